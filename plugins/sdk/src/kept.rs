//! Rows that a kernel looks at again: the last ones of what it has consumed, outside the windows.

use crate::Error;
use crate::window::{Chunk, Window};
use alloc::{format, vec::Vec};

/// Memory as aligned as a window.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes that start on a multiple of 64.
#[derive(Debug, Default)]
struct Lines(Vec<Line>);

impl Lines {
    /// Makes room for that many bytes.
    fn hold(&mut self, bytes: usize, port: &str) -> Result<(), Error> {
        let lines = bytes.div_ceil(64);
        if lines > self.0.len() {
            self.0.try_reserve(lines - self.0.len()).map_err(|_| {
                Error::failed(format!(
                    "{port}: no memory for {bytes} bytes of earlier rows"
                ))
            })?;
            self.0.resize(lines, Line([0; 64]));
        }
        Ok(())
    }

    fn address(&mut self) -> usize {
        self.0.as_mut_ptr().expose_provenance()
    }

    /// Copies `bytes` bytes from `source` to byte `at`.
    ///
    /// # Safety
    /// They are readable, and not bytes of these lines.
    #[expect(unsafe_code, reason = "rows are copied out of a window")]
    unsafe fn copy_in(&mut self, at: usize, source: usize, bytes: usize) {
        assert!(at + bytes <= self.0.len() * 64, "`hold` made room");
        let target = self.0.as_mut_ptr().cast::<u8>().wrapping_add(at);
        let source = core::ptr::with_exposed_provenance::<u8>(source);
        // SAFETY: the target was asserted to be inside; the source is the caller's promise, as is that they are apart.
        unsafe { source.copy_to_nonoverlapping(target, bytes) };
    }

    /// Moves what stands from byte `from` on to the start.
    fn drop_front(&mut self, from: usize, bytes: usize) {
        if from > 0 && bytes > 0 {
            let (start, end) = (from, from + bytes);
            let target = self.bytes_mut();
            target.copy_within(start..end, 0);
        }
    }

    #[expect(unsafe_code, reason = "lines are seen as bytes")]
    fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.0.len() * 64;
        // SAFETY: a `Line` is 64 initialised bytes without padding.
        unsafe { core::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u8>(), length) }
    }
}

/// The last rows of one input that was consumed, at most `most` of them.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    most: u64,
    rows: u64,
    lines: Lines,
    /// Kept rows and the first ones of a chunk, one after the other.
    seam: Lines,
}

impl Kept {
    /// Keeps up to so many rows.
    pub(crate) fn new(most: u64) -> Self {
        Self {
            most,
            ..Self::default()
        }
    }

    /// Rows after `consumed` ones of the chunk that can be shown at once, of `rows`: fewer where rows from before the chunk
    /// come first.
    pub(crate) fn at_once(&self, consumed: u64, rows: u64) -> u64 {
        match consumed < self.lead(consumed) {
            true => rows.min(self.most - consumed),
            false => rows,
        }
    }

    fn lead(&self, consumed: u64) -> u64 {
        self.most.min(self.rows.saturating_add(consumed))
    }

    /// Shows `rows` rows of the chunk after `consumed` ones, with those before them, as many as are kept.
    ///
    /// # Errors
    /// [`Error::Failed`] if there is no memory.
    ///
    /// # Safety
    /// The chunk is mapped.
    #[expect(unsafe_code, reason = "rows are copied out of a window")]
    pub(crate) unsafe fn show(
        &mut self,
        window: &mut Window,
        chunk: Chunk,
        consumed: u64,
        rows: u64,
    ) -> Result<(), Error> {
        let (first, lead) = (chunk.first + consumed, self.lead(consumed));
        if lead <= consumed {
            let address = chunk.address + window.bytes_of(consumed - lead);
            window.show(address, first, lead, rows);
            return Ok(());
        }
        // Those that are kept come first.
        let earlier = lead - consumed;
        let (before, after) = (window.bytes_of(earlier), window.bytes_of(consumed + rows));
        self.seam.hold(before + after, window.port())?;
        let kept = self.lines.address() + window.bytes_of(self.rows - earlier);
        // SAFETY: `earlier` rows of the kept ones, which are memory of their own.
        unsafe { self.seam.copy_in(0, kept, before) };
        // SAFETY: rows of the chunk: the caller's promise. A window is no memory of the allocator's.
        unsafe { self.seam.copy_in(before, chunk.address, after) };
        window.show(self.seam.address(), first, lead, rows);
        Ok(())
    }

    /// Keeps the last rows of what was there, now that `consumed` rows of the chunk were consumed.
    ///
    /// # Errors
    /// [`Error::Failed`] if there is no memory.
    ///
    /// # Safety
    /// The chunk is mapped.
    #[expect(unsafe_code, reason = "rows are copied out of a window")]
    pub(crate) unsafe fn take(
        &mut self,
        window: &Window,
        chunk: Chunk,
        consumed: u64,
    ) -> Result<(), Error> {
        if self.most == 0 || consumed == 0 {
            return Ok(());
        }
        let rows = self.lead(consumed);
        let fresh = consumed.min(rows);
        let stay = rows - fresh;
        let (before, after) = (window.bytes_of(stay), window.bytes_of(fresh));
        self.lines.hold(before + after, window.port())?;
        self.lines
            .drop_front(window.bytes_of(self.rows - stay), before);
        let source = chunk.address + window.bytes_of(consumed - fresh);
        // SAFETY: rows of the chunk: the caller's promise. A window is no memory of the allocator's.
        unsafe { self.lines.copy_in(before, source, after) };
        self.rows = rows;
        Ok(())
    }
}
