//! A plugin that writes to its input, in the ways that rustc and LLVM make of copies and fills: for tests of the
//! host. What LLVM makes of them (stores, `memory.copy` of constant and of computed length) depends on the size.

#![cfg_attr(target_arch = "wasm32", no_std)]
#![expect(
    unsafe_code,
    reason = "writing to an input is what it is for, and no safe code can"
)]

use core::hint::black_box;
use strait_plugin::prelude::*;

parameters! {
    /// Parameters of `write-input`.
    pub struct Parameters {
        /// Which of the ways.
        #[minimum(0)]
        pub way: i64 = 0,
    }
}

/// Writes to its input and answers that all went well.
#[derive(Debug)]
pub struct WriteInput(Way);

type Way = unsafe fn(*mut u8);

static SOURCE: [u8; 4096] = [0xee; 4096];

/// A copy of a value of `N` bytes, as of a struct.
unsafe fn assign<const N: usize>(to: *mut u8) {
    let from = black_box(&SOURCE).as_ptr().cast::<[u8; N]>();
    // SAFETY: the source is long enough.
    let value = unsafe { from.read_unaligned() };
    // SAFETY: about `to` the host decides, which is the test.
    unsafe { to.cast::<[u8; N]>().write_unaligned(value) }
}

/// A copy of a constant length.
unsafe fn copy<const N: usize>(to: *mut u8) {
    // SAFETY: as in `assign`.
    unsafe { core::ptr::copy_nonoverlapping(black_box(&SOURCE).as_ptr(), to, N) }
}

/// A copy of a length that the compiler does not know.
unsafe fn copy_computed<const N: usize>(to: *mut u8) {
    // SAFETY: as in `assign`.
    unsafe { core::ptr::copy(black_box(&SOURCE).as_ptr(), to, black_box(N)) }
}

/// A fill of a constant length.
unsafe fn fill<const N: usize>(to: *mut u8) {
    // SAFETY: as in `assign`.
    unsafe { core::ptr::write_bytes(to, black_box(0xdd), N) }
}

macro_rules! ways {
    ($($bytes:literal)+) => {
        &[$(assign::<$bytes>, copy::<$bytes>, copy_computed::<$bytes>, fill::<$bytes>),+]
    };
}
const WAYS: &[Way] = ways! {
    1 2 3 4 5 7 8 9 12 15 16 17 24 31 32 33 40 47 48 56 63 64 65 80 96 100 112 127 128 129 160 192 255 256 257 1024 4096
};

impl Kernel for WriteInput {
    const NAME: &str = "write-input";
    const DOC: &str = "Writes to its input, which no kernel may.";
    const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Float64], "Any shape.")];
    const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Float64], "Not written.")];
    const SIGNATURE: &str = "()->()";
    type Parameters = Parameters;

    fn open(parameters: Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        let way = usize::try_from(parameters.way).ok();
        match way.and_then(|way| WAYS.get(way)) {
            Some(way) => Ok((Self(*way), inputs.to_vec())),
            None => Err(Error::bad_argument(
                "way",
                format!("there are {}", WAYS.len()),
            )),
        }
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        // An address, so that the compiler knows of no borrow.
        let address = black_box(x.as_ptr().expose_provenance()) + 4090;
        // SAFETY: as in `assign`.
        unsafe { (self.0)(core::ptr::with_exposed_provenance_mut(address)) };
        Ok(())
    }
}

/// Gives up, by a panic of more than one line or by an error with a diagnostic.
#[derive(Debug)]
pub struct GiveUp(bool);

parameters! {
    /// Parameters of `give-up`.
    pub struct How {
        /// By a panic.
        pub panic: bool,
    }
}

impl Kernel for GiveUp {
    const NAME: &str = "give-up";
    const DOC: &str = "Gives no result, as a kernel with a bug does.";
    const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Float64], "One axis.").rank(1, 1)];
    const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Float64], "Not written.").rank(1, 1)];
    const SIGNATURE: &str = "(n)->(n)";
    type Parameters = How;

    fn open(how: How, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
        Ok((Self(how.panic), inputs.to_vec()))
    }

    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let x = call.input::<f64>(0)?;
        assert!(!self.0, "{} elements\nare too many", x.len());
        let block: Vec<u8> = x.iter().take(2).flat_map(|x| x.to_le_bytes()).collect();
        call.diagnose(&block);
        Err(Error::failed("the first block is not what it should be"))
    }
}

strait_plugin::export!("input-writer", [WriteInput, GiveUp]);
