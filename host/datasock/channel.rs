//! The two ends of a channel as sockets: the producer's, which brings chunks, and the consumer's, on which batches go.
//!
//! ```text
//! CHUNK, LAST ─▶ lane: produce ─▶ kernel ─▶ Channel ─▶ Reader ─▶ CHUNK …, LAST or ERROR
//!        OK ◀──────┘                              OK with the number of a batch ◀─┘
//! ```

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use strait_memory::{Charge, FrameSocket};
use strait_protocol::{Header, Op, SIZES_BYTES, TraceContext};

use super::frames::failure;
use super::lane::{Edge, notes_body};
use crate::engine::CancelToken;
use crate::error::{Code, Reason, Status};
use crate::session::{
    Called, Channel, ChunkEdge, ChunkFrame, Consumer, Item, OpenChannel, Parted, Prepared, Said,
    Sent, Woken, producer_lost,
};

/// How often a producer that is held up looks whether it was cancelled, or has waited long enough.
const TICK: Duration = Duration::from_millis(50);

/// The host's end of a consumer's socket.
#[derive(Debug)]
pub(super) struct Reader {
    socket: FrameSocket,
    request_id: Arc<str>,
    _place: Charge,
}

impl Reader {
    /// # Errors
    /// `HOST`, if Linux does not let it be one that does not wait.
    pub(super) fn new(
        socket: FrameSocket,
        request_id: Arc<str>,
        place: Charge,
    ) -> Result<Self, Status> {
        socket.set_nonblocking(true).map_err(|error| {
            let message = format!("a channel's socket: {error}");
            Status::new(Code::Internal, Reason::Host, message)
        })?;
        Ok(Self {
            socket,
            request_id,
            _place: place,
        })
    }
}

impl Consumer for Reader {
    fn send(&self, number: u32, item: &Item) -> Sent {
        let (op, body, payload): (_, &[u8], &[Vec<u8>]) = match item {
            Item::Rows(payload) => (Op::Chunk, &[], payload),
            Item::End(notes) => (Op::Last, notes, &[]),
        };
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        let header = Header {
            op,
            sequence: number,
            body_bytes: length(body.len()),
            payload_bytes: length(payload.iter().map(Vec::len).sum()),
            trace: TraceContext::NONE,
        }
        .encode();
        let mut parts = vec![&header[..], body];
        parts.extend(payload.iter().map(Vec::as_slice));
        match self.socket.send_now(&parts) {
            Ok(()) => Sent::Whole,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Full,
            Err(_) => Sent::Gone,
        }
    }

    fn said(&self) -> Said {
        // What is longer is truncated, and noticed.
        let mut packet = [0; strait_protocol::HEADER_BYTES + 1];
        let received = match self.socket.recv(&mut packet) {
            Ok(received) if received.bytes == 0 => return Said::Gone,
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Said::Nothing,
            // It left without having read all: what it said before is still here.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return self.said(),
            Err(_) => return Said::Gone,
        };
        let wrong = |what: &str| {
            Said::Wrong(format!(
                "{what} on the socket of a STREAM; it takes OK without a body, which acknowledges a batch"
            ))
        };
        if received.truncated || received.no_room || !received.fds.is_empty() {
            return wrong("a frame with a body, a payload or descriptors");
        }
        match Header::decode(&packet[..received.bytes]) {
            Ok((header, _, _)) if header.op == Op::Ok => Said::Acknowledged(header.sequence),
            Ok((header, _, _)) => wrong(&format!("{:?}", header.op)),
            Err(error) => wrong(&error.to_string()),
        }
    }

    fn fail(&self, status: &Status) {
        // Whoever has no room for it sees the end.
        let _ = failure(0, status, &self.request_id).send(&self.socket);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The chunks of `edge`, and the channel for what comes of them.
struct Producing<'a, 'b, 'c> {
    edge: &'a mut Edge<'b, 'c>,
    channel: &'a Channel,
    cancel: &'a CancelToken,
    /// The chunk that was received last is answered: what happens now is told with the next one.
    is_answered: bool,
}

/// Runs the kernel on chunk after chunk, the first of which is `first`, and hands what comes of them to the channel, until
/// its consumer has all of it. Then it is over.
pub(super) fn produce(
    prepared: &Prepared,
    channel: &OpenChannel,
    first: ChunkFrame,
    cancel: &CancelToken,
    edge: &mut Edge<'_, '_>,
) {
    let mut producing = Producing {
        edge,
        channel,
        cancel,
        is_answered: false,
    };
    let ended = prepared
        .stream(first, cancel, &mut producing)
        .and_then(|called| producing.finish(called));
    let told = ended.as_ref().err().cloned();
    // Whoever waits for the name, or for nothing more to come, is not kept by a producer that does not read.
    if told.is_none() {
        channel.end(None);
    }
    producing.edge.end(prepared, ended);
    channel.end(told.as_ref());
}

impl Producing<'_, '_, '_> {
    fn put(&self, payload: Vec<Vec<u8>>) {
        if has_rows(&payload) {
            self.channel.push(Item::Rows(payload));
        }
    }

    /// The rest, and the end; waits until the consumer has acknowledged that.
    fn finish(&mut self, called: Called) -> Result<Called, Status> {
        let notes = notes_body(called.notes.clone())?;
        self.put(called.payload);
        self.channel.push(Item::End(notes));
        self.wait(Channel::is_empty)?;
        Ok(Called {
            payload: Vec::new(),
            notes: called.notes,
        })
    }

    /// Waits until `ready`, while the producer is there.
    fn wait(&self, ready: impl Fn(&Channel) -> bool) -> Result<(), Status> {
        loop {
            self.channel.advance()?;
            if ready(self.channel) {
                return Ok(());
            }
            if self.cancel.is_cancelled() {
                let message = "the stream was cancelled while its channel was full";
                return Err(Status::new(Code::Cancelled, Reason::Cancelled, message));
            }
            if self.woken(false, Some(TICK))? == Woken::Gone {
                return Err(producer_lost());
            }
        }
    }

    fn woken(&self, for_requests: bool, most: Option<Duration>) -> Result<Woken, Status> {
        let woken = self
            .channel
            .wait(self.edge.socket.as_fd(), for_requests, most);
        woken.map_err(|error| {
            let message = format!("waiting on a channel: {error}");
            Status::new(Code::Internal, Reason::Host, message)
        })
    }
}

impl ChunkEdge for Producing<'_, '_, '_> {
    fn receive(&mut self) -> Result<Option<ChunkFrame>, Status> {
        while self.channel.advance().is_ok() {
            match self.woken(true, None)? {
                Woken::Producer => break,
                Woken::Gone => return Err(producer_lost()),
                Woken::Other => {}
            }
        }
        let chunk = self.edge.receive()?.ok_or_else(producer_lost)?;
        self.is_answered = false;
        self.wait(Channel::has_room)?;
        Ok(Some(chunk))
    }

    fn send(&mut self, payload: Vec<Vec<u8>>, done: bool) -> Result<(), Parted> {
        self.put(payload);
        if done {
            self.is_answered = true;
            self.edge.send(Vec::new(), true)?;
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.edge.is_full() || !self.channel.has_room()
    }

    fn flush(&mut self) -> Result<(), Parted> {
        self.edge.flush()?;
        match self.is_answered {
            true => Ok(()),
            false => self.wait(Channel::has_room).map_err(Parted::Failed),
        }
    }
}

/// Whether any output in `payload`, the first part of which are their sizes, has rows.
fn has_rows(payload: &[Vec<u8>]) -> bool {
    let sizes = payload.first().map_or(&[][..], Vec::as_slice);
    sizes.chunks_exact(SIZES_BYTES).any(|sizes| {
        sizes
            .first_chunk::<8>()
            .is_some_and(|rows| u64::from_le_bytes(*rows) > 0)
    })
}
