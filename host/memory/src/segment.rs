//! A shared-memory object (memfd) and who can still write to it, in its type.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::budget::SegmentCharge;
use crate::pages::{FileAccess, Reservation, map_for_reading};
use crate::parking::ParkingLot;
use crate::{Budget, BudgetExceeded, Copied, HugeBirths, Inode, PAGE, to_usize};

/// Anybody who has the descriptor can write; the host copies bytes in and out.
#[derive(Debug)]
pub enum Open {}
/// Nobody can write any more, by the operating system's word.
#[derive(Debug)]
pub enum Sealed {}
/// One writer is left, `W`: the one that mapped it writable before it was lent.
#[derive(Debug)]
pub struct Lent<W>(PhantomData<W>);
/// The host is the writer that is left.
#[derive(Debug)]
pub enum Host {}
/// A client is the writer that is left.
#[derive(Debug)]
pub enum Client {}

mod private {
    /// Keeps [`super::Parkable`] to the kinds of this module.
    pub trait Kind {}
    impl Kind for super::Sealed {}
    impl Kind for super::Lent<super::Host> {}
    impl Kind for super::Lent<super::Client> {}
}

/// Kinds of segment that a kernel may read: those that cannot shrink under its window.
/// An [`Open`] one can.
pub trait Parkable: private::Kind {}
impl Parkable for Sealed {}
impl Parkable for Lent<Host> {}
impl Parkable for Lent<Client> {}

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
    Park(#[from] crate::ParkError),
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

/// The seals of a memfd, by their names in text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seals(SealFlags);

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

/// A memfd of fixed size, charged to a [`Budget`] until it and every mapping of it that this
/// crate made are gone. What can be done with it depends on its kind `K`: [`Open`],
/// [`Sealed`] or [`Lent`].
pub struct Segment<K> {
    life: Life,
    kind: PhantomData<fn() -> K>,
}

/// The one descriptor that a segment holds, shared with the frames that are to carry it.
enum Descriptor {
    /// It can add seals, and perhaps write.
    Writer(Arc<OwnedFd>),
    /// A file description of our own that only reads: fit to be sent to anybody.
    Reader(Arc<OwnedFd>),
}

impl Descriptor {
    fn get(&self) -> &Arc<OwnedFd> {
        match self {
            Self::Writer(fd) | Self::Reader(fd) => fd,
        }
    }
}

impl<K> Segment<K> {
    /// Around a descriptor that may be able to write.
    pub(crate) fn from_writer(fd: OwnedFd, inode: Inode, charge: SegmentCharge) -> Self {
        Self::from_parts(Descriptor::Writer(Arc::new(fd)), inode, charge)
    }

    /// Around what [`reopen_readonly`] gave.
    pub(crate) fn from_reader(fd: OwnedFd, inode: Inode, charge: SegmentCharge) -> Self {
        Self::from_parts(Descriptor::Reader(Arc::new(fd)), inode, charge)
    }

    fn from_parts(fd: Descriptor, inode: Inode, charge: SegmentCharge) -> Self {
        Self {
            life: Life {
                fd,
                backing: Arc::new(Backing::new(inode, charge)),
            },
            kind: PhantomData,
        }
    }

    /// Bytes of the whole segment.
    pub fn bytes(&self) -> u64 {
        self.backing().bytes()
    }

    /// Which shared-memory object it is.
    pub fn inode(&self) -> Inode {
        self.backing().inode
    }

    /// The seals that it has now.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn seals(&self) -> Result<Seals, MemoryError> {
        Seals::of(self.fd())
            .map_err(|source| MemoryError::system("F_GET_SEALS", self.bytes(), source))
    }

    /// A descriptor that reads only, to be sent to others. It cannot add seals. (Its
    /// receiver can reopen it for writing where no seal forbids that.) Once writing has ended it
    /// is the segment's own, at no cost; before that it is opened anew.
    ///
    /// # Errors
    /// [`MemoryError::Leased`]; [`MemoryError::System`], for instance if there are no descriptors left.
    pub fn readonly_fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        match &self.life.fd {
            Descriptor::Reader(fd) => Ok(Arc::clone(fd)),
            Descriptor::Writer(_) => self.reopened().map(Arc::new),
        }
    }

    fn reopened(&self) -> Result<OwnedFd, MemoryError> {
        reopen_readonly(self.fd()).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => MemoryError::Leased {
                inode: self.inode(),
            },
            _ => MemoryError::system("opening read-only", self.bytes(), errno),
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.life.fd.get().as_fd()
    }

    pub(crate) fn backing(&self) -> &Arc<Backing> {
        &self.life.backing
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), MemoryError> {
        self.backing().check_range(offset, length)
    }

    fn read_by_descriptor(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.check_range(offset, into.len() as u64)?;
        let mut done = 0;
        while done < into.len() {
            let rest = &mut into[done..];
            let bytes = rest.len() as u64;
            match rustix::io::pread(self.fd(), rest, offset + done as u64) {
                Ok(0) => {
                    let short = io::Error::from(io::ErrorKind::UnexpectedEof);
                    return Err(MemoryError::system("reading", bytes, short));
                }
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => return Err(MemoryError::system("reading", bytes, source)),
            }
        }
        copied.add(into.len() as u64);
        Ok(())
    }

    fn with_seals<L>(self, seals: Seals) -> Result<Segment<L>, Refused<Self>> {
        match rustix::fs::fcntl_add_seals(self.fd(), seals.0) {
            Ok(()) => Ok(Segment {
                life: self.life,
                kind: PhantomData,
            }),
            Err(errno) => {
                let error = self.seal_error(errno);
                Err(Refused {
                    segment: self,
                    error,
                })
            }
        }
    }

    /// As [`Self::with_seals`], for seals after which the host needs no others: from then on a
    /// descriptor that reads does for everything, and the one that can write is closed.
    fn with_last_seals<L>(self, seals: Seals) -> Result<Segment<L>, Refused<Self>> {
        // First, because seals cannot be taken back.
        let reader = match self.reopened() {
            Ok(reader) => reader,
            Err(error) => {
                return Err(Refused {
                    segment: self,
                    error,
                });
            }
        };
        let mut sealed = self.with_seals(seals)?;
        sealed.life.fd = Descriptor::Reader(Arc::new(reader));
        Ok(sealed)
    }

    fn seal_error(&self, errno: rustix::io::Errno) -> MemoryError {
        let inode = self.inode();
        match (errno, self.seals()) {
            (rustix::io::Errno::BUSY, _) => MemoryError::StillWritable { inode },
            (rustix::io::Errno::PERM, Ok(seals)) => MemoryError::SealsLocked { inode, seals },
            _ => MemoryError::system("F_ADD_SEALS", self.bytes(), errno),
        }
    }
}

impl Segment<Open> {
    /// A new segment of at least `bytes` zeros (a multiple of [`PAGE`], at least one).
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if it does not fit the budget; [`MemoryError::System`].
    pub fn create(bytes: u64, budget: &Arc<Budget>) -> Result<Self, MemoryError> {
        let size = bytes.max(1).checked_next_multiple_of(PAGE);
        let bytes = size
            .filter(|size| i64::try_from(*size).is_ok())
            .ok_or_else(|| {
                MemoryError::system("creating a segment", bytes, rustix::io::Errno::FBIG)
            })?;
        let charge = budget.try_reserve_segment(bytes)?;
        let fd =
            create_memfd().map_err(|source| MemoryError::system("memfd_create", bytes, source))?;
        rustix::fs::ftruncate(&fd, bytes)
            .map_err(|source| MemoryError::system("ftruncate", bytes, source))?;
        // From the first moment on, before anybody else has a descriptor: a client that cut it
        // would make every access of the host beyond the new end a SIGBUS.
        let fixed = SealFlags::SHRINK | SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&fd, fixed)
            .map_err(|source| MemoryError::system("F_ADD_SEALS", bytes, source))?;
        let inode =
            inode_of(fd.as_fd()).map_err(|source| MemoryError::system("fstat", bytes, source))?;
        Ok(Self::from_writer(fd, inode, charge))
    }

    /// Backs `range` (bytes), which this process is about to fill and nobody has written yet, with
    /// huge pages (from 4 MiB on) as far as Linux gives any; `births` counts them.
    pub fn back_with_huge_pages(&self, range: Range<u64>, births: &HugeBirths) {
        let range = to_usize(range.start)..to_usize(range.end.min(self.bytes()));
        if range.is_empty() {
            return;
        }
        let bytes = to_usize(self.bytes());
        // Without a mapping there are small pages: slower and otherwise the same.
        if let Ok(pages) = Reservation::of_file(self.fd(), bytes, FileAccess::SharedReadWrite) {
            // SAFETY: just mapped shared and writable, at a multiple of a huge page for what is
            // large enough to have one; an open segment cannot shrink (`create` sealed that).
            unsafe { births.back(&pages, range) };
        }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn write_at(&self, offset: u64, bytes: &[u8], copied: &Copied) -> Result<(), MemoryError> {
        self.check_range(offset, bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            match rustix::io::pwrite(self.fd(), rest, offset + done as u64) {
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(source) => {
                    return Err(MemoryError::system("writing", rest.len() as u64, source));
                }
            }
        }
        copied.add(bytes.len() as u64);
        Ok(())
    }

    /// Copies out of `offset`. Another process may be writing meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.read_by_descriptor(offset, into, copied)
    }

    /// The descriptor that can write, for the client that fills the segment.
    pub fn client_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(self.life.fd.get())
    }

    /// Ends all writing, for everybody.
    ///
    /// # Errors
    /// [`MemoryError::StillWritable`] while anybody has it mapped writable; the segment comes back.
    pub fn seal(self) -> Result<Segment<Sealed>, Refused<Self>> {
        self.with_last_seals(Seals::SEALED)
    }

    /// Ends writing for everybody but the client that has it mapped writable already.
    ///
    /// # Errors
    /// [`MemoryError::SealsLocked`], [`MemoryError::System`]; the segment comes back.
    pub fn lend_to_client(self) -> Result<Segment<Lent<Client>>, Refused<Self>> {
        self.with_seals(Seals::LENT)
    }

    /// Ends writing for everybody but this process, which has it mapped writable already.
    /// No seal can be added after this, so nobody can take that away from us either.
    pub(crate) fn lend_to_host(self) -> Result<Segment<Lent<Host>>, Refused<Self>> {
        self.with_last_seals(Seals::LENT_FOR_GOOD)
    }
}

impl Segment<Lent<Client>> {
    /// Ends all writing, for everybody.
    ///
    /// # Errors
    /// [`MemoryError::StillWritable`] while the client has it mapped writable,
    /// [`MemoryError::SealsLocked`] if the client forbade seals; the segment comes back.
    pub fn seal(self) -> Result<Segment<Sealed>, Refused<Self>> {
        self.with_last_seals(Seals::SEALED)
    }

    /// Copies out of `offset`. The client may be writing meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.read_by_descriptor(offset, into, copied)
    }
}

impl Segment<Sealed> {
    /// Copies out of `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.read_by_descriptor(offset, into, copied)
    }

    /// Maps all of it for reading.
    ///
    /// # Errors
    /// [`MemoryError::System`], for instance if there are too many mappings.
    pub fn map(&self) -> Result<SealedBytes, MemoryError> {
        let seals = self.seals()?;
        if !seals.contains(Seals::SEALED) {
            return Err(MemoryError::MissingSeals {
                operation: "a slice of its bytes",
                inode: self.inode(),
                seals,
                needed: Seals::SEALED,
            });
        }
        let bytes = to_usize(self.bytes());
        let mapped = match bytes {
            0 => None,
            _ => Some(
                map_for_reading(self.fd(), bytes)
                    .map_err(|source| MemoryError::system("mmap", self.bytes(), source))?,
            ),
        };
        Ok(SealedBytes {
            mapped,
            bytes,
            _backing: Arc::clone(self.backing()),
        })
    }
}

impl<K> fmt::Debug for Segment<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = std::any::type_name::<K>().replace("strait_memory::segment::", "");
        f.debug_struct(&format!("Segment<{kind}>"))
            .field("inode", &self.inode())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// The bytes of a sealed segment, mapped read-only.
pub struct SealedBytes {
    // None for a segment of no bytes, which cannot be mapped.
    mapped: Option<Reservation>,
    bytes: usize,
    _backing: Arc<Backing>,
}

impl SealedBytes {
    /// Where the first byte is mapped.
    pub fn address(&self) -> usize {
        self.mapped.as_ref().map_or(0, Reservation::start)
    }
}

impl Deref for SealedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.mapped {
            None => &[],
            // SAFETY: `map` mapped `bytes` bytes readable at this address and the mapping
            // lives as long as `self`; nobody can write them or cut the file, since `map`
            // found it sealed (WRITE, SHRINK) and a seal cannot be taken away.
            Some(mapped) => unsafe {
                std::slice::from_raw_parts(
                    std::ptr::with_exposed_provenance(mapped.start()),
                    self.bytes,
                )
            },
        }
    }
}

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBytes")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
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
    gone: AtomicBool,
    // Read-only parkings that are with an invocation now: until they are back, the pages of
    // a result must not be handed to the next invocation.
    readers: AtomicUsize,
    lots: Mutex<Vec<Weak<ParkingLot>>>,
}

impl Backing {
    fn new(inode: Inode, charge: SegmentCharge) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            inode,
            charge,
            gone: AtomicBool::new(false),
            readers: AtomicUsize::new(0),
            lots: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.charge.bytes()
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

    /// Remembers a lot that may keep mappings of this segment.
    pub(crate) fn parked_in(&self, lot: &Arc<ParkingLot>) {
        let mut lots = self.lots.lock().unwrap_or_else(PoisonError::into_inner);
        if !lots.iter().any(|known| known.as_ptr() == Arc::as_ptr(lot)) {
            lots.push(Arc::downgrade(lot));
        }
    }
}

/// A read-only parking that is with an invocation.
#[derive(Debug)]
pub(crate) struct Reader(Arc<Backing>);

impl Reader {
    pub(crate) fn new(backing: &Arc<Backing>) -> Self {
        backing.readers.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(backing))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Held by the segment alone: when it goes, the lots let go of the idle mappings, and its pages
/// are freed with the descriptor, unless somebody else has them.
struct Life {
    fd: Descriptor,
    backing: Arc<Backing>,
}

impl Drop for Life {
    fn drop(&mut self) {
        let backing = &self.backing;
        backing.gone.store(true, Ordering::Release);
        let lots =
            std::mem::take(&mut *backing.lots.lock().unwrap_or_else(PoisonError::into_inner));
        let idle: Vec<_> = lots
            .iter()
            .filter_map(Weak::upgrade)
            .flat_map(|lot| lot.take_backing(backing.id))
            .collect();
        // The charge goes last: until then the memory is not free.
        let pages = (idle, Arc::clone(self.fd.get()), Arc::clone(backing));
        backing.charge.free(pages);
    }
}

/// Bytes `range` of a segment of `bytes` bytes, as a range of whole guest pages.
pub(crate) fn guest_pages(range: &Range<u64>, bytes: u64) -> bool {
    range.start < range.end
        && range.start.is_multiple_of(crate::GUEST_PAGE)
        && range.end.is_multiple_of(crate::GUEST_PAGE)
        && range.end <= bytes
}

pub(crate) fn inode_of(fd: BorrowedFd<'_>) -> rustix::io::Result<Inode> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(Inode {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// A file description of our own that only reads. `/proc/self/fd` stays open to a process
/// itself when it is not dumpable.
///
/// # Errors
/// `WOULDBLOCK` if somebody holds a write lease on the file (`F_SETLEASE`): without `O_NONBLOCK`
/// this would wait for that process, up to `fs.lease-break-time`.
pub(crate) fn reopen_readonly(fd: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    // Whoever gets it may take the flag for that of a socket.
    rustix::fs::fcntl_setfl(&fd, OFlags::empty())?;
    Ok(fd)
}

fn create_memfd() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("strait", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know NOEXEC_SEAL.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create("strait", flags),
        result => result,
    }
}
