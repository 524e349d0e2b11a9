//! LIMITS.

use std::sync::Arc;

use strait_protocol as wire;

use super::page;
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

/// Principals that a page looks at.
const LIST_MAX: usize = 256;

pub(in crate::datasock) fn limits(
    session: &Session,
    request: wire::AskLimits,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let caller = session.caller();
    if let Some(set) = &request.set {
        caller.set_quotas(request.principal.as_deref(), set)?;
    }
    let found = caller.quotas(request.after.as_deref(), LIST_MAX)?;
    let full = found.len() == LIST_MAX;
    let (accounts, cut) = page(found);
    Ok(Answer::of(&wire::QuotaList {
        host: session.host().totals(),
        default: caller.default_quotas()?,
        accounts,
        more: full || cut,
        request_id: id.to_string(),
    }))
}
