//! The state of a guest's store.

use std::sync::Arc;

use wasmtime::ResourceLimiter;

use super::fault::Faults;
use super::limits::{Limits, Stop, TABLE_ELEMENTS_MAX};
use super::log::{Log, Logged};
use super::regions::Regions;

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

    /// What its guest logs counts with what others have logged in `logged`.
    pub(super) fn logging_in(mut self, logged: &Logged) -> Self {
        self.log.count_in(logged);
        self
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
