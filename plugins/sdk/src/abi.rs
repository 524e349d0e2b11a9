//! The component's exports: one instance in a static, and `memory.grow`.

use crate::bindings::exports::strait::kernel::kernels::{
    Description, Error, Extent, Failure, Guest, Note, Parameter, Spec, Tensor,
};
use crate::{Instance, Plugin};
use alloc::{string::String, vec::Vec};
use core::{cell::RefCell, marker::PhantomData};

const PAGE_BYTES: usize = 65536;

struct OneThread<T>(T);

// SAFETY: wasm32 without the `atomics` feature has one thread, so nothing is ever shared between two.
#[cfg(not(target_feature = "atomics"))]
#[expect(unsafe_code, reason = "see SAFETY")]
unsafe impl<T> Sync for OneThread<T> {}

static INSTANCE: OneThread<RefCell<Instance>> = OneThread(RefCell::new(Instance::new(&[])));

/// What `P` exports.
#[derive(Debug)]
pub struct Exports<P>(PhantomData<P>);

impl<P: Plugin> Guest for Exports<P> {
    fn describe() -> Description {
        Instance::describe::<P>()
    }

    fn open(
        kernel: String,
        parameters: Vec<Parameter>,
        inputs: Vec<Spec>,
    ) -> Result<Vec<Spec>, Error> {
        let mut instance = INSTANCE.0.borrow_mut();
        instance.set_kernels(P::KERNELS);
        instance.open(&kernel, parameters, inputs)
    }

    #[expect(unsafe_code, reason = "the new pages are given to the instance")]
    fn reserve(bytes: u64) -> u64 {
        let Ok(pages) = usize::try_from(bytes.div_ceil(PAGE_BYTES as u64)) else {
            return u64::MAX;
        };
        let old = core::arch::wasm32::memory_grow::<0>(pages);
        if old == usize::MAX {
            return u64::MAX;
        }
        // The last page of a full memory would end at 2^32, one more than a wasm32 address.
        let start = old * PAGE_BYTES;
        let end = start.saturating_add(pages.saturating_mul(PAGE_BYTES));
        // SAFETY: pages that this very `memory.grow` added belong to nobody else: the allocator takes only
        // those of its own calls. `start` is not 0, since a module with data or a stack has a first page.
        unsafe { INSTANCE.0.borrow_mut().set_reserved(start..end) };
        start as u64
    }

    fn bind(inputs: Vec<Tensor>, outputs: Vec<Tensor>) -> Result<(), Error> {
        INSTANCE.0.borrow_mut().bind(inputs, outputs)
    }

    #[expect(
        unsafe_code,
        reason = "the host calls `run` when the windows are in, and only then"
    )]
    fn run(mode: u32) -> u32 {
        // SAFETY: the contract in wit/kernel.wit: while `run` is running the tensors are at the bound addresses.
        // All of that memory is inside linear memory, so that a host that breaks the contract harms
        // nothing but this instance.
        unsafe { INSTANCE.0.borrow_mut().run(mode) }
    }

    fn extents() -> Vec<Extent> {
        INSTANCE.0.borrow().extents()
    }

    fn notes() -> Vec<Note> {
        INSTANCE.0.borrow().notes()
    }

    fn last_error() -> Failure {
        INSTANCE.0.borrow().last_error()
    }
}
