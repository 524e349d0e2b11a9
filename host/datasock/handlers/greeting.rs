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
    let host = session.host();
    let (settings, limits) = (&host.config().lease, &host.config().limits);
    Ok(Answer::of(&wire::Welcome {
        protocol: u32::from(wire::VERSION),
        host_id: host.id().to_owned(),
        host_version: env!("CARGO_PKG_VERSION").to_owned(),
        session: session.id.to_string(),
        principal: session.caller().principal().to_string(),
        directory: host.directory().display().to_string(),
        flight: format!(
            "unix:{}",
            host.directory().join(wire::FLIGHT_SOCKET).display()
        ),
        move_min_bytes: host.config().engine.move_min_bytes,
        inline_bytes: limits.inline_bytes.min(wire::PAYLOAD_BYTES_MAX as u64),
        lease_ms_default: settings.lease_ms_default,
        lease_ms_max: settings.lease_ms_max,
        deadline_ms_default: limits.deadline_ms_default,
        deadline_ms_max: limits.deadline_ms_max,
        request_id: id.to_string(),
    }))
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
