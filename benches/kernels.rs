//! What runs of kernels cost beyond one after the other: pipelines and slices, beside native Rust.
//!
//! `cargo bench --bench kernels`; `-- pipeline` for one group. Ratios within a group are what counts.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench that cannot go on ends"
)]

mod rig;

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::json;

use rig::{MIB, Rig, native};

/// Three elementwise kernels over 100 MiB, beside native code in three passes and in one, and the same kernels one after the other.
fn pipeline(c: &mut Criterion) {
    const KERNELS: [&str; 3] = [
        "clip(lo=0, hi=1e7)",
        "scale-shift(a=2, b=1)",
        "cast(to=float32)",
    ];
    let bytes = 100 * MIB;
    let mut group = c.benchmark_group("pipeline 100MiB");
    group
        .throughput(Throughput::Bytes(bytes as u64))
        .sample_size(20)
        .measurement_time(Duration::from_secs(6));
    let x: Vec<f64> = (0..bytes / 8).map(|i| i as f64).collect();
    let (mut one, mut two) = (vec![1.0; bytes / 8], vec![1.0; bytes / 8]);
    let mut y = vec![1.0_f32; bytes / 8];
    let clip = |x: f64| x.clamp(0.0, 1e7);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "it is what the kernel does"
    )]
    let cast = |x: f64| x as f32;
    group.bench_function("native, three passes, warm", |b| {
        b.iter(|| {
            for (y, x) in one.iter_mut().zip(black_box(&x)) {
                *y = clip(*x);
            }
            native(black_box(&one), &mut two, 2.0, 1.0);
            for (y, x) in y.iter_mut().zip(black_box(&two)) {
                *y = cast(*x);
            }
            black_box(&mut y);
        });
    });
    group.bench_function("native, one fused loop, warm", |b| {
        b.iter(|| {
            for (y, x) in y.iter_mut().zip(black_box(&x)) {
                *y = cast(2.0 * clip(*x) + 1.0);
            }
            black_box(&mut y);
        });
    });
    let text = KERNELS.join(" | ");
    let piped = json!({"kernel": text, "inputs": {"x": "x"}});
    // As in a worker: without checks in loops.
    let rig = |link_bytes| {
        let rig = Rig::new(|config| {
            config.engine.link_bytes = link_bytes;
            config.engine.epoch_interruption = false;
        });
        rig.put("x", bytes);
        rig
    };
    let whole = rig(0);
    group.bench_function("three calls", |b| {
        b.iter(|| {
            let mut x = "x";
            for (kernel, name) in KERNELS.iter().zip(["one", "two", "three"]) {
                whole.ask(json!({"kernel": kernel, "inputs": {"x": x}, "publish": {"y": name}, "replace": true}));
                x = name;
            }
        });
    });
    group.bench_function("one pipeline, stage by stage", |b| {
        b.iter(|| whole.ask(piped.clone()))
    });
    drop(whole);
    for kib in [64, 128, 256, 512, 1024] {
        let rig = rig(kib << 10);
        let name = BenchmarkId::new("one pipeline, at once, links of KiB", kib);
        group.bench_function(name, |b| b.iter(|| rig.ask(piped.clone())));
    }
    group.finish();
}

/// The same call in two slices, on two threads, beside native on one and on two; in this process and through a worker.
fn slices(c: &mut Criterion) {
    let bytes = 100 * MIB;
    let mut group = c.benchmark_group("slices 100MiB");
    group
        .throughput(Throughput::Bytes(bytes as u64))
        .sample_size(20)
        .measurement_time(Duration::from_secs(6));
    let x: Vec<f64> = (0..bytes / 8).map(|i| i as f64).collect();
    let mut y = vec![1.0; bytes / 8];
    group.bench_function("native, one thread", |b| {
        b.iter(|| native(black_box(&x), black_box(&mut y), 2.0, 1.0))
    });
    group.bench_function("native, two threads", |b| {
        b.iter(|| {
            let half = x.len() / 2;
            let ((x0, x1), (y0, y1)) = (black_box(&x).split_at(half), y.split_at_mut(half));
            std::thread::scope(|scope| {
                scope.spawn(|| native(x1, black_box(y1), 2.0, 1.0));
                native(x0, black_box(y0), 2.0, 1.0);
            });
        });
    });
    for (place, enabled) in [("in process", false), ("through a worker", true)] {
        let rig = Rig::new(|config| {
            config.engine.threads = Some(2);
            config.workers.enabled = enabled;
            config.workers.program = Some(env!("CARGO_BIN_EXE_strait").into());
        });
        rig.put("x", bytes);
        for slices in [1, 2] {
            group.bench_function(BenchmarkId::new(place, slices), |b| {
                b.iter(|| rig.call_in(slices));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, pipeline, slices);
criterion_main!(benches);
