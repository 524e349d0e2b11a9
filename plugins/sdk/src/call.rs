//! Windows as slices, for the length of one `run`.

use crate::{Dtype, Element, Error, Note, Spec};
use alloc::{format, string::String, vec::Vec};
use core::ops::{Deref, DerefMut, Range};

/// Where one tensor will lie. Made by [`Window::new`] only, so its fields fit each other.
#[derive(Debug)]
pub(crate) struct Window {
    port: &'static str,
    address: usize,
    elements: usize,
    control: usize,
    spec: Spec,
}

/// Size of a chunk record.
pub(crate) const CONTROL_BYTES: usize = 64;
/// Most bytes that a failing kernel hands to the host.
const DIAGNOSTIC_BYTES_MAX: usize = 4096;

/// What stands in a chunk record: index of the first row, rows, bytes from the tensor's address to the first row, and
/// rows that the kernel consumed or wrote.
type Record = [u64; 4];

impl Window {
    /// # Panics
    /// If the host's answer is not what it promised: the address is no multiple of 64, the record's none of 8,
    /// either lies outside `reserved`, or the size is not that of `spec`. Going on would let a kernel
    /// write into its own heap.
    pub(crate) fn new(
        port: &'static str,
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
        Self {
            port,
            address,
            elements,
            control,
            spec,
        }
    }

    pub(crate) fn spec(&self) -> &Spec {
        &self.spec
    }

    pub(crate) fn tensor_range(&self) -> Range<usize> {
        self.address
            ..self.address + self.elements * usize::try_from(self.spec.dtype.bytes()).unwrap_or(0)
    }

    pub(crate) fn control_range(&self) -> Range<usize> {
        self.control..self.control + CONTROL_BYTES
    }

    fn rows(&self) -> u64 {
        self.spec.shape.first().copied().unwrap_or(1)
    }

    /// Whether this chunk is the whole tensor.
    #[expect(
        unsafe_code,
        reason = "the record lies in memory that only the host and `Window` use"
    )]
    pub(crate) fn is_whole(&self) -> bool {
        let record = core::ptr::with_exposed_provenance::<Record>(self.control);
        // SAFETY: `new` checked alignment and that 64 bytes from `control` lie in the reserved range, which
        // is never given to the allocator; `Instance::bind` checked that no window meets it.
        let [first, rows, offset, _] = unsafe { record.read() };
        (first, rows, offset) == (0, self.rows(), 0)
    }

    /// Says that of a chunk which is the whole tensor so many rows were consumed or written.
    #[expect(
        unsafe_code,
        reason = "the record lies in memory that only the host and `Window` use"
    )]
    fn moved(&self, rows: u64) {
        let record = core::ptr::with_exposed_provenance_mut::<Record>(self.control);
        // SAFETY: as in `is_whole`.
        unsafe { record.write([0, self.rows(), 0, rows]) }
    }

    #[inline(never)]
    fn check(&self, asked: Dtype) -> Result<(), Error> {
        if self.spec.dtype == asked {
            return Ok(());
        }
        let (port, is, asked) = (self.port, self.spec.dtype.name(), asked.name());
        Err(Error::failed(format!(
            "{port} is {is}, the kernel asks for {asked}"
        )))
    }
}

/// The tensors of one `run`.
#[derive(Debug)]
pub struct Call<'w> {
    inputs: &'w [Window],
    outputs: &'w [Window],
    extents: &'w mut [Vec<u64>],
    notes: &'w mut Vec<Note>,
    diagnostic: &'w mut Vec<u8>,
    /// Bit i: output i was handed out.
    taken: u64,
}

impl<'w> Call<'w> {
    /// # Safety
    /// Until `'w` ends each window's range is mapped, initialised memory; nothing but the slices made here
    /// uses the outputs' ranges, which meet no other range; and nothing in this instance writes the inputs'.
    #[expect(unsafe_code, reason = "the promise that input() and output() rely on")]
    pub(crate) unsafe fn new(
        inputs: &'w [Window],
        outputs: &'w [Window],
        extents: &'w mut [Vec<u64>],
        notes: &'w mut Vec<Note>,
        diagnostic: &'w mut Vec<u8>,
    ) -> Self {
        assert!(outputs.len() <= 64, "a kernel has at most 64 outputs");
        Self {
            inputs,
            outputs,
            extents,
            notes,
            diagnostic,
            taken: 0,
        }
    }

    /// Spec of input `index`.
    ///
    /// # Panics
    /// If there is no such port.
    #[must_use]
    pub fn input_spec(&self, index: usize) -> &'w Spec {
        self.inputs[index].spec()
    }

    /// Spec of output `index`: what [`Kernel::open`](crate::Kernel::open) answered.
    ///
    /// # Panics
    /// If there is no such port.
    #[must_use]
    pub fn output_spec(&self, index: usize) -> &'w Spec {
        self.outputs[index].spec()
    }

    /// The elements of input `index`, row-major. Writing to them ends the invocation.
    ///
    /// # Errors
    /// [`Error::Failed`] if the input's dtype is not `T`'s.
    ///
    /// # Panics
    /// If there is no such port.
    #[expect(unsafe_code, reason = "a window becomes a slice")]
    pub fn input<T: Element>(&self, index: usize) -> Result<Input<'w, T>, Error> {
        let window = &self.inputs[index];
        window.check(T::DTYPE)?;
        if window.elements == 0 {
            return Ok(Input {
                elements: &[],
                shape: &window.spec.shape,
            });
        }
        let address = core::ptr::with_exposed_provenance::<T>(window.address);
        // SAFETY: not null (the reserved range does not start at 0) and aligned (a multiple of 64);
        // `elements` of `T`'s size lie in the range (`Window::new`); mapped, and not written by this
        // instance while `'w` lasts (`Call::new`).
        let elements = unsafe { core::slice::from_raw_parts(address, window.elements) };
        Ok(Input {
            elements,
            shape: &window.spec.shape,
        })
    }

    /// The elements of output `index`, row-major, with arbitrary values in them. Once for each `run`.
    ///
    /// # Errors
    /// [`Error::Failed`] if the output's dtype is not `T`'s, or if it was handed out already.
    ///
    /// # Panics
    /// If there is no such port.
    #[expect(unsafe_code, reason = "a window becomes a slice")]
    pub fn output<T: Element>(&mut self, index: usize) -> Result<Output<'w, T>, Error> {
        let window = self.take_output(index, T::DTYPE)?;
        if window.elements == 0 {
            return Ok(Output {
                elements: &mut [],
                shape: &window.spec.shape,
            });
        }
        let address = core::ptr::with_exposed_provenance_mut::<T>(window.address);
        // SAFETY: as in `input`; and this is the only reference to the range: it meets no other
        // (`Call::new`), and `take_output` lets it be made once.
        let elements = unsafe { core::slice::from_raw_parts_mut(address, window.elements) };
        Ok(Output {
            elements,
            shape: &window.spec.shape,
        })
    }

    #[inline(never)]
    fn take_output(&mut self, index: usize, asked: Dtype) -> Result<&'w Window, Error> {
        let window = &self.outputs[index];
        window.check(asked)?;
        if self.taken & (1 << index) != 0 {
            return Err(Error::failed(format!(
                "{} was handed out already",
                window.port
            )));
        }
        self.taken |= 1 << index;
        Ok(window)
    }

    /// Says that output `index` is smaller than `open` answered; its elements are the first ones.
    ///
    /// # Errors
    /// [`Error::Failed`] if the shape has another rank, or a dimension larger than in the output's spec.
    ///
    /// # Panics
    /// If there is no such port.
    pub fn set_shape(&mut self, index: usize, shape: &[u64]) -> Result<(), Error> {
        let window = &self.outputs[index];
        let bound = &window.spec.shape;
        if shape.len() != bound.len() || shape.iter().zip(bound).any(|(size, bound)| size > bound) {
            return Err(Error::failed(format!(
                "{}: {shape:?} is not within {bound:?}",
                window.port
            )));
        }
        self.extents[index] = shape.into();
        Ok(())
    }

    /// Adds a warning or a figure to the result's metadata.
    pub fn note(&mut self, key: impl Into<String>, text: impl Into<String>) {
        self.notes.push(Note {
            key: key.into(),
            text: text.into(),
        });
    }

    /// Bytes for whoever looks into the failure that `run` is about to answer: the block that could not be
    /// converted, for example. The first 4096 are kept.
    pub fn diagnose(&mut self, bytes: &[u8]) {
        self.diagnostic.clear();
        let kept = bytes.len().min(DIAGNOSTIC_BYTES_MAX);
        self.diagnostic.extend_from_slice(&bytes[..kept]);
    }

    /// Writes the chunk records: everything was consumed, and this many rows were written.
    pub(crate) fn finish(&self) {
        for window in self.inputs {
            window.moved(window.rows());
        }
        for (window, extent) in self.outputs.iter().zip(&*self.extents) {
            window.moved(extent.first().copied().unwrap_or(1));
        }
    }
}

/// An input's elements.
///
/// If a client still writes to the tensor while the kernel runs, two reads of one element may differ.
#[derive(Clone, Copy, Debug)]
pub struct Input<'w, T> {
    elements: &'w [T],
    shape: &'w [u64],
}

impl<'w, T> Input<'w, T> {
    /// The dimensions, slowest first.
    #[must_use]
    pub fn shape(&self) -> &'w [u64] {
        self.shape
    }

    /// The elements for as long as the `run` lasts.
    #[must_use]
    pub fn as_slice(&self) -> &'w [T] {
        self.elements
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
    /// The dimensions that `open` answered, slowest first.
    #[must_use]
    pub fn shape(&self) -> &'w [u64] {
        self.shape
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
