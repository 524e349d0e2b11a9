//! Kernels of a pipeline that run at once (`engine.link_bytes`): the same bits as one after the other, nothing copied, and guests that go
//! wrong while others wait for them.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use strait::session::Invoked;
use strait_tensor::Dtype;

use crate::chunks::values;
use crate::support::{Rig, bytes_of, guest};

/// Rows of float64: several links of any size.
const ROWS: usize = 700_001;

fn rig(link_bytes: u64) -> Rig {
    Rig::with(|config| {
        config.engine.link_bytes = link_bytes;
        config.limits.guest_bytes = 64 << 20;
    })
}

fn put(rig: &Rig) {
    let x = values(ROWS);
    rig.put_f64("x", &x);
    let bytes: Vec<u8> = x[..ROWS / 7 * 7]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    rig.put("matrix", Dtype::Float64, &[ROWS as u64 / 7, 7], &bytes);
    let halves: Vec<u8> = (0..=250).cycle().take(ROWS).collect();
    rig.put("bytes", Dtype::Uint8, &[ROWS as u64], &halves);
    rig.put_f64("taps", &[0.5, -1.25, 3.0, 0.125, 7.0]);
    rig.put_f64("few", &x[..20]);
    rig.put_f64("none", &[]);
}

fn outputs(invoked: &Invoked) -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let results = invoked.results.iter();
    results
        .map(|result| {
            let segment = result.segment().unwrap();
            let shape = segment.tensors()[0].spec.shape.clone();
            (result.port.clone(), shape, bytes_of(segment))
        })
        .collect()
}

/// How many links a run had: files that two stages saw.
fn links(invoked: &Invoked) -> usize {
    let mut seen: HashMap<_, Vec<&str>> = HashMap::new();
    for pages in &invoked.report.pages {
        if let Some(inode) = pages.inode {
            seen.entry(inode)
                .or_default()
                .push(pages.port.split('.').next().unwrap());
        }
    }
    let kept: Vec<_> = invoked
        .results
        .iter()
        .filter_map(|result| Some(result.segment()?.inode()))
        .collect();
    let shared = seen.iter().filter(|(inode, stages)| {
        !kept.contains(inode) && stages.iter().any(|stage| *stage != stages[0])
    });
    shared.count()
}

fn pipelines() -> Vec<Value> {
    let mut calls = Vec::new();
    for text in [
        "clip(lo=-100, hi=250) | scale-shift(a=1.5, b=-3) | cast(to=bfloat16)",
        "scale-shift(a=2) | cumsum | clip(hi=1000)",
        "rolling-mean(window=500) | zscore-running | scale-shift(b=1)",
        "cast(to=float32) | scale-shift(a=3) | cast(to=float64) | cumsum | cast(to=float32) | scale-shift",
        "clip(lo=0, hi=1) | histogram(bins=40, lo=-300, hi=5000)",
        // It does not stream: what is before it and after it runs without it.
        "clip(lo=-1000, hi=1000) | scale-shift | zscore(axis=0) | scale-shift(a=2) | clip(hi=3)",
    ] {
        for x in ["x", "matrix", "few", "none"] {
            if x == "none" && text.contains("zscore(") {
                continue;
            }
            calls.push(json!({"kernel": text, "inputs": {"x": x}}));
        }
    }
    for text in [
        // Data decide how much comes out.
        "filter-finite | scale-shift(a=2) | cumsum",
        "scale-shift(a=2) | filter-finite | rolling-mean(window=3) | filter-finite | clip(lo=0)",
        "filter-finite | zscore(axis=0) | scale-shift | filter-finite | cumsum",
    ] {
        for x in ["x", "few"] {
            calls.push(json!({"kernel": text, "inputs": {"x": x}}));
        }
    }
    calls.push(json!({"kernel": "cast(to=float32) | scale-shift(a=0.1) | cast(to=float8_e4m3fn)", "inputs": {"x": "bytes"}}));
    calls.push(
        json!({"kernel": "clip(hi=250) | fir | scale-shift", "inputs": {"x": "x", "taps": "taps"}}),
    );
    calls
}

#[test]
fn the_same_bits_come_out_whatever_lies_between() {
    let calls = pipelines();
    let run = |link_bytes| {
        let rig = rig(link_bytes);
        put(&rig);
        let before = rig.holdings();
        let given: Vec<_> = calls
            .iter()
            .map(|call| {
                let mut call = call.clone();
                call["verify"] = json!(true);
                let invoked = rig.invoke(call.clone());
                let invoked = invoked.unwrap_or_else(|status| panic!("{call}: {status}"));
                let notes = invoked.report.notes.clone();
                (
                    outputs(&invoked),
                    notes,
                    links(&invoked),
                    invoked.report.copied_bytes,
                )
            })
            .collect();
        rig.check_holdings(&before, "pipelines");
        given
    };
    let one_by_one = run(0);
    for link_bytes in [64 << 10, 128 << 10, 1 << 20] {
        let at_once = run(link_bytes);
        for ((call, one_by_one), at_once) in calls.iter().zip(&one_by_one).zip(&at_once) {
            assert!(
                at_once.0 == one_by_one.0,
                "{link_bytes} bytes between: {call}"
            );
            assert_eq!(
                at_once.1, one_by_one.1,
                "{link_bytes} bytes between: {call}"
            );
        }
        let first = &at_once[0];
        assert_eq!((first.2, first.3), (2, 0), "two links, and nothing copied");
    }
    assert_eq!(one_by_one[0].2, 2, "whole segments go from one to the next");
}

#[test]
fn a_graph_runs_at_once_as_far_as_it_can() {
    // `a` goes to two kernels of which only one streams; `b` leaves; the branches of `d` and `e` meet in nothing.
    let graph = json!({"stages": [
        {"name": "a", "kernel": "scale-shift", "parameters": {"a": 2.0}},
        {"name": "b", "kernel": "clip", "inputs": {"x": "a.y"}, "parameters": {"lo": 0.0}},
        {"name": "c", "kernel": "zscore", "inputs": {"x": "a.y"}, "parameters": {"axis": 0}},
        {"name": "d", "kernel": "scale-shift", "inputs": {"x": "c.y"}, "parameters": {"b": 1.0}},
        {"name": "e", "kernel": "cumsum", "inputs": {"x": "d.y"}},
        {"name": "f", "kernel": "clip", "inputs": {"x": "d.y"}, "parameters": {"hi": 0.5}},
    ], "outputs": {"b": "b.y", "e": "e.y", "f": "f.y"}});
    let run = |link_bytes| {
        let rig = rig(link_bytes);
        let x: Vec<f64> = values(ROWS).into_iter().filter(|x| x.is_finite()).collect();
        rig.put_f64("x", &x);
        let call = json!({"pipeline": graph, "inputs": {"x": "x"}, "verify": true});
        let invoked = rig.invoke(call).unwrap();
        let mut outputs = outputs(&invoked);
        outputs.sort();
        (outputs, invoked.report.copied_bytes)
    };
    let (one_by_one, at_once) = (run(0), run(128 << 10));
    assert!(one_by_one == at_once);
    assert_eq!(at_once.1, 0);
}

/// Functions of a guest that streams: what its records say.
const WORDS: &str = r"
    ;; It streams.
    (func $word (param $record i64) (param $at i32) (result i64)
      (i64.load (i32.add (i32.wrap_i64 (local.get $record)) (local.get $at))))
    (func $input (result i32)
      (i32.wrap_i64 (i64.add (global.get $x) (call $word (global.get $in) (i32.const 16)))))";

/// Passes rows on, as many as there is room for; `before` runs before that.
fn passes(before: &str) -> String {
    format!(
        r"{WORDS}
        (func $step (param $mode i32) (result i32) (local $rows i64) (local $room i64)
          {before}
          (local.set $rows (call $word (global.get $in) (i32.const 8)))
          (local.set $room (call $word (global.get $out) (i32.const 8)))
          (if (i64.gt_u (local.get $rows) (local.get $room)) (then (local.set $rows (local.get $room))))
          (memory.copy
            (i32.wrap_i64 (i64.add (global.get $y) (call $word (global.get $out) (i32.const 16))))
            (call $input)
            (i32.wrap_i64 (i64.mul (local.get $rows) (i64.const 8))))
          (call $moved (global.get $in) (local.get $rows))
          (call $moved (global.get $out) (local.get $rows))
          (i32.shl (i64.lt_u (local.get $rows) (call $word (global.get $in) (i32.const 8))) (i32.const 1)))"
    )
}

/// Takes nothing before the last chunk: it has to have all of it.
const HOARDS: &str = r"
    (if (i32.eqz (local.get $mode)) (then (return (i32.const 0))))";

fn load(rig: &Rig, name: &str, text: &str) {
    rig.me().load_plugin(&guest::component(name, text)).unwrap();
}

#[test]
fn a_kernel_that_needs_all_rows_at_once_gets_them() {
    let rig = rig(128 << 10);
    load(&rig, "hoards", &passes(HOARDS));
    load(&rig, "passes", &passes(""));
    let x = rig.put_f64("x", &values(ROWS));
    let before = rig.holdings();
    for text in [
        "passes/k | hoards/k",
        "passes/k | passes/k | hoards/k | passes/k",
    ] {
        let invoked = rig
            .invoke(json!({"kernel": text, "inputs": {"x": "x"}}))
            .unwrap();
        assert!(outputs(&invoked)[0].2 == bytes_of(&x), "{text}");
    }
    rig.check_holdings(&before, "kernels that stall");
}

#[test]
fn rows_that_are_left_unconsumed_come_again() {
    // It leaves all but one row, as long as others may come, and a chunk of one row it takes.
    const LAZY: &str = r"
        (if (i32.eqz (local.get $mode)) (then
          (i64.store (i32.wrap_i64 (i64.add (global.get $y) (call $word (global.get $out) (i32.const 16))))
            (i64.load (call $input)))
          (call $moved (global.get $in) (i64.const 1))
          (call $moved (global.get $out) (i64.const 1))
          (return (i32.const 0))))";
    // Three of a thousand rows are left each time: the link fills up, and what is left moves to its front.
    const KEEPS: &str = r"
        (if (i32.and (i32.eqz (local.get $mode)) (i64.gt_u (call $word (global.get $in) (i32.const 8)) (i64.const 1000))) (then
          (i64.store offset=8 (i32.wrap_i64 (global.get $in))
            (i64.sub (call $word (global.get $in) (i32.const 8)) (i64.const 3)))))";
    let rig = rig(64 << 10);
    load(&rig, "keeps", &passes(KEEPS));
    load(&rig, "lazy", &passes(LAZY));
    load(&rig, "passes", &passes(""));
    let x = rig.put_f64("x", &values(50_000));
    for (text, copies) in [
        ("passes/k | keeps/k | passes/k", true),
        ("passes/k | lazy/k", true),
    ] {
        let invoked = rig
            .invoke(json!({"kernel": text, "inputs": {"x": "x"}}))
            .unwrap();
        assert!(outputs(&invoked)[0].2 == bytes_of(&x), "{text}");
        assert_eq!(
            invoked.report.copied_bytes > 0,
            copies,
            "{text}: {}",
            invoked.report.copied_bytes
        );
    }
}

#[test]
fn one_that_goes_wrong_late_is_named_and_ends_all() {
    let rig = rig(128 << 10);
    load(&rig, "passes", &passes(""));
    let x = rig.put_f64("x", &values(ROWS));
    let bytes = bytes_of(&x);
    let later = |what: &str| {
        passes(&format!(
            "(if (i64.gt_u (call $word (global.get $in) (i32.const 0)) (i64.const 300000)) (then {what}))"
        ))
    };
    let good = || {
        let invoked =
            rig.invoke(json!({"kernel": "passes/k | passes/k | passes/k", "inputs": {"x": "x"}}));
        assert!(outputs(&invoked.unwrap())[0].2 == bytes);
    };
    (0..2).for_each(|_| good());
    for (name, text, reason) in [
        ("trap", later("unreachable"), "GUEST_TRAP"),
        ("spin", later("(loop $ever (br $ever))"), "DEADLINE"),
        ("fail", later("(return (i32.const 1))"), "KERNEL_FAILED"),
        ("three", later("(return (i32.const 3))"), "BAD_ANSWER"),
        (
            "store",
            later("(i64.store (call $input) (i64.const -1))"),
            "INPUT_WRITTEN",
        ),
        (
            "fill",
            later("(memory.fill (call $input) (i32.const 1) (i32.const 64))"),
            "INPUT_WRITTEN",
        ),
        (
            "copy",
            later("(memory.copy (call $input) (i32.const 0) (i32.const 8))"),
            "INPUT_WRITTEN",
        ),
        (
            "takes-more",
            later("(call $moved (global.get $in) (i64.const 1000000)) (return (i32.const 0))"),
            "BAD_ANSWER",
        ),
        (
            "gives-more",
            later("(call $moved (global.get $out) (i64.const 1000000)) (return (i32.const 0))"),
            "BAD_ANSWER",
        ),
        ("stands", later("(return (i32.const 2))"), "BAD_ANSWER"),
    ] {
        load(&rig, name, &text);
        let before = rig.holdings();
        for (stage, others) in [
            (1, "K | passes/k | passes/k"),
            (2, "passes/k | K | passes/k"),
            (3, "passes/k | passes/k | K"),
        ] {
            let text = others.replace('K', &format!("{name}/k"));
            let deadline = if reason == "DEADLINE" { 500 } else { 60_000 };
            let call = json!({"kernel": text, "inputs": {"x": "x"}, "deadline_ms": deadline});
            let status = match rig.invoke(call) {
                Err(status) => status,
                Ok(_) => panic!("{text} gave a result"),
            };
            assert_eq!(status.reason.name(), reason, "{text}: {status}");
            assert_eq!(status.details["stage"], json!(stage), "{text}: {status}");
            assert!(
                status.message.starts_with(&format!("stage {stage} ")),
                "{text}: {status}"
            );
            if reason == "INPUT_WRITTEN" {
                assert_eq!(status.details["port"], json!("x"), "{text}: {status}");
            }
        }
        assert!(bytes_of(&x) == bytes, "{name} changed its input");
        rig.check_holdings(&before, name);
        good();
    }
}

#[test]
fn a_cancel_ends_all_kernels() {
    let rig = rig(128 << 10);
    load(&rig, "passes", &passes(""));
    load(&rig, "spin", &passes("(loop $ever (br $ever))"));
    rig.put_f64("x", &values(ROWS));
    let call = json!({"kernel": "passes/k | spin/k | passes/k", "inputs": {"x": "x"}});
    drop(
        rig.invoke(json!({"kernel": "passes/k | passes/k", "inputs": {"x": "x"}}))
            .unwrap(),
    );
    let before = rig.holdings();
    let (started, receive) = rig.start(call);
    while rig.stats()["running"] != json!(1) {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Past the stages' `open`, or before it: it ends either way.
    std::thread::sleep(Duration::from_millis(100));
    started.cancel();
    let status = match receive.recv().unwrap() {
        Err(status) => status,
        Ok(_) => panic!("it gave a result"),
    };
    assert_eq!(status.reason.name(), "CANCELLED", "{status}");
    drop(started);
    rig.check_holdings(&before, "a cancelled pipeline");
}
