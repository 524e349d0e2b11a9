//! From chunks of any size to calls of a kernel, and what it said of them back into the chunk records.
//!
//! ```text
//! run(mode) ──▶ step ── whole: all at once
//!                  ├─── rows:  as many rows in as out, with earlier rows before them (kept), then `finish`
//!                  └─── free:  the chunk as it is, then `finish`
//! ```

use crate::call::{Call, Leaves, Said};
use crate::kept::Kept;
use crate::window::{Chunk, Window};
use crate::{Error, Note, Streaming};
use alloc::{format, vec, vec::Vec};

/// A kernel's function over a chunk, whichever it is.
type Function<'k> = &'k mut dyn FnMut(&mut Call<'_>) -> Result<(), Error>;

/// An opened kernel whose type is forgotten.
pub(crate) trait Run {
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error>;
    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error>;
}

/// Where the tensors are.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) inputs: Vec<Window>,
    pub(crate) outputs: Vec<Window>,
}

/// How far an invocation has come.
#[derive(Debug)]
pub(crate) struct Steps {
    name: &'static str,
    streaming: Streaming,
    history: u64,
    /// Rows consumed of each input, rows written to each output.
    consumed: Vec<u64>,
    written: Vec<u64>,
    kept: Vec<Kept>,
    said: Said,
    began: bool,
    over: bool,
    /// The outputs' true shapes.
    pub(crate) extents: Vec<Vec<u64>>,
    pub(crate) notes: Vec<Note>,
}

/// One call of `run`: what is there, and how much of it is done with.
struct Step<'s> {
    bound: &'s mut Bound,
    diagnostic: &'s mut Vec<u8>,
    inputs: Vec<Chunk>,
    outputs: Vec<Chunk>,
    last: bool,
    consumed: Vec<u64>,
    written: Vec<u64>,
}

impl Steps {
    pub(crate) fn new(name: &'static str, streaming: Streaming, history: usize) -> Self {
        Self {
            name,
            streaming,
            history: history as u64,
            consumed: Vec::new(),
            written: Vec::new(),
            kept: Vec::new(),
            said: Said::default(),
            began: false,
            over: false,
            extents: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Calls the kernel on what the chunk records say is there; whether there is more to do with that.
    ///
    /// # Safety
    /// The chunks are mapped: the inputs' readable, the outputs' writable, and nothing else in this instance uses
    /// them before the function returns. Windows of outputs meet no other.
    #[expect(unsafe_code, reason = "only the host knows whether the windows are in")]
    pub(crate) unsafe fn step(
        &mut self,
        kernel: &mut dyn Run,
        bound: &mut Bound,
        diagnostic: &mut Vec<u8>,
        last: bool,
    ) -> Result<bool, Error> {
        if self.streaming == Streaming::Whole || !self.began {
            self.begin(bound);
        }
        if self.over {
            let name = self.name;
            return Err(Error::failed(format!(
                "run: {name} has had its last chunk: open it again"
            )));
        }
        let chunks = |windows: &[Window], moved: &[u64]| -> Vec<Chunk> {
            let each = windows.iter().zip(moved);
            each.map(|(window, moved)| window.chunk(*moved)).collect()
        };
        let mut step = Step {
            inputs: chunks(&bound.inputs, &self.consumed),
            outputs: chunks(&bound.outputs, &self.written),
            consumed: vec![0; bound.inputs.len()],
            written: vec![0; bound.outputs.len()],
            last,
            bound,
            diagnostic,
        };
        let more = match self.streaming {
            // SAFETY: the caller's promise.
            Streaming::Whole => unsafe { self.whole(kernel, &mut step) }.map(|()| false),
            // SAFETY: the caller's promise.
            Streaming::Rows => unsafe { self.rows(kernel, &mut step) },
            // SAFETY: the caller's promise.
            Streaming::Free => unsafe { self.free(kernel, &mut step) },
        }?;
        if more && step.stands() {
            let name = self.name;
            return Err(Error::failed(format!(
                "{name} wants to go on, and there is no room for a row of it or nothing to go on with"
            )));
        }
        self.over = last && !more;
        // SAFETY: the caller's promise.
        unsafe { self.end(step) }?;
        Ok(more)
    }

    /// Starts over with notes and extents.
    fn begin(&mut self, bound: &Bound) {
        self.began = true;
        self.over = false;
        self.consumed = vec![0; bound.inputs.len()];
        self.written = vec![0; bound.outputs.len()];
        let keep = |window: &Window| match window.is_whole() {
            true => Kept::default(),
            false => Kept::new(self.history),
        };
        self.kept = bound.inputs.iter().map(keep).collect();
        self.notes.clear();
        let outputs = bound.outputs.iter();
        self.extents = outputs.map(|w| w.spec().shape.clone()).collect();
    }

    /// All tensors at once.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn whole(&mut self, kernel: &mut dyn Run, step: &mut Step<'_>) -> Result<(), Error> {
        let inputs = step.bound.inputs.iter().zip(&step.inputs);
        let outputs = step.bound.outputs.iter().zip(&step.outputs);
        if !step.last
            || !inputs
                .chain(outputs)
                .all(|(window, at)| window.has_all(*at))
        {
            return Err(Error::unsupported(format!(
                "{} takes its input in one piece",
                self.name
            )));
        }
        step.show_inputs();
        step.show_outputs(None);
        // SAFETY: the caller's promise.
        unsafe { self.call(step, true, &mut |call| kernel.run(call)) }?;
        step.consumed = step.inputs.iter().map(|chunk| chunk.rows).collect();
        step.written.clone_from(&self.said.written);
        Ok(())
    }

    /// As many rows of each input as there are of all, and as there is room for.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn rows(&mut self, kernel: &mut dyn Run, step: &mut Step<'_>) -> Result<bool, Error> {
        let streamed: Vec<usize> = (0..step.inputs.len())
            .filter(|index| !step.bound.inputs[*index].is_whole())
            .collect();
        step.show_inputs();
        let mut consumed = 0;
        let left = loop {
            let there = streamed.iter().map(|index| step.inputs[*index].rows);
            let left = there.min().unwrap_or(0) - consumed;
            let room = step.room().min().unwrap_or(u64::MAX);
            let rows = streamed.iter().fold(left.min(room), |rows, index| {
                self.kept[*index].at_once(consumed, rows)
            });
            if rows == 0 {
                break left;
            }
            // SAFETY: the caller's promise.
            unsafe { self.show(step, &streamed, consumed, rows) }?;
            step.show_outputs(Some(rows));
            // SAFETY: the caller's promise.
            unsafe { self.call(step, true, &mut |call| kernel.run(call)) }?;
            consumed += rows;
            step.add(&self.said.written);
            if self.said.more {
                return Err(Error::failed(format!(
                    "{} gives a row for a row, and cannot have more in `run`",
                    self.name
                )));
            }
        };
        for index in &streamed {
            step.consumed[*index] = consumed;
        }
        if left > 0 {
            // There was no room; without a row that moved now the host cannot be asked again.
            return Ok(step.last || !step.stands());
        }
        if step.last {
            // What `finish` sees: no new rows, and those before them.
            // SAFETY: the caller's promise.
            unsafe { self.show(step, &streamed, consumed, 0) }?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.finish(kernel, step) }
    }

    /// Shows `rows` rows of each input after `consumed` ones, with those before them.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn show(
        &mut self,
        step: &mut Step<'_>,
        streamed: &[usize],
        consumed: u64,
        rows: u64,
    ) -> Result<(), Error> {
        for index in streamed {
            let (window, chunk) = (&mut step.bound.inputs[*index], step.inputs[*index]);
            // SAFETY: the caller's promise.
            unsafe { self.kept[*index].show(window, chunk, consumed, rows) }?;
        }
        Ok(())
    }

    /// The chunk as it is.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn free(&mut self, kernel: &mut dyn Run, step: &mut Step<'_>) -> Result<bool, Error> {
        step.show_inputs();
        step.show_outputs(None);
        // SAFETY: the caller's promise.
        unsafe { self.call(step, false, &mut |call| kernel.run(call)) }?;
        step.consumed.clone_from(&self.said.consumed);
        step.add(&self.said.written);
        if self.said.more {
            return Ok(true);
        }
        step.show_rest();
        // SAFETY: the caller's promise.
        unsafe { self.finish(kernel, step) }
    }

    /// What comes after the last row.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn finish(&mut self, kernel: &mut dyn Run, step: &mut Step<'_>) -> Result<bool, Error> {
        if !step.last {
            return Ok(false);
        }
        step.show_outputs(None);
        // SAFETY: the caller's promise.
        unsafe { self.call(step, false, &mut |call| kernel.finish(call)) }?;
        step.add(&self.said.written);
        Ok(self.said.more)
    }

    /// One call of one of the kernel's functions on what is shown. `fills`: it writes all rows of each output, unless it
    /// says otherwise.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn call(
        &mut self,
        step: &mut Step<'_>,
        fills: bool,
        function: Function<'_>,
    ) -> Result<(), Error> {
        let rows = |windows: &[Window]| windows.iter().map(Window::piece_rows).collect();
        self.said.consumed = rows(&step.bound.inputs);
        self.said.written = match fills {
            true => rows(&step.bound.outputs),
            false => vec![0; step.bound.outputs.len()],
        };
        self.said.more = false;
        let leaves = Leaves {
            said: &mut self.said,
            extents: &mut self.extents,
            notes: &mut self.notes,
            diagnostic: step.diagnostic,
        };
        let Bound { inputs, outputs } = &*step.bound;
        // SAFETY: mapped and unused by others: the caller's promise. Pieces are parts of chunks, or of what `Kept` holds,
        // which nothing uses meanwhile; outputs meet no other. `Call` yields only `&[T]` of inputs.
        let mut call = unsafe { Call::new(inputs, outputs, self.streaming, leaves) };
        function(&mut call)
    }

    /// Writes the records, and keeps what will be needed again.
    #[expect(unsafe_code, reason = "see `step`")]
    unsafe fn end(&mut self, step: Step<'_>) -> Result<(), Error> {
        for (index, window) in step.bound.inputs.iter().enumerate() {
            let rows = step.consumed[index];
            // A whole input has all of its rows in every chunk.
            if !window.is_whole() {
                self.consumed[index] += rows;
            }
            if !self.over {
                // SAFETY: the caller's promise.
                unsafe { self.kept[index].take(window, step.inputs[index], rows) }?;
            }
            window.moved(rows);
        }
        for (index, window) in step.bound.outputs.iter().enumerate() {
            self.written[index] += step.written[index];
            if let Some(size) = self.extents[index].first_mut() {
                *size = self.written[index];
            }
            window.moved(step.written[index]);
        }
        Ok(())
    }
}

impl Step<'_> {
    /// Whether nothing of a tensor has moved.
    fn stands(&self) -> bool {
        let inputs = self.bound.inputs.iter().zip(&self.consumed);
        let consumed = inputs.filter(|(window, _)| !window.is_whole());
        let mut moved = consumed.map(|(_, rows)| rows).chain(&self.written);
        moved.all(|rows| *rows == 0)
    }

    /// Rows that each output has room for.
    fn room(&self) -> impl Iterator<Item = u64> {
        let outputs = self.outputs.iter().zip(&self.written);
        outputs.map(|(chunk, written)| chunk.rows - written)
    }

    fn add(&mut self, written: &[u64]) {
        for (sum, rows) in self.written.iter_mut().zip(written) {
            *sum += rows;
        }
    }

    /// Shows all rows of all inputs.
    fn show_inputs(&mut self) {
        for (window, chunk) in self.bound.inputs.iter_mut().zip(&self.inputs) {
            window.show_chunk(*chunk, 0, chunk.rows);
        }
    }

    /// Shows what was not consumed.
    fn show_rest(&mut self) {
        let windows = self.bound.inputs.iter_mut().zip(&self.inputs);
        for ((window, chunk), consumed) in windows.zip(&self.consumed) {
            if !window.is_whole() {
                window.show_chunk(*chunk, *consumed, chunk.rows - consumed);
            }
        }
    }

    /// Shows the room that is left, at most that of `rows` rows.
    fn show_outputs(&mut self, rows: Option<u64>) {
        let windows = self.bound.outputs.iter_mut().zip(&self.outputs);
        for ((window, chunk), written) in windows.zip(&self.written) {
            let room = chunk.rows - written;
            window.show_chunk(*chunk, *written, rows.map_or(room, |rows| rows.min(room)));
        }
    }
}
