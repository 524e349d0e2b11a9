//! Results of invocations over Flight: no connection holds them, so they live for a set time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Host;
use crate::error::{Code, Status};
use crate::lease::{LiveSegment, Principal, SegmentId};

#[derive(Debug)]
struct Kept {
    segment: Arc<LiveSegment>,
    expires: Instant,
}

/// Segments that are kept until a time of their own.
#[derive(Debug, Default)]
pub(super) struct Undelivered {
    // A std mutex: held for map operations only.
    kept: Mutex<HashMap<SegmentId, Kept>>,
}

impl Undelivered {
    fn lock(&self) -> MutexGuard<'_, HashMap<SegmentId, Kept>> {
        self.kept
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes out those whose time is over.
    pub(super) fn expire(&self, now: Instant) -> Vec<Arc<LiveSegment>> {
        let mut over = Vec::new();
        self.lock().retain(|_, kept| {
            let live = kept.expires > now;
            if !live {
                over.push(Arc::clone(&kept.segment));
            }
            live
        });
        over
    }
}

impl Host {
    /// Keeps a result alive for `lease.undelivered_ms` from now on, and answers that time.
    pub fn keep_undelivered(&self, segment: &Arc<LiveSegment>) -> Duration {
        let life = Duration::from_millis(self.config().lease.undelivered_ms);
        let kept = Kept {
            segment: Arc::clone(segment),
            expires: Instant::now() + life,
        };
        self.undelivered.lock().insert(segment.id(), kept);
        life
    }

    /// A result of `principal` that is still kept.
    ///
    /// # Errors
    /// `SEGMENT_NOT_FOUND` if it is not kept (any more), or another principal's.
    pub fn undelivered(
        &self,
        principal: Principal,
        id: SegmentId,
    ) -> Result<Arc<LiveSegment>, Status> {
        let kept = self.undelivered.lock();
        kept.get(&id)
            .filter(|kept| kept.segment.owner() == principal && kept.expires > Instant::now())
            .map(|kept| Arc::clone(&kept.segment))
            .ok_or_else(|| {
                Status::new(
                    Code::NotFound,
                    "SEGMENT_NOT_FOUND",
                    format!(
                        "no result {id} of {principal} is kept; a result that nobody publishes lives {} ms: \
                         run the invocation again, renew its endpoint in time, or publish the output",
                        self.config().lease.undelivered_ms
                    ),
                )
            })
    }

    /// Lets go of a result before its time; answers whether it was kept.
    pub fn forget_undelivered(&self, principal: Principal, id: SegmentId) -> bool {
        let mut kept = self.undelivered.lock();
        let own = kept
            .get(&id)
            .is_some_and(|kept| kept.segment.owner() == principal);
        let gone = own.then(|| kept.remove(&id)).flatten();
        drop(kept);
        gone.is_some()
    }
}
