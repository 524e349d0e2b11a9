//! Compiled components on disk, so that a plugin is compiled once.
//!
//! wasmtime believes a compiled artifact: whoever can write one runs code in the host. So the
//! directory must be the host's own, mode 0700, and so must every file read from it; anything
//! else is compiled anew.
//!
//! Where kernels run in workers the host alone reads and writes the directory, and never maps what it finds there as code.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use wasmtime::Engine;
use wasmtime::component::Component;

use crate::plugin::{self, PluginHash};

/// Which artifact.
#[derive(Clone, Copy, Debug)]
pub struct ArtifactKey {
    /// Of what was compiled.
    pub plugin: PluginHash,
    /// Of the compiler and its settings.
    pub build: u64,
}

/// A directory of compiled components, or none.
#[derive(Debug)]
pub struct Cache {
    directory: Option<PathBuf>,
}

impl Cache {
    /// Uses `directory` if it is, or can be made, the host's own.
    #[must_use]
    pub fn open(directory: Option<&Path>) -> Self {
        let usable = directory.filter(|path| {
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(path);
            let own = made.is_ok() && fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && private(&m));
            if !own {
                tracing::warn!(directory = %path.display(), "the cache of compiled plugins is not a directory of this user with mode 0700; plugins are compiled at each start");
            }
            own
        });
        Self {
            directory: usable.map(Path::to_owned),
        }
    }

    /// The component of `wasm`, whose sha-256 is `hash`, compiled now or before.
    ///
    /// # Errors
    /// wasmtime's, if `wasm` is not a component that it can compile.
    pub(super) fn component(
        &self,
        engine: &Engine,
        hash: &PluginHash,
        wasm: &[u8],
    ) -> wasmtime::Result<Component> {
        let mut settings = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut settings);
        let key = ArtifactKey {
            plugin: *hash,
            build: settings.finish(),
        };
        if let Some(bytes) = self.read(&key) {
            match believed(engine, &bytes) {
                Ok(component) => return Ok(component),
                Err(error) => {
                    tracing::debug!(%error, "a compiled plugin does not fit and is compiled anew")
                }
            }
        }
        let component = Component::from_binary(engine, wasm)?;
        if self.directory.is_some() {
            self.write(&key, &component.serialize()?);
        }
        Ok(component)
    }

    /// What was kept under `key`, if it is still only the host's own to write.
    #[must_use]
    pub fn read(&self, key: &ArtifactKey) -> Option<Vec<u8>> {
        read_private(&self.path(key)?)
    }

    /// Keeps `artifact`. That it cannot be kept costs the next start a compilation, and is told in the log.
    pub fn write(&self, key: &ArtifactKey, artifact: &[u8]) {
        let Some(path) = self.path(key) else {
            return;
        };
        if let Err(error) = write_private(&path, artifact) {
            tracing::debug!(path = %path.display(), %error, "a compiled plugin could not be kept");
        }
    }

    fn path(&self, key: &ArtifactKey) -> Option<PathBuf> {
        let directory = self.directory.as_ref()?;
        let name = plugin::hex(&key.plugin);
        Some(directory.join(format!("{name}-{:016x}.cwasm", key.build)))
    }
}

/// The component of an artifact that this host, or a compiler process of its own, has made. wasmtime itself checks that it is
/// of its version and these settings.
///
/// # Errors
/// wasmtime's, if it is not.
pub(super) fn believed(engine: &Engine, artifact: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: what runs here is machine code that must have come from wasmtime's compiler. Artifacts have two sources. A file
    // of the cache is a regular file of this user that nobody else can write, in a directory that nobody else can write
    // (`open`, `read_private`), so it holds what this host wrote. In a worker it is what the host sent over its socket: such a
    // file, or the answer of a compiler process, which has never run the plugin, copied by the host into memory that is
    // sealed before anybody maps it. If a plugin took the compiler over, its artifact gets no further than a worker.
    unsafe { Component::deserialize(engine, artifact) }
}

fn private(metadata: &fs::Metadata) -> bool {
    metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

fn read_private(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::OpenOptions::new()
        .read(true)
        // A FIFO or a leased file in the place of the artifact must not make the host wait.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || !private(&metadata) {
        return None;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    // Born with the mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}
