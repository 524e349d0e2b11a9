//! Memory for results, in a worker.

use std::sync::Arc;

use parking_lot::Mutex;
use strait_memory::{GUEST_PAGE, ResultPages};

use super::{ASK_BYTES_MAX, FDS_MAX, Worker};
use crate::engine::{Cause, Results};
use crate::worker::channel::Channel;
use crate::worker::messages::{Answer, Ask, Grant};

/// The memory of one run's results, as the host grants it.
pub(super) struct Granted {
    pub(super) worker: Arc<Worker>,
    pub(super) lane: Arc<Mutex<Channel>>,
    pub(super) ahead: Vec<u64>,
    pub(super) grants: Mutex<Vec<(Grant, ResultPages)>>,
}

impl std::fmt::Debug for Granted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Granted").finish_non_exhaustive()
    }
}

impl Granted {
    /// Uses what was granted ahead, if all of it fits.
    fn take_ahead(&self, bytes: &[u64]) -> Option<Vec<ResultPages>> {
        if self.ahead.len() != bytes.len() {
            return None;
        }
        let mut results = self.worker.results.lock();
        let fits = |(segment, bytes): (&u64, &u64)| {
            let capacity = results.get(segment).map(ResultPages::bytes);
            // What the pool would give for it, and no more.
            let spare = capacity.and_then(|capacity| capacity.checked_sub(*bytes));
            spare.is_some_and(|spare| spare <= (bytes / 8).max(GUEST_PAGE))
        };
        if !self.ahead.iter().zip(bytes).all(fits) {
            return None;
        }
        let grant = |segment: &u64| {
            let grant = Grant {
                segment: *segment,
                bytes: None,
                once: false,
            };
            Some((grant, results.remove(segment)?))
        };
        let granted = self.ahead.iter().map(grant).collect::<Option<Vec<_>>>()?;
        let pages = granted.iter().map(|(_, pages)| pages.clone()).collect();
        *self.grants.lock() = granted;
        Some(pages)
    }
}

impl Results for Granted {
    fn take(&self, bytes: &[u64]) -> Result<Vec<ResultPages>, Cause> {
        if let Some(pages) = self.take_ahead(bytes) {
            return Ok(pages);
        }
        let mut lane = self.lane.lock();
        let host = |error: &dyn std::fmt::Display| Cause::Host(error.to_string());
        lane.send(&Answer::Need(bytes.to_vec()), &[])
            .map_err(|e| host(&e))?;
        let (answer, fds) = lane
            .receive(ASK_BYTES_MAX, FDS_MAX, None)
            .map_err(|e| host(&e))?;
        drop(lane);
        let grants = match answer {
            Ask::Granted(grants) if grants.len() == bytes.len() => grants,
            // The host knows why.
            Ask::Denied => return Err(Cause::Host("there is no memory for it".to_owned())),
            _ => return Err(Cause::Host("the host granted something else".to_owned())),
        };
        let mut fds = fds.into_iter();
        let mut granted = self.grants.lock();
        for (grant, asked) in grants.into_iter().zip(bytes) {
            let pages = match grant.bytes.and_then(|bytes| Some((bytes, fds.next()?))) {
                Some((bytes, fd)) => ResultPages::received(
                    fd,
                    (bytes, *asked),
                    self.worker.mappings.try_reserve(1).map_err(|e| host(&e))?,
                    &self.worker.open,
                    &self.worker.births,
                )?,
                None => {
                    let known = self.worker.results.lock().remove(&grant.segment);
                    known.ok_or_else(|| host(&"the worker does not have a result's memory"))?
                }
            };
            granted.push((grant, pages));
        }
        Ok(granted.iter().map(|(_, pages)| pages.clone()).collect())
    }
}
