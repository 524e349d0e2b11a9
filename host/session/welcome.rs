//! What is told to whoever comes: WELCOME.

use std::sync::Arc;

use strait_protocol as wire;

use super::{Caller, Host};

impl Host {
    /// WELCOME for `caller`, whose `session` is empty over Flight.
    pub fn welcome(
        &self,
        caller: &Caller,
        session: String,
        request_id: &Arc<str>,
    ) -> wire::Welcome {
        let (lease, limits) = (&self.config.lease, &self.config.limits);
        let flight = self.directory.join(wire::FLIGHT_SOCKET);
        wire::Welcome {
            protocol: u32::from(wire::VERSION),
            host_id: self.id.clone(),
            host_version: env!("CARGO_PKG_VERSION").to_owned(),
            session,
            principal: caller.principal().to_string(),
            directory: self.directory.display().to_string(),
            flight: format!("unix:{}", flight.display()),
            move_min_bytes: self.config.engine.move_min_bytes,
            inline_bytes: limits.inline_bytes.min(wire::PAYLOAD_BYTES_MAX as u64),
            lease_ms_default: lease.lease_ms_default,
            lease_ms_max: lease.lease_ms_max,
            deadline_ms_default: limits.deadline_ms_default,
            deadline_ms_max: limits.deadline_ms_max,
            request_id: request_id.to_string(),
        }
    }
}
