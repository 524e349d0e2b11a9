//! What goes over the socket of one PREPARE, or through its ring.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use strait_memory::{FrameSocket, Received, SharedPages};
use strait_protocol::{self as wire, Header, Op, Side};
use strait_ring::{Came, Ring, RingError, Spin};

use super::frames::{Outgoing, encode, failure};
use crate::error::{Code, Reason, Status};
use crate::session::{Called, ChunkFrame, Prepared};

/// A frame that came, of the right kind.
pub(super) struct Asked {
    pub(super) header: Header,
    pub(super) frame: Arc<Vec<u8>>,
    pub(super) payload: Range<usize>,
}

impl Asked {
    pub(super) fn into_chunk(self) -> (Header, ChunkFrame) {
        let chunk = ChunkFrame {
            frame: self.frame,
            payload: self.payload,
            last: self.header.op == Op::Last,
        };
        (self.header, chunk)
    }
}

/// The host's end.
pub(super) struct Line<'a> {
    socket: &'a FrameSocket,
    /// How long to look for the next frame after the one before was answered.
    spin: Spin,
    /// Something came, and whoever sent it may send more soon.
    lively: bool,
    ring: Option<Ring>,
    /// It ends after what it does now.
    over: &'a AtomicBool,
    /// Bytes of each payload.
    payload: usize,
    /// What the frames are.
    ops: &'static [Op],
    frame: Arc<Vec<u8>>,
    /// What is to be sent next is in the ring already, but for its body.
    announced: bool,
}

impl<'a> Line<'a> {
    pub(super) fn new(
        socket: &'a FrameSocket,
        ring: Option<(wire::Ring, SharedPages)>,
        over: &'a AtomicBool,
        prepared: &Prepared,
        spin: Spin,
    ) -> Self {
        Self {
            socket,
            spin,
            lively: false,
            ring: ring.map(|(layout, memory)| Ring::new(memory, layout, Side::Host, spin)),
            over,
            payload: usize::try_from(prepared.request_bytes()).unwrap_or(0),
            ops: match prepared.streams() {
                true => &[Op::Chunk, Op::Last],
                false => &[Op::Call],
            },
            frame: Arc::default(),
            announced: false,
        }
    }

    /// Waits for the next one; none at the end.
    ///
    /// # Errors
    /// What is answered to one that is wrong, and its sequence.
    pub(super) fn next(&mut self) -> Result<Option<Asked>, (u32, Status)> {
        // What is longer is truncated, and noticed.
        let bytes = wire::HEADER_BYTES + self.payload + 1;
        // Nobody has the one before any more, unless an input of it is still on its way somewhere.
        if Arc::get_mut(&mut self.frame).is_none_or(|frame| frame.len() != bytes) {
            self.frame = Arc::new(vec![0; bytes]);
        }
        let lively = std::mem::replace(&mut self.lively, true);
        let Some(buffer) = Arc::get_mut(&mut self.frame) else {
            return Ok(None);
        };
        let came = match &mut self.ring {
            Some(ring) => {
                let (frame, over) = (&mut buffer[..bytes - 1], self.over);
                let over = || over.load(Ordering::Relaxed);
                from_ring(ring.receive(self.socket, frame, lively, over), frame)
            }
            None => {
                let spin = if lively { self.spin } else { Spin::NEVER };
                from_socket(spin.recv(self.socket, buffer), self.payload)
            }
        };
        let Some(came) = came else {
            return Ok(None);
        };
        let packet = &buffer[..came.bytes];
        let header = match came.wrong {
            Some(wrong) => Err(wrong),
            None => header_of(packet, came.fds, self.ops),
        };
        let header = header.map_err(|message| {
            let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
            (Header::sequence_of(packet), status)
        })?;
        Ok(Some(Asked {
            header,
            frame: Arc::clone(&self.frame),
            payload: wire::HEADER_BYTES..came.bytes,
        }))
    }

    /// What the client says comes here.
    pub(super) fn socket(&self) -> &FrameSocket {
        self.socket
    }

    /// Frames come through a ring, which is not used any more after something wrong.
    pub(super) fn is_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Sends a reply at once, or says that this would have to wait.
    pub(super) fn send_now(&mut self, answered: &Answered) -> io::Result<()> {
        self.send_by(answered, FrameSocket::send_now)
    }

    /// Sends a reply, also one that could not be sent at once.
    pub(super) fn send(&mut self, answered: &Answered) -> io::Result<()> {
        self.send_by(answered, |socket, parts| socket.send(parts, &[]))
    }

    fn send_by(
        &mut self,
        answered: &Answered,
        by: impl FnOnce(&FrameSocket, &[&[u8]]) -> io::Result<()>,
    ) -> io::Result<()> {
        let Self {
            socket,
            ring,
            announced,
            ..
        } = self;
        answered.with_parts(|parts| {
            let Some(ring) = ring else {
                return by(socket, parts);
            };
            // There is no room for a body in a slot: the slot says that it comes on the socket.
            let has_body = answered.has_body();
            let slot = if has_body { &parts[..1] } else { parts };
            if !*announced {
                ring.send(socket, slot).map_err(|error| match error {
                    RingError::Socket(error) => error,
                    violation @ RingError::Violation(_) => io::Error::other(violation),
                })?;
            }
            if !has_body {
                return Ok(());
            }
            let sent = by(socket, parts);
            *announced = matches!(&sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
            sent
        })
    }

    /// Nothing more is answered. What comes is thrown away until the client closes its end: a socket that is closed with
    /// something unread looks reset, and the client would not receive what was sent last.
    pub(super) fn discard(&self) {
        if self.socket.shutdown_sending().is_ok() {
            let mut nothing = [0; wire::HEADER_BYTES];
            while self
                .socket
                .recv(&mut nothing)
                .is_ok_and(|received| received.bytes > 0)
            {}
        }
    }
}

/// What came: so many bytes, and beside them so many descriptors, which are closed.
struct Packet {
    bytes: usize,
    fds: usize,
    /// Where the bytes are no frame.
    wrong: Option<String>,
}

fn from_socket(received: io::Result<Received>, payload: usize) -> Option<Packet> {
    let received = received.ok().filter(|received| received.bytes > 0)?;
    let wrong = || {
        format!(
            "a frame with more than the {payload} bytes of payload of this PREPARE, or with descriptors"
        )
    };
    // The descriptors are closed here, before anything is answered.
    Some(Packet {
        bytes: received.bytes,
        fds: received.fds.len(),
        wrong: received.truncated.then(wrong),
    })
}

fn from_ring(came: Result<Came, RingError>, frame: &[u8]) -> Option<Packet> {
    let (bytes, wrong) = match came {
        Ok(Came::Frame) => (frame.len(), None),
        Ok(Came::End) | Err(RingError::Socket(_)) => return None,
        Ok(Came::Packet(bytes) | Came::Wrong(bytes)) => {
            let wrong = "a packet on the socket of a ring: only single bytes go over it, which wake; CALLs go into slots";
            (bytes, Some(wrong.to_owned()))
        }
        Err(violation @ RingError::Violation(_)) => (0, Some(violation.to_string())),
    };
    Some(Packet {
        bytes,
        fds: 0,
        wrong,
    })
}

/// The header of a packet that is one of `ops`, or what is wrong with that.
fn header_of(packet: &[u8], fds: usize, ops: &[Op]) -> Result<Header, String> {
    let (header, body, _) = Header::decode(packet).map_err(|error| error.to_string())?;
    if !ops.contains(&header.op) {
        let takes = match ops {
            [only] => format!("it takes {only:?} only"),
            _ => "it streams, and takes Chunk and Last".to_owned(),
        };
        return Err(format!(
            "{:?} on the socket of a PREPARE; {takes}: other requests go over the connection",
            header.op
        ));
    }
    if !body.is_empty() || fds > 0 {
        return Err(format!(
            "such a frame has neither a body nor descriptors, this one has {} bytes and {fds}",
            body.len()
        ));
    }
    Ok(header)
}

/// What a kernel had to say, as a frame's body; empty if that is nothing.
///
/// # Errors
/// `BAD_ANSWER` if that is more than a frame takes.
pub(super) fn notes_body(notes: Vec<(String, String)>) -> Result<Vec<u8>, Status> {
    if notes.is_empty() {
        return Ok(Vec::new());
    }
    let notes = notes
        .into_iter()
        .map(|(key, text)| wire::Note { key, text });
    let notes = notes.collect();
    let frame = encode(Op::Ok, 0, &wire::Called { notes }, Vec::new());
    match frame.op {
        Op::Error => Err(Status::new(
            Code::Internal,
            Reason::BadAnswer,
            "the kernel left more notes than a frame takes; the plugin must leave fewer or shorter ones",
        )),
        _ => Ok(frame.body),
    }
}

/// What is answered.
pub(super) enum Answered {
    Ok {
        header: Header,
        body: Vec<u8>,
        payload: Vec<Vec<u8>>,
    },
    Error(Outgoing),
}

impl Answered {
    pub(super) fn new(asked: &Header, prepared: &Prepared, result: Result<Called, Status>) -> Self {
        let error = |status: &Status| {
            let trace = asked.trace;
            let failure = failure(asked.sequence, status, prepared.request_id());
            Self::Error(Outgoing { trace, ..failure })
        };
        let called = match result {
            Ok(called) => called,
            Err(status) => return error(&status),
        };
        match notes_body(called.notes) {
            Ok(body) => Self::parts(Op::Ok, asked, called.payload, body),
            Err(status) => error(&status),
        }
    }

    pub(super) fn parts(op: Op, asked: &Header, payload: Vec<Vec<u8>>, body: Vec<u8>) -> Self {
        let lengths = (body.len(), payload.iter().map(Vec::len).sum());
        Self::Ok {
            header: Header::of(op, asked.sequence, lengths, asked.trace),
            body,
            payload,
        }
    }

    fn has_body(&self) -> bool {
        match self {
            Self::Ok { body, .. } => !body.is_empty(),
            Self::Error(_) => true,
        }
    }

    fn with_parts<R>(&self, send: impl FnOnce(&[&[u8]]) -> R) -> R {
        match self {
            Self::Ok {
                header,
                body,
                payload,
            } => {
                let header = header.encode();
                let mut parts = vec![&header[..], &body[..]];
                parts.extend(payload.iter().map(Vec::as_slice));
                send(&parts)
            }
            Self::Error(outgoing) => send(&[&outgoing.header(), &outgoing.body]),
        }
    }
}
