//! Several kernels at once on one thread, rows going from one to the next through memory that stays in the cache.
//!
//! ```text
//! input ──▶ kernel ──▶ link (≈256 KiB) ──▶ kernel ──▶ link ──▶ kernel ──▶ result
//! ```
//! Each kernel is told of tensors as large as if it ran alone. Of one that is linked, pages are only where the records say that a chunk
//! lies, at the front of its place, and they are the same for who writes and who reads: nothing of it is copied, moved or written to
//! memory as a whole. The result is that of the kernels one after the other, bit for bit, since all of them stream.

use std::sync::Arc;
use std::time::Instant;

use strait_memory::{FaultRange, GUEST_PAGE, LinkPages, MemoryError, Parked, Window};

use super::Engine;
use super::contract::{DONE, MORE};
use super::error::{Broken, Cause, Stage};
use super::flow::{Flow, Next, Shift};
use super::invocation::{Bound, Opened, Running};
use super::job::{Chain, ChainFilled, Link, Supplies};
use super::placement::Spot;
use super::results::Making;

/// What failed, and which stage.
type At = (usize, Broken);

const STAGE: Stage = Stage::Run;

/// Runs `chain` to finished results. Its supplies are those of all stages, one after the other.
///
/// # Errors
/// [`Broken`], of one stage; nothing is left of any then.
pub(super) fn run(engine: &Engine, chain: &Chain, supplies: Supplies) -> Result<ChainFilled, At> {
    check(chain).map_err(|how| (0, Stage::Open.host(how)))?;
    let supplies = apart(chain, supplies);
    let bound = bind(engine, chain, &supplies)?;
    let mut running = Vec::with_capacity(bound.len());
    for (at, bound) in bound.into_iter().enumerate() {
        running.push(bound.enter().map_err(|broken| (at, broken))?);
    }
    let mut linked = Linked::new(chain, &running)?;
    let mut flow = flow(chain, &running);
    watch(&mut running, &linked);
    let ended = steps(&mut running, &mut flow, &mut linked);
    for stage in &mut running {
        stage.call.instance.unwatch();
    }
    finish(running, linked, &flow, ended)
}

/// Whether it is one at all, which is for whoever makes it to see to.
fn check(chain: &Chain) -> Result<(), String> {
    let port = |(stage, index): (usize, usize), output: bool| {
        let kernel = chain.stages.get(stage)?.kernel.kernel();
        let ports = if output {
            &kernel.outputs
        } else {
            &kernel.inputs
        };
        ports.get(index)
    };
    if let Some(whole) = chain
        .stages
        .iter()
        .find(|job| !job.kernel.kernel().streaming)
    {
        let kernel = &whole.kernel.kernel().name;
        return Err(format!("kernel `{kernel}` of a chain does not stream"));
    }
    for (index, link) in chain.links.iter().enumerate() {
        let goes_on = |to: &(usize, usize)| to.0 > link.from.0;
        let takes = |to: &(usize, usize)| port(*to, false).is_some_and(|port| !port.whole);
        let fits = link.bytes.is_multiple_of(GUEST_PAGE) && link.bytes <= LinkPages::BYTES_MAX;
        let twice = chain.links[..index]
            .iter()
            .any(|other| other.from == link.from || other.to.iter().any(|to| link.to.contains(to)));
        if port(link.from, true).is_none()
            || !link.to.iter().all(|to| goes_on(to) && takes(to))
            || !fits
            || link.bytes == 0
            || twice
        {
            return Err(format!("a chain cannot have the link {link:?}"));
        }
    }
    Ok(())
}

/// Each stage's own supplies.
fn apart(chain: &Chain, supplies: Supplies) -> Vec<Supplies> {
    let mut inputs = supplies.inputs.into_iter();
    let stages = chain.stages.iter();
    stages
        .map(|job| Supplies {
            inputs: inputs.by_ref().take(job.inputs.len()).collect(),
            results: Arc::clone(&supplies.results),
            deadline: supplies.deadline,
            cancel: supplies.cancel.clone(),
            logged: supplies.logged.clone(),
        })
        .collect()
}

/// All stages opened, memory taken for all results at once, and everything bound.
fn bind<'a>(
    engine: &'a Engine,
    chain: &'a Chain,
    supplies: &'a [Supplies],
) -> Result<Vec<Bound<'a>>, At> {
    let mut opened = Vec::with_capacity(chain.stages.len());
    for (at, (job, supplies)) in chain.stages.iter().zip(supplies).enumerate() {
        opened.push(Opened::open(engine, job, supplies).map_err(|broken| (at, broken))?);
    }
    for link in &chain.links {
        let (stage, output) = link.from;
        let gives = &opened[stage].columns[output].spec;
        let differs = |to: &(usize, usize)| chain.stages[to.0].inputs[to.1].place.spec != *gives;
        if link.to.iter().any(differs) {
            let changed =
                "`open` announces another output than before for the same inputs and parameters";
            return Err((stage, Stage::Open.broken_contract(changed)));
        }
    }
    let is_linked = |stage, output| chain.links.iter().any(|link| link.from == (stage, output));
    let mut leaving = Vec::new();
    for (stage, opened) in opened.iter().enumerate() {
        let columns = opened.columns.iter().enumerate();
        leaving.extend(
            columns
                .filter(|(output, _)| !is_linked(stage, *output))
                .map(|(_, column)| column.clone()),
        );
    }
    let last = chain.stages.len().saturating_sub(1);
    let inline = chain.stages.last().and_then(|job| job.inline);
    let results = match supplies.first() {
        Some(supplies) => Making::all(leaving, inline, &*supplies.results),
        None => Ok(Vec::new()),
    };
    let mut results = results.map_err(|broken| (last, broken))?.into_iter();
    let mut bound = Vec::with_capacity(opened.len());
    for (stage, mut opened) in opened.into_iter().enumerate() {
        let columns = std::mem::take(&mut opened.columns).into_iter().enumerate();
        let making = columns.filter_map(|(output, column)| match is_linked(stage, output) {
            true => Some(Making::linked(column)),
            false => results.next(),
        });
        let making = making.collect();
        let one = opened.bind_with(making);
        bound.push(one.map_err(|broken| (stage, broken))?);
    }
    Ok(bound)
}

/// The links' memory in the guests. Dropping it takes it out of them, which must be before they end.
struct Linked {
    /// Each with the stage that writes it.
    links: Vec<(usize, LinkPages)>,
    windows: Vec<LinkWindow>,
}

struct LinkWindow {
    stage: usize,
    /// The input that reads it; none: it is written.
    input: Option<usize>,
    window: Window,
}

impl Linked {
    fn new(chain: &Chain, running: &[Running<'_>]) -> Result<Self, At> {
        let mut linked = Self {
            links: Vec::with_capacity(chain.links.len()),
            windows: Vec::new(),
        };
        for link in &chain.links {
            linked.lay(link, running)?;
        }
        Ok(linked)
    }

    fn lay(&mut self, link: &Link, running: &[Running<'_>]) -> Result<(), At> {
        let broke = |at, error: MemoryError| (at, Stage::Place.broke(error));
        let (stage, output) = link.from;
        let pages = LinkPages::create(link.bytes).map_err(|error| broke(stage, error))?;
        let parked = pages.writer().map_err(|error| broke(stage, error))?;
        let spot = running[stage].call.job.inputs.len() + output;
        self.enter(running, (stage, spot), None, parked)?;
        for (stage, input) in &link.to {
            let parked = pages.reader().map_err(|error| broke(*stage, error))?;
            self.enter(running, (*stage, *input), Some(*input), parked)?;
        }
        self.links.push((stage, pages));
        Ok(())
    }

    fn enter(
        &mut self,
        running: &[Running<'_>],
        (stage, spot): (usize, usize),
        input: Option<usize>,
        parked: Parked,
    ) -> Result<(), At> {
        let of = &running[stage];
        let (at, room) = match of.placed.spots[spot] {
            Spot::Window { at, bytes } => (at, bytes as u64),
            // More inputs than the fault handler can watch.
            Spot::Copy { .. } => return Err((stage, Stage::Place.broke(Cause::Stalled))),
        };
        let whole = 0..parked.bytes();
        if room < whole.end {
            return Err((stage, Stage::Place.host("a link is larger than its tensor")));
        }
        let space = of.call.instance.regions().memory().space();
        let window = parked
            .move_into(whole, space, space.base() + at)
            .map_err(|refused| (stage, Stage::Place.broke(MemoryError::from(refused.error))))?;
        self.windows.push(LinkWindow {
            stage,
            input,
            window,
        });
        Ok(())
    }

    /// Makes room at the end of a link.
    fn shift(
        &mut self,
        shift: Shift,
        running: &[Running<'_>],
    ) -> Result<(), (usize, Result<u32, Broken>)> {
        let Shift { link, from, bytes } = shift;
        // Within a link, which is small.
        let [from, length] =
            [from, bytes].map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let (stage, pages) = &mut self.links[link];
        let (stage, moved) = (*stage, pages.bring_forward(from, length));
        moved.map_err(|error| (stage, Err(STAGE.broke(error))))?;
        running[stage].call.copied.add(bytes);
        Ok(())
    }

    /// The windows through which a stage reads.
    fn reads(&self, stage: usize) -> impl Iterator<Item = (usize, FaultRange)> + '_ {
        let windows = self.windows.iter().filter(move |w| w.stage == stage);
        windows.filter_map(|w| Some((w.input?, w.window.fault_range())))
    }
}

/// How far the chain is at its beginning.
fn flow(chain: &Chain, running: &[Running<'_>]) -> Flow {
    let mut flow = Flow::new();
    for link in &chain.links {
        flow.link(link.bytes);
    }
    let tied = |holds: &dyn Fn(&Link) -> bool| chain.links.iter().position(holds);
    for (stage, (job, running)) in chain.stages.iter().zip(running).enumerate() {
        let kernel = job.kernel.kernel();
        let inputs = kernel.inputs.iter().zip(&job.inputs).enumerate();
        let inputs = inputs.map(|(index, (port, input))| {
            let link = tied(&|link| link.to.contains(&(stage, index)));
            (port, &input.place.spec, link)
        });
        let outputs = kernel.outputs.iter().zip(running.windows.results());
        let outputs = outputs.enumerate().map(|(index, (port, making))| {
            let link = tied(&|link| link.from == (stage, index));
            (port, &making.bound().spec, link)
        });
        flow.stage(inputs, outputs);
    }
    flow
}

/// Has an eye kept on all inputs, and notes what lies where.
fn watch(running: &mut [Running<'_>], linked: &Linked) {
    for (at, stage) in running.iter_mut().enumerate() {
        if stage.call.job.verify {
            stage.call.report.pages = stage.pages();
        }
        let mut read_only = stage.windows.read_only();
        read_only.extend(linked.reads(at).map(|(_, range)| range));
        let compiled = Arc::clone(&stage.call.compiled);
        stage.call.instance.watch(&compiled, read_only);
    }
}

/// Calls one stage's `run` after another's until all is done, or one of them ends it: which, and how.
fn steps(
    running: &mut [Running<'_>],
    flow: &mut Flow,
    linked: &mut Linked,
) -> Result<(), (usize, Result<u32, Broken>)> {
    loop {
        let at = match flow.next() {
            Next::Over => return Ok(()),
            Next::Stalled(at) => return Err((at, Err(STAGE.broke(Cause::Stalled)))),
            Next::Shift(shift) => {
                linked.shift(shift, running)?;
                continue;
            }
            Next::Run(at) => at,
        };
        let stage = &mut running[at];
        let begin = Instant::now();
        let answer = step(stage, flow, at);
        stage.call.report.seconds.run += begin.elapsed().as_secs_f64();
        match answer {
            Ok(DONE | MORE) if !stage.call.instance.faults().any_written() => {}
            ended => return Err((at, ended)),
        }
    }
}

/// One call of `run`; its answer.
fn step(stage: &mut Running<'_>, flow: &mut Flow, at: usize) -> Result<u32, Broken> {
    let (instance, records) = (&mut stage.call.instance, stage.placed.records.clone());
    instance
        .regions_mut()
        .with_mut(records.clone(), |records| flow.write(at, records))
        .map_err(|e| STAGE.broke(e))?;
    let mode = u32::from(flow.is_last(at));
    let answer = instance.call(STAGE, |guest, store| guest.call_run(store, mode))?;
    if matches!(answer, DONE | MORE) {
        instance
            .regions()
            .with(records, |records| flow.step(at, records, answer))
            .map_err(|e| STAGE.broke(e))?
            .map_err(|lie| STAGE.broken_contract(lie))?;
    }
    Ok(answer)
}

/// Takes everything home, and makes files of the results: all of them, or none.
fn finish(
    mut running: Vec<Running<'_>>,
    linked: Linked,
    flow: &Flow,
    ended: Result<(), (usize, Result<u32, Broken>)>,
) -> Result<ChainFilled, At> {
    let failed = ended.err().map(|(at, ended)| {
        let reads: Vec<_> = linked.reads(at).map(|(input, _)| input).collect();
        let written = running[at].written(&ended, &reads);
        (at, ended, written)
    });
    drop(linked);
    if let Some((at, ended, written)) = failed {
        let told = match running.swap_remove(at).home(ended, written) {
            Err(broken) => broken,
            Ok(_) => STAGE.host("a kernel of a chain ended it and did not fail"),
        };
        return Err((at, told));
    }
    let mut filled = ChainFilled {
        outputs: Vec::new(),
        reports: Vec::with_capacity(running.len()),
        used: Vec::with_capacity(running.len()),
    };
    for (at, mut stage) in running.into_iter().enumerate() {
        stage.call.lap = Instant::now();
        let one = stage
            .home(Ok(DONE), None)
            .and_then(|finished| finished.publish_with(|output| flow.written(at, output)));
        let mut one = one.map_err(|broken| (at, broken))?;
        filled.outputs.append(&mut one.outputs);
        // Of the process, and so of all stages: told once.
        if at > 0 {
            one.report.minor_faults = 0;
        }
        one.report.seconds.total = one.report.seconds.parts().iter().sum();
        filled.reports.push(one.report);
        filled.used.push(one.used);
    }
    Ok(filled)
}
