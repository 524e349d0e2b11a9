//! Who may hold what, and until when.
//!
//! ```text
//! Leases ──▶ Lease ──▶ Arc<LiveSegment> ──▶ Body (Open | Client | Sealed | Result)
//! ```
//! A [`LiveSegment`] is alive while anybody has an `Arc` of it: a lease, a name, a running
//! invocation. The last one gone frees its bytes, or gives a result back to the pool.

mod principal;
mod segment;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use strait_memory::Charge;

pub use principal::Principal;
pub use segment::{Body, Framing, LiveSegment, SealError, SegmentId};

/// A session, for the life of the host.
pub type SessionId = u64;

/// A session's right to a segment. Positive.
pub type LeaseId = u64;

/// How many ended leases are remembered, to tell "expired" from "never was".
const EXPIRED_KEPT: usize = 1024;

#[derive(Debug)]
struct Lease {
    segment: Arc<LiveSegment>,
    expires: Instant,
    /// Its place among its principal's.
    _place: Charge,
}

/// The leases of one session.
#[derive(Debug, Default)]
struct Own {
    live: HashMap<LeaseId, Lease>,
    /// By segment, the one that lives longest last.
    of: HashMap<SegmentId, BTreeSet<(Instant, LeaseId)>>,
}

#[derive(Debug)]
struct Expired {
    session: SessionId,
    lease: LeaseId,
    segment: SegmentId,
    at: Instant,
}

// Every call of a session costs what its own leases cost, however many others have.
#[derive(Debug, Default)]
struct Inner {
    last: LeaseId,
    sessions: HashMap<SessionId, Own>,
    /// All live leases, the next to run out first.
    ends: BTreeSet<(Instant, LeaseId, SessionId)>,
    expired: VecDeque<Expired>,
    segments: HashMap<SegmentId, Weak<LiveSegment>>,
}

impl Inner {
    fn insert(&mut self, session: SessionId, id: LeaseId, lease: Lease) {
        let own = self.sessions.entry(session).or_default();
        let of = own.of.entry(lease.segment.id()).or_default();
        of.insert((lease.expires, id));
        self.ends.insert((lease.expires, id, session));
        own.live.insert(id, lease);
    }

    fn remove(&mut self, session: SessionId, id: LeaseId) -> Option<Lease> {
        let own = self.sessions.get_mut(&session)?;
        let lease = own.live.remove(&id)?;
        let segment = lease.segment.id();
        if let Some(of) = own.of.get_mut(&segment) {
            of.remove(&(lease.expires, id));
            if of.is_empty() {
                own.of.remove(&segment);
            }
        }
        if own.live.is_empty() {
            self.sessions.remove(&session);
        }
        self.ends.remove(&(lease.expires, id, session));
        Some(lease)
    }

    fn get(&self, session: SessionId, id: LeaseId) -> Option<&Lease> {
        self.sessions.get(&session)?.live.get(&id)
    }
}

/// Leases that have ended. Dropping it frees the segments that nobody else holds, which takes
/// its time: do it where nobody waits.
#[derive(Debug)]
#[must_use = "dropping it may free segments"]
pub struct Ended(Vec<Lease>);

impl Ended {
    /// How many leases.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Bytes of their segments; what dropping frees is at most that.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = self.0.iter().map(|lease| lease.segment.capacity());
        bytes.fold(0, u64::saturating_add)
    }
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
        "lease {lease} on segment {segment} expired {late_ms} ms ago; renew leases sooner, or map it again"
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
    #[error("lease {0} is not (or no longer) this session's; map the segment again")]
    NotYours(LeaseId),
}

/// All leases of the host. Every call takes the time, so that tests can set it.
#[derive(Debug, Default)]
pub struct Leases {
    // Held for map operations only, never across I/O or an await.
    inner: Mutex<Inner>,
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Makes a segment known by its id, for [`Leases::count_segments`].
    pub fn register(&self, segment: &Arc<LiveSegment>) {
        let mut inner = self.lock();
        if inner.segments.len() >= 64 && inner.segments.len().is_power_of_two() {
            inner.segments.retain(|_, weak| weak.strong_count() > 0);
        }
        inner.segments.insert(segment.id(), Arc::downgrade(segment));
    }

    /// Gives `session` a lease on `segment` for `life` from `now` on, and holds `place` until it ends.
    pub fn grant(
        &self,
        session: SessionId,
        segment: &Arc<LiveSegment>,
        life: Duration,
        now: Instant,
        place: Charge,
    ) -> LeaseId {
        let mut inner = self.lock();
        inner.last += 1;
        let id = inner.last;
        let lease = Lease {
            segment: Arc::clone(segment),
            expires: now + life,
            _place: place,
        };
        inner.insert(session, id, lease);
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
        let own = inner.sessions.get(&session);
        let longest = own.and_then(|own| own.of.get(&segment)?.last().copied());
        if let Some((expires, lease)) = longest
            && expires > now
            && let Some(lease) = inner.get(session, lease)
        {
            return Ok(Arc::clone(&lease.segment));
        }
        let expired = inner
            .expired
            .iter()
            .rev()
            .find(|old| old.session == session && old.segment == segment)
            .map(|old| (old.at, old.lease))
            .or(longest);
        Err(match expired {
            Some((at, lease)) => LeaseError::Expired {
                lease,
                segment,
                late_ms: now.saturating_duration_since(at).as_millis(),
            },
            None => LeaseError::NoLease(segment),
        })
    }

    /// Ends leases that the holder says it no longer maps. Those that are not its own or are
    /// gone already do not count.
    pub fn release(&self, session: SessionId, leases: &[LeaseId]) -> Ended {
        let mut inner = self.lock();
        let ended = leases.iter().filter_map(|id| inner.remove(session, *id));
        Ended(ended.collect())
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
            match inner.get(session, *id) {
                Some(lease) if lease.expires > now => {}
                Some(lease) => {
                    return Err(LeaseError::Expired {
                        lease: *id,
                        segment: lease.segment.id(),
                        late_ms: now.saturating_duration_since(lease.expires).as_millis(),
                    });
                }
                None => {
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
            if let Some(mut lease) = inner.remove(session, *id) {
                lease.expires = now + life;
                inner.insert(session, *id, lease);
            }
        }
        Ok(())
    }

    /// Ends the leases whose time is over. Their holders may still have the pages mapped, so a
    /// result among them is never recycled.
    pub fn expire(&self, now: Instant) -> (Vec<Gone>, Ended) {
        let mut inner = self.lock();
        let mut ended = Vec::new();
        let mut gone = Vec::new();
        while let Some((at, lease, session)) = inner.ends.first().copied()
            && at <= now
        {
            let Some(old) = inner.remove(session, lease) else {
                break;
            };
            let segment = old.segment.id();
            gone.push(Gone {
                session,
                lease,
                segment,
            });
            inner.expired.push_back(Expired {
                session,
                lease,
                segment,
                at,
            });
            ended.push(old);
        }
        let surplus = inner.expired.len().saturating_sub(EXPIRED_KEPT);
        inner.expired.drain(..surplus);
        drop(inner);
        for lease in &ended {
            lease.segment.never_recycle();
        }
        (gone, Ended(ended))
    }

    /// Ends all leases of a session whose connection or process is gone. What it had mapped may
    /// live on in a forked child, so a result among them is never recycled.
    pub fn end_session(&self, session: SessionId) -> Ended {
        let mut inner = self.lock();
        let own = inner.sessions.remove(&session).unwrap_or_default();
        for (id, lease) in &own.live {
            inner.ends.remove(&(lease.expires, *id, session));
        }
        inner.expired.retain(|old| old.session != session);
        drop(inner);
        let ended: Vec<Lease> = own.live.into_values().collect();
        for lease in &ended {
            lease.segment.never_recycle();
        }
        Ended(ended)
    }

    /// Live leases: all, and those of `session`.
    pub fn count(&self, session: SessionId) -> (usize, usize) {
        let inner = self.lock();
        let own = inner.sessions.get(&session).map_or(0, |own| own.live.len());
        (inner.ends.len(), own)
    }

    /// Live segments and their bytes: all, or those of `owner`.
    pub fn count_segments(&self, owner: Option<&Principal>) -> (usize, u64) {
        let live: Vec<_> = self
            .lock()
            .segments
            .values()
            .filter_map(Weak::upgrade)
            .filter(|segment| owner.is_none_or(|owner| segment.owner() == owner))
            .collect();
        (
            live.len(),
            live.iter().map(|segment| segment.capacity()).sum(),
        )
    }

    /// Segments that `session` has leases on.
    pub fn count_own_segments(&self, session: SessionId) -> usize {
        let inner = self.lock();
        inner.sessions.get(&session).map_or(0, |own| own.of.len())
    }
}
