//! One invocation as states that consume each other.
//!
//! ```text
//! Opened ──bind──▶ Bound ──enter──▶ Running ──run──▶ Finished ──publish──▶ Filled
//!    │ open          │ reserve, bind    │ windows in     │ windows home      all outputs
//!    ▼               ▼                  ▼                ▼
//!  dropped: the failure path. Windows go home, mappings back to where they are parked, results to the pool.
//! ```
//! Nothing is left of an invocation that fails at any of them: its results have no name and no holder before
//! [`Filled`], which has all of them.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use strait_memory::Copied;
use strait_tensor::{Column, TensorPlace, TensorSpec};

use super::chunk::Chunk;
use super::contract::{self, windows_fit};
use super::error::{Broken, Cause, Stage};
use super::instance::Instance;
use super::job::{Filled, Job, Report, Source, Supplies, WindowPages};
use super::leash::Until;
use super::limits::State;
use super::placement::{self, Placement, Spot};
use super::results::Making;
use super::spare::Used;
use super::windows::Windows;
use super::{Compiled, Engine};

/// Runs `job` from a fresh instance to finished results.
///
/// # Errors
/// [`Broken`]; nothing of it is left then.
pub(super) fn invoke(engine: &Engine, job: &Job, supplies: &Supplies) -> Result<Filled, Broken> {
    Opened::open(engine, job, supplies)?
        .bind()?
        .enter()?
        .run()?
        .publish()
}

/// What every state carries.
struct Call<'a> {
    engine: &'a Engine,
    job: &'a Job,
    supplies: &'a Supplies,
    compiled: Arc<Compiled>,
    instance: Instance,
    copied: Copied,
    report: Report,
    begin: Instant,
    lap: Instant,
    faults_before: u64,
}

impl Call<'_> {
    /// Seconds since the last lap.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let elapsed = now.duration_since(self.lap).as_secs_f64();
        self.lap = now;
        elapsed
    }

    /// What is told of all of it, and its instance.
    fn end(self) -> (Report, Used) {
        let mut report = self.report;
        report.copied_bytes = self.copied.get();
        report.minor_faults = minor_faults().saturating_sub(self.faults_before);
        report.seconds.total = self.begin.elapsed().as_secs_f64();
        let used = Used {
            instance: self.instance,
            plugin: self.job.kernel.plugin.hash,
            compiled: self.compiled,
            limits: self.job.limits,
            seconds: report.seconds.instantiate,
        };
        (report, used)
    }
}

/// The guest knows what it is to do, and has said what comes out.
pub(super) struct Opened<'a> {
    call: Call<'a>,
    columns: Vec<Column>,
}

impl<'a> Opened<'a> {
    /// A fresh instance that has answered `open`, its answer within the declaration and the limits.
    pub(super) fn open(
        engine: &'a Engine,
        job: &'a Job,
        supplies: &'a Supplies,
    ) -> Result<Self, Broken> {
        let (begin, faults_before) = (Instant::now(), minor_faults());
        assert_eq!(
            supplies.inputs.len(),
            job.inputs.len(),
            "a source for each input"
        );
        let inputs_bytes = job
            .inputs
            .iter()
            .fold(0_u64, |sum, input| sum.saturating_add(input.place.length));
        windows_fit(job, inputs_bytes)?;
        let plugin = &job.kernel.plugin;
        let compiled = engine
            .compiled(plugin)
            .map_err(|e| Stage::Instantiate.broke(Cause::Load(Box::new(e))))?;
        let description = &plugin.description;
        let state = State::new(
            job.limits,
            Arc::clone(&job.request_id),
            Arc::from(description.name.as_str()),
        );
        let until = Until {
            deadline: supplies.deadline,
            deadline_ms: job.deadline_ms,
            cancel: supplies.cancel.clone(),
        };
        let made = engine.spares.take(&plugin.hash, job.limits.guest_bytes);
        let record = description.panic_record;
        let instance = Instance::new(engine, &compiled, made, state, until, record)?;
        let mut call = Call {
            engine,
            job,
            supplies,
            compiled,
            instance,
            copied: Copied::new(),
            report: Report::default(),
            begin,
            lap: begin,
            faults_before,
        };
        call.report.seconds.instantiate = call.lap();
        let columns = contract::open(job, &mut call.instance, inputs_bytes)?;
        Ok(Self { call, columns })
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
        let Self { mut call, columns } = self;
        let (job, supplies) = (call.job, call.supplies);
        let results = Making::all(columns, job.inline, &*supplies.results)?;
        call.report.seconds.open = call.lap();
        let needs = |place: &TensorPlace, has_pages| placement::Tensor {
            has_pages,
            offset: place.offset,
            length: place.length,
        };
        let inputs = job.inputs.iter().zip(&supplies.inputs);
        let placement = Placement::new(
            inputs.map(|(input, source)| needs(&input.place, matches!(source, Source::Segment(_)))),
            results
                .iter()
                .map(|making| needs(making.bound(), making.pages().is_some())),
            call.engine.config.move_min_bytes,
        );
        let room = contract::reserve(&mut call.instance, placement.room_bytes())?;
        let spots = placement.within(&room).ok_or_else(|| {
            Stage::Reserve.host("the tensors do not fit the room computed for them")
        })?;
        contract::bind(job, &mut call.instance, &results, room.start, &spots)?;
        let kernel = job.kernel.kernel();
        let of_inputs = job.inputs.iter().map(|input| &input.place.spec);
        let of_outputs = results.iter().map(|making| &making.bound().spec);
        let rows = call.engine.config.chunk_rows;
        let chunk = Chunk::new(
            rows.filter(|_| kernel.streaming),
            kernel.inputs.iter().zip(of_inputs),
            kernel.outputs.iter().zip(of_outputs),
        );
        call.report.seconds.reserve = call.lap();
        let placed = Placed {
            spots,
            records: room.start..room.start + chunk.records_bytes(),
            chunk,
        };
        Ok(Bound {
            call,
            placed,
            results,
        })
    }
}

/// What lies where in the guest, and how far it has come.
struct Placed<'a> {
    /// For each tensor, inputs first.
    spots: Vec<Spot>,
    /// Guest addresses of the chunk records, which lie one after the other.
    records: Range<usize>,
    chunk: Chunk<'a>,
}

/// The guest knows the addresses; nothing is there yet.
struct Bound<'a> {
    call: Call<'a>,
    placed: Placed<'a>,
    results: Vec<Making>,
}

impl<'a> Bound<'a> {
    /// Brings the inputs' and results' pages in.
    fn enter(self) -> Result<Running<'a>, Broken> {
        const STAGE: Stage = Stage::Place;
        let Self {
            mut call,
            placed,
            results,
        } = self;
        let (engine, job, sources) = (call.engine, call.job, &call.supplies.inputs);
        // Copies first: from the first window on, this memory has ranges that nobody may touch.
        for ((input, source), spot) in job.inputs.iter().zip(sources).zip(&placed.spots) {
            if let Spot::Copy { at, bytes } = *spot {
                let (offset, copied) = (input.place.offset, &call.copied);
                let fill = |into: &mut [u8]| match source {
                    Source::Segment(source) => source.read_at(offset, into, copied),
                    Source::Inline(bytes) => {
                        // Whoever made the job has held one against the other.
                        into.copy_from_slice(bytes);
                        copied.add(into.len() as u64);
                        Ok(())
                    }
                };
                call.instance
                    .regions_mut()
                    .with_mut(at..at + bytes, fill)
                    .map_err(|e| STAGE.broke(e))?
                    .map_err(|e| STAGE.broke(e))?;
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
struct Running<'a> {
    windows: Windows<'a>,
    call: Call<'a>,
    placed: Placed<'a>,
}

impl<'a> Running<'a> {
    /// Calls `run`, and brings the windows home whatever came of it.
    fn run(mut self) -> Result<Finished<'a>, Broken> {
        if self.call.job.verify {
            self.call.report.pages = self.pages();
        }
        self.call.lap = Instant::now();
        let (compiled, placed) = (Arc::clone(&self.call.compiled), &mut self.placed);
        let read_only = self.windows.read_only();
        let instance = &mut self.call.instance;
        let ended = instance.watched(&compiled, read_only, |instance| {
            contract::run(instance, &mut placed.chunk, placed.records.clone())
        });
        self.call.report.seconds.run = self.call.lap();
        let written = self.written(&ended);
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

    /// The input that the guest wrote to: by a store that was no trap, or by the one that it trapped at.
    fn written(&self, ended: &Result<u32, Broken>) -> Option<usize> {
        let faults = self.call.instance.faults();
        if let Some(index) = faults.written().next() {
            return Some(self.windows.input(index));
        }
        match ended {
            Err(broken) if matches!(broken.cause, Cause::Trap { .. }) => {
                self.call.instance.regions().input_at(faults.trapped_at())
            }
            Err(_) | Ok(_) => None,
        }
    }

    /// What the host's own maps say at each tensor's address.
    fn pages(&self) -> Vec<WindowPages> {
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
struct Finished<'a> {
    call: Call<'a>,
    placed: Placed<'a>,
    results: Vec<Making>,
}

impl Finished<'_> {
    /// Makes files of the results: all of them, or none.
    fn publish(self) -> Result<Filled, Broken> {
        let Self {
            mut call,
            placed,
            results,
        } = self;
        let shapes = contract::extents(&mut call.instance, &results, &placed.chunk)?;
        call.report.notes = contract::notes(&mut call.instance)?;
        let copied_in = call.copied.get();
        let regions = call.instance.regions();
        let spots = &placed.spots[call.job.inputs.len()..];
        let outputs = results
            .into_iter()
            .zip(shapes)
            .zip(spots)
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

/// Page faults of the process so far. A missing figure is no reason to fail an invocation.
fn minor_faults() -> u64 {
    strait_memory::process::minor_faults().unwrap_or(0)
}
