//! A retry of an invocation gets the first one's answer, and nothing else does.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use sha2::{Digest, Sha256};
use strait_protocol as wire;

use super::answer::{Answer, Invoked};
use super::prepare::{Found, Resolved};
use super::run::{Call, NotJoined, Run, WAITERS_MAX};
use crate::error::{Code, Reason, Status};
use crate::lease::{Principal, SegmentId};
use crate::plugin::hex;

/// How long an answer is kept for repeats.
const KEPT: Duration = Duration::from_secs(60);

pub(super) type Key = (Principal, String);

/// What makes two requests the same one. How long a caller waits, how it gets the results and
/// under which request id are its own affair.
#[derive(Debug)]
pub(super) struct Fingerprint {
    /// The fields as they were sent, by name, each as a hash.
    fields: [(&'static str, [u8; 32]); 10],
    /// Port to the segment behind the name of its input, where there was one.
    named: BTreeMap<String, SegmentId>,
}

impl Fingerprint {
    /// Of `invoke`, whose inputs stand for `found` now.
    pub(super) fn of(invoke: &wire::Invoke, found: &Resolved) -> Self {
        let mut inputs = BTreeMap::new();
        let mut named = BTreeMap::new();
        let published: HashSet<&str> = invoke.publish.values().map(String::as_str).collect();
        for (port, input) in &invoke.inputs {
            let found = found.get(port).and_then(|found| found.as_ref().ok());
            let sent = match input {
                wire::Input::Text(text) => match text.split_once('#') {
                    Some((name, tensor)) => ("name", Cow::from(name), Some(tensor)),
                    None => ("name", Cow::from(text), None),
                },
                wire::Input::Flight { name, tensor } => {
                    ("name", Cow::from(name), tensor.as_deref())
                }
                wire::Input::Segment { segment, tensor } => {
                    ("segment", Cow::from(segment), tensor.as_deref())
                }
                // Its elements, wherever in the payload they were.
                wire::Input::Inline { inline } => {
                    let bytes = match found {
                        Some((Found::Inline(bytes), _)) => Sha256::digest(&**bytes),
                        Some((Found::Segment(_), _)) | None => Sha256::digest(b""),
                    };
                    let elements = (&inline.dtype, &inline.shape, hex(&bytes.into()));
                    ("inline", Cow::from(hex(&hash(&elements))), None)
                }
            };
            // A name that the request itself publishes stands for another segment once it is done.
            if sent.0 == "name"
                && !published.contains(&*sent.1)
                && let Some((Found::Segment(segment), _)) = found
            {
                named.insert(port.clone(), segment.id());
            }
            inputs.insert(port, sent);
        }
        Self {
            fields: [
                ("kernel", hash(&invoke.kernel)),
                ("pipeline", hash(&invoke.pipeline)),
                ("inputs", hash(&inputs)),
                ("parameters", hash(&invoke.parameters)),
                ("publish", hash(&invoke.publish)),
                ("replace", hash(&invoke.replace)),
                ("seal", hash(&invoke.seal)),
                ("inline_bytes", hash(&invoke.inline_bytes.unwrap_or(0))),
                ("limits", hash(&invoke.limits.unwrap_or_default())),
                ("verify", hash(&invoke.verify)),
            ],
            named,
        }
    }

    /// What of this is not as it was the first time.
    fn differs(&self, first: &Self) -> Option<String> {
        let fields = self.fields.iter().zip(&first.fields);
        let other: Vec<_> = fields
            .filter(|(now, then)| now != then)
            .map(|((name, _), _)| format!("`{name}`"))
            .collect();
        if !other.is_empty() {
            return Some(format!("{} differ", other.join(", ")));
        }
        // A name that is gone has not been given to another segment.
        self.named
            .iter()
            .find(|(port, id)| first.named.get(*port).is_some_and(|then| then != *id))
            .map(|(port, _)| format!("the flight given for input `{port}` has been replaced since"))
    }
}

fn hash(value: &impl Serialize) -> [u8; 32] {
    // Maps are sorted and all of these came as JSON, so equal values are equal bytes.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    Sha256::digest(bytes).into()
}

#[derive(Debug)]
enum Entry {
    Running(Fingerprint, Arc<Run>),
    Done(Fingerprint, Arc<Invoked>, Instant),
}

/// Answers by (principal, key).
#[derive(Debug, Default)]
pub(super) struct Answers {
    entries: Mutex<HashMap<Key, Entry>>,
}

/// What to do with a request that has a key.
pub(super) enum Turn {
    /// It is the first: run it and call [`Answers::finish`].
    First(Arc<Run>, Call),
    /// It waits for the first one's outcome.
    Joined(Arc<Run>, Call),
    /// It was answered.
    Answered,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock()
    }

    pub(super) fn begin(
        &self,
        key: &Key,
        fingerprint: Fingerprint,
        kernel: &str,
        deadline_ms: u64,
        mut answer: Answer,
    ) -> Turn {
        let mut entries = self.lock();
        let differs = match entries.get(key) {
            Some(Entry::Running(first, run)) if !run.is_over() => fingerprint.differs(first),
            Some(Entry::Done(first, _, at)) if at.elapsed() <= KEPT => fingerprint.differs(first),
            _ => None,
        };
        if let Some(what) = differs {
            drop(entries);
            answer.give(Err(reused(key, &what)));
            return Turn::Answered;
        }
        match entries.get(key) {
            Some(Entry::Running(_, run)) => match run.join(answer, deadline_ms) {
                Ok(call) => return Turn::Joined(Arc::clone(run), call),
                Err(NotJoined::Over(back)) => answer = back,
                Err(NotJoined::Full(answer)) => {
                    drop(entries);
                    answer.give(Err(too_many()));
                    return Turn::Answered;
                }
            },
            Some(Entry::Done(_, invoked, at)) if at.elapsed() <= KEPT => {
                let invoked = Arc::clone(invoked);
                drop(entries);
                answer.give(Ok(invoked));
                return Turn::Answered;
            }
            _ => {}
        }
        let (run, call) = Run::begin(kernel, answer, deadline_ms);
        let before = entries.insert(key.clone(), Entry::Running(fingerprint, Arc::clone(&run)));
        drop(entries);
        // Results that nobody else holds are freed here: not under the lock.
        drop(before);
        Turn::First(run, call)
    }

    /// The outcome of `run`: kept if it succeeded, forgotten if not, so that a retry runs anew.
    pub(super) fn finish(&self, key: &Key, run: &Arc<Run>, outcome: Option<&Arc<Invoked>>) {
        let mut entries = self.lock();
        // Not if everybody had left and the key is another run's by now.
        if !matches!(entries.get(key), Some(Entry::Running(_, now)) if Arc::ptr_eq(now, run)) {
            return;
        }
        let entry = entries.remove(key);
        if let (Some(Entry::Running(fingerprint, _)), Some(invoked)) = (entry, outcome) {
            let done = Entry::Done(fingerprint, Arc::clone(invoked), Instant::now());
            entries.insert(key.clone(), done);
        }
    }

    /// Ends the run that goes on under that key, for all who wait for it; whether there is one.
    pub(super) fn cancel(&self, key: &Key) -> bool {
        let run = match self.lock().get(key) {
            Some(Entry::Running(_, run)) if !run.is_over() => Arc::clone(run),
            _ => return false,
        };
        run.cancel();
        true
    }

    /// Forgets the answer that is kept under that key; whether there was one.
    pub(super) fn forget(&self, key: &Key) -> bool {
        let mut entries = self.lock();
        let Some(Entry::Done(..)) = entries.get(key) else {
            return false;
        };
        let gone = entries.remove(key);
        // Results that nobody else holds are freed here: not under the lock.
        drop(entries);
        gone.is_some()
    }

    /// Takes out the answers whose time is over.
    pub(super) fn expire(&self, now: Instant) -> Vec<Arc<Invoked>> {
        let mut old = Vec::new();
        self.lock().retain(|_, entry| match entry {
            Entry::Done(_, invoked, at) if now.saturating_duration_since(*at) > KEPT => {
                old.push(Arc::clone(invoked));
                false
            }
            _ => true,
        });
        old
    }
}

fn too_many() -> Status {
    let message = format!(
        "{WAITERS_MAX} requests wait for the run of this idempotency key already; one answer is as good as all of them"
    );
    Status::new(Code::ResourceExhausted, Reason::QuotaExceeded, message).with("limit", WAITERS_MAX)
}

fn reused((principal, key): &Key, what: &str) -> Status {
    Status::new(
        Code::FailedPrecondition,
        Reason::IdempotencyKeyReused,
        format!(
            "idempotency key `{key}` belongs to another request of {principal}: {what}; take a new key for a new request"
        ),
    )
    .with("idempotency_key", key.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_time_by_its_length_and_not_by_the_square_of_it() {
        const COUNT: usize = 40_000;
        let each = |name: &str| -> BTreeMap<String, String> {
            (0..COUNT)
                .map(|n| (n.to_string(), name.to_owned()))
                .collect()
        };
        let invoke = serde_json::json!({"kernel": "k", "inputs": each("x"), "publish": each("y")});
        let invoke = serde_json::from_value(invoke).expect("an INVOKE");
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = crate::config::Config::default();
        config.engine.cache = Some(std::path::PathBuf::new());
        let host = super::super::Host::start(config, directory.path()).expect("a host");
        let tensors = serde_json::json!([{"name": "x", "dtype": "int8", "shape": [1]}]);
        let tensors = serde_json::from_value(tensors).expect("tensors");
        let (segment, _fd) = host.own_caller().create(tensors).expect("made");
        let place = segment.tensors()[0].clone();
        let found = || Ok((Found::Segment(Arc::clone(&segment)), place.clone()));
        let found: Resolved = (0..COUNT).map(|n| (n.to_string(), found())).collect();
        let begin = Instant::now();
        let fingerprint = Fingerprint::of(&invoke, &found);
        let took = begin.elapsed();
        assert_eq!(fingerprint.named.len(), COUNT);
        assert!(took < Duration::from_secs(2), "{took:?}");
    }
}
