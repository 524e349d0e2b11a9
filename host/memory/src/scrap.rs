//! Where the stores of a guest into its inputs go.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use rustix::fs::MemfdFlags;

use crate::HUGE_USIZE;

/// Most bytes that a guest's stores into its inputs can dirty, all inputs together; for each
/// input where Linux has no descriptor left.
pub const SCRAP_BYTES: usize = HUGE_USIZE;

/// A little memory that takes what a guest stores into its inputs: laid over an input again
/// and again, so that however much the guest stores, no more than [`SCRAP_BYTES`] are dirtied.
///
/// It serves one invocation and is made by its first such store, inside the fault handler.
#[derive(Debug)]
pub struct Scrap {
    // -1: not made yet.
    fd: AtomicI32,
    // Of memory beside it that has no descriptor, and can all have been dirtied.
    fresh_bytes: AtomicU64,
}

impl Default for Scrap {
    fn default() -> Self {
        Self::new()
    }
}

impl Scrap {
    /// No memory yet.
    pub const fn new() -> Self {
        Self {
            fd: AtomicI32::new(-1),
            fresh_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes that were dirtied, in whole pages; at most, where there was no descriptor.
    pub fn dirtied_bytes(&self) -> u64 {
        const BLOCK_BYTES: u64 = 512;
        let stat = self.known().map(rustix::fs::fstat);
        let known = match stat {
            Some(Ok(stat)) => u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK_BYTES,
            Some(Err(_)) | None => 0,
        };
        known + self.fresh_bytes.load(Ordering::Acquire)
    }

    /// An input was replaced by `bytes` bytes of other memory. Async-signal-safe.
    pub(crate) fn add_fresh(&self, bytes: usize) {
        self.fresh_bytes.fetch_add(bytes as u64, Ordering::AcqRel);
    }

    fn known(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.fd.load(Ordering::Acquire);
        // SAFETY: a number that is not -1 is our own open descriptor, closed by `drop` only.
        (fd != -1).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// The memory, made now if it was not yet. None if Linux gives none.
    ///
    /// Async-signal-safe: three system calls and an atomic. One thread at a time may call it:
    /// the one that runs the guest.
    pub(crate) fn in_signal(&self) -> Option<BorrowedFd<'_>> {
        if self.known().is_none() {
            let made = rustix::fs::memfd_create(c"strait-scrap", MemfdFlags::CLOEXEC).ok()?;
            rustix::fs::ftruncate(&made, SCRAP_BYTES as u64).ok()?;
            self.fd.store(made.into_raw_fd(), Ordering::Release);
        }
        self.known()
    }
}

impl Drop for Scrap {
    fn drop(&mut self) {
        if let Some(fd) = self.known().map(|fd| fd.as_raw_fd()) {
            // SAFETY: ours (see `known`), and nobody can borrow it any more.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
