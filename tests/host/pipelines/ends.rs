//! Pipelines that fail or are ended in the middle: the stage is named, and nothing of them is left.

use serde_json::{Value, json};
use strait_client::wire::Op;

use super::{MOVED, call};
use crate::guest;
use crate::served::{Holdings, Raw, Served, check_call, number, put, ramp};

/// A host with the plugins `spins`, `traps`, and `opens`, which traps in `open`.
fn host(settings: &[(&str, &str)]) -> Served {
    let plugin = |name: &str, file: &str| {
        let text = std::fs::read_to_string(format!("tests/guests/{file}.wat")).unwrap();
        guest::component(name, &text)
    };
    let plugins = [
        plugin("spins", "spins"),
        plugin("traps", "traps"),
        plugin("opens", "traps_in_open"),
    ];
    Served::with_plugins(&plugins, settings)
}

#[test]
fn a_stage_that_fails_names_itself_and_leaves_nothing() {
    let host = host(&[]);
    let mut client = host.greeted();
    for elements in [10, MOVED] {
        put(&mut client, "x", elements);
        // Once around, so that what is kept warm is there.
        check_call(&mut client, json!("x"), &ramp(elements));
        let before = Holdings::of(&host.settled(&mut client));
        for (text, stage, during) in [
            ("traps/k | clip | scale-shift", 1, "run"),
            ("clip | t: traps/k | scale-shift", 2, "run"),
            ("clip | scale-shift | traps/k", 3, "run"),
            ("clip | scale-shift | opens/k", 3, "open"),
        ] {
            let reply = client.ask(Op::Invoke, call(text));
            let message = reply.refused("INTERNAL", "GUEST_TRAP");
            assert!(
                message.starts_with(&format!("stage {stage} (`k`): kernel `k` trapped")),
                "{message}"
            );
            let details = reply.body()["details"].clone();
            assert_eq!(
                (&details["stage"], &details["during"]),
                (&json!(stage), &json!(during))
            );
            assert!(reply.body()["backtrace"].is_string());
        }
        let after = Holdings::of(&host.settled(&mut client));
        assert_eq!(after, before);
    }
}

/// Waits until an INVOKE runs.
fn running(host: &Served, watcher: &mut Raw) {
    host.eventually(watcher, "a running call", |stats| {
        number(stats, "/running") == 1
    });
}

fn spinning(stage: usize) -> Value {
    let mut stages = ["clip", "scale-shift", "clip"];
    stages[stage - 1] = "spins/k";
    call(&stages.join(" | "))
}

#[test]
fn a_cancel_a_deadline_or_a_death_ends_the_stage_that_runs() {
    let host = host(&[]);
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut watcher));
    for stage in 1..=3 {
        let mut client = host.greeted();
        let sequence = client.begin(Op::Invoke, &spinning(stage), &[]);
        running(&host, &mut watcher);
        client.cancel(sequence);
        host.eventually(&mut watcher, "its end", |stats| {
            number(stats, "/running") == 0
        });

        let mut late = spinning(stage);
        late["deadline_ms"] = json!(300);
        let message = client
            .ask(Op::Invoke, late)
            .refused("DEADLINE_EXCEEDED", "DEADLINE");
        assert!(
            message.starts_with(&format!("stage {stage} (`k`): ")) && message.contains("300 ms"),
            "{message}"
        );

        client.begin(Op::Invoke, &spinning(stage), &[]);
        running(&host, &mut watcher);
        drop(client);
        host.eventually(&mut watcher, "its end", |stats| {
            number(stats, "/running") == 0
        });
    }
    assert_eq!(Holdings::of(&host.settled(&mut watcher)), before);
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
}

#[test]
fn limits_are_those_of_each_stage_and_bytes_those_of_all() {
    let bytes = MOVED * 8;
    // x, and two results with what is around them.
    let quota = (3 * bytes + (1 << 20)).to_string();
    let host = host(&[("STRAIT__QUOTA__BYTES", &quota)]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let mut limited = call("clip | scale-shift");
    limited["limits"] = json!({"result_bytes": bytes - 1});
    let message = client
        .ask(Op::Invoke, limited.clone())
        .refused("RESOURCE_EXHAUSTED", "LIMIT_RESULT_BYTES");
    assert!(message.starts_with("stage 1 (`clip`): "), "{message}");
    limited["limits"] = json!({"result_bytes": bytes});
    limited["publish"] = json!({"y": "y"});
    limited["map"] = json!(false);
    // Each result goes once the next stage has had it: any number of stages has room.
    limited["kernel"] = json!(["clip"; 8].join(" | "));
    client.ok(Op::Invoke, limited.clone());
    limited["kernel"] = json!("a: clip | b: clip | c: clip -> y: a, b: b, c: c");
    let message = client
        .ask(Op::Invoke, {
            let mut kept = limited.clone();
            kept["publish"] = json!({"y": "y2", "b": "b", "c": "c"});
            kept
        })
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(message.starts_with("stage "), "{message}");
    client.ok(Op::Drop, json!({"name": "y"}));
    limited["kernel"] = json!("clip | clip | clip");
    client.ok(Op::Invoke, limited);
}
