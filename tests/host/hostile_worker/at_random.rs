//! Workers whose every word may be changed, by a seed: whatever comes of it, each request has an answer, the next one is served, and
//! nothing is left.
//!
//! `TEST_LIES` is how many (those of a few seconds otherwise), `TEST_SEED` which.

use std::os::fd::AsFd;

use serde_json::{Value, json};
use strait_client::wire::Op;
use strait_memory::FrameSocket;

use super::Lied;
use crate::prepared::stream::flat;
use crate::prepared::{Prepared, brought, scale_shift as scale_shift_of};
use crate::served::{Frame, Holdings, Random, Raw, number, numbers, ramp, scale_shift};
use crate::workers::MOVED;

const LIES: usize = 80;
/// After lies, until one is served as it should be.
const CALLS_MAX: usize = 20;
/// Of each request: a worker may say nothing.
const DEADLINE_MS: u64 = 300;

/// Whether a request was not refused; it was answered.
fn is_done(reply: &Frame) -> bool {
    if reply.op() != Op::Error {
        return true;
    }
    let body = reply.body();
    let [code, reason] = ["code", "reason"].map(|field| body[field].as_str().unwrap());
    reply.refused(code, reason);
    false
}

impl Lied {
    /// Serves again without lies. What was said when nobody asked may still be taken for an answer, but not for long.
    fn recover(&mut self) {
        self.lie("");
        let expected: Vec<_> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
        for _ in 0..CALLS_MAX {
            let call = scale_shift(json!("x"), 2.0, 1.0);
            let reply = self.client.ask(Op::Invoke, call);
            if is_done(&reply) {
                let is_right = numbers(&reply) == expected;
                let lease = &reply.body()["results"][0]["lease"];
                self.client.ok(Op::Release, json!({"leases": [lease]}));
                if is_right {
                    return;
                }
            }
        }
        panic!("no call is served as it should be");
    }

    fn run(&mut self, input: &str, publish: bool) {
        let mut body = scale_shift(json!(input), 2.0, 1.0);
        body["deadline_ms"] = json!(DEADLINE_MS);
        if publish {
            body["publish"] = json!({"y": "made"});
        }
        let reply = self.client.ask(Op::Invoke, body);
        if !is_done(&reply) {
            return;
        }
        if publish {
            self.client.ok(Op::Drop, json!({"name": "made"}));
        }
        let lease = &reply.body()["results"][0]["lease"];
        self.client.ok(Op::Release, json!({"leases": [lease]}));
    }

    fn run_small(&mut self) {
        let x = json!({"inline": {"dtype": "float64", "shape": [3], "offset": 0, "length": 24}});
        let mut body = scale_shift(x, 2.0, 1.0);
        body["deadline_ms"] = json!(DEADLINE_MS);
        body["inline_bytes"] = json!(32 << 10);
        is_done(&self.client.ask_inline(Op::Invoke, &body, &[0; 24]));
    }

    /// It, and its end of the socket as one that is not waited for without end.
    fn prepare(&mut self, mut request: Value) -> Option<(Prepared, Raw)> {
        request["deadline_ms"] = json!(DEADLINE_MS);
        let reply = self.client.ask(Op::Prepare, request);
        if !is_done(&reply) {
            return None;
        }
        let prepared = Prepared::of(reply);
        let socket = prepared.socket.as_fd().try_clone_to_owned().unwrap();
        Some((prepared, Raw::over(FrameSocket::from(socket))))
    }

    fn call(&mut self) {
        let Some((prepared, socket)) = self.prepare(scale_shift_of(brought(8))) else {
            return;
        };
        for sequence in 0..4 {
            prepared.send(sequence, &prepared.payload(&ramp(8)));
            is_done(&socket.receive().expect("it goes on"));
        }
    }

    fn stream(&mut self) {
        let request = json!({"kernel": "cumsum", "stream": true,
            "inputs": {"x": {"dtype": "float64", "shape": [4]}}});
        let Some((stream, socket)) = self.prepare(request) else {
            return;
        };
        for last in [false, false, true, false, true] {
            let chunk = flat(&stream, last, &ramp(4));
            // It may be over.
            if stream.socket.send(&[&chunk], &[]).is_err() {
                return;
            }
            loop {
                let Some(reply) = socket.receive() else {
                    return;
                };
                if reply.op() != Op::Chunk {
                    is_done(&reply);
                    break;
                }
            }
        }
    }
}

#[test]
fn whatever_a_worker_says_each_request_is_answered_and_nothing_is_left() {
    let lies = std::env::var("TEST_LIES").map_or(LIES, |lies| lies.parse().unwrap());
    let mut random = Random::new();
    let mut lied = Lied::start();
    let each: [fn(&mut Lied); 5] = [
        |lied| lied.run("y", false),
        |lied| lied.run("x", true),
        Lied::run_small,
        Lied::call,
        Lied::stream,
    ];
    // Once without a lie, so that what stays for good is there.
    for run in each {
        run(&mut lied);
    }
    lied.honest();
    let stats = lied.host.settled(&mut lied.client);
    let (before, threads) = (Holdings::of(&stats), number(&stats, "/process/threads"));
    for _ in 0..lies {
        let (seed, which) = (random.next(), random.below(each.len()));
        eprintln!("mutate {seed}: {which}");
        lied.lie(&format!("mutate {seed}"));
        each[which](&mut lied);
        lied.recover();
    }
    lied.host
        .eventually(&mut lied.client, "no thread is left", |stats| {
            number(stats, "/process/threads") <= threads
        });
    lied.done(&before);
}
