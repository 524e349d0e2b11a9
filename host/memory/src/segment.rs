//! A shared-memory object (memfd) and who can still write to it, in its type.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::SealFlags;

use crate::backing::{Backing, Descriptor, Life, Maker};
use crate::memfd::{create_memfd, inode_of, reopen_readonly, to_keep};
use crate::pages::{Reservation, map_for_reading};
use crate::segment_charge::SegmentCharge;
use crate::{
    Budget, Copied, HugeBirths, Inode, KeepsMappings, MemoryError, PAGE, Refused, Seals, Shared,
    to_usize,
};

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

/// A memfd of fixed size, charged to a [`Budget`] until it and every mapping of it that this
/// crate made are gone. What can be done with it depends on its kind `K`: [`Open`],
/// [`Sealed`] or [`Lent`].
pub struct Segment<K> {
    life: Life,
    kind: PhantomData<fn() -> K>,
}

impl<K> Segment<K> {
    /// Around a descriptor that may be able to write.
    pub(crate) fn from_writer(fd: OwnedFd, inode: Inode, charge: SegmentCharge) -> Self {
        Self::from_parts(Descriptor::Writer(Arc::new(fd)), inode, charge, Maker::Host)
    }

    /// Around the descriptor of a client, which made the file.
    pub(crate) fn from_client(fd: OwnedFd, inode: Inode, charge: SegmentCharge) -> Self {
        Self::from_parts(
            Descriptor::Writer(Arc::new(fd)),
            inode,
            charge,
            Maker::Client,
        )
    }

    /// As [`Self::from_client`], around what [`reopen_readonly`] gave of it.
    pub(crate) fn from_client_reader(fd: OwnedFd, inode: Inode, charge: SegmentCharge) -> Self {
        Self::from_parts(
            Descriptor::Reader(Arc::new(fd)),
            inode,
            charge,
            Maker::Client,
        )
    }

    fn from_parts(fd: Descriptor, inode: Inode, charge: SegmentCharge, maker: Maker) -> Self {
        Self {
            life: Life {
                fd,
                backing: Arc::new(Backing::new(inode, charge, maker)),
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

    /// A descriptor that reads only, to be sent to others. It cannot add seals. (A receiver of the host's own
    /// user can make it one that does, and can write where no seal forbids that.) Once writing has ended it
    /// is the segment's own, at no cost; before that it is opened anew.
    ///
    /// # Errors
    /// [`MemoryError::Leased`]; [`MemoryError::System`], for instance if there are no descriptors left.
    pub fn readonly_fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        self.backing().handed_out.store(true, Ordering::Relaxed);
        match &self.life.fd {
            Descriptor::Reader(fd) => Ok(Arc::clone(fd)),
            Descriptor::Writer(_) => self.reopened().map(Arc::new),
        }
    }

    /// Which segment it is, by a number that is not used twice in this process.
    pub fn number(&self) -> u64 {
        self.backing().id
    }

    fn reopened(&self) -> Result<OwnedFd, MemoryError> {
        reopen_readonly(self.fd()).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => MemoryError::Leased {
                inode: self.inode(),
            },
            _ => MemoryError::system("opening read-only", self.bytes(), errno),
        })
    }

    /// A memfd of `bytes` bytes that the host made, in another process of it. `counted` counts what that has open.
    pub(crate) fn of_host(
        fd: OwnedFd,
        bytes: u64,
        counted: &Arc<Budget>,
    ) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::system("fstat", bytes, source);
        let stat = rustix::fs::fstat(&fd).map_err(failed)?;
        if u64::try_from(stat.st_size) != Ok(bytes) {
            return Err(failed(rustix::io::Errno::INVAL));
        }
        let charge = SegmentCharge::reserve(counted, bytes)?;
        let inode = inode_of(fd.as_fd()).map_err(failed)?;
        Ok(Self::from_writer(fd, inode, charge))
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

    /// Copies out of `offset`. Whoever can still write may be writing meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
        copied: &Copied,
    ) -> Result<(), MemoryError> {
        self.check_range(offset, into.len() as u64)?;
        read_all(self.fd(), offset, into)?;
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

impl<K: Parkable> Segment<K> {
    /// What another process of the host needs in order to read it; `keeper` is told when the segment goes.
    ///
    /// # Errors
    /// As [`Self::readonly_fd`].
    pub fn share(&self, keeper: &Arc<dyn KeepsMappings>) -> Result<Shared, MemoryError> {
        self.backing().parked_in(keeper);
        Ok(Shared {
            fd: self.readonly_fd()?,
            bytes: self.bytes(),
        })
    }
}

impl Segment<Open> {
    /// A new segment of at least `bytes` zeros (a multiple of [`PAGE`], at least one).
    ///
    /// # Errors
    /// [`MemoryError::Budget`] if it does not fit the budget; [`MemoryError::System`].
    pub fn create(bytes: u64, budget: &Arc<Budget>) -> Result<Self, MemoryError> {
        let bytes = whole_pages(bytes.max(1))?;
        let charge = SegmentCharge::reserve(budget, bytes)?;
        let fd =
            create_memfd().map_err(|source| MemoryError::system("memfd_create", bytes, source))?;
        rustix::fs::ftruncate(&fd, bytes)
            .map_err(|source| MemoryError::system("ftruncate", bytes, source))?;
        fix_length(fd.as_fd(), bytes)?;
        let fd = to_keep(fd.as_fd())
            .map_err(|source| MemoryError::system("opening a new memfd", bytes, source))?;
        let inode =
            inode_of(fd.as_fd()).map_err(|source| MemoryError::system("fstat", bytes, source))?;
        Ok(Self::from_writer(fd, inode, charge))
    }

    /// Around a file that this process alone has, which has its length now.
    pub(crate) fn of_grown(fd: Arc<OwnedFd>, charge: SegmentCharge) -> Result<Self, MemoryError> {
        let bytes = charge.bytes();
        fix_length(fd.as_fd(), bytes)?;
        let inode =
            inode_of(fd.as_fd()).map_err(|source| MemoryError::system("fstat", bytes, source))?;
        let fd = Descriptor::Writer(fd);
        Ok(Self::from_parts(fd, inode, charge, Maker::Host))
    }

    pub(crate) fn writer(&self) -> Arc<OwnedFd> {
        Arc::clone(self.life.fd.get())
    }

    /// Backs `range` (bytes), which this process is about to fill and nobody has written yet, with
    /// huge pages (from 4 MiB on) as far as Linux gives any; `births` counts them.
    pub fn back_with_huge_pages(&self, range: Range<u64>, births: &HugeBirths) {
        // SAFETY: an open segment cannot shrink (`create` sealed that).
        unsafe { births.back_file(self.fd(), self.bytes(), range) };
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], [`MemoryError::System`].
    pub fn write_at(&self, offset: u64, bytes: &[u8], copied: &Copied) -> Result<(), MemoryError> {
        self.check_range(offset, bytes.len() as u64)?;
        write_all(self.fd(), offset, bytes)?;
        copied.add(bytes.len() as u64);
        Ok(())
    }

    /// The descriptor that can write, for the client that fills the segment.
    pub fn client_fd(&self) -> Arc<OwnedFd> {
        self.backing().handed_out.store(true, Ordering::Relaxed);
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

    /// Ends writing for everybody but the process of the host that has it mapped writable already. That, too, can be
    /// ended: a segment that others are to see is [sealed](Segment::seal).
    pub(crate) fn lend_to_filler(self) -> Result<Segment<Lent<Host>>, Refused<Self>> {
        self.with_seals(Seals::LENT)
    }
}

impl Segment<Lent<Host>> {
    /// In a process of the host: what it is to read, of `bytes` bytes, and cannot shrink. `counted` counts what it has open.
    ///
    /// # Errors
    /// [`MemoryError::Budget`]; [`MemoryError::System`], also if it has another size.
    pub fn received(fd: OwnedFd, bytes: u64, counted: &Arc<Budget>) -> Result<Self, MemoryError> {
        Self::of_host(fd, bytes, counted)
    }

    /// What seals it.
    pub(crate) fn sealer(&self) -> Arc<OwnedFd> {
        Arc::clone(self.life.fd.get())
    }

    /// Ends all writing, for everybody.
    ///
    /// # Errors
    /// [`MemoryError::StillWritable`] while another process has it mapped writable, [`MemoryError::SealsLocked`] if it
    /// is this process that writes; the segment comes back.
    pub(crate) fn seal(self) -> Result<Segment<Sealed>, Refused<Self>> {
        self.with_last_seals(Seals::SEALED)
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
}

impl Segment<Sealed> {
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

/// From the first moment on, before anybody else has a descriptor: a client that cut it
/// would make every access of the host beyond the new end a SIGBUS.
fn fix_length(fd: BorrowedFd<'_>, bytes: u64) -> Result<(), MemoryError> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(|source| MemoryError::system("F_ADD_SEALS", bytes, source))
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all(fd: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        match rustix::io::pwrite(fd, rest, offset + done as u64) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(source) => {
                return Err(MemoryError::system("writing", rest.len() as u64, source));
            }
        }
    }
    Ok(())
}

/// A segment's size: `bytes` in whole pages.
pub(crate) fn whole_pages(bytes: u64) -> Result<u64, MemoryError> {
    bytes
        .checked_next_multiple_of(PAGE)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| MemoryError::system("sizing a segment", bytes, rustix::io::Errno::FBIG))
}

/// Reads all of `into` at `offset`.
pub(crate) fn read_all(
    fd: BorrowedFd<'_>,
    offset: u64,
    into: &mut [u8],
) -> Result<(), MemoryError> {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        let bytes = rest.len() as u64;
        match rustix::io::pread(fd, rest, offset + done as u64) {
            Ok(0) => {
                let short = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(MemoryError::system("reading", bytes, short));
            }
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(source) => return Err(MemoryError::system("reading", bytes, source)),
        }
    }
    Ok(())
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
