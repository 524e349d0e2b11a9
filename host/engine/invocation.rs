//! One invocation as states that consume each other.
//!
//! ```text
//! Opened ──bind──▶ Bound ──enter──▶ Running ──run──▶ Finished ──publish──▶ Filled
//!    │ open          │ reserve, bind    │ windows in     │ windows home      all outputs
//!    ▼               ▼                  ▼                ▼
//!  dropped: the failure path. Windows go home, mappings back to where they are parked, results to the pool.
//! ```
//! Nothing is left of an invocation that fails at any of them: its results have no name and no holder before
//! [`Filled`], which has all of them. Slices of one go the same way: [`slice`].

pub(super) mod along;
mod call;
pub(super) mod slice;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use strait_tensor::{Column, TensorPlace, TensorSpec};

use super::Engine;
use super::chunk::Chunk;
use super::contract::{self, windows_fit};
use super::error::{Broken, Cause, Stage};
use super::instance::{Instance, Made};
use super::job::{Filled, Job, Source, Supplies, WindowPages};
use super::placement::{self, Placement, Spot};
use super::plan::Plan;
use super::results::Making;
use super::stream::{Batch, Batches, Stream};
use super::windows::Windows;
use call::{Call, minor_faults};

/// Takes `job` as far as it goes without the elements of its inputs and pages for its results.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(super) fn wait(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
) -> Result<(Plan, Made), Broken> {
    let bound = Opened::open(engine, job, supplies)?.bind()?;
    Ok(bound.wait())
}

/// Runs what has waited to its end.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(super) fn go_on(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    (plan, made): (&Plan, Made),
) -> Result<Filled, Broken> {
    Bound::resume(engine, job, supplies, (plan, made))?
        .enter()?
        .run()?
        .publish()
}

/// Runs `job`, which is another one than was told to the guest that waits, to its end in that.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(super) fn start_over(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    (plan, made): (&Plan, Made),
) -> Result<Filled, Broken> {
    let compiled = Arc::clone(&plan.compiled);
    let call = Call::begin(engine, job, supplies, compiled, Some(made), None)?;
    Opened::again(call)?
        .fitting()?
        .bind_in(Some(&plan.room))?
        .enter()?
        .run()?
        .publish()
}

/// Runs what has waited with batch after batch, from `first` to its end; what the kernel had to say, and its guest.
///
/// # Errors
/// [`Broken`]; what was given before stays given.
pub(super) fn stream(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    (plan, made): (&Plan, Made),
    first: Batch,
    batches: &mut dyn Batches,
) -> Result<(Vec<(String, String)>, Made), Broken> {
    Bound::resume(engine, job, supplies, (plan, made))?
        .enter_with(false)?
        .stream(first, batches)?
        .told()
}

/// The guest knows what it is to do, and has said what comes out.
pub(super) struct Opened<'a> {
    call: Call<'a>,
    /// The outputs.
    pub(super) columns: Vec<Column>,
}

impl<'a> Opened<'a> {
    /// A fresh instance that has answered `open`, its answer within the declaration and the limits.
    pub(super) fn open(
        engine: &'a Engine,
        job: &'a Job,
        supplies: &'a Supplies,
    ) -> Result<Self, Broken> {
        windows_fit(job, inputs_bytes(job))?;
        Self::open_any(engine, job, supplies)?.fitting()
    }

    /// The same, whether or not its tensors fit one guest.
    pub(super) fn open_any(
        engine: &'a Engine,
        job: &'a Job,
        supplies: &'a Supplies,
    ) -> Result<Self, Broken> {
        let faults_before = Some(minor_faults());
        let compiled = engine
            .compiled(&job.kernel.plugin)
            .map_err(|e| Stage::Instantiate.broke(Cause::Load(Box::new(e))))?;
        let made = engine
            .spares
            .take(&job.kernel.plugin.hash, job.limits.guest_bytes);
        let call = Call::begin(engine, job, supplies, compiled, made, faults_before)?;
        Self::again(call)
    }

    /// Its answer to `open`, whatever it was told before.
    fn again(mut call: Call<'a>) -> Result<Self, Broken> {
        let job = call.job;
        let columns = contract::open(job, &mut call.instance)?;
        Ok(Self { call, columns })
    }

    /// The same, if its tensors fit one guest.
    pub(super) fn fitting(self) -> Result<Self, Broken> {
        let (job, outputs) = (self.call.job, contract::reserve_bytes(&self.columns));
        windows_fit(job, inputs_bytes(job).saturating_add(outputs))?;
        Ok(self)
    }

    /// The outputs that there would be: port and spec at its largest.
    pub(super) fn into_outputs(self) -> Vec<(String, TensorSpec)> {
        self.columns
            .into_iter()
            .map(|column| (column.name, column.spec))
            .collect()
    }

    /// Takes memory for the results, and tells the guest where everything will lie.
    fn bind(self) -> Result<Bound<'a>, Broken> {
        self.bind_in(None)
    }

    /// The same in the `room` that there is already, if that is enough.
    fn bind_in(self, room: Option<&Range<usize>>) -> Result<Bound<'a>, Broken> {
        let Self { call, columns } = self;
        let results = Making::all(columns, call.job.inline, &*call.supplies.results)?;
        call.bind(results, room)
    }

    /// The same with memory for the results.
    pub(super) fn bind_with(self, results: Vec<Making>) -> Result<Bound<'a>, Broken> {
        self.call.bind(results, None)
    }
}

impl<'a> Call<'a> {
    /// Tells the guest where everything will lie, in the `room` that there is already, if that is enough.
    fn bind(self, results: Vec<Making>, room: Option<&Range<usize>>) -> Result<Bound<'a>, Broken> {
        let mut call = self;
        let (job, supplies) = (call.job, call.supplies);
        call.report.seconds.open = call.lap();
        let needs = |place: &TensorPlace, has_pages, linked| placement::Tensor {
            has_pages,
            linked,
            offset: place.offset,
            length: place.length,
        };
        let inputs = job.inputs.iter().zip(&supplies.inputs);
        let placement = Placement::new(
            inputs.map(|(input, source)| {
                let has_pages = matches!(source, Source::Segment(_));
                needs(&input.place, has_pages, matches!(source, Source::Linked))
            }),
            results.iter().map(|making| {
                let has_pages = making.pages().is_some();
                needs(making.bound(), has_pages, making.is_linked())
            }),
            call.engine.config.move_min_bytes,
        );
        let needed = placement.room_bytes();
        let room = match room.filter(|room| room.len() as u64 >= needed) {
            Some(room) => room.clone(),
            None => contract::reserve(&mut call.instance, needed)?,
        };
        let spots = placement.within(&room).ok_or_else(|| {
            Stage::Reserve.host("the tensors do not fit the room computed for them")
        })?;
        contract::bind(job, &mut call.instance, &results, room.start, &spots)?;
        call.report.seconds.reserve = call.lap();
        let placed = Placed::new(&call, &results, spots, room);
        Ok(Bound {
            call,
            placed,
            results,
        })
    }
}

/// What lies where in the guest, and how far it has come.
pub(super) struct Placed<'a> {
    /// For each tensor, inputs first.
    pub(super) spots: Vec<Spot>,
    /// Guest addresses of all of it.
    room: Range<usize>,
    /// Guest addresses of the chunk records, which lie one after the other.
    pub(super) records: Range<usize>,
    chunk: Chunk<'a>,
}

impl<'a> Placed<'a> {
    fn new(call: &Call<'a>, results: &[Making], spots: Vec<Spot>, room: Range<usize>) -> Self {
        let job = call.job;
        let kernel = job.kernel.kernel();
        let of_inputs = job.inputs.iter().map(|input| &input.place.spec);
        let of_outputs = results.iter().map(|making| &making.bound().spec);
        let rows = call.engine.config.chunk_rows;
        let chunk = Chunk::new(
            rows.filter(|_| kernel.streaming),
            kernel.inputs.iter().zip(of_inputs),
            kernel.outputs.iter().zip(of_outputs),
        );
        Self {
            spots,
            records: room.start..room.start + chunk.records_bytes(),
            room,
            chunk,
        }
    }
}

/// The guest knows the addresses; nothing is there yet.
pub(super) struct Bound<'a> {
    call: Call<'a>,
    placed: Placed<'a>,
    results: Vec<Making>,
}

impl<'a> Bound<'a> {
    /// What stays when it is to wait.
    fn wait(self) -> (Plan, Made) {
        let Self {
            call,
            placed,
            results,
        } = self;
        let column = |making: &Making| Column {
            name: making.port.clone(),
            spec: making.bound().spec.clone(),
            reserve_bytes: making.bound().length,
        };
        let plan = Plan {
            columns: results.iter().map(column).collect(),
            spots: placed.spots,
            room: placed.room,
            compiled: call.compiled,
        };
        (plan, call.instance.rest())
    }

    /// The same that has waited, for a call.
    fn resume(
        engine: &'a Engine,
        job: &'a Job,
        supplies: &'a Supplies,
        (plan, made): (&Plan, Made),
    ) -> Result<Self, Broken> {
        let compiled = Arc::clone(&plan.compiled);
        let mut call = Call::begin(engine, job, supplies, compiled, Some(made), None)?;
        let results = Making::all(plan.columns.clone(), job.inline, &*supplies.results)?;
        let placed = Placed::new(&call, &results, plan.spots.clone(), plan.room.clone());
        call.report.seconds.open = call.lap();
        Ok(Self {
            call,
            placed,
            results,
        })
    }

    /// Brings the inputs' and results' pages in.
    pub(super) fn enter(self) -> Result<Running<'a>, Broken> {
        self.enter_with(true)
    }

    /// The same, with or without the elements of inputs in frames.
    fn enter_with(self, inline: bool) -> Result<Running<'a>, Broken> {
        let Self {
            mut call,
            placed,
            results,
        } = self;
        let (engine, job, sources) = (call.engine, call.job, &call.supplies.inputs);
        // Copies first: from the first window on, this memory has ranges that nobody may touch.
        for ((input, source), spot) in job.inputs.iter().zip(sources).zip(&placed.spots) {
            if let Spot::Copy { at, bytes } = *spot
                && (inline || !source.is_inline())
            {
                call.copy_in(at..at + bytes, input.place.offset, source)?;
            }
        }
        let regions = call.instance.regions_mut();
        let space = regions.memory().space();
        let windows = Windows::enter(&engine.lot, space, job, sources, results, &placed.spots)?;
        regions.enter(&placed.spots, job.inputs.len());
        engine.copies.guest_in.add(call.copied.get());
        call.report.seconds.move_in = call.lap();
        Ok(Running {
            windows,
            call,
            placed,
        })
    }
}

/// The windows are in. Fields drop in this order: the windows go home before the instance ends.
pub(super) struct Running<'a> {
    pub(super) windows: Windows<'a>,
    pub(super) call: Call<'a>,
    pub(super) placed: Placed<'a>,
}

impl<'a> Running<'a> {
    /// Calls `run`, and brings the windows home whatever came of it.
    fn run(mut self) -> Result<Finished<'a>, Broken> {
        if self.call.job.verify {
            self.call.report.pages = self.pages();
        }
        self.watched(|instance, placed, _| {
            contract::run(instance, &mut placed.chunk, placed.records.clone())
        })
    }

    /// The same with batch after batch.
    fn stream(self, first: Batch, batches: &mut dyn Batches) -> Result<Finished<'a>, Broken> {
        let (job, copies) = (self.call.job, &self.call.engine.copies);
        self.watched(|instance, placed, results| {
            let kernel = job.kernel.kernel();
            let of_inputs = job.inputs.iter().map(|input| &input.place.spec);
            let of_outputs = results.iter().map(|making| &making.bound().spec);
            let mut stream = Stream::new(
                kernel.inputs.iter().zip(of_inputs),
                kernel.outputs.iter().zip(of_outputs),
                &placed.spots,
                placed.records.clone(),
            );
            stream.run(instance, first, batches, copies)
        })
    }

    /// Has `steps` call `run`, and brings the windows home whatever came of it.
    fn watched(
        mut self,
        steps: impl FnOnce(&mut Instance, &mut Placed<'a>, &[Making]) -> Result<u32, Broken>,
    ) -> Result<Finished<'a>, Broken> {
        self.call.lap = Instant::now();
        let (compiled, placed) = (Arc::clone(&self.call.compiled), &mut self.placed);
        let read_only = self.windows.read_only();
        let results = self.windows.results();
        let instance = &mut self.call.instance;
        let ended = instance.watched(&compiled, read_only, |instance| {
            steps(instance, placed, results)
        });
        self.call.report.seconds.run = self.call.lap();
        let written = self.written(&ended, &[]);
        self.home(ended, written)
    }

    /// Brings the windows home after `run` has `ended`, and the input of that index was `written` to.
    pub(super) fn home(
        self,
        ended: Result<u32, Broken>,
        written: Option<usize>,
    ) -> Result<Finished<'a>, Broken> {
        let results = self.windows.home()?;
        let (mut call, placed) = (self.call, self.placed);
        call.instance.regions_mut().leave();
        call.report.seconds.move_out = call.lap();
        // Whatever the guest did after such a store, it did with scrap in the place of an input.
        if let Some(input) = written {
            return Err(Stage::Run.broke(Cause::InputWritten {
                port: call.job.inputs[input].port.clone(),
                backtrace: match ended {
                    Err(broken) => broken.into_backtrace(),
                    Ok(_) => None,
                },
                dirtied_bytes: call.instance.faults().dirtied_bytes(),
            }));
        }
        match ended? {
            contract::DONE => Ok(Finished {
                call,
                placed,
                results,
            }),
            contract::FAILED => Err(Stage::Run.broke(call.instance.last_error()?)),
            other => Err(Stage::Run.broken_contract(format!(
                "it returned {other}; 0 is done, 1 an error, 2 more to do"
            ))),
        }
    }

    /// The input that the guest wrote to: by a store that was no trap, or by the one that it trapped at. Those that are
    /// `linked` were watched after the windows.
    pub(super) fn written(&self, ended: &Result<u32, Broken>, linked: &[usize]) -> Option<usize> {
        let faults = self.call.instance.faults();
        if let Some(index) = faults.written().next() {
            return self.windows.input(index, linked);
        }
        match ended {
            Err(broken) if matches!(broken.cause, Cause::Trap { .. }) => {
                self.call.instance.regions().input_at(faults.trapped_at())
            }
            Err(_) | Ok(_) => None,
        }
    }

    /// What the host's own maps say at each tensor's address.
    pub(super) fn pages(&self) -> Vec<WindowPages> {
        let base = self.call.instance.regions().memory().base();
        let inputs = self.call.job.inputs.iter().map(|input| &input.port);
        let outputs = self.windows.results().iter().map(|making| &making.port);
        inputs
            .chain(outputs)
            .zip(&self.placed.spots)
            .map(|(port, spot)| WindowPages {
                port: port.clone(),
                inode: match spot {
                    Spot::Window { at, .. } => strait_memory::process::inode_at(base + at)
                        .ok()
                        .flatten()
                        .map(|(inode, _)| inode),
                    Spot::Copy { .. } => None,
                },
            })
            .collect()
    }
}

/// The windows are home, and the kernel says that it is done.
pub(super) struct Finished<'a> {
    call: Call<'a>,
    placed: Placed<'a>,
    results: Vec<Making>,
}

impl Finished<'_> {
    /// What the kernel has to say, and its guest: there are no results beyond those that were given.
    fn told(mut self) -> Result<(Vec<(String, String)>, Made), Broken> {
        let notes = contract::notes(&mut self.call.instance)?;
        Ok((notes, self.call.instance.rest()))
    }

    /// Makes files of the results: all of them, or none.
    fn publish(mut self) -> Result<Filled, Broken> {
        let chunk = &self.placed.chunk;
        let instance = &mut self.call.instance;
        let shapes = contract::extents(instance, &self.results, |index| chunk.written(index))?;
        self.publish_as(shapes)
    }

    /// The same where of output `i` there are `written(i)` rows.
    pub(super) fn publish_with(mut self, written: impl Fn(usize) -> u64) -> Result<Filled, Broken> {
        let shapes = contract::extents(&mut self.call.instance, &self.results, written)?;
        self.publish_as(shapes)
    }

    fn publish_as(self, shapes: Vec<Vec<u64>>) -> Result<Filled, Broken> {
        let Self {
            mut call,
            placed,
            results,
        } = self;
        call.report.notes = contract::notes(&mut call.instance)?;
        let copied_in = call.copied.get();
        let regions = call.instance.regions();
        let spots = &placed.spots[call.job.inputs.len()..];
        let outputs = results
            .into_iter()
            .zip(shapes)
            .zip(spots)
            .filter(|((making, _), _)| !making.is_linked())
            .map(|((making, shape), spot)| making.finish(shape, *spot, regions, &call.copied))
            .collect::<Result<_, _>>()?;
        let copied_out = call.copied.get() - copied_in;
        call.engine.copies.guest_out.add(copied_out);
        let (report, used) = call.end();
        Ok(Filled {
            outputs,
            report,
            used,
        })
    }
}

fn inputs_bytes(job: &Job) -> u64 {
    let bytes = job.inputs.iter().map(|input| input.place.length);
    bytes.fold(0, u64::saturating_add)
}
