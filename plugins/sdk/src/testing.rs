//! Runs kernels natively, through the same checks as in a host: for tests.

use crate::bindings::strait::kernel::types::{self, Parameter};
use crate::call::CONTROL_BYTES;
use crate::{Dtype, Element, Entry, Error, Instance, Kernel, Note, Spec, Value};
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

/// Memory that starts on a multiple of 64.
#[derive(Clone)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Opens, binds and runs kernel `K`.
///
/// # Errors
/// The kernel's or the SDK's.
pub fn invoke<K: Kernel>(
    parameters: &[(&str, Value)],
    inputs: &[Tensor],
) -> Result<Outcome, Error> {
    invoke_entry(const { &[Entry::of::<K>()] }, K::NAME, parameters, inputs)
}

#[expect(unsafe_code, reason = "this is the host's part")]
fn invoke_entry(
    kernels: &'static [Entry],
    name: &str,
    parameters: &[(&str, Value)],
    inputs: &[Tensor],
) -> Result<Outcome, Error> {
    let mut instance = Instance::new(kernels);
    let given = parameters.iter().map(|(name, value)| Parameter {
        name: (*name).to_string(),
        value: value.clone(),
    });
    let input_specs: Vec<Spec> = inputs
        .iter()
        .map(|tensor| Spec::new(tensor.dtype, tensor.shape.clone()))
        .collect();
    let output_specs = instance.open(name, given.collect(), input_specs.clone())?;

    // One line for each record, then each tensor on its own lines.
    let specs: Vec<&Spec> = input_specs.iter().chain(&output_specs).collect();
    let mut lines = specs.len();
    let starts: Vec<usize> = specs
        .iter()
        .map(|spec| {
            let start = lines;
            lines += bytes_of(spec).div_ceil(64);
            start
        })
        .collect();
    // 0xA5: outputs hold arbitrary values before a run.
    let mut memory = vec![Line([0xA5; 64]); lines];
    for (record, spec) in memory.iter_mut().zip(&specs) {
        let rows = spec.shape.first().copied().unwrap_or(1);
        record.0.fill(0);
        record.0[8..16].copy_from_slice(&rows.to_le_bytes());
    }
    let base = memory.as_mut_ptr();
    let address = base.expose_provenance();
    for (tensor, &start) in inputs.iter().zip(&starts) {
        // SAFETY: `start` counts lines of `memory`.
        let target = unsafe { base.add(start) }.cast::<u8>();
        // SAFETY: the tensor's lines hold its bytes; `memory` is an allocation of its own.
        unsafe { target.copy_from_nonoverlapping(tensor.bytes.as_ptr(), tensor.bytes.len()) };
    }
    // SAFETY: `memory` is used for windows and records only, until it is read below.
    unsafe { instance.set_reserved(address..address + lines * 64) };
    let tensor = |index: usize| types::Tensor {
        address: (address + starts[index] * 64) as u64,
        bytes: bytes_of(specs[index]) as u64,
        control: (address + index * CONTROL_BYTES) as u64,
        spec: specs[index].clone(),
    };
    let (inputs_bound, outputs_bound) = (0..inputs.len(), inputs.len()..specs.len());
    instance.bind(
        inputs_bound.map(tensor).collect(),
        outputs_bound.clone().map(tensor).collect(),
    )?;
    // SAFETY: all windows lie in `memory`, which nothing else uses during the call.
    if unsafe { instance.run(1) } != 0 {
        return Err(instance.last_error().error);
    }
    let outputs = outputs_bound
        .zip(instance.extents())
        .map(|(index, extent)| {
            let bytes = bytes_of(&Spec::new(specs[index].dtype, extent.shape.clone()));
            // SAFETY: as above, within `memory`.
            let source = unsafe { base.add(starts[index]) }.cast::<u8>();
            // SAFETY: the extent is at most the spec's size; all bytes of `memory` are initialised.
            let bytes = unsafe { core::slice::from_raw_parts(source, bytes) }.to_vec();
            Tensor {
                dtype: specs[index].dtype,
                shape: extent.shape,
                bytes,
            }
        })
        .collect();
    Ok(Outcome {
        outputs,
        notes: instance.notes(),
    })
}

fn bytes_of(spec: &Spec) -> usize {
    spec.elements().expect("a test's tensors are small")
        * usize::try_from(spec.dtype.bytes()).expect("at most 16")
}
