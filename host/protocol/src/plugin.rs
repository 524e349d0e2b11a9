//! PLUGINS: what is loaded, and what of it is out of service.

use serde::{Deserialize, Serialize};

/// One plugin in the answer to PLUGINS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// Its name.
    pub name: String,
    /// Of the component that was loaded, in hexadecimal digits.
    pub sha256: String,
    /// Names of its kernels.
    pub kernels: Vec<String>,
    /// Worker processes that its kernels cost lately, for each principal whose kernels that were: as many as a reply has room
    /// for, first those that keep it out of service.
    pub incidents: Vec<Incidents>,
}

/// What a plugin cost a principal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incidents {
    /// Whose calls those were.
    pub principal: String,
    /// How many worker processes.
    pub count: u64,
    /// What the last such call ended with.
    pub last: String,
    /// Milliseconds since the plugin has been out of service for that principal; none: it is in service.
    pub out_ms: Option<u64>,
}

/// OK to PLUGINS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginList {
    /// By name.
    pub plugins: Vec<Plugin>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}
