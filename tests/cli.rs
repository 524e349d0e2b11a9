//! The real binary: its commands, exit codes, errors and JSON, against a real host in a temporary
//! directory.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[path = "support/guest.rs"]
mod guest;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use strait_tensor::{Dtype, TensorFile, TensorSpec};
use tempfile::TempDir;

/// Long enough for a loaded machine; nothing here waits for it unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

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

fn run(directory: &Path, arguments: &[&str]) -> Output {
    strait(directory).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    text
}

fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .unwrap_or_else(|| panic!("{}: {}", output.status, stderr(output)))
}

/// Its stdout, after it went well.
fn good(directory: &Path, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// Its one JSON object, after it went well.
fn good_json(directory: &Path, arguments: &[&str]) -> Value {
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

/// A running host in `directory/host`; killed when it drops.
struct Served {
    directory: TempDir,
    child: Child,
    ready: String,
}

impl Served {
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(TempDir::new().unwrap(), arguments)
    }

    fn start_in(directory: TempDir, arguments: &[&str]) -> Self {
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut child = strait(directory.path())
            .args(["serve", "--directory", "host"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        let served = Self {
            directory,
            child,
            ready,
        };
        assert!(
            served.ready.ends_with("kernels\n"),
            "{:?}; log: {}",
            served.ready,
            served.log()
        );
        served
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap()
    }

    fn sockets(&self) -> Vec<String> {
        names_in(&self.path().join("host"))
    }

    fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    fn wait(&mut self) -> i32 {
        wait(&mut self.child).unwrap_or(-1)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended as the test meant it to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// The exit code, or none if a signal ended it.
fn wait(child: &mut Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(start.elapsed() < PATIENCE, "it does not end");
        thread::sleep(Duration::from_millis(10));
    }
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
            "COLUMN_NOT_FOUND",
            "\"c\"",
        ),
        (
            vec!["get", "q", "q.npy"],
            3,
            "TENSOR_NOT_FOUND",
            "strait ls",
        ),
        (vec!["get", "x#c", "q.npy"], 3, "COLUMN_NOT_FOUND", "\"c\""),
        (vec!["get", "x", "q.txt"], 3, "BAD_FILE", ".npy"),
        (
            vec!["get", "x", "missing/q.npy"],
            3,
            "BAD_FILE",
            "missing/q.npy",
        ),
        (vec!["rm", "q"], 3, "TENSOR_NOT_FOUND", "`q`"),
        (vec!["kernels", "q"], 3, "KERNEL_NOT_FOUND", "`q`"),
        (
            vec!["call", "q", "-i", "x=x", "-o", "y"],
            3,
            "KERNEL_NOT_FOUND",
            "scale-shift",
        ),
        (call(&["-i", "q=x"]), 3, "UNKNOWN_INPUT", "`q`"),
        (call(&[]), 3, "MISSING_INPUT", "`x`"),
        (call(&["-i", "x=q"]), 3, "TENSOR_NOT_FOUND", "`q`"),
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
        "TENSOR_NOT_FOUND",
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
fn sigterm_drains_and_exits_0() {
    let directory = TempDir::new().unwrap();
    let spins = plugin(directory.path(), "spins").display().to_string();
    for signal in [Signal::TERM, Signal::INT] {
        let mut host = Served::start(&["--plugin", &spins]);
        put_f64(&host.path().join("x.npy"), &[4], &[0.0; 4]);
        good(host.path(), &["put", "x", "x.npy"]);
        assert_eq!(host.sockets(), ["data.sock", "flight.sock"]);
        for socket in host.sockets() {
            let mode = fs::metadata(host.path().join("host").join(socket))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let running = strait(host.path())
            .args([
                "call",
                "spins/k",
                "-i",
                "x=x",
                "-o",
                "y",
                "--deadline-ms",
                "1500",
                "--json",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Its own connection shows in the log; what it runs takes all of its deadline.
        until("the call runs", || {
            host.log().matches("connected session").count() >= 2
        });
        thread::sleep(Duration::from_millis(300));
        host.signal(signal);
        // What was running ends by its own deadline, not with the host.
        let output = running.wait_with_output().unwrap();
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(object["error"]["reason"], "DEADLINE", "{object}");
        assert_eq!(host.wait(), 0, "{}", host.log());
        assert_eq!(host.sockets(), Vec::<String>::new());
        bad(host.path(), &["ls"], 5, "NO_HOST");
    }
}

#[test]
fn a_directory_has_one_host() {
    let mut first = Served::start(&[]);
    let second = run(first.path(), &["serve", "--directory", "host"]);
    assert_eq!(code(&second), 1);
    assert!(
        stderr(&second).contains("HOST_RUNNING"),
        "{}",
        stderr(&second)
    );
    put_f64(&first.path().join("x.npy"), &[4], &[0.0; 4]);
    good(first.path(), &["put", "x", "x.npy"]);

    first.signal(Signal::KILL);
    assert_eq!(first.wait(), -1);
    assert_eq!(
        first.sockets(),
        ["data.sock", "flight.sock"],
        "a killed host removes nothing"
    );
    bad(first.path(), &["ls"], 5, "NO_HOST");

    let directory = std::mem::replace(&mut first.directory, TempDir::new().unwrap());
    let mut successor = Served::start_in(directory, &[]);
    assert_eq!(good(successor.path(), &["ls"]), "", "a host begins empty");
    good(successor.path(), &["put", "x", "x.npy"]);
    successor.signal(Signal::TERM);
    assert_eq!(successor.wait(), 0);
}

#[test]
fn serve_refuses_what_it_cannot_trust() {
    let directory = TempDir::new().unwrap();
    let serve = |arguments: &[&str]| {
        let output = run(directory.path(), &[&["serve"], arguments].concat());
        (code(&output), stderr(&output))
    };
    fs::create_dir(directory.path().join("open")).unwrap();
    fs::set_permissions(
        directory.path().join("open"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    std::os::unix::fs::symlink(directory.path(), directory.path().join("link")).unwrap();
    fs::write(
        directory.path().join("settings.toml"),
        "[limits]\nno_such_setting = 1\n",
    )
    .unwrap();
    fs::write(directory.path().join("not.wasm"), "not a component").unwrap();
    let long = "d".repeat(100);
    for (arguments, exit, says) in [
        (&["--directory", "open"][..], 3, "chmod 700"),
        (&["--directory", "link"], 3, "not a directory"),
        (&["--directory", "not.wasm"], 3, "not.wasm"),
        (&["--directory", &long], 3, "at most 107"),
        (&["--config", "missing.toml"], 3, "missing.toml"),
        (&["--config", "settings.toml"], 3, "no_such_setting"),
        (
            &["--directory", "d", "--log-level", "strait=loud"],
            3,
            "strait=loud",
        ),
        (&["--directory", "d", "--plugin", "not.wasm"], 1, "not.wasm"),
        (
            &["--directory", "d", "--plugin", "missing.wasm"],
            1,
            "missing.wasm",
        ),
    ] {
        let (code, text) = serve(arguments);
        assert_eq!(code, exit, "{arguments:?}: {text}");
        assert!(
            text.contains(says),
            "{arguments:?}: {text:?} lacks {says:?}"
        );
    }
    assert_eq!(
        names_in(&directory.path().join("d")),
        Vec::<String>::new(),
        "a failed start leaves no socket"
    );
}

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
            "COLUMN_NOT_FOUND",
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
fn several_columns_make_one_tensor_of_columns() {
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
    assert!(text.contains("all#COLUMN"), "{text}");
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

#[test]
fn the_demo_verifies_itself_and_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let demo = |arguments: &[&str]| {
        let mut command = strait(directory.path());
        command
            .env("TMPDIR", directory.path())
            .arg("demo")
            .args(arguments);
        command
    };
    let output = demo(&["--bytes", "4194304", "--calls", "3", "--json"])
        .output()
        .unwrap();
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (code(&output), &object["verified"]),
        (0, &Value::Bool(true)),
        "{object}: {}",
        stderr(&output)
    );
    assert!(
        object["native_seconds"]
            .as_f64()
            .is_some_and(|seconds| seconds > 0.0),
        "{object}"
    );
    let paths = object["paths"].as_array().unwrap();
    for (path, name, same_pages, copied) in [
        (&paths[0], "mapped call", true, 0),
        (&paths[1], "inline Flight", false, 4_194_304),
    ] {
        assert_eq!(path["name"], name);
        assert_eq!(path["same_pages"], same_pages, "{path}");
        assert_eq!(path["bytes"], 4_194_304);
        assert_eq!(path["copied_bytes"], copied, "{path}");
        assert!(
            path["seconds"]
                .as_f64()
                .is_some_and(|seconds| seconds > 0.0),
            "{path}"
        );
    }
    let small = demo(&["--bytes", "1000", "--calls", "1"]).output().unwrap();
    assert_eq!(code(&small), 0, "{}", stderr(&small));
    assert!(
        stdout(&small).contains("are copied into the guest")
            && stdout(&small).ends_with("verified\n")
    );
    let large = demo(&["--bytes", "1000000000000000"]).output().unwrap();
    assert_eq!(code(&large), 3, "{}", stderr(&large));
    assert_eq!(names_in(directory.path()), Vec::<String>::new());

    for (signal, exit) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::KILL, -1)] {
        let mut child = demo(&["--calls", "1000"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let hosts = || names_in(directory.path());
        until("the demo's host is up", || {
            hosts()
                .first()
                .is_some_and(|name| directory.path().join(name).join("flight.sock").exists())
        });
        let host = directory.path().join(&hosts()[0]).join("data.sock");
        send(&child, signal);
        assert_eq!(wait(&mut child).unwrap_or(-1), exit);
        // After SIGKILL the children see the end of their stdin, and the host removes its sockets.
        until("the demo's host is gone", || !host.exists());
        if signal == Signal::KILL {
            fs::remove_dir_all(host.parent().unwrap()).unwrap();
        }
        assert_eq!(hosts(), Vec::<String>::new(), "{signal:?}");
    }
}
