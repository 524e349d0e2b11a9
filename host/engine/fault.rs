//! What happens when a guest, or host code on its behalf, stores into an input.
//!
//! Inputs are mapped read-only. A store by wasm code is a trap: the handler notes the address and
//! lets wasmtime unwind. `memory.fill` and `memory.copy` are host code, which wasmtime cannot
//! unwind: there the handler makes the window's private pages writable, notes it, and the
//! invocation fails when the guest comes back. The segment itself never changes either way.
//!
//! The handler is set on the store, so nothing process-wide changes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use strait_memory::FaultRange;
use wasmtime::Store;
use wasmtime::unix::StoreExt;

/// The place of the program counter among the registers.
const REG_RIP: usize = 16;
const _: () = assert!(REG_RIP == libc::REG_RIP as usize, "libc's own number");

/// What the handler saw. Shared with it, so atomics only.
#[derive(Debug)]
pub(super) struct Faults {
    address: AtomicUsize,
    written: [AtomicBool; WINDOWS_MAX],
}

/// Most read-only windows that one invocation can have; more inputs are copied.
pub(super) const WINDOWS_MAX: usize = 64;

impl Faults {
    /// The window (index into the ranges of [`watch`]) in which wasm code last faulted.
    pub(super) fn trapped_in(&self, windows: &[Range<usize>]) -> Option<usize> {
        let address = self.address.load(Ordering::Acquire);
        windows.iter().position(|w| w.contains(&address))
    }

    /// The windows that host code wrote to.
    pub(super) fn written(&self) -> impl Iterator<Item = usize> + '_ {
        (0..WINDOWS_MAX).filter(|i| self.written[*i].load(Ordering::Acquire))
    }
}

/// Watches the read-only windows `ranges` while `store` runs. `code` is the component's machine code.
///
/// # Panics
/// If there are more than [`WINDOWS_MAX`] ranges: the caller copies the rest.
pub(super) fn watch<T: 'static>(
    store: &mut Store<T>,
    code: Range<usize>,
    ranges: Vec<FaultRange>,
) -> Arc<Faults> {
    assert!(
        ranges.len() <= WINDOWS_MAX,
        "{} read-only windows",
        ranges.len()
    );
    let faults = Arc::new(Faults {
        address: AtomicUsize::new(0),
        written: [const { AtomicBool::new(false) }; WINDOWS_MAX],
    });
    let seen = Arc::clone(&faults);
    let handler = move |signal: libc::c_int,
                        info: *const libc::siginfo_t,
                        context: *const libc::c_void| {
        if signal != libc::SIGSEGV {
            return false;
        }
        // SAFETY: Linux gives a SA_SIGINFO handler a valid siginfo.
        let info = unsafe { &*info };
        // SAFETY: the field that this reads is set for SIGSEGV.
        let address = unsafe { info.si_addr() } as usize;
        let Some(index) = ranges.iter().position(|range| range.contains(address)) else {
            return false;
        };
        // SAFETY: Linux gives a SA_SIGINFO handler a valid ucontext_t.
        let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        let pc = usize::from_ne_bytes(registers[REG_RIP].to_ne_bytes());
        if code.contains(&pc) {
            seen.address.store(address, Ordering::Release);
            return false;
        }
        seen.written[index].store(true, Ordering::Release);
        // SAFETY: the range is a window of this store, which is moved home only after the store's
        // handler has been taken away; the call is async-signal-safe.
        if unsafe { ranges[index].make_writable_in_signal() } {
            return true;
        }
        // Neither mprotect nor mmap worked: returning would fault here for ever.
        const MESSAGE: &[u8] = b"strait: a guest wrote to an input and Linux gave no memory to contain it; the host ends\n";
        // SAFETY: write(2) is async-signal-safe; the buffer is a constant.
        unsafe { libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
        // SAFETY: abort(3) is async-signal-safe.
        unsafe { libc::abort() }
    };
    // SAFETY: the handler is async-signal-safe: it reads and writes atomics and what it captured by
    // value, calls mprotect/mmap/write/abort, takes no lock and allocates nothing.
    unsafe { store.set_signal_handler(handler) };
    faults
}

/// Ends [`watch`], before the windows move home.
pub(super) fn unwatch<T: 'static>(store: &mut Store<T>) {
    // SAFETY: the handler does nothing.
    unsafe { store.set_signal_handler(|_, _, _| false) };
}
