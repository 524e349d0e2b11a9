//! Channels: one process writes chunks, another reads what comes of them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use strait_client::wire::{self, Op};

use super::stream::chunk;
use super::{Prepared, floats};
use crate::served::{Frame, Holdings, Random, Raw, Served, number, packet, ramp};

/// Rows of `x` at a time.
const MOST: u64 = 4;

/// Rows of one float64 for the channel `name`, with `more` among its options.
pub(super) fn asks(kernel: &str, name: &str, more: &Value) -> Value {
    let mut channel = json!({"name": name});
    for (option, value) in more.as_object().unwrap() {
        channel[option] = value.clone();
    }
    json!({"kernel": kernel, "inputs": {"x": {"dtype": "float64", "shape": [MOST, 1]}},
        "stream": true, "channel": channel})
}

pub(super) fn produces(client: &mut Raw, name: &str, more: &Value) -> Prepared {
    let prepared = Prepared::by(client, asks("cumsum", name, more));
    assert_eq!(number(&prepared.told, "/reply_bytes"), 0);
    prepared
}

pub(super) fn reads(client: &mut Raw, name: &str) -> Prepared {
    Prepared::of(client.ask(Op::Stream, json!({"channel": name})))
}

impl Prepared {
    pub(super) fn sends(&self, last: bool, rows: &[f64]) {
        let frame = chunk(self, last, rows, 1);
        self.socket.send(&[&frame], &[]).unwrap();
    }

    /// The producer is told that its chunk was taken.
    pub(super) fn taken(&self) {
        let reply = self.receive().expect("an answer");
        assert_eq!(
            (reply.op(), reply.payload.len()),
            (Op::Ok, 0),
            "{}",
            reply.text
        );
    }

    /// The consumer's next batch: its number, and its rows.
    pub(super) fn batch(&self) -> (u32, Vec<f64>) {
        self.rows(&self.receive().expect("a batch"))
    }

    pub(super) fn rows(&self, frame: &Frame) -> (u32, Vec<f64>) {
        assert_eq!(frame.op(), Op::Chunk, "{}", frame.text);
        assert_eq!(
            frame.payload.len() as u64,
            number(&self.told, "/batch_bytes")
        );
        let shape = wire::shape(&frame.payload[..64], 2).expect("two axes");
        assert_eq!(shape[1], 1);
        let from = usize::try_from(number(&self.told, "/outputs/0/offset")).unwrap();
        let length = 8 * usize::try_from(shape[0]).unwrap();
        (
            frame.sequence(),
            floats(&frame.payload[from..from + length]),
        )
    }

    pub(super) fn acknowledges(&self, batch: u32) {
        let frame = packet(Op::Ok as u8, batch, b"");
        self.socket.send(&[&frame], &[]).unwrap();
    }

    /// The end of the channel, which is acknowledged; its number.
    fn is_last(&self) -> u32 {
        let end = self.receive().expect("the end");
        assert_eq!(end.op(), Op::Last, "{}", end.text);
        self.acknowledges(end.sequence());
        assert!(self.receive().is_none(), "nothing comes after it");
        end.sequence()
    }
}

pub(super) fn sums(x: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    x.iter()
        .map(|x| {
            sum += x;
            sum
        })
        .collect()
}

#[test]
fn what_one_process_writes_another_reads_in_order() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let mut random = Random::new();
    for early in [false, true] {
        let producer = produces(&mut one, "levels", &json!({"batches": 3}));
        let consumer = early.then(|| reads(&mut other, "levels"));
        let x = ramp(200);
        let mut cuts = Random::seeded(random.next());
        let write = || {
            let mut rest = &x[..];
            while !rest.is_empty() {
                let take = cuts
                    .below(1 + usize::try_from(MOST).unwrap())
                    .min(rest.len());
                let (now, then) = rest.split_at(take);
                rest = then;
                producer.sends(rest.is_empty(), now);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(write);
            let consumer = consumer.unwrap_or_else(|| reads(&mut other, "levels"));
            assert_eq!(number(&consumer.told, "/first"), 1);
            assert_eq!(consumer.told["kernel"], "cumsum");
            let (mut came, mut last) = (Vec::new(), 0);
            while came.len() < x.len() {
                let (number, rows) = consumer.batch();
                last += 1;
                assert_eq!(number, last);
                assert!(!rows.is_empty(), "a batch without rows");
                came.extend(rows);
                // Several at once, too.
                if number.is_multiple_of(3) || random.below(2) == 0 || came.len() == x.len() {
                    consumer.acknowledges(number);
                }
            }
            assert_eq!(came, sums(&x));
            assert_eq!(consumer.is_last(), last + 1);
        });
        // The producer has an answer for each chunk, the last of them when everything was read.
        while let Some(reply) = producer.receive() {
            assert_eq!(
                (reply.op(), reply.payload.len()),
                (Op::Ok, 0),
                "{}",
                reply.text
            );
        }
        other
            .ask(Op::Stream, json!({"channel": "levels"}))
            .refused("NOT_FOUND", "CHANNEL_NOT_FOUND");
    }
    drop((one, other));
    let after = host.settled(&mut watcher);
    assert_eq!(Holdings::of(&after), before);
    assert_eq!(number(&after, "/account/connections"), 1);
    assert_eq!(after["channels"], json!([]));
}

#[test]
fn a_full_channel_holds_its_producer_up_and_drops_nothing() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let producer = produces(&mut client, "levels", &json!({"batches": 2}));
    let consumer = reads(&mut client, "levels");
    for at in 0..2 {
        producer.sends(false, &[f64::from(at)]);
        producer.taken();
    }
    producer.sends(false, &[2.0]);
    let mut waits = [rustix::event::PollFd::new(
        &producer.socket,
        rustix::event::PollFlags::IN,
    )];
    let timeout = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    assert_eq!(
        rustix::event::poll(&mut waits, Some(&timeout)),
        Ok(0),
        "it is full"
    );
    let stats = client.ok(Op::Stats, json!({}));
    let told = &stats["channels"][0];
    assert_eq!(
        (
            &told["name"],
            &told["batches"],
            &told["lag_batches"],
            &told["is_read"]
        ),
        (&json!("levels"), &json!(2), &json!(2), &json!(true)),
        "{stats}"
    );
    assert!(number(told, "/lag_ms") >= 200, "{stats}");
    assert_eq!(
        number(&stats, "/account/running"),
        0,
        "it has no turn meanwhile"
    );
    assert_eq!(consumer.batch(), (1, vec![0.0]));
    assert_eq!(consumer.batch(), (2, vec![1.0]));
    // Both of them at once.
    consumer.acknowledges(2);
    producer.taken();
    assert_eq!(consumer.batch(), (3, vec![3.0]));
    producer.sends(true, &[]);
    consumer.acknowledges(3);
    assert_eq!(consumer.is_last(), 4);
    producer.taken();
    assert!(producer.receive().is_none());
}

#[test]
fn a_consumer_that_has_acknowledged_the_end_may_leave_at_once() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for _ in 0..50 {
        let producer = produces(&mut client, "levels", &json!({}));
        let consumer = reads(&mut client, "levels");
        producer.sends(true, &[1.0]);
        assert_eq!(consumer.batch(), (1, vec![1.0]));
        assert_eq!(consumer.receive().expect("the end").op(), Op::Last);
        consumer.acknowledges(2);
        drop(consumer);
        producer.taken();
        assert!(producer.receive().is_none());
    }
}

#[test]
fn a_consumer_that_comes_back_goes_on_where_it_had_acknowledged() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let producer = produces(&mut client, "levels", &json!({"resume_ms": 60_000}));
    let consumer = reads(&mut client, "levels");
    client
        .ask(Op::Stream, json!({"channel": "levels"}))
        .refused("FAILED_PRECONDITION", "WRONG_STATE");
    for at in 1..=5 {
        producer.sends(false, &[f64::from(at)]);
        producer.taken();
    }
    for number in 1..=3 {
        assert_eq!(consumer.batch().0, number);
    }
    consumer.acknowledges(2);
    drop(consumer);
    let consumer = reads(&mut client, "levels");
    assert_eq!(number(&consumer.told, "/first"), 3);
    for (number, sum) in [(3, 6.0), (4, 10.0), (5, 15.0)] {
        assert_eq!(consumer.batch(), (number, vec![sum]));
    }
    producer.sends(true, &[6.0]);
    assert_eq!(consumer.batch(), (6, vec![21.0]));
    // Before it acknowledged the end, too.
    let end = consumer.receive().expect("the end");
    assert_eq!((end.op(), end.sequence()), (Op::Last, 7));
    drop(consumer);
    let consumer = reads(&mut client, "levels");
    assert_eq!(number(&consumer.told, "/first"), 3);
    for number in 3..=6 {
        assert_eq!(consumer.batch().0, number);
    }
    assert_eq!(consumer.is_last(), 7);
    producer.taken();
}

#[test]
fn whoever_is_left_is_told_at_once_what_happened() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    let soon = |what: &str, begin: Instant| {
        assert!(begin.elapsed() < Duration::from_secs(5), "{what}");
    };
    // The consumer leaves: while the producer says nothing, and while it is held up.
    for held in [false, true] {
        let (mut one, mut other) = (host.greeted(), host.greeted());
        let producer = produces(&mut one, "levels", &json!({"batches": 1}));
        let consumer = reads(&mut other, "levels");
        producer.sends(false, &[1.0]);
        producer.taken();
        assert_eq!(consumer.batch().0, 1);
        if held {
            producer.sends(false, &[2.0]);
        }
        let begin = Instant::now();
        drop(consumer);
        if !held {
            producer.sends(false, &[2.0]);
        }
        let reply = producer.receive().expect("an answer");
        soon("the producer", begin);
        let message = reply.refused("UNAVAILABLE", "CONSUMER_LOST");
        assert!(
            message.contains("`levels`") && message.contains("after batch 0"),
            "{message}"
        );
        assert_eq!(reply.body()["details"]["chunk"], 1);
        // Its name is free, whether the producer reads or not.
        drop(produces(&mut other, "levels", &json!({})));
        host.eventually(&mut watcher, "that one has ended", |stats| {
            stats["channels"] == json!([])
        });
    }
    // The producer leaves: before its first chunk, after one, held up, and with its connection.
    for (sent, held, whole) in [
        (0, false, false),
        (1, false, false),
        (1, true, false),
        (1, true, true),
    ] {
        let (mut one, mut other) = (host.greeted(), host.greeted());
        let producer = produces(&mut one, "levels", &json!({"batches": 1}));
        let consumer = reads(&mut other, "levels");
        for _ in 0..sent + i32::from(held) {
            producer.sends(false, &[1.0]);
        }
        for _ in 0..sent {
            producer.taken();
            consumer.batch();
        }
        let begin = Instant::now();
        match whole {
            true => drop(one),
            false => drop(producer),
        }
        let told = consumer.receive().expect("it is told");
        soon("the consumer", begin);
        told.refused("UNAVAILABLE", "PRODUCER_LOST");
        assert!(consumer.receive().is_none());
    }
    // The kernel fails.
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let request = asks("scale-shift", "levels", &json!({}));
    let mut request = request;
    request["parameters"] = json!({"a": 1.0, "b": 0.0});
    let producer = Prepared::by(&mut one, request);
    let consumer = reads(&mut other, "levels");
    producer.sends(false, &[1.0]);
    producer.taken();
    // Rows that are wider than was prepared.
    let mut wrong = chunk(&producer, false, &[1.0, 2.0], 2);
    wrong[4] = 9;
    producer.socket.send(&[&wrong], &[]).unwrap();
    let reply = producer.receive().expect("an answer");
    assert_eq!(reply.sequence(), 9);
    reply.refused("INVALID_ARGUMENT", "BAD_INPUT");
    assert_eq!(consumer.batch().1, [1.0]);
    let told = consumer.receive().expect("it is told");
    told.refused("INVALID_ARGUMENT", "BAD_INPUT");
    assert_eq!(told.body()["details"]["chunk"], 1);
    assert!(consumer.receive().is_none());
    drop((one, other, producer, consumer));
    let after = host.settled(&mut watcher);
    assert_eq!(Holdings::of(&after), before);
}

#[test]
fn a_producer_that_nobody_reads_waits_no_longer_than_it_said() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for is_read in [false, true] {
        let producer = produces(
            &mut client,
            "levels",
            &json!({"batches": 1, "wait_ms": 150}),
        );
        let consumer = is_read.then(|| reads(&mut client, "levels"));
        producer.sends(false, &[1.0]);
        producer.taken();
        producer.sends(false, &[1.0]);
        let reply = producer.receive().expect("an answer");
        let message = reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
        let words = match is_read {
            true => "its consumer acknowledged none",
            false => "nobody came to read them",
        };
        assert!(
            message.contains(words) && message.contains("wait_ms"),
            "{message}"
        );
        if let Some(consumer) = consumer {
            assert_eq!(consumer.batch().0, 1);
            consumer
                .receive()
                .expect("it is told")
                .refused("DEADLINE_EXCEEDED", "DEADLINE");
        }
    }
    // Cancelled, while it waits.
    let producer = produces(&mut client, "levels", &json!({"batches": 1}));
    producer.sends(false, &[1.0]);
    producer.taken();
    producer.sends(false, &[1.0]);
    let cancel = json!({"prepared": producer.number()});
    while client.ok(Op::Cancel, cancel.clone())["cancelled"] != json!(true) {}
    producer
        .receive()
        .expect("an answer")
        .refused("CANCELLED", "CANCELLED");
}

#[test]
fn what_is_no_acknowledgement_ends_its_consumer_and_nobody_else() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let producer = produces(&mut client, "levels", &json!({"resume_ms": 60_000}));
    producer.sends(false, &[1.0]);
    producer.taken();
    let with_payload = {
        let mut frame = packet(Op::Ok as u8, 1, b"");
        frame[12..16].copy_from_slice(&8_u32.to_le_bytes());
        frame.extend([0; 8]);
        frame
    };
    let mut version = packet(Op::Ok as u8, 1, b"");
    version[2] = 9;
    for (wrong, words) in [
        (packet(Op::Ok as u8, 2, b""), "batch 2"),
        (packet(Op::Ok as u8, u32::MAX, b""), "batch 4294967295"),
        (packet(Op::Ok as u8, 1, b"{}"), "a body"),
        (with_payload, "a payload"),
        (packet(Op::Chunk as u8, 1, b""), "Chunk"),
        (packet(Op::Invoke as u8, 1, b"{}"), "a body"),
        (packet(Op::Ping as u8, 1, b""), "Ping"),
        (version, "version 9"),
        (b"ST".to_vec(), "shorter"),
        (vec![b'x'; 48], "starts with"),
    ] {
        let consumer = reads(&mut client, "levels");
        assert_eq!(consumer.batch(), (1, vec![1.0]), "{words}");
        consumer.socket.send(&[&wrong], &[]).unwrap();
        let told = consumer.receive().expect("it is told");
        let message = told.refused("INVALID_ARGUMENT", "BAD_FRAME");
        assert!(message.contains(words), "{message} {words}");
        assert!(consumer.receive().is_none(), "{words}");
    }
    // Of a batch that was acknowledged already it is none either; what is acknowledged with another is.
    let consumer = reads(&mut client, "levels");
    producer.sends(false, &[1.0]);
    assert_eq!((consumer.batch().0, consumer.batch().0), (1, 2));
    consumer.acknowledges(2);
    consumer.acknowledges(1);
    let told = consumer.receive().expect("it is told");
    let message = told.refused("INVALID_ARGUMENT", "BAD_FRAME");
    assert!(message.contains("batch 1"), "{message}");
    let consumer = reads(&mut client, "levels");
    assert_eq!(number(&consumer.told, "/first"), 3);
    producer.taken();
    producer.sends(true, &[]);
    assert_eq!(consumer.is_last(), 3);
}

#[test]
fn options_are_checked_and_names_are_a_principals_own() {
    let host = Served::start(&[]);
    host.open_to_all();
    let mut client = host.greeted();
    let mut ask = |request: Value, reason: &str| {
        let reply = client.ask(Op::Prepare, request);
        let code = if reason == "NAME_TAKEN" {
            "ALREADY_EXISTS"
        } else {
            "INVALID_ARGUMENT"
        };
        reply.refused(code, reason)
    };
    for name in ["", "a#b", "a\nb", &"x".repeat(201)] {
        ask(asks("cumsum", name, &json!({})), "BAD_NAME");
    }
    for batches in [0, 1025] {
        let message = ask(
            asks("cumsum", "levels", &json!({"batches": batches})),
            "BAD_REQUEST",
        );
        assert!(message.contains("1 to 1024"), "{message}");
    }
    for more in [
        json!({"batches": -1}),
        json!({"wait_ms": "x"}),
        json!({"size": 1}),
    ] {
        ask(asks("cumsum", "levels", &more), "BAD_REQUEST");
    }
    let mut calls = asks("cumsum", "levels", &json!({}));
    calls["stream"] = json!(false);
    let message = ask(calls, "BAD_REQUEST");
    assert!(message.contains("`stream`"), "{message}");
    let producer = produces(&mut client, "levels", &json!({}));
    client
        .ask(Op::Prepare, asks("cumsum", "levels", &json!({})))
        .refused("ALREADY_EXISTS", "NAME_TAKEN");
    for (body, reason) in [
        (json!({"channel": "level"}), "CHANNEL_NOT_FOUND"),
        (json!({"channel": "x".repeat(5000)}), "CHANNEL_NOT_FOUND"),
    ] {
        client.ask(Op::Stream, body).refused("NOT_FOUND", reason);
    }
    for body in [
        json!({}),
        json!({"channel": 1}),
        json!({"channel": "levels", "from": 1}),
    ] {
        client
            .ask(Op::Stream, body)
            .refused("INVALID_ARGUMENT", "BAD_REQUEST");
    }
    if rustix::process::geteuid().is_root() {
        let socket = host.socket();
        crate::served::as_user(4242, || {
            let mut stranger = Raw::connect(&socket).unwrap();
            stranger.hello();
            stranger
                .ask(Op::Stream, json!({"channel": "levels"}))
                .refused("NOT_FOUND", "CHANNEL_NOT_FOUND");
            // And has one of that name of its own.
            drop(produces(&mut stranger, "levels", &json!({})));
        });
    }
    producer.sends(true, &[1.0]);
    let consumer = reads(&mut client, "levels");
    assert_eq!(consumer.batch().1, [1.0]);
    consumer.acknowledges(1);
    consumer.is_last();
}

#[test]
fn what_a_channel_keeps_is_charged() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let used = |client: &mut Raw| number(&client.ok(Op::Stats, json!({})), "/account/bytes");
    let small = produces(&mut client, "levels", &json!({"batches": 1}));
    let one = used(&mut client);
    drop(small);
    let mut watcher = host.greeted();
    host.eventually(&mut watcher, "it has ended", |stats| {
        number(stats, "/account/bytes") == 0
    });
    let large = produces(&mut client, "levels", &json!({"batches": 1000}));
    let consumer = reads(&mut client, "levels");
    let more = number(&consumer.told, "/batch_bytes") * 999;
    assert_eq!(used(&mut client), one + more);
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(
        number(&stats, "/account/connections"),
        4,
        "two connections, and two ends"
    );
    drop((large, consumer));
    host.eventually(&mut watcher, "it has ended", |stats| {
        number(stats, "/account/bytes") == 0 && number(stats, "/account/connections") == 2
    });
}
