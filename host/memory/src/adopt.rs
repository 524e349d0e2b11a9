//! Taking over a memfd that somebody else made: nothing about it is believed.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::memfd::{inode_of, reopen_readonly};
use crate::segment_charge::SegmentCharge;
use crate::{Budget, BudgetExceeded, Client, GUEST_PAGE, Lent, Sealed, Seals, Segment};

/// An adopted segment, by the seals that it came with.
#[derive(Debug)]
pub enum Adopted {
    /// It had `F_SEAL_WRITE`: nobody can write it any more.
    Sealed(Segment<Sealed>),
    /// It had `F_SEAL_FUTURE_WRITE`: its creator may still write it.
    Lent(Segment<Lent<Client>>),
}

/// Why a descriptor was not adopted as a segment.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It does not know seals at all.
    #[error(
        "the descriptor is not a memfd ({source}); make it with memfd_create and MFD_ALLOW_SEALING"
    )]
    NotMemfd {
        /// The answer to `F_GET_SEALS`.
        source: io::Error,
    },
    /// It knows seals but is not on tmpfs.
    #[error(
        "the memfd is on a file system of type {magic:#x}, not tmpfs; make it without MFD_HUGETLB"
    )]
    NotTmpfs {
        /// `f_type` of `fstatfs`.
        magic: i64,
    },
    /// It can be cut under a mapping, which kills whoever reads it.
    #[error(
        "the memfd has the seals {seals}, but its size must be fixed; add F_SEAL_SHRINK | F_SEAL_GROW"
    )]
    Resizable {
        /// The seals that it has.
        seals: Seals,
    },
    /// Anybody who has it can write.
    #[error(
        "the memfd has the seals {seals}; add F_SEAL_WRITE (or F_SEAL_FUTURE_WRITE to go on writing through a mapping that you have)"
    )]
    Writable {
        /// The seals that it has.
        seals: Seals,
    },
    /// A range does not start on a guest page.
    #[error(
        "range {index} starts at byte {start}, which is {} past a multiple of {GUEST_PAGE}; move it to such a multiple",
        start % GUEST_PAGE
    )]
    Unaligned {
        /// Which of the ranges.
        index: usize,
        /// Its first byte.
        start: u64,
    },
    /// A range, rounded up to guest pages, ends after the file.
    #[error(
        "range {index} is bytes {start} to {end}; rounded up to a multiple of {GUEST_PAGE} it must end within the {bytes} bytes of the memfd"
    )]
    OutOfRange {
        /// Which of the ranges.
        index: usize,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// Bytes of the file.
        bytes: u64,
    },
    /// Two ranges, rounded up to guest pages, share one.
    #[error(
        "ranges {first} and {second} meet in the {GUEST_PAGE} bytes at {at}; give each range pages of its own"
    )]
    Overlap {
        /// One of them.
        first: usize,
        /// The other.
        second: usize,
        /// First byte of the shared page.
        at: u64,
    },
    /// A part of a range was never written: reading it would allocate memory in the host's name.
    #[error(
        "range {index} has a hole at byte {at}; write every byte of it before sealing (zeros too)"
    )]
    Hole {
        /// Which of the ranges.
        index: usize,
        /// First byte of the hole.
        at: u64,
    },
    /// Its sender could make the host wait, at every opening.
    #[error(
        "somebody holds a file lease (F_SETLEASE) on the memfd; let go of it before handing it over"
    )]
    Leased,
    /// The host's budget is full.
    #[error(transparent)]
    Budget(#[from] BudgetExceeded),
    /// The operating system refused.
    #[error("{operation} of the memfd failed: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl AdoptError {
    fn system(operation: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::System {
            operation,
            source: source.into(),
        }
    }
}

/// Takes over `fd`, of which `ranges` (bytes, one for each tensor) will be read.
///
/// A range may be empty but must lie within the file. The whole file
/// is charged to `budget`.
///
/// # Errors
/// [`AdoptError`]; the descriptor is closed.
pub fn adopt(
    fd: OwnedFd,
    ranges: &[Range<u64>],
    budget: &Arc<Budget>,
) -> Result<Adopted, AdoptError> {
    let seals = Seals::of(fd.as_fd()).map_err(|source| AdoptError::NotMemfd {
        source: source.into(),
    })?;
    let system = rustix::fs::fstatfs(&fd).map_err(AdoptError::system("fstatfs"))?;
    if system.f_type != libc::TMPFS_MAGIC {
        return Err(AdoptError::NotTmpfs {
            magic: system.f_type,
        });
    }
    if !seals.contains(Seals::SIZE) {
        return Err(AdoptError::Resizable { seals });
    }
    if !seals.no_writes() && !seals.no_future_writes() {
        return Err(AdoptError::Writable { seals });
    }
    // From here on neither the size nor the holes can change.
    let stat = rustix::fs::fstat(&fd).map_err(AdoptError::system("fstat"))?;
    let bytes = u64::try_from(stat.st_size).unwrap_or(0);
    check_places(ranges, bytes)?;
    let charge = SegmentCharge::reserve(budget, bytes)?;
    // The sender shares our file offset, and could move it between two of our steps.
    let reader = reopen_readonly(fd.as_fd()).map_err(|errno| match errno {
        Errno::WOULDBLOCK => AdoptError::Leased,
        _ => AdoptError::system("opening read-only")(errno),
    })?;
    check_holes(ranges, reader.as_fd())?;
    let inode = inode_of(fd.as_fd()).map_err(AdoptError::system("fstat"))?;
    Ok(if seals.no_writes() {
        Adopted::Sealed(Segment::from_client_reader(reader, inode, charge))
    } else {
        // The sender's own descriptor, because only one that can write can seal for good.
        Adopted::Lent(Segment::from_client(fd, inode, charge))
    })
}

fn check_places(ranges: &[Range<u64>], bytes: u64) -> Result<(), AdoptError> {
    let mut padded = Vec::with_capacity(ranges.len());
    for (index, range) in ranges.iter().enumerate() {
        let Range { start, end } = *range;
        if !start.is_multiple_of(GUEST_PAGE) {
            return Err(AdoptError::Unaligned { index, start });
        }
        match end.checked_next_multiple_of(GUEST_PAGE) {
            Some(padded_end) if start <= end && padded_end <= bytes => {
                padded.push((start..padded_end, index));
            }
            _ => {
                return Err(AdoptError::OutOfRange {
                    index,
                    start,
                    end,
                    bytes,
                });
            }
        }
    }
    padded.retain(|(range, _)| !range.is_empty());
    padded.sort_by_key(|(range, _)| range.start);
    for pair in padded.windows(2) {
        let [(before, first), (after, second)] = pair else {
            continue;
        };
        if after.start < before.end {
            return Err(AdoptError::Overlap {
                first: *first,
                second: *second,
                at: after.start,
            });
        }
    }
    Ok(())
}

fn check_holes(ranges: &[Range<u64>], fd: BorrowedFd<'_>) -> Result<(), AdoptError> {
    for (index, range) in ranges.iter().enumerate() {
        if range.is_empty() {
            continue;
        }
        // The end of the file counts as a hole, so there is always an answer.
        let at = rustix::fs::seek(fd, SeekFrom::Hole(range.start))
            .map_err(AdoptError::system("SEEK_HOLE"))?;
        if at < range.end {
            return Err(AdoptError::Hole { index, at });
        }
    }
    Ok(())
}
