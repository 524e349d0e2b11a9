//! What happens when a guest, or host code on its behalf, stores into an input.
//!
//! Inputs are mapped read-only. A store by an instruction that wasmtime knows to trap is a trap:
//! the handler notes the address and lets wasmtime unwind. Others cannot be unwound: `memory.fill`
//! and long `memory.copy` are host code, and a short `memory.copy` or `memory.init` of constant length
//! is stores that Cranelift writes down nowhere. There the handler lays scrap memory over the window, so that
//! however much the guest stores, no more than [`strait_memory::SCRAP_BYTES`] are dirtied (for each window, where
//! Linux has no descriptor left for it), and the clock ends the guest as soon as it can; the invocation fails. The segment itself never changes either way.
//!
//! The handler is set on the store, so nothing process-wide changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use strait_memory::{FaultRange, Scrap};
use wasmtime::unix::StoreExt;
use wasmtime::{Engine, Store};

use super::traps::TrapSites;

/// The places of the program counter and of the fault's kind among the registers.
pub(super) const REG_RIP: usize = 16;
const REG_ERR: usize = 19;
const _: () = assert!(REG_RIP == libc::REG_RIP as usize, "libc's own number");
const _: () = assert!(REG_ERR == libc::REG_ERR as usize, "libc's own number");
/// Set in the fault's kind (the x86 page-fault error code) when it was a store.
const WAS_STORE: i64 = 2;

/// What the handler saw. Shared with it, so atomics only.
#[derive(Debug)]
pub(super) struct Faults {
    address: AtomicUsize,
    any_written: AtomicBool,
    written: [AtomicBool; WINDOWS_MAX],
    scrap: Scrap,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            address: AtomicUsize::new(0),
            any_written: AtomicBool::new(false),
            written: [const { AtomicBool::new(false) }; WINDOWS_MAX],
            scrap: Scrap::new(),
        }
    }
}

/// Most read-only windows that one invocation can have; more inputs are copied.
pub(super) const WINDOWS_MAX: usize = 64;

impl Faults {
    /// The address at which wasm code last faulted in a window that is watched; 0: nowhere.
    pub(super) fn trapped_at(&self) -> usize {
        self.address.load(Ordering::Acquire)
    }

    /// Whether there was a store that could not be made a trap: the guest is to end.
    pub(super) fn any_written(&self) -> bool {
        self.any_written.load(Ordering::Acquire)
    }

    /// Bytes of memory that such stores dirtied.
    pub(super) fn dirtied_bytes(&self) -> u64 {
        self.scrap.dirtied_bytes()
    }

    /// The windows of such stores.
    pub(super) fn written(&self) -> impl Iterator<Item = usize> + '_ {
        (0..WINDOWS_MAX).filter(|i| self.written[*i].load(Ordering::Acquire))
    }
}

/// Watches the read-only windows `ranges` while `store` runs: `seen` learns what happens. `traps` are
/// those of the component that runs, on `engine`.
///
/// # Panics
/// If there are more than [`WINDOWS_MAX`] ranges: the caller copies the rest.
pub(super) fn watch<T: 'static>(
    store: &mut Store<T>,
    engine: Engine,
    traps: Arc<TrapSites>,
    ranges: Vec<FaultRange>,
    seen: Arc<Faults>,
) {
    assert!(
        ranges.len() <= WINDOWS_MAX,
        "{} read-only windows",
        ranges.len()
    );
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
        // A load that faults is no store into an input: other memory there would not mend it.
        if registers[REG_ERR] & WAS_STORE == 0 {
            return false;
        }
        let pc = usize::from_ne_bytes(registers[REG_RIP].to_ne_bytes());
        if traps.contains(pc) {
            seen.address.store(address, Ordering::Release);
            return false;
        }
        seen.written[index].store(true, Ordering::Release);
        seen.any_written.store(true, Ordering::Release);
        // SAFETY: the range is a window of this store, which is moved home only after the store's
        // handler has been taken away, and this thread runs its guest; the call is async-signal-safe.
        if unsafe { ranges[index].divert_in_signal(&seen.scrap) } {
            // So that the next check of a guest that checks looks at `any_written`. One atomic addition.
            engine.increment_epoch();
            return true;
        }
        // Linux maps nothing there any more: returning would fault here for ever.
        const MESSAGE: &[u8] = b"strait: a guest wrote to an input and Linux gave no memory to contain it; the host ends\n";
        // SAFETY: write(2) is async-signal-safe; the buffer is a constant.
        unsafe { libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
        // SAFETY: abort(3) is async-signal-safe.
        unsafe { libc::abort() }
    };
    // SAFETY: the handler is async-signal-safe: it reads and writes atomics and what it captured by
    // value, calls mmap/memfd_create/ftruncate/write/abort, takes no lock and allocates nothing.
    unsafe { store.set_signal_handler(handler) };
}

/// Ends [`watch`], before the windows move home.
pub(super) fn unwatch<T: 'static>(store: &mut Store<T>) {
    // SAFETY: the handler does nothing.
    unsafe { store.set_signal_handler(|_, _, _| false) };
}
