//! Kernels that are given a tensor in chunks of rows.

use std::os::fd::{AsFd, BorrowedFd};

use strait_tensor::TensorPlace;

use crate::elements::Elements;
use crate::error::Error;
use crate::prepared::Prepared;
use crate::tensor::{TensorView, range};
use crate::wire::{Note, Op, PreparedTensor};

/// A kernel that is ready for tensors that come in chunks of rows. It keeps its state from the first chunk to the
/// last, and all its output rows are bit for bit those of one call on all rows.
///
/// It has a socket of its own; dropping it ends it in the host. It waits on the calling thread.
#[derive(Debug)]
pub struct PreparedStream(pub(crate) Prepared);

/// A chunk's output: rows of the outputs.
#[derive(Debug)]
pub struct Rows {
    outputs: Vec<(TensorPlace, Vec<u128>)>,
    /// The kernel's notes, at the end.
    pub notes: Vec<Note>,
}

impl Rows {
    /// The rows of an output port.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if the kernel has no such port.
    pub fn tensor(&self, port: &str) -> Result<TensorView<'_>, Error> {
        let output = self.outputs.iter().find(|(place, _)| place.name == port);
        let (place, words) = output.ok_or_else(|| Error::NoTensor {
            name: port.to_owned(),
            known: self
                .outputs
                .iter()
                .map(|(place, _)| place.name.clone())
                .collect(),
        })?;
        Ok(TensorView::of(place, bytemuck::cast_slice(words)))
    }

    /// Appends the rows at `place`, which are `bytes`, to output `index`.
    fn append(&mut self, index: usize, place: &TensorPlace, bytes: &[u8]) {
        let (all, words) = &mut self.outputs[index];
        let from = range(all).end;
        words.resize((from + bytes.len()).div_ceil(size_of::<u128>()), 0);
        bytemuck::cast_slice_mut::<u128, u8>(words)[from..from + bytes.len()]
            .copy_from_slice(bytes);
        all.length += bytes.len() as u64;
        if let (Some(rows), Some(more)) = (all.spec.shape.first_mut(), place.spec.shape.first()) {
            // Rows without elements may be any number.
            *rows = rows.saturating_add(*more);
        }
    }
}

impl PreparedStream {
    /// The inputs that come in chunks, in their order; their shapes begin with the most rows of a chunk.
    #[must_use]
    pub fn inputs(&self) -> &[PreparedTensor] {
        &self.0.inputs
    }

    /// Its number in this session, as [`Prepared::number`].
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.number
    }

    /// The outputs; their shapes begin with the most rows of a frame.
    #[must_use]
    pub fn outputs(&self) -> &[PreparedTensor] {
        &self.0.outputs
    }

    /// Sends the next rows of [`Self::inputs`] in their order, perhaps none, and waits for the output.
    ///
    /// # Errors
    /// As [`Prepared::call`]; [`Error::Remote`] says which chunk it was (`details.chunk`), and ends the stream.
    pub fn chunk(&mut self, elements: &[Elements<'_>]) -> Result<Rows, Error> {
        let rows = self.begin(elements, false)?;
        self.rest(rows)
    }

    /// Sends the last rows, perhaps none, and waits for the rest. The next chunk begins another stream.
    ///
    /// # Errors
    /// As [`Self::chunk`].
    pub fn last(&mut self, elements: &[Elements<'_>]) -> Result<Rows, Error> {
        let rows = self.begin(elements, true)?;
        self.rest(rows)
    }

    fn rest(&mut self, mut rows: Rows) -> Result<Rows, Error> {
        while !self.receive(&mut rows)? {}
        Ok(rows)
    }

    /// The first half of [`Self::chunk`], or of [`Self::last`]: sends the rows. [`Self::receive`] puts the output into
    /// the rows that this returns.
    ///
    /// # Errors
    /// As [`Self::chunk`].
    pub fn begin(&mut self, elements: &[Elements<'_>], last: bool) -> Result<Rows, Error> {
        let stream = &mut self.0;
        // As many rows as there are elements for.
        let shapes = elements.iter().zip(&stream.inputs).map(|(given, tensor)| {
            let rest = tensor.shape.get(1..).unwrap_or_default();
            let row = rest
                .iter()
                .fold(tensor.dtype.size(), |bytes, size| bytes * size);
            let rows = (given.bytes.len() as u64).checked_div(row).unwrap_or(0);
            [&[rows], rest].concat()
        });
        let shapes: Vec<_> = shapes.collect();
        let mut shaped = elements.to_vec();
        for (given, shape) in shaped.iter_mut().zip(&shapes) {
            given.shape = given.shape.or(Some(shape));
        }
        stream.check(&shaped)?;
        let op = if last { Op::Last } else { Op::Chunk };
        stream.begin_checked(op, &shaped)?;
        Ok(Rows {
            outputs: stream
                .places
                .iter()
                .map(|place| {
                    let mut none = place.clone();
                    (none.offset, none.length) = (0, 0);
                    if let Some(rows) = none.spec.shape.first_mut() {
                        *rows = 0;
                    }
                    (none, Vec::new())
                })
                .collect(),
            notes: Vec::new(),
        })
    }

    /// Waits for the next of the host's frames, for which the descriptor (`AsFd`) becomes readable. True: it was the last
    /// one, and `rows` is complete.
    ///
    /// # Errors
    /// As [`Self::chunk`], and [`Error::Linux`] if nothing was begun.
    pub fn receive(&mut self, rows: &mut Rows) -> Result<bool, Error> {
        let stream = &mut self.0;
        stream.check_begun()?;
        let received = stream.receive(&[Op::Ok, Op::Chunk]);
        // Until the last of them is here, and after an error for good.
        stream.broken = true;
        let (op, notes) = received?;
        for (index, place) in stream.places.iter().enumerate() {
            let (is, prepared) = (&place.spec.shape, &stream.outputs[index].shape);
            if is.is_empty() || is[1..] != prepared[1..] {
                return Err(Error::Protocol(format!(
                    "the reply to CHUNK: output {:?} has rows of {is:?}, and {prepared:?} was said",
                    place.name
                )));
            }
            let bytes = stream.received(place);
            rows.append(index, place, bytes);
            stream.session.count_copied(bytes.len() as u64);
        }
        if op == Op::Ok {
            stream.broken = false;
            rows.notes = notes;
        }
        Ok(op == Op::Ok)
    }
}

impl AsFd for PreparedStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
