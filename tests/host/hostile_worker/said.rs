//! What a worker says, as `host/worker/messages.rs` has it, and how to change it.

use serde::{Deserialize, Serialize};
use strait::engine::{Failed, Report};
use strait_tensor::TensorSpec;

/// Of a message of the worker on a lane: what it is.
pub(super) const LOADED: u8 = 0;
pub(super) const NEED: u8 = 1;
pub(super) const ENDED: u8 = 2;
pub(super) const WAITS: u8 = 4;
pub(super) const KEEPS: u8 = 5;
pub(super) const PIECE: u8 = 6;
/// Of a message to the worker on a lane.
pub(super) const GRANTED: u8 = 2;
/// Of one on the control channel: a lane for a stream, whose socket is beside it.
pub(super) const LANE: u8 = 5;

/// As `host/worker/messages.rs` has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) outcome: Result<Outcome, Failed>,
    pub(super) gone: Vec<usize>,
    pub(super) totals: [u64; 5],
    pub(super) counts: [u64; 6],
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    Filled(Vec<Filled>, Report),
    Specs(Vec<(String, TensorSpec)>),
    Streamed(Vec<(String, String)>),
    Chained(Vec<Filled>, Vec<Report>),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Filled {
    pub(super) port: String,
    pub(super) spec: TensorSpec,
    pub(super) body: FilledIn,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FilledIn {
    Segment { reserve_bytes: u64 },
    Inline(Vec<u8>),
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Piece {
    pub(super) outputs: Vec<(TensorSpec, Vec<u8>)>,
    pub(super) done: bool,
    pub(super) totals: [u64; 5],
}

impl Ended {
    pub(super) fn with(outcome: Result<Outcome, Failed>) -> Self {
        Self {
            outcome,
            gone: Vec::new(),
            totals: [0; 5],
            counts: [0; 6],
        }
    }
}

/// A message of that kind.
pub(super) fn message(kind: u8, of: &impl Serialize) -> Vec<u8> {
    [vec![kind], postcard::to_allocvec(of).unwrap()].concat()
}

pub(super) fn need(bytes: &[u64]) -> Vec<u8> {
    message(NEED, &bytes)
}

/// The end of a run, changed.
pub(super) fn ended(ended: &[u8], change: impl FnOnce(&mut Ended)) -> Vec<u8> {
    let mut changed = postcard::from_bytes(&ended[1..]).unwrap();
    change(&mut changed);
    message(ENDED, &changed)
}

pub(super) fn filled(message: &[u8], change: impl FnOnce(&mut Filled)) -> Vec<u8> {
    ended(message, |ended| {
        if let Ok(Outcome::Filled(filled, _)) = &mut ended.outcome {
            change(&mut filled[0]);
        }
    })
}

/// The end of a chain, changed; of anything else as it is.
pub(super) fn chained(
    message: &[u8],
    change: impl FnOnce(Vec<Filled>, Vec<Report>) -> Result<Outcome, Failed>,
) -> Vec<u8> {
    ended(message, |ended| {
        let told = std::mem::replace(&mut ended.outcome, Ok(Outcome::Specs(Vec::new())));
        ended.outcome = match told {
            Ok(Outcome::Chained(filled, reports)) => change(filled, reports),
            told => told,
        };
    })
}

pub(super) fn reported(message: &[u8], change: impl FnOnce(&mut Report)) -> Vec<u8> {
    ended(message, |ended| {
        if let Ok(Outcome::Filled(_, report)) = &mut ended.outcome {
            change(report);
        }
    })
}

/// Rows of a stream, changed.
pub(super) fn piece(piece: &[u8], change: impl FnOnce(&mut Piece)) -> Vec<u8> {
    let mut changed = postcard::from_bytes(&piece[1..]).unwrap();
    change(&mut changed);
    message(PIECE, &changed)
}
