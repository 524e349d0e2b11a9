//! How prepared kernels end, whose turn it is, and what they are counted as.

use std::time::Duration;

use serde_json::json;
use strait_client::wire::Op;

use super::memory::{REMEMBERS, SPINS};
use super::stream::flat;
use super::{Prepared, brought, call_frame, scale_shift, shifted};
use crate::guest;
use crate::served::{Holdings, Served, number, put, ramp};

#[test]
fn it_ends_with_its_socket_or_its_connection_or_its_client() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[]);
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    let request =
        || json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 60_000});
    let spin = |prepared: &Prepared| {
        prepared.send(
            1,
            &prepared.payload(&[SPINS, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        );
    };
    // Its socket is closed, while it waits.
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, request());
    let stats = watcher.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/account/connections"), 3, "{stats}");
    assert!(number(&stats, "/account/bytes") >= 131_072, "{stats}");
    drop(prepared);
    host.eventually(&mut watcher, "it has ended", |stats| {
        number(stats, "/account/connections") == 2 && number(stats, "/account/bytes") == 0
    });
    // The connection is, while it waits and while it runs.
    for runs in [false, true] {
        let prepared = Prepared::by(&mut client, request());
        if runs {
            spin(&prepared);
            host.eventually(&mut watcher, "it runs", |stats| {
                number(stats, "/running") == 1
            });
        }
        drop(client);
        // The last that it hears, if anything: that it was cancelled.
        while let Some(frame) = prepared.receive() {
            frame.refused("CANCELLED", "CANCELLED");
        }
        assert!(prepared.socket.send(&[b"x"], &[]).is_err());
        let after = host.settled(&mut watcher);
        assert_eq!(Holdings::of(&after), before);
        assert_eq!(number(&after, "/account/connections"), 1);
        client = host.greeted();
    }
}

#[test]
fn a_client_that_does_not_read_its_answers_keeps_no_turn() {
    let host = Served::with(&[], &[("STRAIT__ENGINE__WORKERS", "1")]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, scale_shift(brought(8000)));
    let x = prepared.payload(&ramp(8000));
    prepared.socket.set_nonblocking(true).unwrap();
    // Until neither side's buffer takes any more.
    let mut sent = 0;
    let mut refusals = 0;
    while refusals < 50 {
        match prepared.socket.send(&[&call_frame(1, &x)], &[]) {
            Ok(()) => sent += 1,
            Err(_) => {
                refusals += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    let mut second = host.greeted();
    let other = Prepared::by(&mut second, scale_shift(brought(8)));
    assert_eq!(other.call(&ramp(8)), shifted(&ramp(8)));
    prepared.socket.set_nonblocking(false).unwrap();
    for _ in 0..sent {
        let reply = prepared.receive().expect("an answer");
        assert_eq!(prepared.output(&reply), shifted(&ramp(8000)));
    }
}

#[test]
fn calls_wait_for_their_turn_as_invocations_do() {
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let plugins = [
        guest::component("spins", &text),
        guest::component_without_globals("kept", REMEMBERS),
    ];
    let host = Served::with_plugins(&plugins, &[("STRAIT__ENGINE__WORKERS", "1")]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let request = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 300});
    let prepared = Prepared::by(&mut client, request.clone());
    let mut other = host.greeted();
    let mut watcher = host.greeted();
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    let spins = other.begin(Op::Invoke, &spin, &[]);
    host.eventually(&mut watcher, "it spins", |stats| {
        number(stats, "/running") == 1
    });
    // At its deadline; and so is another PREPARE.
    let reply = prepared.ask(&prepared.payload(&[0.0; 8]));
    let message = reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(message.contains("still waiting"), "{message}");
    let message = client
        .ask(Op::Prepare, request)
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(message.contains("still waiting"), "{message}");
    // Cancelled while it waits; one more waits until there is room.
    let long = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 600_000});
    other.cancel(spins);
    let prepared = Prepared::by(&mut client, long.clone());
    let spins = other.begin(Op::Invoke, &spin, &[]);
    host.eventually(&mut watcher, "it spins again", |stats| {
        number(stats, "/running") == 1
    });
    prepared.send(1, &prepared.payload(&[0.0; 8]));
    host.eventually(&mut watcher, "the call waits", |stats| {
        number(stats, "/account/queued") == 1
    });
    client.ok(Op::Cancel, json!({"prepared": prepared.number()}));
    prepared
        .receive()
        .unwrap()
        .refused("CANCELLED", "CANCELLED");
    let sequence = client.begin(Op::Prepare, &long, &[]);
    host.eventually(&mut watcher, "the PREPARE waits", |stats| {
        number(stats, "/account/queued") == 1
    });
    client.cancel(sequence);
    prepared.send(2, &prepared.payload(&[0.0; 8]));
    host.eventually(&mut watcher, "the call waits", |stats| {
        number(stats, "/account/queued") == 1
    });
    other.cancel(spins);
    let reply = prepared.receive().unwrap();
    assert_eq!(prepared.output(&reply)[0], 1.0);
    let stats = host.eventually(&mut watcher, "nothing waits", |stats| {
        number(stats, "/account/queued") + number(stats, "/account/running") == 0
    });
    assert_eq!(number(&stats, "/running"), 0);
}

#[test]
fn a_host_that_ends_finishes_the_call_that_runs() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[("STRAIT__SERVER__DRAIN_MS", "10000")]);
    let mut client = host.greeted();
    let request = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 700});
    let idle = Prepared::by(&mut client, request.clone());
    let busy = Prepared::by(&mut client, request);
    busy.send(
        1,
        &busy.payload(&[SPINS, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    );
    host.eventually(&mut host.greeted(), "it runs", |stats| {
        number(stats, "/running") == 1
    });
    host.terminate();
    assert_eq!(client.receive().unwrap().op(), Op::Shutdown);
    assert!(idle.receive().is_none(), "the end");
    let reply = busy.receive().expect("it is answered");
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(busy.receive().is_none(), "the end");
    client.ended();
    host.ended();
}

#[test]
fn prepared_kernels_count_as_connections_and_their_memory_as_bytes() {
    let host = Served::with(&[], &[("STRAIT__QUOTA__CONNECTIONS", "4")]);
    let mut client = host.greeted();
    let some: Vec<_> = (0..3)
        .map(|_| Prepared::by(&mut client, scale_shift(brought(8))))
        .collect();
    client
        .ask(Op::Prepare, scale_shift(brought(8)))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    let each = number(&client.ok(Op::Stats, json!({})), "/account/bytes") / 3;
    drop(some);
    host.eventually(&mut client, "they have ended", |stats| {
        number(stats, "/account/bytes") == 0
    });
    let quota = (2 * each).to_string();
    let host = Served::with(&[], &[("STRAIT__QUOTA__BYTES", &quota)]);
    let mut client = host.greeted();
    let two = [(); 2].map(|()| Prepared::by(&mut client, scale_shift(brought(8))));
    client
        .ask(Op::Prepare, scale_shift(brought(8)))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    for prepared in &two {
        assert_eq!(prepared.call(&ramp(8)), shifted(&ramp(8)));
    }
}

#[test]
fn calls_and_chunks_wait_for_the_quota_of_cpu_time() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[("STRAIT__QUOTA__CPU_PERCENT", "1")]);
    let (mut client, mut operator) = (host.greeted(), host.greeted());
    let request =
        |ms: u64| json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": ms});
    let short = Prepared::by(&mut client, request(250));
    let long = Prepared::by(&mut client, request(600_000));
    let stream = (!host.has_workers()).then(|| {
        let stream = json!({"kernel": "cumsum", "inputs": {"x": brought(8)}, "stream": true});
        let stream = Prepared::by(&mut client, stream);
        let rows = flat(&stream, false, &ramp(8));
        stream.socket.send(&[&rows], &[]).unwrap();
        stream.collect(&mut [Vec::new()]);
        stream
    });
    let spins = short.payload(&[SPINS, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let refused = loop {
        let reply = short.ask(&spins);
        match reply.body()["reason"].as_str() {
            Some("DEADLINE") => {}
            _ => break reply,
        }
    };
    let message = refused.refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("ms more than a quota.cpu_percent of 1 gives")
            && message.contains("a deadline of 250 ms"),
        "{message}"
    );
    // One that has time waits.
    long.send(1, &long.payload(&[0.0; 8]));
    host.eventually(&mut operator, "it waits", |stats| {
        number(stats, "/account/queued") == 1
    });
    operator.ok(Op::Limits, json!({"set": {"cpu_percent": "none"}}));
    assert_eq!(long.output(&long.receive().unwrap())[0], 1.0);
    operator.ok(Op::Limits, json!({"set": {"cpu_percent": 0}}));
    if let Some(stream) = stream {
        let rows = flat(&stream, true, &ramp(8));
        stream.socket.send(&[&rows], &[]).unwrap();
        let message = stream
            .receive()
            .unwrap()
            .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        assert!(
            message.starts_with("chunk 1 of a stream:") && message.contains("none may begin"),
            "{message}"
        );
    }
    client
        .ask(Op::Prepare, request(1000))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
}
