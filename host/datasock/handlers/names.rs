//! LOOKUP, LIST, PUBLISH, DROP, SHARE.

use std::sync::Arc;

use strait_protocol as wire;

use super::{done, mapped, page};
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

/// Flights that a page of LIST looks at.
const LIST_MAX: usize = 256;

pub(in crate::datasock) fn lookup(
    session: &Session,
    request: wire::Name,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let segment = session.caller().lookup(&request.name)?;
    Ok(Answer::of(&wire::Mapped {
        name: Some(request.name),
        ..mapped(session, &segment, id)
    }))
}

pub(in crate::datasock) fn list(
    session: &Session,
    request: wire::List,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let found = session.caller().list(request.after.as_deref(), LIST_MAX)?;
    let full = found.len() == LIST_MAX;
    let (flights, cut) = page(found.into_iter().map(|(name, segment)| wire::Flight {
        name,
        mapping: session.host().mapping(&segment),
    }));
    Ok(Answer::of(&wire::Flights {
        flights,
        more: full || cut,
        request_id: id.to_string(),
    }))
}

pub(in crate::datasock) fn publish(
    session: &Session,
    request: wire::Publish,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let segment = session.segment(&request.segment)?;
    session
        .caller()
        .publish(&segment, &request.name, request.replace)?;
    Ok(Answer::of(&wire::Mapped {
        name: Some(request.name),
        ..mapped(session, &segment, id)
    }))
}

pub(in crate::datasock) fn drop_flight(
    session: &Session,
    request: wire::Name,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    session.caller().drop_flight(&request.name)?;
    Ok(done(id))
}

pub(in crate::datasock) fn share(
    session: &Session,
    request: wire::Share,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let caller = session.caller();
    let shared = caller.share(&request.name, &request.add, &request.remove)?;
    Ok(Answer::of(&wire::Shared {
        name: request.name,
        shared,
        request_id: id.to_string(),
    }))
}
