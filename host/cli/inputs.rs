//! Files with tensors that commands read, stdin among them.

use std::fs::File;
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::OnceLock;

use strait_tensor::{Format, TensorFile};

use super::failure::Failure;
use super::progress::Progress;
use super::staging::STREAM;

/// A file that is open, and what had to be copied before it could be read.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: TensorFile,
    pub(super) copied_bytes: u64,
}

/// Opens a file, or the Arrow IPC stream on stdin for `-`: as often as it is asked for.
pub(super) fn open(path: &Path) -> Result<Opened, Failure> {
    if path != Path::new(STREAM) {
        return Ok(Opened {
            file: TensorFile::open(path)?,
            copied_bytes: 0,
        });
    }
    static STDIN: OnceLock<File> = OnceLock::new();
    let failed =
        |error: io::Error| Failure::file(&error, format!("stdin: cannot read it: {error}"));
    let (stdin, copied_bytes) = match STDIN.get() {
        Some(stdin) => (stdin, 0),
        None => {
            let (stdin, copied_bytes) = read_stdin()?;
            (STDIN.get_or_init(|| stdin), copied_bytes)
        }
    };
    let file = stdin.try_clone().map_err(failed)?;
    Ok(Opened {
        file: TensorFile::of(Path::new("stdin"), file, Format::Arrow)?,
        copied_bytes,
    })
}

/// Stdin as a file that can be read from any place: a stream says at its end how long its tensors are. What is no file
/// is copied into one without a name, in the directory for temporary files.
fn read_stdin() -> Result<(File, u64), Failure> {
    let failed =
        |error: io::Error| Failure::file(&error, format!("stdin: cannot read it: {error}"));
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(Failure::usage(
            "`-` reads an Arrow stream from stdin, which is a terminal; send it a file or a program's output",
        ));
    }
    let mut stdin = File::from(stdin.as_fd().try_clone_to_owned().map_err(failed)?);
    if stdin.metadata().map_err(failed)?.is_file()
        && stdin.stream_position().is_ok_and(|at| at == 0)
    {
        return Ok((stdin, 0));
    }
    let _bar = Progress::waiting("reading stdin");
    let mut file = tempfile::tempfile().map_err(failed)?;
    let copied_bytes = io::copy(&mut stdin, &mut file).map_err(|error| {
        let place = std::env::temp_dir();
        let message = format!(
            "stdin: cannot copy it into a file in {}: {error}; TMPDIR names another place",
            place.display()
        );
        Failure::file(&error, message)
    })?;
    Ok((file, copied_bytes))
}
