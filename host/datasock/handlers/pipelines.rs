//! PIPELINES.

use std::sync::Arc;

use strait_protocol as wire;

use super::page;
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

pub(in crate::datasock) fn pipelines(
    session: &Session,
    request: wire::AskPipelines,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let caller = session.caller();
    if let Some(name) = &request.drop {
        caller.drop_pipeline(name)?;
    }
    if let Some(publish) = request.publish {
        caller.publish_pipeline(publish)?;
    }
    let (pipelines, more) = page(caller.pipelines(request.after.as_deref()));
    Ok(Answer::of(&wire::PipelineList {
        pipelines,
        more,
        request_id: id.to_string(),
    }))
}
