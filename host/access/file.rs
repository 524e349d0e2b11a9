//! Files that decide who is let in: read only if nobody else can have written them, replaced in one step.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Longest of them in bytes.
const BYTES_MAX: u64 = 16 << 20;
/// Mode bits by which a group or others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Set for a directory in which one removes one's own files only.
const STICKY: u32 = 0o1000;

/// Which version of a file that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    file: (u64, u64),
    bytes: u64,
    written: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(found: &fs::Metadata) -> Self {
        Self {
            file: (found.dev(), found.ino()),
            bytes: found.size(),
            written: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Of what lies there now. None: nothing that could be read.
    #[must_use]
    pub fn now(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|found| Self::of(&found))
    }
}

/// Why such a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Linux says so.
    #[error("{path}: cannot {doing} it: {source}", path = path.display())]
    System {
        /// The file.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Somebody else can have written it, or put another in its place.
    #[error("{path}: {what}", path = path.display())]
    Unsafe {
        /// The file or its directory.
        path: PathBuf,
        /// Who, and what to do.
        what: String,
    },
    /// What is in it is wrong.
    #[error("{path}: {what}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl FileError {
    fn system(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::System {
            path,
            doing,
            source,
        }
    }

    /// Whether there is no such file.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What is in a file, and which version that is.
///
/// # Errors
/// [`FileError`]; also for a file that others than its host and root can write to or replace.
pub fn read(path: &Path) -> Result<(String, Stamp), FileError> {
    let mut options = OpenOptions::new();
    // A pipe without a writer would be waited for.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    options.read(true).custom_flags(nonblocking);
    let file = options
        .open(path)
        .map_err(FileError::system(path, "open"))?;
    let found = file
        .metadata()
        .map_err(FileError::system(path, "look at"))?;
    if !found.is_file() {
        return Err(FileError::Content {
            path: path.to_owned(),
            what: "it is not a file".to_owned(),
        });
    }
    check(path, &found, false)?;
    // Where a link leads, or the file could be replaced there.
    let place = fs::canonicalize(path).map_err(FileError::system(path, "find"))?;
    let directory = directory(&place);
    let around = fs::metadata(directory).map_err(FileError::system(directory, "look at"))?;
    check(directory, &around, true)?;
    let mut text = String::new();
    file.take(BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(FileError::system(path, "read"))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(FileError::Content {
            path: path.to_owned(),
            what: format!("it has more than {BYTES_MAX} bytes"),
        });
    }
    Ok((text, Stamp::of(&found)))
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// That only root and this user can write to it.
fn check(path: &Path, found: &fs::Metadata, is_directory: bool) -> Result<(), FileError> {
    let refused = |what: String| {
        Err(FileError::Unsafe {
            path: path.to_owned(),
            what,
        })
    };
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own && found.uid() != 0 {
        return refused(format!(
            "it belongs to uid {}, who could change who is let in; it must belong to uid {own} or root",
            found.uid()
        ));
    }
    let mode = found.permissions().mode();
    let is_guarded = is_directory && mode & STICKY != 0;
    if mode & WRITABLE_BY_OTHERS != 0 && !is_guarded {
        return refused(format!(
            "its mode is {:04o}, so that others can change who is let in: chmod go-w {}",
            mode & 0o7777,
            path.display()
        ));
    }
    Ok(())
}

/// Puts `text` in the place of a file, which is whole at each moment, with mode 0600.
///
/// # Errors
/// [`FileError::System`]; then the file is as it was.
pub fn replace(path: &Path, text: &str) -> Result<(), FileError> {
    let directory = directory(path);
    let failed = |doing| FileError::system(path, doing);
    // The temporary file has that mode from its first moment on.
    let mut file = tempfile::Builder::new()
        .prefix(".strait-")
        .permissions(fs::Permissions::from_mode(0o600))
        .tempfile_in(directory)
        .map_err(failed("write beside"))?;
    file.write_all(text.as_bytes()).map_err(failed("write"))?;
    file.as_file().sync_all().map_err(failed("write"))?;
    file.persist(path)
        .map_err(|error| failed("replace")(error.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync the directory of"))
}

/// Nobody else changes files of that directory in this way until it is dropped.
#[derive(Debug)]
pub struct Turn {
    // Linux ends the lock with it.
    _directory: File,
}

impl Turn {
    /// Waits until nobody else does.
    ///
    /// # Errors
    /// [`FileError::System`].
    pub fn wait(path: &Path) -> Result<Self, FileError> {
        let place = directory(path);
        let opened = File::open(place).map_err(FileError::system(place, "open"))?;
        rustix::fs::flock(&opened, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|error| FileError::system(place, "lock")(error.into()))?;
        Ok(Self { _directory: opened })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }

    #[test]
    fn what_others_can_write_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("f");
        assert!(read(&path).expect_err("missing").is_missing());
        replace(&path, "one").expect("written");
        let (text, first) = read(&path).expect("read");
        assert_eq!(text, "one");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        replace(&path, "two").expect("written");
        assert_ne!(Stamp::now(&path).expect("there"), first);
        for mode in [0o620, 0o602, 0o666] {
            chmod(&path, mode);
            let refused = read(&path).expect_err("writable").to_string();
            assert!(refused.contains("chmod go-w"), "{refused}");
        }
        chmod(&path, 0o644);
        chmod(directory.path(), 0o777);
        let refused = read(&path).expect_err("replaceable").to_string();
        assert!(refused.contains("0777"), "{refused}");
        chmod(directory.path(), 0o1777);
        assert_eq!(read(&path).expect("sticky").0, "two");
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);
    }

    #[test]
    fn what_is_not_a_file_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .expect("a pipe");
        let refused = read(&path).expect_err("a pipe").to_string();
        assert!(refused.contains("not a file"), "{refused}");
    }
}
