//! Output files that appear complete, all of them or none, and leave nothing behind.

use std::fs::{self, File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, MutexGuard};
use strait_tensor::{Column, FileLayout, TensorSpec};
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;

/// Directories to remove when a signal ends the process.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn live() -> MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock()
}

/// Files on their way; dropping it unfinished removes them.
#[derive(Debug, Default)]
pub(super) struct Staging(Vec<Staged>);

#[derive(Debug)]
struct Staged {
    /// Beside the target, hence on the same file system, so that a rename is enough.
    directory: PathBuf,
    file: PathBuf,
    /// As the caller named it.
    target: PathBuf,
    /// Where that is: behind links.
    real: PathBuf,
}

/// Where a file to be written at `target` goes: a link there stays, and what it leads to is replaced.
fn behind_links(target: &Path) -> Result<PathBuf, Failure> {
    let refused = |what: &str| Failure::input("BAD_FILE", format!("{}: {what}", target.display()));
    match fs::metadata(target) {
        Ok(there) if there.is_dir() => Err(refused("this is a directory; name a file")),
        Ok(there) if !there.is_file() => Err(refused(
            "this is a pipe, socket or device, which would be replaced; name a file",
        )),
        Ok(_) => fs::canonicalize(target)
            .map_err(|error| Failure::file(&error, format!("{}: {error}", target.display()))),
        Err(_) if fs::symlink_metadata(target).is_ok_and(|there| there.is_symlink()) => Err(
            refused("this is a link that leads nowhere; remove it or name what it should lead to"),
        ),
        // A directory that is not there is told when something is made in it.
        Err(_) => Ok(target
            .parent()
            .map(|parent| {
                if parent.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    parent
                }
            })
            .and_then(|parent| fs::canonicalize(parent).ok())
            .zip(target.file_name())
            .map_or_else(|| target.to_owned(), |(parent, name)| parent.join(name))),
    }
}

impl Staging {
    /// Makes room for an output at `target`. Called before the work is done, so that a path that
    /// cannot be written costs no run.
    pub(super) fn add(&mut self, target: &Path) -> Result<(), Failure> {
        let extension = target.extension().map(|e| e.to_ascii_lowercase());
        let known = matches!(
            extension.as_deref().and_then(|e| e.to_str()),
            Some("npy" | "arrow" | "feather")
        );
        let name = match target.file_name() {
            Some(name) if known => name,
            _ => {
                let path = target.display();
                let message =
                    format!("{path}: the extension must say the format: .npy, .arrow or .feather");
                return Err(Failure::input("BAD_FILE", message));
            }
        };
        let real = behind_links(target)?;
        if self.0.iter().any(|staged| staged.real == real) {
            return Err(Failure::input(
                "BAD_FILE",
                format!("{}: two outputs go there", target.display()),
            ));
        }
        let directory = {
            // Whoever handles a signal waits until it is registered.
            let mut live = live();
            let made = tempfile::Builder::new()
                .prefix(".strait-")
                .permissions(Permissions::from_mode(0o700))
                .tempdir_in(real.with_file_name(""));
            let directory = made
                .map_err(|error| {
                    Failure::file(
                        &error,
                        format!("{}: cannot write beside it: {error}", target.display()),
                    )
                })?
                .keep();
            live.push(directory.clone());
            directory
        };
        let file = directory.join(name);
        self.0.push(Staged {
            directory,
            file,
            target: target.to_owned(),
            real,
        });
        Ok(())
    }

    /// Writes the tensors of the `index`th file; `.npy` holds one.
    pub(super) fn write(
        &self,
        index: usize,
        tensors: &[(&str, TensorSpec, &[u8])],
    ) -> Result<(), Failure> {
        let Staged { file, target, .. } = &self.0[index];
        let written = match tensors {
            [(name, spec, bytes)] => {
                strait_tensor::write(file, name, spec, bytes).map_err(Failure::from)
            }
            _ => write_columns(file, tensors),
        };
        written.map_err(|failure| {
            failure.about(&file.display().to_string(), &target.display().to_string())
        })
    }

    /// Moves all files to where they belong, over what is there.
    pub(super) fn finish(self) -> Result<(), Failure> {
        for Staged {
            file, target, real, ..
        } in &self.0
        {
            fs::rename(file, real).map_err(|error| {
                Failure::file(
                    &error,
                    format!(
                        "{}: cannot move the finished file there: {error}",
                        target.display()
                    ),
                )
            })?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Whoever asked has the error that led here, if there was one.
        let _ = fs::remove_dir_all(&self.directory);
        live().retain(|directory| *directory != self.directory);
    }
}

/// Several tensors as the columns of one Arrow IPC file.
fn write_columns(path: &Path, tensors: &[(&str, TensorSpec, &[u8])]) -> Result<(), Failure> {
    let columns: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, spec, _)| Column::new(*name, spec.clone()))
        .collect();
    let layout = columns
        .and_then(|columns| FileLayout::plan(&columns))
        .map_err(|error| Failure::input("BAD_TENSOR", error.to_string()))?;
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(&layout.header)?;
        for (place, (_, _, bytes)) in layout.tensors.iter().zip(tensors) {
            file.seek(SeekFrom::Start(place.offset))?;
            file.write_all(bytes)?;
        }
        file.seek(SeekFrom::Start(layout.footer_offset))?;
        file.write_all(&layout.footer)
    };
    write().map_err(|error| {
        Failure::file(
            &error,
            format!("{}: cannot write it: {error}", path.display()),
        )
    })
}

/// From now on SIGINT and SIGTERM remove what is staged before they end the process.
pub(super) fn watch_signals() -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::other("SIGNALS", format!("cannot watch for signals: {error}"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let guard = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    drop(guard);
    let watch = move || {
        let number = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
            }
        });
        // Held to the end: none is made any more.
        let live = live();
        for directory in live.iter() {
            let _ = fs::remove_dir_all(directory);
        }
        std::process::exit(128 + number.as_raw_value());
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(watch)
        .map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use strait_tensor::Dtype;

    fn entries(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("a temporary directory");
        let mut names: Vec<String> = entries
            .map(|e| {
                e.expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    #[test]
    fn files_appear_together_or_not_at_all() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        let spec = TensorSpec {
            dtype: Dtype::Uint8,
            shape: vec![3],
        };
        let mut staging = Staging::default();
        staging.add(&at("a.npy")).expect("it can be written");
        staging.add(&at("b.arrow")).expect("it can be written");
        staging
            .write(0, &[("a", spec.clone(), &[1, 2, 3])])
            .expect("it can be written");
        assert!(!at("a.npy").exists());
        drop(staging);
        assert!(entries(directory.path()).is_empty());

        let mut staging = Staging::default();
        staging.add(&at("a.npy")).expect("it can be written");
        staging
            .write(0, &[("a", spec, &[1, 2, 3])])
            .expect("it can be written");
        staging.finish().expect("it can be moved");
        assert_eq!(entries(directory.path()), ["a.npy"]);
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_replaced() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("elsewhere")).expect("a directory");
        fs::write(at("elsewhere/old.npy"), "old").expect("it can be written");
        std::os::unix::fs::symlink("elsewhere/old.npy", at("link.npy")).expect("a link");
        std::os::unix::fs::symlink("nowhere.npy", at("broken.npy")).expect("a link");
        std::os::unix::fs::symlink("/dev/null", at("null.npy")).expect("a link");
        let spec = TensorSpec {
            dtype: Dtype::Uint8,
            shape: vec![1],
        };
        let mut staging = Staging::default();
        staging.add(&at("link.npy")).expect("it can be written");
        for (again, says) in [
            ("elsewhere/old.npy", "two outputs go there"),
            ("elsewhere/../link.npy", "two outputs go there"),
            ("broken.npy", "a link that leads nowhere"),
            ("null.npy", "a pipe, socket or device"),
            ("elsewhere", "the extension must say the format"),
        ] {
            let text = staging.add(&at(again)).expect_err("refused").to_string();
            assert!(text.contains(says) && text.contains(again), "{text}");
        }
        staging
            .write(0, &[("x", spec, &[7])])
            .expect("it can be written");
        staging.finish().expect("it can be moved");
        assert!(fs::symlink_metadata(at("link.npy")).is_ok_and(|there| there.is_symlink()));
        assert!(fs::read(at("elsewhere/old.npy")).is_ok_and(|bytes| bytes.ends_with(&[7])));
        assert_eq!(entries(&at("elsewhere")), ["old.npy"]);
        let mut staging = Staging::default();
        staging.add(&at("new.npy")).expect("it can be written");
        staging
            .add(&at("elsewhere/../new.npy"))
            .expect_err("the same");
    }

    #[test]
    fn paths_that_cannot_be_written_are_refused_at_once() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for name in ["a.txt", "noext", "missing/a.npy"] {
            let refused = Staging::default().add(&directory.path().join(name));
            let text = refused.expect_err("refused").to_string();
            assert!(text.contains(name) && text.contains("BAD_FILE"), "{text}");
        }
        assert!(entries(directory.path()).is_empty());
    }
}
