//! Every way in which wasm can store into an input: each ends in INPUT_WRITTEN, the input is
//! unchanged, and the next call is right.
//!
//! One guest has a function for each way; the first element of its input says which one it takes.

use std::fmt::Write;

use serde_json::json;
use strait::error::Code;

use crate::support::{Rig, bytes_of, guest};

/// A little more than `move_min_bytes`: the input is a window.
const ELEMENTS: usize = 70_000;
const BYTES: usize = ELEMENTS * 8;

/// The ways, as (what it is, the body of a function without parameters and results).
/// `$x` and `$y` are the addresses of input and output as `i32`.
fn ways() -> Vec<(String, String)> {
    let mut ways = Vec::new();
    let mut way = |name: String, body: String| ways.push((name, body));
    let values = [
        ("i32.store", "(i32.const -1)"),
        ("i32.store8", "(i32.const -1)"),
        ("i32.store16", "(i32.const -1)"),
        ("i64.store", "(i64.const -1)"),
        ("i64.store8", "(i64.const -1)"),
        ("i64.store16", "(i64.const -1)"),
        ("i64.store32", "(i64.const -1)"),
        ("f32.store", "(f32.const -1)"),
        ("f64.store", "(f64.const -1)"),
        ("v128.store", "(v128.const i32x4 -1 -1 -1 -1)"),
    ];
    // Aligned, not aligned, over a page's end, over a window's start, at its very end.
    let end = i64::try_from(BYTES).unwrap() - 16;
    let places = [8192, 8193, 4095, -1, end];
    for (store, value) in values {
        for place in places {
            // One byte before the window is none in it.
            if place < 0 && store.ends_with("store8") {
                continue;
            }
            way(
                format!("{store} at {place}"),
                format!("({store} align=1 (i32.add (global.get $x4) (i32.const {place})) {value})"),
            );
        }
        way(
            format!("{store} with a static offset"),
            format!("({store} offset=65536 (global.get $x4) {value})"),
        );
    }
    for (bits, lanes) in [(8, 16), (16, 8), (32, 4), (64, 2)] {
        for lane in 0..lanes {
            way(
                format!("v128.store{bits}_lane {lane}"),
                format!(
                    "(v128.store{bits}_lane align=1 {lane} (i32.add (global.get $x4) (i32.const 4099)) (v128.const i32x4 -1 -1 -1 -1))"
                ),
            );
        }
    }
    for bytes in 1..=256 {
        for (place, from) in [(8192, 0), (4090, 1)] {
            let to = format!("(i32.add (global.get $x4) (i32.const {place}))");
            way(
                format!("memory.copy of {bytes} to {place}"),
                format!(
                    "(memory.copy {to} (i32.add (global.get $y4) (i32.const {from})) (i32.const {bytes}))"
                ),
            );
            way(
                format!("memory.init of {bytes} to {place}"),
                format!("(memory.init $ones {to} (i32.const {from}) (i32.const {bytes}))"),
            );
            way(
                format!("memory.fill of {bytes} at {place}"),
                format!("(memory.fill {to} (i32.const 255) (i32.const {bytes}))"),
            );
        }
    }
    for bytes in [1, 2, 16, 100, 129, 300, 65_536, BYTES] {
        let to = "(i32.add (global.get $x4) (i32.const 3))";
        // A length that the compiler does not know.
        let length = format!(
            "(i32.add (global.get $zero) (i32.const {}))",
            bytes.min(BYTES - 3)
        );
        way(
            format!("memory.copy of a computed {bytes}"),
            format!("(memory.copy {to} (global.get $y4) {length})"),
        );
        way(
            format!("memory.fill of a computed {bytes}"),
            format!("(memory.fill {to} (i32.const 7) {length})"),
        );
        if bytes <= 300 {
            way(
                format!("memory.init of a computed {bytes}"),
                format!("(memory.init $ones {to} (i32.const 0) {length})"),
            );
        }
        way(
            format!("memory.copy of {bytes} within the input"),
            format!(
                "(memory.copy (global.get $x4) (i32.add (global.get $x4) (i32.const 3)) {length})"
            ),
        );
    }
    // From before the window into it, and from it out.
    way(
        "memory.copy over the window's start".into(),
        "(memory.copy (i32.sub (global.get $x4) (i32.const 8)) (global.get $y4) (i32.const 16))"
            .into(),
    );
    way(
        "memory.fill over the window's end".into(),
        format!(
            "(memory.fill (i32.add (global.get $x4) (i32.const {})) (i32.const 1) (i32.const 64))",
            BYTES.next_multiple_of(65_536) - 32
        ),
    );
    ways
}

/// A guest whose `run` takes the way that the first element of its input names, then ends as `then` says.
fn scribbler(name: &str, ways: &[(String, String)], then: &str) -> Vec<u8> {
    let mut text = String::from(
        "(global $x4 (mut i32) (i32.const 0)) (global $y4 (mut i32) (i32.const 0)) (global $zero (mut i32) (i32.const 0))\n",
    );
    writeln!(text, "(data $ones \"{}\")", "\\ff".repeat(320)).unwrap();
    writeln!(text, "(type $way (func))").unwrap();
    let mut names = String::new();
    for (index, (_, body)) in ways.iter().enumerate() {
        writeln!(text, "(func $way{index} {body})").unwrap();
        write!(names, " $way{index}").unwrap();
    }
    writeln!(text, "(table funcref (elem{names}))").unwrap();
    writeln!(
        text,
        r"(func $run (param i32) (result i32)
            (global.set $x4 (i32.wrap_i64 (global.get $x)))
            (global.set $y4 (i32.wrap_i64 (global.get $y)))
            (call_indirect (type $way) (i32.trunc_f64_u (f64.load (global.get $x4))))
            {then}
            i32.const 0)"
    )
    .unwrap();
    guest::component(name, &text)
}

fn input(way: usize) -> Vec<f64> {
    let mut values: Vec<f64> = (0..ELEMENTS).map(|i| i as f64 * 0.5).collect();
    values[0] = way as f64;
    values
}

#[test]
fn every_store_into_an_input_is_refused() {
    let rig = Rig::new();
    let ways = ways();
    rig.host
        .own_caller()
        .load_plugin(&scribbler("scribbler", &ways, ""))
        .unwrap();
    let copies = std::fs::read_to_string("tests/guests/copies.wat").unwrap();
    rig.host
        .own_caller()
        .load_plugin(&guest::component("copies", &copies))
        .unwrap();
    for (way, (name, _)) in ways.iter().enumerate() {
        let x = rig.put_f64("x", &input(way));
        let before = bytes_of(&x);
        let status = rig
            .invoke(json!({"kernel": "scribbler/k", "inputs": {"x": "x"}}))
            .err()
            .unwrap_or_else(|| panic!("{name}: it was served"));
        assert_eq!(
            (status.code, status.reason.name(), &status.details["port"]),
            (Code::Internal, "INPUT_WRITTEN", &json!("x")),
            "{name}: {status}"
        );
        let dirtied = status.details["dirtied_bytes"].as_u64().unwrap();
        assert!(dirtied <= 2 << 20, "{name} dirtied {dirtied} bytes");
        // What wasmtime knows to trap is told where it happened.
        if name.contains("store") {
            assert!(
                status.backtrace.is_some() && dirtied == 0,
                "{name}: {status:?}"
            );
        }
        assert!(bytes_of(&x) == before, "{name} changed its input");
        let next = rig
            .invoke(json!({"kernel": "copies/k", "inputs": {"x": "x"}}))
            .unwrap_or_else(|e| panic!("after {name}: {e}"));
        assert!(
            bytes_of(next.results[0].segment().unwrap()) == before,
            "the next call after {name}"
        );
    }
    assert!(ways.len() > 1_500, "{} ways", ways.len());
}

#[test]
fn what_rustc_makes_of_a_copy_into_an_input_is_refused() {
    const WAYS: usize = 148;
    let rig = Rig::new();
    let plugin = std::fs::read("plugins/prebuilt/tests/input-writer.wasm").unwrap();
    rig.host.own_caller().load_plugin(&plugin).unwrap();
    let x = rig.put_f64("x", &input(0));
    let before = bytes_of(&x);
    let call = |way: usize| {
        let call =
            json!({"kernel": "write-input", "inputs": {"x": "x"}, "parameters": {"way": way}});
        rig.invoke(call).unwrap_err()
    };
    for way in 0..WAYS {
        let status = call(way);
        assert_eq!(status.reason, "INPUT_WRITTEN", "{way}: {status}");
        assert!(bytes_of(&x) == before, "way {way} changed its input");
        let next = rig
            .invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}}))
            .unwrap();
        assert!(
            bytes_of(next.results[0].segment().unwrap()) == before,
            "the next call after way {way}"
        );
    }
    assert_eq!(call(WAYS).reason, "BAD_PARAMETER", "there are more ways");
}

#[test]
fn a_guest_does_not_go_on_after_a_store_that_is_no_trap() {
    let rig = Rig::with(|config| config.limits.deadline_ms_default = 600_000);
    let fill = format!("(memory.fill (global.get $x4) (i32.const 255) (i32.const {BYTES}))");
    let copy = "(memory.copy (global.get $x4) (global.get $y4) (i32.const 8))".to_owned();
    let ways = [("fill".to_owned(), fill), ("copy".to_owned(), copy)];
    // Without an end of its own: only the epoch check behind the store ends it before the deadline.
    rig.host
        .own_caller()
        .load_plugin(&scribbler("endless", &ways, "(loop $l (br $l))"))
        .unwrap();
    for way in 0..ways.len() {
        rig.put_f64("x", &input(way));
        let status = rig
            .invoke(json!({"kernel": "endless/k", "inputs": {"x": "x"}}))
            .unwrap_err();
        assert_eq!(status.reason, "INPUT_WRITTEN", "{status}");
        assert!(status.backtrace.is_some(), "{status:?}");
        let dirtied = status.details["dirtied_bytes"].as_u64().unwrap();
        assert!((1..=2 << 20).contains(&dirtied), "{dirtied} bytes");
    }
}

#[test]
fn the_scrap_of_one_invocation_is_not_seen_by_the_next() {
    let rig = Rig::new();
    // Traps when it finds anything in its fresh scrap, and leaves something there.
    let ways = [(
        "peek".to_owned(),
        "(local $seen i32)
         (memory.copy (i32.add (global.get $x4) (i32.const 64)) (global.get $y4) (i32.const 8))
         (local.set $seen (i32.load (i32.add (global.get $x4) (i32.const 4096))))
         (if (local.get $seen) (then unreachable))
         (memory.fill (i32.add (global.get $x4) (i32.const 4096)) (i32.const 255) (i32.const 64))"
            .to_owned(),
    )];
    rig.host
        .own_caller()
        .load_plugin(&scribbler("peeks", &ways, ""))
        .unwrap();
    for _ in 0..3 {
        rig.put_f64("x", &input(0));
        let status = rig
            .invoke(json!({"kernel": "peeks/k", "inputs": {"x": "x"}}))
            .unwrap_err();
        assert_eq!(status.reason, "INPUT_WRITTEN", "{status}");
        assert_eq!(status.backtrace, None, "it saw another's scrap: {status:?}");
    }
}

/// A guest with two inputs that stores into both of them in the way that the first element of `x` names.
const SEVERAL: &str = r"
(func $run (param i32) (result i32) (local $a i32) (local $b i32) (local $n i32) (local $way i32)
  (local.set $a (i32.wrap_i64 (global.get $x)))
  (local.set $b (i32.wrap_i64 (global.get $x2)))
  (local.set $n (i32.wrap_i64 (global.get $bytes)))
  (local.set $way (i32.trunc_f64_s (f64.load (local.get $a))))
  ;; Fills both and reads back what it wrote.
  (if (i32.eq (local.get $way) (i32.const 0)) (then
    (memory.fill (local.get $a) (i32.const 7) (local.get $n))
    (memory.fill (local.get $b) (i32.const 9) (local.get $n))
    (memory.copy (i32.wrap_i64 (global.get $y)) (local.get $a) (local.get $n))
    (memory.copy (i32.wrap_i64 (global.get $y2)) (local.get $b) (local.get $n))
    (return (i32.const 0))))
  ;; One store over the border between what lies before the second window and the window; then fails.
  (if (i32.eq (local.get $way) (i32.const 1)) (then
    (memory.fill (i32.sub (local.get $b) (i32.const 65536)) (i32.const 7) (i32.const 131072))
    (return (i32.const 1))))
  ;; A short copy from one input to the other, then a trap.
  (if (i32.eq (local.get $way) (i32.const 2)) (then
    (memory.copy (local.get $b) (i32.add (local.get $a) (i32.const 64)) (i32.const 16))
    (unreachable)))
  ;; Likewise over the border, then growth and no end.
  (if (i32.eq (local.get $way) (i32.const 3)) (then
    (memory.copy (i32.sub (local.get $b) (i32.const 8)) (local.get $a) (i32.const 16))
    (drop (memory.grow (i32.const 3)))
    (loop $l (br $l))))
  ;; One that is no trap, then one that is.
  (if (i32.eq (local.get $way) (i32.const 4)) (then
    (memory.fill (local.get $a) (i32.const 1) (i32.const 1))
    (i64.store (local.get $b) (i64.const 5))
    (return (i32.const 0))))
  ;; More memory than it may have, after a store.
  (if (i32.eq (local.get $way) (i32.const 5)) (then
    (memory.fill (local.get $b) (i32.const 1) (i32.const 1))
    (drop (memory.grow (i32.const 60000)))
    (return (i32.const 0))))
  ;; Until its stack is full.
  (if (i32.eq (local.get $way) (i32.const 6)) (then
    (memory.fill (local.get $b) (i32.const 1) (i32.const 1))
    (return (i32.add (i32.const 1) (call $deeper (i32.const 0))))))
  ;; An answer that there is not.
  (memory.fill (local.get $b) (i32.const 1) (i32.const 1))
  (i32.const 7))
(func $deeper (param i32) (result i32)
  (i32.add (i32.const 1) (call $deeper (i32.add (local.get 0) (i32.const 1)))))";

#[test]
fn stores_into_several_inputs_however_the_guest_ends() {
    const WAYS: usize = 8;
    let rig = Rig::new();
    rig.host
        .own_caller()
        .load_plugin(&guest::component("several", SEVERAL))
        .unwrap();
    for way in 0..WAYS {
        let x = rig.put_f64("x", &input(way));
        let z = rig.put_f64("z", &input(WAYS));
        let before = (bytes_of(&x), bytes_of(&z));
        // The same tensor twice is two windows of one segment.
        for second in ["x", "z"] {
            let call = |deadline_ms: u64| {
                let call = json!({"kernel": "several/k", "inputs": {"x": "x", "x2": second}, "deadline_ms": deadline_ms});
                rig.invoke(call).unwrap_err()
            };
            assert_eq!(call(30_000).reason, "INPUT_WRITTEN", "way {way}");
            // Whatever comes first.
            for deadline_ms in 1..=3 {
                let reason = call(deadline_ms).reason.name();
                assert!(
                    ["INPUT_WRITTEN", "DEADLINE"].contains(&reason),
                    "{way} {reason}"
                );
            }
            let after = (bytes_of(&x), bytes_of(&z));
            assert!(after == before, "way {way} changed an input");
        }
        for (name, bytes) in [("x", &before.0), ("z", &before.1)] {
            let next = rig.scale_shift(name, 1.0, 0.0);
            assert!(
                bytes_of(next.results[0].segment().unwrap()) == *bytes,
                "the next call with `{name}` after way {way}"
            );
        }
    }
}

/// What the SDK makes of a kernel's panic and of what it says when it fails.
#[test]
fn a_kernel_that_gives_up_says_where_and_with_what() {
    let plugin = std::fs::read("plugins/prebuilt/tests/input-writer.wasm").unwrap();
    let rig = Rig::new();
    rig.host.own_caller().load_plugin(&plugin).unwrap();
    rig.put_f64("x", &[1.5; ELEMENTS]);
    let call = |panic: bool| {
        let call =
            json!({"kernel": "give-up", "inputs": {"x": "x"}, "parameters": {"panic": panic}});
        rig.invoke(call).unwrap_err()
    };
    let status = call(true);
    assert_eq!(
        (status.code, status.reason.name()),
        (Code::Internal, "GUEST_TRAP")
    );
    let panic = &status.details["panic"];
    assert_eq!(panic["message"], r"70000 elements\nare too many");
    assert_eq!(panic["file"], "tests/input-writer/src/lib.rs");
    assert!(panic["line"].as_u64().unwrap() > 100, "{panic}");
    assert!(
        status
            .message
            .contains("panicked at tests/input-writer/src/lib.rs:"),
        "{status}"
    );
    assert!(status.backtrace.is_some());
    let status = call(false);
    assert_eq!(status.reason, "KERNEL_FAILED", "{status}");
    // 1.5 twice, little-endian.
    assert_eq!(status.details["diagnostic"], "AAAAAAAA+D8AAAAAAAD4Pw==");
}
