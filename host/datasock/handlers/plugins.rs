//! PLUGINS.

use std::sync::Arc;

use strait_protocol as wire;

use super::page;
use crate::datasock::answer::Answer;
use crate::error::Status;
use crate::session::Session;

pub(in crate::datasock) fn plugins(
    session: &Session,
    request: wire::AskPlugins,
    id: &Arc<str>,
) -> Result<Answer, Status> {
    let caller = session.caller();
    if let Some(plugin) = &request.enable {
        caller.enable_plugin(plugin, request.principal.as_deref())?;
    }
    let (plugins, more) = page(caller.plugins(request.after.as_deref()));
    Ok(Answer::of(&wire::PluginList {
        plugins,
        more,
        request_id: id.to_string(),
    }))
}
