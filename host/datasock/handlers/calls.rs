//! INVOKE, CANCEL.

use std::sync::Arc;

use strait_protocol::{self as wire, Op};
use tokio::sync::oneshot;

use crate::datasock::answer::{Answer, parse};
use crate::datasock::frames::{Outgoing, encode, failure};
use crate::error::Status;
use crate::session::{self, Call, Invoked, Session};

/// An INVOKE that is under way.
pub(in crate::datasock) struct Running {
    pub(in crate::datasock) call: Call,
    pub(in crate::datasock) wanted: Wanted,
    pub(in crate::datasock) result: oneshot::Receiver<Result<Arc<Invoked>, Status>>,
}

/// How an INVOKE wants its results.
pub(in crate::datasock) struct Wanted {
    request_id: Arc<str>,
    is_mapped: bool,
    lease_ms: Option<u64>,
}

pub(in crate::datasock) fn invoke(
    session: &Session,
    request: wire::Invoke,
    id: Arc<str>,
) -> Result<Running, Status> {
    let wanted = Wanted {
        request_id: Arc::clone(&id),
        is_mapped: request.map.unwrap_or(true),
        lease_ms: request.lease_ms,
    };
    if wanted.is_mapped {
        session.caller().account().check_answer(1)?;
    }
    let (answer, result) = oneshot::channel();
    // The connection may have ended; then the results end with it.
    let answer = session::Answer::new(move |result| drop(answer.send(result)));
    let call = session
        .caller()
        .invoke(Some(session.id), request, id, answer);
    Ok(Running {
        call,
        wanted,
        result,
    })
}

/// OK or ERROR to INVOKE.
pub(in crate::datasock) fn invoked(
    session: &Session,
    sequence: u32,
    wanted: &Wanted,
    result: Result<Arc<Invoked>, Status>,
) -> Outgoing {
    let answer = result.and_then(|invoked| {
        let results = invoked.results.iter();
        let fds = match wanted.is_mapped {
            true => results
                .map(|r| r.segment.readonly_fd())
                .collect::<Result<_, _>>()?,
            false => Vec::new(),
        };
        // Given back if the last of them is refused. Nothing else that can fail comes between the leases
        // and the frame that tells of them.
        let mut leases = Vec::new();
        let mut results = Vec::with_capacity(invoked.results.len());
        for (index, result) in invoked.results.iter().enumerate() {
            let granted = wanted
                .is_mapped
                .then(|| session.grant(&result.segment, wanted.lease_ms))
                .transpose()
                .inspect_err(|_| drop(session.release(&leases)))?;
            leases.extend(granted.map(|(lease, _)| lease));
            results.push(wire::ResultEntry {
                port: result.port.clone(),
                mapping: session.host().mapping(&result.segment),
                lease: granted.map(|(lease, _)| lease),
                expires_ms: granted.map(|(_, expires_ms)| expires_ms),
                fd: wanted.is_mapped.then_some(index),
                name: result.name.clone(),
            });
        }
        let body = invoked.to_wire(results, &wanted.request_id);
        Ok(Answer::of(&body).with(fds, leases))
    });
    match answer {
        Ok(answer) => answer.framed(Op::Ok, session, sequence, &wanted.request_id),
        Err(status) => failure(sequence, &status, &wanted.request_id),
    }
}

/// CANCEL; `cancel` says whether the INVOKE was running.
pub(in crate::datasock) fn cancel(
    session: &Session,
    sequence: u32,
    body: &[u8],
    cancel: impl Fn(u32) -> bool,
) -> Outgoing {
    match parse::<wire::Cancel>(session, body) {
        Ok((request, id)) => {
            let reply = wire::Cancelled {
                cancelled: cancel(request.sequence),
                request_id: id.to_string(),
            };
            encode(Op::Ok, sequence, &reply, Vec::new())
        }
        Err(status) => failure(sequence, &status, "-"),
    }
}
