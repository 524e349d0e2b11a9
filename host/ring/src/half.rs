//! One side of the protocol.
//!
//! Request `n` lies in slot `n` of the requests and its reply in slot `n` of the replies, modulo the slots. So a reply frees
//! both: there are no heads, and nothing that a side would have to believe about what the other has read.

use strait_protocol::{Ring, Side, Word};

/// Memory that both sides have.
pub trait Shared {
    /// What `word` is. What its side wrote before it can be read then (acquire).
    fn load(&self, word: Word) -> u32;
    /// `word` becomes `value`, after all that was written before (release).
    fn store(&self, word: Word, value: u32);
    /// What was stored before is seen by others before anything that is loaded after it (sequentially consistent).
    fn fence(&self);
    /// Copies out of `offset`.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies to `offset`.
    fn write(&self, offset: usize, bytes: &[u8]);
}

/// What a side has done that the protocol does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Its count of frames is beyond what may be.
    #[error("it has put {ahead} frames into the ring where at most {most} can be new")]
    Runaway {
        /// Frames that would be new, modulo 2^32.
        ahead: u32,
        /// That can be.
        most: u32,
    },
    /// More is under way than there are slots for.
    #[error("{slots} calls are under way in a ring of {slots} slots; receive one first")]
    Full {
        /// Of the ring.
        slots: u32,
    },
    /// There is nothing to answer.
    #[error("there is no request that is not answered yet")]
    Unasked,
    /// A frame is longer than a slot.
    #[error("a frame of {bytes} bytes for a slot of {room}")]
    TooLong {
        /// Of the frame.
        bytes: usize,
        /// Of the slot.
        room: usize,
    },
}

/// One side: what it has sent and received, by its own count.
#[derive(Debug)]
pub struct Half<M> {
    memory: M,
    ring: Ring,
    side: Side,
    sent: u32,
    received: u32,
}

impl<M: Shared> Half<M> {
    /// `side` of a ring that is new, in `memory` with room for it.
    pub fn new(memory: M, ring: Ring, side: Side) -> Self {
        Self {
            memory,
            ring,
            side,
            sent: 0,
            received: 0,
        }
    }

    /// Puts a frame, the concatenation of `parts`, into the next slot. True if the other side sleeps and must be woken.
    ///
    /// # Errors
    /// What this side would do wrong; nothing was done.
    pub fn publish(&mut self, parts: &[&[u8]]) -> Result<bool, Violation> {
        match self.side {
            Side::Client if self.sent.wrapping_sub(self.received) >= self.ring.slots => {
                let slots = self.ring.slots;
                return Err(Violation::Full { slots });
            }
            Side::Host if self.sent == self.received => return Err(Violation::Unasked),
            Side::Client | Side::Host => {}
        }
        let bytes = parts.iter().map(|part| part.len()).sum();
        let (mut at, room) = self.slot(self.side, self.sent);
        if bytes > room {
            return Err(Violation::TooLong { bytes, room });
        }
        for part in parts {
            self.memory.write(at, part);
            at += part.len();
        }
        self.sent = self.sent.wrapping_add(1);
        self.memory.store(Word::Tail(self.side), self.sent);
        // Either the other side sees the frame when it looks once more before it sleeps, or this one sees that it sleeps.
        self.memory.fence();
        Ok(self.memory.load(Word::Asleep(self.side.peer())) != 0)
    }

    /// Copies the next frame of the other side into `into`, as much of the slot as there is room for. False if there is none.
    ///
    /// # Errors
    /// What the other side has done wrong. The ring is not to be used any more.
    pub fn take(&mut self, into: &mut [u8]) -> Result<bool, Violation> {
        let from = self.side.peer();
        let tail = self.memory.load(Word::Tail(from));
        let ahead = tail.wrapping_sub(self.received);
        if ahead == 0 {
            return Ok(false);
        }
        let most = match self.side {
            // Each is the reply to a request.
            Side::Client => self.sent.wrapping_sub(self.received),
            Side::Host => self.ring.slots - self.received.wrapping_sub(self.sent),
        };
        if ahead > most {
            return Err(Violation::Runaway { ahead, most });
        }
        let (at, room) = self.slot(from, self.received);
        let bytes = into.len().min(room);
        self.memory.read(at, &mut into[..bytes]);
        self.received = self.received.wrapping_add(1);
        Ok(true)
    }

    /// Says that this side is about to sleep. What came meanwhile must be looked for once more before it does.
    pub fn doze(&self) {
        self.memory.store(Word::Asleep(self.side), 1);
        self.memory.fence();
    }

    /// Says that it does not.
    pub fn rise(&self) {
        self.memory.store(Word::Asleep(self.side), 0);
    }

    /// Of the memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    fn slot(&self, side: Side, count: u32) -> (usize, usize) {
        let (at, room) = self.ring.slot(side, count);
        let number = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        (number(at), number(room))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    /// As a peer would change it, too.
    #[derive(Clone, Debug)]
    struct Bytes(Rc<RefCell<Vec<u8>>>);

    impl Shared for Bytes {
        fn load(&self, word: Word) -> u32 {
            let mut bytes = [0; 4];
            self.read(word.offset(), &mut bytes);
            u32::from_le_bytes(bytes)
        }

        fn store(&self, word: Word, value: u32) {
            self.write(word.offset(), &value.to_le_bytes());
        }

        fn fence(&self) {}

        fn read(&self, offset: usize, into: &mut [u8]) {
            into.copy_from_slice(&self.0.borrow()[offset..offset + into.len()]);
        }

        fn write(&self, offset: usize, bytes: &[u8]) {
            self.0.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// Both sides, which have had `before` calls.
    fn halves(before: u32) -> (Half<Bytes>, Half<Bytes>) {
        let ring = Ring::of(16, 16).expect("short");
        let memory = vec![0; usize::try_from(ring.bytes).expect("few")];
        let memory = Bytes(Rc::new(RefCell::new(memory)));
        for side in [Side::Client, Side::Host] {
            memory.store(Word::Tail(side), before);
        }
        let half = |side| Half {
            sent: before,
            received: before,
            ..Half::new(memory.clone(), ring, side)
        };
        (half(Side::Client), half(Side::Host))
    }

    #[test]
    fn frames_come_as_they_were_sent_beyond_the_end_of_the_count() {
        let (mut client, mut host) = halves(u32::MAX - 3);
        let mut into = [0; 4];
        for call in 0..8_u32 {
            assert_eq!(host.take(&mut into), Ok(false));
            for frame in [2 * call, 2 * call + 1] {
                let bytes = frame.to_le_bytes();
                let (one, other) = bytes.split_at(1);
                assert_eq!(client.publish(&[one, other]), Ok(false));
            }
            assert_eq!(client.publish(&[]), Err(Violation::Full { slots: 2 }));
            for frame in [2 * call, 2 * call + 1] {
                assert_eq!(host.take(&mut into), Ok(true));
                assert_eq!(u32::from_le_bytes(into), frame);
            }
            assert_eq!(host.take(&mut into), Ok(false));
            for frame in [2 * call, 2 * call + 1] {
                assert_eq!(host.publish(&[&frame.to_le_bytes()]), Ok(false));
            }
            assert_eq!(host.publish(&[]), Err(Violation::Unasked));
            for frame in [2 * call, 2 * call + 1] {
                assert_eq!(client.take(&mut into), Ok(true));
                assert_eq!(u32::from_le_bytes(into), frame);
            }
            assert_eq!(client.take(&mut into), Ok(false));
        }
    }

    #[test]
    fn whoever_sleeps_is_to_be_woken() {
        let (mut client, mut host) = halves(0);
        host.doze();
        assert_eq!(client.publish(&[]), Ok(true));
        host.rise();
        assert_eq!(client.publish(&[]), Ok(false));
        let mut into = [0; 64];
        assert_eq!(host.take(&mut into), Ok(true));
        client.doze();
        assert_eq!(host.publish(&[]), Ok(true));
    }

    #[test]
    fn a_count_that_cannot_be_ends_it() {
        let mut into = [0; 4];
        let runaway = |ahead, most| Err(Violation::Runaway { ahead, most });
        for before in [0, 7, u32::MAX - 1] {
            for ahead in [3, 4, u32::MAX, 1 << 31] {
                let (client, mut host) = halves(before);
                let tail = before.wrapping_add(ahead);
                client.memory.store(Word::Tail(Side::Client), tail);
                assert_eq!(host.take(&mut into), runaway(ahead, 2), "{before}");
            }
            // One that is not answered yet leaves one less.
            let (mut client, mut host) = halves(before);
            assert_eq!(client.publish(&[]), Ok(false));
            assert_eq!(host.take(&mut into), Ok(true));
            let tail = before.wrapping_add(3);
            client.memory.store(Word::Tail(Side::Client), tail);
            assert_eq!(host.take(&mut into), runaway(2, 1));
            // Back to before what was taken.
            client.memory.store(Word::Tail(Side::Client), before);
            assert_eq!(host.take(&mut into), runaway(u32::MAX, 1));
            // A reply that nobody asked for, and one more than was.
            let (mut client, host) = halves(before);
            let tail = |more: u32| {
                let tail = before.wrapping_add(more);
                host.memory.store(Word::Tail(Side::Host), tail);
            };
            tail(1);
            assert_eq!(client.take(&mut into), runaway(1, 0));
            tail(0);
            assert_eq!(client.publish(&[]), Ok(false));
            tail(2);
            assert_eq!(client.take(&mut into), runaway(2, 1));
            tail(u32::MAX);
            assert_eq!(client.take(&mut into), runaway(u32::MAX, 1));
        }
    }

    #[test]
    fn a_frame_fits_its_slot_or_is_refused() {
        let (mut client, mut host) = halves(0);
        let long = [1; 65];
        let too_long = Err(Violation::TooLong {
            bytes: 65,
            room: 64,
        });
        assert_eq!(client.publish(&[&long]), too_long);
        assert_eq!(client.publish(&[&long[..64]]), Ok(false));
        // No more is copied than the slot has.
        let mut into = [0; 80];
        assert_eq!(host.take(&mut into), Ok(true));
        assert_eq!((into[63], into[64]), (1, 0));
    }
}
