//! Which worker processes there are: one of each principal, a spare, no more than the setting says, and none that
//! nobody has used for long.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::{Value, json};
use strait_client::wire::Op;

use crate::cli;
use crate::guest;
use crate::served::{
    Holdings, PATIENCE, Raw, Served, as_user, check_call, number, numbers, put, ramp, scale_shift,
};
use crate::workers::{MOVED, all_children, kill};

const OTHER: u32 = 4242;

/// A host of several users with workers and the kernel `spins/k`, which never ends; and its operator. None unless root
/// is here to become those users.
fn shared_host(settings: &[(&str, &str)]) -> Option<(Served, Raw)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
    let on = [
        ("STRAIT__WORKERS__ENABLED", "true"),
        ("STRAIT__ENGINE__WORKERS", "4"),
    ];
    let settings = [&on, settings].concat();
    let host = Served::with_plugin(&guest::component("spins", &text), &settings);
    host.open_to_all();
    let client = user(&host, 0);
    Some((host, client))
}

/// A client that is `uid`, with the flight `x`.
fn user(host: &Served, uid: u32) -> Raw {
    let mut client = as_user(uid, || host.greeted());
    put(&mut client, "x", MOVED);
    client
}

fn check(client: &mut Raw) {
    check_call(client, json!("x"), &ramp(MOVED));
}

/// What a client sees of the workers.
fn workers(client: &mut Raw) -> Vec<Value> {
    let list = client.ok(Op::Workers, json!({}));
    assert_eq!(list["more"], false);
    list["workers"].as_array().unwrap().clone()
}

/// Until what `operator` sees of them is as it should be.
fn eventually(
    operator: &mut Raw,
    what: &str,
    mut holds: impl FnMut(&[Value]) -> bool,
) -> Vec<Value> {
    let begin = Instant::now();
    loop {
        let seen = workers(operator);
        if holds(&seen) {
            return seen;
        }
        assert!(begin.elapsed() < PATIENCE, "never: {what}; {seen:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The one worker of `whose`.
fn of<'a>(workers: &'a [Value], whose: &str) -> &'a Value {
    let mut own = workers.iter().filter(|worker| worker["principal"] == whose);
    let (one, more) = (own.next(), own.next());
    assert!(one.is_some() && more.is_none(), "{whose}: {workers:?}");
    one.unwrap()
}

/// The spare, once there is one.
fn spare(operator: &mut Raw) -> Pid {
    let is_spare = |worker: &Value| worker["principal"].is_null();
    let seen = eventually(operator, "a spare", |seen| seen.iter().any(is_spare));
    let mut spares = seen.iter().filter(|worker| is_spare(worker));
    let spare = pid(spares.next().unwrap());
    assert_eq!(spares.count(), 0, "{seen:?}");
    spare
}

fn pid(worker: &Value) -> Pid {
    Pid::from_raw(i32::try_from(number(worker, "/pid")).unwrap()).unwrap()
}

fn spin(client: &mut Raw) -> u32 {
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    let sequence = client.begin(Op::Invoke, &spin, &[]);
    eventually(client, "it runs", |seen| {
        seen.iter().any(|worker| worker["running"] == 1)
    });
    sequence
}

const NO_SPARE: (&str, &str) = ("STRAIT__WORKERS__SPARE", "false");

#[test]
fn what_happens_to_one_principals_worker_is_no_affair_of_another() {
    let Some((host, mut client)) = shared_host(&[NO_SPARE]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    check(&mut client);
    check(&mut other);
    let seen = workers(&mut client);
    assert_eq!(seen.len(), 2, "{seen:?}");
    let own = of(&seen, "uid:0").clone();
    assert_eq!((&own["running"], &own["runs"]), (&json!(0), &json!(1)));
    // An older Linux has no Landlock, or not all of it; and this host is root.
    let mut lacks = own["lacks"].as_array().unwrap().iter();
    let known = |wall: &Value| {
        let wall = wall.as_str().unwrap();
        wall.starts_with("Landlock") || wall.starts_with("a user of its own")
    };
    assert!(lacks.all(known), "{own}");
    let seen = workers(&mut other);
    assert_eq!((seen.len(), &seen[0]["principal"]), (1, &json!("uid:4242")));
    let sequence = spin(&mut client);
    for _ in 0..3 {
        kill(pid(of(&workers(&mut other), "uid:4242")));
        // The first call may find it dying, and then runs in one of its own.
        for _ in 0..2 {
            check(&mut other);
        }
    }
    let seen = workers(&mut client);
    let now = of(&seen, "uid:0");
    assert_eq!(
        (&now["pid"], &now["running"], &now["runs"]),
        (&own["pid"], &json!(1), &json!(2)),
    );
    assert_eq!(number(&client.ok(Op::Stats, json!({})), "/workers/lost"), 3);
    client.cancel(sequence);
    check(&mut client);
}

#[test]
fn the_spare_serves_the_next_principal_and_succeeds_whoever_is_lost() {
    let Some((host, mut client)) = shared_host(&[]) else {
        return;
    };
    assert_eq!(
        workers(&mut client),
        Vec::<Value>::new(),
        "nobody runs anything"
    );
    check(&mut client);
    let first = spare(&mut client);
    let mut other = user(&host, OTHER);
    check(&mut other);
    assert_eq!(pid(of(&workers(&mut client), "uid:4242")), first);
    let second = spare(&mut client);
    assert_ne!(second, first);
    assert!(
        !workers(&mut other)
            .iter()
            .any(|worker| pid(worker) == second),
        "it is nobody's"
    );
    // One that ends while it is idle.
    kill(pid(of(&workers(&mut client), "uid:0")));
    eventually(&mut client, "it is gone", |seen| seen.len() == 2);
    check(&mut client);
    assert_eq!(pid(of(&workers(&mut client), "uid:0")), second);
    // One that ends while it runs something, which is then alone.
    let third = spare(&mut client);
    let sequence = spin(&mut client);
    kill(second);
    eventually(&mut client, "it runs again in the spare", |seen| {
        seen.iter().any(|worker| {
            pid(worker) == third && worker["principal"] == "uid:0" && worker["running"] == 1
        })
    });
    check(&mut client);
    check(&mut other);
    client.cancel(sequence);
    eventually(&mut client, "a worker each and a spare", |seen| {
        seen.len() == 3
    });
    let left = workers(&mut client);
    assert!(!left.iter().any(|worker| pid(worker) == third), "{left:?}");
}

#[test]
fn workers_that_nobody_uses_end_and_so_does_the_spare() {
    let Some((host, mut client)) = shared_host(&[("STRAIT__WORKERS__IDLE_MS", "300")]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    let kept = other.ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0));
    let before = numbers(&kept);
    let sequence = spin(&mut client);
    eventually(&mut client, "the other's ends", |seen| {
        seen.iter().all(|worker| worker["principal"] != "uid:4242")
    });
    assert_eq!(of(&workers(&mut client), "uid:0")["running"], 1);
    client.cancel(sequence);
    check(&mut client);
    // What it had mapped is given back, idle results among it.
    let stats = host.eventually(&mut client, "all have ended", |stats| {
        number(stats, "/workers/processes") == 0
            && number(stats, "/pool/idle_segments") == 0
            && number(stats, "/parked/mappings") == 0
    });
    assert_eq!(number(&stats, "/workers/lost"), 0);
    host.eventually(&mut client, "there is no zombie", |stats| {
        all_children(host.pid()) == 0 && number(stats, "/workers/fds") == 0
    });
    assert_eq!(numbers(&kept), before, "a result that was delivered");
    check(&mut other);
    check(&mut client);
}

#[test]
fn at_the_most_an_idle_worker_makes_room_and_if_all_are_busy_a_run_waits() {
    let Some((host, mut client)) = shared_host(&[("STRAIT__WORKERS__MAX", "1")]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    for _ in 0..3 {
        check(&mut client);
        of(&workers(&mut client), "uid:0");
        check(&mut other);
        of(&workers(&mut client), "uid:4242");
        assert_eq!(
            workers(&mut client).len(),
            1,
            "there is no room for a spare"
        );
    }
    let sequence = spin(&mut client);
    let mut late = scale_shift(json!("x"), 2.0, 1.0);
    late["deadline_ms"] = json!(200);
    other
        .ask(Op::Invoke, late.clone())
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    late["deadline_ms"] = json!(600_000);
    let waiting = other.begin(Op::Invoke, &late, &[]);
    while number(&other.ok(Op::Stats, json!({})), "/account/running") == 0 {}
    other.cancel(waiting);
    let waiting = other.begin(Op::Invoke, &late, &[]);
    while number(&other.ok(Op::Stats, json!({})), "/account/running") == 0 {}
    assert_eq!(of(&workers(&mut client), "uid:0")["running"], 1);
    client.cancel(sequence);
    let reply = other.receive().unwrap();
    assert_eq!(
        (reply.sequence(), numbers(&reply).len()),
        (waiting, 100_000)
    );
    // Its successor needs room, too.
    let sequence = spin(&mut client);
    kill(pid(of(&workers(&mut client), "uid:0")));
    eventually(&mut client, "it runs again", |seen| {
        seen.iter().any(|worker| worker["running"] == 1)
    });
    client.cancel(sequence);
    check(&mut other);
}

#[test]
fn whoever_is_never_idle_makes_room_as_well() {
    let Some((host, mut operator)) = shared_host(&[("STRAIT__WORKERS__MAX", "1")]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    let mut busy = [user(&host, 7), user(&host, 7)];
    let runs = |operator: &mut Raw| {
        let runs = |worker: &Value| worker["principal"] == "uid:7" && worker["running"] == 1;
        let seen = eventually(operator, "it runs", |seen| seen.iter().any(runs));
        pid(of(&seen, "uid:7"))
    };
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    let begin = Instant::now();
    loop {
        let first = busy[0].begin(Op::Invoke, &spin, &[]);
        let worker = runs(&mut operator);
        let call = scale_shift(json!("x"), 2.0, 1.0);
        let waiting = other.begin(Op::Invoke, &call, &[]);
        while number(&other.ok(Op::Stats, json!({})), "/account/running") == 0 {}
        // Comes later, and before the first one is over.
        let second = busy[1].begin(Op::Invoke, &spin, &[]);
        while number(&busy[1].ok(Op::Stats, json!({})), "/account/running") < 2 {}
        busy[0].cancel(first);
        let made_room = runs(&mut operator) != worker;
        if made_room {
            // Who came later has the only place now, and keeps it.
            assert!(other.readable(PATIENCE), "it was not its turn");
        }
        busy[1].cancel(second);
        assert_eq!(other.receive().unwrap().sequence(), waiting);
        if made_room {
            return;
        }
        // The later one may have been in line first.
        assert!(begin.elapsed() < PATIENCE, "nobody makes room");
    }
}

#[test]
fn a_run_that_is_alone_gets_the_place_of_its_own_principals_worker() {
    let Some((host, mut operator)) = shared_host(&[("STRAIT__WORKERS__MAX", "1")]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    let mut own = [user(&host, 7), user(&host, 7)];
    let call = scale_shift(json!("x"), 2.0, 1.0);
    for _ in 0..3 {
        let first = spin(&mut own[0]);
        let killed = pid(of(&workers(&mut operator), "uid:7"));
        // In line behind another, the worker that is to be killed being asked to leave.
        other.begin(Op::Invoke, &call, &[]);
        while number(&other.ok(Op::Stats, json!({})), "/account/running") == 0 {}
        own[1].begin(Op::Invoke, &call, &[]);
        while number(&own[1].ok(Op::Stats, json!({})), "/account/running") < 2 {}
        kill(killed);
        other.receive().unwrap().accepted();
        own[1].receive().unwrap().accepted();
        eventually(&mut operator, "it runs again, alone", |seen| {
            seen.iter().any(|worker| {
                worker["principal"] == "uid:7" && worker["running"] == 1 && pid(worker) != killed
            })
        });
        own[0].cancel(first);
    }
}

#[test]
fn twenty_principals_are_served_by_three_processes() {
    let Some((host, mut client)) = shared_host(&[("STRAIT__WORKERS__MAX", "3")]) else {
        return;
    };
    check(&mut client);
    client.ok(Op::Drop, json!({"name": "x"}));
    let before = Holdings::of(&host.settled(&mut client));
    let mut users: Vec<_> = (0..20).map(|n| user(&host, OTHER + n)).collect();
    std::thread::scope(|scope| {
        let calls: Vec<_> = users
            .iter_mut()
            .map(|client| scope.spawn(|| (0..4).for_each(|_| check(client))))
            .collect();
        let mut seen = BTreeSet::new();
        while !calls.iter().all(|call| call.is_finished()) {
            let stats = client.ok(Op::Stats, json!({}));
            assert!(number(&stats, "/workers/processes") <= 3, "{stats}");
            for worker in workers(&mut client) {
                seen.insert(worker["principal"].to_string());
            }
        }
        eprintln!("{seen:?}");
    });
    for client in &mut users {
        client.ok(Op::Drop, json!({"name": "x"}));
    }
    drop(users);
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/workers/lost"), 0, "{stats}");
    host.eventually(&mut client, "no more than that, and no zombie", |_| {
        all_children(host.pid()) <= 3
    });
}

#[test]
fn the_command_line_shows_them() {
    let Some((host, mut client)) = shared_host(&[NO_SPARE]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    check(&mut client);
    check(&mut other);
    let list = cli::good_json(host.path(), &["workers", "--json"]);
    let listed = list["workers"].as_array().unwrap();
    let table = cli::good(host.path(), &["workers"]);
    for whose in ["uid:0", "uid:4242"] {
        let worker = of(listed, whose);
        assert_eq!(worker["runs"], 1);
        let pid = worker["pid"].to_string();
        assert!(
            table
                .lines()
                .any(|line| line.contains(whose) && line.contains(&pid)),
            "{table}"
        );
    }
}

/// What Linux says of a process: the numbers behind a word of its status.
fn status(pid: Pid, word: &str) -> Vec<u64> {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    let words = line.unwrap().split_ascii_whitespace();
    words.map(|n| n.parse().unwrap()).collect()
}

#[test]
fn each_worker_may_have_a_user_of_its_own() {
    let uids = ("STRAIT__WORKERS__UIDS", "300000-300007");
    let Some((host, mut client)) = shared_host(&[uids]) else {
        return;
    };
    let mut other = user(&host, OTHER);
    check(&mut client);
    check(&mut other);
    let spare = spare(&mut client);
    let seen = workers(&mut client);
    let mut users = BTreeSet::new();
    for worker in [pid(of(&seen, "uid:0")), pid(of(&seen, "uid:4242")), spare] {
        let uids = status(worker, "Uid:");
        assert!((300_000..300_008).contains(&uids[0]), "{uids:?}");
        assert_eq!(uids, [uids[0]; 4]);
        assert_eq!(status(worker, "Gid:"), uids);
        assert!(status(worker, "Groups:").is_empty());
        for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(status(worker, capabilities), [0], "{capabilities}");
        }
        assert!(users.insert(uids[0]), "two are of user {}", uids[0]);
    }
    // What it maps, makes and gives is as it is with the host's user.
    let mut sealed = scale_shift(json!("x"), 2.0, 1.0);
    sealed["seal"] = json!(true);
    let reply = other.ask(Op::Invoke, sealed);
    assert_eq!(numbers(&reply).len(), ramp(MOVED).len());
    let first = pid(of(&seen, "uid:0"));
    kill(first);
    check(&mut client);
    check(&mut client);
    assert_ne!(pid(of(&workers(&mut client), "uid:0")), first);
    let lacking = |worker: &Value| worker["lacks"].as_array().unwrap().clone();
    let lacks: Vec<Value> = workers(&mut client).iter().flat_map(lacking).collect();
    let is_landlock = |wall: &Value| wall.as_str().unwrap().starts_with("Landlock");
    assert!(lacks.iter().all(is_landlock), "{lacks:?}");
}

#[test]
fn a_worker_that_finds_no_user_is_not_started() {
    let settings = [("STRAIT__WORKERS__UIDS", "300000-300000"), NO_SPARE];
    let Some((host, mut client)) = shared_host(&settings) else {
        return;
    };
    let mut other = user(&host, OTHER);
    check(&mut client);
    let message = other
        .ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0))
        .refused("INTERNAL", "HOST");
    for part in ["workers.uids (300000-300000)", "workers.max"] {
        assert!(message.contains(part), "{message}");
    }
    check(&mut client);
    kill(pid(of(&workers(&mut client), "uid:0")));
    eventually(&mut client, "it is gone", |seen| seen.is_empty());
    // Its user is free once Linux has taken it apart.
    let begin = Instant::now();
    while other
        .ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0))
        .op()
        == Op::Error
    {
        assert!(begin.elapsed() < PATIENCE, "the user is not free");
        std::thread::sleep(Duration::from_millis(5));
    }
    check(&mut other);
}
