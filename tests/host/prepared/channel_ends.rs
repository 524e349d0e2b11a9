//! Channels whose one side ends while the other is in the middle of something.

use std::time::Duration;

use serde_json::json;
use strait_client::wire::Op;

use super::Prepared;
use super::channel::{asks, produces, reads};
use super::stream::chunk;
use crate::served::Served;

#[test]
fn a_producer_that_leaves_while_its_chunks_run_has_left() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for at in 0..60 {
        let mut mine = host.greeted();
        let producer = produces(&mut mine, "levels", &json!({}));
        let consumer = reads(&mut client, "levels");
        // Their answers are not read, and perhaps not written.
        for _ in 0..=at % 4 {
            producer.sends(false, &[1.0; 4]);
        }
        // With its connection, too, which cancels what runs.
        match at % 2 {
            0 => drop(producer),
            _ => drop((producer, mine)),
        }
        let told = std::iter::repeat_with(|| consumer.receive().expect("it is told"))
            .find(|frame| frame.op() != Op::Chunk)
            .expect("without end");
        told.refused("UNAVAILABLE", "PRODUCER_LOST");
    }
}

#[test]
fn a_consumer_whose_socket_is_full_is_told_why_it_is_over() {
    let host = Served::start(&[]);
    let (mut one, mut other) = (host.greeted(), host.greeted());
    for batches in [1, 8, 16] {
        // A few of them fill a socket.
        let rows = vec![1.0; 4096];
        let mut request = asks("scale-shift", "levels", &json!({"batches": 32}));
        request["inputs"]["x"]["shape"] = json!([rows.len(), 1]);
        let producer = Prepared::by(&mut one, request);
        let consumer = reads(&mut other, "levels");
        for _ in 0..batches {
            producer.sends(false, &rows);
            producer.taken();
        }
        let wrong = chunk(&producer, false, &[1.0, 2.0], 2);
        producer.socket.send(&[&wrong], &[]).unwrap();
        let reply = producer.receive().expect("an answer");
        reply.refused("INVALID_ARGUMENT", "BAD_INPUT");
        for number in 1..=batches {
            // It reads one after another, so that the last one is sent when there is room for that alone.
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(consumer.batch(), (number, rows.clone()));
        }
        let told = consumer.receive().expect("it is told");
        told.refused("INVALID_ARGUMENT", "BAD_INPUT");
    }
}
