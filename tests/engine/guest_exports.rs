//! Guests that misbehave in every function of the contract, and that answer with everything the
//! canonical ABI can say and must not: each ends by a named error within bounded time, no input
//! changes, nothing is left, and the next call is right.
//!
//! The guests are written here, case by case; `tests/engine/hostile.rs` has those that are a file each.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use crate::support::guest;
use crate::support::trial::{Case, Trial, case};

/// Those after whose answer the host calls back to free it.
const POST: [&str; 5] = ["open", "bind", "extents", "notes", "last-error"];

const FAILS: &str = "(func $run (param i32) (result i32) i32.const 1)";

const TRAP: &str = "GUEST_TRAP";
const BAD: &str = "BAD_ANSWER";

/// Guests with `body` in place of each function in turn, and of each function that frees.
fn everywhere(what: &str, body: &str, rest: &str, reason: &'static str) -> Vec<Case> {
    let fails = |name: &str| if name.starts_with("last") { FAILS } else { "" };
    let own = guest::FUNCTIONS.iter().map(|(name, parameters, result)| {
        let rest = format!("{rest}\n{}", fails(name));
        let text =
            format!("(func ${name} (param {parameters}) (result {result}) {body} unreachable)");
        case(format!("{what}-{name}"), format!("{text}\n{rest}"), reason)
    });
    let post = POST.iter().map(|name| {
        let rest = format!("{rest}\n{}", fails(name));
        let text = format!("(func $post (param i32) {body})\n{}", freed_by_post(name));
        case(
            format!("{what}-after-{name}"),
            format!("{text}\n{rest}"),
            reason,
        )
    });
    own.chain(post).collect()
}

fn freed_by_post(name: &str) -> String {
    format!(r#"(export "cabi_post_strait:kernel/kernels@0.1.0#{name}" (func $post))"#)
}

const SPIN: &str = "(loop $for_ever (br $for_ever))";
const GROW: &str = "(loop $more (drop (memory.grow (i32.const 16))) (br $more))";
const DEEP: &str = "(func $deep (result i32) (i32.add (call $deep) (i32.const 1)))";

#[test]
fn whatever_spins_meets_its_deadline() {
    let trial = Trial::new();
    trial.check_all(&everywhere("spins", SPIN, "", "DEADLINE"), 150);
}

#[test]
fn whatever_traps_or_recurses_is_a_trap() {
    let trial = Trial::new();
    trial.check_all(&everywhere("traps", "unreachable", "", TRAP), 60_000);
    let cases = everywhere("deep", "(drop (call $deep))", DEEP, TRAP);
    trial.check_all(&cases, 60_000);
}

#[test]
fn whatever_grows_meets_its_limit() {
    let trial = Trial::new();
    let cases = everywhere("grows", GROW, "", "LIMIT_GUEST_BYTES");
    trial.check_all(&cases, 60_000);
    let table = "(loop $more (drop (table.grow $t (ref.null func) (i32.const 9000))) (br $more))";
    let cases = everywhere("tables", table, "(table $t 1 funcref)", BAD);
    trial.check_all(&cases, 60_000);
}

/// What cannot be done while a plugin is loaded. The three that spin have 5 s each, all at once.
#[test]
fn a_plugin_that_misbehaves_while_it_is_loaded_is_refused() {
    let trial = Trial::new();
    let places = |body: &str| {
        [
            format!("(func $describe (result i32) {body} unreachable)"),
            format!("(func $begin {body})\n(start $begin)"),
            format!(
                "(func $post (param i32) {body})\n{}",
                freed_by_post("describe")
            ),
        ]
    };
    std::thread::scope(|scope| {
        for text in places(SPIN) {
            let trial = &trial;
            scope.spawn(move || trial.guest_refused("spins", &text, "deadline"));
        }
    });
    for text in places("unreachable") {
        trial.guest_refused("traps", &text, "unreachable");
    }
    for text in places("(drop (call $deep))") {
        trial.guest_refused("deep", &format!("{text}\n{DEEP}"), "stack");
    }
    for text in places(GROW) {
        trial.guest_refused("grows", &text, "limit");
    }
    trial.ended();
}

/// `(i32.store AT VALUE)` for each pair.
fn stores(pairs: &[(u32, &str)]) -> String {
    let store = |(at, value): &(u32, &str)| format!("(i32.store (i32.const {at}) {value})");
    pairs.iter().map(store).collect()
}

const END: &str = "(i32.mul (memory.size) (i32.const 65536))";
/// Pairs of address and length where there is nothing, for elements of 8 bytes and more.
const NOWHERE: [(&str, &str, &str); 6] = [
    ("longest", "(i32.const 800)", "(i32.const -1)"),
    ("half", "(i32.const 800)", "(i32.const 0x80000000)"),
    ("last", "(i32.const -8)", "(i32.const 1)"),
    ("wraps", "(i32.const -8)", "(i32.const -1)"),
    ("beyond", END, "(i32.const 1)"),
    (
        "over",
        "(i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 8))",
        "(i32.const 17)",
    ),
];
/// Memory from 800 on is zero: bytes that are no UTF-8 are put there.
const NOT_UTF8: &str = "(i32.store (i32.const 800) (i32.const 0xc0ff80fe))";

/// The guest whose `name` stores `body` and answers 800 - 32: records lie at 768, memory at 800 is free.
fn answering(name: &str, body: &str) -> String {
    let (_, parameters, _) = guest::FUNCTIONS.iter().find(|f| f.0 == name).unwrap();
    let rest = if name == "last_error" { FAILS } else { "" };
    format!("(func ${name} (param {parameters}) (result i32) {body} i32.const 768)\n{rest}")
}

/// What is stored where.
type Stores = &'static [(u32, &'static str)];

/// Every list and string that an invocation's functions answer: function, what it is, where its
/// pair is stored, what must be stored beside it, whether it is a string.
const LISTS: [(&str, &str, u32, Stores, bool); 13] = [
    ("open", "specs", 772, &[], false),
    (
        "open",
        "shape",
        788,
        &[(772, "(i32.const 784)"), (776, "(i32.const 1)")],
        false,
    ),
    ("open", "bad-name", 776, &[(768, "(i32.const 1)")], true),
    ("open", "bad-reason", 784, &[(768, "(i32.const 1)")], true),
    (
        "open",
        "unsupported",
        776,
        &[(768, "(i32.const 1)"), (772, "(i32.const 1)")],
        true,
    ),
    ("bind", "bad-reason", 784, &[(768, "(i32.const 1)")], true),
    (
        "bind",
        "failed",
        776,
        &[(768, "(i32.const 1)"), (772, "(i32.const 2)")],
        true,
    ),
    ("extents", "list", 768, &[], false),
    (
        "extents",
        "shape",
        784,
        &[(768, "(i32.const 784)"), (772, "(i32.const 1)")],
        false,
    ),
    ("notes", "list", 768, &[], false),
    (
        "notes",
        "text",
        784,
        &[(768, "(i32.const 776)"), (772, "(i32.const 1)")],
        true,
    ),
    ("last_error", "bad-name", 772, &[], true),
    ("last_error", "failed", 772, &[(768, "(i32.const 2)")], true),
];

#[test]
fn answers_that_lie_nowhere_or_are_no_text_are_traps() {
    let trial = Trial::new();
    for (function, what, at, beside, text) in LISTS {
        let named = |how: &str| format!("{function}-{what}-{how}");
        for (how, address, length) in NOWHERE {
            let pair = stores(&[(at, address), (at + 4, length)]);
            let body = format!("{}{pair}", stores(beside));
            trial.check(&case(named(how), answering(function, &body), TRAP), 60_000);
        }
        let (address, length, set) = if text {
            ("(i32.const 800)", "(i32.const 4)", NOT_UTF8)
        } else {
            // Not where its elements may lie.
            ("(i32.const 801)", "(i32.const 1)", "")
        };
        let pair = stores(&[(at, address), (at + 4, length)]);
        let body = format!("{set}{}{pair}", stores(beside));
        let how = if text { "no-utf8" } else { "odd" };
        trial.check(&case(named(how), answering(function, &body), TRAP), 60_000);
    }
}

#[test]
fn records_that_lie_nowhere_and_values_that_are_none_are_traps() {
    let trial = Trial::new();
    for name in ["open", "bind", "extents", "notes", "last_error"] {
        let rest = if name == "last_error" { FAILS } else { "" };
        let (_, parameters, _) = guest::FUNCTIONS.iter().find(|f| f.0 == name).unwrap();
        let back = |n: u32| format!("(i32.sub {END} (i32.const {n}))");
        for (how, at) in [
            ("at-end", back(4)),
            ("beyond", END.to_owned()),
            ("last", "(i32.const -4)".to_owned()),
            ("odd", "(i32.const 769)".to_owned()),
        ] {
            let text = format!("(func ${name} (param {parameters}) (result i32) {at})\n{rest}");
            trial.check(&case(format!("{name}-{how}"), text, TRAP), 60_000);
        }
    }
    // A result that is neither, an error, a dtype and a role that there are not.
    let spec: &[(u32, &str)] = &[(772, "(i32.const 784)"), (776, "(i32.const 1)")];
    for (function, what, set) in [
        ("open", "result", stores(&[(768, "(i32.const 2)")])),
        ("open", "result-255", stores(&[(768, "(i32.const 255)")])),
        (
            "open",
            "error",
            stores(&[(768, "(i32.const 1)"), (772, "(i32.const 3)")]),
        ),
        (
            "open",
            "dtype",
            stores(spec) + &stores(&[(784, "(i32.const 17)")]),
        ),
        (
            "open",
            "dtype-255",
            stores(spec) + &stores(&[(784, "(i32.const 255)")]),
        ),
        (
            "open",
            "role",
            stores(spec) + &stores(&[(784, "(i32.const 0x20e)")]),
        ),
        ("bind", "result", stores(&[(768, "(i32.const 2)")])),
        (
            "bind",
            "error",
            stores(&[(768, "(i32.const 1)"), (772, "(i32.const 255)")]),
        ),
        ("last_error", "error", stores(&[(768, "(i32.const 3)")])),
    ] {
        let name = format!("{function}-no-{what}");
        trial.check(&case(name, answering(function, &set), TRAP), 60_000);
    }
}

/// A list of 16 MiB whose elements all name the same memory: gigabytes for whoever believes it.
#[test]
fn lists_that_name_the_same_memory_again_and_again_are_traps() {
    let trial = Trial::new();
    let pair = |at: u32, stride: u32| {
        let count = format!("(i32.const {})", (16 << 20) / stride);
        stores(&[(at, "(call $many)"), (at + 4, &count)])
    };
    let many = |stride: u32, at: u32| {
        format!(
            r"(func $many (result i32) (local $at i32) (local $list i32)
            (local.set $list (i32.mul (memory.grow (i32.const 256)) (i32.const 65536)))
            (local.set $at (local.get $list))
            (loop $next
              (i32.store offset={at} (local.get $at) (i32.const 8192))
              (i32.store offset={} (local.get $at) (i32.const 49152))
              (br_if $next (i32.lt_u
                (local.tee $at (i32.add (local.get $at) (i32.const {stride})))
                (i32.add (local.get $list) (i32.const {})))))
            local.get $list)",
            at + 4,
            (16 << 20) / stride * stride,
        )
    };
    for (function, at, stride, first) in [
        ("open", 772, 12, 4),
        ("extents", 768, 8, 0),
        ("notes", 768, 16, 8),
    ] {
        let text = answering(function, &pair(at, stride)) + &many(stride, first);
        trial.check(&case(format!("{function}-many"), text, TRAP), 60_000);
    }
    let describe = format!(
        "(func $describe (result i32) {} i32.const 1024)",
        pair(1044, 104)
    );
    trial.guest_refused("describe-many", &(describe + &many(104, 8)), "describe");
    trial.ended();
}

/// `$step` that says these rows were consumed and written, and answers `answer`.
fn stepping(consumed: &str, written: &str, answer: u32) -> String {
    format!(
        "(func $step (param i32) (result i32)
        (call $moved (global.get $in) (i64.const {consumed}))
        (call $moved (global.get $out) (i64.const {written}))
        i32.const {answer})"
    )
}

/// Copies the next 7 rows of each chunk as its record says where they are; wants to be called until all are copied.
const STEPS: &str = r"(func $row (param $record i64) (result i64) (i64.load offset=8 (i32.wrap_i64 (local.get $record))))
    (func $at (param $record i64) (result i64) (i64.load offset=16 (i32.wrap_i64 (local.get $record))))
    (func $step (param i32) (result i32) (local $rows i64)
      (local.set $rows (select (i64.const 7) (call $row (global.get $in)) (i64.gt_u (call $row (global.get $in)) (i64.const 7))))
      (memory.copy
        (i32.wrap_i64 (i64.add (global.get $y) (call $at (global.get $out))))
        (i32.wrap_i64 (i64.add (global.get $x) (call $at (global.get $in))))
        (i32.wrap_i64 (i64.mul (local.get $rows) (i64.const 8))))
      (call $moved (global.get $in) (local.get $rows))
      (call $moved (global.get $out) (local.get $rows))
      (select (i32.const 0) (i32.const 2) (i64.eq (local.get $rows) (call $row (global.get $in)))))";

#[test]
fn a_guest_may_take_its_chunk_in_steps() {
    let trial = Trial::new();
    let component = guest::component("steps", STEPS);
    trial.rig.host.own_caller().load_plugin(&component).unwrap();
    for (input, bytes) in ["large", "small"].iter().zip(&trial.inputs) {
        let copy = trial.call("steps", input, 60_000).unwrap();
        assert!(copy == *bytes, "steps on {input}");
    }
    trial.ended();
}

#[test]
fn rows_that_cannot_have_been_moved_are_bad_answers() {
    let trial = Trial::new();
    for (name, step) in [
        ("consumed-more", stepping("100001", "100", 0)),
        ("consumed-all", stepping("-1", "0", 0)),
        ("written-more", stepping("0", "100001", 0)),
        ("written-all", stepping("0", "-1", 2)),
        // `extents` says as many as there are.
        ("written-none", stepping("100", "0", 0)),
        ("gets-nowhere", stepping("0", "0", 2)),
        // The second step has nothing more to take.
        (
            "says-more-for-ever",
            stepping("0", "0", 2).replace(
                "(i64.const 0)",
                "(i64.load offset=8 (i32.wrap_i64 (global.get $in)))",
            ),
        ),
        ("answers-three", stepping("1", "1", 3)),
    ] {
        trial.check(&case(name, step, BAD), 60_000);
    }
    // A row at a time is progress, but not without end.
    let slow = "(func $step (param i32) (result i32) (local $n i32)
        (loop $wait (local.set $n (i32.add (local.get $n) (i32.const 1)))
          (br_if $wait (i32.lt_u (local.get $n) (i32.const 50000000))))
        (call $moved (global.get $out) (i64.const 1)) i32.const 2)";
    trial.check(&case("slow", slow, "DEADLINE"), 150);
    // What else it writes into the records is not believed.
    let scribbles = "(func $step (param i32) (result i32) (local $rows i64)
        (local.set $rows (i64.load offset=8 (i32.wrap_i64 (global.get $in))))
        (drop (call $run (i32.const 1)))
        (memory.fill (i32.wrap_i64 (global.get $in)) (i32.const 0xff) (i32.const 128))
        (call $moved (global.get $in) (local.get $rows))
        (call $moved (global.get $out) (local.get $rows)) i32.const 0)";
    let component = guest::component("scribbles", scribbles);
    trial.rig.host.own_caller().load_plugin(&component).unwrap();
    let copy = trial.call("scribbles", "small", 60_000).unwrap();
    assert!(copy == trial.inputs[1]);
    trial.ended();
}

/// A guest that traps, and announced a panic record at `address`.
fn panicking(address: &str, data: &str) -> String {
    format!(
        "(func $describe (result i32) (i64.store (i32.const 1056) (i64.const {address})) i32.const 1024)
        {data}\n(func $run (param i32) (result i32) unreachable)"
    )
}

#[test]
fn a_panic_is_told_and_a_false_record_is_not_believed() {
    let trial = Trial::new();
    let record = |words: [u32; 4]| {
        let words: String = words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .map(|byte| format!("\\{byte:02x}"))
            .collect();
        format!(
            r#"(data (i32.const 8192) "{words}src/a\1bb.rs") (data (i32.const 8448) "no\0amore")"#
        )
    };
    let told = |name: &str, text: &str| {
        trial.check(&case(name, text, TRAP), 60_000);
        let status = trial.call(name, "large", 60_000).unwrap_err();
        (status.details.get("panic").cloned(), status.message)
    };
    let (panic, message) = told("panics", &panicking("8192", &record([1, 42, 10, 7])));
    let expected = json!({"message": r"no\nmore", "file": r"src/a\u{1b}b.rs", "line": 42});
    assert_eq!(panic, Some(expected));
    assert!(
        message.contains(r"panicked at src/a\u{1b}b.rs:42: no\nmore"),
        "{message}"
    );
    for (name, address, words) in [
        ("no-panic", "8192", [0, 42, 10, 7]),
        ("other-word", "8192", [0x101, 42, 10, 7]),
        ("long-file", "8192", [1, 42, 241, 7]),
        ("long-message", "8192", [1, 42, 10, 769]),
        ("longest", "8192", [1, 42, u32::MAX, u32::MAX]),
        ("beyond", "0x7fffffff", [1, 42, 10, 7]),
        ("far", "-8", [1, 42, 10, 7]),
        ("over-4-gib", "0x100002000", [1, 42, 10, 7]),
        // Where a window was.
        ("window", "0x280000", [1, 42, 10, 7]),
    ] {
        let (panic, message) = told(name, &panicking(address, &record(words)));
        assert_eq!(panic, None, "{name}");
        assert!(message.contains("unreachable"), "{name}: {message}");
    }
    trial.ended();
}

#[test]
fn a_failing_guest_hands_over_a_few_bytes() {
    let trial = Trial::new();
    let fails = |grow: &str, address: &str, bytes: &str| {
        let list = stores(&[(768, "(i32.const 2)"), (788, address), (792, bytes)]);
        answering("last_error", &format!("{grow} {list}"))
    };
    let data = r#"(data (i32.const 800) "\01\02\03\ff")"#;
    for (name, bytes, length) in [
        ("four", "(i32.const 4)", 4),
        ("most", "(i32.const 4096)", 4096),
    ] {
        let text = fails("", "(i32.const 800)", bytes) + data;
        trial.check(&case(name, text, "KERNEL_FAILED"), 60_000);
        let status = trial.call(name, "small", 60_000).unwrap_err();
        let told = status.details["diagnostic"].as_str().unwrap();
        let told = BASE64_STANDARD.decode(told).unwrap();
        assert_eq!((told.len(), &told[..4]), (length, &[1, 2, 3, 0xff][..]));
    }
    let grow = "(drop (memory.grow (i32.const 300)))";
    for (name, address, bytes, reason) in [
        ("one-more", "(i32.const 800)", "(i32.const 4097)", BAD),
        ("megabytes", "(i32.const 800)", "(i32.const 0x1000000)", BAD),
        (
            "gibibyte",
            "(i32.const 800)",
            "(i32.const 0x40000000)",
            TRAP,
        ),
        ("wraps", "(i32.const -8)", "(i32.const -1)", TRAP),
        ("beyond-end", END, "(i32.const 1)", TRAP),
    ] {
        trial.check(&case(name, fails(grow, address, bytes), reason), 60_000);
    }
    trial.ended();
}
