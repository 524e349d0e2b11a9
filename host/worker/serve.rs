//! Inside a worker process: lanes on which kernels run, and the host's control of them.
//!
//! ```text
//! control (the main thread) ── forget, cancel              the host is gone: so is this process
//! lane (a thread each) ──── load ──▶ Engine ──▶ plugins
//!                      ├─── prepare, call ──▶ prepared.rs; a lane of its own for each stream
//!                      └─── run ───▶ Engine::fill ──▶ results: need ──▶ host ──▶ granted
//! ```

mod chained;
mod granted;
mod prepared;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_bytes::ByteBuf;
use strait_memory::{
    Budget, Copied, FrameSocket, Host, HugeBirths, InputSource, Lent, Lot, MemoryError, Parked,
    ReadMapping, ResultPages, Segment, process,
};

use super::channel::{Channel, ReceiveError};
use super::compiler;
use super::confine::{self, Confined};
use super::messages::{
    Answer, Ask, Control, Controlled, Counts, Ended, Filled, FilledIn, Load, Outcome, Run,
    RunSource, Start, Totals,
};
use super::users;
use crate::engine::{
    CancelToken, Cause, Engine, Failed, FilledBody, FilledOutput, Input, Job, LoadError, Logged,
    Results, Source as Supply, Stage, Supplies, Used,
};
use crate::plugin::{KernelRef, Plugin, PluginHash};
use granted::Granted;

/// What the host may send in one message: a plugin, at most.
const ASK_BYTES_MAX: usize = 300 << 20;
/// Descriptors beside one message: a kernel has at most so many inputs.
const FDS_MAX: usize = 256;
/// Cancels that came before their run, or after it.
const EARLY_MAX: usize = 1024;

/// Serves the host at the other end of `control` until that closes it: then this process ends.
///
/// # Errors
/// Why it cannot begin.
pub fn serve(control: OwnedFd) -> Result<(), String> {
    // Before it has anything to do: what comes later may keep it from seeing that the host is gone.
    users::end_with_host().map_err(|e| e.to_string())?;
    let mut lacking = confine::go_first();
    process::set_not_dumpable().map_err(|e| e.to_string())?;
    let socket = FrameSocket::from(control);
    let mut control = Channel::new(socket).map_err(|e| e.to_string())?;
    // As many lanes as the host has threads.
    let (first, lanes) = control
        .receive(ASK_BYTES_MAX, usize::MAX, None)
        .map_err(|e| e.to_string())?;
    // No file can be opened later. There are no other threads yet.
    process::keep_mappings_open().map_err(|e| e.to_string())?;
    lacking.extend(confine::shut_out());
    let step_down = |uid: Option<u32>| {
        users::step_down(uid)
            .map_err(|e| format!("it cannot become the user that it is to be: {e}"))
    };
    let start = match first {
        Control::Start(start) => {
            lacking.extend(step_down(start.uid)?);
            start
        }
        Control::Compile(work) => {
            lacking.extend(step_down(work.uid)?);
            return compiler::obey(&mut control, work, lacking);
        }
        // It may hold all of a plugin.
        _ => return Err("a worker begins with its settings, or with a plugin".to_owned()),
    };
    let bounds = start.bounds;
    let begun = Worker::begin(start, lanes);
    // All lanes are there. What a plugin brings along comes later.
    let told = begun
        .as_ref()
        .map(|_| confine::confine(lacking, Confined::Worker(bounds)))
        .map_err(Clone::clone);
    let told = control.send(&Controlled::Started(told), &[]);
    let worker = begun?;
    told.map_err(|e| e.to_string())?;
    while let Ok((message, fds)) = control.receive(ASK_BYTES_MAX, 1, None) {
        let Some(answer) = worker.obey(message, fds) else {
            continue;
        };
        if control.send(&answer, &[]).is_err() {
            break;
        }
    }
    Ok(())
}

/// What all lanes share.
struct Worker {
    engine: Arc<Engine>,
    lot: Arc<Lot>,
    plugins: Mutex<HashMap<PluginHash, Arc<Plugin>>>,
    inputs: Mutex<HashMap<u64, Arc<Source>>>,
    results: Mutex<HashMap<u64, ResultPages>>,
    births: HugeBirths,
    counts_taken: Mutex<u64>,
    cancels: Mutex<Cancels>,
    prepared: prepared::All,
    /// To the threads of streams.
    streams: mpsc::Sender<Channel>,
    /// The host decides how much there may be; here it is only counted.
    open: Arc<Budget>,
    mappings: Arc<Budget>,
}

#[derive(Default)]
struct Cancels {
    running: HashMap<u64, CancelToken>,
    /// Cancelled before they came.
    early: HashSet<u64>,
}

/// An input's segment.
#[derive(Debug)]
struct Source {
    segment: Segment<Lent<Host>>,
    lot: Arc<Lot>,
}

impl InputSource for Source {
    fn park(&self, range: Range<u64>) -> Result<Parked, MemoryError> {
        Ok(self.lot.take_input(&self.segment, range)?)
    }

    fn read_at(&self, offset: u64, into: &mut [u8], copied: &Copied) -> Result<(), MemoryError> {
        self.segment.read_at(offset, into, copied)
    }
}

impl Worker {
    fn begin(start: Start, lanes: Vec<OwnedFd>) -> Result<Arc<Self>, String> {
        let lot = Lot::new(start.parked_mappings_max, start.parked_bytes_max);
        let (streams, their_lanes) = mpsc::channel();
        let worker = Arc::new(Self {
            engine: Engine::new(start.engine, Arc::clone(&lot))?,
            lot,
            plugins: Mutex::default(),
            inputs: Mutex::default(),
            results: Mutex::default(),
            births: HugeBirths::new(),
            counts_taken: Mutex::default(),
            cancels: Mutex::default(),
            prepared: prepared::All::default(),
            streams,
            open: Budget::new("bytes open in a worker", u64::MAX),
            mappings: Budget::new("results in a worker", u64::MAX),
        });
        for (index, lane) in lanes.into_iter().enumerate() {
            let channel = Channel::new(FrameSocket::from(lane)).map_err(|e| e.to_string())?;
            let worker = Arc::clone(&worker);
            std::thread::Builder::new()
                .name(format!("strait-lane-{index}"))
                .spawn(move || worker.serve_lane(channel))
                .map_err(|e| e.to_string())?;
        }
        worker.begin_streams(start.streams, their_lanes)?;
        Ok(worker)
    }

    fn obey(&self, message: Control, fds: Vec<OwnedFd>) -> Option<Controlled> {
        match message {
            Control::Start(_) | Control::Compile(_) => {
                Some(Controlled::Started(Err("it has begun".to_owned())))
            }
            Control::ForgetInput(segment) => {
                let forgotten = self.inputs.lock().remove(&segment);
                drop(forgotten);
                Some(Controlled::Forgotten(self.counts()))
            }
            Control::ForgetResult(segment) => {
                let forgotten = self.results.lock().remove(&segment);
                drop(forgotten);
                Some(Controlled::Forgotten(self.counts()))
            }
            Control::ForgetPrepared(number) => {
                let forgotten = self.prepared.lock().remove(&number);
                drop(forgotten);
                Some(Controlled::Forgotten(self.counts()))
            }
            Control::Cancel(run) => {
                self.cancels.lock().cancel(run);
                None
            }
            Control::Lane => {
                if let Some(socket) = fds.into_iter().next().map(FrameSocket::from) {
                    // The threads stay as long as this process.
                    let _ = self.streams.send(Channel::limited(socket));
                }
                None
            }
        }
    }

    fn counts(&self) -> Counts {
        let mut taken = self.counts_taken.lock();
        *taken += 1;
        Counts {
            taken: *taken,
            lot: self.lot.stats(),
        }
    }

    fn serve_lane(self: &Arc<Self>, channel: Channel) {
        let lane = Arc::new(Mutex::new(channel));
        loop {
            let asked = lane.lock().receive(ASK_BYTES_MAX, FDS_MAX, None);
            let mut used = Vec::new();
            let answer = match asked {
                Ok((Ask::Load(load), fds)) => Answer::Loaded(Box::new(self.load(*load, fds))),
                Ok((Ask::Describe(bytes), fds)) => {
                    let described =
                        artifact(fds, bytes).and_then(|pages| self.engine.describe(pages.bytes()));
                    Answer::Described(Box::new(described))
                }
                Ok((Ask::Run(run), fds)) => {
                    let ended;
                    (ended, used) = self.run(&lane, *run, fds);
                    Answer::Ended(Box::new(ended))
                }
                Ok((Ask::Chain(chain), fds)) => {
                    let ended;
                    (ended, used) = self.chain(&lane, *chain, fds);
                    Answer::Ended(Box::new(ended))
                }
                Ok((Ask::Prepare(number, run), fds)) => {
                    match self.prepare(&mut lane.lock(), number, *run, fds) {
                        Ok(()) => continue,
                        Err(_) => return,
                    }
                }
                Ok((Ask::Call(call), _)) => match self.call(&mut lane.lock(), *call) {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                Ok((
                    Ask::Granted(_)
                    | Ask::Denied
                    | Ask::Stream(_)
                    | Ask::Chunk(_)
                    | Ask::GoOn(_)
                    | Ask::Stop,
                    _,
                )) => continue,
                Err(ReceiveError::Gone) => return,
                Err(error) => {
                    tracing::error!(%error, "the host cannot be understood");
                    return;
                }
            };
            if lane.lock().send(&answer, &[]).is_err() {
                return;
            }
            for used in used {
                // As above: it has reported itself, and the lane goes on.
                let _ = catch_unwind(AssertUnwindSafe(|| self.engine.renew(used)));
            }
        }
    }

    fn load(&self, load: Load, fds: Vec<OwnedFd>) -> Result<(), LoadError> {
        self.engine.adopt(
            load.plugin,
            artifact(fds, load.bytes)?.bytes(),
            load.memory_only,
        )?;
        let plugin = Plugin {
            hash: load.plugin,
            // Nobody compiles it here.
            bytes: Arc::from([]),
            description: load.description,
            kept: None,
        };
        self.plugins.lock().insert(load.plugin, Arc::new(plugin));
        Ok(())
    }

    fn run(
        self: &Arc<Self>,
        lane: &Arc<Mutex<Channel>>,
        run: Run,
        fds: Vec<OwnedFd>,
    ) -> (Ended, Vec<Used>) {
        let (number, ahead) = (run.run, run.ahead.clone());
        self.granted(lane, number, ahead, |cancel, granted| {
            self.outcome(run, fds, cancel, granted)
        })
    }

    /// The end of a `run` with memory for results, and what else that leaves.
    fn granted(
        self: &Arc<Self>,
        lane: &Arc<Mutex<Channel>>,
        number: u64,
        ahead: Vec<u64>,
        run: impl FnOnce(CancelToken, &Arc<Granted>) -> Result<(Outcome, Vec<Used>), Failed>,
    ) -> (Ended, Vec<Used>) {
        let cancel = self.cancels.lock().begin(number);
        let granted = Arc::new(Granted {
            worker: Arc::clone(self),
            lane: Arc::clone(lane),
            ahead,
            grants: Mutex::default(),
        });
        // A bug of ours must not end the lane for the others.
        let outcome = catch_unwind(AssertUnwindSafe(|| run(cancel, &granted)))
            .unwrap_or_else(|_| Err(host_failed("it panicked; this is a bug of strait")));
        self.cancels.lock().running.remove(&number);
        let gone = self.keep(&granted, outcome.is_ok());
        let (outcome, used) = match outcome {
            Ok((outcome, used)) => (Ok(outcome), used),
            Err(failed) => (Err(failed), Vec::new()),
        };
        (self.ended(outcome, gone), used)
    }

    fn totals(&self) -> Totals {
        Totals {
            copied_in: self.engine.copies().guest_in.get(),
            copied_out: self.engine.copies().guest_out.get(),
            huge_asked: self.births.asked_bytes(),
            huge: self.births.huge_bytes(),
            slices: self.engine.slices(),
        }
    }

    fn ended(&self, outcome: Result<Outcome, Failed>, gone: Vec<usize>) -> Ended {
        Ended {
            outcome,
            gone,
            totals: self.totals(),
            counts: self.counts(),
        }
    }

    /// The job that a run is, and what holds its inputs.
    fn job(
        &self,
        run: Run,
        fds: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<(Job, Vec<Supply<dyn InputSource>>), Failed> {
        let kernel = self
            .plugins
            .lock()
            .get(&run.plugin)
            .and_then(|plugin| KernelRef::new(plugin, run.kernel))
            .ok_or_else(|| host_failed("the worker does not have the plugin"))?;
        let failed = |cause: Cause| Failed::new(&kernel.kernel().name, Stage::Place, cause);
        let (mut inputs, mut sources) = (Vec::<Input>::new(), Vec::new());
        for input in run.inputs {
            let (input, source) = input.into_parts();
            sources.push(match source {
                RunSource::Inline(bytes) => Supply::Inline(bytes.into_vec().into()),
                RunSource::Linked => Supply::Linked,
                RunSource::Segment { number, bytes } => {
                    let source = self
                        .source(number, bytes, fds)
                        .map_err(|error| failed(error.into()))?
                        .ok_or_else(|| {
                            failed(Cause::Host("the worker does not have an input".to_owned()))
                        })?;
                    Supply::Segment(source as Arc<dyn InputSource>)
                }
            });
            inputs.push(input);
        }
        let job = Job {
            kernel,
            inputs,
            parameters: run.parameters,
            verify: run.verify,
            limits: run.limits,
            inline: run.inline,
            deadline_ms: run.deadline_ms,
            request_id: Arc::from(run.request_id),
            threads: run.threads,
        };
        Ok((job, sources))
    }

    fn outcome(
        &self,
        run: Run,
        fds: Vec<OwnedFd>,
        cancel: CancelToken,
        granted: &Arc<Granted>,
    ) -> Result<(Outcome, Vec<Used>), Failed> {
        let (deadline, open_only) = (deadline(run.left_us), run.open_only);
        let (job, inputs) = self.job(run, &mut fds.into_iter())?;
        let supplies = Supplies {
            inputs,
            results: Arc::clone(granted) as Arc<dyn Results>,
            deadline,
            cancel,
            logged: Logged::default(),
        };
        if open_only {
            let specs = self.engine.specs(&job, &supplies)?;
            return Ok((Outcome::Specs(specs), Vec::new()));
        }
        let filled = self.engine.fill(&job, &supplies)?;
        let outcome = Outcome::Filled(told(filled.outputs), filled.report);
        Ok((outcome, vec![filled.used]))
    }

    /// The segment of that number, with the next of `fds` if it comes with its `bytes`.
    fn source(
        &self,
        number: u64,
        bytes: Option<u64>,
        fds: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Option<Arc<Source>>, MemoryError> {
        let fd = bytes.and_then(|bytes| Some((bytes, fds.next()?)));
        let mut inputs = self.inputs.lock();
        if let Some(source) = inputs.get(&number) {
            return Ok(Some(Arc::clone(source)));
        }
        let Some((bytes, fd)) = fd else {
            return Ok(None);
        };
        let source = Arc::new(Source {
            segment: Segment::<Lent<Host>>::received(fd, bytes, &self.open)?,
            lot: Arc::clone(&self.lot),
        });
        inputs.insert(number, Arc::clone(&source));
        Ok(Some(source))
    }

    /// Keeps the mappings of results for the next ones, after a run that gave them. Which are gone, by index.
    fn keep(&self, granted: &Granted, given: bool) -> Vec<usize> {
        let mut gone = Vec::new();
        for (index, (grant, pages)) in granted.grants.lock().drain(..).enumerate() {
            // New ones that give nothing are the host's to free.
            let kept = !grant.once && (given || grant.bytes.is_none());
            if kept && pages.is_home() {
                self.results.lock().insert(grant.segment, pages);
            } else {
                self.results.lock().remove(&grant.segment);
                drop(pages);
                gone.push(index);
            }
        }
        gone
    }
}

impl Cancels {
    fn begin(&mut self, run: u64) -> CancelToken {
        let token = CancelToken::default();
        if self.early.remove(&run) {
            token.cancel();
        }
        self.running.insert(run, token.clone());
        token
    }

    fn cancel(&mut self, run: u64) {
        match self.running.get(&run) {
            Some(token) => token.cancel(),
            None => {
                // Most are late ones, of which nobody asks any more.
                if self.early.len() >= EARLY_MAX {
                    self.early.clear();
                }
                self.early.insert(run);
            }
        }
    }
}

/// Results as the host is told of them.
fn told(outputs: Vec<FilledOutput>) -> Vec<Filled> {
    let told = |output: FilledOutput| {
        let (spec, body) = match output.body {
            FilledBody::Pages {
                layout,
                reserve_bytes,
            } => (
                layout.tensors[0].spec.clone(),
                FilledIn::Segment { reserve_bytes },
            ),
            FilledBody::Inline { spec, bytes } => (spec, FilledIn::Inline(ByteBuf::from(bytes))),
        };
        Filled {
            port: output.port,
            spec,
            body,
        }
    };
    outputs.into_iter().map(told).collect()
}

/// The compiled plugin whose descriptor came beside a message.
fn artifact(fds: Vec<OwnedFd>, bytes: u64) -> Result<ReadMapping, LoadError> {
    let misfit = |how: String| LoadError::Artifact(how);
    let fd = fds.into_iter().next();
    let fd = fd.ok_or_else(|| misfit("its descriptor is missing".to_owned()))?;
    let bytes = usize::try_from(bytes).map_err(|e| misfit(e.to_string()))?;
    ReadMapping::new(fd, bytes).map_err(|e| misfit(e.to_string()))
}

fn deadline(left_us: u64) -> Instant {
    Instant::now() + Duration::from_micros(left_us)
}

/// The host knows of which kernel.
fn host_failed(how: &str) -> Failed {
    Failed::new("", Stage::Instantiate, Cause::Host(how.to_owned()))
}
