//! A retry of an invocation gets the first one's answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::invoke::{Answer, Invoked};
use crate::error::Status;
use crate::lease::Principal;

/// How long an answer is kept for repeats.
const KEPT: Duration = Duration::from_secs(60);

type Key = (Principal, String);

#[derive(Debug)]
enum Entry {
    Running(Vec<Answer>),
    Done(Arc<Invoked>, Instant),
}

/// Answers by (principal, key).
#[derive(Debug, Default)]
pub(super) struct Answers {
    entries: Mutex<HashMap<Key, Entry>>,
}

/// What to do with a request that has a key.
pub(super) enum Turn {
    /// It is the first: run it and call [`Answers::finish`].
    First(Answer),
    /// It will be answered with the first one's result.
    Joined,
}

impl Answers {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn begin(&self, key: &Key, answer: Answer) -> Turn {
        let mut entries = self.lock();
        match entries.get_mut(key) {
            None => {
                entries.insert(key.clone(), Entry::Running(Vec::new()));
                Turn::First(answer)
            }
            Some(Entry::Running(waiting)) => {
                waiting.push(answer);
                Turn::Joined
            }
            Some(Entry::Done(invoked, _)) => {
                let invoked = Arc::clone(invoked);
                drop(entries);
                answer.give(Ok(invoked));
                Turn::Joined
            }
        }
    }

    /// The first one's result: kept if it succeeded, forgotten if not, so that a retry runs anew.
    pub(super) fn finish(&self, key: &Key, result: &Result<Arc<Invoked>, Status>) {
        let mut entries = self.lock();
        let entry = match result {
            Ok(invoked) => entries.insert(
                key.clone(),
                Entry::Done(Arc::clone(invoked), Instant::now()),
            ),
            Err(_) => entries.remove(key),
        };
        drop(entries);
        if let Some(Entry::Running(waiting)) = entry {
            for answer in waiting {
                answer.give(result.clone());
            }
        }
    }

    pub(super) fn expire(&self, now: Instant) {
        let mut old = Vec::new();
        self.lock().retain(|_, entry| match entry {
            Entry::Done(invoked, at) if now.saturating_duration_since(*at) > KEPT => {
                old.push(Arc::clone(invoked));
                false
            }
            _ => true,
        });
        // The results, if nobody else holds them, are freed here: not under the lock.
        drop(old);
    }
}
