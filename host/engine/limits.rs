//! What a guest may use, and the state of its store.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmtime::ResourceLimiter;

use super::abi::log_sink;
use super::fault::Faults;
use super::guest_memory::{GuestMemory, NotOwn};

/// What one invocation may use. Sizes in bytes; the wall time is the request's deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The guest's own memory, without windows.
    pub guest_bytes: u64,
    /// Inputs and outputs together.
    pub window_bytes: u64,
    /// Outputs together, as `open` announces them.
    pub result_bytes: u64,
    /// Log lines together, each with 64 bytes for what stands before its text.
    pub log_bytes: u64,
}

/// Most elements of a guest's tables: function pointers, not data.
const TABLE_ELEMENTS_MAX: usize = 100_000;

/// What a log line costs beside its text, in bytes: time, level, request and plugin. Without it
/// empty lines would be free.
const LINE_BYTES: u64 = 64;
/// Between two lines about progress; what comes in between is not told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Why the host ended a guest.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error("cancelled")]
    Cancelled,
    #[error("deadline")]
    Deadline,
    #[error("it wrote to an input")]
    InputWritten,
    #[error("guest memory of {asked} bytes, the limit is {limit}")]
    GuestBytes { asked: u64, limit: u64 },
    #[error("log lines of {asked} bytes, the limit is {limit}")]
    LogBytes { asked: u64, limit: u64 },
    #[error("tables of {asked} elements, the limit is {TABLE_ELEMENTS_MAX}")]
    Table { asked: usize },
    #[error("a log line that is not in the guest's own memory: {0}")]
    LogRange(String),
}

/// What a store carries.
#[derive(Debug)]
pub(super) struct State {
    pub(super) limits: Limits,
    /// Bytes that `reserve` may grow the memory by, beyond `guest_bytes`.
    pub(super) allowance: u64,
    pub(super) memory: Option<Arc<GuestMemory>>,
    /// Guest ranges that the host must not touch now.
    pub(super) windows: Vec<Range<usize>>,
    pub(super) request_id: Arc<str>,
    pub(super) plugin: Arc<str>,
    pub(super) faults: Arc<Faults>,
    logged: u64,
    progress_told: Option<Instant>,
}

impl State {
    pub(super) fn new(limits: Limits, request_id: Arc<str>, plugin: Arc<str>) -> Self {
        Self {
            limits,
            allowance: 0,
            memory: None,
            windows: Vec::new(),
            request_id,
            plugin,
            faults: Arc::default(),
            logged: 0,
            progress_told: None,
        }
    }

    fn line(&mut self, address: u64, bytes: u64) -> Result<String, Stop> {
        let asked = self.logged.saturating_add(bytes).saturating_add(LINE_BYTES);
        if asked > self.limits.log_bytes {
            return Err(Stop::LogBytes {
                asked,
                limit: self.limits.log_bytes,
            });
        }
        let memory = self
            .memory
            .as_ref()
            .ok_or_else(|| Stop::LogRange("the plugin has no linear memory".to_owned()))?;
        let text = memory
            .read(address, bytes, &self.windows)
            .map_err(|e: NotOwn| Stop::LogRange(e.to_string()))?;
        self.logged = asked;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl ResourceLimiter for State {
    fn memory_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let limit = self.limits.guest_bytes.saturating_add(self.allowance);
        if desired as u64 > limit {
            let asked = (desired as u64).saturating_sub(self.allowance);
            return Err(Stop::GuestBytes {
                asked,
                limit: self.limits.guest_bytes,
            }
            .into());
        }
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if desired > TABLE_ELEMENTS_MAX {
            return Err(Stop::Table { asked: desired }.into());
        }
        Ok(true)
    }

    // One memory, so that there is no question which one the windows are in.
    fn memories(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        16
    }

    fn instances(&self) -> usize {
        64
    }
}

impl log_sink::Host for State {
    fn log(&mut self, level: u32, address: u64, bytes: u64) -> wasmtime::Result<()> {
        let text = self.line(address, bytes)?;
        let (request_id, plugin) = (&*self.request_id, &*self.plugin);
        match level {
            0 => tracing::error!(target: "strait::guest", request_id, plugin, "{text}"),
            1 => tracing::warn!(target: "strait::guest", request_id, plugin, "{text}"),
            2 => tracing::info!(target: "strait::guest", request_id, plugin, "{text}"),
            _ => tracing::debug!(target: "strait::guest", request_id, plugin, "{text}"),
        }
        Ok(())
    }

    fn progress(&mut self, done: u64, total: u64) -> wasmtime::Result<()> {
        if self
            .progress_told
            .is_some_and(|told| told.elapsed() < PROGRESS_EVERY)
        {
            return Ok(());
        }
        self.progress_told = Some(Instant::now());
        let (request_id, plugin) = (&*self.request_id, &*self.plugin);
        tracing::debug!(target: "strait::guest", request_id, plugin, done, total, "progress");
        Ok(())
    }
}
