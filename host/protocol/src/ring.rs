//! Where what is in a ring's memory.
//!
//! ```text
//! page 0: words of the client │ page 1: words of the host │ slots of requests │ slots of replies
//! ```

use serde::{Deserialize, Serialize};

use crate::frame::{HEADER_BYTES, PAYLOAD_BYTES_MAX};

/// Slots of each kind, a power of two.
const SLOTS: u32 = 2;
/// A slot begins at a multiple of it: a line of the cache.
const LINE: u64 = 64;
const PAGE: u64 = 4096;
/// First byte of the slots: behind a page of words of each side.
const SLOTS_AT: u64 = 2 * PAGE;

/// Whose words they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who sends requests.
    Client,
    /// Who answers them.
    Host,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::Client => Self::Host,
            Self::Host => Self::Client,
        }
    }
}

/// A word of control, of 4 bytes. Its side alone writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Frames that the side has put into its slots, modulo 2^32.
    Tail(Side),
    /// Not 0: the side sleeps, or is about to, until something comes on the socket.
    Asleep(Side),
}

impl Word {
    /// Its first byte in the memory.
    #[must_use]
    pub fn offset(self) -> usize {
        let page = |side| match side {
            Side::Client => 0,
            Side::Host => 4096,
        };
        match self {
            Self::Tail(side) => page(side),
            // Processors fetch lines in pairs.
            Self::Asleep(side) => page(side) + 128,
        }
    }
}

/// The ring of a PREPARE: memory of `bytes` bytes, in which slot `i` of the requests begins at `requests + i * request_stride`, and
/// of the replies likewise. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ring {
    /// All of it.
    pub bytes: u64,
    /// Slots of each kind, a power of two.
    pub slots: u32,
    /// First byte of the requests.
    pub requests: u64,
    /// From one to the next.
    pub request_stride: u64,
    /// First byte of the replies.
    pub replies: u64,
    /// From one to the next.
    pub reply_stride: u64,
}

impl Ring {
    /// For payloads of so many bytes. None if they are longer than any payload.
    #[must_use]
    pub fn of(request_bytes: u64, reply_bytes: u64) -> Option<Self> {
        let stride = |payload: u64| {
            let fits = payload <= PAYLOAD_BYTES_MAX as u64;
            fits.then(|| (HEADER_BYTES as u64 + payload).next_multiple_of(LINE))
        };
        let (request_stride, reply_stride) = (stride(request_bytes)?, stride(reply_bytes)?);
        let slots = u64::from(SLOTS);
        let replies = SLOTS_AT + (slots * request_stride).next_multiple_of(PAGE);
        Some(Self {
            bytes: replies + (slots * reply_stride).next_multiple_of(PAGE),
            slots: SLOTS,
            requests: SLOTS_AT,
            request_stride,
            replies,
            reply_stride,
        })
    }

    /// First byte of the slot of frame `count` that `side` puts there, and how many bytes there are.
    #[must_use]
    pub fn slot(&self, side: Side, count: u32) -> (u64, u64) {
        let (from, stride) = match side {
            Side::Client => (self.requests, self.request_stride),
            Side::Host => (self.replies, self.reply_stride),
        };
        let index = count & (self.slots - 1);
        (from + u64::from(index) * stride, stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_lie_apart_behind_the_words() {
        let ring = Ring::of(1088, 0).expect("short");
        let expected = Ring {
            bytes: 16_384,
            slots: 2,
            requests: 8192,
            request_stride: 1152,
            replies: 12_288,
            reply_stride: 64,
        };
        assert_eq!(ring, expected);
        let at = |side, count| ring.slot(side, count);
        assert_eq!(at(Side::Client, 0), (8192, 1152));
        assert_eq!(at(Side::Client, 1), (8192 + 1152, 1152));
        assert_eq!(at(Side::Client, 2), (8192, 1152));
        assert_eq!(at(Side::Host, u32::MAX), (12_288 + 64, 64));
        let most = PAYLOAD_BYTES_MAX as u64;
        let ring = Ring::of(most, most).expect("the longest");
        let (at, bytes) = ring.slot(Side::Host, 1);
        assert!(at + bytes <= ring.bytes && ring.bytes < 3 * 2 * most);
        assert_eq!(Ring::of(most + 1, 0), None);
        assert_eq!(Ring::of(0, u64::MAX), None);
    }
}
