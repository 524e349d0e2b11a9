//! Kernels that would go on for ever in a worker process, where nothing in their loops looks at a clock: their deadline ends
//! them and nothing else.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use strait_client::wire::Op;

use crate::guest;
use crate::served::{PATIENCE, Raw, Served, check_call, number, put, ramp, scale_shift};
use crate::workers::{MOVED, NO_SPARE, ON, OnDrop, worker};

/// In the guest's own code, whatever it does there.
const IN_THE_GUEST: [(&str, &str); 14] = [
    ("nothing", "(loop $l (br $l))"),
    (
        "loads",
        "(local $i i32) (loop $l (local.set $i (i32.load (i32.and (local.get $i) (i32.const 1020)))) (br $l))",
    ),
    (
        "stores",
        "(local $i i32) (loop $l (i32.store (i32.const 2048) (local.tee $i (i32.add (local.get $i) (i32.const 1)))) (br $l))",
    ),
    (
        "an input",
        "(local $v f64) (loop $l (local.set $v (f64.add (local.get $v) (f64.load (i32.wrap_i64 (global.get $x))))) (br $l))",
    ),
    (
        "an output",
        "(loop $l (f64.store (i32.wrap_i64 (global.get $y)) (f64.const 7)) (br $l))",
    ),
    (
        "numbers",
        "(local $v f64) (loop $l (local.set $v (f64.sqrt (f64.add (local.get $v) (f64.const 1)))) (br $l))",
    ),
    (
        "divisions",
        "(local $v i64) (loop $l (local.set $v (i64.div_u (i64.const -1) (i64.add (i64.const 3) (local.get $v)))) (br $l))",
    ),
    (
        "vectors",
        "(local $v v128) (loop $l (local.set $v (f64x2.add (local.get $v) (v128.load (i32.const 1024)))) (br $l))",
    ),
    (
        "atoms of a copy",
        "(loop $l (memory.copy (i32.const 2048) (i32.const 1024) (i32.const 8)) (br $l))",
    ),
    ("calls", "(loop $l (drop (call $one)) (br $l))"),
    (
        "indirect calls",
        "(loop $l (drop (call_indirect $functions (result i32) (i32.const 0))) (br $l))",
    ),
    ("far down", "(drop (call $down (i32.const 5000)))"),
    ("tail calls", "(drop (call $tail (i32.const 0)))"),
    (
        "a table",
        "(loop $l (br_table 0 0 0 (i32.and (memory.size) (i32.const 1))))",
    ),
];

/// Mostly in what the guest calls.
const ELSEWHERE: [(&str, &str); 4] = [
    (
        "short fills",
        "(loop $l (memory.fill (i32.const 2048) (i32.const 1) (i32.const 64)) (br $l))",
    ),
    (
        "growth by nothing",
        "(loop $l (drop (memory.grow (i32.const 0))) (br $l))",
    ),
    (
        "fills",
        // Memory beyond the windows: over them it would be a store into an input.
        "(local $at i32) (local.set $at (i32.shl (memory.grow (i32.const 1000)) (i32.const 16))) (loop $l (memory.fill (local.get $at) (i32.const 1) (i32.const 65000000)) (br $l))",
    ),
    (
        "table fills",
        "(drop (table.grow $functions (ref.null func) (i32.const 9000))) (loop $l (table.fill $functions (i32.const 1) (ref.null func) (i32.const 9000)) (br $l))",
    ),
];

const REST: &str = "
(type $answers (func (result i32)))
(table $functions 1 10000 funcref)
(elem (table $functions) (i32.const 0) func $one)
(func $one (result i32) memory.size)
(func $down (param i32) (result i32)
  (if (i32.eqz (local.get 0)) (then (loop $l (br $l))))
  (i32.add (call $down (i32.sub (local.get 0) (i32.const 1))) (i32.const 1)))
(func $tail (param i32) (result i32) (return_call $other (i32.add (local.get 0) (i32.const 1)) (i32.const 2) (i32.const 3) (i32.const 4) (i32.const 5) (i32.const 6) (i32.const 7)))
(func $other (param i32 i32 i32 i32 i32 i32 i32) (result i32) (return_call $tail (local.get 0)))";

/// A host with a plugin for each of `bodies`, and the flight `x`.
fn host(bodies: &[(&str, &str)], grace_ms: &str) -> (Served, Raw) {
    let plugin = |(index, (_, body)): (usize, &(&str, &str))| {
        let text = format!("(func $run (param i32) (result i32) {body} i32.const 0)\n{REST}");
        guest::component(&format!("spins-{index}"), &text)
    };
    let plugins: Vec<_> = bodies.iter().enumerate().map(plugin).collect();
    let grace = ("STRAIT__WORKERS__GRACE_MS", grace_ms);
    let host = Served::with_plugins(&plugins, &[ON, NO_SPARE, grace]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    (host, client)
}

fn check_ended(client: &mut Raw, index: usize, what: &str) {
    let kernel = format!("spins-{index}/k");
    let call = json!({"kernel": kernel, "inputs": {"x": "x"}, "deadline_ms": 60});
    let message = client
        .ask(Op::Invoke, call)
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(message.contains("60 ms"), "{what}: {message}");
    check_call(client, json!("x"), &ramp(MOVED));
}

#[test]
fn a_guest_that_checks_nothing_ends_at_its_deadline_and_its_worker_goes_on() {
    let (host, mut client) = host(&IN_THE_GUEST, "60000");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let first = worker(&host);
    for (index, (what, _)) in IN_THE_GUEST.iter().enumerate() {
        (0..5).for_each(|_| check_ended(&mut client, index, what));
        assert_eq!(worker(&host), first, "{what}");
    }
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/workers/lost"), 0, "{stats}");
}

#[test]
fn a_guest_that_is_rarely_in_its_own_code_ends_with_its_worker_at_the_latest() {
    let (_host, mut client) = host(&ELSEWHERE, "100");
    for (index, (what, _)) in ELSEWHERE.iter().enumerate() {
        check_ended(&mut client, index, what);
    }
}

/// A quarter of a second or so: nobody waits for it.
#[test]
fn a_large_worker_is_taken_apart_beside_its_neighbours_next_runs() {
    // More than a GiB in small pages.
    let text = "(func $run (param i32) (result i32) (local $at i32)
        (local.set $at (i32.mul (memory.grow (i32.const 18000)) (i32.const 65536)))
        (loop $l (memory.fill (local.get $at) (i32.const 1) (i32.const 1170000000)) (br $l)) i32.const 0)";
    let settings = [
        ON,
        NO_SPARE,
        ("STRAIT__ENGINE__WORKERS", "4"),
        ("STRAIT__LIMITS__GUEST_BYTES", "1400000000"),
        ("STRAIT__WORKERS__GRACE_MS", "100"),
    ];
    let host = Served::with_plugin(&guest::component("fills", text), &settings);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let fill = |client: &mut Raw, deadline_ms: u64| {
        let call = json!({"kernel": "fills/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
        client
            .ask(Op::Invoke, call)
            .refused("DEADLINE_EXCEEDED", "DEADLINE");
    };
    // Its worker has the plugin.
    fill(&mut client, 1);
    let mut other = host.greeted();
    put(&mut other, "large", 10 * MOVED);
    let call = scale_shift(json!("large"), 2.0, 1.0);
    other.ask(Op::Invoke, call.clone()).accepted();
    let large = worker(&host);
    let done = AtomicBool::new(false);
    let (overrun, next, longest) = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let begin = Instant::now();
                let reply = other.ask(Op::Invoke, call.clone());
                longest = longest.max(begin.elapsed());
                let lease = reply.accepted()["results"][0]["lease"].clone();
                other.ok(Op::Release, json!({"leases": [lease]}));
            }
            longest
        });
        // Also where this thread gives up.
        let end = OnDrop(|| done.store(true, Ordering::Relaxed));
        let begin = Instant::now();
        fill(&mut client, 3000);
        let overrun = begin.elapsed();
        check_call(&mut client, json!("x"), &ramp(MOVED));
        let next = begin.elapsed() - overrun;
        drop(end);
        (overrun, next, neighbour.join().unwrap())
    });
    eprintln!("its end {overrun:?}, the next call {next:?}, the neighbour's longest {longest:?}");
    assert!(overrun.max(next).max(longest) < PATIENCE);
    host.eventually(&mut client, "it is taken apart", |_| {
        !fs::exists(format!("/proc/{}", large.as_raw_nonzero())).unwrap()
    });
}
