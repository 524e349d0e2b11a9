//! A job that is cut along its rows: its slices run on several threads at a time, or one after the other where its tensors do
//! not all fit one guest.
//!
//! ```text
//! open, whole ──▶ memory for the results ──▶ cut into parts ──▶ slices, each a job of its own ──▶ joined, header and footer
//! ```
//! A slice is an ordinary invocation ([`invocation::slice`]) on some rows of the inputs, whose outputs are parts of the one
//! result: nothing is copied to put them together. It has the whole job's deadline and log, and limits of its own for each guest.
//! What a slice fails of ends those behind it and none before it: what is told is what fails first in the order of the rows,
//! whichever thread was faster.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use strait_memory::ResultPages;
use strait_tensor::{Column, TensorSpec};

use super::contract;
use super::cut::{Tensors, Wanted};
use super::error::{Broken, Cause, Limit, Stage};
use super::guest_memory::RESERVATION_BYTES;
use super::invocation::Opened;
use super::invocation::along::along;
use super::invocation::slice::{Slice, slice};
use super::job::{Filled, Input, Job, NOTES_MAX, Report, Seconds, Source, Supplies};
use super::results::Making;
use super::{CancelToken, Engine, threads};
use crate::plugin::{Combine, Port};

/// Bytes of cut tensors that are worth a slice, where nobody has said how many: below it a thread more saves less than a guest
/// more costs.
const WORTH_BYTES: u64 = 8 << 20;
/// Most bytes of one tensor that a wasm32 guest is told of: what it can count with a sign.
const TENSOR_BYTES_MAX: u64 = (1 << 31) - 1;
/// Most bytes of windows that move along.
const ROOM_BYTES_MAX: u64 = 1 << 30;
/// What a guest needs of its addresses beside tensors and its own memory.
const APART_BYTES: u64 = 64 << 20;

/// Runs `job`, in slices if it can be cut and that is worth it.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(super) fn invoke(engine: &Engine, job: &Job, supplies: &Supplies) -> Result<Filled, Broken> {
    let Some(inputs) = cut_inputs(job, supplies) else {
        return uncut(engine, job, supplies);
    };
    let sample = sample(job, &inputs);
    let opened = Opened::open_any(engine, sample.as_ref().unwrap_or(job), supplies)?;
    match cut(engine, job, inputs, &opened)? {
        Some((columns, rows)) => run(engine, job, supplies, (opened, columns), &rows),
        None if sample.is_none() => opened.fitting()?.whole(),
        // What is told of that is what is told of kernels that cannot be cut.
        None => Opened::open(engine, job, supplies)?.whole(),
    }
}

/// Runs `job`, which cannot be cut: whole, or with windows that move along its tensors, if they do not fit and it streams.
fn uncut(engine: &Engine, job: &Job, supplies: &Supplies) -> Result<Filled, Broken> {
    let mut unfit = None;
    if job.kernel.kernel().streaming {
        let lengths = job.inputs.iter().map(|input| input.place.length);
        let largest = lengths.max().unwrap_or(0);
        match Opened::open(engine, job, supplies) {
            Ok(opened) if largest <= TENSOR_BYTES_MAX => return opened.whole(),
            Err(broken) if largest <= TENSOR_BYTES_MAX && !is_of_windows(&broken.cause) => {
                return Err(broken);
            }
            other => unfit = Some(other),
        }
        let room = room_bytes(job).min(ROOM_BYTES_MAX);
        if let Some(filled) = along(engine, job, supplies, room)? {
            return Ok(filled);
        }
    }
    match unfit {
        Some(unfit) => unfit?.whole(),
        None => Opened::open(engine, job, supplies)?.whole(),
    }
}

/// Whether tensors do not fit one guest.
fn is_of_windows(cause: &Cause) -> bool {
    match cause {
        Cause::Limit { limit, .. } => matches!(limit, Limit::Window | Limit::Wasm32),
        _ => false,
    }
}

/// The outputs that `job` would have: port and spec at its largest.
///
/// # Errors
/// [`Broken`].
pub(super) fn specs(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
) -> Result<Vec<(String, TensorSpec)>, Broken> {
    let whole = || Opened::open(engine, job, supplies).map(Opened::into_outputs);
    let Some(inputs) = cut_inputs(job, supplies) else {
        return whole();
    };
    let sample = sample(job, &inputs);
    let opened = Opened::open_any(engine, sample.as_ref().unwrap_or(job), supplies)?;
    match cut(engine, job, inputs, &opened)? {
        Some((columns, _)) => Ok(columns
            .into_iter()
            .map(|column| (column.name, column.spec))
            .collect()),
        None if sample.is_none() => Ok(opened.fitting()?.into_outputs()),
        None => whole(),
    }
}

/// `job` on its first rows, where all of them are more than a guest can be told of.
fn sample(job: &Job, inputs: &Tensors) -> Option<Job> {
    /// Of its rows.
    const BYTES: u64 = 64 << 20;
    let row = (inputs.cut_bytes() / inputs.rows).max(1);
    let rows = (BYTES / row).clamp(1, inputs.rows);
    (!fit(job, inputs)).then(|| part_of(job, &(0..rows)))
}

/// Bytes of tensors that one guest has room for.
fn room_bytes(job: &Job) -> u64 {
    let own_bytes = job.limits.guest_bytes.saturating_add(APART_BYTES);
    let addresses = (RESERVATION_BYTES as u64).saturating_sub(own_bytes);
    job.limits.window_bytes.min(addresses)
}

/// Whether one guest can have all of `tensors`.
fn fit(job: &Job, tensors: &Tensors) -> bool {
    let bytes = tensors.bytes();
    bytes <= job.limits.window_bytes
        && bytes < RESERVATION_BYTES as u64
        && tensors.largest() <= TENSOR_BYTES_MAX
}

/// The outputs of `job`, of which all or a sample is `opened`, and the rows of each slice; none if it is not to be cut.
///
/// # Errors
/// The outputs are more than they may be.
fn cut(
    engine: &Engine,
    job: &Job,
    inputs: Tensors,
    opened: &Opened<'_>,
) -> Result<Option<Planned>, Broken> {
    let (all, shown) = (inputs.rows, opened.rows());
    let of_all = |column: &Column| {
        let mut spec = column.spec.clone();
        let first = spec
            .shape
            .first_mut()
            .filter(|rows| Some(**rows) == shown)?;
        *first = all;
        Column::new(column.name.clone(), spec).ok()
    };
    let columns = opened.columns().iter().map(of_all);
    let Some(columns) = columns.collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    let (asked, most) = (contract::reserve_bytes(&columns), job.limits.result_bytes);
    if asked > most {
        let limit = Limit::Result;
        return Err(Stage::Open.broke(Cause::Limit { limit, asked, most }));
    }
    Ok(rows(engine, job, inputs, &columns).map(|rows| (columns, rows)))
}

/// Outputs, and the rows of each slice.
type Planned = (Vec<Column>, Vec<Range<u64>>);

fn ports(job: &Job) -> impl Iterator<Item = (&Port, &Input)> {
    job.kernel.kernel().inputs.iter().zip(&job.inputs)
}

/// What of `job` is cut as far as its inputs go; none if it cannot be.
fn cut_inputs(job: &Job, supplies: &Supplies) -> Option<Tensors> {
    let kernel = job.kernel.kernel();
    if kernel.split_axis != Some(0) || !matches!(kernel.combine, Combine::Concatenate) {
        return None;
    }
    let mut tensors = Tensors {
        rows: 0,
        row_bytes: Vec::new(),
        whole_bytes: 0,
        multiple: 1,
    };
    let mut all = None;
    for ((port, input), source) in ports(job).zip(&supplies.inputs) {
        let place = &input.place;
        if port.whole {
            tensors.whole_bytes = tensors.whole_bytes.saturating_add(place.length);
            continue;
        }
        let rows = *place.spec.shape.first().filter(|rows| **rows > 0)?;
        // What lies in a frame is small.
        if source.is_inline() || *all.get_or_insert(rows) != rows {
            return None;
        }
        tensors.row_bytes.push(place.length / rows);
    }
    tensors.rows = all?;
    Some(tensors)
}

/// The rows of each slice of `job`, or none if it runs whole.
fn rows(
    engine: &Engine,
    job: &Job,
    mut tensors: Tensors,
    columns: &[Column],
) -> Option<Vec<Range<u64>>> {
    for column in columns {
        let bytes = column.reserve_bytes;
        if bytes == 0 || job.inline.is_some_and(|room| bytes <= room.each) {
            return None;
        }
        tensors.row_bytes.push(bytes / tensors.rows);
    }
    let by_size = || (tensors.cut_bytes() / WORTH_BYTES).min(engine.config.threads as u64);
    let asked = job.threads.map(|threads| threads.get().into());
    let wanted = Wanted {
        slices: asked.unwrap_or_else(by_size),
        guest_bytes: match fit(job, &tensors) {
            // Then nothing else is to be asked of a slice than of the whole.
            true => u64::MAX,
            false => room_bytes(job).min(TENSOR_BYTES_MAX),
        },
    };
    tensors.cut(wanted)
}

/// One of them, not begun.
struct Task {
    index: usize,
    rows: Range<u64>,
    parts: Vec<Making>,
}

/// What all of them are made from, when they begin: there may be thousands.
struct Common {
    job: Job,
    supplies: Supplies,
}

/// What all threads that run slices of one job share.
struct Shared {
    engine: Arc<Engine>,
    state: Mutex<State>,
    changed: Condvar,
    /// The first one that failed.
    failed: AtomicUsize,
    cancels: Vec<CancelToken>,
}

struct State {
    /// The last one is the next.
    tasks: Vec<Task>,
    /// Until all have ended: whoever helps holds no segment longer than its slice takes.
    common: Option<Arc<Common>>,
    /// Those that have been begun and have not ended.
    running: usize,
    ended: Vec<Ended>,
    /// CPU time of helpers.
    lent: Duration,
}

/// A slice that was run.
struct Ended {
    index: usize,
    outcome: Result<(Report, bool), Broken>,
}

impl Shared {
    /// Runs one slice after the other until none is left to begin.
    fn work(&self, as_helper: bool) {
        loop {
            let mut state = self.state.lock();
            let Some((task, common)) = state.tasks.pop().zip(state.common.clone()) else {
                return;
            };
            state.running += 1;
            drop(state);
            let before = threads::cpu_time();
            let index = task.index;
            // Those before it went well so far; nobody waits for those behind one that failed.
            let cancel = self.cancels[index].clone();
            let ran = (index < self.failed.load(Ordering::Acquire)).then(|| {
                catch_unwind(AssertUnwindSafe(|| task.run(&self.engine, &common, cancel)))
            });
            drop(common);
            let (outcome, used) = match ran {
                None => (None, None),
                Some(Ok(Ok(slice))) => {
                    let Slice {
                        report,
                        used,
                        is_full,
                    } = slice;
                    (Some(Ok((report, is_full))), Some(used))
                }
                Some(Ok(Err(broken))) => (Some(Err(broken)), None),
                Some(Err(_)) => {
                    let broken = Stage::Run.host("it panicked; this is a bug of strait");
                    (Some(Err(broken)), None)
                }
            };
            if let Some(Err(_)) = &outcome {
                self.fail(index);
            }
            let lent = threads::cpu_time().saturating_sub(before);
            let mut state = self.state.lock();
            state.running -= 1;
            state
                .ended
                .extend(outcome.map(|outcome| Ended { index, outcome }));
            if as_helper {
                state.lent += lent;
            }
            drop(state);
            self.changed.notify_all();
            if let Some(used) = used.filter(|_| as_helper) {
                // Whoever waits does not wait for this.
                self.engine.renew(used);
            }
        }
    }

    /// The slice `index` failed: those behind it end.
    fn fail(&self, index: usize) {
        self.failed.fetch_min(index, Ordering::AcqRel);
        for cancel in &self.cancels[index + 1..] {
            cancel.cancel();
        }
    }

    /// All slices have ended; what came of them, in order, and the CPU time that other threads have used for them.
    fn finish(&self) -> (Vec<Ended>, Duration) {
        let mut state = self.state.lock();
        while state.running > 0 || !state.tasks.is_empty() {
            self.changed.wait(&mut state);
        }
        state.common = None;
        let mut ended = std::mem::take(&mut state.ended);
        ended.sort_by_key(|ended| ended.index);
        (ended, state.lent)
    }
}

impl Task {
    fn run(self, engine: &Engine, of: &Common, cancel: CancelToken) -> Result<Slice, Broken> {
        engine.slices.fetch_add(1, Ordering::Relaxed);
        let job = part_of(&of.job, &self.rows);
        let supplies = shared(&of.supplies, cancel);
        slice(engine, &job, &supplies, self.parts)
    }
}

/// Runs `job`, which is opened and has outputs of these `columns`, in slices of `rows`.
fn run(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    (opened, columns): (Opened<'_>, Vec<Column>),
    rows: &[Range<u64>],
) -> Result<Filled, Broken> {
    let Some(whole) = engine.me.upgrade() else {
        return Err(Stage::Run.host("the engine is ending"));
    };
    let begin = Instant::now();
    let results = Making::all(columns, job.inline, &*supplies.results)?;
    let mut parts = Parts::cut(&results, rows)?;
    let cancels: Vec<_> = rows.iter().map(|_| supplies.cancel.part()).collect();
    let task = |(index, rows): (usize, &Range<u64>)| Task {
        index,
        rows: rows.clone(),
        parts: parts.take(index),
    };
    let mut tasks: Vec<_> = rows.iter().enumerate().map(task).collect();
    tasks.reverse();
    let helpers = engine.threads.count().min(rows.len() - 1);
    let shared = Arc::new(Shared {
        engine: whole,
        state: Mutex::new(State {
            tasks,
            common: Some(Arc::new(Common {
                job: job.clone(),
                supplies: shared(supplies, supplies.cancel.clone()),
            })),
            running: 0,
            ended: Vec::with_capacity(rows.len()),
            lent: Duration::ZERO,
        }),
        changed: Condvar::new(),
        failed: AtomicUsize::new(usize::MAX),
        cancels,
    });
    for _ in 0..helpers {
        // One that comes late finds nothing, and has held nothing meanwhile.
        let shared = Arc::downgrade(&shared);
        engine.threads.ask(move || {
            if let Some(shared) = shared.upgrade() {
                shared.work(true);
            }
        });
    }
    shared.work(false);
    let (ended, lent) = shared.finish();
    threads::lend(lent);
    let seconds = begin.elapsed().as_secs_f64();
    // All are home, whatever came of them.
    let joined = parts.join(&results);
    let mut reports = Vec::with_capacity(ended.len());
    for Ended { index, outcome } in ended {
        let (report, is_full) = outcome.map_err(|broken| broken.in_rows(rows[index].clone()))?;
        if !is_full {
            return Err(Stage::Extents
                .broken_contract("a slice has fewer rows than it announced, so that its rows would not follow each other; a kernel whose rows depend on the data must not have a split axis")
                .in_rows(rows[index].clone()));
        }
        reports.push(report);
    }
    joined?;
    let outputs = results.into_iter().map(Making::joined);
    let outputs = outputs.collect::<Result<_, _>>()?;
    Ok(opened.sliced(outputs, |report| tell(report, reports, seconds)))
}

/// The same supplies, for what `cancel` ends.
fn shared(supplies: &Supplies, cancel: CancelToken) -> Supplies {
    Supplies {
        inputs: Source::filled(&supplies.inputs, Vec::new()),
        results: Arc::clone(&supplies.results),
        deadline: supplies.deadline,
        cancel,
        logged: supplies.logged.clone(),
    }
}

/// `job` on some of its rows.
fn part_of(job: &Job, rows: &Range<u64>) -> Job {
    let mut part = job.clone();
    part.inline = None;
    let cut = part.kernel.clone();
    let ports = cut.kernel().inputs.iter();
    for (port, input) in ports.zip(&mut part.inputs) {
        let place = &mut input.place;
        let Some(all) = place.spec.shape.first_mut().filter(|_| !port.whole) else {
            continue;
        };
        let row_bytes = place.length / (*all).max(1);
        *all = rows.end - rows.start;
        place.offset += rows.start * row_bytes;
        place.length = *all * row_bytes;
    }
    part
}

/// The parts that results are cut into.
struct Parts {
    /// For each result, its parts.
    pages: Vec<Vec<ResultPages>>,
    /// For each slice, its parts, until it takes them.
    makings: Vec<Vec<Making>>,
}

impl Parts {
    fn cut(results: &[Making], rows: &[Range<u64>]) -> Result<Self, Broken> {
        let mut parts = Self {
            pages: Vec::with_capacity(results.len()),
            makings: rows.iter().map(|_| Vec::new()).collect(),
        };
        for making in results {
            let of_slices = match making.cut(rows) {
                Ok(of_slices) => of_slices,
                Err(broken) => {
                    // Those that were cut before it are whole again.
                    parts.join(results)?;
                    return Err(broken);
                }
            };
            let pages = of_slices.iter().filter_map(Making::pages);
            parts.pages.push(pages.cloned().collect());
            for (slice, part) in parts.makings.iter_mut().zip(of_slices) {
                slice.push(part);
            }
        }
        Ok(parts)
    }

    /// Those of the slice `index`.
    fn take(&mut self, index: usize) -> Vec<Making> {
        std::mem::take(&mut self.makings[index])
    }

    fn join(&mut self, results: &[Making]) -> Result<(), Broken> {
        let parts = std::mem::take(&mut self.pages);
        let joined = results.iter().zip(parts);
        // Each of them, also after one that was lost.
        let joined: Vec<_> = joined.map(|(making, parts)| making.join(parts)).collect();
        joined.into_iter().collect()
    }
}

/// Adds what slices, which took so many `seconds`, have reported.
fn tell(report: &mut Report, slices: Vec<Report>, seconds: f64) {
    report.slices = slices.len() as u64;
    let mut sum = Seconds::default();
    for slice in slices {
        report.copied_bytes += slice.copied_bytes;
        for note in slice.notes {
            if report.notes.len() < NOTES_MAX && !report.notes.contains(&note) {
                report.notes.push(note);
            }
        }
        // The same segments in all of them.
        if report.pages.is_empty() {
            report.pages = slice.pages;
        } else {
            for (pages, other) in report.pages.iter_mut().zip(slice.pages) {
                pages.inode = pages.inode.filter(|inode| Some(*inode) == other.inode);
            }
        }
        sum.add_parts(&slice.seconds);
    }
    // They ran beside each other: each part of the time is told as large as it was of the whole.
    let all: f64 = sum.parts().into_iter().sum();
    for (told, of) in report.seconds.parts_mut().into_iter().zip(sum.parts()) {
        *told += of / all.max(f64::MIN_POSITIVE) * seconds;
    }
}
