//! Kernels that are made ready once and called again and again.
//!
//! ```text
//! Preparing (checked) ── prepare: a turn, open, bind ──▶ Prepared ── call: a turn, run, answer, renew ──▶ …
//! ```
//! Both are for a thread that has nothing else to do: they wait for a turn among all invocations, and work on that thread.
//! What makes a kernel ready again is done within the turn of the call before it, but after the answer.

mod travelling;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use strait_memory::{Charge, SharedPages};
use strait_protocol::{self as wire, PreparedInput, PreparedTensor, SIZES_BYTES};
use strait_tensor::{TensorPlace, TensorSpec};

use super::caller::Caller;
use super::channel::{ChannelPlan, OpenChannel};
use super::pipeline::ReadyPipeline;
use super::prepare::{Checked, Deadline, Framed};
use super::run::still_waiting;
use super::workers::{NoTurn, OwnTurn};
use crate::engine::{Brought, CancelToken, Done, Failed, FramePart, InlineRoom, OutputBody, Ready};
use crate::error::{Code, Reason, Status};
use crate::lease::SessionId;
use crate::plugin::{ITEMS_MAX, KernelRef};

use travelling::{ToPrepare, check_stream, framed_place, placed, within};

/// What brings a PREPARE, and then what it is called with.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// Frames, of a connection to the data socket those of a session, whose leased segments may be inputs by id.
    Frames(Option<SessionId>),
    /// Batches.
    Batches,
}

/// What a PREPARE asks for, checked.
#[derive(Debug)]
pub struct Preparing {
    caller: Caller,
    /// What is prepared, in messages.
    name: String,
    checked: Checked<ToPrepare>,
    deadline: Deadline,
    inputs: Vec<PreparedTensor>,
    request_bytes: u64,
    streams: bool,
    channel: Option<ChannelPlan>,
    ring: bool,
    in_frames: bool,
}

/// A kernel that can be called.
#[derive(Debug)]
pub struct Prepared {
    pub(super) caller: Caller,
    /// Of a pipeline: its last.
    pub(super) kernel: KernelRef,
    pipeline: Option<Arc<ReadyPipeline>>,
    request_id: Arc<str>,
    pub(super) deadline_ms: u64,
    /// Of all inputs, and whether a call brings them.
    specs: Vec<(TensorSpec, bool)>,
    inputs: Vec<PreparedTensor>,
    request_bytes: u64,
    /// It takes chunks, and not calls.
    streams: bool,
    /// Its calls come through a ring.
    ring: bool,
    /// What travels does so in frames of the data socket, and is counted here.
    in_frames: bool,
    outputs: Vec<PreparedTensor>,
    reply_bytes: u64,
    /// Where what comes of it goes, if not to whoever calls it.
    channel: Option<OpenChannel>,
    // One call at a time.
    pub(super) ready: Mutex<Box<dyn Ready>>,
    // Of frames, and of memory that waits.
    _charges: (Option<Charge>, Charge),
}

/// What a call has given.
#[derive(Debug)]
pub struct Called {
    /// The payload of the OK to it, in parts.
    pub payload: Vec<Vec<u8>>,
    /// What the kernel had to say: (key, text).
    pub notes: Vec<(String, String)>,
}

impl Caller {
    /// Checks what a PREPARE from `origin` asks for. Inputs and results that travel have `room` bytes each way.
    ///
    /// # Errors
    /// What it is answered.
    pub fn preparing(
        &self,
        origin: Origin,
        request: wire::Prepare,
        room: u64,
        request_id: Arc<str>,
        cancel: CancelToken,
    ) -> Result<Preparing, Status> {
        let framed = match origin {
            Origin::Frames(session) => Some(Framed {
                session,
                payload: &[],
                room,
            }),
            Origin::Batches => None,
        };
        let mut invoke = wire::Invoke {
            kernel: request.kernel,
            parameters: request.parameters,
            deadline_ms: request.deadline_ms,
            limits: request.limits,
            ..wire::Invoke::default()
        };
        let deadline = self.host.deadline(&invoke)?;
        let mut resolved = BTreeMap::new();
        for (port, input) in request.inputs.into_iter().take(ITEMS_MAX + 1) {
            let found = match input {
                PreparedInput::Spec { dtype, shape } => {
                    framed_place(&port, TensorSpec { dtype, shape })
                }
                PreparedInput::Fixed(wire::Input::Inline { .. }) => {
                    let port = crate::text::name(&port);
                    let how =
                        format!("input `{port}`: PREPARE takes no bytes; give its dtype and shape");
                    Err(Status::new(Code::InvalidArgument, Reason::BadInput, how))
                }
                PreparedInput::Fixed(input) => self.resolve(framed, &port, &input),
            };
            resolved.insert(port, found);
        }
        let asked = self.asked(&invoke.kernel, None)?;
        let name = asked.name(&invoke.kernel);
        let outputs = match asked.pipeline().filter(|_| !request.stream) {
            Some(pipeline) => self.declared(pipeline)?.outputs.len(),
            None => {
                let kernel = self.kernel_to_stream(&invoke.kernel)?;
                if request.stream {
                    if request.ring {
                        let message = "chunks of a stream do not go through a ring; leave out `ring`, or call the kernel with whole tensors";
                        return Err(Status::new(
                            Code::InvalidArgument,
                            Reason::Unsupported,
                            message,
                        ));
                    }
                    check_stream(kernel.kernel(), &resolved)?;
                }
                kernel.kernel().outputs.len()
            }
        };
        let channel = match request.channel {
            Some(_) if !request.stream => {
                let message = "`channel` is for what comes in chunks; set `stream`";
                return Err(Status::new(
                    Code::InvalidArgument,
                    Reason::BadRequest,
                    message,
                ));
            }
            Some(asked) => Some(ChannelPlan::new(asked, self.host.config.stall())?),
            None => None,
        };
        let together = room.saturating_sub((outputs * SIZES_BYTES) as u64);
        // What is larger is refused as such, as if the host's own limit were that.
        let limits = invoke.limits.get_or_insert_default();
        let most = self.host.config.limits.limits().result_bytes;
        if limits.result_bytes.is_none_or(|asked| asked <= most) {
            limits.result_bytes = Some(limits.result_bytes.unwrap_or(most).min(together));
        }
        let inline = InlineRoom {
            each: together,
            together,
        };
        let checked = match asked.pipeline() {
            None => self
                .check(Some(inline), invoke, resolved, deadline, request_id, cancel)?
                .map(|(job, means)| ToPrepare::Kernel(Box::new(job), means)),
            Some(pipeline) => {
                let ids = (request_id, cancel);
                let inline = Some(inline);
                self.check_pipeline(pipeline, inline, &mut invoke, resolved, deadline, ids)?
                    .map(|piped| ToPrepare::Pipeline(Box::new(piped)))
            }
        };
        let (inputs, request_bytes) = placed(checked.work.brought().into_iter())?;
        if request_bytes > room {
            let message = format!(
                "the inputs that each CALL brings have {request_bytes} bytes together, and a frame has room for {room}; \
                 give large ones as flights or segments, or use INVOKE"
            );
            return Err(
                Status::new(Code::InvalidArgument, Reason::BadInput, message)
                    .with("asked", request_bytes)
                    .with("limit", room),
            );
        }
        Ok(Preparing {
            caller: self.clone(),
            name,
            checked,
            deadline,
            inputs,
            request_bytes,
            streams: request.stream,
            channel,
            ring: request.ring,
            in_frames: framed.is_some(),
        })
    }

    /// Waits for a turn for work on the calling thread.
    pub(super) fn turn(
        &self,
        kernel: &str,
        deadline: Deadline,
        cancel: &CancelToken,
    ) -> Result<OwnTurn, Status> {
        let share = self.account.invocations();
        self.account.check_cpu(deadline.at, deadline.ms)?;
        let workers = self.host.workers.lock();
        let place = match workers.as_ref() {
            None => return Err(super::draining()),
            Some(workers) => match workers.begin(share) {
                Some(turn) => return Ok(turn),
                None => workers.reserve(share)?,
            },
        };
        drop(workers);
        place.wait(deadline.at, cancel).map_err(|none| match none {
            NoTurn::Late => still_waiting(kernel, deadline.ms, share.cpu().over().as_ref()),
            NoTurn::Cancelled => Failed::cancelled(kernel).into(),
            NoTurn::Ended => super::draining(),
        })
    }
}

impl Preparing {
    /// Has the kernel told all but the elements. Blocks.
    ///
    /// # Errors
    /// What the PREPARE is answered.
    pub fn prepare(self) -> Result<Prepared, Status> {
        let Self {
            caller,
            name,
            checked,
            deadline,
            mut inputs,
            request_bytes,
            streams,
            channel,
            ring,
            in_frames,
        } = self;
        let Checked { work, charge, .. } = checked;
        let (request_id, cancel) = work.ids();
        let _turn = caller.turn(&name, deadline, &cancel)?;
        let (kernel, specs, ready, pipeline) = match work {
            ToPrepare::Kernel(job, means) => {
                let kernel = job.kernel.clone();
                // As the declaration has them.
                let ports = job.inputs.iter().zip(&means.inputs);
                let ports = ports.filter(|(_, source)| source.is_inline());
                for (tensor, (input, _)) in inputs.iter_mut().zip(ports) {
                    tensor.port.clone_from(&input.port);
                }
                let specs = job.inputs.iter().zip(&means.inputs);
                let specs =
                    specs.map(|(input, source)| (input.place.spec.clone(), source.is_inline()));
                let specs = specs.collect();
                caller.check_in_service(&kernel.plugin)?;
                let prepared = Arc::clone(&caller.host.runner).prepare(*job, means);
                let ready =
                    prepared.inspect_err(|failed| caller.note_cost(&kernel.plugin, failed))?;
                (kernel, specs, ready, None)
            }
            ToPrepare::Pipeline(piped) => {
                let kernel = piped.last_kernel().cloned();
                let none = || Status::new(Code::Internal, Reason::Host, "a pipeline of nothing");
                let (ready, pipeline) = caller.prepare_pipeline(*piped, name.clone())?;
                (kernel.ok_or_else(none)?, Vec::new(), ready, Some(pipeline))
            }
        };
        let largest: Vec<_> = ready
            .outputs()
            .into_iter()
            .map(|(name, spec)| {
                let length = spec.bytes().unwrap_or(u64::MAX);
                TensorPlace {
                    name,
                    spec,
                    offset: 0,
                    length,
                }
            })
            .collect();
        let (outputs, reply_bytes) = placed(largest.iter())?;
        let kept = channel.as_ref().map_or(0, |plan| plan.bytes(reply_bytes));
        let waiting = ready.waiting_bytes().saturating_add(reply_bytes);
        let memory = caller.charge(waiting.saturating_add(kept))?;
        let channel = channel
            .map(|plan| caller.open_channel(plan, &name, outputs.clone(), reply_bytes))
            .transpose()?;
        Ok(Prepared {
            deadline_ms: deadline.ms,
            caller,
            kernel,
            pipeline,
            request_id,
            specs,
            inputs,
            request_bytes,
            streams,
            ring,
            in_frames,
            outputs,
            reply_bytes,
            channel,
            ready: Mutex::new(ready),
            _charges: (charge, memory),
        })
    }
}

impl Prepared {
    /// Memory for its ring, and where what is in that; none if it was not asked for.
    ///
    /// # Errors
    /// What the PREPARE is answered.
    pub fn ring(&self) -> Result<Option<(wire::Ring, SharedPages)>, Status> {
        // No payload is longer than a frame's.
        let layout = wire::Ring::of(self.request_bytes, self.reply_bytes).filter(|_| self.ring);
        let create = |layout: wire::Ring| {
            let bytes = usize::try_from(layout.bytes).unwrap_or(usize::MAX);
            let budget = self.caller.account().segments();
            Ok((layout, SharedPages::create(bytes, budget)?))
        };
        layout.map(create).transpose()
    }

    /// What the PREPARE is answered, as number `prepared`.
    #[must_use]
    pub fn to_wire(&self, prepared: u64, ring: Option<wire::Ring>) -> wire::Prepared {
        // Nothing of a channel's comes back here.
        let (reply_bytes, outputs) = match self.channel {
            Some(_) => (0, Vec::new()),
            None => (self.reply_bytes, self.outputs.clone()),
        };
        wire::Prepared {
            prepared,
            request_bytes: self.request_bytes,
            inputs: self.inputs.clone(),
            reply_bytes,
            outputs,
            ring,
            request_id: self.request_id.to_string(),
        }
    }

    /// Length of each CALL's payload in bytes.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        self.request_bytes
    }

    /// Names its calls in errors and log lines.
    #[must_use]
    pub fn request_id(&self) -> &Arc<str> {
        &self.request_id
    }

    /// The channel that what comes of it goes to.
    #[must_use]
    pub fn channel(&self) -> Option<&OpenChannel> {
        self.channel.as_ref()
    }

    /// Whether it takes chunks and not calls.
    #[must_use]
    pub fn streams(&self) -> bool {
        self.streams
    }

    /// Runs the kernel on what `payload` of `frame` brings, hands the outcome to `answer`, and makes it ready for the next
    /// call. Blocks.
    pub fn call(
        &self,
        frame: &Arc<Vec<u8>>,
        payload: Range<usize>,
        cancel: &CancelToken,
        answer: impl FnOnce(Result<Called, Status>),
    ) {
        let deadline = Deadline::after(self.deadline_ms);
        let begun = self.brought(frame, payload).and_then(|brought| {
            self.caller.host.admit()?;
            let kernels = match &self.pipeline {
                Some(pipeline) => pipeline.kernels().collect(),
                None => vec![&self.kernel],
            };
            for kernel in &kernels {
                self.caller.check_call(kernel)?;
            }
            let turn = self.caller.turn(self.name(), deadline, cancel)?;
            // Others of its calls may have been the last straw meanwhile.
            for kernel in kernels {
                self.caller.check_in_service(&kernel.plugin)?;
            }
            Ok((brought, turn))
        });
        let (brought, _turn) = match begun {
            Ok(begun) => begun,
            Err(status) => return answer(Err(status)),
        };
        let mut ready = self.ready.lock();
        let done = ready.run(brought, deadline.at, cancel);
        let done = done.map_err(|failed| self.failed(failed));
        let result = done.and_then(|done| self.called(done));
        if let Err(status) = &result {
            self.warn(status);
        }
        answer(result);
        self.renew(&mut **ready);
    }

    /// Makes it ready for its next call, within the turn of the last one.
    pub(super) fn renew(&self, ready: &mut dyn Ready) {
        if let Err(failed) = ready.renew() {
            self.failed(failed);
        }
    }

    /// Notes what a failure cost; what is told of it.
    fn failed(&self, failed: Failed) -> Status {
        let pipeline = self.pipeline.as_ref();
        let plugin = pipeline.map_or(&self.kernel.plugin, |pipeline| pipeline.failing());
        self.caller.note_cost(plugin, &failed);
        match pipeline {
            Some(pipeline) => pipeline.told(failed),
            None => failed.into(),
        }
    }

    pub(super) fn warn(&self, status: &Status) {
        tracing::warn!(
            request_id = &*self.request_id,
            kernel = self.name(),
            code = status.code.name(),
            reason = status.reason.name(),
            message = status.message,
            "prepared call failed"
        );
    }

    /// The inputs that a CALL brings.
    pub(super) fn brought(
        &self,
        frame: &Arc<Vec<u8>>,
        payload: Range<usize>,
    ) -> Result<Vec<Brought>, Status> {
        let refused = |reason, message| Status::new(Code::InvalidArgument, reason, message);
        if payload.len() as u64 != self.request_bytes {
            let message = format!(
                "a payload of {} bytes; each CALL of this PREPARE has {}",
                payload.len(),
                self.request_bytes
            );
            return Err(refused(Reason::BadFrame, message));
        }
        let bytes = frame.get(payload.clone()).unwrap_or_default();
        let (sizes, _) = bytes.as_chunks::<SIZES_BYTES>();
        let mut all = Vec::with_capacity(self.inputs.len());
        for (tensor, sizes) in self.inputs.iter().zip(sizes) {
            let shape = wire::shape(sizes, tensor.shape.len());
            let Some(shape) = shape.filter(|shape| within(shape, &tensor.shape)) else {
                let (port, shape) = (&tensor.port, &tensor.shape);
                let message = format!(
                    "input `{port}`: the sizes in the CALL are not within those that were prepared, {shape:?}; prepare a larger shape by itself"
                );
                return Err(refused(Reason::BadInput, message));
            };
            if self.streams && shape.get(1..) != tensor.shape.get(1..) {
                let (port, shape) = (&tensor.port, &tensor.shape);
                let message = format!(
                    "input `{port}`: a row of a chunk has the sizes that were prepared, {shape:?} without the first"
                );
                return Err(refused(Reason::BadInput, message));
            }
            let elements = shape.iter().product::<u64>() * tensor.dtype.size();
            let part = usize::try_from(tensor.offset).ok().and_then(|offset| {
                let from = payload.start + offset;
                let to = from + usize::try_from(elements).ok()?;
                FramePart::new(frame, from..to)
            });
            let elements = part.ok_or_else(|| {
                refused(Reason::BadFrame, "a tensor beyond the payload".to_owned())
            })?;
            if self.in_frames {
                self.caller.host.framed.inputs.add(elements.len() as u64);
            }
            all.push(Brought { shape, elements });
        }
        // Of a stream only rows differ, and those may be cut anywhere.
        if !self.streams && self.pipeline.is_none() {
            self.check_axes(&all)?;
        }
        Ok(all)
    }

    /// Whether what a call brings fits together, and with what does not change.
    fn check_axes(&self, brought: &[Brought]) -> Result<(), Status> {
        let mut brought = brought.iter();
        let specs: Vec<_> = self
            .specs
            .iter()
            .map(
                |(spec, is_brought)| match is_brought.then(|| brought.next()) {
                    Some(Some(brought)) => TensorSpec {
                        dtype: spec.dtype,
                        shape: brought.shape.clone(),
                    },
                    Some(None) | None => spec.clone(),
                },
            )
            .collect();
        let fits = self.kernel.kernel().axes_fit(&specs, []);
        fits.map_err(|(port, how)| {
            let message = format!("input `{}` of kernel `{}`: {how}", port.name, self.name());
            Status::new(Code::InvalidArgument, Reason::BadInput, message)
        })
    }

    pub(super) fn name(&self) -> &str {
        match &self.pipeline {
            Some(pipeline) => &pipeline.name,
            None => &self.kernel.kernel().name,
        }
    }

    fn called(&self, done: Done) -> Result<Called, Status> {
        let outputs = done.outputs.into_iter().map(|output| match output.body {
            OutputBody::Inline { spec, bytes } => Some((spec, bytes)),
            OutputBody::Segment { .. } => None,
        });
        let outputs: Option<Vec<_>> = outputs.collect();
        Ok(Called {
            payload: self.payload(outputs.unwrap_or_default())?,
            notes: done.report.notes,
        })
    }

    /// The payload of a reply with `outputs`, in parts.
    pub(super) fn payload(
        &self,
        outputs: Vec<(TensorSpec, Vec<u8>)>,
    ) -> Result<Vec<Vec<u8>>, Status> {
        let lost = || {
            Status::new(
                Code::Internal,
                Reason::Host,
                "a prepared call left no bytes",
            )
        };
        if outputs.len() != self.outputs.len() {
            return Err(lost());
        }
        let mut sizes = Vec::with_capacity(outputs.len() * SIZES_BYTES);
        let mut payload = vec![Vec::new()];
        for ((spec, mut bytes), tensor) in outputs.into_iter().zip(&self.outputs) {
            if !within(&spec.shape, &tensor.shape) {
                let message = format!(
                    "kernel `{}` gave output `{}` the sizes {:?}, and for the largest inputs it said {:?}; the plugin must not give more for less",
                    self.name(),
                    tensor.port,
                    spec.shape,
                    tensor.shape
                );
                return Err(Status::new(Code::Internal, Reason::BadAnswer, message));
            }
            sizes.extend(wire::sizes(&spec.shape));
            if self.in_frames {
                self.caller.host.framed.results.add(bytes.len() as u64);
            }
            let room = wire::padded(tensor.length).and_then(|room| usize::try_from(room).ok());
            bytes.resize(room.ok_or_else(lost)?, 0);
            payload.push(bytes);
        }
        payload[0] = sizes;
        Ok(payload)
    }
}
