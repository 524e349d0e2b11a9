//! Kernels that stream, chunk by chunk through the engine (`engine.chunk_rows`): the same bits as at once, and
//! guests that break the contract in a later chunk.

use std::num::NonZeroU64;

use serde_json::{Value, json};
use strait_tensor::Dtype;

use crate::support::{Rig, bytes_of, f64s, guest};

/// Above `move_min_bytes`: inputs are windows.
const MOVED: usize = 100_000;
/// Below it: they are copies.
const COPIED: usize = 700;

fn rig(chunk_rows: u64) -> Rig {
    Rig::with(|config| {
        config.engine.chunk_rows = NonZeroU64::new(chunk_rows);
        config.limits.guest_bytes = 32 << 20;
    })
}

/// Of many magnitudes, with what is not finite here and there.
pub(crate) fn values(n: usize) -> Vec<f64> {
    let value = |i: usize| match i % 1013 {
        7 => f64::NAN,
        400 => f64::INFINITY,
        401 => f64::NEG_INFINITY,
        500 => -0.0,
        _ => ((i * 7919) % 1009) as f64 * [1e-3, 0.1, 1.0, 1e5][i % 4] - 400.0,
    };
    (0..n).map(value).collect()
}

fn put(rig: &Rig, name: &str, values: &[f64], shape: &[u64]) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    rig.put(name, Dtype::Float64, shape, &bytes);
}

/// What a call gives: its outputs and its notes.
#[derive(PartialEq)]
struct Given {
    outputs: Vec<Vec<u8>>,
    notes: Vec<(String, String)>,
}

/// What each of `calls` gives.
fn results(rig: &Rig, calls: &[Value]) -> Vec<Given> {
    for (name, n) in [("moved", MOVED), ("copied", COPIED)] {
        put(rig, name, &values(n), &[n as u64]);
        let x: Vec<f64> = values(n).into_iter().filter(|x| x.is_finite()).collect();
        let rows = x.len() / 5;
        let matrix = format!("{name}-matrix");
        put(rig, &matrix, &x[..rows * 5], &[rows as u64, 5]);
    }
    put(rig, "taps", &[0.5, -1.25, 3.0, 0.125, 7.0], &[5]);
    let result = |call: &Value| {
        let invoked = rig.invoke(call.clone()).unwrap();
        let results = invoked.results.iter();
        Given {
            outputs: results.map(|r| bytes_of(r.segment().unwrap())).collect(),
            notes: invoked.report.notes.clone(),
        }
    };
    calls.iter().map(result).collect()
}

#[test]
fn standard_kernels_give_the_same_bits_chunk_by_chunk() {
    let kernels = [
        ("scale-shift", json!({"a": 1.5, "b": -3.0})),
        ("clip", json!({"lo": -100.0, "hi": 250.0})),
        ("cast", json!({"to": "bfloat16"})),
        ("cumsum", json!({})),
        ("rolling-mean", json!({"window": 12})),
        ("rolling-mean", json!({"window": 500})),
        ("zscore-running", json!({})),
        ("fir", json!({})),
        ("histogram", json!({"bins": 40, "lo": -300.0, "hi": 5000})),
        // It does not stream, and comes whole.
        ("zscore", json!({"axis": 0})),
    ];
    let mut calls = Vec::new();
    for x in ["moved", "copied", "moved-matrix", "copied-matrix"] {
        for (kernel, parameters) in &kernels {
            let mut inputs = json!({"x": x});
            if *kernel == "fir" {
                inputs["taps"] = json!("taps");
            }
            calls.push(json!({"kernel": kernel, "inputs": inputs, "parameters": parameters}));
        }
        if !x.ends_with("matrix") {
            calls.push(json!({"kernel": "filter-finite", "inputs": {"x": x}}));
        }
    }
    let at_once = results(&rig(u64::MAX), &calls);
    for chunk_rows in [1, 97, 4096] {
        let cut = results(&rig(chunk_rows), &calls);
        for ((call, cut), at_once) in calls.iter().zip(&cut).zip(&at_once) {
            assert!(cut == at_once, "{chunk_rows} rows at a time: {call}");
        }
    }
}

#[test]
fn no_rows_and_scalars() {
    let rig = rig(3);
    put(&rig, "empty", &[], &[0, 4]);
    put(&rig, "one", &[3.5], &[]);
    let y = |call: Value| {
        let invoked = rig.invoke(call).unwrap();
        f64s(&bytes_of(invoked.results[0].segment().unwrap()))
    };
    assert!(y(json!({"kernel": "cumsum", "inputs": {"x": "empty"}})).is_empty());
    assert_eq!(
        y(json!({"kernel": "scale-shift", "inputs": {"x": "one"}, "parameters": {"a": 2}})),
        [7.0]
    );
    let counts = json!({"kernel": "histogram", "inputs": {"x": "empty"}, "parameters": {"bins": 2, "lo": 0.0, "hi": 1.0}});
    assert_eq!(y(counts), [0.0, 0.0], "two int64 zeros");
}

/// Copies what its records say is there, but for the last row of each chunk that is not the last: that one comes again.
/// Traps if a chunk has more rows than it should, or if the last one does not say so.
const ECHO: &str = r"
    ;; It streams.
    (func $word (param $record i64) (param $at i32) (result i64)
      (i64.load (i32.add (i32.wrap_i64 (local.get $record)) (local.get $at))))
    (func $step (param $mode i32) (result i32) (local $rows i64)
      (local.set $rows (call $word (global.get $in) (i32.const 8)))
      (if (i64.gt_u (local.get $rows) (i64.const 31)) (then unreachable))
      (if (i32.ne (local.get $mode)
            (i64.eq (i64.shl (i64.add (call $word (global.get $in) (i32.const 0)) (local.get $rows)) (i64.const 3))
              (global.get $bytes)))
        (then unreachable))
      (if (i32.eqz (local.get $mode)) (then (local.set $rows (i64.sub (local.get $rows) (i64.const 1)))))
      (memory.copy
        (i32.wrap_i64 (i64.add (global.get $y) (call $word (global.get $out) (i32.const 16))))
        (i32.wrap_i64 (i64.add (global.get $x) (call $word (global.get $in) (i32.const 16))))
        (i32.wrap_i64 (i64.mul (local.get $rows) (i64.const 8))))
      (call $moved (global.get $in) (local.get $rows))
      (call $moved (global.get $out) (local.get $rows))
      i32.const 0)";

#[test]
fn rows_that_were_not_consumed_come_again() {
    let rig = rig(30);
    let echo = guest::component("echo", ECHO);
    rig.host.own_caller().load_plugin(&echo).unwrap();
    for n in [MOVED, COPIED, 30, 1] {
        let x = bytes_of(&rig.put_f64("x", &values(n)));
        let invoked = rig.invoke(json!({"kernel": "echo/k", "inputs": {"x": "x"}}));
        let y = bytes_of(invoked.unwrap().results[0].segment().unwrap());
        assert!(y == x, "{n}");
    }
}

#[test]
fn what_goes_wrong_in_a_later_chunk_ends_as_in_the_first() {
    let rig = rig(30);
    let x = rig.put_f64("x", &values(MOVED));
    let bytes = bytes_of(&x);
    let later = |what: &str| {
        format!(
            ";; It streams.
            (func $later (result i32) (i64.gt_u (i64.load (i32.wrap_i64 (global.get $in))) (i64.const 90)))
            (func $run (param i32) (result i32) (if (call $later) (then {what})) i32.const 0)"
        )
    };
    rig.host
        .own_caller()
        .load_plugin(&guest::component("echo", ECHO))
        .unwrap();
    let cases = [
        ("trap", later("unreachable"), "GUEST_TRAP"),
        ("spin", later("(loop $ever (br $ever))"), "DEADLINE"),
        ("fail", later("(return (i32.const 1))"), "KERNEL_FAILED"),
        ("three", later("(return (i32.const 3))"), "BAD_ANSWER"),
        (
            "store",
            later("(i64.store (i32.wrap_i64 (global.get $x)) (i64.const -1))"),
            "INPUT_WRITTEN",
        ),
        (
            "fill",
            later("(memory.fill (i32.wrap_i64 (global.get $x)) (i32.const 1) (i32.const 64))"),
            "INPUT_WRITTEN",
        ),
        (
            "consumes-more",
            ";; It streams.
            (func $step (param i32) (result i32)
              (call $moved (global.get $in) (i64.add (i64.load (i32.wrap_i64 (global.get $in))) (i64.const 1))) i32.const 0)"
                .to_owned(),
            "BAD_ANSWER",
        ),
        (
            "writes-too-few",
            ";; It streams.
            (func $step (param i32) (result i32)
              (call $moved (global.get $out) (i64.const 1)) i32.const 0)"
                .to_owned(),
            "BAD_ANSWER",
        ),
    ];
    let echo = || {
        let invoked = rig.invoke(json!({"kernel": "echo/k", "inputs": {"x": "x"}}));
        bytes_of(invoked.unwrap().results[0].segment().unwrap())
    };
    (0..2).for_each(|_| drop(echo()));
    for (name, text, reason) in cases {
        let component = guest::component(name, &text);
        rig.host.own_caller().load_plugin(&component).unwrap();
        // It ends after the next request has an instance ready, or none.
        let before = rig.holdings();
        let call = json!({"kernel": format!("{name}/k"), "inputs": {"x": "x"}, "deadline_ms": if reason == "DEADLINE" { 300 } else { 60_000 }});
        let status = match rig.invoke(call) {
            Err(status) => status,
            Ok(_) => panic!("{name} gave a result"),
        };
        assert_eq!(status.reason.name(), reason, "{name}: {status}");
        assert!(bytes_of(&x) == bytes, "{name} changed its input");
        rig.check_holdings(&before, name);
        assert!(echo() == bytes, "the next request after {name}");
    }
}
