//! Which seals a memfd has.

use std::fmt;
use std::os::fd::BorrowedFd;

use rustix::fs::SealFlags;

/// The seals of a memfd, by their names in text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seals(pub(crate) SealFlags);

impl Seals {
    pub(crate) const SIZE: Self = Self(SealFlags::SHRINK.union(SealFlags::GROW));
    pub(crate) const SEALED: Self = Self(SealFlags::WRITE.union(Self::SIZE.0));
    pub(crate) const LENT: Self = Self(SealFlags::FUTURE_WRITE.union(Self::SIZE.0));
    pub(crate) const LENT_FOR_GOOD: Self = Self(Self::LENT.0.union(SealFlags::SEAL));

    pub(crate) fn of(fd: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        rustix::fs::fcntl_get_seals(fd).map(Self)
    }

    pub(crate) fn contains(self, other: Self) -> bool {
        self.0.contains(other.0)
    }

    /// Nobody can write any more.
    pub fn no_writes(self) -> bool {
        self.0.contains(SealFlags::WRITE)
    }

    /// Nobody can make a new writable mapping any more.
    pub fn no_future_writes(self) -> bool {
        self.0.contains(SealFlags::FUTURE_WRITE)
    }

    /// Nobody can make it smaller any more.
    pub fn no_shrinking(self) -> bool {
        self.0.contains(SealFlags::SHRINK)
    }

    /// Nobody can make it bigger any more.
    pub fn no_growing(self) -> bool {
        self.0.contains(SealFlags::GROW)
    }

    /// Nobody can add a seal any more.
    pub fn no_seals(self) -> bool {
        self.0.contains(SealFlags::SEAL)
    }
}

impl fmt::Display for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = [
            (SealFlags::WRITE, "F_SEAL_WRITE"),
            (SealFlags::FUTURE_WRITE, "F_SEAL_FUTURE_WRITE"),
            (SealFlags::SHRINK, "F_SEAL_SHRINK"),
            (SealFlags::GROW, "F_SEAL_GROW"),
            (SealFlags::SEAL, "F_SEAL_SEAL"),
            (SealFlags::EXEC, "F_SEAL_EXEC"),
        ]
        .into_iter()
        .filter(|(flag, _)| self.0.contains(*flag))
        .map(|(_, name)| name)
        .collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(" | "))
    }
}

impl fmt::Debug for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
