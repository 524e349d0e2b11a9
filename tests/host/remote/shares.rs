//! Flights that their owner lets others read: near and far, by name and by group, and nobody else.

use serde_json::{Value, json};
use strait_client::wire::Op;

use super::*;
use crate::served::{
    Raw, as_user, check_call, numbers, put as put_near, ramp as numbers_of, scale_shift,
};

const OTHER: u32 = 4242;
const THIRD: u32 = 4243;

fn shared_host() -> (Rig, Vec<String>) {
    let mut made = Vec::new();
    let rig = Rig::start(|directory, _| {
        made.extend(
            ["alice", "bob"].map(|name| token(directory, &[name, "--can", "put,get,call,share"])),
        );
        let rights = "[groups]\nlab = [\"token:bob\", \"uid:4243\"]\n";
        fs::write(directory.path().join("rights.toml"), rights).unwrap();
        let file = |option: &str, name| [option.to_owned(), path(directory, name)];
        [
            file("--tokens", "tokens.toml"),
            file("--rights", "rights.toml"),
        ]
        .concat()
    });
    rig.host.open_to_all();
    (rig, made)
}

fn greeted(rig: &Rig, uid: u32) -> Raw {
    as_user(uid, || rig.host.greeted())
}

fn names(client: &mut Raw) -> Vec<String> {
    let flights = client.ok(Op::List, json!({}))["flights"].clone();
    let name = |flight: &Value| flight["name"].as_str().unwrap().to_owned();
    flights.as_array().unwrap().iter().map(name).collect()
}

#[test]
fn those_it_is_shared_with_read_it_and_nobody_else() {
    let (rig, _) = shared_host();
    let mut own = rig.host.greeted();
    let full = format!("uid:{}/x", rustix::process::geteuid().as_raw());
    put_near(&mut own, "x", 100_000);
    let mut other = greeted(&rig, OTHER);
    let mut third = greeted(&rig, THIRD);
    let look = json!({"name": full});
    for client in [&mut other, &mut third] {
        client
            .ask(Op::Lookup, look.clone())
            .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
        assert!(names(client).is_empty());
    }
    let shared = own.ok(Op::Share, json!({"name": "x", "add": ["uid:4242"]}));
    assert_eq!(shared["shared"], json!(["uid:4242"]));
    assert_eq!(names(&mut other), [full.as_str()]);
    check_call(&mut other, json!(full), &numbers_of(100_000));
    let mapped = other.ask(Op::Map, look.clone());
    assert_eq!(
        (mapped.accepted()["name"].as_str(), mapped.fds.len()),
        (Some(full.as_str()), 1)
    );
    third
        .ask(Op::Map, look.clone())
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");

    // Reading is all that it may.
    for (op, body) in [
        (Op::Drop, look.clone()),
        (Op::Share, json!({"name": full, "add": ["uid:4243"]})),
    ] {
        other.ask(op, body).refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    }
    // A name of its own that looks the same is its own.
    put_near(&mut other, &full, 10);
    check_call(&mut other, json!(full), &numbers_of(10));
    other.ok(Op::Drop, look.clone());
    check_call(&mut other, json!(full), &numbers_of(100_000));

    // By group; what replaces it is shared as it was.
    own.ok(
        Op::Share,
        json!({"name": "x", "add": ["group:lab"], "remove": ["*"]}),
    );
    other
        .ask(Op::Lookup, look.clone())
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    check_call(&mut third, json!(full), &numbers_of(100_000));
    put_near(&mut own, "x", 200);
    check_call(&mut third, json!(full), &numbers_of(200));
    own.ok(Op::Drop, json!({"name": "x"}));
    third
        .ask(Op::Lookup, look.clone())
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    put_near(&mut own, "x", 200);
    third
        .ask(Op::Lookup, look)
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");

    let told = own.ok(Op::Share, json!({"name": "x"}));
    assert_eq!(told["shared"], json!([]));
    for nobody in [
        "alice",
        "group:none",
        "uid:x",
        "uid:07",
        "token:a/b",
        "*",
        "",
    ] {
        let share = json!({"name": "x", "add": [nobody]});
        own.ask(Op::Share, share)
            .refused("INVALID_ARGUMENT", "BAD_REQUEST");
    }
    let many: Vec<_> = (0..65).map(|n| format!("uid:{n}")).collect();
    own.ask(Op::Share, json!({"name": "x", "add": many}))
        .refused("INVALID_ARGUMENT", "BAD_REQUEST");
    own.ask(Op::Share, json!({"name": "no", "add": ["uid:1"]}))
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
}

#[test]
fn a_result_that_another_mapped_is_not_used_again() {
    let (rig, _) = shared_host();
    let mut own = rig.host.greeted();
    put_near(&mut own, "x", 100_000);
    let full = format!("uid:{}/y", rustix::process::geteuid().as_raw());
    let mut call = scale_shift(json!("x"), 2.0, 1.0);
    call["publish"] = json!({"y": "y"});
    own.ok(Op::Invoke, call);
    own.ok(Op::Share, json!({"name": "y", "add": ["uid:4242"]}));
    let mut other = greeted(&rig, OTHER);
    let mapped = other.ask(Op::Map, json!({"name": full}));
    let expected: Vec<f64> = numbers_of(100_000).iter().map(|x| 2.0 * x + 1.0).collect();
    let see = || {
        use std::os::fd::AsFd;
        let place = &mapped.body()["mapping"]["tensors"][0];
        crate::served::read(
            mapped.fds[0].as_fd(),
            place["offset"].as_u64().unwrap(),
            100_000,
        )
    };
    assert_eq!(see(), expected);
    let lease = mapped.body()["lease"].clone();
    other.ok(Op::Release, json!({"leases": [lease]}));
    own.ok(Op::Drop, json!({"name": "y"}));
    // Whoever keeps its descriptor sees what it saw, whatever is computed since.
    for n in 0..8 {
        let reply = own.ask(Op::Invoke, scale_shift(json!("x"), f64::from(n), -1.0));
        let lease = reply.accepted()["results"][0]["lease"].clone();
        drop(numbers(&reply));
        own.ok(Op::Release, json!({"leases": [lease]}));
    }
    assert_eq!(see(), expected);
}

#[test]
fn flights_are_shared_from_afar() {
    let (rig, tokens) = shared_host();
    let [alice, bob] = &tokens[..] else {
        panic!("two tokens")
    };
    blocking(async {
        let mut client = rig.client().await;
        put(&mut client, alice, "x", &ramp(1000)).await.unwrap();
        let share = |body: Value| body.to_string();
        let body = share(json!({"name": "x", "add": ["group:lab"]}));
        let told = act(&mut client, alice, "share", body).await.unwrap();
        let told: Value = serde_json::from_slice(&told[0]).unwrap();
        assert_eq!(told["shared"], json!(["group:lab"]));
        assert_eq!(listed(&mut client, bob).await.unwrap(), ["token:alice/x"]);
        let found = info(&mut client, bob, name("token:alice/x")).await.unwrap();
        let ticket = found.endpoint[0].ticket.clone().unwrap();
        assert_eq!(
            get(&mut client, bob, ticket.clone()).await.unwrap().len(),
            1000
        );
        let invoke = json!({"kernel": "scale-shift", "inputs": {"x": "token:alice/x"}, "parameters": {"a": 2, "b": 0}});
        let called = info(
            &mut client,
            bob,
            FlightDescriptor::new_cmd(invoke.to_string()),
        )
        .await
        .unwrap();
        let result = called.endpoint[0].ticket.clone().unwrap();
        assert_eq!(get(&mut client, bob, result).await.unwrap()[999], 1998.0);
        // Near, too.
        let mut third = greeted(&rig, THIRD);
        assert_eq!(names(&mut third), ["token:alice/x"]);
        fs::write(rig.file("rights.toml"), "[groups]\nlab = []\n").unwrap();
        rig.logged(&["audit", "rights.toml", "read again"]);
        refused(
            get(&mut client, bob, ticket).await,
            Code::NotFound,
            "FLIGHT_NOT_FOUND",
        );
        assert!(names(&mut third).is_empty());
    });
}

#[test]
fn the_command_line_shares() {
    let (rig, _) = shared_host();
    let file = rig.file("x.csv");
    fs::write(&file, "x\n1\n2\n").unwrap();
    let at = format!("unix://{}", rig.host.directory().display());
    let ask = |words: &[&str]| {
        let (code, out, error) = strait(&[words, &["--address", &at]].concat());
        assert_eq!(code, Some(0), "{words:?}: {error}");
        out
    };
    ask(&[
        "put",
        "x",
        file.to_str().unwrap(),
        "--share",
        "alice,group:lab",
    ]);
    assert_eq!(ask(&["share", "x"]), "group:lab\ntoken:alice\n");
    assert_eq!(
        ask(&["share", "x", "uid:4242"]),
        "group:lab\ntoken:alice\nuid:4242\n"
    );
    let full = format!("uid:{}/x", rustix::process::geteuid().as_raw());
    let mut other = greeted(&rig, OTHER);
    assert_eq!(names(&mut other), [full.as_str()]);
    assert_eq!(ask(&["unshare", "x", "alice", "group:lab"]), "uid:4242\n");
    assert_eq!(ask(&["unshare", "x"]), "");
    assert!(names(&mut other).is_empty());
}

#[test]
fn a_group_reaches_a_hosts_sockets() {
    use std::os::unix::fs::MetadataExt;
    let host = Served::start(&["--socket-group", "4300"]);
    for (path, mode) in [("", 0o750), ("data.sock", 0o660), ("flight.sock", 0o660)] {
        let found = fs::metadata(host.directory().join(path)).unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (mode, 4300), "{path}");
    }
    let (code, _, error) = strait(&[
        "serve",
        "--directory",
        host.path().join("h").to_str().unwrap(),
        "--socket-group",
        "no such group",
    ]);
    assert!(code == Some(3) && error.contains("/etc/group"), "{error}");
}
