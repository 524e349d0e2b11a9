//! What a host has only so much of, and a client that would use it up without being charged.

use serde_json::json;
use strait_client::wire::Op;

use crate::served::{Raw, Served, number, put};

#[test]
fn a_connection_that_has_ended_counts_until_all_of_it_is_received() {
    let host = Served::with(&[], &[("STRAIT__QUOTA__CONNECTIONS", "4")]);
    let mut watcher = host.greeted();
    put(&mut watcher, "x", 3);
    let mut unread: Vec<Raw> = (0..3).map(|_| host.greeted()).collect();
    for client in &mut unread {
        client.begin(Op::Map, &json!({"name": "x"}), &[]);
        rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Write).unwrap();
    }
    let stats = host.eventually(&mut watcher, "their sessions have ended", |stats| {
        number(stats, "/account/sessions") == 1
    });
    // The host keeps their sockets to see when the descriptors have arrived.
    assert_eq!(
        (
            number(&stats, "/account/connections"),
            number(&stats, "/account/descriptors")
        ),
        (4, 3),
        "{stats}"
    );
    let message = host
        .connect()
        .ask(Op::Ping, json!({}))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(message.contains("connections of uid:"), "{message}");
    while unread[0].receive().is_some() {}
    // At once: whoever connects is not told of what is over.
    let mut next = host.greeted();
    next.ok(Op::Ping, json!({}));
    drop((unread, next));
    host.eventually(&mut watcher, "they are gone", |stats| {
        number(stats, "/account/connections") == 1
    });
}

#[test]
fn a_client_that_receives_while_it_asks_is_never_refused() {
    let host = Served::with(&[], &[("STRAIT__QUOTA__DESCRIPTORS", "100")]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    // There is always something that it has not received, and never much.
    let map = json!({"name": "x"});
    for _ in 0..20 {
        client.begin(Op::Map, &map, &[]);
    }
    for _ in 0..2000 {
        std::thread::sleep(std::time::Duration::from_micros(100));
        client.receive().unwrap().accepted();
        client.begin(Op::Map, &map, &[]);
    }
}

#[test]
fn inputs_that_no_kernel_has_take_little_memory() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let tensors: Vec<_> = (0..120)
        .map(|n| json!({"name": format!("{n:a>200}"), "dtype": "int8", "shape": [1]}))
        .collect();
    let segment = client.ok(Op::Create, json!({"tensors": tensors}))["mapping"]["segment"].clone();
    client.ok(Op::Publish, json!({"segment": segment, "name": "x"}));
    // Each is refused with the names of all tensors.
    let inputs: serde_json::Map<_, _> = (0..4000).map(|n| (n.to_string(), json!("x#z"))).collect();
    let call = json!({"kernel": "scale-shift", "inputs": inputs});
    let process = format!("/proc/{}/status", client.socket.peer().unwrap().pid);
    let peak = || {
        let status = std::fs::read_to_string(&process).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() << 10
    };
    let before = peak();
    let message = client
        .ask(Op::Invoke, call)
        .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
    assert!(message.contains("has no tensor `z`"), "{message}");
    let grown = peak() - before;
    assert!(grown < 32 << 20, "{grown} bytes");
}
