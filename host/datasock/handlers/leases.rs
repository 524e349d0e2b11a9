//! RELEASE, RENEW.

use std::sync::Arc;

use strait_protocol as wire;

use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

/// Leases that are ended on the thread that serves others, too.
pub(in crate::datasock) const ENDED_AT_ONCE: usize = 64;

pub(in crate::datasock) fn release(
    session: &Session,
    request: wire::Leases,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let ended = session.release(&request.leases);
    let released = ended.count() as u64;
    // A result goes back to the pool at once, where the next call looks for it, and what is big is
    // freed elsewhere; so only a great number of them takes long.
    match ended.count() > ENDED_AT_ONCE {
        true => tokio::task::block_in_place(|| drop(ended)),
        false => drop(ended),
    }
    Ok(Answer::of(&wire::Released {
        released,
        request_id: id.to_string(),
    }))
}

pub(in crate::datasock) fn renew(
    session: &Session,
    request: wire::Leases,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let expires_ms = session.renew(&request.leases, request.lease_ms)?;
    Ok(Answer::of(&wire::Renewed {
        expires_ms,
        request_id: id.to_string(),
    }))
}
