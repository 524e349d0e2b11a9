//! Runs kernels: fresh instance, windows in, `run`, windows home.
//!
//! ```text
//! Engine ──load──▶ Plugin (plain data)          Compiled (wasmtime), by sha-256
//!    └──invoke(Request) ──▶ Outcome | InvokeError
//!         store + instance → open → results from the pool → reserve, bind
//!         → windows in → run → windows home → extents → header and footer
//! ```
//! The interface is plain data and segments; nothing of sessions, sockets or Flight. Only this
//! room knows wasmtime.

mod abi;
#[expect(
    unsafe_code,
    reason = "a compiled artifact is believed; see the module's doc"
)]
mod cache;
mod core_module;
#[expect(unsafe_code, reason = "signal handler of a store")]
mod fault;
#[expect(unsafe_code, reason = "linear memories on our own reservations")]
mod guest_memory;
mod invoke;
mod limits;
mod ticker;
mod traps;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use strait_memory::{Budget, Copied, GuestSpaces, ParkingLot, ResultPool};
use strait_tensor::TensorSpec;
use wasmtime::component::{Component, HasSelf, Linker};

use crate::plugin::{Plugin, PluginError, PluginHash};

pub use invoke::{Input, InvokeError, Outcome, Output, Request, Seconds, WindowPages};
pub use limits::Limits;

use abi::PluginPre;
use guest_memory::{Creator, RESERVATION_BYTES};
use limits::State;

/// How the engine is set up. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tensors from this size on are moved into the guest, smaller ones copied.
    pub move_min_bytes: u64,
    /// Check for deadlines and cancels inside kernels. Without it a runaway kernel cannot be stopped.
    pub epoch_interruption: bool,
    /// Where compiled plugins are kept; none: nowhere.
    pub cache: Option<PathBuf>,
    /// Bytes that idle results of the pool may hold.
    pub pool_idle_bytes_max: u64,
    /// Idle parked mappings.
    pub parked_mappings_max: u64,
    /// Bytes that idle parked mappings may cover.
    pub parked_bytes_max: u64,
    /// Idle reservations of guest memories (address space only).
    pub idle_guests_max: usize,
}

/// Ends an invocation from outside.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks the invocation to end; it does at its next check.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether [`CancelToken::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Every place in the host where tensor bytes are copied for an invocation.
#[derive(Debug, Default)]
pub struct CopyPlaces {
    /// Inputs below `move_min_bytes`, into the guest.
    pub guest_in: Copied,
    /// Outputs below `move_min_bytes`, out of the guest.
    pub guest_out: Copied,
}

struct Compiled {
    pre: PluginPre<State>,
    traps: Arc<traps::TrapSites>,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

/// Why a plugin could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a component of this contract.
    #[error(
        "this file is not a strait plugin: {0}; a plugin is a wasm component that exports the world strait:kernel/plugin@0.1.0 and imports at most log-sink"
    )]
    NotAPlugin(String),
    /// `describe` failed.
    #[error("the plugin's `describe` failed: {0}")]
    Describe(InvokeError),
    /// The description makes no sense.
    #[error(transparent)]
    Plugin(#[from] PluginError),
}

/// The one wasmtime engine of a process, and what its invocations share.
pub struct Engine {
    wasmtime: wasmtime::Engine,
    linker: Linker<State>,
    config: EngineConfig,
    cache: cache::Cache,
    compiled: Mutex<HashMap<PluginHash, Arc<Compiled>>>,
    ticker: ticker::Ticker,
    pool: Arc<ResultPool>,
    lot: Arc<ParkingLot>,
    copies: CopyPlaces,
    invocations: AtomicU64,
    running: AtomicU64,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine whose results are charged to `budget`.
    ///
    /// # Errors
    /// wasmtime's, if this machine cannot run it.
    pub fn new(config: EngineConfig, budget: &Arc<Budget>) -> Result<Self, String> {
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
            .epoch_interruption(config.epoch_interruption)
            .wasm_memory64(false)
            .wasm_multi_memory(false)
            // Not the same bit for bit on every CPU.
            .wasm_relaxed_simd(false);
        let wasmtime = wasmtime::Engine::new(&settings).map_err(|e| e.to_string())?;
        let mut linker = Linker::new(&wasmtime);
        abi::log_sink::add_to_linker::<State, HasSelf<State>>(&mut linker, |state| state)
            .map_err(|e| e.to_string())?;
        Ok(Self {
            ticker: ticker::Ticker::new(wasmtime.clone()),
            wasmtime,
            linker,
            cache: cache::Cache::open(config.cache.as_deref()),
            compiled: Mutex::default(),
            pool: ResultPool::new(Arc::clone(budget), config.pool_idle_bytes_max),
            lot: ParkingLot::new(config.parked_mappings_max, config.parked_bytes_max),
            config,
            copies: CopyPlaces::default(),
            invocations: AtomicU64::new(0),
            running: AtomicU64::new(0),
        })
    }

    /// Compiles a plugin, asks what it offers and checks that. A core module, as cargo makes it, is made
    /// a component first.
    ///
    /// # Errors
    /// [`LoadError`], naming what is wrong with the plugin.
    pub fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        let bytes = core_module::component(bytes)?;
        let hash = Plugin::hash(&bytes);
        let compiled = self.compile(&hash, &bytes)?;
        let description = invoke::describe(self, &compiled).map_err(LoadError::Describe)?;
        let plugin = Plugin::new(bytes, description)?;
        self.compiled
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .insert(hash, compiled);
        Ok(plugin)
    }

    fn compile(&self, hash: &PluginHash, bytes: &[u8]) -> Result<Arc<Compiled>, LoadError> {
        let refused = |e: wasmtime::Error| LoadError::NotAPlugin(format!("{e:#}"));
        let component: Component = self
            .cache
            .component(&self.wasmtime, hash, bytes)
            .map_err(refused)?;
        let pre = self.linker.instantiate_pre(&component).map_err(refused)?;
        let pre = PluginPre::new(pre).map_err(refused)?;
        let traps = Arc::new(traps::TrapSites::of(&component));
        Ok(Arc::new(Compiled { pre, traps }))
    }

    fn compiled(&self, plugin: &Plugin) -> Result<Arc<Compiled>, LoadError> {
        let compiled = self.compiled.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(compiled) = compiled.get(&plugin.hash) {
            return Ok(Arc::clone(compiled));
        }
        drop(compiled);
        self.compile(&plugin.hash, &plugin.bytes)
    }

    /// Runs one kernel on the calling thread.
    ///
    /// # Errors
    /// [`InvokeError`]; nothing of the invocation is left then.
    pub fn invoke(&self, request: Request) -> Result<Outcome, InvokeError> {
        self.invocations.fetch_add(1, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        let outcome = invoke::invoke(self, request);
        self.running.fetch_sub(1, Ordering::Relaxed);
        outcome
    }

    /// The outputs that an invocation would have, by `open` alone.
    ///
    /// # Errors
    /// [`InvokeError`].
    pub fn open_only(&self, request: Request) -> Result<Vec<(String, TensorSpec)>, InvokeError> {
        invoke::open_only(self, &request)
    }

    /// The results' pool.
    #[must_use]
    pub fn pool(&self) -> &Arc<ResultPool> {
        &self.pool
    }

    /// The warm mappings of live segments.
    #[must_use]
    pub fn lot(&self) -> &Arc<ParkingLot> {
        &self.lot
    }

    /// Where invocations copied.
    #[must_use]
    pub fn copies(&self) -> &CopyPlaces {
        &self.copies
    }

    /// See [`EngineConfig::move_min_bytes`].
    #[must_use]
    pub fn move_min_bytes(&self) -> u64 {
        self.config.move_min_bytes
    }

    /// Invocations since the start, and those that run now.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (
            self.invocations.load(Ordering::Relaxed),
            self.running.load(Ordering::Relaxed),
        )
    }
}

/// Limits under which a plugin's `describe` runs when it is loaded.
fn describe_limits() -> (Limits, Instant) {
    let limits = Limits {
        guest_bytes: 64 << 20,
        window_bytes: 0,
        result_bytes: 0,
        log_bytes: 16 << 10,
    };
    (limits, Instant::now() + Duration::from_secs(5))
}
