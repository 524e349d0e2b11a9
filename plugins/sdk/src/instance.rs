//! One instance's states: opened, bound, run. Everything but the ABI itself, so that it is tested natively.

use crate::bindings::strait::kernel::types::{Description, Extent, Failure, Parameter, Tensor};
use crate::call::{Call, Window};
use crate::kernel::{Entry, Port, Run};
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
    extents: Vec<Vec<u64>>,
    notes: Vec<Note>,
}

impl core::fmt::Debug for Opened {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Opened")
            .field("kernel", &self.entry.name)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Bound {
    inputs: Vec<Window>,
    outputs: Vec<Window>,
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
        let (kernel, outputs) = (entry.open)(parameters, &inputs)?;
        check_outputs(entry, &outputs)?;
        self.opened = Some(Opened {
            entry,
            kernel,
            inputs,
            outputs: outputs.clone(),
            bound: None,
            extents: Vec::new(),
            notes: Vec::new(),
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

    /// Calls the kernel; 0 is success, 1 is an error to be fetched by [`last_error`](Self::last_error).
    ///
    /// # Safety
    /// The windows that were bound are mapped: the inputs' readable, the outputs' writable, and nothing else
    /// in this instance uses them before the function returns.
    #[expect(unsafe_code, reason = "only the host knows whether the windows are in")]
    pub unsafe fn run(&mut self, mode: u32) -> u32 {
        // SAFETY: the caller's promise is the same one.
        match unsafe { self.try_run(mode) } {
            Ok(()) => 0,
            Err(error) => {
                self.last_error = Some(error);
                1
            }
        }
    }

    #[expect(unsafe_code, reason = "see `run`")]
    unsafe fn try_run(&mut self, mode: u32) -> Result<(), Error> {
        let opened = self
            .opened
            .as_mut()
            .ok_or_else(|| Error::failed("run: nothing is open"))?;
        let bound = opened
            .bound
            .as_ref()
            .ok_or_else(|| Error::failed("run: nothing is bound"))?;
        let mut windows = bound.inputs.iter().chain(&bound.outputs);
        if mode & 1 == 0 || !windows.all(Window::is_whole) {
            return Err(Error::unsupported(format!(
                "{} takes its input in one piece",
                opened.entry.name
            )));
        }
        self.diagnostic.clear();
        opened.notes.clear();
        opened.extents.clear();
        opened
            .extents
            .extend(opened.outputs.iter().map(|spec| spec.shape.clone()));
        // SAFETY: mapped and unused by others: the caller's promise. Outputs meet no other range, and all
        // lie in memory reserved for this: `bind`. Inputs are only read: `Call` yields `&[T]` of them.
        let mut call = unsafe {
            Call::new(
                &bound.inputs,
                &bound.outputs,
                &mut opened.extents,
                &mut opened.notes,
                &mut self.diagnostic,
            )
        };
        opened.kernel.run(&mut call)?;
        call.finish();
        Ok(())
    }

    /// The outputs' true shapes; empty before the first successful `run`.
    #[must_use]
    pub fn extents(&self) -> Vec<Extent> {
        let opened = self.opened.iter();
        opened
            .flat_map(|opened| &opened.extents)
            .map(|shape| Extent {
                shape: shape.clone(),
            })
            .collect()
    }

    /// What the kernel noted in its last `run`.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        self.opened
            .iter()
            .flat_map(|opened| &opened.notes)
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
                port.name(),
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
mod tests {
    use super::*;
    use crate::{Dtype, Kernel, Port};
    use alloc::{string::String, vec};

    /// Copies its first input; fails when that starts with 0.
    struct Copy;

    impl Kernel for Copy {
        const NAME: &str = "copy";
        const DOC: &str = "y = x";
        const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Uint8], "").rank(1, 1)];
        const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Uint8], "").rank(1, 1)];
        type Parameters = ();

        fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
            Ok((Self, inputs.to_vec()))
        }

        fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
            let x = call.input::<u8>(0)?;
            let mut y = call.output::<u8>(0)?;
            if x.first() == Some(&0) {
                let block = [&x[..], &[8; 5000]].concat();
                call.diagnose(&block);
                return Err(Error::failed("it starts with 0"));
            }
            y.copy_from_slice(&x);
            assert!(
                matches!(call.input::<i8>(0), Err(Error::Failed(_))),
                "another dtype"
            );
            assert!(
                matches!(call.output::<u8>(0), Err(Error::Failed(_))),
                "a second time"
            );
            assert!(
                call.set_shape(0, &[x.len() as u64 + 1]).is_err(),
                "beyond the bound"
            );
            call.set_shape(0, &[x.len() as u64 - 1])?;
            call.note("seen", "all");
            Ok(())
        }
    }

    const KERNELS: &[Entry] = &[Entry::of::<Copy>()];

    #[repr(C, align(64))]
    struct Memory([u8; 512]);

    /// An instance with `copy` open on 100 bytes, and its memory: records at 0 and 64, tensors at 128 and 256.
    struct Bench {
        instance: Instance,
        memory: alloc::boxed::Box<Memory>,
    }

    impl Bench {
        #[expect(unsafe_code, reason = "this is the host's part")]
        fn new() -> Self {
            let mut memory = alloc::boxed::Box::new(Memory([7; 512]));
            let start = memory.0.as_mut_ptr().expose_provenance();
            let mut instance = Instance::new(KERNELS);
            // SAFETY: the tests use the memory only between runs.
            unsafe { instance.set_reserved(start..start + 512) };
            instance
                .open("copy", vec![], vec![Spec::new(Dtype::Uint8, [100])])
                .expect("valid");
            Self { instance, memory }
        }

        fn tensor(&self, address: u64, control: u64) -> Tensor {
            let start = self.memory.0.as_ptr().addr() as u64;
            let spec = Spec::new(Dtype::Uint8, [100]);
            Tensor {
                address: start + address,
                bytes: 100,
                control: start + control,
                spec,
            }
        }

        fn bind(&mut self, x: Tensor, y: Tensor) -> Result<(), Error> {
            self.instance.bind(vec![x], vec![y])
        }

        /// With all 100 rows in, and room for as many.
        fn run(&mut self, mode: u32) -> u32 {
            for record in [0, 64] {
                self.write(record, 100);
            }
            self.step(mode)
        }

        fn write(&mut self, record: usize, rows: u64) {
            self.memory.0[record..record + 64].fill(0);
            self.memory.0[record + 8..record + 16].copy_from_slice(&rows.to_le_bytes());
        }

        #[expect(unsafe_code, reason = "this is the host's part")]
        fn step(&mut self, mode: u32) -> u32 {
            // SAFETY: all windows lie in `memory`, which nothing uses meanwhile.
            unsafe { self.instance.run(mode) }
        }

        fn word(&self, at: usize) -> u64 {
            u64::from_le_bytes(*self.memory.0[at..].first_chunk().expect("inside"))
        }
    }

    fn failure(error: &Error) -> String {
        match error {
            Error::Failed(reason) | Error::Unsupported(reason) => reason.clone(),
            Error::BadArgument(bad) => format!("{}: {}", bad.name, bad.reason),
        }
    }

    #[test]
    fn a_whole_invocation_twice() {
        let mut bench = Bench::new();
        bench
            .bind(bench.tensor(128, 0), bench.tensor(256, 64))
            .expect("all in place");
        for round in 1..3 {
            bench.memory.0[128..228].fill(round);
            assert_eq!(bench.run(1), 0);
            assert_eq!(bench.memory.0[256..356], [round; 100]);
            assert_eq!(bench.instance.extents(), [Extent { shape: vec![99] }]);
            assert_eq!(
                bench.instance.notes().len(),
                1,
                "notes of earlier runs are gone"
            );
            assert_eq!(bench.word(24), 100, "rows that were consumed");
            assert_eq!(bench.word(64 + 24), 99, "rows that were written");
        }
    }

    #[test]
    fn what_comes_in_the_wrong_order_is_an_error() {
        let mut bench = Bench::new();
        assert_eq!(bench.run(1), 1);
        assert_eq!(
            failure(&bench.instance.last_error().error),
            "run: nothing is bound"
        );
        bench
            .bind(bench.tensor(128, 0), bench.tensor(256, 64))
            .expect("all in place");
        assert_eq!(bench.run(0), 1);
        assert_eq!(
            failure(&bench.instance.last_error().error),
            "copy takes its input in one piece"
        );
        for (record, rows) in [(0, 99), (64, 50)] {
            bench.write(64 - record, 100);
            bench.write(record, rows);
            assert_eq!(bench.step(1), 1);
            assert_eq!(
                failure(&bench.instance.last_error().error),
                "copy takes its input in one piece"
            );
        }
        bench.memory.0[128] = 0;
        assert_eq!(bench.run(1), 1);
        let told = bench.instance.last_error();
        assert_eq!(failure(&told.error), "it starts with 0");
        assert_eq!(
            told.diagnostic,
            [bench.memory.0[128..228].to_vec(), vec![8; 3996]].concat()
        );
        bench.memory.0[128] = 1;
        assert_eq!(bench.run(1), 0);
        assert_eq!(bench.instance.last_error().diagnostic, []);

        let unknown = bench
            .instance
            .open("paste", vec![], vec![])
            .expect_err("no such kernel");
        assert_eq!(
            failure(&unknown),
            "no kernel \"paste\": this plugin has copy"
        );
        let unbound = bench
            .bind(bench.tensor(128, 0), bench.tensor(256, 64))
            .expect_err("not open");
        assert_eq!(failure(&unbound), "bind: nothing is open");
    }

    #[test]
    fn inputs_are_checked_against_the_ports() {
        let mut bench = Bench::new();
        let mut refusal = |inputs: Vec<Spec>| {
            failure(
                &bench
                    .instance
                    .open("copy", vec![], inputs)
                    .expect_err("refused"),
            )
        };
        assert_eq!(refusal(vec![]), "copy: it takes 1 inputs; given: 0");
        assert_eq!(
            refusal(vec![Spec::new(Dtype::Int8, [1])]),
            "x: it takes uint8; given: int8"
        );
        assert_eq!(
            refusal(vec![Spec::new(Dtype::Uint8, [1, 1])]),
            "x: it takes tensors of 1 to 1 axes; given: 2"
        );
        assert_eq!(
            refusal(vec![Spec::new(Dtype::Uint8, [u64::MAX])]),
            "x: [18446744073709551615] of uint8 is more than a plugin can address"
        );
    }

    #[test]
    fn other_tensors_than_opened_are_an_error() {
        let mut bench = Bench::new();
        let mut x = bench.tensor(128, 0);
        x.spec.shape = vec![101];
        let y = bench.tensor(256, 64);
        let error = bench.bind(x, y).expect_err("another shape");
        assert!(failure(&error).starts_with("x: bind: "), "{error:?}");
        let error = bench.instance.bind(vec![], vec![]).expect_err("no tensors");
        assert_eq!(failure(&error), "bind: 0 tensors where `open` had 1");
    }

    #[test]
    #[should_panic(expected = "is no multiple of 64")]
    fn an_unaligned_window_panics() {
        let mut bench = Bench::new();
        let _ = bench.bind(bench.tensor(136, 0), bench.tensor(256, 64));
    }

    #[test]
    #[should_panic(expected = "is outside")]
    fn a_window_beyond_the_reserved_memory_panics() {
        let mut bench = Bench::new();
        let _ = bench.bind(bench.tensor(128, 0), bench.tensor(448, 64));
    }

    #[test]
    #[should_panic(expected = "is outside")]
    fn a_window_at_the_end_of_the_address_space_panics() {
        let mut bench = Bench::new();
        let mut y = bench.tensor(256, 64);
        y.address = u64::MAX - 63;
        let _ = bench.bind(bench.tensor(128, 0), y);
    }

    #[test]
    #[should_panic(expected = "bound 99 bytes, its spec has 100")]
    fn a_window_of_another_size_panics() {
        let mut bench = Bench::new();
        let mut x = bench.tensor(128, 0);
        x.bytes = 99;
        let _ = bench.bind(x, bench.tensor(256, 64));
    }

    #[test]
    #[should_panic(expected = "meets the tensor")]
    fn an_output_over_an_input_panics() {
        let mut bench = Bench::new();
        let _ = bench.bind(bench.tensor(128, 0), bench.tensor(192, 64));
    }

    #[test]
    #[should_panic(expected = "chunk record")]
    fn a_record_inside_a_window_panics() {
        let mut bench = Bench::new();
        let _ = bench.bind(bench.tensor(128, 0), bench.tensor(256, 320));
    }
}
