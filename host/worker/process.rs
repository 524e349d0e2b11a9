//! One worker process, as the host sees it: started, talked to, ended.

mod burial;
mod mapped;

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use strait_memory::{Author, FrameSocket, KeepsMappings};

use super::channel::{self, Channel, ReceiveError};
use super::confine;
use super::messages::{Answer, Ask, Control, Controlled, Counts, Start, Totals};
use super::program::{Census, Program, Recipe, Spawned};
use crate::engine::{Cause, EngineConfig, RunnerProcess};
use crate::plugin::PluginHash;
use crate::text;

use burial::{Burial, Buried};
use mapped::Keeper;
pub(super) use mapped::Mapped;

/// What a worker may send in one message: beside tensors; and of a plugin, which is a description. A byte of it can become
/// tens of bytes of this process before anything of it is looked at.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const DESCRIPTION_BYTES_MAX: usize = 16 << 20;
/// What a worker gets to start, and to answer what it needs no kernel for.
const START_MAX: Duration = Duration::from_secs(30);
const CONTROL_MAX: Duration = Duration::from_secs(2);
/// Walls that one may lack, and the bytes that are kept of each.
const WALLS_MAX: usize = 16;
const WALL_BYTES_MAX: usize = 200;

/// How often a run that is waited for is asked whether it was cancelled.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// How large each kernel's results were the last time, in bytes.
pub(super) type Needs = Mutex<HashMap<(PluginHash, usize, bool), Vec<u64>>>;

/// The walls that a worker process lacks on this Linux, in words. One is started to find out.
///
/// # Errors
/// It does not start.
pub fn lacking_walls(
    program: Option<&Path>,
    engine: EngineConfig,
    uids: Option<RangeInclusive<u32>>,
) -> io::Result<Vec<String>> {
    let program = Program::open(program, vec!["worker".to_owned()], uids)?;
    let recipe = Recipe::describer(Arc::new(program), engine, false);
    let process = Process::start(&recipe, || false)?;
    process.end_here();
    Ok(process.about().lacks)
}

/// A worker. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    number: u64,
    /// In the log.
    name: Arc<str>,
    pid: u32,
    started: Instant,
    /// Walls that this Linux lacks, as it told when it started.
    lacks: OnceLock<Vec<String>>,
    fds: u64,
    child: Mutex<Option<Spawned>>,
    /// CPU time that it has used, as it was last looked at, in nanoseconds.
    cpu: AtomicU64,
    /// For what is answered: held until it is.
    control: Mutex<Channel>,
    /// The same socket, for what is not: nobody who cancels waits for an answer to something else. What is sent after
    /// the start is one packet each, so the two cannot get mixed.
    cancels: Mutex<Channel>,
    lanes: Mutex<Vec<Channel>>,
    lane_free: Condvar,
    /// This end of each socket, lent out or not: Linux closes the other one late.
    sockets: Mutex<Vec<Weak<FrameSocket>>>,
    streams: Mutex<usize>,
    streams_max: usize,
    keeper: Arc<Keeper>,
    gone: AtomicBool,
    burial: Arc<Burial>,
    census: Arc<Census>,
    /// Segments that it has open for reading.
    inputs: Mutex<HashSet<u64>>,
    /// Plugins that it has.
    plugins: Mutex<HashSet<PluginHash>>,
    totals: Mutex<Totals>,
    counts: Mutex<Counts>,
    needs: Needs,
    /// The runs that are told to it and not over.
    runs: Mutex<Vec<(PluginHash, Arc<AtomicBool>)>>,
}

/// What runs in a worker at the same time, seen by one of them; it leaves when it is dropped.
#[derive(Debug)]
pub(super) struct Company {
    process: Arc<Process>,
    /// A run of another plugin was there.
    mixed: Arc<AtomicBool>,
}

impl Company {
    pub(super) fn is_alone(&self) -> bool {
        !self.mixed.load(Ordering::Acquire)
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        let mut runs = self.process.runs.lock();
        runs.retain(|(_, mixed)| !Arc::ptr_eq(mixed, &self.mixed));
    }
}

impl Process {
    /// # Errors
    /// Linux gives no process, or it does not come up in [`START_MAX`] or before it `is_over`.
    pub(super) fn start(recipe: &Recipe, is_over: impl Fn() -> bool) -> io::Result<Arc<Self>> {
        let number = recipe.census.started.fetch_add(1, Ordering::Relaxed) + 1;
        let name = recipe.name(number);
        let process = Self::begin(recipe, number, &name, is_over).map_err(|error| {
            let text = format!(
                "no worker process could be started: {error}; what it said itself is in the log, its program is the setting workers.program"
            );
            io::Error::new(error.kind(), text)
        })?;
        tracing::info!(worker = &*name, "a worker process has started");
        Ok(process)
    }

    fn begin(
        recipe: &Recipe,
        number: u64,
        name: &Arc<str>,
        is_over: impl Fn() -> bool,
    ) -> io::Result<Arc<Self>> {
        let (own, its) = FrameSocket::pair()?;
        let mut pairs = Vec::new();
        for _ in 0..recipe.lanes {
            pairs.push(FrameSocket::pair()?);
        }
        let (lanes, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let cancels = FrameSocket::from(own.as_fd().try_clone_to_owned()?);
        let (control, cancels) = (Channel::new(own)?, Channel::new(cancels)?);
        let lanes = lanes.into_iter().map(Channel::new);
        let lanes = lanes.collect::<io::Result<Vec<_>>>()?;
        let sockets = lanes.iter().chain([&control]).map(Channel::socket);
        let sockets = Mutex::new(sockets.collect());
        let child = recipe.program.spawn(its, name)?;
        let start = Start {
            uid: child.uid(),
            ..recipe.start.clone()
        };
        recipe.census.living.fetch_add(1, Ordering::Relaxed);
        recipe.census.fds.fetch_add(recipe.fds(), Ordering::Relaxed);
        let process = Arc::new_cyclic(|process| Self {
            number,
            name: Arc::clone(name),
            pid: child.child.id(),
            started: Instant::now(),
            lacks: OnceLock::new(),
            fds: recipe.fds(),
            child: Mutex::new(Some(child)),
            cpu: AtomicU64::new(0),
            control: Mutex::new(control),
            cancels: Mutex::new(cancels),
            lanes: Mutex::new(lanes),
            keeper: Arc::new(Keeper(Weak::clone(process))),
            lane_free: Condvar::new(),
            sockets,
            streams: Mutex::new(0),
            streams_max: recipe.start.streams,
            gone: AtomicBool::new(false),
            burial: Arc::default(),
            census: Arc::clone(&recipe.census),
            inputs: Mutex::default(),
            plugins: Mutex::default(),
            totals: Mutex::default(),
            counts: Mutex::default(),
            needs: Needs::default(),
            runs: Mutex::default(),
        });
        let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        let mut control = process.control.lock();
        control.send(&Control::Start(start), &fds)?;
        drop(fds);
        drop(theirs);
        let until = Instant::now() + START_MAX;
        let came = loop {
            match control.wait(until.min(Instant::now() + LOOK)) {
                Err(ReceiveError::Late) if !is_over() && Instant::now() < until => {}
                came => break came,
            }
        };
        let rest = Instant::now() + CONTROL_MAX;
        let started = came.and_then(|()| control.receive(ANSWER_BYTES_MAX, 0, Some(rest)));
        drop(control);
        match started {
            Ok((Controlled::Started(started), _)) => {
                let lacks = started.map_err(|why| {
                    io::Error::other(text::one_line(why, text::MESSAGE_BYTES_MAX))
                })?;
                let lacks = recipe.program.lacking.iter().cloned().chain(lacks);
                let lacks = lacks.map(|wall| text::one_line(wall, WALL_BYTES_MAX));
                let lacks = process
                    .lacks
                    .get_or_init(|| lacks.take(WALLS_MAX).collect());
                for wall in lacks {
                    tracing::warn!(worker = &**name, wall, "a worker process lacks a wall");
                }
                confine::check(lacks, recipe.require_walls).map_err(io::Error::other)?;
            }
            Ok((other, _)) => {
                return Err(io::Error::other(format!("it answered {}", other.kind())));
            }
            Err(error) => return Err(io::Error::other(error)),
        }
        Ok(process)
    }

    /// Who is to be told when a segment goes that it has open.
    pub(super) fn keeper(&self) -> Arc<dyn KeepsMappings> {
        Arc::clone(&self.keeper) as _
    }

    /// Who is to be told what becomes known of a result that it has filled.
    pub(super) fn author(&self) -> Arc<dyn Author> {
        Arc::clone(&self.keeper) as _
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Itself, whoever uses it.
    pub(super) fn about(&self) -> RunnerProcess {
        RunnerProcess {
            number: self.number,
            pid: self.pid,
            age: self.started.elapsed(),
            walls: confine::standing(
                self.lacks.get().map_or(&[], Vec::as_slice),
                rustix::process::geteuid().is_root(),
            ),
            lacks: self.lacks.get().cloned().unwrap_or_default(),
            ..RunnerProcess::default()
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Looks whether it has ended by itself, or by somebody's hand.
    pub(super) fn has_ended(&self) -> bool {
        let ended = match &*self.child.lock() {
            // It is not reaped: until then Linux knows what it has used.
            Some(spawned) => {
                let pid = WaitId::Pid(Pid::from_child(&spawned.child));
                let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
                !matches!(waitid(pid, look), Ok(None))
            }
            None => true,
        };
        if ended {
            self.kill("it has ended");
        }
        ended
    }

    /// CPU time that it has used, by Linux's word and not its own.
    pub(super) fn cpu_time(&self) -> Duration {
        if let Some(spawned) = &*self.child.lock() {
            self.note_cpu(spawned);
        }
        Duration::from_nanos(self.cpu.load(Ordering::Relaxed))
    }

    /// To be called before it is reaped: its number may be another's then.
    fn note_cpu(&self, spawned: &Spawned) {
        if let Ok(time) = strait_memory::process::cpu_time(spawned.child.id()) {
            let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            self.cpu.fetch_max(ns, Ordering::Relaxed);
        }
    }

    /// Ends it when it is not needed any more.
    pub(super) fn end(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            tracing::debug!(
                worker = &*self.name,
                "a worker process is not needed any more"
            );
            self.put_down();
        }
    }

    /// Ends it, whatever it does, and returns when it is no more: for one that has nothing large mapped.
    pub(super) fn end_here(&self) {
        self.gone.store(true, Ordering::Release);
        if let Some(mut spawned) = self.killed() {
            let _ = spawned.child.wait();
            drop(spawned);
            self.burial.end();
        }
    }

    /// Ends it at once, whatever it does. `why` is told the first time.
    pub(super) fn kill(&self, why: &str) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        self.census.lost.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(worker = &*self.name, why, "a worker process ends");
        self.put_down();
    }

    /// The process, killed, for who is the first to end it.
    fn killed(&self) -> Option<Spawned> {
        let mut spawned = self.child.lock().take()?;
        self.census.living.fetch_sub(1, Ordering::Relaxed);
        self.note_cpu(&spawned);
        spawned.kill();
        // Before all of it is taken apart: nobody waits for that who waits for an answer.
        for socket in self.sockets.lock().iter().filter_map(Weak::upgrade) {
            let _ = socket.shutdown();
        }
        Some(spawned)
    }

    fn put_down(&self) {
        let Some(mut spawned) = self.killed() else {
            return;
        };
        // Linux takes gigabytes apart before it lets go of it. Without a thread it is reaped when the host ends.
        let burial = Arc::clone(&self.burial);
        let reaper = std::thread::Builder::new()
            .name("strait-reaper".to_owned())
            .spawn(move || {
                let child = &mut spawned.child;
                if let Ok(status) = child.wait() {
                    tracing::debug!(pid = child.id(), %status, "a worker process has ended");
                }
                // The next one may have its user.
                drop(spawned);
                burial.end();
            });
        if reaper.is_err() {
            // Nobody is going to know.
            self.burial.end();
        }
    }

    /// With it, which was killed: `what` it has mapped is not free, and no other's to fill, as long as it has.
    pub(super) fn bury<T>(&self, what: T) -> Buried<T> {
        Buried::new(&self.burial, what)
    }

    /// A run of `plugin` begins there.
    pub(super) fn join(self: &Arc<Self>, plugin: PluginHash) -> Company {
        let mut runs = self.runs.lock();
        let mixed = Arc::new(AtomicBool::new(false));
        for (other, also_mixed) in &*runs {
            if *other != plugin {
                also_mixed.store(true, Ordering::Release);
                mixed.store(true, Ordering::Release);
            }
        }
        runs.push((plugin, Arc::clone(&mixed)));
        Company {
            process: Arc::clone(self),
            mixed,
        }
    }

    /// A lane that nobody else uses.
    pub(super) fn lane(self: &Arc<Self>) -> Lane {
        let mut lanes = self.lanes.lock();
        loop {
            if let Some(channel) = lanes.pop() {
                return Lane {
                    channel: Some(channel),
                    process: Arc::clone(self),
                    of_stream: false,
                };
            }
            self.lane_free.wait(&mut lanes);
        }
    }

    /// A lane for one stream, which ends with it.
    ///
    /// # Errors
    /// As many as there may be are under way; or there is none to be had.
    pub(super) fn stream_lane(self: &Arc<Self>) -> Result<Lane, Cause> {
        let mut streams = self.streams.lock();
        if *streams >= self.streams_max {
            return Err(Cause::Streams(self.streams_max));
        }
        let none = |e: io::Error| Cause::Host(format!("no socket for a stream: {e}"));
        let (own, its) = FrameSocket::pair().map_err(none)?;
        let channel = Channel::new(own).map_err(none)?;
        channel::limit(&its).map_err(none)?;
        *streams += 1;
        let mut sockets = self.sockets.lock();
        sockets.retain(|known| known.strong_count() > 0);
        sockets.push(channel.socket());
        drop(sockets);
        self.census.fds.fetch_add(1, Ordering::Relaxed);
        drop(streams);
        let lane = Lane {
            channel: Some(channel),
            process: Arc::clone(self),
            of_stream: true,
        };
        // One that is gone is found out by whoever asks it.
        if let Err(error) = self.cancels.lock().send(&Control::Lane, &[its.as_fd()]) {
            tracing::debug!(worker = &*self.name, %error, "a worker takes no stream");
        }
        Ok(lane)
    }

    fn controlled(&self, message: &Control) -> Result<Controlled, ReceiveError> {
        let mut control = self.control.lock();
        control.send(message, &[])?;
        let until = Instant::now() + CONTROL_MAX;
        Ok(control.receive(ANSWER_BYTES_MAX, 0, Some(until))?.0)
    }

    /// Returns when it has let go of a segment, or is gone.
    pub(super) fn forget(&self, forget: &Control) {
        if !self.is_gone() {
            if let Ok(Controlled::Forgotten(counts)) = self.controlled(forget) {
                self.set_counts(counts);
                return;
            }
            self.kill("it does not let go of a segment");
        }
        // Then it has nothing mapped either.
        self.burial.wait();
    }

    /// Asks it to end a run.
    pub(super) fn cancel(&self, run: u64) {
        let cancel = || self.cancels.lock().send(&Control::Cancel(run), &[]);
        if !self.is_gone() && cancel().is_err() {
            self.kill("it takes no message");
        }
    }

    /// As it last told.
    pub(super) fn counts(&self) -> Counts {
        match self.is_gone() {
            true => Counts::default(),
            false => *self.counts.lock(),
        }
    }

    pub(super) fn set_counts(&self, told: Counts) {
        let mut counts = self.counts.lock();
        if told.taken > counts.taken {
            *counts = told;
        }
    }

    pub(super) fn set_totals(&self, told: Totals) {
        let mut totals = self.totals.lock();
        // Answers may overtake each other on the lanes.
        *totals = totals.with(told, u64::max);
    }

    pub(super) fn totals(&self) -> Totals {
        *self.totals.lock()
    }

    /// What may go along with its next runs. Of this process alone: it has mapped nothing that another filled.
    pub(super) fn needs(&self) -> &Needs {
        &self.needs
    }

    pub(super) fn has_plugin(&self, hash: &PluginHash) -> bool {
        self.plugins.lock().contains(hash)
    }

    pub(super) fn add_plugin(&self, hash: PluginHash) {
        self.plugins.lock().insert(hash);
    }

    pub(super) fn has_input(&self, segment: u64) -> bool {
        self.inputs.lock().contains(&segment)
    }

    pub(super) fn add_inputs(&self, segments: impl Iterator<Item = u64>) {
        self.inputs.lock().extend(segments);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
        self.census.fds.fetch_sub(self.fds, Ordering::Relaxed);
    }
}

/// One run's way to the worker and back. Given back when it is dropped.
#[derive(Debug)]
pub(super) struct Lane {
    // Taken by `drop` only.
    channel: Option<Channel>,
    process: Arc<Process>,
    /// It is one stream's, and nobody's after that.
    of_stream: bool,
}

impl Lane {
    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    fn channel(&mut self) -> &mut Channel {
        self.channel.as_mut().expect("only drop takes it")
    }

    pub(super) fn ask(&mut self, ask: &Ask, fds: &[BorrowedFd<'_>]) -> Result<(), ReceiveError> {
        Ok(self.channel().send(ask, fds)?)
    }

    /// Until something comes.
    pub(super) fn wait(&mut self, until: Instant) -> Result<(), ReceiveError> {
        self.channel().wait(until)
    }

    /// What it says of a plugin.
    pub(super) fn description(&mut self, until: Instant) -> Result<Answer, ReceiveError> {
        self.receive(DESCRIPTION_BYTES_MAX, until)
    }

    /// What it says of a run, with so many bytes of tensors in it at most.
    pub(super) fn answer(&mut self, tensors: u64, until: Instant) -> Result<Answer, ReceiveError> {
        let tensors = usize::try_from(tensors).unwrap_or(usize::MAX);
        self.receive(ANSWER_BYTES_MAX.saturating_add(tensors), until)
    }

    fn receive(&mut self, most: usize, until: Instant) -> Result<Answer, ReceiveError> {
        // A worker sends no descriptors.
        Ok(self.channel().receive(most, 0, Some(until))?.0)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.of_stream {
            drop(self.channel.take());
            self.process.census.fds.fetch_sub(1, Ordering::Relaxed);
            *self.process.streams.lock() -= 1;
            return;
        }
        self.process.lanes.lock().extend(self.channel.take());
        self.process.lane_free.notify_one();
    }
}
