//! One live segment: whose it is, what lies in it, who can still write.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use strait_memory::{
    Client, Copied, Inode, InputSource, KeepsMappings, Lent, Lot, MemoryError, Open, Parked,
    PoolSegment, Sealed, Segment, Shared, SharedSource,
};
use strait_tensor::{FileLayout, TensorPlace};

use super::principal::Principal;

/// A segment's random name: 32 hex digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(u128);

impl SegmentId {
    /// A new one.
    ///
    /// # Errors
    /// If Linux gives no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if got != bytes.len() {
            return Err(std::io::Error::other("getrandom gave fewer than 16 bytes"));
        }
        Ok(Self(u128::from_le_bytes(bytes)))
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for SegmentId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then(|| u128::from_str_radix(text, 16).ok().map(Self))
            .flatten()
            .ok_or_else(|| format!("{text:?} is not a segment id: 32 hex digits"))
    }
}

/// The host's bytes around the tensors of a segment that a client fills: header and footer.
#[derive(Clone, Debug)]
pub struct Framing {
    // At offset 0, without the zeros up to `header_bytes`: most of the 64 KiB before a tensor are such, and
    // this is kept for as long as the segment lives.
    header: Box<[u8]>,
    header_bytes: usize,
    // At `footer_offset`.
    footer: Box<[u8]>,
    footer_offset: u64,
}

impl Framing {
    /// Whether header and footer are in the segment as the host wrote them.
    fn is_in(&self, sealed: &Segment<Sealed>) -> Result<bool, MemoryError> {
        let uncounted = Copied::new();
        let same = |offset: u64, expected: &[u8], bytes: usize| -> Result<bool, MemoryError> {
            let mut found = vec![0; bytes];
            sealed.read_at(offset, &mut found, &uncounted)?;
            let rest = found.strip_prefix(expected);
            Ok(rest.is_some_and(|rest| rest.iter().all(|byte| *byte == 0)))
        };
        Ok(same(0, &self.header, self.header_bytes)?
            && same(self.footer_offset, &self.footer, self.footer.len())?)
    }
}

impl From<&FileLayout> for Framing {
    fn from(layout: &FileLayout) -> Self {
        let written = layout.header.iter().rposition(|byte| *byte != 0);
        Self {
            header: layout.header[..written.map_or(0, |last| last + 1)].into(),
            header_bytes: layout.header.len(),
            footer: layout.footer.as_slice().into(),
            footer_offset: layout.footer_offset,
        }
    }
}

/// A segment in one of its states.
#[derive(Debug)]
pub enum Body {
    /// A client fills it.
    Open(Segment<Open>),
    /// The client that made it can still write.
    Client(Segment<Lent<Client>>),
    /// Nobody can write.
    Sealed(Segment<Sealed>),
    /// A result of the pool: only the host can write, or the worker process that filled it, and neither does.
    Result(PoolSegment),
    /// A failed change of state lost it.
    Lost,
}

/// Why a segment could not be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The client still maps it writable, or Linux refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Header or footer are not what the host wrote.
    #[error(
        "the client changed the host's own bytes of segment {0} (header or footer); write the tensors only"
    )]
    Tampered(SegmentId),
    /// The same of a result: whatever ran in the worker process has taken it over.
    #[error(
        "the worker process that filled segment {0} changed the host's own bytes of it (header or footer), which no well-behaved plugin can do; do not trust its tensors"
    )]
    TamperedResult(SegmentId),
    /// An earlier failure lost it.
    #[error("segment {0} was lost in an earlier failure; create a new one")]
    Lost(SegmentId),
}

/// A segment that somebody holds.
#[derive(Debug)]
pub struct LiveSegment {
    id: SegmentId,
    owner: Principal,
    number: u64,
    inode: Inode,
    bytes: u64,
    capacity: u64,
    tensors: Vec<TensorPlace>,
    framing: Option<Framing>,
    is_result: bool,
    lot: Arc<Lot>,
    // Locked for seal, park and chunk copies; never while a kernel runs.
    body: Mutex<Body>,
    // Locked, before `body`, while a result is being sealed.
    sealing: Mutex<()>,
}

impl LiveSegment {
    /// A segment of `owner` with `tensors` in its first `bytes` bytes. `framing` is what belongs
    /// around them, where others than the host could have written something else.
    ///
    /// # Errors
    /// If Linux gives no random bytes for the id.
    pub fn new(
        owner: Principal,
        body: Body,
        bytes: u64,
        tensors: Vec<TensorPlace>,
        framing: Option<Framing>,
        lot: &Arc<Lot>,
    ) -> std::io::Result<Arc<Self>> {
        let (number, inode, capacity) = match &body {
            Body::Open(s) => (s.number(), s.inode(), s.bytes()),
            Body::Client(s) => (s.number(), s.inode(), s.bytes()),
            Body::Sealed(s) => (s.number(), s.inode(), s.bytes()),
            Body::Result(s) => (s.number(), s.inode(), s.bytes()),
            Body::Lost => return Err(std::io::Error::other("a lost segment has no life")),
        };
        Ok(Arc::new(Self {
            id: SegmentId::random()?,
            owner,
            number,
            inode,
            bytes,
            capacity,
            tensors,
            framing,
            is_result: matches!(body, Body::Result(_)),
            lot: Arc::clone(lot),
            body: Mutex::new(body),
            sealing: Mutex::default(),
        }))
    }

    /// Its random id.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Whose it is.
    pub fn owner(&self) -> &Principal {
        &self.owner
    }

    /// Device and inode of its memfd.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// Length of the Arrow IPC file in it, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Size of its memfd in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// What lies in it.
    pub fn tensors(&self) -> &[TensorPlace] {
        &self.tensors
    }

    /// Access to the state.
    pub fn body(&self) -> MutexGuard<'_, Body> {
        self.body.lock()
    }

    /// A read-only descriptor to send out.
    ///
    /// # Errors
    /// [`MemoryError`] of the reopening, which a segment needs that can still be written.
    pub fn readonly_fd(&self) -> Result<Arc<OwnedFd>, MemoryError> {
        match &*self.body() {
            Body::Open(s) => s.readonly_fd(),
            Body::Client(s) => s.readonly_fd(),
            Body::Sealed(s) => s.readonly_fd(),
            Body::Result(s) => s.readonly_fd(),
            Body::Lost => Err(lost(self.id)),
        }
    }

    /// Whether nobody but the host can write.
    pub fn is_settled(&self) -> bool {
        match &*self.body() {
            Body::Sealed(_) => true,
            Body::Result(result) => !result.is_filled_elsewhere(),
            Body::Open(_) | Body::Client(_) | Body::Lost => false,
        }
    }

    /// Ends all writing but the host's own. It waits for a worker process, where one filled it: not for a thread that
    /// serves others. Sealed ones stay as they are, and results that this process filled.
    ///
    /// # Errors
    /// [`SealError::Memory`] with `StillWritable` if the client still maps it writable, with `KeptWritable` if a worker
    /// does: nothing changed. [`SealError::Tampered`], [`SealError::TamperedResult`]: it is sealed and cannot be
    /// published; its tensors can still be used. Whoever filled such a result is [told](strait_memory::Author).
    pub fn seal(&self) -> Result<(), SealError> {
        let _sealing = self.sealing.lock();
        let (ending, author) = match &mut *self.body() {
            Body::Result(result) => (result.ending(), result.author()),
            _ => (None, None),
        };
        // Whoever only wants to know of the segment does not wait for this.
        if let Some(ending) = ending {
            ending.end()?;
        }
        let mut body = self.body();
        let (after, error) = match std::mem::replace(&mut *body, Body::Lost) {
            Body::Open(open) => match open.seal() {
                Ok(sealed) => (Body::Sealed(sealed), None),
                Err(refused) => (Body::Open(refused.segment), Some(refused.error)),
            },
            Body::Client(lent) => match lent.seal() {
                Ok(sealed) => (Body::Sealed(sealed), None),
                Err(refused) => (Body::Client(refused.segment), Some(refused.error)),
            },
            Body::Result(result) if result.is_sealable() || result.is_filled_elsewhere() => {
                match result.seal() {
                    Ok(sealed) => (Body::Sealed(sealed), None),
                    Err(refused) => (Body::Result(refused.segment), Some(refused.error)),
                }
            }
            Body::Lost => return Err(SealError::Lost(self.id)),
            other => (other, None),
        };
        *body = after;
        if let Some(error) = error {
            return Err(error.into());
        }
        let is_whole = match (&*body, &self.framing) {
            (Body::Sealed(sealed), Some(framing)) => framing.is_in(sealed)?,
            _ => true,
        };
        drop(body);
        if is_whole {
            return Ok(());
        }
        if let Some(author) = author {
            author.distrust("it changed header or footer of a result, which are the host's own");
        }
        Err(match self.is_result {
            true => SealError::TamperedResult(self.id),
            false => SealError::Tampered(self.id),
        })
    }

    /// Before first use as an input: from now on only the client that made it can write.
    ///
    /// # Errors
    /// [`MemoryError`] if Linux refuses the seals.
    pub fn lend(&self) -> Result<(), MemoryError> {
        let mut body = self.body();
        match std::mem::replace(&mut *body, Body::Lost) {
            Body::Open(open) => match open.lend_to_client() {
                Ok(lent) => *body = Body::Client(lent),
                Err(refused) => {
                    *body = Body::Open(refused.segment);
                    return Err(refused.error);
                }
            },
            other => *body = other,
        }
        Ok(())
    }

    /// Somebody may still have its pages mapped: if it is a result, the pool must not use it again.
    pub fn never_recycle(&self) {
        if let Body::Result(segment) = &*self.body() {
            segment.never_recycle();
        }
    }
}

impl InputSource for LiveSegment {
    /// An open segment is lent first; one that is lost is an error.
    fn park(&self, range: Range<u64>) -> Result<Parked, MemoryError> {
        self.lend()?;
        match &*self.body() {
            Body::Client(s) => Ok(self.lot.take_input(s, range)?),
            Body::Sealed(s) => Ok(self.lot.take_input(s, range)?),
            Body::Result(s) => s.park_as_input(&self.lot, range),
            Body::Open(_) | Body::Lost => Err(lost(self.id)),
        }
    }

    fn read_at(&self, offset: u64, into: &mut [u8], copied: &Copied) -> Result<(), MemoryError> {
        match &*self.body() {
            Body::Open(s) => s.read_at(offset, into, copied),
            Body::Client(s) => s.read_at(offset, into, copied),
            Body::Sealed(s) => s.read_at(offset, into, copied),
            Body::Result(s) => s.read_at(offset, into, copied),
            Body::Lost => Err(lost(self.id)),
        }
    }
}

impl SharedSource for LiveSegment {
    fn number(&self) -> u64 {
        self.number
    }

    fn is_final(&self) -> bool {
        match &*self.body() {
            Body::Sealed(_) | Body::Result(_) => true,
            Body::Open(_) | Body::Client(_) | Body::Lost => false,
        }
    }

    /// An open segment is lent first; one that is lost is an error.
    fn share(&self, keeper: &Arc<dyn KeepsMappings>) -> Result<Shared, MemoryError> {
        self.lend()?;
        match &*self.body() {
            Body::Client(s) => s.share(keeper),
            Body::Sealed(s) => s.share(keeper),
            Body::Result(s) => s.share(keeper),
            Body::Open(_) | Body::Lost => Err(lost(self.id)),
        }
    }
}

fn lost(id: SegmentId) -> MemoryError {
    MemoryError::System {
        operation: "use of a lost segment",
        bytes: 0,
        source: std::io::Error::other(format!(
            "segment {id} was lost in an earlier failure; create a new one"
        )),
    }
}
