//! A right to a segment, as what holds it has it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::Connection;
use crate::error::Error;

/// This session's right to a segment, released on drop.
///
/// While it lives, the host neither frees nor reuses the segment. Unless
/// [`Options::renew`](crate::Options::renew) was switched off, it is renewed in the background at
/// half its lifetime, so that it ends only by drop or with the connection.
pub struct Lease {
    id: u64,
    connection: Arc<Connection>,
}

impl Lease {
    pub(crate) fn new(id: u64, life: Duration, connection: &Arc<Connection>) -> Self {
        connection.register(id, life);
        Self {
            id,
            connection: Arc::clone(connection),
        }
    }

    /// The lease's number in this session.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether the host still honours it.
    ///
    /// # Errors
    /// [`Error::LeaseExpired`] once the host announced its end, [`Error::Disconnected`] or
    /// [`Error::Protocol`] once the connection is over.
    pub fn check(&self) -> Result<(), Error> {
        self.connection.check_lease(self.id)
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.connection.release(self.id);
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.id).finish()
    }
}
