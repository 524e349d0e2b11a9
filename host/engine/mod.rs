//! Runs kernels: fresh instance, windows in, `run`, windows home.
//!
//! ```text
//! Engine ──load──▶ Plugin (plain data)          Compiled (wasmtime), by sha-256
//!    └──fill(Job, Supplies) ──▶ Filled | Failed         Runner: the same for the host, with its segments
//!
//!  invocation   Opened → Bound → Running → Finished ──▶ Filled
//!   │    └ contract    the guest's functions, each answer checked ── abi, chunk
//!   ├ instance         a guest that can be called ── limits, imports, ticker, leash, fault
//!   │  └ spare         the next one, made while nobody waits
//!   ├ prepared         a job that is run again and again, bound ahead
//!   ├ stream           one whose tensors come and go in batches
//!   ├ chain            several kernels at once, rows going from one to the next ── flow
//!   ├ slices           one on several threads, or part by part ── cut, threads
//!   │  └ along         one whose windows move along tensors that do not fit it ── tall
//!   ├ placement        sizes to addresses, numbers only
//!   ├ windows          pages of segments in the guest, and home
//!   ├ results          memory for what comes out, made fit to be mapped
//!   └ regions          which memory is the guest's own ── guest_memory
//! ```
//! The interface is plain data and segments; nothing of leases, sessions, sockets or Flight. Only this
//! room knows wasmtime.

mod abi;
#[expect(
    unsafe_code,
    reason = "a compiled artifact is believed; see the module's doc"
)]
mod cache;
mod chain;
mod chunk;
mod compile;
mod contract;
mod core_module;
mod cut;
mod error;
#[expect(unsafe_code, reason = "signal handler of a store")]
mod fault;
mod flow;
#[expect(unsafe_code, reason = "linear memories on our own reservations")]
mod guest_memory;
mod imports;
mod instance;
mod invocation;
mod job;
#[expect(unsafe_code, reason = "signals that end a guest")]
mod leash;
mod limits;
mod log;
mod panicked;
mod placement;
mod plan;
mod prepared;
#[expect(unsafe_code, reason = "reads and writes of guest memory")]
mod regions;
mod results;
mod runner;
mod slices;
mod spare;
mod state;
mod stream;
mod tall;
mod threads;
mod ticker;
mod traps;
mod windows;

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use strait_memory::{Copied, Lot};
use strait_tensor::TensorSpec;
use wasmtime::component::{Component, Linker};

use crate::plugin::{Description, Plugin, PluginError, PluginHash};

pub use cache::{ArtifactKey, Cache};
pub use compile::compile;
pub use core_module::keeps_memory_only;
pub use error::{Cause, Failed, Limit, Refusal, Stage};
pub use flow::link_bytes;
pub use job::{
    Brought, CancelToken, Chain, ChainDone, ChainFilled, Done, Filled, FilledBody, FilledOutput,
    FramePart, InlineRoom, Input, Job, Link, Means, Output, OutputBody, Owner, Report, Results,
    Seconds, Source, Supplies, Telling, WindowPages,
};
pub use limits::Limits;
pub use log::Logged;
pub use panicked::Panic;
pub(crate) use prepared::RENEWAL;
pub use prepared::Ready;
pub use runner::{Runner, RunnerCounts, RunnerProcess};
pub use spare::Used;
pub use stream::{Batch, Batches};
pub use threads::lent_cpu_time;

use abi::PluginPre;
use state::State;

/// How a kernel is ended that has run out of time, was cancelled or wrote to an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Interruption {
    /// At checks in its loops, which cost a few percent.
    Checks,
    /// By signals to its thread, in a process that may be lost over it: whoever runs that kills it when a kernel goes on.
    Signals,
    /// Not at all.
    None,
}

/// How the engine is set up. Sizes in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EngineConfig {
    /// Tensors from this size on are moved into the guest, smaller ones copied.
    pub move_min_bytes: u64,
    /// Rows that a kernel gets at a time if it streams; none: all at once.
    pub chunk_rows: Option<NonZeroU64>,
    /// How kernels are ended that do not end by themselves.
    pub interruption: Interruption,
    /// Where compiled plugins are kept; none: nowhere.
    pub cache: Option<PathBuf>,
    /// Idle reservations of guest memories (address space only).
    pub idle_guests_max: usize,
    /// Threads that one invocation can run on: its own, and others that are there for all of them.
    pub threads: usize,
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
    /// See [`keeps_memory_only`].
    memory_only: bool,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

/// Why a plugin could not be loaded.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
pub enum LoadError {
    /// Not a component of this contract.
    #[error(
        "this file is not a strait plugin: {0}; a plugin is a wasm component that exports the world strait:kernel/plugin@0.1.0 and imports at most log-sink"
    )]
    NotAPlugin(String),
    /// It needs a part of the contract that is not there.
    #[error("the plugin imports {0}, which this host does not offer yet; build it without that")]
    NotOffered(String),
    /// There is no process that could load it.
    #[error("the plugin could not be loaded: {0}")]
    NoWorker(String),
    /// Compiling it goes on for too long.
    #[error(
        "compiling the plugin took more than {seconds} s; make its functions smaller, or raise workers.compile_ms"
    )]
    CompileTime {
        /// Of CPU, or twice that by the clock.
        seconds: u64,
    },
    /// Compiling it wants too much.
    #[error(
        "compiling the plugin needs more memory or stack than it may have ({bytes} bytes of addresses); make its functions smaller, or raise workers.compile_bytes"
    )]
    CompileMemory {
        /// That the compiler process may have.
        bytes: u64,
    },
    /// The compiler process ended in another way, or did not do what it was asked.
    #[error("the plugin could not be compiled: {0}; what the compiler said itself is in the log")]
    CompilerLost(String),
    /// All compilers were taken for as long as a load may wait.
    #[error(
        "the plugin was not compiled: {at_once} others were for {seconds} s; load it again, or raise workers.compilers"
    )]
    CompilersBusy {
        /// Compilers at a time.
        at_once: usize,
        /// Waited for.
        seconds: u64,
    },
    /// A compiled plugin is not of this program and these settings.
    #[error("the compiled plugin does not fit: {0}")]
    Artifact(String),
    /// `describe` took its process with it.
    #[error("the plugin's `describe` ended its process: {0}")]
    DescriberLost(String),
    /// `describe` failed.
    #[error("the plugin's `describe` failed: {0}")]
    Describe(Failed),
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
    lot: Arc<Lot>,
    spares: spare::Spares,
    copies: CopyPlaces,
    invocations: AtomicU64,
    running: AtomicU64,
    slices: AtomicU64,
    threads: threads::Threads,
    /// What helpers hold while they help.
    me: Weak<Self>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine that keeps warm mappings of inputs in `lot`.
    ///
    /// # Errors
    /// wasmtime's, if this machine cannot run it; Linux gives no threads.
    pub fn new(config: EngineConfig, lot: Arc<Lot>) -> Result<Arc<Self>, String> {
        let settings = compile::settings(&config);
        let wasmtime = wasmtime::Engine::new(&settings).map_err(|e| e.to_string())?;
        let linker = imports::linker(&wasmtime).map_err(|e| e.to_string())?;
        let ticker = ticker::Ticker::new(wasmtime.clone(), config.interruption)?;
        let threads = threads::Threads::new(config.threads.saturating_sub(1))?;
        Ok(Arc::new_cyclic(|me| Self {
            ticker,
            wasmtime,
            linker,
            cache: cache::Cache::open(config.cache.as_deref()),
            compiled: Mutex::default(),
            lot,
            config,
            spares: spare::Spares::default(),
            copies: CopyPlaces::default(),
            invocations: AtomicU64::new(0),
            running: AtomicU64::new(0),
            slices: AtomicU64::new(0),
            threads,
            me: Weak::clone(me),
        }))
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
        let description = instance::describe(self, &compiled).map_err(LoadError::Describe)?;
        let plugin = Plugin::new(bytes, description)?;
        self.compiled.lock().insert(hash, compiled);
        Ok(plugin)
    }

    /// Takes over a plugin that was compiled and described elsewhere, where it is also known whether it
    /// [`keeps_memory_only`]. See `cache.rs` on what is believed.
    ///
    /// # Errors
    /// [`LoadError::Artifact`].
    pub fn adopt(
        &self,
        hash: PluginHash,
        artifact: &[u8],
        memory_only: bool,
    ) -> Result<(), LoadError> {
        let compiled = self.believed(artifact, memory_only)?;
        self.compiled.lock().insert(hash, compiled);
        Ok(())
    }

    /// Asks what an artifact's plugin offers; that is not checked here.
    ///
    /// # Errors
    /// [`LoadError::Artifact`], [`LoadError::Describe`].
    pub fn describe(&self, artifact: &[u8]) -> Result<Description, LoadError> {
        let compiled = self.believed(artifact, false)?;
        instance::describe(self, &compiled).map_err(LoadError::Describe)
    }

    fn believed(&self, artifact: &[u8], memory_only: bool) -> Result<Arc<Compiled>, LoadError> {
        let component = cache::believed(&self.wasmtime, artifact)
            .map_err(|e| LoadError::Artifact(format!("{e:#}")))?;
        self.checked(&component, memory_only)
    }

    fn compile(&self, hash: &PluginHash, bytes: &[u8]) -> Result<Arc<Compiled>, LoadError> {
        let component = self
            .cache
            .component(&self.wasmtime, hash, bytes)
            .map_err(|e| LoadError::NotAPlugin(format!("{e:#}")))?;
        self.checked(&component, keeps_memory_only(bytes))
    }

    fn checked(
        &self,
        component: &Component,
        memory_only: bool,
    ) -> Result<Arc<Compiled>, LoadError> {
        let pre = compile::check(&self.wasmtime, &self.linker, component)?;
        let traps = Arc::new(traps::TrapSites::of(component));
        Ok(Arc::new(Compiled {
            pre,
            traps,
            memory_only,
        }))
    }

    fn compiled(&self, plugin: &Plugin) -> Result<Arc<Compiled>, LoadError> {
        let compiled = self.compiled.lock();
        if let Some(compiled) = compiled.get(&plugin.hash) {
            return Ok(Arc::clone(compiled));
        }
        drop(compiled);
        self.compile(&plugin.hash, &plugin.bytes)
    }

    /// Runs one kernel on the calling thread, and on others if it can be cut into slices.
    ///
    /// # Errors
    /// [`Failed`]; nothing of the invocation is left then, its pages hold anything.
    pub fn fill(&self, job: &Job, supplies: &Supplies) -> Result<Filled, Failed> {
        self.counted(|| slices::invoke(self, job, supplies))
            .map_err(|broken| broken.of(&job.kernel.kernel().name))
    }

    fn counted<R>(&self, run: impl FnOnce() -> R) -> R {
        self.invocations.fetch_add(1, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        let done = run();
        self.running.fetch_sub(1, Ordering::Relaxed);
        done
    }

    /// Runs several kernels at once on the calling thread, rows going from one to the next.
    ///
    /// # Errors
    /// [`Failed`], of the kernel concerned; nothing is left then, its pages hold anything. [`Cause::Stalled`]: they are to be run one
    /// after the other.
    pub fn fill_chain(&self, chain: &Chain, supplies: Supplies) -> Result<ChainFilled, Failed> {
        self.counted(|| chain::run(self, chain, supplies))
            .map_err(|(at, broken)| Failed {
                at,
                ..broken.of(&chain.stages[at].kernel.kernel().name)
            })
    }

    /// The outputs that an invocation would have, by `open` alone.
    ///
    /// # Errors
    /// [`Failed`].
    pub fn specs(
        &self,
        job: &Job,
        supplies: &Supplies,
    ) -> Result<Vec<(String, TensorSpec)>, Failed> {
        slices::specs(self, job, supplies).map_err(|broken| broken.of(&job.kernel.kernel().name))
    }

    /// Slices of invocations that were cut, since the start.
    #[must_use]
    pub fn slices(&self) -> u64 {
        self.slices.load(Ordering::Relaxed)
    }

    /// Where invocations copied.
    #[must_use]
    pub fn copies(&self) -> &CopyPlaces {
        &self.copies
    }

    /// Invocations since the start, and those that run now.
    #[must_use]
    pub fn invocations(&self) -> (u64, u64) {
        (
            self.invocations.load(Ordering::Relaxed),
            self.running.load(Ordering::Relaxed),
        )
    }
}
