//! STREAM.

use std::sync::Arc;

use strait_memory::FrameSocket;
use strait_protocol as wire;

use crate::datasock::answer::Answer;
use crate::datasock::channel::ConsumerSocket;
use crate::error::Status;
use crate::session::Session;

pub(in crate::datasock) fn stream(
    session: &Session,
    request: wire::Stream,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let channel = session.caller().channel(&request.channel)?;
    // It has a socket, as a connection has.
    let place = session.caller().account().connect()?;
    let (ours, theirs) = FrameSocket::pair().map_err(|error| {
        Status::no_descriptors(&format!("no socket for the channel's batches: {error}"))
    })?;
    let reader = ConsumerSocket::new(ours, Arc::clone(id), place)?;
    let first = channel.attach(Arc::new(reader))?;
    let answer = Answer::of(&channel.to_wire(first, id));
    Ok(answer.with(vec![Arc::new(theirs.into())], Vec::new()))
}
