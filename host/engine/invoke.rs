//! One invocation, from a fresh store to finished results.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use strait_memory::{Copied, GUEST_PAGE, HUGE, Inode, MemoryError, Parked, PoolSegment, Window};
use strait_tensor::{Column, FileLayout, LayoutError, TensorPlace, TensorSpec};
use wasmtime::{Store, UpdateDeadline, WasmBacktrace};

use super::abi::{self, Guest, types};
use super::guest_memory::{GuestMemory, NotOwn, RESERVATION_BYTES, collect};
use super::limits::{State, Stop};
use super::{CancelToken, Compiled, Engine, Limits, LoadError, describe_limits, fault};
use crate::lease::{Body, LiveSegment};
use crate::plugin::{Description, KernelRef, Role, Value};
use crate::text::{self, BACKTRACE_BYTES_MAX};

/// Size of a chunk record in guest memory, in bytes.
const CONTROL_BYTES: usize = 64;
/// Alignment of copied tensors in the guest, in bytes.
const COPY_ALIGN: usize = 64;
/// Most notes of one invocation, and longest key or text in bytes.
const NOTES_MAX: usize = 64;
const NOTE_BYTES_MAX: usize = 1024;

/// An input: a tensor in a live segment.
#[derive(Clone, Debug)]
pub struct Input {
    /// The port that it goes to.
    pub port: String,
    /// Numbers or a mask.
    pub role: Role,
    /// Where it lies.
    pub place: TensorPlace,
    /// What holds it.
    pub segment: Arc<LiveSegment>,
}

/// Everything that one invocation needs. Inputs and parameters have been checked against the
/// kernel's declaration.
#[derive(Debug)]
pub struct Request {
    /// What to run.
    pub kernel: KernelRef,
    /// In the kernel's order.
    pub inputs: Vec<Input>,
    /// All declared ones.
    pub parameters: Vec<(String, Value)>,
    /// Whose results they are, for the pool.
    pub owner: u64,
    /// Seal the results for good.
    pub seal: bool,
    /// Look at the host's own maps during `run`.
    pub verify: bool,
    /// What it may use.
    pub limits: Limits,
    /// When it must be done.
    pub deadline: Instant,
    /// Milliseconds from the request to `deadline`, for the message.
    pub deadline_ms: u64,
    /// Ends it.
    pub cancel: CancelToken,
    /// For log lines.
    pub request_id: Arc<str>,
}

/// A finished result.
#[derive(Debug)]
pub struct Output {
    /// The output port.
    pub port: String,
    /// The file in the segment; one tensor, named as the port.
    pub layout: FileLayout,
    /// What holds it: `Body::Result` or, with [`Request::seal`], `Body::Sealed`.
    pub body: Body,
}

/// What the host's own maps said at a window's address during `run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowPages {
    /// The port.
    pub port: String,
    /// The file mapped there; none for a tensor that was copied.
    pub inode: Option<Inode>,
}

/// What an invocation leaves.
#[derive(Debug)]
pub struct Outcome {
    /// In the kernel's order.
    pub outputs: Vec<Output>,
    /// (key, text), at most 64.
    pub notes: Vec<(String, String)>,
    /// Bytes of its tensors that the host copied.
    pub copied_bytes: u64,
    /// With [`Request::verify`]: inputs, then outputs.
    pub pages: Vec<WindowPages>,
    /// Page faults of the process meanwhile that needed no I/O.
    pub minor_faults: u64,
    /// Where the time went.
    pub seconds: Seconds,
}

/// Where an invocation's time went, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seconds {
    /// Store and instance.
    pub instantiate: f64,
    /// `open`, and taking the results from the pool.
    pub open: f64,
    /// `reserve` and `bind`.
    pub reserve: f64,
    /// Windows in, small inputs copied in.
    pub move_in: f64,
    /// `run`.
    pub run: f64,
    /// Windows home.
    pub move_out: f64,
    /// All of it, without waiting for a worker.
    pub total: f64,
}

/// Why an invocation failed. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// The plugin's bytes no longer compile.
    #[error(transparent)]
    Load(Box<LoadError>),
    /// The guest trapped.
    #[error(
        "kernel `{kernel}` trapped in `{during}`: {trap}; this is the plugin's bug, its author will want the backtrace"
    )]
    Trap {
        /// The kernel.
        kernel: String,
        /// The exported function.
        during: &'static str,
        /// wasmtime's words.
        trap: String,
        /// The guest's stack.
        backtrace: Option<String>,
    },
    /// The guest wrote to an input.
    #[error(
        "kernel `{kernel}` wrote to its input `{port}`; inputs are read-only, the tensor is unchanged"
    )]
    InputWritten {
        /// The kernel.
        kernel: String,
        /// The input.
        port: String,
        /// The guest's stack: at the store, or where the guest was ended after it.
        backtrace: Option<String>,
        /// Bytes of scrap memory that the guest dirtied; 0 if the store was a trap.
        dirtied_bytes: u64,
    },
    /// The guest broke the contract.
    #[error("kernel `{kernel}` broke the contract in `{during}`: {what}")]
    BadAnswer {
        /// The kernel.
        kernel: String,
        /// The exported function.
        during: &'static str,
        /// How.
        what: String,
    },
    /// The kernel refuses an argument.
    #[error("kernel `{kernel}` refuses `{name}`: {reason}")]
    BadArgument {
        /// The kernel.
        kernel: String,
        /// The port or parameter.
        name: String,
        /// In the kernel's words.
        reason: String,
    },
    /// The kernel cannot do this.
    #[error("kernel `{kernel}` does not support this: {reason}")]
    Unsupported {
        /// The kernel.
        kernel: String,
        /// In the kernel's words.
        reason: String,
    },
    /// The kernel gave up.
    #[error("kernel `{kernel}` failed: {reason}")]
    Failed {
        /// The kernel.
        kernel: String,
        /// In the kernel's words.
        reason: String,
    },
    /// It took too long.
    #[error(
        "kernel `{kernel}` was stopped at its deadline of {deadline_ms} ms; raise the deadline or give it less data"
    )]
    Deadline {
        /// The kernel.
        kernel: String,
        /// From the request on.
        deadline_ms: u64,
    },
    /// The caller asked for it to end.
    #[error("the invocation of kernel `{0}` was cancelled")]
    Cancelled(String),
    /// The guest's own memory.
    #[error(
        "kernel `{kernel}` asked for {asked} bytes of memory of its own, the limit is {limit}; raise guest_bytes or give it less data"
    )]
    GuestBytes {
        /// The kernel.
        kernel: String,
        /// What it would have had.
        asked: u64,
        /// The limit.
        limit: u64,
    },
    /// The tensors together.
    #[error(
        "inputs and outputs of kernel `{kernel}` need {asked} bytes of windows, the limit is {limit}; raise window_bytes or cut the tensors"
    )]
    WindowBytes {
        /// The kernel.
        kernel: String,
        /// What they need.
        asked: u64,
        /// The limit.
        limit: u64,
    },
    /// The outputs together.
    #[error(
        "kernel `{kernel}` announced outputs of {asked} bytes, the limit is {limit}; raise result_bytes or give it less data"
    )]
    ResultBytes {
        /// The kernel.
        kernel: String,
        /// What it announced.
        asked: u64,
        /// The limit.
        limit: u64,
    },
    /// Its log lines.
    #[error(
        "kernel `{kernel}` logged {asked} bytes, the limit is {limit}; raise log_bytes or make it quieter"
    )]
    LogBytes {
        /// The kernel.
        kernel: String,
        /// With the line that was too much.
        asked: u64,
        /// The limit.
        limit: u64,
    },
    /// More than 32-bit addresses reach.
    #[error(
        "inputs and outputs of kernel `{kernel}` need {asked} bytes, but a wasm32 guest has 4 GiB (4294967296 bytes) of addresses for them and its own memory; cut the tensors"
    )]
    Wasm32 {
        /// The kernel.
        kernel: String,
        /// What they need.
        asked: u64,
    },
    /// No memory for it.
    #[error("no memory for kernel `{kernel}`: {error}")]
    Memory {
        /// The kernel.
        kernel: String,
        /// Why.
        error: MemoryError,
    },
    /// The host's own fault.
    #[error("the host failed while running kernel `{kernel}`: {what}")]
    Host {
        /// The kernel.
        kernel: String,
        /// How.
        what: String,
    },
}

impl InvokeError {
    /// The guest's stack, of an error that has one.
    fn into_backtrace(self) -> Option<String> {
        match self {
            Self::Trap { backtrace, .. } | Self::InputWritten { backtrace, .. } => backtrace,
            _ => None,
        }
    }
}

/// What every step of an invocation needs to make its errors.
struct Names<'a> {
    kernel: &'a str,
    deadline_ms: u64,
    asked: u64,
}

impl<'a> Names<'a> {
    fn of(request: &'a Request) -> Self {
        Self {
            kernel: &request.kernel.kernel().name,
            deadline_ms: request.deadline_ms,
            asked: request
                .inputs
                .iter()
                .fold(0, |sum, i| sum.saturating_add(i.place.length)),
        }
    }

    fn memory(&self, error: MemoryError) -> InvokeError {
        InvokeError::Memory {
            kernel: self.kernel.to_owned(),
            error,
        }
    }

    fn bad(&self, during: &'static str, what: impl Into<String>) -> InvokeError {
        InvokeError::BadAnswer {
            kernel: self.kernel.to_owned(),
            during,
            what: what.into(),
        }
    }

    fn host(&self, what: impl Into<String>) -> InvokeError {
        InvokeError::Host {
            kernel: self.kernel.to_owned(),
            what: what.into(),
        }
    }

    fn not_own(&self, error: &NotOwn) -> InvokeError {
        self.host(error.to_string())
    }

    /// What a failed call of the guest means.
    fn trap(&self, during: &'static str, error: &wasmtime::Error) -> InvokeError {
        let kernel = self.kernel.to_owned();
        match error.downcast_ref::<Stop>() {
            Some(Stop::Cancelled) => return InvokeError::Cancelled(kernel),
            Some(Stop::Deadline) => {
                return InvokeError::Deadline {
                    kernel,
                    deadline_ms: self.deadline_ms,
                };
            }
            Some(Stop::GuestBytes { asked, limit }) => {
                return InvokeError::GuestBytes {
                    kernel,
                    asked: *asked,
                    limit: *limit,
                };
            }
            Some(Stop::LogBytes { asked, limit }) => {
                return InvokeError::LogBytes {
                    kernel,
                    asked: *asked,
                    limit: *limit,
                };
            }
            Some(stop @ (Stop::LogRange(_) | Stop::Table { .. })) => {
                return self.bad(during, stop.to_string());
            }
            // `run` says which one; no other call has inputs to write to.
            Some(Stop::InputWritten) => {}
            None => {}
        }
        let backtrace = error
            .downcast_ref::<WasmBacktrace>()
            .map(|backtrace| text::lines(backtrace.to_string(), BACKTRACE_BYTES_MAX));
        InvokeError::Trap {
            kernel,
            during,
            trap: error.root_cause().to_string(),
            backtrace,
        }
    }

    /// Why there is no instance: its start function trapped, or its exports are of another contract.
    fn not_instantiated(&self, error: &wasmtime::Error) -> InvokeError {
        if error.is::<wasmtime::Trap>() || error.is::<Stop>() {
            return self.trap("instantiate", error);
        }
        self.bad(
            "instantiate",
            format!(
                "it does not fit this host's strait:kernel: {}; build the plugin again with this version's SDK",
                error.root_cause()
            ),
        )
    }

    fn said(&self, error: types::Error) -> InvokeError {
        let kernel = self.kernel.to_owned();
        match error {
            types::Error::BadArgument(bad) => InvokeError::BadArgument {
                kernel,
                name: bounded(bad.name),
                reason: bounded(bad.reason),
            },
            types::Error::Unsupported(reason) => InvokeError::Unsupported {
                kernel,
                reason: bounded(reason),
            },
            types::Error::Failed(reason) => InvokeError::Failed {
                kernel,
                reason: bounded(reason),
            },
        }
    }
}

/// A guest's text, short enough for an error body.
fn bounded(text: String) -> String {
    text::one_line(text, NOTE_BYTES_MAX)
}

/// A guest ready for calls. Fields drop in order: the instance's store last of all that it needs.
struct Instance {
    guest: Guest,
    memory: Arc<GuestMemory>,
    store: Store<State>,
    _ticking: super::ticker::Ticking,
}

impl Instance {
    fn new(
        engine: &Engine,
        compiled: &Compiled,
        names: &Names<'_>,
        state: State,
        deadline: Instant,
        cancel: CancelToken,
    ) -> Result<Self, InvokeError> {
        let ticking = engine.ticker.start().map_err(|e| names.host(e))?;
        let mut store = Store::new(&engine.wasmtime, state);
        store.limiter(|state| state);
        if engine.config.epoch_interruption {
            store.epoch_deadline_callback(move |store| {
                if store.data().faults.any_written() {
                    return Err(Stop::InputWritten.into());
                }
                if cancel.is_cancelled() {
                    return Err(Stop::Cancelled.into());
                }
                if Instant::now() >= deadline {
                    return Err(Stop::Deadline.into());
                }
                Ok(UpdateDeadline::Continue(1))
            });
            store.set_epoch_deadline(1);
        }
        let (plugin, mut made) = collect(|| compiled.pre.instantiate(&mut store));
        let plugin = plugin.map_err(|e| names.not_instantiated(&e))?;
        let memory = made.pop().ok_or_else(|| {
            names.bad("instantiate", "the plugin has no linear memory of its own")
        })?;
        store.data_mut().memory = Some(Arc::clone(&memory));
        Ok(Self {
            guest: plugin.strait_kernel_kernels().clone(),
            memory,
            store,
            _ticking: ticking,
        })
    }
}

fn instantiate(
    engine: &Engine,
    request: &Request,
    names: &Names<'_>,
) -> Result<(Arc<Compiled>, Instance), InvokeError> {
    let compiled = engine
        .compiled(&request.kernel.plugin)
        .map_err(|e| InvokeError::Load(Box::new(e)))?;
    let plugin = Arc::from(request.kernel.plugin.description.name.as_str());
    let state = State::new(request.limits, Arc::clone(&request.request_id), plugin);
    let instance = Instance::new(
        engine,
        &compiled,
        names,
        state,
        request.deadline,
        request.cancel.clone(),
    )?;
    Ok((compiled, instance))
}

/// Asks a plugin what it offers.
pub(super) fn describe(engine: &Engine, compiled: &Compiled) -> Result<Description, InvokeError> {
    let (limits, deadline) = describe_limits();
    let names = Names {
        kernel: "(describe)",
        deadline_ms: 5000,
        asked: 0,
    };
    let state = State::new(limits, Arc::from("load"), Arc::from("(loading)"));
    let mut instance = Instance::new(
        engine,
        compiled,
        &names,
        state,
        deadline,
        CancelToken::default(),
    )?;
    let description = instance
        .guest
        .call_describe(&mut instance.store)
        .map_err(|e| names.trap("describe", &e))?;
    Ok(abi::description(description))
}

/// Where a tensor is while `run` is running.
#[derive(Debug)]
enum Spot {
    /// A window at this guest address.
    Window { at: usize, bytes: usize },
    /// A copy at this guest address.
    Copy { at: usize, bytes: usize },
}

impl Spot {
    fn address(&self) -> usize {
        match self {
            Self::Window { at, .. } | Self::Copy { at, .. } => *at,
        }
    }
}

/// A place for one tensor in the region that `reserve` grew.
fn place(cursor: &mut usize, tensor: &TensorPlace, window: bool) -> Option<Spot> {
    let bytes = usize::try_from(tensor.length).ok()?;
    if window {
        let region = bytes.checked_next_multiple_of(usize::try_from(GUEST_PAGE).ok()?)?;
        // The same place within 2 MiB as in the file and at home: whole page tables move then.
        let (huge, phase) = (
            usize::try_from(HUGE).ok()?,
            usize::try_from(tensor.offset % HUGE).ok()?,
        );
        let start = cursor.checked_add(huge - 1 - phase)? / huge * huge + phase;
        *cursor = start.checked_add(region)?;
        return Some(Spot::Window {
            at: start,
            bytes: region,
        });
    }
    let start = cursor.checked_next_multiple_of(COPY_ALIGN)?;
    *cursor = start.checked_add(bytes)?;
    Some(Spot::Copy { at: start, bytes })
}

/// A result that is being made.
struct Making {
    port: String,
    /// Of the largest tensor that it can become.
    layout: FileLayout,
    segment: PoolSegment,
}

impl Making {
    /// Where the tensor lies, as large as it can become.
    fn bound(&self) -> &TensorPlace {
        // `take_results` made a layout of one column.
        &self.layout.tensors[0]
    }
}

/// The windows that are in. Whatever happens they go home before the store ends: losing the one
/// writable mapping of a result would lose its segment, and a guest's teardown must never meet
/// pages of a segment.
struct Windows<'a> {
    engine: &'a Engine,
    inputs: Vec<Option<Window>>,
    outputs: Vec<(usize, Option<Window>)>,
    making: Vec<Making>,
}

impl Windows<'_> {
    fn home(&mut self) -> Result<(), String> {
        let mut problem = None;
        for window in self.inputs.iter_mut().filter_map(Option::take) {
            match window.move_home() {
                Ok(parked) => self.engine.lot.give_back(parked),
                Err(poisoned) => problem = Some(poisoned.to_string()),
            }
        }
        for (index, window) in &mut self.outputs {
            let Some(window) = window.take() else {
                continue;
            };
            match window.move_home() {
                Ok(parked) => self.making[*index].segment.put_parked(parked),
                Err(poisoned) => problem = Some(poisoned.to_string()),
            }
        }
        problem.map_or(Ok(()), Err)
    }
}

impl Drop for Windows<'_> {
    fn drop(&mut self) {
        // On the failure path there is nobody to tell; the poisoned guest space is not reused.
        if let Err(problem) = self.home() {
            tracing::error!(problem, "a window could not be moved home");
        }
    }
}

fn seconds_since(start: &mut Instant) -> f64 {
    let now = Instant::now();
    let elapsed = (now - *start).as_secs_f64();
    *start = now;
    elapsed
}

pub(super) fn invoke(engine: &Engine, request: Request) -> Result<Outcome, InvokeError> {
    let begin = Instant::now();
    let mut lap = begin;
    let mut seconds = Seconds::default();
    let faults_before = minor_faults();
    let names = Names::of(&request);
    windows_fit(&names, names.asked, &request.limits)?;
    // Declared before the windows, so that it drops after them.
    let (compiled, mut instance) = instantiate(engine, &request, &names)?;
    seconds.instantiate = seconds_since(&mut lap);

    let columns = announced(&mut instance, &request, &names)?;
    let making = take_results(engine, &request, &names, columns)?;
    seconds.open = seconds_since(&mut lap);

    let spots = reserve_and_bind(engine, &mut instance, &request, &names, &making)?;
    seconds.reserve = seconds_since(&mut lap);

    let copied = Copied::new();
    let mut windows = Windows {
        engine,
        inputs: Vec::new(),
        outputs: Vec::new(),
        making,
    };
    move_in(
        &mut windows,
        &mut instance,
        &request,
        &names,
        &spots,
        &copied,
    )?;
    engine.copies.guest_in.add(copied.get());
    seconds.move_in = seconds_since(&mut lap);

    let pages = if request.verify {
        pages(&request, &windows, &instance.memory, &spots)
    } else {
        Vec::new()
    };
    lap = Instant::now();
    run(
        engine,
        &mut windows,
        &mut instance,
        &request,
        &names,
        &compiled,
        (&mut seconds, &mut lap),
    )?;

    let shapes = extents(&mut instance, &names, &windows.making, &spots)?;
    let notes = notes(&mut instance, &names)?;
    let copied_in = copied.get();
    let making = std::mem::take(&mut windows.making);
    let outputs = making
        .into_iter()
        .zip(shapes)
        .zip(&spots[request.inputs.len()..])
        .map(|((making, shape), spot)| {
            finish(
                making,
                shape,
                spot,
                &instance.memory,
                &request,
                &names,
                &copied,
            )
        })
        .collect::<Result<_, _>>()?;
    engine.copies.guest_out.add(copied.get() - copied_in);
    drop(windows);
    drop(instance);
    seconds.total = begin.elapsed().as_secs_f64();
    let minor_faults = minor_faults().saturating_sub(faults_before);
    Ok(Outcome {
        outputs,
        notes,
        copied_bytes: copied.get(),
        pages,
        minor_faults,
        seconds,
    })
}

fn windows_fit(names: &Names<'_>, asked: u64, limits: &Limits) -> Result<(), InvokeError> {
    if asked >= RESERVATION_BYTES as u64 {
        return Err(InvokeError::Wasm32 {
            kernel: names.kernel.to_owned(),
            asked,
        });
    }
    if asked > limits.window_bytes {
        let kernel = names.kernel.to_owned();
        return Err(InvokeError::WindowBytes {
            kernel,
            asked,
            limit: limits.window_bytes,
        });
    }
    Ok(())
}

/// The outputs that an invocation would have, by `open` alone.
pub(super) fn open_only(
    engine: &Engine,
    request: &Request,
) -> Result<Vec<(String, TensorSpec)>, InvokeError> {
    let names = Names::of(request);
    let (_, mut instance) = instantiate(engine, request, &names)?;
    let columns = announced(&mut instance, request, &names)?;
    Ok(columns
        .into_iter()
        .map(|column| (column.name, column.spec))
        .collect())
}

/// `open`, and its answer against the declaration and the limits.
fn announced(
    instance: &mut Instance,
    request: &Request,
    names: &Names<'_>,
) -> Result<Vec<Column>, InvokeError> {
    let kernel = request.kernel.kernel();
    let parameters: Vec<_> = request
        .parameters
        .iter()
        .map(|(name, value)| abi::parameter_of(name, value))
        .collect();
    let specs: Vec<_> = request
        .inputs
        .iter()
        .map(|i| abi::spec_of(&i.place.spec, i.role))
        .collect();
    let answered = instance
        .guest
        .call_open(&mut instance.store, &kernel.name, &parameters, &specs)
        .map_err(|e| names.trap("open", &e))?
        .map_err(|e| names.said(e))?;
    if answered.len() != kernel.outputs.len() {
        let (answered, declared) = (answered.len(), kernel.outputs.len());
        return Err(names.bad(
            "open",
            format!("{answered} outputs, it declares {declared}"),
        ));
    }
    let mut columns = Vec::with_capacity(answered.len());
    let mut result_bytes = 0_u64;
    for (port, spec) in kernel.outputs.iter().zip(answered) {
        let spec = abi::spec(spec);
        port.fits(&spec)
            .map_err(|e| names.bad("open", format!("output `{}`: {e}", port.name)))?;
        let column = Column::new(port.name.clone(), spec)
            .map_err(|e| names.bad("open", format!("output `{}`: {e}", port.name)))?;
        result_bytes = result_bytes.saturating_add(column.reserve_bytes);
        columns.push(column);
    }
    if result_bytes > request.limits.result_bytes {
        return Err(InvokeError::ResultBytes {
            kernel: names.kernel.to_owned(),
            asked: result_bytes,
            limit: request.limits.result_bytes,
        });
    }
    windows_fit(
        names,
        names.asked.saturating_add(result_bytes),
        &request.limits,
    )?;
    Ok(columns)
}

/// Segments for the results.
fn take_results(
    engine: &Engine,
    request: &Request,
    names: &Names<'_>,
    columns: Vec<Column>,
) -> Result<Vec<Making>, InvokeError> {
    columns
        .into_iter()
        .map(|column| {
            let layout = plan(&column).map_err(|e| names.bad("open", e.to_string()))?;
            let segment = if request.seal {
                engine.pool.take_sealable(layout.capacity)
            } else {
                engine.pool.take(layout.capacity, request.owner)
            };
            Ok(Making {
                port: column.name,
                layout,
                segment: segment.map_err(|e| names.memory(e))?,
            })
        })
        .collect()
}

fn plan(column: &Column) -> Result<FileLayout, LayoutError> {
    FileLayout::plan(std::slice::from_ref(column))
}

/// Room in the guest for every tensor, in the memory that grew during `reserve`.
fn reserve_and_bind(
    engine: &Engine,
    instance: &mut Instance,
    request: &Request,
    names: &Names<'_>,
    making: &[Making],
) -> Result<Vec<Spot>, InvokeError> {
    let tensors: Vec<&TensorPlace> = request
        .inputs
        .iter()
        .map(|i| &i.place)
        .chain(making.iter().map(Making::bound))
        .collect();
    let moves = |index: usize, tensor: &TensorPlace| {
        let read_only = index < request.inputs.len();
        tensor.length >= engine.config.move_min_bytes.max(1)
            && (!read_only || index < fault::WINDOWS_MAX)
    };
    // An upper bound: each window may need up to 2 MiB before it to be in place.
    let slack = |window: bool| {
        if window {
            HUGE + GUEST_PAGE
        } else {
            COPY_ALIGN as u64
        }
    };
    let asked = tensors.iter().enumerate().fold(
        GUEST_PAGE + (CONTROL_BYTES * tensors.len()) as u64,
        |sum, (index, tensor)| {
            sum.saturating_add(tensor.length)
                .saturating_add(slack(moves(index, tensor)))
        },
    );
    let asked = asked
        .checked_next_multiple_of(GUEST_PAGE)
        .unwrap_or(u64::MAX);
    let before = instance.memory.size();
    if asked.saturating_add(before as u64) > RESERVATION_BYTES as u64 {
        return Err(InvokeError::Wasm32 {
            kernel: names.kernel.to_owned(),
            asked,
        });
    }
    instance.store.data_mut().allowance = asked;
    instance.memory.take_growths();
    instance
        .guest
        .call_reserve(&mut instance.store, asked)
        .map_err(|e| names.trap("reserve", &e))?;
    let growths = instance.memory.take_growths();
    let [grown] = growths.as_slice() else {
        return Err(names.bad(
            "reserve",
            format!("the memory grew {} times, it must grow once", growths.len()),
        ));
    };
    if (grown.len() as u64) < asked {
        return Err(names.bad(
            "reserve",
            format!(
                "the memory grew by {} bytes, {asked} were asked for",
                grown.len()
            ),
        ));
    }
    let mut cursor = grown.start + CONTROL_BYTES * tensors.len();
    let spots = tensors
        .iter()
        .enumerate()
        .map(|(index, tensor)| place(&mut cursor, tensor, moves(index, tensor)))
        .collect::<Option<Vec<_>>>()
        .filter(|_| cursor <= grown.end)
        .ok_or_else(|| names.host("the tensors do not fit the room computed for them"))?;
    let bound = |index: usize, tensor: &TensorPlace, role: Role| types::Tensor {
        address: spots[index].address() as u64,
        bytes: tensor.length,
        control: (grown.start + CONTROL_BYTES * index) as u64,
        spec: abi::spec_of(&tensor.spec, role),
    };
    let inputs: Vec<_> = request
        .inputs
        .iter()
        .enumerate()
        .map(|(index, input)| bound(index, &input.place, input.role))
        .collect();
    let outputs: Vec<_> = making
        .iter()
        .enumerate()
        .map(|(index, m)| bound(inputs.len() + index, m.bound(), Role::Data))
        .collect();
    instance
        .guest
        .call_bind(&mut instance.store, &inputs, &outputs)
        .map_err(|e| names.trap("bind", &e))?
        .map_err(|e| names.said(e))?;
    for (index, tensor) in tensors.iter().enumerate() {
        write_control(
            &instance.memory,
            grown.start + CONTROL_BYTES * index,
            tensor,
            index < inputs.len(),
        )
        .map_err(|e| names.not_own(&e))?;
    }
    Ok(spots)
}

/// The chunk record of a tensor that comes whole: all elements in, none out yet, chunk 0.
fn write_control(
    memory: &GuestMemory,
    at: usize,
    tensor: &TensorPlace,
    input: bool,
) -> Result<(), NotOwn> {
    let elements = if input {
        tensor.spec.elements().unwrap_or(0)
    } else {
        0
    };
    memory.with_mut(at..at + CONTROL_BYTES, &[], |record| {
        record.fill(0);
        record[..8].copy_from_slice(&elements.to_le_bytes());
    })
}

fn move_in(
    windows: &mut Windows<'_>,
    instance: &mut Instance,
    request: &Request,
    names: &Names<'_>,
    spots: &[Spot],
    copied: &Copied,
) -> Result<(), InvokeError> {
    let memory = &instance.memory;
    let (input_spots, output_spots) = spots.split_at(request.inputs.len());
    // Copies first: from the first window on, this memory has ranges that nobody may touch.
    for (input, spot) in request.inputs.iter().zip(input_spots) {
        if let Spot::Copy { at, bytes } = spot {
            let read = memory
                .with_mut(*at..*at + *bytes, &[], |into| {
                    input.segment.read_at(input.place.offset, into, copied)
                })
                .map_err(|e| names.not_own(&e))?;
            read.map_err(|e| names.memory(e))?;
        }
    }
    let go = |parked: Parked, part: Range<u64>, at: usize| {
        parked
            .move_into(part, memory.space(), memory.base() + at)
            .map_err(|refused| names.memory(refused.error.into()))
    };
    for (input, spot) in request.inputs.iter().zip(input_spots) {
        let window = match spot {
            Spot::Window { at, bytes } => {
                let range = input.place.offset..input.place.offset + *bytes as u64;
                let parked = input.segment.park(range).map_err(|e| names.memory(e))?;
                Some(go(parked, 0..*bytes as u64, *at)?)
            }
            Spot::Copy { .. } => None,
        };
        windows.inputs.push(window);
    }
    for (index, spot) in output_spots.iter().enumerate() {
        let Spot::Window { at, bytes } = spot else {
            continue;
        };
        let making = &mut windows.making[index];
        let parked = making
            .segment
            .take_parked()
            .ok_or_else(|| names.host("a result's mapping is not at home"))?;
        let offset = making.bound().offset;
        let part = offset..offset + *bytes as u64;
        let window = go(parked, part, *at)?;
        windows.outputs.push((index, Some(window)));
    }
    instance.store.data_mut().windows = spots
        .iter()
        .filter_map(|spot| match spot {
            Spot::Window { at, bytes } => Some(*at..*at + *bytes),
            Spot::Copy { .. } => None,
        })
        .collect();
    Ok(())
}

/// Page faults of the process so far. A missing figure is no reason to fail an invocation.
fn minor_faults() -> u64 {
    strait_memory::process::minor_faults().unwrap_or(0)
}

fn inode_at(address: usize) -> Option<Inode> {
    strait_memory::process::inode_at(address)
        .ok()
        .flatten()
        .map(|(inode, _)| inode)
}

fn pages(
    request: &Request,
    windows: &Windows<'_>,
    memory: &GuestMemory,
    spots: &[Spot],
) -> Vec<WindowPages> {
    let ports = request
        .inputs
        .iter()
        .map(|i| &i.port)
        .chain(windows.making.iter().map(|m| &m.port));
    ports
        .zip(spots)
        .map(|(port, spot)| WindowPages {
            port: port.clone(),
            inode: match spot {
                Spot::Window { at, .. } => inode_at(memory.base() + at),
                Spot::Copy { .. } => None,
            },
        })
        .collect()
}

/// `run` with the windows in, and home again whatever came of it.
fn run(
    engine: &Engine,
    windows: &mut Windows<'_>,
    instance: &mut Instance,
    request: &Request,
    names: &Names<'_>,
    compiled: &Compiled,
    (seconds, lap): (&mut Seconds, &mut Instant),
) -> Result<(), InvokeError> {
    // (port index, range) of each read-only window.
    let read_only: Vec<_> = windows
        .inputs
        .iter()
        .enumerate()
        .filter_map(|(index, window)| window.as_ref().map(|w| (index, w.fault_range())))
        .collect();
    let ranges: Vec<_> = read_only.iter().map(|(_, range)| *range).collect();
    let addresses: Vec<Range<usize>> = ranges.iter().map(|r| r.start..r.end).collect();
    let faults = Arc::clone(&instance.store.data().faults);
    fault::watch(
        &mut instance.store,
        engine.wasmtime.clone(),
        Arc::clone(&compiled.traps),
        ranges,
        Arc::clone(&faults),
    );
    let answer = instance.guest.call_run(&mut instance.store, 1);
    fault::unwatch(&mut instance.store);
    seconds.run = seconds_since(lap);
    windows.home().map_err(|e| names.host(e))?;
    instance.store.data_mut().windows.clear();
    seconds.move_out = seconds_since(lap);

    let written = |index: usize, backtrace| InvokeError::InputWritten {
        kernel: names.kernel.to_owned(),
        port: request.inputs[read_only[index].0].port.clone(),
        backtrace,
        dirtied_bytes: faults.dirtied_bytes(),
    };
    // Whatever the guest did after such a store, it did with scrap in the place of an input.
    if let Some(index) = faults.written().next() {
        let ended = answer.err().map(|error| names.trap("run", &error));
        return Err(written(index, ended.and_then(InvokeError::into_backtrace)));
    }
    match answer {
        Err(error) => {
            let error = names.trap("run", &error);
            if let InvokeError::Trap { backtrace, .. } = &error
                && let Some(index) = faults.trapped_in(&addresses)
            {
                return Err(written(index, backtrace.clone()));
            }
            Err(error)
        }
        Ok(0) => Ok(()),
        Ok(1) => {
            let error = instance.guest.call_last_error(&mut instance.store);
            Err(names.said(error.map_err(|e| names.trap("last-error", &e))?))
        }
        Ok(other) => Err(names.bad("run", format!("it answered {other}; 0 is done, 1 an error"))),
    }
}

/// The outputs' true shapes, each within its bound.
fn extents(
    instance: &mut Instance,
    names: &Names<'_>,
    making: &[Making],
    spots: &[Spot],
) -> Result<Vec<Vec<u64>>, InvokeError> {
    debug_assert!(spots.len() >= making.len(), "a spot for each result");
    let extents = instance
        .guest
        .call_extents(&mut instance.store)
        .map_err(|e| names.trap("extents", &e))?;
    if extents.len() != making.len() {
        let (answered, outputs) = (extents.len(), making.len());
        return Err(names.bad(
            "extents",
            format!("{answered} extents for {outputs} outputs"),
        ));
    }
    extents
        .into_iter()
        .zip(making)
        .map(|(extent, making)| {
            let bound = &making.bound().spec.shape;
            let within = extent.shape.len() == bound.len()
                && extent
                    .shape
                    .iter()
                    .zip(bound)
                    .all(|(true_size, most)| true_size <= most);
            if within {
                return Ok(extent.shape);
            }
            let shown = &extent.shape[..extent.shape.len().min(16)];
            Err(names.bad(
                "extents",
                format!(
                    "output `{}` has shape {shown:?}, `open` announced at most {bound:?}",
                    making.port
                ),
            ))
        })
        .collect()
}

fn notes(instance: &mut Instance, names: &Names<'_>) -> Result<Vec<(String, String)>, InvokeError> {
    let notes = instance
        .guest
        .call_notes(&mut instance.store)
        .map_err(|e| names.trap("notes", &e))?;
    if notes.len() > NOTES_MAX {
        return Err(names.bad(
            "notes",
            format!("{} notes, at most {NOTES_MAX} are allowed", notes.len()),
        ));
    }
    Ok(notes
        .into_iter()
        .map(|note| (bounded(note.key), text::lines(note.text, NOTE_BYTES_MAX)))
        .collect())
}

/// Makes a result fit to be mapped: small ones copied out, everything past the tensor zeroed, the
/// file's header and footer around it.
fn finish(
    mut making: Making,
    shape: Vec<u64>,
    spot: &Spot,
    memory: &GuestMemory,
    request: &Request,
    names: &Names<'_>,
    copied: &Copied,
) -> Result<Output, InvokeError> {
    let layout = if making.bound().spec.shape == shape {
        making.layout
    } else {
        let bound = making.bound();
        let column = Column {
            name: making.port.clone(),
            spec: TensorSpec {
                dtype: bound.spec.dtype,
                shape,
            },
            reserve_bytes: bound.length,
        };
        plan(&column).map_err(|e| names.bad("extents", e.to_string()))?
    };
    let tensor = &layout.tensors[0];
    let (offset, length) = (tensor.offset, tensor.length);
    let segment = &mut making.segment;
    let window_end = match spot {
        Spot::Window { bytes, .. } => offset + *bytes as u64,
        Spot::Copy { at, .. } => {
            let true_bytes = usize::try_from(length).map_err(|e| names.host(e.to_string()))?;
            memory
                .with(*at..*at + true_bytes, &[], |bytes| {
                    segment.write_at(offset, bytes, copied)
                })
                .map_err(|e| names.not_own(&e))?
                .map_err(|e| names.memory(e))?;
            offset + length
        }
    };
    let uncounted = Copied::new();
    let padded = window_end.max(layout.footer_offset);
    segment
        .zero(offset + length..padded)
        .map_err(|e| names.memory(e))?;
    segment
        .zero(layout.header.len() as u64..offset.min(GUEST_PAGE))
        .map_err(|e| names.memory(e))?;
    segment
        .write_at(0, &layout.header, &uncounted)
        .map_err(|e| names.memory(e))?;
    segment
        .write_at(layout.footer_offset, &layout.footer, &uncounted)
        .map_err(|e| names.memory(e))?;
    let body = if request.seal {
        Body::Sealed(making.segment.seal().map_err(|e| names.memory(e.error))?)
    } else {
        Body::Result(making.segment)
    };
    Ok(Output {
        port: making.port,
        layout,
        body,
    })
}
