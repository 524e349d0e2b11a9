//! What a worker says, changed at random: its bytes, its order, its packets, what is beside them.

use std::io::IoSlice;
use std::os::fd::OwnedFd;

use parking_lot::Mutex;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use serde_json::json;
use strait::engine::Report;
use strait_memory::FrameSocket;
use strait_tensor::{Dtype, TensorSpec};

use super::packet::{LAST, MORE, send};
use super::said::{
    self, ENDED, Ended, Filled, FilledIn, KEEPS, NEED, Outcome, PIECE, Piece, WAITS,
};
use crate::served::{Random, memfd};

/// Messages that may be said again.
const SAID_MAX: usize = 64;
/// Numbers at which something may change.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    8,
    127,
    128,
    4096,
    65_536,
    1 << 20,
    1 << 32,
    1 << 53,
    i64::MAX.cast_unsigned(),
    i64::MIN.cast_unsigned(),
    u64::MAX,
];
const DTYPES: [Dtype; 4] = [
    Dtype::Float64,
    Dtype::Bool8,
    Dtype::Complex128,
    Dtype::Bfloat16,
];

struct Mutator {
    seed: String,
    random: Random,
    said: Vec<Vec<u8>>,
}

/// Of this process, so that the same seed changes the same messages as long as they come in the same order.
static MUTATOR: Mutex<Option<Mutator>> = Mutex::new(None);

/// What goes to the host.
enum Sent {
    Message(Vec<u8>, Vec<OwnedFd>),
    Packet(Vec<u8>),
    /// Without a byte.
    Empty,
    /// Nothing comes any more.
    End,
}

/// Says something in the place of `message`, or around it; whether to go on.
pub(super) fn say(host: &FrameSocket, message: &[u8], seed: &str) -> bool {
    let mut mutator = MUTATOR.lock();
    if mutator.as_ref().is_none_or(|mutator| mutator.seed != seed) {
        *mutator = Some(Mutator {
            seed: seed.to_owned(),
            random: Random::seeded(seed.parse().unwrap()),
            said: Vec::new(),
        });
    }
    let sent = mutator.as_mut().unwrap().changed(message);
    drop(mutator);
    sent.iter().all(|sent| match sent {
        Sent::Message(message, fds) => send(host, message, fds),
        Sent::Packet(packet) => host.send(&[packet], &[]).is_ok(),
        Sent::Empty => {
            let none: [IoSlice<'_>; 0] = [];
            let mut control = SendAncillaryBuffer::default();
            rustix::net::sendmsg(host, &none, &mut control, SendFlags::NOSIGNAL).is_ok()
        }
        Sent::End => {
            let _ = host.shutdown();
            false
        }
    })
}

impl Mutator {
    fn changed(&mut self, message: &[u8]) -> Vec<Sent> {
        if self.said.len() == SAID_MAX {
            self.said.swap_remove(self.random.below(SAID_MAX));
        }
        self.said.push(message.to_vec());
        let plain = |message: Vec<u8>| Sent::Message(message, Vec::new());
        let same = || plain(message.to_vec());
        match self.random.below(24) {
            0..=7 => vec![same()],
            8 | 9 => vec![plain(self.bytes(message.to_vec()))],
            10 => vec![plain(self.number_in(message))],
            11 => vec![plain(self.spliced(message))],
            12 => vec![plain(message[..self.random.below(message.len())].to_vec())],
            13 => {
                let behind = 1 + self.random.below(64);
                vec![plain([message, &self.random.bytes(behind)].concat())]
            }
            14 => vec![same(), same()],
            15 => vec![plain(self.older())],
            16 => vec![plain(self.older()), same()],
            17 => vec![same(), plain(self.older())],
            18 => {
                let fds = (0..=self.random.below(20)).map(|_| memfd(1)).collect();
                vec![Sent::Message(message.to_vec(), fds)]
            }
            19 => self.packets(message),
            20 => vec![plain(self.made_up())],
            21 => vec![plain(self.made_up()), same()],
            22 => vec![plain(self.told_otherwise(message))],
            _ => match self.random.below(3) {
                0 => Vec::new(),
                1 => vec![Sent::End],
                _ => vec![same()],
            },
        }
    }

    fn edge(&mut self) -> u64 {
        *self.random.one(&EDGES)
    }

    fn older(&mut self) -> Vec<u8> {
        self.random.one(&self.said).clone()
    }

    /// Some of them are others.
    fn bytes(&mut self, mut message: Vec<u8>) -> Vec<u8> {
        for _ in 0..=self.random.below(4) {
            let at = self.random.below(message.len());
            message[at] = self.random.bytes(1)[0];
        }
        message
    }

    /// A number in the place of a byte: most bytes of a message are numbers.
    fn number_in(&mut self, message: &[u8]) -> Vec<u8> {
        let at = self.random.below(message.len());
        let number = postcard::to_allocvec(&self.edge()).unwrap();
        [&message[..at], &number, &message[at + 1..]].concat()
    }

    /// The end of another one behind its beginning.
    fn spliced(&mut self, message: &[u8]) -> Vec<u8> {
        let other = self.older();
        let (to, from) = (
            self.random.below(message.len()),
            self.random.below(other.len()),
        );
        [&message[..=to], &other[from..]].concat()
    }

    /// Cut into packets as none are.
    fn packets(&mut self, message: &[u8]) -> Vec<Sent> {
        let packet = |kind: u8, part: &[u8]| Sent::Packet([&[kind], part].concat());
        let half = message.len() / 2;
        match self.random.below(6) {
            0 => vec![
                packet(MORE, &message[..half]),
                packet(LAST, &message[half..]),
            ],
            1 => vec![packet(self.random.bytes(1)[0], message)],
            2 => vec![Sent::Empty],
            3 => vec![packet(LAST, &self.random.bytes(100 << 10))],
            4 => (0..40)
                .map(|_| packet(MORE, &[0; 60 << 10]))
                .chain([packet(LAST, message)])
                .collect(),
            _ => vec![packet(MORE, &[0; 60 << 10])],
        }
    }

    fn spec(&mut self) -> TensorSpec {
        TensorSpec {
            dtype: *self.random.one(&DTYPES),
            shape: (0..self.random.below(4)).map(|_| self.edge()).collect(),
        }
    }

    fn elements(&mut self) -> Vec<u8> {
        let count = self.random.below(200);
        self.random.bytes(count)
    }

    /// A message of any kind, at whatever time.
    fn made_up(&mut self) -> Vec<u8> {
        let (kind, count) = (self.random.below(8), self.random.below(4));
        let port = || "y".to_owned();
        let outcome = match kind {
            0 => {
                let needs: Vec<_> = (0..count).map(|_| self.edge()).collect();
                return said::message(NEED, &needs);
            }
            1 => return said::message(WAITS, &self.edge()),
            2 => return said::message(KEEPS, &self.edge()),
            3 => {
                let outputs = (0..count).map(|_| (self.spec(), self.elements()));
                let piece = Piece {
                    outputs: outputs.collect(),
                    done: self.random.below(2) == 0,
                    totals: [self.edge(); 5],
                };
                return said::message(PIECE, &piece);
            }
            4 => Ok(Outcome::Streamed(vec![(port(), port()); 30 * count])),
            5 => {
                let specs = (0..count).map(|_| (port(), self.spec()));
                Ok(Outcome::Specs(specs.collect()))
            }
            6 => {
                let filled = (0..count).map(|_| Filled {
                    port: port(),
                    spec: self.spec(),
                    body: self.body(),
                });
                Ok(Outcome::Filled(filled.collect(), Report::default()))
            }
            _ => {
                let causes = [
                    json!("Cancelled"),
                    json!("Lost"),
                    json!({"Host": "it is ill"}),
                    json!({"Deadline": 1}),
                    json!({"Contract": "x".repeat(10_000)}),
                ];
                let cause = self.random.one(&causes);
                let failed = json!({"kernel": "k", "stage": "Run", "cause": cause});
                Err(serde_json::from_value(failed).unwrap())
            }
        };
        said::message(ENDED, &Ended::with(outcome))
    }

    fn body(&mut self) -> FilledIn {
        match self.random.below(2) {
            0 => FilledIn::Segment {
                reserve_bytes: self.edge(),
            },
            _ => FilledIn::Inline(self.elements()),
        }
    }

    /// The same kind of message with other figures.
    fn told_otherwise(&mut self, message: &[u8]) -> Vec<u8> {
        match message[0] {
            WAITS | KEEPS => said::message(message[0], &self.edge()),
            PIECE => said::piece(message, |piece| {
                for (spec, bytes) in &mut piece.outputs {
                    self.tensor_otherwise(spec, bytes);
                }
                piece.done ^= self.random.below(3) == 0;
            }),
            ENDED => said::ended(message, |ended| {
                match &mut ended.outcome {
                    Ok(Outcome::Filled(filled, _) | Outcome::Chained(filled, _)) => {
                        for filled in filled {
                            self.filled_otherwise(filled);
                        }
                    }
                    Ok(Outcome::Specs(specs)) => {
                        for (_, spec) in specs {
                            self.spec_otherwise(spec);
                        }
                    }
                    Ok(Outcome::Streamed(_)) | Err(_) => {}
                }
                ended.gone.push(self.random.below(3));
                (ended.totals, ended.counts) = ([self.edge(); 5], [self.edge(); 6]);
            }),
            _ => self.number_in(message),
        }
    }

    fn filled_otherwise(&mut self, filled: &mut Filled) {
        match (&mut filled.body, self.random.below(3)) {
            (body, 0) => *body = self.body(),
            (FilledIn::Inline(bytes), _) => self.tensor_otherwise(&mut filled.spec, bytes),
            (FilledIn::Segment { .. }, _) => self.spec_otherwise(&mut filled.spec),
        }
    }

    fn spec_otherwise(&mut self, spec: &mut TensorSpec) {
        match self.random.below(4) {
            0 => spec.dtype = *self.random.one(&DTYPES),
            1 => spec.shape.push(self.edge()),
            2 => {
                spec.shape.pop();
            }
            _ => {
                for size in &mut spec.shape {
                    *size = self.edge();
                }
            }
        }
    }

    fn tensor_otherwise(&mut self, spec: &mut TensorSpec, bytes: &mut Vec<u8>) {
        match self.random.below(3) {
            0 => self.spec_otherwise(spec),
            1 => bytes.truncate(self.random.below(bytes.len() + 1)),
            _ => bytes.extend(self.elements()),
        }
    }
}
