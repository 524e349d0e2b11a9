//! Who is served.

use std::fmt;
use std::sync::Arc;

/// Who is served. Opaque: how somebody was authenticated is in its text (`uid:1000`), and nothing reads it
/// out of there again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Principal(Arc<str>);

impl Principal {
    /// The Linux user at the other end of a unix socket.
    #[must_use]
    pub fn of_uid(uid: u32) -> Self {
        Self(format!("uid:{uid}").into())
    }

    /// Whoever has a token of that name.
    #[must_use]
    pub fn of_token(name: &str) -> Self {
        Self(format!("token:{name}").into())
    }

    /// The holder of a certificate of that name.
    #[must_use]
    pub fn of_certificate(name: &str) -> Self {
        Self(format!("cert:{name}").into())
    }

    /// As it is written in settings, files of rights and names of shared flights.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
