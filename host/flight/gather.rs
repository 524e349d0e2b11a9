//! What HTTP/2 writes, gathered for the socket.
//!
//! ```text
//! h2: a frame of 16 KiB, flush, a frame, flush, … ──▶ Gathered ──▶ socket, 256 KiB at a time
//!     a longer frame ─────────────────────────────────────────────▶ socket, as it lies
//! ```
//! A client that takes frames of 16 KiB only (stock gRPC) would otherwise be woken for each. The copy that
//! this costs is out of one cache into the same, and counted by whoever hands over the slices.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

/// What is gathered at most, for each connection.
const BYTES_MAX: usize = 256 << 10;
/// Writes of this size are worth a system call of their own.
const DIRECT_BYTES_MIN: usize = 64 << 10;

/// Bytes on the way to a socket.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    bytes: Vec<u8>,
    /// So many of them are in the socket.
    sent: usize,
    /// The socket is full, and wakes the task when it is not.
    is_waiting: bool,
}

impl Gathered {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether somebody must see to it that [`poll_drain`](Self::poll_drain) is called again.
    pub(super) fn is_left_alone(&self) -> bool {
        !self.is_empty() && !self.is_waiting
    }

    /// Whether a write of `length` bytes goes to the socket by itself.
    pub(super) fn is_direct(length: usize) -> bool {
        length >= DIRECT_BYTES_MIN
    }

    /// Whether so many bytes more find room.
    pub(super) fn has_room(&self, length: usize) -> bool {
        length <= BYTES_MAX - self.bytes.len()
    }

    /// Keeps the bytes of `slices`.
    pub(super) fn take(&mut self, slices: &[IoSlice<'_>]) {
        if self.bytes.capacity() == 0 {
            // All at once: it grows to that in any case. A connection that sends little touches little of it.
            self.bytes.reserve_exact(BYTES_MAX);
        }
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
        *self = Self {
            bytes: std::mem::take(&mut self.bytes),
            ..Self::default()
        };
        self.bytes.clear();
        Poll::Ready(Ok(()))
    }
}
