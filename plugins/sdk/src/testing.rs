//! Runs kernels natively, through the same checks as in a host, at once or in chunks: for tests.

use crate::bindings::strait::kernel::types::{self, Parameter};
use crate::lines::{LINE_BYTES, Lines};
use crate::window::CONTROL_BYTES;
use crate::{Dtype, Element, Entry, Error, Instance, Kernel, Note, Spec, Streaming, Value};
use alloc::{string::ToString, vec, vec::Vec};

/// A tensor with its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, slowest first.
    pub shape: Vec<u64>,
    /// The elements, row-major.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A 1-D tensor.
    #[must_use]
    pub fn new<T: Element>(elements: &[T]) -> Self {
        Self::shaped(elements, &[elements.len() as u64])
    }

    /// A tensor of any shape.
    ///
    /// # Panics
    /// If `shape` does not have as many elements.
    #[must_use]
    #[expect(unsafe_code, reason = "elements are seen as bytes")]
    pub fn shaped<T: Element>(elements: &[T], shape: &[u64]) -> Self {
        assert_eq!(
            Spec::new(T::DTYPE, shape).elements(),
            Some(elements.len()),
            "{shape:?}"
        );
        // SAFETY: an `Element` has no padding, so all of the slice's bytes are initialised.
        let bytes = unsafe {
            core::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), size_of_val(elements))
        };
        Self {
            dtype: T::DTYPE,
            shape: shape.into(),
            bytes: bytes.into(),
        }
    }

    /// Its elements.
    ///
    /// # Panics
    /// If `T` is not the tensor's dtype.
    #[must_use]
    #[expect(unsafe_code, reason = "bytes are seen as elements")]
    pub fn values<T: Element>(&self) -> Vec<T> {
        assert_eq!(self.dtype, T::DTYPE);
        let mut values = vec![T::default(); self.bytes.len() / size_of::<T>()];
        let target = values.as_mut_ptr().cast::<u8>();
        // SAFETY: as many bytes as `values` has at most; all bit patterns of an `Element` are valid; the two are
        // different allocations.
        unsafe { target.copy_from_nonoverlapping(self.bytes.as_ptr(), size_of_val(&*values)) };
        values
    }
}

/// What a successful invocation gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The outputs with their true shapes.
    pub outputs: Vec<Tensor>,
    /// The kernel's notes.
    pub notes: Vec<Note>,
}

/// How a test cuts the rows of a stream, and how much room there is for what comes out.
#[derive(Clone, Debug)]
pub struct Cuts {
    /// None: all rows at once, and room for all.
    random: Option<Random>,
}

#[derive(Clone, Debug)]
struct Random {
    state: u64,
    /// Most rows of a chunk.
    rows_max: u64,
    /// Most rows that there is room for.
    room_max: u64,
}

impl Cuts {
    /// None: everything is there at once.
    #[must_use]
    pub fn none() -> Self {
        Self { random: None }
    }

    /// Chunks of random sizes, among them empty ones and single rows; the same for the same seed.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        const SIZES: [u64; 5] = [1, 2, 7, 40, 1000];
        let mut random = Random {
            state: seed,
            rows_max: 0,
            room_max: 0,
        };
        random.rows_max = *random.one_of(&SIZES);
        random.room_max = *random.one_of(&SIZES);
        Self {
            random: Some(random),
        }
    }

    /// Rows to go on with, of those that are left.
    fn rows(&mut self, left: u64) -> u64 {
        self.random.as_mut().map_or(left, |random| {
            let most = random.rows_max.min(left);
            random.below(most + 1)
        })
    }

    /// Rows to make room for, of those that are left: at least one of them.
    fn room(&mut self, left: u64) -> u64 {
        self.random.as_mut().map_or(left, |random| {
            let most = random.room_max.min(left);
            most.min(1 + random.below(most.max(1)))
        })
    }

    /// Whether the chunk with the last rows says that it is the last: an empty one may come after it.
    fn says_last(&mut self) -> bool {
        self.random
            .as_mut()
            .is_none_or(|random| random.below(2) == 0)
    }

    /// Which of the places where a chunk can lie it takes; first: where it does in the whole tensor.
    fn place(&mut self, at: u64, places: u64) -> u64 {
        self.random
            .as_mut()
            .map_or(at, |random| random.below(places))
    }
}

impl Random {
    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let index = self.below(of.len() as u64);
        &of[usize::try_from(index).unwrap_or(0)]
    }
}

/// Opens, binds and runs kernel `K`.
///
/// # Errors
/// The kernel's or the SDK's.
pub fn invoke<K: Kernel>(
    parameters: &[(&str, Value)],
    inputs: &[Tensor],
) -> Result<Outcome, Error> {
    invoke_in_chunks::<K>(parameters, inputs, Cuts::none())
}

/// As [`invoke`], chunk by chunk: each is there only while the kernel runs on it, and lies somewhere else.
///
/// # Errors
/// The kernel's or the SDK's.
///
/// # Panics
/// If the kernel breaks the contract: it goes on and gets nowhere, for example.
pub fn invoke_in_chunks<K: Kernel>(
    parameters: &[(&str, Value)],
    inputs: &[Tensor],
    cuts: Cuts,
) -> Result<Outcome, Error> {
    Stream::open(const { &[Entry::of::<K>()] }, parameters, inputs)?.run(cuts)
}

/// Checks that what `K` gives does not depend on how its rows are cut, bit for bit, by some hundred random ways to cut
/// them.
///
/// # Panics
/// If it does; the message has the seed for [`Cuts::random`] and the output.
pub fn assert_streams<K: Kernel>(parameters: &[(&str, Value)], inputs: &[Tensor]) {
    assert!(
        K::STREAMING != Streaming::Whole,
        "{} does not stream",
        K::NAME
    );
    let name = K::NAME;
    let at_once = invoke::<K>(parameters, inputs)
        .unwrap_or_else(|error| panic!("{name}: {error:?} of the whole tensors"));
    for seed in 0..100 {
        let cut = invoke_in_chunks::<K>(parameters, inputs, Cuts::random(seed))
            .unwrap_or_else(|error| panic!("{name}, seed {seed}: {error:?}"));
        for (index, (cut, at_once)) in cut.outputs.iter().zip(&at_once.outputs).enumerate() {
            assert_eq!(
                cut.shape, at_once.shape,
                "{name}, seed {seed}: output {index}"
            );
            let differs = cut.bytes.iter().zip(&at_once.bytes);
            let differs = differs.take_while(|(a, b)| a == b).count();
            assert!(
                differs == at_once.bytes.len(),
                "{name}, seed {seed}: output {index} differs from byte {differs} of {} on",
                at_once.bytes.len()
            );
        }
        assert_eq!(
            format_notes(&cut),
            format_notes(&at_once),
            "{name}, seed {seed}"
        );
    }
}

fn format_notes(outcome: &Outcome) -> Vec<(&str, &str)> {
    let notes = outcome.notes.iter();
    notes.map(|note| (&*note.key, &*note.text)).collect()
}

/// What an untouched byte holds.
const POISON: u8 = 0xA5;

/// An invocation, with the host's part of it.
struct Stream<'t> {
    instance: Instance,
    inputs: &'t [Tensor],
    /// Whether an input comes whole.
    whole: Vec<bool>,
    /// Inputs, then outputs.
    specs: Vec<Spec>,
    /// The lines where each tensor starts.
    starts: Vec<usize>,
    /// A line for each record, then each tensor on lines of its own.
    memory: Lines,
}

impl<'t> Stream<'t> {
    #[expect(unsafe_code, reason = "this is the host's part")]
    fn open(
        kernels: &'static [Entry],
        parameters: &[(&str, Value)],
        inputs: &'t [Tensor],
    ) -> Result<Self, Error> {
        let mut instance = Instance::new(kernels);
        let given = parameters.iter().map(|(name, value)| Parameter {
            name: (*name).to_string(),
            value: value.clone(),
        });
        let mut specs: Vec<Spec> = inputs
            .iter()
            .map(|tensor| Spec::new(tensor.dtype, tensor.shape.clone()))
            .collect();
        let outputs = instance.open(kernels[0].name, given.collect(), specs.clone())?;
        specs.extend(outputs);
        let mut lines = specs.len();
        let place = |spec: &Spec| {
            let start = lines;
            lines += bytes_of(spec).div_ceil(LINE_BYTES);
            start
        };
        let starts = specs.iter().map(place).collect();
        let mut stream = Self {
            instance,
            inputs,
            whole: kernels[0].inputs.iter().map(|p| p.is_whole()).collect(),
            specs,
            starts,
            memory: Lines::filled(lines, POISON),
        };
        let address = stream.memory.address();
        // SAFETY: `memory` is used for windows and records only, and never while the instance runs.
        unsafe {
            stream
                .instance
                .set_reserved(address..address + lines * LINE_BYTES)
        };
        let tensor = |index: usize| types::Tensor {
            address: (address + stream.starts[index] * LINE_BYTES) as u64,
            bytes: bytes_of(&stream.specs[index]) as u64,
            control: (address + index * CONTROL_BYTES) as u64,
            spec: stream.specs[index].clone(),
        };
        let (of_inputs, of_outputs) = (0..inputs.len(), inputs.len()..stream.specs.len());
        let (of_inputs, of_outputs) = (of_inputs.map(tensor), of_outputs.map(tensor));
        let (of_inputs, of_outputs) = (of_inputs.collect(), of_outputs.collect());
        stream.instance.bind(of_inputs, of_outputs)?;
        Ok(stream)
    }

    #[expect(unsafe_code, reason = "this is the host's part")]
    fn run(mut self, mut cuts: Cuts) -> Result<Outcome, Error> {
        let count = self.specs.len();
        let rows: Vec<u64> = self.specs.iter().map(Spec::rows).collect();
        let (mut there, mut moved) = (vec![0; count], vec![0; count]);
        let mut written = vec![Vec::new(); count - self.inputs.len()];
        let (mut again, mut last) = (false, false);
        loop {
            for index in 0..self.inputs.len() {
                if self.whole[index] {
                    there[index] = rows[index];
                } else if !again {
                    there[index] += cuts.rows(rows[index] - there[index]);
                }
            }
            let given = there.iter().zip(&rows).take(self.inputs.len());
            last |= given.fold(true, |all, (a, b)| all & (a == b)) && cuts.says_last();
            for index in self.inputs.len()..count {
                there[index] = moved[index] + cuts.room(rows[index] - moved[index]);
            }
            let places = self.lay(&mut cuts, &there, &moved);
            // It was written to by other ways since the instance was told of it.
            self.memory.address();
            // SAFETY: all windows lie in `memory`, which nothing else uses during the call.
            let answer = unsafe { self.instance.run(u32::from(last)) };
            if answer == 1 {
                return Err(self.instance.last_error().error);
            }
            let mut stands = true;
            for index in 0..count {
                let (record, start) = (self.bytes(index, 24..32), places[index]);
                let step = u64::from_le_bytes(record.try_into().expect("8 bytes"));
                let room = there[index] - moved[index];
                assert!(step <= room, "{step} rows moved, there were {room}");
                if self.whole.get(index) == Some(&true) {
                    continue;
                }
                moved[index] += step;
                stands &= step == 0;
                let bytes = row_bytes(&self.specs[index]);
                let laid = self.tensor(index, start..start + bytes * as_index(room));
                if let Some(output) = index.checked_sub(count - written.len()) {
                    written[output].extend_from_slice(&laid[..bytes * as_index(step)]);
                }
                laid.fill(POISON);
            }
            assert!(answer == 0 || answer == 2, "`run` answered {answer}");
            again = answer == 2;
            assert!(!again || !stands, "it wants to go on and nothing moved");
            if last && !again {
                return Ok(self.outcome(written, &moved));
            }
        }
    }

    /// Lays out what there is between `moved` and `there`; the bytes from each tensor's start to it.
    fn lay(&mut self, cuts: &mut Cuts, there: &[u64], moved: &[u64]) -> Vec<usize> {
        let mut places = Vec::new();
        for index in 0..self.specs.len() {
            let whole = self.whole.get(index) == Some(&true);
            let spec = &self.specs[index];
            let (bytes, all) = (row_bytes(spec), spec.rows());
            let first = if whole { 0 } else { moved[index] };
            let rows = there[index] - first;
            let place = match whole {
                true => 0,
                false => cuts.place(first, all - rows + 1),
            };
            let place = as_index(place) * bytes;
            let record = [first, rows, place as u64, 0, 0, 0, 0, 0];
            let record: Vec<u8> = record.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.memory.bytes_mut()[index * CONTROL_BYTES..][..CONTROL_BYTES]
                .copy_from_slice(&record);
            if let Some(tensor) = self.inputs.get(index) {
                let from = as_index(first) * bytes;
                let length = as_index(rows) * bytes;
                let bytes = &tensor.bytes[from..from + length];
                self.tensor(index, place..place + length)
                    .copy_from_slice(bytes);
            }
            places.push(place);
        }
        places
    }

    fn outcome(&self, written: Vec<Vec<u8>>, moved: &[u64]) -> Outcome {
        let first = self.inputs.len();
        let extents = self.instance.extents().into_iter().zip(written);
        let outputs = extents.enumerate().map(|(index, (extent, mut bytes))| {
            let spec = Spec::new(self.specs[first + index].dtype, extent.shape.clone());
            assert_eq!(spec.rows(), moved[first + index], "rows of its records");
            // Only where all is there at once can rows be shorter than announced: then they lie at the start.
            bytes.truncate(bytes_of(&spec));
            Tensor {
                dtype: spec.dtype,
                shape: extent.shape,
                bytes,
            }
        });
        Outcome {
            outputs: outputs.collect(),
            notes: self.instance.notes(),
        }
    }

    fn bytes(&mut self, record: usize, range: core::ops::Range<usize>) -> &[u8] {
        &self.memory.bytes_mut()[record * CONTROL_BYTES..][range]
    }

    fn tensor(&mut self, index: usize, range: core::ops::Range<usize>) -> &mut [u8] {
        let start = self.starts[index] * LINE_BYTES;
        &mut self.memory.bytes_mut()[start + range.start..start + range.end]
    }
}

fn as_index(number: u64) -> usize {
    usize::try_from(number).expect("a test's tensors are small")
}

fn row_bytes(spec: &Spec) -> usize {
    let rest = spec.shape.get(1..).unwrap_or_default();
    let row = Spec::new(spec.dtype, rest);
    match spec.rows() {
        0 => 0,
        _ => bytes_of(&row),
    }
}

fn bytes_of(spec: &Spec) -> usize {
    spec.elements().expect("a test's tensors are small") * as_index(spec.dtype.bytes())
}
