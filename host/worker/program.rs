//! The program that workers and compilers run.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use strait_memory::FrameSocket;

use super::log;

/// What workers and compilers run.
#[derive(Debug)]
pub(super) struct Program {
    /// Opened once: an upgrade in its place changes nothing for this host.
    pub(super) file: File,
    pub(super) arguments: Vec<String>,
}

impl Program {
    /// That file; none: the program that this process runs.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn open(path: Option<&Path>, arguments: Vec<String>) -> io::Result<Self> {
        let path = path.unwrap_or(Path::new("/proc/self/exe"));
        let file = File::open(path).map_err(|error| {
            let path = path.display();
            io::Error::new(
                error.kind(),
                format!("the program of workers, {path}: {error}"),
            )
        })?;
        Ok(Self { file, arguments })
    }

    /// A process of it with that socket, and nothing else of the host's. What it writes on stderr is told in the log with `name`.
    ///
    /// # Errors
    /// Linux gives none.
    pub(super) fn spawn(&self, socket: FrameSocket, name: &str) -> io::Result<Child> {
        let mut child = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .arg0("strait-worker")
            .args(&self.arguments)
            .env_clear()
            // What the terminal sends to the host is the host's to tell.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let relayed = match child.stderr.take() {
            Some(stderr) => log::relay(name, stderr),
            None => Ok(()),
        };
        if let Err(error) = relayed {
            // It has not begun.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(child)
    }
}
