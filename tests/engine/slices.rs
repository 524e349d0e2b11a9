//! Kernels whose rows are cut into slices: the same bits for any number of them, guests that go wrong in one of them, and
//! tensors that are too large for one guest.

use serde_json::{Value, json};
use strait_memory::{Copied, InputSource};
use strait_tensor::Dtype;

use crate::support::{Rig, bytes_of, guest};

/// Odd, and enough for seven slices of 64 KiB in each dtype of one byte and more.
const ROWS: usize = 500_003;

/// Of many magnitudes, with zeros of both signs, infinities and NaNs that carry something.
fn value(i: usize) -> f64 {
    match i % 1013 {
        7 => f64::from_bits(0x7ff8_0000_dead_0000 + i as u64 % 97),
        8 => f64::from_bits(0xfff8_0000_0000_0001),
        400 => f64::INFINITY,
        401 => f64::NEG_INFINITY,
        500 => -0.0,
        _ => ((i * 7919) % 1009) as f64 * [1e-3, 0.1, 1.0, 1e5][i % 4] - 400.0,
    }
}

fn put(rig: &Rig, name: &str, dtype: Dtype, shape: &[u64]) {
    let elements = usize::try_from(shape.iter().product::<u64>()).unwrap();
    let bytes: Vec<u8> = match dtype {
        Dtype::Float64 => (0..elements).flat_map(|i| value(i).to_le_bytes()).collect(),
        #[expect(clippy::cast_possible_truncation, reason = "infinity is a value, too")]
        Dtype::Float32 => (0..elements)
            .flat_map(|i| (value(i) as f32).to_le_bytes())
            .collect(),
        _ => {
            let size = usize::try_from(dtype.size()).unwrap();
            let byte = |i: usize| (i * 31 + i / 251) % 256;
            (0..elements * size)
                .map(|i| u8::try_from(byte(i)).unwrap())
                .collect()
        }
    };
    rig.put(name, dtype, shape, &bytes);
}

/// Its only result, and how many slices it ran in.
#[track_caller]
fn called(rig: &Rig, mut call: Value, threads: Option<u32>) -> (Vec<u8>, u64) {
    if let Some(threads) = threads {
        call["threads"] = threads.into();
    }
    let invoked = rig
        .invoke(call.clone())
        .unwrap_or_else(|status| panic!("{call}: {status}"));
    let bytes = bytes_of(invoked.results[0].segment().unwrap());
    (bytes, invoked.report.slices)
}

fn with_matrices(rig: &Rig) {
    let rows = ROWS as u64;
    put(rig, "a", Dtype::Float64, &[rows / 5, 12]);
    put(rig, "b", Dtype::Float64, &[12, 9]);
}

/// Calls of every standard kernel that can be cut, on tensors that it puts.
fn calls(rig: &Rig) -> Vec<Value> {
    let rows = ROWS as u64;
    with_matrices(rig);
    let mut calls = vec![json!({"kernel": "matmul", "inputs": {"a": "a", "b": "b"}})];
    let mut add = |kernel: &str, x: &str, parameters: Value| {
        calls.push(json!({"kernel": kernel, "inputs": {"x": x}, "parameters": parameters}));
    };
    for dtype in [Dtype::Float64, Dtype::Float32] {
        for (shape, kind) in [(vec![rows], "row"), (vec![rows / 3, 3], "matrix")] {
            let name = format!("{dtype}-{kind}");
            put(rig, &name, dtype, &shape);
            add("scale-shift", &name, json!({"a": 1.5, "b": -3.0}));
            add("clip", &name, json!({"lo": -100.0, "hi": 250.0}));
            for to in ["bfloat16", "int8", "complex128"] {
                add("cast", &name, json!({"to": to}));
            }
        }
    }
    for dtype in [Dtype::Uint8, Dtype::Int16, Dtype::Bfloat16, Dtype::Float16] {
        let name = dtype.to_string();
        put(rig, &name, dtype, &[rows]);
        add("clip", &name, json!({"lo": 3, "hi": 77}));
        add("cast", &name, json!({"to": "float64"}));
    }
    calls
}

#[test]
fn any_number_of_slices_gives_the_same_bits() {
    for move_min_bytes in [512 << 10, 1, u64::MAX] {
        let rig = Rig::with(|config| config.engine.move_min_bytes = move_min_bytes);
        for call in calls(&rig) {
            let (whole, slices) = called(&rig, call.clone(), Some(1));
            assert_eq!(slices, 0, "{call}");
            let mut most = 0;
            for threads in 2..=7 {
                let (cut, slices) = called(&rig, call.clone(), Some(threads));
                assert!(cut == whole, "{threads} slices of {call}");
                assert!(slices <= threads.into(), "{slices} slices of {call}");
                most = most.max(slices);
            }
            assert!(most >= 2, "{call} was never cut");
        }
    }
}

#[test]
fn a_large_tensor_is_cut_by_itself_and_never_copied() {
    let rig = Rig::new();
    put(&rig, "x", Dtype::Float64, &[40 << 17]);
    let before = rig.stats()["slices"].as_u64().unwrap();
    let mut call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0}});
    call["verify"] = true.into();
    for _ in 0..3 {
        let invoked = rig.invoke(call.clone()).unwrap();
        let report = &invoked.report;
        assert_eq!((report.slices, report.copied_bytes), (2, 0));
        // Both slices saw pages of the one input and of the one result.
        let y = invoked.results[0].segment().unwrap().inode();
        let pages: Vec<_> = report.pages.iter().map(|p| p.port.as_str()).collect();
        assert_eq!(pages, ["x", "y"]);
        assert!(report.pages[0].inode.is_some());
        assert_eq!(report.pages[1].inode, Some(y));
    }
    call["threads"] = 1.into();
    assert_eq!(rig.invoke(call).unwrap().report.slices, 0);
    // A worker tells its counts when it next ends a run.
    put(&rig, "small", Dtype::Float64, &[10]);
    called(
        &rig,
        json!({"kernel": "scale-shift", "inputs": {"x": "small"}}),
        None,
    );
    assert_eq!(rig.stats()["slices"].as_u64().unwrap() - before, 6);
}

#[test]
fn what_cannot_be_cut_runs_whole() {
    let rig = Rig::new();
    put(&rig, "tiny", Dtype::Float64, &[100]);
    put(&rig, "scalar", Dtype::Float64, &[]);
    put(&rig, "empty", Dtype::Float64, &[0, 5]);
    put(&rig, "flat", Dtype::Float64, &[100_000, 0]);
    put(&rig, "one", Dtype::Float64, &[1, 1 << 20]);
    put(&rig, "x", Dtype::Float64, &[1 << 20]);
    for x in ["tiny", "scalar", "empty", "flat", "one"] {
        let call = json!({"kernel": "scale-shift", "inputs": {"x": x}});
        assert_eq!(called(&rig, call, Some(7)).1, 0, "{x}");
    }
    let zscore = json!({"kernel": "zscore", "inputs": {"x": "x"}, "parameters": {"axis": 0}});
    assert_eq!(called(&rig, zscore, Some(7)).1, 0);
    for threads in [0, 65, u32::MAX] {
        let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "threads": threads});
        let status = rig.invoke(call).unwrap_err();
        assert_eq!(status.reason.name(), "BAD_LIMIT", "{status}");
    }
}

/// What a guest does in slices that do not begin with row 0, whose element is not 0.
fn in_later_slices(what: &str) -> String {
    format!(
        ";; It splits.
        (func $run (param i32) (result i32)
          (if (f64.gt (f64.load (i32.wrap_i64 (global.get $x))) (f64.const 0)) (then {what}))
          (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
          i32.const 0)"
    )
}

fn load(rig: &Rig, name: &str, text: &str) {
    let component = guest::component(name, text);
    rig.host.own_caller().load_plugin(&component).unwrap();
}

#[test]
fn what_goes_wrong_in_one_slice_ends_all_and_leaves_nothing() {
    let rig = Rig::with(|config| config.limits.guest_bytes = 32 << 20);
    let values: Vec<f64> = (0..ROWS).map(|i| i as f64).collect();
    let x = rig.put_f64("x", &values);
    let bytes = bytes_of(&x);
    load(&rig, "copies", &in_later_slices(""));
    let copies = || {
        let call = json!({"kernel": "copies/k", "inputs": {"x": "x"}});
        let (y, slices) = called(&rig, call, Some(4));
        assert_eq!(slices, 4);
        assert!(y == bytes);
    };
    let cases = [
        ("trap", "unreachable", "GUEST_TRAP"),
        ("spin", "(loop $ever (br $ever))", "DEADLINE"),
        ("fail", "(return (i32.const 1))", "KERNEL_FAILED"),
        ("three", "(return (i32.const 3))", "BAD_ANSWER"),
        (
            "store",
            "(i64.store (i32.wrap_i64 (global.get $x)) (i64.const -1))",
            "INPUT_WRITTEN",
        ),
        (
            "fill",
            "(memory.fill (i32.wrap_i64 (global.get $x)) (i32.const 1) (i32.const 64))",
            "INPUT_WRITTEN",
        ),
        (
            "grow",
            "(drop (memory.grow (i32.const 2000)))",
            "LIMIT_GUEST_BYTES",
        ),
    ];
    (0..2).for_each(|_| copies());
    for (name, what, reason) in cases {
        load(&rig, name, &in_later_slices(what));
        let before = rig.holdings();
        let deadline = if reason == "DEADLINE" { 300 } else { 60_000 };
        let call = json!({"kernel": format!("{name}/k"), "inputs": {"x": "x"}, "threads": 4, "deadline_ms": deadline});
        let status = rig.invoke(call).unwrap_err();
        assert_eq!(status.reason.name(), reason, "{name}: {status}");
        // The first one that fails in the order of the rows, whichever ended first.
        assert_eq!(status.details["rows"], json!([131_072, 262_144]), "{name}");
        assert!(status.message.ends_with(" (in rows 131072 to 262144)"));
        assert!(bytes_of(&x) == bytes, "{name} changed its input");
        rig.check_holdings(&before, name);
        copies();
    }
}

#[test]
fn a_cancel_ends_all_slices() {
    let rig = Rig::new();
    rig.put_f64("x", &vec![1.0; ROWS]);
    load(&rig, "spins", &in_later_slices("(loop $ever (br $ever))"));
    let call =
        json!({"kernel": "spins/k", "inputs": {"x": "x"}, "threads": 4, "deadline_ms": 60_000});
    // What stays once a call has been there.
    let short =
        json!({"kernel": "spins/k", "inputs": {"x": "x"}, "threads": 4, "deadline_ms": 100});
    assert_eq!(rig.invoke(short).unwrap_err().reason.name(), "DEADLINE");
    let before = rig.holdings();
    let (cancel, answer) = rig.start(call);
    std::thread::sleep(std::time::Duration::from_millis(50));
    cancel.cancel();
    let status = answer.recv().unwrap().unwrap_err();
    assert_eq!(status.reason.name(), "CANCELLED");
    rig.check_holdings(&before, "a cancel");
}

#[test]
fn cpu_time_is_that_of_all_threads() {
    let rig = Rig::new();
    rig.put_f64("x", &vec![1.0; ROWS]);
    let text = ";; It splits.
        (func $run (param i32) (result i32) (local $i i32)
          (loop $again (br_if $again (i32.lt_u
            (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 200000000))))
          i32.const 0)";
    load(&rig, "burns", text);
    let used = || rig.me().stats(0).account.unwrap().cpu_seconds;
    // It is counted a moment after the answer.
    let burn = |threads: u32, at_least: f64| {
        let before = used();
        let call = json!({"kernel": "burns/k", "inputs": {"x": "x"}});
        let (_, slices) = called(&rig, call, Some(threads));
        assert_eq!(slices, if threads == 1 { 0 } else { threads.into() });
        for _ in 0..5000 {
            if used() - before > at_least {
                return used() - before;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!(
            "{} s in {threads} slices, less than {at_least}",
            used() - before
        )
    };
    let one = burn(1, 0.01);
    burn(4, 2.5 * one);
}

#[test]
fn slices_share_what_a_call_may_log() {
    let rig = Rig::with(|config| config.limits.log_bytes = 10_000);
    rig.put_f64("x", &vec![1.0; ROWS]);
    let text = r#";; It splits.
(import "strait:kernel/log-sink@0.1.0" "log" (func $log (param i32 i64 i64)))
        (func $run (param i32) (result i32)
          (call $log (i32.const 3) (i64.const 1024) (i64.const 4096))
          (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
          i32.const 0)"#;
    load(&rig, "chats", text);
    let call = |threads: u32| {
        rig.invoke(json!({"kernel": "chats/k", "inputs": {"x": "x"}, "threads": threads}))
    };
    assert_eq!(call(1).unwrap().report.slices, 0);
    assert_eq!(call(2).unwrap().report.slices, 2);
    let status = call(3).unwrap_err();
    assert_eq!(status.reason.name(), "LIMIT_LOG_BYTES", "{status}");
}

#[test]
fn slices_whose_rows_depend_on_the_data_are_refused() {
    let rig = Rig::new();
    rig.put_f64("x", &vec![1.0; ROWS]);
    let text = ";; It splits.
        (func $step (param i32) (result i32)
          (call $moved (global.get $in) (i64.load offset=8 (i32.wrap_i64 (global.get $in))))
          (call $moved (global.get $out) (i64.const 5))
          i32.const 0)
        (func $extents (result i32)
          (i32.store (i32.const 560) (i32.const 600)) (i32.store (i32.const 564) (i32.const 1))
          (i64.store (i32.const 600) (i64.const 5))
          (i64.store (i32.const 568) (i64.load (i32.const 560)))
          (i32.store (i32.const 552) (i32.const 560)) (i32.store (i32.const 556) (i32.const 1))
          i32.const 552)";
    load(&rig, "few", text);
    let call = |threads: u32| {
        rig.invoke(json!({"kernel": "few/k", "inputs": {"x": "x"}, "threads": threads}))
    };
    let whole = call(1).unwrap();
    let shape = &whole.results[0].segment().unwrap().tensors()[0].spec.shape;
    assert_eq!(shape, &[5]);
    let status = call(2).unwrap_err();
    assert_eq!(status.reason.name(), "BAD_ANSWER", "{status}");
    assert!(status.message.contains("split axis"), "{status}");
}

#[test]
fn tensors_beyond_what_a_guest_may_see_go_through_part_by_part() {
    let large = Rig::new();
    let of_large: Vec<_> = calls(&large)
        .into_iter()
        .map(|call| called(&large, call, Some(1)).0)
        .collect();
    drop(large);
    let rig = Rig::with(|config| config.limits.window_bytes = 4 << 20);
    let mut cut = 0;
    for (call, whole) in calls(&rig).into_iter().zip(of_large) {
        for threads in [None, Some(1), Some(3)] {
            let (parts, slices) = called(&rig, call.clone(), threads);
            assert!(parts == whole, "{call}");
            cut += usize::from(slices > 1);
        }
    }
    assert!(cut > 20, "{cut}");
    // A kernel that needs all of it at once.
    let call =
        json!({"kernel": "zscore", "inputs": {"x": "float64-row"}, "parameters": {"axis": 0}});
    let status = rig.invoke(call).unwrap_err();
    assert_eq!(status.reason.name(), "LIMIT_WINDOW_BYTES", "{status}");
    // Nor does it help where what comes whole is too large.
    put(&rig, "wide", Dtype::Float64, &[12, 60_000]);
    put(&rig, "few", Dtype::Float64, &[3, 12]);
    let call = json!({"kernel": "matmul", "inputs": {"a": "few", "b": "wide"}});
    let status = rig.invoke(call).unwrap_err();
    assert_eq!(status.reason.name(), "LIMIT_WINDOW_BYTES", "{status}");
}

/// Calls of every standard kernel that streams and cannot be cut, on tensors that it puts: finite and others.
fn streams(rig: &Rig) -> Vec<Value> {
    let rows = ROWS as u64;
    put(rig, "x", Dtype::Float64, &[rows]);
    put(rig, "matrix", Dtype::Float64, &[rows / 5, 7]);
    put(rig, "narrow", Dtype::Float32, &[2 * rows]);
    rig.put_f64("taps", &[0.5, -1.25, 3.0, 0.125, 7.0]);
    let mut calls = Vec::new();
    for x in ["x", "matrix", "narrow"] {
        let mut add = |kernel: &str, parameters: Value| {
            calls.push(json!({"kernel": kernel, "inputs": {"x": x}, "parameters": parameters}));
        };
        add("cumsum", json!({}));
        add("rolling-mean", json!({"window": 12}));
        add("rolling-mean", json!({"window": 5000}));
        add("zscore-running", json!({}));
        add("histogram", json!({"bins": 40, "lo": -300.0, "hi": 5000}));
        if x != "matrix" {
            add("filter-finite", json!({}));
        }
        calls.push(json!({"kernel": "fir", "inputs": {"x": x, "taps": "taps"}}));
    }
    calls
}

#[test]
fn streams_beyond_what_a_guest_may_see_go_through_with_windows_that_move_along() {
    let given = |rig: &Rig, call: &Value| {
        let invoked = rig.invoke(call.clone());
        let invoked = invoked.unwrap_or_else(|status| panic!("{call}: {status}"));
        let results = invoked.results.iter();
        let bytes: Vec<_> = results.map(|r| bytes_of(r.segment().unwrap())).collect();
        let shapes = invoked.results.iter();
        let shapes: Vec<_> = shapes
            .map(|r| r.segment().unwrap().tensors()[0].spec.shape.clone())
            .collect();
        let report = &invoked.report;
        (bytes, shapes, report.notes.clone(), report.slices)
    };
    let large = Rig::new();
    let of_large: Vec<_> = streams(&large)
        .iter()
        .map(|call| given(&large, call))
        .collect();
    drop(large);
    for move_min_bytes in [512 << 10, 1] {
        let rig = Rig::with(|config| {
            config.limits.window_bytes = 2 << 20;
            config.engine.move_min_bytes = move_min_bytes;
        });
        let calls = streams(&rig);
        for (call, whole) in calls.iter().zip(&of_large) {
            let parts = given(&rig, call);
            assert!(parts.0 == whole.0, "other bits: {call}");
            assert_eq!((&parts.1, &parts.2), (&whole.1, &whole.2), "{call}");
            assert!(parts.3 > 1 && whole.3 == 0, "{call}: {} steps", parts.3);
        }
        let before = rig.holdings();
        calls.iter().for_each(|call| drop(given(&rig, call)));
        rig.check_holdings(&before, "windows that moved along");
    }
}

#[test]
fn what_goes_wrong_where_windows_move_along_leaves_nothing() {
    let rig = Rig::with(|config| config.limits.window_bytes = 2 << 20);
    let values: Vec<f64> = (0..ROWS).map(|i| i as f64).collect();
    let x = rig.put_f64("x", &values);
    let bytes = bytes_of(&x);
    let guest = |what: &str| {
        format!(
            ";; It streams.
            (func $word (param $record i64) (param $at i32) (result i64)
              (i64.load (i32.add (i32.wrap_i64 (local.get $record)) (local.get $at))))
            (func $step (param $mode i32) (result i32) (local $rows i64)
              (if (i64.gt_u (call $word (global.get $in) (i32.const 0)) (i64.const 100000)) (then {what}))
              (local.set $rows (call $word (global.get $in) (i32.const 8)))
              (if (i64.gt_u (local.get $rows) (call $word (global.get $out) (i32.const 8)))
                (then (local.set $rows (call $word (global.get $out) (i32.const 8)))))
              (memory.copy
                (i32.wrap_i64 (i64.add (global.get $y) (call $word (global.get $out) (i32.const 16))))
                (i32.wrap_i64 (i64.add (global.get $x) (call $word (global.get $in) (i32.const 16))))
                (i32.wrap_i64 (i64.mul (local.get $rows) (i64.const 8))))
              (call $moved (global.get $in) (local.get $rows))
              (call $moved (global.get $out) (local.get $rows))
              i32.const 0)"
        )
    };
    load(&rig, "copies", &guest(""));
    let copies = || {
        let call = json!({"kernel": "copies/k", "inputs": {"x": "x"}});
        let (y, steps) = called(&rig, call, None);
        assert!(steps > 2 && y == bytes, "{steps} steps");
    };
    (0..2).for_each(|_| copies());
    let store = "(i64.store (i32.wrap_i64 (i64.add (global.get $x) (call $word (global.get $in) (i32.const 16)))) (i64.const -1))";
    let fill = "(memory.fill (i32.wrap_i64 (i64.add (global.get $x) (call $word (global.get $in) (i32.const 16)))) (i32.const 1) (i32.const 64))";
    let cases = [
        ("trap", "unreachable", "GUEST_TRAP"),
        ("spin", "(loop $ever (br $ever))", "DEADLINE"),
        ("fail", "(return (i32.const 1))", "KERNEL_FAILED"),
        ("three", "(return (i32.const 3))", "BAD_ANSWER"),
        ("again", "(return (i32.const 2))", "BAD_ANSWER"),
        ("nothing", "(return (i32.const 0))", "BAD_ANSWER"),
        ("store", store, "INPUT_WRITTEN"),
        ("fill", fill, "INPUT_WRITTEN"),
    ];
    for (name, what, reason) in cases {
        load(&rig, name, &guest(what));
        let before = rig.holdings();
        let deadline = if reason == "DEADLINE" { 300 } else { 60_000 };
        let call =
            json!({"kernel": format!("{name}/k"), "inputs": {"x": "x"}, "deadline_ms": deadline});
        let status = rig.invoke(call).unwrap_err();
        assert_eq!(status.reason.name(), reason, "{name}: {status}");
        assert!(bytes_of(&x) == bytes, "{name} changed its input");
        rig.check_holdings(&before, name);
        copies();
    }
}

/// `STRAIT_TEST_LARGE=1` runs it: it needs 13 GiB of memory.
#[test]
fn six_gib_go_through_guests_of_four() {
    if std::env::var_os("STRAIT_TEST_LARGE").is_none() {
        return;
    }
    const BLOCK: usize = 64 << 20;
    const BYTES: u64 = 6 << 30;
    let rig = Rig::with(|config| {
        config.memory.budget_bytes = Some(16 << 30);
        config.limits.result_bytes = 8 << 30;
    });
    let spec = strait_tensor::TensorSpec {
        dtype: Dtype::Uint8,
        shape: vec![BYTES],
    };
    let upload = rig.me().begin_upload("x", true).unwrap();
    let column = strait_tensor::Column::new("x", spec).unwrap();
    let layout = strait_tensor::FileLayout::plan(&[column]).unwrap();
    let segment = rig.me().allocate_to_fill(&layout).unwrap();
    let offset = layout.tensors[0].offset;
    let block: Vec<u8> = (0..BLOCK)
        .map(|i| u8::try_from((i * 31 + i / 251) % 256).unwrap())
        .collect();
    let starts = || (0..BYTES).step_by(BLOCK);
    for start in starts() {
        let wrote = segment.write_at(offset + start, &block, &Copied::new());
        wrote.unwrap();
    }
    upload.finish(segment, layout).unwrap();
    // One that streams: all of it passes before one instance.
    let counted = json!({"kernel": "histogram", "inputs": {"x": "x"}, "parameters": {"bins": 256, "lo": 0, "hi": 256}, "deadline_ms": 300_000});
    let counted = rig.invoke(counted).unwrap();
    let counts = bytes_of(counted.results[0].segment().unwrap());
    let counts = counts.chunks_exact(8);
    let counts: Vec<_> = counts
        .map(|count| u64::from_le_bytes(count.try_into().unwrap()))
        .collect();
    let mut expected = vec![0; 256];
    let blocks = BYTES / BLOCK as u64;
    block
        .iter()
        .for_each(|x| expected[usize::from(*x)] += blocks);
    assert!(counts == expected && counted.report.slices > 5);
    let call = json!({"kernel": "clip", "inputs": {"x": "x"}, "parameters": {"lo": 10, "hi": 99}, "deadline_ms": 300_000});
    let invoked = rig.invoke(call).unwrap();
    assert_eq!(
        (invoked.report.copied_bytes, invoked.report.slices),
        (0, 12)
    );
    let expected: Vec<u8> = block.iter().map(|x| (*x).clamp(10, 99)).collect();
    let result = invoked.results[0].segment().unwrap();
    let place = result.tensors()[0].offset;
    let mut seen = vec![0; BLOCK];
    for start in starts() {
        let read = result.read_at(place + start, &mut seen, &Copied::new());
        read.unwrap();
        assert!(seen == expected, "from {start} on");
    }
}
