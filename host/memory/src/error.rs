//! Why what was asked of a segment, or of a mapping of it, was refused.

use std::fmt;
use std::io;
use std::ops::Range;

use crate::{BudgetExceeded, GUEST_PAGE, Inode, Seals};

/// Why an operation on a segment was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host's budget is full.
    #[error(transparent)]
    Budget(#[from] BudgetExceeded),
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
    /// A byte range ends outside the segment.
    #[error("bytes {offset} to {end} are not within segment {inode} of {bytes} bytes", end = u128::from(*offset) + u128::from(*length))]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Bytes that there are.
        bytes: u64,
        /// Which segment.
        inode: Inode,
    },
    /// Sealing was refused because a writable mapping lives.
    #[error(
        "segment {inode} is still mapped writable; unmap it or replace that mapping by a read-only one, then seal again"
    )]
    StillWritable {
        /// Which segment.
        inode: Inode,
    },
    /// Sealing was refused because another process that was to let go of it did not, or somebody keeps its pages
    /// from being moved.
    #[error(
        "segment {inode} can still be written by the worker process that filled it, so its bytes are not final; run the kernel again, or copy them into a segment of your own"
    )]
    KeptWritable {
        /// Which segment.
        inode: Inode,
    },
    /// Its creator forbade further seals, or gave a descriptor that cannot seal.
    #[error(
        "segment {inode} takes no further seals (it has {seals}); seal it with F_SEAL_WRITE before handing it over"
    )]
    SealsLocked {
        /// Which segment.
        inode: Inode,
        /// The seals that it has.
        seals: Seals,
    },
    /// Somebody holds a file lease on it, which would have made us wait.
    #[error(
        "somebody holds a file lease (F_SETLEASE) on segment {inode}; let go of it, then try again"
    )]
    Leased {
        /// Which segment.
        inode: Inode,
    },
    /// The operation needs seals that the segment lacks.
    #[error("segment {inode} has the seals {seals}, but {operation} needs {needed}")]
    MissingSeals {
        /// What was tried.
        operation: &'static str,
        /// Which segment.
        inode: Inode,
        /// The seals that it has.
        seals: Seals,
        /// The seals that it must have.
        needed: Seals,
    },
    /// Its pages are in a guest at the moment, or were lost there.
    #[error(
        "the pages of segment {inode} are not at home; end the invocation that uses them first"
    )]
    Away {
        /// Which segment.
        inode: Inode,
    },
    /// The pages could not be parked.
    #[error(transparent)]
    Park(#[from] ParkError),
}

impl MemoryError {
    pub(crate) fn system(
        operation: &'static str,
        bytes: u64,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::System {
            operation,
            bytes,
            source: source.into(),
        }
    }
}

/// An operation that consumes a segment was refused; here it is back.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Refused<T: fmt::Debug> {
    /// What the operation was called on, unchanged.
    pub segment: T,
    /// Why.
    #[source]
    pub error: MemoryError,
}

/// Why a segment was not parked or a parked mapping not moved.
#[derive(Debug, thiserror::Error)]
pub enum ParkError {
    /// Not whole guest pages of what there is.
    #[error(
        "bytes {} to {} must be whole pages of {GUEST_PAGE} bytes within the {bytes} bytes of segment {inode}",
        range.start, range.end
    )]
    NotGuestPages {
        /// What was asked for.
        range: Range<u64>,
        /// Bytes that there are.
        bytes: u64,
        /// Which segment.
        inode: Inode,
    },
    /// The budget of mappings is full and none of them is idle.
    #[error(transparent)]
    TooMany(#[from] BudgetExceeded),
    /// The mapping was dirtied or lost in a guest.
    #[error(
        "the parked mapping of segment {inode} was written or lost in a guest; park the segment anew"
    )]
    Spent {
        /// Which segment.
        inode: Inode,
    },
    /// The destination is not guest memory that is accessible.
    #[error(
        "addresses {at:#x} to {end:#x} are not whole pages of the guest's memory at {from:#x} to {to:#x}",
        end = u128::from(*at as u64) + u128::from(*bytes as u64)
    )]
    OutsideGuest {
        /// First address asked for.
        at: usize,
        /// Bytes asked for.
        bytes: usize,
        /// First address of the accessible memory.
        from: usize,
        /// One past its last address.
        to: usize,
    },
    /// Another window is there.
    #[error("addresses {at:#x} to {end:#x} meet the window at {other_at:#x}; move it home first")]
    Occupied {
        /// First address asked for.
        at: usize,
        /// One past the last address asked for.
        end: usize,
        /// First address of the window that is there.
        other_at: usize,
    },
    /// An earlier move failed half-way in this guest.
    #[error("the guest's memory at {at:#x} is poisoned by a move that failed; drop the instance")]
    Poisoned {
        /// First address of the reservation.
        at: usize,
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

impl ParkError {
    pub(crate) fn system(operation: &'static str, bytes: usize) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System {
            operation,
            bytes: bytes as u64,
            source,
        }
    }
}
