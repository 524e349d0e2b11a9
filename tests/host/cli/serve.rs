//! `strait serve`: how it starts, what it refuses, how it ends.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use std::{fs, thread};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{bad, code, good, names_in, plugin, put_f64, run, stderr, strait, until};
use crate::served::{Served, send, wait};

fn sockets(host: &Served) -> Vec<String> {
    names_in(&host.directory())
}

#[test]
fn sigterm_drains_and_exits_0() {
    let directory = TempDir::new().unwrap();
    let spins = plugin(directory.path(), "spins").display().to_string();
    for signal in [Signal::TERM, Signal::INT] {
        let mut host = Served::start(&["--plugin", &spins]);
        put_f64(&host.path().join("x.npy"), &[4], &[0.0; 4]);
        good(host.path(), &["put", "x", "x.npy"]);
        assert_eq!(sockets(&host), ["data.sock", "flight.sock"]);
        for socket in sockets(&host) {
            let mode = fs::metadata(host.directory().join(socket))
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
        assert_eq!(host.wait(), Some(0), "{}", host.log());
        assert_eq!(sockets(&host), Vec::<String>::new());
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
    assert_eq!(first.wait(), None);
    assert_eq!(
        sockets(&first),
        ["data.sock", "flight.sock"],
        "a killed host removes nothing"
    );
    bad(first.path(), &["ls"], 5, "NO_HOST");

    let mut successor = Served::start_in(first.into_path(), &[]);
    assert_eq!(good(successor.path(), &["ls"]), "", "a host begins empty");
    good(successor.path(), &["put", "x", "x.npy"]);
    successor.signal(Signal::TERM);
    assert_eq!(successor.wait(), Some(0));
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

/// A host in a directory of its own below `place`, started with these options, and its ready line.
fn temporary(place: &Path, settings: &[(&str, &str)], options: &[&str]) -> (Child, Value) {
    let mut host = strait(place)
        .args(["serve", "--temporary", "--json", "--log-level", "warn"])
        .args(options)
        .env("TMPDIR", place)
        .envs(settings.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(host.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let ready = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
    (host, ready)
}

fn directory_of(ready: &Value) -> PathBuf {
    let address = ready["address"].as_str().unwrap();
    address.strip_prefix("unix://").unwrap().into()
}

#[test]
fn a_temporary_directory_goes_with_its_host() {
    let place = TempDir::new().unwrap();
    // Where others would find a host does not count.
    let elsewhere = place.path().join("elsewhere").display().to_string();
    let settings = [
        ("STRAIT__SERVER__DIRECTORY", elsewhere.as_str()),
        ("STRAIT__SERVER__TCP", "127.0.0.1:1"),
    ];
    let start = || temporary(place.path(), &settings, &["--until-stdin-ends"]);
    let nothing_is_left = || assert_eq!(names_in(place.path()), Vec::<String>::new());
    let (mut host, ready) = start();
    let directory = directory_of(&ready);
    assert_eq!(directory.parent(), Some(place.path()));
    let mode = fs::metadata(&directory).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(names_in(&directory), ["data.sock", "flight.sock"]);
    let flight = format!("grpc+unix://{}/flight.sock", directory.display());
    assert_eq!(ready["flight"], flight);
    assert_eq!(ready["tcp"], Value::Null);
    assert_eq!(ready["pid"], host.id());
    assert_eq!(ready["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(ready["protocol"], strait_client::wire::VERSION);
    let address = ready["address"].as_str().unwrap();
    let listed = good(place.path(), &["kernels", "--json", "--address", address]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(
        ready["kernels"],
        listed["kernels"].as_array().unwrap().len()
    );
    drop(host.stdin.take());
    assert_eq!(wait(&mut host), Some(0));
    nothing_is_left();

    for signal in [Signal::TERM, Signal::INT] {
        let (mut host, _) = start();
        send(&host, signal);
        assert_eq!(wait(&mut host), Some(0));
        nothing_is_left();
    }

    let (mut host, ready) = start();
    send(&host, Signal::KILL);
    assert_eq!(wait(&mut host), None);
    assert_eq!(names_in(place.path()).len(), 1);
    assert_eq!(
        names_in(&directory_of(&ready)),
        ["data.sock", "flight.sock"],
        "what a kill may leave is told in --help"
    );
}

#[test]
fn two_temporary_hosts_know_nothing_of_each_other() {
    let place = TempDir::new().unwrap();
    let tcp = ["--tcp", "127.0.0.1:0"];
    let (mut first, one) = temporary(place.path(), &[], &tcp);
    let (mut second, two) = temporary(place.path(), &[], &tcp);
    assert_ne!(directory_of(&one), directory_of(&two));
    assert_ne!(one["tcp"], two["tcp"]);
    assert!(
        one["tcp"]
            .as_str()
            .unwrap()
            .starts_with("grpc+tcp://127.0.0.1:")
    );
    for host in [&mut first, &mut second] {
        send(host, Signal::TERM);
        assert_eq!(wait(host), Some(0));
    }
}

#[test]
fn a_temporary_host_that_does_not_start_leaves_nothing() {
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("not.wasm"), "not a component").unwrap();
    let long = place.path().join("d".repeat(100));
    fs::create_dir(&long).unwrap();
    let missing = place.path().join("missing");
    for (place_of_it, options, exit, says) in [
        (place.path(), &["--plugin", "not.wasm"][..], 1, "not.wasm"),
        (&long, &[], 3, "at most 107"),
        (&missing, &[], 3, "set TMPDIR"),
        (place.path(), &["--directory", "d"], 2, "--directory"),
    ] {
        let mut host = strait(place.path());
        host.args(["serve", "--temporary", "--json"])
            .args(options)
            .env("TMPDIR", place_of_it);
        let output = host.output().unwrap();
        let text = stderr(&output);
        assert_eq!(code(&output), exit, "{options:?}: {text}");
        assert!(text.contains(says), "{options:?}: {text:?} lacks {says:?}");
        if exit != 2 {
            let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
            let message = answer["error"]["message"].as_str().unwrap();
            assert!(message.contains(says), "{answer}");
        }
        let mut names = names_in(place.path());
        names.retain(|name| name != "not.wasm" && !name.starts_with('d'));
        assert_eq!(names, Vec::<String>::new(), "{options:?}");
        assert_eq!(names_in(&long), Vec::<String>::new(), "{options:?}");
    }
}

#[test]
fn a_host_that_is_told_to_end_while_it_starts_does_so() {
    let place = TempDir::new().unwrap();
    // Nothing is compiled already.
    let cache = place.path().join("cache").display().to_string();
    let mut host = strait(place.path());
    let mut host = host
        .args(["serve", "--temporary", "--until-stdin-ends"])
        .env("TMPDIR", place.path())
        .env("STRAIT__ENGINE__CACHE", cache)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(host.stdin.take());
    assert_eq!(wait(&mut host), Some(0));
    let mut names = names_in(place.path());
    names.retain(|name| name != "cache");
    assert_eq!(names, Vec::<String>::new());
}
