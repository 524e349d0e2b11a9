//! The commands that speak to a host.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use strait_tensor::TensorFile;
use tempfile::TempDir;

use super::{
    bad, code, get_f64, good, good_json, names_in, npy, plugin, put_f64, run, stderr, stdout,
    strait,
};
use crate::served::{Served, wait};

#[test]
fn a_tensor_goes_all_the_way() {
    let host = Served::start(&[]);
    let at = |name: &str| host.path().join(name);
    assert!(
        host.ready
            .contains(&format!("unix://{}", at("host").display())),
        "{:?}",
        host.ready
    );
    let values: Vec<f64> = (0..12).map(f64::from).collect();
    put_f64(&at("data.npy"), &[3, 4], &values);

    let line = good(host.path(), &["put", "x", "data.npy"]);
    assert!(
        line.starts_with("x ") && line.contains("float64") && line.contains("[3, 4]"),
        "{line:?}"
    );
    let call = [
        "call",
        "scale-shift",
        "--input",
        "x=x",
        "--param",
        "a=2",
        "--param",
        "b=1",
        "--output",
        "y",
    ];
    assert!(good(host.path(), &call).starts_with("y "));
    let list = good(host.path(), &["ls"]);
    assert_eq!(list.lines().count(), 3, "{list}");
    assert!(
        list.starts_with("NAME ") && list.contains("\nx ") && list.contains("\ny "),
        "{list}"
    );
    assert_eq!(good(host.path(), &["get", "y", "out.npy"]), "");
    let expected: Vec<f64> = values.iter().map(|v| 2.0 * v + 1.0).collect();
    assert_eq!(get_f64(&at("out.npy")), (vec![3, 4], expected.clone()));
    assert_eq!(good(host.path(), &["get", "y", "out.arrow"]), "");
    assert_eq!(get_f64(&at("out.arrow")), (vec![3, 4], expected));

    let text = good(host.path(), &["kernels"]);
    for part in [
        "scale-shift",
        "(standard 0",
        "input",
        "output",
        "param",
        "default 1",
        "float32 float64",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert_eq!(
        good(host.path(), &["kernels", "standard/scale-shift"])
            .lines()
            .next(),
        text_of(&text, "scale-shift")
    );
    assert_eq!(good(host.path(), &["rm", "x", "y"]), "");
    assert_eq!(good(host.path(), &["ls"]), "");
    assert_eq!(
        names_in(host.path()),
        ["data.npy", "host", "log", "out.arrow", "out.npy"]
    );
}

fn text_of<'a>(text: &'a str, kernel: &str) -> Option<&'a str> {
    text.lines().find(|line| line.starts_with(kernel))
}

#[test]
fn json_has_the_same_shape_everywhere() {
    let host = Served::start(&[]);
    put_f64(&host.path().join("x.npy"), &[4], &[1.0, 2.0, 3.0, f64::NAN]);
    let put = good_json(host.path(), &["put", "x", "x.npy", "--json"]);
    assert_eq!(put["flight"]["name"], "x");
    assert_eq!(put["copied_bytes"], 32);
    assert_eq!(
        put["flight"]["mapping"]["tensors"][0]["shape"],
        serde_json::json!([4])
    );
    let call = good_json(
        host.path(),
        &[
            "call",
            "standard/scale-shift",
            "-i",
            "x=x",
            "-p",
            "b=inf",
            "-o",
            "y=y",
            "--json",
        ],
    );
    assert_eq!(call["results"][0]["port"], "y");
    assert_eq!(call["results"][0]["name"], "y");
    assert!(
        call["seconds"]["run"].is_f64()
            && call["notes"].is_array()
            && call["request_id"].is_string(),
        "{call}"
    );
    let list = good_json(host.path(), &["ls", "--json"]);
    assert_eq!(list["flights"].as_array().unwrap().len(), 2);
    let kernels = good_json(host.path(), &["kernels", "--json"]);
    assert!(
        kernels["kernels"]
            .as_array()
            .unwrap()
            .iter()
            .any(|kernel| kernel["name"] == "scale-shift")
    );
    let get = good_json(host.path(), &["get", "y", "y.npy", "--json"]);
    assert_eq!(get["tensors"][0]["dtype"], "float64");
    let (_, values) = get_f64(&host.path().join("y.npy"));
    assert!(values[..3].iter().all(|v| *v == f64::INFINITY) && values[3].is_nan());
    assert_eq!(
        good_json(host.path(), &["rm", "y", "--json"])["dropped"],
        serde_json::json!(["y"])
    );
    let local = good_json(
        host.path(),
        &[
            "run",
            "scale-shift",
            "-i",
            "x=x.npy",
            "-o",
            "z.npy",
            "--json",
        ],
    );
    assert_eq!(local["outputs"][0]["file"], "z.npy");
    assert_eq!(local["outputs"][0]["port"], "y");
}

#[test]
fn mistakes_name_the_thing_and_the_remedy() {
    let host = Served::start(&["--log-format", "json"]);
    put_f64(&host.path().join("x.npy"), &[4], &[0.0; 4]);
    fs::write(
        host.path().join("short.npy"),
        &fs::read(host.path().join("x.npy")).unwrap()[..140],
    )
    .unwrap();
    fs::write(host.path().join("x.txt"), "1 2 3").unwrap();
    good(host.path(), &["put", "x", "x.npy"]);
    let before = names_in(host.path());
    let call =
        |more: &[&'static str]| [&["call", "scale-shift"], more, &["--output", "y"]].concat();
    for (arguments, exit, reason, says) in [
        (vec!["put", "x", "x.npy"], 3, "NAME_TAKEN", "--replace"),
        (
            vec!["put", "q", "missing.npy"],
            3,
            "BAD_FILE",
            "missing.npy",
        ),
        (vec!["put", "q", "short.npy"], 3, "BAD_FILE", "short.npy"),
        (vec!["put", "q", "x.txt"], 3, "BAD_FILE", ".npy"),
        (vec!["put", "a#b", "x.npy"], 3, "BAD_NAME", "a#b"),
        (
            vec!["put", "q", "x.npy", "--column", "c"],
            3,
            "TENSOR_NOT_FOUND",
            "\"c\"",
        ),
        (
            vec!["get", "q", "q.npy"],
            3,
            "FLIGHT_NOT_FOUND",
            "strait ls",
        ),
        (vec!["get", "x#c", "q.npy"], 3, "TENSOR_NOT_FOUND", "\"c\""),
        (vec!["get", "x", "q.txt"], 3, "BAD_FILE", ".npy"),
        (
            vec!["get", "x", "missing/q.npy"],
            3,
            "BAD_FILE",
            "missing/q.npy",
        ),
        (vec!["rm", "q"], 3, "FLIGHT_NOT_FOUND", "`q`"),
        (vec!["kernels", "q"], 3, "KERNEL_NOT_FOUND", "`q`"),
        (
            vec!["call", "q", "-i", "x=x", "-o", "y"],
            3,
            "KERNEL_NOT_FOUND",
            "scale-shift",
        ),
        (call(&["-i", "q=x"]), 3, "UNKNOWN_INPUT", "`q`"),
        (call(&[]), 3, "MISSING_INPUT", "`x`"),
        (call(&["-i", "x=q"]), 3, "FLIGHT_NOT_FOUND", "`q`"),
        (
            call(&["-i", "x=x", "-p", "q=1"]),
            3,
            "UNKNOWN_PARAMETER",
            "`a`, `b`",
        ),
        (
            call(&["-i", "x=x", "-p", "a=two"]),
            3,
            "BAD_PARAMETER",
            "two",
        ),
        (
            call(&["-i", "x=x", "--output", "q=z"]),
            3,
            "UNKNOWN_OUTPUT",
            "`q`",
        ),
        (
            call(&["-i", "x=x", "--deadline-ms", "99999999"]),
            3,
            "BAD_LIMIT",
            "99999999",
        ),
        (
            call(&["-i", "x=x", "--request-id", "a b"]),
            3,
            "BAD_REQUEST",
            "request id",
        ),
        (
            vec!["ls", "--address", "unix:///nowhere/at/all"],
            5,
            "NO_HOST",
            "strait serve",
        ),
        (
            vec!["ls", "--address", "nowhere"],
            3,
            "BAD_ADDRESS",
            "unix:///DIRECTORY",
        ),
    ] {
        let text = bad(host.path(), &arguments, exit, reason);
        assert!(
            text.contains(says),
            "{arguments:?}: {text:?} lacks {says:?}"
        );
    }
    assert_eq!(names_in(host.path()), before, "something was left behind");
    // Usage is clap's: text only.
    for arguments in [
        &["put"][..],
        &["call", "k", "-i", "x", "-o", "y"],
        &["call", "k", "-o", "y", "--deadline-ms", "0"],
        &["nonsense"],
        &[],
    ] {
        let output = run(host.path(), arguments);
        assert_eq!(code(&output), 2, "{arguments:?}: {}", stderr(&output));
    }
    let twice = run(host.path(), &call(&["-i", "x=x", "-i", "x=y"]));
    assert!(code(&twice) == 2 && stderr(&twice).contains("twice"));
    assert!(good(host.path(), &["--help"]).contains("Exit codes:"));

    // The id that the caller chose is in the error and on the host's own line about it.
    let text = bad(
        host.path(),
        &["get", "q", "q.npy", "--request-id", "job-17"],
        3,
        "FLIGHT_NOT_FOUND",
    );
    assert!(text.contains("request: job-17"), "{text}");
    let refused = [
        "-p",
        "lo=2",
        "-p",
        "hi=1",
        "-o",
        "z",
        "--request-id",
        "job-18",
    ];
    bad(
        host.path(),
        &[&["call", "clip", "-i", "x=x"][..], &refused].concat(),
        3,
        "BAD_PARAMETER",
    );
    let log = host.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        lines.iter().any(|line| line["request_id"] == "job-18"),
        "{log}"
    );
}

#[test]
fn kernels_that_fail_are_told_from_mistakes() {
    let directory = TempDir::new().unwrap();
    let guests = ["spins", "traps", "fails", "stores_into_input"];
    let plugins: Vec<String> = guests
        .iter()
        .map(|guest| plugin(directory.path(), guest).display().to_string())
        .collect();
    let arguments: Vec<&str> = plugins
        .iter()
        .flat_map(|path| ["--plugin", path.as_str()])
        .collect();
    let host = Served::start_in(directory, &arguments);
    put_f64(&host.path().join("x.npy"), &[4], &[0.0; 4]);
    good(host.path(), &["put", "x", "x.npy"]);
    for (guest, reason) in [
        ("spins", "DEADLINE"),
        ("traps", "GUEST_TRAP"),
        ("fails", "KERNEL_FAILED"),
        ("stores_into_input", "INPUT_WRITTEN"),
    ] {
        // Large enough to be moved, so that a store into the input can be seen.
        if guest == "stores_into_input" {
            put_f64(&host.path().join("x.npy"), &[1 << 18], &vec![0.0; 1 << 18]);
            good(host.path(), &["put", "x", "x.npy", "--replace"]);
        }
        let kernel = format!("{guest}/k");
        let text = bad(
            host.path(),
            &[
                "call",
                &kernel,
                "-i",
                "x=x",
                "-o",
                "y",
                "--deadline-ms",
                "300",
            ],
            4,
            reason,
        );
        assert!(text.contains("request: "), "{text}");
        let file = format!("{guest}.wasm");
        bad(
            host.path(),
            &[
                "run",
                &file,
                "-i",
                "x=x.npy",
                "-o",
                "y.npy",
                "--deadline-ms",
                "300",
            ],
            4,
            reason,
        );
    }
    assert!(!host.path().join("y.npy").exists());
    let ambiguous = bad(
        host.path(),
        &["call", "k", "-i", "x=x", "-o", "y"],
        3,
        "AMBIGUOUS_KERNEL",
    );
    assert!(
        ambiguous.contains("spins/k") && ambiguous.contains("traps/k"),
        "{ambiguous}"
    );
    // And the host still serves.
    good(
        host.path(),
        &["call", "scale-shift", "-i", "x=x", "-o", "y"],
    );
}

#[test]
fn integer_parameters_are_exact() {
    let host = Served::start(&[]);
    let here = host.path();
    let bytes = |values: &[i128]| -> Vec<u8> {
        let low = |v: &i128| *v.to_le_bytes().first_chunk::<8>().unwrap();
        values.iter().flat_map(low).collect()
    };
    let two_53 = 1_i128 << 53;
    for (descr, x, parameter, y) in [
        (
            "<i8",
            vec![two_53, two_53 + 1, two_53 + 2],
            "hi=9007199254740993",
            vec![two_53, two_53 + 1, two_53 + 1],
        ),
        (
            "<i8",
            vec![-two_53 - 6, -two_53 - 1],
            "lo=-9007199254740993",
            vec![-two_53 - 1; 2],
        ),
        (
            "<u8",
            vec![1 << 63, 5],
            "hi=9223372036854775807",
            vec![(1 << 63) - 1, 5],
        ),
        (
            "<u8",
            vec![5, u64::MAX.into()],
            "lo=18446744073709551615",
            vec![u64::MAX.into(); 2],
        ),
        ("<u8", vec![5, 5000], "hi=1e3", vec![5, 1000]),
    ] {
        let dictionary = format!(
            "{{'descr': '{descr}', 'fortran_order': False, 'shape': ({},), }}",
            x.len()
        );
        npy(&here.join("n.npy"), &dictionary, &bytes(&x));
        good(
            here,
            &[
                "run", "clip", "-i", "x=n.npy", "-p", parameter, "-o", "run.npy",
            ],
        );
        good(here, &["put", "n", "n.npy", "--replace"]);
        good(
            here,
            &[
                "call",
                "clip",
                "-i",
                "x=n",
                "-p",
                parameter,
                "-o",
                "y",
                "--replace",
            ],
        );
        good(here, &["get", "y", "call.npy"]);
        for file in ["run.npy", "call.npy"] {
            let data = fs::read(here.join(file)).unwrap();
            assert!(data.ends_with(&bytes(&y)), "{descr} {parameter} {file}");
        }
    }
    let text = good(here, &["kernels", "clip"]);
    assert!(text.contains("number, default -inf"), "{text}");
    bad(
        here,
        &[
            "run", "clip", "-i", "x=n.npy", "-p", "hi=0x10", "-o", "run.npy",
        ],
        3,
        "BAD_PARAMETER",
    );
}

#[test]
fn several_columns_make_one_flight() {
    let host = Served::start(&[]);
    let fixture = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/host/tensor/tests/data/every_kind.arrow"
    );
    let put = run(host.path(), &["put", "all", fixture]);
    assert_eq!(code(&put), 0, "{}", stderr(&put));
    let count = |text: &str| text.lines().filter(|line| line.starts_with("all#")).count();
    let columns = TensorFile::open(Path::new(fixture)).unwrap();
    assert!(columns.tensors().len() > 1);
    assert_eq!(count(&stdout(&put)), columns.tensors().len());
    assert_eq!(
        stderr(&put).matches("left out").count(),
        columns.unsupported().len()
    );
    let text = bad(host.path(), &["get", "all", "all.npy"], 3, "BAD_INPUT");
    assert!(text.contains("all#TENSOR"), "{text}");
    // All of them into one file, and each the same bytes as in the fixture.
    good(host.path(), &["get", "all", "all.arrow"]);
    let mut original = columns;
    let mut copy = TensorFile::open(&host.path().join("all.arrow")).unwrap();
    assert_eq!(original.tensors(), copy.tensors());
    for index in 0..copy.tensors().len() {
        let bytes = usize::try_from(copy.tensors()[index].1.bytes().unwrap()).unwrap();
        let (mut one, mut other) = (vec![0; bytes], vec![1; bytes]);
        original.read_into(index, &mut one).unwrap();
        copy.read_into(index, &mut other).unwrap();
        assert_eq!(one, other, "{:?}", copy.tensors()[index]);
    }
    let name = copy.tensors()[0].0.clone();
    good(host.path(), &["get", &format!("all#{name}"), "one.npy"]);
    good(host.path(), &["put", "one", &format!("{fixture}#{name}")]);
    assert!(
        good(host.path(), &["ls"])
            .lines()
            .any(|line| line.starts_with("one "))
    );
}

#[test]
fn a_closed_stdout_is_no_error() {
    let host = Served::start(&[]);
    put_f64(&host.path().join("x.npy"), &[4], &[0.0; 4]);
    for number in 0..20 {
        good(host.path(), &["put", &format!("x{number}"), "x.npy"]);
    }
    for arguments in [&["ls"][..], &["ls", "--json"], &["kernels"]] {
        let mut child = strait(host.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // As `head` does once it has its lines, only that it has none.
        drop(child.stdout.take());
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(
            (wait(&mut child), text.as_str()),
            (Some(0), ""),
            "{arguments:?}"
        );
    }
}
