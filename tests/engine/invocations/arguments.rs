//! Inputs and parameters reach the kernel with every bit, and wrong ones are named.

use std::sync::Arc;

use serde_json::{Value, json};
use strait::error::Code;
use strait_tensor::Dtype;

use super::values;
use crate::support::{Rig, bytes_of, f64s, guest};

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
            bytes_of(invoked.results[0].segment().unwrap()),
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
        let y = f64s(&bytes_of(invoked.results[0].segment().unwrap()));
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
        let bytes = bytes_of(invoked.results[0].segment().unwrap());
        if kernel == "zscore" {
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-15;
            assert!(f64s(&bytes).iter().zip(&f64s(&y)).all(close), "{bytes:?}");
        } else {
            assert_eq!(bytes, y, "{kernel} {parameters}");
        }
    }
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
            (status.code, status.reason.name()),
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
        "FLIGHT_NOT_FOUND",
        &["nothing"],
    );
    check(
        shift("x#nothing", json!({})),
        Code::NotFound,
        "TENSOR_NOT_FOUND",
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
        Code::NotFound,
        "SEGMENT_NOT_FOUND",
        &["no result", "publish"],
    );
    check(
        json!({"kernel": "clip", "inputs": {"x": "x"}, "idempotency_key": "no spaces"}),
        bad,
        "BAD_REQUEST",
        &["idempotency_key"],
    );
    rig.check_holdings(&before, "a refused call");
}

#[test]
fn names_of_several_outputs_are_given_together_or_not_at_all() {
    let rig = Rig::with(|config| config.engine.workers = Some(1));
    rig.host
        .own_caller()
        .load_plugin(&guest::component("pair", ";; $x2"))
        .unwrap();
    let spins = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    rig.host
        .own_caller()
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
    assert!(rig.me().lookup("a").is_err());
    assert_eq!(f64s(&bytes_of(&rig.me().lookup("b").unwrap())), [3.0]);
    // A name whose bytes are arriving is nobody else's.
    rig.put_f64("a", &[4.0]);
    rig.me().drop_flight("b").unwrap();
    let upload = rig.me().begin_upload("b", false).unwrap();
    assert_eq!(rig.invoke(pair(true)).unwrap_err().reason, "WRONG_STATE");
    assert_eq!(f64s(&bytes_of(&rig.me().lookup("a").unwrap())), [4.0]);
    drop(upload);
    let done = rig.invoke(pair(true)).unwrap();
    for (name, result) in ["a", "b"].into_iter().zip(&done.results) {
        let named = rig.me().lookup(name).unwrap();
        assert!(Arc::ptr_eq(&named, result.segment().unwrap()), "{name}");
    }
}
