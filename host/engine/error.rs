//! Why an invocation failed, and what its caller is told: the one place where a cause becomes a code, a reason,
//! words and figures.

use std::fmt;
use std::ops::Range;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::json;
use strait_memory::MemoryError;

use super::LoadError;
use super::panicked::Panic;
use super::regions::NotOwn;
use crate::error::{Code, Reason, Status};

/// What was going on when an invocation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Making store and instance.
    Instantiate,
    /// The guest's `describe`.
    Describe,
    /// The guest's `open`, and its answer against the declaration and the limits.
    Open,
    /// Memory for the results.
    Results,
    /// The guest's `reserve`, and where the tensors lie in what it grew.
    Reserve,
    /// The guest's `bind`.
    Bind,
    /// Windows into the guest, small inputs copied in.
    Place,
    /// The guest's `run`, until the windows are home.
    Run,
    /// The guest's `last-error`.
    LastError,
    /// The guest's `extents`.
    Extents,
    /// The guest's `notes`.
    Notes,
    /// Making files of the results.
    Publish,
}

impl Stage {
    /// The guest's function, where it is one; `during` in an error's details.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Instantiate => "instantiate",
            Self::Describe => "describe",
            Self::Open => "open",
            Self::Results => "results",
            Self::Reserve => "reserve",
            Self::Bind => "bind",
            Self::Place => "place",
            Self::Run => "run",
            Self::LastError => "last-error",
            Self::Extents => "extents",
            Self::Notes => "notes",
            Self::Publish => "publish",
        }
    }

    /// This is where it failed.
    pub(super) fn broke(self, cause: impl Into<Cause>) -> Broken {
        Broken {
            stage: self,
            cause: cause.into(),
            rows: None,
        }
    }

    /// The guest broke the contract here.
    pub(super) fn broken_contract(self, how: impl Into<String>) -> Broken {
        self.broke(Cause::Contract(how.into()))
    }

    /// The host failed here.
    pub(super) fn host(self, how: impl Into<String>) -> Broken {
        self.broke(Cause::Host(how.into()))
    }
}

/// An invocation that failed. Nothing of it is left.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failed {
    /// The kernel's name.
    pub kernel: String,
    /// When.
    pub stage: Stage,
    /// Why.
    pub cause: Cause,
    /// Which kernel of a chain it is, from 0 on.
    #[serde(default)]
    pub at: usize,
    /// Rows of axis 0 in which it failed, if it was cut into slices.
    pub rows: Option<Box<Range<u64>>>,
    /// It took the process with it in which it ran: nothing else can have been what ended that. Nobody is told so by another process.
    #[serde(skip)]
    pub took_process: bool,
}

/// Why an invocation failed.
#[derive(Debug, Serialize, Deserialize)]
pub enum Cause {
    /// The plugin's bytes no longer compile.
    Load(Box<LoadError>),
    /// The guest trapped.
    Trap {
        /// wasmtime's words.
        trap: String,
        /// The guest's own.
        panic: Option<Box<Panic>>,
        /// The guest's stack.
        backtrace: Option<String>,
    },
    /// The guest wrote to an input.
    InputWritten {
        /// The input.
        port: String,
        /// The guest's stack: at the store, or where the guest was ended after it.
        backtrace: Option<String>,
        /// Bytes of scrap memory that the guest dirtied; 0 if the store was a trap.
        dirtied_bytes: u64,
    },
    /// The guest broke the contract: how.
    Contract(String),
    /// The kernel said no.
    Refused {
        /// In which way.
        refusal: Refusal,
        /// In the kernel's words.
        reason: String,
        /// Bytes that the kernel handed over.
        diagnostic: Vec<u8>,
    },
    /// It took too long: its milliseconds, from the request on.
    Deadline(u64),
    /// The caller asked for it to end.
    Cancelled,
    /// It asked for more than it may have.
    Limit {
        /// Of what.
        limit: Limit,
        /// Bytes that it needs.
        asked: u64,
        /// Bytes that it may have.
        most: u64,
    },
    /// No memory for it.
    Memory(Box<Status>),
    /// The host's own fault: how.
    Host(String),
    /// The process that ran it is gone.
    Lost,
    /// As many streams as there may be are under way in its process.
    Streams(usize),
    /// It needs more rows at a time than there is room for between the kernels of a chain.
    Stalled,
}

/// How a kernel says no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// An argument of this name (port or parameter) will not do.
    Argument(String),
    /// It cannot do this.
    Unsupported,
    /// It gave up.
    Failed,
}

/// The limits that an invocation can meet, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// The guest's own memory.
    Guest,
    /// Inputs and outputs together.
    Window,
    /// Outputs together.
    Result,
    /// Log lines.
    Log,
    /// What 32-bit addresses reach.
    Wasm32,
}

/// What a wasm32 guest can address, in bytes.
pub(super) const WASM32_BYTES: u64 = 1 << 32;

impl Failed {
    /// The invocation of `kernel` was cancelled.
    #[must_use]
    pub fn cancelled(kernel: &str) -> Self {
        Stage::Run.broke(Cause::Cancelled).of(kernel)
    }

    /// `kernel` ran until its deadline, `deadline_ms` after the request.
    #[must_use]
    pub fn late(kernel: &str, deadline_ms: u64) -> Self {
        Stage::Run.broke(Cause::Deadline(deadline_ms)).of(kernel)
    }

    /// `kernel` failed at `stage`.
    #[must_use]
    pub fn new(kernel: &str, stage: Stage, cause: impl Into<Cause>) -> Self {
        stage.broke(cause).of(kernel)
    }
}

impl std::error::Error for Failed {}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tell(f)?;
        match &self.rows {
            Some(rows) => write!(f, " (in rows {} to {})", rows.start, rows.end),
            None => Ok(()),
        }
    }
}

impl Failed {
    fn tell(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kernel, during) = (&self.kernel, self.stage.name());
        match &self.cause {
            Cause::Load(error) => write!(f, "{error}"),
            Cause::Trap { trap, panic, .. } => {
                write!(f, "kernel `{kernel}` trapped in `{during}`: ")?;
                match panic {
                    Some(panic) => write!(f, "{panic}")?,
                    None => f.write_str(trap)?,
                }
                f.write_str("; this is the plugin's bug, its author will want the backtrace")
            }
            Cause::InputWritten { port, .. } => write!(
                f,
                "kernel `{kernel}` wrote to its input `{port}`; inputs are read-only, the tensor is unchanged"
            ),
            Cause::Contract(how) => {
                write!(
                    f,
                    "kernel `{kernel}` broke the contract in `{during}`: {how}"
                )
            }
            Cause::Refused {
                refusal, reason, ..
            } => match refusal {
                Refusal::Argument(name) => {
                    write!(f, "kernel `{kernel}` refuses `{name}`: {reason}")
                }
                Refusal::Unsupported => {
                    write!(f, "kernel `{kernel}` does not support this: {reason}")
                }
                Refusal::Failed => write!(f, "kernel `{kernel}` failed: {reason}"),
            },
            Cause::Deadline(ms) => write!(
                f,
                "kernel `{kernel}` was stopped at its deadline of {ms} ms; raise the deadline or give it less data"
            ),
            Cause::Cancelled => write!(f, "the invocation of kernel `{kernel}` was cancelled"),
            Cause::Limit { limit, asked, most } => match limit {
                Limit::Guest => write!(
                    f,
                    "kernel `{kernel}` asked for {asked} bytes of memory of its own, the limit is {most}; raise guest_bytes or give it less data"
                ),
                Limit::Window => write!(
                    f,
                    "inputs and outputs of kernel `{kernel}` need {asked} bytes of windows, the limit is {most}; raise window_bytes or cut the tensors"
                ),
                Limit::Result => write!(
                    f,
                    "kernel `{kernel}` announced outputs of {asked} bytes, the limit is {most}; raise result_bytes or give it less data"
                ),
                Limit::Log => write!(
                    f,
                    "kernel `{kernel}` logged {asked} bytes, the limit is {most}; raise log_bytes or make it quieter"
                ),
                Limit::Wasm32 => write!(
                    f,
                    "inputs and outputs of kernel `{kernel}` need {asked} bytes, but a wasm32 guest has 4 GiB ({most} bytes) of addresses for them and its own memory; cut the tensors"
                ),
            },
            Cause::Memory(status) => {
                let message = &status.message;
                write!(f, "no memory for kernel `{kernel}`: {message}")?;
                match self.stage {
                    // A guest's addresses, which count before they are used.
                    Stage::Reserve => f.write_str(
                        "; a worker process has at most workers.memory_bytes of its own: raise that, or run fewer kernels at a time",
                    ),
                    _ => Ok(()),
                }
            }
            Cause::Host(how) => {
                write!(f, "the host failed while running kernel `{kernel}`: {how}")
            }
            Cause::Streams(most) => write!(
                f,
                "kernel `{kernel}` cannot stream now: {most} streams are under way in its worker process, and no more may be; finish or drop one, or have the operator raise workers.streams"
            ),
            Cause::Stalled => write!(
                f,
                "kernel `{kernel}` needs more rows at a time than there is room for between two kernels"
            ),
            Cause::Lost => write!(
                f,
                "the worker process that ran kernel `{kernel}` ended before it was done; nothing of the invocation is left, ask again"
            ),
        }
    }
}

impl From<Failed> for Status {
    fn from(failed: Failed) -> Self {
        let message = failed.to_string();
        let rows = failed.rows.clone();
        let status = |code, reason| match &rows {
            Some(rows) => {
                Self::new(code, reason, message.clone()).with("rows", json!([rows.start, rows.end]))
            }
            None => Self::new(code, reason, message.clone()),
        };
        match failed.cause {
            Cause::Load(error) => (*error).into(),
            Cause::Trap {
                panic, backtrace, ..
            } => {
                let mut status =
                    status(Code::Internal, Reason::GuestTrap).with("during", failed.stage.name());
                if let Some(panic) = panic {
                    let Panic {
                        message,
                        file,
                        line,
                    } = *panic;
                    let panic = json!({"message": message, "file": file, "line": line});
                    status = status.with("panic", panic);
                }
                status.backtrace = backtrace;
                status
            }
            Cause::InputWritten {
                port,
                backtrace,
                dirtied_bytes,
            } => {
                let mut status = status(Code::Internal, Reason::InputWritten)
                    .with("port", port)
                    .with("dirtied_bytes", dirtied_bytes);
                status.backtrace = backtrace;
                status
            }
            Cause::Contract(_) => {
                status(Code::Internal, Reason::BadAnswer).with("during", failed.stage.name())
            }
            Cause::Refused {
                refusal,
                diagnostic,
                ..
            } => {
                let mut status = match refusal {
                    Refusal::Argument(name) => {
                        status(Code::InvalidArgument, Reason::BadParameter).with("name", name)
                    }
                    Refusal::Unsupported => status(Code::InvalidArgument, Reason::Unsupported),
                    Refusal::Failed => status(Code::Internal, Reason::KernelFailed),
                };
                if !diagnostic.is_empty() {
                    // Whole: half of it might say the opposite. The engine bounds it.
                    let text = BASE64_STANDARD.encode(diagnostic).into();
                    status.details.insert("diagnostic".to_owned(), text);
                }
                status
            }
            Cause::Deadline(ms) => {
                status(Code::DeadlineExceeded, Reason::Deadline).with("deadline_ms", ms)
            }
            Cause::Cancelled => status(Code::Cancelled, Reason::Cancelled),
            Cause::Limit { limit, asked, most } => {
                let reason = match limit {
                    Limit::Guest => Reason::LimitGuestBytes,
                    Limit::Window => Reason::LimitWindowBytes,
                    Limit::Result => Reason::LimitResultBytes,
                    Limit::Log => Reason::LimitLogBytes,
                    Limit::Wasm32 => Reason::LimitWasm32,
                };
                status(Code::ResourceExhausted, reason)
                    .with("asked", asked)
                    .with("limit", most)
            }
            Cause::Memory(status) => Self { message, ..*status },
            // Whoever runs a chain runs its kernels one by one then.
            Cause::Host(_) | Cause::Stalled => status(Code::Internal, Reason::Host),
            Cause::Streams(most) => {
                status(Code::ResourceExhausted, Reason::QuotaExceeded).with("limit", most)
            }
            Cause::Lost => status(Code::Unavailable, Reason::WorkerLost),
        }
    }
}

/// A failure of which the kernel's name is still to be told: what the steps of an invocation return.
#[derive(Debug)]
pub(super) struct Broken {
    stage: Stage,
    pub(super) cause: Cause,
    rows: Option<Box<Range<u64>>>,
}

impl Broken {
    /// It failed in a slice of these `rows`.
    pub(super) fn in_rows(mut self, rows: Range<u64>) -> Self {
        self.rows = Some(Box::new(rows));
        self
    }

    pub(super) fn of(self, kernel: &str) -> Failed {
        Failed {
            kernel: kernel.to_owned(),
            stage: self.stage,
            cause: self.cause,
            at: 0,
            rows: self.rows,
            took_process: false,
        }
    }

    /// The guest's stack, of a trap.
    pub(super) fn into_backtrace(self) -> Option<String> {
        match self.cause {
            Cause::Trap { backtrace, .. } => backtrace,
            _ => None,
        }
    }
}

impl From<MemoryError> for Cause {
    fn from(error: MemoryError) -> Self {
        Self::Memory(Box::new(error.into()))
    }
}

/// A range that the host itself computed is not the guest's own.
impl From<NotOwn> for Cause {
    fn from(error: NotOwn) -> Self {
        Self::Host(error.to_string())
    }
}

#[cfg(test)]
mod tests;
