//! The directory that a host serves: where it is, and that it is this user's alone.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::failure::Failure;

/// The name of the Flight service's socket in it.
pub(super) const FLIGHT_SOCKET: &str = "flight.sock";
/// Longest path that a unix socket's address has room for, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Default runtime directory.
pub(super) fn usual_directory() -> PathBuf {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let uid = rustix::process::geteuid().as_raw();
    set("RUNTIME_DIRECTORY")
        .or_else(|| set("XDG_RUNTIME_DIR").map(|directory| directory.join("strait")))
        .or_else(|| (uid == 0).then(|| "/run/strait".into()))
        .unwrap_or_else(|| format!("/tmp/strait-{uid}").into())
}

/// The directory as an absolute path: created, or found to be this user's alone.
pub(super) fn prepare(directory: &Path) -> Result<PathBuf, Failure> {
    let directory = absolute(directory)?;
    match DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
    {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => {
            return Err(wrong_directory(
                &directory,
                &format!("cannot create it: {e}"),
            ));
        }
    }
    owned(&directory)?;
    Ok(directory)
}

/// A new directory of this user alone, removed with what is in it when it is dropped.
pub(super) fn temporary() -> Result<TempDir, Failure> {
    let place = std::env::temp_dir();
    tempfile::Builder::new()
        .prefix("strait-host-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(&place)
        .map_err(|error| {
            let what = format!("cannot make a directory in it: {error}; set TMPDIR to another one");
            wrong_directory(&place, &what)
        })
}

fn wrong_directory(directory: &Path, what: &str) -> Failure {
    Failure::input("BAD_DIRECTORY", format!("{}: {what}", directory.display()))
}

/// The directory as an absolute path that leaves room for the sockets' names.
pub(super) fn absolute(directory: &Path) -> Result<PathBuf, Failure> {
    let absolute = std::path::absolute(directory)
        .map_err(|e| wrong_directory(directory, &format!("not a directory's path: {e}")))?;
    let longest = absolute.join(FLIGHT_SOCKET);
    if longest.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(wrong_directory(
            directory,
            &format!(
                "with {FLIGHT_SOCKET} the path has {} bytes, and a socket's path at most {SOCKET_PATH_BYTES_MAX}; take a shorter one",
                longest.as_os_str().len()
            ),
        ));
    }
    Ok(absolute)
}

/// Refuses what is not a directory of this user alone.
pub(super) fn owned(directory: &Path) -> Result<(), Failure> {
    let wrong = |what: String| wrong_directory(directory, &what);
    // Not `metadata`: a link could be turned to another place after this check.
    let found =
        fs::symlink_metadata(directory).map_err(|e| wrong(format!("cannot look at it: {e}")))?;
    let uid = rustix::process::geteuid().as_raw();
    if !found.is_dir() {
        return Err(wrong("not a directory; take another path".to_owned()));
    }
    if found.uid() != uid {
        return Err(wrong(format!(
            "it belongs to uid {}, and this host runs as uid {uid}; take another one",
            found.uid()
        )));
    }
    let mode = found.permissions().mode() & 0o777;
    if mode != 0o700 {
        return Err(wrong(format!(
            "its mode is {mode:04o}, which lets others in or keeps its owner out; it must be 0700: chmod 700 {}",
            directory.display()
        )));
    }
    Ok(())
}
