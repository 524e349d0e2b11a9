//! CREATE, SEAL, ADOPT, MAP.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_protocol as wire;

use super::{leased, mapped};
use crate::datasock::answer::Answer;
use crate::error::{Code, Reason, Status};
use crate::session::Session;

/// Bytes of a created segment beside its tensors, at most.
const CREATE_ROOM: u64 = 16 << 20;

pub(in crate::datasock) fn create(
    session: &Session,
    request: wire::Create,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let caller = session.caller();
    let bytes = request.tensors.iter().fold(0_u64, |sum, tensor| {
        sum.saturating_add(
            tensor
                .shape
                .iter()
                .fold(16, |n, size| n.saturating_mul(*size)),
        )
    });
    let has_room = caller
        .account()
        .segments()
        .has_room(bytes.saturating_add(CREATE_ROOM));
    let create = || caller.create(request.tensors);
    // Without room it waits for what is being freed, or frees idle results first.
    let (segment, fd) = match has_room {
        true => create(),
        false => tokio::task::block_in_place(create),
    }?;
    let reply = leased(session, &segment, request.lease_ms, id)?;
    Ok(Answer::of(&reply).with(vec![fd], reply.lease.into_iter().collect()))
}

pub(in crate::datasock) fn seal(
    session: &Session,
    request: wire::SegmentId,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let segment = session.segment(&request.segment)?;
    session.caller().seal(&segment)?;
    Ok(Answer::of(&mapped(session, &segment, id)))
}

pub(in crate::datasock) fn adopt(
    session: &Session,
    request: wire::Adopt,
    id: &Arc<str>,
    fd: OwnedFd,
) -> Result<Answer, Status> {
    let caller = session.caller();
    let tensors = request.tensors.into_iter().map(Into::into).collect();
    let segment = caller.adopt(fd, tensors, request.name.is_some())?;
    let reply = wire::Mapped {
        name: request.name.clone(),
        ..leased(session, &segment, request.lease_ms, id)?
    };
    let answer = Answer::of(&reply).with(Vec::new(), reply.lease.into_iter().collect());
    // Only a segment that its owner hears of gets a name.
    if let Some(name) = request.name.filter(|_| answer.fits()) {
        let published = caller.publish(&segment, &name, request.replace);
        published.inspect_err(|_| drop(session.release(reply.lease.as_slice())))?;
    }
    Ok(answer)
}

pub(in crate::datasock) fn map(
    session: &Session,
    request: wire::Map,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let segment = match (&request.name, &request.segment) {
        (Some(name), None) => session.caller().lookup(name),
        (None, Some(segment)) => session.segment(segment),
        _ => Err(Status::new(
            Code::InvalidArgument,
            Reason::BadRequest,
            "MAP takes either `name` or `segment`",
        )),
    }?;
    let fd = segment.readonly_fd()?;
    let reply = wire::Mapped {
        name: request.name,
        ..leased(session, &segment, request.lease_ms, id)?
    };
    Ok(Answer::of(&reply).with(vec![fd], reply.lease.into_iter().collect()))
}
