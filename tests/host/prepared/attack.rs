//! Kernels that try to keep, to take or to be more than a prepared call gives them.

use serde_json::{Value, json};
use strait_client::wire::{self, Op};

use super::memory::REMEMBERS;
use super::stream::{flat, frame};
use super::{Prepared, brought, bytes, floats};
use crate::guest;
use crate::served::{Served, number, put, ramp};

/// Counts at a place where no window is while `x` is small: that of `x2`, where `x` is as large as was prepared. Unless its
/// first element is 1. Its second output has two elements.
const COUNTS_UNDER_A_WINDOW: &str = "
(memory (export \"memory\") 32)
(func $open (param i32 i32 i32 i32 i32 i32) (result i32)
  (global.set $shape (i32.load offset=4 (local.get 4)))
  (global.set $rank (i32.load offset=8 (local.get 4)))
  (memory.copy (i32.const 900) (local.get 4) (i32.const 12))
  (memory.copy (i32.const 912) (local.get 4) (i32.const 12))
  (i32.store (i32.const 916) (i32.const 936))
  (i32.store (i32.const 920) (i32.const 1))
  (i64.store (i32.const 936) (i64.const 2))
  (i32.store8 (i32.const 512) (i32.const 0))
  (i32.store (i32.const 516) (i32.const 900))
  (i32.store (i32.const 520) (i32.const 2))
  i32.const 512)
(func $extents (result i32)
  (i32.store (i32.const 560) (global.get $shape))
  (i32.store (i32.const 564) (global.get $rank))
  (i32.store (i32.const 568) (i32.const 936))
  (i32.store (i32.const 572) (i32.const 1))
  (i32.store (i32.const 552) (i32.const 560))
  (i32.store (i32.const 556) (i32.const 2))
  i32.const 552)
(func $run (param i32) (result i32)
  (local $at i32)
  (local.set $at (i32.const 4259968))
  (f64.store offset=8 (i32.wrap_i64 (global.get $y)) (f64.convert_i64_u (global.get $x2)))
  (if (f64.ne (f64.load (i32.wrap_i64 (global.get $x))) (f64.const 1)) (then
    (i32.store (local.get $at) (i32.add (i32.load (local.get $at)) (i32.const 1)))
    (f64.store (i32.wrap_i64 (global.get $y)) (f64.convert_i32_u (i32.load (local.get $at))))))
  i32.const 0)";

fn small(prepared: &Prepared, x: &[f64]) -> Vec<u8> {
    let mut payload = wire::sizes(&[x.len() as u64]).to_vec();
    payload.extend(bytes(x));
    let length = usize::try_from(number(&prepared.told, "/request_bytes")).unwrap();
    payload.resize(length, 0);
    payload
}

#[test]
fn nothing_is_kept_where_a_window_is_at_other_sizes() {
    let plugin = guest::component_without_globals("under", COUNTS_UNDER_A_WINDOW);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    put(&mut client, "fixed", 65_536);
    // The first that is copied reaches beyond 64 KiB: the window is 2 MiB further on than beside a small one.
    let most = 9000;
    let request = json!({"kernel": "under/k", "inputs": {"x": brought(most), "x2": "fixed"}});
    let prepared = Prepared::by(&mut client, request);
    let first = |payload: &[u8]| {
        let reply = prepared.ask(payload);
        assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
        let from = usize::try_from(number(&prepared.told, "/outputs/0/offset")).unwrap();
        floats(&reply.payload[from..from + 16])
    };
    let mut full = vec![0.0; usize::try_from(most).unwrap()];
    full[0] = 1.0;
    let few = small(&prepared, &[0.0; 4]);
    let counts: Vec<f64> = [&few, &few, &small(&prepared, &full), &few]
        .map(|payload| first(payload)[0])
        .to_vec();
    assert_eq!(counts, [1.0, 1.0, 0.0, 1.0]);
    // The case is the one that is meant.
    assert_ne!(first(&few)[1], first(&small(&prepared, &full))[1]);
}

/// Takes its time in `open`, a good part of a second.
const OPENS_SLOWLY: &str = "
;; It streams.
(func $open (param i32 i32 i32 i32 i32 i32) (result i32)
  (local $left i64)
  (local.set $left (i64.const 1000000000))
  (loop $on (br_if $on (i64.ne (i64.const 0) (local.tee $left (i64.sub (local.get $left) (i64.const 1))))))
  (global.set $shape (i32.load offset=4 (local.get 4)))
  (global.set $rank (i32.load offset=8 (local.get 4)))
  (i32.store8 (i32.const 512) (i32.const 0))
  (i32.store (i32.const 516) (local.get 4))
  (i32.store (i32.const 520) (local.get 5))
  i32.const 512)";

fn stream_of(kernel: &str, most: u64) -> Value {
    json!({"kernel": kernel, "stream": true, "deadline_ms": 60_000,
        "inputs": {"x": {"dtype": "float64", "shape": [most]}}})
}

#[test]
fn a_stream_after_the_first_has_the_time_for_open_that_the_first_had() {
    // Its globals cannot be taken back: each stream has another instance.
    let host = Served::with_plugin(&guest::component("slow", OPENS_SLOWLY), &[]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, stream_of("slow/k", 4));
    for _ in 0..2 {
        prepared
            .socket
            .send(&[&flat(&prepared, true, &ramp(4))], &[])
            .unwrap();
        let mut y = vec![Vec::new()];
        prepared.collect(&mut y);
        assert_eq!(floats(&y[0]), ramp(4));
    }
}

/// Writes rows for ever.
const FLOODS: &str = "
;; It streams.
(func $step (param i32) (result i32)
  (i64.store offset=24 (i32.wrap_i64 (global.get $out)) (i64.load offset=8 (i32.wrap_i64 (global.get $out))))
  i32.const 2)";

#[test]
fn rows_without_end_end_at_the_deadline_however_slowly_they_are_read() {
    let host = Served::with_plugin(&guest::component_without_globals("floods", FLOODS), &[]);
    let mut client = host.greeted();
    let mut request = stream_of("floods/k", 4000);
    request["deadline_ms"] = json!(50);
    let prepared = Prepared::by(&mut client, request);
    let sent = flat(&prepared, false, &[0.0]);
    prepared.socket.send(&[&sent], &[]).unwrap();
    let mut frames = 0;
    let end = loop {
        let reply = prepared.receive().expect("an answer");
        if reply.op() != Op::Chunk {
            break reply;
        }
        frames += 1;
        assert!(frames < 50_000, "no end to it");
        // Always less quickly than they are made.
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    end.refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(frames > 0);
}

/// Has 64 MiB more once an element is 4.
const GROWS: &str = "
;; It streams.
(func $run (param i32) (result i32)
  (if (f64.eq (f64.load (i32.wrap_i64 (global.get $x))) (f64.const 4)) (then (drop (memory.grow (i32.const 1024)))))
  (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
  i32.const 0)";

/// Has as much more from `bind` on.
const GROWS_IN_BIND: &str = "
(func $bind (param i32 i32 i32 i32) (result i32)
  (global.set $x (i64.load (local.get 0)))
  (global.set $bytes (i64.load offset=8 (local.get 0)))
  (global.set $in (i64.load offset=16 (local.get 0)))
  (global.set $y (i64.load (local.get 2)))
  (global.set $out (i64.load offset=16 (local.get 2)))
  (drop (memory.grow (i32.const 1024)))
  (i32.store8 (i32.const 528) (i32.const 0))
  i32.const 528)";

const GROWN: u64 = 64 << 20;

#[test]
fn memory_that_a_stream_keeps_between_chunks_is_its_principals() {
    let plugin = guest::component_without_globals("grows", GROWS);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, stream_of("grows/k", 4));
    let charged = || number(&host.greeted().ok(Op::Stats, json!({})), "/account/bytes");
    let before = charged();
    for _ in 0..2 {
        for (x, last, more) in [(0.0, false, 0), (4.0, false, GROWN), (0.0, true, 0)] {
            let sent = flat(&prepared, last, &[x, 0.0, 0.0, 0.0]);
            prepared.socket.send(&[&sent], &[]).unwrap();
            let mut y = vec![Vec::new()];
            prepared.collect(&mut y);
            assert_eq!(floats(&y[0])[0], x);
            host.eventually(&mut host.greeted(), "what it keeps is counted", |stats| {
                number(stats, "/account/bytes") == before + more
            });
        }
    }
    drop(prepared);
    host.eventually(&mut client, "nothing is left", |stats| {
        number(stats, "/account/bytes") == 0
    });
    // Nor has it more than its principal may have.
    let host = Served::with_plugin(&plugin, &[("STRAIT__QUOTA__BYTES", "33554432")]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, stream_of("grows/k", 4));
    prepared
        .socket
        .send(&[&flat(&prepared, false, &[4.0, 0.0, 0.0, 0.0])], &[])
        .unwrap();
    let message = prepared
        .receive()
        .expect("the stream's end")
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(message.contains("chunk 0 of a stream"), "{message}");
    assert!(prepared.receive().is_none(), "the stream is over");
}

#[test]
fn memory_that_a_guest_has_from_bind_on_is_its_principals() {
    let plugin = guest::component_without_globals("binds", GROWS_IN_BIND);
    let request = || json!({"kernel": "binds/k", "inputs": {"x": brought(4)}});
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, request());
    let charged = number(&client.ok(Op::Stats, json!({})), "/account/bytes");
    assert!(charged >= GROWN, "{charged}");
    assert_eq!(prepared.call(&ramp(4)), ramp(4));
    let host = Served::with_plugin(&plugin, &[("STRAIT__QUOTA__BYTES", "33554432")]);
    host.greeted()
        .ask(Op::Prepare, request())
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
}

/// Answers the number of a handle that it makes and keeps.
const KEEPS_HANDLES: &str = "
(import \"[export]tests:other/kept\" \"[resource-new]thing\" (func $keep (param i32) (result i32)))
(func $run (param i32) (result i32)
  (f64.store (i32.wrap_i64 (global.get $y)) (f64.convert_i32_u (call $keep (i32.const 1))))
  i32.const 0)";

const OTHER_WORLD: &str = "
package tests:other;
interface kept { resource thing; }
world plugin { include strait:kernel/plugin@0.1.0; export kept; }";

#[test]
fn handles_of_a_plugins_own_resources_do_not_outlive_a_call() {
    let plugin = guest::component_with("handles", KEEPS_HANDLES, OTHER_WORLD);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    let request = json!({"kernel": "handles/k", "inputs": {"x": brought(4)}});
    let prepared = Prepared::by(&mut client, request);
    let first = prepared.call(&[0.0; 4])[0];
    for _ in 0..3 {
        assert_eq!(prepared.call(&[0.0; 4])[0], first);
    }
}

#[test]
fn rows_without_bytes_are_counted_as_far_as_anybody_can_count() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let rows = u64::MAX / 2;
    for (shape, kernel) in [
        ([5, 0], "cumsum"),
        ([5, 0], "scale-shift"),
        ([rows, 0], "clip"),
    ] {
        let mut request = stream_of(kernel, 1);
        request["inputs"]["x"]["shape"] = json!(shape);
        let reply = client.ask(Op::Prepare, request);
        if shape[0] == rows {
            // More than a guest can count: it may say so.
            if reply.op() == Op::Error {
                continue;
            }
        }
        let prepared = Prepared::of(reply);
        'stream: for last in [false, false, false, true] {
            let mut payload = wire::sizes(&shape).to_vec();
            let length = usize::try_from(number(&prepared.told, "/request_bytes")).unwrap();
            payload.resize(length, 0);
            prepared
                .socket
                .send(&[&frame(last, 5, &payload)], &[])
                .unwrap();
            loop {
                let reply = prepared.receive().expect("an answer");
                let done = reply.op() != Op::Chunk;
                if shape[0] == rows && reply.op() == Op::Error {
                    break 'stream;
                }
                assert_ne!(reply.op(), Op::Error, "{}", reply.text);
                assert_eq!(wire::shape(&reply.payload[..64], 2), Some(shape.to_vec()));
                if done {
                    break;
                }
            }
        }
    }
    // The host is there.
    let prepared = Prepared::by(&mut client, super::scale_shift(brought(4)));
    assert_eq!(prepared.call(&ramp(4)), super::shifted(&ramp(4)));
}

#[test]
fn a_hundred_that_come_and_go_leave_nothing() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[("STRAIT__ENGINE__WORKERS", "2")]);
    let mut watcher = host.greeted();
    let before = crate::served::Holdings::of(&host.settled(&mut watcher));
    for round in 0..5 {
        let mut client = host.greeted();
        let request =
            json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 60_000});
        // Not one reply is read before all of them are asked for.
        let sequences: Vec<_> = (0..100)
            .map(|_| client.begin(Op::Prepare, &request, &[]))
            .collect();
        if round % 2 == 0 {
            let mut all = Vec::new();
            for _ in &sequences {
                all.push(Prepared::of(client.receive().expect("an answer")));
            }
            for (index, prepared) in all.iter().enumerate() {
                // Some count, some spin until their client is gone, some are never read.
                let what = if index % 10 == 9 { 3.0 } else { 0.0 };
                let mut x = [0.0; 8];
                x[0] = what;
                prepared.send(1, &prepared.payload(&x));
            }
        }
        drop(client);
    }
    let after = host.settled(&mut watcher);
    assert_eq!(crate::served::Holdings::of(&after), before);
    for nothing in [
        "/account/bytes",
        "/account/queued",
        "/account/running",
        "/running",
    ] {
        assert_eq!(number(&after, nothing), 0, "{nothing} {after}");
    }
    assert_eq!(number(&after, "/account/connections"), 1);
}

/// Never comes back from `open`.
const SPINS_IN_OPEN: &str = "
(func $open (param i32 i32 i32 i32 i32 i32) (result i32) (loop $on (br $on)) unreachable)";

#[test]
fn a_host_ends_whatever_its_prepared_kernels_do() {
    let plugins = [
        guest::component_without_globals("opens", SPINS_IN_OPEN),
        guest::component_without_globals("floods", FLOODS),
        guest::component_without_globals("grows", GROWS),
    ];
    for workers in ["1", "4"] {
        let settings = [
            ("STRAIT__SERVER__DRAIN_MS", "500"),
            ("STRAIT__ENGINE__WORKERS", workers),
        ];
        let host = Served::with_plugins(&plugins, &settings);
        let mut client = host.greeted();
        // One stream waits for its next chunk, and the answers of another are not read.
        let waits = Prepared::by(&mut client, stream_of("grows/k", 4));
        let sent = flat(&waits, false, &ramp(4));
        waits.socket.send(&[&sent], &[]).unwrap();
        waits.collect(&mut [Vec::new()]);
        let deaf = Prepared::by(&mut client, stream_of("floods/k", 4000));
        let sent = flat(&deaf, false, &[0.0]);
        deaf.socket.send(&[&sent], &[]).unwrap();
        // A PREPARE is under way, and with one worker another waits for its turn.
        let mut other = host.greeted();
        let opens =
            json!({"kernel": "opens/k", "inputs": {"x": brought(4)}, "deadline_ms": 60_000});
        other.begin(Op::Prepare, &opens, &[]);
        other.begin(Op::Prepare, &opens, &[]);
        host.eventually(&mut host.greeted(), "a PREPARE is under way", |stats| {
            number(stats, "/account/running") >= 1
        });
        host.terminate();
        host.ended();
        assert!(waits.socket.send(&[b"x"], &[]).is_err());
    }
}

/// The first element of `x2`; stores one there before, if `x` begins with 5, or has it filled, if with 6.
const WRITES_TO_ITS_INPUT: &str = "
(func $run (param i32) (result i32)
  (local $what f64) (local $x2 i32)
  (local.set $what (f64.load (i32.wrap_i64 (global.get $x))))
  (local.set $x2 (i32.wrap_i64 (global.get $x2)))
  (if (f64.eq (local.get $what) (f64.const 5)) (then (f64.store (local.get $x2) (f64.const 99))))
  (if (f64.eq (local.get $what) (f64.const 6)) (then (memory.fill (local.get $x2) (i32.const 1) (i32.const 4096))))
  (f64.store (i32.wrap_i64 (global.get $y)) (f64.load (local.get $x2)))
  i32.const 0)";

#[test]
fn a_store_into_an_input_that_stays_is_of_no_use_to_the_next_call() {
    let (shapes, _) = COUNTS_UNDER_A_WINDOW.split_once("(func $run").unwrap();
    let text = format!("{shapes}{WRITES_TO_ITS_INPUT}");
    let plugin = guest::component_without_globals("writes", &text);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    put(&mut client, "fixed", 65_536);
    let request = json!({"kernel": "writes/k", "inputs": {"x": brought(4), "x2": "fixed"}});
    let prepared = Prepared::by(&mut client, request);
    for what in [0.0, 5.0, 0.0, 6.0, 0.0, 6.0, 5.0, 0.0] {
        for count in [4, 2] {
            let reply = prepared.ask(&small(&prepared, &[what; 4][..count]));
            if what != 0.0 {
                reply.refused("INTERNAL", "INPUT_WRITTEN");
                continue;
            }
            assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
            let from = usize::try_from(number(&prepared.told, "/outputs/0/offset")).unwrap();
            assert_eq!(floats(&reply.payload[from..from + 8]), ramp(1));
        }
    }
}
