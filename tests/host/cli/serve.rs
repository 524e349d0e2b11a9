//! `strait serve`: how it starts, what it refuses, how it ends.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;
use std::{fs, thread};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{bad, code, good, names_in, plugin, put_f64, run, stderr, strait, until};
use crate::served::Served;

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
