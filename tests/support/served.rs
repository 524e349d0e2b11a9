//! A real host process, and clients that speak to it in raw frames: what they send need not make sense.

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

mod raw;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal, Uid};
use serde_json::{Value, json};
use strait_client::wire::Op;
use tempfile::TempDir;

pub use raw::{Created, Frame, Raw, packet, send_with, try_send_with};

/// Long enough for a loaded machine; nothing here waits for it unless it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the one tensor of a small segment begins.
pub const PAGE: u64 = 65_536;

/// A `strait serve` process in a directory of its own; killed when it drops.
pub struct Served {
    directory: TempDir,
    child: Child,
    /// The line by which it said that it serves.
    pub ready: String,
}

impl Served {
    /// Ready to be connected to.
    pub fn start(arguments: &[&str]) -> Self {
        Self::with(arguments, &[])
    }

    /// The same with settings from the environment.
    pub fn with(arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let host = Command::new(env!("CARGO_BIN_EXE_strait"));
        Self::run(host, TempDir::new().unwrap(), arguments, settings)
    }

    /// The same in a directory that has files, or had a host, already.
    pub fn start_in(directory: TempDir, arguments: &[&str]) -> Self {
        Self::start_in_with(directory, arguments, &[])
    }

    /// The same with settings from the environment.
    pub fn start_in_with(
        directory: TempDir,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> Self {
        let host = Command::new(env!("CARGO_BIN_EXE_strait"));
        Self::run(host, directory, arguments, settings)
    }

    /// The same with at most `files` open files.
    pub fn with_files(files: u32, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let mut host = Command::new("sh");
        let script = format!("ulimit -n {files} && exec \"$0\" \"$@\"");
        host.args(["-c", &script, env!("CARGO_BIN_EXE_strait")]);
        Self::run(host, TempDir::new().unwrap(), arguments, settings)
    }

    /// The same as another user, which only root can start.
    pub fn as_user(uid: u32, settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        std::os::unix::fs::chown(directory.path(), Some(uid), None).unwrap();
        let mut host = Command::new(env!("CARGO_BIN_EXE_strait"));
        host.uid(uid);
        Self::run(host, directory, &[], settings)
    }

    fn run(
        mut command: Command,
        directory: TempDir,
        arguments: &[&str],
        settings: &[(&str, &str)],
    ) -> Self {
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
            .env(
                "STRAIT__WORKERS__ENABLED",
                std::env::var_os("STRAIT_TEST_WORKERS")
                    .is_some()
                    .to_string(),
            )
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
        let served = Self {
            directory,
            child,
            ready,
        };
        assert!(
            served.ready.ends_with("kernels\n"),
            "{:?}; log: {}",
            served.ready,
            served.log()
        );
        served
    }

    /// Ready, with a plugin that is not in a file yet.
    pub fn with_plugin(component: &[u8], settings: &[(&str, &str)]) -> Self {
        Self::with_plugins(&[component], settings)
    }

    /// The same with several.
    pub fn with_plugins<C: AsRef<[u8]>>(components: &[C], settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let mut arguments = Vec::new();
        for (index, component) in components.iter().enumerate() {
            let path = directory.path().join(format!("plugin-{index}.wasm"));
            fs::write(&path, component).unwrap();
            arguments.extend(["--plugin".to_owned(), path.to_str().unwrap().to_owned()]);
        }
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        Self::with(&arguments, settings)
    }

    /// Where it runs: its log and its runtime directory are in there.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Ends it and gives what it leaves behind.
    pub fn into_path(mut self) -> TempDir {
        std::mem::replace(&mut self.directory, TempDir::new().unwrap())
    }

    /// The runtime directory.
    pub fn directory(&self) -> PathBuf {
        self.path().join("host")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory().join("data.sock")
    }

    /// Whether all hosts of this test run have kernels in processes of their own.
    pub fn has_workers(&self) -> bool {
        std::env::var_os("STRAIT_TEST_WORKERS").is_some()
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap()
    }

    /// Lets every user get to the sockets, which `strait serve` itself never does.
    pub fn open_to_all(&self) {
        let mode = |path: PathBuf, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(self.path().to_owned(), 0o755);
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

    pub fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// The exit code once it has ended, or none if a signal ended it.
    pub fn wait(&mut self) -> Option<i32> {
        wait(&mut self.child)
    }

    /// Waits for the end that it was told of, which must be a good one.
    pub fn ended(mut self) {
        assert_eq!(self.wait(), Some(0), "log: {}", self.log());
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

pub fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// The exit code once it has ended, or none if a signal ended it.
pub fn wait(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(start.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
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
            // An idle result of the pool is a descriptor, and workers come and go as they are needed.
            fds: n("/process/fds") - n("/pool/idle_segments") - n("/workers/fds"),
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
