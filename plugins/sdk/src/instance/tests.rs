//! Instances as a host drives them.

use super::*;
use crate::{Call, Dtype, Kernel, Port};
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

/// Copies, row for row.
struct Echo;

impl Kernel for Echo {
    const NAME: &str = "echo";
    const DOC: &str = "";
    const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Uint8], "").rank(1, 1)];
    const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Uint8], "").rank(1, 1)];
    const STREAMING: crate::Streaming = crate::Streaming::Rows;
    type Parameters = ();

    fn open((): (), inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self, inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<u8>(0)?;
        assert!(!x.is_empty(), "a chunk without rows asks for nothing");
        call.output::<u8>(0)?.copy_from_slice(&x);
        Ok(())
    }
}

/// A stream that is open, with x at 128 and y at 256.
fn stream() -> Bench {
    let mut bench = Bench::new();
    bench.instance.kernels = const { &[Entry::of::<Echo>()] };
    let spec = Spec::new(Dtype::Uint8, [100]);
    let opened = bench.instance.open("echo", vec![], vec![spec]);
    opened.expect("valid");
    bench
        .bind(bench.tensor(128, 0), bench.tensor(256, 64))
        .expect("all in place");
    for (value, byte) in (0..100).zip(&mut bench.memory.0[128..228]) {
        *byte = value;
    }
    bench
}

impl Bench {
    /// One step with these chunks: first row, rows, offset. The answer, and what moved.
    fn chunk(&mut self, x: [u64; 3], y: [u64; 3], mode: u32) -> (u32, u64, u64) {
        for (record, words) in [(0, x), (64, y)] {
            self.memory.0[record..record + 64].fill(0);
            for (word, value) in words.iter().enumerate() {
                let at = record + 8 * word;
                self.memory.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        let answer = self.step(mode);
        (answer, self.word(24), self.word(64 + 24))
    }
}

#[test]
fn a_stream_step_by_step() {
    let mut bench = stream();
    // Nothing there; no room; room for less; the rest of the chunk; what lies elsewhere.
    assert_eq!(bench.chunk([0, 0, 0], [0, 100, 0], 0), (0, 0, 0));
    assert_eq!(bench.chunk([0, 10, 0], [0, 0, 0], 0), (0, 0, 0));
    assert_eq!(bench.chunk([0, 10, 0], [0, 4, 0], 0), (2, 4, 4));
    assert_eq!(bench.memory.0[256..261], [0, 1, 2, 3, 7]);
    assert_eq!(bench.chunk([4, 6, 4], [4, 9, 90], 0), (0, 6, 6));
    assert_eq!(bench.memory.0[345..353], [7, 4, 5, 6, 7, 8, 9, 7]);
    assert_eq!(bench.instance.extents(), [Extent { shape: vec![10] }]);
    // The last rows, in two steps.
    assert_eq!(bench.chunk([10, 90, 10], [10, 89, 0], 1), (2, 89, 89));
    assert_eq!(bench.chunk([99, 1, 0], [99, 1, 0], 1), (0, 1, 1));
    assert_eq!(bench.instance.extents(), [Extent { shape: vec![100] }]);

    assert_eq!(bench.chunk([100, 0, 0], [100, 0, 0], 1).0, 1);
    assert_eq!(
        failure(&bench.instance.last_error().error),
        "run: echo has had its last chunk: open it again"
    );
    let spec = Spec::new(Dtype::Uint8, [100]);
    let opened = bench.instance.open("echo", vec![], vec![spec]);
    opened.expect("valid");
    let (x, y) = (bench.tensor(128, 0), bench.tensor(256, 64));
    bench.bind(x, y).expect("all in place");
    assert_eq!(bench.chunk([0, 100, 0], [0, 100, 0], 1), (0, 100, 100));
}

#[test]
fn a_last_chunk_without_room_is_an_error() {
    let mut bench = stream();
    assert_eq!(bench.chunk([0, 10, 0], [0, 0, 0], 1).0, 1);
    assert_eq!(
        failure(&bench.instance.last_error().error),
        "echo wants to go on, and there is no room for a row of it or nothing to go on with"
    );
}

#[test]
#[should_panic(expected = "x: a chunk of 101 rows at byte 0 of 100")]
fn a_chunk_beyond_the_tensor_panics() {
    let mut bench = stream();
    bench.chunk([0, 10, 0], [0, 10, 0], 0);
    bench.chunk([10, 101, 0], [10, 90, 0], 0);
}

#[test]
fn a_stream_goes_on_beyond_the_room_for_a_chunk() {
    let mut bench = stream();
    for first in [0, 100, 200] {
        bench.chunk([first, 100, 0], [first, 100, 0], 0);
    }
}

#[test]
#[should_panic(expected = "x: a chunk of 10 rows from 9 on, after 10")]
fn a_row_that_comes_twice_panics() {
    let mut bench = stream();
    bench.chunk([0, 10, 0], [0, 10, 0], 0);
    bench.chunk([9, 10, 0], [10, 90, 0], 0);
}

#[test]
#[should_panic(expected = "y: a chunk of 10 rows at byte 91 of 100")]
fn room_beyond_the_window_panics() {
    stream().chunk([0, 10, 0], [0, 10, 91], 0);
}

#[test]
#[should_panic(expected = "x: a chunk of 1 rows at byte 18446744073709551615 of 100")]
fn a_chunk_at_the_end_of_the_address_space_panics() {
    stream().chunk([0, 1, u64::MAX], [0, 10, 0], 0);
}
