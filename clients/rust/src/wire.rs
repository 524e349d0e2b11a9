//! The data socket's frames and JSON bodies, as `docs/protocol.md` states them.
//!
//! Host and client share these types: one definition of the contract. Requests refuse
//! unknown fields, replies ignore them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use strait_tensor::{Dtype, TensorPlace, TensorSpec};

/// First two bytes of every frame.
pub const MAGIC: [u8; 2] = *b"ST";
/// Protocol version in every header.
pub const VERSION: u8 = 1;
/// Size of a header in bytes.
pub const HEADER_BYTES: usize = 16;
/// Longest JSON body in bytes.
pub const BODY_BYTES_MAX: usize = 61_440;
/// Most file descriptors beside one frame.
pub const FDS_MAX: usize = 16;

macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// What a frame asks or answers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Op { $($(#[$doc])* $name = $code,)* }

        impl TryFrom<u8> for Op {
            type Error = FrameError;
            fn try_from(code: u8) -> Result<Self, FrameError> {
                match code { $($code => Ok(Op::$name),)* other => Err(FrameError::Op(other)) }
            }
        }
    };
}

ops! {
    /// First request of a connection.
    Hello = 1,
    /// Reply to HELLO.
    Welcome = 2,
    /// Reply to every other request that succeeded.
    Ok = 3,
    /// Reply to a request that failed.
    Error = 4,
    /// Lists kernels.
    Kernels = 5,
    /// A flight's mapping by name.
    Lookup = 6,
    /// Lists flights.
    List = 7,
    /// Gives a segment a name.
    Publish = 8,
    /// Takes a name away.
    Drop = 9,
    /// The host's counts.
    Stats = 10,
    /// A segment for the client to fill.
    Create = 11,
    /// Ends all writing to a segment.
    Seal = 12,
    /// Takes over a client's memfd.
    Adopt = 13,
    /// A descriptor and a lease.
    Map = 14,
    /// Ends leases.
    Release = 15,
    /// Prolongs leases.
    Renew = 16,
    /// Runs a kernel.
    Invoke = 17,
    /// Reserved.
    Prepare = 18,
    /// Reserved.
    Call = 19,
    /// Ends a running INVOKE.
    Cancel = 20,
    /// Reserved.
    Stream = 21,
    /// Asks whether the host is there.
    Ping = 22,
    /// Reserved.
    Chunk = 64,
    /// Pushed: a lease is over.
    Gone = 65,
    /// Pushed: the host ends.
    Shutdown = 66,
}

/// Why a frame's header could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Fewer bytes than a header.
    #[error("a frame of {0} bytes is shorter than its header of {HEADER_BYTES} bytes")]
    Short(usize),
    /// Not our protocol.
    #[error(
        "a frame starts with {0:02x?}; this socket speaks strait's protocol, whose frames start with \"ST\""
    )]
    Magic([u8; 2]),
    /// Another protocol version.
    #[error("protocol version {0} in the header; this side speaks version {VERSION}")]
    Version(u8),
    /// An op that the protocol does not have.
    #[error("op {0} does not exist in protocol version {VERSION}")]
    Op(u8),
    /// The header's length is not the packet's.
    #[error("the header says {said} body bytes, the packet has {had}")]
    Length {
        /// From the header.
        said: u32,
        /// Bytes after the header.
        had: usize,
    },
    /// The body is too long.
    #[error("a body of {0} bytes is over the limit of {BODY_BYTES_MAX}")]
    TooLong(usize),
    /// Reserved bits are set.
    #[error("flags {0:#x} in the header; none is defined in version {VERSION}")]
    Flags(u32),
}

/// The 16 bytes before each body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub op: Op,
    /// Pairs a reply with its request; 0 in pushed frames.
    pub sequence: u32,
    /// Length of the JSON that follows.
    pub body_bytes: u32,
}

impl Header {
    /// The header as it goes over the socket.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = VERSION;
        bytes[3] = self.op as u8;
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes
    }

    /// Reads the header of `packet` and gives it with the body.
    ///
    /// # Errors
    /// [`FrameError`] for anything that is not one whole frame of this version. The sequence
    /// of a frame with an unknown op can still be had from [`Header::sequence_of`].
    pub fn decode(packet: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        let Some((header, body)) = packet.split_first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Short(packet.len()));
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if header[..2] != MAGIC {
            return Err(FrameError::Magic([header[0], header[1]]));
        }
        if header[2] != VERSION {
            return Err(FrameError::Version(header[2]));
        }
        if word(8) as usize != body.len() {
            return Err(FrameError::Length {
                said: word(8),
                had: body.len(),
            });
        }
        if body.len() > BODY_BYTES_MAX {
            return Err(FrameError::TooLong(body.len()));
        }
        let op = Op::try_from(header[3])?;
        if word(12) != 0 {
            return Err(FrameError::Flags(word(12)));
        }
        Ok((
            Self {
                op,
                sequence: word(4),
                body_bytes: word(8),
            },
            body,
        ))
    }

    /// The sequence of a packet whose header is at least long enough to have one, else 0.
    #[must_use]
    pub fn sequence_of(packet: &[u8]) -> u32 {
        packet
            .get(4..8)
            .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
}

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
    pub seal: Seal,
    /// Where the tensors lie.
    pub tensors: Vec<TensorPlace>,
}

/// Who can still write to a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seal {
    /// Nobody.
    Write,
    /// The host, which does not while anyone holds a lease.
    HostWrite,
    /// The client that made it.
    ClientWrite,
    /// Everybody who has the descriptor.
    None,
}

macro_rules! request {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
            /// Names this request in replies, errors and log lines; the host makes one if it is missing.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub request_id: Option<String>,
        }
    };
}

request! {
    /// HELLO.
    Hello {
        /// 1.
        protocol: u32,
        /// Name and version of the client library.
        client: String,
    }
}
request! {
    /// A request without fields of its own (STATS, PING).
    Empty {}
}
request! {
    /// KERNELS.
    Kernels {
        /// Last `plugin/kernel` of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
        /// Only this kernel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kernel: Option<String>,
    }
}
request! {
    /// LOOKUP and DROP.
    Name {
        /// The flight's name.
        name: String,
    }
}
request! {
    /// LIST.
    List {
        /// Last name of the previous page.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    }
}
request! {
    /// CREATE.
    Create {
        /// What the segment is to hold; all of them share the leading axis.
        tensors: Vec<NewTensor>,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// SEAL.
    SegmentId {
        /// The segment's id.
        segment: String,
    }
}
request! {
    /// PUBLISH.
    Publish {
        /// The segment's id.
        segment: String,
        /// The name it gets.
        name: String,
        /// Take the name from another flight.
        #[serde(default)]
        replace: bool,
    }
}
request! {
    /// ADOPT.
    Adopt {
        /// Where the tensors lie in the memfd.
        tensors: Vec<PlacedTensor>,
        /// A name for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Take the name from another flight.
        #[serde(default)]
        replace: bool,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// MAP: either `name` or `segment`.
    Map {
        /// The flight's name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// The segment's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        segment: Option<String>,
        /// Life of the lease in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// RELEASE and RENEW.
    Leases {
        /// Lease ids.
        leases: Vec<u64>,
        /// RENEW: the new life in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
    }
}
request! {
    /// CANCEL.
    Cancel {
        /// The INVOKE's sequence.
        sequence: u32,
    }
}
request! {
    /// INVOKE.
    Invoke {
        /// `kernel` or `plugin/kernel`.
        kernel: String,
        /// Port to input.
        inputs: BTreeMap<String, Input>,
        /// Parameter to value.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        parameters: BTreeMap<String, serde_json::Value>,
        /// Output port to the name it gets.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        publish: BTreeMap<String, String>,
        /// May `publish` take names from other flights.
        #[serde(default)]
        replace: bool,
        /// Seal the outputs for good.
        #[serde(default)]
        seal: bool,
        /// Wall time in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
        /// Life of the results' leases in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease_ms: Option<u64>,
        /// false: no descriptors and no leases.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        map: Option<bool>,
        /// Tighter limits than the host's own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limits: Option<Limits>,
        /// Fill `pages`.
        #[serde(default)]
        verify: bool,
        /// A repeat of the same key gets the same results.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idempotency_key: Option<String>,
    }
}

/// A tensor that CREATE is to make room for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewTensor {
    /// Column name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
}

/// A tensor where ADOPT says that it lies.
// Not `TensorPlace`, which a reply may extend: a request with unknown fields is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacedTensor {
    /// Column name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major sizes.
    pub shape: Vec<u64>,
    /// First byte in the memfd.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl From<PlacedTensor> for TensorPlace {
    fn from(placed: PlacedTensor) -> Self {
        let PlacedTensor {
            name,
            dtype,
            shape,
            offset,
            length,
        } = placed;
        Self {
            name,
            spec: TensorSpec { dtype, shape },
            offset,
            length,
        }
    }
}

impl From<&TensorPlace> for PlacedTensor {
    fn from(place: &TensorPlace) -> Self {
        let TensorSpec { dtype, shape } = place.spec.clone();
        Self {
            name: place.name.clone(),
            dtype,
            shape,
            offset: place.offset,
            length: place.length,
        }
    }
}

/// An input of INVOKE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Input {
    /// `name` or `name#column`.
    Text(String),
    /// A flight by name.
    Flight {
        /// The flight's name.
        name: String,
        /// One of its tensors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        column: Option<String>,
    },
    /// A segment that the session has a lease on.
    Segment {
        /// The segment's id.
        segment: String,
        /// One of its tensors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        column: Option<String>,
    },
}

/// Limits of one invocation; each must not exceed the host's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The guest's own memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_bytes: Option<u64>,
    /// All windows together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bytes: Option<u64>,
    /// All results together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_bytes: Option<u64>,
    /// All log lines together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_bytes: Option<u64>,
}

/// WELCOME.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// 1.
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
    /// What it is.
    pub doc: String,
}

/// A parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// `boolean`, `integer`, `real`, `number`, `axis`, `text` or `reals`.
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
    /// The axis along which it may be cut into slices.
    pub split_axis: Option<u32>,
    /// May be run chunk by chunk.
    pub streaming: bool,
    /// An output may share its input's pages.
    pub in_place: bool,
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
    /// What to map.
    pub mapping: Mapping,
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
