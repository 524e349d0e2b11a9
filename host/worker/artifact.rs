//! A compiled plugin, as the host keeps it for its workers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_memory::{Budget, Copied, MemoryError, Sealed, Segment};

/// In memory that the host has written and nobody can write any more.
#[derive(Debug)]
pub(super) struct Artifact {
    segment: Segment<Sealed>,
    bytes: u64,
    memory_only: bool,
}

impl Artifact {
    /// Of a plugin that keeps what it keeps from one call to the next in its memory only, or elsewhere.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(super) fn new(
        artifact: &[u8],
        memory_only: bool,
        counted: &Arc<Budget>,
    ) -> Result<Self, MemoryError> {
        let bytes = artifact.len() as u64;
        let segment = Segment::create(bytes, counted)?;
        segment.write_at(0, artifact, &Copied::new())?;
        let segment = segment.seal().map_err(|refused| refused.error)?;
        Ok(Self {
            segment,
            bytes,
            memory_only,
        })
    }

    /// Its own; the segment has whole pages.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn memory_only(&self) -> bool {
        self.memory_only
    }

    /// For a process that is to map it.
    ///
    /// # Errors
    /// Linux gives no descriptor.
    pub(super) fn fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        self.segment.readonly_fd()
    }
}
