//! One result's segment, from the pool and back to it.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use crate::backing::Backing;
use crate::result_pages::ResultPages;
use crate::{
    Budget, Charge, Copied, Host, Inode, KeepsMappings, Lent, Lot, MemoryError, Open, Parked,
    RecyclingKey, Refused, ResultPool, Sealed, Seals, Segment, Shared,
};

/// Another process, which fills a result's segment through a writable mapping of its own. Dropping this has it let
/// go: when that returns, it has, or is gone with all that it had.
pub trait Filler: fmt::Debug + Send + Sync {
    /// Which process it is: its number among those of this one's life.
    fn process(&self) -> u64;

    /// Whether it can fill the segment again.
    fn is_there(&self) -> bool;
}

/// Who filled a result.
pub trait Author: fmt::Debug + Send + Sync {
    /// It did with the result what it has no right to, as `why` says: it is not to be trusted with another one.
    fn distrust(&self, why: &str);
}

/// Where the one writable mapping of a segment is.
#[derive(Debug)]
pub(super) enum Writer {
    Here(Parked),
    There(Box<dyn Filler>),
}

// In this order: the segment's memory is free when nobody has it mapped.
#[derive(Debug)]
pub(super) struct Warm {
    pub(super) writer: Writer,
    pub(super) segment: Segment<Lent<Host>>,
    pub(super) counted: Counted,
}

impl Warm {
    pub(super) fn charged_to(&self, budget: &Arc<Budget>) -> bool {
        Arc::ptr_eq(self.segment.backing().budget(), budget)
    }

    /// Drops it, not here if that takes long.
    pub(super) fn free(self, budget: &Budget) {
        match self.writer {
            Writer::There(_) => budget.free_slowly(self),
            Writer::Here(_) => budget.free(self.segment.bytes(), self),
        }
    }

    /// Whether `process` can fill it; none: this one.
    pub(super) fn is_for(&self, process: Option<u64>) -> bool {
        match &self.writer {
            Writer::Here(_) => process.is_none(),
            Writer::There(filler) => process == Some(filler.process()) && filler.is_there(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Counted {
    pub(super) _bytes: Charge,
    /// Of a segment that this process does not map itself.
    pub(super) _segment: Option<Charge>,
}

/// The end of all writing to a result that another process fills. It may take that process's time, and Linux's: nobody
/// else has to wait for either.
#[derive(Debug)]
pub struct Ending {
    filler: Option<Box<dyn Filler>>,
    sealer: Arc<OwnedFd>,
    inode: Inode,
    bytes: u64,
}

impl Ending {
    /// Has that process let go, and adds the seal, which Linux refuses as long as anybody could write.
    ///
    /// # Errors
    /// [`MemoryError::KeptWritable`]; [`MemoryError::SealsLocked`] if somebody else forbade further seals.
    pub fn end(self) -> Result<(), MemoryError> {
        drop(self.filler);
        let add = || rustix::fs::fcntl_add_seals(&self.sealer, Seals::SEALED.0);
        let mut added = add();
        // Whoever looks at a process that ends keeps its memory for a moment.
        for wait_ms in [1, 4, 16, 64] {
            if added != Err(Errno::BUSY) {
                break;
            }
            std::thread::sleep(Duration::from_millis(wait_ms));
            added = add();
        }
        let inode = self.inode;
        added.map_err(|errno| match (errno, Seals::of(self.sealer.as_fd())) {
            (Errno::BUSY, _) => MemoryError::KeptWritable { inode },
            (Errno::PERM, Ok(seals)) => MemoryError::SealsLocked { inode, seals },
            _ => MemoryError::system("F_ADD_SEALS", self.bytes, errno),
        })
    }
}

/// A result's segment, writable by the host (or [a process](Filler) of it) alone, or [sealable](ResultPool::take_sealable).
///
/// Dropping it gives it back to the pool, or frees it if it must not be recycled.
#[derive(Debug)]
pub struct PoolSegment {
    // These taken by `drop` and `seal` only.
    held: Option<Held>,
    counted: Option<Counted>,
    filler: Option<Box<dyn Filler>>,
    // By another process, whether or not it still can.
    filled_elsewhere: bool,
    author: Option<Arc<dyn Author>>,
    pages: ResultPages,
    recyclable: AtomicBool,
    pool: Arc<ResultPool>,
}

#[derive(Debug)]
pub(super) enum Held {
    Lent(Segment<Lent<Host>>, RecyclingKey),
    /// Another process is going to map it, and then it is lent.
    Unlent(Segment<Open>, RecyclingKey),
    Sealable(Segment<Open>),
}

impl Held {
    fn backing(&self) -> &Arc<Backing> {
        match self {
            Self::Lent(segment, _) => segment.backing(),
            Self::Unlent(segment, _) | Self::Sealable(segment) => segment.backing(),
        }
    }
}

impl PoolSegment {
    pub(super) fn new(
        pool: &Arc<ResultPool>,
        held: Held,
        parked: Option<Parked>,
        counted: Counted,
    ) -> Self {
        Self {
            pages: ResultPages::new(held.backing(), parked),
            recyclable: AtomicBool::new(!matches!(held, Held::Sealable(_))),
            filler: None,
            filled_elsewhere: false,
            author: None,
            held: Some(held),
            counted: Some(counted),
            pool: Arc::clone(pool),
        }
    }

    /// One that waited.
    pub(super) fn warm(pool: &Arc<ResultPool>, warm: Warm, key: RecyclingKey) -> Self {
        let held = Held::Lent(warm.segment, key);
        match warm.writer {
            Writer::Here(parked) => Self::new(pool, held, Some(parked), warm.counted),
            Writer::There(filler) => {
                let mut segment = Self::elsewhere(pool, held, warm.counted);
                segment.filler = Some(filler);
                segment
            }
        }
    }

    /// One that another process fills.
    pub(super) fn elsewhere(pool: &Arc<ResultPool>, held: Held, counted: Counted) -> Self {
        let mut segment = Self::new(pool, held, None, counted);
        segment.filled_elsewhere = true;
        segment
    }

    /// Its capacity: at least what was asked for, and a multiple of [a guest's page](crate::GUEST_PAGE).
    pub fn bytes(&self) -> u64 {
        self.backing().bytes()
    }

    /// Which shared-memory object it is.
    pub fn inode(&self) -> Inode {
        self.backing().inode
    }

    /// A descriptor for a consumer. It can neither write nor be made to.
    ///
    /// # Errors
    /// [`MemoryError::MissingSeals`] for a sealable segment: seal it first.
    pub fn readonly_fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        self.lent("sending a descriptor")?.readonly_fd()
    }

    /// What writes it, in this process.
    pub fn pages(&self) -> &ResultPages {
        &self.pages
    }

    /// Copies out of `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        // Where another process may write, bytes are copied by Linux and never borrowed.
        match self.held.as_ref().filter(|_| self.filled_elsewhere) {
            Some(Held::Lent(segment, _)) => segment.read_at(offset, into, copied),
            Some(Held::Unlent(segment, _) | Held::Sealable(segment)) => {
                segment.read_at(offset, into, copied)
            }
            None => self.pages.read_at(offset, into, copied),
        }
    }

    /// Which segment it is, by a number that is not used twice in this process.
    pub fn number(&self) -> u64 {
        self.backing().id
    }

    /// A descriptor that can write, for the process that is to fill this segment. None if it has it mapped already.
    pub fn new_fd(&self) -> Option<Arc<OwnedFd>> {
        match &self.held {
            Some(Held::Unlent(segment, _) | Held::Sealable(segment)) => Some(segment.writer()),
            Some(Held::Lent(..)) | None => None,
        }
    }

    /// Whether it is still to be [lent](Self::lend_to) to the process that fills it.
    pub fn is_unlent(&self) -> bool {
        matches!(self.held, Some(Held::Unlent(..)))
    }

    /// Whether another process fills it, or has filled it.
    pub fn is_filled_elsewhere(&self) -> bool {
        self.filled_elsewhere
    }

    /// Whether it is going to be [sealed](Self::seal).
    pub fn is_sealable(&self) -> bool {
        matches!(self.held, Some(Held::Sealable(_)))
    }

    /// From now on nobody can write it but `filler`, which has it mapped and has filled it. Only for one that
    /// [is unlent](Self::is_unlent).
    ///
    /// # Errors
    /// [`MemoryError::SealsLocked`], [`MemoryError::System`]: it cannot be given to anybody.
    pub fn lend_to(&mut self, filler: Box<dyn Filler>) -> Result<(), MemoryError> {
        match self.held.take() {
            Some(Held::Unlent(segment, key)) => match segment.lend_to_filler() {
                Ok(segment) => {
                    self.held = Some(Held::Lent(segment, key));
                    self.filler = Some(filler);
                    Ok(())
                }
                Err(refused) => {
                    self.held = Some(Held::Unlent(refused.segment, key));
                    Err(refused.error)
                }
            },
            held => {
                self.held = held;
                let (inode, seals) = (self.inode(), Seals::LENT_FOR_GOOD);
                Err(MemoryError::SealsLocked { inode, seals })
            }
        }
    }

    /// Who has filled it, by a process other than this one.
    pub fn set_author(&mut self, author: Arc<dyn Author>) {
        self.author = Some(author);
    }

    /// Whom [that](Self::set_author) named.
    pub fn author(&self) -> Option<Arc<dyn Author>> {
        self.author.clone()
    }

    /// A read-only mapping of `range` (bytes, whole guest pages), to use this result as a
    /// kernel's input.
    ///
    /// # Errors
    /// [`MemoryError::MissingSeals`] for a sealable segment: seal it first. [`MemoryError::Park`].
    pub fn park_as_input(&self, lot: &Arc<Lot>, range: Range<u64>) -> Result<Parked, MemoryError> {
        Ok(lot.take_input(self.lent("use as an input")?, range)?)
    }

    /// What another process of the host needs in order to read it; `keeper` is told when the segment goes.
    ///
    /// # Errors
    /// [`MemoryError::MissingSeals`] for a sealable segment: seal it first.
    pub fn share(&self, keeper: &Arc<dyn KeepsMappings>) -> Result<Shared, MemoryError> {
        self.lent("use as an input")?.share(keeper)
    }

    /// Forbids recycling: somebody may go on reading it (a lease expired without a release,
    /// or another principal mapped it).
    pub fn never_recycle(&self) {
        self.recyclable.store(false, Ordering::Relaxed);
    }

    /// What comes before [`Self::seal`] where another process has filled it, which does not fill it again: none if it is
    /// this one that has.
    pub fn ending(&mut self) -> Option<Ending> {
        let sealer = match self.held.as_ref().filter(|_| self.filled_elsewhere)? {
            Held::Lent(segment, _) => segment.sealer(),
            Held::Unlent(segment, _) | Held::Sealable(segment) => segment.writer(),
        };
        Some(Ending {
            filler: self.filler.take(),
            sealer,
            inode: self.inode(),
            bytes: self.bytes(),
        })
    }

    /// Ends all writing, for everybody. Only for a [sealable](ResultPool::take_sealable) segment, and for one that another
    /// process has filled, after [`Self::ending`].
    ///
    /// # Errors
    /// [`MemoryError::SealsLocked`] for a segment that is lent to this process for good,
    /// [`MemoryError::StillWritable`] if its pages are in a guest; the segment comes back.
    pub fn seal(mut self) -> Result<Segment<Sealed>, Box<Refused<Self>>> {
        let inode = self.inode();
        let refused = match self.held.take() {
            Some(Held::Sealable(segment)) => {
                drop(self.pages.take_parked());
                match segment.seal() {
                    Ok(sealed) => return Ok(sealed),
                    Err(refused) => (Some(Held::Sealable(refused.segment)), refused.error),
                }
            }
            Some(Held::Lent(segment, key)) => match segment.seal() {
                Ok(sealed) => return Ok(sealed),
                Err(refused) => (Some(Held::Lent(refused.segment, key)), refused.error),
            },
            held => {
                let seals = Seals::LENT_FOR_GOOD;
                (held, MemoryError::SealsLocked { inode, seals })
            }
        };
        let error;
        (self.held, error) = refused;
        Err(Box::new(Refused {
            segment: self,
            error,
        }))
    }

    fn backing(&self) -> &Arc<Backing> {
        let held = self.held.as_ref().expect("only drop and seal take it");
        held.backing()
    }

    fn lent(&self, operation: &'static str) -> Result<&Segment<Lent<Host>>, MemoryError> {
        match self.held.as_ref().expect("only drop and seal take it") {
            Held::Lent(segment, _) => Ok(segment),
            Held::Unlent(segment, _) | Held::Sealable(segment) => Err(MemoryError::MissingSeals {
                operation,
                inode: segment.inode(),
                seals: segment.seals()?,
                needed: Seals::SEALED,
            }),
        }
    }
}

impl Drop for PoolSegment {
    fn drop(&mut self) {
        let (held, counted) = (self.held.take(), self.counted.take());
        // One that is gone fills nothing again, and may have it mapped a moment longer.
        let is_there = self.filler.as_ref().is_none_or(|filler| filler.is_there());
        let writer = match self.filler.take() {
            Some(filler) => Some(Writer::There(filler)),
            None => self.pages.take_parked().map(Writer::Here),
        };
        let Some(held) = held else {
            return;
        };
        let recyclable = self.recyclable.load(Ordering::Relaxed);
        match (held, counted, writer) {
            (Held::Lent(segment, key), Some(counted), Some(writer))
                if recyclable && is_there && !segment.backing().has_readers() =>
            {
                self.pool.keep(
                    Warm {
                        writer,
                        segment,
                        counted,
                    },
                    key,
                );
            }
            (held, counted, writer) => match writer {
                Some(Writer::There(_)) => self.pool.budget.free_slowly((writer, held, counted)),
                _ => {
                    let bytes = held.backing().bytes();
                    self.pool.budget.free(bytes, (writer, held, counted));
                }
            },
        }
    }
}
