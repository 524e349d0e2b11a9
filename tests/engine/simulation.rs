//! Random grant, release, renew, expire and disconnect over leases with a fake clock, held
//! against a small model. A failure prints the seed and the steps that proptest shrank to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use strait::lease::{LeaseError, Leases, LiveSegment};
use strait_client::wire::NewTensor;
use strait_memory::Budget;
use strait_tensor::Dtype;

use crate::support::Rig;

#[derive(Clone, Debug)]
enum Step {
    Create {
        session: u64,
        life_ms: u64,
    },
    Share {
        pick: usize,
        session: u64,
        life_ms: u64,
    },
    Release {
        pick: usize,
        session: u64,
    },
    Renew {
        pick: usize,
        session: u64,
        life_ms: u64,
    },
    Pass {
        ms: u64,
    },
    Disconnect {
        session: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let session = 1..4_u64;
    let life = 1..100_u64;
    prop_oneof![
        3 => (session.clone(), life.clone()).prop_map(|(session, life_ms)| Step::Create { session, life_ms }),
        3 => (any::<usize>(), session.clone(), life.clone()).prop_map(|(pick, session, life_ms)| Step::Share { pick, session, life_ms }),
        3 => (any::<usize>(), session.clone()).prop_map(|(pick, session)| Step::Release { pick, session }),
        3 => (any::<usize>(), session.clone(), life).prop_map(|(pick, session, life_ms)| Step::Renew { pick, session, life_ms }),
        3 => (1..60_u64).prop_map(|ms| Step::Pass { ms }),
        1 => session.prop_map(|session| Step::Disconnect { session }),
    ]
}

/// What the model knows of a lease.
struct Expected {
    session: u64,
    segment: usize,
    expires: Instant,
}

struct World<'a> {
    rig: &'a Rig,
    leases: Leases,
    places: Arc<Budget>,
    now: Instant,
    model: BTreeMap<u64, Expected>,
    segments: Vec<Weak<LiveSegment>>,
}

impl World<'_> {
    fn grant(&mut self, segment: &Arc<LiveSegment>, index: usize, session: u64, life_ms: u64) {
        let life = Duration::from_millis(life_ms);
        let place = self.places.try_reserve(1).unwrap();
        let lease = self.leases.grant(session, segment, life, self.now, place);
        let expires = self.now + life;
        assert!(
            self.model
                .insert(
                    lease,
                    Expected {
                        session,
                        segment: index,
                        expires
                    }
                )
                .is_none(),
            "a lease id twice"
        );
    }

    fn picked(&self, pick: usize) -> Option<u64> {
        let ids: Vec<u64> = self.model.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[pick % ids.len()])
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Create { session, life_ms } => {
                let tensors = vec![NewTensor {
                    name: "x".to_owned(),
                    dtype: Dtype::Uint8,
                    shape: vec![8],
                }];
                let (segment, _fd) = self.rig.me().create(tensors).unwrap();
                self.segments.push(Arc::downgrade(&segment));
                let index = self.segments.len() - 1;
                self.grant(&segment, index, session, life_ms);
            }
            Step::Share {
                pick,
                session,
                life_ms,
            } => {
                let Some(lease) = self.picked(pick) else {
                    return;
                };
                let Expected {
                    session: holder,
                    segment,
                    expires,
                } = self.model[&lease];
                let Some(live) = self.segments[segment].upgrade() else {
                    return;
                };
                let found = self.leases.find(holder, live.id(), self.now);
                assert_eq!(
                    found.is_ok(),
                    self.has(holder, segment),
                    "lease {lease} expires in {:?}",
                    expires - self.now
                );
                self.grant(&live, segment, session, life_ms);
            }
            Step::Release { pick, session } => {
                let Some(lease) = self.picked(pick) else {
                    return;
                };
                let own = self.model[&lease].session == session;
                assert_eq!(
                    self.leases.release(session, &[lease]).count(),
                    usize::from(own)
                );
                if own {
                    self.model.remove(&lease);
                }
            }
            Step::Renew {
                pick,
                session,
                life_ms,
            } => {
                let Some(lease) = self.picked(pick) else {
                    return;
                };
                let life = Duration::from_millis(life_ms);
                let expected = &self.model[&lease];
                let renewed = self.leases.renew(session, &[lease], life, self.now);
                let live = expected.expires > self.now;
                match renewed {
                    Ok(()) => {
                        assert!(live && expected.session == session);
                        self.model.get_mut(&lease).unwrap().expires = self.now + life;
                    }
                    Err(LeaseError::Expired { .. }) => {
                        assert!(!live && expected.session == session)
                    }
                    Err(LeaseError::NotYours(_)) => assert_ne!(expected.session, session),
                    Err(other) => panic!("{other}"),
                }
            }
            Step::Pass { ms } => {
                self.now += Duration::from_millis(ms);
                let gone: Vec<u64> = self
                    .leases
                    .expire(self.now)
                    .0
                    .iter()
                    .map(|g| g.lease)
                    .collect();
                let expected: Vec<u64> = self
                    .model
                    .iter()
                    .filter(|(_, e)| e.expires <= self.now)
                    .map(|(id, _)| *id)
                    .collect();
                let mut sorted = gone;
                sorted.sort_unstable();
                assert_eq!(sorted, expected);
                self.model.retain(|_, e| e.expires > self.now);
            }
            Step::Disconnect { session } => {
                let own = self.model.values().filter(|e| e.session == session).count();
                assert_eq!(self.leases.end_session(session).count(), own);
                self.model.retain(|_, e| e.session != session);
            }
        }
        self.check();
    }

    fn has(&self, session: u64, segment: usize) -> bool {
        self.model
            .values()
            .any(|e| e.session == session && e.segment == segment && e.expires > self.now)
    }

    /// A segment lives exactly as long as somebody has a lease on it.
    fn check(&self) {
        for (index, segment) in self.segments.iter().enumerate() {
            let held = self.model.values().any(|e| e.segment == index);
            assert_eq!(segment.strong_count() > 0, held, "segment {index}");
        }
        for session in 1..4 {
            let own = self.model.values().filter(|e| e.session == session);
            let segments: BTreeSet<_> = own.clone().map(|e| e.segment).collect();
            assert_eq!(
                self.leases.count(session),
                (self.model.len(), own.count()),
                "leases: all, and of session {session}"
            );
            assert_eq!(self.leases.count_own_segments(session), segments.len());
        }
    }
}

#[test]
fn leases_follow_the_model() {
    // One host for all cases: it takes longer to start than a case to run.
    let rig = Rig::new();
    let config = ProptestConfig {
        cases: 256,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let walk = |steps: Vec<Step>| {
        let mut world = World {
            places: Budget::new("leases", u64::MAX),
            rig: &rig,
            leases: Leases::default(),
            now: Instant::now(),
            model: BTreeMap::new(),
            segments: Vec::new(),
        };
        let before = rig.holdings();
        for step in &steps {
            world.apply(step);
        }
        for session in 1..4 {
            drop(world.leases.end_session(session));
        }
        rig.check_holdings(&before, "a walk");
        Ok(())
    };
    TestRunner::new(config)
        .run(&prop::collection::vec(step(), 1..60), walk)
        .unwrap();
}
