//! Pages that two processes write, and of which neither believes anything.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use rustix::fs::{FallocateFlags, SealFlags};

use crate::mapping::{Mapped, MappingError, check_seals, map_for_both};
use crate::{Budget, MemoryError, Open, Segment};

/// A mapping of memory that another process writes at the same time: words that are atomic, and bytes that are copied. It has
/// its size for good, and never any other seal, so that neither process can take pages away under the other.
pub struct SharedPages {
    mapped: Mapped,
    bytes: usize,
    /// Of who made it. It stays charged as long as the other process has it, too, and goes after our own mapping.
    segment: Option<Segment<Open>>,
}

impl SharedPages {
    /// New memory of at least `bytes` zeros, charged to `budget` as a segment.
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if it does not fit the budget; [`MemoryError::System`].
    pub fn create(bytes: usize, budget: &Arc<Budget>) -> Result<Self, MemoryError> {
        let segment = Segment::create(bytes as u64, budget)?;
        let fd = segment.client_fd();
        let failed =
            |what| move |error: std::io::Error| MemoryError::system(what, bytes as u64, error);
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL)
            .map_err(|errno| failed("F_ADD_SEALS")(errno.into()))?;
        // Rather refused here than when a page is written for the first time.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, segment.bytes())
            .map_err(|errno| failed("fallocate")(errno.into()))?;
        let mapped = Mapped::new(fd.as_fd(), bytes, map_for_both);
        let mapped = mapped.map_err(|error| match error {
            MappingError::System { source, .. } => failed("mmap")(source),
            other => failed("mmap")(std::io::Error::other(other)),
        })?;
        Ok(Self {
            mapped,
            bytes,
            segment: Some(segment),
        })
    }

    /// Maps the first `bytes` bytes of memory that another process made by [`Self::create`].
    ///
    /// # Errors
    /// [`MappingError::MissingSeals`] if its size or its seals can still change; [`MappingError::TooShort`],
    /// [`MappingError::NotMemfd`], [`MappingError::System`].
    pub fn open(fd: impl AsFd, bytes: usize) -> Result<Self, MappingError> {
        check_seals(
            fd.as_fd(),
            |seals| seals.no_shrinking() && seals.no_growing() && seals.no_seals(),
            "F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL",
        )?;
        Ok(Self {
            mapped: Mapped::new(fd.as_fd(), bytes, map_for_both)?,
            bytes,
            segment: None,
        })
    }

    /// The descriptor for the other process; none if this one did not make it.
    pub fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        self.segment.as_ref().map(Segment::client_fd)
    }

    /// The word at `offset` (bytes, a multiple of 4).
    ///
    /// # Panics
    /// If there is no such word, which is our own bug.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        let bytes = self.bytes;
        assert!(
            offset.is_multiple_of(4) && offset < bytes && bytes - offset >= 4,
            "a word at {offset} of {bytes} bytes"
        );
        let at = self.mapped.address() + offset;
        // SAFETY: it lies within the mapping, which is readable and writable as long as `self` lives and of a file that
        // cannot shrink; a mapping starts at a page, so that it is aligned. Other processes' writes to it are atomic
        // as ours are, or their own affair: every pattern of bits is a u32, and nobody here has a reference but of this kind.
        unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(at)) }
    }

    /// Copies out of `offset`; bytes that are written meanwhile may be old or new.
    ///
    /// # Panics
    /// If there are not as many bytes, which is our own bug.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        if let Some(pages) = &self.mapped.pages {
            // SAFETY: mapped readable as long as `self` lives, and the file cannot shrink; the range is checked there.
            unsafe { pages.copy_out(offset, into) };
        }
    }

    /// Copies to `offset`.
    ///
    /// # Panics
    /// As [`Self::read`].
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        if let Some(pages) = &self.mapped.pages {
            // SAFETY: mapped writable as long as `self` lives, and the file cannot shrink; the range is checked there.
            unsafe { pages.copy_in(offset, bytes) };
        }
    }
}

impl fmt::Debug for SharedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedPages({:?})", self.mapped)
    }
}
