//! Pipelines that do not fit: each is refused before any stage runs, by the stage that it concerns.

use serde_json::{Value, json};
use strait_client::wire::Op;

use super::call;
use crate::served::{Raw, Served, number, put};

/// Runs so far, of kernels.
fn runs(client: &mut Raw) -> u64 {
    number(&client.ok(Op::Stats, json!({})), "/invocations")
}

#[test]
fn what_does_not_fit_is_told_by_its_stage_before_anything_runs() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 100_000);
    let at_rest = host.settled(&mut client);
    for (text, stage, kernel, reason, says) in [
        // By declarations alone.
        (
            "clip | histogram(bins=4, lo=0, hi=1) | matmul(a: 2.counts, b: 2.counts)",
            3,
            "matmul",
            "BAD_INPUT",
            "output `counts` of stage 2 (`histogram`) is of dtype int64, it takes float32, float64",
        ),
        (
            "clip | filter-finite | matmul(a: .y, b: .y)",
            3,
            "matmul",
            "BAD_INPUT",
            "has rank 1 to 1, it takes 2 to 2",
        ),
        // By what `open` says of the stages before.
        (
            "clip | cast(to=complex64) | clip",
            3,
            "clip",
            "BAD_INPUT",
            "dtype complex64 is not one of",
        ),
        (
            "scale-shift | matmul(a: 1.y, b: 1.y)",
            2,
            "matmul",
            "BAD_INPUT",
            "shape [100000] has rank 1, the port takes 2 to 2",
        ),
        // Parameters.
        (
            "clip | scale-shift(c=1)",
            2,
            "scale-shift",
            "UNKNOWN_PARAMETER",
            "has no parameter `c`",
        ),
        (
            "clip | cast",
            2,
            "cast",
            "MISSING_PARAMETER",
            "needs parameter `to`",
        ),
        (
            "clip | scale-shift(a=\"1\")",
            2,
            "scale-shift",
            "BAD_PARAMETER",
            "is not of type",
        ),
        (
            "scale-shift | clip(lo=2, hi=1)",
            2,
            "clip",
            "BAD_PARAMETER",
            "clip",
        ),
        // Wiring.
        (
            "clip | nothing",
            2,
            "nothing",
            "KERNEL_NOT_FOUND",
            "no loaded plugin has a kernel `nothing`",
        ),
        (
            "clip | scale-shift(y: x)",
            2,
            "scale-shift",
            "UNKNOWN_INPUT",
            "has no input `y`",
        ),
        (
            "clip | scale-shift(x: .z)",
            2,
            "scale-shift",
            "BAD_PIPELINE",
            "has no output `z`: `1.y`",
        ),
        (
            "clip | scale-shift(x: 3.y) | clip",
            2,
            "scale-shift",
            "BAD_PIPELINE",
            "no stage before it is called `3`",
        ),
        (
            "clip | scale-shift(x: later) | later: clip",
            2,
            "scale-shift",
            "BAD_PIPELINE",
            "does not come before it",
        ),
        (
            "h: histogram(bins=4, lo=0, hi=1) | clip",
            2,
            "clip",
            "BAD_PIPELINE",
            "has several outputs; say which: `h.counts`, `h.outside`",
        ),
        (
            "clip | scale-shift(x: x)",
            1,
            "clip",
            "BAD_PIPELINE",
            "nothing takes what it gives",
        ),
    ] {
        let before = runs(&mut client);
        let reply = client.ask(Op::Invoke, call(text));
        let body = reply.body();
        assert_eq!(body["reason"], reason, "{text}: {body}");
        let message = body["message"].as_str().unwrap();
        assert!(
            message.starts_with(&format!("stage {stage} (`{kernel}`): ")) && message.contains(says),
            "{text}: {message}"
        );
        assert_eq!(
            (&body["details"]["stage"], &body["details"]["kernel"]),
            (&json!(stage), &json!(kernel)),
            "{text}: {body}"
        );
        assert_eq!(runs(&mut client), before, "{text}");
    }
    let after = host.settled(&mut client);
    for same in ["/segments", "/leases", "/budget_used_bytes"] {
        assert_eq!(number(&after, same), number(&at_rest, same), "{same}");
    }
}

#[test]
fn what_concerns_no_stage_is_told_as_of_a_kernel() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 4);
    let with = |field: &str, value: Value| {
        let mut call = call("clip | scale-shift");
        call[field] = value;
        call
    };
    for (request, reason, says) in [
        (
            with("inputs", json!({"x": "x", "z": "x"})),
            "UNKNOWN_INPUT",
            "kernel `clip | scale-shift` has no input `z`; its inputs are `x`",
        ),
        (
            with("inputs", json!({})),
            "MISSING_INPUT",
            "kernel `clip | scale-shift` needs input `x`",
        ),
        (
            with("parameters", json!({"a": 1})),
            "UNKNOWN_PARAMETER",
            "has no parameter `a`; its parameters are those of its stages",
        ),
        (
            with("publish", json!({"z": "z"})),
            "UNKNOWN_OUTPUT",
            "has no output `z`; its outputs are `y`",
        ),
        (
            with("pipeline", json!({"stages": [{"kernel": "clip"}]})),
            "BAD_REQUEST",
            "either `kernel`",
        ),
        (with("kernel", json!("")), "BAD_REQUEST", "either `kernel`"),
        (
            with("kernel", json!("clip || cast")),
            "BAD_PIPELINE",
            "character 7: expected a kernel, found `|`",
        ),
        (
            json!({"pipeline": {"stages": []}, "inputs": {}}),
            "BAD_PIPELINE",
            "0 stages",
        ),
        (
            json!({"pipeline": {"stages": [{"kernel": "clip", "parameters": {"lo": {}}}]}, "inputs": {"x": "x"}}),
            "BAD_PIPELINE",
            "parameter `lo` is neither",
        ),
        (
            json!({"pipeline": {"stages": [{"kernel": "clip", "input": {}}]}, "inputs": {"x": "x"}}),
            "BAD_REQUEST",
            "input",
        ),
        (
            json!({"kernel": "a: clip -> y: x", "inputs": {"x": "x"}}),
            "BAD_PIPELINE",
            "an output is what a stage gives",
        ),
    ] {
        let message = client
            .ask(Op::Invoke, request.clone())
            .refused("INVALID_ARGUMENT", reason);
        assert!(message.contains(says), "{request}: {message}");
    }
    let missing = with("inputs", json!({"x": "nowhere"}));
    client
        .ask(Op::Invoke, missing)
        .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    put(&mut client, "y", 4);
    client
        .ask(Op::Invoke, with("publish", json!({"y": "y"})))
        .refused("ALREADY_EXISTS", "NAME_TAKEN");
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(
        (number(&stats, "/invocations"), number(&stats, "/leases")),
        (0, 0),
        "{stats}"
    );
}

#[test]
fn a_pipeline_does_not_stream() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    client.ok(
        Op::Pipelines,
        json!({"publish": {"name": "two", "kernel": "clip | clip"}}),
    );
    for kernel in ["clip | clip", "two", "pipeline/two"] {
        let inputs = json!({"x": {"dtype": "float64", "shape": [4]}});
        let prepare = json!({"kernel": kernel, "inputs": inputs, "stream": true});
        let message = client
            .ask(Op::Prepare, prepare)
            .refused("INVALID_ARGUMENT", "UNSUPPORTED");
        assert!(message.contains("a pipeline does not stream"), "{message}");
    }
}
