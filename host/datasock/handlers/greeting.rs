//! HELLO, PING, STATS.

use std::sync::Arc;

use strait_protocol as wire;

use super::done;
use crate::datasock::answer::Answer;
use crate::error::{Code, Reason, Status};
use crate::session::Session;

pub(in crate::datasock) fn hello(
    session: &Session,
    request: wire::Hello,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    if request.protocol != u32::from(wire::VERSION) {
        let message = format!(
            "client `{}` speaks protocol {}, this host {}; use a client of the host's version",
            crate::text::name(&request.client),
            request.protocol,
            wire::VERSION
        );
        return Err(Status::new(
            Code::FailedPrecondition,
            Reason::ProtocolVersion,
            message,
        ));
    }
    let welcome = session
        .host()
        .welcome(session.caller(), session.id.to_string(), id);
    Ok(Answer::of(&welcome))
}

pub(in crate::datasock) fn ping(
    _: &Session,
    _: wire::Empty,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    Ok(done(id))
}

pub(in crate::datasock) fn stats(
    session: &Session,
    _: wire::Empty,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    Ok(Answer::of(&wire::Stats {
        request_id: id.to_string(),
        ..session.caller().stats(session.id)
    }))
}
