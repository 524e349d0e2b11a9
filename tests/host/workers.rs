//! Kernels in a worker process: whatever becomes of it, the host goes on, and nothing is left behind.
//! (The suites of engine and host run through workers as a whole with `STRAIT_TEST_WORKERS=1`.)

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use strait_client::wire::Op;
use strait_memory::WriteMapping;

use crate::guest;
use crate::served::{
    Frame, Holdings, PATIENCE, Random, Raw, Served, as_user, check_call, number, numbers, put,
    ramp, read, scale_shift,
};

/// Above `move_min_bytes`: such a tensor becomes a window.
pub(super) const MOVED: u64 = 100_000;
pub(super) const ON: (&str, &str) = ("STRAIT__WORKERS__ENABLED", "true");
/// So that there is one worker, the principal's, but for those in which a run is alone.
pub(super) const NO_SPARE: (&str, &str) = ("STRAIT__WORKERS__SPARE", "false");
const LOST: (&str, &str) = ("UNAVAILABLE", "WORKER_LOST");

fn spin(deadline_ms: u64) -> Value {
    json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms})
}

/// A host with the kernel `spins/k`, which never ends, and the flight `x`; its worker is there.
pub(super) fn host(settings: &[(&str, &str)]) -> (Served, Raw) {
    let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
    host_with(&text, settings)
}

fn host_with(spins: &str, settings: &[(&str, &str)]) -> (Served, Raw) {
    let settings = [&[NO_SPARE], settings].concat();
    let host = Served::with_plugin(&guest::component("spins", spins), &settings);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    put(&mut client, "first", 10);
    let mut first = scale_shift(json!("first"), 2.0, 1.0);
    // Of which nothing is left.
    (first["seal"], first["map"]) = (json!(true), json!(false));
    client.ok(Op::Invoke, first);
    client.ok(Op::Drop, json!({"name": "first"}));
    (host, client)
}

/// Processes whose parent is `parent`.
pub(super) fn children(parent: i32) -> Vec<Pid> {
    processes_of(parent, |state| state != "Z")
}

/// How many those are with the ones that have ended and are waited for by nobody.
pub(super) fn all_children(parent: i32) -> usize {
    processes_of(parent, |_| true).len()
}

fn processes_of(parent: i32, is_one: impl Fn(&str) -> bool) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap();
    let of_parent = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before it may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        (fields.next()? == parent.to_string() && is_one(state)).then_some(pid)
    };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(of_parent)
        .filter_map(Pid::from_raw)
        .collect()
}

/// The one worker of `host`.
pub(super) fn worker(host: &Served) -> Pid {
    let begin = Instant::now();
    loop {
        // Until it has become the worker, a new process looks like its host.
        match children(host.pid())[..] {
            [worker] => return worker,
            ref others => assert!(begin.elapsed() < PATIENCE, "workers: {others:?}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn kill(pid: Pid) {
    kill_process(pid, Signal::KILL).unwrap();
}

/// Returns when no thread of it runs any more.
pub(super) fn stop(pid: Pid) {
    kill_process(pid, Signal::STOP).unwrap();
    let begin = Instant::now();
    let runs = |task: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        !stat.contains(") T ")
    };
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    while fs::read_dir(&tasks).unwrap().any(runs) {
        assert!(begin.elapsed() < PATIENCE, "it is not stopped");
    }
}

fn begin_spin(client: &mut Raw, deadline_ms: u64) -> u32 {
    let sequence = client.begin(Op::Invoke, &spin(deadline_ms), &[]);
    while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
    sequence
}

pub(super) fn invoke(client: &mut Raw) -> Frame {
    client.ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0))
}

#[test]
fn a_worker_that_is_killed_is_followed_by_another_and_its_results_stay() {
    let (host, mut client) = host(&[ON]);
    let kept = invoke(&mut client);
    let expected: Vec<_> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
    assert_eq!(numbers(&kept), expected);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let first = worker(&host);
    let warm = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&warm, "/pool/idle_segments"), 1);
    kill(first);
    // The first call may find the worker dying, and then runs in one of its own.
    for _ in 0..2 {
        check_call(&mut client, json!("x"), &ramp(MOVED));
    }
    assert_ne!(worker(&host), first);
    assert_eq!(numbers(&kept), expected, "a result that was delivered");
    let mapping = &kept.body()["results"][0]["mapping"];
    let segment = json!({"segment": mapping["segment"]});
    let again = client.ask(Op::Map, segment.clone());
    again.accepted();
    let offset = mapping["tensors"][0]["offset"].as_u64().unwrap();
    assert_eq!(read(again.fds[0].as_fd(), offset, expected.len()), expected);
    // Nor is it recycled: nobody has it mapped writable any more.
    let doubled = client.ask(Op::Invoke, scale_shift(segment, 2.0, 0.0));
    assert_eq!(numbers(&doubled)[7], 2.0 * expected[7]);
    assert_eq!(numbers(&kept), expected);
    // What the first one kept warm was no use to the second, whose own has gone into the last result.
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/pool/idle_segments"), 0, "{stats}");
}

#[test]
fn what_ran_in_a_killed_worker_runs_again_once_and_alone() {
    let (host, mut client) = host(&[ON, ("STRAIT__ENGINE__WORKERS", "4")]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut client));
    for _ in 0..3 {
        let sequence = begin_spin(&mut client, 600_000);
        let first = worker(&host);
        kill(first);
        let begin = Instant::now();
        let alone = loop {
            let workers = client.ok(Op::Workers, json!({}))["workers"].clone();
            let mut workers = workers.as_array().unwrap().iter();
            if let Some(busy) = workers.find(|worker| worker["running"] == 1) {
                let pid = i32::try_from(number(busy, "/pid")).unwrap();
                match Pid::from_raw(pid).unwrap() {
                    alone if alone != first => break alone,
                    _ => {}
                }
            }
            assert!(begin.elapsed() < PATIENCE, "it does not run again");
        };
        // Others have a worker of their own beside it.
        check_call(&mut client, json!("x"), &ramp(MOVED));
        assert_eq!(children(host.pid()).len(), 2);
        kill(alone);
        let reply = client.receive().unwrap();
        assert_eq!(reply.sequence(), sequence);
        let message = reply.refused(LOST.0, LOST.1);
        assert!(
            message.contains("`k`") && message.contains("ask again"),
            "{message}"
        );
        check_call(&mut client, json!("x"), &ramp(MOVED));
    }
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}

#[test]
fn a_worker_is_confined_and_counted() {
    let (host, mut client) = host(&[ON]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let pid = worker(&host);
    let about = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", pid.as_raw_nonzero()));
    let status = about("status").unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{status}");
    }
    assert_eq!(about("oom_score_adj").unwrap().trim(), "1000");
    assert_eq!(about("environ").unwrap(), "");
    assert!(status.contains("Umask:\t0777"), "{status}");
    let limits = about("limits").unwrap();
    for (name, most) in [("core file size", 0), ("file size", 2 << 20)] {
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix(&format!("Max {name} ")));
        let words: Vec<_> = line.unwrap().split_whitespace().take(2).collect();
        assert_eq!(words, [most.to_string(), most.to_string()], "{name}");
    }
    let workers = |client: &mut Raw| client.ok(Op::Stats, json!({}))["workers"].clone();
    let before = workers(&mut client);
    assert_eq!(
        (&before["processes"], &before["lost"]),
        (&json!(1), &json!(0))
    );
    kill(pid);
    for _ in 0..2 {
        check_call(&mut client, json!("x"), &ramp(MOVED));
    }
    let after = workers(&mut client);
    // One more if the first call found it dying and ran alone.
    let started = number(&after, "/started") - number(&before, "/started");
    assert!((1..=2).contains(&started), "{after}");
    assert_eq!(
        (&after["processes"], &after["lost"]),
        (&json!(1), &json!(1))
    );
}

#[test]
fn what_could_find_other_bytes_is_not_run_again() {
    let (host, mut client) = host(&[ON]);
    let created = client.create(MOVED);
    let pages = WriteMapping::new(&created.fd, created.bytes).unwrap();
    let own = json!({"kernel": "spins/k", "inputs": {"x": {"segment": created.segment}}, "deadline_ms": 600_000});
    client.begin(Op::Invoke, &own, &[]);
    while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
    kill(worker(&host));
    client.receive().unwrap().refused(LOST.0, LOST.1);
    drop(pages);
}

#[test]
fn a_runaway_in_host_code_is_killed_at_its_deadline_or_when_cancelled() {
    // Fills memory of its own again and again: what it has grown by, beyond the windows.
    let text = "(func $run (param i32) (result i32) (local $at i32)
        (local.set $at (i32.mul (memory.grow (i32.const 2000)) (i32.const 65536)))
        (loop $l (memory.fill (local.get $at) (i32.const 1) (i32.const 130000000)) (br $l)) i32.const 0)";
    let (host, mut client) = host_with(text, &[ON]);
    let begin = Instant::now();
    loop {
        client
            .ask(Op::Invoke, spin(100))
            .refused("DEADLINE_EXCEEDED", "DEADLINE");
        if number(&client.ok(Op::Stats, json!({})), "/workers/lost") > 0 {
            break;
        }
        // Its time was over when the worker had the plugin.
        assert!(begin.elapsed() < PATIENCE, "it still has memory");
    }
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let sequence = begin_spin(&mut client, 600_000);
    client.ok(Op::Cancel, json!({"sequence": sequence}));
    client.receive().unwrap().refused("CANCELLED", "CANCELLED");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    // Whoever is gone is waited for by nobody.
    let mut leaving = host.greeted();
    begin_spin(&mut leaving, 600_000);
    drop(leaving);
    host.eventually(&mut client, "its run ends", |stats| {
        number(stats, "/running") == 0
    });
    check_call(&mut client, json!("x"), &ramp(MOVED));
}

#[test]
fn a_worker_that_is_stopped_is_replaced() {
    let (host, mut client) = host(&[ON]);
    let stopped = worker(&host);
    stop(stopped);
    let mut late = scale_shift(json!("x"), 2.0, 1.0);
    late["deadline_ms"] = json!(100);
    client
        .ask(Op::Invoke, late)
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    assert_ne!(worker(&host), stopped);
}

/// Whose host is gone: nobody here may be there to reap it.
fn check_ends(worker: Pid) {
    let begin = Instant::now();
    let stat = format!("/proc/{}/stat", worker.as_raw_nonzero());
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(begin.elapsed() < PATIENCE, "the worker lives");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_worker_does_not_outlive_its_host() {
    for signal in [Signal::KILL, Signal::TERM] {
        let (mut host, mut client) = host(&[ON]);
        let worker = worker(&host);
        // Nor does what it is doing keep it.
        client.begin(Op::Invoke, &spin(2000), &[]);
        host.signal(signal);
        host.wait();
        check_ends(worker);
    }
}

/// Which cannot see that its host is gone.
#[test]
fn a_worker_that_is_stopped_does_not_outlive_its_host() {
    let (mut host, mut client) = host(&[ON]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let worker = worker(&host);
    stop(worker);
    host.signal(Signal::KILL);
    host.wait();
    check_ends(worker);
}

#[test]
fn workers_killed_at_any_moment_cost_no_call_and_leave_nothing() {
    let (host, mut client) = host(&[ON]);
    put(&mut client, "small", 10);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let before = Holdings::of(&host.settled(&mut client));
    let mut random = Random::new();
    for _ in 0..40 {
        let wait = Duration::from_micros(random.next() % 3000);
        let (name, count) = *random.one(&[("x", MOVED), ("small", 10)]);
        let victim = worker(&host);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(wait);
            kill(victim);
        });
        for _ in 0..4 {
            check_call(&mut client, json!(name), &ramp(count));
        }
        killer.join().unwrap();
        // The first one may find it dying, and then runs in one of its own.
        for _ in 0..2 {
            check_call(&mut client, json!(name), &ramp(count));
        }
    }
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}

#[test]
fn what_nobody_holds_any_more_is_mapped_in_no_worker() {
    let (host, mut client) = host(&[ON]);
    let maps = || fs::read_to_string(format!("/proc/{}/maps", worker(&host).as_raw_nonzero()));
    let mapped = |inode: u64| {
        maps().is_ok_and(|maps| {
            maps.lines()
                .any(|line| line.contains(&format!(" {inode} ")))
        })
    };
    if maps().is_err() {
        // Only root may look into a process that is not dumpable.
        return;
    }
    let inode = |frame: &Frame| rustix::fs::fstat(&frame.fds[0]).unwrap().st_ino;
    let input = client.ask(Op::Map, json!({"name": "x"}));
    let mut sealed = scale_shift(json!("x"), 2.0, 1.0);
    sealed["seal"] = json!(true);
    let results = [invoke(&mut client), client.ask(Op::Invoke, sealed)];
    assert!(mapped(inode(&input)) && mapped(inode(&results[0])));
    assert!(
        !mapped(inode(&results[1])),
        "what is sealed is mapped writable nowhere"
    );
    let inodes = [&input, &results[0]].map(inode);
    client.ok(Op::Drop, json!({"name": "x"}));
    let leases: Vec<_> = results
        .iter()
        .map(|result| result.body()["results"][0]["lease"].clone())
        .chain([input.body()["lease"].clone()])
        .collect();
    client.ok(Op::Release, json!({"leases": leases}));
    drop((input, results));
    // The idle result stays warm for the next one; the input is gone.
    host.eventually(&mut client, "the input is unmapped", |_| !mapped(inodes[0]));
    assert!(mapped(inodes[1]));
}

#[test]
fn nobody_else_waits_for_a_worker_that_is_stopped() {
    let (host, mut client) = host(&[ON]);
    put(&mut client, "small", 10);
    check_call(&mut client, json!("small"), &ramp(10));
    let small = client.ask(Op::Invoke, scale_shift(json!("small"), 2.0, 1.0));
    let input = client.ask(Op::Map, json!({"name": "small"}));
    let stopped = worker(&host);
    stop(stopped);
    // It has both open, and is to let go of them.
    let leases = [
        input.body()["lease"].clone(),
        small.body()["results"][0]["lease"].clone(),
    ];
    client.ok(Op::Drop, json!({"name": "small"}));
    client.ok(Op::Release, json!({"leases": leases}));
    let sequence = client.begin(Op::Invoke, &spin(600_000), &[]);
    let mut other = host.greeted();
    other.ok(Op::List, json!({}));
    put(&mut other, "z", MOVED);
    other.ok(Op::Drop, json!({"name": "z"}));
    client.begin(Op::Cancel, &json!({"sequence": sequence}), &[]);
    other.ok(Op::Ping, json!({}));
    assert_eq!(worker(&host), stopped, "it was waited for");
    client.receive().unwrap().accepted();
    client.receive().unwrap().refused("CANCELLED", "CANCELLED");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    assert_ne!(worker(&host), stopped);
}

#[test]
fn a_worker_that_ends_while_nobody_uses_it_is_found_by_stats() {
    let (host, mut client) = host(&[ON]);
    kill(worker(&host));
    let stats = host.eventually(&mut client, "it is not counted", |stats| {
        number(stats, "/workers/processes") == 0
    });
    assert_eq!(number(&stats, "/workers/lost"), 1);
    host.eventually(&mut client, "it is no zombie", |_| {
        all_children(host.pid()) == 0
    });
}

#[test]
fn as_many_lanes_as_there_are_threads() {
    let (_host, mut client) = host(&[ON, ("STRAIT__ENGINE__WORKERS", "300")]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
}

pub(super) struct OnDrop<F: Fn()>(pub(super) F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Of the host's own user, while workers start again and again.
#[test]
fn nobody_gets_at_the_memory_of_a_worker_that_starts() {
    const HOSTS: u32 = 4242;
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let host = Served::as_user(HOSTS, &[ON, NO_SPARE]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let done = AtomicBool::new(false);
    let opens = |pid: i32| {
        let memory = fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/{pid}/mem"));
        memory.is_ok()
    };
    let intruder = || {
        let mut entered = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let load = fs::read_to_string("/proc/loadavg").unwrap();
            let last: i32 = load.split_whitespace().last().unwrap().parse().unwrap();
            // Those that are about to be, too.
            entered.extend((last - 2..last + 3).filter(|pid| opens(*pid)));
        }
        entered
    };
    let (entered, victims) = std::thread::scope(|scope| {
        let intruder = scope.spawn(|| as_user(HOSTS, intruder));
        // Also where this thread gives up.
        let _end = OnDrop(|| done.store(true, Ordering::Relaxed));
        let mut victims = Vec::new();
        for _ in 0..20 {
            // The first one may find a worker dying, and then runs in one of its own.
            for _ in 0..2 {
                check_call(&mut client, json!("x"), &ramp(MOVED));
            }
            let victim = worker(&host);
            victims.push(victim.as_raw_nonzero().get());
            kill(victim);
        }
        // That others of its user are no such matter.
        let mut other = Command::new("sleep").arg("600").uid(HOSTS).spawn().unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        assert!(as_user(HOSTS, || opens(pid)));
        other.kill().unwrap();
        other.wait().unwrap();
        done.store(true, Ordering::Relaxed);
        (intruder.join().unwrap(), victims)
    });
    let lost: Vec<_> = victims.iter().filter(|pid| entered.contains(pid)).collect();
    assert!(
        lost.is_empty(),
        "{} of {}: {lost:?}",
        lost.len(),
        victims.len()
    );
}

#[test]
fn a_run_that_needs_more_than_its_worker_may_have_says_so() {
    let (host, mut client) = host(&[ON, ("STRAIT__WORKERS__MEMORY_BYTES", "1")]);
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let first = worker(&host);
    put(&mut client, "large", 20_000_000);
    let call = scale_shift(json!("large"), 2.0, 1.0);
    let message = client
        .ask(Op::Invoke, call)
        .refused("RESOURCE_EXHAUSTED", "NO_MEMORY");
    assert!(message.contains("workers.memory_bytes"), "{message}");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    assert_eq!(worker(&host), first);
}

#[test]
fn what_a_guest_logs_is_told_by_the_host_as_one_line() {
    let text = fs::read_to_string("tests/guests/forges.wat").unwrap();
    let host = Served::with_plugin(&guest::component("forges", &text), &[ON]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let call = json!({"kernel": "forges/k", "inputs": {"x": "x"}});
    client
        .ask(Op::Invoke, call)
        .refused("INTERNAL", "KERNEL_FAILED");
    host.eventually(&mut client, "the line is told", |_| {
        host.log().contains("strait::guest: a")
    });
    let log = host.log();
    let line = log
        .lines()
        .find(|line| line.contains("strait::guest"))
        .unwrap();
    for part in [
        "ERROR",
        r"a\n2030-01-01T00:00:00Z ERROR strait: forged\r\x1b[2K\u{0}b",
        "worker=",
        "request_id=",
        r#"plugin="forges""#,
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
}

#[test]
fn instances_that_wait_take_no_memory_that_a_run_needs() {
    // Any two of them at a time have room, and no more.
    let text = format!(
        "(memory (export \"memory\") {})\n{}",
        (24 << 20) / (64 << 10),
        fs::read_to_string("tests/guests/copies.wat").unwrap()
    );
    let names = ["a", "b", "c", "d"];
    let plugins = names.map(|name| guest::component(name, &text));
    let settings = [
        ON,
        NO_SPARE,
        ("STRAIT__WORKERS__MEMORY_BYTES", "1"),
        ("STRAIT__ENGINE__WORKERS", "1"),
    ];
    let host = Served::with_plugins(&plugins, &settings);
    let mut client = host.greeted();
    put(&mut client, "x", 10);
    for name in names {
        let call = json!({"kernel": format!("{name}/k"), "inputs": {"x": "x"}});
        for _ in 0..2 {
            client.ask(Op::Invoke, call.clone()).accepted();
        }
    }
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/workers/lost"), 0);
}
