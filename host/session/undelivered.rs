//! Results of invocations over Flight: no connection holds them, so they live for a set time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::caller::Caller;
use crate::error::{Code, Reason, Status};
use crate::lease::{LiveSegment, SegmentId};

#[derive(Debug)]
struct Kept {
    segment: Arc<LiveSegment>,
    expires: Instant,
}

/// Segments that are kept until a time of their own.
#[derive(Debug, Default)]
pub(super) struct Undelivered {
    // Held for map operations only.
    kept: Mutex<HashMap<SegmentId, Kept>>,
}

impl Undelivered {
    /// Takes out those whose time is over.
    pub(super) fn expire(&self, now: Instant) -> Vec<Arc<LiveSegment>> {
        let mut over = Vec::new();
        self.kept.lock().retain(|_, kept| {
            let live = kept.expires > now;
            if !live {
                over.push(Arc::clone(&kept.segment));
            }
            live
        });
        over
    }
}

impl Caller {
    /// Keeps a result of its alive for `lease.undelivered_ms` from now on, and answers that time.
    pub fn keep_undelivered(&self, segment: &Arc<LiveSegment>) -> Duration {
        let life = Duration::from_millis(self.host.config().lease.undelivered_ms);
        let kept = Kept {
            segment: Arc::clone(segment),
            expires: Instant::now() + life,
        };
        self.host.undelivered.kept.lock().insert(segment.id(), kept);
        life
    }

    /// A result of this principal that is still kept.
    ///
    /// # Errors
    /// `NO_RIGHT`; `SEGMENT_NOT_FOUND` if it is not kept (any more), or another principal's.
    pub fn undelivered(&self, id: SegmentId) -> Result<Arc<LiveSegment>, Status> {
        self.check_get()?;
        let kept = self.host.undelivered.kept.lock();
        kept.get(&id)
            .filter(|kept| self.owns(kept) && kept.expires > Instant::now())
            .map(|kept| Arc::clone(&kept.segment))
            .ok_or_else(|| {
                Status::new(
                    Code::NotFound,
                    Reason::SegmentNotFound,
                    format!(
                        "no result {id} of {} is kept; a result that nobody publishes lives {} ms: \
                         run the invocation again, renew its endpoint in time, or publish the output",
                        self.principal(),
                        self.host.config().lease.undelivered_ms
                    ),
                )
            })
    }

    fn owns(&self, kept: &Kept) -> bool {
        kept.segment.owner() == self.principal()
    }

    /// Lets go of a result before its time; answers whether it was kept.
    pub fn forget_undelivered(&self, id: SegmentId) -> bool {
        let mut kept = self.host.undelivered.kept.lock();
        let own = kept.get(&id).is_some_and(|kept| self.owns(kept));
        let gone = own.then(|| kept.remove(&id)).flatten();
        drop(kept);
        gone.is_some()
    }
}
