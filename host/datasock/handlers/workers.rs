//! WORKERS.

use std::sync::Arc;

use strait_protocol as wire;

use super::page;
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

pub(in crate::datasock) fn workers(
    session: &Session,
    request: wire::AskWorkers,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let (workers, more) = page(session.caller().worker_processes(request.after));
    Ok(Answer::of(&wire::WorkerList {
        workers,
        more,
        request_id: id.to_string(),
    }))
}
