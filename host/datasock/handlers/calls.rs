//! INVOKE, CANCEL.

use std::sync::Arc;

use strait_protocol::{self as wire, Op};
use tokio::sync::oneshot;

use crate::datasock::answer::{Answer, parse};
use crate::datasock::frames::{Outgoing, encode, failure};
use crate::error::{Code, Reason, Status};
use crate::session::{self, Call, Framed, Invoked, InvokedResult, ResultBody, Session};

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
    (payload, room): (&[u8], u64),
) -> Result<Running, Status> {
    let wanted = Wanted {
        request_id: Arc::clone(&id),
        is_mapped: request.map.unwrap_or(true),
        lease_ms: request.lease_ms,
    };
    // One whose results all come in the frame needs neither.
    if wanted.is_mapped && request.inline_bytes.is_none() {
        session.caller().account().check_answer(1)?;
    }
    let (answer, result) = oneshot::channel();
    // The connection may have ended; then the results end with it.
    let answer = session::Answer::new(move |result| drop(answer.send(result)));
    let framed = Framed {
        session: Some(session.id),
        payload,
        room,
    };
    let call = session.caller().invoke(Some(framed), request, id, answer);
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
        let segments = invoked.results.iter().filter_map(InvokedResult::segment);
        let fds = match wanted.is_mapped {
            true => segments
                .map(|segment| segment.readonly_fd())
                .collect::<Result<_, _>>()?,
            false => Vec::new(),
        };
        // Given back if the last of them is refused. Nothing else that can fail comes between the leases
        // and the frame that tells of them.
        let mut leases = Vec::new();
        let mut results = Vec::with_capacity(invoked.results.len());
        let (mut payload, mut offset) = (Vec::new(), 0);
        for result in &invoked.results {
            let segment = result.segment().filter(|_| wanted.is_mapped);
            let granted = segment
                .map(|segment| session.grant(segment, wanted.lease_ms))
                .transpose()
                .inspect_err(|_| drop(session.release(&leases)))?;
            results.push(wire::ResultEntry {
                lease: granted.map(|(lease, _)| lease),
                expires_ms: granted.map(|(_, expires_ms)| expires_ms),
                fd: granted.map(|_| leases.len()),
                ..session.host().entry(result, offset)
            });
            leases.extend(granted.map(|(lease, _)| lease));
            if let ResultBody::Inline(_, bytes) = &result.body {
                let length = bytes.as_ref().as_ref().len() as u64;
                session.host().framed().results.add(length);
                offset += wire::padded(length).unwrap_or(length);
                payload.push(Arc::clone(bytes));
            }
        }
        let body = invoked.to_wire(results, &wanted.request_id);
        Ok(Answer::of(&body).with(fds, leases).followed_by(payload))
    });
    match answer {
        Ok(answer) => answer.framed(Op::Ok, session, sequence, &wanted.request_id),
        Err(status) => failure(sequence, &status, &wanted.request_id),
    }
}

/// What a CANCEL names.
pub(in crate::datasock) enum Cancelling {
    /// The sequence of an INVOKE or PREPARE.
    Sequence(u32),
    /// The number of a PREPARE that is done.
    Prepared(u64),
}

/// CANCEL; `cancel` says whether there was anything to end.
pub(in crate::datasock) fn cancel(
    session: &Session,
    sequence: u32,
    body: &[u8],
    cancel: impl Fn(Cancelling) -> bool,
) -> Outgoing {
    let asked = parse::<wire::Cancel>(session, body).and_then(|(request, id)| {
        match (request.sequence, request.prepared) {
            (Some(sequence), None) => Ok((Cancelling::Sequence(sequence), id)),
            (None, Some(prepared)) => Ok((Cancelling::Prepared(prepared), id)),
            _ => Err(Status::new(
                Code::InvalidArgument,
                Reason::BadRequest,
                "CANCEL takes either `sequence` or `prepared`",
            )),
        }
    });
    match asked {
        Ok((asked, id)) => {
            let reply = wire::Cancelled {
                cancelled: cancel(asked),
                request_id: id.to_string(),
            };
            encode(Op::Ok, sequence, &reply, Vec::new())
        }
        Err(status) => failure(sequence, &status, "-"),
    }
}
