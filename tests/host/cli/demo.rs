//! `strait demo`.

use std::fs;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{code, names_in, stderr, stdout, strait, until};
use crate::served::{send, wait};

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
        // Once out of the segment: the demo takes long frames.
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

    for (signal, exit) in [
        (Signal::INT, Some(130)),
        (Signal::TERM, Some(143)),
        (Signal::KILL, None),
    ] {
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
        assert_eq!(wait(&mut child), exit);
        // After SIGKILL the children see the end of their stdin, and the host removes its sockets.
        until("the demo's host is gone", || !host.exists());
        if signal == Signal::KILL {
            fs::remove_dir_all(host.parent().unwrap()).unwrap();
        }
        assert_eq!(hosts(), Vec::<String>::new(), "{signal:?}");
    }
}
