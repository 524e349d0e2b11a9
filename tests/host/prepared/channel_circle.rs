//! Circles of producers and consumers whose channels are full: they go on, or end by name, and never wait for ever.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};
use strait_client::wire::Op;

use super::Prepared;
use super::channel::{produces, reads};
use crate::served::{Holdings, Random, Served};

/// What each of them waits for its consumer where nobody reads, and where all do, on a busy machine.
const WAIT_MS: [u64; 2] = [500, 20_000];
/// Chunks that each of them writes.
const CHUNKS: u64 = 40;

/// Reads the channel of the one before it, and for each batch of that writes a chunk of its own.
struct Party {
    producer: Prepared,
    consumer: Prepared,
    /// Chunks that it may write.
    may: u64,
    written: u64,
    /// A chunk is not answered yet.
    is_held_up: bool,
    read: u64,
    has_ended: Option<String>,
}

impl Party {
    fn has_something(of: &Prepared) -> bool {
        let mut polled = [PollFd::new(&of.socket, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut polled, Some(&at_once)).unwrap() > 0
    }

    fn writes(&mut self) {
        if self.is_held_up && Self::has_something(&self.producer) {
            let reply = self.producer.receive().expect("an answer");
            self.is_held_up = false;
            if reply.op() == Op::Error {
                let told: Value = serde_json::from_str(&reply.text).unwrap();
                self.has_ended = Some(told["reason"].as_str().unwrap().to_owned());
            }
        } else if !self.is_held_up && self.may > 0 && self.written < CHUNKS {
            self.producer.sends(false, &[1.0]);
            (self.may, self.written, self.is_held_up) = (self.may - 1, self.written + 1, true);
        }
    }

    fn reads(&mut self) {
        if self.read == CHUNKS || !Self::has_something(&self.consumer) {
            return;
        }
        let Some(batch) = self.consumer.receive() else {
            return;
        };
        if batch.op() == Op::Error {
            let told: Value = serde_json::from_str(&batch.text).unwrap();
            self.has_ended = Some(told["reason"].as_str().unwrap().to_owned());
            return;
        }
        let (number, rows) = self.consumer.rows(&batch);
        self.read += 1;
        assert_eq!(
            u64::from(number),
            self.read,
            "in order, and none is missing"
        );
        assert_eq!(rows, [self.read as f64]);
        self.consumer.acknowledges(number);
        self.may += 1;
    }

    fn is_done(&self) -> bool {
        let all = self.written == CHUNKS && self.read == CHUNKS && !self.is_held_up;
        all || self.has_ended.is_some()
    }
}

/// One run of `seed`: how each of the parties ended. `greedy`: whoever is held up does not read meanwhile.
fn run(host: &Served, seed: u64, greedy: bool) -> Vec<Option<String>> {
    let mut random = Random::seeded(seed);
    let count = 2 + random.below(3);
    let mut clients: Vec<_> = (0..count).map(|_| host.greeted()).collect();
    // Those of the seed before may not have ended yet.
    let name = |party: usize| format!("{seed}: from {party}");
    let producers: Vec<_> = clients
        .iter_mut()
        .enumerate()
        .map(|(party, client)| {
            let batches = 1 + random.below(3);
            let options = json!({"batches": batches, "wait_ms": WAIT_MS[usize::from(!greedy)]});
            produces(client, &name(party), &options)
        })
        .collect();
    let mut parties: Vec<_> = producers
        .into_iter()
        .enumerate()
        .map(|(party, producer)| Party {
            producer,
            consumer: reads(&mut clients[party], &name((party + count - 1) % count)),
            // More than all channels keep, so that all of them can be full at once.
            may: if greedy {
                CHUNKS
            } else {
                1 + random.below(8) as u64
            },
            written: 0,
            is_held_up: false,
            read: 0,
            has_ended: None,
        })
        .collect();
    let start = Instant::now();
    while !parties.iter().all(Party::is_done) {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "seed {seed}: {:?}",
            parties
                .iter()
                .map(|p| (p.written, p.read, p.is_held_up, &p.has_ended))
                .collect::<Vec<_>>()
        );
        let party = &mut parties[random.below(count)];
        if party.has_ended.is_some() {
            continue;
        }
        match random.below(2) {
            0 => party.writes(),
            _ if greedy && party.written < CHUNKS => {}
            _ => party.reads(),
        }
    }
    parties.into_iter().map(|party| party.has_ended).collect()
}

#[test]
fn full_channels_in_a_circle_do_not_stop_those_who_read() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    for seed in 0..20 {
        let ends = run(&host, seed, false);
        assert!(ends.iter().all(Option::is_none), "seed {seed}: {ends:?}");
    }
    assert_eq!(Holdings::of(&host.settled(&mut watcher)), before);
}

#[test]
fn a_circle_in_which_nobody_reads_ends_by_name() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.settled(&mut watcher));
    for seed in 0..4 {
        let ends = run(&host, seed, true);
        // The first of them is late; those it leaves are told so.
        let known = ["DEADLINE", "PRODUCER_LOST", "CONSUMER_LOST"];
        let named = |end: &Option<String>| end.as_deref().is_some_and(|end| known.contains(&end));
        assert!(ends.iter().all(named), "seed {seed}: {ends:?}");
        assert!(ends.contains(&Some("DEADLINE".to_owned())), "{ends:?}");
    }
    assert_eq!(Holdings::of(&host.settled(&mut watcher)), before);
}
