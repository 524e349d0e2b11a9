//! What a worker says of kernels that are prepared, and of streams.

use std::time::Instant;

use serde_json::{Value, json};
use strait_client::wire::Op;

use super::{FINE, LATE, LOST, Lied};
use crate::prepared::stream::flat;
use crate::prepared::{Prepared, brought, floats, scale_shift, shifted};
use crate::served::{Frame, Holdings, PATIENCE, number, ramp};

fn request(deadline_ms: u64) -> Value {
    let mut request = scale_shift(brought(8));
    request["deadline_ms"] = json!(deadline_ms);
    request
}

/// A stream of the sums so far, whose chunks have at most four elements.
fn stream(lied: &mut Lied, deadline_ms: u64) -> Prepared {
    let request = json!({"kernel": "cumsum", "stream": true, "deadline_ms": deadline_ms,
        "inputs": {"x": {"dtype": "float64", "shape": [4]}}});
    Prepared::by(&mut lied.client, request)
}

fn send(stream: &Prepared, last: bool) {
    let frame = flat(stream, last, &ramp(4));
    stream.socket.send(&[&frame], &[]).unwrap();
}

/// The last sum of a chunk.
fn sum(stream: &Prepared) -> f64 {
    let mut y = vec![Vec::new()];
    stream.collect(&mut y);
    floats(&y[0])[3]
}

/// What ends a chunk, behind whatever came of it.
fn end(stream: &Prepared) -> Frame {
    loop {
        let reply = stream.receive().expect("an answer");
        if reply.op() != Op::Chunk {
            return reply;
        }
    }
}

/// What was called last is ready again.
fn at_rest(lied: &mut Lied) {
    lied.host.eventually(&mut lied.client, "it waits", |stats| {
        number(stats, "/account/running") == 0
    });
}

#[test]
fn what_a_worker_prepares_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for lie in [
        "end: no results",
        "end: streamed",
        "end: a need",
        "end: a descriptor",
        "specs: none",
        "specs: port",
        "specs: dtype",
        "specs: larger",
        "keeps: of a run",
        "piece: of a run",
        "waits: first",
        "waits: all",
        "waits: a need",
    ] {
        lied.lie(lie);
        let reply = lied.client.ask(Op::Prepare, request(60_000));
        eprintln!("{lie}");
        reply.refused(LOST.0, LOST.1);
        lied.honest();
    }
    lied.lie("waits: silence");
    let reply = lied.client.ask(Op::Prepare, request(100));
    reply.refused(LATE.0, LATE.1);
    lied.done(&before);
}

#[test]
fn what_a_worker_gives_for_a_prepared_call_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    let prepared = Prepared::by(&mut lied.client, request(60_000));
    let x = ramp(8);
    for lie in [
        "end: specs",
        "end: no results",
        "end: streamed",
        "end: a need",
        "end: a descriptor",
        "end: half",
        "result: port",
        "result: dtype",
        "result: larger",
        "result: a segment",
        "result: a byte less",
        "result: a byte more",
        "keeps: of a run",
        "piece: of a run",
        "waits: first",
    ] {
        lied.lie(lie);
        eprintln!("{lie}");
        prepared.ask(&prepared.payload(&x)).refused(LOST.0, LOST.1);
        // It is prepared anew.
        lied.honest();
        assert_eq!(prepared.call(&x), shifted(&x), "{lie}");
    }
    // The call has its answer already.
    for lie in ["waits: all", "waits: a need", "waits: silence"] {
        at_rest(&mut lied);
        lied.lie(lie);
        assert_eq!(prepared.call(&x), shifted(&x), "{lie}");
        lied.honest();
        assert_eq!(prepared.call(&x), shifted(&x), "{lie}");
    }
    // What nobody asked for is taken for the answer to what is asked next, and is none.
    at_rest(&mut lied);
    lied.lie("waits: twice");
    assert_eq!(prepared.call(&x), shifted(&x));
    let begin = Instant::now();
    loop {
        let reply = prepared.ask(&prepared.payload(&x));
        if reply.op() == Op::Error {
            reply.refused(LOST.0, LOST.1);
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "it is never heard");
    }
    lied.honest();
    assert_eq!(prepared.call(&x), shifted(&x));
    drop(prepared);
    lied.done(&before);
}

#[test]
fn what_a_worker_gives_for_a_chunk_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    let all: f64 = ramp(4).iter().sum();
    for (lie, deadline_ms, outcome) in [
        ("piece: none", 60_000, LOST),
        ("piece: one more", 60_000, LOST),
        ("piece: more rows", 60_000, LOST),
        ("piece: rows past counting", 60_000, LOST),
        ("piece: columns", 60_000, LOST),
        ("piece: no rows", 60_000, LOST),
        ("piece: dtype", 60_000, LOST),
        ("piece: a byte less", 60_000, LOST),
        ("piece: a byte more", 60_000, LOST),
        ("piece: a need", 60_000, LOST),
        ("piece: waits", 60_000, LOST),
        // Before the last chunk.
        ("piece: the end", 60_000, LOST),
        ("piece: another end", 60_000, LOST),
        ("piece: silence", 100, LATE),
        ("piece: without end", 100, LATE),
        (
            "keeps: all",
            60_000,
            ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"),
        ),
    ] {
        let stream = stream(&mut lied, deadline_ms);
        lied.lie(lie);
        send(&stream, false);
        eprintln!("{lie}");
        let message = end(&stream).refused(outcome.0, outcome.1);
        assert!(message.contains("chunk 0 of a stream"), "{lie}: {message}");
        assert!(stream.receive().is_none(), "{lie}: the stream is over");
        lied.honest();
    }
    for (lie, outcome) in [
        ("end: no results", LOST),
        ("end: specs", LOST),
        ("end: many notes", LOST),
        ("end: a descriptor", LOST),
        // Then it waits, and has not ended.
        ("end: silence", LOST),
        ("end: streamed", FINE),
    ] {
        let stream = stream(&mut lied, 60_000);
        lied.lie(lie);
        send(&stream, false);
        assert_eq!(sum(&stream), all, "{lie}");
        send(&stream, true);
        eprintln!("{lie}");
        if outcome == FINE {
            assert_eq!(sum(&stream), 2.0 * all, "{lie}");
        } else {
            let message = end(&stream).refused(outcome.0, outcome.1);
            assert!(message.contains("chunk 1 of a stream"), "{lie}: {message}");
        }
        lied.honest();
    }
    lied.done(&before);
}
