//! How a guest is ended whose loops check nothing.
//!
//! The clock sends a signal to the thread that runs the guest. If that finds the thread in one of the guest's own functions, the
//! thread goes on at an instruction of the guest that is a trap, from where wasmtime unwinds as from any other trap: it needs no
//! more of a function than that its frame is on the stack. If it finds the thread elsewhere (in host code that the guest called,
//! or in a trampoline between the two), nothing happens, and the next tick tries again.
//!
//! What a function does to its own frame when it ends in a tail call is not known to wasmtime's unwinder. So this is for
//! processes that may be lost: in the host's own, guests check.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;

use super::fault::{Faults, REG_RIP};
use super::job::CancelToken;
use super::limits::Stop;
use super::traps::TrapSites;

/// Nobody else in this process uses it, and it does nothing where no handler is set.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Until when a guest runs.
#[derive(Debug)]
pub(super) struct Until {
    pub(super) deadline: Instant,
    /// Milliseconds from the request to it, for the message.
    pub(super) deadline_ms: u64,
    pub(super) cancel: CancelToken,
}

/// One guest's, on the thread that made it.
#[derive(Debug)]
pub(super) struct Leash {
    // Never held over anything but an assignment or a look. The handler does not look at it.
    until: Mutex<Until>,
    faults: Arc<Faults>,
    sites: Arc<TrapSites>,
    thread: libc::pthread_t,
    /// The thread is in the guest, or in what that called.
    inside: AtomicBool,
    /// Why it is to end.
    asked: OnceLock<Stop>,
    /// It was sent to a trap.
    pulled: AtomicBool,
}

thread_local! {
    // Read by the handler: no allocation, no destructor.
    static HELD: Cell<*const Leash> = const { Cell::new(ptr::null()) };
}

impl Leash {
    /// For a guest that this thread will run.
    pub(super) fn new(until: Until, faults: Arc<Faults>, sites: Arc<TrapSites>) -> Arc<Self> {
        Arc::new(Self {
            until: Mutex::new(until),
            faults,
            sites,
            // SAFETY: it has no preconditions.
            thread: unsafe { libc::pthread_self() },
            inside: AtomicBool::new(false),
            asked: OnceLock::new(),
            pulled: AtomicBool::new(false),
        })
    }

    /// Why a guest that runs now must end, if it must.
    pub(super) fn due(&self) -> Option<Stop> {
        if self.faults.any_written() {
            return Some(Stop::InputWritten);
        }
        let until = self.until.lock();
        if until.cancel.is_cancelled() {
            return Some(Stop::Cancelled);
        }
        (Instant::now() >= until.deadline).then_some(Stop::Deadline(until.deadline_ms))
    }

    /// From now on it runs until `deadline`.
    pub(super) fn extend(&self, deadline: Instant) {
        self.until.lock().deadline = deadline;
    }

    /// Sends the guest to a trap, if it must end and can be. Its thread lives: the clock forgets a guest before its thread goes on.
    pub(super) fn pull_if_due(&self) {
        if !self.inside.load(Ordering::Acquire) {
            return;
        }
        if self.asked.get().is_none() {
            let Some(stop) = self.due() else {
                return;
            };
            // Only the clock asks.
            let _ = self.asked.set(stop);
        }
        // SAFETY: the thread that made this lives (see above). It may have left the guest meanwhile: then the handler does
        // nothing.
        unsafe { libc::pthread_kill(self.thread, SIGNAL) };
    }

    /// Runs `guest` where it can be ended.
    pub(super) fn around<R>(&self, guest: impl FnOnce() -> R) -> R {
        struct Inside<'a>(&'a Leash);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                self.0.inside.store(false, Ordering::Release);
                HELD.set(ptr::null());
            }
        }
        HELD.set(ptr::from_ref(self));
        self.inside.store(true, Ordering::Release);
        let _inside = Inside(self);
        guest()
    }

    /// Why the guest was ended, if that is what its trap was.
    pub(super) fn stopped(&self) -> Option<&Stop> {
        match self.pulled.load(Ordering::Acquire) {
            true => self.asked.get(),
            false => None,
        }
    }
}

/// Has signals handled as described above.
///
/// # Errors
/// Linux's.
pub(super) fn handle_signals() -> Result<(), String> {
    static ONCE: Once = Once::new();
    let mut set = Ok(());
    ONCE.call_once(|| {
        // SAFETY: all zeros are a valid sigaction, of no handler.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        // On the stack that wasmtime gives each thread for this: the guest's own may be full.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the handler is async-signal-safe (see there), `action` is initialised.
        if unsafe { libc::sigaction(SIGNAL, &raw const action, ptr::null_mut()) } != 0 {
            set = Err(format!(
                "no handler to end guests with: {}",
                std::io::Error::last_os_error()
            ));
        }
    });
    set
}

/// Async-signal-safe: reads and writes atomics, what they guard, and the registers; takes no lock, allocates nothing.
extern "C" fn on_signal(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let held = HELD.try_with(Cell::get).unwrap_or(ptr::null());
    // SAFETY: null, or the leash that `around` of this very thread borrows now.
    let Some(leash) = (unsafe { held.as_ref() }) else {
        return;
    };
    if leash.asked.get().is_none() {
        return;
    }
    // SAFETY: Linux gives a SA_SIGINFO handler a valid ucontext_t, which nobody else uses meanwhile.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let pc = usize::from_ne_bytes(registers[REG_RIP].to_ne_bytes());
    if let Some(trap) = leash.sites.way_out(pc) {
        registers[REG_RIP] = i64::from_ne_bytes(trap.to_ne_bytes());
        leash.pulled.store(true, Ordering::Release);
    }
}
