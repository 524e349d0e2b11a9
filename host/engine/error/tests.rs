//! What each cause is told as.

use super::*;

#[test]
fn each_cause_has_its_code_reason_words_and_figures() {
    let check = |stage: Stage, cause: Cause, told: &str, details: serde_json::Value| {
        let status = Status::from(stage.broke(cause).of("k"));
        assert_eq!(status.to_string(), told);
        assert_eq!(serde_json::Value::from(status.details), details, "{told}");
        status.backtrace
    };
    let trap = |panic| Cause::Trap {
        trap: "wasm trap: x".to_owned(),
        panic,
        backtrace: Some("at y".to_owned()),
    };
    let backtrace = check(
        Stage::Run,
        trap(None),
        "kernel `k` trapped in `run`: wasm trap: x; this is the plugin's bug, its author will want the backtrace (INTERNAL/GUEST_TRAP)",
        json!({"during": "run"}),
    );
    assert_eq!(backtrace.as_deref(), Some("at y"));
    let panic = Panic {
        message: "m".to_owned(),
        file: "f.rs".to_owned(),
        line: 7,
    };
    check(
        Stage::LastError,
        trap(Some(Box::new(panic))),
        "kernel `k` trapped in `last-error`: panicked at f.rs:7: m; this is the plugin's bug, its author will want the backtrace (INTERNAL/GUEST_TRAP)",
        json!({"during": "last-error", "panic": {"message": "m", "file": "f.rs", "line": 7}}),
    );
    check(
        Stage::Run,
        Cause::InputWritten {
            port: "x".to_owned(),
            backtrace: None,
            dirtied_bytes: 4096,
        },
        "kernel `k` wrote to its input `x`; inputs are read-only, the tensor is unchanged (INTERNAL/INPUT_WRITTEN)",
        json!({"port": "x", "dirtied_bytes": 4096}),
    );
    check(
        Stage::Extents,
        Cause::Contract("how".to_owned()),
        "kernel `k` broke the contract in `extents`: how (INTERNAL/BAD_ANSWER)",
        json!({"during": "extents"}),
    );
    let refused = |refusal, diagnostic: &[u8]| Cause::Refused {
        refusal,
        reason: "r".to_owned(),
        diagnostic: diagnostic.to_vec(),
    };
    check(
        Stage::Open,
        refused(Refusal::Argument("a".to_owned()), b""),
        "kernel `k` refuses `a`: r (INVALID_ARGUMENT/BAD_PARAMETER)",
        json!({"name": "a"}),
    );
    check(
        Stage::Bind,
        refused(Refusal::Unsupported, b""),
        "kernel `k` does not support this: r (INVALID_ARGUMENT/UNSUPPORTED)",
        json!({}),
    );
    check(
        Stage::Run,
        refused(Refusal::Failed, b"\0\xff"),
        "kernel `k` failed: r (INTERNAL/KERNEL_FAILED)",
        json!({"diagnostic": "AP8="}),
    );
    check(
        Stage::Run,
        Cause::Deadline(30),
        "kernel `k` was stopped at its deadline of 30 ms; raise the deadline or give it less data (DEADLINE_EXCEEDED/DEADLINE)",
        json!({"deadline_ms": 30}),
    );
    check(
        Stage::Run,
        Cause::Cancelled,
        "the invocation of kernel `k` was cancelled (CANCELLED/CANCELLED)",
        json!({}),
    );
    check(
        Stage::Run,
        Cause::Host("how".to_owned()),
        "the host failed while running kernel `k`: how (INTERNAL/HOST)",
        json!({}),
    );
    check(
        Stage::Run,
        Cause::Lost,
        "the worker process that ran kernel `k` ended before it was done; nothing of the invocation is left, ask again (UNAVAILABLE/WORKER_LOST)",
        json!({}),
    );
    let stray = MemoryError::OutOfRange {
        offset: 8,
        length: 1,
        bytes: 8,
        inode: strait_memory::Inode {
            device: 1,
            inode: 2,
        },
    };
    check(
        Stage::Place,
        Cause::from(stray),
        "no memory for kernel `k`: bytes 8 to 9 are not within segment 1:2 of 8 bytes (INTERNAL/HOST)",
        json!({}),
    );
    for (limit, most, words, reason) in [
        (
            Limit::Guest,
            8,
            "kernel `k` asked for 9 bytes of memory of its own, the limit is 8; raise guest_bytes or give it less data",
            "LIMIT_GUEST_BYTES",
        ),
        (
            Limit::Window,
            8,
            "inputs and outputs of kernel `k` need 9 bytes of windows, the limit is 8; raise window_bytes or cut the tensors",
            "LIMIT_WINDOW_BYTES",
        ),
        (
            Limit::Result,
            8,
            "kernel `k` announced outputs of 9 bytes, the limit is 8; raise result_bytes or give it less data",
            "LIMIT_RESULT_BYTES",
        ),
        (
            Limit::Log,
            8,
            "kernel `k` logged 9 bytes, the limit is 8; raise log_bytes or make it quieter",
            "LIMIT_LOG_BYTES",
        ),
        (
            Limit::Wasm32,
            WASM32_BYTES,
            "inputs and outputs of kernel `k` need 9 bytes, but a wasm32 guest has 4 GiB (4294967296 bytes) of addresses for them and its own memory; cut the tensors",
            "LIMIT_WASM32",
        ),
    ] {
        check(
            Stage::Open,
            Cause::Limit {
                limit,
                asked: 9,
                most,
            },
            &format!("{words} (RESOURCE_EXHAUSTED/{reason})"),
            json!({"asked": 9, "limit": most}),
        );
    }
}
