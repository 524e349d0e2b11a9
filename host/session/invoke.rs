//! The way of an invocation: prepare, queue, run, publish.

use std::sync::Arc;
use std::time::Instant;

use strait_protocol as wire;

use super::answer::{Answer, InlineBytes, Invoked, InvokedResult, Outputs, ResultBody};
use super::caller::Caller;
use super::idempotency::{Fingerprint, Turn};
use super::pipeline::{Asked, Piped, Ran};
use super::prepare::{Checked, Deadline, Framed, Naming, Resolved};
use super::run::{Call, Given, Run};
use super::{Host, check_id};
use crate::engine::{CancelToken, Done, InlineRoom, Job, Means, OutputBody, Used};
use crate::error::{Code, Reason, Status};

/// What a request asks to be run.
enum Work {
    Kernel(Box<(Job, Means)>),
    Pipeline(Box<Piped>),
}

/// What is to become of results.
struct After {
    naming: Naming,
    /// The answer comes with leases and descriptors.
    mapped: bool,
    queue_seconds: f64,
}

impl Work {
    fn request_id(&self) -> Arc<str> {
        Arc::clone(match self {
            Self::Kernel(work) => &work.0.request_id,
            Self::Pipeline(piped) => piped.request_id(),
        })
    }
}

/// What else is to know of a run's outcome; none if there is no result.
type Keep<T> = Box<dyn FnOnce(&Arc<Run<T>>, Option<&T>) + Send>;

/// Brings a run to its end, even if the worker that runs it is lost.
struct Ending<T: Given> {
    run: Arc<Run<T>>,
    keep: Option<Keep<T>>,
}

impl<T: Given> Ending<T> {
    fn end(mut self, result: Result<T, Status>) {
        self.tell(Some(result));
    }

    fn tell(&mut self, result: Option<Result<T, Status>>) {
        if let Some(keep) = self.keep.take() {
            let outcome = result.as_ref().and_then(|result| result.as_ref().ok());
            keep(&self.run, outcome);
        }
        self.run.end(result);
    }
}

impl<T: Given> Drop for Ending<T> {
    fn drop(&mut self) {
        // After `end` nobody is left to be answered.
        self.tell(None);
    }
}

impl Caller {
    /// Starts an invocation; `answer` gets its outcome, on a worker thread or at once.
    ///
    /// `framed` is there for one that came in a frame.
    pub fn invoke(
        &self,
        framed: Option<Framed<'_>>,
        mut invoke: wire::Invoke,
        request_id: Arc<str>,
        answer: Answer,
    ) -> Call {
        let begun = self.host.deadline(&invoke).and_then(|deadline| {
            let asked = self.asked(&invoke.kernel, invoke.pipeline.clone())?;
            // Before anything is repeated: a repeat, too, is refused what cannot travel to it.
            let room = self.inline_room(framed, &invoke)?;
            let key = invoke.idempotency_key.take();
            if let Some(key) = &key {
                check_id("idempotency_key", key)?;
            }
            Ok((
                deadline,
                room,
                key.map(|key| (self.principal().clone(), key)),
                asked,
            ))
        });
        let (mut deadline, room, key, asked) = match begun {
            Ok(begun) => begun,
            Err(status) => {
                answer.give(Err(status));
                return Call::answered();
            }
        };
        let own = deadline;
        let leases = framed.is_some_and(|framed| framed.session.is_some());
        let mapped = leases && invoke.map.unwrap_or(true);
        let name = asked.name(&invoke.kernel);
        let inputs = self.resolve_all(framed, &invoke);
        let (run, call) = match &key {
            None => Run::begin(&name, answer, own.ms),
            Some(key) => {
                let fingerprint = Fingerprint::of(&invoke, &inputs);
                match self
                    .host
                    .idempotency
                    .begin(key, fingerprint, &name, own.ms, answer)
                {
                    Turn::Answered => return Call::answered(),
                    Turn::Joined(run, call) => {
                        run.watch(&call, &self.host.deadlines, own.at);
                        return call;
                    }
                    // Each caller's own deadline is watched; the run lasts as long as anybody waits.
                    Turn::First(run, call) => {
                        deadline = Deadline::after(self.host.config.limits.deadline_ms_max);
                        run.watch(&call, &self.host.deadlines, own.at);
                        (run, call)
                    }
                }
            }
        };
        let keep = key.map(|key| -> Keep<Arc<Invoked>> {
            let host = Arc::clone(&self.host);
            Box::new(move |run, outcome| host.idempotency.finish(&key, run, outcome))
        });
        let ending = Ending { run, keep };
        let ids = (request_id, ending.run.cancel_token());
        match self.checked(&asked, room, invoke, inputs, deadline, ids) {
            Ok(checked) => {
                let caller = self.clone();
                self.queue(ending, deadline, &call, own, move |queue_seconds| {
                    let (result, used) = caller.run(checked, &name, mapped, queue_seconds);
                    (result.map(Arc::new), used)
                });
            }
            Err(status) => ending.end(Err(status)),
        }
        call
    }

    /// Ends the invocation that runs or waits under that idempotency key, for all of this principal's who wait for it; false
    /// if there is none.
    ///
    /// # Errors
    /// `BAD_REQUEST` for a key that is none.
    pub fn cancel_keyed(&self, key: &str) -> Result<bool, Status> {
        check_id("idempotency_key", key)?;
        let key = (self.principal().clone(), key.to_owned());
        Ok(self.host.idempotency.cancel(&key))
    }

    /// Forgets the answer that is kept for repeats under that idempotency key; false if there is none.
    pub fn forget_answer(&self, key: &str) -> bool {
        let key = (self.principal().clone(), key.to_owned());
        self.host.idempotency.forget(&key)
    }

    /// Runs an invocation to its end. Blocks.
    ///
    /// # Errors
    /// What it is answered.
    pub fn invoke_and_wait(
        &self,
        invoke: wire::Invoke,
        request_id: Arc<str>,
    ) -> Result<Arc<Invoked>, Status> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let answer = Answer::new(move |result| {
            // It is received below, whatever happens.
            let _ = sender.send(result);
        });
        self.invoke(None, invoke, request_id, answer);
        let lost = |_| Status::new(Code::Internal, Reason::Host, "an invocation was lost");
        receiver.recv().map_err(lost)?
    }

    /// Starts what finds out the outputs that an invocation would have, by `open` alone: for `GetSchema`. It
    /// waits, runs and counts as an invocation does.
    pub fn open_only(
        &self,
        invoke: wire::Invoke,
        request_id: Arc<str>,
        answer: Answer<Outputs>,
    ) -> Call {
        let begun = self.host.deadline(&invoke).and_then(|deadline| {
            let asked = self.asked(&invoke.kernel, invoke.pipeline.clone())?;
            Ok((deadline, self.inline_room(None, &invoke)?, asked))
        });
        let (deadline, room, asked) = match begun {
            Ok(begun) => begun,
            Err(status) => {
                answer.give(Err(status));
                return Call::answered();
            }
        };
        let (run, call) = Run::begin(&asked.name(&invoke.kernel), answer, deadline.ms);
        let inputs = self.resolve_all(None, &invoke);
        let ids = (request_id, run.cancel_token());
        let ending = Ending { run, keep: None };
        match self.checked(&asked, room, invoke, inputs, deadline, ids) {
            Ok(checked) => {
                let caller = self.clone();
                self.queue(ending, deadline, &call, deadline, move |_| {
                    (caller.open(checked.work), Vec::new())
                });
            }
            Err(status) => ending.end(Err(status)),
        }
        call
    }

    /// Checks a request, whatever it asks for.
    fn checked(
        &self,
        asked: &Asked,
        room: Option<InlineRoom>,
        mut invoke: wire::Invoke,
        inputs: Resolved,
        deadline: Deadline,
        (request_id, cancel): (Arc<str>, CancelToken),
    ) -> Result<Checked<Work>, Status> {
        match asked.pipeline() {
            None => {
                let checked = self.check(room, invoke, inputs, deadline, request_id, cancel)?;
                Ok(checked.map(|work| Work::Kernel(Box::new(work))))
            }
            Some(pipeline) => {
                let ids = (request_id, cancel);
                let checked =
                    self.check_pipeline(pipeline, room, &mut invoke, inputs, deadline, ids)?;
                Ok(checked.map(|piped| Work::Pipeline(Box::new(piped))))
            }
        }
    }

    fn open(&self, work: Work) -> Result<Outputs, Status> {
        let (job, means) = match work {
            Work::Pipeline(piped) => return self.open_pipeline(&piped),
            Work::Kernel(work) => *work,
        };
        let plugin = &job.kernel.plugin;
        self.check_in_service(plugin)?;
        let specs = self.host.runner.open_only(&job, means);
        Ok(specs.inspect_err(|failed| self.note_cost(plugin, failed))?)
    }

    /// Queues `work`, which gets the seconds that it waited, and what it leaves is renewed after the answer. It must be
    /// done by `deadline`, and `call`, the first that waits for it, is answered by its `own`.
    fn queue<T: Given>(
        &self,
        ending: Ending<T>,
        deadline: Deadline,
        call: &Call,
        own: Deadline,
        work: impl FnOnce(f64) -> (Result<T, Status>, Vec<Used>) + Send + 'static,
    ) {
        let workers = self.host.workers.lock();
        let place = match workers.as_ref() {
            Some(workers) => self
                .account
                .check_cpu(own.at, own.ms)
                .and_then(|()| Ok(workers.reserve(self.account.invocations())?)),
            None => Err(super::draining()),
        };
        drop(workers);
        let place = match place {
            Ok(place) => place,
            Err(status) => return ending.end(Err(status)),
        };
        let run = Arc::clone(&ending.run);
        let runner = Arc::clone(&self.host.runner);
        let begin = Instant::now();
        let queued = place.submit(move || {
            if !ending.run.start() {
                return;
            }
            // `own` is that of the first caller, who may have left others here.
            let (result, used) = match Instant::now() < deadline.at {
                true => work(begin.elapsed().as_secs_f64()),
                false => (Err(ending.run.late(false, deadline.ms)), Vec::new()),
            };
            ending.end(result);
            for used in used {
                runner.renew(used);
            }
        });
        if queued.waits {
            run.watch(call, &self.host.deadlines, own.at);
        }
        run.queued(queued);
    }

    /// `mapped`: its answer comes with leases and descriptors.
    fn run(
        &self,
        checked: Checked<Work>,
        name: &str,
        mapped: bool,
        queue_seconds: f64,
    ) -> (Result<Invoked, Status>, Vec<Used>) {
        let Checked {
            work,
            naming,
            charge,
        } = checked;
        let request_id = work.request_id();
        let (result, used) = match work {
            Work::Kernel(work) => {
                let (job, means) = *work;
                self.run_kernel(&job, means)
            }
            Work::Pipeline(piped) => self.run_pipeline(&piped),
        };
        match &result {
            Ok(ran) => tracing::debug!(
                request_id = &*request_id,
                kernel = name,
                seconds = ran.report.seconds.total,
                copied_bytes = ran.report.copied_bytes,
                "invocation"
            ),
            Err(status) => tracing::warn!(
                request_id = &*request_id,
                kernel = name,
                code = status.code.name(),
                reason = status.reason.name(),
                message = status.message,
                "invocation failed"
            ),
        }
        // The inputs in the frame went with the work.
        drop(charge);
        let after = After {
            naming,
            mapped,
            queue_seconds,
        };
        let result = result.and_then(|ran| self.keep(ran, name, &after));
        (result, used)
    }

    fn run_kernel(&self, job: &Job, means: Means) -> (Result<Ran, Status>, Vec<Used>) {
        let plugin = &job.kernel.plugin;
        // Others of its calls may have been the last straw while this one waited.
        let done = self.check_in_service(plugin).and_then(|()| {
            let done = self.host.runner.invoke(job, means);
            Ok(done.inspect_err(|failed| self.note_cost(plugin, failed))?)
        });
        match done {
            Ok(mut done) => {
                let used = done.used.take();
                (self.ran(done), used.into_iter().collect())
            }
            Err(status) => (Err(status), Vec::new()),
        }
    }

    /// Makes segments of what a kernel has left.
    fn ran(&self, done: Done) -> Result<Ran, Status> {
        let results = done.outputs.into_iter().map(|output| {
            let body = match output.body {
                OutputBody::Inline { spec, bytes } => {
                    let charge = self.charge(bytes.len() as u64)?;
                    ResultBody::Inline(spec, Arc::new(InlineBytes::new(bytes, charge)))
                }
                OutputBody::Segment { layout, segment } => {
                    ResultBody::Segment(self.live_result(layout, segment)?)
                }
            };
            Ok((output.port, body))
        });
        Ok(Ran {
            results: results.collect::<Result<_, Status>>()?,
            report: done.report,
            stages: Vec::new(),
        })
    }

    /// Seals what a run has left, if that is asked for, and publishes those that get names: all of them, or none.
    fn keep(&self, ran: Ran, kernel: &str, after: &After) -> Result<Invoked, Status> {
        let Naming {
            seal,
            publish,
            replace,
        } = &after.naming;
        let mut results = Vec::with_capacity(ran.results.len());
        for (port, body) in ran.results {
            if let (true, ResultBody::Segment(live)) = (*seal, &body) {
                live.seal().map_err(|error| {
                    let status = Status::from(error);
                    let why = &status.message;
                    let message = format!("a result of kernel `{kernel}` was not sealed: {why}");
                    Status { message, ..status }
                })?;
            }
            results.push(InvokedResult {
                body,
                name: publish.get(&port).cloned(),
                port,
            });
        }
        let invoked = Invoked {
            results,
            report: ran.report,
            stages: ran.stages,
            queue_seconds: after.queue_seconds,
        };
        self.host.check_reply(&invoked, kernel)?;
        if after.mapped {
            let segments = invoked.results.iter().filter_map(InvokedResult::segment);
            self.account.check_answer(segments.count())?;
        }
        let named: Vec<_> = invoked
            .results
            .iter()
            .filter_map(|result| Some((result.segment()?, result.name.as_deref()?)))
            .collect();
        self.publish_all(&named, *replace)?;
        Ok(invoked)
    }
}

impl Host {
    /// What is told of a result: of one in the frame, that it is at `offset` of the payload; of one in a segment, nothing
    /// yet of leases.
    #[must_use]
    pub fn entry(&self, result: &InvokedResult, offset: u64) -> wire::ResultEntry {
        let (mapping, inline) = match &result.body {
            ResultBody::Segment(segment) => {
                let mut mapping = self.mapping(segment);
                // Of a pipeline: in the file it has the name of its stage's port.
                if let [tensor] = mapping.tensors.as_mut_slice() {
                    tensor.name.clone_from(&result.port);
                }
                (Some(mapping), None)
            }
            ResultBody::Inline(spec, bytes) => {
                let inline = wire::InlineResult {
                    dtype: spec.dtype,
                    shape: spec.shape.clone(),
                    offset,
                    length: bytes.as_ref().as_ref().len() as u64,
                };
                (None, Some(inline))
            }
        };
        wire::ResultEntry {
            port: result.port.clone(),
            mapping,
            inline,
            lease: None,
            expires_ms: None,
            fd: None,
            name: result.name.clone(),
        }
    }

    /// Whether the reply will fit a frame. Asked before anything gets a name.
    fn check_reply(&self, invoked: &Invoked, kernel: &str) -> Result<(), Status> {
        // A character may become six in JSON; a mapping of one tensor and a page have less than this.
        let notes = invoked
            .report
            .notes
            .iter()
            .map(|(key, text)| key.len() + text.len());
        let most = wire::BODY_BYTES_MAX - super::REPLY_BYTES;
        if 6 * notes.sum::<usize>()
            + 2048 * invoked.results.len()
            + 256 * invoked.report.pages.len()
            + 512 * invoked.stages.len()
            < most / 2
        {
            return Ok(());
        }
        let results = invoked.results.iter().map(|result| wire::ResultEntry {
            lease: Some(u64::MAX),
            expires_ms: Some(u64::MAX),
            fd: Some(usize::MAX),
            ..self.entry(result, u64::MAX)
        });
        let reply = invoked.to_wire(results.collect(), "");
        let bytes = serde_json::to_vec(&reply).map_or(usize::MAX, |json| json.len());
        if bytes <= most {
            return Ok(());
        }
        Err(Status::new(
            Code::Internal,
            Reason::BadAnswer,
            format!(
                "kernel `{kernel}` left {} notes that make a reply of {bytes} bytes of JSON, and there is room for {most}; \
                 the plugin must leave fewer or shorter ones",
                invoked.report.notes.len()
            ),
        )
        .with("during", "notes"))
    }
}
