//! Chains of guests that are played, over links that are vectors: whatever the sizes, the rows that come out are those of the stages
//! one after the other.

use proptest::prelude::*;
use strait_tensor::Dtype;

use super::*;
use crate::plugin::Role;

/// What a stage does with rows.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A row for a row.
    Map,
    /// Some of them.
    Filter,
    /// Each one twice.
    Twice,
    /// A row for a row, of which it leaves the last one unconsumed as long as others may come.
    Lag,
    /// Nothing before the end, and then how many there were.
    Count,
}

const KINDS: [Kind; 5] = [Kind::Map, Kind::Filter, Kind::Twice, Kind::Lag, Kind::Count];

impl Kind {
    /// All of its output.
    fn all(self, inputs: &[Vec<u64>]) -> Vec<u64> {
        let rows = inputs.iter().map(Vec::len).min().unwrap_or(0);
        let sum = |row: usize| {
            let rows = inputs.iter().map(|input| input[row]);
            rows.fold(1_u64, |sum, row| sum.wrapping_mul(31).wrapping_add(row))
        };
        match self {
            Self::Map | Self::Lag => (0..rows).map(sum).collect(),
            Self::Filter => (0..rows).map(sum).filter(|v| v % 3 > 0).collect(),
            Self::Twice => (0..rows).flat_map(|row| [sum(row); 2]).collect(),
            Self::Count => vec![rows as u64],
        }
    }

    /// Rows that come of so many, at most.
    fn bound(self, rows: u64) -> u64 {
        match self {
            Self::Map | Self::Lag | Self::Filter => rows,
            Self::Twice => 2 * rows,
            Self::Count => 1,
        }
    }
}

/// A stage as a guest would have it: what it has consumed, and what it has yet to write of that.
#[derive(Debug, Default)]
struct Guest {
    consumed: Vec<Vec<u64>>,
    written: usize,
}

#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    /// None: the chain's own input.
    inputs: Vec<Option<usize>>,
}

const ROW: u64 = 8;

fn port(name: &str) -> Port {
    Port {
        name: name.to_owned(),
        dtypes: vec![Dtype::Uint64],
        rank_min: 1,
        rank_max: 1,
        role: Role::Data,
        whole: false,
        doc: String::new(),
    }
}

fn spec(rows: u64) -> TensorSpec {
    TensorSpec {
        dtype: Dtype::Uint64,
        shape: vec![rows],
    }
}

/// Plays `nodes` over the rows of `x`, with links of so many rows; what each gives that nobody takes. None: they stall.
fn play(nodes: &[Node], x: &[u64], capacity: &[u64], lazy: &[bool]) -> Option<Vec<Vec<u64>>> {
    let mut flow = Flow::new();
    let mut memory: Vec<Vec<u64>> = Vec::new();
    let (x_port, y_port) = (port("x"), port("y"));
    let taken = |node: usize| nodes.iter().any(|other| other.inputs.contains(&Some(node)));
    let mut bounds: Vec<u64> = Vec::new();
    let mut link_of: Vec<Option<usize>> = Vec::new();
    for (at, node) in nodes.iter().enumerate() {
        let link = taken(at).then(|| {
            memory.push(vec![0; usize::try_from(capacity[at]).expect("small")]);
            flow.link(capacity[at] * ROW)
        });
        let rows = |input: &Option<usize>| input.map_or(x.len() as u64, |from| bounds[from]);
        let bound = node
            .kind
            .bound(node.inputs.iter().map(rows).min().unwrap_or(0));
        let inputs: Vec<_> = node
            .inputs
            .iter()
            .map(|input| (spec(rows(input)), input.and_then(|from| link_of[from])))
            .collect();
        let out = spec(bound);
        flow.stage(
            inputs.iter().map(|(spec, link)| (&x_port, spec, *link)),
            [(&y_port, &out, link)].into_iter(),
        );
        bounds.push(bound);
        link_of.push(link);
    }
    let mut guests: Vec<Guest> = nodes.iter().map(|_| Guest::default()).collect();
    let mut results: Vec<Vec<u64>> = vec![Vec::new(); nodes.len()];
    for step in 0.. {
        assert!(step < 200_000, "it does not end");
        let at = match flow.next() {
            Next::Over => break,
            Next::Stalled(_) => return None,
            Next::Shift(shift) => {
                let [from, bytes] = [shift.from, shift.bytes]
                    .map(|bytes| usize::try_from(bytes / ROW).expect("small"));
                memory[shift.link].copy_within(from..from + bytes, 0);
                continue;
            }
            Next::Run(at) => at,
        };
        let (node, last) = (&nodes[at], flow.is_last(at));
        let mut records = vec![0xee; (node.inputs.len() + 1) * RECORD_BYTES];
        flow.write(at, &mut records);
        let word = |record: usize, at: usize| {
            let from = record * RECORD_BYTES + at;
            let bytes = records[from..from + 8].try_into().expect("8 bytes");
            usize::try_from(u64::from_le_bytes(bytes)).expect("small")
        };
        let guest = &mut guests[at];
        guest.consumed.resize(node.inputs.len(), Vec::new());
        // As many rows as there are of all, or fewer where the guest takes its time.
        let there = (0..node.inputs.len())
            .map(|input| word(input, 8))
            .min()
            .unwrap_or(0);
        let mut rows = there;
        if lazy[at] {
            rows = rows.min(1 + step % 3);
        }
        let kept = matches!(node.kind, Kind::Lag) && !last && rows == there;
        let took = if kept { rows.saturating_sub(1) } else { rows };
        // What it has consumed and not written yet waits in the guest.
        let backlog = guest.all(node.kind).len() - guest.written;
        let took = if backlog > 50 { 0 } else { took };
        for (index, input) in node.inputs.iter().enumerate() {
            let (first, from) = (word(index, 0), word(index, 16) / 8);
            assert_eq!(first, guest.consumed[index].len(), "rows in order");
            let rows = match input.and_then(|from| link_of[from]) {
                Some(link) => &memory[link][from..from + took],
                None => &x[from..from + took],
            };
            guest.consumed[index].extend_from_slice(rows);
        }
        let ended = last && took == there;
        let mut all = guest.all(node.kind);
        if matches!(node.kind, Kind::Count) && !ended {
            all.clear();
        }
        let (room, from) = (word(node.inputs.len(), 8), word(node.inputs.len(), 16) / 8);
        assert_eq!(word(node.inputs.len(), 0), guest.written, "rows in order");
        let new = &all[guest.written.min(all.len())..];
        let new = &new[..new.len().min(room)];
        match link_of[at] {
            Some(link) => memory[link][from..from + new.len()].copy_from_slice(new),
            None => results[at].extend_from_slice(new),
        }
        guest.written += new.len();
        let left = guest.written < all.len() || took < there - usize::from(kept && there > 0);
        let moved = took > 0 || !new.is_empty();
        let answer = if left && moved { MORE } else { DONE };
        assert!(!(left && !moved && last), "a guest of ours would lose rows");
        for (record, moved) in (0..node.inputs.len())
            .map(|_| took)
            .chain([new.len()])
            .enumerate()
        {
            let to = record * RECORD_BYTES + MOVED_AT;
            records[to..to + 8].copy_from_slice(&(moved as u64).to_le_bytes());
        }
        flow.step(at, &records, answer).expect("no lie");
    }
    for (at, result) in results.iter().enumerate() {
        assert_eq!(flow.written(at, 0), guests[at].written as u64);
        assert!(link_of[at].is_some() || result.len() == guests[at].written);
    }
    Some(results)
}

impl Guest {
    fn all(&self, kind: Kind) -> Vec<u64> {
        match kind {
            Kind::Count if self.consumed.is_empty() => Vec::new(),
            kind => kind.all(&self.consumed),
        }
    }
}

fn expected(nodes: &[Node], x: &[u64]) -> Vec<Vec<u64>> {
    let mut all: Vec<Vec<u64>> = Vec::new();
    for node in nodes {
        let inputs = node.inputs.iter().map(|input| match input {
            None => x.to_vec(),
            Some(from) => all[*from].clone(),
        });
        all.push(node.kind.all(&inputs.collect::<Vec<_>>()));
    }
    all
}

proptest! {
    #[test]
    fn a_line_of_stages_gives_what_they_give_one_after_the_other(
        kinds in proptest::collection::vec(0..KINDS.len(), 1..6),
        rows in 0..300_usize,
        capacity in proptest::collection::vec(2..40_u64, 6),
        lazy in proptest::collection::vec(any::<bool>(), 6),
    ) {
        let nodes: Vec<Node> = kinds
            .iter()
            .enumerate()
            .map(|(at, kind)| Node { kind: KINDS[*kind], inputs: vec![at.checked_sub(1)] })
            .collect();
        let x: Vec<u64> = (0..rows as u64).map(|row| row * 7919 % 1009).collect();
        let given = play(&nodes, &x, &capacity, &lazy);
        let given = given.expect("nothing in a line waits for something else");
        let expected = expected(&nodes, &x);
        prop_assert_eq!(given.last(), expected.last());
    }

    #[test]
    fn a_graph_gives_the_same_or_stalls(
        shape in proptest::collection::vec((0..KINDS.len(), 0..8_usize, 0..8_usize), 1..7),
        rows in 0..200_usize,
        capacity in proptest::collection::vec(2..40_u64, 7),
        lazy in proptest::collection::vec(any::<bool>(), 7),
    ) {
        let nodes: Vec<Node> = shape
            .iter()
            .enumerate()
            .map(|(at, (kind, one, two))| {
                let of = |input: &usize| (*input < at).then_some(*input);
                let mut inputs = vec![of(one), of(two)];
                inputs.dedup();
                Node { kind: KINDS[*kind], inputs }
            })
            .collect();
        let x: Vec<u64> = (0..rows as u64).map(|row| row * 7919 % 1009).collect();
        if let Some(given) = play(&nodes, &x, &capacity, &lazy) {
            let expected = expected(&nodes, &x);
            for (at, given) in given.iter().enumerate() {
                let taken = nodes.iter().any(|node| node.inputs.contains(&Some(at)));
                if !taken {
                    prop_assert_eq!(given, &expected[at]);
                }
            }
        }
    }
}

/// Ten rows go from one to another, through a link of four.
fn two_stages() -> Flow {
    let mut flow = Flow::new();
    let link = flow.link(4 * ROW);
    let (x, y, of) = (port("x"), port("y"), spec(10));
    flow.stage(
        [(&x, &of, None)].into_iter(),
        [(&y, &of, Some(link))].into_iter(),
    );
    flow.stage(
        [(&x, &of, Some(link))].into_iter(),
        [(&y, &of, None)].into_iter(),
    );
    flow
}

#[test]
fn lies_are_told_apart() {
    let records = |moved: [u64; 2]| {
        let mut records = vec![0; 2 * RECORD_BYTES];
        for (record, moved) in records.chunks_exact_mut(RECORD_BYTES).zip(moved) {
            record[MOVED_AT..MOVED_AT + 8].copy_from_slice(&moved.to_le_bytes());
        }
        records
    };
    let refused = |moved, answer| {
        let mut flow = two_stages();
        flow.step(0, &records(moved), answer).expect_err("refused")
    };
    assert!(refused([11, 0], DONE).contains("consumed 11 rows of input `x`, whose chunk had 10"));
    assert!(refused([4, 5], MORE).contains("to output `y`, which had room for 4"));
    assert!(refused([0, 0], MORE).contains("neither consumed nor wrote"));
    let mut flow = two_stages();
    assert_eq!(flow.next(), Next::Run(0));
    flow.step(0, &records([4, 4]), MORE).expect("it did");
    assert_eq!(flow.next(), Next::Run(1));
    let lie = flow.step(1, &records([5, 0]), DONE).expect_err("refused");
    assert!(lie.contains("whose chunk had 4"));
}

#[test]
fn who_needs_more_than_there_is_room_for_stalls() {
    let mut flow = two_stages();
    let mut records = vec![0; 2 * RECORD_BYTES];
    records[MOVED_AT] = 4;
    records[RECORD_BYTES + MOVED_AT] = 4;
    assert_eq!(flow.next(), Next::Run(0));
    flow.step(0, &records, MORE).expect("it did");
    assert_eq!(flow.next(), Next::Run(1));
    flow.step(1, &[0; 2 * RECORD_BYTES], DONE)
        .expect("it waits");
    assert_eq!(flow.next(), Next::Stalled(1));
}

#[test]
fn links_hold_some_rows_or_are_none() {
    let of = |shape: &[u64]| TensorSpec {
        dtype: Dtype::Float64,
        shape: shape.to_vec(),
    };
    let bytes = |shape: &[u64]| link_bytes(&of(shape), 128 << 10);
    assert_eq!(bytes(&[1 << 20]), Some(128 << 10));
    assert_eq!(
        bytes(&[1000, 10_000]),
        Some(320_000_u64.next_multiple_of(GUEST_PAGE))
    );
    assert_eq!(bytes(&[10, 1 << 20]), None);
    assert_eq!(bytes(&[10, u64::MAX]), None);
    assert_eq!(bytes(&[]), None);
}
