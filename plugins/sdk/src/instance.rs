//! One instance's states: opened, bound, run. Everything but the ABI itself, so that it is tested natively.

use crate::bindings::strait::kernel::types::{Description, Extent, Failure, Parameter, Tensor};
use crate::kernel::{Entry, Port};
use crate::steps::{Bound, Run, Steps};
use crate::window::Window;
use crate::{Error, Note, Plugin, Spec};
use alloc::{boxed::Box, format, vec::Vec};
use core::ops::Range;

/// The state behind a plugin's exports.
#[derive(Debug)]
pub struct Instance {
    kernels: &'static [Entry],
    reserved: Range<usize>,
    opened: Option<Opened>,
    last_error: Option<Error>,
    /// Bytes to go with `last_error`.
    diagnostic: Vec<u8>,
}

struct Opened {
    entry: &'static Entry,
    kernel: Box<dyn Run>,
    inputs: Vec<Spec>,
    outputs: Vec<Spec>,
    bound: Option<Bound>,
    steps: Steps,
}

impl core::fmt::Debug for Opened {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Opened")
            .field("kernel", &self.entry.name)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

impl Instance {
    /// An instance in which nothing is open.
    #[must_use]
    pub const fn new(kernels: &'static [Entry]) -> Self {
        Self {
            kernels,
            reserved: 0..0,
            opened: None,
            last_error: None,
            diagnostic: Vec::new(),
        }
    }

    #[cfg(target_arch = "wasm32")]
    pub(crate) fn set_kernels(&mut self, kernels: &'static [Entry]) {
        self.kernels = kernels;
    }

    /// What `describe` answers.
    #[must_use]
    pub fn describe<P: Plugin>() -> Description {
        Description {
            abi: 1,
            name: P::NAME.into(),
            version: P::VERSION.into(),
            kernels: P::KERNELS.iter().map(|entry| (entry.describe)()).collect(),
            panic_record: crate::panic::address(),
        }
    }

    /// Starts an invocation, or starts over.
    ///
    /// # Errors
    /// The kernel's own, or what its declaration does not allow.
    pub fn open(
        &mut self,
        kernel: &str,
        parameters: Vec<Parameter>,
        inputs: Vec<Spec>,
    ) -> Result<Vec<Spec>, Error> {
        self.opened = None;
        self.last_error = None;
        let entry = self
            .kernels
            .iter()
            .find(|entry| entry.name == kernel)
            .ok_or_else(|| {
                let names: Vec<&str> = self.kernels.iter().map(|entry| entry.name).collect();
                Error::unsupported(format!(
                    "no kernel {kernel:?}: this plugin has {}",
                    names.join(", ")
                ))
            })?;
        if inputs.len() != entry.inputs.len() {
            let (takes, given) = (entry.inputs.len(), inputs.len());
            return Err(Error::bad_argument(
                kernel,
                format!("it takes {takes} inputs; given: {given}"),
            ));
        }
        entry
            .inputs
            .iter()
            .zip(&inputs)
            .try_for_each(|(port, spec)| port.check(spec))?;
        let (kernel, outputs, history) = (entry.open)(parameters, &inputs)?;
        check_outputs(entry, &outputs)?;
        entry.check_streams(history, &inputs, &outputs)?;
        self.opened = Some(Opened {
            entry,
            kernel,
            inputs,
            outputs: outputs.clone(),
            bound: None,
            steps: Steps::new(entry.name, entry.streaming, history),
        });
        Ok(outputs)
    }

    /// The memory in which windows and chunk records will lie.
    ///
    /// # Safety
    /// Nothing but windows and records ever lies in that range; in particular the allocator does not own it,
    /// and it does not start at 0.
    #[expect(unsafe_code, reason = "every window's soundness rests on this range")]
    pub unsafe fn set_reserved(&mut self, reserved: Range<usize>) {
        self.reserved = reserved;
    }

    /// Takes note of where the tensors will be.
    ///
    /// # Errors
    /// [`Error::Failed`] if nothing is open, or if the tensors are not those of `open`.
    ///
    /// # Panics
    /// If an address is not what the host promises: unaligned, outside the reserved memory, or in the way of
    /// another one.
    pub fn bind(&mut self, inputs: Vec<Tensor>, outputs: Vec<Tensor>) -> Result<(), Error> {
        let opened = self
            .opened
            .as_mut()
            .ok_or_else(|| Error::failed("bind: nothing is open"))?;
        let bound = Bound {
            inputs: windows(opened.entry.inputs, &opened.inputs, inputs, &self.reserved)?,
            outputs: windows(
                opened.entry.outputs,
                &opened.outputs,
                outputs,
                &self.reserved,
            )?,
        };
        assert_apart(&bound);
        opened.bound = Some(bound);
        Ok(())
    }

    /// Calls the kernel on a chunk. Bit 0 of `mode`: it is the last one. 0 is success, 2 that it is to be called again
    /// with what is left, 1 an error to be fetched by [`last_error`](Self::last_error).
    ///
    /// # Panics
    /// If a chunk record is not what the host promises: rows beyond the tensor, or other ones than come next.
    ///
    /// # Safety
    /// The chunks of the windows that were bound are mapped: the inputs' readable, the outputs' writable, and nothing else
    /// in this instance uses them before the function returns.
    #[expect(unsafe_code, reason = "only the host knows whether the windows are in")]
    pub unsafe fn run(&mut self, mode: u32) -> u32 {
        // SAFETY: the caller's promise is the same one.
        match unsafe { self.try_run(mode) } {
            Ok(false) => 0,
            Ok(true) => 2,
            Err(error) => {
                self.last_error = Some(error);
                1
            }
        }
    }

    #[expect(unsafe_code, reason = "see `run`")]
    unsafe fn try_run(&mut self, mode: u32) -> Result<bool, Error> {
        let opened = self
            .opened
            .as_mut()
            .ok_or_else(|| Error::failed("run: nothing is open"))?;
        let bound = opened
            .bound
            .as_mut()
            .ok_or_else(|| Error::failed("run: nothing is bound"))?;
        self.diagnostic.clear();
        let (kernel, last) = (&mut *opened.kernel, mode & 1 == 1);
        // SAFETY: mapped and unused by others: the caller's promise. Outputs meet no other range, and all
        // lie in memory reserved for this: `bind`.
        unsafe { opened.steps.step(kernel, bound, &mut self.diagnostic, last) }
    }

    /// The outputs' true shapes, as far as they have come; empty before the first `run`.
    #[must_use]
    pub fn extents(&self) -> Vec<Extent> {
        let opened = self.opened.iter();
        opened
            .flat_map(|opened| &opened.steps.extents)
            .map(|shape| Extent {
                shape: shape.clone(),
            })
            .collect()
    }

    /// What the kernel noted in its last `run`, or since its first chunk.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        self.opened
            .iter()
            .flat_map(|opened| &opened.steps.notes)
            .cloned()
            .collect()
    }

    /// Why `run` answered 1.
    #[must_use]
    pub fn last_error(&self) -> Failure {
        let error = self.last_error.clone();
        Failure {
            error: error.unwrap_or_else(|| Error::failed("no error has happened")),
            diagnostic: self.diagnostic.clone(),
        }
    }
}

fn check_outputs(entry: &Entry, outputs: &[Spec]) -> Result<(), Error> {
    if outputs.len() != entry.outputs.len() {
        let (has, answered) = (entry.outputs.len(), outputs.len());
        return Err(Error::failed(format!(
            "{} declares {has} outputs and its `open` answered {answered}",
            entry.name
        )));
    }
    entry
        .outputs
        .iter()
        .zip(outputs)
        .try_for_each(|(port, spec)| port.check(spec))
}

fn windows(
    ports: &'static [Port],
    specs: &[Spec],
    tensors: Vec<Tensor>,
    reserved: &Range<usize>,
) -> Result<Vec<Window>, Error> {
    if tensors.len() != specs.len() {
        let (has, given) = (specs.len(), tensors.len());
        return Err(Error::failed(format!(
            "bind: {given} tensors where `open` had {has}"
        )));
    }
    ports
        .iter()
        .zip(specs)
        .zip(tensors)
        .map(|((port, spec), tensor)| {
            let Tensor {
                address,
                bytes,
                control,
                spec: bound,
            } = tensor;
            if bound.dtype != spec.dtype || bound.shape != spec.shape {
                let reason = format!("bind: {bound:?} where `open` had {spec:?}");
                return Err(Error::bad_argument(port.name(), reason));
            }
            Ok(Window::new(
                (port.name(), port.is_whole()),
                (address, bytes, control),
                bound,
                reserved,
            ))
        })
        .collect()
}

/// An output meets nothing else and no record meets a window. Inputs may share memory: they are only read.
fn assert_apart(bound: &Bound) {
    let all = || bound.inputs.iter().chain(&bound.outputs);
    for (index, output) in bound.outputs.iter().enumerate() {
        let others = bound.inputs.iter().chain(&bound.outputs[..index]);
        for other in others {
            let (a, b) = (output.tensor_range(), other.tensor_range());
            assert!(!meet(&a, &b), "output at {a:?} meets the tensor at {b:?}");
        }
    }
    for record in all().map(Window::control_range) {
        for tensor in all().map(Window::tensor_range) {
            assert!(
                !meet(&record, &tensor),
                "chunk record at {record:?} meets the tensor at {tensor:?}"
            );
        }
    }
}

fn meet(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

#[cfg(test)]
mod tests;
