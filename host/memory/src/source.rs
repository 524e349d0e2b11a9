//! What a kernel is given to work with: where its inputs' bytes are read, where its results' memory comes from.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::{
    Budget, Copied, KeepsMappings, MemoryError, Parked, PoolSegment, RecyclingKey, ResultPool,
};

/// A segment that kernels can read, whatever its state and whoever holds it.
pub trait InputSource: fmt::Debug + Send + Sync {
    /// A warm read-only mapping of `range` (bytes, whole guest pages), to be moved into a guest.
    ///
    /// # Errors
    /// [`MemoryError`] if there is no room for a mapping.
    fn park(&self, range: Range<u64>) -> Result<Parked, MemoryError>;

    /// Copies bytes out, counted.
    ///
    /// # Errors
    /// [`MemoryError`] if the range is outside the segment.
    fn read_at(&self, offset: u64, into: &mut [u8], copied: &Copied) -> Result<(), MemoryError>;
}

/// One that kernels in other processes of the host can read, too.
pub trait SharedSource: InputSource {
    /// Which segment it is, by a number that is not used twice in this process.
    fn number(&self) -> u64;

    /// Whether its bytes cannot change any more.
    fn is_final(&self) -> bool;

    /// What another process needs in order to read it. `keeper` is told when the segment goes.
    ///
    /// # Errors
    /// [`MemoryError`] if there is no descriptor for it.
    fn share(&self, keeper: &Arc<dyn KeepsMappings>) -> Result<Shared, MemoryError>;
}

/// A segment as another process is given it.
#[derive(Debug)]
pub struct Shared {
    /// It reads only.
    pub fd: Arc<OwnedFd>,
    /// Bytes of the segment.
    pub bytes: u64,
}

/// Where the results of one invocation come from: a pool, the budget that they are charged to, and
/// what becomes of them later.
#[derive(Clone, Debug)]
pub struct ResultSource {
    pool: Arc<ResultPool>,
    budget: Arc<Budget>,
    // None: to be sealed.
    recycling: Option<RecyclingKey>,
}

impl ResultSource {
    /// Results that are recycled under `key`, as [`ResultPool::take`] makes them.
    pub fn recycled(pool: &Arc<ResultPool>, key: RecyclingKey, budget: Arc<Budget>) -> Self {
        Self {
            pool: Arc::clone(pool),
            budget,
            recycling: Some(key),
        }
    }

    /// Results that are going to be sealed, as [`ResultPool::take_sealable`] makes them.
    pub fn sealable(pool: &Arc<ResultPool>, budget: Arc<Budget>) -> Self {
        Self {
            pool: Arc::clone(pool),
            budget,
            recycling: None,
        }
    }

    /// A segment of at least `bytes`.
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take(&self, bytes: u64) -> Result<PoolSegment, MemoryError> {
        match self.recycling {
            Some(key) => self.pool.take(bytes, key, &self.budget),
            None => self.pool.take_sealable(bytes, &self.budget),
        }
    }

    /// As [`Self::take`], for the process `process`: see [`ResultPool::take_for`].
    ///
    /// # Errors
    /// [`MemoryError::Budget`], [`MemoryError::Park`], [`MemoryError::System`].
    pub fn take_for(&self, process: u64, bytes: u64) -> Result<PoolSegment, MemoryError> {
        self.pool
            .take_for(process, bytes, self.recycling, &self.budget)
    }

    /// What [`Self::take_for`] gives if it need not make a segment.
    pub fn warm_for(&self, process: u64, bytes: u64) -> Option<PoolSegment> {
        self.pool
            .warm_for(process, bytes, self.recycling?, &self.budget)
    }
}
