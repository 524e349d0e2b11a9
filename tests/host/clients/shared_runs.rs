//! Idempotency keys, and the deadlines and cancels of calls that wait.

use std::fs;

use serde_json::json;
use strait_client::wire::Op;

use super::with;
use crate::guest;
use crate::served::{Frame, Raw, Served, check_call, number, numbers, put, ramp, scale_shift};

const REUSED: (&str, &str) = ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED");

#[test]
fn an_idempotency_key_belongs_to_one_request() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    put(&mut client, "other", 3);
    let runs = |client: &mut Raw| number(&client.ok(Op::Stats, json!({})), "/invocations");
    let first = with(
        &scale_shift(json!("x"), 2.0, 0.0),
        "idempotency_key",
        json!("K"),
    );
    let reply = client.ask(Op::Invoke, first.clone());
    assert_eq!(numbers(&reply), [-14.0, -13.0, -12.0]);
    let segment = reply.body()["results"][0]["mapping"]["segment"].clone();

    // How long it may take, how it is given and what it is called are the caller's own affair.
    for (field, value) in [
        ("request_id", json!("again")),
        ("deadline_ms", json!(5000)),
        ("lease_ms", json!(5000)),
        ("map", json!(false)),
        ("limits", json!({})),
        ("inputs", json!({"x": {"name": "x"}})),
    ] {
        let again = client.ok(Op::Invoke, with(&first, field, value));
        assert_eq!(
            again["results"][0]["mapping"]["segment"], segment,
            "{field}"
        );
    }
    let mut second_session = host.greeted();
    let again = second_session.ok(Op::Invoke, first.clone());
    assert_eq!(again["results"][0]["mapping"]["segment"], segment);
    assert_eq!(runs(&mut client), 1);

    for (field, value) in [
        ("kernel", json!("standard/scale-shift")),
        ("kernel", json!("zscore")),
        ("inputs", json!({"x": "other"})),
        ("inputs", json!({"x": {"name": "x", "tensor": "x"}})),
        ("parameters", json!({"a": 3.0, "b": 0.0})),
        ("parameters", json!({"a": 2.0})),
        ("publish", json!({"y": "y"})),
        ("replace", json!(true)),
        ("seal", json!(true)),
        ("verify", json!(true)),
        ("limits", json!({"log_bytes": 1})),
    ] {
        let message = client
            .ask(Op::Invoke, with(&first, field, value))
            .refused(REUSED.0, REUSED.1);
        assert!(
            message.contains("`K`") && message.contains(&format!("`{field}`")),
            "{field}: {message}"
        );
    }
    let clip = json!({"kernel": "clip", "inputs": {"x": "x"}, "idempotency_key": "K"});
    second_session
        .ask(Op::Invoke, clip)
        .refused(REUSED.0, REUSED.1);
    client
        .ask(Op::Lookup, json!({"name": "y"}))
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    assert_eq!(runs(&mut client), 1);

    // A flight that has been replaced makes it another request; one that is gone does not.
    put(&mut client, "x", 3);
    let message = client
        .ask(Op::Invoke, first.clone())
        .refused(REUSED.0, REUSED.1);
    assert!(message.contains("input `x` has been replaced"), "{message}");
    client.ok(Op::Drop, json!({"name": "x"}));
    let again = client.ok(Op::Invoke, first);
    assert_eq!(again["results"][0]["mapping"]["segment"], segment);

    // In place, once.
    let doubled = json!({"kernel": "scale-shift", "inputs": {"x": "other"}, "parameters": {"a": 2.0, "b": 0.0},
                         "publish": {"y": "other"}, "replace": true, "idempotency_key": "twice"});
    for _ in 0..3 {
        assert_eq!(
            numbers(&client.ask(Op::Invoke, doubled.clone())),
            [-14.0, -13.0, -12.0]
        );
    }
    let now = client.ask(Op::Invoke, scale_shift(json!("other"), 1.0, 0.0));
    assert_eq!(numbers(&now), [-14.0, -13.0, -12.0]);

    // What failed may be tried again, as something else, too.
    let bad =
        json!({"kernel": "scale-shift", "inputs": {"x": "nothing"}, "idempotency_key": "fails"});
    client
        .ask(Op::Invoke, bad)
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    let good = with(
        &scale_shift(json!("other"), 1.0, 0.0),
        "idempotency_key",
        json!("fails"),
    );
    client.ok(Op::Invoke, good);
}

/// A host with one worker, which spins for `client`; answers the spinning call's sequence.
fn busy_host(client: &mut Option<Raw>) -> (Served, u32) {
    let directory = tempfile::tempdir().unwrap();
    let plugin = directory.path().join("spins.wasm");
    let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
    fs::write(&plugin, guest::component("spins", &text)).unwrap();
    let host = Served::with(
        &["--plugin", plugin.to_str().unwrap()],
        &[
            ("STRAIT__ENGINE__WORKERS", "1"),
            ("STRAIT__ENGINE__QUEUE_LEN", "2"),
        ],
    );
    let mut spinner = host.greeted();
    put(&mut spinner, "x", 3);
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    let sequence = spinner.begin(Op::Invoke, &spin, &[]);
    while number(&spinner.ok(Op::Stats, json!({})), "/running") == 0 {}
    *client = Some(spinner);
    (host, sequence)
}

#[test]
fn whoever_leaves_a_shared_run_leaves_it_to_the_others() {
    let mut spinner = None;
    let (host, spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let keyed = with(
        &scale_shift(json!("x"), 2.0, 0.0),
        "idempotency_key",
        json!("K"),
    );
    let mut clients: Vec<_> = (0..4).map(|_| host.greeted()).collect();
    let sequences: Vec<_> = clients
        .iter_mut()
        .map(|client| client.begin(Op::Invoke, &keyed, &[]))
        .collect();
    // One with a shorter time; the first by a cancel; another with its connection.
    let mut hasty = host.greeted();
    hasty
        .ask(Op::Invoke, with(&keyed, "deadline_ms", json!(50)))
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    clients[0].cancel(sequences[0]);
    drop(clients.remove(1));
    assert_eq!(number(&spinner.ok(Op::Stats, json!({})), "/running"), 1);
    spinner.cancel(spin);
    let replies: Vec<_> = clients[1..].iter().map(|c| c.receive().unwrap()).collect();
    for reply in &replies {
        assert_eq!(numbers(reply), [-14.0, -13.0, -12.0]);
    }
    let segment = |reply: &Frame| reply.body()["results"][0]["mapping"]["segment"].clone();
    assert_eq!(segment(&replies[0]), segment(&replies[1]));
    let stats = spinner.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/invocations"), 2, "the spin, and one run");
}

#[test]
fn a_shared_run_ends_when_nobody_waits_and_its_key_is_free() {
    let mut spinner = None;
    let (host, _spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let spin = |client: &mut Raw, deadline_ms: u64| {
        let body = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms, "idempotency_key": "S"});
        client.begin(Op::Invoke, &body, &[])
    };
    // In the queue.
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let (first, second) = (spin(&mut one, 600_000), spin(&mut other, 600_000));
    one.cancel(first);
    other.cancel(second);
    // Running: each caller has its own deadline, and the last one's ends it.
    spinner.cancel(_spin);
    spin(&mut one, 300);
    spin(&mut other, 600);
    for client in [&one, &other] {
        client
            .receive()
            .unwrap()
            .refused("DEADLINE_EXCEEDED", "DEADLINE");
    }
    host.eventually(&mut spinner, "it has ended", |stats| {
        number(stats, "/running") == 0
    });
    let mut call = scale_shift(json!("x"), 1.0, 0.0);
    call["idempotency_key"] = json!("S");
    assert_eq!(numbers(&spinner.ask(Op::Invoke, call)), ramp(3));
}

#[test]
fn a_deadline_and_a_cancel_count_in_the_queue() {
    let mut spinner = None;
    let (host, spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let mut client = host.greeted();
    let call = scale_shift(json!("x"), 1.0, 0.0);
    let message = client
        .ask(Op::Invoke, with(&call, "deadline_ms", json!(0)))
        .refused("INVALID_ARGUMENT", "BAD_LIMIT");
    assert!(message.contains("at least 1"), "{message}");
    let message = client
        .ask(Op::Invoke, with(&call, "deadline_ms", json!(100)))
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(
        message.contains("100 ms") && message.contains("worker"),
        "{message}"
    );
    // The queue takes two; each way out of it makes room.
    for round in 0..3 {
        let mut queued = host.greeted();
        let sequences = [0, 1].map(|_| queued.begin(Op::Invoke, &call, &[]));
        queued.ok(Op::Ping, json!({}));
        client
            .ask(Op::Invoke, call.clone())
            .refused("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED");
        match round {
            0 => sequences
                .iter()
                .for_each(|sequence| queued.cancel(*sequence)),
            1 => {
                drop(queued);
                host.eventually(&mut spinner, "it is gone", |stats| {
                    number(stats, "/sessions") == 2
                });
            }
            _ => {
                queued.cancel(sequences[0]);
                let late = with(&call, "deadline_ms", json!(50));
                queued
                    .ask(Op::Invoke, late)
                    .refused("DEADLINE_EXCEEDED", "DEADLINE");
                queued.cancel(sequences[1]);
            }
        }
    }
    let stats = spinner.ok(Op::Stats, json!({}));
    assert_eq!(
        (number(&stats, "/running"), number(&stats, "/invocations")),
        (1, 1),
        "the spin alone was run"
    );
    spinner.cancel(spin);
    check_call(&mut client, json!("x"), &ramp(3));
}
