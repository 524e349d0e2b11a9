//! A host by hand: what it says and when is each test's own.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses its own part"
)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use serde_json::{Value, json};
use strait_client::wire::{Header, Op, TraceContext, VERSION};
use strait_client::{Client, Options};
use strait_memory::FrameSocket;

pub struct Peer(pub FrameSocket);

/// A request as it arrived.
#[derive(Debug)]
pub struct Asked {
    pub op: Op,
    pub sequence: u32,
    pub body: Value,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Peer {
    /// True if a frame or the end of the connection is there within so many milliseconds.
    pub fn hears_within(&self, milliseconds: i64) -> bool {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        rustix::event::poll(&mut ready, Some(&timeout)).expect("poll") > 0
    }

    /// The next request, or `None` at the end of the connection.
    pub fn next(&self) -> Option<Asked> {
        let timeout = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        let heard = rustix::event::poll(&mut ready, Some(&timeout)).expect("poll");
        assert!(heard > 0, "the client is silent");
        let mut buffer = vec![0; 1 << 17];
        let received = self
            .0
            .recv(&mut buffer)
            .ok()
            .filter(|received| received.bytes > 0)?;
        let (header, body, payload) =
            Header::decode(&buffer[..received.bytes]).expect("a whole frame");
        let body = serde_json::from_slice(body).expect("JSON");
        Some(Asked {
            op: header.op,
            sequence: header.sequence,
            body,
            payload: payload.to_vec(),
            fds: received.fds,
        })
    }

    /// The next request, which is to be of that kind.
    #[track_caller]
    pub fn expect(&self, op: Op) -> Asked {
        let asked = self.next().expect("the client is still there");
        assert_eq!(asked.op, op, "{asked:?}");
        asked
    }

    pub fn send(&self, op: Op, sequence: u32, body: &Value, fds: &[BorrowedFd<'_>]) {
        self.send_with(op, sequence, body, &[], fds);
    }

    /// With `payload` after the JSON.
    pub fn send_with(
        &self,
        op: Op,
        sequence: u32,
        body: &Value,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) {
        let body = body.to_string();
        let body_bytes = u32::try_from(body.len()).expect("short");
        let header = Header {
            op,
            sequence,
            body_bytes,
            payload_bytes: u32::try_from(payload.len()).expect("short"),
            trace: TraceContext::NONE,
        }
        .encode();
        self.raw(&[&header[..], body.as_bytes(), payload].concat(), fds);
    }

    pub fn raw(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        self.0
            .send(&[packet], fds)
            .expect("the client is still there");
    }

    pub fn ok(&self, asked: &Asked, mut body: Value) {
        body["request_id"] = request_id(asked);
        self.send(Op::Ok, asked.sequence, &body, &[]);
    }

    /// OK with a segment and a lease, as to MAP.
    pub fn grant(&self, asked: &Asked, segment: &Segment, lease: u64, expires_ms: u64) {
        let body = json!({
            "mapping": segment.mapping, "lease": lease, "expires_ms": expires_ms,
            "request_id": request_id(asked),
        });
        self.send(Op::Ok, asked.sequence, &body, &[segment.fd.as_fd()]);
    }

    pub fn error(&self, asked: &Asked, code: &str, reason: &str, message: &str) {
        let body = json!({
            "code": code, "reason": reason, "message": message, "request_id": request_id(asked),
        });
        self.send(Op::Error, asked.sequence, &body, &[]);
    }
}

fn request_id(asked: &Asked) -> Value {
    match &asked.body["request_id"] {
        Value::Null => json!(format!("made-{}", asked.sequence)),
        given => given.clone(),
    }
}

/// A client and its peer, greeted.
pub fn connected(options: &Options) -> (Client, Peer) {
    let (ours, theirs) = FrameSocket::pair().expect("a socket pair");
    let peer = Peer(theirs);
    let client = std::thread::scope(|scope| {
        let client = scope.spawn(|| Client::over(ours, options));
        let hello = peer.expect(Op::Hello);
        assert_eq!(hello.body["protocol"], VERSION);
        peer.send(Op::Welcome, hello.sequence, &welcome(), &[]);
        client.join().expect("no panic").expect("it was welcomed")
    });
    (client, peer)
}

pub fn welcome() -> Value {
    json!({
        "protocol": VERSION, "host_id": "1a2b", "host_version": "0.1.0", "session": "s1",
        "principal": "uid:1000", "directory": "/run/strait", "flight": "unix:/run/strait/flight.sock",
        "move_min_bytes": 524_288, "inline_bytes": 4096, "lease_ms_default": 600_000, "lease_ms_max": 86_400_000,
        "deadline_ms_default": 30_000, "deadline_ms_max": 600_000, "request_id": "hello",
        "added_later": true,
    })
}

/// A memfd with one tensor of float64 at 64 KiB.
pub struct Segment {
    pub fd: OwnedFd,
    pub mapping: Value,
}

pub fn segment(id: &str, name: &str, numbers: &[f64], writers: &str) -> Segment {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("test", flags).expect("a memfd");
    rustix::fs::ftruncate(&fd, 1 << 17).expect("space");
    let bytes: Vec<u8> = numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    rustix::io::pwrite(&fd, &bytes, 1 << 16).expect("space");
    let fixed = SealFlags::SHRINK | SealFlags::GROW;
    let seals = match writers {
        "none" => fixed | SealFlags::WRITE,
        "host" => fixed | SealFlags::FUTURE_WRITE,
        _ => SealFlags::empty(),
    };
    rustix::fs::fcntl_add_seals(&fd, seals).expect("it may be sealed");
    let mapping = json!({
        "strait-mmap": 1, "host_id": "1a2b", "socket": "/run/strait/data.sock", "segment": id,
        "generation": 1, "bytes": 1 << 17, "writers": writers,
        "tensors": [{
            "name": name, "dtype": "float64", "shape": [numbers.len()], "offset": 1 << 16,
            "length": bytes.len(),
        }],
    });
    Segment { fd, mapping }
}

/// What lies in the tensor of a [`Segment`].
pub fn numbers(segment: &Segment, count: usize) -> Vec<f64> {
    let mut bytes = vec![0; count * 8];
    rustix::io::pread(&segment.fd, &mut bytes, 1 << 16).expect("it is as long");
    let chunks = bytes.chunks_exact(8);
    chunks
        .map(|bytes| f64::from_le_bytes(bytes.try_into().expect("8 bytes")))
        .collect()
}

/// The body of OK to INVOKE.
pub fn invoked(results: Value) -> Value {
    json!({
        "results": results, "notes": [{"key": "k", "text": "t"}], "copied_bytes": 0,
        "input_written": false, "pages": [], "minor_faults": 4,
        "seconds": {"queue": 0.0, "instantiate": 0.0, "open": 0.0, "reserve": 0.0,
                    "move_in": 0.0, "run": 0.5, "move_out": 0.0, "total": 0.5},
    })
}
