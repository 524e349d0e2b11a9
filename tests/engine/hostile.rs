//! Plugins that break the contract: each ends in its own named error, no input changes, nothing
//! is left behind, and the host serves the next request.

use serde_json::json;
use strait::error::Code;

use crate::support::{Rig, bytes_of, f64s, guest};

/// Above `move_min_bytes`: the input is a window.
const MOVED: usize = 300_000;
/// Below it: the input is a copy.
const COPIED: usize = 1_000;

fn values(n: usize) -> Vec<f64> {
    (0..n).map(|i| i as f64 * 0.5 - 7.0).collect()
}

/// Loads `tests/guests/NAME.wat`.
fn load(rig: &Rig, name: &str) {
    let text = std::fs::read_to_string(format!("tests/guests/{name}.wat")).unwrap();
    rig.host
        .own_caller()
        .load_plugin(&guest::component(name, &text))
        .unwrap_or_else(|e| panic!("{name}: {e}"));
}

/// Invokes the guest on moved and copied inputs and expects (code, reason) for each.
fn check(name: &str, moved: Option<(Code, &str)>, copied: Option<(Code, &str)>) {
    let rig = Rig::with(|config| {
        config.limits.deadline_ms_default = 400;
        config.limits.guest_bytes = 32 << 20;
    });
    load(&rig, name);
    load(&rig, "copies");
    for (n, expected) in [(MOVED, moved), (COPIED, copied)] {
        let input = rig.put_f64("x", &values(n));
        let before_bytes = bytes_of(&input);
        // Once to warm what stays (pool, parked mappings), then the counted one.
        for _ in 0..2 {
            rig.invoke(json!({"kernel": "copies/k", "inputs": {"x": "x"}}))
                .unwrap();
        }
        let before = rig.holdings();
        let call = json!({"kernel": format!("{name}/k"), "inputs": {"x": "x"}});
        for round in 0..3 {
            let result = rig.invoke(call.clone());
            match (&result, expected) {
                (Err(status), Some((code, reason))) => {
                    assert_eq!(
                        (status.code, status.reason.name()),
                        (code, reason),
                        "{name} on {n}: {status}"
                    );
                    assert!(
                        status.message.len() > 20,
                        "{name}: the message explains: {status}"
                    );
                }
                (Ok(_), None) => {}
                (result, expected) => {
                    panic!("{name} on {n}, round {round}: {result:?}, expected {expected:?}")
                }
            }
            drop(result);
            assert_eq!(
                bytes_of(&input),
                before_bytes,
                "{name} on {n} changed its input"
            );
        }
        rig.check_holdings(&before, &format!("{name} on {n}"));
        let next = rig
            .invoke(json!({"kernel": "copies/k", "inputs": {"x": "x"}}))
            .unwrap();
        assert_eq!(
            bytes_of(next.results[0].segment().unwrap()),
            before_bytes,
            "the next request after {name}"
        );
    }
}

fn both(name: &str, code: Code, reason: &str) {
    check(name, Some((code, reason)), Some((code, reason)));
}

#[test]
fn a_well_behaved_guest_is_served() {
    check("copies", None, None);
}

#[test]
fn a_guest_that_spins_meets_its_deadline() {
    both("spins", Code::DeadlineExceeded, "DEADLINE");
}

#[test]
fn a_guest_that_grows_without_end_meets_its_limit() {
    both("grows", Code::ResourceExhausted, "LIMIT_GUEST_BYTES");
}

#[test]
fn a_store_into_an_input_is_caught() {
    // A copied input is the guest's own memory.
    check(
        "stores_into_input",
        Some((Code::Internal, "INPUT_WRITTEN")),
        None,
    );
}

#[test]
fn a_fill_of_an_input_is_caught() {
    check("fills_input", Some((Code::Internal, "INPUT_WRITTEN")), None);
    check(
        "copies_into_input",
        Some((Code::Internal, "INPUT_WRITTEN")),
        None,
    );
}

#[test]
fn a_hostile_realloc_is_a_trap() {
    both("hostile_realloc", Code::Internal, "GUEST_TRAP");
}

#[test]
fn a_list_over_a_former_window_is_a_bad_answer() {
    // Where a window was there are zeros: 100 000 empty shapes. A copy is the guest's own memory,
    // whose numbers make pointers to nowhere.
    check(
        "list_over_window",
        Some((Code::Internal, "BAD_ANSWER")),
        Some((Code::Internal, "GUEST_TRAP")),
    );
}

#[test]
fn a_note_over_a_former_window_shows_no_input() {
    let rig = Rig::new();
    load(&rig, "notes_over_window");
    let secret = vec![f64::from_bits(0x4141_4141_4141_4141); MOVED];
    rig.put_f64("x", &secret);
    let invoked = rig
        .invoke(json!({"kernel": "k", "inputs": {"x": "x"}}))
        .unwrap();
    let zeros = r"\u{0}".repeat(16);
    assert_eq!(invoked.report.notes, [(zeros.clone(), zeros)]);
}

#[test]
fn traps_carry_a_backtrace() {
    both("traps", Code::Internal, "GUEST_TRAP");
    both("traps_in_open", Code::Internal, "GUEST_TRAP");
    let rig = Rig::new();
    load(&rig, "traps");
    rig.put_f64("x", &values(MOVED));
    let status = rig
        .invoke(json!({"kernel": "k", "inputs": {"x": "x"}}))
        .unwrap_err();
    assert!(
        status
            .backtrace
            .as_deref()
            .is_some_and(|b| b.contains("wasm")),
        "{status:?}"
    );
    assert_eq!(status.details["during"], "run");
}

#[test]
fn lies_about_extents_are_bad_answers() {
    both("lies_about_extents", Code::Internal, "BAD_ANSWER");
    both("lies_about_rank", Code::Internal, "BAD_ANSWER");
}

#[test]
fn codes_outside_the_contract_are_bad_answers() {
    both("answers_seven", Code::Internal, "BAD_ANSWER");
}

#[test]
fn a_kernel_that_fails_is_quoted() {
    both("fails", Code::Internal, "KERNEL_FAILED");
    let rig = Rig::new();
    load(&rig, "fails");
    rig.put_f64("x", &values(4));
    let status = rig
        .invoke(json!({"kernel": "k", "inputs": {"x": "x"}}))
        .unwrap_err();
    assert!(status.message.contains("own words"), "{status}");
}

#[test]
fn a_guests_words_stay_on_one_line() {
    both("forges", Code::Internal, "KERNEL_FAILED");
    let rig = Rig::new();
    load(&rig, "forges");
    rig.put_f64("x", &values(4));
    let status = rig
        .invoke(json!({"kernel": "k", "inputs": {"x": "x"}}))
        .unwrap_err();
    let words = r"a\n2030-01-01T00:00:00Z ERROR strait: forged\r\u{1b}[2K\u{0}b";
    assert!(status.message.contains(words), "{status}");
}

#[test]
fn a_fifo_in_the_cache_of_compiled_plugins_does_not_stop_the_host() {
    let cache = tempfile::tempdir().unwrap();
    let start = || {
        let path = cache.path().to_owned();
        drop(Rig::with(|config| config.engine.cache = Some(path)));
    };
    start();
    let artifacts: Vec<_> = std::fs::read_dir(cache.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(artifacts.len(), 1, "{artifacts:?}");
    std::fs::remove_file(&artifacts[0]).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &artifacts[0],
        rustix::fs::FileType::Fifo,
        mode,
        0,
    )
    .unwrap();
    start();
}

#[test]
fn reserve_must_grow_once() {
    both("reserves_nothing", Code::Internal, "BAD_ANSWER");
    both("reserves_twice", Code::Internal, "BAD_ANSWER");
}

#[test]
fn outputs_have_limits() {
    both("huge_output", Code::Internal, "BAD_ANSWER");
    both("big_output", Code::ResourceExhausted, "LIMIT_RESULT_BYTES");
}

#[test]
fn log_lines_have_a_limit_and_stay_out_of_windows() {
    both("chatters", Code::ResourceExhausted, "LIMIT_LOG_BYTES");
    both(
        "chatters_of_nothing",
        Code::ResourceExhausted,
        "LIMIT_LOG_BYTES",
    );
    check("logs_window", Some((Code::Internal, "BAD_ANSWER")), None);
}

#[test]
fn every_invocation_has_a_fresh_sandbox() {
    let rig = Rig::new();
    load(&rig, "counts_runs");
    for n in [1, MOVED] {
        rig.put_f64("x", &values(n));
        for _ in 0..5 {
            let invoked = rig
                .invoke(json!({"kernel": "k", "inputs": {"x": "x"}}))
                .unwrap();
            assert_eq!(
                f64s(&bytes_of(invoked.results[0].segment().unwrap()))[0],
                1.0
            );
        }
    }
}

#[test]
fn limits_can_be_tightened_and_not_widened() {
    let rig = Rig::new();
    load(&rig, "copies");
    rig.put_f64("x", &values(MOVED));
    let call = |key: &str, n: u64| {
        rig.invoke(json!({"kernel": "k", "inputs": {"x": "x"}, "limits": {key: n}}))
            .unwrap_err()
    };
    for (key, reason) in [
        ("guest_bytes", "LIMIT_GUEST_BYTES"),
        ("window_bytes", "LIMIT_WINDOW_BYTES"),
        ("result_bytes", "LIMIT_RESULT_BYTES"),
    ] {
        let status = call(key, 100_000);
        assert_eq!(
            (status.code, status.reason.name()),
            (Code::ResourceExhausted, reason),
            "{status}"
        );
        assert!(status.message.contains(key), "{status}");
        let status = call(key, u64::MAX);
        assert_eq!(
            (status.code, status.reason.name()),
            (Code::InvalidArgument, "BAD_LIMIT"),
            "{status}"
        );
    }
}

#[test]
fn cancel_ends_a_running_kernel() {
    let rig = Rig::new();
    load(&rig, "spins");
    rig.put_f64("x", &values(MOVED));
    let (cancel, answer) =
        rig.start(json!({"kernel": "k", "inputs": {"x": "x"}, "deadline_ms": 60_000}));
    std::thread::sleep(std::time::Duration::from_millis(50));
    cancel.cancel();
    let status = answer
        .recv_timeout(std::time::Duration::from_secs(20))
        .unwrap()
        .unwrap_err();
    assert_eq!(
        (status.code, status.reason.name()),
        (Code::Cancelled, "CANCELLED")
    );
}

#[test]
fn files_that_are_no_plugins_are_refused() {
    let rig = Rig::new();
    let refused = |bytes: &[u8], word: &str| {
        let status = rig.host.own_caller().load_plugin(bytes).unwrap_err();
        assert_eq!(
            (status.code, status.reason.name()),
            (Code::InvalidArgument, "BAD_PLUGIN"),
            "{status}"
        );
        assert!(status.message.contains(word), "{word:?} in {status}");
    };
    refused(b"", "plugin");
    refused(b"\0asm\x01\0\0\0", "component");
    refused(&wat::parse_str("(component)").unwrap(), "kernels");
    refused(
        &wat::parse_str(
            r#"(component (import "wasi:cli/exit@0.2.0" (instance (export "exit" (func)))))"#,
        )
        .unwrap(),
        "wasi:cli/exit",
    );
    let copies = std::fs::read_to_string("tests/guests/copies.wat").unwrap();
    let component = guest::component("copies", &copies);
    refused(&component[..component.len() / 2], "plugin");
    refused(&guest::component("no name", &copies), "no name");
    // A memory of 64 MiB and more for `describe` alone.
    refused(
        &guest::component(
            "greedy",
            "(func $describe (result i32) (drop (memory.grow (i32.const 2000))) i32.const 1024)",
        ),
        "limit",
    );
    refused(
        &guest::component("astray", "(func $describe (result i32) i32.const 131060)"),
        "describe",
    );
}
