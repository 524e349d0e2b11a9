//! Frames through shared memory, with the socket beside it to sleep on.

use std::io;
use std::sync::atomic::{Ordering, fence};

use strait_memory::{FrameSocket, SharedPages};
use strait_protocol::{self as wire, Side, Word};

use crate::half::{Half, Shared, Violation};
use crate::spin::Spin;

impl Shared for SharedPages {
    fn load(&self, word: Word) -> u32 {
        self.word(word.offset()).load(Ordering::Acquire)
    }

    fn store(&self, word: Word, value: u32) {
        self.word(word.offset()).store(value, Ordering::Release);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        Self::read(self, offset, into);
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        Self::write(self, offset, bytes);
    }
}

/// Why a ring cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// One side broke the protocol.
    #[error("the ring: {0}")]
    Violation(#[from] Violation),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Came {
    /// The next frame, out of its slot.
    Frame,
    /// A packet of so many bytes on the socket, which wakes nobody.
    Packet(usize),
    /// The same, but longer than the room for it or with descriptors, which are closed.
    Wrong(usize),
    /// The other side is gone, or this one is to end.
    End,
}

/// One side of a ring.
#[derive(Debug)]
pub struct Ring {
    half: Half<SharedPages>,
    spin: Spin,
}

impl Ring {
    /// `side` of a new ring that lies in `memory` as `layout` says.
    #[must_use]
    pub fn new(memory: SharedPages, layout: wire::Ring, side: Side, spin: Spin) -> Self {
        let half = Half::new(memory, layout, side);
        Self { half, spin }
    }

    /// Sends a frame, the concatenation of `parts`, and wakes the other side on `socket` if it sleeps. Never waits.
    ///
    /// # Errors
    /// [`RingError::Violation`] if the frame does not fit, or is one too many; [`RingError::Socket`] if the other side is gone.
    pub fn send(&mut self, socket: &FrameSocket, parts: &[&[u8]]) -> Result<(), RingError> {
        if self.half.publish(parts)? {
            match socket.send_now(&[&[0]]) {
                // It has so much to receive there that it wakes anyway.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Waits for the next frame, which is copied into `into`, or for what else comes on `socket`. Looks for a while before it
    /// sleeps if `spins`. Ends at the latest with the next frame once `is_over` says so.
    ///
    /// # Errors
    /// [`RingError`]
    pub fn receive(
        &mut self,
        socket: &FrameSocket,
        into: &mut [u8],
        spins: bool,
        is_over: impl Fn() -> bool,
    ) -> Result<Came, RingError> {
        let mut spin = if spins { self.spin } else { Spin::NEVER };
        loop {
            if let Some(came) = self.look(into, &is_over)? {
                return Ok(came);
            }
            if let Some(came) = spin.until(|| self.look(into, &is_over).transpose()) {
                return came;
            }
            spin = Spin::NEVER;
            self.half.doze();
            let missed = self.look(into, &is_over);
            if !matches!(missed, Ok(None)) {
                self.half.rise();
                return missed.map(|came| came.unwrap_or(Came::End));
            }
            let received = socket.recv(into);
            self.half.rise();
            let received = received?;
            match received.bytes {
                bytes if received.truncated || !received.fds.is_empty() => {
                    return Ok(Came::Wrong(bytes.min(into.len())));
                }
                0 => return Ok(Came::End),
                1 => {}
                bytes => return Ok(Came::Packet(bytes)),
            }
        }
    }

    fn look(
        &mut self,
        into: &mut [u8],
        is_over: impl Fn() -> bool,
    ) -> Result<Option<Came>, RingError> {
        if is_over() {
            return Ok(Some(Came::End));
        }
        let came = self.half.take(into)?;
        Ok(came.then_some(Came::Frame))
    }
}
