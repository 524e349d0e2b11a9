//! What a call costs beside its baselines: native Rust on warm pages, and a copy in and out.
//!
//! `cargo bench --bench calls`; `-- 100MiB` for one group. Ratios within a group are what counts.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench that cannot go on ends"
)]

#[path = "../tests/support/guest.rs"]
mod guest;

use std::hint::black_box;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::sync::Arc;
use strait::access::{Rights, Tokens};
use strait::config::Config;
use strait::engine::{Owner, RunnerProcess};
use strait::session::{Caller, Host, Invoked};
use strait_client::{Client, NewTensor};
use strait_memory::{Budget, Copied, Segment, WriteMapping};
use strait_tensor::{Column, Dtype, FileLayout, TensorSpec};

const MIB: usize = 1 << 20;

/// The baseline: the same loop as the kernel's, as rustc vectorises it for this CPU's baseline.
fn native(x: &[f64], y: &mut [f64], a: f64, b: f64) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a * *x + b;
    }
}

/// A host in this process, without sockets.
struct Rig(Caller);

impl Rig {
    fn new(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.engine.cache = Some(concat!(env!("CARGO_TARGET_TMPDIR"), "/compiled").into());
        change(&mut config);
        Self(
            Host::start(config, std::path::Path::new("nowhere"))
                .unwrap()
                .own_caller(),
        )
    }

    /// For another user of the same host.
    fn of(&self, uid: u32) -> Self {
        Self(self.0.host().caller(Some(uid)).unwrap())
    }

    fn wait_for_spare(&self, spare: bool) {
        let is_spare = |process: &RunnerProcess| process.owner.is_none();
        while spare && !self.0.host().runner().processes().iter().any(is_spare) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn kill_worker(&self) {
        let own = Some(Owner(self.0.account().number()));
        for process in self.0.host().runner().processes() {
            if process.owner == own {
                let pid = i32::try_from(process.pid).unwrap();
                kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            }
        }
    }

    fn put(&self, name: &str, bytes: usize) {
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: vec![bytes as u64 / 8],
        };
        let upload = self.0.begin_upload(name, true).unwrap();
        let layout = FileLayout::plan(&[Column::new("x", spec).unwrap()]).unwrap();
        let segment = self.0.allocate_to_fill(&layout).unwrap();
        let values: Vec<u8> = (0..bytes / 8)
            .flat_map(|i| (i as f64).to_le_bytes())
            .collect();
        segment
            .write_at(layout.tensors[0].offset, &values, &Copied::new())
            .unwrap();
        upload.finish(segment, layout).unwrap();
    }

    fn call(&self) -> Arc<Invoked> {
        let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0, "b": 1.0}});
        let id = self.0.host().request_id(None).unwrap();
        let invoke = serde_json::from_value(call).unwrap();
        self.0.invoke_and_wait(invoke, id).unwrap()
    }

    /// How long `spins/k` goes on after its deadline.
    fn runaway(&self, deadline_ms: u64) -> Duration {
        let call = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
        let id = self.0.host().request_id(None).unwrap();
        let invoke = serde_json::from_value(call).unwrap();
        let begin = Instant::now();
        self.0.invoke_and_wait(invoke, id).unwrap_err();
        begin.elapsed() - Duration::from_millis(deadline_ms)
    }
}

/// A 100 MiB call with a fresh sandbox, beside native on warm pages and the copying path.
fn large(c: &mut Criterion) {
    let bytes = 100 * MIB;
    let mut group = c.benchmark_group("call 100MiB");
    group
        .throughput(Throughput::Bytes(bytes as u64))
        .sample_size(20)
        .measurement_time(Duration::from_secs(8));
    let x: Vec<f64> = (0..bytes / 8).map(|i| i as f64).collect();
    let mut y = vec![1.0; bytes / 8];
    group.bench_function("native, warm", |b| {
        b.iter(|| native(black_box(&x), black_box(&mut y), 2.0, 1.0))
    });
    for (name, epoch) in [
        ("epoch checks off", false),
        ("epoch checks on (default)", true),
    ] {
        let rig = Rig::new(|config| config.engine.epoch_interruption = epoch);
        rig.put("x", bytes);
        group.bench_function(name, |b| b.iter(|| rig.call()));
    }
    let rig = Rig::new(|config| config.engine.move_min_bytes = u64::MAX);
    rig.put("x", bytes);
    group.bench_function("copied in and out of the guest", |b| b.iter(|| rig.call()));
    let (mut guest_x, mut guest_y) = (vec![1.0; bytes / 8], vec![1.0; bytes / 8]);
    group.bench_function("native and one memcpy in and out, warm", |b| {
        b.iter(|| {
            guest_x.copy_from_slice(black_box(&x));
            native(&guest_x, &mut guest_y, 2.0, 1.0);
            y.copy_from_slice(black_box(&guest_y));
        });
    });
    group.finish();
}

/// Sizes across `move_min_bytes`: always moved, always copied, native.
fn sizes(c: &mut Criterion) {
    let mut group = c.benchmark_group("size");
    group
        .sample_size(15)
        .measurement_time(Duration::from_secs(2))
        .warm_up_time(Duration::from_millis(500));
    let moving = Rig::new(|config| config.engine.move_min_bytes = 1);
    let copying = Rig::new(|config| config.engine.move_min_bytes = u64::MAX);
    for kib in [4, 64, 256, 512, 1024, 4096, 16 << 10, 64 << 10, 256 << 10] {
        let bytes = kib << 10;
        group.throughput(Throughput::Bytes(bytes as u64));
        let x: Vec<f64> = (0..bytes / 8).map(|i| i as f64).collect();
        let mut y = vec![1.0; bytes / 8];
        let label = format!("{kib} KiB");
        group.bench_function(BenchmarkId::new("native", &label), |b| {
            b.iter(|| native(black_box(&x), black_box(&mut y), 2.0, 1.0));
        });
        for (name, rig) in [("moved", &moving), ("copied", &copying)] {
            rig.put("x", bytes);
            group.bench_function(BenchmarkId::new(name, &label), |b| b.iter(|| rig.call()));
        }
    }
    group.finish();
}

/// A call through a worker process beside one in this process, and native on warm pages; kernels in a worker have no checks
/// in their loops. Then how long after its deadline a runaway ends.
fn worker(c: &mut Criterion) {
    let mut group = c.benchmark_group("worker");
    group
        .sample_size(20)
        .measurement_time(Duration::from_secs(4));
    let here = Rig::new(|_| {});
    let there = Rig::new(|config| {
        config.workers.enabled = true;
        config.workers.program = Some(env!("CARGO_BIN_EXE_strait").into());
    });
    for (label, bytes) in [
        ("1 KiB", 1 << 10),
        ("1 MiB", MIB),
        ("10 MiB", 10 * MIB),
        ("100 MiB", 100 * MIB),
    ] {
        let x: Vec<f64> = (0..bytes / 8).map(|i| i as f64).collect();
        let mut y = vec![1.0; bytes / 8];
        group.bench_function(BenchmarkId::new("native, warm", label), |b| {
            b.iter(|| native(black_box(&x), black_box(&mut y), 2.0, 1.0));
        });
        for (name, rig) in [("in process", &here), ("through a worker", &there)] {
            rig.put("x", bytes);
            group.bench_function(BenchmarkId::new(name, label), |b| b.iter(|| rig.call()));
        }
    }
    const SPINS: &str =
        "(func $run (param i32) (result i32) (loop $again (br $again)) i32.const 0)";
    const DEADLINE_MS: u64 = 20;
    for (name, rig) in [("in process", &here), ("through a worker", &there)] {
        let spins = guest::component("spins", SPINS);
        rig.0.load_plugin(&spins).unwrap();
        group.bench_function(BenchmarkId::new(name, "after its deadline"), |b| {
            b.iter_custom(|calls| (0..calls).map(|_| rig.runaway(DEADLINE_MS)).sum());
        });
    }
    first_calls(&mut group);
    group.finish();
}

/// The first call of a principal, and the next one when its worker was killed: with a process that has to be started, and
/// with one to spare.
fn first_calls(group: &mut BenchmarkGroup<'_, WallTime>) {
    for (label, spare) in [("without a spare", false), ("with a spare", true)] {
        let rig = Rig::new(|config| {
            config.workers.enabled = true;
            config.workers.program = Some(env!("CARGO_BIN_EXE_strait").into());
            config.workers.spare = spare;
        });
        // Somebody is served already.
        rig.put("x", 1 << 10);
        rig.call();
        let mut uid = 100_000;
        for (name, is_first) in [("first call", true), ("call after a kill", false)] {
            group.bench_function(BenchmarkId::new(name, label), |b| {
                b.iter_custom(|calls| {
                    (0..calls)
                        .map(|_| {
                            uid += 1;
                            let other = rig.of(uid);
                            other.put("x", 1 << 10);
                            if !is_first {
                                other.call();
                                other.wait_for_spare(spare);
                                other.kill_worker();
                            }
                            other.wait_for_spare(spare);
                            let begun = Instant::now();
                            black_box(other.call());
                            let took = begun.elapsed();
                            other.kill_worker();
                            took
                        })
                        .sum()
                });
            });
        }
    }
}

/// From nothing to a sandbox that can be called: store and instance, by the engine's own clock.
fn sandbox(c: &mut Criterion) {
    let mut group = c.benchmark_group("sandbox");
    for (name, bytes) in [
        ("instantiate, 1 KiB calls", 1 << 10),
        ("instantiate, 100 MiB calls", 100 * MIB),
    ] {
        let rig = Rig::new(|_| {});
        rig.put("x", bytes);
        group
            .sample_size(10)
            .measurement_time(Duration::from_secs(3))
            .bench_function(name, |b| {
                b.iter_custom(|calls| {
                    (0..calls)
                        .map(|_| Duration::from_secs_f64(rig.call().report.seconds.instantiate))
                        .sum()
                });
            });
    }
    group.finish();
}

/// A host process of its own, for what crosses the socket. Its settings are the default ones, unlike those of the tests'
/// `Served`, which logs all that it does.
struct Served {
    host: Child,
    directory: tempfile::TempDir,
}

impl Served {
    fn new(settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        let host = Command::new(env!("CARGO_BIN_EXE_strait"))
            .args(["serve", "--directory"])
            .arg(&run)
            .envs(settings.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { host, directory }
    }

    fn client(&self) -> Client {
        let run = self.directory.path().join("run");
        let give_up = Instant::now() + Duration::from_secs(30);
        loop {
            match Client::connect_to(&run) {
                Ok(client) => return client,
                Err(error) if Instant::now() > give_up => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already; either way it must not outlive the bench.
        let _ = self.host.kill();
        let _ = self.host.wait();
    }
}

/// Attaching to a tensor: MAP, mmap, unmap, RELEASE. Must not depend on its size.
fn attach(c: &mut Criterion) {
    let served = Served::new(&[]);
    let client = served.client();
    let mut group = c.benchmark_group("attach");
    for mib in [1, 10, 100, 500] {
        let values = vec![1.0_f64; mib * MIB / 8];
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: vec![values.len() as u64],
        };
        client.put("x", &spec, &values, true).unwrap();
        group.bench_function(BenchmarkId::from_parameter(format!("{mib} MiB")), |b| {
            b.iter(|| client.map("x").unwrap());
        });
    }
    group.finish();
}

/// The first fill of 100 MiB of shared memory, and a consumer's first pass over 100 MiB: each beside the same
/// without what makes it cheap.
fn first_touch(c: &mut Criterion) {
    let bytes = 100 * MIB;
    let served = Served::new(&[]);
    let client = served.client();
    let tensor = |name: &str| NewTensor {
        name: name.into(),
        dtype: Dtype::Float64,
        shape: vec![bytes as u64 / 8],
    };
    let mut group = c.benchmark_group("first touch 100MiB");
    group
        .throughput(Throughput::Bytes(bytes as u64))
        .sample_size(10)
        .measurement_time(Duration::from_secs(4));
    group.bench_function("fill a plain memfd", |b| {
        b.iter_custom(|rounds| {
            (0..rounds)
                .map(|_| {
                    let begun = Instant::now();
                    let memfd =
                        Segment::create(bytes as u64, &Budget::new("bytes", u64::MAX)).unwrap();
                    let mut pages = WriteMapping::new(memfd.client_fd(), bytes).unwrap();
                    pages.bytes_mut().fill(black_box(1));
                    begun.elapsed()
                })
                .sum()
        });
    });
    group.bench_function("CREATE and fill by the client", |b| {
        b.iter_custom(|rounds| {
            (0..rounds)
                .map(|_| {
                    let begun = Instant::now();
                    let mut segment = client.create(&[tensor("x")]).unwrap();
                    segment.bytes_mut("x").unwrap().fill(black_box(1));
                    begun.elapsed()
                })
                .sum()
        });
    });
    let mut x = client.create(&[tensor("x")]).unwrap();
    x.tensor_mut::<f64>("x").unwrap().fill(1.0);
    for (name, pass) in [
        ("a consumer's first pass over a result", 0),
        ("its second pass", 1),
    ] {
        group.bench_function(name, |b| {
            b.iter_custom(|rounds| {
                (0..rounds)
                    .map(|_| {
                        let result = client.call("scale-shift").input("x", &x).send().unwrap();
                        let tensor = result.tensor("y").unwrap();
                        let y = tensor.as_slice::<f64>().unwrap();
                        let mut took = [Duration::ZERO; 2];
                        for took in &mut took {
                            let begun = Instant::now();
                            black_box(sum(y));
                            *took = begun.elapsed();
                        }
                        took[pass]
                    })
                    .sum()
            });
        });
    }
    group.finish();
}

/// In eight lanes, or it would wait for additions and not for memory.
fn sum(values: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    for chunk in values.chunks_exact(8) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    lanes.iter().sum()
}

/// A call of 1 KiB through the socket, beside an empty round trip: in the host's process, then in a worker.
fn small(c: &mut Criterion) {
    small_on(c, "1 KiB over the socket", &[]);
    let workers = [("STRAIT__WORKERS__ENABLED", "true")];
    small_on(c, "1 KiB over the socket and through a worker", &workers);
}

fn small_on(c: &mut Criterion, name: &str, settings: &[(&str, &str)]) {
    let served = Served::new(settings);
    let client = served.client();
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![128],
    };
    client.put("x", &spec, &[1.0_f64; 128], true).unwrap();
    let mut group = c.benchmark_group(name);
    group.bench_function("ping", |b| b.iter(|| client.ping().unwrap()));
    group.bench_function("call, result mapped", |b| {
        b.iter(|| {
            let call = client.call("scale-shift").input("x", "x");
            call.param("a", 2.0).inline_bytes(0).send().unwrap()
        });
    });
    group.bench_function("call, both in frames", |b| {
        b.iter(|| {
            let x = [1.0_f64; 128];
            let call = client.call("scale-shift").input("x", (&spec, &x[..]));
            call.param("a", 2.0).send().unwrap()
        });
    });
    let prepare = client.prepare("scale-shift").input("x", &spec);
    let mut prepared = prepare.param("a", 2.0).send().unwrap();
    group.bench_function("prepared call", |b| {
        b.iter(|| {
            let result = prepared.call(&[(&[1.0_f64; 128][..]).into()]).unwrap();
            assert_eq!(result.tensor("y").unwrap().bytes().len(), 1024);
        });
    });
    group.finish();
}

/// What it costs to say who makes a call, by token: one that is good, and one that nobody knows.
fn token(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("tokens.toml");
    let rights = || Rights::parse(["get", "call:scale-*"]).unwrap();
    let mut made = Vec::new();
    for n in 0..100 {
        made.push(
            Tokens::add(&file, &format!("user-{n}"), rights(), None)
                .unwrap()
                .0,
        );
    }
    let rig = Rig::new(|config| config.server.tokens = Some(file));
    let host = rig.0.host();
    let good = made[50].text();
    let mut group = c.benchmark_group("token");
    group.bench_function("good", |b| {
        b.iter(|| host.caller_by_token(black_box(good)).unwrap());
    });
    let guess = format!("{}x", &good[..good.len() - 1]);
    group.bench_function("refused", |b| {
        b.iter(|| host.caller_by_token(black_box(&guess)).unwrap_err());
    });
    group.finish();
}

criterion_group!(
    benches,
    large,
    sizes,
    worker,
    sandbox,
    attach,
    first_touch,
    small,
    token
);
criterion_main!(benches);
