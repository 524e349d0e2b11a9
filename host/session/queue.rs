//! Who is next: a queue for each principal, and turns between them by what they used.
//!
//! ```text
//! Share (one principal: bounds, counts) ◀── Lane (its jobs, its balance) ──▶ FairQueue (whose turn it is)
//! ```
//! Deficit round robin: each turn gives a principal a [`QUANTUM`] of worker time, and each job takes what it
//! used from that. What a job will use is not known before it ran: until then it costs what its principal's
//! jobs cost lately, and whoever was wrong about that pays afterwards. `docs/decisions/0012` has the reasons.
//!
//! Whoever has used too much CPU time has no turns until some of that has flowed off ([`CpuMeter`]).
//!
//! No threads in here and no clock but the meters': `workers` has both.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::cpu::CpuMeter;

/// Worker time that one turn gives. Jobs below it alternate one by one.
const QUANTUM: i64 = 10_000_000;

/// What one principal may have of the workers, has, and had. Its bounds can change at any time.
#[derive(Debug)]
pub(super) struct Share {
    whose: Arc<str>,
    waiting_max: AtomicUsize,
    running_max: AtomicUsize,
    waiting: AtomicUsize,
    running: AtomicUsize,
    runs: AtomicU64,
    refused: AtomicU64,
    cpu: CpuMeter,
}

/// A principal's use of the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    /// Jobs that no thread has begun.
    pub(super) waiting: usize,
    /// Jobs on a thread.
    pub(super) running: usize,
    /// Jobs since the start that a thread began.
    pub(super) runs: u64,
    /// Jobs since the start that found the queue full.
    pub(super) refused: u64,
}

impl Share {
    /// Of `whose` (a principal): at most `waiting_max` jobs that wait and `running_max` that run.
    pub(super) fn new(
        whose: Arc<str>,
        waiting_max: usize,
        running_max: usize,
        cpu: CpuMeter,
    ) -> Arc<Self> {
        let share = Self {
            whose,
            waiting_max: AtomicUsize::default(),
            running_max: AtomicUsize::default(),
            waiting: AtomicUsize::default(),
            running: AtomicUsize::default(),
            runs: AtomicU64::default(),
            refused: AtomicU64::default(),
            cpu,
        };
        share.set_limits(waiting_max, running_max);
        Arc::new(share)
    }

    /// From now on; what waits and runs already stays. A principal that may run nothing would wait for ever,
    /// so one job is the least.
    pub(super) fn set_limits(&self, waiting_max: usize, running_max: usize) {
        self.waiting_max.store(waiting_max, Relaxed);
        self.running_max.store(running_max.max(1), Relaxed);
    }

    /// What its jobs take of the CPUs.
    pub(super) fn cpu(&self) -> &CpuMeter {
        &self.cpu
    }

    /// At this moment.
    pub(super) fn used(&self) -> Used {
        Used {
            waiting: self.waiting.load(Relaxed),
            running: self.running.load(Relaxed),
            runs: self.runs.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }
}

/// No more invocations may wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueFull {
    /// In all.
    #[error(
        "{waiting} invocations are waiting already, as many as the host's queue takes; \
         try again later, or have the operator raise engine.queue_len"
    )]
    Host {
        /// How many wait, of everybody.
        waiting: usize,
    },
    /// Of one principal.
    #[error(
        "{waiting} invocations of {whose} are waiting already, and its quota.queued is {limit}; \
         wait for some or cancel them, or ask the operator to raise the quota"
    )]
    Quota {
        /// Whose quota is full.
        whose: Arc<str>,
        /// How many of it wait.
        waiting: usize,
        /// How many may.
        limit: usize,
    },
}

/// Why a job was charged what it was, for [`FairQueue::end`].
#[derive(Debug)]
pub(super) struct Turn {
    share: Arc<Share>,
    charged: i64,
}

impl Turn {
    /// Whose job it is.
    pub(super) fn share(&self) -> &Arc<Share> {
        &self.share
    }
}

#[derive(Debug)]
struct Lane<J> {
    share: Arc<Share>,
    /// By the number that [`FairQueue::push`] answered.
    jobs: VecDeque<(u64, J)>,
    /// Places without a job yet.
    reserved: usize,
    running: usize,
    /// Nanoseconds of worker time that it may still use; below 0 it waits for its next turns.
    balance: i64,
    /// What a job of its costs, by the latest.
    estimate: i64,
}

impl<J> Lane<J> {
    fn new(share: Arc<Share>) -> Self {
        Self {
            share,
            jobs: VecDeque::new(),
            reserved: 0,
            running: 0,
            balance: QUANTUM,
            estimate: 0,
        }
    }

    /// Nothing to remember of it.
    fn is_done(&self) -> bool {
        self.is_idle() && self.balance >= QUANTUM
    }

    fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.reserved == 0 && self.running == 0
    }

    /// How many more its quotas let run.
    fn may_run(&self) -> usize {
        if self.share.cpu.over().is_some() {
            return 0;
        }
        let max = self.share.running_max.load(Relaxed);
        max.saturating_sub(self.running)
    }

    /// One of its jobs, which is in the queue no more, begins.
    fn begin(&mut self) -> Turn {
        let turn = Turn {
            share: Arc::clone(&self.share),
            charged: self.estimate,
        };
        self.running += 1;
        self.balance -= turn.charged;
        self.share.runs.fetch_add(1, Relaxed);
        self.tell();
        turn
    }

    fn tell(&self) {
        self.share.waiting.store(self.jobs.len(), Relaxed);
        self.share.running.store(self.running, Relaxed);
    }
}

/// The jobs of all principals that wait for a thread, and whose turn it is.
#[derive(Debug)]
pub(super) struct FairQueue<J> {
    /// Jobs that run at a time. One more may if its principal runs nothing else: whoever fills the
    /// threads with long jobs does not keep the next one waiting.
    slots: usize,
    waiting_max: usize,
    // By principal. Those that have nothing here stay only while they still owe for what they used.
    lanes: HashMap<Arc<str>, Lane<J>>,
    /// Principals whose jobs wait, by whose turn it is.
    turns: VecDeque<Arc<str>>,
    waiting: usize,
    reserved: usize,
    running: usize,
    last: u64,
}

impl<J> FairQueue<J> {
    /// For `slots` jobs at a time, with `waiting_max` others that wait.
    pub(super) fn new(slots: usize, waiting_max: usize) -> Self {
        Self {
            slots,
            waiting_max,
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            waiting: 0,
            reserved: 0,
            running: 0,
            last: 0,
        }
    }

    /// Jobs that can begin at once: they keep nobody waiting.
    fn free(&self) -> usize {
        self.slots.saturating_sub(self.running)
    }

    /// A place for a job, to be given back by [`Self::push`] or [`Self::give_back`]. The first of a principal
    /// is always granted: nobody is shut out by what others have waiting.
    ///
    /// # Errors
    /// [`QueueFull`].
    pub(super) fn reserve(&mut self, share: &Arc<Share>) -> Result<(), QueueFull> {
        let free = self.free();
        let waiting = (self.waiting + self.reserved).saturating_sub(free);
        let lane = self.lanes.get(&share.whose);
        let own = lane.map_or(0, |lane| lane.jobs.len() + lane.reserved);
        let own_free = free.min(lane.map_or(usize::MAX, Lane::may_run));
        let own_waiting = own.saturating_sub(own_free);
        let limit = share.waiting_max.load(Relaxed);
        // One may always wait, whatever the quota says.
        let full = if own >= own_free && own_waiting >= limit.max(1) {
            Some(QueueFull::Quota {
                whose: Arc::clone(&share.whose),
                waiting: own_waiting,
                limit,
            })
        } else if waiting >= self.waiting_max && own > 0 {
            Some(QueueFull::Host { waiting })
        } else {
            None
        };
        if let Some(full) = full {
            share.refused.fetch_add(1, Relaxed);
            return Err(full);
        }
        self.lane(share).reserved += 1;
        self.reserved += 1;
        Ok(())
    }

    fn lane(&mut self, share: &Arc<Share>) -> &mut Lane<J> {
        let lane = self.lanes.entry(Arc::clone(&share.whose));
        lane.or_insert_with(|| Lane::new(Arc::clone(share)))
    }

    /// A place that gets no job.
    pub(super) fn give_back(&mut self, share: &Arc<Share>) {
        self.lane(share).reserved -= 1;
        self.reserved -= 1;
        self.forget(&share.whose);
    }

    /// Puts a job into its place. Answers its number, and whether it may have to wait: false only if a
    /// thread is free for it whatever else comes.
    pub(super) fn push(&mut self, share: &Arc<Share>, job: J) -> (u64, bool) {
        self.last += 1;
        let id = self.last;
        let lane = self.lane(share);
        lane.reserved -= 1;
        lane.jobs.push_back((id, job));
        lane.tell();
        let (own, may_run) = (lane.jobs.len(), lane.may_run());
        // Others of its jobs may use too much before this one begins.
        let may_wait = share.cpu.is_limited();
        if own == 1 {
            self.turns.push_back(Arc::clone(&share.whose));
        }
        self.reserved -= 1;
        self.waiting += 1;
        (id, may_wait || self.waiting > self.free() || own > may_run)
    }

    /// Takes a job out that no thread has begun.
    pub(super) fn withdraw(&mut self, share: &Arc<Share>, id: u64) -> Option<J> {
        let lane = self.lanes.get_mut(&share.whose)?;
        let at = lane.jobs.iter().position(|(known, _)| *known == id)?;
        let (_, job) = lane.jobs.remove(at)?;
        lane.tell();
        if lane.jobs.is_empty() {
            self.turns.retain(|whose| *whose != share.whose);
        }
        self.waiting -= 1;
        self.forget(&share.whose);
        Some(job)
    }

    /// A turn at once for a job on a thread of its own, if nothing else waits for one.
    pub(super) fn begin(&mut self, share: &Arc<Share>) -> Option<Turn> {
        if self.waiting > 0 || self.free() == 0 {
            return None;
        }
        let lane = self.lane(share);
        if lane.may_run() == 0 {
            self.forget(&share.whose);
            return None;
        }
        let turn = lane.begin();
        self.running += 1;
        Some(turn)
    }

    /// Whether nothing waits any more, or may yet.
    pub(super) fn is_drained(&self) -> bool {
        self.waiting + self.reserved == 0
    }

    /// Whether [`Self::take`] has a job for one more thread.
    pub(super) fn has_next(&self) -> bool {
        self.runnable().next().is_some()
    }

    /// When the first of those that have used too much CPU time may have more.
    pub(super) fn next_opening(&self) -> Option<Instant> {
        let waiting = self.turns.iter().filter_map(|whose| self.lanes.get(whose));
        let over = waiting.filter_map(|lane| lane.share.cpu.over());
        Instant::now().checked_add(over.filter_map(|over| over.wait).min()?)
    }

    /// Lanes whose next job may begin now, whatever they owe: their places among the turns.
    fn runnable(&self) -> impl Iterator<Item = (usize, &Lane<J>)> {
        let lanes = self.turns.iter().enumerate();
        let lanes = lanes.filter_map(|(at, whose)| Some((at, self.lanes.get(whose)?)));
        lanes.filter(|(_, lane)| {
            let a_slot = self.running < self.slots;
            let the_extra_one = self.running == self.slots && lane.running == 0;
            lane.may_run() > 0 && (a_slot || the_extra_one)
        })
    }

    /// The next job, for a thread that begins it now.
    pub(super) fn take(&mut self) -> Option<(Turn, J)> {
        let solvent = self.runnable().find(|(_, lane)| lane.balance > 0);
        let at = match solvent.map(|(at, _)| at) {
            Some(at) => at,
            None => {
                // All of them owe: as many turns pass at once as the one that owes least needs. A thread never
                // stands still for a debt.
                let owed = self.runnable().map(|(at, lane)| (-lane.balance, at));
                let (owed, at) = owed.min()?;
                self.pass_turns(owed / QUANTUM + 1);
                at
            }
        };
        let whose = self.turns.remove(at)?;
        let lane = self.lanes.get_mut(&whose)?;
        let (_, job) = lane.jobs.pop_front()?;
        let turn = lane.begin();
        if !lane.jobs.is_empty() {
            self.turns.push_back(whose);
        }
        self.waiting -= 1;
        self.running += 1;
        Some((turn, job))
    }

    fn pass_turns(&mut self, turns: i64) {
        let given = QUANTUM.saturating_mul(turns);
        // What is not used is not saved up, or an idle hour would be a busy one later.
        self.lanes.retain(|_, lane| {
            lane.balance = lane.balance.saturating_add(given).min(QUANTUM);
            !lane.is_done()
        });
    }

    /// A job has ended; it used a thread for `cost`.
    pub(super) fn end(&mut self, turn: &Turn, cost: Duration) {
        let cost = i64::try_from(cost.as_nanos()).unwrap_or(i64::MAX);
        self.running -= 1;
        if let Some(lane) = self.lanes.get_mut(&turn.share.whose) {
            lane.running -= 1;
            lane.balance = lane
                .balance
                .saturating_add(turn.charged)
                .saturating_sub(cost);
            lane.estimate = lane.estimate / 2 + cost / 2;
            lane.tell();
        }
        self.forget(&turn.share.whose);
    }

    /// Drops what need not be known any more after something of `whose` has ended.
    fn forget(&mut self, whose: &Arc<str>) {
        if self.waiting + self.reserved + self.running == 0 {
            // Nobody had to wait for what was used: no debts.
            self.lanes.clear();
        } else if self.lanes.get(whose).is_some_and(Lane::is_done) {
            self.lanes.remove(whose);
        }
    }
}

#[cfg(test)]
impl<J> FairQueue<J> {
    /// Nothing waits, runs or is reserved, and nothing is remembered.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting + self.reserved + self.running == 0
            && self.lanes.is_empty()
            && self.turns.is_empty()
    }

    /// Jobs on a thread.
    pub(super) fn running(&self) -> usize {
        self.running
    }
}

#[cfg(test)]
mod tests;
