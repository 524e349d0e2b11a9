//! The bodies of replies and of what is pushed. Readers ignore unknown fields.

use serde::{Deserialize, Serialize};
use strait_tensor::{Dtype, TensorPlace};

use crate::ring::Ring;

/// What a client needs in order to map a segment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    /// Version of this record: 1.
    #[serde(rename = "strait-mmap")]
    pub strait_mmap: u32,
    /// The host's uuid, new at every start.
    pub host_id: String,
    /// Path of the data socket that gives the descriptor.
    pub socket: String,
    /// The segment's id: 32 hex digits.
    pub segment: String,
    /// Counts reuses of the id.
    pub generation: u64,
    /// Length of the Arrow IPC file in the segment.
    pub bytes: u64,
    /// Who can still write.
    pub writers: Writers,
    /// Where the tensors lie.
    pub tensors: Vec<TensorPlace>,
}

/// Who can still write to a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Writers {
    /// Nobody, for good.
    None,
    /// The host, which does not while anyone holds a lease.
    Host,
    /// The worker process of the host that filled it, which does not while anyone holds a lease.
    Worker,
    /// The client that made it, by the mapping that it has.
    Creator,
    /// Anyone who has the descriptor.
    Anyone,
}

impl Writers {
    /// As it stands in a mapping.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Host => "host",
            Self::Worker => "worker",
            Self::Creator => "creator",
            Self::Anyone => "anyone",
        }
    }
}

/// WELCOME.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::VERSION`].
    pub protocol: u32,
    /// The host's uuid.
    pub host_id: String,
    /// The host's version.
    pub host_version: String,
    /// This session.
    pub session: String,
    /// Who the host takes the client for.
    pub principal: String,
    /// The runtime directory.
    pub directory: String,
    /// Address of the Flight service.
    pub flight: String,
    /// Tensors from this size on are moved, smaller ones copied.
    pub move_min_bytes: u64,
    /// Tensors up to this size may travel in frames, as inputs of INVOKE and as results; 0: none.
    #[serde(default)]
    pub inline_bytes: u64,
    /// Life of a lease that names none.
    pub lease_ms_default: u64,
    /// Longest life of a lease.
    pub lease_ms_max: u64,
    /// Deadline of an INVOKE that names none.
    pub deadline_ms_default: u64,
    /// Longest deadline.
    pub deadline_ms_max: u64,
    /// The request's id.
    pub request_id: String,
}

/// OK with a mapping: LOOKUP, SEAL, PUBLISH, and with a lease CREATE, ADOPT, MAP.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mapped {
    /// LOOKUP: the name asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What to map.
    pub mapping: Mapping,
    /// The lease, where one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
    /// The lease's life in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// The request's id.
    pub request_id: String,
}

/// One flight in a listing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flight {
    /// Its name.
    pub name: String,
    /// Its mapping.
    pub mapping: Mapping,
}

/// OK to LIST.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flights {
    /// Sorted by name.
    pub flights: Vec<Flight>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}

/// OK to SHARE.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shared {
    /// The flight's name.
    pub name: String,
    /// Whom it is shared with now.
    pub shared: Vec<String>,
    /// The request's id.
    pub request_id: String,
}

/// A port of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// What it takes or gives.
    pub dtypes: Vec<Dtype>,
    /// Least rank.
    pub rank_min: u32,
    /// Greatest rank.
    pub rank_max: u32,
    /// `data` or `mask`.
    pub role: String,
    /// An input that comes whole with every chunk and slice.
    #[serde(default)]
    pub whole: bool,
    /// What it is.
    pub doc: String,
}

/// A parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// `boolean`, `integer`, `real`, `number`, `axis`, `text`, `integers` or `reals`.
    pub kind: String,
    /// Missing: the caller must give it.
    pub default: Option<serde_json::Value>,
    /// Least value, exact.
    pub minimum: Option<serde_json::Number>,
    /// Greatest value, exact.
    pub maximum: Option<serde_json::Number>,
    /// Allowed texts; empty allows any.
    pub choices: Vec<String>,
    /// What it does.
    pub doc: String,
}

/// How a reduction gives the same bits on any slicing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockTree {
    /// Rows of one block, counted from row 0 of the whole tensor.
    pub block_rows: u64,
    /// The kernel that gives one row for each block.
    pub partials: String,
    /// The kernel that makes the result of them.
    pub merge: String,
}

/// A kernel as KERNELS lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// The plugin's name.
    pub plugin: String,
    /// The plugin's version.
    pub version: String,
    /// What it computes.
    pub doc: String,
    /// Input ports.
    pub inputs: Vec<Port>,
    /// Output ports.
    pub outputs: Vec<Port>,
    /// Parameters.
    pub parameters: Vec<Parameter>,
    /// Which axes are equal, such as `(n),(k)->(m)`; none: no rule.
    #[serde(default)]
    pub signature: Option<String>,
    /// The axis along which it may be cut into slices.
    pub split_axis: Option<u32>,
    /// How the slices' results are put together: `none`, `concatenate` or `tree`.
    #[serde(default = "not_combined")]
    pub combine: String,
    /// With `tree`.
    #[serde(default)]
    pub block_tree: Option<BlockTree>,
    /// May be run chunk by chunk.
    pub streaming: bool,
    /// An output may share its input's pages.
    pub in_place: bool,
}

fn not_combined() -> String {
    "none".to_owned()
}

/// OK to KERNELS.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KernelList {
    /// Sorted by plugin and name.
    pub kernels: Vec<Kernel>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}

/// One output of INVOKE.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResultEntry {
    /// The output port.
    pub port: String,
    /// What to map; none if the result is in the frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<Mapping>,
    /// Where in the payload the result is, if that has no mapping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inline: Option<InlineResult>,
    /// The lease, unless `map` was false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
    /// The lease's life in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// Index of its descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<usize>,
    /// The name it was published under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A result in a reply's payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InlineResult {
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
    /// First byte in the payload.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// OK to PREPARE, with the socket for CALLs as a descriptor, and behind it the memory of the ring if there is one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// Its number, for CANCEL.
    pub prepared: u64,
    /// Length of each CALL's payload in bytes.
    pub request_bytes: u64,
    /// What each CALL brings, in the kernel's order: the sizes of the first are at byte 0 of the payload, of the next at 64, and so on.
    pub inputs: Vec<PreparedTensor>,
    /// Length of the payload of each OK in bytes.
    pub reply_bytes: u64,
    /// The outputs, likewise.
    pub outputs: Vec<PreparedTensor>,
    /// Where CALLs and the OKs to them go in the place of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ring: Option<Ring>,
    /// The request's id, which the errors of its CALLs carry.
    pub request_id: String,
}

/// OK to STREAM, with one descriptor: the socket on which batches come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streamed {
    /// The channel's name.
    pub channel: String,
    /// Whose outputs come over it.
    pub kernel: String,
    /// The outputs in the payload of each batch, their shapes with the most rows of one.
    pub outputs: Vec<PreparedTensor>,
    /// Length of that payload in bytes.
    pub batch_bytes: u64,
    /// Number of the first batch that comes; the channel's first one is 1.
    pub first: u64,
    /// The request's id.
    pub request_id: String,
}

/// A tensor in the payload of CALL or of the OK to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedTensor {
    /// The port.
    pub port: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes; of an output at most.
    pub shape: Vec<u64>,
    /// First byte in the payload.
    pub offset: u64,
    /// Bytes that it has room for.
    pub length: u64,
}

/// The body of an OK to CALL, if the kernel had anything to say.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Called {
    /// What it said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Note>,
}

/// A warning or figure from the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// What it is about.
    pub key: String,
    /// What it says.
    pub text: String,
}

/// What the host's own maps said at a window's address during `run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The port.
    pub port: String,
    /// Device of the mapped file; 0 for anonymous memory (a copied tensor).
    pub device: u64,
    /// Inode of the mapped file; 0 for anonymous memory.
    pub inode: u64,
}

/// Where an invocation's time went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// Waiting for a worker.
    pub queue: f64,
    /// Store and instance.
    pub instantiate: f64,
    /// `open`, and taking the results from the pool.
    pub open: f64,
    /// `reserve` and `bind`.
    pub reserve: f64,
    /// Windows in (or copies in).
    pub move_in: f64,
    /// `run`.
    pub run: f64,
    /// Windows home (or copies out).
    pub move_out: f64,
    /// All of it.
    pub total: f64,
}

/// OK to INVOKE.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Invoked {
    /// One for each output port, in the kernel's order.
    pub results: Vec<ResultEntry>,
    /// What the kernel had to say.
    pub notes: Vec<Note>,
    /// Bytes of this invocation's tensors that the host copied.
    pub copied_bytes: u64,
    /// The kernel wrote to an input; only ever true in an error's details.
    pub input_written: bool,
    /// See `verify`.
    pub pages: Vec<Pages>,
    /// Page faults of the host's process during the invocation that needed no I/O.
    pub minor_faults: u64,
    /// Where the time went.
    pub seconds: Seconds,
    /// The request's id.
    pub request_id: String,
}

/// OK to RELEASE.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Released {
    /// How many of them were live.
    pub released: u64,
    /// The request's id.
    pub request_id: String,
}

/// OK to RENEW.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Renewed {
    /// The leases' new life in milliseconds.
    pub expires_ms: u64,
    /// The request's id.
    pub request_id: String,
}

/// OK to CANCEL.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cancelled {
    /// false: it was not running.
    pub cancelled: bool,
    /// The request's id.
    pub request_id: String,
}

/// OK to PING and DROP.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// The request's id.
    pub request_id: String,
}

/// ERROR.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// A gRPC code's name.
    pub code: String,
    /// Stable word for programs.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The request's id.
    pub request_id: String,
    /// The guest's stack, for a trap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backtrace: Option<String>,
    /// Figures and names.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub details: serde_json::Map<String, serde_json::Value>,
}

/// GONE.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Gone {
    /// The lease that is over.
    pub lease: u64,
    /// Its segment.
    pub segment: String,
    /// Why.
    pub reason: String,
}

/// SHUTDOWN.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Shutdown {
    /// Time until the host ends.
    pub drain_ms: u64,
}
