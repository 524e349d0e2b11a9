//! Output files that appear complete, all of them or none, and leave nothing behind.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use strait_tensor::TensorSpec;
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;

/// Directories to remove when a signal ends the process.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn live() -> MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Files on their way; dropping it unfinished removes them.
#[derive(Debug, Default)]
pub(super) struct Staging(Vec<Staged>);

#[derive(Debug)]
struct Staged {
    /// Beside the target, hence on the same file system, so that a rename is enough.
    directory: PathBuf,
    file: PathBuf,
    target: PathBuf,
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
                let message = format!(
                    "{path}: the extension says the format; known are .npy, .arrow and .feather"
                );
                return Err(Failure::input("BAD_FILE", message));
            }
        };
        if target.is_dir() {
            return Err(Failure::input(
                "BAD_FILE",
                format!("{}: this is a directory; name a file", target.display()),
            ));
        }
        if self.0.iter().any(|staged| staged.target == target) {
            return Err(Failure::input(
                "BAD_FILE",
                format!("{}: two outputs go there", target.display()),
            ));
        }
        let number = self.0.len();
        let directory = target.with_file_name(format!(".strait-{}-{number}", std::process::id()));
        // Registered first, so that no signal comes between.
        live().push(directory.clone());
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|error| {
                live().retain(|d| *d != directory);
                Failure::file(
                    &error,
                    format!("{}: cannot write beside it: {error}", target.display()),
                )
            })?;
        let file = directory.join(name);
        self.0.push(Staged {
            directory,
            file,
            target: target.to_owned(),
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
            _ => super::tensors::write_columns(file, tensors),
        };
        written.map_err(|failure| {
            failure.about(&file.display().to_string(), &target.display().to_string())
        })
    }

    /// Moves all files to where they belong, over what is there.
    pub(super) fn finish(self) -> Result<(), Failure> {
        for Staged { file, target, .. } in &self.0 {
            fs::rename(file, target).map_err(|error| {
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
        for directory in live().iter() {
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
