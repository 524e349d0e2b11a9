//! The component around a core module, as cargo and other toolchains make it.

use std::fmt::Write;
use std::sync::Arc;

use wasmparser::{
    CanonicalFunction, Encoding, ExternalKind, FuncType, Operator, Parser, Payload, ValType,
    Validator,
};
use wit_component::ComponentEncoder;

use super::LoadError;

const I32: ValType = ValType::I32;
const I64: ValType = ValType::I64;

/// The functions of `wit/kernel.wit` as a core module exports them, with parameters and result.
const FUNCTIONS: [(&str, &[ValType], ValType); 8] = [
    ("describe", &[], I32),
    ("open", &[I32; 6], I32),
    ("reserve", &[I64], I64),
    ("bind", &[I32; 4], I32),
    ("run", &[I32], I32),
    ("extents", &[], I32),
    ("notes", &[], I32),
    ("last-error", &[], I32),
];
const INTERFACE: &str = "strait:kernel/kernels@0.1.0";
/// The custom section in which bindings say which interface the module's functions are of.
const BINDINGS: &str = "component-type";

/// `bytes`, with a component around it if it is a core module.
///
/// # Errors
/// [`LoadError::NotAPlugin`] that says what a core module lacks.
pub(super) fn component(bytes: Arc<[u8]>) -> Result<Arc<[u8]>, LoadError> {
    const CORE_MODULE: &[u8] = b"\0asm\x01\0\0\0";
    if !bytes.starts_with(CORE_MODULE) {
        return Ok(bytes);
    }
    let refused = |what: String| LoadError::NotAPlugin(format!("it is a core module {what}"));
    // The encoder panics at what the validator finds.
    let exports = Exports::of(&bytes).map_err(|e| refused(format!("that is not valid: {e}")))?;
    if !exports.has_bindings {
        return Err(refused(exports.misfit()));
    }
    ComponentEncoder::default()
        .validate(true)
        .module(&bytes)
        .and_then(|mut encoder| encoder.encode())
        .map(Arc::from)
        .map_err(|e| refused(format!("{}: {e:#}", exports.misfit())))
}

/// Whether instances of the plugin `bytes` keep nothing from one call to the next but what is in their memory, and what
/// is in one global: the stack pointer, which is the same before and after a call. Handles of its own resources lie in a table
/// of the component.
#[must_use]
pub fn keeps_memory_only(bytes: &[u8]) -> bool {
    looks_like_memory_only(bytes).unwrap_or(false)
}

fn looks_like_memory_only(bytes: &[u8]) -> wasmparser::Result<bool> {
    let mut mutable = 0;
    let mut modules = 0;
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            // Itself, or one in it.
            Payload::Version {
                encoding: Encoding::Module,
                ..
            } => modules += 1,
            // Of a module that is not in a component yet.
            Payload::ImportSection(imports) => {
                for import in imports.into_imports() {
                    if import?.name.starts_with("[resource-new]") {
                        return Ok(false);
                    }
                }
            }
            Payload::GlobalSection(globals) => {
                for global in globals {
                    mutable += usize::from(global?.ty.mutable);
                }
            }
            Payload::CodeSectionEntry(body) => {
                for operator in body.get_operators_reader()? {
                    let keeps = matches!(
                        operator?,
                        Operator::TableSet { .. }
                            | Operator::TableGrow { .. }
                            | Operator::TableFill { .. }
                            | Operator::TableCopy { .. }
                            | Operator::TableInit { .. }
                            | Operator::ElemDrop { .. }
                            | Operator::DataDrop { .. }
                    );
                    if keeps {
                        return Ok(false);
                    }
                }
            }
            Payload::ComponentCanonicalSection(functions) => {
                for function in functions {
                    if matches!(function?, CanonicalFunction::ResourceNew { .. }) {
                        return Ok(false);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(modules > 0 && mutable <= 1)
}

/// What matters of a core module's exports.
struct Exports {
    /// Names of all functions with their types.
    functions: Vec<(String, FuncType)>,
    has_bindings: bool,
}

impl Exports {
    fn of(bytes: &[u8]) -> wasmparser::Result<Self> {
        let types = Validator::new().validate_all(bytes)?;
        let mut exports = Self {
            functions: Vec::new(),
            has_bindings: false,
        };
        for payload in Parser::new(0).parse_all(bytes) {
            match payload? {
                Payload::ExportSection(section) => {
                    for export in section {
                        let export = export?;
                        if export.kind == ExternalKind::Func {
                            let id = types.as_ref().core_function_at(export.index);
                            let function = types[id].unwrap_func().clone();
                            exports.functions.push((export.name.to_owned(), function));
                        }
                    }
                }
                Payload::CustomSection(section) => {
                    exports.has_bindings |= section.name().starts_with(BINDINGS);
                }
                _ => {}
            }
        }
        Ok(exports)
    }

    /// What keeps the module from being a plugin, in words that follow "it is a core module".
    fn misfit(&self) -> String {
        let mut missing = Vec::new();
        for (function, parameters, result) in FUNCTIONS {
            let name = format!("{INTERFACE}#{function}");
            let Some((_, found)) = self.functions.iter().find(|(n, _)| *n == name) else {
                missing.push(format!("`{name}`"));
                continue;
            };
            let needed = FuncType::new(parameters.iter().copied(), [result]);
            if *found != needed {
                return format!(
                    "whose export `{name}` has the type {} and must have {}",
                    shown(found),
                    shown(&needed)
                );
            }
        }
        match (missing.len(), self.has_bindings) {
            (0, true) => "that does not become a component".to_owned(),
            (0, false) => format!(
                "without the section `{BINDINGS}`, in which bindings made from wit/kernel.wit say \
                 what its exports mean (`wasm-tools component embed` adds it)"
            ),
            (1, _) => format!("without the export {}", missing[0]),
            _ => format!("without the exports {}", missing.join(", ")),
        }
    }
}

/// As in `(i32, i64) -> i32`.
fn shown(function: &FuncType) -> String {
    let list = |types: &[ValType]| {
        let types: Vec<String> = types.iter().map(ToString::to_string).collect();
        types.join(", ")
    };
    let mut text = format!("({})", list(function.params()));
    if !function.results().is_empty() {
        let _ = write!(text, " -> {}", list(function.results()));
    }
    text
}
