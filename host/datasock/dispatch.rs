//! Requests to handlers, and what becomes of them to frames.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_protocol::{self as wire, Op};

use super::answer::{Answer, parse};
use super::frames::{Outgoing, failure};
use super::handlers::{
    calls, channels, greeting, kernels, leases, names, plugins, quotas, segments, workers,
};
use crate::error::{Code, Reason, Status};
use crate::session::Session;

/// The reason of the one refusal after which there is nothing more to say.
const OTHER_PROTOCOL: Reason = Reason::ProtocolVersion;

/// What becomes of a request.
pub(super) enum Reply {
    /// Answered.
    Frame(Outgoing),
    /// Answered, and there is nothing more to say: the client speaks another protocol.
    Last(Outgoing),
    /// An INVOKE that is under way.
    Running(Box<calls::Running>),
}

/// A request on its way to its handler.
struct Asked<'a> {
    session: &'a Session,
    op: Op,
    sequence: u32,
    body: &'a [u8],
}

impl Asked<'_> {
    fn answer<T: wire::Request>(
        &self,
        handler: impl FnOnce(&Session, T, &Arc<str>) -> Result<Answer, Status>,
    ) -> Reply {
        let (request, id) = match parse(self.session, self.body) {
            Ok(parsed) => parsed,
            Err(status) => return self.refused(&status, None),
        };
        match handler(self.session, request, &id) {
            Ok(answer) => {
                let op = match self.op {
                    Op::Hello => Op::Welcome,
                    _ => Op::Ok,
                };
                Reply::Frame(answer.framed(op, self.session, self.sequence, &id))
            }
            Err(status) => self.refused(&status, Some(&id)),
        }
    }

    /// The same for a handler that looks at every page of a segment, or of the process: not on a thread that
    /// serves others.
    fn answer_slowly<T: wire::Request>(
        &self,
        handler: impl FnOnce(&Session, T, &Arc<str>) -> Result<Answer, Status>,
    ) -> Reply {
        tokio::task::block_in_place(|| self.answer(handler))
    }

    fn refused(&self, status: &Status, id: Option<&str>) -> Reply {
        tracing::debug!(
            request_id = id,
            reason = status.reason.name(),
            message = status.message,
            "request refused"
        );
        let failure = failure(self.sequence, status, id.unwrap_or("-"));
        match status.reason {
            OTHER_PROTOCOL => Reply::Last(failure),
            _ => Reply::Frame(failure),
        }
    }
}

/// Answers a request, or starts its INVOKE, whose reply has `room` for a payload in bytes.
pub(super) fn respond(
    session: &Session,
    op: Op,
    sequence: u32,
    (body, payload): (&[u8], &[u8]),
    room: u64,
    mut fds: Vec<OwnedFd>,
) -> Reply {
    let asked = Asked {
        session,
        op,
        sequence,
        body,
    };
    let expected = usize::from(op == Op::Adopt);
    if fds.len() != expected {
        let message = format!(
            "{} descriptors beside the frame, this op takes {expected}",
            fds.len()
        );
        let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
        return asked.refused(&status, None);
    }
    if matches!(op, Op::Create | Op::Adopt | Op::Map | Op::Stream)
        && let Err(status) = session.caller().account().check_answer(1)
    {
        return asked.refused(&status, None);
    }
    match op {
        Op::Hello => asked.answer(greeting::hello),
        Op::Ping => asked.answer(greeting::ping),
        Op::Stats => asked.answer_slowly(greeting::stats),
        Op::Limits => asked.answer(quotas::limits),
        Op::Workers => asked.answer(workers::workers),
        Op::Plugins => asked.answer(plugins::plugins),
        Op::Kernels => asked.answer(kernels::kernels),
        Op::Lookup => asked.answer(names::lookup),
        Op::List => asked.answer(names::list),
        Op::Publish => asked.answer_slowly(names::publish),
        Op::Drop => asked.answer(names::drop_flight),
        Op::Share => asked.answer(names::share),
        Op::Create => asked.answer(segments::create),
        Op::Seal => asked.answer_slowly(segments::seal),
        Op::Adopt => match fds.pop() {
            Some(fd) => asked
                .answer_slowly(|session, request, id| segments::adopt(session, request, id, fd)),
            // Counted above.
            None => asked.refused(
                &Status::new(Code::InvalidArgument, Reason::BadFrame, "no descriptor"),
                None,
            ),
        },
        Op::Map => asked.answer(segments::map),
        Op::Stream => asked.answer_slowly(channels::stream),
        Op::Release => asked.answer(leases::release),
        Op::Renew => asked.answer(leases::renew),
        Op::Invoke => match parse(session, body) {
            Ok((request, id)) => {
                match calls::invoke(session, request, Arc::clone(&id), (payload, room)) {
                    Ok(running) => Reply::Running(Box::new(running)),
                    Err(status) => asked.refused(&status, Some(&id)),
                }
            }
            Err(status) => asked.refused(&status, None),
        },
        Op::Call | Op::Chunk | Op::Last => {
            let message = format!("{op:?} goes over the socket that the OK to PREPARE brings");
            let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
            asked.refused(&status, None)
        }
        // Those of a connection itself are refused here only for their descriptors, above.
        Op::Cancel | Op::Prepare | Op::Welcome | Op::Ok | Op::Error | Op::Gone | Op::Shutdown => {
            let message = format!("{op:?} is not a request");
            let status = Status::new(Code::InvalidArgument, Reason::BadFrame, message);
            asked.refused(&status, None)
        }
    }
}
