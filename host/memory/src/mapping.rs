//! How a client maps segments that it received.
//!
//! No mapping is inherited by a child made by `fork` (`MADV_DONTFORK`).

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;

use crate::memfd::{inode_of, reopen_readonly};
use crate::pages::{FileAccess, Reservation, map_for_reading, reading_access};
use crate::{Copied, HugeBirths, Inode, PAGE_USIZE, Seals};

/// Why a descriptor was not mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// It does not know seals.
    #[error("the descriptor is not a memfd: {source}")]
    NotMemfd {
        /// The answer to `F_GET_SEALS`.
        source: io::Error,
    },
    /// Anybody could change or cut it under the mapping.
    #[error("segment {inode} has the seals {seals}, but this mapping needs {needed}")]
    MissingSeals {
        /// Which segment.
        inode: Inode,
        /// The seals that it has.
        seals: Seals,
        /// What would do.
        needed: &'static str,
    },
    /// It is smaller than it was said to be.
    #[error("segment {inode} has {actual} bytes, {} fewer than the {expected} of its description", expected - actual)]
    TooShort {
        /// Which segment.
        inode: Inode,
        /// Bytes that there are.
        actual: u64,
        /// Bytes that there should be.
        expected: u64,
    },
    /// A descriptor of another segment came to replace a mapping.
    #[error("the mapping is of segment {mapped}, the descriptor of segment {given}")]
    AnotherSegment {
        /// What is mapped.
        mapped: Inode,
        /// What was given.
        given: Inode,
    },
    /// A byte range ends outside the mapping.
    #[error("{length} bytes at {offset} are not within the {bytes} bytes of the mapping")]
    OutOfRange {
        /// First byte asked for.
        offset: usize,
        /// Bytes asked for.
        length: usize,
        /// Bytes that there are.
        bytes: usize,
    },
    /// The operating system refused.
    #[error("{operation} of {bytes} bytes failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// On how many bytes.
        bytes: u64,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl MappingError {
    fn system<E: Into<io::Error>>(operation: &'static str, bytes: usize) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            operation,
            bytes: bytes as u64,
            source: source.into(),
        }
    }
}

/// Mapped pages of a segment, and how many bytes of them count.
pub(crate) struct Mapped {
    // None if there are no bytes, which cannot be mapped.
    pub(crate) pages: Option<Reservation>,
    bytes: usize,
    inode: Inode,
}

impl Mapped {
    /// Maps the first `bytes` bytes with `map`, after the checks that all mappings share.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        bytes: usize,
        map: impl FnOnce(BorrowedFd<'_>, usize) -> io::Result<Reservation>,
    ) -> Result<Self, MappingError> {
        let inode = check_size(fd, bytes)?;
        let pages = match bytes {
            0 => None,
            _ => Some(map(fd, bytes).map_err(MappingError::system("mmap", bytes))?),
        };
        if let Some(pages) = &pages {
            pages
                .keep_from_children(0..pages.bytes())
                .map_err(MappingError::system("madvise", bytes))?;
        }
        Ok(Self {
            pages,
            bytes,
            inode,
        })
    }

    pub(crate) fn address(&self) -> usize {
        self.pages.as_ref().map_or(0, Reservation::start)
    }
}

/// A read-only mapping of a segment that does not change.
pub struct ReadMapping(Mapped);

impl ReadMapping {
    /// Maps the first `bytes` bytes of a segment that nobody can write (`"writers": "none"`).
    ///
    /// # Errors
    /// [`MappingError::MissingSeals`] without `F_SEAL_WRITE` and `F_SEAL_SHRINK`;
    /// [`MappingError::TooShort`], [`MappingError::NotMemfd`], [`MappingError::System`].
    pub fn new(fd: impl AsFd, bytes: usize) -> Result<Self, MappingError> {
        let enough = |seals: Seals| seals.no_writes() && seals.no_shrinking();
        check_seals(fd.as_fd(), enough, "F_SEAL_WRITE and F_SEAL_SHRINK")?;
        Mapped::new(fd.as_fd(), bytes, map_for_reading).map(Self)
    }

    /// Maps the first `bytes` bytes of a result (`"writers": "host"`): only the host that
    /// made it can write it, and that host has promised not to while the lease lives. So
    /// drop the mapping before the lease is released, and do not use it after the lease
    /// expired.
    ///
    /// # Errors
    /// As [`Self::new`], with `F_SEAL_FUTURE_WRITE` as good as `F_SEAL_WRITE`.
    pub fn of_result(fd: impl AsFd, bytes: usize) -> Result<Self, MappingError> {
        let enough =
            |seals: Seals| (seals.no_writes() || seals.no_future_writes()) && seals.no_shrinking();
        let needed = "F_SEAL_FUTURE_WRITE (or F_SEAL_WRITE) and F_SEAL_SHRINK";
        check_seals(fd.as_fd(), enough, needed)?;
        Mapped::new(fd.as_fd(), bytes, map_for_reading).map(Self)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0.pages {
            None => &[],
            // SAFETY: the constructors mapped this many bytes readable, of a segment that
            // cannot shrink and that nobody writes: by its seals, or by the host's promise
            // (`of_result`). The mapping lives as long as `self`.
            Some(pages) => unsafe {
                std::slice::from_raw_parts(
                    std::ptr::with_exposed_provenance(pages.start()),
                    self.0.bytes,
                )
            },
        }
    }

    /// Where the first byte is mapped; 0 for a mapping of no bytes.
    pub fn address(&self) -> usize {
        self.0.address()
    }

    /// Which segment it is.
    pub fn inode(&self) -> Inode {
        self.0.inode
    }
}

/// A read-only mapping of a segment that another process may be writing: bytes come out as
/// copies only.
pub struct SharedMapping(Mapped);

impl SharedMapping {
    /// Maps the first `bytes` bytes of a segment of any kind whose size is fixed (for
    /// instance `"writers": "creator"`).
    ///
    /// # Errors
    /// [`MappingError::MissingSeals`] without `F_SEAL_SHRINK`;
    /// [`MappingError::TooShort`], [`MappingError::NotMemfd`], [`MappingError::System`].
    pub fn new(fd: impl AsFd, bytes: usize) -> Result<Self, MappingError> {
        check_seals(fd.as_fd(), Seals::no_shrinking, "F_SEAL_SHRINK")?;
        Mapped::new(fd.as_fd(), bytes, map_for_reading).map(Self)
    }

    /// Copies out of `offset`; bytes that are written meanwhile may be old or new.
    ///
    /// # Errors
    /// [`MappingError::OutOfRange`].
    pub fn read_at(
        &self,
        offset: usize,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MappingError> {
        let (length, bytes) = (into.len(), self.0.bytes);
        if offset > bytes || length > bytes - offset {
            return Err(MappingError::OutOfRange {
                offset,
                length,
                bytes,
            });
        }
        if let Some(pages) = &self.0.pages {
            // SAFETY: the range was checked above and is mapped readable as long as `self`
            // lives; the segment cannot shrink.
            unsafe { pages.copy_out(offset, into) };
        }
        copied.add(length as u64);
        Ok(())
    }

    /// How many bytes are mapped.
    pub fn len(&self) -> usize {
        self.0.bytes
    }

    /// True if no bytes are mapped.
    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    /// Where the first byte is mapped; 0 for a mapping of no bytes.
    pub fn address(&self) -> usize {
        self.0.address()
    }

    /// Which segment it is.
    pub fn inode(&self) -> Inode {
        self.0.inode
    }
}

/// A writable mapping of a segment that the host made for this client to fill.
///
/// The client is its one writer: map it once. The host reads it by copies and does not
/// write or cut it.
pub struct WriteMapping(Mapped);

impl WriteMapping {
    /// Maps the first `bytes` bytes, shared.
    ///
    /// # Errors
    /// [`MappingError::TooShort`]; [`MappingError::System`], for instance because the
    /// descriptor only reads.
    pub fn new(fd: impl AsFd, bytes: usize) -> Result<Self, MappingError> {
        Mapped::new(fd.as_fd(), bytes, map_for_both).map(Self)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.0.pages {
            None => &[],
            // SAFETY: `new` mapped this many bytes readable; the host does not change or cut
            // the segment (see the type), and `self` is borrowed while the slice lives.
            Some(pages) => unsafe {
                std::slice::from_raw_parts(
                    std::ptr::with_exposed_provenance(pages.start()),
                    self.0.bytes,
                )
            },
        }
    }

    /// Backs `range` (bytes), which is about to be filled for the first time, with huge pages (from 4 MiB on) as far
    /// as Linux gives any; `births` counts them. What was written there may be zero afterwards.
    pub fn back_with_huge_pages(&mut self, range: Range<usize>, births: &HugeBirths) {
        let Some(pages) = &self.0.pages else {
            return;
        };
        let end = range.end.min(pages.bytes());
        if range.start < end {
            // SAFETY: `new` mapped all of it shared and writable, at a multiple of a huge page for
            // what is large enough to have one (`Reservation::of_file`); the host does not cut the
            // segment (see the type), and `self` is borrowed alone.
            unsafe { births.back(pages, range.start..end) };
        }
    }

    /// The bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &self.0.pages {
            None => &mut [],
            // SAFETY: `new` mapped this many bytes writable; the host does not change or cut
            // the segment (see the type), and `self` is borrowed alone while the slice lives.
            Some(pages) => unsafe {
                std::slice::from_raw_parts_mut(
                    std::ptr::with_exposed_provenance_mut(pages.start()),
                    self.0.bytes,
                )
            },
        }
    }

    /// Where the first byte is mapped; 0 for a mapping of no bytes.
    pub fn address(&self) -> usize {
        self.0.address()
    }

    /// Which segment it is.
    pub fn inode(&self) -> Inode {
        self.0.inode
    }

    /// Replaces the mapping, at the same address and with no hole, by a read-only one, so
    /// that the host can seal the segment. `fd` is a descriptor of the same segment.
    ///
    /// The bytes then are what the client wrote, and stay so as long as nobody else has the
    /// segment mapped writable.
    ///
    /// # Errors
    /// [`MappingError::AnotherSegment`], [`MappingError::System`]; the mapping is gone then.
    pub fn replace_readonly(self, fd: impl AsFd) -> Result<ReadMapping, MappingError> {
        let Mapped {
            pages,
            bytes,
            inode,
        } = self.0;
        let given = check_size(fd.as_fd(), bytes)?;
        if given != inode {
            return Err(MappingError::AnotherSegment {
                mapped: inode,
                given,
            });
        }
        if let Some(pages) = &pages {
            // A shared mapping made from a descriptor that can write counts as writable in
            // older versions of Linux, and would hinder sealing.
            let flags = rustix::fs::fcntl_getfl(fd.as_fd())
                .map_err(MappingError::system("F_GETFL", bytes))?;
            let reopened;
            let fd = if flags & OFlags::RWMODE == OFlags::RDONLY {
                fd.as_fd()
            } else {
                reopened = reopen_readonly(fd.as_fd())
                    .map_err(MappingError::system("opening read-only", bytes))?;
                reopened.as_fd()
            };
            let all = 0..pages.bytes();
            pages
                .map_file(all.clone(), fd, 0, reading_access(fd))
                .map_err(MappingError::system("mmap", bytes))?;
            pages
                .keep_from_children(all)
                .map_err(MappingError::system("madvise", bytes))?;
        }
        Ok(ReadMapping(Mapped {
            pages,
            bytes,
            inode,
        }))
    }
}

/// For reading and writing, shared.
pub(crate) fn map_for_both(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<Reservation> {
    let bytes = bytes.next_multiple_of(PAGE_USIZE);
    Reservation::of_file(fd, bytes, FileAccess::SharedReadWrite)
}

/// The segment behind `fd`, if it has at least `bytes` bytes.
fn check_size(fd: BorrowedFd<'_>, bytes: usize) -> Result<Inode, MappingError> {
    let stat = rustix::fs::fstat(fd).map_err(MappingError::system("fstat", bytes))?;
    let inode = inode_of(fd).map_err(MappingError::system("fstat", bytes))?;
    let (actual, expected) = (u64::try_from(stat.st_size).unwrap_or(0), bytes as u64);
    if actual < expected {
        return Err(MappingError::TooShort {
            inode,
            actual,
            expected,
        });
    }
    Ok(inode)
}

pub(crate) fn check_seals(
    fd: BorrowedFd<'_>,
    enough: impl FnOnce(Seals) -> bool,
    needed: &'static str,
) -> Result<(), MappingError> {
    let seals = Seals::of(fd).map_err(|source| MappingError::NotMemfd {
        source: source.into(),
    })?;
    if enough(seals) {
        return Ok(());
    }
    let inode = inode_of(fd).map_err(MappingError::system("fstat", 0))?;
    Err(MappingError::MissingSeals {
        inode,
        seals,
        needed,
    })
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of segment {}", self.bytes, self.inode)
    }
}

impl fmt::Debug for ReadMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadMapping({:?})", self.0)
    }
}

impl fmt::Debug for SharedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMapping({:?})", self.0)
    }
}

impl fmt::Debug for WriteMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteMapping({:?})", self.0)
    }
}
