//! Which kernel of a chain runs next, and what it sees: numbers only, without the guests and the memory between them.
//!
//! ```text
//! stage ──writes──▶ link │ consumed │ rows that are there │ room │ ──reads──▶ stages
//! ```
//! The stage furthest down that can go on runs, so that what was just written is read while it is in the cache. A link starts
//! over at its front when all its readers have consumed what is in it; only when none of the stages could go on otherwise, rows that
//! were not consumed move there.

use strait_memory::{GUEST_PAGE, LinkPages};
use strait_tensor::TensorSpec;

use super::chunk::{MOVED_AT, RECORD_BYTES};
use super::contract::{DONE, MORE};
use crate::plugin::Port;

/// One tensor of a stage.
#[derive(Debug)]
struct Side {
    port: String,
    /// It is there as a whole with each step.
    whole: bool,
    /// Of the whole tensor, at most.
    rows: u64,
    row_bytes: u64,
    /// Rows consumed or written so far.
    moved: u64,
    /// What it is read from, or written to.
    link: Option<usize>,
}

impl Side {
    fn new(port: &Port, spec: &TensorSpec, link: Option<usize>) -> Self {
        let rest = spec.shape.get(1..).unwrap_or_default();
        Self {
            port: port.name.clone(),
            whole: port.whole,
            // A tensor without axes is one row.
            rows: spec.shape.first().copied().unwrap_or(1),
            // That the tensor fits into memory was checked with its layout.
            row_bytes: rest
                .iter()
                .fold(spec.dtype.size(), |bytes, size| bytes.saturating_mul(*size)),
            moved: 0,
            link,
        }
    }
}

/// What is between a stage and those that read from it.
#[derive(Debug)]
struct Link {
    /// Rows that there is room for.
    capacity: u64,
    row_bytes: u64,
    /// Which row of the whole tensor lies at its front.
    front: u64,
    written: u64,
    /// (stage, input) that read from it.
    readers: Vec<(usize, usize)>,
    /// No rows come after those that were written.
    ended: bool,
}

#[derive(Debug)]
struct Stage {
    inputs: Vec<Side>,
    outputs: Vec<Side>,
    /// It wants to be called again, whatever comes.
    more: bool,
    /// Something came since it was last called.
    fresh: bool,
    ended: bool,
}

/// Rows of a link that are to move to its front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shift {
    pub(super) link: usize,
    /// Bytes, from the link's front.
    pub(super) from: u64,
    pub(super) bytes: u64,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Call this stage's `run`.
    Run(usize),
    /// Make room first.
    Shift(Shift),
    /// All is done.
    Over,
    /// This stage needs more rows at a time than there is room for.
    Stalled(usize),
}

/// How far a chain has come.
#[derive(Debug)]
pub(super) struct Flow {
    stages: Vec<Stage>,
    links: Vec<Link>,
}

/// A tensor, and the link that it is read from or written to.
pub(super) type Tied<'a> = (&'a Port, &'a TensorSpec, Option<usize>);

impl Flow {
    /// Of no stage, with links of so many bytes.
    pub(super) fn new() -> Self {
        Self {
            stages: Vec::new(),
            links: Vec::new(),
        }
    }

    /// A link of `bytes`, which the next stage writes. Its number.
    pub(super) fn link(&mut self, bytes: u64) -> usize {
        self.links.push(Link {
            // Until its writer is known.
            capacity: bytes,
            row_bytes: 1,
            front: 0,
            written: 0,
            readers: Vec::new(),
            ended: false,
        });
        self.links.len() - 1
    }

    /// A stage after all those that it reads from.
    pub(super) fn stage<'a>(
        &mut self,
        inputs: impl Iterator<Item = Tied<'a>>,
        outputs: impl Iterator<Item = Tied<'a>>,
    ) {
        let side = |(port, spec, link): Tied<'_>| Side::new(port, spec, link);
        let stage = Stage {
            inputs: inputs.map(side).collect(),
            outputs: outputs.map(side).collect(),
            more: false,
            fresh: true,
            ended: false,
        };
        let at = self.stages.len();
        for (index, input) in stage.inputs.iter().enumerate() {
            if let Some(link) = input.link {
                self.links[link].readers.push((at, index));
            }
        }
        for output in &stage.outputs {
            if let Some(link) = output.link {
                let link = &mut self.links[link];
                // As many as fit, but one.
                link.row_bytes = output.row_bytes.max(1);
                link.capacity = (link.capacity / link.row_bytes).max(1);
            }
        }
        self.stages.push(stage);
    }

    /// Rows written to an output of a stage.
    pub(super) fn written(&self, stage: usize, output: usize) -> u64 {
        self.stages[stage].outputs[output].moved
    }

    /// What is to be done next.
    pub(super) fn next(&mut self) -> Next {
        let ready = (0..self.stages.len()).rev().find(|at| self.is_ready(*at));
        if let Some(at) = ready {
            return Next::Run(at);
        }
        let full = (0..self.links.len()).find_map(|at| self.make_room(at));
        if let Some(shift) = full {
            return Next::Shift(shift);
        }
        match self.stages.iter().rposition(|stage| !stage.ended) {
            None => Next::Over,
            Some(at) => Next::Stalled(at),
        }
    }

    fn is_ready(&self, at: usize) -> bool {
        let stage = &self.stages[at];
        let has_rows = |side: &Side| side.link.is_none_or(|link| self.links[link].has_for(side));
        !stage.ended
            && (stage.more || stage.fresh)
            && stage.inputs.iter().all(has_rows)
            && stage.outputs.iter().all(|output| self.has_room(output))
    }

    /// Whether there is room for a row, or none is to come.
    fn has_room(&self, output: &Side) -> bool {
        output.moved == output.rows || self.room(output) > 0
    }

    fn room(&self, output: &Side) -> u64 {
        let all = output.rows - output.moved;
        match output.link {
            None => all,
            Some(link) => all.min(self.links[link].room()),
        }
    }

    /// If the link is full and some of it was consumed, what moves to make room.
    fn make_room(&mut self, at: usize) -> Option<Shift> {
        let link = &self.links[at];
        let consumed = self.consumed(link);
        if link.room() > 0 || consumed == link.front {
            return None;
        }
        let shift = Shift {
            link: at,
            from: (consumed - link.front) * link.row_bytes,
            bytes: (link.written - consumed) * link.row_bytes,
        };
        self.links[at].front = consumed;
        Some(shift)
    }

    /// Up to where all readers are done with a link.
    fn consumed(&self, link: &Link) -> u64 {
        let readers = link.readers.iter();
        let consumed = readers.map(|(stage, input)| match &self.stages[*stage] {
            stage if stage.ended => link.written,
            stage => stage.inputs[*input].moved,
        });
        consumed.min().unwrap_or(link.written)
    }

    /// Whether nothing comes after what the stage sees now.
    pub(super) fn is_last(&self, stage: usize) -> bool {
        let inputs = self.stages[stage].inputs.iter();
        inputs
            .filter_map(|input| input.link)
            .all(|link| self.links[link].ended)
    }

    /// Writes the stage's records for its next step, one after the other.
    pub(super) fn write(&self, stage: usize, records: &mut [u8]) {
        let Stage {
            inputs, outputs, ..
        } = &self.stages[stage];
        let inputs = inputs.iter().map(|side| match side.link {
            _ if side.whole => [0, side.rows, 0],
            None => [
                side.moved,
                side.rows - side.moved,
                side.moved * side.row_bytes,
            ],
            Some(link) => {
                let link = &self.links[link];
                let offset = (side.moved - link.front) * link.row_bytes;
                [side.moved, link.written - side.moved, offset]
            }
        });
        let outputs = outputs.iter().map(|side| {
            let offset = match side.link {
                None => side.moved * side.row_bytes,
                Some(link) => {
                    let link = &self.links[link];
                    (side.moved - link.front) * link.row_bytes
                }
            };
            [side.moved, self.room(side), offset]
        });
        let records = records.chunks_exact_mut(RECORD_BYTES);
        for (record, words) in records.zip(inputs.chain(outputs)) {
            record.fill(0);
            for (to, word) in record.chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Takes what the stage's guest wrote into its records, and what it answered.
    ///
    /// # Errors
    /// What it says and cannot have done, or that it wants to go on and gets nowhere.
    pub(super) fn step(&mut self, at: usize, records: &[u8], answer: u32) -> Result<(), String> {
        let last = self.is_last(at);
        let mut moved = records.chunks_exact(RECORD_BYTES).map(|record| {
            let mut word = [0; 8];
            word.copy_from_slice(&record[MOVED_AT..MOVED_AT + 8]);
            u64::from_le_bytes(word)
        });
        let mut any = false;
        for index in 0..self.stages[at].inputs.len() {
            let side = &self.stages[at].inputs[index];
            let moved = moved.next().unwrap_or(0);
            if side.whole {
                continue;
            }
            let there = match side.link {
                None => side.rows,
                Some(link) => self.links[link].written,
            };
            let rows = there - side.moved;
            if moved > rows {
                let port = &side.port;
                return Err(format!(
                    "it consumed {moved} rows of input `{port}`, whose chunk had {rows}"
                ));
            }
            any |= moved > 0;
            self.stages[at].inputs[index].moved += moved;
        }
        for index in 0..self.stages[at].outputs.len() {
            let side = &self.stages[at].outputs[index];
            let (moved, room, link) = (moved.next().unwrap_or(0), self.room(side), side.link);
            if moved > room {
                let port = &side.port;
                return Err(format!(
                    "it wrote {moved} rows to output `{port}`, which had room for {room}"
                ));
            }
            any |= moved > 0;
            self.stages[at].outputs[index].moved += moved;
            if let Some(link) = link {
                self.links[link].written += moved;
                if moved > 0 {
                    self.tell(link);
                }
            }
        }
        debug_assert!(
            answer == DONE || answer == MORE,
            "another answer is no step"
        );
        let stage = &mut self.stages[at];
        stage.more = answer == MORE;
        stage.fresh = false;
        if stage.more && !any {
            return Err(
                "it returned 2 (call again) and neither consumed nor wrote a row".to_owned(),
            );
        }
        if answer == DONE && last {
            self.end(at);
        }
        self.start_over(at);
        Ok(())
    }

    /// Those that read from the link have something new.
    fn tell(&mut self, link: usize) {
        for (stage, _) in &self.links[link].readers {
            self.stages[*stage].fresh = true;
        }
    }

    fn end(&mut self, at: usize) {
        self.stages[at].ended = true;
        let links: Vec<_> = self.stages[at]
            .outputs
            .iter()
            .filter_map(|output| output.link)
            .collect();
        for link in links {
            self.links[link].ended = true;
            self.tell(link);
        }
    }

    /// Links that the stage reads and that are consumed start over at their front.
    fn start_over(&mut self, at: usize) {
        for index in 0..self.stages[at].inputs.len() {
            if let Some(link) = self.stages[at].inputs[index].link
                && self.consumed(&self.links[link]) == self.links[link].written
            {
                self.links[link].front = self.links[link].written;
            }
        }
    }
}

impl Link {
    fn room(&self) -> u64 {
        self.capacity - (self.written - self.front)
    }

    /// Whether there is a row for a reader, or none is to come.
    fn has_for(&self, side: &Side) -> bool {
        self.ended || self.written > side.moved
    }
}

/// Bytes of a link between a stage that gives `spec` and those that take it, of about `asked` bytes; none if a row is too long for
/// that, or there are no rows.
#[must_use]
pub fn link_bytes(spec: &TensorSpec, asked: u64) -> Option<u64> {
    /// A link holds as many rows at least, lest each step does next to nothing.
    const ROWS_MIN: u64 = 4;
    let rest = spec.shape.get(1..)?;
    let row = rest
        .iter()
        .try_fold(spec.dtype.size(), |bytes, size| bytes.checked_mul(*size))?;
    let bytes = row.checked_mul(ROWS_MIN)?.max(asked);
    let bytes = bytes.checked_next_multiple_of(GUEST_PAGE)?;
    (bytes <= LinkPages::BYTES_MAX).then_some(bytes)
}

#[cfg(test)]
mod tests;
