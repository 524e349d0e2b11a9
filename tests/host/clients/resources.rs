//! What runs out: descriptors, memory, the runtime directory.

use std::fs::{self, File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use serde_json::json;
use strait_client::wire::{Op, VERSION};

use super::{place, sealed};
use crate::served::{
    FINAL, PAGE, Raw, Served, check_call, memfd, number, put, ramp, scale_shift, write,
};

#[test]
fn with_no_descriptors_left_a_connection_is_told_and_the_others_are_served() {
    let host = Served::with_files(60, &[], &[]);
    let mut first = host.greeted();
    put(&mut first, "x", 3);
    let full = ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED");
    let mut connected = Vec::new();
    let refused = loop {
        assert!(connected.len() < 60, "60 descriptors hold 60 connections");
        let mut client = host.connect();
        let hello = json!({"protocol": VERSION, "client": "strait-tests"});
        let sequence = client.begin(Op::Hello, &hello, &[]);
        let reply = client.receive().expect("it is told");
        assert_eq!(reply.sequence(), sequence);
        if reply.op() != Op::Welcome {
            break (client, reply);
        }
        connected.push(client);
    };
    let message = refused.1.refused(full.0, full.1);
    assert!(message.contains("open files"), "{message}");
    refused.0.ended();
    assert!(connected.len() > 5, "only {} were served", connected.len());
    // Nor is one that says nothing kept waiting.
    let silent = host.connect();
    silent.receive().unwrap().refused(full.0, full.1);
    silent.ended();
    for _ in 0..20 {
        drop(host.connect());
    }
    // They are taken in turn: once this one is told, none of them is still to come.
    let last = host.connect();
    last.receive().unwrap().refused(full.0, full.1);
    last.ended();
    // What needs a descriptor says so; what needs none goes on.
    let flights = first.ok(Op::List, json!({}));
    assert_eq!(flights["flights"][0]["name"], "x");
    first.ok(Op::Map, json!({"name": "x"}));
    let one = json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]});
    // A connection takes two descriptors, so one may be left.
    let mut held = 0;
    let refused = loop {
        let reply = first.ask(Op::Create, one.clone());
        if reply.op() == Op::Error {
            break reply;
        }
        held += 1;
    };
    assert!(held < 3, "{held} more segments");
    refused.refused(full.0, full.1);
    let fd = sealed(memfd(PAGE), FINAL);
    let tensors = json!([place("x", 8, 0)]);
    // CREATE opens its memfd twice for an instant; ADOPT may have the one place that was too few for that.
    let adopt =
        |client: &mut Raw| client.ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()]);
    let mut reply = adopt(&mut first);
    if reply.op() != Op::Error {
        reply = adopt(&mut first);
    }
    reply.refused(full.0, full.1);
    let lines = host.log().matches("were refused").count();
    assert!((1..=4).contains(&lines), "{lines} lines: {}", host.log());
    drop(connected);
    // A session ends before its socket is closed, and only then is its place free.
    host.eventually(&mut first, "they are gone", |stats| {
        number(stats, "/account/connections") == 1
    });
    check_call(&mut host.greeted(), json!("x"), &ramp(3));
    first.ok(Op::Create, one);
}

#[test]
fn idle_results_make_room_for_segments() {
    let host = Served::with_files(100, &[], &[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let mut leases = Vec::new();
    for _ in 0..49 {
        let reply = client.ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0));
        leases.push(reply.accepted()["results"][0]["lease"].clone());
    }
    let full = ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED");
    client
        .ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0))
        .refused(full.0, full.1);
    client.ok(Op::Release, json!({"leases": leases}));
    client.ok(Op::Drop, json!({"name": "x"}));
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/pool/idle_segments"), 49);
    let created: Vec<_> = (0..50).map(|_| client.create(1)).collect();
    let one = json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]});
    let message = client.ask(Op::Create, one).refused(full.0, full.1);
    assert!(message.contains("budget of 50"), "{message}");
    let last = client.ask(Op::Map, json!({"segment": created[49].segment}));
    last.accepted();
}

#[test]
fn a_lock_on_the_runtime_directory_is_an_error_that_says_whose() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = directory.path().join("host");
    fs::create_dir(&runtime).unwrap();
    fs::set_permissions(&runtime, Permissions::from_mode(0o700)).unwrap();
    let held = File::open(&runtime).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_strait"))
        .args(["serve", "--directory", runtime.to_str().unwrap()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    let own = format!("process {}", std::process::id());
    assert!(
        text.contains("flock") && text.contains(&own) && text.contains(runtime.to_str().unwrap()),
        "{text}"
    );
    assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0);
}

#[test]
fn memory_that_is_let_go_of_is_there_for_the_next() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    // Three quarters of the budget: each needs what the one before it had.
    for round in 0..12 {
        let created = client.create((3 << 29) / 8);
        for part in 0..16 {
            write(
                created.fd.as_fd(),
                created.offset + part * (90 << 20),
                &[1; 1 << 20],
            );
        }
        match round % 3 {
            0 => drop(client.ok(Op::Release, json!({"leases": [created.lease]}))),
            1 => {
                client.ok(
                    Op::Publish,
                    json!({"segment": created.segment, "name": "big"}),
                );
                client.ok(Op::Release, json!({"leases": [created.lease]}));
                client.ok(Op::Drop, json!({"name": "big"}));
            }
            _ => {
                drop(client);
                client = host.greeted();
                host.eventually(&mut client, "it is gone", |stats| {
                    number(stats, "/sessions") == 1
                });
            }
        }
    }
}
