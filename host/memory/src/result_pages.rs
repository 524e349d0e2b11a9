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

/// A handle on the one writable mapping of a result's segment: it moves into a guest and home again.
#[derive(Clone, Debug)]
pub struct ResultPages {
    backing: Arc<Backing>,
    // None while its pages are with a guest, or were lost there.
    home: Arc<Mutex<Option<Parked>>>,
}

impl ResultPages {
    pub(crate) fn new(backing: &Arc<Backing>, parked: Option<Parked>) -> Self {
        Self {
            backing: Arc::clone(backing),
            home: Arc::new(Mutex::new(parked)),
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
        self.at_home(offset, bytes.len() as u64)?
            .copy_in(offset, bytes);
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
        self.at_home(offset, into.len() as u64)?
            .copy_out(offset, into);
        copied.add(into.len() as u64);
        Ok(())
    }

    /// Writes zeros to `range` (bytes). Nobody may hold a mapping of this segment yet.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; [`MemoryError::Away`] while its pages are with a guest.
    pub fn zero(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let length = range.end.saturating_sub(range.start);
        let mut parked = self.at_home(range.start, length)?;
        parked.zero(range.start..range.start + length);
        Ok(())
    }

    /// The mapping of the whole segment, to be moved into a guest. Without it the segment
    /// can neither be written nor recycled. None if it was taken already.
    pub fn take_parked(&self) -> Option<Parked> {
        self.home.lock().take()
    }

    /// Takes back what [`Self::take_parked`] gave. A spent mapping, or one of another
    /// segment, is dropped.
    pub fn put_parked(&self, parked: Parked) {
        let mut home = self.home.lock();
        if !parked.is_spent() && parked.backing().id == self.backing.id && home.is_none() {
            *home = Some(parked);
        }
    }

    /// Whether they are neither with a guest nor lost.
    pub fn is_home(&self) -> bool {
        self.home.lock().is_some()
    }

    fn at_home(
        &self,
        offset: u64,
        length: u64,
    ) -> Result<MappedMutexGuard<'_, Parked>, MemoryError> {
        self.backing.check_range(offset, length)?;
        let inode = self.inode();
        MutexGuard::try_map(self.home.lock(), Option::as_mut)
            .map_err(|_| MemoryError::Away { inode })
    }
}
