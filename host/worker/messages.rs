//! What a host and its workers say to each other.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use strait_memory::LotStats;
use strait_tensor::{Dtype, TensorPlace, TensorSpec};

use super::confine::Bounds;
use crate::engine::{
    Brought, EngineConfig, Failed, InlineRoom, Input, Limits, Link, LoadError, Report,
};
use crate::plugin::{Description, PluginHash, Role, Value};

/// How a worker is set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Start {
    pub(super) engine: EngineConfig,
    pub(super) parked_mappings_max: u64,
    pub(super) parked_bytes_max: u64,
    /// The user that it is to become; none: it keeps the host's.
    pub(super) uid: Option<u32>,
    pub(super) bounds: Bounds,
    /// Streams at a time.
    pub(super) streams: usize,
}

/// To the worker, on its control channel. The lanes' sockets are beside `Start`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Control {
    /// Answered by `Controlled::Started`.
    Start(Start),
    /// The segment is gone: nothing of it is to be kept. Answered by `Controlled::Forgotten`.
    ForgetInput(u64),
    /// The same for a result.
    ForgetResult(u64),
    /// Ends a run.
    Cancel(u64),
    /// Nothing is to be kept of a prepared kernel. Answered by `Controlled::Forgotten`.
    ForgetPrepared(u64),
    /// A lane of its own for a stream, whose socket is beside it.
    Lane,
    /// In the place of `Start`: the process compiles one plugin and ends. Answered by `Controlled::Compiled`.
    Compile(Compile),
}

/// A plugin to compile, and what that may cost.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Compile {
    /// As in [`Start`].
    pub(super) uid: Option<u32>,
    pub(super) engine: EngineConfig,
    /// Of CPU.
    pub(super) seconds: u64,
    /// Of addresses.
    pub(super) bytes: u64,
    /// It compiles nothing where a wall is lacking.
    pub(super) require_walls: bool,
    pub(super) plugin: Vec<u8>,
}

// What a worker says may be as long as it likes, so that no text is made of it: `kind` is for the log.
#[derive(Serialize, Deserialize)]
pub(super) enum Controlled {
    /// With the walls that this Linux lacks.
    Started(Result<Vec<String>, String>),
    Forgotten(Counts),
    /// The artifact.
    Compiled(Result<Vec<u8>, LoadError>),
}

impl Controlled {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Started(_) => "`Started`",
            Self::Forgotten(_) => "`Forgotten`",
            Self::Compiled(_) => "`Compiled`",
        }
    }
}

/// A worker's warm mappings.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Counts {
    /// The later of two has the greater one: they may overtake each other on their ways.
    pub(super) taken: u64,
    pub(super) lot: LotStats,
}

/// To the worker, on a lane.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Take over a compiled plugin, whose artifact's descriptor is beside it; answered by `Answer::Loaded`.
    Load(Box<Load>),
    /// Run a kernel; answered by `Answer::Need`, if it has results, and `Answer::Ended`. Descriptors of those inputs that
    /// come with their bytes are beside it, in order.
    Run(Box<Run>),
    /// Memory for the results; descriptors of those that are new are beside it, in order.
    Granted(Vec<Grant>),
    /// There is none.
    Denied,
    /// Ask the plugin of the artifact of so many bytes, whose descriptor is beside, what it offers; answered by
    /// `Answer::Described`.
    Describe(u64),
    /// Make a kernel ready, under that number, to be called or given chunks; answered by `Answer::Ended` with its outputs at their
    /// largest and, if it is ready, `Answer::Waits`. Its inputs in frames have no bytes yet; descriptors as beside `Run`.
    Prepare(u64, Box<Run>),
    /// Run one that is ready; answered by `Answer::Ended` and, when it is ready again, `Answer::Waits`.
    Call(Box<Call>),
    /// On a lane of its own: give one that is ready what `Chunk`s bring; answered by `Answer::Ended` at the end, and then as `Call`.
    Stream(Call),
    /// Answered by any number of `Answer::Keeps` and `Answer::Piece`, the last of them done.
    Chunk(Box<Chunk>),
    /// The answer to `Keeps`, and to a `Piece` that is not done: go on, with so many microseconds.
    GoOn(u64),
    /// In the place of `Chunk` and `GoOn`: the stream ends.
    Stop,
    /// Run a chain of kernels; as `Run`.
    Chain(Box<RunChain>),
}

/// One run of a prepared kernel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Call {
    /// Its number among those that are prepared.
    pub(super) prepared: u64,
    /// Of the run, or of the whole stream, as in [`Run`].
    pub(super) run: u64,
    pub(super) left_us: u64,
    pub(super) brought: Vec<Bring>,
}

/// Rows for a prepared kernel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Chunk {
    pub(super) brought: Vec<Bring>,
    pub(super) last: bool,
    pub(super) left_us: u64,
}

/// An input that a run or chunk brings.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Bring {
    shape: Vec<u64>,
    elements: ByteBuf,
}

impl Bring {
    pub(super) fn all(brought: &[Brought]) -> Vec<Self> {
        let bring = |brought: &Brought| Self {
            shape: brought.shape.clone(),
            elements: ByteBuf::from(&*brought.elements),
        };
        brought.iter().map(bring).collect()
    }

    pub(super) fn into_brought(all: Vec<Self>) -> Vec<Brought> {
        let brought = |bring: Self| Brought {
            shape: bring.shape,
            elements: bring.elements.into_vec().into(),
        };
        all.into_iter().map(brought).collect()
    }
}

/// A compiled plugin.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Load {
    pub(super) plugin: PluginHash,
    /// Of the artifact.
    pub(super) bytes: u64,
    /// Whether it keeps anything elsewhere than in its memory.
    pub(super) memory_only: bool,
    /// What another process heard of it.
    pub(super) description: Description,
}

/// One invocation. See [`crate::engine::Job`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Run {
    /// Its number in the life of the host.
    pub(super) run: u64,
    pub(super) plugin: PluginHash,
    /// Which of its kernels.
    pub(super) kernel: usize,
    pub(super) inputs: Vec<RunInput>,
    pub(super) parameters: Vec<(String, Value)>,
    pub(super) verify: bool,
    pub(super) limits: Limits,
    pub(super) deadline_ms: u64,
    /// What is left of it.
    pub(super) left_us: u64,
    pub(super) request_id: String,
    /// Numbers of segments that the worker has mapped, if the results are as large as those of the last run: they save a question.
    pub(super) ahead: Vec<u64>,
    /// Into how many slices it is cut; none: by its size.
    pub(super) threads: Option<NonZeroU32>,
    /// Which results come as bytes.
    pub(super) inline: Option<InlineRoom>,
    /// Find out the outputs by `open` alone.
    pub(super) open_only: bool,
}

/// One invocation of several kernels. See [`crate::engine::Chain`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RunChain {
    /// All with one number.
    pub(super) stages: Vec<Run>,
    pub(super) links: Vec<Link>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RunInput {
    pub(super) port: String,
    pub(super) role: Role,
    pub(super) place: Place,
    pub(super) source: RunSource,
}

/// What holds an input.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum RunSource {
    Segment {
        /// Its number.
        number: u64,
        /// Its bytes, if its descriptor is beside.
        bytes: Option<u64>,
    },
    Inline(ByteBuf),
    /// Another kernel of the chain gives it.
    Linked,
}

impl RunInput {
    pub(super) fn new(input: &Input, source: RunSource) -> Self {
        Self {
            port: input.port.clone(),
            role: input.role,
            place: Place::from(&input.place),
            source,
        }
    }

    pub(super) fn into_parts(self) -> (Input, RunSource) {
        let input = Input {
            port: self.port,
            role: self.role,
            place: self.place.into(),
        };
        (input, self.source)
    }
}

/// A [`TensorPlace`]: its JSON is flat, which no binary form can read back.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Place {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    offset: u64,
    length: u64,
}

impl From<&TensorPlace> for Place {
    fn from(place: &TensorPlace) -> Self {
        Self {
            name: place.name.clone(),
            dtype: place.spec.dtype,
            shape: place.spec.shape.clone(),
            offset: place.offset,
            length: place.length,
        }
    }
}

impl From<Place> for TensorPlace {
    fn from(place: Place) -> Self {
        Self {
            name: place.name,
            spec: TensorSpec {
                dtype: place.dtype,
                shape: place.shape,
            },
            offset: place.offset,
            length: place.length,
        }
    }
}

/// A segment for a result.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Grant {
    /// The segment's number.
    pub(super) segment: u64,
    /// Its bytes, if its descriptor is beside: it is new. Otherwise the worker has it mapped.
    pub(super) bytes: Option<u64>,
    /// Whether it is mapped for this run only.
    pub(super) once: bool,
}

/// From the worker, on a lane.
// As `Controlled`.
#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Loaded(Box<Result<(), LoadError>>),
    /// Answered by `Ask::Granted` or `Ask::Denied`: results of so many bytes.
    Need(Vec<u64>),
    Ended(Box<Ended>),
    Described(Box<Result<Description, LoadError>>),
    /// The prepared kernel is ready (again), with so many bytes of memory.
    Waits(u64),
    /// Answered by `Ask::GoOn` or `Ask::Stop`: the guest of a stream has taken so many bytes since its first chunk.
    Keeps(u64),
    /// Rows of the outputs of a stream.
    Piece(Box<Piece>),
}

impl Answer {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Loaded(_) => "`Loaded`",
            Self::Need(_) => "`Need`",
            Self::Ended(_) => "`Ended`",
            Self::Described(_) => "`Described`",
            Self::Waits(_) => "`Waits`",
            Self::Keeps(_) => "`Keeps`",
            Self::Piece(_) => "`Piece`",
        }
    }
}

/// Rows of each output, in the kernel's order.
#[derive(Serialize, Deserialize)]
pub(super) struct Piece {
    pub(super) outputs: Vec<(TensorSpec, ByteBuf)>,
    /// All that comes of the chunk has come; otherwise it is answered by `Ask::GoOn` or `Ask::Stop`.
    pub(super) done: bool,
    pub(super) totals: Totals,
}

/// The end of a run.
#[derive(Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) outcome: Result<Outcome, Failed>,
    /// By index, those granted segments that the worker has no more mapped.
    pub(super) gone: Vec<usize>,
    pub(super) totals: Totals,
    pub(super) counts: Counts,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Outcome {
    /// In the kernel's order; those without bytes are in the granted segments, in their order.
    Filled(Vec<Filled>, Report),
    /// Of `open_only`, and of what is prepared.
    Specs(Vec<(String, TensorSpec)>),
    /// Of a stream, when all of its outputs have come: what the kernel had to say.
    Streamed(Vec<(String, String)>),
    /// Of a chain, stage by stage: its results as in `Filled`, a report of each stage.
    Chained(Vec<Filled>, Vec<Report>),
}

/// A result, from which the file around it follows.
#[derive(Serialize, Deserialize)]
pub(super) struct Filled {
    pub(super) port: String,
    pub(super) spec: TensorSpec,
    pub(super) body: FilledIn,
}

#[derive(Serialize, Deserialize)]
pub(super) enum FilledIn {
    Segment {
        /// What it could have become.
        reserve_bytes: u64,
    },
    Inline(ByteBuf),
}

/// Bytes, and what else is counted, since the worker's start.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) copied_in: u64,
    pub(super) copied_out: u64,
    pub(super) huge_asked: u64,
    pub(super) huge: u64,
    /// That it has run, and no bytes.
    pub(super) slices: u64,
}

impl Totals {
    /// Figure by figure, what `combine` makes of the two.
    pub(super) fn with(self, other: Self, combine: fn(u64, u64) -> u64) -> Self {
        Self {
            copied_in: combine(self.copied_in, other.copied_in),
            copied_out: combine(self.copied_out, other.copied_out),
            huge_asked: combine(self.huge_asked, other.huge_asked),
            huge: combine(self.huge, other.huge),
            slices: combine(self.slices, other.slices),
        }
    }
}
