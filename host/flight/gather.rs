//! What HTTP/2 writes, gathered for the socket.
//!
//! ```text
//! h2: a frame of 16 KiB, flush, a frame, flush, … ──▶ Gathered ──▶ socket, 256 KiB at a time
//!     frames of a client that takes longer ones ──────────────────▶ socket, as they lie
//! ```
//! A client that takes frames of 16 KiB only (stock gRPC) would otherwise be woken for each. The copy that
//! this costs is out of one cache into the same, and counted by `read`, which knows what of it is tensors.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use strait_memory::Charge;
use tokio::io::AsyncWrite;

/// What is gathered at most, for each connection, if the host's budget has room for it.
pub(super) const BYTES_MAX: usize = 256 << 10;
/// What a connection may gather without being charged for it: enough for all but streams of tensors.
const UNCHARGED_BYTES_MAX: usize = 64 << 10;
/// Frames that may have this size are worth a system call of their own.
const DIRECT_BYTES_MIN: u32 = 64 << 10;

/// Bytes on the way to a socket.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    bytes: Vec<u8>,
    /// So many of them are in the socket.
    sent: usize,
    /// The socket is full, and wakes the task when it is not.
    is_waiting: bool,
    /// For `BYTES_MAX`, from when more than the uncharged bytes were to be gathered until the connection ends.
    charge: Option<Charge>,
}

impl Gathered {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether somebody must see to it that [`poll_drain`](Self::poll_drain) is called again.
    pub(super) fn is_left_alone(&self) -> bool {
        !self.is_empty() && !self.is_waiting
    }

    /// Whether frames for a client that takes them of up to `frame_bytes` go to the socket as they lie.
    pub(super) fn is_direct(frame_bytes: u32) -> bool {
        frame_bytes >= DIRECT_BYTES_MIN
    }

    fn most(&self) -> usize {
        match self.charge {
            Some(_) => BYTES_MAX,
            None => UNCHARGED_BYTES_MAX,
        }
    }

    /// Whether so many bytes more find room.
    pub(super) fn has_room(&self, length: usize) -> bool {
        length <= self.most() - self.bytes.len()
    }

    /// Whether a [`charge`](Self::charge) for `BYTES_MAX` would make room.
    pub(super) fn is_narrow(&self) -> bool {
        self.charge.is_none()
    }

    /// Makes room.
    pub(super) fn charge(&mut self, charge: Charge) {
        self.charge = Some(charge);
        self.bytes.reserve_exact(BYTES_MAX - self.bytes.len());
    }

    /// Keeps the bytes of `slices`.
    pub(super) fn take(&mut self, slices: &[IoSlice<'_>]) {
        for slice in slices {
            self.bytes.extend_from_slice(slice);
        }
    }

    /// Writes what there is; ready when nothing is left.
    pub(super) fn poll_drain(
        &mut self,
        mut stream: Pin<&mut impl AsyncWrite>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            self.is_waiting = true;
            let rest = &self.bytes[self.sent..];
            let count = ready!(stream.as_mut().poll_write(context, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count;
        }
        self.bytes.clear();
        (self.sent, self.is_waiting) = (0, false);
        Poll::Ready(Ok(()))
    }
}
