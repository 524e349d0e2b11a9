//! What the operators of a host see and change of everybody's quotas, while it runs.

use strait_protocol as wire;

use super::{Caller, Host};
use crate::error::{Code, Reason, Status};

/// Longest text of a principal in bytes.
const PRINCIPAL_BYTES_MAX: usize = 200;

impl Caller {
    /// The principals after `after` with their quotas and what they have, at most `count`, by name.
    ///
    /// # Errors
    /// `NO_RIGHT`.
    pub fn quotas(
        &self,
        after: Option<&str>,
        count: usize,
    ) -> Result<Vec<wire::AccountQuotas>, Status> {
        self.check_admin("see everybody's quotas")?;
        Ok(self.host.accounts.list(after.unwrap_or(""), count))
    }

    /// What a principal may have for whom nothing else is set.
    ///
    /// # Errors
    /// `NO_RIGHT`.
    pub fn default_quotas(&self) -> Result<wire::Quotas, Status> {
        self.check_admin("see everybody's quotas")?;
        Ok(self.host.accounts.default_quotas())
    }

    /// Changes quotas of a principal, or without one of all for whom nothing else is set. It holds from now on until
    /// the host ends: what somebody has beyond it stays.
    ///
    /// # Errors
    /// `NO_RIGHT`; `BAD_REQUEST` for a text that no principal has.
    pub fn set_quotas(
        &self,
        principal: Option<&str>,
        changes: &wire::QuotaSettings,
    ) -> Result<(), Status> {
        self.check_admin("change quotas")?;
        let fits = |text: &str| {
            text.len() <= PRINCIPAL_BYTES_MAX
                && text.contains(':')
                && !text.chars().any(char::is_control)
        };
        if let Some(text) = principal.filter(|text| !fits(text)) {
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::BadRequest,
                format!("`{text}` is not a principal; one looks like `uid:1000`"),
            ));
        }
        self.host.accounts.set(principal, changes);
        // Somebody may run more now.
        if let Some(workers) = &*self.host.workers.lock() {
            workers.limits_changed();
        }
        tracing::info!(
            by = %self.principal(),
            of = principal.unwrap_or("everybody"),
            changes = serde_json::to_string(changes).unwrap_or_default(),
            "quotas changed"
        );
        Ok(())
    }
}

impl Host {
    /// What all principals together may have.
    pub fn totals(&self) -> wire::Quotas {
        let segments = self.budget.segments();
        wire::Quotas {
            bytes: Some(self.budget.limit()),
            segments: segments.map(|segments| segments.limit()),
            connections: Some(self.accounts.connections_max()),
            descriptors: Some(self.accounts.descriptors_max()),
            queued: Some(self.config.engine.queue_len as u64),
            running: Some(self.config.workers() as u64),
            cpu_percent: Some(100 * self.config.workers() as u64),
            ..wire::Quotas::default()
        }
    }
}
