//! Rows that a kernel looks at again: the last ones of what it has consumed, outside the windows.

use crate::Error;
use crate::lines::Lines;
use crate::window::{Chunk, Window};
use alloc::format;

/// Copies `bytes` bytes from `source` to byte `at` of `lines`.
///
/// # Safety
/// They are readable, and not bytes of these lines.
#[expect(unsafe_code, reason = "rows are copied out of a window")]
unsafe fn copy_in(lines: &mut Lines, at: usize, source: usize, bytes: usize) {
    let target = lines.bytes_mut()[at..at + bytes].as_mut_ptr();
    let source = core::ptr::with_exposed_provenance::<u8>(source);
    // SAFETY: the target was cut to `bytes` bytes; the source is the caller's promise, as is that they are apart.
    unsafe { source.copy_to_nonoverlapping(target, bytes) };
}

/// Makes room for that many bytes.
fn hold(lines: &mut Lines, bytes: usize, port: &str) -> Result<(), Error> {
    match lines.hold(bytes) {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "{port}: no memory for {bytes} bytes of earlier rows"
        ))),
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
        hold(&mut self.seam, before + after, window.port())?;
        let kept = self.lines.address() + window.bytes_of(self.rows - earlier);
        // SAFETY: `earlier` rows of the kept ones, which are memory of their own.
        unsafe { copy_in(&mut self.seam, 0, kept, before) };
        // SAFETY: rows of the chunk: the caller's promise. A window is no memory of the allocator's.
        unsafe { copy_in(&mut self.seam, before, chunk.address, after) };
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
        hold(&mut self.lines, before + after, window.port())?;
        let from = window.bytes_of(self.rows - stay);
        if from > 0 && before > 0 {
            self.lines.bytes_mut().copy_within(from..from + before, 0);
        }
        let source = chunk.address + window.bytes_of(consumed - fresh);
        // SAFETY: rows of the chunk: the caller's promise. A window is no memory of the allocator's.
        unsafe { copy_in(&mut self.lines, before, source, after) };
        self.rows = rows;
        Ok(())
    }
}
