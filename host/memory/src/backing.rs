//! How long a segment's memory lives and is charged: longer than the [`Segment`](crate::Segment) itself while
//! parked mappings, or others, still have it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::segment_charge::SegmentCharge;
use crate::{Budget, Inode, MemoryError};

/// Something that keeps mappings of segments for later.
pub trait KeepsMappings: Send + Sync {
    /// Lets go of those that it has of the segment of this number; the answer holds them until it is dropped.
    fn let_go(&self, backing_id: u64) -> Box<dyn Send>;

    /// Whether dropping that answer waits for another process.
    fn is_slow(&self) -> bool {
        false
    }
}

/// The one descriptor that a segment holds, shared with the frames that are to carry it.
pub(crate) enum Descriptor {
    /// It can add seals, and perhaps write.
    Writer(Arc<OwnedFd>),
    /// A file description of our own that only reads: fit to be sent to anybody.
    Reader(Arc<OwnedFd>),
}

impl Descriptor {
    pub(crate) fn get(&self) -> &Arc<OwnedFd> {
        match self {
            Self::Writer(fd) | Self::Reader(fd) => fd,
        }
    }
}

/// Held by the segment alone: when it goes, its keepers let go of the idle mappings, and its pages
/// are freed with the descriptor, unless somebody else has them.
pub(crate) struct Life {
    pub(crate) fd: Descriptor,
    pub(crate) backing: Arc<Backing>,
}

impl Drop for Life {
    fn drop(&mut self) {
        let backing = &self.backing;
        backing.gone.store(true, Ordering::Release);
        let keepers = std::mem::take(&mut *backing.keepers.lock());
        let keepers: Vec<_> = keepers.iter().filter_map(Weak::upgrade).collect();
        let slow = keepers.iter().any(|keeper| keeper.is_slow());
        let idle: Vec<_> = keepers
            .iter()
            .map(|keeper| keeper.let_go(backing.id))
            .collect();
        if backing.maker == Maker::Host && backing.handed_out.load(Ordering::Relaxed) {
            let mut given = backing.given.lock();
            *given = Some(Arc::clone(self.fd.get()));
        }
        // The charge goes last: until then the memory is not free.
        let pages = (idle, Arc::clone(self.fd.get()), Arc::clone(backing));
        match slow {
            true => backing.charge.budget().free_slowly(pages),
            false => backing.charge.free(pages),
        }
    }
}

/// What a segment and its parked mappings share. Lives, with the charge, until the last of
/// them is gone.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Unlike an inode number never used twice in this process.
    pub(crate) id: u64,
    pub(crate) inode: Inode,
    charge: SegmentCharge,
    maker: Maker,
    // Others were given a descriptor, and may have kept it.
    pub(crate) handed_out: AtomicBool,
    // What they were given, once the segment is gone.
    given: Mutex<Option<Arc<OwnedFd>>>,
    gone: AtomicBool,
    // Read-only parkings that are with an invocation now: until they are back, the pages of
    // a result must not be handed to the next invocation.
    readers: AtomicUsize,
    keepers: Mutex<Vec<Weak<dyn KeepsMappings>>>,
}

impl Backing {
    pub(crate) fn new(inode: Inode, charge: SegmentCharge, maker: Maker) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            inode,
            charge,
            maker,
            handed_out: AtomicBool::new(false),
            given: Mutex::new(None),
            gone: AtomicBool::new(false),
            readers: AtomicUsize::new(0),
            keepers: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.charge.bytes()
    }

    pub(crate) fn budget(&self) -> &Arc<Budget> {
        self.charge.budget()
    }

    /// Whether `budget` has more room once this is gone.
    pub(crate) fn counts_in(&self, budget: &Budget) -> bool {
        self.charge.counts_in(budget)
    }

    /// The segment was dropped: its mappings must not be kept for later.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(crate) fn has_readers(&self) -> bool {
        self.readers.load(Ordering::Acquire) > 0
    }

    pub(crate) fn check_range(&self, offset: u64, length: u64) -> Result<(), MemoryError> {
        let bytes = self.bytes();
        if offset > bytes || length > bytes - offset {
            return Err(MemoryError::OutOfRange {
                offset,
                length,
                bytes,
                inode: self.inode,
            });
        }
        Ok(())
    }

    /// Remembers who may keep mappings of this segment.
    pub(crate) fn parked_in(&self, keeper: &Arc<dyn KeepsMappings>) {
        let mut keepers = self.keepers.lock();
        // Processes come and go while a segment lives.
        keepers.retain(|known| known.strong_count() > 0);
        let same = |known: &Weak<_>| std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(keeper));
        if !keepers.iter().any(same) {
            keepers.push(Arc::downgrade(keeper));
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let given = self.given.get_mut();
        if let Some(given) = given.take() {
            self.charge.take().keep_until_gone(given);
        }
    }
}

/// Who made the memfd. What a client made and keeps is its own memory, not the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    Host,
    Client,
}

/// A read-only parking that is with an invocation.
#[derive(Debug)]
pub(crate) struct InUse(Arc<Backing>);

impl InUse {
    pub(crate) fn new(backing: &Arc<Backing>) -> Self {
        backing.readers.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(backing))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::AcqRel);
    }
}
