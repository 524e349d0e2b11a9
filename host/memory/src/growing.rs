//! A segment to be, filled before anybody knows how long it will get.
//!
//! A [`Segment`] has its size from its first moment on, since others may have it. This file nobody else has
//! until it becomes one, so it may grow, and is cut to its length at the end.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::memfd::{create_memfd, to_keep};
use crate::segment::{read_all, whole_pages, write_all};
use crate::segment_charge::SegmentCharge;
use crate::{Budget, Charge, Copied, HugeBirths, MemoryError, Open, Segment};

/// A memfd that this process alone has, charged to a [`Budget`] for the room that it has. Clones are the same file.
#[derive(Clone)]
pub struct Growing(Arc<File>);

struct File {
    fd: Arc<OwnedFd>,
    /// Of the bytes that there is room for. Held while the file's length changes.
    charge: Mutex<Charge>,
}

impl Drop for File {
    fn drop(&mut self) {
        // As a segment's pages: many of them take long, and are charged until they are free.
        let charge = self.charge.get_mut().take();
        let (bytes, budget) = (charge.amount(), Arc::clone(charge.budget()));
        budget.free(bytes, (Arc::clone(&self.fd), charge));
    }
}

impl Growing {
    /// An empty one, to be charged to `budget`.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn new(budget: &Arc<Budget>) -> Result<Self, MemoryError> {
        let charge = budget.try_reserve(0)?;
        let failed = |source| MemoryError::system("memfd_create", 0, source);
        let fd = create_memfd().map_err(failed)?;
        let fd = to_keep(fd.as_fd()).map_err(failed)?;
        Ok(Self(Arc::new(File {
            fd: Arc::new(fd),
            charge: Mutex::new(charge),
        })))
    }

    /// Bytes that there is room for.
    pub fn room(&self) -> u64 {
        self.0.charge.lock().amount()
    }

    /// Makes room for `bytes` bytes in all (rounded up to a [`PAGE`](crate::PAGE)), if there is less. `huge`, of it, is about to be
    /// filled: backed with huge pages as far as Linux gives any, which takes time that no runtime thread has.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::System`]; the room is as it was.
    pub fn grow(
        &self,
        bytes: u64,
        huge: Range<u64>,
        births: &HugeBirths,
    ) -> Result<(), MemoryError> {
        let mut charge = self.0.charge.lock();
        let room = charge.amount();
        let bytes = whole_pages(bytes)?;
        if bytes > room {
            let more = charge.budget().try_reserve(bytes - room)?;
            self.set_length(bytes)?;
            charge.absorb(more);
        }
        // SAFETY: the file's length changes under the lock that is held here.
        unsafe { births.back_file(self.0.fd.as_fd(), bytes, huge) };
        drop(charge);
        Ok(())
    }

    fn set_length(&self, bytes: u64) -> Result<(), MemoryError> {
        rustix::fs::ftruncate(&self.0.fd, bytes)
            .map_err(|source| MemoryError::system("ftruncate", bytes, source))
    }

    /// Whether `room` has room for that.
    fn check_range(&self, room: u64, offset: u64, length: usize) -> Result<(), MemoryError> {
        let length = length as u64;
        if offset > room || length > room - offset {
            let inode = crate::memfd::inode_of(self.0.fd.as_fd())
                .map_err(|source| MemoryError::system("fstat", room, source))?;
            return Err(MemoryError::OutOfRange {
                offset,
                length,
                bytes: room,
                inode,
            });
        }
        Ok(())
    }

    /// Copies `bytes` to `offset`, where there is room for them.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn write_at(&self, offset: u64, bytes: &[u8], copied: &Copied) -> Result<(), MemoryError> {
        // The file does not change its length meanwhile.
        let charge = self.0.charge.lock();
        self.check_range(charge.amount(), offset, bytes.len())?;
        write_all(self.0.fd.as_fd(), offset, bytes)?;
        drop(charge);
        copied.add(bytes.len() as u64);
        Ok(())
    }

    /// Copies out of `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn read_at(
        &self,
        offset: u64,
        bytes: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        let charge = self.0.charge.lock();
        self.check_range(charge.amount(), offset, bytes.len())?;
        read_all(self.0.fd.as_fd(), offset, bytes)?;
        drop(charge);
        copied.add(bytes.len() as u64);
        Ok(())
    }

    /// The segment of `bytes` bytes (rounded up to a [`PAGE`](crate::PAGE), at least one): from now on it is no longer or shorter,
    /// and clones of this have no room.
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if it is to be longer than it is, or one segment too many; [`MemoryError::System`].
    pub fn into_segment(self, bytes: u64) -> Result<Segment<Open>, MemoryError> {
        let bytes = whole_pages(bytes.max(1))?;
        let mut charge = self.0.charge.lock();
        if bytes > charge.amount() {
            let more = charge.budget().try_reserve(bytes - charge.amount())?;
            charge.absorb(more);
        }
        self.set_length(bytes)?;
        charge.reduce(bytes);
        let charge = SegmentCharge::of(&mut charge)?;
        Segment::of_grown(Arc::clone(&self.0.fd), charge)
    }
}

impl fmt::Debug for Growing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Growing")
            .field("room", &self.room())
            .finish_non_exhaustive()
    }
}
