//! Which machine instructions of a plugin wasmtime can turn into traps.
//!
//! Cranelift writes down the loads and stores that may fault. It does not for what it makes of a
//! short `memory.copy` or `memory.init` of constant length: a fault there would end the process.
//! So the fault handler has to know which is which before it leaves a fault to wasmtime.

use std::ops::Range;

use wasmtime::component::Component;
use wasmtime_environ::object::{Object, ObjectSection};
use wasmtime_environ::{iterate_traps, obj};

/// The addresses of a component's instructions that may trap.
#[derive(Debug, Default)]
pub(super) struct TrapSites {
    /// The machine code.
    text: Range<usize>,
    /// Sorted; from the start of `text`.
    offsets: Vec<u32>,
}

impl TrapSites {
    /// What wasmtime wrote down for `component`. Without it (which is another layout of the
    /// artifact than the one known here) no fault is taken for a trap: that costs the backtrace
    /// of a store into an input, and nothing else.
    pub(super) fn of(component: &Component) -> Self {
        Self::read(component).unwrap_or_else(|| {
            tracing::warn!("wasmtime's list of trap sites could not be read; a store into an input is reported without a backtrace");
            Self::default()
        })
    }

    fn read(component: &Component) -> Option<Self> {
        let artifact = component.serialize().ok()?;
        let elf = wasmtime_environ::object::File::parse(&*artifact).ok()?;
        let (text_offset, text_bytes) = elf.section_by_name(".text")?.file_range()?;
        let traps = elf.section_by_name(obj::ELF_WASMTIME_TRAPS)?;
        let offsets: Vec<u32> = iterate_traps(traps.data().ok()?)?
            .map(|(offset, _)| offset)
            .collect();
        // wasmtime maps the artifact as it is.
        let image = component.image_range();
        let start = (image.start as usize).checked_add(usize::try_from(text_offset).ok()?)?;
        let end = start.checked_add(usize::try_from(text_bytes).ok()?)?;
        (end <= image.end as usize && offsets.is_sorted()).then_some(Self {
            text: start..end,
            offsets,
        })
    }

    /// Whether a fault at this instruction is a trap. Async-signal-safe.
    pub(super) fn contains(&self, pc: usize) -> bool {
        self.text.contains(&pc)
            && u32::try_from(pc - self.text.start)
                .is_ok_and(|offset| self.offsets.binary_search(&offset).is_ok())
    }
}
