//! Shared memory for tensors: the only crate that calls `mmap`, `mremap` and `memfd_create`.
//!
//! Which type builds on which, in the order in which a tensor meets them:
//!
//! ```text
//!   a client's memfd ──adopt──▶ Segment<Sealed>        nobody can write any more: yields &[u8]
//!                          └──▶ Segment<Lent<Client>>  one writer is left: copies only
//!   Growing ──into_segment─▶ Segment<Open>           filled before its length is known
//!   Segment<Open> ──seal──────▶ Segment<Sealed>
//!                 └─lend──────▶ Segment<Lent<Client>> ──seal──▶ Segment<Sealed>
//!   ResultPool ──take──▶ PoolSegment                   the host is the one writer
//!
//!   Lot / PoolSegment ──▶ Parked ──move_into──▶ Window in a GuestSpace
//!                            ▲────move_home───────┘
//! ```
//! [`InputSource`] and [`ResultSource`] are all that whoever runs kernels has to know of it.
//!
//! [`Budget`]s bound all of it. [`FrameSocket`] carries descriptors between processes,
//! [`ReadMapping`] and [`WriteMapping`] are how a client maps what it received, and
//! [`process`] reads what the operating system says about this process.
//!
//! # What is deliberately absent
//! - No `&[u8]` over memory that another process or a guest can write: only a
//!   write-sealed segment yields a slice, everything else is copied in and out, and every
//!   copying function takes a [`Copied`] so that none goes uncounted.
//! - No hole: an address range that was reserved stays mapped until it is given up as a
//!   whole, so that no other thread's mapping can land inside it.
//! - No reference into a guest. A [`Window`] knows addresses, never pointers that outlive it.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "strait-memory runs on Linux x86-64 (5.13 or later) only: it needs memfd seals and MREMAP_DONTUNMAP"
);

mod adopt;
mod backing;
mod budget;
mod dirty;
mod error;
mod freeing;
mod growing;
mod guest_space;
mod held;
mod huge;
mod idle;
mod link;
mod lot;
mod mapping;
mod memfd;
mod moving;
mod pages;
mod peer;
mod pool;
pub mod probe;
pub mod process;
mod result_pages;
mod scrap;
mod seals;
mod segment;
mod segment_charge;
mod shared_pages;
mod socket;
mod source;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

pub use adopt::{AdoptError, Adopted, adopt};
pub use backing::KeepsMappings;
pub use budget::{Budget, BudgetExceeded, Charge, Elsewhere};
pub use error::{MemoryError, ParkError, Refused};
pub use growing::Growing;
pub use guest_space::{GuestSpace, GuestSpaces};
pub use huge::HugeBirths;
pub use link::LinkPages;
pub use lot::{Lot, LotStats};
pub use mapping::{MappingError, ReadMapping, SharedMapping, WriteMapping};
pub use memfd::unreadable_program;
pub use moving::{Access, FaultRange, MoveRefused, Parked, Poisoned, Window};
pub use peer::Peer;
pub use pool::{Author, Ending, Filler, PoolSegment, PoolStats, RecyclingKey, ResultPool};
pub use result_pages::ResultPages;
pub use scrap::{SCRAP_BYTES, Scrap};
pub use seals::Seals;
pub use segment::{Client, Host, Lent, Open, Parkable, Sealed, SealedBytes, Segment};
pub use shared_pages::SharedPages;
pub use socket::{FDS_MAX, FrameListener, FrameSocket, Received, SpareDescriptor};
pub use source::{InputSource, ResultSource, Shared, SharedSource};

/// Bytes in a page of the machine: what `mmap` counts in.
pub const PAGE: u64 = 4096;
/// Bytes in a page of a guest's linear memory: what windows count in.
pub const GUEST_PAGE: u64 = 65_536;
/// Bytes that one page of page tables maps. A move between two addresses that are equal
/// modulo this takes whole page-table pages, and so is nearly free.
pub const HUGE: u64 = 2 << 20;

/// Counts tensor bytes copied in user space at one place of the program.
#[derive(Debug, Default)]
pub struct Copied(AtomicU64);

impl Copied {
    /// A counter at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `bytes`.
    pub fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Relaxed);
    }

    /// Bytes counted so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What names a shared-memory object to the operating system: two mappings with equal
/// `Inode`s (and equal offsets) are the same physical pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Inode {
    /// Device number, as in `st_dev`.
    pub device: u64,
    /// Inode number, as in `st_ino`.
    pub inode: u64,
}

impl std::fmt::Display for Inode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}:{}", self.device, self.inode)
    }
}

/// Widens or keeps: `usize` has 64 bits here (see the `compile_error` above).
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits on the only target"
)]
pub(crate) const fn to_usize(bytes: u64) -> usize {
    bytes as usize
}

pub(crate) const PAGE_USIZE: usize = to_usize(PAGE);
pub(crate) const HUGE_USIZE: usize = to_usize(HUGE);
