//! The real binary: its commands, exit codes, errors and JSON, against a real host in a temporary
//! directory.

mod commands;
mod demo;
mod files;
mod pipelines;
mod run;
mod serve;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::Value;
use strait_tensor::{Dtype, TensorFile, TensorSpec};

use crate::guest;
use crate::served::PATIENCE;

/// The binary, without what this machine's environment would tell it.
fn strait(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strait"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("STRAIT_")) {
        command.env_remove(name);
    }
    command
        .current_dir(directory)
        .env_remove("RUNTIME_DIRECTORY")
        .env_remove("XDG_RUNTIME_DIR")
        .env(
            "XDG_CACHE_HOME",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/cache"),
        )
        .env(
            "STRAIT_ADDRESS",
            format!("unix://{}", directory.join("host").display()),
        )
        .stdin(Stdio::null());
    command
}

pub(super) fn run(directory: &Path, arguments: &[&str]) -> Output {
    strait(directory).args(arguments).output().unwrap()
}

pub(super) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(super) fn stderr(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    text
}

pub(super) fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .unwrap_or_else(|| panic!("{}: {}", output.status, stderr(output)))
}

/// Its stdout, after it went well.
pub(super) fn good(directory: &Path, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// Its one JSON object, after it went well.
pub(super) fn good_json(directory: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&good(directory, arguments)).unwrap()
}

/// Fails with this exit code and reason, as text and as JSON; answers the text.
fn bad(directory: &Path, arguments: &[&str], exit: i32, reason: &str) -> String {
    let output = run(directory, arguments);
    let text = stderr(&output);
    assert_eq!(code(&output), exit, "{arguments:?}: {text}");
    assert!(
        text.starts_with("strait: ") && text.contains(reason),
        "{arguments:?}: {text:?} lacks {reason}"
    );
    let output = run(directory, &[arguments, &["--json"]].concat());
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["error"]["reason"], reason, "{object}");
    assert_eq!(object["error"]["exit_code"], exit, "{object}");
    assert_eq!(code(&output), exit);
    text
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A .npy file as numpy writes it, from its header's dictionary and its data.
fn npy(path: &Path, dictionary: &str, data: &[u8]) {
    let mut header = dictionary.to_owned();
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

fn put_f64(path: &Path, shape: &[u64], values: &[f64]) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: shape.to_vec(),
    };
    strait_tensor::write(path, "x", &spec, &bytes).unwrap();
}

fn get_f64(path: &Path) -> (Vec<u64>, Vec<f64>) {
    let mut file = TensorFile::open(path).unwrap();
    let [(_, spec)] = file.tensors() else {
        panic!("{:?}", file.tensors())
    };
    let spec = spec.clone();
    assert_eq!(spec.dtype, Dtype::Float64);
    let mut bytes = vec![0; usize::try_from(spec.bytes().unwrap()).unwrap()];
    file.read_into(0, &mut bytes).unwrap();
    let values = bytes
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    (spec.shape, values)
}

/// A plugin with the kernel `k` from a file of the hostile corpus, as a file in `directory`.
fn plugin(directory: &Path, guest: &str) -> PathBuf {
    let text = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/guests")
            .join(guest)
            .with_extension("wat"),
    );
    let path = directory.join(guest).with_extension("wasm");
    fs::write(&path, guest::component(guest, &text.unwrap())).unwrap();
    path
}
