//! Leases and sessions: what expires, what is whose, many at once, and the end of the host.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use strait_client::wire::Op;
use strait_memory::ReadMapping;

use super::{MOVED, host_with_spins, mappings};
use crate::served::{Holdings, Raw, Served, as_user, check_call, number, put, ramp, scale_shift};

fn gone(client: &Raw, lease: &Value, segment: &Value) {
    let frame = client
        .receive()
        .expect("GONE comes over a connection that stays");
    assert_eq!(
        (frame.op(), frame.sequence()),
        (Op::Gone, 0),
        "{}",
        frame.text
    );
    assert_eq!(
        frame.body(),
        json!({"lease": lease, "segment": segment, "reason": "expired"})
    );
}

#[test]
fn a_lease_that_expires_is_announced_and_what_is_mapped_stays() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    let late = ("FAILED_PRECONDITION", "LEASE_EXPIRED");

    // A created segment ends with its lease.
    let body =
        json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [MOVED]}], "lease_ms": 50});
    let created = client.ask(Op::Create, body).accepted();
    assert_eq!(created["expires_ms"], 50);
    let (lease, segment) = (&created["lease"], &created["mapping"]["segment"]);
    gone(&client, lease, segment);
    client
        .ask(Op::Publish, json!({"segment": segment, "name": "late"}))
        .refused(late.0, late.1);
    client
        .ask(Op::Seal, json!({"segment": segment}))
        .refused(late.0, late.1);
    client
        .ask(Op::Map, json!({"segment": segment}))
        .refused(late.0, late.1);
    client
        .ask(
            Op::Invoke,
            scale_shift(json!({"segment": segment}), 1.0, 0.0),
        )
        .refused(late.0, late.1);
    client
        .ask(Op::Renew, json!({"leases": [lease]}))
        .refused(late.0, late.1);
    assert_eq!(
        client.ok(Op::Release, json!({"leases": [lease]}))["released"],
        0
    );

    // A renewed one lives on; when one of several is gone none is renewed.
    let first = client.ok(Op::Map, json!({"name": "x", "lease_ms": 400}));
    let second = client.ok(Op::Map, json!({"name": "x", "lease_ms": 400}));
    client
        .ask(
            Op::Renew,
            json!({"leases": [second["lease"], lease], "lease_ms": 600_000}),
        )
        .refused(late.0, late.1);
    assert_eq!(
        client.ok(
            Op::Renew,
            json!({"leases": [first["lease"]], "lease_ms": 600_000})
        )["expires_ms"],
        600_000
    );
    gone(&client, &second["lease"], &second["mapping"]["segment"]);
    client.ok(Op::Map, json!({"segment": first["mapping"]["segment"]}));
    assert_eq!(
        client.ok(Op::Stats, json!({}))["own"],
        json!({"leases": 2, "segments": 1})
    );

    // A result that is mapped when its lease expires: nobody writes there again.
    let mut invoke = scale_shift(json!("x"), 3.0, 0.0);
    invoke["lease_ms"] = json!(50);
    let reply = client.ask(Op::Invoke, invoke);
    let result = reply.accepted()["results"][0].clone();
    let bytes = usize::try_from(result["mapping"]["bytes"].as_u64().unwrap()).unwrap();
    let pages = ReadMapping::of_result(&reply.fds[0], bytes).unwrap();
    let snapshot = pages.bytes().to_vec();
    gone(&client, &result["lease"], &result["mapping"]["segment"]);
    for b in 1..20 {
        let reply = client.ask(Op::Invoke, scale_shift(json!("x"), 0.0, f64::from(b)));
        let other = ReadMapping::of_result(&reply.fds[0], bytes).unwrap();
        assert_ne!(other.inode(), pages.inode());
        client.ok(
            Op::Release,
            json!({"leases": [reply.body()["results"][0]["lease"]]}),
        );
    }
    assert!(
        pages.bytes() == snapshot,
        "an expired result's pages changed under their reader"
    );
    drop(client);
    let mut client = host.greeted();
    // The reader still has them, so they are charged still, and not when it is done.
    let held = Holdings::of(&client.ok(Op::Stats, json!({}))).budget;
    assert!(held >= before.budget + bytes as u64, "{held} of {before:?}");
    drop((pages, reply));
    host.eventually(&mut client, "as before", |stats| {
        Holdings::of(stats) == before
    });
}

#[test]
fn a_lease_is_its_sessions_own() {
    let host = Served::start(&[]);
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let created = one.create(10);
    created.fill(&ramp(10));
    let id = json!({"segment": created.segment});
    let missing = ("NOT_FOUND", "SEGMENT_NOT_FOUND");
    for op in [Op::Map, Op::Seal] {
        other.ask(op, id.clone()).refused(missing.0, missing.1);
    }
    other
        .ask(
            Op::Publish,
            json!({"segment": created.segment, "name": "stolen"}),
        )
        .refused(missing.0, missing.1);
    other
        .ask(Op::Invoke, scale_shift(id.clone(), 1.0, 0.0))
        .refused(missing.0, missing.1);
    other
        .ask(Op::Renew, json!({"leases": [created.lease]}))
        .refused("FAILED_PRECONDITION", "LEASE_EXPIRED");
    assert_eq!(
        other.ok(Op::Release, json!({"leases": [created.lease, 0, u64::MAX]}))["released"],
        0
    );
    one.ok(Op::Map, id);
    assert_eq!(
        one.ok(
            Op::Release,
            json!({"leases": [created.lease, created.lease]})
        )["released"],
        1
    );
}

#[test]
fn many_clients_at_once_and_many_one_after_another() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
    let start = Holdings::of(&host.settled(&mut watcher));
    std::thread::scope(|scope| {
        for index in 0..64_u64 {
            let host = &host;
            scope.spawn(move || {
                let mut client = host.greeted();
                let count = 1000 + index;
                let name = format!("of-{index}");
                put(&mut client, &name, count);
                for _ in 0..4 {
                    check_call(&mut client, json!(name), &ramp(count));
                    check_call(&mut client, json!("x"), &ramp(MOVED));
                }
                client.ok(Op::Drop, json!({"name": name}));
            });
        }
    });
    host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == start
    });
    let mut counts = Vec::new();
    for turn in 0..1000 {
        match turn % 4 {
            0 => drop(host.connect()),
            1 => drop(host.greeted()),
            2 => {
                // It does not wait for the answers.
                let mut client = host.greeted();
                client.begin(
                    Op::Create,
                    &json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [MOVED]}]}),
                    &[],
                );
                client.begin(Op::Invoke, &scale_shift(json!("x"), 1.0, 0.0), &[]);
            }
            _ => {
                let mut client = host.greeted();
                client.create(10);
                client.ok(Op::Map, json!({"name": "x"}));
            }
        }
        if turn % 250 == 249 {
            let stats = host.eventually(&mut watcher, "as before", |stats| {
                Holdings::of(stats) == start
            });
            counts.push(mappings(&stats));
        }
    }
    // A mapping that one connection in four left behind would be 62 in each quarter.
    assert!(
        counts.last().unwrap() < &(counts[0] + 62),
        "mappings after each 250 connections: {counts:?}"
    );
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
}

#[test]
fn one_user_sees_nothing_of_anothers() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = Served::start(&[]);
    let (directory, socket): (PathBuf, PathBuf) = (host.directory(), host.socket());
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let mut root = host.greeted();
    put(&mut root, "x", 10);
    let created = root.create(10);
    created.fill(&ramp(10));
    // The way to it is open, the directory itself is not, and then the socket is not.
    mode(directory.parent().unwrap(), 0o755);
    let denied = |socket: &Path| as_user(4242, || Raw::connect(socket).err().map(|e| e.kind()));
    assert_eq!(denied(&socket), Some(std::io::ErrorKind::PermissionDenied));
    assert_eq!(
        as_user(4242, || fs::read_dir(&directory).err().map(|e| e.kind())),
        Some(std::io::ErrorKind::PermissionDenied)
    );
    mode(&directory, 0o755);
    assert_eq!(denied(&socket), Some(std::io::ErrorKind::PermissionDenied));
    mode(&socket, 0o666);
    as_user(4242, || {
        let mut client = Raw::connect(&socket).unwrap();
        assert_eq!(client.hello()["principal"], "uid:4242");
        assert_eq!(client.ok(Op::List, json!({}))["flights"], json!([]));
        let missing = ("NOT_FOUND", "FLIGHT_NOT_FOUND");
        for op in [Op::Lookup, Op::Map, Op::Drop] {
            client
                .ask(op, json!({"name": "x"}))
                .refused(missing.0, missing.1);
        }
        client
            .ask(Op::Invoke, scale_shift(json!("x"), 1.0, 0.0))
            .refused(missing.0, missing.1);
        client
            .ask(Op::Map, json!({"segment": created.segment}))
            .refused("NOT_FOUND", "SEGMENT_NOT_FOUND");
        assert_eq!(
            client.ok(Op::Release, json!({"leases": [created.lease]}))["released"],
            0
        );
        assert_eq!(client.ok(Op::Stats, json!({}))["flights"], 0);
        // A name of one's own, and not the other's.
        put(&mut client, "x", 20);
        check_call(&mut client, json!("x"), &ramp(20));
    });
    check_call(&mut root, json!("x"), &ramp(10));
    assert_eq!(root.ok(Op::Stats, json!({}))["flights"], 1);
    let overflow: u32 = fs::read_to_string("/proc/sys/kernel/overflowuid")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    as_user(overflow, || {
        let client = Raw::connect(&socket).unwrap();
        client
            .receive()
            .unwrap()
            .refused("PERMISSION_DENIED", "PRINCIPAL");
        client.ended();
    });
}

/// What a host's process leaves when it goes.
#[test]
fn a_host_that_ends_says_so_and_removes_its_sockets() {
    let host = host_with_spins();
    let mut client = host.greeted();
    put(&mut client, "x", 10);
    let running = client.begin(
        Op::Invoke,
        &json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 500}),
        &[],
    );
    let mut idle = host.greeted();
    host.eventually(&mut idle, "it runs", |stats| number(stats, "/running") == 1);
    let directory = host.directory();
    host.terminate();
    assert_eq!(idle.receive().unwrap().op(), Op::Shutdown);
    idle.ended();
    assert_eq!(client.receive().unwrap().op(), Op::Shutdown);
    // What runs may finish, nothing new begins.
    let start = Instant::now();
    client
        .ask(
            Op::Create,
            json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]}),
        )
        .refused("UNAVAILABLE", "DRAINING");
    client
        .ask(Op::Invoke, scale_shift(json!("x"), 1.0, 0.0))
        .refused("UNAVAILABLE", "DRAINING");
    let reply = client.receive().unwrap();
    assert_eq!(
        reply.sequence(),
        running,
        "after {} ms",
        start.elapsed().as_millis()
    );
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    client.ended();
    host.ended();
    let left: Vec<_> = fs::read_dir(&directory)
        .map(|d| d.map(|e| e.unwrap().file_name()).collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
}
