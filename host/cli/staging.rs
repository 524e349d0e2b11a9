//! Output files that appear complete, all of them or none, and leave nothing behind.

use std::fs::{self, Permissions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, MutexGuard};
use strait_tensor::{FileError, Format, NamedTensor, write_stream, write_tensors};
use tokio::signal::unix::{SignalKind, signal};

use super::failure::Failure;

/// Directories to remove when a signal ends the process.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn live() -> MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock()
}

/// What stands for stdout, and among inputs for stdin: an Arrow IPC stream.
pub(super) const STREAM: &str = "-";

/// Files on their way; dropping it unfinished removes them.
#[derive(Debug, Default)]
pub(super) struct Staging(Vec<Target>);

#[derive(Debug)]
enum Target {
    File(Staged),
    Stdout,
}

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

/// Both want stdout.
pub(super) fn json_and_stream() -> Failure {
    Failure::usage("--json and an output to `-` both go to stdout; choose one")
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
    /// Makes room for an output at `target`, and answers its index: that of an earlier output if the file holds several.
    /// Called before the work is done, so that a path that cannot be written costs no run.
    pub(super) fn add(&mut self, target: &Path) -> Result<usize, Failure> {
        let shown = target.display();
        if target == Path::new(STREAM) {
            return self.add_stdout();
        }
        let (name, format) = match (target.file_name(), Format::of(target)) {
            (Some(name), Some(format)) => (name, format),
            _ => {
                let message = format!(
                    "{shown}: the extension must say the format: {}",
                    Format::EXTENSIONS
                );
                return Err(Failure::input("BAD_FILE", message));
            }
        };
        let real = behind_links(target)?;
        let is_there = |there: &Target| matches!(there, Target::File(file) if file.real == real);
        if let Some(index) = self.0.iter().position(is_there) {
            if format.holds_several() {
                return Ok(index);
            }
            let message = format!("{shown}: two outputs go there, and .npy holds one; write .npz");
            return Err(Failure::input("BAD_FILE", message));
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
        self.0.push(Target::File(Staged {
            directory,
            file,
            target: target.to_owned(),
            real,
        }));
        Ok(self.0.len() - 1)
    }

    fn add_stdout(&mut self) -> Result<usize, Failure> {
        if let Some(index) = (0..self.0.len()).find(|&index| self.is_stdout(index)) {
            return Ok(index);
        }
        if io::stdout().is_terminal() {
            return Err(Failure::usage(
                "`-` writes an Arrow stream to stdout, which is a terminal; send it to a file or a program",
            ));
        }
        self.0.push(Target::Stdout);
        Ok(self.0.len() - 1)
    }

    /// Whether an output goes to stdout.
    pub(super) fn has_stdout(&self) -> bool {
        (0..self.0.len()).any(|index| self.is_stdout(index))
    }

    /// Whether the `index`th target is stdout.
    pub(super) fn is_stdout(&self, index: usize) -> bool {
        matches!(self.0[index], Target::Stdout)
    }

    /// Writes the tensors of the `index`th target. What goes to stdout is on its way at once.
    pub(super) fn write(&self, index: usize, tensors: &[NamedTensor<'_>]) -> Result<(), Failure> {
        match &self.0[index] {
            Target::File(Staged { file, target, .. }) => {
                let (temporary, target) = (file.display().to_string(), target.display());
                write_tensors(file, tensors)
                    .map_err(|error| Failure::from(error).about(&temporary, &target.to_string()))
            }
            Target::Stdout => {
                let stdout = io::stdout().lock();
                write_stream(Path::new("stdout"), stdout, tensors).map_err(|error| match error {
                    FileError::Io { error, .. } => Failure::stdout(&error),
                    error => error.into(),
                })
            }
        }
    }

    /// Moves all files to where they belong, over what is there.
    pub(super) fn finish(self) -> Result<(), Failure> {
        for target in &self.0 {
            let Target::File(Staged {
                file, target, real, ..
            }) = target
            else {
                continue;
            };
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
    use strait_tensor::{Dtype, TensorSpec};

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

    fn tensor<'a>(name: &'a str, spec: &'a TensorSpec, bytes: &'a [u8]) -> NamedTensor<'a> {
        NamedTensor { name, spec, bytes }
    }

    #[test]
    fn a_file_that_holds_several_takes_several_outputs() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| directory.path().join(name);
        let mut staging = Staging::default();
        for (name, index) in [
            ("a.safetensors", 0),
            ("b.npz", 1),
            ("./a.safetensors", 0),
            ("b.npz", 1),
        ] {
            assert_eq!(staging.add(&at(name)).expect("it can be written"), index);
        }
        drop(staging);
        assert!(entries(directory.path()).is_empty());
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
            .write(0, &[tensor("a", &spec, &[1, 2, 3])])
            .expect("it can be written");
        assert!(!at("a.npy").exists());
        drop(staging);
        assert!(entries(directory.path()).is_empty());

        let mut staging = Staging::default();
        staging.add(&at("a.npy")).expect("it can be written");
        staging
            .write(0, &[tensor("a", &spec, &[1, 2, 3])])
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
            .write(0, &[tensor("x", &spec, &[7])])
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
