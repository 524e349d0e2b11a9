//! Who may hold what, and until when.
//!
//! ```text
//! Leases ──▶ Lease ──▶ Arc<LiveSegment> ──▶ Body (Open | Client | Sealed | Result)
//! ```
//! A [`LiveSegment`] is alive while anybody has an `Arc` of it: a lease, a name, a running
//! invocation. The last one gone frees its bytes, or gives a result back to the pool.

mod segment;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

pub use segment::{Body, Framing, LiveSegment, Principal, SealError, SegmentId};

/// A session, for the life of the host.
pub type SessionId = u64;

/// A session's right to a segment. Positive.
pub type LeaseId = u64;

/// How many ended leases are remembered, to tell "expired" from "never was".
const EXPIRED_KEPT: usize = 1024;

#[derive(Debug)]
struct Lease {
    session: SessionId,
    segment: Arc<LiveSegment>,
    expires: Instant,
}

#[derive(Debug)]
struct Expired {
    session: SessionId,
    lease: LeaseId,
    segment: SegmentId,
    at: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    last: LeaseId,
    live: HashMap<LeaseId, Lease>,
    expired: VecDeque<Expired>,
    segments: HashMap<SegmentId, Weak<LiveSegment>>,
}

/// A lease that is over because its time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone {
    /// Whose it was.
    pub session: SessionId,
    /// The lease.
    pub lease: LeaseId,
    /// What it was for.
    pub segment: SegmentId,
}

/// Why a segment is not to be had, or a lease not to be prolonged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The session never had a lease on it, or released it.
    #[error("this session has no lease on segment {0}; map it first")]
    NoLease(SegmentId),
    /// The session's lease on the segment ran out.
    #[error(
        "lease {lease} on segment {segment} expired {late_ms} ms ago; renew leases sooner, or map the tensor again"
    )]
    Expired {
        /// The lease.
        lease: LeaseId,
        /// What it was for.
        segment: SegmentId,
        /// Time since then.
        late_ms: u128,
    },
    /// RENEW of a lease that this session does not have.
    #[error("lease {0} is not (or no longer) this session's; map the tensor again")]
    NotYours(LeaseId),
}

/// All leases of the host. Every call takes the time, so that tests can set it.
#[derive(Debug, Default)]
pub struct Leases {
    // A std mutex: held for map operations only, never across I/O or an await.
    inner: Mutex<Inner>,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes a segment known by its id, for [`Leases::count_segments`].
    pub fn register(&self, segment: &Arc<LiveSegment>) {
        let mut inner = self.lock();
        if inner.segments.len() >= 64 && inner.segments.len().is_power_of_two() {
            inner.segments.retain(|_, weak| weak.strong_count() > 0);
        }
        inner.segments.insert(segment.id(), Arc::downgrade(segment));
    }

    /// Gives `session` a lease on `segment` for `life` from `now` on.
    pub fn grant(
        &self,
        session: SessionId,
        segment: &Arc<LiveSegment>,
        life: Duration,
        now: Instant,
    ) -> LeaseId {
        let mut inner = self.lock();
        inner.last += 1;
        let id = inner.last;
        inner.live.insert(
            id,
            Lease {
                session,
                segment: Arc::clone(segment),
                expires: now + life,
            },
        );
        id
    }

    /// The segment, if `session` has a live lease on it.
    ///
    /// # Errors
    /// [`LeaseError::Expired`] if it had one, [`LeaseError::NoLease`] otherwise.
    pub fn find(
        &self,
        session: SessionId,
        segment: SegmentId,
        now: Instant,
    ) -> Result<Arc<LiveSegment>, LeaseError> {
        let inner = self.lock();
        let live = inner.live.values().find(|lease| {
            lease.session == session && lease.segment.id() == segment && lease.expires > now
        });
        if let Some(lease) = live {
            return Ok(Arc::clone(&lease.segment));
        }
        let expired = inner
            .expired
            .iter()
            .rev()
            .find(|old| old.session == session && old.segment == segment)
            .map(|old| (old.lease, old.at))
            .or_else(|| {
                inner
                    .live
                    .iter()
                    .find(|(_, l)| l.session == session && l.segment.id() == segment)
                    .map(|(id, l)| (*id, l.expires))
            });
        Err(match expired {
            Some((lease, at)) => LeaseError::Expired {
                lease,
                segment,
                late_ms: now.saturating_duration_since(at).as_millis(),
            },
            None => LeaseError::NoLease(segment),
        })
    }

    /// Ends leases that the holder says it no longer maps. Those that are not its own or are
    /// gone already do not count.
    pub fn release(&self, session: SessionId, leases: &[LeaseId]) -> u64 {
        let mut ended = Vec::new();
        let mut inner = self.lock();
        for id in leases {
            if inner
                .live
                .get(id)
                .is_some_and(|lease| lease.session == session)
            {
                ended.extend(inner.live.remove(id));
            }
        }
        drop(inner);
        // Dropping the last Arc of a segment unmaps it: not under the lock.
        ended.len() as u64
    }

    /// Prolongs leases to `life` from `now` on: all of them or none.
    ///
    /// # Errors
    /// [`LeaseError::Expired`], [`LeaseError::NotYours`].
    pub fn renew(
        &self,
        session: SessionId,
        leases: &[LeaseId],
        life: Duration,
        now: Instant,
    ) -> Result<(), LeaseError> {
        let mut inner = self.lock();
        for id in leases {
            match inner.live.get(id) {
                Some(lease) if lease.session == session && lease.expires > now => {}
                Some(lease) if lease.session == session => {
                    return Err(LeaseError::Expired {
                        lease: *id,
                        segment: lease.segment.id(),
                        late_ms: now.saturating_duration_since(lease.expires).as_millis(),
                    });
                }
                _ => {
                    let old = inner
                        .expired
                        .iter()
                        .find(|o| o.session == session && o.lease == *id);
                    return Err(
                        old.map_or(LeaseError::NotYours(*id), |old| LeaseError::Expired {
                            lease: *id,
                            segment: old.segment,
                            late_ms: now.saturating_duration_since(old.at).as_millis(),
                        }),
                    );
                }
            }
        }
        for id in leases {
            if let Some(lease) = inner.live.get_mut(id) {
                lease.expires = now + life;
            }
        }
        Ok(())
    }

    /// Ends the leases whose time is over. Their holders may still have the pages mapped, so a
    /// result among them is never recycled.
    pub fn expire(&self, now: Instant) -> Vec<Gone> {
        let mut inner = self.lock();
        let over: Vec<LeaseId> = inner
            .live
            .iter()
            .filter(|(_, l)| l.expires <= now)
            .map(|(id, _)| *id)
            .collect();
        let mut ended = Vec::with_capacity(over.len());
        let mut gone = Vec::with_capacity(over.len());
        for lease in over {
            let Some(old) = inner.live.remove(&lease) else {
                continue;
            };
            let segment = old.segment.id();
            gone.push(Gone {
                session: old.session,
                lease,
                segment,
            });
            inner.expired.push_back(Expired {
                session: old.session,
                lease,
                segment,
                at: old.expires,
            });
            ended.push(old);
        }
        let surplus = inner.expired.len().saturating_sub(EXPIRED_KEPT);
        inner.expired.drain(..surplus);
        drop(inner);
        for lease in &ended {
            lease.segment.never_recycle();
        }
        gone
    }

    /// Ends all leases of a session whose connection or process is gone. What it had mapped may
    /// live on in a forked child, so a result among them is never recycled.
    pub fn end_session(&self, session: SessionId) -> usize {
        let mut inner = self.lock();
        let ids: Vec<LeaseId> = inner
            .live
            .iter()
            .filter(|(_, l)| l.session == session)
            .map(|(id, _)| *id)
            .collect();
        let ended: Vec<Lease> = ids.iter().filter_map(|id| inner.live.remove(id)).collect();
        inner.expired.retain(|old| old.session != session);
        drop(inner);
        for lease in &ended {
            lease.segment.never_recycle();
        }
        ended.len()
    }

    /// When the next lease runs out.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lock().live.values().map(|lease| lease.expires).min()
    }

    /// Live leases: all, and those of `session`.
    pub fn count(&self, session: SessionId) -> (usize, usize) {
        let inner = self.lock();
        let own = inner
            .live
            .values()
            .filter(|lease| lease.session == session)
            .count();
        (inner.live.len(), own)
    }

    /// Live segments and their bytes.
    pub fn count_segments(&self) -> (usize, u64) {
        let live: Vec<_> = self
            .lock()
            .segments
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        (
            live.len(),
            live.iter().map(|segment| segment.capacity()).sum(),
        )
    }

    /// Segments that `session` has leases on.
    pub fn count_own_segments(&self, session: SessionId) -> usize {
        let inner = self.lock();
        let own: std::collections::HashSet<_> = inner
            .live
            .values()
            .filter(|lease| lease.session == session)
            .map(|lease| lease.segment.id())
            .collect();
        own.len()
    }
}
