//! What each request does, a noun a file: a body in, an answer out.

pub(super) mod calls;
pub(super) mod channels;
pub(super) mod greeting;
pub(super) mod kernels;
pub(super) mod leases;
pub(super) mod names;
pub(super) mod pipelines;
pub(super) mod plugins;
pub(super) mod quotas;
pub(super) mod segments;
pub(super) mod workers;

use std::sync::Arc;

use serde::Serialize;
use strait_protocol as wire;

use super::answer::Answer;
use crate::error::Status;
use crate::lease::LiveSegment;
use crate::session::Session;

/// Bytes of JSON that a page of a listing may reach before it ends.
const PAGE_BYTES: usize = wire::BODY_BYTES_MAX - 16_384;

fn done(id: &Arc<str>) -> Answer {
    Answer::of(&wire::Done {
        request_id: id.to_string(),
    })
}

/// The first of `items` whose JSON fits a page, and whether there are more.
fn page<T: Serialize>(items: impl IntoIterator<Item = T>) -> (Vec<T>, bool) {
    let mut taken = Vec::new();
    let mut bytes = 0;
    for item in items {
        // What does not serialise here will not in the reply either, which says so.
        bytes += serde_json::to_vec(&item).map_or(0, |json| json.len() + 1);
        if bytes > PAGE_BYTES && !taken.is_empty() {
            return (taken, true);
        }
        taken.push(item);
    }
    (taken, false)
}

/// What a client is told of a segment on which it gets no lease.
fn mapped(session: &Session, segment: &LiveSegment, id: &Arc<str>) -> wire::Mapped {
    wire::Mapped {
        name: None,
        mapping: session.host().mapping(segment),
        lease: None,
        expires_ms: None,
        request_id: id.to_string(),
    }
}

/// What a client is told of a segment with a new lease, if it may have one.
fn leased(
    session: &Session,
    segment: &Arc<LiveSegment>,
    lease_ms: Option<u64>,
    id: &Arc<str>,
) -> Result<wire::Mapped, Status> {
    let (lease, expires_ms) = session.grant(segment, lease_ms)?;
    Ok(wire::Mapped {
        lease: Some(lease),
        expires_ms: Some(expires_ms),
        ..mapped(session, segment, id)
    })
}
