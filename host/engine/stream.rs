//! One invocation whose tensors come and go in batches of rows, while its windows and its state stay.
//!
//! ```text
//! Batches::next ─▶ rows behind those that were not consumed │ run │ rows written ─▶ Batches::give
//! ```
//! The guest's room for an input holds as many rows as were prepared. A batch with more than there is room for, beside what
//! was not consumed, is fed in several steps; what is left moves to the front. The records say where the rows are in the whole
//! tensor ([`wit/kernel.wit`](../../wit/kernel.wit)), so that the result does not depend on any of that.

use std::ops::Range;
use std::time::Instant;

use strait_tensor::TensorSpec;

use super::CopyPlaces;
use super::chunk::{MOVED_AT, RECORD_BYTES};
use super::contract::{DONE, MORE};
use super::error::{Broken, Cause, Stage};
use super::instance::Instance;
use super::job::Brought;
use super::placement::Spot;
use crate::plugin::Port;

/// Rows of each input that comes in batches.
#[derive(Debug)]
pub struct Batch {
    /// In the order of the inputs; sizes beyond axis 0 are those that were prepared.
    pub brought: Vec<Brought>,
    /// No rows come after these.
    pub last: bool,
    /// When they must be done with.
    pub deadline: Instant,
}

/// Where batches come from, and where what a kernel makes of them goes.
pub trait Batches {
    /// Waits for the next one.
    ///
    /// # Errors
    /// Why none comes: the invocation ends with that.
    fn next(&mut self) -> Result<Batch, Cause>;

    /// The guest has taken so many bytes of memory in all since its first batch, and keeps them while it waits for the next one.
    ///
    /// # Errors
    /// It may not: the invocation ends with that.
    fn keeps(&mut self, bytes: u64) -> Result<(), Cause>;

    /// Takes rows of each output. `done`: all that comes of the last batch was given with these. When that must be done with,
    /// which may have changed.
    ///
    /// # Errors
    /// Nobody takes them: the invocation ends with that.
    fn give(&mut self, outputs: Vec<(TensorSpec, Vec<u8>)>, done: bool) -> Result<Instant, Cause>;
}

/// One tensor of a stream.
struct Side<'a> {
    port: &'a str,
    spec: &'a TensorSpec,
    /// It is there as a whole with each step.
    whole: bool,
    /// Guest address of its room.
    at: usize,
    /// Rows that there is room for.
    most: u64,
    row_bytes: usize,
    /// In the whole tensor: the first row that is in the room. Beyond 2^64, which only rows without bytes can get to, from 0 on.
    first: u64,
    /// Rows in the room: of an input to be consumed, of an output written.
    rows: u64,
}

impl<'a> Side<'a> {
    fn new(port: &'a Port, spec: &'a TensorSpec, spot: Spot) -> Self {
        let most = spec.shape.first().copied().unwrap_or(1);
        let rest = spec.shape.get(1..).unwrap_or_default();
        let row_bytes = rest
            .iter()
            .fold(spec.dtype.size(), |bytes, size| bytes.saturating_mul(*size));
        Self {
            port: &port.name,
            spec,
            whole: port.whole,
            at: spot.address(),
            most,
            // Of a tensor that was placed.
            row_bytes: usize::try_from(row_bytes).unwrap_or(usize::MAX),
            first: 0,
            rows: 0,
        }
    }

    fn bytes(&self, rows: u64) -> usize {
        // No more than there is room for, which is an address.
        usize::try_from(rows).map_or(usize::MAX, |rows| rows.saturating_mul(self.row_bytes))
    }

    /// Guest addresses of so many rows from the `from`th in the room on.
    fn range(&self, from: u64, rows: u64) -> Range<usize> {
        let start = self.at + self.bytes(from);
        start..start + self.bytes(rows)
    }

    fn has_room(&self) -> bool {
        self.rows < self.most
    }
}

/// The tensors of one stream, and how far each has come.
pub(super) struct Stream<'a> {
    inputs: Vec<Side<'a>>,
    outputs: Vec<Side<'a>>,
    /// Guest addresses of the chunk records, which lie one after the other.
    records: Range<usize>,
    /// Bytes that the guest has taken and that `Batches` know of.
    taken: usize,
}

const STAGE: Stage = Stage::Run;

impl<'a> Stream<'a> {
    /// Of ports with specs, each at its spot.
    pub(super) fn new(
        inputs: impl Iterator<Item = (&'a Port, &'a TensorSpec)>,
        outputs: impl Iterator<Item = (&'a Port, &'a TensorSpec)>,
        spots: &[Spot],
        records: Range<usize>,
    ) -> Self {
        let mut spots = spots.iter();
        let mut sides = |ports: &mut dyn Iterator<Item = (&'a Port, &'a TensorSpec)>| {
            let spots = &mut spots;
            let sides = ports.zip(spots);
            sides
                .map(|((port, spec), spot)| Side::new(port, spec, *spot))
                .collect()
        };
        Self {
            inputs: sides(&mut { inputs }),
            outputs: sides(&mut { outputs }),
            records,
            taken: 0,
        }
    }

    /// Calls `run` with batch after batch, `first` and what follows; its last answer. It ends early after a store into an input.
    pub(super) fn run(
        &mut self,
        instance: &mut Instance,
        first: Batch,
        batches: &mut dyn Batches,
        copies: &CopyPlaces,
    ) -> Result<u32, Broken> {
        let had = instance.regions().memory().size();
        let mut batch = first;
        loop {
            instance.extend(batch.deadline);
            let answer = self.batch(instance, &batch, (batches, had), copies)?;
            if answer != DONE || batch.last || instance.faults().any_written() {
                return Ok(answer);
            }
            drop(batch);
            batch = batches.next().map_err(|cause| STAGE.broke(cause))?;
        }
    }

    fn batch(
        &mut self,
        instance: &mut Instance,
        batch: &Batch,
        (batches, had): (&mut dyn Batches, usize),
        copies: &CopyPlaces,
    ) -> Result<u32, Broken> {
        let mut fed = vec![0; batch.brought.len()];
        loop {
            let all_fed = self.feed(instance, &batch.brought, &mut fed, copies)?;
            let mode = u32::from(batch.last && all_fed);
            let records = self.records.clone();
            instance
                .regions_mut()
                .with_mut(records.clone(), |records| self.write(records))
                .map_err(|e| STAGE.broke(e))?;
            let answer = instance.call(STAGE, |guest, store| guest.call_run(store, mode))?;
            if (answer != DONE && answer != MORE) || instance.faults().any_written() {
                return Ok(answer);
            }
            let taken = instance.regions().memory().size() - had;
            let waits = answer == MORE || mode == 0;
            if waits && taken != self.taken {
                let kept = batches.keeps(taken as u64);
                kept.map_err(|cause| STAGE.broke(cause))?;
                self.taken = taken;
            }
            let moved = instance
                .regions()
                .with(records, |records| self.step(records))
                .map_err(|e| STAGE.broke(e))?
                .map_err(|lie| STAGE.broken_contract(lie))?;
            self.shift(instance, &moved)?;
            let (moved_any, written) = (
                moved.iter().any(|rows| *rows > 0),
                self.outputs.iter().any(|output| output.rows > 0),
            );
            if answer == DONE && all_fed {
                self.give(instance, batches, copies, true)?;
                return Ok(answer);
            }
            if !moved_any && !written {
                let how = match answer == MORE {
                    true => "it returned 2 (call again) and neither consumed nor wrote a row",
                    false => {
                        "it consumes none of as many rows as were prepared; prepare more rows, or the plugin must keep what it needs"
                    }
                };
                return Err(STAGE.broken_contract(how));
            }
            // For more, and where nothing went on, all of the room.
            let is_full = self.outputs.iter().any(|output| !output.has_room());
            if written && (is_full || !moved_any || answer == MORE) {
                self.give(instance, batches, copies, false)?;
            }
        }
    }

    /// Brings rows in as far as there is room; whether those were all.
    fn feed(
        &mut self,
        instance: &mut Instance,
        brought: &[Brought],
        fed: &mut [u64],
        copies: &CopyPlaces,
    ) -> Result<bool, Broken> {
        let mut all = true;
        let cut = self.inputs.iter_mut().filter(|side| !side.whole);
        for ((side, brought), fed) in cut.zip(brought).zip(fed) {
            let there = brought.shape.first().copied().unwrap_or(0);
            let rows = (there - *fed).min(side.most - side.rows);
            let from = side.bytes(*fed);
            let bytes = &brought.elements[from..from + side.bytes(rows)];
            let range = side.range(side.rows, rows);
            instance
                .regions_mut()
                .with_mut(range, |into| into.copy_from_slice(bytes))
                .map_err(|e| STAGE.broke(e))?;
            copies.guest_in.add(bytes.len() as u64);
            *fed += rows;
            side.rows += rows;
            all &= *fed == there;
        }
        Ok(all)
    }

    fn write(&self, records: &mut [u8]) {
        let inputs = self.inputs.iter().map(|side| match side.whole {
            true => [0, side.most, 0],
            false => [side.first, side.rows, 0],
        });
        let outputs = self.outputs.iter().map(|side| {
            let offset = side.bytes(side.rows) as u64;
            let first = side.first.wrapping_add(side.rows);
            [first, side.most - side.rows, offset]
        });
        for (record, words) in records
            .chunks_exact_mut(RECORD_BYTES)
            .zip(inputs.chain(outputs))
        {
            record.fill(0);
            for (to, word) in record.chunks_exact_mut(8).zip(words) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Rows that the guest says it moved, inputs first, each within what there was.
    fn step(&self, records: &[u8]) -> Result<Vec<u64>, String> {
        let sides = self.inputs.iter().map(|side| (side, true));
        let sides = sides.chain(self.outputs.iter().map(|side| (side, false)));
        let moved = records.chunks_exact(RECORD_BYTES).zip(sides);
        let moved = moved.map(|(record, (side, is_input))| {
            let mut word = [0; 8];
            word.copy_from_slice(&record[MOVED_AT..MOVED_AT + 8]);
            let (moved, port) = (u64::from_le_bytes(word), side.port);
            match is_input {
                true if side.whole => Ok(0),
                true if moved > side.rows => Err(format!(
                    "it consumed {moved} rows of input `{port}`, whose chunk had {}",
                    side.rows
                )),
                false if moved > side.most - side.rows => Err(format!(
                    "it wrote {moved} rows to output `{port}`, which had room for {}",
                    side.most - side.rows
                )),
                true | false => Ok(moved),
            }
        });
        moved.collect()
    }

    /// What was not consumed moves to the front.
    fn shift(&mut self, instance: &mut Instance, moved: &[u64]) -> Result<(), Broken> {
        let (of_inputs, of_outputs) = moved.split_at(self.inputs.len());
        for (side, moved) in self.inputs.iter_mut().zip(of_inputs) {
            if *moved == 0 {
                continue;
            }
            let (gone, all) = (side.bytes(*moved), side.range(0, side.rows));
            instance
                .regions_mut()
                .with_mut(all, |rows| rows.copy_within(gone.., 0))
                .map_err(|e| STAGE.broke(e))?;
            side.first = side.first.wrapping_add(*moved);
            side.rows -= moved;
        }
        for (side, moved) in self.outputs.iter_mut().zip(of_outputs) {
            side.rows += moved;
        }
        Ok(())
    }

    /// Hands over what was written.
    fn give(
        &mut self,
        instance: &Instance,
        batches: &mut dyn Batches,
        copies: &CopyPlaces,
        done: bool,
    ) -> Result<(), Broken> {
        let mut outputs = Vec::with_capacity(self.outputs.len());
        for side in &mut self.outputs {
            let bytes = instance
                .regions()
                .with(side.range(0, side.rows), <[u8]>::to_vec)
                .map_err(|e| STAGE.broke(e))?;
            copies.guest_out.add(bytes.len() as u64);
            let mut spec = side.spec.clone();
            if let Some(first) = spec.shape.first_mut() {
                *first = side.rows;
            }
            outputs.push((spec, bytes));
            side.first = side.first.wrapping_add(side.rows);
            side.rows = 0;
        }
        let given = batches.give(outputs, done);
        instance.extend(given.map_err(|cause| STAGE.broke(cause))?);
        Ok(())
    }
}
