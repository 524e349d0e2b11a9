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

/// A Linux group whose members reach a host's sockets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group(u32);

impl Group {
    /// By name, as `/etc/group` has it, or by number.
    pub(super) fn find(text: &str) -> Result<Self, Failure> {
        if let Ok(number) = text.parse() {
            return Ok(Self(number));
        }
        let known = fs::read_to_string("/etc/group").unwrap_or_default();
        let mut lines = known.lines().map(|line| line.split(':'));
        let found = lines.find_map(|mut line| match line.next() {
            Some(name) if name == text => line.nth(1)?.parse().ok(),
            _ => None,
        });
        found.map(Self).ok_or_else(|| {
            let what = format!(
                "server.socket_group: /etc/group has no group `{}`; one that is kept elsewhere is given by its number",
                crate::text::name(text)
            );
            Failure::input("BAD_SETTING", what)
        })
    }

    /// Lets its members use what is at `path`.
    pub(super) fn let_in(self, path: &Path, mode: u32) -> Result<(), Failure> {
        let changed = std::os::unix::fs::chown(path, None, Some(self.0))
            .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)));
        changed.map_err(|error| {
            let what = format!(
                "cannot be given to group {} ({error}); the host's user must be one of its members, or root",
                self.0
            );
            wrong_directory(path, &what)
        })
    }
}

/// Mode of a directory that one user alone, or a group as well, gets into.
const OWN: u32 = 0o700;
const OF_A_GROUP: u32 = 0o750;

/// The directory as an absolute path: created, or found to be this user's alone, and then opened for `group`.
pub(super) fn prepare(directory: &Path, group: Option<Group>) -> Result<PathBuf, Failure> {
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
    owned(&directory, group.is_some())?;
    if let Some(group) = group {
        group.let_in(&directory, OF_A_GROUP)?;
    }
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

/// Refuses what is not a directory of this user alone, or else only of a group that a host of it serves.
pub(super) fn owned(directory: &Path, with_group: bool) -> Result<(), Failure> {
    match with_group {
        true => has_mode(directory, &[OWN, OF_A_GROUP]),
        false => has_mode(directory, &[OWN]),
    }
}

/// Refuses what is not a directory of this user with one of these modes.
fn has_mode(directory: &Path, modes: &[u32]) -> Result<(), Failure> {
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
    if !modes.contains(&mode) {
        return Err(wrong(format!(
            "its mode is {mode:04o}, which lets others in or keeps its owner out; it must be 0700 (0750 with server.socket_group): chmod 700 {}",
            directory.display()
        )));
    }
    Ok(())
}
