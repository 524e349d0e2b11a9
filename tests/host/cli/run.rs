//! `strait run` and plugins in files, without a host.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::{bad, code, get_f64, good, names_in, npy, plugin, put_f64, run, stderr, stdout};
use crate::guest;

#[test]
fn run_needs_no_host() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    let here = directory.path();
    // 2 x 3 in Fortran order: the columns one after the other.
    let columns: Vec<u8> = [0.0_f64, 3.0, 1.0, 4.0, 2.0, 5.0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    npy(
        &at("f.npy"),
        "{'descr': '<f8', 'fortran_order': True, 'shape': (2, 3), }",
        &columns,
    );
    let big: Vec<u8> = [0.0_f64, 1.0, 2.0, 3.0, 4.0, 5.0]
        .iter()
        .flat_map(|v| v.to_be_bytes())
        .collect();
    npy(
        &at("big.npy"),
        "{'descr': '>f8', 'fortran_order': False, 'shape': (2, 3), }",
        &big,
    );
    npy(
        &at("short.npy"),
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }",
        &columns[..40],
    );
    npy(
        &at("int.npy"),
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }",
        &[0; 8],
    );
    let expected = (vec![2, 3], vec![1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
    for input in ["x=f.npy", "x=big.npy"] {
        let line = good(
            here,
            &[
                "run",
                "scale-shift",
                "--input",
                input,
                "-p",
                "a=2",
                "-p",
                "b=1",
                "--output",
                "y=out.npy",
            ],
        );
        assert!(
            line.contains("float64 [2, 3]") && line.contains("out.npy"),
            "{line:?}"
        );
        assert_eq!(get_f64(&at("out.npy")), expected, "{input}");
    }
    // Over an older file, in the other format, and from one column of it.
    good(
        here,
        &[
            "run",
            "scale-shift",
            "-i",
            "x=f.npy",
            "-p",
            "a=2",
            "-p",
            "b=1",
            "-o",
            "out.arrow",
        ],
    );
    good(
        here,
        &["run", "scale-shift", "-i", "x=out.arrow#y", "-o", "out.npy"],
    );
    assert_eq!(get_f64(&at("out.npy")), expected);

    let text = good(here, &["kernels", "--local", "scale-shift"]);
    assert!(
        text.starts_with("scale-shift  (standard") && text.contains("param"),
        "{text}"
    );
    let standard = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/plugins/prebuilt/standard.wasm"
    );
    good(
        here,
        &[
            "run",
            &format!("{standard}#scale-shift"),
            "-i",
            "x=f.npy",
            "-o",
            "out.npy",
        ],
    );
    let one = plugin(here, "answers_seven").display().to_string();
    assert!(good(here, &["kernels", &one]).starts_with("k  (answers_seven 0.0.1)"));
    fs::write(at("not.wasm"), "not a component").unwrap();
    let before = names_in(here);
    let out = ["-o", "new.npy"];
    for (arguments, exit, reason, says) in [
        (
            &["run", "q", "-i", "x=f.npy"][..],
            3,
            "KERNEL_NOT_FOUND",
            "scale-shift",
        ),
        (
            &["run", "not.wasm", "-i", "x=f.npy"],
            3,
            "BAD_PLUGIN",
            "not.wasm",
        ),
        (
            &["run", "missing.wasm", "-i", "x=f.npy"],
            3,
            "BAD_FILE",
            "missing.wasm",
        ),
        (
            &["run", &format!("{one}#q"), "-i", "x=f.npy"],
            3,
            "KERNEL_NOT_FOUND",
            "it has k",
        ),
        (
            &["run", "scale-shift", "-i", "x=short.npy"],
            3,
            "BAD_FILE",
            "short.npy",
        ),
        (
            &["run", "scale-shift", "-i", "x=missing.npy"],
            3,
            "BAD_FILE",
            "missing.npy",
        ),
        (
            &["run", "scale-shift", "-i", "x=int.npy"],
            3,
            "BAD_INPUT",
            "int32",
        ),
        (
            &["run", "scale-shift", "-i", "q=f.npy"],
            3,
            "UNKNOWN_INPUT",
            "`q`",
        ),
        (&["run", "scale-shift"], 3, "MISSING_INPUT", "`x`"),
        (
            &["run", "scale-shift", "-i", "x=f.npy", "-p", "q=1"],
            3,
            "UNKNOWN_PARAMETER",
            "`q`",
        ),
        (
            &["run", "scale-shift", "-i", "x=f.npy", "-p", "a=one"],
            3,
            "BAD_PARAMETER",
            "one",
        ),
        (
            &["run", "scale-shift", "-i", "x=out.arrow#q"],
            3,
            "TENSOR_NOT_FOUND",
            "\"q\"",
        ),
        (
            &["run", "scale-shift", "-i", "x=f.npy", "-o", "q=q.npy"],
            3,
            "UNKNOWN_OUTPUT",
            "`q`",
        ),
    ] {
        let text = bad(here, &[arguments, &out].concat(), exit, reason);
        assert!(
            text.contains(says),
            "{arguments:?}: {text:?} lacks {says:?}"
        );
    }
    assert_eq!(names_in(here), before, "something was left behind");
    bad(
        here,
        &[
            "run",
            "scale-shift",
            "-i",
            "x=f.npy",
            "-o",
            "missing/new.npy",
        ],
        3,
        "BAD_FILE",
    );
    let kept = fs::read(at("out.npy")).unwrap();
    bad(
        here,
        &["run", "scale-shift", "-i", "x=short.npy", "-o", "out.npy"],
        3,
        "BAD_FILE",
    );
    assert_eq!(
        fs::read(at("out.npy")).unwrap(),
        kept,
        "an older file stays as it was"
    );
}

#[test]
fn a_core_module_that_is_no_plugin_says_what_it_lacks() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    let module = guest::module("core", "");
    let export = |name: &str| format!("(export \"strait:kernel/kernels@0.1.0#{name}\" (func");
    let without = |name: &str| module.replace(&export(name), "(export \"other\" (func");
    let whole = guest::with_bindings(&module);
    fs::write(here.join("good.wasm"), &whole).unwrap();
    assert!(good(here, &["kernels", "good.wasm"]).starts_with("k  (core 0.0.1)"));

    let misfits = [
        (
            guest::with_bindings(&without("run")),
            "it is a core module without the export `strait:kernel/kernels@0.1.0#run`",
        ),
        (
            guest::with_bindings(&module.replace(
                &format!("{} $bind", export("bind")),
                &format!("{} $run", export("bind")),
            )),
            "`strait:kernel/kernels@0.1.0#bind` has the type (i32) -> i32 and must have (i32, i32, i32, i32) -> i32",
        ),
        (
            guest::with_bindings(&module.replace("cabi_realloc", "other_realloc")),
            "it is a core module that does not become a component",
        ),
        (
            wat::parse_str(&module).unwrap(),
            "it is a core module without the section `component-type`",
        ),
        (
            wat::parse_str("(module (func (export \"run\")))").unwrap(),
            "without the exports `strait:kernel/kernels@0.1.0#describe`, `strait:kernel/kernels@0.1.0#open`",
        ),
    ];
    for (bytes, says) in misfits {
        fs::write(here.join("core.wasm"), bytes).unwrap();
        let text = bad(here, &["kernels", "core.wasm"], 3, "BAD_PLUGIN");
        assert!(text.contains(says), "{text:?} lacks {says:?}");
        assert!(text.contains("core.wasm"), "{text:?}");
    }
    // Cut off anywhere: an error, and `bad` fails on a panic.
    for length in [8, 9, 40, whole.len() / 2, whole.len() - 1] {
        fs::write(here.join("core.wasm"), &whole[..length]).unwrap();
        bad(here, &["kernels", "core.wasm"], 3, "BAD_PLUGIN");
    }
}

#[test]
fn a_plugin_in_a_file_may_have_any_name() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    let bytes = guest::component("standard", "");
    fs::write(here.join("standard.wasm"), bytes).unwrap();
    put_f64(&here.join("x.npy"), &[2], &[1.0, 2.0]);
    assert!(good(here, &["kernels", "standard.wasm"]).starts_with("k  (standard 0.0.1)"));
    good(
        here,
        &["run", "standard.wasm", "-i", "x=x.npy", "-o", "y.npy"],
    );
    assert_eq!(get_f64(&here.join("y.npy")), (vec![2], vec![1.0, 2.0]));
}

#[test]
fn a_name_with_line_breaks_makes_no_line_of_its_own() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    let forged = "x\nstrait: all is well\u{1b}[2J\u{85}.npy";
    put_f64(&here.join(forged), &[2], &[1.0, 2.0]);
    fs::write(here.join("no.npy"), "no numbers").unwrap();
    let input = format!("x={forged}");
    for (arguments, exit) in [
        (vec!["run", "scale-shift", "-i", &input, "-o", forged], 0),
        (
            vec![
                "run",
                "scale-shift",
                "-i",
                &input,
                "-p",
                "a=1\n2",
                "-o",
                "y.npy",
            ],
            3,
        ),
        (
            vec!["run", "scale-shift", "-i", &input, "-o", "missing\n/y.npy"],
            3,
        ),
        (vec!["run", forged, "-i", &input, "-o", "y.npy"], 3),
        (vec!["run", "a\r\nb.wasm", "-i", &input, "-o", "y.npy"], 3),
        (
            vec!["run", "scale-shift", "-i", "x=a\nb.npy", "-o", "y.npy"],
            3,
        ),
    ] {
        let output = run(here, &arguments);
        assert_eq!(code(&output), exit, "{}", stderr(&output));
        for text in [stdout(&output), stderr(&output)] {
            let odd = text.lines().find(|line| {
                line.starts_with("strait: all") || line.contains(|c: char| c.is_control())
            });
            assert_eq!(odd, None, "{text}");
        }
        let json = run(here, &[&arguments[..], &["--json"]].concat()).stdout;
        let text = String::from_utf8(json).unwrap();
        assert_eq!(
            text.matches(|c: char| c.is_control()).collect::<Vec<_>>(),
            ["\n"]
        );
        let object: Value = serde_json::from_str(&text).unwrap();
        if exit == 0 {
            assert_eq!(object["outputs"][0]["file"], forged);
        } else {
            assert!(object["error"]["message"].is_string());
        }
    }
}

fn pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

#[test]
fn a_plugin_is_a_regular_file_and_nobody_waits_for_another() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    put_f64(&here.join("x.npy"), &[2], &[1.0, 2.0]);
    pipe(&here.join("pipe.wasm"));
    fs::create_dir(here.join("directory.wasm")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", here.join("zero.wasm")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(here.join("socket.wasm")).unwrap();
    let huge = fs::File::create(here.join("huge.wasm")).unwrap();
    huge.set_len(1 << 40).unwrap();
    for (file, says) in [
        ("pipe.wasm", "not a regular file"),
        ("directory.wasm", "not a regular file"),
        ("zero.wasm", "not a regular file"),
        ("socket.wasm", "not a regular file"),
        (
            "huge.wasm",
            "has 1099511627776 bytes; a plugin has at most 268435456",
        ),
    ] {
        for arguments in [
            &["kernels", file][..],
            &["run", file, "-i", "x=x.npy", "-o", "y.npy"],
        ] {
            let text = bad(here, arguments, 3, "BAD_FILE");
            assert!(text.contains(file) && text.contains(says), "{text:?}");
        }
        let output = run(here, &["serve", "--directory", "host", "--plugin", file]);
        let text = stderr(&output);
        assert_ne!(code(&output), 0, "{text}");
        assert!(text.contains(file) && text.contains(says), "{text:?}");
    }
}

#[test]
fn rows_are_cut_into_as_many_slices_as_asked_for() {
    let directory = TempDir::new().unwrap();
    let here = directory.path();
    let elements = 300_000_u32;
    let bytes: Vec<u8> = (0..elements)
        .flat_map(|i| (f64::from(i) - 1e5).to_le_bytes())
        .collect();
    npy(
        &here.join("x.npy"),
        "{'descr': '<f8', 'fortran_order': False, 'shape': (300000, ), }",
        &bytes,
    );
    let clipped = |threads: &str, file: &str| {
        let output = format!("y={file}");
        let arguments = [
            "run",
            "clip",
            "--input",
            "x=x.npy",
            "-p",
            "lo=-7",
            "--threads",
            threads,
            "--output",
            &output,
            "--json",
        ];
        let told: Value = serde_json::from_str(&good(here, &arguments)).unwrap();
        let slices = told["slices"].as_u64().unwrap();
        (slices, fs::read(here.join(file)).unwrap())
    };
    let (slices, whole) = clipped("1", "whole.npy");
    assert_eq!(slices, 0);
    for threads in ["2", "3", "7"] {
        let (slices, cut) = clipped(threads, "cut.npy");
        assert!((2..=threads.parse().unwrap()).contains(&slices), "{slices}");
        assert!(cut == whole, "{threads}");
    }
    for threads in ["0", "65", "x"] {
        let arguments = ["run", "clip", "--threads", threads, "--output", "y=y.npy"];
        assert!(!run(here, &arguments).status.success(), "{threads}");
    }
}
