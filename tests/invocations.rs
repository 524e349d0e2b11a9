//! Invocations on a host without sockets: both paths give the same bits, nothing is copied
//! where nothing should be, arguments are checked, and results are recycled only when they may.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

mod support;

use std::sync::Arc;

use serde_json::{Value, json};
use strait::error::Code;
use strait_client::wire;
use strait_memory::Copied;
use strait_tensor::{Column, Dtype, FileLayout};
use support::{ME, Rig, bytes_of, f64s, guest};

const MB: usize = 1 << 20;

fn values(n: usize) -> Vec<f64> {
    (0..n).map(|i| (i as f64).sin() * 1e3).collect()
}

#[test]
fn a_large_tensor_is_moved_and_never_copied() {
    let rig = Rig::new();
    let n = 100 * MB / 8;
    let x = values(n);
    let segment = rig.put_f64("x", &x);
    let mut results = Vec::new();
    for round in 0..5 {
        let invoked = rig.scale_shift("x", 2.0, 1.0);
        assert_eq!(invoked.copied_bytes, 0);
        if round >= 2 {
            // Mapping anew would take about 51 000.
            assert!(
                invoked.minor_faults < 256,
                "{} minor faults in call {round}",
                invoked.minor_faults
            );
        }
        let pages: Vec<_> = invoked
            .pages
            .iter()
            .map(|p| (p.port.as_str(), p.inode))
            .collect();
        let result = &invoked.results[0].segment;
        assert_eq!(
            pages,
            [("x", Some(segment.inode())), ("y", Some(result.inode()))]
        );
        results.push(result.inode());
        if round == 4 {
            let y = f64s(&bytes_of(result));
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x + 1.0));
        }
    }
    assert!(
        results.windows(2).all(|w| w[0] == w[1]),
        "released results are recycled: {results:?}"
    );
    assert_eq!(rig.host.stats(None)["copied_bytes"], 0);
}

#[test]
fn integers_reach_the_kernel_with_every_bit() {
    let rig = Rig::new();
    let two_53 = 1_i64 << 53;
    let signed =
        |values: &[i64]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let unsigned =
        |values: &[u64]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let half = 1_u64 << 63;
    // As text: that is what comes over the sockets.
    for (dtype, x, parameters, y) in [
        (
            Dtype::Int64,
            signed(&[two_53, two_53 + 1, two_53 + 2]),
            r#"{"hi": 9007199254740993}"#,
            signed(&[two_53, two_53 + 1, two_53 + 1]),
        ),
        (
            Dtype::Int64,
            signed(&[-two_53 - 6, -two_53 - 1]),
            r#"{"lo": -9007199254740993}"#,
            signed(&[-two_53 - 1; 2]),
        ),
        (
            Dtype::Int64,
            signed(&[i64::MIN, 0, i64::MAX]),
            r#"{"lo": -9223372036854775807, "hi": 9223372036854775806}"#,
            signed(&[i64::MIN + 1, 0, i64::MAX - 1]),
        ),
        (
            Dtype::Int64,
            signed(&[0, i64::MAX]),
            r#"{"hi": 18446744073709551615}"#,
            signed(&[0, i64::MAX]),
        ),
        (
            Dtype::Uint64,
            unsigned(&[half, 5]),
            r#"{"hi": 9223372036854775807}"#,
            unsigned(&[half - 1, 5]),
        ),
        (
            Dtype::Uint64,
            unsigned(&[half, u64::MAX]),
            r#"{"lo": 9223372036854775809, "hi": 18446744073709551614}"#,
            unsigned(&[half + 1, u64::MAX - 1]),
        ),
        (
            Dtype::Int64,
            signed(&[two_53 - 1, two_53 + 1]),
            r#"{"lo": 9007199254740992.0}"#,
            signed(&[two_53, two_53 + 1]),
        ),
    ] {
        rig.put("n", dtype, &[(x.len() / 8) as u64], &x);
        let parameters: Value = serde_json::from_str(parameters).unwrap();
        let call = json!({"kernel": "clip", "inputs": {"x": "n"}, "parameters": parameters});
        let invoked = rig.invoke(call).unwrap();
        assert_eq!(
            bytes_of(&invoked.results[0].segment),
            y,
            "{dtype} {parameters}"
        );
    }
    let crossed = json!({"kernel": "clip", "inputs": {"x": "n"}, "parameters": {"lo": two_53 + 1, "hi": two_53}});
    let status = rig.invoke(crossed).unwrap_err();
    assert_eq!(status.reason, "BAD_PARAMETER");
    assert!(
        status
            .message
            .contains("9007199254740993 is above hi, 9007199254740992"),
        "{status}"
    );
}

#[test]
fn scores_of_values_that_cannot_be_squared() {
    let rig = Rig::new();
    for scale in [1.7e308, 1e-200, 5e-324] {
        rig.put_f64("x", &[scale, -scale]);
        let invoked = rig
            .invoke(json!({"kernel": "zscore", "inputs": {"x": "x"}}))
            .unwrap();
        let y = f64s(&bytes_of(&invoked.results[0].segment));
        assert_eq!(y, [1.0, -1.0], "{scale}");
    }
}

#[test]
fn every_byte_of_a_bool8_but_0_is_true() {
    let rig = Rig::new();
    rig.put("m", Dtype::Bool8, &[4], &[0, 1, 2, 255]);
    let f64_bytes = |values: [f64; 4]| values.map(f64::to_le_bytes).concat();
    let third = 1.0 / 3.0_f64.sqrt();
    let cast = |to: &str| ("cast", json!({ "to": to }));
    for ((kernel, parameters), y) in [
        (cast("uint8"), vec![0, 1, 1, 1]),
        (cast("bool8"), vec![0, 1, 1, 1]),
        (cast("float8_e5m2"), vec![0, 0x3c, 0x3c, 0x3c]),
        (cast("float64"), f64_bytes([0.0, 1.0, 1.0, 1.0])),
        (("clip", json!({"hi": 5})), vec![0, 1, 1, 1]),
        (("clip", json!({"lo": 2})), vec![1, 1, 1, 1]),
        (("filter-finite", json!({})), vec![0, 1, 1, 1]),
        (
            ("zscore", json!({})),
            f64_bytes([-3.0 * third, third, third, third]),
        ),
    ] {
        let call = json!({"kernel": kernel, "inputs": {"x": "m"}, "parameters": parameters});
        let invoked = rig.invoke(call).unwrap();
        let bytes = bytes_of(&invoked.results[0].segment);
        if kernel == "zscore" {
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-15;
            assert!(f64s(&bytes).iter().zip(&f64s(&y)).all(close), "{bytes:?}");
        } else {
            assert_eq!(bytes, y, "{kernel} {parameters}");
        }
    }
}

#[test]
fn both_sides_of_the_threshold_give_the_same_bits() {
    let threshold = 512 << 10;
    let kernels = [
        ("scale-shift", json!({"a": 1.5, "b": -3.0})),
        ("clip", json!({"lo": -100.0, "hi": 250.0})),
        ("zscore", json!({"axis": 0})),
        ("cast", json!({"to": "bfloat16"})),
        ("filter-finite", json!({})),
    ];
    let mut by_path: Vec<Vec<Vec<u8>>> = Vec::new();
    for move_min in [threshold, 1, u64::MAX] {
        let rig = Rig::with(|config| config.engine.move_min_bytes = move_min);
        let mut results = Vec::new();
        for elements in [threshold / 8 - 1, threshold / 8, threshold / 8 + 1] {
            let mut x = values(usize::try_from(elements).unwrap());
            x[7] = f64::NAN;
            x[9] = f64::INFINITY;
            rig.put_f64("x", &x);
            for (kernel, parameters) in &kernels {
                let call =
                    json!({"kernel": kernel, "inputs": {"x": "x"}, "parameters": parameters});
                let invoked = rig.invoke(call).unwrap();
                let bytes = bytes_of(&invoked.results[0].segment);
                let input = elements * 8;
                let moved_in = input >= move_min;
                let bound = if *kernel == "cast" {
                    elements * 2
                } else {
                    input
                };
                let moved_out = bound >= move_min;
                let expected = if moved_in { 0 } else { input }
                    + if moved_out { 0 } else { bytes.len() as u64 };
                assert_eq!(
                    invoked.copied_bytes, expected,
                    "{kernel} of {input} bytes, threshold {move_min}"
                );
                results.push(bytes);
            }
        }
        by_path.push(results);
    }
    assert!(by_path[0] == by_path[1] && by_path[1] == by_path[2]);
}

#[test]
fn simultaneous_calls_on_one_input_are_right() {
    let rig = Rig::new();
    let x = values(2 * MB / 8);
    rig.put_f64("x", &x);
    for _ in 0..10 {
        let started: Vec<_> = (0..6)
            .map(|k| {
                let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": k, "b": 0.5}});
                rig.start(call).1
            })
            .collect();
        for (k, answer) in started.into_iter().enumerate() {
            let invoked = answer.recv().unwrap().unwrap();
            let y = f64s(&bytes_of(&invoked.results[0].segment));
            assert!(
                y.iter().zip(&x).all(|(y, x)| *y == k as f64 * x + 0.5),
                "call {k}"
            );
        }
    }
}

#[test]
fn a_result_in_use_is_not_recycled() {
    let rig = Rig::new();
    rig.put_f64("x", &values(MB / 8));
    let first = rig.scale_shift("x", 1.0, 0.0);
    let held = bytes_of(&first.results[0].segment);
    let second = rig.scale_shift("x", 5.0, 0.0);
    assert_ne!(
        first.results[0].segment.inode(),
        second.results[0].segment.inode()
    );
    assert_eq!(bytes_of(&first.results[0].segment), held);
    // Given back by a holder that may still have it mapped.
    let inode = first.results[0].segment.inode();
    first.results[0].segment.never_recycle();
    drop(first);
    for _ in 0..4 {
        assert_ne!(
            rig.scale_shift("x", 1.0, 0.0).results[0].segment.inode(),
            inode
        );
    }
}

#[test]
fn an_output_whose_size_the_data_decides() {
    let rig = Rig::new();
    for n in [0_usize, 1, 1000, 200_000] {
        let mut x = values(n);
        for i in (0..n).step_by(3) {
            x[i] = if i % 2 == 0 {
                f64::NAN
            } else {
                f64::NEG_INFINITY
            };
        }
        rig.put_f64("x", &x);
        // A recycled result held something else before.
        drop(rig.invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 0, "b": 77}})).unwrap());
        let invoked = rig
            .invoke(json!({"kernel": "filter-finite", "inputs": {"x": "x"}}))
            .unwrap();
        let expected: Vec<f64> = x.iter().copied().filter(|v| v.is_finite()).collect();
        let segment = &invoked.results[0].segment;
        assert_eq!(segment.tensors()[0].spec.shape, [expected.len() as u64]);
        assert_eq!(f64s(&bytes_of(segment)), expected);
        // What lies behind the tensor is zero up to the footer.
        let place = &segment.tensors()[0];
        let end = (place.offset + place.length)
            .next_multiple_of(65536)
            .max(place.offset + 65536)
            .min(segment.bytes());
        let tail = usize::try_from(end - place.offset - place.length).unwrap();
        let mut padding = vec![1; tail.min(65536)];
        if !padding.is_empty() && place.length > 0 {
            segment
                .read_at(
                    place.offset + place.length,
                    &mut padding,
                    &strait_memory::Copied::new(),
                )
                .unwrap();
            let footer = padding
                .len()
                .min(usize::try_from(65536 - place.length % 65536).unwrap() % 65536);
            assert!(
                padding[..footer].iter().all(|b| *b == 0),
                "{n} elements: stale bytes behind the tensor"
            );
        }
    }
}

#[test]
fn small_and_empty_tensors() {
    let rig = Rig::new();
    rig.put("scalar", Dtype::Float64, &[], &3.5_f64.to_le_bytes());
    rig.put("empty", Dtype::Float64, &[0, 5], &[]);
    for (name, shape, expected) in [("scalar", vec![], vec![7.0]), ("empty", vec![0, 5], vec![])] {
        let invoked = rig
            .invoke(json!({"kernel": "scale-shift", "inputs": {"x": name}, "parameters": {"a": 2}}))
            .unwrap();
        let place = &invoked.results[0].segment.tensors()[0];
        assert_eq!(place.spec.shape, shape);
        assert_eq!(f64s(&bytes_of(&invoked.results[0].segment)), expected);
    }
}

#[test]
fn a_sealed_result_can_be_asked_for() {
    let rig = Rig::new();
    let x = values(MB / 8);
    rig.put_f64("x", &x);
    let invoked = rig.invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 3}, "seal": true, "verify": true})).unwrap();
    let segment = &invoked.results[0].segment;
    assert_eq!(rig.host.mapping(segment).seal, wire::Seal::Write);
    assert_eq!(invoked.pages[1].inode, Some(segment.inode()));
    assert!(
        f64s(&bytes_of(segment))
            .iter()
            .zip(&x)
            .all(|(y, x)| *y == 3.0 * x)
    );
}

#[test]
fn results_feed_the_next_kernel() {
    let rig = Rig::new();
    let x = values(MB / 8);
    rig.put_f64("x", &x);
    for round in 0..3 {
        let first = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2}, "publish": {"y": "half"}, "replace": true});
        rig.invoke(first).unwrap();
        let invoked = rig.scale_shift("half", 0.5, 1.0);
        assert_eq!(invoked.copied_bytes, 0, "round {round}");
        let y = f64s(&bytes_of(&invoked.results[0].segment));
        assert!(
            y.iter().zip(&x).all(|(y, x)| *y == (2.0 * x) * 0.5 + 1.0),
            "round {round}"
        );
    }
    let taken = rig
        .invoke(json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "publish": {"y": "half"}}))
        .unwrap_err();
    assert_eq!(
        (taken.code, taken.reason),
        (Code::AlreadyExists, "NAME_TAKEN")
    );
}

#[test]
fn a_repeat_with_the_same_key_is_not_run_again() {
    let rig = Rig::new();
    rig.put_f64("x", &values(100));
    let call = json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "idempotency_key": "k-1"});
    let (first, again) = (rig.invoke(call.clone()).unwrap(), rig.invoke(call).unwrap());
    assert_eq!(first.results[0].segment.id(), again.results[0].segment.id());
    assert_eq!(rig.host.engine().counts().0, 1);
}

#[test]
fn a_tensor_beyond_wasm32_is_a_segment_and_no_input() {
    let rig = Rig::with(|config| config.memory.budget_bytes = Some(16 << 30));
    let shape = vec![5, 1 << 27];
    let tensors = vec![wire::NewTensor {
        name: "x".to_owned(),
        dtype: Dtype::Float64,
        shape,
    }];
    let (segment, _fd) = rig.host.create(ME, tensors).unwrap();
    assert_eq!(segment.tensors()[0].length, 5 << 30);
    rig.host.publish(ME, &segment, "big", false).unwrap();
    let status = rig
        .invoke(json!({"kernel": "scale-shift", "inputs": {"x": "big"}}))
        .unwrap_err();
    assert_eq!(
        (status.code, status.reason),
        (Code::ResourceExhausted, "LIMIT_WASM32"),
        "{status}"
    );
    assert!(
        status.message.contains("wasm32") && status.message.contains("4 GiB"),
        "{status}"
    );
}

#[test]
fn wrong_arguments_are_named() {
    let rig = Rig::new();
    rig.put_f64("x", &values(10));
    rig.put("i", Dtype::Int16, &[5], &[0; 10]);
    rig.put("m", Dtype::Float64, &[2, 3], &[0; 48]);
    let before = rig.holdings();
    let check = |call: Value, code: Code, reason: &str, words: &[&str]| {
        let status = rig.invoke(call.clone()).expect_err(&call.to_string());
        assert_eq!(
            (status.code, status.reason),
            (code, reason),
            "{call}: {status}"
        );
        for word in words {
            assert!(status.message.contains(word), "{word:?} in {status}");
        }
    };
    let bad = Code::InvalidArgument;
    let shift =
        |x: &str, p: Value| json!({"kernel": "scale-shift", "inputs": {"x": x}, "parameters": p});
    check(
        shift("nothing", json!({})),
        Code::NotFound,
        "TENSOR_NOT_FOUND",
        &["nothing"],
    );
    check(
        shift("x#nothing", json!({})),
        Code::NotFound,
        "COLUMN_NOT_FOUND",
        &["nothing", "`x`"],
    );
    check(
        json!({"kernel": "nothing", "inputs": {}}),
        Code::NotFound,
        "KERNEL_NOT_FOUND",
        &["nothing", "zscore"],
    );
    check(
        shift("i", json!({})),
        bad,
        "BAD_INPUT",
        &["int16", "`x`", "cast"],
    );
    check(
        json!({"kernel": "filter-finite", "inputs": {"x": "m"}}),
        bad,
        "BAD_INPUT",
        &["rank 2", "[2, 3]"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"z": "x"}}),
        bad,
        "UNKNOWN_INPUT",
        &["`z`", "`x`"],
    );
    check(
        json!({"kernel": "clip", "inputs": {}}),
        bad,
        "MISSING_INPUT",
        &["`x`"],
    );
    check(
        shift("x", json!({"c": 1})),
        bad,
        "UNKNOWN_PARAMETER",
        &["`c`", "`a`"],
    );
    check(
        shift("x", json!({"a": "two"})),
        bad,
        "BAD_PARAMETER",
        &["`a`", "two", "real"],
    );
    check(
        json!({"kernel": "zscore", "inputs": {"x": "m"}, "parameters": {"axis": 2}}),
        bad,
        "BAD_PARAMETER",
        &["axis 2", "rank 2"],
    );
    check(
        json!({"kernel": "zscore", "inputs": {"x": "m"}, "parameters": {"axis": -1}}),
        bad,
        "BAD_PARAMETER",
        &["-1"],
    );
    check(
        json!({"kernel": "cast", "inputs": {"x": "x"}}),
        bad,
        "MISSING_PARAMETER",
        &["`to`"],
    );
    check(
        json!({"kernel": "cast", "inputs": {"x": "x"}, "parameters": {"to": "float99"}}),
        bad,
        "BAD_PARAMETER",
        &["float99", "bfloat16"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "parameters": {"lo": 2, "hi": 1}}),
        bad,
        "BAD_PARAMETER",
        &["lo"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "publish": {"q": "z"}}),
        bad,
        "UNKNOWN_OUTPUT",
        &["`q`", "`y`"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "publish": {"y": "a#b"}}),
        bad,
        "BAD_NAME",
        &["#"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "deadline_ms": u64::MAX}),
        bad,
        "BAD_LIMIT",
        &["deadline_ms"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": {"segment": "00000000000000000000000000000000"}}}),
        bad,
        "BAD_REQUEST",
        &["session"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "idempotency_key": "no spaces"}),
        bad,
        "BAD_REQUEST",
        &["idempotency_key"],
    );
    assert_eq!(rig.holdings(), before);
}

#[test]
fn names_of_several_outputs_are_given_together_or_not_at_all() {
    let rig = Rig::with(|config| config.engine.workers = Some(1));
    rig.host
        .load_plugin(&guest::component("pair", ";; $x2"))
        .unwrap();
    let spins = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    rig.host
        .load_plugin(&guest::component("spins", &spins))
        .unwrap();
    rig.put_f64("x", &[1.0, 2.0]);
    let pair = |replace: bool| json!({"kernel": "pair/k", "inputs": {"x": "x", "x2": "x"}, "publish": {"y": "a", "y2": "b"}, "replace": replace});
    // It waits for the only worker: its names were free when they were asked for.
    let (spinning, spun) = rig.start(json!({"kernel": "spins/k", "inputs": {"x": "x"}}));
    let (_call, waiting) = rig.start(pair(false));
    rig.put_f64("b", &[3.0]);
    spinning.cancel();
    assert_eq!(spun.recv().unwrap().unwrap_err().reason, "CANCELLED");
    assert_eq!(waiting.recv().unwrap().unwrap_err().reason, "NAME_TAKEN");
    assert!(rig.host.lookup(ME, "a").is_err());
    assert_eq!(f64s(&bytes_of(&rig.host.lookup(ME, "b").unwrap())), [3.0]);
    // A name whose bytes are arriving is nobody else's.
    rig.put_f64("a", &[4.0]);
    rig.host.drop_flight(ME, "b").unwrap();
    let upload = rig.host.begin_upload(ME, "b", false).unwrap();
    assert_eq!(rig.invoke(pair(true)).unwrap_err().reason, "WRONG_STATE");
    assert_eq!(f64s(&bytes_of(&rig.host.lookup(ME, "a").unwrap())), [4.0]);
    drop(upload);
    let done = rig.invoke(pair(true)).unwrap();
    for (name, result) in ["a", "b"].into_iter().zip(&done.results) {
        let named = rig.host.lookup(ME, name).unwrap();
        assert!(Arc::ptr_eq(&named, &result.segment), "{name}");
    }
}

/// Numbers that look random, the same for the same seed.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap()
    }
}

#[test]
fn a_recycled_result_is_a_whole_file_with_nothing_of_earlier_ones_around_it() {
    const WAYS: usize = 6;
    // Around guest pages, size classes, the smallest window and the smallest huge page.
    const SIZES: [usize; 12] = [
        1, 1000, 8191, 8192, 8193, 65_535, 65_536, 65_537, 73_000, 81_919, 524_287, 524_289,
    ];
    let rig = Rig::new();
    let smears = std::fs::read_to_string("tests/guests/smears.wat").unwrap();
    rig.host
        .load_plugin(&guest::component("smears", &smears))
        .unwrap();
    for n in SIZES {
        for way in 0..WAYS {
            let mut values = vec![1.5; n];
            values[0] = way as f64;
            rig.put_f64(&format!("{n}-{way}"), &values);
        }
    }
    let mut draws = Draws(0x9e37_79b9_7f4a_7c15);
    for round in 0..250 {
        let (n, way) = (SIZES[draws.below(SIZES.len())], draws.below(WAYS));
        let (plain, seal) = (draws.below(3) == 0, draws.below(6) == 0);
        let kernel = if plain { "scale-shift" } else { "smears/k" };
        let call = json!({"kernel": kernel, "inputs": {"x": format!("{n}-{way}")}, "seal": seal});
        let at = format!("round {round}: {call}");
        let done = match rig.invoke(call) {
            Ok(done) => done,
            Err(status) => {
                assert!(!plain && [1, 2, 5].contains(&way), "{at}: {status}");
                continue;
            }
        };
        let segment = &done.results[0].segment;
        let column = Column {
            name: "y".to_owned(),
            spec: segment.tensors()[0].spec.clone(),
            reserve_bytes: n as u64 * 8,
        };
        let layout = FileLayout::plan(&[column]).unwrap();
        let mut file = vec![0xAA; usize::try_from(segment.bytes()).unwrap()];
        segment.read_at(0, &mut file, &Copied::new()).unwrap();
        let place = &layout.tensors[0];
        let body = usize::try_from(place.offset).unwrap();
        let end = body + usize::try_from(place.length).unwrap();
        let footer = usize::try_from(layout.footer_offset).unwrap();
        let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let (header, padding) = file[..body].split_at(layout.header.len());
        assert!(header == layout.header && zeros(padding), "{at}: header");
        assert!(zeros(&file[end..footer]), "{at}: behind the tensor");
        assert!(file[footer..] == layout.footer, "{at}: footer");
        if plain {
            assert!(
                f64s(&file[body..end])[1..].iter().all(|v| *v == 1.5),
                "{at}"
            );
        } else {
            assert!(file[body..end].iter().all(|byte| *byte == 0xEE), "{at}");
        }
    }
    assert!(rig.host.stats(None)["pool"]["segments"].as_u64().unwrap() > 0);
}
