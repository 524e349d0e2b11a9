//! Guest linear memories on reservations of our own.
//!
//! ```text
//! wasmtime ──new_memory──▶ Creator ──take──▶ GuestSpaces (strait-memory)
//!          ◀──LinearMemory── Linear ──shares──▶ GuestMemory ◀── Regions (the invocation)
//! ```
//! wasmtime gives no access to a component's core memory. So [`collect`] notes which memory is
//! made while an instance is made, and [`GuestMemory`] notes each growth: the window region is
//! what grew while the host called the guest's `reserve`, whatever the guest answers.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use strait_memory::{GuestSpace, GuestSpaces, ParkError};
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

/// Address space of one wasm32 memory: no bounds check is needed below it.
pub(super) const RESERVATION_BYTES: usize = 4 << 30;

thread_local! {
    // Instantiation runs on this thread from start to end, so a thread-local is enough to learn
    // which memory belongs to which instance.
    static MADE: RefCell<Option<Vec<Arc<GuestMemory>>>> = const { RefCell::new(None) };
}

/// Runs `instantiate` and tells which linear memories it made.
pub(super) fn collect<R>(instantiate: impl FnOnce() -> R) -> (R, Vec<Arc<GuestMemory>>) {
    MADE.with(|made| *made.borrow_mut() = Some(Vec::new()));
    let result = instantiate();
    let made = MADE
        .with(|made| made.borrow_mut().take())
        .unwrap_or_default();
    (result, made)
}

/// A guest's linear memory as the host sees it.
#[derive(Debug)]
pub(super) struct GuestMemory {
    space: Arc<GuestSpace>,
    size: AtomicUsize,
    growths: Mutex<Vec<Range<usize>>>,
    /// Why the last growth came to nothing that Linux has refused.
    refusal: Mutex<Option<ParkError>>,
}

impl GuestMemory {
    /// The reservation, for moving windows into it.
    pub(super) fn space(&self) -> &Arc<GuestSpace> {
        &self.space
    }

    /// Address of guest address 0.
    pub(super) fn base(&self) -> usize {
        self.space.base()
    }

    /// Size in bytes.
    pub(super) fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// The growths since the last call, as ranges of guest addresses.
    pub(super) fn take_growths(&self) -> Vec<Range<usize>> {
        std::mem::take(&mut *self.growths.lock())
    }

    /// Why Linux has refused a growth since the last call, if it has.
    pub(super) fn take_refusal(&self) -> Option<ParkError> {
        self.refusal.lock().take()
    }
}

/// Makes every guest memory on a reservation of [`GuestSpaces`].
#[derive(Debug)]
pub(super) struct Creator {
    pub(super) spaces: Arc<GuestSpaces>,
}

#[derive(Debug)]
struct Linear {
    memory: Arc<GuestMemory>,
    capacity: usize,
}

// SAFETY: the memory is zero-filled (fresh anonymous pages of the reservation), `reserved` bytes plus
// the guard stay mapped PROT_NONE beyond its size for as long as it lives (the GuestSpace owns them),
// and its base never moves.
unsafe impl MemoryCreator for Creator {
    fn new_memory(
        &self,
        ty: MemoryType,
        minimum: usize,
        _maximum: Option<usize>,
        reserved: Option<usize>,
        guard: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        if ty.is_64() || ty.is_shared() {
            return Err("64-bit and shared memories are not supported; build the plugin for wasm32 without threads".to_owned());
        }
        let capacity = reserved.unwrap_or(RESERVATION_BYTES).max(minimum);
        let space = self
            .spaces
            .take(capacity + guard)
            .map_err(|e| e.to_string())?;
        if minimum > 0 {
            space
                .make_accessible(0, minimum)
                .map_err(|e| e.to_string())?;
        }
        let memory = Arc::new(GuestMemory {
            space,
            size: minimum.into(),
            growths: Mutex::default(),
            refusal: Mutex::default(),
        });
        MADE.with(|made| {
            if let Some(made) = made.borrow_mut().as_mut() {
                made.push(Arc::clone(&memory));
            }
        });
        Ok(Box::new(Linear { memory, capacity }))
    }
}

// SAFETY: `as_ptr` is the base of a reservation that outlives this value, of which the first
// `byte_size` bytes are mapped read-write or as a window; growth is in place, up to `byte_capacity`.
unsafe impl LinearMemory for Linear {
    fn byte_size(&self) -> usize {
        self.memory.size()
    }

    fn byte_capacity(&self) -> usize {
        self.capacity
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        let old = self.memory.size();
        if new_size > self.capacity {
            return Err(wasmtime::Error::msg(format!(
                "memory of {old} bytes cannot grow to {new_size}, its reservation has {}",
                self.capacity
            )));
        }
        if let Err(error) = self.memory.space.make_accessible(old, new_size) {
            // The guest is told that there is none, and may say anything about it.
            let text = error.to_string();
            *self.memory.refusal.lock() = Some(error);
            return Err(wasmtime::Error::msg(text));
        }
        self.memory.size.store(new_size, Ordering::Relaxed);
        self.memory.growths.lock().push(old..new_size);
        Ok(())
    }

    fn as_ptr(&self) -> *mut u8 {
        self.memory.base() as *mut u8
    }
}
