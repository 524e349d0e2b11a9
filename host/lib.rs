//! strait: sandboxed WebAssembly kernels over shared tensors.
//!
//! ```text
//! flight / datasock ─▶ session ─▶ engine, lease ─▶ plugin ─▶ strait-tensor ─▶ strait-memory
//! ```
//! Imports run only to the right; `ARCHITECTURE.md` says why each room is there.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "strait runs on Linux on x86-64 only: it needs memfd seals, mremap(MREMAP_DONTUNMAP) and the ucontext of that platform"
);

pub mod access;
pub mod cli;
pub mod config;
pub mod datasock;
pub mod engine;
pub mod error;
pub mod flight;
pub mod lease;
pub mod plugin;
pub mod session;
mod text;
pub mod worker;

/// The standard kernels as a component, built from `plugins/kernels`.
pub const STANDARD_PLUGIN: &[u8] = include_bytes!("../plugins/prebuilt/standard.wasm");
