//! A principal's CPU time: counted wherever its kernels run, waited for beyond the quota, and refused where no waiting helps.

use serde_json::{Value, json};
use strait_client::wire::Op;

use crate::guest;
use crate::served::{Raw, Served, as_user, check_call, number, put, ramp, scale_shift};

const OTHER: u32 = 4242;

fn spins() -> Vec<u8> {
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    guest::component("spins", &text)
}

fn cpu_seconds(client: &mut Raw) -> f64 {
    let stats = client.ok(Op::Stats, json!({}));
    stats["account"]["cpu_seconds"].as_f64().unwrap()
}

fn call(deadline_ms: u64) -> Value {
    let mut call = scale_shift(json!("x"), 2.0, 1.0);
    call["deadline_ms"] = json!(deadline_ms);
    call
}

/// Invokes kernels that spin for a short time until one of them is refused for the CPU time that they took.
fn use_up(client: &mut Raw) {
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 25});
    // A thousand times what the quota gives.
    for _ in 0..24_000 {
        let body = client.ask(Op::Invoke, spin.clone()).body();
        if body["reason"] == "QUOTA_EXCEEDED" {
            return;
        }
        assert_eq!(body["reason"], "DEADLINE", "{body}");
    }
    panic!("nothing was refused");
}

#[test]
fn cpu_time_beyond_the_quota_is_waited_for_or_refused() {
    let host = Served::with_plugin(&spins(), &[("STRAIT__QUOTA__CPU_PERCENT", "1")]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    use_up(&mut client);
    let stats = client.ok(Op::Stats, json!({}));
    let account = &stats["account"];
    assert!(number(account, "/cpu_percent") >= 1, "{account}");
    assert!(account["cpu_seconds"].as_f64().unwrap() > 0.6, "{account}");
    assert!(number(account, "/cpu_refused") >= 1, "{account}");
    // Who would wait for longer than it may is told at once, and for how long.
    let mut operator = host.greeted();
    let set = |operator: &mut Raw, percent: Value| {
        operator.ok(Op::Limits, json!({"set": {"cpu_percent": percent}}))
    };
    let list = set(&mut operator, json!(0));
    assert_eq!(list["default"]["cpu_percent"], 0, "{list}");
    let refused = number(account, "/cpu_refused");
    let message = client
        .ask(Op::Invoke, call(600_000))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("ms more than a quota.cpu_percent of 0") && message.contains("none may"),
        "{message}"
    );
    set(&mut operator, json!("default"));
    let answer = client.ask(Op::Invoke, call(1));
    let message = answer.refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("ms more than a quota.cpu_percent of 1 gives in a minute")
            && message.contains("a deadline of 1 ms"),
        "{message}"
    );
    let wait_ms = number(&answer.body(), "/details/wait_ms");
    assert!((1..600_000).contains(&wait_ms), "{message}");
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/account/cpu_refused"), refused + 2);
    // Others wait: until their deadline, or until there is more.
    let waits = client.begin(Op::Invoke, &call(600_000), &[]);
    let gives_up = client.begin(Op::Invoke, &call(wait_ms + 1000), &[]);
    host.eventually(&mut operator, "both wait", |stats| {
        number(stats, "/account/queued") == 2
    });
    set(&mut operator, json!(0));
    let late = client.receive().unwrap();
    assert_eq!(late.sequence(), gives_up);
    let message = late.refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(
        message.contains("still waiting for CPU time") && message.contains("cpu_percent of 0"),
        "{message}"
    );
    set(&mut operator, json!("none"));
    let answer = client.receive().unwrap();
    assert_eq!(answer.sequence(), waits);
    answer.accepted();
    host.eventually(&mut operator, "nothing waits", |stats| {
        number(stats, "/account/queued") + number(stats, "/account/running") == 0
    });
}

#[test]
fn what_one_user_has_used_is_not_anothers() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let settings = [
        ("STRAIT__QUOTA__CPU_PERCENT", "1"),
        ("STRAIT__ENGINE__WORKERS", "1"),
    ];
    let host = Served::with_plugin(&spins(), &settings);
    host.open_to_all();
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    use_up(&mut client);
    // It waits, and keeps no thread.
    let waits = client.begin(Op::Invoke, &call(600_000), &[]);
    as_user(OTHER, || {
        let mut client = host.greeted();
        put(&mut client, "x", 3);
        for _ in 0..5 {
            check_call(&mut client, json!("x"), &ramp(3));
        }
    });
    client.ok(
        Op::Limits,
        json!({"principal": "uid:0", "set": {"cpu_percent": 400}}),
    );
    let answer = client.receive().unwrap();
    assert_eq!(answer.sequence(), waits);
    answer.accepted();
}

#[test]
fn what_a_kernel_takes_is_counted_however_it_ends() {
    let host = Served::with_plugin(&spins(), &[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let spin = |deadline_ms: u64| json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
    let at_rest = |stats: &Value| number(stats, "/account/running") == 0;
    let before = cpu_seconds(&mut client);
    client
        .ask(Op::Invoke, spin(300))
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    host.eventually(&mut client, "it has ended", at_rest);
    let after_one = cpu_seconds(&mut client);
    assert!(after_one > before + 0.01, "{before} {after_one}");
    if !host.has_workers() {
        return;
    }
    // Its process ends under it, twice: what both have used is known still.
    let spinning = client.begin(Op::Invoke, &spin(600_000), &[]);
    let mut watcher = host.greeted();
    for lost in 1..=2 {
        let begun = std::time::Instant::now();
        let worker = loop {
            let workers = watcher.ok(Op::Workers, json!({}));
            let workers = workers["workers"].as_array().unwrap().clone();
            let busy = workers
                .iter()
                .find(|worker| number(worker, "/running") == 1);
            if let Some(worker) = busy {
                break number(worker, "/pid");
            }
            assert!(begun.elapsed() < crate::served::PATIENCE);
        };
        let pid = u32::try_from(worker).unwrap();
        while strait_memory::process::cpu_time(pid).unwrap().as_millis() < 300 {
            std::thread::yield_now();
        }
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        host.eventually(&mut watcher, "it is lost", |stats| {
            number(stats, "/workers/lost") == lost
        });
    }
    let answer = client.receive().unwrap();
    assert_eq!(answer.sequence(), spinning);
    answer.refused("UNAVAILABLE", "WORKER_LOST");
    host.eventually(&mut watcher, "it has ended", at_rest);
    let after_two = cpu_seconds(&mut watcher);
    assert!(after_two > 0.6, "{after_one} {after_two}");
}
