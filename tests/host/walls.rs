//! The walls around a worker process, as Linux and the host tell them.

use std::fs;
use std::process::Command;

use serde_json::json;
use strait_client::wire::Op;

use crate::served::{Served, check_call, put, ramp};
use crate::workers::{NO_SPARE, ON, host, worker};

const NO_USER: &str = "a user of its own";

#[test]
fn no_thread_of_a_worker_has_a_capability() {
    let (host, _client) = host(&[ON]);
    for thread in fs::read_dir(format!("/proc/{}/task", worker(&host).as_raw_nonzero())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let mut sets: Vec<_> = status.lines().filter(|l| l.starts_with("Cap")).collect();
        if !rustix::process::geteuid().is_root() {
            // What only programs could be given, of which it runs none.
            sets.retain(|set| !set.starts_with("CapBnd"));
        }
        let none = |set: &&str| set.ends_with("\t0000000000000000");
        assert!(sets.len() >= 4 && sets.iter().all(none), "{status}");
    }
    check_walls(&host);
}

/// All walls stand but those of a Landlock that an older Linux does not have, and a user of its own of a host that is root.
fn check_walls(host: &Served) {
    let log = host.log();
    let mut lacking = log.lines().filter(|line| line.contains("lacks a wall"));
    let known = |line: &str| line.contains("Landlock") || line.contains(NO_USER);
    assert!(lacking.all(known), "{log}");
}

#[test]
fn a_worker_that_is_root_lacks_a_wall() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let lacks = |settings: &[(&str, &str)]| {
        let host = Served::with(&[], &[&[ON, NO_SPARE], settings].concat());
        let mut client = host.greeted();
        put(&mut client, "x", 10);
        check_call(&mut client, json!("x"), &ramp(10));
        let workers = client.ok(Op::Workers, json!({}))["workers"].clone();
        let stands = workers[0]["walls"].as_array().unwrap();
        let lacks = workers[0]["lacks"].to_string();
        assert!(stands.contains(&json!("seccomp")), "{workers}");
        // Each wall is told of once.
        assert_ne!(
            stands.contains(&json!(NO_USER)),
            lacks.contains(NO_USER),
            "{workers}"
        );
        (lacks, host.log())
    };
    let (told, log) = lacks(&[]);
    for told in [told, log] {
        assert!(
            told.contains(NO_USER) && told.contains("workers.uids"),
            "{told}"
        );
    }
    let uids = ("STRAIT__WORKERS__UIDS", "300000-300063");
    let (told, _) = lacks(&[uids]);
    assert!(!told.contains(NO_USER), "{told}");
    let required = ("STRAIT__WORKERS__REQUIRE_WALLS", "true");
    if told == "[]" {
        lacks(&[uids, required]);
    }
    let directory = tempfile::tempdir().unwrap();
    let host = Command::new("timeout")
        .args([
            "60",
            env!("CARGO_BIN_EXE_strait"),
            "serve",
            "--directory",
            "host",
        ])
        .current_dir(directory.path())
        .env("STRAIT__ENGINE__CACHE", "")
        .envs([ON, required])
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&host.stderr);
    assert_eq!(host.status.code(), Some(1), "{log}");
    assert!(
        log.contains(NO_USER) && log.contains("workers.require_walls"),
        "{log}"
    );
    // Nothing was compiled before.
    assert!(!log.contains("a plugin was compiled"), "{log}");
}

#[test]
fn a_worker_of_another_user_than_root_has_all_walls() {
    if !rustix::process::geteuid().is_root() {
        // Then the others tell.
        return;
    }
    let host = Served::as_user(4242, &[ON]);
    check_walls(&host);
}
