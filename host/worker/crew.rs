//! The worker processes of a host: one of each principal that runs something, and a spare.
//!
//! ```text
//! start (a thread) ──▶ spare ──▶ a seat for all runs of one owner ──▶ ended: idle for long, or to make room
//!                        └─────▶ a seat for one run alone             lost: the next run takes the spare
//! ```
//! A process knows nobody before it has a seat, and nobody but its owner from then on.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use strait_memory::{PoolSegment, ResultPool};

use super::channel::ReceiveError;
use super::exchange::Trouble;
use super::messages::Totals;
use super::process::{LOOK, Process};
use super::program::Recipe;
use crate::engine::{Cause, Means, Owner, RunnerProcess};

/// How many workers there are, and how long they wait for work.
#[derive(Clone, Copy, Debug)]
pub struct CrewSettings {
    /// Processes at most; at least one.
    pub max: usize,
    /// After how long without a run a worker ends.
    pub idle: Duration,
    /// Whether one waits for the next principal, or to succeed one that is lost.
    pub spare: bool,
}

/// All workers of a host.
#[derive(Debug)]
pub(super) struct Crew {
    recipe: Arc<Recipe>,
    settings: CrewSettings,
    pool: Arc<ResultPool>,
    /// Never held while a worker is waited for.
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Those that were taken first come first.
    seats: Vec<Seat>,
    spares: Vec<Arc<Process>>,
    /// Threads that start one.
    starting: usize,
    /// Runs that have no process yet, as they came.
    line: VecDeque<Waiting>,
    last_ticket: u64,
    /// Starts that came to nothing, and why the last one did.
    failures: u64,
    failed: String,
    /// When a seat was last used.
    used: Instant,
    /// What processes that are gone have counted.
    past: Totals,
    /// CPU time that they have used.
    past_cpu: HashMap<Owner, Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    ticket: u64,
    owner: Owner,
    alone: bool,
}

/// What a process is there for.
#[derive(Debug)]
struct Seat {
    process: Arc<Process>,
    owner: Owner,
    /// For one run, after which it ends.
    alone: bool,
    /// Somebody waits for its place: it gets no run that came later.
    leaving: bool,
    running: u64,
    runs: u64,
    idle_since: Instant,
}

impl Seat {
    /// Whether a run may have it that is the `first` of those that wait, or not.
    fn serves(&self, owner: Owner, first: bool) -> bool {
        self.owner == owner && !self.alone && (first || !self.leaving)
    }
}

impl State {
    fn size(&self) -> usize {
        self.seats.len() + self.spares.len() + self.starting
    }

    /// Processes that those in line need and that there are none of.
    fn wanted(&self) -> usize {
        let mut owners = HashSet::new();
        let needs_one = |(place, waiting): &(usize, &Waiting)| {
            let served = |seat: &Seat| seat.serves(waiting.owner, *place == 0);
            waiting.alone || (!self.seats.iter().any(served) && owners.insert(waiting.owner))
        };
        self.line.iter().enumerate().filter(needs_one).count()
    }

    /// The seat that nobody has used for longest, and that nobody is about to.
    fn idlest(&self) -> Option<usize> {
        let next = self.line.front().filter(|waiting| !waiting.alone);
        let next = next.map(|waiting| waiting.owner);
        let seats = self.seats.iter().enumerate();
        let idle = seats.filter(|(_, seat)| seat.running == 0 && Some(seat.owner) != next);
        idle.min_by_key(|(_, seat)| seat.idle_since)
            .map(|(at, _)| at)
    }

    /// As `count` of those in line can have a place only if somebody makes room, who has been there longest is to.
    fn ask_to_leave(&mut self, count: usize) {
        let going = self.seats.iter().filter(|seat| seat.leaving || seat.alone);
        let more = count.saturating_sub(going.count());
        let staying = self
            .seats
            .iter_mut()
            .filter(|seat| !seat.leaving && !seat.alone);
        staying.take(more).for_each(|seat| seat.leaving = true);
    }

    fn leave_line(&mut self, ticket: u64) {
        self.line.retain(|waiting| waiting.ticket != ticket);
        if self.line.is_empty() {
            self.seats.iter_mut().for_each(|seat| seat.leaving = false);
        }
    }
}

fn lives(process: &Process) -> bool {
    !process.is_gone() && !process.has_ended()
}

/// Whether nobody waits for a run any more.
pub(super) fn is_over(means: &Means) -> bool {
    means.cancel.is_cancelled() || Instant::now() >= means.deadline
}

impl Crew {
    /// Nobody yet; results are filled that `pool` has.
    pub(super) fn new(recipe: Arc<Recipe>, settings: CrewSettings, pool: Arc<ResultPool>) -> Self {
        Self {
            recipe,
            settings: CrewSettings {
                max: settings.max.max(1),
                ..settings
            },
            pool,
            state: Mutex::new(State {
                seats: Vec::new(),
                spares: Vec::new(),
                starting: 0,
                line: VecDeque::new(),
                last_ticket: 0,
                failures: 0,
                failed: String::new(),
                used: Instant::now(),
                past: Totals::default(),
                past_cpu: HashMap::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// The process of the run's owner, or one that nobody else uses and that ends with it; as soon as there is one, and
    /// no later than anybody waits for the run.
    ///
    /// # Errors
    /// It could not be started, or is [over](is_over).
    pub(super) fn take(self: &Arc<Self>, means: &Means, alone: bool) -> Result<Seated, Trouble> {
        let mut state = self.state.lock();
        state.last_ticket += 1;
        let waiting = Waiting {
            ticket: state.last_ticket,
            owner: means.owner,
            alone,
        };
        state.line.push_back(waiting);
        let taken = self.wait(&mut state, waiting, means);
        state.leave_line(waiting.ticket);
        if !state.line.is_empty() {
            self.changed.notify_all();
        }
        let (process, runs) = taken?;
        // It was the spare.
        if runs == 1
            && let Err(why) = self.supply(&mut state)
        {
            tracing::warn!(why, "there is no spare worker");
        }
        Ok(Seated {
            crew: Arc::clone(self),
            process,
        })
    }

    fn wait(
        self: &Arc<Self>,
        state: &mut MutexGuard<'_, State>,
        waiting: Waiting,
        means: &Means,
    ) -> Result<(Arc<Process>, u64), Trouble> {
        let failures = state.failures;
        loop {
            if let Some(taken) = self.seat(state, waiting) {
                return Ok(taken);
            }
            if state.failures != failures {
                return Err(Trouble::Own(Cause::Host(state.failed.clone())));
            }
            if is_over(means) {
                return Err(ReceiveError::Late.into());
            }
            self.supply(state)
                .map_err(|why| Trouble::Own(Cause::Host(why)))?;
            let until = means.deadline.min(Instant::now() + LOOK);
            self.changed.wait_until(state, until);
        }
    }

    /// What there is for somebody in line, and how many runs it has had with this one.
    fn seat(&self, state: &mut State, waiting: Waiting) -> Option<(Arc<Process>, u64)> {
        let first = state.line.front().map(|waiting| waiting.ticket) == Some(waiting.ticket);
        let served = |seat: &Seat| !waiting.alone && seat.serves(waiting.owner, first);
        while let Some(at) = state.seats.iter().position(served) {
            let seat = &mut state.seats[at];
            if lives(&seat.process) {
                seat.running += 1;
                seat.runs += 1;
                return Some((Arc::clone(&seat.process), seat.runs));
            }
            self.part_with(state, at);
        }
        if !first {
            return None;
        }
        // One may have ended while it waited.
        while let Some(process) = state.spares.pop() {
            if lives(&process) {
                state.seats.push(Seat {
                    process: Arc::clone(&process),
                    owner: waiting.owner,
                    alone: waiting.alone,
                    leaving: false,
                    running: 1,
                    runs: 1,
                    idle_since: Instant::now(),
                });
                return Some((process, 1));
            }
        }
        None
    }

    /// Has processes started for those in line, and one to spare; if there may be no more, idle ones end.
    fn supply(self: &Arc<Self>, state: &mut State) -> Result<(), String> {
        self.sweep(state);
        loop {
            let wanted = state.wanted();
            // Whoever waits now comes first.
            let spare = wanted == 0 && self.settings.spare && !state.seats.is_empty();
            let ready = state.spares.len() + state.starting;
            if ready >= wanted + usize::from(spare) {
                return Ok(());
            }
            if state.size() >= self.settings.max {
                // A spare is not worth anybody's worker.
                if spare {
                    return Ok(());
                }
                let Some(at) = state.idlest() else {
                    state.ask_to_leave(wanted - ready);
                    return Ok(());
                };
                self.part_with(state, at);
            }
            self.start(state)?;
        }
    }

    /// Starts a worker on a thread of its own: whoever waits for it does that no longer than it has time.
    fn start(self: &Arc<Self>, state: &mut State) -> Result<(), String> {
        let (crew, recipe) = (Arc::downgrade(self), Arc::clone(&self.recipe));
        std::thread::Builder::new()
            .name("strait-starter".to_owned())
            .spawn(move || {
                let started = Process::start(&recipe, || crew.strong_count() == 0);
                let Some(crew) = crew.upgrade() else {
                    return;
                };
                let mut state = crew.state.lock();
                state.starting -= 1;
                match started {
                    Ok(process) => state.spares.push(process),
                    Err(error) => {
                        tracing::warn!(%error);
                        state.failures += 1;
                        state.failed = error.to_string();
                    }
                }
                crew.changed.notify_all();
            })
            .map_err(|e| format!("no thread to start a worker: {e}"))?;
        state.starting += 1;
        Ok(())
    }

    /// Finds those that have ended by themselves, or by somebody's hand.
    fn sweep(&self, state: &mut State) {
        while let Some(at) = state.seats.iter().position(|seat| !lives(&seat.process)) {
            self.part_with(state, at);
        }
        state.spares.retain(|process| lives(process));
    }

    /// Ends a process if it has not ended yet. What it would have filled is of no use to another.
    fn part_with(&self, state: &mut State, at: usize) {
        let Seat { process, owner, .. } = state.seats.remove(at);
        process.end();
        *state.past_cpu.entry(owner).or_default() += process.cpu_time();
        // A worker may tell anything.
        state.past = state.past.with(process.totals(), u64::saturating_add);
        self.pool.forget(process.number());
    }

    /// Frees what `process` could still fill when that, which was killed, is no more: waited for by nobody but who needs
    /// that memory.
    pub(super) fn bury(&self, process: &Process, segments: Vec<PoolSegment>) {
        if !segments.is_empty() {
            self.pool.budget().free_slowly(process.bury(segments));
        }
    }

    /// Ends those that were idle for too long, and spares that nobody needs.
    pub(super) fn end_idle(&self, now: Instant) {
        let mut state = self.state.lock();
        let idle = |since: Instant| now.saturating_duration_since(since) >= self.settings.idle;
        let due = |seat: &Seat| seat.running == 0 && idle(seat.idle_since);
        while let Some(at) = state.seats.iter().position(due) {
            self.part_with(&mut state, at);
        }
        if state.line.is_empty() {
            // Its owner's worker may have been lost a moment ago.
            let needed = !state.seats.is_empty() || !idle(state.used);
            let keep = usize::from(self.settings.spare && needed);
            while state.spares.len() > keep {
                state.spares.pop().inspect(|process| process.end());
            }
        }
    }

    /// What all workers together have counted, and their warm mappings.
    pub(super) fn totals(&self) -> (Totals, strait_memory::LotStats) {
        let mut state = self.state.lock();
        self.sweep(&mut state);
        let mut totals = state.past;
        let mut parked = strait_memory::LotStats::default();
        for seat in &state.seats {
            totals = totals.with(seat.process.totals(), u64::saturating_add);
            let lot = seat.process.counts().lot;
            parked.mappings = parked.mappings.saturating_add(lot.mappings);
            parked.idle_mappings = parked.idle_mappings.saturating_add(lot.idle_mappings);
            parked.idle_bytes = parked.idle_bytes.saturating_add(lot.idle_bytes);
        }
        (totals, parked)
    }

    /// CPU time that all processes of an owner have used.
    pub(super) fn cpu_time(&self, owner: Owner) -> Duration {
        let state = self.state.lock();
        let past = state.past_cpu.get(&owner).copied().unwrap_or_default();
        let seats = state.seats.iter().filter(|seat| seat.owner == owner);
        seats.fold(past, |sum, seat| sum + seat.process.cpu_time())
    }

    /// Each one that lives.
    pub(super) fn processes(&self) -> Vec<RunnerProcess> {
        let mut state = self.state.lock();
        self.sweep(&mut state);
        let seats = state.seats.iter().map(|seat| RunnerProcess {
            owner: Some(seat.owner),
            running: seat.running,
            runs: seat.runs,
            ..seat.process.about()
        });
        let spares = state.spares.iter().map(|process| process.about());
        let mut all: Vec<_> = seats.chain(spares).collect();
        all.sort_by_key(|process| process.number);
        all
    }
}

/// A run's seat in a process, until it is dropped.
#[derive(Debug)]
pub(super) struct Seated {
    crew: Arc<Crew>,
    process: Arc<Process>,
}

impl Seated {
    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }
}

impl Drop for Seated {
    fn drop(&mut self) {
        let mut state = self.crew.state.lock();
        state.used = Instant::now();
        let (number, used) = (self.process.number(), state.used);
        let mut seats = state.seats.iter();
        if let Some(at) = seats.position(|seat| seat.process.number() == number) {
            let seat = &mut state.seats[at];
            seat.running -= 1;
            seat.idle_since = used;
            if seat.alone || seat.process.is_gone() {
                self.crew.part_with(&mut state, at);
            }
        }
        if !state.line.is_empty() {
            self.crew.changed.notify_all();
        }
    }
}
