//! What a handler gets and gives: a parsed body, an answer that is not a frame yet.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::Serialize;
use strait_protocol::{self as wire, Op};

use super::frames::{Outgoing, failure, framed};
use crate::error::{Code, Reason, Status};
use crate::session::{InlineBytes, LeaseId, Session};

/// What a handler answers.
pub(super) struct Answer {
    /// JSON, or why it could not be written.
    body: serde_json::Result<Vec<u8>>,
    fds: Vec<Arc<OwnedFd>>,
    leases: Vec<LeaseId>,
    payload: Vec<Arc<InlineBytes>>,
}

impl Answer {
    pub(super) fn of(body: &impl Serialize) -> Self {
        Self {
            body: serde_json::to_vec(body),
            fds: Vec::new(),
            leases: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// With descriptors beside it, and the leases that it tells of.
    pub(super) fn with(self, fds: Vec<Arc<OwnedFd>>, leases: Vec<LeaseId>) -> Self {
        Self {
            fds,
            leases,
            ..self
        }
    }

    /// With these bytes after the JSON.
    pub(super) fn followed_by(self, payload: Vec<Arc<InlineBytes>>) -> Self {
        Self { payload, ..self }
    }

    /// Whether it will be sent as it is, and not an error in its place.
    pub(super) fn fits(&self) -> bool {
        let body = self.body.as_ref();
        body.is_ok_and(|body| body.len() <= wire::BODY_BYTES_MAX)
    }

    /// As a frame. If that becomes an error its leases end: the client never learns of them.
    pub(super) fn framed(self, op: Op, session: &Session, sequence: u32, id: &str) -> Outgoing {
        let count = self.fds.len();
        let mut outgoing = framed(op, sequence, self.body, self.fds);
        if count > 0 && outgoing.op != Op::Error {
            match session.caller().account().descriptors(count) {
                Ok(places) => outgoing.places = Some(places),
                Err(status) => outgoing = failure(sequence, &status, id),
            }
        }
        if outgoing.op != Op::Error {
            outgoing.payload = self.payload;
        } else {
            drop(session.release(&self.leases));
        }
        outgoing
    }
}

/// The request's body, and its id or a new one.
pub(super) fn parse<T: wire::Request>(
    session: &Session,
    body: &[u8],
) -> Result<(T, Arc<str>), Status> {
    let bad = |what: &dyn std::fmt::Display| {
        Status::new(
            Code::InvalidArgument,
            Reason::BadRequest,
            format!("the body: {what}"),
        )
    };
    let body = if body.is_empty() { b"{}" } else { body };
    // serde would take a list of the fields' values, too, which goes wrong as soon as one is added.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(bad(&"not a JSON object"));
    }
    let request: T = serde_json::from_slice(body).map_err(|e| bad(&e))?;
    let request_id = session.host().request_id(request.request_id())?;
    Ok((request, request_id))
}
