//! The way to a prepared kernel: its socket, or the ring beside it.

use std::io;
use std::os::fd::OwnedFd;

use strait_memory::{FrameSocket, SharedPages};
use strait_ring::{Came, Ring, RingError, Spin};

use crate::error::Error;
use crate::wire::{self, Failure, HEADER_BYTES, Header, Op, Side};

/// The client's end.
#[derive(Debug)]
pub(crate) struct Link {
    socket: FrameSocket,
    spin: Spin,
    ring: Option<Ring>,
}

impl Link {
    /// Over `socket`, or through the ring that lies in what the descriptor gives.
    pub(crate) fn new(
        socket: OwnedFd,
        ring: Option<(wire::Ring, OwnedFd)>,
        spin: Spin,
    ) -> Result<Self, Error> {
        let open = |(layout, memory): (wire::Ring, OwnedFd)| {
            let bytes = usize::try_from(layout.bytes).unwrap_or(usize::MAX);
            let memory = SharedPages::open(memory, bytes)?;
            Ok::<_, Error>(Ring::new(memory, layout, Side::Client, spin))
        };
        Ok(Self {
            socket: socket.into(),
            spin,
            ring: ring.map(open).transpose()?,
        })
    }

    /// Becomes readable with each frame that does not come through a ring.
    pub(crate) fn socket(&self) -> &FrameSocket {
        &self.socket
    }

    /// Sends a frame, the concatenation of `parts`.
    pub(crate) fn send(&mut self, parts: &[&[u8]]) -> Result<(), Error> {
        const WHAT: &str = "send a prepared call";
        match &mut self.ring {
            Some(ring) => ring
                .send(&self.socket, parts)
                .map_err(|error| of_ring(error, WHAT)),
            None => self
                .socket
                .send(parts, &[])
                .map_err(|error| over(error, WHAT)),
        }
    }

    /// Receives the frame of a reply: its bytes. One without a body has `bytes`.
    pub(crate) fn receive(&mut self, packet: &mut [u8], bytes: usize) -> Result<usize, Error> {
        let Some(ring) = &mut self.ring else {
            let mut received = self.spin.recv(&self.socket, packet);
            // The host left without having read all. What it had sent is still there.
            while matches!(&received, Err(error) if error.kind() == io::ErrorKind::ConnectionReset)
            {
                received = self.spin.recv(&self.socket, packet);
            }
            return checked(received);
        };
        let came = ring
            .receive(&self.socket, packet, true, || false)
            .map_err(|error| of_ring(error, WHAT))?;
        match came {
            Came::Frame if has_body(packet) => self.announced(packet),
            Came::Frame => Ok(bytes),
            Came::End => Err(Error::Disconnected),
            Came::Packet(bytes) => Err(last_words(&packet[..bytes])),
            Came::Wrong(_) => Err(too_much()),
        }
    }

    /// The frame whose header was in the slot, from the socket.
    fn announced(&self, packet: &mut [u8]) -> Result<usize, Error> {
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&packet[..HEADER_BYTES]);
        loop {
            let bytes = checked(self.spin.recv(&self.socket, packet))?;
            if bytes == 1 {
                // It was to wake this side, which did not sleep.
                continue;
            }
            if packet[..bytes].first_chunk() != Some(&header) {
                let wrong = "the reply to CALL: another frame than the one that its slot told of";
                return Err(Error::Protocol(wrong.to_owned()));
            }
            return Ok(bytes);
        }
    }
}

const WHAT: &str = "receive a prepared call's reply";

/// Of a header.
fn has_body(packet: &[u8]) -> bool {
    packet[8..12] != [0; 4]
}

/// What a host says before it ends a ring.
fn last_words(packet: &[u8]) -> Error {
    let failure = Header::decode(packet).ok().and_then(|(header, body, _)| {
        let failure = serde_json::from_slice::<Failure>(body).ok();
        failure.filter(|_| header.op == Op::Error)
    });
    match failure {
        Some(failure) => failure.into(),
        None => {
            let wrong = "a frame on the socket of a ring that no slot told of";
            Error::Protocol(wrong.to_owned())
        }
    }
}

fn too_much() -> Error {
    let wrong = "the reply to CALL: it is longer than was said, or brings descriptors";
    Error::Protocol(wrong.to_owned())
}

fn checked(received: io::Result<strait_memory::Received>) -> Result<usize, Error> {
    let received = received.map_err(|error| over(error, WHAT))?;
    match received.bytes {
        _ if received.truncated || !received.fds.is_empty() => Err(too_much()),
        0 => Err(Error::Disconnected),
        bytes => Ok(bytes),
    }
}

fn of_ring(error: RingError, what: &'static str) -> Error {
    match error {
        RingError::Socket(error) => over(error, what),
        RingError::Violation(violation) => Error::Protocol(format!("the ring: {violation}")),
    }
}

fn over(source: io::Error, what: &'static str) -> Error {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Disconnected,
        _ => Error::Linux { what, source },
    }
}
