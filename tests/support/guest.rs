//! Plugins by hand: a core module in WAT around which `wit-component` puts the component.
//!
//! A guest file under `tests/guests` defines some of the functions; the rest are those of a
//! well-behaved plugin with one kernel `k`: `x` (float64, rank 0 to 8) to `y`, of the same spec.
//! It has a memory of 2 pages unless the file exports one of its own.
//! Globals it may use: `$x`, `$y` (i64 addresses), `$bytes` (i64), `$shape` and `$rank` (i32), `$in` and `$out` (chunk records).
//! Exported as `run` is `$step`: it calls `$run` and, if that answers 0, says that all was consumed and written
//! (without a call of a function, whose epoch check would end a guest that `$run` left to its fate).
//! One that names `$x2` has a second input `x2` and a second output `y2`, of the same spec.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "a module of test binaries, each of which uses a part of it"
)]

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};

/// The functions that the host calls in an invocation: name, parameters, result.
pub const FUNCTIONS: [(&str, &str, &str); 8] = [
    ("open", "i32 i32 i32 i32 i32 i32", "i32"),
    ("reserve", "i64", "i64"),
    ("bind", "i32 i32 i32 i32", "i32"),
    ("run", "i32", "i32"),
    ("extents", "", "i32"),
    ("notes", "", "i32"),
    ("last_error", "", "i32"),
    ("realloc", "i32 i32 i32 i32", "i32"),
];

/// Function name, what it is unless the guest file defines it.
const DEFAULTS: [(&str, &str); 10] = [
    ("$describe", "(func $describe (result i32) i32.const 1024)"),
    (
        "$open",
        r#"(func $open (param i32 i32 i32 i32 i32 i32) (result i32)
        (global.set $shape (i32.load offset=4 (local.get 4)))
        (global.set $rank (i32.load offset=8 (local.get 4)))
        (i32.store8 (i32.const 512) (i32.const 0))
        (i32.store (i32.const 516) (local.get 4))
        (i32.store (i32.const 520) (local.get 5))
        i32.const 512)"#,
    ),
    (
        "$reserve",
        r#"(func $reserve (param i64) (result i64)
        (i64.mul (i64.extend_i32_u (memory.grow (i32.wrap_i64 (i64.div_u (i64.add (local.get 0) (i64.const 65535)) (i64.const 65536))))) (i64.const 65536)))"#,
    ),
    (
        "$bind",
        r#"(func $bind (param i32 i32 i32 i32) (result i32)
        (global.set $x (i64.load (local.get 0)))
        (global.set $bytes (i64.load offset=8 (local.get 0)))
        (global.set $in (i64.load offset=16 (local.get 0)))
        (global.set $y (i64.load (local.get 2)))
        (global.set $out (i64.load offset=16 (local.get 2)))
        (if (i32.eq (local.get 1) (i32.const 2)) (then
          (global.set $x2 (i64.load offset=40 (local.get 0)))
          (global.set $y2 (i64.load offset=40 (local.get 2)))))
        (i32.store8 (i32.const 528) (i32.const 0))
        i32.const 528)"#,
    ),
    (
        "$run",
        r#"(func $run (param i32) (result i32)
        (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
        i32.const 0)"#,
    ),
    (
        "$step",
        r#"(func $step (param $mode i32) (result i32) (local $answer i32)
        (local.set $answer (call $run (local.get $mode)))
        (if (i32.eqz (local.get $answer)) (then
          (i64.store offset=24 (i32.wrap_i64 (global.get $in)) (i64.load offset=8 (i32.wrap_i64 (global.get $in))))
          (i64.store offset=24 (i32.wrap_i64 (global.get $out)) (i64.load offset=8 (i32.wrap_i64 (global.get $out))))
          (if (i32.eq (global.get $ports) (i32.const 2)) (then
            (i64.store offset=88 (i32.wrap_i64 (global.get $in)) (i64.load offset=72 (i32.wrap_i64 (global.get $in))))
            (i64.store offset=88 (i32.wrap_i64 (global.get $out)) (i64.load offset=72 (i32.wrap_i64 (global.get $out))))))))
        local.get $answer)"#,
    ),
    (
        "$extents",
        r#"(func $extents (result i32)
        (i32.store (i32.const 560) (global.get $shape))
        (i32.store (i32.const 564) (global.get $rank))
        (i64.store (i32.const 568) (i64.load (i32.const 560)))
        (i32.store (i32.const 552) (i32.const 560))
        (i32.store (i32.const 556) (global.get $ports))
        i32.const 552)"#,
    ),
    (
        "$notes",
        "(func $notes (result i32) (i64.store (i32.const 568) (i64.const 0)) i32.const 568)",
    ),
    (
        "$last_error",
        r#"(func $last_error (result i32)
        (i32.store8 (i32.const 576) (i32.const 2))
        (i32.store (i32.const 580) (i32.const 700))
        (i32.store (i32.const 584) (i32.const 9))
        (i64.store align=4 (i32.const 596) (i64.const 0))
        i32.const 576)"#,
    ),
    (
        "$realloc",
        r#"(func $realloc (param i32 i32 i32 i32) (result i32)
        (local $at i32)
        (local.set $at (i32.and (i32.add (global.get $heap) (i32.sub (local.get 2) (i32.const 1))) (i32.sub (i32.const 0) (local.get 2))))
        (global.set $heap (i32.add (local.get $at) (local.get 3)))
        local.get $at)"#,
    ),
];

/// Records of the canonical ABI in one data segment.
struct Data {
    base: u32,
    bytes: Vec<u8>,
}

impl Data {
    fn add(&mut self, bytes: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.base + u32::try_from(self.bytes.len()).unwrap();
        self.bytes.extend_from_slice(bytes);
        at
    }

    fn list(&mut self, bytes: &[u8], count: usize) -> [u8; 8] {
        let at = self.add(bytes);
        let mut pair = [0; 8];
        pair[..4].copy_from_slice(&at.to_le_bytes());
        pair[4..].copy_from_slice(&u32::try_from(count).unwrap().to_le_bytes());
        pair
    }

    fn text(&mut self, text: &str) -> [u8; 8] {
        self.list(text.as_bytes(), text.len())
    }

    fn port(&mut self, name: &str) -> Vec<u8> {
        const FLOAT64: u8 = 14;
        let mut port = Vec::new();
        port.extend(self.text(name));
        port.extend(self.list(&[FLOAT64], 1));
        port.extend(0_u32.to_le_bytes());
        port.extend(8_u32.to_le_bytes());
        port.extend([0; 4]);
        port.extend(self.text(""));
        port
    }
}

/// A description with the kernel `k`; its record is the first thing in the segment.
fn description(plugin: &str, ports: usize, streams: bool, splits: bool) -> Vec<u8> {
    // The canonical ABI's sizes.
    const DESCRIPTION_BYTES: usize = 40;
    const KERNEL_BYTES: usize = 104;
    const SPLIT_AXIS_AT: usize = 48;
    const COMBINE_AT: usize = 56;
    const STREAMING_AT: usize = 88;
    let mut data = Data {
        base: 1024,
        bytes: vec![0; DESCRIPTION_BYTES],
    };
    let mut side = |names: [&str; 2]| -> Vec<u8> {
        let names = names.iter().take(ports);
        names.flat_map(|name| data.port(name)).collect()
    };
    let (x, y) = (side(["x", "x2"]), side(["y", "y2"]));
    let mut kernel = Vec::new();
    kernel.extend(data.text("k"));
    kernel.extend(data.text("a kernel of the tests"));
    kernel.extend(data.list(&x, ports));
    kernel.extend(data.list(&y, ports));
    // Parameters, signature, split axis, combine, in-place, cost hint: none.
    kernel.resize(KERNEL_BYTES, 0);
    kernel[STREAMING_AT] = u8::from(streams);
    // Along axis 0, put together one after the other.
    kernel[SPLIT_AXIS_AT] = u8::from(splits);
    kernel[COMBINE_AT] = u8::from(splits);
    let mut record = Vec::new();
    record.extend(1_u32.to_le_bytes());
    record.extend(data.text(plugin));
    record.extend(data.text("0.0.1"));
    record.extend(data.list(&kernel, 1));
    // A gap, and no panic record.
    record.extend([0; 12]);
    assert_eq!(record.len(), DESCRIPTION_BYTES);
    data.bytes[..DESCRIPTION_BYTES].copy_from_slice(&record);
    data.bytes
}

/// The core module of a guest file's text, as text. `plugin` is the name that it gives itself.
pub fn module(plugin: &str, text: &str) -> String {
    let ports = 1 + usize::from(text.contains("$x2"));
    let [streams, splits] =
        [";; It streams.", ";; It splits."].map(|declares| text.contains(declares));
    let escaped: String = description(plugin, ports, streams, splits)
        .iter()
        .map(|b| format!("\\{b:02x}"))
        .collect();
    let defaults: String = DEFAULTS
        .iter()
        .filter(|(name, _)| !text.contains(&format!("(func {name} ")))
        .map(|(_, body)| *body)
        .collect();
    let imports: String = text
        .lines()
        .filter(|line| line.starts_with("(import"))
        .collect();
    let rest: String = text
        .lines()
        .filter(|line| !line.starts_with("(import"))
        .map(|l| format!("{l}\n"))
        .collect();
    let memory = if text.contains("(memory (export") {
        ""
    } else {
        r#"(memory (export "memory") 2)"#
    };
    format!(
        r#"(module
        {imports}
        {memory}
        (global $x (mut i64) (i64.const 0)) (global $y (mut i64) (i64.const 0)) (global $bytes (mut i64) (i64.const 0))
        (global $in (mut i64) (i64.const 0)) (global $out (mut i64) (i64.const 0))
        (global $shape (mut i32) (i32.const 0)) (global $rank (mut i32) (i32.const 0))
        (global $x2 (mut i64) (i64.const 0)) (global $y2 (mut i64) (i64.const 0)) (global $ports i32 (i32.const {ports}))
        (global $heap (mut i32) (i32.const 65536))
        (data (i32.const 700) "own words")
        (data (i32.const 1024) "{escaped}")
        (func $moved (param $record i64) (param $rows i64) (i64.store offset=24 (i32.wrap_i64 (local.get $record)) (local.get $rows)))
        {defaults}
        {rest}
        (export "strait:kernel/kernels@0.1.0#describe" (func $describe))
        (export "strait:kernel/kernels@0.1.0#open" (func $open))
        (export "strait:kernel/kernels@0.1.0#reserve" (func $reserve))
        (export "strait:kernel/kernels@0.1.0#bind" (func $bind))
        (export "strait:kernel/kernels@0.1.0#run" (func $step))
        (export "strait:kernel/kernels@0.1.0#extents" (func $extents))
        (export "strait:kernel/kernels@0.1.0#notes" (func $notes))
        (export "strait:kernel/kernels@0.1.0#last-error" (func $last_error))
        (export "cabi_realloc" (func $realloc)))"#
    )
}

/// A core module with the section that bindings put in.
pub fn with_bindings(wat: &str) -> Vec<u8> {
    with_bindings_and(wat, None)
}

/// The same for the world `plugin` of the WIT package `other`, if there is one.
fn with_bindings_and(wat: &str, other: Option<&str>) -> Vec<u8> {
    let mut module = wat::parse_str(wat).unwrap_or_else(|e| panic!("{e}: {wat}"));
    let mut resolve = wit_parser::Resolve::default();
    let (mut package, _) = resolve.push_path("wit").unwrap();
    if let Some(other) = other {
        package = resolve.push_str("other.wit", other).unwrap();
    }
    let world = resolve.select_world(&[package], Some("plugin")).unwrap();
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    module
}

/// The same as [`component`], but what are globals there lies in memory: such a guest keeps nothing elsewhere.
pub fn component_without_globals(plugin: &str, text: &str) -> Vec<u8> {
    encoded(&without_globals(plugin, text), None)
}

/// The same, with what the world `plugin` of the WIT package `other` has beside.
pub fn component_with(plugin: &str, text: &str, other: &str) -> Vec<u8> {
    encoded(&without_globals(plugin, text), Some(other))
}

fn without_globals(plugin: &str, text: &str) -> String {
    let mut module = module(plugin, text);
    let globals = ["x", "y", "bytes", "in", "out", "x2", "y2"].map(|name| (name, "i64"));
    let words = ["shape", "rank", "heap"].map(|name| (name, "i32"));
    for (index, (name, ty)) in globals.into_iter().chain(words).enumerate() {
        let at = 800 + 8 * index;
        let is = format!("(global ${name} (mut {ty}) ({ty}.const ");
        assert!(module.contains(&is), "{is}");
        module = module
            .replace(&is, &format!("(global $unused_{name} {ty} ({ty}.const "))
            .replace(
                &format!("(global.get ${name})"),
                &format!("({ty}.load (i32.const {at}))"),
            )
            .replace(
                &format!("(global.set ${name} "),
                &format!("({ty}.store (i32.const {at}) "),
            );
        if name == "heap" {
            let first = format!(
                "(data (i32.const {at}) \"\\00\\00\\01\\00\")\n        (data (i32.const 700)"
            );
            module = module.replace("(data (i32.const 700)", &first);
        }
    }
    module
}

fn encoded(module: &str, other: Option<&str>) -> Vec<u8> {
    ComponentEncoder::default()
        .module(&with_bindings_and(module, other))
        .unwrap()
        .validate(true)
        .encode()
        .unwrap()
}

/// The component of a guest file's text. `plugin` is the name that it gives itself.
pub fn component(plugin: &str, text: &str) -> Vec<u8> {
    encoded(&module(plugin, text), None)
}
