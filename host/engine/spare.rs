//! Instances that are made before anybody asks for them.
//!
//! ```text
//! call ── takes one ──▶ … ──▶ answered ──▶ Used ── renew: the old one ends, the next one is made
//! ```
//! A call gets memory that nobody has used either way; this only moves the work to where nobody waits for it. A plugin whose
//! start function does something that can be noticed (it logs, traps, takes long) has no such instances: what it does belongs
//! to the call.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::instance::{Instance, Made};
use super::leash::{Leash, Until};
use super::limits::Limits;
use super::log::Log;
use super::state::State;
use super::{CancelToken, Compiled, Engine};
use crate::plugin::PluginHash;

/// Of one plugin, and of all: more calls at a time make their own.
const EACH_MAX: usize = 4;
const ALL_MAX: usize = 16;
/// Memory of all of them, in bytes: it counts with what the calls of this process may have.
const BYTES_MAX: u64 = 16 << 20;
/// An instance that took longer is made by the call that needs it, which its deadline ends.
const SECONDS_MAX: f64 = 0.002;
/// What making one may take, if against expectation it takes long.
const DEADLINE_MS: u64 = 20;

/// The instances that are ready, the latest last.
#[derive(Default)]
pub(super) struct Spares {
    ready: Mutex<VecDeque<(PluginHash, Made)>>,
    /// Of these plugins there are none.
    never: Mutex<HashSet<PluginHash>>,
}

impl Spares {
    /// One for a call that may have `guest_bytes`.
    pub(super) fn take(&self, plugin: &PluginHash, guest_bytes: u64) -> Option<Made> {
        let mut ready = self.ready.lock();
        let at = ready.iter().rposition(|(hash, _)| hash == plugin)?;
        let (_, made) = ready.remove(at)?;
        drop(ready);
        // Otherwise the call is told what its own instance is told.
        (made.memory_bytes() <= guest_bytes).then_some(made)
    }

    fn wants(&self, plugin: &PluginHash) -> bool {
        let ready = self.ready.lock();
        let own = ready.iter().filter(|(hash, _)| hash == plugin).count();
        own < EACH_MAX && !self.never.lock().contains(plugin)
    }

    fn put(&self, plugin: PluginHash, made: Made) {
        let mut ready = self.ready.lock();
        ready.push_back((plugin, made));
        let mut bytes: u64 = ready.iter().map(|(_, made)| made.memory_bytes()).sum();
        let mut oldest = Vec::new();
        while (ready.len() > ALL_MAX || bytes > BYTES_MAX)
            && let Some((_, made)) = ready.pop_front()
        {
            bytes -= made.memory_bytes();
            oldest.push(made);
        }
        drop(ready);
        // Not under the lock: it is the end of instances.
        drop(oldest);
    }
}

/// The instance of a call that is over, for [`Engine::renew`]. Dropping it ends the instance and makes no other.
pub struct Used {
    pub(super) instance: Instance,
    pub(super) plugin: PluginHash,
    pub(super) compiled: Arc<Compiled>,
    pub(super) limits: Limits,
    /// What making it took; 0 if it was there.
    pub(super) seconds: f64,
}

impl std::fmt::Debug for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Used").finish_non_exhaustive()
    }
}

impl Engine {
    /// Ends the instance of a call and makes one for the next, while nobody waits for either.
    pub fn renew(&self, used: Used) {
        let Used {
            instance,
            plugin,
            compiled,
            limits,
            seconds,
        } = used;
        let bytes = instance.first_bytes();
        drop(instance);
        if seconds > SECONDS_MAX || bytes > BYTES_MAX || !self.spares.wants(&plugin) {
            return;
        }
        match self.make_spare(&compiled, limits) {
            Some(made) => self.spares.put(plugin, made),
            None => drop(self.spares.never.lock().insert(plugin)),
        }
    }

    fn make_spare(&self, compiled: &Compiled, limits: Limits) -> Option<Made> {
        let nobody = Arc::from("-");
        let mut state = State::new(limits, Arc::clone(&nobody), nobody);
        // A line of its start function would be a call's.
        state.log = Log::nobodys();
        let until = Until {
            deadline: Instant::now() + Duration::from_millis(DEADLINE_MS),
            deadline_ms: DEADLINE_MS,
            cancel: CancelToken::default(),
        };
        let faults = Arc::clone(&state.faults);
        let leash = Leash::new(until, faults, Arc::clone(&compiled.traps));
        let _ticking = self.ticker.start(Arc::clone(&leash)).ok()?;
        Made::new(self, compiled, state, &leash).ok()
    }
}
