//! A real host process, and clients that speak to it in raw frames: what they send need not make sense.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

use std::fs;
use std::io::{self, BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, Signal, Uid};
use serde_json::{Value, json};
use strait_client::wire::{self, Header, Op};
use strait_memory::FrameSocket;
use tempfile::TempDir;

/// Long enough for a loaded machine; nothing here waits for it unless it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the one tensor of a small segment begins.
pub const PAGE: u64 = 65_536;

/// A `strait serve` process in a directory of its own; killed when it drops.
pub struct Served {
    directory: TempDir,
    child: Child,
}

impl Served {
    /// Ready to be connected to.
    pub fn start(arguments: &[&str]) -> Self {
        Self::with(arguments, &[])
    }

    /// The same with settings from the environment.
    pub fn with(arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let host = Command::new(env!("CARGO_BIN_EXE_strait"));
        Self::run(host, arguments, settings)
    }

    /// The same with at most `files` open files.
    pub fn with_files(files: u32, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let mut host = Command::new("sh");
        let script = format!("ulimit -n {files} && exec \"$0\" \"$@\"");
        host.args(["-c", &script, env!("CARGO_BIN_EXE_strait")]);
        Self::run(host, arguments, settings)
    }

    fn run(mut command: Command, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("STRAIT_")) {
            command.env_remove(name);
        }
        let mut child = command
            .current_dir(directory.path())
            .env(
                "XDG_CACHE_HOME",
                concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"),
            )
            .env("STRAIT__MEMORY__BUDGET_BYTES", (2_u64 << 30).to_string())
            .envs(settings.iter().copied())
            .args(["serve", "--directory", "host", "--log-level", "debug"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        let served = Self { directory, child };
        assert!(
            ready.ends_with("kernels\n"),
            "{ready:?}; log: {}",
            served.log()
        );
        served
    }

    /// Ready, with a plugin that is not in a file yet.
    pub fn with_plugin(component: &[u8], settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("plugin.wasm");
        fs::write(&path, component).unwrap();
        Self::with(&["--plugin", path.to_str().unwrap()], settings)
    }

    /// The runtime directory.
    pub fn directory(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory().join("data.sock")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Lets every user get to the sockets, which `strait serve` itself never does.
    pub fn open_to_all(&self) {
        let mode = |path: PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(self.directory.path().to_owned(), 0o755);
        mode(self.directory(), 0o755);
        mode(self.socket(), 0o666);
        mode(self.directory().join("flight.sock"), 0o666);
    }

    /// A connection that has not said HELLO.
    pub fn connect(&self) -> Raw {
        Raw::connect(&self.socket()).unwrap()
    }

    /// A connection that has.
    pub fn greeted(&self) -> Raw {
        let mut raw = self.connect();
        raw.hello();
        raw
    }

    pub fn terminate(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
    }

    /// Waits for the end that it was told of, which must be a good one.
    pub fn ended(mut self) {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}; log: {}", self.log());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the host does not end; log: {}", self.log());
    }

    /// Asks until `holds` of STATS, which is read over `watcher`; answers those STATS.
    pub fn eventually(
        &self,
        watcher: &mut Raw,
        what: &str,
        mut holds: impl FnMut(&Value) -> bool,
    ) -> Value {
        let start = Instant::now();
        loop {
            let stats = watcher.ok(Op::Stats, json!({}));
            if holds(&stats) {
                return stats;
            }
            assert!(start.elapsed() < PATIENCE, "never: {what}; {stats}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Served {
    /// STATS once nobody but `watcher` is connected and nothing changes any more.
    pub fn settled(&self, watcher: &mut Raw) -> Value {
        let mut last = None;
        let mut same = 0;
        self.eventually(watcher, "a host at rest", |stats| {
            let now = Some(Holdings::of(stats));
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same >= 10 && number(stats, "/sessions") == 1
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            eprintln!("the host: {:?}; the end of its log:", self.child.try_wait());
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
        // It may have ended as the test meant it to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A frame that came.
pub struct Frame {
    pub header: [u8; wire::HEADER_BYTES],
    pub text: String,
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
    let mut bytes = Header {
        op: Op::Ping,
        sequence,
        body_bytes: u32::try_from(body.len()).unwrap(),
    }
    .encode()
    .to_vec();
    bytes[3] = op;
    bytes.extend_from_slice(body);
    bytes
}

/// One connection.
pub struct Raw {
    pub socket: FrameSocket,
    sequence: u32,
}

impl Raw {
    pub fn connect(socket: &std::path::Path) -> std::io::Result<Self> {
        Ok(Self {
            socket: FrameSocket::connect(socket)?,
            sequence: 100,
        })
    }

    pub fn hello(&mut self) -> Value {
        let reply = self.ask(Op::Hello, json!({"protocol": 1, "client": "strait-tests"}));
        assert_eq!(reply.op(), Op::Welcome, "{}", reply.text);
        reply.body()
    }

    pub fn send(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        self.socket.send(&[packet], fds).unwrap();
    }

    /// Sends a request without waiting; answers its sequence.
    pub fn begin(&mut self, op: Op, body: &Value, fds: &[BorrowedFd<'_>]) -> u32 {
        self.sequence += 1;
        self.send(
            &packet(op as u8, self.sequence, body.to_string().as_bytes()),
            fds,
        );
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
        let mut buffer = vec![0; wire::HEADER_BYTES + wire::BODY_BYTES_MAX];
        let received = match self.socket.recv(&mut buffer) {
            Ok(received) if received.bytes > 0 => received,
            Ok(_) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(
            !received.truncated,
            "a frame of the host is longer than the protocol allows"
        );
        let (header, body) = buffer[..received.bytes]
            .split_first_chunk()
            .expect("a header");
        let decoded = Header::decode(&buffer[..received.bytes])
            .expect("a frame of the protocol")
            .0;
        assert_eq!(decoded.body_bytes as usize, body.len());
        Some(Frame {
            header: *header,
            text: String::from_utf8(body.to_vec()).unwrap(),
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

    pub fn ask(&mut self, op: Op, body: Value) -> Frame {
        self.ask_with(op, body, &[])
    }

    pub fn ok(&mut self, op: Op, body: Value) -> Value {
        self.ask(op, body).accepted()
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

/// All of `bytes` at `offset` of a file.
pub fn write(fd: BorrowedFd<'_>, offset: u64, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(fd, &bytes[done..], offset + done as u64).unwrap();
    }
}

/// The float64 numbers at `offset` of a file.
pub fn read(fd: BorrowedFd<'_>, offset: u64, count: usize) -> Vec<f64> {
    let mut bytes = vec![0; count * 8];
    let mut done = 0;
    while done < bytes.len() {
        let got = rustix::io::pread(fd, &mut bytes[done..], offset + done as u64).unwrap();
        assert!(got > 0, "the file ends at {}", offset + done as u64);
        done += got;
    }
    bytes
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// A memfd of `bytes` bytes, all written with zeros, without seals.
pub fn memfd(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create(
        "strait-tests",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .unwrap();
    write(fd.as_fd(), 0, &vec![0; usize::try_from(bytes).unwrap()]);
    fd
}

pub fn seal(fd: &OwnedFd, seals: SealFlags) {
    rustix::fs::fcntl_add_seals(fd, seals).unwrap();
}

/// Its size cannot change.
pub const SIZE: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);
/// Nothing of it can change.
pub const FINAL: SealFlags = SIZE.union(SealFlags::WRITE);
/// Only those that map it writable already can change it.
pub const FUTURE: SealFlags = SIZE.union(SealFlags::FUTURE_WRITE);

/// What must be the same before and after: nothing is left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub fds: u64,
    pub segments: u64,
    pub segment_bytes: u64,
    pub flights: u64,
    pub leases: u64,
    pub sessions: u64,
    pub running: u64,
    pub parked: u64,
    /// Beside what the pool keeps warm.
    pub budget: u64,
}

impl Holdings {
    pub fn of(stats: &Value) -> Self {
        let n = |path: &str| number(stats, path);
        Self {
            // An idle result of the pool is a descriptor.
            fds: n("/process/fds") - n("/pool/idle_segments"),
            segments: n("/segments"),
            segment_bytes: n("/segment_bytes"),
            flights: n("/flights"),
            leases: n("/leases"),
            sessions: n("/sessions"),
            running: n("/running"),
            parked: n("/parked/mappings") - n("/parked/idle_mappings"),
            budget: n("/budget_used_bytes") - n("/pool/idle_bytes"),
        }
    }
}

pub fn number(stats: &Value, path: &str) -> u64 {
    stats
        .pointer(path)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no {path} in {stats}"))
}

pub fn ramp(count: u64) -> Vec<f64> {
    (0..count).map(|i| i as f64 * 0.5 - 7.0).collect()
}

/// Gives the host the flight `name`: `ramp(count)`.
pub fn put(client: &mut Raw, name: &str, count: u64) {
    let created = client.create(count);
    created.fill(&ramp(count));
    client.ok(
        Op::Publish,
        json!({"segment": created.segment, "name": name, "replace": true}),
    );
    assert_eq!(
        client.ok(Op::Release, json!({"leases": [created.lease]}))["released"],
        1
    );
}

pub fn scale_shift(input: Value, a: f64, b: f64) -> Value {
    json!({"kernel": "scale-shift", "inputs": {"x": input}, "parameters": {"a": a, "b": b}})
}

/// The numbers of an INVOKE's one result.
pub fn numbers(reply: &Frame) -> Vec<f64> {
    let body = reply.accepted();
    let place = &body["results"][0]["mapping"]["tensors"][0];
    let count = usize::try_from(place["length"].as_u64().unwrap() / 8).unwrap();
    read(
        reply.fds[0].as_fd(),
        place["offset"].as_u64().unwrap(),
        count,
    )
}

/// Invokes scale-shift and checks every element against `x`.
pub fn check_call(client: &mut Raw, input: Value, x: &[f64]) {
    let reply = client.ask(Op::Invoke, scale_shift(input, 2.0, 1.0));
    let y = numbers(&reply);
    assert!(
        y.len() == x.len() && y.iter().zip(x).all(|(y, x)| *y == 2.0 * x + 1.0),
        "{:?}",
        &y[..y.len().min(8)]
    );
    let lease = reply.body()["results"][0]["lease"].clone();
    client.ok(Op::Release, json!({"leases": [lease]}));
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

/// Runs `client` in a thread that has become user `uid`.
pub fn as_user<T: Send>(uid: u32, client: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let became = scope.spawn(move || {
            let uid = Some(Uid::from_raw(uid));
            // Of this thread alone, which ends with it.
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            client()
        });
        became.join().unwrap()
    })
}

/// Numbers that are the same in each run (SplitMix64). `TEST_SEED` gives others.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let seed = std::env::var("TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
        eprintln!("TEST_SEED={seed}");
        Self(seed)
    }

    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    pub fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}
