//! What goes into an invocation and what comes out.
//!
//! ```text
//! Job (plain data) + Supplies (pages, clock) ──▶ Engine::invoke ──▶ Filled { outputs, report: plain data } | Failed
//! Job              + Means (segments, clock) ──▶ Runner::invoke ──▶ Done { outputs with their segments, report } | Failed
//! ```
//! A [`Job`] and what comes of it are values: nothing in them lives in this process alone (a [`KernelRef`] stands for a
//! plugin's hash and a kernel's place in it). What does is set apart: [`Supplies`] where the kernel runs, [`Means`] in the
//! host.

use serde::{Deserialize, Serialize};
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use strait_memory::{Inode, InputSource, PoolSegment, ResultPages, ResultSource, SharedSource};
use strait_tensor::{FileLayout, TensorPlace, TensorSpec};

use super::{Cause, Limits, Logged, Used};
use crate::plugin::{KernelRef, Port, Role, Value};
use crate::text;

/// Most notes of one invocation, and longest key or text in bytes.
pub(super) const NOTES_MAX: usize = 64;
const NOTE_BYTES_MAX: usize = 1024;

/// What to run on what. Inputs and parameters have been checked against the kernel's declaration.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to run: a loaded plugin and one of its kernels.
    pub kernel: KernelRef,
    /// In the kernel's order.
    pub inputs: Vec<Input>,
    /// All declared ones.
    pub parameters: Vec<(String, Value)>,
    /// Look at the host's own maps during `run`.
    pub verify: bool,
    /// What it may use.
    pub limits: Limits,
    /// Which results are given as bytes; none: all are segments.
    pub inline: Option<InlineRoom>,
    /// Milliseconds from the request to the deadline, for the message.
    pub deadline_ms: u64,
    /// For log lines.
    pub request_id: Arc<str>,
    /// Into how many slices it is cut, if it can be; none: by its size.
    pub threads: Option<NonZeroU32>,
}

/// Which results are given as bytes and not as segments: each that can at most become so large, as far as there is room for
/// it beside all those before it, in multiples of 64 bytes. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InlineRoom {
    /// Of one result.
    pub each: u64,
    /// Of all together.
    pub together: u64,
}

impl InlineRoom {
    /// Whether a result that can become `bytes` large is given as bytes; then its room is taken.
    pub(crate) fn takes(room: &mut Option<Self>, bytes: u64) -> bool {
        match room {
            Some(room) if bytes <= room.each => {
                let rest = strait_protocol::padded(bytes)
                    .and_then(|bytes| room.together.checked_sub(bytes));
                room.together = rest.unwrap_or(room.together);
                rest.is_some()
            }
            Some(_) | None => false,
        }
    }
}

/// An input: a tensor.
#[derive(Clone, Debug)]
pub struct Input {
    /// The port that it goes to.
    pub port: String,
    /// Numbers or a mask.
    pub role: Role,
    /// Where it lies in its segment; of one that has none its offset is 0.
    pub place: TensorPlace,
}

/// What holds an input.
#[derive(Debug)]
pub enum Source<S: ?Sized> {
    /// A segment.
    Segment(Arc<S>),
    /// Nothing: these are its bytes.
    Inline(FramePart),
    /// What another kernel of the same [`Chain`] gives.
    Linked,
}

/// Kernels of which each takes what others give, row by row as it comes: see `chain.rs`.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Each after all those that it takes from. All of them stream. An input that is linked is as large as what it takes can
    /// become, at offset 0.
    pub stages: Vec<Job>,
    /// What goes from one to others.
    pub links: Vec<Link>,
}

impl Chain {
    /// Outputs that are results.
    pub(crate) fn leaving(&self) -> impl Iterator<Item = (usize, &Port)> + Clone {
        let stages = self.stages.iter().enumerate();
        let outputs = stages.flat_map(|(stage, job)| {
            let ports = job.kernel.kernel().outputs.iter().enumerate();
            ports.map(move |(output, port)| ((stage, output), port))
        });
        outputs
            .filter(|(from, _)| !self.links.iter().any(|link| link.from == *from))
            .map(|((stage, _), port)| (stage, port))
    }

    /// Whether all kernels are of the same plugin.
    pub(crate) fn is_of_one_plugin(&self) -> bool {
        let mut plugins = self.stages.iter().map(|job| job.kernel.plugin.hash);
        let first = plugins.next();
        plugins.all(|plugin| Some(plugin) == first)
    }
}

/// What one kernel of a chain gives to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// (stage, output). That output is no result.
    pub from: (usize, usize),
    /// (stage, input), none of them `whole`.
    pub to: Vec<(usize, usize)>,
    /// Bytes of the memory between them: whole guest pages, and at least a row.
    pub bytes: u64,
}

/// An input that a run of a prepared job brings.
#[derive(Clone, Debug)]
pub struct Brought {
    /// Its sizes, none larger than was prepared.
    pub shape: Vec<u64>,
    /// Its elements: as many bytes as that needs.
    pub elements: FramePart,
}

impl Job {
    /// The same job on inputs of other sizes: those of `brought` in the place of `sources`' inline ones, one after the other.
    /// None if they are the same.
    pub(crate) fn resized<S: ?Sized>(
        &self,
        sources: &[Source<S>],
        brought: &[Brought],
    ) -> Option<Self> {
        let inline = || {
            let places = self.inputs.iter().zip(sources).enumerate();
            let inline = places.filter(|(_, (_, source))| source.is_inline());
            inline.zip(brought)
        };
        let same =
            inline().all(|((_, (input, _)), brought)| input.place.spec.shape == brought.shape);
        if same {
            return None;
        }
        let mut job = self.clone();
        for ((index, _), brought) in inline() {
            let place = &mut job.inputs[index].place;
            place.spec.shape.clone_from(&brought.shape);
            place.length = brought.elements.len() as u64;
        }
        Some(job)
    }
}

impl<S: ?Sized> Source<S> {
    /// Whether it is bytes.
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self, Self::Inline(_))
    }

    /// The same sources, with what is `brought` in the place of those that have no segment, one after the other; those that
    /// are left stay.
    pub(crate) fn filled(sources: &[Self], brought: Vec<Brought>) -> Vec<Self> {
        let mut brought = brought.into_iter().map(|brought| brought.elements);
        let filled = sources.iter().map(|source| match source {
            Self::Segment(segment) => Self::Segment(Arc::clone(segment)),
            Self::Inline(part) => Self::Inline(brought.next().unwrap_or_else(|| part.clone())),
            Self::Linked => Self::Linked,
        });
        filled.collect()
    }
}

/// Bytes of a frame, which is shared and not copied.
#[derive(Clone, Debug, Default)]
pub struct FramePart {
    frame: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl FramePart {
    /// `range` of `frame`; none if it is not in there.
    #[must_use]
    pub fn new(frame: &Arc<Vec<u8>>, range: Range<usize>) -> Option<Self> {
        frame.get(range.clone())?;
        let frame = Arc::clone(frame);
        Some(Self { frame, range })
    }
}

impl From<Vec<u8>> for FramePart {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            range: 0..bytes.len(),
            frame: Arc::new(bytes),
        }
    }
}

impl std::ops::Deref for FramePart {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // `new` found it there.
        &self.frame[self.range.clone()]
    }
}

/// Whose a run is: what two owners run shares no process. A plain number, of one owner in the host's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(pub u64);

/// What a job works with in the host.
#[derive(Debug)]
pub struct Means {
    /// Who runs it.
    pub owner: Owner,
    /// What holds the inputs, one for each of [`Job::inputs`].
    pub inputs: Vec<Source<dyn SharedSource>>,
    /// Where the memory of its results comes from.
    pub results: ResultSource,
    /// When it must be done.
    pub deadline: Instant,
    /// Ends it.
    pub cancel: CancelToken,
}

/// What a job works with in the process that it runs in.
#[derive(Debug)]
pub struct Supplies {
    /// What holds the inputs, one for each of [`Job::inputs`].
    pub inputs: Vec<Source<dyn InputSource>>,
    /// Where the memory of its results comes from.
    pub results: Arc<dyn Results>,
    /// When it must be done.
    pub deadline: Instant,
    /// Ends it.
    pub cancel: CancelToken,
    /// What it has logged so far.
    pub logged: Logged,
}

/// Gives memory for the results of one invocation.
pub trait Results: std::fmt::Debug + Send + Sync {
    /// Pages of at least so many `bytes` each.
    ///
    /// # Errors
    /// There is no memory for them.
    fn take(&self, bytes: &[u64]) -> Result<Vec<ResultPages>, Cause>;
}

/// Ends an invocation from outside.
#[derive(Clone, Default)]
pub struct CancelToken(Arc<Cancelling>);

#[derive(Default)]
struct Cancelling {
    asked: AtomicBool,
    /// Ends it, too.
    of: Option<CancelToken>,
    /// Tells whoever runs the invocation elsewhere.
    told: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl std::fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CancelToken")
            .field(&self.is_cancelled())
            .finish()
    }
}

impl CancelToken {
    /// Asks the invocation to end; it does at its next check.
    pub fn cancel(&self) {
        self.0.asked.store(true, Ordering::Release);
        if let Some(tell) = &*self.0.told.lock() {
            tell();
        }
    }

    /// Whether [`CancelToken::cancel`] was called, of this or of what it is a part of.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let of = self.0.of.as_ref();
        self.0.asked.load(Ordering::Acquire) || of.is_some_and(Self::is_cancelled)
    }

    /// One for a part of what this one ends.
    #[must_use]
    pub(super) fn part(&self) -> Self {
        Self(Arc::new(Cancelling {
            of: Some(self.clone()),
            ..Cancelling::default()
        }))
    }

    /// `tell` is called when this is cancelled, or now if it is already; until the answer is dropped.
    #[must_use]
    pub fn telling(&self, tell: impl Fn() + Send + 'static) -> Telling<'_> {
        let mut told = self.0.told.lock();
        if self.is_cancelled() {
            tell();
        }
        *told = Some(Box::new(tell));
        Telling(self)
    }
}

/// See [`CancelToken::telling`].
#[derive(Debug)]
pub struct Telling<'a>(&'a CancelToken);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        *self.0.0.told.lock() = None;
    }
}

/// What an invocation leaves: all of its outputs.
#[derive(Debug)]
pub struct Filled {
    /// In the kernel's order; those in segments have the pages that it was given, in their order.
    pub outputs: Vec<FilledOutput>,
    /// What is told of it.
    pub report: Report,
    /// For [`Engine::renew`](super::Engine::renew), once it is answered.
    pub used: Used,
}

/// A finished result, wherever its pages are.
#[derive(Debug)]
pub struct FilledOutput {
    /// The output port.
    pub port: String,
    /// What it has become.
    pub body: FilledBody,
}

/// Where a finished result is.
#[derive(Debug)]
pub enum FilledBody {
    /// In pages.
    Pages {
        /// The file in the segment; one tensor, named as the port.
        layout: FileLayout,
        /// Bytes that the tensor could have had: with them the layout can be planned anew.
        reserve_bytes: u64,
    },
    /// Here.
    Inline {
        /// Element type and sizes.
        spec: TensorSpec,
        /// Its elements, row-major.
        bytes: Vec<u8>,
    },
}

/// What an invocation leaves in the host: all of its outputs.
#[derive(Debug)]
pub struct Done {
    /// In the kernel's order.
    pub outputs: Vec<Output>,
    /// What is told of it.
    pub report: Report,
    /// For [`Runner::renew`](super::Runner::renew), if it ran in this process.
    pub used: Option<Used>,
}

/// What a chain leaves where it ran: all outputs that are not linked.
#[derive(Debug)]
pub struct ChainFilled {
    /// Stage by stage, in each kernel's order; those in segments have the pages that the chain was given, in their order.
    pub outputs: Vec<FilledOutput>,
    /// What is told of each stage.
    pub reports: Vec<Report>,
    /// As in [`Filled`], of each stage.
    pub used: Vec<Used>,
}

/// What a chain leaves in the host: all outputs that are not linked.
#[derive(Debug, Default)]
pub struct ChainDone {
    /// Stage by stage, in each kernel's order.
    pub outputs: Vec<Output>,
    /// What is told of each stage.
    pub reports: Vec<Report>,
    /// As in [`Done`], of each stage.
    pub used: Vec<Used>,
}

/// A finished result.
#[derive(Debug)]
pub struct Output {
    /// The output port.
    pub port: String,
    /// What it has become.
    pub body: OutputBody,
}

/// Where a finished result is.
#[derive(Debug)]
pub enum OutputBody {
    /// In a segment.
    Segment {
        /// The file in it; one tensor, named as the port.
        layout: FileLayout,
        /// What holds it.
        segment: PoolSegment,
    },
    /// Here.
    Inline {
        /// Element type and sizes.
        spec: TensorSpec,
        /// Its elements, row-major.
        bytes: Vec<u8>,
    },
}

/// What is told of an invocation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// (key, text), at most 64.
    pub notes: Vec<(String, String)>,
    /// Bytes of its tensors that the host copied.
    pub copied_bytes: u64,
    /// With [`Job::verify`]: inputs, then outputs.
    pub pages: Vec<WindowPages>,
    /// Page faults of the process meanwhile that needed no I/O.
    pub minor_faults: u64,
    /// Slices that it ran in; 0: it ran whole.
    pub slices: u64,
    /// Where the time went.
    pub seconds: Seconds,
}

impl Report {
    /// What another process reports of `job`, if that could be: within the bounds that notes have, and their text as
    /// this process would pass it on.
    ///
    /// # Errors
    /// How it could not.
    pub(crate) fn checked(self, job: &Job) -> Result<Self, String> {
        let tensors = job.inputs.len() + job.kernel.kernel().outputs.len();
        if self.pages.len() > tensors {
            return Err(format!("{} pages of {tensors} tensors", self.pages.len()));
        }
        Ok(Self {
            notes: bounded_notes(self.notes)?,
            ..self
        })
    }
}

/// Notes, if they are not too many, as they are passed on.
pub(super) fn bounded_notes(notes: Vec<(String, String)>) -> Result<Vec<(String, String)>, String> {
    if notes.len() > NOTES_MAX {
        return Err(format!(
            "{} notes, at most {NOTES_MAX} are allowed",
            notes.len()
        ));
    }
    let bounded = |(key, text): (String, String)| {
        (
            text::one_line(key, NOTE_BYTES_MAX),
            text::lines(text, NOTE_BYTES_MAX),
        )
    };
    Ok(notes.into_iter().map(bounded).collect())
}

/// What the host's own maps said at a window's address during `run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowPages {
    /// The port.
    pub port: String,
    /// The file mapped there; none for a tensor that was copied.
    pub inode: Option<Inode>,
}

/// Where an invocation's time went, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Seconds {
    /// Store and instance.
    pub instantiate: f64,
    /// `open`, and taking the results from the pool.
    pub open: f64,
    /// `reserve` and `bind`.
    pub reserve: f64,
    /// Windows in, small inputs copied in.
    pub move_in: f64,
    /// `run`.
    pub run: f64,
    /// Windows home.
    pub move_out: f64,
    /// All of it, without waiting for a worker.
    pub total: f64,
}

impl Seconds {
    /// All but their total.
    pub(super) fn parts(&self) -> [f64; 6] {
        let mut own = *self;
        own.parts_mut().map(|part| *part)
    }

    /// Adds each part of `other` to its own; not the total.
    pub(crate) fn add_parts(&mut self, other: &Self) {
        for (sum, part) in self.parts_mut().into_iter().zip(other.parts()) {
            *sum += part;
        }
    }

    pub(super) fn parts_mut(&mut self) -> [&mut f64; 6] {
        let Self {
            instantiate,
            open,
            reserve,
            move_in,
            run,
            move_out,
            total: _,
        } = self;
        [instantiate, open, reserve, move_in, run, move_out]
    }
}
