//! Pipelines on the command line: against a host, and on files without one.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{bad, get_f64, good, good_json, plugin, put_f64};
use crate::served::Served;

const SHIFTS: &str = "clip(lo=0, hi=1) | scale-shift(a=2, b=1)";

fn shifted() -> (Vec<u64>, Vec<f64>) {
    (vec![4], vec![1.0, 2.0, 3.0, 3.0])
}

#[test]
fn call_takes_a_pipeline_as_text_or_in_a_file() {
    let host = Served::start(&[]);
    let here = host.path();
    put_f64(&here.join("x.npy"), &[4], &[-1.0, 0.5, 1.0, 7.0]);
    good(here, &["put", "x", "x.npy"]);
    let line = good(here, &["call", SHIFTS, "-i", "x=x", "-o", "y"]);
    assert!(
        line.starts_with("y ") && line.contains("float64"),
        "{line:?}"
    );
    good(here, &["get", "y", "y.npy"]);
    assert_eq!(get_f64(&here.join("y.npy")), shifted());

    let graph = json!({
        "stages": [
            {"name": "c", "kernel": "clip", "parameters": {"lo": 0, "hi": 1}},
            {"kernel": "scale-shift", "parameters": {"a": 2, "b": 1}},
        ],
        "outputs": {"clipped": "c.y", "shifted": ".y"},
    });
    fs::write(here.join("shifts.json"), graph.to_string()).unwrap();
    let call = [
        "call",
        "shifts.json",
        "-i",
        "x=x",
        "-o",
        "shifted=z",
        "-o",
        "clipped=c",
        "--json",
    ];
    let told = good_json(here, &call);
    let stages: Vec<_> = told["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["stage"].clone())
        .collect();
    assert_eq!(stages, ["c", "2"]);
    assert_eq!(
        told["kernel"],
        "c: clip(hi=1, lo=0) | scale-shift(a=2, b=1) -> clipped: c.y, shifted: .y"
    );
    good(here, &["get", "z", "z.npy"]);
    assert_eq!(get_f64(&here.join("z.npy")), shifted());

    let text = good(here, &["kernels", "fir | clip"]);
    for part in ["fir | clip  (pipeline ", "taps", "output"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let kernel = good_json(here, &["kernels", "shifts.json", "--json"]);
    assert_eq!(kernel["kernels"][0]["outputs"][0]["name"], "clipped");

    let wrong = |pipeline: &str, reason: &str, says: &str| {
        let told = bad(here, &["call", pipeline, "-i", "x=x", "-o", "w"], 3, reason);
        assert!(told.contains(says), "{pipeline}: {told}");
    };
    wrong("clip | | clip", "BAD_PIPELINE", "character 8");
    wrong("clip | cast(to=int3)", "BAD_PARAMETER", "stage 2 (`cast`)");
    wrong("none.json", "BAD_FILE", "none.json");
    fs::write(here.join("bad.json"), "{\"stages\": 1}").unwrap();
    wrong("bad.json", "BAD_PIPELINE", "not a pipeline as JSON");
    let several = bad(
        here,
        &["call", "shifts.json", "-i", "x=x", "-o", "w"],
        3,
        "UNKNOWN_OUTPUT",
    );
    assert!(several.contains("clipped, shifted"), "{several}");
    bad(
        here,
        &["call", SHIFTS, "-i", "x=x", "-p", "a=1", "-o", "w"],
        3,
        "UNKNOWN_PARAMETER",
    );
}

#[test]
fn run_takes_a_pipeline_with_plugins_in_files() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    put_f64(&here.join("x.npy"), &[4], &[-1.0, 0.5, 1.0, 7.0]);
    good(here, &["run", SHIFTS, "-i", "x=x.npy", "-o", "y.npy"]);
    assert_eq!(get_f64(&here.join("y.npy")), shifted());

    plugin(here, "answers_seven");
    plugin(here, "traps");
    fs::rename(here.join("answers_seven.wasm"), here.join("its name.wasm")).unwrap();
    fs::write(
        here.join("copies.wasm"),
        crate::guest::component("copies", ""),
    )
    .unwrap();
    for text in [
        "copies.wasm | clip(lo=0, hi=1) | copies.wasm#k | scale-shift(a=2, b=1)",
        "./copies.wasm#k | clip(lo=0,hi=1)|scale-shift(a=2,b=1)",
    ] {
        let told: Value = good_json(
            here,
            &["run", text, "-i", "x=x.npy", "-o", "y.npy", "--json"],
        );
        assert!(told["stages"].as_array().unwrap().len() >= 3, "{told}");
        assert_eq!(get_f64(&here.join("y.npy")), shifted(), "{text}");
    }
    let wrong = |pipeline: &str, exit: i32, reason: &str, says: &str| {
        let told = bad(
            here,
            &["run", pipeline, "-i", "x=x.npy", "-o", "w.npy"],
            exit,
            reason,
        );
        assert!(told.contains(says), "{pipeline}: {told}");
    };
    wrong("clip | traps.wasm", 4, "GUEST_TRAP", "stage 2 (`k`)");
    wrong("clip | \"its name.wasm\"#x", 3, "BAD_PIPELINE", "character");
    wrong(
        "clip | \"its name.wasm#x\"",
        3,
        "KERNEL_NOT_FOUND",
        "no kernel `x`",
    );
    wrong("clip | nothing.wasm", 3, "BAD_FILE", "nothing.wasm");
    wrong("clip | clip(x: z)", 3, "BAD_PIPELINE", "nothing takes");
    assert!(!here.join("w.npy").exists());
}
