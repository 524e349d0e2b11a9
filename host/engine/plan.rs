//! What a guest that is bound ahead was told, and what is brought back between its runs.

use std::ops::Range;
use std::sync::Arc;

use strait_tensor::Column;

use super::Compiled;
use super::placement::Spot;

/// What a guest that waits was told.
pub(super) struct Plan {
    pub(super) compiled: Arc<Compiled>,
    /// The outputs.
    pub(super) columns: Vec<Column>,
    /// For each tensor, inputs first.
    pub(super) spots: Vec<Spot>,
    /// Guest addresses of all that.
    pub(super) room: Range<usize>,
}

impl Plan {
    /// Bytes of the guest's memory that are no window.
    pub(super) fn own_bytes(&self) -> u64 {
        let between = self.between_windows();
        let room: usize = between.iter().map(Range::len).sum();
        (self.room.start + room) as u64
    }

    /// What is to be brought back after a run: the bytes from the first on that are kept, and what is to be zero.
    pub(super) fn restored(&self) -> (usize, Vec<Range<usize>>) {
        /// So much is cheaper to take back page by page, as all else, than to overwrite with the rest of the room.
        const FEW_BYTES: usize = 16 << 10;
        let copies = self.spots.iter().map(|spot| match *spot {
            Spot::Copy { bytes, .. } => bytes,
            // Nothing of it is the guest's own.
            Spot::Window { .. } => usize::MAX,
        });
        match copies.fold(0, usize::saturating_add) <= FEW_BYTES {
            true => (self.room.end, Vec::new()),
            // Where a window is as well: before and after `run`, and with smaller tensors, there is none.
            false => {
                let mut parts = self.between_windows();
                parts.extend(self.windows());
                (self.room.start, parts)
            }
        }
    }

    fn windows(&self) -> impl Iterator<Item = Range<usize>> {
        self.spots.iter().filter_map(|spot| match *spot {
            Spot::Window { at, bytes } => Some(at..at + bytes),
            Spot::Copy { .. } => None,
        })
    }

    /// The parts of the room where no window is.
    fn between_windows(&self) -> Vec<Range<usize>> {
        let mut windows: Vec<_> = self.windows().collect();
        windows.sort_by_key(|window| window.start);
        let mut from = self.room.start;
        let mut between = Vec::with_capacity(windows.len() + 1);
        for window in windows {
            between.push(from..window.start);
            from = window.end;
        }
        between.push(from..self.room.end);
        between
    }
}
