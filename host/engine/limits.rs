//! What a guest may use, and the state of its store.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

use wasmtime::ResourceLimiter;

use super::fault::Faults;
use super::imports::Log;
use super::regions::Regions;

/// What one invocation may use. Sizes in bytes; the wall time is the request's deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// Why the host ended a guest.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error("cancelled")]
    Cancelled,
    #[error("deadline of {0} ms")]
    Deadline(u64),
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
    /// None until the instance is made.
    pub(super) regions: Option<Regions>,
    pub(super) faults: Arc<Faults>,
    pub(super) log: Log,
}

impl State {
    pub(super) fn new(limits: Limits, request_id: Arc<str>, plugin: Arc<str>) -> Self {
        Self {
            limits,
            allowance: 0,
            regions: None,
            faults: Arc::default(),
            log: Log::new(request_id, plugin, limits.log_bytes),
        }
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
