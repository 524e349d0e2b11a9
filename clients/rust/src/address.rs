//! Finding the host: from an address or the environment to the directory of `data.sock`.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub use crate::wire::DATA_SOCKET;

/// An address that does not lead to a host's directory.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// Not of the form that this client can use.
    #[error(
        "address {0:?} is not of the form unix:///DIRECTORY (an absolute path); \
         this client reaches hosts on the same machine only"
    )]
    Form(String),
    /// `/tmp/strait-UID` could have been planted by somebody else.
    #[error(
        "{path} belongs to uid {owner} with mode {mode:04o}; a host's directory there belongs to \
         uid {uid} and only it can write to it: remove it, or name the host's directory by an address"
    )]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Its permission bits.
        mode: u32,
        /// This process's user.
        uid: u32,
    },
    /// None of the usual places has a data socket.
    #[error(
        "no host found: none of {} exists; start one with `strait serve`, or name its directory \
         by an address (unix:///DIRECTORY) or in STRAIT_ADDRESS",
        list(.0)
    )]
    Nowhere(Vec<PathBuf>),
}

fn list(sockets: &[PathBuf]) -> String {
    let names: Vec<String> = sockets
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(", ")
}

/// The runtime directory of the host that `address` names, or without one of the host that this
/// process's environment leads to: `$STRAIT_ADDRESS` alone if it is set; else the first of
/// `$RUNTIME_DIRECTORY`, `$XDG_RUNTIME_DIR/strait`, `/run/strait` (as root) and
/// `/tmp/strait-UID` that has a `data.sock`.
///
/// # Errors
/// [`AddressError`].
pub fn directory(address: Option<&str>) -> Result<PathBuf, AddressError> {
    let uid = rustix::process::geteuid().as_raw();
    find(address, &|name| std::env::var_os(name), uid)
}

fn find(
    address: Option<&str>,
    environment: &dyn Fn(&str) -> Option<OsString>,
    uid: u32,
) -> Result<PathBuf, AddressError> {
    let set = |name| environment(name).filter(|value| !value.is_empty());
    if let Some(address) = address {
        return parse(address);
    }
    if let Some(address) = set("STRAIT_ADDRESS") {
        return parse(&address.to_string_lossy());
    }
    let mut places: Vec<PathBuf> = Vec::new();
    places.extend(set("RUNTIME_DIRECTORY").map(PathBuf::from));
    places.extend(set("XDG_RUNTIME_DIR").map(|directory| Path::new(&directory).join("strait")));
    if uid == 0 {
        places.push("/run/strait".into());
    }
    // The one place that anybody can create, hence the check of its owner.
    let shared = PathBuf::from(format!("/tmp/strait-{uid}"));
    for place in &places {
        if place.join(DATA_SOCKET).exists() {
            return Ok(place.clone());
        }
    }
    if shared.join(DATA_SOCKET).exists() {
        return owned(shared, uid);
    }
    places.push(shared);
    Err(AddressError::Nowhere(
        places.iter().map(|place| place.join(DATA_SOCKET)).collect(),
    ))
}

fn parse(address: &str) -> Result<PathBuf, AddressError> {
    match address.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(AddressError::Form(address.to_owned())),
    }
}

fn owned(directory: PathBuf, uid: u32) -> Result<PathBuf, AddressError> {
    // Not `metadata`: a link would answer with the owner of its target.
    let found = |data: std::fs::Metadata| (data.uid(), data.mode() & 0o7777, data.is_dir());
    let looked: io::Result<_> = std::fs::symlink_metadata(&directory).map(found);
    match looked {
        Ok((owner, mode, true)) if owner == uid && mode & 0o022 == 0 => Ok(directory),
        Ok((owner, mode, _)) => Err(AddressError::Owner {
            path: directory,
            owner,
            mode,
            uid,
        }),
        Err(_) => Err(AddressError::Nowhere(vec![directory.join(DATA_SOCKET)])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(parent: &Path, name: &str) -> PathBuf {
        let directory = parent.join(name);
        std::fs::create_dir_all(&directory).expect("a temporary directory is writable");
        std::fs::write(directory.join(DATA_SOCKET), "").expect("a temporary directory is writable");
        directory
    }

    fn none(_: &str) -> Option<OsString> {
        None
    }

    #[test]
    fn an_address_is_a_unix_url_with_an_absolute_path() {
        assert_eq!(
            find(Some("unix:///run/strait"), &none, 1).ok(),
            Some(PathBuf::from("/run/strait"))
        );
        for wrong in [
            "",
            "/run/strait",
            "unix:/run",
            "unix://run/strait",
            "grpc://host:1",
        ] {
            let error = find(Some(wrong), &none, 1).expect_err("not an address");
            assert!(error.to_string().contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn the_environment_is_looked_at_in_order() {
        let temporary = tempfile::tempdir().expect("a temporary directory");
        let runtime = host(temporary.path(), "runtime");
        let session = host(temporary.path(), "session/strait");
        let all = |name: &str| match name {
            "STRAIT_ADDRESS" => Some(OsString::from("unix:///named")),
            "RUNTIME_DIRECTORY" => Some(runtime.clone().into_os_string()),
            "XDG_RUNTIME_DIR" => Some(temporary.path().join("session").into_os_string()),
            _ => None,
        };
        let without = |missing: &'static [&str]| {
            find(
                None,
                &|name| {
                    if missing.contains(&name) {
                        None
                    } else {
                        all(name)
                    }
                },
                4_000_000_000,
            )
        };
        assert_eq!(without(&[]).ok(), Some(PathBuf::from("/named")));
        assert_eq!(without(&["STRAIT_ADDRESS"]).ok(), Some(runtime.clone()));
        assert_eq!(
            without(&["STRAIT_ADDRESS", "RUNTIME_DIRECTORY"]).ok(),
            Some(session.clone())
        );

        // A service's own runtime directory without a host in it does not hide the host.
        std::fs::remove_file(runtime.join(DATA_SOCKET)).expect("it was made above");
        assert_eq!(without(&["STRAIT_ADDRESS"]).ok(), Some(session));
    }

    #[test]
    fn no_host_names_every_place_looked_at() {
        let text = find(None, &none, 4_000_000_000)
            .expect_err("no such uid")
            .to_string();
        assert!(text.contains("/tmp/strait-4000000000/data.sock"), "{text}");
        assert!(text.contains("strait serve"), "{text}");
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        let temporary = tempfile::tempdir().expect("a temporary directory");
        let directory = host(temporary.path(), "planted");
        let uid = rustix::process::geteuid().as_raw();
        assert!(owned(directory.clone(), uid).is_ok());
        assert!(matches!(
            owned(directory.clone(), uid + 1),
            Err(AddressError::Owner { owner, .. }) if owner == uid
        ));
        let link = temporary.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).expect("a temporary directory is writable");
        assert!(owned(link, uid).is_err());
    }
}
