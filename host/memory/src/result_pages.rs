//! The writable pages of a result, for whoever fills it.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

use crate::backing::Backing;
use crate::{
    Budget, Charge, Copied, HUGE, HugeBirths, Inode, MemoryError, Open, ParkError, Parked, Segment,
};

/// Where a large result's body starts: before it is a header of a page or two.
const HUGE_FROM: u64 = HUGE;

/// The writable mapping of a new segment, of which a result needs the first `asked_bytes`.
pub(crate) fn born(
    segment: &Segment<Open>,
    asked_bytes: u64,
    mapping: Charge,
    births: &HugeBirths,
) -> Result<Parked, ParkError> {
    let mut parked = Parked::whole(segment, mapping)?;
    if asked_bytes > HUGE_FROM {
        parked.back_with_huge_pages(HUGE_FROM..asked_bytes, births);
    }
    Ok(parked)
}

/// A handle on the one writable mapping of a result's segment, or on a [part](Self::split) of it: it moves into a guest and
/// home again.
#[derive(Clone, Debug)]
pub struct ResultPages {
    backing: Arc<Backing>,
    home: Arc<Home>,
}

#[derive(Debug)]
struct Home {
    /// Bytes of the segment: all, or those of a part.
    file: Range<u64>,
    // None while its pages are with a guest, or were lost there.
    parked: Mutex<Option<Parked>>,
}

impl ResultPages {
    pub(crate) fn new(backing: &Arc<Backing>, parked: Option<Parked>) -> Self {
        Self::of(backing, 0..backing.bytes(), parked)
    }

    fn of(backing: &Arc<Backing>, file: Range<u64>, parked: Option<Parked>) -> Self {
        Self {
            backing: Arc::clone(backing),
            home: Arc::new(Home {
                file,
                parked: Mutex::new(parked),
            }),
        }
    }

    /// Maps a segment of `bytes` bytes that another process made and charged, of which a result needs the first
    /// `asked_bytes`. `fd` can write; it is closed, the mapping stays.
    ///
    /// # Errors
    /// [`MemoryError::System`], [`MemoryError::Park`]; [`MemoryError::Budget`] if `counted`, which counts what this
    /// process has mapped, is full.
    pub fn received(
        fd: OwnedFd,
        (bytes, asked_bytes): (u64, u64),
        mapping: Charge,
        counted: &Arc<Budget>,
        births: &HugeBirths,
    ) -> Result<Self, MemoryError> {
        let segment = Segment::<Open>::of_host(fd, bytes, counted)?;
        let parked = born(&segment, asked_bytes, mapping, births)?;
        Ok(Self::new(segment.backing(), Some(parked)))
    }

    /// Bytes of the segment.
    pub fn bytes(&self) -> u64 {
        self.backing.bytes()
    }

    /// Which shared-memory object it is.
    pub fn inode(&self) -> Inode {
        self.backing.inode
    }

    /// Copies `bytes` to `offset`. Nobody may hold a mapping of this segment yet.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn write_at(&self, offset: u64, bytes: &[u8], copied: &Copied) -> Result<(), MemoryError> {
        let (mut parked, at) = self.at_home(offset, bytes.len() as u64)?;
        parked.copy_in(at, bytes);
        copied.add(bytes.len() as u64);
        Ok(())
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
        let (parked, at) = self.at_home(offset, into.len() as u64)?;
        parked.copy_out(at, into);
        copied.add(into.len() as u64);
        Ok(())
    }

    /// Writes zeros to `range` (bytes). Nobody may hold a mapping of this segment yet.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn zero(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let length = range.end.saturating_sub(range.start);
        let (mut parked, at) = self.at_home(range.start, length)?;
        parked.zero(at..at + length);
        Ok(())
    }

    /// Cuts them at `cuts` (bytes of the segment, whole guest pages, in order): until [`Self::join`] the mapping is with the
    /// parts. Offsets into a part are those of the segment.
    ///
    /// # Errors
    /// [`MemoryError::Away`] if they are with a guest, [`MemoryError::Park`] if it cannot be cut there.
    pub fn split(&self, cuts: &[u64]) -> Result<Vec<Self>, MemoryError> {
        let inode = self.inode();
        let parked = self.take_parked().ok_or(MemoryError::Away { inode })?;
        match parked.split(cuts) {
            Ok(parts) => Ok(parts
                .into_iter()
                .map(|part| Self::of(&self.backing, part.file_range().clone(), Some(part)))
                .collect()),
            Err(refused) => {
                self.put_parked(refused.parked);
                Err(refused.error.into())
            }
        }
    }

    /// Takes the mapping back from all `parts` that it was cut into, in their order.
    ///
    /// # Errors
    /// [`MemoryError::Away`] if one of them is not home, was lost, or is missing: then all are.
    pub fn join(&self, parts: Vec<Self>) -> Result<(), MemoryError> {
        let parked = parts.iter().map(Self::take_parked);
        let joined = parked.collect::<Option<Vec<_>>>().and_then(Parked::join);
        let inode = self.inode();
        self.put_parked(joined.ok_or(MemoryError::Away { inode })?);
        match self.is_home() {
            true => Ok(()),
            false => Err(MemoryError::Away { inode }),
        }
    }

    /// The mapping of the whole segment, or of this part of it, to be moved into a guest. Without it the segment
    /// can neither be written nor recycled. None if it was taken already.
    pub fn take_parked(&self) -> Option<Parked> {
        self.home.parked.lock().take()
    }

    /// Takes back what [`Self::take_parked`] gave. A spent mapping, or one of another
    /// segment or part, is dropped.
    pub fn put_parked(&self, parked: Parked) {
        let mut home = self.home.parked.lock();
        let is_own =
            parked.backing().id == self.backing.id && *parked.file_range() == self.home.file;
        if !parked.is_spent() && is_own && home.is_none() {
            *home = Some(parked);
        }
    }

    /// Whether they are neither with a guest nor lost.
    pub fn is_home(&self) -> bool {
        self.home.parked.lock().is_some()
    }

    /// The mapping, and where in it `offset` is.
    fn at_home(
        &self,
        offset: u64,
        length: u64,
    ) -> Result<(MappedMutexGuard<'_, Parked>, u64), MemoryError> {
        self.backing.check_range(offset, length)?;
        let inode = self.inode();
        let parked = MutexGuard::try_map(self.home.parked.lock(), Option::as_mut)
            .map_err(|_| MemoryError::Away { inode })?;
        let file = parked.file_range();
        if offset < file.start || offset + length > file.end {
            return Err(MemoryError::OutOfRange {
                offset,
                length,
                bytes: parked.bytes(),
                inode,
            });
        }
        let at = offset - file.start;
        Ok((parked, at))
    }
}
