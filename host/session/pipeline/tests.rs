//! What pipelines' texts mean, and that no text does harm.

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};
use strait_protocol::{Pipeline, PipelineStage, StageInput};

use super::{PipelineError, is_pipeline, parse, print};

fn read(text: &str) -> Value {
    let pipeline = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let again = parse(&print(&pipeline)).expect("what was printed");
    assert_eq!(again, pipeline, "{text} as {}", print(&pipeline));
    serde_json::to_value(pipeline).expect("JSON")
}

#[test]
fn texts_mean_this_json() {
    for (text, meant) in [
        ("clip", json!({"stages": [{"kernel": "clip"}]})),
        ("clip()", json!({"stages": [{"kernel": "clip"}]})),
        (
            "clip(lo=0,hi=1.5) | standard/scale-shift( a = 2 ,b=-1e3 )|cast(to=bfloat16)",
            json!({"stages": [
                {"kernel": "clip", "parameters": {"lo": 0, "hi": 1.5}},
                {"kernel": "standard/scale-shift", "parameters": {"a": 2, "b": -1000.0}},
                {"kernel": "cast", "parameters": {"to": "bfloat16"}},
            ]}),
        ),
        (
            "a: clip(x: raw, lo=-inf) | b: clip(x: raw)\n| matmul(a: a, b: b.y) -> product: .y, clipped: a",
            json!({"stages": [
                {"name": "a", "kernel": "clip", "inputs": {"x": "raw"}, "parameters": {"lo": "-inf"}},
                {"name": "b", "kernel": "clip", "inputs": {"x": "raw"}},
                {"kernel": "matmul", "inputs": {"a": "a", "b": "b.y"}},
            ], "outputs": {"product": ".y", "clipped": "a"}}),
        ),
        (
            r#""my plugins/a.wasm#k"(w=[1, 2.5, nan, "a b"], e=[], s="\u0041\"", t="1", u="true", v=true, w.x: "1.taps")"#,
            json!({"stages": [{
                "kernel": "my plugins/a.wasm#k",
                "parameters": {"w": [1, 2.5, "nan", "a b"], "e": [], "s": "A\"", "t": "1", "u": "true", "v": true},
                "inputs": {"w.x": {"input": "1.taps"}},
            }]}),
        ),
        (
            "k(n=18446744073709551615, m=-9223372036854775808, z=-0)->o:1.y",
            json!({"stages": [{"kernel": "k", "parameters": {"n": u64::MAX, "m": i64::MIN, "z": -0.0}}], "outputs": {"o": "1.y"}}),
        ),
    ] {
        assert_eq!(read(text), meant, "{text}");
    }
}

#[test]
fn a_kernels_name_is_no_pipeline() {
    for name in ["clip", "standard/clip", "a.b+c-d_e", "file.wasm#clip"] {
        assert!(!is_pipeline(name), "{name}");
    }
    for text in ["clip()", "clip | cast", "|", "clip -> z: y"] {
        assert!(is_pipeline(text), "{text}");
    }
}

#[test]
fn mistakes_are_told_where_they_are() {
    for (text, at, told) in [
        ("", 1, "expected a kernel, and the text ends"),
        ("clip |", 7, "expected a kernel"),
        ("clip | | cast", 8, "found `|`"),
        ("clip(lo)", 8, "expected `=` and a value"),
        ("clip(lo=)", 9, "expected a value, found `)`"),
        ("clip(lo=1", 10, "expected `,` or `)`, and the text ends"),
        ("clip(lo=1 hi=2)", 11, "found `hi`"),
        ("clip(lo=1,lo=2)", 15, "`lo` is given twice"),
        ("clip(lo=1..2)", 9, "`1..2` is not a number as JSON"),
        ("clip(lo=.5)", 9, "`.5` is not a number as JSON"),
        ("clip(lo=1e999)", 9, "is not a number"),
        ("clip(lo=[[1]])", 10, "expected a value, found `[`"),
        ("clip(lo=\"a)", 9, "a string without an end"),
        ("clip(lo=\"\\q\")", 9, "not one of JSON"),
        ("clip(x: )", 9, "expected a stage"),
        (
            "clip cast",
            6,
            "expected `|`, `->` or the end, found `cast`",
        ),
        ("clip ü", 6, "`ü` has no meaning here"),
        ("größe()", 3, "`ö` has no meaning here"),
        ("clip -> y", 10, "expected `:`"),
        ("clip(\u{0}", 6, "`\\0` has no meaning here"),
    ] {
        match parse(text) {
            Err(PipelineError::Text { at: found, what }) => {
                assert!(found == at && what.contains(told), "{text}: {found} {what}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    for (text, told) in [
        ("1a: clip", "stage 1 is named `1a`"),
        ("a.b: clip", "a name begins with a letter"),
        ("a: clip | a: cast", "two stages are named `a`"),
        ("clip(x: a/b)", "`a/b` is neither a stage"),
        ("clip(x: .)", "is neither"),
        ("clip(x#: a)", "can have the name `x#`"),
        ("\"\"", "names no kernel"),
    ] {
        match parse(text) {
            Err(PipelineError::Graph(what)) => assert!(what.contains(told), "{text}: {what}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    let many = vec!["clip"; 33].join(" | ");
    let error = parse(&many).expect_err("too many");
    assert!(error.to_string().contains("33 stages, 1 to 32"), "{error}");
}

fn name() -> impl Strategy<Value = String> {
    "[a-z_][a-z0-9_]{0,3}"
}

fn value() -> impl Strategy<Value = Value> {
    let plain = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e300..1e300_f64).prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
        "[-+.a-z0-9]{0,5}".prop_map(Value::from),
    ];
    let plain = plain.boxed();
    prop_oneof![plain.clone(), vec(plain, 0..4).prop_map(Value::from)]
}

fn source() -> impl Strategy<Value = StageInput> {
    prop_oneof![
        (name(), name()).prop_map(|(stage, port)| StageInput::Text(format!("{stage}.{port}"))),
        name().prop_map(StageInput::Text),
        name().prop_map(|port| StageInput::Text(format!(".{port}"))),
        "[a-z0-9._+-]{1,6}".prop_map(|input| StageInput::Input { input }),
    ]
}

fn pipeline() -> impl Strategy<Value = Pipeline> {
    let kernel = prop_oneof![name(), "[a-z ./#\"|(>-]{1,8}"];
    let stage = (
        option::of(name()),
        kernel,
        btree_map(name(), value(), 0..3),
        btree_map(name(), source(), 0..3),
    );
    let stage = stage.prop_map(|(name, kernel, parameters, inputs)| PipelineStage {
        name,
        kernel,
        parameters,
        inputs,
    });
    (vec(stage, 1..4), btree_map(name(), source(), 0..3))
        .prop_map(|(stages, outputs)| Pipeline { stages, outputs })
}

proptest! {
    #[test]
    fn what_is_printed_is_read_back(pipeline in pipeline()) {
        // Names of stages, or of inputs, may clash by chance.
        if super::graph::check(&pipeline).is_ok() {
            let text = print(&pipeline);
            let again = parse(&text);
            prop_assert_eq!(again, Ok(pipeline), "{}", text);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in r#"([ -~]|[a-z|(),:="\\\[\]>.-]|\PC){0,40}"#) {
        if let Ok(pipeline) = parse(&text) {
            prop_assert_eq!(parse(&print(&pipeline)), Ok(pipeline));
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..64)) {
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(pipeline) = parse(&text) {
            prop_assert_eq!(parse(&print(&pipeline)), Ok(pipeline));
        }
    }
}
