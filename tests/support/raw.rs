//! One connection in raw frames, and what came over it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use strait_client::wire::{self, Header, Op, TraceContext};
use strait_memory::FrameSocket;

use super::{PATIENCE, write};

/// A frame that came.
pub struct Frame {
    pub header: [u8; wire::HEADER_BYTES],
    pub text: String,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Frame {
    pub fn op(&self) -> Op {
        Op::try_from(self.header[3]).unwrap()
    }

    pub fn sequence(&self) -> u32 {
        Header::sequence_of(&self.header)
    }

    pub fn body(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    /// Asserts an ERROR; answers its message.
    pub fn refused(&self, code: &str, reason: &str) -> String {
        let body = self.body();
        assert_eq!(
            (self.op(), body["code"].as_str(), body["reason"].as_str()),
            (Op::Error, Some(code), Some(reason)),
            "{:.2000}",
            self.text
        );
        assert!(self.fds.is_empty(), "descriptors beside an ERROR");
        let message = body["message"].as_str().unwrap();
        assert!(message.len() > 12, "the message explains: {message:?}");
        message.to_owned()
    }

    /// Asserts an OK; answers its body.
    pub fn accepted(&self) -> Value {
        assert_eq!(self.op(), Op::Ok, "{:.2000}", self.text);
        self.body()
    }
}

/// A frame's bytes.
pub fn packet(op: u8, sequence: u32, body: &[u8]) -> Vec<u8> {
    packet_with(op, sequence, body, &[])
}

/// A frame's bytes, with a payload.
pub fn packet_with(op: u8, sequence: u32, body: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header {
        op: Op::Ping,
        sequence,
        body_bytes: u32::try_from(body.len()).unwrap(),
        payload_bytes: u32::try_from(payload.len()).unwrap(),
        trace: TraceContext::NONE,
    }
    .encode()
    .to_vec();
    bytes[3] = op;
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(payload);
    bytes
}

/// One connection.
pub struct Raw {
    pub socket: FrameSocket,
    sequence: u32,
}

impl Raw {
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self::over(FrameSocket::connect(socket)?))
    }

    pub fn over(socket: FrameSocket) -> Self {
        Self {
            socket,
            sequence: 100,
        }
    }

    pub fn hello(&mut self) -> Value {
        let reply = self.ask(
            Op::Hello,
            json!({"protocol": wire::VERSION, "client": "strait-tests"}),
        );
        assert_eq!(reply.op(), Op::Welcome, "{}", reply.text);
        reply.body()
    }

    pub fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        self.socket.send(&[packet], fds).unwrap();
    }

    /// Sends a request without waiting; answers its sequence.
    pub fn begin(&mut self, op: Op, body: &Value, fds: &[BorrowedFd<'_>]) -> u32 {
        self.begin_with(op, body, &[], fds)
    }

    fn begin_with(&mut self, op: Op, body: &Value, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
        self.sequence += 1;
        let body = body.to_string();
        let packet = packet_with(op as u8, self.sequence, body.as_bytes(), payload);
        self.send(&packet, fds);
        self.sequence
    }

    /// Whether something, or the end, is to be read within `within`.
    pub fn readable(&self, within: Duration) -> bool {
        let fd = self.socket.as_fd();
        let timeout = Timespec {
            tv_sec: i64::try_from(within.as_secs()).unwrap(),
            tv_nsec: i64::from(within.subsec_nanos()),
        };
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
    }

    /// The next frame; none at the end of the connection.
    pub fn receive(&self) -> Option<Frame> {
        assert!(self.readable(PATIENCE), "no frame came");
        let mut buffer =
            vec![0; wire::HEADER_BYTES + wire::BODY_BYTES_MAX + wire::PAYLOAD_BYTES_MAX];
        let received = match self.socket.recv(&mut buffer) {
            Ok(received) if received.bytes > 0 => received,
            Ok(_) => return None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(
            !received.truncated,
            "a frame of the host is longer than the protocol allows"
        );
        let packet = &buffer[..received.bytes];
        let header = packet.first_chunk().expect("a header");
        let (_, body, payload) = Header::decode(packet).expect("a frame of the protocol");
        Some(Frame {
            header: *header,
            text: String::from_utf8(body.to_vec()).unwrap(),
            payload: payload.to_vec(),
            fds: received.fds,
        })
    }

    /// A request and its reply, which must be the next frame.
    pub fn ask_with(&mut self, op: Op, body: Value, fds: &[BorrowedFd<'_>]) -> Frame {
        let sequence = self.begin(op, &body, fds);
        let reply = self
            .receive()
            .unwrap_or_else(|| panic!("the host closed the connection at {op:?} {body}"));
        assert_eq!(reply.sequence(), sequence, "{op:?} {body}: {}", reply.text);
        reply
    }

    /// A request with a payload, and its reply.
    pub fn ask_inline(&mut self, op: Op, body: &Value, payload: &[u8]) -> Frame {
        let sequence = self.begin_inline(op, body, payload);
        let reply = self.receive().expect("the host is there");
        assert_eq!(reply.sequence(), sequence, "{body}: {}", reply.text);
        reply
    }

    /// Sends a request with a payload without waiting; answers its sequence.
    pub fn begin_inline(&mut self, op: Op, body: &Value, payload: &[u8]) -> u32 {
        self.begin_with(op, body, payload, &[])
    }

    pub fn ask(&mut self, op: Op, body: Value) -> Frame {
        self.ask_with(op, body, &[])
    }

    pub fn ok(&mut self, op: Op, body: Value) -> Value {
        self.ask(op, body).accepted()
    }

    /// Ends the call `sequence`, which waits in the queue or runs.
    pub fn cancel(&mut self, sequence: u32) {
        let asked = self.begin(Op::Cancel, &json!({"sequence": sequence}), &[]);
        for _ in 0..2 {
            let reply = self.receive().unwrap();
            if reply.sequence() == asked {
                assert_eq!(reply.accepted()["cancelled"], true);
            } else {
                assert_eq!(reply.sequence(), sequence);
                reply.refused("CANCELLED", "CANCELLED");
            }
        }
    }

    pub fn ended(&self) {
        if let Some(frame) = self.receive() {
            panic!(
                "not the end of the connection: {:?} {}",
                frame.op(),
                frame.text
            );
        }
    }

    /// A float64 segment: its id, its lease, its size, the descriptor.
    pub fn create(&mut self, elements: u64) -> Created {
        let body = json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [elements]}]});
        let mut reply = self.ask(Op::Create, body);
        let body = reply.accepted();
        Created {
            segment: body["mapping"]["segment"].as_str().unwrap().to_owned(),
            lease: body["lease"].as_u64().unwrap(),
            offset: body["mapping"]["tensors"][0]["offset"].as_u64().unwrap(),
            bytes: usize::try_from(body["mapping"]["bytes"].as_u64().unwrap()).unwrap(),
            fd: reply.fds.pop().expect("CREATE comes with a descriptor"),
        }
    }
}

/// What CREATE answered.
pub struct Created {
    pub segment: String,
    pub lease: u64,
    pub offset: u64,
    pub bytes: usize,
    pub fd: OwnedFd,
}

impl Created {
    pub fn fill(&self, values: &[f64]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(self.fd.as_fd(), self.offset, &bytes);
    }
}

/// Sends a packet with more descriptors than `FrameSocket` would.
pub fn try_send_with(client: &Raw, packet: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = rustix::net::sendmsg(
        client.socket.as_fd(),
        &[IoSlice::new(packet)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    assert_eq!(sent, packet.len());
    Ok(())
}

pub fn send_with(client: &Raw, packet: &[u8], fds: &[BorrowedFd<'_>]) {
    try_send_with(client, packet, fds).unwrap();
}
