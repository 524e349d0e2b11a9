//! Which machine instructions of a plugin wasmtime can turn into traps, and where its functions are.
//!
//! Cranelift writes down the loads and stores that may fault. It does not for what it makes of a
//! short `memory.copy` or `memory.init` of constant length: a fault there would end the process.
//! So the fault handler has to know which is which before it leaves a fault to wasmtime.

use std::ops::Range;

use wasmtime::component::Component;
use wasmtime_environ::object::{Object, ObjectSection, ObjectSymbol};
use wasmtime_environ::{iterate_traps, obj};

/// An instruction that does nothing but trap.
const UD2: [u8; 2] = [0x0f, 0x0b];

/// The addresses of a component's instructions that may trap.
#[derive(Debug, Default)]
pub(super) struct TrapSites {
    /// The machine code.
    text: Range<usize>,
    /// Sorted; from the start of `text`.
    offsets: Vec<u32>,
    /// One of them that traps whenever it is executed.
    certain: Option<u32>,
    /// The plugin's own functions, without what wasmtime puts between them and the host: sorted, from the start of `text`.
    functions: Vec<Range<u32>>,
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
        let text = elf.section_by_name(".text")?;
        let (text_offset, text_bytes) = text.file_range()?;
        let code = text.data().ok()?;
        let traps = elf.section_by_name(obj::ELF_WASMTIME_TRAPS)?;
        let offsets: Vec<u32> = iterate_traps(traps.data().ok()?)?
            .map(|(offset, _)| offset)
            .collect();
        let always = |offset: &u32| {
            code.get(*offset as usize..)?
                .starts_with(&UD2)
                .then_some(*offset)
        };
        let certain = offsets.iter().find_map(always);
        let mut functions: Vec<Range<u32>> = elf
            .symbols()
            .filter(|symbol| symbol.name_bytes().is_ok_and(is_function))
            .filter_map(|symbol| {
                let start = u32::try_from(symbol.address()).ok()?;
                Some(start..start.checked_add(u32::try_from(symbol.size()).ok()?)?)
            })
            .collect();
        functions.sort_unstable_by_key(|function| function.start);
        // wasmtime maps the artifact as it is.
        let image = component.image_range();
        let start = (image.start as usize).checked_add(usize::try_from(text_offset).ok()?)?;
        let end = start.checked_add(usize::try_from(text_bytes).ok()?)?;
        (end <= image.end as usize && offsets.is_sorted()).then_some(Self {
            text: start..end,
            offsets,
            certain,
            functions,
        })
    }

    /// Whether a fault at this instruction is a trap. Async-signal-safe.
    pub(super) fn contains(&self, pc: usize) -> bool {
        self.offset(pc)
            .is_some_and(|offset| self.offsets.binary_search(&offset).is_ok())
    }

    /// Where to go on instead of `pc` to trap, if that is in one of the plugin's functions. Async-signal-safe.
    pub(super) fn way_out(&self, pc: usize) -> Option<usize> {
        let offset = self.offset(pc)?;
        let after = self
            .functions
            .partition_point(|function| function.start <= offset);
        let within = self.functions[..after].last()?.contains(&offset);
        let trap = self.certain.filter(|_| within)?;
        Some(self.text.start + trap as usize)
    }

    fn offset(&self, pc: usize) -> Option<u32> {
        let offset = self.text.contains(&pc).then(|| pc - self.text.start)?;
        u32::try_from(offset).ok()
    }
}

/// Whether wasmtime calls a function of a plugin so. What follows is the plugin's name for it.
fn is_function(symbol: &[u8]) -> bool {
    let Some(rest) = symbol.strip_prefix(b"wasm[") else {
        return false;
    };
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    rest[digits..].starts_with(b"]::function[")
}
