//! Where tensors lie, and what of them a kernel sees now: chunk records in, pieces out.

use crate::Spec;
use alloc::vec::Vec;
use core::ops::Range;

/// Size of a chunk record.
pub(crate) const CONTROL_BYTES: usize = 64;
/// Where in it a kernel says what it consumed or wrote.
const MOVED_AT: usize = 24;

/// What the host says in a chunk record: index of the first row, rows, bytes from the tensor's address to the first row.
type Record = [u64; 3];

/// What a port has in this step.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Chunk {
    /// Index of the first row in the whole tensor.
    pub(crate) first: u64,
    /// Rows of an input; rows that an output has room for.
    pub(crate) rows: u64,
    /// Address of the first row.
    pub(crate) address: usize,
}

/// What a kernel sees of a tensor.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) address: usize,
    pub(crate) elements: usize,
    pub(crate) shape: Vec<u64>,
    /// Index in the whole tensor of the first row after the lead.
    pub(crate) first: u64,
    /// Rows at the start that were taken before.
    pub(crate) lead: u64,
}

/// Where one tensor will lie. Made by [`Window::new`] only, so its fields fit each other.
#[derive(Debug)]
pub(crate) struct Window {
    port: &'static str,
    whole: bool,
    address: usize,
    bytes: u64,
    control: usize,
    spec: Spec,
    row_elements: u64,
    piece: Piece,
}

impl Window {
    /// For a port of that name, which may be `whole`.
    ///
    /// # Panics
    /// If the host's answer is not what it promised: the address is no multiple of 64, the record's none of 8,
    /// either lies outside `reserved`, or the size is not that of `spec`. Going on would let a kernel
    /// write into its own heap.
    pub(crate) fn new(
        (port, whole): (&'static str, bool),
        (address, bytes, control): (u64, u64, u64),
        spec: Spec,
        reserved: &Range<usize>,
    ) -> Self {
        let elements = spec
            .elements()
            .expect("`open` refuses specs that are too large");
        let expected = elements as u64 * spec.dtype.bytes();
        assert!(
            bytes == expected,
            "{port}: bound {bytes} bytes, its spec has {expected}"
        );
        assert!(
            address.is_multiple_of(64),
            "{port}: address {address} is no multiple of 64"
        );
        assert!(
            control.is_multiple_of(8),
            "{port}: control {control} is no multiple of 8"
        );
        let inside = |start: u64, bytes: u64| {
            let end = start.checked_add(bytes)?;
            let start = usize::try_from(start).ok()?;
            (reserved.start <= start && end <= reserved.end as u64).then_some(start)
        };
        let address = inside(address, bytes)
            .unwrap_or_else(|| panic!("{port}: {address} + {bytes} is outside {reserved:?}"));
        let control = inside(control, CONTROL_BYTES as u64)
            .unwrap_or_else(|| panic!("{port}: control {control} is outside {reserved:?}"));
        let piece = Piece {
            address,
            elements,
            shape: spec.shape.clone(),
            first: 0,
            lead: 0,
        };
        Self {
            port,
            whole,
            address,
            bytes,
            control,
            row_elements: row_elements(&spec.shape),
            spec,
            piece,
        }
    }

    pub(crate) fn port(&self) -> &'static str {
        self.port
    }

    /// Whether it is an input that comes whole with every chunk.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    pub(crate) fn spec(&self) -> &Spec {
        &self.spec
    }

    pub(crate) fn piece(&self) -> &Piece {
        &self.piece
    }

    /// Rows of the piece after its lead.
    pub(crate) fn piece_rows(&self) -> u64 {
        match self.piece.shape.first() {
            Some(size) => size - self.piece.lead,
            None => self.piece.elements as u64 - self.piece.lead,
        }
    }

    pub(crate) fn tensor_range(&self) -> Range<usize> {
        self.address..self.address + usize::try_from(self.bytes).unwrap_or(0)
    }

    pub(crate) fn control_range(&self) -> Range<usize> {
        self.control..self.control + CONTROL_BYTES
    }

    /// Rows of the whole tensor; of a stream those of the largest chunk.
    pub(crate) fn rows(&self) -> u64 {
        self.spec.rows()
    }

    /// Bytes of so many rows, which are within the tensor.
    pub(crate) fn bytes_of(&self, rows: u64) -> usize {
        let elements = self.elements_of(rows) as u64;
        usize::try_from(elements.saturating_mul(self.spec.dtype.bytes())).unwrap_or(usize::MAX)
    }

    fn elements_of(&self, rows: u64) -> usize {
        usize::try_from(rows.saturating_mul(self.row_elements)).unwrap_or(usize::MAX)
    }

    /// What the host's record says that there is in this step. `moved`: rows consumed or written so far.
    ///
    /// # Panics
    /// If that is not within the tensor's memory, or does not go on where the last step ended. A stream's rows go on beyond
    /// those of the spec, which is then the room for a chunk. Going on would let a kernel write
    /// into its own heap, or compute from rows that come twice.
    #[expect(
        unsafe_code,
        reason = "the record lies in memory that only the host and `Window` use"
    )]
    pub(crate) fn chunk(&self, moved: u64) -> Chunk {
        let record = core::ptr::with_exposed_provenance::<Record>(self.control);
        // SAFETY: `new` checked alignment and that 64 bytes from `control` lie in the reserved range, which
        // is never given to the allocator; `Instance::bind` checked that no window meets it.
        let [first, rows, offset] = unsafe { record.read() };
        let port = self.port;
        assert!(
            first == moved && first.checked_add(rows).is_some(),
            "{port}: a chunk of {rows} rows from {first} on, after {moved}"
        );
        let size = rows.saturating_mul(self.row_elements);
        let size = size.saturating_mul(self.spec.dtype.bytes());
        assert!(
            offset.is_multiple_of(self.spec.dtype.bytes())
                && offset
                    .checked_add(size)
                    .is_some_and(|end| end <= self.bytes),
            "{port}: a chunk of {rows} rows at byte {offset} of {}",
            self.bytes
        );
        Chunk {
            first,
            rows,
            // Within the tensor, whose end is an address.
            address: self.address + usize::try_from(offset).unwrap_or(0),
        }
    }

    /// Whether the host's record says that this step has the whole tensor.
    pub(crate) fn has_all(&self, chunk: Chunk) -> bool {
        chunk.rows == self.rows() && chunk.address == self.address
    }

    /// Shows a kernel `rows` rows at `address`, after `lead` rows that it has seen before. `first`: the index of the first
    /// of those rows. The caller has made sure of what lies there.
    pub(crate) fn show(&mut self, address: usize, first: u64, lead: u64, rows: u64) {
        self.piece.address = address;
        self.piece.elements = self.elements_of(lead + rows);
        self.piece.first = first;
        self.piece.lead = lead;
        if let Some(size) = self.piece.shape.first_mut() {
            *size = lead + rows;
        }
    }

    /// Shows what is left of a chunk after `skipped` rows, at most `rows` of it.
    pub(crate) fn show_chunk(&mut self, chunk: Chunk, skipped: u64, rows: u64) {
        let address = chunk.address + self.bytes_of(skipped);
        self.show(address, chunk.first + skipped, 0, rows);
    }

    /// Says that so many rows of the chunk were consumed or written.
    #[expect(
        unsafe_code,
        reason = "the record lies in memory that only the host and `Window` use"
    )]
    pub(crate) fn moved(&self, rows: u64) {
        let word = core::ptr::with_exposed_provenance_mut::<u64>(self.control + MOVED_AT);
        // SAFETY: as in `chunk`; the word is inside the record, and aligned as that is.
        unsafe { word.write(rows) }
    }
}

/// Elements of one row: of what one index of axis 0 holds.
pub(crate) fn row_elements(shape: &[u64]) -> u64 {
    let rest = shape.get(1..).unwrap_or_default();
    // Also where it saturates a size of 0 makes it 0.
    rest.iter().fold(1, |n: u64, size| n.saturating_mul(*size))
}
