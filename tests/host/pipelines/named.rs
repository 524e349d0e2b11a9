//! Pipelines that have names: called, listed and described as kernels are, each principal's own.

use serde_json::{Value, json};
use strait_client::wire::Op;

use super::shifted;
use crate::cli;
use crate::served::{Raw, Served, as_user, number, numbers, put, ramp};

const SMOOTH: &str = "clip(hi=20000, lo=0) | scale-shift(a=2, b=1) | scale-shift(b=0.5)";

fn publish(name: &str, text: &str) -> Value {
    json!({"publish": {"name": name, "kernel": text}})
}

fn names(client: &mut Raw) -> Vec<String> {
    let list = client.ok(Op::Pipelines, json!({}));
    let all = list["pipelines"].as_array().unwrap().iter();
    all.map(|one| one["name"].as_str().unwrap().to_owned())
        .collect()
}

fn kernels(client: &mut Raw, asked: Value) -> Vec<String> {
    let list = client.ok(Op::Kernels, asked);
    let all = list["kernels"].as_array().unwrap().iter();
    all.map(|one| {
        format!(
            "{}/{}",
            one["plugin"].as_str().unwrap(),
            one["name"].as_str().unwrap()
        )
    })
    .collect()
}

#[test]
fn a_name_is_called_as_a_kernel_is() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 1000);
    let used = |client: &mut Raw| {
        let stats = client.ok(Op::Stats, json!({}));
        ["/account/names", "/account/bytes"].map(|path| number(&stats, path))
    };
    let before = used(&mut client);
    let told = client.ok(Op::Pipelines, publish("smooth", SMOOTH));
    assert_eq!(
        told["pipelines"],
        json!([{"name": "smooth", "text": SMOOTH, "shared": false}])
    );
    let during = used(&mut client);
    assert_eq!(during[0], before[0] + 1);
    assert_eq!(during[1], before[1] + 2 * SMOOTH.len() as u64);
    for name in ["smooth", "pipeline/smooth"] {
        let reply = client.ask(Op::Invoke, json!({"kernel": name, "inputs": {"x": "x"}}));
        assert_eq!(numbers(&reply), shifted(&ramp(1000)), "{name}");
        let listed = client.ok(Op::Kernels, json!({"kernel": name}));
        let kernel = &listed["kernels"][0];
        assert_eq!(
            (&kernel["name"], &kernel["doc"]),
            (&json!("smooth"), &json!(SMOOTH))
        );
        assert_eq!(kernel["inputs"][0]["name"], "x");
    }
    let all = kernels(&mut client, json!({}));
    assert!(
        all.is_sorted() && all.contains(&"pipeline/smooth".to_owned()),
        "{all:?}"
    );
    let after = kernels(&mut client, json!({"after": "pipeline/smooth"}));
    assert_eq!(
        after[..],
        all[all.iter().position(|one| one == "pipeline/smooth").unwrap() + 1..]
    );
    let wrong = json!({"kernel": "smooth", "inputs": {"z": "x"}});
    let message = client
        .ask(Op::Invoke, wrong)
        .refused("INVALID_ARGUMENT", "UNKNOWN_INPUT");
    assert!(message.contains("`z`"), "{message}");

    // Of a name that a plugin's kernel has, that is meant.
    client.ok(Op::Pipelines, publish("scale-shift", "clip(hi=0)"));
    let reply = client.ask(
        Op::Invoke,
        json!({"kernel": "scale-shift", "inputs": {"x": "x"}}),
    );
    assert_eq!(numbers(&reply), ramp(1000));
    let reply = client.ask(
        Op::Invoke,
        json!({"kernel": "pipeline/scale-shift", "inputs": {"x": "x"}}),
    );
    let low: Vec<f64> = ramp(1000).iter().map(|x| x.min(0.0)).collect();
    assert_eq!(numbers(&reply), low);

    // Over the command line.
    let table = cli::good(host.path(), &["pipelines"]);
    assert!(
        table.contains("smooth") && table.contains("you") && table.contains(SMOOTH),
        "{table}"
    );
    cli::good(
        host.path(),
        &["pipelines", "publish", "small", "cast(to=float32)"],
    );
    cli::good(host.path(), &["pipelines", "publish", "alone", "clip"]);
    let line = cli::good(host.path(), &["call", "small", "-i", "x=x", "-o", "y"]);
    assert!(line.contains("float32"), "{line}");
    let shown = cli::good(host.path(), &["kernels", "small"]);
    assert!(shown.starts_with("small  (pipeline "), "{shown}");
    assert_eq!(
        names(&mut client),
        ["alone", "scale-shift", "small", "smooth"]
    );
    let told = cli::good_json(
        host.path(),
        &["pipelines", "rm", "small", "alone", "scale-shift", "--json"],
    );
    assert_eq!(told["pipelines"].as_array().unwrap().len(), 1, "{told}");

    client.ok(Op::Drop, json!({"name": "y"}));
    client.ok(Op::Pipelines, json!({"drop": "smooth"}));
    client
        .ask(Op::Pipelines, json!({"drop": "smooth"}))
        .refused("NOT_FOUND", "KERNEL_NOT_FOUND");
    client
        .ask(
            Op::Invoke,
            json!({"kernel": "smooth", "inputs": {"x": "x"}}),
        )
        .refused("NOT_FOUND", "KERNEL_NOT_FOUND");
    assert_eq!(used(&mut client)[0], before[0]);
}

#[test]
fn what_is_wrong_gets_no_name() {
    let host = Served::with(&[], &[("STRAIT__QUOTA__NAMES", "2")]);
    let mut client = host.greeted();
    client.ok(Op::Pipelines, publish("one", "clip"));
    for (asked, code, reason) in [
        (
            publish("one", "cast(to=int8)"),
            "ALREADY_EXISTS",
            "NAME_TAKEN",
        ),
        (publish("a/b", "clip"), "INVALID_ARGUMENT", "BAD_NAME"),
        (publish("", "clip"), "INVALID_ARGUMENT", "BAD_NAME"),
        (publish("two", "clip |"), "INVALID_ARGUMENT", "BAD_PIPELINE"),
        (
            publish("two", "one | clip"),
            "NOT_FOUND",
            "KERNEL_NOT_FOUND",
        ),
        (publish("two", ""), "INVALID_ARGUMENT", "BAD_REQUEST"),
        (
            publish("two", &format!("clip(lo=\"{}\")", "x".repeat(17_000))),
            "INVALID_ARGUMENT",
            "BAD_PIPELINE",
        ),
        (
            json!({"publish": {"name": "two"}}),
            "INVALID_ARGUMENT",
            "BAD_REQUEST",
        ),
    ] {
        client
            .ask(Op::Pipelines, asked.clone())
            .refused(code, reason);
    }
    assert_eq!(names(&mut client), ["one"]);
    let mut again = publish("one", "cast(to=int8)");
    again["publish"]["replace"] = json!(true);
    let told = client.ok(Op::Pipelines, again);
    assert_eq!(told["pipelines"][0]["text"], "cast(to=int8)");
    client.ok(Op::Pipelines, publish("two", "clip"));
    client
        .ask(Op::Pipelines, publish("three", "clip"))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert_eq!(names(&mut client), ["one", "two"]);
}

#[test]
fn names_are_ones_own_but_for_what_operators_share() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let host = Served::start(&[]);
    host.open_to_all();
    let mut operator = host.greeted();
    operator.ok(Op::Pipelines, publish("mine", "clip"));
    let shared = json!({"publish": {"name": "all", "kernel": "clip(hi=0)", "shared": true}});
    operator.ok(Op::Pipelines, shared.clone());
    as_user(4711, || {
        let mut other = host.greeted();
        assert_eq!(names(&mut other), ["all"]);
        put(&mut other, "x", 10);
        let call = |name: &str| json!({"kernel": name, "inputs": {"x": "x"}});
        other
            .ask(Op::Invoke, call("mine"))
            .refused("NOT_FOUND", "KERNEL_NOT_FOUND");
        let low: Vec<f64> = ramp(10).iter().map(|x| x.min(0.0)).collect();
        assert_eq!(numbers(&other.ask(Op::Invoke, call("all"))), low);
        other
            .ask(Op::Pipelines, json!({"drop": "all"}))
            .refused("PERMISSION_DENIED", "NO_RIGHT");
        let mut again = shared;
        again["publish"]["replace"] = json!(true);
        other
            .ask(Op::Pipelines, again)
            .refused("PERMISSION_DENIED", "NO_RIGHT");
        // Its own comes before that of the operators.
        other.ok(Op::Pipelines, publish("all", "scale-shift(b=1)"));
        let up: Vec<f64> = ramp(10).iter().map(|x| x + 1.0).collect();
        assert_eq!(numbers(&other.ask(Op::Invoke, call("all"))), up);
        let told = other.ok(Op::Pipelines, json!({"drop": "all"}));
        assert_eq!(
            told["pipelines"],
            json!([{"name": "all", "text": "clip(hi=0)", "shared": true}])
        );
    });
    operator.ok(Op::Pipelines, json!({"drop": "all"}));
    assert_eq!(names(&mut operator), ["mine"]);
}
