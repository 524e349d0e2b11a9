//! Calling a kernel: what goes in, and what comes out.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use strait_tensor::TensorSpec;

use crate::argument::{CallInput, Given, Param};
use crate::connection::{Beside, Connection, Pending, Reply};
use crate::error::Error;
use crate::lease::Lease;
use crate::output::{self, Output};
use crate::segment::{MappedSegment, OpenSegment};
use crate::session::{Session, check_request_id, milliseconds};
use crate::tensor::TensorView;
use crate::wire::{
    self, Failure, Flight, InlineTensor, Input, Invoke, Limits, Note, Op, Pages, Pipeline, Seconds,
    StageReport,
};

/// A call to be sent: [`Client::call`](crate::Client::call) or
/// [`AsyncClient::call`](crate::AsyncClient::call) begin it, and `C` says which of them sends it.
///
/// It borrows the segments that go in, so that they are not written while it runs.
#[must_use = "a call does nothing until it is sent"]
pub struct Call<'a, C> {
    session: &'a Session,
    invoke: Invoke,
    /// Elements that are still to go into the frame, or into a segment.
    elements: Vec<(String, TensorSpec, &'a [u8])>,
    misfit: Option<Error>,
    leases: Vec<&'a Lease>,
    cancel: CancelHandle,
    client: PhantomData<&'a C>,
}

impl<'a, C> Call<'a, C> {
    pub(crate) fn new(session: &'a Session, kernel: &str) -> Self {
        let invoke = Invoke {
            kernel: kernel.to_owned(),
            lease_ms: session.lease_ms(),
            inline_bytes: Some(session.welcome().inline_bytes).filter(|bytes| *bytes > 0),
            ..Invoke::default()
        };
        Self {
            session,
            invoke,
            elements: Vec::new(),
            misfit: None,
            leases: Vec::new(),
            cancel: CancelHandle::default(),
            client: PhantomData,
        }
    }

    /// Several kernels in the place of one.
    pub(crate) fn of(mut self, pipeline: Pipeline) -> Self {
        self.invoke.pipeline = Some(pipeline);
        self
    }

    /// Gives an input port its tensor. Nobody may write to a segment while the call runs.
    pub fn input(mut self, port: &str, input: impl Into<CallInput<'a>>) -> Self {
        let CallInput { given, lease } = input.into();
        self.leases.extend(lease);
        match given {
            Given::Named(input) => drop(self.invoke.inputs.insert(port.to_owned(), input)),
            Given::Elements(spec, bytes) => self.elements.push((port.to_owned(), spec, bytes)),
            Given::Misfit(error) => self.misfit = self.misfit.or(Some(error)),
        }
        self
    }

    /// Gives a parameter its value. `axis` is 0-based and row-major.
    pub fn param(mut self, name: &str, value: impl Into<Param>) -> Self {
        self.invoke
            .parameters
            .insert(name.to_owned(), value.into().0);
        self
    }

    /// Publishes an output under a name, which must be free unless [`Call::replace`].
    pub fn publish(mut self, port: &str, name: &str) -> Self {
        self.invoke.publish.insert(port.to_owned(), name.to_owned());
        self
    }

    /// Whether [`Call::publish`] may take names from other flights.
    pub fn replace(mut self, replace: bool) -> Self {
        self.invoke.replace = replace;
        self
    }

    /// Whether the outputs are sealed permanently, so that not even the host can write to them again.
    pub fn seal(mut self, seal: bool) -> Self {
        self.invoke.seal = seal;
        self
    }

    /// Whether the outputs are mapped here; if not, each should be published.
    pub fn map(mut self, map: bool) -> Self {
        self.invoke.map = Some(map);
        self
    }

    /// Largest result that comes in the reply and not in a segment that can be passed on; 0: none does. Without this, as
    /// large as the host allows.
    pub fn inline_bytes(mut self, most: u64) -> Self {
        self.invoke.inline_bytes = Some(most).filter(|bytes| *bytes > 0);
        self
    }

    /// Wall time for the call, from the host's receipt on.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.invoke.deadline_ms = Some(milliseconds(deadline));
        self
    }

    /// Lifetime of the results' leases.
    pub fn lease(mut self, life: Duration) -> Self {
        self.invoke.lease_ms = Some(milliseconds(life));
        self
    }

    /// Limits of this call, lower than the host's own.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.invoke.limits = Some(limits);
        self
    }

    /// Slices to cut the rows into, if the kernel can be cut: they run on as many threads as the host has for one call. The
    /// result is the same for any number. Without this, as many as are worth it.
    pub fn threads(mut self, threads: u32) -> Self {
        self.invoke.threads = Some(threads);
        self
    }

    /// Whether the host reads from its own maps which pages the guest saw ([`CallResult::pages`]).
    pub fn verify(mut self, verify: bool) -> Self {
        self.invoke.verify = verify;
        self
    }

    /// A repeat of the same key within a minute gets the same results without another run.
    pub fn idempotency_key(mut self, key: &str) -> Self {
        self.invoke.idempotency_key = Some(key.to_owned());
        self
    }

    /// Id of this call in the host's log and in errors: 1 to 64 characters from
    /// `A-Z a-z 0-9 . _ : -`.
    pub fn request_id(mut self, id: &str) -> Self {
        self.invoke.request_id = Some(id.to_owned());
        self
    }

    /// A handle that ends this call from another thread or task.
    #[must_use]
    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// What can be said before the host is asked.
    fn check(&self) -> Result<(), Error> {
        self.invoke
            .request_id
            .as_deref()
            .map_or(Ok(()), check_request_id)?;
        self.leases.iter().try_for_each(|lease| lease.check())
    }

    /// Brings the elements into the frame, or into segments where they do not fit that.
    async fn take_elements(&mut self) -> Result<(Vec<u8>, Vec<OpenSegment>), Error> {
        let (mut payload, mut segments) = (Vec::new(), Vec::new());
        let elements = std::mem::take(&mut self.elements);
        if elements.is_empty() {
            return Ok((payload, segments));
        }
        let each = self.session.welcome().inline_bytes;
        let room = self.session.connection().payload_room();
        for (port, spec, bytes) in elements {
            let length = bytes.len() as u64;
            let input = if each > 0 && length <= each && bytes.len() <= room - payload.len() {
                let offset = payload.len() as u64;
                payload.extend_from_slice(bytes);
                self.session.count_copied(length);
                let TensorSpec { dtype, shape } = spec;
                let inline = InlineTensor {
                    dtype,
                    shape,
                    offset,
                    length,
                };
                Input::Inline { inline }
            } else {
                let segment = self.session.filled(&port, &spec, bytes).await?;
                let id = segment.mapping().segment.clone();
                segments.push(segment);
                Input::Segment {
                    segment: id,
                    tensor: None,
                }
            };
            self.invoke.inputs.insert(port, input);
        }
        Ok((payload, segments))
    }

    pub(crate) fn session(&self) -> &'a Session {
        self.session
    }

    /// Runs the kernel. Dropping the future cancels it; results that were already under way are
    /// released.
    pub(crate) async fn run(mut self) -> Result<CallResult, Error> {
        if let Some(misfit) = self.misfit.take() {
            return Err(misfit);
        }
        self.check()?;
        if self.invoke.request_id.is_none() {
            self.invoke.request_id = self.session.request_id();
        }
        // The segments are kept until the answer is there.
        let (payload, _segments) = self.take_elements().await?;
        let pending = self.cancel.start(self.session, &self.invoke, &payload)?;
        // Ended on drop too, so that a late cancel cannot hit another call's sequence.
        let _running = Running(&self.cancel);
        CallResult::of(self.session, pending.await?)
    }
}

impl<C> fmt::Debug for Call<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.invoke).finish()
    }
}

/// Ends a call from another thread or task; the call then fails with `CANCELLED`.
#[derive(Clone, Debug, Default)]
pub struct CancelHandle(Arc<Mutex<Phase>>);

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Unsent,
    Running {
        connection: Arc<Connection>,
        sequence: u32,
    },
    Cancelled,
    Done,
}

impl CancelHandle {
    /// Asks the host to end the call, or keeps it from being sent. No effect once it is
    /// answered. Returns at once: the call itself tells how it went.
    pub fn cancel(&self) {
        let mut phase = self.0.lock();
        match &*phase {
            Phase::Unsent => *phase = Phase::Cancelled,
            Phase::Running {
                connection,
                sequence,
            } => connection.cancel(*sequence),
            Phase::Cancelled | Phase::Done => {}
        }
    }

    fn start(&self, session: &Session, invoke: &Invoke, payload: &[u8]) -> Result<Pending, Error> {
        let mut phase = self.0.lock();
        if matches!(*phase, Phase::Cancelled) {
            return Err(cancelled(invoke).into());
        }
        let beside = Beside {
            payload,
            fds: Vec::new(),
        };
        let pending = session.request(Op::Invoke, invoke, beside)?;
        let sequence = pending.sequence();
        *phase = Phase::Running {
            connection: Arc::clone(session.connection()),
            sequence,
        };
        Ok(pending)
    }
}

struct Running<'a>(&'a CancelHandle);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.0.lock() = Phase::Done;
    }
}

fn cancelled(invoke: &Invoke) -> Failure {
    Failure {
        code: "CANCELLED".into(),
        reason: "CANCELLED".into(),
        message: format!(
            "the call of {} was cancelled before it was sent",
            invoke.kernel
        ),
        request_id: invoke.request_id.clone().unwrap_or_else(|| "-".into()),
        backtrace: None,
        details: serde_json::Map::new(),
    }
}

/// How a result came.
enum Came {
    Segment(wire::Mapping, Lease, Option<usize>),
    Inline(wire::InlineResult),
}

/// What a kernel returned.
#[derive(Debug)]
pub struct CallResult {
    /// Each output port with its result, in the kernel's order; after [`Call::map`]`(false)` only those that came in the reply.
    pub results: Vec<(String, Output)>,
    /// The outputs that were published.
    pub published: Vec<Flight>,
    /// The kernel's notes.
    pub notes: Vec<Note>,
    /// Bytes of this call's tensors that the host copied.
    pub copied_bytes: u64,
    /// The pages that the guest saw; filled by [`Call::verify`].
    pub pages: Vec<Pages>,
    /// Page faults of the host's process during the call that needed no I/O.
    pub minor_faults: u64,
    /// Slices of its rows that it ran in; 0: it ran whole.
    pub slices: u64,
    /// Where the time went.
    pub seconds: Seconds,
    /// Of a pipeline: its stages, in order.
    pub stages: Vec<StageReport>,
    /// Names this call in the host's log.
    pub request_id: String,
}

impl CallResult {
    /// Maps what an INVOKE answered.
    fn of(session: &Session, mut reply: Reply) -> Result<Self, Error> {
        let payload = reply.take_payload();
        let (invoked, fds) = reply.read::<wire::Invoked>()?;
        let mut fds: BTreeMap<usize, OwnedFd> = fds.into_iter().enumerate().collect();
        let mut published = Vec::new();
        let mut held = Vec::new();
        // All leases are taken over before the first mapping is tried: a failure releases them.
        for entry in invoked.results {
            let wire::ResultEntry {
                port,
                mapping,
                inline,
                lease,
                expires_ms,
                fd,
                name,
            } = entry;
            let mapping = match (mapping, inline) {
                (Some(mapping), None) => mapping,
                (None, Some(inline)) => {
                    held.push((port, Came::Inline(inline)));
                    continue;
                }
                (Some(_), Some(_)) | (None, None) => {
                    return Err(Error::Protocol(format!(
                        "result {port:?} has neither a mapping nor bytes, or both"
                    )));
                }
            };
            if let Some(name) = name {
                published.push(Flight {
                    name,
                    mapping: mapping.clone(),
                });
            }
            if let (Some(lease), Some(life)) = (lease, expires_ms) {
                held.push((port, Came::Segment(mapping, session.lease(lease, life), fd)));
            }
        }
        let mut results = Vec::with_capacity(held.len());
        for (port, came) in held {
            let (mapping, lease, fd) = match came {
                Came::Segment(mapping, lease, fd) => (mapping, lease, fd),
                Came::Inline(inline) => {
                    let tensor = output::InlineTensor::new(&port, inline, &payload)?;
                    session.count_copied(tensor.bytes().len() as u64);
                    results.push((port, Output::Inline(tensor)));
                    continue;
                }
            };
            let fd = fd.and_then(|index| fds.remove(&index)).ok_or_else(|| {
                Error::Protocol(format!(
                    "result {port:?} came without a descriptor of its own"
                ))
            })?;
            let segment = MappedSegment::new(mapping, lease, fd)?;
            results.push((port, Output::Mapped(segment)));
        }
        Ok(Self {
            results,
            published,
            notes: invoked.notes,
            copied_bytes: invoked.copied_bytes,
            pages: invoked.pages,
            minor_faults: invoked.minor_faults,
            slices: invoked.slices,
            seconds: invoked.seconds,
            stages: invoked.stages,
            request_id: invoked.request_id,
        })
    }

    /// The tensor of an output port.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if the kernel has no such port or it was not mapped.
    pub fn tensor(&self, port: &str) -> Result<TensorView<'_>, Error> {
        match self.results.iter().find(|(name, _)| name == port) {
            Some((_, output)) => output.tensor(),
            None => Err(self.no_port(port)),
        }
    }

    /// Takes an output port's result out, to keep it or to call the next kernel with it.
    ///
    /// # Errors
    /// As [`CallResult::tensor`]; also if it was taken before.
    pub fn take(&mut self, port: &str) -> Result<Output, Error> {
        match self.results.iter().position(|(name, _)| name == port) {
            Some(index) => Ok(self.results.remove(index).1),
            None => Err(self.no_port(port)),
        }
    }

    fn no_port(&self, port: &str) -> Error {
        let known = self.results.iter().map(|(name, _)| name.clone()).collect();
        Error::NoTensor {
            name: port.to_owned(),
            known,
        }
    }
}
