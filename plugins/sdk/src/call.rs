//! Windows as slices, for the length of one `run`.

use crate::window::{Window, row_elements};
use crate::{Dtype, Element, Error, Note, Spec, Streaming};
use alloc::{format, string::String, vec::Vec};
use core::ops::{Deref, DerefMut};

/// Most bytes that a failing kernel hands to the host.
const DIAGNOSTIC_BYTES_MAX: usize = 4096;

/// What a kernel said in one call about rows.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// Rows of each input that it is done with.
    pub(crate) consumed: Vec<u64>,
    /// Rows of each output that it has written.
    pub(crate) written: Vec<u64>,
    /// It has more to give than there was room for.
    pub(crate) more: bool,
}

/// What a call can leave behind.
#[derive(Debug)]
pub(crate) struct Leaves<'w> {
    pub(crate) said: &'w mut Said,
    pub(crate) extents: &'w mut [Vec<u64>],
    pub(crate) notes: &'w mut Vec<Note>,
    pub(crate) diagnostic: &'w mut Vec<u8>,
}

/// The tensors of one `run`, or what this chunk has of them.
#[derive(Debug)]
pub struct Call<'w> {
    inputs: &'w [Window],
    outputs: &'w [Window],
    streaming: Streaming,
    leaves: Leaves<'w>,
    /// Bit i: output i was handed out.
    handed_out: u64,
}

impl<'w> Call<'w> {
    /// # Safety
    /// Until `'w` ends each window's piece is mapped, initialised memory; nothing but the slices made here
    /// uses the outputs' pieces, which meet no other piece; and nothing in this instance writes the inputs'.
    #[expect(unsafe_code, reason = "the promise that input() and output() rely on")]
    pub(crate) unsafe fn new(
        inputs: &'w [Window],
        outputs: &'w [Window],
        streaming: Streaming,
        leaves: Leaves<'w>,
    ) -> Self {
        assert!(outputs.len() <= 64, "a kernel has at most 64 outputs");
        Self {
            inputs,
            outputs,
            streaming,
            leaves,
            handed_out: 0,
        }
    }

    /// Spec of input `index`: the whole tensor's.
    ///
    /// # Panics
    /// If there is no such port.
    #[must_use]
    pub fn input_spec(&self, index: usize) -> &'w Spec {
        self.inputs[index].spec()
    }

    /// Spec of output `index`: the whole tensor's, as [`Kernel::open`](crate::Kernel::open) answered it.
    ///
    /// # Panics
    /// If there is no such port.
    #[must_use]
    pub fn output_spec(&self, index: usize) -> &'w Spec {
        self.outputs[index].spec()
    }

    /// The elements of input `index`, row-major: of a stream those of this chunk. Writing to them ends the invocation.
    ///
    /// # Errors
    /// [`Error::Failed`] if the input's dtype is not `T`'s.
    ///
    /// # Panics
    /// If there is no such port.
    #[expect(unsafe_code, reason = "a window becomes a slice")]
    pub fn input<T: Element>(&self, index: usize) -> Result<Input<'w, T>, Error> {
        let window = &self.inputs[index];
        check(window, T::DTYPE)?;
        let piece = window.piece();
        let mut input = Input {
            elements: &[],
            shape: &piece.shape,
            lead: index_of(piece.lead),
            first: piece.first,
        };
        if piece.elements > 0 {
            let address = core::ptr::with_exposed_provenance::<T>(piece.address);
            // SAFETY: not null (the reserved range does not start at 0) and aligned (a multiple of 64, and whole
            // rows of `T`); `elements` of `T`'s size lie in the piece (`Window`); mapped, and not written by this
            // instance while `'w` lasts (`Call::new`).
            input.elements = unsafe { core::slice::from_raw_parts(address, piece.elements) };
        }
        Ok(input)
    }

    /// The elements of output `index`, row-major, with arbitrary values in them: of a stream what there is room for
    /// in this chunk. Once for each `run`.
    ///
    /// # Errors
    /// [`Error::Failed`] if the output's dtype is not `T`'s, or if it was handed out already.
    ///
    /// # Panics
    /// If there is no such port.
    #[expect(unsafe_code, reason = "a window becomes a slice")]
    pub fn output<T: Element>(&mut self, index: usize) -> Result<Output<'w, T>, Error> {
        let piece = self.hand_out(index, T::DTYPE)?.piece();
        let mut output = Output {
            elements: &mut [],
            shape: &piece.shape,
        };
        if piece.elements > 0 {
            let address = core::ptr::with_exposed_provenance_mut::<T>(piece.address);
            // SAFETY: as in `input`; and this is the only reference to the piece: it meets no other
            // (`Call::new`), and `hand_out` lets it be made once.
            output.elements = unsafe { core::slice::from_raw_parts_mut(address, piece.elements) };
        }
        Ok(output)
    }

    #[inline(never)]
    fn hand_out(&mut self, index: usize, asked: Dtype) -> Result<&'w Window, Error> {
        let window = &self.outputs[index];
        check(window, asked)?;
        if self.handed_out & (1 << index) != 0 {
            return Err(Error::failed(format!(
                "{} was handed out already",
                window.port()
            )));
        }
        self.handed_out |= 1 << index;
        Ok(window)
    }

    /// Says that output `index` is smaller than `open` answered; its elements are the first ones. Of a stream only
    /// the number of rows can be less, and it is that of this chunk: see [`written`](Self::written).
    ///
    /// # Errors
    /// [`Error::Failed`] if the shape has another rank, or a dimension larger than the output's.
    ///
    /// # Panics
    /// If there is no such port.
    pub fn set_shape(&mut self, index: usize, shape: &[u64]) -> Result<(), Error> {
        let window = &self.outputs[index];
        let bound = &window.piece().shape;
        let fits = match self.streaming {
            Streaming::Whole => shape.iter().zip(bound).all(|(size, bound)| size <= bound),
            // Where a row lies was said before the first one was written.
            Streaming::Rows | Streaming::Free => {
                shape.first() <= bound.first() && shape.get(1..) == bound.get(1..)
            }
        };
        if shape.len() != bound.len() || !fits {
            return Err(Error::failed(format!(
                "{}: {shape:?} is not within {bound:?}",
                window.port()
            )));
        }
        self.leaves.extents[index] = shape.into();
        self.leaves.said.written[index] = shape.first().copied().unwrap_or(1);
        Ok(())
    }

    /// Says how many rows of output `index` hold something now: the first ones of what there was room for.
    ///
    /// If a kernel does not say: with [`Streaming::Whole`] and [`Streaming::Rows`] all of them, else none.
    ///
    /// # Errors
    /// [`Error::Failed`] if there was not room for so many.
    ///
    /// # Panics
    /// If there is no such port.
    pub fn written(&mut self, index: usize, rows: usize) -> Result<(), Error> {
        let window = &self.outputs[index];
        let room = window.piece_rows();
        let rows = rows as u64;
        if rows > room {
            let port = window.port();
            return Err(Error::failed(format!(
                "{port}: {rows} rows written, there was room for {room}"
            )));
        }
        self.leaves.said.written[index] = rows;
        Ok(())
    }

    /// Says how many rows of input `index` the kernel is done with; the others come again before the next ones. If it does
    /// not say: all.
    ///
    /// # Errors
    /// [`Error::Failed`] if there are not so many, or the kernel is not [`Streaming::Free`].
    ///
    /// # Panics
    /// If there is no such port.
    pub fn consumed(&mut self, index: usize, rows: usize) -> Result<(), Error> {
        let window = &self.inputs[index];
        let (port, there, rows) = (window.port(), window.piece_rows(), rows as u64);
        if self.streaming != Streaming::Free || window.is_whole() {
            return Err(Error::failed(format!(
                "{port}: only a kernel with Streaming::Free says what it consumed, of inputs that are not whole"
            )));
        }
        if rows > there {
            return Err(Error::failed(format!(
                "{port}: {rows} rows consumed, there were {there}"
            )));
        }
        self.leaves.said.consumed[index] = rows;
        Ok(())
    }

    /// Says that there is more to give than there was room for: the host calls again.
    pub fn more(&mut self) {
        self.leaves.said.more = true;
    }

    /// Adds a warning or a figure to the result's metadata.
    pub fn note(&mut self, key: impl Into<String>, text: impl Into<String>) {
        self.leaves.notes.push(Note {
            key: key.into(),
            text: text.into(),
        });
    }

    /// Bytes for whoever looks into the failure that `run` is about to answer: the block that could not be
    /// converted, for example. The first 4096 are kept.
    pub fn diagnose(&mut self, bytes: &[u8]) {
        self.leaves.diagnostic.clear();
        let kept = bytes.len().min(DIAGNOSTIC_BYTES_MAX);
        self.leaves.diagnostic.extend_from_slice(&bytes[..kept]);
    }
}

#[inline(never)]
fn check(window: &Window, asked: Dtype) -> Result<(), Error> {
    let is = window.spec().dtype;
    if is == asked {
        return Ok(());
    }
    let (port, is, asked) = (window.port(), is.name(), asked.name());
    Err(Error::failed(format!(
        "{port} is {is}, the kernel asks for {asked}"
    )))
}

/// A number of rows or elements that lie in memory.
fn index_of(rows: u64) -> usize {
    usize::try_from(rows).unwrap_or(usize::MAX)
}

/// An input's elements.
///
/// If a client still writes to the tensor while the kernel runs, two reads of one element may differ.
#[derive(Clone, Copy, Debug)]
pub struct Input<'w, T> {
    elements: &'w [T],
    shape: &'w [u64],
    lead: usize,
    first: u64,
}

impl<'w, T> Input<'w, T> {
    /// The dimensions of what is here, slowest first.
    #[must_use]
    pub fn shape(&self) -> &'w [u64] {
        self.shape
    }

    /// The elements for as long as the `run` lasts.
    #[must_use]
    pub fn as_slice(&self) -> &'w [T] {
        self.elements
    }

    /// How many of the first rows the kernel has seen before: see [`Kernel::history`](crate::Kernel::history).
    #[must_use]
    pub fn lead(&self) -> usize {
        self.lead
    }

    /// Index in the whole tensor of the first row after the [`lead`](Self::lead).
    #[must_use]
    pub fn first_row(&self) -> u64 {
        self.first
    }

    /// Elements of one row: of what one index of axis 0 holds.
    #[must_use]
    pub fn row_len(&self) -> usize {
        index_of(row_elements(self.shape))
    }
}

impl<T> Deref for Input<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.elements
    }
}

/// An output's elements.
#[derive(Debug)]
pub struct Output<'w, T> {
    elements: &'w mut [T],
    shape: &'w [u64],
}

impl<'w, T> Output<'w, T> {
    /// The dimensions of what there is room for, slowest first.
    #[must_use]
    pub fn shape(&self) -> &'w [u64] {
        self.shape
    }

    /// Elements of one row: of what one index of axis 0 holds.
    #[must_use]
    pub fn row_len(&self) -> usize {
        index_of(row_elements(self.shape))
    }
}

impl<T> Deref for Output<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.elements
    }
}

impl<T> DerefMut for Output<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.elements
    }
}
