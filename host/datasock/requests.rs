//! Bodies to calls and results to bodies.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use strait_client::wire::{self, Op};
use tokio::sync::oneshot;

use super::Outgoing;
use crate::error::{Code, Status};
use crate::lease::LiveSegment;
use crate::session::{Answer, Call, Invoked, LeaseId, Session};

/// Bytes of JSON that a page of a listing may reach before it ends.
const PAGE_BYTES: usize = wire::BODY_BYTES_MAX - 16_384;
/// The reason of the one refusal after which there is nothing more to say.
const OTHER_PROTOCOL: &str = "PROTOCOL_VERSION";
/// Flights that a page of LIST looks at.
const LIST_MAX: usize = 256;

/// Leases of one connection: a client that never releases must not fill the host.
const LEASES_MAX: usize = 16_384;

/// Bytes of a created segment beside its tensors, at most.
const CREATE_ROOM: u64 = 16 << 20;
/// Leases that are ended on the thread that serves others, too.
pub(super) const ENDED_AT_ONCE: usize = 64;

/// What becomes of a request.
pub(super) enum Reply {
    /// Answered.
    Frame(Outgoing),
    /// Answered, and there is nothing more to say: the client speaks another protocol.
    Last(Outgoing),
    /// An INVOKE that is under way.
    Running(Box<Running>),
}

/// An INVOKE that is under way.
pub(super) struct Running {
    pub(super) call: Call,
    pub(super) request_id: Arc<str>,
    pub(super) invoke: wire::Invoke,
    pub(super) result: oneshot::Receiver<Result<Arc<Invoked>, Status>>,
}

/// A frame of `body`; one that is too long becomes an error.
pub(super) fn encode(
    op: Op,
    sequence: u32,
    body: &impl Serialize,
    fds: Vec<Arc<OwnedFd>>,
) -> Outgoing {
    match serde_json::to_vec(body) {
        Ok(body) if body.len() <= wire::BODY_BYTES_MAX => Outgoing {
            op,
            sequence,
            body,
            fds,
        },
        Ok(body) => {
            let message = format!(
                "the reply has {} bytes, a frame takes {}; use fewer or shorter column names",
                body.len(),
                wire::BODY_BYTES_MAX
            );
            failure(
                sequence,
                &Status::new(Code::OutOfRange, "BAD_REQUEST", message),
                "-",
            )
        }
        Err(error) => failure(
            sequence,
            &Status::new(Code::Internal, "HOST", error.to_string()),
            "-",
        ),
    }
}

/// OK with `leases` in it. If that becomes an error they end: the client never learns of them.
fn encode_leased(
    session: &Session,
    sequence: u32,
    body: &impl Serialize,
    fds: Vec<Arc<OwnedFd>>,
    leases: &[LeaseId],
) -> Outgoing {
    let outgoing = encode(Op::Ok, sequence, body, fds);
    if outgoing.op == Op::Error {
        drop(session.release(leases));
    }
    outgoing
}

/// ERROR.
pub(super) fn failure(sequence: u32, status: &Status, request_id: &str) -> Outgoing {
    let cut = |text: &str, most: usize| {
        let end = (0..=most.min(text.len()))
            .rev()
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(0);
        text[..end].to_owned()
    };
    let body = |message: usize, backtrace: usize, details: bool| {
        let body = wire::Failure {
            code: status.code.name().to_owned(),
            reason: status.reason.to_owned(),
            message: cut(&status.message, message),
            request_id: request_id.to_owned(),
            backtrace: status.backtrace.as_deref().map(|text| cut(text, backtrace)),
            details: match details {
                true => status.details.clone(),
                false => serde_json::Map::new(),
            },
        };
        serde_json::to_vec(&body).unwrap_or_else(|_| b"{}".to_vec())
    };
    let mut whole = body(8192, 16_384, true);
    if whole.len() > wire::BODY_BYTES_MAX {
        // Each byte may become six in JSON, and this fits even so.
        whole = body(2048, 4096, false);
    }
    Outgoing {
        op: Op::Error,
        sequence,
        body: whole,
        fds: Vec::new(),
    }
}

/// The request's body, and its id or a new one.
fn parse<T: DeserializeOwned>(
    session: &Session,
    body: &[u8],
    id: impl Fn(&T) -> Option<&str>,
) -> Result<(T, Arc<str>), Status> {
    let bad = |what: &dyn std::fmt::Display| {
        Status::new(
            Code::InvalidArgument,
            "BAD_REQUEST",
            format!("the body: {what}"),
        )
    };
    let body = if body.is_empty() { b"{}" } else { body };
    // serde would take a list of the fields' values, too, which goes wrong as soon as one is added.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(bad(&"not a JSON object"));
    }
    let request: T = serde_json::from_slice(body).map_err(|e| bad(&e))?;
    let request_id = session.host().request_id(id(&request))?;
    Ok((request, request_id))
}

/// Answers a request, or starts its INVOKE.
pub(super) fn respond(
    session: &Session,
    op: Op,
    sequence: u32,
    body: &[u8],
    mut fds: Vec<OwnedFd>,
) -> Reply {
    let expected = usize::from(op == Op::Adopt);
    if fds.len() != expected {
        let message = format!(
            "{} descriptors beside the frame, this op takes {expected}",
            fds.len()
        );
        return Reply::Frame(failure(
            sequence,
            &Status::new(Code::InvalidArgument, "BAD_FRAME", message),
            "-",
        ));
    }
    if matches!(op, Op::Create | Op::Adopt | Op::Map | Op::Invoke)
        && session.lease_count() >= LEASES_MAX
    {
        let message = format!(
            "this connection has {LEASES_MAX} leases, as many as it may; RELEASE those that are no longer mapped"
        );
        let status = Status::new(Code::ResourceExhausted, "QUOTA_EXCEEDED", message);
        return Reply::Frame(failure(sequence, &status, "-"));
    }
    let frame = match op {
        Op::Hello => {
            let greeting = hello(session, sequence, body);
            if let Err((status, id)) = &greeting
                && status.reason == OTHER_PROTOCOL
            {
                return Reply::Last(failure(sequence, status, id.as_deref().unwrap_or("-")));
            }
            greeting
        }
        Op::Kernels => kernels(session, sequence, body),
        Op::Lookup => lookup(session, sequence, body),
        Op::List => list(session, sequence, body),
        // These look at every page of a segment, or of the process: not on a thread that serves others.
        Op::Publish => tokio::task::block_in_place(|| publish(session, sequence, body)),
        Op::Seal => tokio::task::block_in_place(|| seal(session, sequence, body)),
        Op::Stats => tokio::task::block_in_place(|| stats(session, sequence, body)),
        Op::Drop => drop_flight(session, sequence, body),
        Op::Release => release(session, sequence, body),
        Op::Adopt => match fds.pop() {
            Some(fd) => tokio::task::block_in_place(|| adopt(session, sequence, body, fd)),
            None => Err((
                Status::new(Code::InvalidArgument, "BAD_FRAME", "no descriptor"),
                None,
            )),
        },
        Op::Create => create(session, sequence, body),
        Op::Map => map(session, sequence, body),
        Op::Renew => renew(session, sequence, body),
        Op::Ping => ping(session, sequence, body),
        Op::Invoke => match invoke(session, body) {
            Ok(running) => return Reply::Running(Box::new(running)),
            Err(failed) => Err(failed),
        },
        Op::Prepare | Op::Call | Op::Stream | Op::Chunk => Err((
            Status::new(
                Code::Unimplemented,
                "UNSUPPORTED_OP",
                format!("{op:?} is reserved for a later version; use INVOKE"),
            ),
            None,
        )),
        Op::Cancel | Op::Welcome | Op::Ok | Op::Error | Op::Gone | Op::Shutdown => Err((
            Status::new(
                Code::InvalidArgument,
                "BAD_FRAME",
                format!("{op:?} is not a request"),
            ),
            None,
        )),
    };
    Reply::Frame(frame.unwrap_or_else(|(status, id)| {
        tracing::debug!(
            request_id = id.as_deref(),
            reason = status.reason,
            message = status.message,
            "request refused"
        );
        failure(sequence, &status, id.as_deref().unwrap_or("-"))
    }))
}

type Failed = (Status, Option<Arc<str>>);
type Framed = Result<Outgoing, Failed>;

/// A failure of a request whose id is known.
fn of(id: &Arc<str>) -> impl Fn(Status) -> Failed + '_ {
    |status| (status, Some(Arc::clone(id)))
}

/// A failure of a request whose id is not known.
fn nameless(status: Status) -> Failed {
    (status, None)
}

fn hello(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Hello, _) =
        parse(session, body, |r: &wire::Hello| r.request_id.as_deref()).map_err(nameless)?;
    if request.protocol != u32::from(wire::VERSION) {
        let message = format!(
            "client {:?} speaks protocol {}, this host {}; use a client of the host's version",
            request.client.chars().take(64).collect::<String>(),
            request.protocol,
            wire::VERSION
        );
        return Err((
            Status::new(Code::FailedPrecondition, OTHER_PROTOCOL, message),
            Some(id),
        ));
    }
    let host = session.host();
    let (settings, limits) = (&host.config().lease, &host.config().limits);
    let welcome = wire::Welcome {
        protocol: u32::from(wire::VERSION),
        host_id: host.id().to_owned(),
        host_version: env!("CARGO_PKG_VERSION").to_owned(),
        session: session.id.to_string(),
        principal: session.principal.to_string(),
        directory: host.directory().display().to_string(),
        flight: format!("unix:{}", host.directory().join("flight.sock").display()),
        move_min_bytes: host.engine().move_min_bytes(),
        lease_ms_default: settings.lease_ms_default,
        lease_ms_max: settings.lease_ms_max,
        deadline_ms_default: limits.deadline_ms_default,
        deadline_ms_max: limits.deadline_ms_max,
        request_id: id.to_string(),
    };
    Ok(encode(Op::Welcome, sequence, &welcome, Vec::new()))
}

fn ping(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (_, id): (wire::Empty, _) =
        parse(session, body, |r: &wire::Empty| r.request_id.as_deref()).map_err(nameless)?;
    Ok(done(sequence, &id))
}

fn done(sequence: u32, id: &Arc<str>) -> Outgoing {
    encode(
        Op::Ok,
        sequence,
        &wire::Done {
            request_id: id.to_string(),
        },
        Vec::new(),
    )
}

fn stats(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (_, id): (wire::Empty, _) =
        parse(session, body, |r: &wire::Empty| r.request_id.as_deref()).map_err(nameless)?;
    let mut stats = session.host().stats(Some((session.id, session.principal)));
    if let Some(stats) = stats.as_object_mut() {
        stats.insert("request_id".to_owned(), (&*id).into());
    }
    Ok(encode(Op::Ok, sequence, &stats, Vec::new()))
}

/// The first of `items` whose JSON fits a page, and whether there are more.
fn page<T: Serialize>(items: impl IntoIterator<Item = T>) -> (Vec<T>, bool) {
    let mut taken = Vec::new();
    let mut bytes = 0;
    for item in items {
        // What does not serialise here will not in the reply either, which says so.
        bytes += serde_json::to_vec(&item).map_or(0, |json| json.len() + 1);
        if bytes > PAGE_BYTES && !taken.is_empty() {
            return (taken, true);
        }
        taken.push(item);
    }
    (taken, false)
}

fn list(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::List, _) =
        parse(session, body, |r: &wire::List| r.request_id.as_deref()).map_err(nameless)?;
    let host = session.host();
    let found = host.list(session.principal, request.after.as_deref(), LIST_MAX);
    let full = found.len() == LIST_MAX;
    let (flights, cut) = page(found.into_iter().map(|(name, segment)| wire::Flight {
        name,
        mapping: host.mapping(&segment),
    }));
    let body = wire::Flights {
        flights,
        more: full || cut,
        request_id: id.to_string(),
    };
    Ok(encode(Op::Ok, sequence, &body, Vec::new()))
}

fn kernels(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Kernels, _) =
        parse(session, body, |r: &wire::Kernels| r.request_id.as_deref()).map_err(nameless)?;
    let key = |k: &wire::Kernel| format!("{}/{}", k.plugin, k.name);
    let all = session.host().plugins().kernels();
    let wanted = all
        .iter()
        .map(wire::Kernel::from)
        .filter(|k| {
            request
                .kernel
                .as_ref()
                .is_none_or(|name| k.name == *name || key(k) == *name)
        })
        .filter(|k| {
            request.after.as_ref().is_none_or(|after| {
                (k.plugin.as_str(), k.name.as_str()) > after.split_once('/').unwrap_or((after, ""))
            })
        });
    let (kernels, more) = page(wanted);
    let body = wire::KernelList {
        kernels,
        more,
        request_id: id.to_string(),
    };
    Ok(encode(Op::Ok, sequence, &body, Vec::new()))
}

fn mapped(session: &Session, segment: &LiveSegment, id: &Arc<str>) -> wire::Mapped {
    wire::Mapped {
        name: None,
        mapping: session.host().mapping(segment),
        lease: None,
        expires_ms: None,
        request_id: id.to_string(),
    }
}

fn leased(
    session: &Session,
    segment: &Arc<LiveSegment>,
    lease_ms: Option<u64>,
    id: &Arc<str>,
) -> wire::Mapped {
    let (lease, expires_ms) = session.grant(segment, lease_ms);
    wire::Mapped {
        lease: Some(lease),
        expires_ms: Some(expires_ms),
        ..mapped(session, segment, id)
    }
}

fn lookup(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Name, _) =
        parse(session, body, |r: &wire::Name| r.request_id.as_deref()).map_err(nameless)?;
    let segment = session
        .host()
        .lookup(session.principal, &request.name)
        .map_err(of(&id))?;
    let reply = wire::Mapped {
        name: Some(request.name),
        ..mapped(session, &segment, &id)
    };
    Ok(encode(Op::Ok, sequence, &reply, Vec::new()))
}

fn drop_flight(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Name, _) =
        parse(session, body, |r: &wire::Name| r.request_id.as_deref()).map_err(nameless)?;
    session
        .host()
        .drop_flight(session.principal, &request.name)
        .map_err(of(&id))?;
    Ok(done(sequence, &id))
}

fn create(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Create, _) =
        parse(session, body, |r: &wire::Create| r.request_id.as_deref()).map_err(nameless)?;
    let host = session.host();
    let bytes = request.tensors.iter().fold(0_u64, |sum, tensor| {
        sum.saturating_add(
            tensor
                .shape
                .iter()
                .fold(16, |n, size| n.saturating_mul(*size)),
        )
    });
    let create = || host.create(session.principal, request.tensors);
    // Without room it waits for what is being freed, or frees idle results first.
    let created = match host.budget().has_room(bytes.saturating_add(CREATE_ROOM)) {
        true => create(),
        false => tokio::task::block_in_place(create),
    };
    let (segment, fd) = created.map_err(of(&id))?;
    let reply = leased(session, &segment, request.lease_ms, &id);
    Ok(encode_leased(
        session,
        sequence,
        &reply,
        vec![fd],
        reply.lease.as_slice(),
    ))
}

fn seal(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::SegmentId, _) =
        parse(session, body, |r: &wire::SegmentId| r.request_id.as_deref()).map_err(nameless)?;
    let segment = session.segment(&request.segment).map_err(of(&id))?;
    segment.seal().map_err(|e| of(&id)(e.into()))?;
    Ok(encode(
        Op::Ok,
        sequence,
        &mapped(session, &segment, &id),
        Vec::new(),
    ))
}

fn publish(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Publish, _) =
        parse(session, body, |r: &wire::Publish| r.request_id.as_deref()).map_err(nameless)?;
    let segment = session.segment(&request.segment).map_err(of(&id))?;
    session
        .host()
        .publish(session.principal, &segment, &request.name, request.replace)
        .map_err(of(&id))?;
    let reply = wire::Mapped {
        name: Some(request.name),
        ..mapped(session, &segment, &id)
    };
    Ok(encode(Op::Ok, sequence, &reply, Vec::new()))
}

fn adopt(session: &Session, sequence: u32, body: &[u8], fd: OwnedFd) -> Framed {
    let (request, id): (wire::Adopt, _) =
        parse(session, body, |r: &wire::Adopt| r.request_id.as_deref()).map_err(nameless)?;
    let segment = session
        .host()
        .adopt(
            session.principal,
            fd,
            request.tensors.into_iter().map(Into::into).collect(),
        )
        .map_err(of(&id))?;
    if request.name.is_some() && !matches!(&*segment.body(), crate::lease::Body::Sealed(_)) {
        let message = "a memfd without F_SEAL_WRITE cannot have a name: its sender can still write; seal it first";
        return Err((
            Status::new(Code::InvalidArgument, "BAD_SEGMENT", message),
            Some(id),
        ));
    }
    let reply = wire::Mapped {
        name: request.name.clone(),
        ..leased(session, &segment, request.lease_ms, &id)
    };
    let outgoing = encode_leased(
        session,
        sequence,
        &reply,
        Vec::new(),
        reply.lease.as_slice(),
    );
    // Only a segment that its owner hears of gets a name.
    if let (Op::Ok, Some(name)) = (outgoing.op, &request.name) {
        let published = session
            .host()
            .publish(session.principal, &segment, name, request.replace);
        published.map_err(|status| {
            drop(session.release(reply.lease.as_slice()));
            of(&id)(status)
        })?;
    }
    Ok(outgoing)
}

fn map(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Map, _) =
        parse(session, body, |r: &wire::Map| r.request_id.as_deref()).map_err(nameless)?;
    let segment = match (&request.name, &request.segment) {
        (Some(name), None) => session.host().lookup(session.principal, name),
        (None, Some(segment)) => session.segment(segment),
        _ => Err(Status::new(
            Code::InvalidArgument,
            "BAD_REQUEST",
            "MAP takes `name` or `segment`, one of them",
        )),
    }
    .map_err(of(&id))?;
    let fd = segment.readonly_fd().map_err(|e| of(&id)(e.into()))?;
    let mut reply = leased(session, &segment, request.lease_ms, &id);
    reply.name = request.name;
    Ok(encode_leased(
        session,
        sequence,
        &reply,
        vec![fd],
        reply.lease.as_slice(),
    ))
}

fn release(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Leases, _) =
        parse(session, body, |r: &wire::Leases| r.request_id.as_deref()).map_err(nameless)?;
    let ended = session.release(&request.leases);
    let released = ended.count() as u64;
    // A result goes back to the pool at once, where the next call looks for it, and what is big is
    // freed elsewhere; so only a great number of them takes long.
    match ended.count() > ENDED_AT_ONCE {
        true => tokio::task::block_in_place(|| drop(ended)),
        false => drop(ended),
    }
    Ok(encode(
        Op::Ok,
        sequence,
        &wire::Released {
            released,
            request_id: id.to_string(),
        },
        Vec::new(),
    ))
}

fn renew(session: &Session, sequence: u32, body: &[u8]) -> Framed {
    let (request, id): (wire::Leases, _) =
        parse(session, body, |r: &wire::Leases| r.request_id.as_deref()).map_err(nameless)?;
    let expires_ms = session
        .renew(&request.leases, request.lease_ms)
        .map_err(of(&id))?;
    Ok(encode(
        Op::Ok,
        sequence,
        &wire::Renewed {
            expires_ms,
            request_id: id.to_string(),
        },
        Vec::new(),
    ))
}

/// CANCEL; `cancel` says whether the INVOKE was running.
pub(super) fn cancel(
    session: &Session,
    sequence: u32,
    body: &[u8],
    cancel: impl Fn(u32) -> bool,
) -> Outgoing {
    match parse(session, body, |r: &wire::Cancel| r.request_id.as_deref()) {
        Ok((request, id)) => {
            let cancelled = cancel(request.sequence);
            encode(
                Op::Ok,
                sequence,
                &wire::Cancelled {
                    cancelled,
                    request_id: id.to_string(),
                },
                Vec::new(),
            )
        }
        Err(status) => failure(sequence, &status, "-"),
    }
}

fn invoke(session: &Session, body: &[u8]) -> Result<Running, Failed> {
    let (request, id): (wire::Invoke, _) =
        parse(session, body, |r: &wire::Invoke| r.request_id.as_deref()).map_err(nameless)?;
    let (answer, result) = oneshot::channel();
    let call = session.host().invoke(
        session.principal,
        Some(session.id),
        request.clone(),
        Arc::clone(&id),
        // The connection may have ended; then the results end with it.
        Answer::new(move |result| drop(answer.send(result))),
    );
    Ok(Running {
        call,
        request_id: id,
        invoke: request,
        result,
    })
}

/// OK or ERROR to INVOKE.
pub(super) fn invoked(
    session: &Session,
    sequence: u32,
    invoke: &wire::Invoke,
    request_id: &Arc<str>,
    result: Result<Arc<Invoked>, Status>,
) -> Outgoing {
    let framed = result.and_then(|invoked| {
        let mapped = invoke.map.unwrap_or(true);
        let fds = match mapped {
            true => invoked
                .results
                .iter()
                .map(|r| r.segment.readonly_fd())
                .collect::<Result<_, _>>()?,
            false => Vec::new(),
        };
        // Nothing that can fail comes between the leases and the frame that tells of them.
        let mut leases = Vec::new();
        let mut results = Vec::with_capacity(invoked.results.len());
        for (index, result) in invoked.results.iter().enumerate() {
            let granted = mapped.then(|| session.grant(&result.segment, invoke.lease_ms));
            leases.extend(granted.map(|(lease, _)| lease));
            results.push(wire::ResultEntry {
                port: result.port.clone(),
                mapping: session.host().mapping(&result.segment),
                lease: granted.map(|(lease, _)| lease),
                expires_ms: granted.map(|(_, expires_ms)| expires_ms),
                fd: mapped.then_some(index),
                name: result.name.clone(),
            });
        }
        let body = invoked.to_wire(results, request_id);
        Ok(encode_leased(session, sequence, &body, fds, &leases))
    });
    framed.unwrap_or_else(|status| failure(sequence, &status, request_id))
}
