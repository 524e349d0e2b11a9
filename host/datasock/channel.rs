//! The consumer's end of a channel as a socket: batches go, and their acknowledgements come.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::PollFlags;
use strait_memory::{Charge, FrameSocket};
use strait_protocol::{Header, Op, TraceContext};

use super::frames::failure;
use crate::error::{Code, Reason, Status};
use crate::session::{Consumer, Item, Said, Sent};

/// The host's end of a consumer's socket.
#[derive(Debug)]
pub(super) struct ConsumerSocket {
    socket: FrameSocket,
    request_id: Arc<str>,
    _place: Charge,
}

impl ConsumerSocket {
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

impl Consumer for ConsumerSocket {
    fn send(&self, number: u64, item: &Item) -> Sent {
        let (op, body, payload): (_, &[u8], &[Vec<u8>]) = match item {
            Item::Rows(payload) => (Op::Chunk, &[], payload),
            Item::End(notes) => (Op::Last, notes, &[]),
        };
        let lengths = (body.len(), payload.iter().map(Vec::len).sum());
        let sequence = Header::sequence_of_batch(number);
        let header = Header::of(op, sequence, lengths, TraceContext::NONE).encode();
        let mut parts = vec![&header[..], body];
        parts.extend(payload.iter().map(Vec::as_slice));
        sent(self.socket.send_now(&parts))
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

    fn fail(&self, status: &Status) -> Sent {
        sent(failure(0, status, &self.request_id).send(&self.socket))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn events(&self, unsent: bool) -> PollFlags {
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, unsent);
        events
    }
}

fn sent(result: io::Result<()>) -> Sent {
    match result {
        Ok(()) => Sent::Whole,
        Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Full,
        Err(_) => Sent::Gone,
    }
}
