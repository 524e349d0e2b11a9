//! A guest's memory as the host may touch it: every pointer that a guest names is held against these regions.
//!
//! ```text
//! guest address 0 ─────────────────────────────────────────────▶ size
//!   own memory │ input window │ own memory │ output window │ own memory
//! ```
//! The host reads and writes *own* memory only. Windows show pages of segments: the guest reads an input's and
//! writes an output's, and the host goes to the segment itself.

use std::ops::Range;
use std::sync::Arc;

use super::guest_memory::GuestMemory;
use super::placement::Spot;

/// A range that the guest named lies outside its memory or in a window.
#[derive(Debug, thiserror::Error)]
#[error("{bytes} bytes at guest address {address:#x} are not the guest's own memory (size {size:#x}{})", if *.window { ", a window lies there" } else { "" })]
pub(super) struct NotOwn {
    address: u64,
    bytes: u64,
    size: usize,
    window: bool,
}

/// Whose a part of a guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Window {
    /// An input of this index: the guest may read it.
    Input(usize),
    /// An output: the guest may read and write it.
    Output,
}

/// One guest's memory and the windows that are in it.
#[derive(Debug)]
pub(super) struct Regions {
    memory: Arc<GuestMemory>,
    windows: Vec<(Range<usize>, Window)>,
}

impl Regions {
    /// All of `memory` is the guest's own.
    pub(super) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            windows: Vec::new(),
        }
    }

    /// The memory as a whole.
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// From now on windows lie at those of `spots` that are windows: `inputs` spots of inputs, then those of outputs.
    pub(super) fn enter(&mut self, spots: &[Spot], inputs: usize) {
        self.windows = spots
            .iter()
            .enumerate()
            .filter_map(|(index, spot)| match *spot {
                Spot::Window { at, bytes } if index < inputs => {
                    Some((at..at + bytes, Window::Input(index)))
                }
                Spot::Window { at, bytes } => Some((at..at + bytes, Window::Output)),
                Spot::Copy { .. } => None,
            })
            .collect();
    }

    /// The windows are home: all of it is the guest's own again.
    pub(super) fn leave(&mut self) {
        self.windows.clear();
    }

    /// The input in whose window `address` (of the host) lies.
    pub(super) fn input_at(&self, address: usize) -> Option<usize> {
        let at = address.checked_sub(self.memory.base())?;
        self.windows
            .iter()
            .find_map(|(range, window)| match window {
                Window::Input(index) if range.contains(&at) => Some(*index),
                Window::Input(_) | Window::Output => None,
            })
    }

    /// `bytes` bytes at guest address `address`, if all of them are the guest's own.
    fn own(&self, address: u64, bytes: u64) -> Result<Range<usize>, NotOwn> {
        let size = self.memory.size();
        let refused = |window| NotOwn {
            address,
            bytes,
            size,
            window,
        };
        let end = address.checked_add(bytes).filter(|end| *end <= size as u64);
        let (Ok(start), Some(Ok(end))) = (usize::try_from(address), end.map(usize::try_from))
        else {
            return Err(refused(false));
        };
        let meets = |window: &Range<usize>| start < window.end && window.start < end;
        match self.windows.iter().any(|(window, _)| meets(window)) {
            true => Err(refused(true)),
            false => Ok(start..end),
        }
    }

    /// Copies `bytes` bytes of own memory at a guest address out.
    ///
    /// # Errors
    /// [`NotOwn`] if the range is not all the guest's own memory.
    pub(super) fn read(&self, address: u64, bytes: u64) -> Result<Vec<u8>, NotOwn> {
        let range = self.own(address, bytes)?;
        let mut out = vec![0; range.len()];
        // SAFETY: `own` proved the range within `size`, all of which is mapped readable (the
        // memory's own pages, or the anonymous cover of a former window). The guest does not run:
        // the host is called on its thread. `out` is a fresh allocation of the same length.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (self.memory.base() + range.start) as *const u8,
                out.as_mut_ptr(),
                range.len(),
            );
        }
        Ok(out)
    }

    /// Lets `fill` write `range` (guest addresses) of own memory while the guest does not run.
    ///
    /// # Errors
    /// [`NotOwn`] if the range is not all the guest's own memory.
    pub(super) fn with_mut<R>(
        &mut self,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, NotOwn> {
        let range = self.own(range.start as u64, range.len() as u64)?;
        // SAFETY: as in `read`; the pages are mapped read-write, and while the slice lives neither
        // the guest nor another borrow of this memory runs: `self`, which its store owns, is borrowed.
        let slice = unsafe {
            std::slice::from_raw_parts_mut(
                (self.memory.base() + range.start) as *mut u8,
                range.len(),
            )
        };
        Ok(fill(slice))
    }

    /// Lets `take` read `range` (guest addresses) of own memory without a copy, while the guest does not run.
    ///
    /// # Errors
    /// [`NotOwn`] if the range is not all the guest's own memory.
    pub(super) fn with<R>(
        &self,
        range: Range<usize>,
        take: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, NotOwn> {
        let range = self.own(range.start as u64, range.len() as u64)?;
        // SAFETY: as in `with_mut`, for reading.
        let slice = unsafe {
            std::slice::from_raw_parts((self.memory.base() + range.start) as *const u8, range.len())
        };
        Ok(take(slice))
    }
}

#[cfg(test)]
mod tests {
    use strait_memory::GuestSpaces;
    use wasmtime::{MemoryCreator, MemoryType};

    use super::*;
    use crate::engine::guest_memory::{Creator, collect};

    const PAGE: usize = 64 << 10;

    /// Four guest pages of a guest's own.
    fn regions() -> (Box<dyn wasmtime::LinearMemory>, Regions) {
        let creator = Creator {
            spaces: GuestSpaces::new(1),
        };
        let ty = MemoryType::new(4, None);
        let (linear, mut made) =
            collect(|| creator.new_memory(ty, 4 * PAGE, None, Some(64 * PAGE), PAGE));
        let memory = made.pop().expect("it was made");
        (linear.expect("there is room"), Regions::new(memory))
    }

    #[test]
    fn own_memory_is_what_is_neither_window_nor_outside() {
        let (_linear, mut regions) = regions();
        let (page, base) = (PAGE as u64, regions.memory().base());
        let wrote = regions.with_mut(PAGE - 2..PAGE + 2, |bytes| bytes.copy_from_slice(b"abcd"));
        wrote.expect("own");
        assert_eq!(regions.read(page - 1, 2).expect("own"), b"bc");
        let spots = [
            Spot::Window {
                at: PAGE,
                bytes: PAGE,
            },
            Spot::Copy { at: 0, bytes: 8 },
            Spot::Window {
                at: 3 * PAGE,
                bytes: PAGE,
            },
        ];
        regions.enter(&spots, 2);
        let refused = |address, bytes| {
            let refused = regions.read(address, bytes).expect_err("not own");
            refused.to_string()
        };
        for (address, bytes) in [
            (page - 1, 2),
            (page, 1),
            (2 * page - 1, 1),
            (0, 4 * page),
            (3 * page, 9),
        ] {
            assert!(refused(address, bytes).ends_with(", a window lies there)"));
        }
        for (address, bytes) in [
            (4 * page, 1),
            (2 * page, 3 * page),
            (u64::MAX, 2),
            (0, u64::MAX),
        ] {
            assert!(refused(address, bytes).ends_with("(size 0x40000)"));
        }
        assert_eq!(regions.read(page - 2, 2).expect("own"), b"ab");
        let length = regions.with(2 * PAGE..3 * PAGE, <[u8]>::len);
        assert_eq!(length.expect("between the windows"), PAGE);
        let inputs = [base + PAGE, base + 2 * PAGE - 1].map(|at| regions.input_at(at));
        assert_eq!(inputs, [Some(0), Some(0)]);
        for at in [
            0,
            base - 1,
            base + PAGE - 1,
            base + 2 * PAGE,
            base + 3 * PAGE,
        ] {
            assert_eq!(regions.input_at(at), None);
        }
        regions.leave();
        assert_eq!(regions.read(page - 1, 2).expect("own again"), b"bc");
        assert_eq!(regions.input_at(base + PAGE), None);
    }
}
