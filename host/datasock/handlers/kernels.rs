//! KERNELS.

use std::sync::Arc;

use strait_protocol as wire;

use super::page;
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

pub(in crate::datasock) fn kernels(
    session: &Session,
    request: wire::Kernels,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let (kernels, more) = page(session.caller().kernels(&request)?);
    Ok(Answer::of(&wire::KernelList {
        kernels,
        more,
        request_id: id.to_string(),
    }))
}
