//! From a plugin's bytes to an artifact, without running any of it: what a compiler process does.

use std::io;
use std::sync::Arc;

use strait_memory::GuestSpaces;
use wasmtime::component::{Component, Linker};

use super::abi::PluginPre;
use super::guest_memory::{Creator, RESERVATION_BYTES};
use super::state::State;
use super::{EngineConfig, Interruption, LoadError, core_module, imports};

/// wasmtime's settings. Those that change machine code are the same in the compiler and where that code runs.
pub(super) fn settings(config: &EngineConfig) -> wasmtime::Config {
    let mut settings = wasmtime::Config::new();
    settings
        .with_host_memory(Arc::new(Creator {
            spaces: GuestSpaces::new(config.idle_guests_max),
        }))
        // With a memory of ours and a data segment wasmtime would otherwise hit `unreachable!`.
        .memory_init_cow(false)
        .memory_reservation(RESERVATION_BYTES as u64)
        // Halves the cost of a component call; plugins have no async exports.
        .concurrency_support(false)
        .epoch_interruption(config.interruption == Interruption::Checks)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        // Not the same bit for bit on every CPU.
        .wasm_relaxed_simd(false);
    settings
}

/// The artifact of a plugin of this contract. A core module, as cargo makes it, is made a component first. One thread does
/// all of it: what it costs is what the limits of this process count.
///
/// # Errors
/// [`LoadError`]; [`LoadError::CompileMemory`] with `bytes_max`, what this process may have, if that was too little.
pub fn compile(
    config: &EngineConfig,
    plugin: Vec<u8>,
    bytes_max: u64,
) -> Result<Vec<u8>, LoadError> {
    let refused = |error: wasmtime::Error| match is_no_memory(&error) {
        true => LoadError::CompileMemory { bytes: bytes_max },
        false => LoadError::NotAPlugin(format!("{error:#}")),
    };
    let own = |error: wasmtime::Error| LoadError::CompilerLost(format!("{error:#}"));
    let mut settings = settings(config);
    settings.parallel_compilation(false);
    let engine = wasmtime::Engine::new(&settings).map_err(own)?;
    let linker = imports::linker(&engine).map_err(own)?;
    let plugin = core_module::component(Arc::from(plugin))?;
    let component = Component::from_binary(&engine, &plugin).map_err(refused)?;
    check(&engine, &linker, &component)?;
    component.serialize().map_err(refused)
}

/// A component of this contract, ready for instances.
///
/// # Errors
/// [`LoadError`], naming what does not fit.
pub(super) fn check(
    engine: &wasmtime::Engine,
    linker: &Linker<State>,
    component: &Component,
) -> Result<PluginPre<State>, LoadError> {
    let refused = |error: wasmtime::Error| LoadError::NotAPlugin(format!("{error:#}"));
    imports::check(engine, component)?;
    let pre = linker.instantiate_pre(component).map_err(refused)?;
    PluginPre::new(pre).map_err(refused)
}

fn is_no_memory(error: &wasmtime::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error);
        let errno = cause.downcast_ref::<rustix::io::Errno>();
        io == Some(libc::ENOMEM) || errno == Some(&rustix::io::Errno::NOMEM)
    })
}
