//! The way of an invocation: resolve inputs, check, queue, run, publish.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strait_client::wire;
use strait_tensor::TensorPlace;

use super::idempotency::Turn;
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

/// A request whose arguments have been checked.
#[derive(Debug)]
struct Checked {
    request: Request,
    publish: BTreeMap<String, String>,
    replace: bool,
    principal: Principal,
}

impl Host {
    /// Starts an invocation; `answer` gets its outcome, on a worker thread or at once.
    ///
    /// `session` is whose leased segments may be inputs by id.
    pub fn invoke(
        self: &Arc<Self>,
        principal: Principal,
        session: Option<SessionId>,
        invoke: wire::Invoke,
        request_id: Arc<str>,
        answer: Answer,
    ) -> CancelToken {
        let cancel = CancelToken::default();
        let key = match &invoke.idempotency_key {
            Some(key) => match check_id("idempotency_key", key) {
                Ok(()) => Some((principal, key.clone())),
                Err(status) => {
                    answer.give(Err(status));
                    return cancel;
                }
            },
            None => None,
        };
        let answer = match &key {
            None => answer,
            Some(key) => match self.idempotency.begin(key, answer) {
                Turn::Joined => return cancel,
                Turn::First(answer) => {
                    let (host, key) = (Arc::clone(self), key.clone());
                    Answer::new(move |result| {
                        host.idempotency.finish(&key, &result);
                        answer.give(result);
                    })
                }
            },
        };
        match self.check(principal, session, invoke, request_id, cancel.clone()) {
            Ok(checked) => self.queue(checked, answer),
            Err(status) => answer.give(Err(status)),
        }
        cancel
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
        let checked = self.check(principal, None, invoke, request_id, CancelToken::default())?;
        Ok(self.engine.open_only(checked.request)?)
    }

    fn queue(self: &Arc<Self>, checked: Checked, answer: Answer) {
        let workers = self.workers.lock().unwrap_or_else(|e| e.into_inner());
        let place = match workers.as_ref() {
            Some(workers) => workers.reserve().map_err(Status::from),
            None => Err(super::draining()),
        };
        drop(workers);
        let place = match place {
            Ok(place) => place,
            Err(status) => return answer.give(Err(status)),
        };
        let host = Arc::clone(self);
        let queued = Instant::now();
        place.submit(move || {
            let queue_seconds = queued.elapsed().as_secs_f64();
            let result = host.run(checked, queue_seconds).map(Arc::new);
            answer.give(result);
        });
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
        if request.cancel.is_cancelled() {
            return Err(crate::engine::InvokeError::Cancelled(kernel).into());
        }
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
        for result in &results {
            if let Some(name) = &result.name {
                self.publish(principal, &result.segment, name, replace)?;
            }
        }
        Ok(Invoked {
            results,
            notes,
            copied_bytes,
            pages,
            minor_faults,
            seconds,
            queue_seconds,
        })
    }

    fn check(
        &self,
        principal: Principal,
        session: Option<SessionId>,
        invoke: wire::Invoke,
        request_id: Arc<str>,
        cancel: CancelToken,
    ) -> Result<Checked, Status> {
        self.admit()?;
        let kernel = self.plugins.find(&invoke.kernel)?;
        let declared = kernel.kernel();
        let mut inputs = BTreeMap::new();
        for (port, input) in invoke.inputs {
            let (segment, place) = self.resolve(principal, session, input)?;
            inputs.insert(port, (segment, place));
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
        let settings = &self.config.limits;
        let deadline_ms = invoke.deadline_ms.unwrap_or(settings.deadline_ms_default);
        if deadline_ms > settings.deadline_ms_max {
            return Err(bad_limit(
                "deadline_ms",
                deadline_ms,
                settings.deadline_ms_max,
            ));
        }
        let limits = tightened(settings.limits(), invoke.limits.unwrap_or_default())?;
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
            deadline: Instant::now() + Duration::from_millis(deadline_ms),
            deadline_ms,
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
        input: wire::Input,
    ) -> Result<(Arc<LiveSegment>, TensorPlace), Status> {
        let (segment, column, shown) = match input {
            wire::Input::Text(text) => {
                let (name, column) = match text.split_once('#') {
                    Some((name, column)) => (name.to_owned(), Some(column.to_owned())),
                    None => (text, None),
                };
                (self.lookup(principal, &name)?, column, name)
            }
            wire::Input::Flight { name, column } => (self.lookup(principal, &name)?, column, name),
            wire::Input::Segment { segment, column } => {
                let session = session.ok_or_else(|| {
                    Status::new(
                        Code::InvalidArgument,
                        "BAD_REQUEST",
                        "an input by segment id needs a data-socket session; name a flight",
                    )
                })?;
                (self.leased(session, &segment)?, column, segment)
            }
        };
        let tensors = segment.tensors();
        let names = || {
            tensors
                .iter()
                .map(|t| format!("`{}`", t.name))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let place = match &column {
            Some(column) => tensors.iter().find(|t| t.name == *column).ok_or_else(|| {
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
