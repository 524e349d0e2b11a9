//! Repairs the `:authority` that gRPC C++ sends over unix sockets.
//!
//! For `unix:///run/strait/flight.sock` it sends `run%2Fstrait%2Fflight.sock`, and the h2 crate
//! refuses `%` in an authority, so stock pyarrow could not connect. [`AuthorityRepair`] follows the
//! HTTP/2 frames of a connection as they arrive and overwrites such bytes in place:
//!
//! ```text
//! bytes ─▶ preface ─▶ frame header ─▶ HEADERS, CONTINUATION ─▶ HPACK fields ─▶ value of `:authority`
//!                         ├─▶ SETTINGS ─▶ the longest frame that the client takes
//!                         └─▶ every other frame is skipped
//! ```
//! A byte is replaced by one byte, so frame lengths, string lengths and the sizes in the HPACK
//! table stay right, and nothing is ever held back: there is no buffer. A value that was repaired
//! on its way into the dynamic table is right when a later request refers to it by index.
//!
//! Left alone, and then judged by h2: Huffman-coded values, and values whose name is an index into
//! the dynamic table (no client known sends either for this name). After anything that is not
//! HTTP/2 the rest of the connection is left alone too; h2 closes it.

mod frames;
mod hpack;

use frames::Frames;
use hpack::Malformed;

/// What every client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest frame that a peer takes which says nothing.
const FRAME_BYTES: u32 = 16 << 10;

/// Follows the bytes of one connection from its client.
#[derive(Debug)]
pub(super) struct AuthorityRepair {
    at: At,
    frames: u64,
    /// The longest frame that the client takes.
    frame_bytes: u32,
}

impl Default for AuthorityRepair {
    fn default() -> Self {
        Self {
            at: At::default(),
            frames: 0,
            frame_bytes: FRAME_BYTES,
        }
    }
}

/// What the next byte belongs to.
#[derive(Debug, Default)]
enum At {
    /// The start: so many bytes of the preface have passed.
    #[default]
    Start,
    Preface(usize),
    Frames(Frames),
    /// Not HTTP/2 that we understand.
    Elsewhere,
}

impl AuthorityRepair {
    /// Frames that began so far.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    /// The longest frame that the client takes, by its settings so far.
    pub(super) fn frame_bytes(&self) -> u32 {
        self.frame_bytes
    }

    /// Whether something has begun that is not whole: the preface with its first frame, any other
    /// frame, a header block.
    pub(super) fn is_midway(&self) -> bool {
        match &self.at {
            At::Start | At::Preface(_) | At::Elsewhere => true,
            At::Frames(frames) => self.frames == 0 || frames.is_midway(),
        }
    }

    /// Repairs the next bytes of the connection, however they were cut.
    pub(super) fn pass(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            match self.step(bytes) {
                Ok(done) => bytes = &mut bytes[done..],
                Err(Malformed) => {
                    self.at = At::Elsewhere;
                    return;
                }
            }
        }
    }

    /// Handles at least one of `bytes` (not empty) and answers how many.
    fn step(&mut self, bytes: &mut [u8]) -> Result<usize, Malformed> {
        match &mut self.at {
            At::Elsewhere => Ok(bytes.len()),
            At::Start => {
                self.at = At::Preface(0);
                self.step(bytes)
            }
            At::Preface(seen) => {
                if bytes[0] != PREFACE[*seen] {
                    return Err(Malformed);
                }
                *seen += 1;
                if *seen == PREFACE.len() {
                    self.at = At::Frames(Frames::default());
                }
                Ok(1)
            }
            At::Frames(frames) => {
                let (done, begins) = frames.step(bytes, &mut self.frame_bytes)?;
                self.frames += u64::from(begins);
                Ok(done)
            }
        }
    }
}

#[cfg(test)]
mod tests;
