//! A result whose mapping is in two guests at the same time.

use std::sync::Arc;

use strait_memory::{Copied, GUEST_PAGE, MemoryError};

use crate::common::poke;
use crate::{PAGE_USIZE, World, owned, to_usize};

impl World {
    /// Cuts the last result, moves each part into a guest of its own where there is room, writes there, and joins them again.
    pub(crate) fn slice_result(&mut self, cut: u64, at: [u64; 2], byte: u8) {
        let spaces = [Arc::clone(&self.guests[0]), Arc::clone(&self.guests[1])];
        let Some((name, known)) = self.last_result() else {
            return;
        };
        let pages = known.segment.pages().clone();
        let (cut, byte) = (cut * GUEST_PAGE, owned(name, &[byte])[0]);
        let parts = match pages.split(&[cut]) {
            Ok(parts) => parts,
            Err(MemoryError::Away { .. }) => return assert!(known.away),
            Err(_) => return assert!(cut == 0 || cut >= pages.bytes()),
        };
        assert!(!pages.is_home() && pages.write_at(0, &[byte], &Copied::new()).is_err());
        let starts = [0, cut];
        let mut windows = Vec::new();
        for (((part, start), space), at) in parts.iter().zip(starts).zip(&spaces).zip(at) {
            let outside = [start.checked_sub(1), (start == 0).then_some(cut)];
            for offset in outside.into_iter().flatten() {
                assert!(part.write_at(offset, &[byte], &Copied::new()).is_err());
            }
            part.write_at(start + 1, &[byte], &Copied::new())
                .expect("within");
            known.bytes[to_usize(start) + 1] = byte;
            let parked = part.take_parked().expect("at home");
            assert_eq!(parked.file_offset(), start);
            let bytes = parked.bytes();
            match parked.move_into(0..bytes, space, space.base() + to_usize(at) * PAGE_USIZE) {
                Ok(window) => windows.push((part, start, window)),
                Err(refused) => part.put_parked(refused.parked),
            }
        }
        for (_, start, window) in &windows {
            let offset = to_usize(window.bytes()) - 1;
            // SAFETY: the window is in its guest, writable.
            unsafe { poke(window.address() + offset, byte) };
            known.bytes[to_usize(*start) + offset] = byte;
        }
        // The last one first: as they end.
        for (part, _, window) in windows.into_iter().rev() {
            part.put_parked(window.move_home().expect("covered"));
        }
        pages.join(parts).expect("all are home");
    }
}
