//! What the log shows of texts that guests chose.

use std::process::Command;

use serde_json::json;
use strait_client::wire::Op;

use crate::guest;
use crate::served::{Served, put};

/// The log of `strait run` with the guest `forges`.
fn log_of_a_forger(arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string("tests/guests/forges.wat").unwrap();
    let plugin = folder.path().join("forges.wasm");
    std::fs::write(&plugin, guest::component("forges", &text)).unwrap();
    let mut x = b"\x93NUMPY\x01\x00".to_vec();
    let header = format!(
        "{:<117}\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }"
    );
    x.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    x.extend(header.as_bytes());
    x.extend(1_f64.to_le_bytes());
    let input = folder.path().join("x.npy");
    std::fs::write(&input, x).unwrap();
    let done = Command::new(env!("CARGO_BIN_EXE_strait"))
        .arg("run")
        .arg(format!("{}#k", plugin.display()))
        .arg("--input")
        .arg(format!("x={}", input.display()))
        .arg("--output")
        .arg(format!("y={}", folder.path().join("y.npy").display()))
        .args(arguments)
        .env(
            "STRAIT__ENGINE__CACHE",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/compiled"),
        )
        .output()
        .unwrap();
    assert_eq!(done.status.code(), Some(4), "{done:?}");
    String::from_utf8(done.stderr).unwrap()
}

#[test]
fn a_guest_cannot_forge_a_line() {
    let log = log_of_a_forger(&[]);
    assert!(
        log.contains(r"a\n2030-01-01T00:00:00Z ERROR strait: forged\r\u{1b}[2K\u{0}b"),
        "{log}"
    );
    assert!(
        !log.lines().any(|line| line.starts_with("2030-01-01")),
        "{log}"
    );
    let controls: Vec<char> = log
        .chars()
        .filter(|c| c.is_control() && *c != '\n')
        .collect();
    assert!(controls.is_empty(), "{controls:?} in {log}");
}

#[test]
fn what_a_plugin_tells_at_its_start_is_told_of_each_call() {
    let text = r#"
(import "strait:kernel/log-sink@0.1.0" "progress" (func $progress (param i64 i64)))
(start $begin)
(func $begin (call $progress (i64.const 1) (i64.const 2)))
(func $run (param i32) (result i32) i32.const 0)"#;
    let host = Served::with_plugin(&guest::component("begins", text), &[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    for call in ["first-call", "second-call", "third-call"] {
        let invoke = json!({"kernel": "begins/k", "inputs": {"x": "x"}, "request_id": call});
        client.ask(Op::Invoke, invoke).accepted();
        // A worker's lines take a moment.
        host.eventually(&mut client, "it is told", |_| {
            let log = host.log();
            let mut lines = log.lines().filter(|line| line.contains("progress"));
            lines.any(|line| line.contains(call))
        });
    }
    let log = host.log();
    let nobodys = log.lines().find(|line| line.contains("request_id=\"-\""));
    assert_eq!(nobodys, None, "{log}");
}
