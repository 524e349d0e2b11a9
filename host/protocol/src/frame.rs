//! Headers: what a frame is, and how long.

/// First two bytes of every frame.
pub const MAGIC: [u8; 2] = *b"ST";
/// Protocol version in every header.
pub const VERSION: u8 = 2;
/// Size of a header in bytes.
pub const HEADER_BYTES: usize = 48;
/// Longest JSON body in bytes.
pub const BODY_BYTES_MAX: usize = 61_440;
/// Longest payload in bytes. A frame with the longest body and payload fits the buffer that Linux gives a socket by itself.
pub const PAYLOAD_BYTES_MAX: usize = 131_072;
/// Most file descriptors beside one frame.
pub const FDS_MAX: usize = 16;

/// Where a tensor may start in a reply's payload: at multiples of so many bytes.
pub const PAYLOAD_ALIGN: usize = 64;

/// What a tensor of `bytes` takes in a payload: up to where the next one starts. None if that is no number.
#[must_use]
pub const fn padded(bytes: u64) -> Option<u64> {
    bytes.checked_next_multiple_of(PAYLOAD_ALIGN as u64)
}

/// Bytes of payload that a frame with the longest body can carry on a socket with a send buffer of `send_buffer_bytes`: Linux
/// sends no packet that is longer than that, less what it needs itself.
#[must_use]
pub fn payload_room(send_buffer_bytes: usize) -> usize {
    const OWN: usize = 32;
    send_buffer_bytes
        .saturating_sub(OWN + HEADER_BYTES + BODY_BYTES_MAX)
        .min(PAYLOAD_BYTES_MAX)
}

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
    /// Makes a kernel ready for CALLs, which have a socket of their own.
    Prepare = 18,
    /// Runs what was prepared.
    Call = 19,
    /// Ends a running INVOKE, PREPARE or CALL.
    Cancel = 20,
    /// Reads a channel, over a socket of its own.
    Stream = 21,
    /// Asks whether the host is there.
    Ping = 22,
    /// What each principal may have; for operators of the host.
    Limits = 23,
    /// The processes that run kernels.
    Workers = 24,
    /// The plugins that are loaded.
    Plugins = 25,
    /// Lets others read a flight, or no longer.
    Share = 26,
    /// Rows for a prepared stream; in the other direction rows of its outputs with more to follow.
    Chunk = 64,
    /// Pushed: a lease is over.
    Gone = 65,
    /// Pushed: the host ends.
    Shutdown = 66,
    /// The last rows for a prepared stream.
    Last = 67,
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
    /// The header's lengths are not the packet's.
    #[error(
        "the header says {body_bytes} body bytes and {payload_bytes} of payload, the packet has {had}"
    )]
    Length {
        /// From the header.
        body_bytes: u32,
        /// From the header.
        payload_bytes: u32,
        /// Bytes after the header.
        had: usize,
    },
    /// The body is too long.
    #[error("a body of {0} bytes is over the limit of {BODY_BYTES_MAX}")]
    TooLong(usize),
    /// Bytes after the JSON of an op that has none.
    #[error(
        "{0} payload bytes in the header; only INVOKE, CALL, CHUNK, LAST and the answers to them carry a payload"
    )]
    Payload(u32),
    /// The payload is too long.
    #[error("a payload of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    PayloadTooLong(usize),
    /// Reserved bytes are set.
    #[error("reserved bytes {0:02x?} in the header; they are 0 in version {VERSION}")]
    Reserved([u8; 3]),
    /// Reserved bits are set.
    #[error("flags {0:#x} in the header; none is defined in version {VERSION}")]
    Flags(u32),
}

/// Which trace a request belongs to, as W3C Trace Context has it. It is carried, not interpreted:
/// a reply has that of its request. All zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceContext {
    /// Names the trace; zero bytes name none.
    pub trace_id: [u8; 16],
    /// Names the caller's span in it.
    pub parent_id: [u8; 8],
    /// The lowest bit says that the caller records the trace.
    pub flags: u8,
}

impl TraceContext {
    /// No trace.
    pub const NONE: Self = Self {
        trace_id: [0; 16],
        parent_id: [0; 8],
        flags: 0,
    };

    /// The trace's id, if there is a trace: written as 32 hex digits.
    #[must_use]
    pub fn id(&self) -> Option<impl std::fmt::Display> {
        let id = u128::from_be_bytes(self.trace_id);
        (id != 0).then(|| std::fmt::from_fn(move |f| write!(f, "{id:032x}")))
    }
}

/// What stands before each body, in [`HEADER_BYTES`] bytes.
///
/// ```text
///  0 "ST"   2 version   3 op   4 sequence   8 body_bytes   12 payload_bytes
/// 16 trace_id
/// 32 parent_id                 40 trace_flags   41 three zero bytes   44 flags, 0
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub op: Op,
    /// Pairs a reply with its request; 0 in pushed frames.
    pub sequence: u32,
    /// Length of the JSON that follows.
    pub body_bytes: u32,
    /// Length of what follows that: the bytes of tensors.
    pub payload_bytes: u32,
    /// The request's; in a reply that of its request.
    pub trace: TraceContext,
}

impl Header {
    /// Of a frame with a body and a payload of so many bytes, which whoever makes it has held against the most that they may be.
    #[must_use]
    pub fn of(op: Op, sequence: u32, (body, payload): (usize, usize), trace: TraceContext) -> Self {
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self {
            op,
            sequence,
            body_bytes: length(body),
            payload_bytes: length(payload),
            trace,
        }
    }

    /// The sequence of the frame with a channel's batch of that number, or of the frame that acknowledges it.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a header has 32 bits of the number"
    )]
    pub fn sequence_of_batch(number: u64) -> u32 {
        number as u32
    }

    /// The header as it goes over the socket.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2] = VERSION;
        bytes[3] = self.op as u8;
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.trace.trace_id);
        bytes[32..40].copy_from_slice(&self.trace.parent_id);
        bytes[40] = self.trace.flags;
        bytes
    }

    /// Reads the header of `packet` and gives it with the body and the payload.
    ///
    /// # Errors
    /// [`FrameError`] for anything that is not one whole frame of this version. The sequence
    /// of a frame with an unknown op can still be had from [`Header::sequence_of`].
    pub fn decode(packet: &[u8]) -> Result<(Self, &[u8], &[u8]), FrameError> {
        // What is of another version is told so, however long its header is.
        if let [first, second, version, ..] = *packet {
            if [first, second] != MAGIC {
                return Err(FrameError::Magic([first, second]));
            }
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
        }
        let Some((header, rest)) = packet.split_first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Short(packet.len()));
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let (body_bytes, payload_bytes) = (word(8), word(12));
        if u64::from(body_bytes) + u64::from(payload_bytes) != rest.len() as u64 {
            return Err(FrameError::Length {
                body_bytes,
                payload_bytes,
                had: rest.len(),
            });
        }
        if body_bytes as usize > BODY_BYTES_MAX {
            return Err(FrameError::TooLong(body_bytes as usize));
        }
        if payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadTooLong(payload_bytes as usize));
        }
        let op = Op::try_from(header[3])?;
        if payload_bytes != 0
            && !matches!(op, Op::Invoke | Op::Call | Op::Chunk | Op::Last | Op::Ok)
        {
            return Err(FrameError::Payload(payload_bytes));
        }
        let reserved = [header[41], header[42], header[43]];
        if reserved != [0; 3] {
            return Err(FrameError::Reserved(reserved));
        }
        if word(44) != 0 {
            return Err(FrameError::Flags(word(44)));
        }
        let mut trace = TraceContext {
            flags: header[40],
            ..TraceContext::NONE
        };
        trace.trace_id.copy_from_slice(&header[16..32]);
        trace.parent_id.copy_from_slice(&header[32..40]);
        // Together they are all of the rest, as held above.
        let (body, payload) = rest.split_at(body_bytes as usize);
        Ok((
            Self {
                op,
                sequence: word(4),
                body_bytes,
                payload_bytes,
                trace,
            },
            body,
            payload,
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
