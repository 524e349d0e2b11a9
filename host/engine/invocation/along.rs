//! One instance whose windows move along tensors that do not all fit its memory: for kernels that stream.
//!
//! ```text
//! file of x  ├──────────────┤consumed├──── window ────┤ ─ ─ ─ ─ ─ ▶     home, and in again further on, between two calls of `run`
//! file of y  ├──────┤written├──── window ────┤ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ▶
//! ```
//! The guest is told of as many rows as there is room for, as in a stream of unknown length, and its chunk records say where
//! in the whole tensors it is. Nothing is copied but what is too small to be moved.

use std::ops::Range;
use std::sync::Arc;

use strait_memory::{
    FaultRange, GUEST_PAGE, GuestSpace, HUGE, InputSource, Lot, MemoryError, Parked, ResultPages,
    Window,
};
use strait_tensor::{Column, TensorPlace, TensorSpec};

use super::{Call, Opened};
use crate::engine::Engine;
use crate::engine::chunk::{MOVED_AT, RECORD_BYTES};
use crate::engine::contract::{self, DONE, FAILED, MORE};
use crate::engine::error::{Broken, Cause, Limit, Stage};
use crate::engine::job::{Filled, Job, Source, Supplies};
use crate::engine::placement::{Placement, Spot, Tensor};
use crate::engine::results::Making;
use crate::engine::tall::Tall;

const STAGE: Stage = Stage::Run;

/// Runs `job` with room for `room_bytes` of its tensors in the guest, or not at all if that is too little.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(in crate::engine) fn along(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    room_bytes: u64,
) -> Result<Option<Filled>, Broken> {
    let Some(tall) = Tall::of(job, supplies, room_bytes) else {
        return Ok(None);
    };
    // Twice, to see how the outputs depend on the rows: once for a few, then for as many as there is room for.
    let few = tall.job(job, tall.few);
    let opened = Opened::open_any(engine, &few, supplies)?;
    let Some(rows) = tall.rows(&opened.columns) else {
        return Ok(None);
    };
    let room = tall.job(job, rows);
    let few_columns = opened.columns;
    let mut call = Call {
        job: &room,
        ..opened.call
    };
    let room_columns = contract::open(&room, &mut call.instance)?;
    let Some(columns) = tall.columns(rows, &few_columns, &room_columns) else {
        return Ok(None);
    };
    let (asked, most) = (contract::reserve_bytes(&columns), job.limits.result_bytes);
    if asked > most {
        let limit = Limit::Result;
        return Err(Stage::Open.broke(Cause::Limit { limit, asked, most }));
    }
    let results = Making::all(columns, job.inline, &*supplies.results)?;
    let mut going = Going::bind(call, job, room_columns, &results)?;
    let steps = going.run()?;
    going.finish(results, steps).map(Some)
}

/// One tensor, and how far it has come.
struct Side {
    port: String,
    whole: bool,
    input: Option<Arc<dyn InputSource>>,
    output: Option<ResultPages>,
    /// What is written to no file.
    bytes: Vec<u8>,
    /// All of it in its file.
    place: TensorPlace,
    rows: u64,
    row_bytes: u64,
    /// Rows that there is room for.
    room: u64,
    spot: Spot,
    moved: u64,
    /// In this step: the file's byte at the spot, and rows from the next one on.
    start: u64,
    there: u64,
    /// One past the last byte of the file that the guest could write so far.
    end: u64,
    home: Option<Parked>,
}

impl Side {
    fn is_cut_input(&self) -> bool {
        self.input.is_some() && !self.whole
    }

    /// The file's byte at which the next row begins.
    fn next(&self) -> u64 {
        self.place.offset + self.moved * self.row_bytes
    }

    /// Looks at what comes next, through a window that begins at a multiple of `align` of its tensor.
    fn look(&mut self, align: u64) {
        let left = self.rows - self.moved;
        let Spot::Window { .. } = self.spot else {
            // It lies in the guest: an output from its first row on, an input as a whole.
            self.start = self.next();
            self.there = left.min(self.room);
            return;
        };
        if self.whole {
            (self.start, self.there) = (self.place.offset, self.rows);
            return;
        }
        let before = (self.next() - self.place.offset) / align * align;
        self.start = self.place.offset + before;
        let room = self.room * self.row_bytes - (self.next() - self.start);
        self.there = left.min(room / self.row_bytes.max(1));
    }

    fn record(&self) -> [u8; RECORD_BYTES] {
        let first = if self.whole { 0 } else { self.moved };
        let offset = match self.whole {
            true => 0,
            false => self.next() - self.start,
        };
        let mut record = [0; RECORD_BYTES];
        for (to, word) in record.chunks_exact_mut(8).zip([first, self.there, offset]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        record
    }

    /// Rows that the guest says it moved.
    fn said(&self, record: &[u8]) -> Result<u64, Broken> {
        let mut word = [0; 8];
        word.copy_from_slice(&record[MOVED_AT..MOVED_AT + 8]);
        let (moved, there, port) = (u64::from_le_bytes(word), self.there, &self.port);
        match (moved > there, self.input.is_some()) {
            (true, true) => Err(STAGE.broken_contract(format!(
                "it consumed {moved} rows of input `{port}`, whose chunk had {there}"
            ))),
            (true, false) => Err(STAGE.broken_contract(format!(
                "it wrote {moved} rows to output `{port}`, which had room for {there}"
            ))),
            (false, _) => Ok(if self.whole { 0 } else { moved }),
        }
    }
}

/// The tensors and those of their windows that are in. Whatever happens they go home before the instance ends.
struct Sides<'e> {
    all: Vec<Side>,
    windows: Vec<(usize, Window)>,
    lot: &'e Lot,
}

impl Sides<'_> {
    /// Brings in what is to be looked at.
    fn enter(&mut self, space: &Arc<GuestSpace>) -> Result<(), Broken> {
        let broke = |error: MemoryError| Stage::Place.broke(error);
        for (index, side) in self.all.iter_mut().enumerate() {
            let Spot::Window { at, bytes } = side.spot else {
                continue;
            };
            let file_end = (side.place.offset + side.place.length).next_multiple_of(GUEST_PAGE);
            let end = file_end.min(side.start + bytes as u64);
            if side.start >= end {
                continue;
            }
            let parked = match (side.home.take(), &side.input, &side.output) {
                (Some(parked), ..) => parked,
                (None, Some(source), _) => source
                    .park(side.place.offset..file_end)
                    .map_err(|e| Stage::Place.broke(e))?,
                (None, None, Some(pages)) => pages
                    .take_parked()
                    .ok_or_else(|| Stage::Place.host("a result's mapping is not at home"))?,
                (None, None, None) => continue,
            };
            let from = side.start - parked.file_offset();
            let part = from..from + (end - side.start);
            match parked.move_into(part, space, space.base() + at) {
                Ok(window) => self.windows.push((index, window)),
                Err(refused) => {
                    side.home = Some(refused.parked);
                    return Err(broke(refused.error.into()));
                }
            }
            if side.output.is_some() {
                side.end = side.end.max(end);
            }
        }
        Ok(())
    }

    fn read_only(&self) -> Vec<FaultRange> {
        let inputs = self.inputs();
        inputs.map(|(_, window)| window.fault_range()).collect()
    }

    /// The windows of inputs.
    fn inputs(&self) -> impl Iterator<Item = &(usize, Window)> {
        let is_input = |index: usize| self.all[index].input.is_some();
        self.windows
            .iter()
            .filter(move |(index, _)| is_input(*index))
    }

    fn go_home(&mut self) -> Result<(), String> {
        let mut problem = None;
        for (index, window) in self.windows.drain(..) {
            match window.move_home() {
                Ok(parked) => self.all[index].home = Some(parked),
                Err(poisoned) => problem = Some(poisoned.to_string()),
            }
        }
        problem.map_or(Ok(()), Err)
    }
}

impl Drop for Sides<'_> {
    fn drop(&mut self) {
        // As the windows of any other invocation.
        if let Err(problem) = self.go_home() {
            tracing::error!(problem, "a window could not be moved home");
        }
        for side in &mut self.all {
            match (side.home.take(), &side.output) {
                (Some(parked), Some(pages)) => pages.put_parked(parked),
                (Some(parked), None) => self.lot.give_back(parked),
                (None, _) => {}
            }
        }
    }
}

/// The guest knows the addresses. Fields drop in this order.
struct Going<'a> {
    sides: Sides<'a>,
    call: Call<'a>,
    records: Range<usize>,
    spots: Vec<Spot>,
    align: u64,
}

impl<'a> Going<'a> {
    /// Binds `call`, whose job has as many rows as there is room for, for `results` of all rows of `job`.
    fn bind(
        mut call: Call<'a>,
        job: &Job,
        room: Vec<Column>,
        results: &[Making],
    ) -> Result<Self, Broken> {
        let kernel = job.kernel.kernel();
        let needs = |place: &TensorPlace, bytes: u64, has_pages| Tensor {
            has_pages,
            linked: false,
            offset: place.offset,
            length: bytes,
        };
        let inputs = job.inputs.iter().zip(&call.job.inputs);
        let inputs = inputs.zip(&call.supplies.inputs);
        let outputs = results.iter().zip(&room);
        let placement = Placement::new(
            inputs.map(|((input, room), source)| {
                needs(&input.place, room.place.length, !source.is_inline())
            }),
            outputs.map(|(making, room)| {
                let has_pages = making.pages().is_some();
                needs(making.bound(), room.reserve_bytes, has_pages)
            }),
            call.engine.config.move_min_bytes,
        );
        let reserved = contract::reserve(&mut call.instance, placement.room_bytes())?;
        let spots = placement.within(&reserved).ok_or_else(|| {
            Stage::Reserve.host("the tensors do not fit the room computed for them")
        })?;
        let narrowest = call.job.inputs.iter().map(|input| input.place.length);
        let is_wide = narrowest.min().unwrap_or(0) >= 16 * HUGE;
        let announced = Making::announced(room);
        contract::bind(
            call.job,
            &mut call.instance,
            &announced,
            reserved.start,
            &spots,
        )?;
        let mut all = Vec::with_capacity(spots.len());
        for (index, ((input, room), source)) in job
            .inputs
            .iter()
            .zip(&call.job.inputs)
            .zip(&call.supplies.inputs)
            .enumerate()
        {
            let whole = kernel.inputs[index].whole;
            let side = side(
                &input.port,
                whole,
                &input.place,
                &room.place.spec,
                spots[index],
            );
            let input = match source {
                Source::Segment(source) => Some(Arc::clone(source)),
                Source::Inline(_) | Source::Linked => None,
            };
            all.push(Side { input, ..side });
        }
        for (index, (making, room)) in results.iter().zip(&announced).enumerate() {
            let spot = spots[job.inputs.len() + index];
            let side = side(
                &making.port,
                false,
                making.bound(),
                &room.bound().spec,
                spot,
            );
            let output = making.pages().cloned();
            all.push(Side { output, ..side });
        }
        let records = reserved.start..reserved.start + all.len() * RECORD_BYTES;
        let lot = &*call.engine.lot;
        let mut going = Self {
            sides: Sides {
                all,
                windows: Vec::new(),
                lot,
            },
            call,
            records,
            spots,
            align: if is_wide { HUGE } else { GUEST_PAGE },
        };
        going.call.report.seconds.reserve = going.call.lap();
        going.copy_in()?;
        Ok(going)
    }

    /// Inputs that come whole and are no windows.
    fn copy_in(&mut self) -> Result<(), Broken> {
        let call = &mut self.call;
        for (index, source) in call.supplies.inputs.iter().enumerate() {
            let (Spot::Copy { at, bytes }, side) = (self.spots[index], &self.sides.all[index])
            else {
                continue;
            };
            if side.is_cut_input() {
                continue;
            }
            call.copy_in(at..at + bytes, side.place.offset, source)?;
        }
        Ok(())
    }

    /// Calls `run` until all rows are done with; how often.
    fn run(&mut self) -> Result<u64, Broken> {
        for steps in 1.. {
            let align = self.align;
            self.sides.all.iter_mut().for_each(|side| side.look(align));
            let ends = |side: &Side| side.moved + side.there == side.rows;
            let mut cut = self.sides.all.iter().filter(|side| side.is_cut_input());
            let last = cut.all(ends);
            self.feed()?;
            let answer = self.step(u32::from(last))?;
            let moved = self.moved()?;
            if answer == DONE && last {
                return Ok(steps);
            }
            if moved == 0 {
                return Err(STAGE.broken_contract(match answer {
                    MORE => "it returned 2 (call again) and neither consumed nor wrote a row",
                    _ => "it consumes none of as many rows as fit one guest; the plugin must keep what it needs",
                }));
            }
        }
        Ok(0)
    }

    /// Copies rows of inputs in that come in parts and are no windows.
    fn feed(&mut self) -> Result<(), Broken> {
        let (regions, copied) = (self.call.instance.regions_mut(), &self.call.copied);
        let before = copied.get();
        for side in self.sides.all.iter().filter(|side| side.is_cut_input()) {
            if let (Spot::Copy { at, .. }, Some(source)) = (side.spot, &side.input) {
                // No more than there is room for, which is an address.
                let bytes = usize::try_from(side.there * side.row_bytes)
                    .map_err(|e| Stage::Place.host(e.to_string()))?;
                let fill = |into: &mut [u8]| source.read_at(side.next(), into, copied);
                regions
                    .with_mut(at..at + bytes, fill)
                    .map_err(|e| Stage::Place.broke(e))?
                    .map_err(|e| Stage::Place.broke(e))?;
            }
        }
        self.call.engine.copies.guest_in.add(copied.get() - before);
        Ok(())
    }

    /// One call of `run`, with windows that go home whatever comes of it.
    fn step(&mut self, mode: u32) -> Result<u32, Broken> {
        let Self {
            sides,
            call,
            records,
            spots,
            ..
        } = self;
        let written = |into: &mut [u8]| {
            for (to, side) in into.chunks_exact_mut(RECORD_BYTES).zip(&sides.all) {
                to.copy_from_slice(&side.record());
            }
        };
        let regions = call.instance.regions_mut();
        regions
            .with_mut(records.clone(), written)
            .map_err(|e| STAGE.broke(e))?;
        let space = Arc::clone(regions.memory().space());
        call.lap();
        sides.enter(&space)?;
        call.instance
            .regions_mut()
            .enter(spots, call.job.inputs.len());
        call.report.seconds.move_in += call.lap();
        let compiled = Arc::clone(&call.compiled);
        let ended = call
            .instance
            .watched(&compiled, sides.read_only(), |instance| {
                instance.call(STAGE, |guest, store| guest.call_run(store, mode))
            });
        call.report.seconds.run += call.lap();
        let faults = Arc::clone(call.instance.faults());
        let stored = faults.written().next();
        let stored = stored.and_then(|index| Some(sides.inputs().nth(index)?.0));
        let stored = stored.or_else(|| match &ended {
            Err(broken) if matches!(broken.cause, Cause::Trap { .. }) => {
                call.instance.regions().input_at(faults.trapped_at())
            }
            _ => None,
        });
        sides.go_home().map_err(|problem| STAGE.host(problem))?;
        call.instance.regions_mut().leave();
        call.report.seconds.move_out += call.lap();
        if let Some(input) = stored {
            return Err(STAGE.broke(Cause::InputWritten {
                port: call.job.inputs[input].port.clone(),
                backtrace: match ended {
                    Err(broken) => broken.into_backtrace(),
                    Ok(_) => None,
                },
                dirtied_bytes: faults.dirtied_bytes(),
            }));
        }
        match ended? {
            answer @ (DONE | MORE) => Ok(answer),
            FAILED => Err(STAGE.broke(call.instance.last_error()?)),
            other => Err(STAGE.broken_contract(format!(
                "it returned {other}; 0 is done, 1 an error, 2 more to do"
            ))),
        }
    }

    /// Takes what the guest says it moved, and what it wrote where no window is; how many rows.
    fn moved(&mut self) -> Result<u64, Broken> {
        let regions = self.call.instance.regions();
        let records = regions
            .with(self.records.clone(), <[u8]>::to_vec)
            .map_err(|e| STAGE.broke(e))?;
        let before = self.call.copied.get();
        let mut sum = 0_u64;
        for (side, record) in self
            .sides
            .all
            .iter_mut()
            .zip(records.chunks_exact(RECORD_BYTES))
        {
            let moved = side.said(record)?;
            if let (Spot::Copy { at, .. }, None, false) = (side.spot, &side.input, side.whole) {
                // No more than there is room for, which is an address.
                let bytes = usize::try_from(moved * side.row_bytes)
                    .map_err(|e| STAGE.host(e.to_string()))?;
                let (offset, pages, kept) = (side.next(), &side.output, &mut side.bytes);
                let copied = &self.call.copied;
                let take = |rows: &[u8]| match pages {
                    Some(pages) => pages.write_at(offset, rows, copied),
                    None => {
                        kept.extend_from_slice(rows);
                        copied.add(rows.len() as u64);
                        Ok(())
                    }
                };
                regions
                    .with(at..at + bytes, take)
                    .map_err(|e| STAGE.broke(e))?
                    .map_err(|e| STAGE.broke(e))?;
            }
            side.moved += moved;
            sum = sum.saturating_add(moved);
        }
        let copied = self.call.copied.get() - before;
        self.call.engine.copies.guest_out.add(copied);
        Ok(sum)
    }

    /// Makes files of the results.
    fn finish(self, results: Vec<Making>, steps: u64) -> Result<Filled, Broken> {
        let Self {
            mut sides,
            mut call,
            ..
        } = self;
        call.report.notes = contract::notes(&mut call.instance)?;
        call.report.slices = steps;
        let outputs: Vec<_> = sides.all.split_off(call.job.inputs.len());
        let mut filled = Vec::with_capacity(results.len());
        for (making, mut side) in results.into_iter().zip(outputs) {
            if let (Some(parked), Some(pages)) = (side.home.take(), &side.output) {
                pages.put_parked(parked);
            }
            let mut spec = side.place.spec.clone();
            if let Some(first) = spec.shape.first_mut() {
                *first = side.moved;
            }
            let written = side.end.max(side.place.offset) - side.place.offset;
            filled.push(making.streamed(spec, written, side.bytes)?);
        }
        drop(sides);
        let (report, used) = call.end();
        Ok(Filled {
            outputs: filled,
            report,
            used,
        })
    }
}

/// A tensor at `spot`, which has room for `room`.
fn side(port: &str, whole: bool, place: &TensorPlace, room: &TensorSpec, spot: Spot) -> Side {
    let rows = place.spec.shape.first().copied().unwrap_or(1);
    Side {
        port: port.to_owned(),
        whole,
        input: None,
        output: None,
        bytes: Vec::new(),
        rows,
        row_bytes: place.length / rows.max(1),
        room: room.shape.first().copied().unwrap_or(1),
        spot,
        moved: 0,
        start: place.offset,
        there: 0,
        end: 0,
        home: None,
        place: place.clone(),
    }
}
