//! Plugins that are odd as modules and components, descriptions that say what there is not, and
//! guests at the edge of a limit: each is refused by name, or served right.

use crate::support::guest;
use crate::support::trial::{Trial, case};

const TRAP: &str = "GUEST_TRAP";
const BAD: &str = "BAD_ANSWER";

/// A guest whose `describe` first does `body`, with the address of its kernel's record in `$k`.
fn described(body: &str) -> String {
    format!(
        "(func $describe (result i32) (local $k i32) (local.set $k (i32.load (i32.const 1044)))
        {body} i32.const 1024)"
    )
}

/// Where a declaration of a parameter is made: memory there is zero.
const PARAMETER: u32 = 4096;

/// `describe` with one parameter, a boolean without a name, changed by single bytes.
fn parameter(bytes: &[(u32, u8)]) -> String {
    let set = |(at, byte): &(u32, u8)| {
        format!(
            "(i32.store8 (i32.const {}) (i32.const {byte}))",
            PARAMETER + at
        )
    };
    let bytes: String = bytes.iter().map(set).collect();
    described(&format!(
        "(i32.store offset=32 (local.get $k) (i32.const {PARAMETER}))
        (i32.store offset=36 (local.get $k) (i32.const 1)) {bytes}"
    ))
}

#[test]
fn descriptions_that_lie_nowhere_or_are_no_values_are_refused() {
    let trial = Trial::new();
    let refused = |name: &str, text: &str| trial.guest_refused(name, text, "describe");
    for at in ["-1", "-4", "131072", "131068", "1025", "1026"] {
        let text = format!("(func $describe (result i32) i32.const {at})");
        refused(&format!("at {at}"), &text);
    }
    // Lists and strings of the record, of its kernel, of that one's first port: where their pair is.
    let record = [1028, 1036, 1044].map(|at| format!("(i32.const {at})"));
    let kernel =
        [0, 8, 16, 24, 32, 40].map(|at| format!("(i32.add (local.get $k) (i32.const {at}))"));
    let port = [0, 8, 28]
        .map(|at| format!("(i32.add (i32.load offset=16 (local.get $k)) (i32.const {at}))"));
    for place in record.iter().chain(&kernel).chain(&port) {
        for (address, length) in [
            (1024, -1),
            (1024, i32::MIN),
            (-8, 1),
            (131_072, 1),
            (131_064, 200),
        ] {
            let body = format!(
                "(i64.store align=4 {place} (i64.const {}))",
                i64::from(length) << 32 | i64::from(address) & 0xffff_ffff
            );
            refused(&format!("{place} {address} {length}"), &described(&body));
        }
    }
    for place in ["(i32.load (i32.const 1028))", "(i32.load (local.get $k))"] {
        let body = format!("(i32.store8 {place} (i32.const 0xff))");
        refused("no UTF-8", &described(&body));
    }
    // Values of enumerations, options and variants that there are not.
    let port = "(i32.load offset=16 (local.get $k))";
    for (name, body) in [
        (
            "a dtype",
            format!("(i32.store8 (i32.load offset=8 {port}) (i32.const 17))"),
        ),
        (
            "a role",
            format!("(i32.store8 offset=24 {port} (i32.const 2))"),
        ),
        (
            "an axis",
            "(i32.store8 offset=48 (local.get $k) (i32.const 2))".to_owned(),
        ),
        (
            "combine",
            "(i32.store8 offset=56 (local.get $k) (i32.const 3))".to_owned(),
        ),
    ] {
        refused(name, &described(&body));
    }
    for (name, bytes) in [
        ("a kind", &[(8, 8)][..]),
        ("a kind", &[(8, 255)]),
        ("a default", &[(16, 2)]),
        ("a default's value", &[(16, 1), (24, 5)]),
        ("a default's number", &[(16, 1), (24, 1), (32, 3)]),
        ("a default's text", &[(16, 1), (24, 3), (35, 255), (36, 1)]),
        ("a default's numbers", &[(16, 1), (24, 4), (39, 255)]),
        ("a minimum", &[(48, 2)]),
        ("a minimum's number", &[(48, 1), (56, 3)]),
        ("a maximum", &[(72, 255)]),
        ("a maximum's number", &[(72, 1), (80, 255)]),
        ("choices", &[(103, 255)]),
        ("a doc", &[(111, 255)]),
    ] {
        refused(name, &parameter(bytes));
    }
    trial.ended();
}

#[test]
fn what_a_description_may_not_say_is_named() {
    let trial = Trial::new();
    trial.guest_refused(
        "abi",
        &described("(i32.store (i32.const 1024) (i32.const 2))"),
        "abi",
    );
    trial.guest_refused(
        "none",
        &described("(i32.store (i32.const 1048) (i32.const 0))"),
        "kernel",
    );
    trial.guest_refused("nameless", &parameter(&[]), "parameter");
    let rank = "(i32.store offset=16 (i32.load offset=16 (local.get $k)) (i32.const 9))";
    trial.guest_refused("rank", &described(rank), "rank");
    let dtypes = "(i32.store offset=12 (i32.load offset=16 (local.get $k)) (i32.const 0))";
    trial.guest_refused("dtypes", &described(dtypes), "dtype");
    trial.ended();
}

/// A component of one core module with this text; the module alone, too.
fn odd(module: &str) -> [Vec<u8>; 2] {
    [
        format!("(component (core module {module}))"),
        format!("(module {module})"),
    ]
    .map(|text| wat::parse_str(&text).unwrap_or_else(|e| panic!("{module}: {e}")))
}

#[test]
fn modules_beyond_plain_wasm32_are_refused() {
    let trial = Trial::new();
    for (name, module, word) in [
        ("memory64", "(memory i64 1)", "memory64"),
        ("shared memory", "(memory 1 1 shared)", "threads"),
        ("two memories", "(memory 1) (memory 1)", "multiple memories"),
        ("gc", "(type (struct (field i32)))", "gc"),
        ("exceptions", "(tag (param i32))", "exceptions"),
        (
            "relaxed simd",
            "(func (param v128 v128) (result v128) (i8x16.relaxed_swizzle (local.get 0) (local.get 1)))",
            "relaxed",
        ),
        ("a page of one byte", "(memory 1 (pagesize 1))", "page size"),
    ] {
        let [component, core] = odd(module);
        trial.refused(name, &component, word);
        trial.refused(name, &core, "");
    }
    for import in [
        r#"(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))"#,
        r#"(import "env" "memory" (memory 1))"#,
        r#"(import "strait:kernel/log-sink@0.1.0" "no-such" (func))"#,
    ] {
        for bytes in odd(import) {
            trial.refused(import, &bytes, "");
        }
    }
    trial.refused(
        "wasi",
        &wat::parse_str(
            r#"(component (import "wasi:filesystem/preopens@0.2.0" (instance (export "get-directories" (func)))))"#,
        )
        .unwrap(),
        "wasi:filesystem/preopens",
    );
    trial.ended();
}

#[test]
fn what_does_not_fit_at_instantiation_is_refused() {
    let trial = Trial::new();
    for (name, text, word) in [
        (
            "data",
            r#"(data (i32.const 131070) "astray")"#,
            "out of bounds",
        ),
        (
            "data at the end",
            r#"(data (i32.const -1) "x")"#,
            "out of bounds",
        ),
        (
            "elements",
            "(table 2 funcref) (elem (i32.const 1) $run $run)",
            "out of bounds",
        ),
        ("memory", r#"(memory (export "memory") 1025)"#, "limit"),
        ("table", "(table 100001 funcref)", "tables of 100001"),
        ("tables", &"(table 1 funcref)".repeat(17), "table"),
    ] {
        trial.guest_refused(name, text, word);
    }
    // Fits `describe`, and not an invocation.
    let memory = r#"(memory (export "memory") 600)"#;
    trial.check(&case("memory", memory, "LIMIT_GUEST_BYTES"), 60_000);
    // The declared maximum leaves no room for tensors.
    let memory = r#"(memory (export "memory") 2 2)"#;
    trial.check(&case("maximum", memory, BAD), 60_000);
    trial.ended();
}

/// A section of a component's binary.
fn section(id: u8, bytes: &[u8]) -> Vec<u8> {
    let mut section = vec![id];
    let mut rest = bytes.len();
    while rest >= 0x80 {
        section.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
        rest >>= 7;
    }
    section.push(u8::try_from(rest).unwrap());
    section.extend_from_slice(bytes);
    section
}

/// The component with `count` (below 128) more instances of its core module `index`.
fn multiplied(mut component: Vec<u8>, index: u8, count: u8) -> Vec<u8> {
    const CORE_INSTANCE: u8 = 2;
    let mut bytes = vec![count];
    (0..count).for_each(|_| bytes.extend([0, index, 0]));
    component.extend(section(CORE_INSTANCE, &bytes));
    component
}

#[test]
fn a_component_has_one_memory_and_a_few_instances() {
    let trial = Trial::new();
    let twice = multiplied(guest::component("twice", ""), 0, 1);
    trial.refused("two memories", &twice, "memor");
    let with_empty = |name: &str, count: u8| {
        const CORE_MODULE: u8 = 1;
        let mut component = guest::component(name, "");
        component.extend(section(CORE_MODULE, b"\0asm\x01\0\0\0"));
        multiplied(component, 1, count)
    };
    trial.refused("many instances", &with_empty("many", 100), "instance");
    trial.ended();
    trial
        .rig
        .host
        .own_caller()
        .load_plugin(&with_empty("few", 20))
        .unwrap();
    trial.next_is_right("few");
}

/// What is large and allowed is served, and no slower than it must be.
#[test]
fn guests_at_the_edge_are_served() {
    let trial = Trial::new();
    let many: String = (0..5000)
        .map(|i| format!("(global (mut i32) (i32.const {i})) (func (result i32) i32.const {i})\n"))
        .collect();
    let notes = |count: u32| {
        format!(
            "(func $notes (result i32) (i32.store (i32.const 768) (i32.const 8192))
            (i32.store (i32.const 772) (i32.const {count})) i32.const 768)"
        )
    };
    for (name, text) in [
        ("tables", "(table 100000 funcref)".repeat(2)),
        ("many", many),
        ("maximum", r#"(memory (export "memory") 2 500)"#.to_owned()),
        ("notes", notes(64)),
    ] {
        trial
            .rig
            .host
            .own_caller()
            .load_plugin(&guest::component(name, &text))
            .unwrap();
        for (input, bytes) in ["large", "small"].iter().zip(&trial.inputs) {
            let copy = trial.call(name, input, 60_000).unwrap();
            assert!(copy == *bytes, "{name} on {input}");
        }
    }
    trial.check(&case("more-notes", notes(65), BAD), 60_000);
    trial.ended();
}

#[test]
fn a_log_line_from_nowhere_is_no_log_line() {
    let trial = Trial::new();
    const IMPORT: &str =
        r#"(import "strait:kernel/log-sink@0.1.0" "log" (func $log (param i32 i64 i64)))"#;
    for (name, address, bytes, reason) in [
        ("last", "-1", "1", BAD),
        ("wraps", "-1", "2", BAD),
        ("far", "0x100000000", "1", BAD),
        ("farther", "0x7fffffffffffffff", "16", BAD),
        ("longest", "0", "-1", "LIMIT_LOG_BYTES"),
        ("wraps-long", "-16", "-1", "LIMIT_LOG_BYTES"),
        ("4gib", "0", "0x100000000", "LIMIT_LOG_BYTES"),
    ] {
        let text = format!(
            "{IMPORT}\n(func $run (param i32) (result i32)
            (call $log (i32.const -1) (i64.const {address}) (i64.const {bytes})) i32.const 0)"
        );
        trial.check(&case(name, text, reason), 60_000);
    }
    // While the host writes an argument the guest may not call out.
    let text = format!(
        "{IMPORT}\n(func $realloc (param i32 i32 i32 i32) (result i32)
        (call $log (i32.const 0) (i64.const 0) (i64.const 1)) i32.const 65536)"
    );
    trial.check(&case("calls-out", text, TRAP), 60_000);
    trial.ended();
}

#[test]
fn signatures_and_slices_that_make_no_sense_are_named() {
    let trial = Trial::new();
    let signed = |text: &str| {
        described(&format!(
            "(i32.store offset=40 (local.get $k) (i32.const 4096))
            (i32.store offset=44 (local.get $k) (i32.const {}))",
            text.len()
        )) + &format!("(data (i32.const 4096) \"{text}\")")
    };
    for (name, text, word) in [
        ("open", "(n)->(n", "parentheses"),
        ("arrowless", "n", "no ->"),
        ("outputs", "()->(),()", "2 outputs"),
        ("ranks", "(n)->(n)", "names 1 axes of port `x`"),
        ("long", &"(".repeat(1025), "1025 bytes"),
    ] {
        trial.guest_refused(name, &signed(text), word);
    }
    let set = |body: &str| described(body);
    for (name, body, word) in [
        (
            "axis",
            "(i32.store8 offset=48 (local.get $k) (i32.const 1))",
            "how slices are combined",
        ),
        (
            "combine",
            "(i32.store8 offset=56 (local.get $k) (i32.const 1))",
            "no split axis",
        ),
        (
            "tree",
            "(i32.store8 offset=48 (local.get $k) (i32.const 1)) (i32.store8 offset=56 (local.get $k) (i32.const 2))",
            "no rows",
        ),
        (
            "whole",
            "(i32.store8 offset=25 (i32.load offset=24 (local.get $k)) (i32.const 1))",
            "only an input",
        ),
    ] {
        trial.guest_refused(name, &set(body), word);
    }
    // A rule that makes sense is held: by what `open` answers, too.
    let shrinks = format!(
        "{}\n(func $open (param i32 i32 i32 i32 i32 i32) (result i32)
        (i32.store (i32.const 516) (i32.const 640)) (i32.store (i32.const 520) (i32.const 1))
        (i32.store8 (i32.const 640) (i32.const 14))
        (i32.store (i32.const 644) (i32.const 656)) (i32.store (i32.const 648) (i32.const 1))
        (i64.store (i32.const 656) (i64.const 3)) i32.const 512)",
        signed("()->()")
    );
    trial.check(&case("shrinks", shrinks, BAD), 60_000);
    trial.ended();
    let text = signed("(),()->(),()") + "(; $x2 ;)";
    trial
        .rig
        .host
        .own_caller()
        .load_plugin(&guest::component("pairs", &text))
        .unwrap();
    let call = |x2: &str| {
        trial
            .rig
            .invoke(serde_json::json!({"kernel": "pairs/k", "inputs": {"x": "large", "x2": x2}}))
    };
    let status = call("small").unwrap_err();
    assert_eq!(
        (status.reason.name(), &status.details["name"]),
        ("BAD_INPUT", &"x2".into()),
        "{status}"
    );
    let words = "axis 0 has size 100 and axis 0 of input `x` has size 100000";
    assert!(status.message.contains(words), "{status}");
    drop(call("large").unwrap());
}

#[test]
fn linear_algebra_is_not_offered_yet() {
    let trial = Trial::new();
    let import = r#"(import "strait:kernel/linalg@0.1.0" "dot" (func (param i64 i32 i64 i64 i32 i64 i64) (result f64)))"#;
    trial.guest_refused("linalg", import, "which this host does not offer yet");
    trial.ended();
}
