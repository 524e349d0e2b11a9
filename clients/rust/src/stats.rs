//! The host's counts, and this client's own.

use serde::Deserialize;
use serde_json::Value;
use strait_protocol as wire;

use crate::error::Error;

/// What [`Client::stats`](crate::Client::stats) returns: counts at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// The host's answer. An operator of the host sees its own counts, others those of their principal.
    pub counts: wire::Stats,
    /// Tensor bytes that this client copied since it connected: those that went through `put`.
    pub client_copied_bytes: u64,
    /// Bytes of segments to fill that this client backed with huge pages.
    pub client_huge_bytes: u64,
    /// The whole answer, with what a newer host says.
    pub all: Value,
}

impl Stats {
    pub(crate) fn new(
        all: Value,
        client_copied_bytes: u64,
        client_huge_bytes: u64,
    ) -> Result<Self, Error> {
        let bad = |what: &dyn std::fmt::Display| {
            Error::Protocol(format!("its reply is not Stats: {what}"))
        };
        let counts = wire::Stats::deserialize(&all).map_err(|error| bad(&error))?;
        // Half of them would be taken for none.
        if counts.host.is_none() && all.get("process").is_some() {
            return Err(bad(&"the host's own counts are not whole"));
        }
        Ok(Self {
            counts,
            client_copied_bytes,
            client_huge_bytes,
            all,
        })
    }
}
