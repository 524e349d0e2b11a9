//! Memory that is aligned as a window is.

use alloc::vec::Vec;

/// As many bytes as a window's address is a multiple of.
pub(crate) const LINE_BYTES: usize = 64;

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// Bytes that start on a multiple of 64.
#[derive(Debug, Default)]
pub(crate) struct Lines(Vec<Line>);

impl Lines {
    /// So many lines, full of one byte.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn filled(count: usize, byte: u8) -> Self {
        Self(alloc::vec![Line([byte; LINE_BYTES]); count])
    }

    /// Makes room for that many bytes; false if there is no memory.
    pub(crate) fn hold(&mut self, bytes: usize) -> bool {
        let lines = bytes.div_ceil(LINE_BYTES);
        let more = lines.saturating_sub(self.0.len());
        if self.0.try_reserve(more).is_err() {
            return false;
        }
        self.0.resize(self.0.len() + more, Line([0; LINE_BYTES]));
        true
    }

    /// Address of the first byte, by which others may get at all of them.
    pub(crate) fn address(&mut self) -> usize {
        self.0.as_mut_ptr().expose_provenance()
    }

    #[expect(unsafe_code, reason = "lines are seen as bytes")]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.0.len() * LINE_BYTES;
        // SAFETY: a `Line` is 64 initialised bytes without padding.
        unsafe { core::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), length) }
    }
}
