//! The way of an invocation: resolve inputs, check, queue, run, publish.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strait_client::wire;
use strait_tensor::TensorPlace;

use super::idempotency::{Fingerprint, Key, Turn};
use super::run::{Call, Run};
use super::{Host, check_id, check_name};
use crate::engine::{CancelToken, Input, Limits, Outcome, Request, Seconds, WindowPages};
use crate::error::{Code, Status};
use crate::lease::{LiveSegment, Principal, SessionId};

/// A result that the caller can map, read or publish.
#[derive(Clone, Debug)]
pub struct InvokedResult {
    /// The output port.
    pub port: String,
    /// What holds it; one tensor, named as the port.
    pub segment: Arc<LiveSegment>,
    /// The name it was published under.
    pub name: Option<String>,
}

/// What an invocation leaves.
#[derive(Debug)]
pub struct Invoked {
    /// In the kernel's order.
    pub results: Vec<InvokedResult>,
    /// (key, text).
    pub notes: Vec<(String, String)>,
    /// Bytes of its tensors that the host copied.
    pub copied_bytes: u64,
    /// With `verify`.
    pub pages: Vec<WindowPages>,
    /// Page faults of the process meanwhile that needed no I/O.
    pub minor_faults: u64,
    /// Where the time went, without the queue.
    pub seconds: Seconds,
    /// Waiting for a worker, in seconds.
    pub queue_seconds: f64,
}

type Callback = Box<dyn FnOnce(Result<Arc<Invoked>, Status>) + Send>;

/// The one answer that a request gets, even if the worker that ran it is lost.
pub struct Answer(Option<Callback>);

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("given", &self.0.is_none())
            .finish()
    }
}

impl Answer {
    /// Calls `callback` exactly once.
    pub fn new(callback: impl FnOnce(Result<Arc<Invoked>, Status>) + Send + 'static) -> Self {
        Self(Some(Box::new(callback)))
    }

    pub(super) fn give(mut self, result: Result<Arc<Invoked>, Status>) {
        if let Some(callback) = self.0.take() {
            callback(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            callback(Err(Status::new(
                Code::Internal,
                "HOST",
                "the worker that ran this was lost; the host's log has the reason",
            )));
        }
    }
}

/// What the inputs of a request stand for, by port.
type Resolved = BTreeMap<String, Result<(Arc<LiveSegment>, TensorPlace), Status>>;

/// When a request must be done, counted from its receipt.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    ms: u64,
}

/// A request whose arguments have been checked.
#[derive(Debug)]
struct Checked {
    request: Request,
    publish: BTreeMap<String, String>,
    replace: bool,
    principal: Principal,
}

/// Brings a run to its end, even if the worker that runs it is lost.
struct Ending {
    host: Arc<Host>,
    run: Arc<Run>,
    key: Option<Key>,
}

impl Ending {
    fn end(self, result: Result<Invoked, Status>) {
        self.tell(Some(result.map(Arc::new)));
    }

    fn tell(&self, result: Option<Result<Arc<Invoked>, Status>>) {
        if let Some(key) = &self.key {
            let outcome = result.as_ref().and_then(|result| result.as_ref().ok());
            self.host.idempotency.finish(key, &self.run, outcome);
        }
        self.run.end(result);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        // After `end` nobody is left to be answered.
        self.tell(None);
    }
}

impl Host {
    /// Starts an invocation; `answer` gets its outcome, on a worker thread or at once.
    ///
    /// `session` is whose leased segments may be inputs by id.
    pub fn invoke(
        self: &Arc<Self>,
        principal: Principal,
        session: Option<SessionId>,
        mut invoke: wire::Invoke,
        request_id: Arc<str>,
        answer: Answer,
    ) -> Call {
        let begun = self.deadline(&invoke).and_then(|deadline| {
            let key = invoke.idempotency_key.take();
            if let Some(key) = &key {
                check_id("idempotency_key", key)?;
            }
            Ok((deadline, key.map(|key| (principal, key))))
        });
        let (mut deadline, key) = match begun {
            Ok(begun) => begun,
            Err(status) => {
                answer.give(Err(status));
                return Call::answered();
            }
        };
        let own = deadline;
        let inputs = self.resolve_all(principal, session, &invoke);
        let (run, call) = match &key {
            None => {
                let run = Run::new(&invoke.kernel);
                match run.join(answer, own.ms) {
                    Ok(call) => (run, call),
                    // A run that is new takes everybody.
                    Err(answer) => {
                        drop(answer);
                        return Call::answered();
                    }
                }
            }
            Some(key) => {
                let segment = |port: &str| match inputs.get(port) {
                    Some(Ok((segment, _))) => Some(segment.id()),
                    _ => None,
                };
                let fingerprint = Fingerprint::of(&invoke, segment);
                match self
                    .idempotency
                    .begin(key, fingerprint, &invoke.kernel, own.ms, answer)
                {
                    Turn::Answered => return Call::answered(),
                    Turn::Joined(run, call) => {
                        run.watch(&call, &self.deadlines, own.at);
                        return call;
                    }
                    // Each caller's own deadline is watched; the run lasts as long as anybody waits.
                    Turn::First(run, call) => {
                        deadline = Deadline::after(self.config.limits.deadline_ms_max);
                        run.watch(&call, &self.deadlines, own.at);
                        (run, call)
                    }
                }
            }
        };
        let ending = Ending {
            host: Arc::clone(self),
            run,
            key,
        };
        match self.check(
            principal,
            invoke,
            inputs,
            deadline,
            request_id,
            ending.run.cancel_token(),
        ) {
            Ok(checked) => self.queue(checked, ending, &call, own),
            Err(status) => ending.end(Err(status)),
        }
        call
    }

    /// The outputs that an invocation would have, by `open` alone: for `GetSchema` and `kernels`.
    ///
    /// # Errors
    /// As [`Host::invoke`].
    pub fn open_only(
        self: &Arc<Self>,
        principal: Principal,
        invoke: wire::Invoke,
        request_id: Arc<str>,
    ) -> Result<Vec<(String, strait_tensor::TensorSpec)>, Status> {
        let deadline = self.deadline(&invoke)?;
        let inputs = self.resolve_all(principal, None, &invoke);
        let checked = self.check(
            principal,
            invoke,
            inputs,
            deadline,
            request_id,
            CancelToken::default(),
        )?;
        Ok(self.engine.open_only(checked.request)?)
    }

    fn queue(self: &Arc<Self>, checked: Checked, ending: Ending, call: &Call, deadline: Deadline) {
        let workers = self.workers.lock().unwrap_or_else(|e| e.into_inner());
        let place = match workers.as_ref() {
            Some(workers) => workers.reserve().map_err(Status::from),
            None => Err(super::draining()),
        };
        drop(workers);
        let place = match place {
            Ok(place) => place,
            Err(status) => return ending.end(Err(status)),
        };
        let run = Arc::clone(&ending.run);
        let begin = Instant::now();
        let queued = place.submit(move || {
            if !ending.run.start() {
                return;
            }
            let queue_seconds = begin.elapsed().as_secs_f64();
            // The run's: `deadline` is that of the first caller, who may have left others here.
            let (at, ms) = (checked.request.deadline, checked.request.deadline_ms);
            let result = match Instant::now() < at {
                true => ending.host.run(checked, queue_seconds),
                false => Err(ending.run.late(false, ms)),
            };
            ending.end(result);
        });
        if queued.waits {
            run.watch(call, &self.deadlines, deadline.at);
        }
        run.queued(queued);
    }

    fn run(&self, checked: Checked, queue_seconds: f64) -> Result<Invoked, Status> {
        let Checked {
            request,
            publish,
            replace,
            principal,
        } = checked;
        let request_id = Arc::clone(&request.request_id);
        let kernel = request.kernel.kernel().name.clone();
        let result = self.engine.invoke(request).map_err(Status::from);
        match &result {
            Ok(outcome) => tracing::debug!(
                request_id = &*request_id,
                kernel,
                seconds = outcome.seconds.total,
                copied_bytes = outcome.copied_bytes,
                "invocation"
            ),
            Err(status) => tracing::warn!(
                request_id = &*request_id,
                kernel,
                code = status.code.name(),
                reason = status.reason,
                message = status.message,
                "invocation failed"
            ),
        }
        let Outcome {
            outputs,
            notes,
            copied_bytes,
            pages,
            minor_faults,
            seconds,
        } = result?;
        let mut results = Vec::with_capacity(outputs.len());
        for output in outputs {
            let segment = self.live(
                principal,
                output.body,
                output.layout.bytes,
                output.layout.tensors,
                None,
            )?;
            results.push(InvokedResult {
                name: publish.get(&output.port).cloned(),
                port: output.port,
                segment,
            });
        }
        let invoked = Invoked {
            results,
            notes,
            copied_bytes,
            pages,
            minor_faults,
            seconds,
            queue_seconds,
        };
        self.check_reply(&invoked, &kernel)?;
        let named: Vec<_> = invoked
            .results
            .iter()
            .filter_map(|result| Some((&result.segment, result.name.as_deref()?)))
            .collect();
        self.publish_all(principal, &named, replace)?;
        Ok(invoked)
    }

    /// Whether the reply will fit a frame. Asked before anything gets a name.
    fn check_reply(&self, invoked: &Invoked, kernel: &str) -> Result<(), Status> {
        // A character may become six in JSON; a mapping of one tensor and a page have less than this.
        let notes = invoked
            .notes
            .iter()
            .map(|(key, text)| key.len() + text.len());
        let most = wire::BODY_BYTES_MAX - super::REPLY_BYTES;
        if 6 * notes.sum::<usize>() + 2048 * invoked.results.len() + 256 * invoked.pages.len()
            < most / 2
        {
            return Ok(());
        }
        let results = invoked.results.iter().map(|result| wire::ResultEntry {
            port: result.port.clone(),
            mapping: self.mapping(&result.segment),
            lease: Some(u64::MAX),
            expires_ms: Some(u64::MAX),
            fd: Some(usize::MAX),
            name: result.name.clone(),
        });
        let reply = invoked.to_wire(results.collect(), "");
        let bytes = serde_json::to_vec(&reply).map_or(usize::MAX, |json| json.len());
        if bytes <= most {
            return Ok(());
        }
        Err(Status::new(
            Code::Internal,
            "BAD_ANSWER",
            format!(
                "kernel `{kernel}` left {} notes that make a reply of {bytes} bytes of JSON, and there is room for {most}; \
                 the plugin must leave fewer or shorter ones",
                invoked.notes.len()
            ),
        )
        .with("during", "notes"))
    }

    /// When `invoke`, just received, must be done.
    fn deadline(&self, invoke: &wire::Invoke) -> Result<Deadline, Status> {
        let settings = &self.config.limits;
        let ms = invoke.deadline_ms.unwrap_or(settings.deadline_ms_default);
        if ms == 0 {
            let message = "deadline_ms of 0: nothing is done by then; ask for at least 1, or leave it out for the host's default";
            return Err(Status::new(Code::InvalidArgument, "BAD_LIMIT", message).with("asked", 0));
        }
        if ms > settings.deadline_ms_max {
            return Err(bad_limit("deadline_ms", ms, settings.deadline_ms_max));
        }
        Ok(Deadline::after(ms))
    }

    fn resolve_all(
        &self,
        principal: Principal,
        session: Option<SessionId>,
        invoke: &wire::Invoke,
    ) -> Resolved {
        let inputs = invoke.inputs.iter();
        inputs
            .map(|(port, input)| (port.clone(), self.resolve(principal, session, input)))
            .collect()
    }

    fn check(
        &self,
        principal: Principal,
        invoke: wire::Invoke,
        resolved: Resolved,
        deadline: Deadline,
        request_id: Arc<str>,
        cancel: CancelToken,
    ) -> Result<Checked, Status> {
        self.admit()?;
        let kernel = self.plugins.find(&invoke.kernel)?;
        let declared = kernel.kernel();
        let mut inputs = BTreeMap::new();
        for (port, input) in resolved {
            inputs.insert(port, input?);
        }
        let checked =
            declared.check(inputs, |(_, place)| place.spec.clone(), &invoke.parameters)?;
        declared.check_outputs(invoke.publish.keys().map(String::as_str))?;
        for (port, name) in &invoke.publish {
            check_name(name)?;
            if invoke
                .publish
                .iter()
                .any(|(other, n)| other != port && n == name)
            {
                return Err(Status::new(
                    Code::InvalidArgument,
                    "BAD_NAME",
                    format!("two outputs would be published as `{name}`"),
                ));
            }
            // Told before the run, not after it; `publish` itself decides in the end.
            if !invoke.replace && self.entry(principal, name).is_ok() {
                return Err(super::name_taken(name));
            }
        }
        let limits = tightened(
            self.config.limits.limits(),
            invoke.limits.unwrap_or_default(),
        )?;
        let inputs = declared
            .inputs
            .iter()
            .zip(checked.inputs)
            .map(|(port, (segment, place))| Input {
                port: port.name.clone(),
                role: port.role,
                place,
                segment,
            })
            .collect();
        let request = Request {
            inputs,
            parameters: checked.parameters,
            owner: principal.owner(),
            seal: invoke.seal,
            verify: invoke.verify,
            limits,
            deadline: deadline.at,
            deadline_ms: deadline.ms,
            cancel,
            request_id,
            kernel,
        };
        Ok(Checked {
            request,
            publish: invoke.publish,
            replace: invoke.replace,
            principal,
        })
    }

    fn resolve(
        &self,
        principal: Principal,
        session: Option<SessionId>,
        input: &wire::Input,
    ) -> Result<(Arc<LiveSegment>, TensorPlace), Status> {
        let (segment, column, shown) = match input {
            wire::Input::Text(text) => {
                let (name, column) = match text.split_once('#') {
                    Some((name, column)) => (name, Some(column)),
                    None => (text.as_str(), None),
                };
                (self.lookup(principal, name)?, column, name)
            }
            wire::Input::Flight { name, column } => (
                self.lookup(principal, name)?,
                column.as_deref(),
                name.as_str(),
            ),
            wire::Input::Segment { segment, column } => {
                let session = session.ok_or_else(|| {
                    Status::new(
                        Code::InvalidArgument,
                        "BAD_REQUEST",
                        "an input by segment id needs a data-socket session; name a flight",
                    )
                })?;
                (
                    self.leased(session, segment)?,
                    column.as_deref(),
                    segment.as_str(),
                )
            }
        };
        let shown = super::shown(shown);
        let tensors = segment.tensors();
        let names = || {
            tensors
                .iter()
                .map(|t| format!("`{}`", t.name))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let place = match column {
            Some(column) => tensors.iter().find(|t| t.name == *column).ok_or_else(|| {
                let column = super::shown(column);
                Status::new(
                    Code::NotFound,
                    "COLUMN_NOT_FOUND",
                    format!("`{shown}` has no column `{column}`; it has {}", names()),
                )
            })?,
            None if tensors.len() == 1 => &tensors[0],
            None => {
                return Err(Status::new(
                    Code::InvalidArgument,
                    "BAD_INPUT",
                    format!(
                        "`{shown}` has {} columns; say which, as `{shown}#column`: {}",
                        tensors.len(),
                        names()
                    ),
                ));
            }
        };
        let place = place.clone();
        Ok((segment, place))
    }
}

impl Deadline {
    fn after(ms: u64) -> Self {
        let at = Instant::now() + Duration::from_millis(ms);
        Self { at, ms }
    }
}

fn bad_limit(name: &str, asked: u64, limit: u64) -> Status {
    Status::new(
        Code::InvalidArgument,
        "BAD_LIMIT",
        format!("{name} of {asked} is over the host's own {limit}; ask for less, or have the operator raise it"),
    )
    .with("asked", asked)
    .with("limit", limit)
}

fn tightened(host: Limits, asked: wire::Limits) -> Result<Limits, Status> {
    let one = |name, host: u64, asked: Option<u64>| match asked {
        Some(asked) if asked > host => Err(bad_limit(name, asked, host)),
        Some(asked) => Ok(asked),
        None => Ok(host),
    };
    Ok(Limits {
        guest_bytes: one("guest_bytes", host.guest_bytes, asked.guest_bytes)?,
        window_bytes: one("window_bytes", host.window_bytes, asked.window_bytes)?,
        result_bytes: one("result_bytes", host.result_bytes, asked.result_bytes)?,
        log_bytes: one("log_bytes", host.log_bytes, asked.log_bytes)?,
    })
}
