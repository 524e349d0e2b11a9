//! What the tests of the host share: a host without sockets, and hostile plugins from WAT.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

pub mod guest;
pub mod trial;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use serde_json::{Value, json};
use strait::config::Config;
use strait::error::Status;
use strait::lease::LiveSegment;
use strait::session::{Answer, Caller, Host, Invoked};
use strait_client::wire;
use strait_memory::{Copied, InputSource};
use strait_tensor::{Column, Dtype, FileLayout, TensorSpec};

/// Descriptors and threads are counted for the whole process, so one rig at a time.
static TURN: Mutex<()> = Mutex::new(());

/// A host without sockets.
pub struct Rig {
    pub host: Arc<Host>,
    // Dropped after the host.
    _turn: Turn,
}

struct Turn {
    _guard: MutexGuard<'static, ()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        // A host's threads end with it, those that free memory or reap a worker process a moment later. The next rig counts.
        let begin = std::time::Instant::now();
        while !host_thread_names().is_empty() {
            let is_patient = begin.elapsed() < std::time::Duration::from_secs(20);
            assert!(
                is_patient || std::thread::panicking(),
                "a host that has ended left {:?}",
                host_thread_names()
            );
            if !is_patient {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A worker may still be letting go of the host after its last answer. The next rig counts
        // threads and descriptors, so this one's must be gone before its turn ends.
        for _ in 0..5000 {
            if Arc::strong_count(&self.host) == 1 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let turn = TURN
            .lock()
            .unwrap_or_else(|failed_test| failed_test.into_inner());
        // What reaps the last rig's workers may be at it still, and would be counted to this one.
        for _ in 0..5000 {
            if host_threads() == 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut config = Config::default();
        config.memory.budget_bytes = Some(4 << 30);
        config.engine.cache = Some(concat!(env!("CARGO_TARGET_TMPDIR"), "/compiled").into());
        config.engine.workers = Some(2);
        // Set where plugins were built by another compiler than the prebuilt ones (xtask's step `rebuilt`).
        config.server.standard_plugin =
            std::env::var_os("STRAIT__SERVER__STANDARD_PLUGIN").map(Into::into);
        // The same suite, with kernels in a process of their own.
        config.workers.enabled = std::env::var_os("STRAIT_TEST_WORKERS").is_some();
        config.workers.program = Some(env!("CARGO_BIN_EXE_strait").into());
        // What starts in the background is counted at no certain time.
        config.workers.spare = false;
        change(&mut config);
        let helpers = match config.workers.enabled {
            true => 0,
            false => config.threads() as u64 - 1,
        };
        let threads = config.engine.workers.unwrap_or_default() as u64 + 4 + helpers;
        let host = Host::start(config, std::path::Path::new("nowhere")).unwrap();
        // A thread has its name, by which holdings count, once it runs: those that run kernels and one more, the clock of
        // deadlines, the one that frees, those that help with slices, and the clock of epochs or the one that starts workers.
        for _ in 0..5000 {
            if host_threads() >= threads {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Self {
            host,
            _turn: Turn { _guard: turn },
        }
    }

    /// Whose everything is that a test makes.
    pub fn me(&self) -> Caller {
        self.host.own_caller()
    }

    pub fn put(&self, name: &str, dtype: Dtype, shape: &[u64], bytes: &[u8]) -> Arc<LiveSegment> {
        let column = Column::new(
            "x",
            TensorSpec {
                dtype,
                shape: shape.to_vec(),
            },
        )
        .unwrap();
        assert_eq!(
            column.reserve_bytes,
            bytes.len() as u64,
            "the test's own arithmetic"
        );
        let upload = self.me().begin_upload(name, true).unwrap();
        let layout = FileLayout::plan(&[column]).unwrap();
        let segment = self.me().allocate_to_fill(&layout).unwrap();
        segment
            .write_at(layout.tensors[0].offset, bytes, &Copied::new())
            .unwrap();
        upload.finish(segment, layout).unwrap()
    }

    pub fn put_f64(&self, name: &str, values: &[f64]) -> Arc<LiveSegment> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.put(name, Dtype::Float64, &[values.len() as u64], &bytes)
    }

    pub fn start(
        &self,
        invoke: Value,
    ) -> (
        strait::session::Call,
        mpsc::Receiver<Result<Arc<Invoked>, Status>>,
    ) {
        let invoke: wire::Invoke = serde_json::from_value(invoke).unwrap();
        let (send, receive) = mpsc::channel();
        let id = self.host.request_id(None).unwrap();
        let answer = Answer::new(move |result| drop(send.send(result)));
        (self.me().invoke(None, invoke, id, answer), receive)
    }

    pub fn invoke(&self, invoke: Value) -> Result<Arc<Invoked>, Status> {
        self.start(invoke).1.recv().unwrap()
    }

    /// scale-shift of the flight `x`.
    pub fn scale_shift(&self, x: &str, a: f64, b: f64) -> Arc<Invoked> {
        self.invoke(json!({"kernel": "scale-shift", "inputs": {"x": x}, "parameters": {"a": a, "b": b}, "verify": true})).unwrap()
    }
}

/// The bytes of a segment's only tensor.
pub fn bytes_of(segment: &LiveSegment) -> Vec<u8> {
    let [place] = segment.tensors() else {
        panic!("{} tensors", segment.tensors().len())
    };
    let mut bytes = vec![0; usize::try_from(place.length).unwrap()];
    segment
        .read_at(place.offset, &mut bytes, &Copied::new())
        .unwrap();
    bytes
}

pub fn f64s(bytes: &[u8]) -> Vec<f64> {
    bytes
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// What must be the same before and after: nothing is left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub fds: u64,
    pub threads: u64,
    pub segments: u64,
    pub flights: u64,
    pub leases: u64,
    pub running: u64,
    pub budget_used: u64,
}

/// Threads of the host, by their names: the test harness starts and ends threads of its own.
fn host_thread_names() -> Vec<String> {
    let named = |task: std::io::Result<std::fs::DirEntry>| {
        let name = std::fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        name.starts_with("strait-").then_some(name)
    };
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(named)
        .collect()
}

/// Without those that come and go with workers.
fn host_threads() -> u64 {
    let names = host_thread_names();
    names.iter().filter(|name| !is_of_workers(name)).count() as u64
}

/// Those that start a worker, tell its log and bury it.
fn worker_threads() -> u64 {
    let names = host_thread_names();
    names.iter().filter(|name| is_of_workers(name)).count() as u64
}

fn is_of_workers(name: &str) -> bool {
    matches!(
        name.trim(),
        "strait-starter" | "strait-relay" | "strait-reaper"
    )
}

impl Rig {
    /// What STATS shows of the whole host.
    pub fn stats(&self) -> Value {
        serde_json::to_value(self.host.stats()).unwrap()
    }

    /// Waits until as much is held as `before`: what ends with a worker process, or is freed on another thread, is gone a moment
    /// later.
    #[track_caller]
    pub fn check_holdings(&self, before: &Holdings, what: &str) {
        let begin = std::time::Instant::now();
        loop {
            let now = self.holdings_now();
            if now == *before {
                return;
            }
            let is_patient = begin.elapsed() < std::time::Duration::from_secs(20);
            assert!(
                is_patient,
                "{what} left something behind: {now:?}, before {before:?}; {:?}",
                host_thread_names()
            );
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Compiled plugins that the host keeps: one for each that is loaded, and none for those that were refused.
    fn artifacts(&self) -> u64 {
        if std::env::var_os("STRAIT_TEST_WORKERS").is_none() {
            return 0;
        }
        let kernels = self.host.plugins().kernels();
        let plugins: BTreeSet<_> = kernels.iter().map(|kernel| kernel.plugin.hash).collect();
        plugins.len() as u64
    }

    /// Once nothing goes away any more by itself: what was replaced is freed, and forgotten by workers, a moment later.
    pub fn holdings(&self) -> Holdings {
        let (mut last, mut same) = (self.holdings_now(), 0);
        for _ in 0..500 {
            std::thread::sleep(std::time::Duration::from_millis(10));
            let now = self.holdings_now();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            if same == 2 {
                break;
            }
        }
        last
    }

    fn holdings_now(&self) -> Holdings {
        // What belonged to workers that have ended goes a moment later; one thread stays with each that lives.
        for _ in 0..5000 {
            let living = self.stats()["workers"]["processes"].as_u64().unwrap();
            if worker_threads() <= living {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let stats = self.stats();
        let n = |path: &str| stats.pointer(path).and_then(Value::as_u64).unwrap();
        Holdings {
            // An idle result of the pool is a descriptor, and so is each plugin that is kept for workers.
            fds: n("/process/fds")
                - n("/pool/idle_segments")
                - n("/workers/fds")
                - self.artifacts(),
            threads: host_threads(),
            segments: n("/segments"),
            flights: n("/flights"),
            leases: n("/leases"),
            running: n("/running"),
            budget_used: n("/budget_used_bytes") - n("/pool/idle_bytes"),
        }
    }
}
