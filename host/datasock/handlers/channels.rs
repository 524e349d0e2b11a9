//! STREAM.

use std::sync::Arc;

use strait_memory::FrameSocket;
use strait_protocol as wire;

use crate::datasock::answer::Answer;
use crate::datasock::channel::ConsumerSocket;
use crate::error::Status;
use crate::session::{Caller, Session};

pub(in crate::datasock) fn stream(
    session: &Session,
    request: wire::Stream,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let (theirs, told) = attach(session.caller(), &request, id)?;
    Ok(Answer::of(&told).with(vec![Arc::new(theirs.into())], Vec::new()))
}

/// Makes `caller` the consumer of the channel: the socket on which its batches come, and what is told of it.
///
/// # Errors
/// What STREAM is answered.
pub(in crate::datasock) fn attach(
    caller: &Caller,
    request: &wire::Stream,
    id: &Arc<str>,
) -> Result<(FrameSocket, wire::Streamed), Status> {
    let channel = caller.channel(&request.channel)?;
    // It has a socket, as a connection has.
    let place = caller.account().connect()?;
    let (ours, theirs) = FrameSocket::pair().map_err(|error| {
        Status::no_descriptors(&format!("no socket for the channel's batches: {error}"))
    })?;
    let reader = ConsumerSocket::new(ours, Arc::clone(id), place)?;
    let first = channel.attach(Arc::new(reader))?;
    Ok((theirs, channel.to_wire(first, id)))
}
