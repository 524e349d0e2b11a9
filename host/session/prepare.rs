//! A request before it is queued: its inputs found, its arguments, names and limits checked.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strait_memory::{Charge, MemoryError, RecyclingKey, ResultSource, SharedSource};
use strait_protocol as wire;
use strait_tensor::{TensorPlace, TensorSpec};

use super::Host;
use super::caller::Caller;
use super::flights::{check_name, name_taken};
use crate::engine::{CancelToken, FramePart, InlineRoom, Input, Job, Limits, Means, Owner, Source};
use crate::error::{Code, Reason, Status};
use crate::lease::{LiveSegment, SessionId};
use crate::plugin::{ITEMS_MAX, Kernel, Plugin, PluginHash};

/// What the inputs of a request stand for, by port.
pub(super) type Resolved = BTreeMap<String, Result<(Found, TensorPlace), Status>>;

/// What an input is in.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Segment(Arc<LiveSegment>),
    /// The request's frame, or bytes that a stage of a pipeline gave.
    Inline(FramePart),
}

impl Found {
    pub(super) fn is_inline(&self) -> bool {
        matches!(self, Self::Inline(_))
    }

    pub(super) fn into_source(self) -> Source<dyn SharedSource> {
        match self {
            Self::Segment(segment) => Source::Segment(segment as Arc<dyn SharedSource>),
            Self::Inline(bytes) => Source::Inline(bytes),
        }
    }
}

/// What a frame gives a request beside its JSON.
#[derive(Clone, Copy, Debug)]
pub struct Framed<'a> {
    /// Whose leased segments may be inputs by id; none over Flight, where nothing is leased.
    pub session: Option<SessionId>,
    /// The bytes of inline inputs.
    pub payload: &'a [u8],
    /// Bytes of results that a reply has room for.
    pub room: u64,
}

/// When a request must be done, counted from its receipt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    pub(super) ms: u64,
}

/// A request whose arguments have been checked.
#[derive(Debug)]
pub(super) struct Checked<W = (Job, Means)> {
    /// What is to run.
    pub(super) work: W,
    pub(super) naming: Naming,
    /// Of the bytes of its inline inputs.
    pub(super) charge: Option<Charge>,
}

impl<W> Checked<W> {
    pub(super) fn map<T>(self, work: impl FnOnce(W) -> T) -> Checked<T> {
        Checked {
            work: work(self.work),
            naming: self.naming,
            charge: self.charge,
        }
    }
}

/// What is to become of results.
#[derive(Debug)]
pub(super) struct Naming {
    pub(super) seal: bool,
    /// Output port to the name that it gets.
    pub(super) publish: BTreeMap<String, String>,
    pub(super) replace: bool,
}

impl Host {
    /// When `invoke`, just received, must be done.
    pub(super) fn deadline(&self, invoke: &wire::Invoke) -> Result<Deadline, Status> {
        let settings = &self.config.limits;
        let ms = invoke.deadline_ms.unwrap_or(settings.deadline_ms_default);
        if ms == 0 {
            let message = "deadline_ms of 0: nothing is done by then; ask for at least 1, or leave it out for the host's default";
            return Err(
                Status::new(Code::InvalidArgument, Reason::BadLimit, message).with("asked", 0),
            );
        }
        if ms > settings.deadline_ms_max {
            return Err(bad_limit("deadline_ms", ms, settings.deadline_ms_max));
        }
        Ok(Deadline::after(ms))
    }
}

impl Caller {
    pub(super) fn resolve_all(
        &self,
        framed: Option<Framed<'_>>,
        invoke: &wire::Invoke,
    ) -> Resolved {
        // One more than a kernel can have is enough for it to be refused, and why an input is refused may be a long text.
        let inputs = invoke.inputs.iter().take(ITEMS_MAX + 1);
        inputs
            .map(|(port, input)| (port.clone(), self.resolve(framed, port, input)))
            .collect()
    }

    /// An input that is in the request's frame.
    fn inline(
        &self,
        framed: Option<Framed<'_>>,
        port: &str,
        inline: &wire::InlineTensor,
    ) -> Result<(Found, TensorPlace), Status> {
        let port = crate::text::name(port);
        let refused = |how: String| {
            let message = format!("inline input `{port}`: {how}");
            Err(Status::new(
                Code::InvalidArgument,
                Reason::BadInput,
                message,
            ))
        };
        let Some(framed) = framed else {
            return refused(
                "its bytes travel in a frame of the data socket, or in the action `invoke` of Flight; name a flight".to_owned(),
            );
        };
        let wire::InlineTensor {
            dtype,
            shape,
            offset,
            length,
        } = inline.clone();
        let spec = TensorSpec { dtype, shape };
        match spec.bytes() {
            Ok(bytes) if bytes == length => {}
            Ok(bytes) => return refused(format!("{spec} has {bytes} bytes, not {length}")),
            Err(error) => return refused(error.to_string()),
        }
        let most = self.host.config.limits.inline_bytes;
        if length > most {
            return refused(format!(
                "{length} bytes, a tensor in a frame has at most {most}; make a segment of it"
            ));
        }
        let range = offset
            .checked_add(length)
            .and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
        let Some(bytes) = range.and_then(|range| framed.payload.get(range)) else {
            return refused(format!(
                "{length} bytes from {offset} on are not in the frame's payload of {} bytes",
                framed.payload.len()
            ));
        };
        self.host.framed.inputs.add(length);
        let place = TensorPlace {
            name: port,
            spec,
            offset: 0,
            length,
        };
        Ok((Found::Inline(bytes.to_vec().into()), place))
    }

    /// Which results are to be bytes in the reply.
    pub(super) fn inline_room(
        &self,
        framed: Option<Framed<'_>>,
        invoke: &wire::Invoke,
    ) -> Result<Option<InlineRoom>, Status> {
        let Some(asked) = invoke.inline_bytes else {
            return Ok(None);
        };
        let Some(framed) = framed else {
            let message = "`inline_bytes`: a result travels in a frame of the data socket, or in the action `invoke` of Flight; leave it out";
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::BadRequest,
                message,
            ));
        };
        let each = asked.min(self.host.config.limits.inline_bytes);
        // What gets a name or a seal is a segment.
        let none = each == 0 || invoke.seal || !invoke.publish.is_empty();
        Ok((!none).then_some(InlineRoom {
            each,
            together: framed.room,
        }))
    }

    pub(super) fn check(
        &self,
        inline: Option<InlineRoom>,
        mut invoke: wire::Invoke,
        resolved: Resolved,
        deadline: Deadline,
        request_id: Arc<str>,
        cancel: CancelToken,
    ) -> Result<Checked, Status> {
        self.host.admit()?;
        let kernel = self.kernel(&invoke.kernel)?;
        let declared = kernel.kernel();
        self.check_in_service(&kernel.plugin)?;
        self.check_publisher(&invoke)?;
        let mut inputs = BTreeMap::new();
        for (port, input) in resolved {
            inputs.insert(port, input?);
        }
        let checked =
            declared.check(inputs, |(_, place)| place.spec.clone(), &invoke.parameters)?;
        let naming = self.naming(&mut invoke, declared)?;
        let limits = tightened(
            self.host.config.limits.limits(),
            invoke.limits.unwrap_or_default(),
        )?;
        let charge = self.charge_framed(checked.inputs.iter())?;
        let (inputs, sources) = apart(declared, checked.inputs);
        let plugins = [kernel.plugin.hash].into_iter();
        let means = self.means(sources, plugins, naming.seal, deadline, cancel);
        let job = Job {
            inputs,
            parameters: checked.parameters,
            verify: invoke.verify,
            limits,
            inline,
            deadline_ms: deadline.ms,
            request_id,
            threads: threads(invoke.threads)?,
            kernel,
        };
        Ok(Checked {
            work: (job, means),
            naming,
            charge,
        })
    }

    /// Whether it may give results names, if it wants to.
    pub(super) fn check_publisher(&self, invoke: &wire::Invoke) -> Result<(), Status> {
        match invoke.publish.is_empty() {
            true => Ok(()),
            false => self.check_put(),
        }
    }

    /// What is to become of the results of what declares itself so.
    pub(super) fn naming(
        &self,
        invoke: &mut wire::Invoke,
        declared: &Kernel,
    ) -> Result<Naming, Status> {
        let publish = std::mem::take(&mut invoke.publish);
        declared.check_outputs(publish.keys().map(String::as_str))?;
        for (port, name) in &publish {
            check_name(name)?;
            if publish.iter().any(|(other, n)| other != port && n == name) {
                return Err(Status::new(
                    Code::InvalidArgument,
                    Reason::BadName,
                    format!("two outputs would be published as `{name}`"),
                ));
            }
            // Told before the run, not after it; `publish` itself decides in the end.
            if !invoke.replace && self.has_flight(name) {
                return Err(name_taken(name));
            }
        }
        Ok(Naming {
            seal: invoke.seal,
            publish,
            replace: invoke.replace,
        })
    }

    /// Memory of the host for those inputs that came in a frame.
    pub(super) fn charge_framed<'a>(
        &self,
        inputs: impl Iterator<Item = &'a (Found, TensorPlace)>,
    ) -> Result<Option<Charge>, Status> {
        let framed = inputs.filter(|(found, _)| matches!(found, Found::Inline(_)));
        match framed.map(|(_, place)| place.length).sum() {
            0 => Ok(None),
            bytes => Ok(Some(self.charge(bytes)?)),
        }
    }

    /// What kernels of `plugins` that run at once work with; `seal`: their results are to be sealed.
    pub(super) fn means(
        &self,
        inputs: Vec<Source<dyn SharedSource>>,
        plugins: impl Iterator<Item = PluginHash>,
        seal: bool,
        deadline: Deadline,
        cancel: CancelToken,
    ) -> Means {
        Means {
            owner: Owner(self.account.number()),
            inputs,
            results: self.result_source(plugins, seal),
            deadline: deadline.at,
            cancel,
        }
    }

    /// Memory of the host for tensors in frames.
    pub(super) fn charge(&self, bytes: u64) -> Result<Charge, Status> {
        let charged = self.account.segments().try_reserve(bytes);
        charged.map_err(|exceeded| MemoryError::from(exceeded).into())
    }

    /// Where the results of `plugins` that run at once for this principal come from. What an earlier one left in their pages is
    /// for the same ones only.
    fn result_source(&self, plugins: impl Iterator<Item = PluginHash>, seal: bool) -> ResultSource {
        let (pool, budget) = (&self.host.pool, Arc::clone(self.account.segments()));
        if seal {
            return ResultSource::sealable(pool, budget);
        }
        let owner = self.account.number().to_le_bytes();
        let whose: Vec<u8> = owner.into_iter().chain(plugins.flatten()).collect();
        let key = RecyclingKey(Plugin::hash(&whose));
        ResultSource::recycled(pool, key, budget)
    }

    pub(super) fn resolve(
        &self,
        framed: Option<Framed<'_>>,
        port: &str,
        input: &wire::Input,
    ) -> Result<(Found, TensorPlace), Status> {
        let (segment, tensor, kind, name) = match input {
            wire::Input::Inline { inline } => return self.inline(framed, port, inline),
            wire::Input::Text(text) => {
                let (name, tensor) = match text.split_once('#') {
                    Some((name, tensor)) => (name, Some(tensor)),
                    None => (text.as_str(), None),
                };
                (self.lookup(name)?, tensor, "flight", name)
            }
            wire::Input::Flight { name, tensor } => (
                self.lookup(name)?,
                tensor.as_deref(),
                "flight",
                name.as_str(),
            ),
            wire::Input::Segment { segment, tensor } => {
                let found = match framed.and_then(|framed| framed.session) {
                    Some(session) => self.host.leased(session, segment)?,
                    // What was uploaded without a name, or a result that nobody published.
                    None => self.undelivered(segment.parse().map_err(|error: String| {
                        Status::new(Code::InvalidArgument, Reason::BadRequest, error)
                    })?)?,
                };
                (found, tensor.as_deref(), "segment", segment.as_str())
            }
        };
        let name = crate::text::name(name);
        let tensors = segment.tensors();
        let names = || {
            tensors
                .iter()
                .map(|t| format!("`{}`", t.name))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let place = match tensor {
            Some(tensor) => tensors.iter().find(|t| t.name == *tensor).ok_or_else(|| {
                let tensor = crate::text::name(tensor);
                Status::new(
                    Code::NotFound,
                    Reason::TensorNotFound,
                    format!(
                        "{kind} `{name}` has no tensor `{tensor}`; it has {}",
                        names()
                    ),
                )
            })?,
            None if tensors.len() == 1 => &tensors[0],
            None => {
                return Err(Status::new(
                    Code::InvalidArgument,
                    Reason::BadInput,
                    format!(
                        "{kind} `{name}` has {} tensors; say which, {}: {}",
                        tensors.len(),
                        match kind {
                            "flight" => format!("as `{name}#TENSOR`"),
                            _ => "by `tensor` beside `segment`".to_owned(),
                        },
                        names()
                    ),
                ));
            }
        };
        let place = place.clone();
        Ok((Found::Segment(segment), place))
    }
}

impl Deadline {
    pub(super) fn after(ms: u64) -> Self {
        let at = Instant::now() + Duration::from_millis(ms);
        Self { at, ms }
    }
}

fn bad_limit(name: &str, asked: u64, limit: u64) -> Status {
    Status::new(
        Code::InvalidArgument,
        Reason::BadLimit,
        format!("{name} of {asked} is over the host's own {limit}; ask for less, or have the operator raise it"),
    )
    .with("asked", asked)
    .with("limit", limit)
}

/// What was found for each input of a kernel, in its order: what the engine is told of it, and what holds it.
pub(super) fn apart(
    declared: &Kernel,
    found: Vec<(Found, TensorPlace)>,
) -> (Vec<Input>, Vec<Source<dyn SharedSource>>) {
    let ports = declared.inputs.iter().zip(found);
    ports
        .map(|(port, (found, place))| {
            let input = Input {
                port: port.name.clone(),
                role: port.role,
                place,
            };
            (input, found.into_source())
        })
        .unzip()
}

/// Into how many slices a request wants to be cut.
pub(super) fn threads(asked: Option<u32>) -> Result<Option<NonZeroU32>, Status> {
    const MOST: u32 = 64;
    let threads = asked.map(|asked| {
        NonZeroU32::new(asked)
            .filter(|_| asked <= MOST)
            .ok_or(asked)
    });
    threads.transpose().map_err(|asked| {
        let message = format!(
            "`threads` of {asked}: ask for 1 to {MOST}, or leave it out for as many as are worth it"
        );
        Status::new(Code::InvalidArgument, Reason::BadLimit, message)
            .with("asked", asked)
            .with("limit", MOST)
    })
}

pub(super) fn tightened(host: Limits, asked: wire::Limits) -> Result<Limits, Status> {
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
