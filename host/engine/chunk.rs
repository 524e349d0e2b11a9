//! What one `run` sees of each tensor, and what the guest says it did with it: the chunk records of
//! `wit/kernel.wit` as numbers, without the memory that they lie in.

use std::num::NonZeroU64;

use strait_tensor::TensorSpec;

use crate::plugin::Port;

/// Size of a chunk record in guest memory, in bytes.
pub(super) const RECORD_BYTES: usize = 64;
/// Where in a record the guest says what it consumed or wrote.
pub(super) const MOVED_AT: usize = 24;

/// One port's tensor on its way through `run`.
#[derive(Debug)]
struct Track<'a> {
    port: &'a str,
    output: bool,
    whole: bool,
    rows: u64,
    row_bytes: u64,
    /// Rows consumed or written so far.
    moved: u64,
    /// Rows up to the end of this chunk; of an output and of what is whole all.
    there: u64,
}

impl<'a> Track<'a> {
    fn new(port: &'a Port, output: bool, spec: &TensorSpec) -> Self {
        // A tensor without axes is one row.
        let rows = spec.shape.first().copied().unwrap_or(1);
        let rest = spec.shape.get(1..).unwrap_or_default();
        Self {
            port: &port.name,
            output,
            whole: port.whole,
            rows,
            // That the tensor fits into memory was checked with its layout.
            row_bytes: rest
                .iter()
                .fold(spec.dtype.size(), |bytes, size| bytes.saturating_mul(*size)),
            moved: 0,
            there: rows,
        }
    }

    /// Whether it comes chunk by chunk.
    fn is_cut(&self) -> bool {
        !self.output && !self.whole
    }

    fn record(&self) -> [u8; RECORD_BYTES] {
        let offset = self.moved.saturating_mul(self.row_bytes);
        let mut record = [0; RECORD_BYTES];
        let words = [self.moved, self.there - self.moved, offset];
        for (to, word) in record.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        record
    }

    /// Takes what the guest wrote into the record, and says how many rows that moved.
    fn step(&mut self, record: &[u8]) -> Result<u64, String> {
        let mut word = [0; 8];
        word.copy_from_slice(&record[MOVED_AT..MOVED_AT + 8]);
        let (moved, room) = (u64::from_le_bytes(word), self.there - self.moved);
        if moved > room {
            let port = self.port;
            return Err(if self.output {
                format!("it wrote {moved} rows to output `{port}`, which had room for {room}")
            } else {
                format!("it consumed {moved} rows of input `{port}`, whose chunk had {room}")
            });
        }
        if self.whole {
            return Ok(0);
        }
        self.moved += moved;
        Ok(moved)
    }
}

/// What is there of each tensor, in one or more steps: all of it, or one chunk after the other. Room there is for all
/// results from the start.
#[derive(Debug)]
pub(super) struct Chunk<'a> {
    /// Inputs, then outputs.
    tracks: Vec<Track<'a>>,
    inputs: usize,
    /// New rows of each input with each chunk; none: all rows are one chunk.
    rows: Option<NonZeroU64>,
}

impl<'a> Chunk<'a> {
    /// The first chunk of these inputs and outputs, each in the order of the kernel's ports.
    pub(super) fn new<'s>(
        rows: Option<NonZeroU64>,
        inputs: impl Iterator<Item = (&'a Port, &'s TensorSpec)>,
        outputs: impl Iterator<Item = (&'a Port, &'s TensorSpec)>,
    ) -> Self {
        let mut tracks: Vec<Track<'a>> = inputs
            .map(|(port, spec)| Track::new(port, false, spec))
            .collect();
        let count = tracks.len();
        tracks.extend(outputs.map(|(port, spec)| Track::new(port, true, spec)));
        if let Some(rows) = rows {
            for track in tracks.iter_mut().filter(|track| track.is_cut()) {
                track.there = track.rows.min(rows.get());
            }
        }
        Self {
            tracks,
            inputs: count,
            rows,
        }
    }

    /// Whether no rows come after it.
    pub(super) fn is_last(&self) -> bool {
        self.tracks.iter().all(|track| track.there == track.rows)
    }

    /// Goes on to the next chunk: what was not consumed, and the next rows.
    pub(super) fn advance(&mut self) {
        let rows = self.rows.map_or(u64::MAX, NonZeroU64::get);
        for track in self.tracks.iter_mut().filter(|track| track.is_cut()) {
            track.there = track.rows.min(track.there.saturating_add(rows));
        }
    }

    /// Bytes of all records.
    pub(super) fn records_bytes(&self) -> usize {
        self.tracks.len() * RECORD_BYTES
    }

    /// Writes the records for the next step, one after the other.
    pub(super) fn write(&self, records: &mut [u8]) {
        for (to, track) in records.chunks_exact_mut(RECORD_BYTES).zip(&self.tracks) {
            to.copy_from_slice(&track.record());
        }
    }

    /// Takes what the guest wrote into the records. `more`: it wants another step.
    ///
    /// # Errors
    /// What it says and cannot have done, or that it wants to go on and gets nowhere.
    pub(super) fn step(&mut self, records: &[u8], more: bool) -> Result<(), String> {
        let mut moved = 0_u64;
        for (record, track) in records.chunks_exact(RECORD_BYTES).zip(&mut self.tracks) {
            moved = moved.saturating_add(track.step(record)?);
        }
        if more && moved == 0 {
            return Err(
                "it returned 2 (call again) and neither consumed nor wrote a row".to_owned(),
            );
        }
        Ok(())
    }

    /// Rows written to output `index`.
    pub(super) fn written(&self, index: usize) -> u64 {
        self.tracks[self.inputs + index].moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Role;
    use strait_tensor::Dtype;

    fn port(name: &str, whole: bool) -> Port {
        Port {
            name: name.to_owned(),
            dtypes: vec![Dtype::Float64],
            rank_min: 0,
            rank_max: 8,
            role: Role::Data,
            whole,
            doc: String::new(),
        }
    }

    fn spec(shape: &[u64]) -> TensorSpec {
        TensorSpec {
            dtype: Dtype::Float64,
            shape: shape.to_vec(),
        }
    }

    /// A guest that says it moved these rows; what it saw before.
    fn step(
        chunk: &mut Chunk<'_>,
        moved: &[u64],
        more: bool,
    ) -> (Vec<[u64; 4]>, Result<(), String>) {
        let mut records = vec![0xee; chunk.records_bytes()];
        chunk.write(&mut records);
        let seen = records
            .chunks_exact(RECORD_BYTES)
            .map(|record| {
                assert!(record[MOVED_AT..].iter().all(|byte| *byte == 0));
                [0, 8, 16, 24]
                    .map(|at| u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes")))
            })
            .collect();
        for (record, moved) in records.chunks_exact_mut(RECORD_BYTES).zip(moved) {
            // Whatever else it writes there is not looked at.
            record[..MOVED_AT].fill(0xff);
            record[MOVED_AT..MOVED_AT + 8].copy_from_slice(&moved.to_le_bytes());
        }
        (seen, chunk.step(&records, more))
    }

    #[test]
    fn steps_go_through_the_rows() {
        let (x, taps, y) = (port("x", false), port("taps", true), port("y", false));
        let (of_x, of_taps, of_y) = (spec(&[10, 3]), spec(&[4]), spec(&[7]));
        let mut chunk = Chunk::new(
            None,
            [(&x, &of_x), (&taps, &of_taps)].into_iter(),
            [(&y, &of_y)].into_iter(),
        );
        let (seen, went) = step(&mut chunk, &[6, 4, 2], true);
        assert_eq!(seen, [[0, 10, 0, 0], [0, 4, 0, 0], [0, 7, 0, 0]]);
        assert_eq!(went, Ok(()));
        let (seen, went) = step(&mut chunk, &[4, 0, 0], true);
        assert_eq!(seen, [[6, 4, 6 * 24, 0], [0, 4, 0, 0], [2, 5, 16, 0]]);
        assert_eq!(went, Ok(()));
        let (seen, went) = step(&mut chunk, &[0, 0, 5], false);
        assert_eq!(seen[0], [10, 0, 240, 0]);
        assert_eq!((went, chunk.written(0)), (Ok(()), 7));
        assert!(chunk.is_last());
    }

    #[test]
    fn chunks_go_through_the_rows() {
        let ports = [port("x", false), port("taps", true), port("z", false)];
        let (y, of_y) = (port("y", false), spec(&[7]));
        let specs = [spec(&[10, 3]), spec(&[9]), spec(&[3])];
        let mut chunk = Chunk::new(
            NonZeroU64::new(4),
            ports.iter().zip(&specs),
            [(&y, &of_y)].into_iter(),
        );
        let (seen, went) = step(&mut chunk, &[3, 0, 3, 1], false);
        assert_eq!(
            seen,
            [[0, 4, 0, 0], [0, 9, 0, 0], [0, 3, 0, 0], [0, 7, 0, 0]]
        );
        assert_eq!((went, chunk.is_last()), (Ok(()), false));
        chunk.advance();
        // The one that was not consumed comes again.
        let (seen, went) = step(&mut chunk, &[6, 9, 0, 0], false);
        assert_eq!(
            seen,
            [[3, 5, 72, 0], [0, 9, 0, 0], [3, 0, 24, 0], [1, 6, 8, 0]]
        );
        let lie = went.expect_err("more than the chunk has");
        assert!(lie.contains("consumed 6 rows of input `x`, whose chunk had 5"));
        chunk.advance();
        let (seen, _) = step(&mut chunk, &[0, 0, 0, 6], false);
        assert_eq!(seen[0], [3, 7, 72, 0]);
        assert!(chunk.is_last());
        assert_eq!(chunk.written(0), 7);
    }

    #[test]
    fn no_rows_are_one_chunk() {
        let (x, y, none) = (port("x", false), port("y", false), spec(&[0]));
        let chunk = Chunk::new(
            NonZeroU64::new(4),
            [(&x, &none)].into_iter(),
            [(&y, &none)].into_iter(),
        );
        assert!(chunk.is_last());
    }

    #[test]
    fn lies_are_told_apart() {
        let (x, y) = (port("x", false), port("y", false));
        let scalar = spec(&[]);
        let (inputs, outputs) = ([(&x, &scalar)], [(&y, &scalar)]);
        let fresh = || Chunk::new(None, inputs.into_iter(), outputs.into_iter());
        let refused = |moved: [u64; 2], more| {
            let mut chunk = fresh();
            step(&mut chunk, &moved, more).1.expect_err("refused")
        };
        assert!(refused([2, 1], false).contains("consumed 2 rows of input `x`, whose chunk had 1"));
        assert!(refused([1, u64::MAX], true).contains("to output `y`, which had room for 1"));
        assert!(refused([0, 0], true).contains("neither consumed nor wrote"));
        let mut chunk = fresh();
        assert_eq!(step(&mut chunk, &[1, 1], true).1, Ok(()));
        assert!(step(&mut chunk, &[0, 0], true).1.is_err(), "no end to it");
    }
}
