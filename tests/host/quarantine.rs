//! A plugin whose kernels cost a principal too many worker processes is out of service for that principal, until an operator
//! says otherwise.

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use strait_client::wire::Op;

use crate::cli;
use crate::guest;
use crate::served::{PATIENCE, Raw, Served, as_user, check_call, number, put, ramp};
use crate::workers::{MOVED, ON, children};

/// Hardly ever in its own code: only with its worker can it be ended.
const OVERRUNS: &str = "(func $run (param i32) (result i32)
    (drop (memory.grow (i32.const 2000)))
    (loop $l (memory.fill (i32.const 65536) (i32.const 1) (i32.const 130000000)) (br $l)) i32.const 0)";
const SPINS: &str = "(func $run (param i32) (result i32) (loop $again (br $again)) i32.const 0)";
const OUT: (&str, &str) = ("FAILED_PRECONDITION", "PLUGIN_OUT_OF_SERVICE");
const LATE: (&str, &str) = ("DEADLINE_EXCEEDED", "DEADLINE");

/// A host with the plugins `overruns` and `spins`, open to all users.
fn host(settings: &[(&str, &str)]) -> (Served, Raw) {
    let plugins = [
        guest::component("overruns", OVERRUNS),
        guest::component("spins", SPINS),
    ];
    let defaults = [
        ON,
        ("STRAIT__WORKERS__GRACE_MS", "50"),
        ("STRAIT__WORKERS__SPARE", "false"),
    ];
    let host = Served::with_plugins(&plugins, &[&defaults, settings].concat());
    host.open_to_all();
    let client = ready(host.greeted());
    (host, client)
}

/// With the flight `x`.
fn ready(mut client: Raw) -> Raw {
    put(&mut client, "x", MOVED);
    client
}

fn call(client: &mut Raw, plugin: &str, expected: (&str, &str)) -> String {
    let call = json!({"kernel": format!("{plugin}/k"), "inputs": {"x": "x"}, "deadline_ms": 30});
    client.ask(Op::Invoke, call).refused(expected.0, expected.1)
}

/// What a client is told that a plugin cost.
fn incidents(client: &mut Raw, plugin: &str) -> Vec<Value> {
    let list = client.ok(Op::Plugins, json!({}));
    let mut plugins = list["plugins"].as_array().unwrap().iter();
    let found = plugins.find(|one| one["name"] == plugin).unwrap();
    found["incidents"].as_array().unwrap().clone()
}

/// Until it has cost so many workers: once in a while a signal finds it in its own code, and it ends without.
fn overrun(client: &mut Raw, count: u64) -> Value {
    for _ in 0..50 {
        call(client, "overruns", LATE);
        let seen = incidents(client, "overruns");
        let of_one = seen.iter().find(|one| one["count"] == count);
        if let Some(of_one) = of_one {
            return of_one.clone();
        }
    }
    panic!("it never overruns: {:?}", incidents(client, "overruns"))
}

#[test]
fn three_overruns_and_a_plugin_is_out_of_service_until_an_operator_says_otherwise() {
    let (host, mut client) = host(&[]);
    for count in 1..=3 {
        let seen = overrun(&mut client, count);
        assert_eq!(seen["out_ms"].is_null(), count < 3, "{seen}");
        // The run itself may be told as cancelled, as nobody waits for it any more.
        let last = seen["last"].as_str().unwrap();
        assert!(
            last.contains("30 ms") || last.contains("cancelled"),
            "{seen}"
        );
    }
    let started = |client: &mut Raw| number(&client.ok(Op::Stats, json!({})), "/workers/started");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = started(&mut client);
    for _ in 0..3 {
        let message = call(&mut client, "overruns", OUT);
        for part in [
            "`overruns`",
            "3 worker processes",
            "strait plugins enable overruns",
        ] {
            assert!(message.contains(part), "{part} in {message}");
        }
    }
    assert_eq!(started(&mut client), before, "it costs nothing any more");
    call(&mut client, "spins", LATE);

    let table = cli::good(host.path(), &["plugins"]);
    let row = table.lines().find(|row| row.contains(" overruns "));
    let row = row.unwrap_or_else(|| panic!("{table}"));
    assert!(row.contains("out of service for uid:"), "{table}");
    let wrong = cli::run(host.path(), &["plugins", "enable", "over"]);
    let (code, error) = (cli::code(&wrong), cli::stderr(&wrong));
    assert!(
        code == 3 && error.contains("no plugin `over`"),
        "{code} {error}"
    );
    let json = cli::good_json(host.path(), &["plugins", "enable", "overruns", "--json"]);
    let plugins = json["plugins"].as_array().unwrap();
    assert!(
        plugins.iter().all(|one| one["incidents"] == json!([])),
        "{json}"
    );
    overrun(&mut client, 1);
}

#[test]
fn what_a_plugin_costs_one_principal_is_no_affair_of_another() {
    if !rustix::process::geteuid().is_root() {
        // Only root can become those users.
        return;
    }
    let (host, mut operator) = host(&[("STRAIT__WORKERS__STRIKES", "1")]);
    let mut one = ready(as_user(4242, || host.greeted()));
    let mut other = ready(as_user(4243, || host.greeted()));
    overrun(&mut one, 1);
    call(&mut one, "overruns", OUT);
    assert_eq!(incidents(&mut other, "overruns"), [] as [Value; 0]);
    let seen = incidents(&mut operator, "overruns");
    assert_eq!((seen.len(), &seen[0]["principal"]), (1, &json!("uid:4242")));
    overrun(&mut other, 1);
    call(&mut other, "overruns", OUT);
    for client in [&mut one, &mut other] {
        let enable = json!({"enable": "overruns"});
        client
            .ask(Op::Plugins, enable)
            .refused("PERMISSION_DENIED", "NO_RIGHT");
    }
    operator.ok(
        Op::Plugins,
        json!({"enable": "overruns", "principal": "uid:4243"}),
    );
    call(&mut one, "overruns", OUT);
    call(&mut other, "overruns", LATE);
    let nobody = json!({"enable": "overruns", "principal": "uid:1"});
    operator
        .ask(Op::Plugins, nobody)
        .refused("INVALID_ARGUMENT", "BAD_REQUEST");
}

#[test]
fn what_is_long_ago_or_ends_as_it_should_counts_for_nothing() {
    let (_host, mut client) = host(&[
        ("STRAIT__WORKERS__STRIKES", "2"),
        ("STRAIT__WORKERS__STRIKES_MS", "1"),
    ]);
    for _ in 0..4 {
        call(&mut client, "overruns", LATE);
    }
    let (_host, mut client) = self::host(&[
        ("STRAIT__WORKERS__STRIKES", "1"),
        ("STRAIT__WORKERS__GRACE_MS", "60000"),
    ]);
    for _ in 0..3 {
        call(&mut client, "spins", LATE);
    }
    assert_eq!(incidents(&mut client, "spins"), [] as [Value; 0]);
    let (_host, mut client) = self::host(&[("STRAIT__WORKERS__STRIKES", "0")]);
    for _ in 0..4 {
        call(&mut client, "overruns", LATE);
    }
}

/// The whole plugin is blamed, whichever of its calls it was, and nobody who ran beside it.
#[test]
fn what_overruns_is_blamed_and_what_runs_beside_it_is_not() {
    let (_host, mut client) = host(&[
        ("STRAIT__ENGINE__WORKERS", "4"),
        ("STRAIT__WORKERS__STRIKES", "1"),
    ]);
    let call = |plugin: &str, deadline_ms: u64| json!({"kernel": format!("{plugin}/k"), "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
    let running = |client: &mut Raw, count: u64| {
        let begin = Instant::now();
        while number(&client.ok(Op::Stats, json!({})), "/running") < count {
            assert!(begin.elapsed() < PATIENCE, "it does not run");
        }
    };
    // Beside a run of another plugin, which is repeated and cancelled in the end.
    for _ in 0..5 {
        let beside = client.begin(Op::Invoke, &call("spins", 600_000), &[]);
        running(&mut client, 1);
        client
            .ask(Op::Invoke, call("overruns", 30))
            .refused(LATE.0, LATE.1);
        client.cancel(beside);
    }
    assert_eq!(incidents(&mut client, "spins"), [] as [Value; 0]);
    assert_eq!(incidents(&mut client, "overruns"), [] as [Value; 0]);
    // Beside a run of its own.
    for _ in 0..50 {
        let other = client.begin(Op::Invoke, &call("overruns", 60), &[]);
        let one = client.begin(Op::Invoke, &call("overruns", 30), &[]);
        let replies = [client.receive().unwrap(), client.receive().unwrap()];
        for sequence in [one, other] {
            assert!(replies.iter().any(|reply| reply.sequence() == sequence));
        }
        if !incidents(&mut client, "overruns").is_empty() {
            return;
        }
    }
    panic!("its own company excuses it");
}

/// From outside, which the host cannot tell from a crash.
#[test]
fn a_worker_that_is_killed_counts_only_if_the_call_was_alone_in_it_to_the_end() {
    let (host, mut client) = host(&[
        ("STRAIT__WORKERS__STRIKES", "1"),
        ("STRAIT__WORKERS__GRACE_MS", "60000"),
    ]);
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    // Kills the one worker that is in the midst of the call, and that is not `dying` already.
    let kill_one = |client: &mut Raw, dying: Option<i32>| {
        let begin = Instant::now();
        loop {
            let list = client.ok(Op::Workers, json!({}));
            let mut workers = list["workers"].as_array().unwrap().iter();
            if let Some(busy) = workers.find(|worker| worker["running"] == 1) {
                let pid = i32::try_from(number(busy, "/pid")).unwrap();
                let mut living = children(host.pid()).into_iter();
                let found = living.find(|child| child.as_raw_nonzero().get() == pid);
                if let Some(child) = found.filter(|_| dying != Some(pid)) {
                    kill_process(child, Signal::KILL).unwrap();
                    return Some(pid);
                }
            }
            assert!(begin.elapsed() < PATIENCE, "{list}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let sequence = client.begin(Op::Invoke, &spin, &[]);
    kill_one(&mut client, None);
    client.cancel(sequence);
    assert_eq!(incidents(&mut client, "spins"), [] as [Value; 0]);
    // A worker that ends while the plugin is loaded into it counts for nothing.
    for _ in 0..50 {
        let sequence = client.begin(Op::Invoke, &spin, &[]);
        let first = kill_one(&mut client, None);
        kill_one(&mut client, first);
        let reply = client.receive().unwrap();
        assert_eq!(reply.sequence(), sequence);
        reply.refused("UNAVAILABLE", "WORKER_LOST");
        if !incidents(&mut client, "spins").is_empty() {
            break;
        }
    }
    call(&mut client, "spins", OUT);
    check_call(&mut client, json!("x"), &ramp(MOVED));
}
