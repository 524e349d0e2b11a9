//! The runtime directory, a host that is there already, and the cache.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::Access;
use strait_client::address::{self, DATA_SOCKET};
use strait_client::{Client, Options};

use super::{Check, Subject};
use crate::cli::directory::{absolute, owned, usual_directory};
use crate::config::Config;

const DIRECTORY: Subject = Subject::new(
    "places",
    "runtime directory",
    "it holds the host's sockets, and its owner and mode decide who can reach them",
);
const HOST: Subject = Subject::new("places", "host", "one host serves a directory at a time");
const CLIENTS: Subject = Subject::new(
    "places",
    "where clients look",
    "clients that name no address find the host by $STRAIT_ADDRESS and the usual places",
);
const CACHE: Subject = Subject::new(
    "places",
    "cache",
    "compiled plugins are kept there; without it each start compiles them anew",
);

/// How long a host may take to greet.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn checks(config: &Config, given: Option<&Path>) -> Vec<Check> {
    let wanted = given
        .map(Path::to_owned)
        .or_else(|| config.server.directory.clone())
        .unwrap_or_else(usual_directory);
    let mut checks = Vec::new();
    match absolute(&wanted) {
        Ok(directory) => {
            let with_group = config.server.socket_group.is_some();
            checks.push(runtime_directory(&directory, with_group));
            checks.push(host(&directory));
            checks.push(clients(&directory, address::directory(None)));
        }
        Err(failure) => checks.push(elsewhere(failure.message())),
    }
    checks.push(cache(config.engine().cache.as_deref()));
    checks
}

fn elsewhere(why: &str) -> Check {
    DIRECTORY.fail(
        why,
        "fix it, or choose another one: --directory DIR or server.directory",
    )
}

fn runtime_directory(directory: &Path, with_group: bool) -> Check {
    if fs::symlink_metadata(directory).is_ok() {
        return match owned(directory, with_group) {
            Ok(()) => {
                let mode = if with_group { "0700 or 0750" } else { "0700" };
                DIRECTORY.ok(format!(
                    "{}, of this user, mode {mode}",
                    directory.display()
                ))
            }
            Err(failure) => elsewhere(failure.message()),
        };
    }
    match creatable(directory) {
        Ok(()) => DIRECTORY.ok(format!(
            "{}, which `serve` will create",
            directory.display()
        )),
        Err(why) => elsewhere(&format!("{} cannot be created: {why}", directory.display())),
    }
}

/// Whether `directory`, which does not exist, could be made with all that leads to it.
fn creatable(directory: &Path) -> Result<(), String> {
    let parent = directory
        .ancestors()
        .skip(1)
        .find(|parent| fs::symlink_metadata(parent).is_ok())
        .ok_or("no directory leads to it")?;
    if !parent.is_dir() {
        return Err(format!("{} is not a directory", parent.display()));
    }
    // Tried: rights alone do not tell of file systems on which nobody makes directories.
    tempfile::Builder::new()
        .prefix(".strait-doctor-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(parent)
        .and_then(tempfile::TempDir::close)
        .map_err(|error| format!("making a directory in {}: {error}", parent.display()))
}

fn host(directory: &Path) -> Check {
    let socket = directory.join(DATA_SOCKET);
    if fs::symlink_metadata(&socket).is_err() {
        return HOST.info(format!("none in {}", directory.display()));
    }
    let (tell, told) = mpsc::channel();
    let at = directory.to_owned();
    let options = Options {
        renew: false,
        name: concat!("strait-doctor/", env!("CARGO_PKG_VERSION")).into(),
        ..Options::default()
    };
    // A thread of its own, since a process that holds the socket and does not answer would keep it.
    let asked = std::thread::Builder::new()
        .name("host".into())
        .spawn(move || {
            let greeted = Client::connect_with(&at, &options)
                .map(|client| client.welcome().host_version.clone())
                .map_err(|error| error.to_string());
            // Nobody waits any more: it took too long.
            let _ = tell.send(greeted);
        });
    if let Err(error) = asked {
        return HOST.warn(
            format!("no thread to ask it: {error}"),
            "a higher limit of threads",
        );
    }
    match told.recv_timeout(PATIENCE) {
        Ok(Ok(version)) => HOST.ok(format!(
            "strait {version} answers in {}",
            directory.display()
        )),
        Ok(Err(error)) => HOST.info(format!(
            "none answers at {} ({error}); `serve` replaces what a dead one left",
            socket.display()
        )),
        Err(_) => HOST.warn(
            format!(
                "what holds {} did not greet within {} s",
                socket.display(),
                PATIENCE.as_secs()
            ),
            "look at the log of the host there, and at its file limit; or take another --directory",
        ),
    }
}

fn clients(directory: &Path, found: Result<std::path::PathBuf, address::AddressError>) -> Check {
    match found {
        Ok(found) if found == directory => CLIENTS.ok(found.display().to_string()),
        Ok(found) => CLIENTS.warn(
            format!(
                "{}, while a host started like this serves {}",
                found.display(),
                directory.display()
            ),
            format!("export STRAIT_ADDRESS=unix://{}", directory.display()),
        ),
        Err(address::AddressError::Nowhere(_)) => {
            CLIENTS.info("nowhere yet: no host runs in the usual places")
        }
        Err(error) => CLIENTS.warn(
            error.to_string(),
            format!("export STRAIT_ADDRESS=unix://{}", directory.display()),
        ),
    }
}

fn cache(directory: Option<&Path>) -> Check {
    let Some(directory) = directory else {
        return CACHE.warn(
            "none: engine.cache is empty, or there is neither $XDG_CACHE_HOME nor $HOME",
            "engine.cache = \"/var/cache/strait\" (systemd: CacheDirectory=strait)",
        );
    };
    let shown = directory.display();
    let wrong = |why: String| {
        CACHE.warn(
            format!("{shown} is not used: {why}"),
            format!("chown and chmod 700 {shown}, or engine.cache = a directory of this user"),
        )
    };
    let Ok(found) = fs::symlink_metadata(directory) else {
        return match creatable(directory) {
            Ok(()) => CACHE.ok(format!("{shown}, which the first start will create")),
            Err(why) => CACHE.warn(
                format!("{shown} cannot be created: {why}"),
                "engine.cache = a directory of this user (systemd: CacheDirectory=strait)",
            ),
        };
    };
    let uid = rustix::process::geteuid().as_raw();
    if !found.is_dir() {
        wrong("not a directory".to_owned())
    } else if found.uid() != uid {
        wrong(format!(
            "it belongs to uid {}, not to uid {uid}",
            found.uid()
        ))
    } else if found.mode() & 0o022 != 0 {
        wrong(format!(
            "others can write to it (mode {:04o})",
            found.mode() & 0o7777
        ))
    } else if let Err(error) = rustix::fs::access(directory, Access::WRITE_OK) {
        CACHE.warn(
            format!("{shown} is only read: {error}"),
            "a file system that can be written to, or another engine.cache",
        )
    } else {
        CACHE.ok(shown.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::Status;
    use super::*;

    fn temporary() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    }

    #[test]
    fn a_directory_is_there_or_can_be_made_and_is_not_made() {
        let place = temporary();
        let path = place.path().join("a/b");
        let check = runtime_directory(&path, false);
        assert!(check.found.contains("will create"), "{check:?}");
        assert!(!place.path().join("a").exists());

        fs::create_dir_all(&path).expect("it can be made");
        chmod(&path, 0o755);
        let check = runtime_directory(&path, false);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("0755"), "{check:?}");
        chmod(&path, 0o700);
        assert_eq!(runtime_directory(&path, false).status, Status::Ok);

        let file = place.path().join("file");
        fs::write(&file, "").expect("it can be made");
        assert_eq!(runtime_directory(&file, false).status, Status::Fail);
        let below = runtime_directory(&file.join("below"), false);
        assert!(below.found.contains("is not a directory"), "{below:?}");
        assert_eq!(
            runtime_directory(Path::new("/proc/strait/x"), false).status,
            Status::Fail
        );
    }

    #[test]
    fn a_cache_that_others_can_write_to_is_not_used() {
        let place = temporary();
        chmod(place.path(), 0o777);
        let check = cache(Some(place.path()));
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.contains("0777"), "{check:?}");
        chmod(place.path(), 0o700);
        assert_eq!(cache(Some(place.path())).status, Status::Ok);
        let check = cache(Some(Path::new("/proc/strait/cache")));
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.contains("cannot be created"), "{check:?}");
        let check = cache(Some(&place.path().join("new/strait")));
        assert!(check.found.contains("will create"), "{check:?}");
        assert!(!place.path().join("new").exists());
        assert_eq!(cache(None).status, Status::Warn);
    }

    #[test]
    fn what_a_dead_host_left_is_no_host() {
        let place = temporary();
        assert!(host(place.path()).found.starts_with("none in"));
        let path = place.path().join(DATA_SOCKET);
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
        let check = host(place.path());
        assert_eq!(check.status, Status::Info);
        assert!(check.found.contains("none answers"), "{check:?}");
    }

    #[test]
    fn clients_must_look_where_the_host_is() {
        let here = Path::new("/run/strait");
        assert_eq!(clients(here, Ok(here.into())).status, Status::Ok);
        let check = clients(here, Ok("/tmp/x".into()));
        assert_eq!(
            check.change.as_deref(),
            Some("export STRAIT_ADDRESS=unix:///run/strait")
        );
        let nowhere = address::AddressError::Nowhere(Vec::new());
        assert_eq!(clients(here, Err(nowhere)).status, Status::Info);
        let wrong = address::AddressError::Form("x".into());
        assert_eq!(clients(here, Err(wrong)).status, Status::Warn);
    }
}
