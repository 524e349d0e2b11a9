//! Worker processes that lie: the host goes on, says what happened, and keeps nothing.
//!
//! ```text
//! host ── control, lanes ── worker_process (this binary again) ── control, lanes ── strait worker
//! ```
//! The process in the middle passes everything on, but for what the file `lie` in its directory tells it to change.

mod at_random;
mod lies;
mod mutate;
mod packet;
mod prepared;
mod relay;
mod said;

use std::fs;
use std::time::Instant;

use rustix::process::{Signal, kill_process};
use serde_json::json;
use strait_client::wire::Op;

use crate::served::{
    Frame, Holdings, PATIENCE, Raw, Served, check_call, number, put, ramp, scale_shift,
};
use crate::workers::{MOVED, all_children, children};

const LOST: (&str, &str) = ("UNAVAILABLE", "WORKER_LOST");

/// A host whose workers tell the lie in this file.
struct Lied {
    host: Served,
    client: Raw,
}

impl Lied {
    fn start() -> Self {
        Self::with(&[])
    }

    fn with(settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let own = std::env::current_exe().unwrap();
        // `/bin/sh worker OPTIONS`, in this directory.
        let script = format!(
            "TEST_WORKER=1 exec '{}' --exact hostile_worker::relay::worker_process --ignored --nocapture\n",
            own.display()
        );
        fs::write(directory.path().join("worker"), script).unwrap();
        fs::write(directory.path().join("lie"), "").unwrap();
        let program = [
            ("STRAIT__WORKERS__ENABLED", "true"),
            // It is no plugin's fault.
            ("STRAIT__WORKERS__STRIKES", "0"),
            ("STRAIT__WORKERS__PROGRAM", "/bin/sh"),
            // Which would start with one lie and serve when there is another.
            ("STRAIT__WORKERS__SPARE", "false"),
        ];
        let host = Served::start_in_with(directory, &[], &[&program, settings].concat());
        let mut client = host.greeted();
        put(&mut client, "x", MOVED);
        // Results of another size than the last one's: what needs them has to ask.
        put(&mut client, "y", 2 * MOVED);
        Self { host, client }
    }

    fn lie(&self, lie: &str) {
        fs::write(self.host.path().join("lie.new"), lie).unwrap();
        fs::rename(
            self.host.path().join("lie.new"),
            self.host.path().join("lie"),
        )
        .unwrap();
    }

    fn honest(&mut self) {
        self.lie("");
        // Whoever comes while the start of a liar fails is told so; the next one is served.
        let begin = Instant::now();
        loop {
            let call = scale_shift(json!("x"), 2.0, 1.0);
            let reply = self.client.ask(Op::Invoke, call);
            if reply.op() != Op::Error {
                let lease = reply.body()["results"][0]["lease"].clone();
                self.client.ok(Op::Release, json!({"leases": [lease]}));
                break;
            }
            reply.refused(HOST.0, HOST.1);
            assert!(begin.elapsed() < PATIENCE, "no worker starts");
        }
        check_call(&mut self.client, json!("x"), &ramp(MOVED));
    }

    /// What a small call comes to while the worker lies.
    fn check_inline(&mut self, lie: &str, outcome: (&str, &str)) {
        self.lie(lie);
        let mut call = scale_shift(
            json!({"inline": {"dtype": "float64", "shape": [3], "offset": 0, "length": 24}}),
            2.0,
            1.0,
        );
        call["inline_bytes"] = json!(32 << 10);
        let reply = self.client.ask_inline(Op::Invoke, &call, &[0; 24]);
        if outcome == FINE {
            reply.accepted();
            assert_eq!(reply.payload, [1.0_f64.to_le_bytes(); 3].concat(), "{lie}");
        } else {
            reply.refused(outcome.0, outcome.1);
        }
        self.honest();
    }

    fn invoke(&mut self, deadline_ms: u64, seal: bool) -> Frame {
        let mut body = scale_shift(json!("y"), 2.0, 1.0);
        body["deadline_ms"] = json!(deadline_ms);
        body["seal"] = json!(seal);
        self.client.ask(Op::Invoke, body)
    }
}

/// An outcome.
const FINE: (&str, &str) = ("", "");
const HOST: (&str, &str) = ("INTERNAL", "HOST");
const LATE: (&str, &str) = ("DEADLINE_EXCEEDED", "DEADLINE");

impl Lied {
    /// What an invocation comes to while the worker lies, and that nothing but that invocation suffers from it.
    fn check(&mut self, lie: &str, deadline_ms: u64, seal: bool, outcome: (&str, &str)) {
        self.lie(lie);
        let reply = self.invoke(deadline_ms, seal);
        if outcome == FINE {
            let lease = reply.accepted()["results"][0]["lease"].clone();
            self.client.ok(Op::Release, json!({"leases": [lease]}));
        } else {
            eprintln!("{lie}");
            let message = reply.refused(outcome.0, outcome.1);
            assert!(message.contains("`scale-shift`"), "{lie}: {message:.200}");
            assert!(message.len() < 10_000 && !message.contains(char::is_control));
        }
        drop(reply);
        self.honest();
    }

    /// The same of two kernels that run at once.
    fn check_chain(&mut self, lie: &str, outcome: (&str, &str)) {
        self.lie(lie);
        let text = "scale-shift(a=2) | scale-shift(b=1)";
        let call = json!({"kernel": text, "inputs": {"x": "y"}});
        let reply = self.client.ask(Op::Invoke, call);
        if outcome == FINE {
            let lease = reply.accepted()["results"][0]["lease"].clone();
            self.client.ok(Op::Release, json!({"leases": [lease]}));
        } else {
            let message = reply.refused(outcome.0, outcome.1);
            assert!(message.contains("`scale-shift`"), "{lie}: {message:.200}");
        }
        drop(reply);
        self.honest();
    }

    fn kill_worker(&self) {
        for child in children(self.host.pid()) {
            // It may end by itself.
            let _ = kill_process(child, Signal::KILL);
        }
    }

    /// Nothing is left of all that, and the host never panicked.
    fn done(mut self, before: &Holdings) {
        self.kill_worker();
        // The first call may find the worker dying, and then runs in one of its own.
        self.honest();
        self.honest();
        assert_eq!(&Holdings::of(&self.host.settled(&mut self.client)), before);
        let pid = self.host.pid();
        self.host
            .eventually(&mut self.client, "one worker and no zombie", |stats| {
                number(stats, "/workers/processes") == 1 && all_children(pid) == 1
            });
        let log = self.host.log();
        assert!(!log.contains("thread '"), "it panicked: {log}");
        // Nor did it write down what it was told.
        let longest = log.lines().map(str::len).max();
        assert!(longest < Some(20_000), "a line of {longest:?} bytes");
    }
}

#[test]
fn what_a_worker_says_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for lie in [
        "need: none",
        "need: two",
        "need: twice",
        "need: a plugin",
        "need: what there is not",
        "need: more than follows",
        "need: a result",
        "end: a need",
        "end: a long need",
        "end: too long",
        "end: too long a packet",
        "end: another kind",
        "end: more behind",
        "end: an empty packet",
        "end: a descriptor",
        "end: 100 descriptors",
        "end: the lane's",
        "end: the process'",
        "end: specs",
        "end: no results",
        "result: port",
        "result: long port",
        "result: larger",
        "result: past counting",
        "result: axes",
        "result: two axes",
        "result: dtype",
        "result: reserved less",
        "result: reserved all",
        "result: bytes",
        "report: many notes",
        "report: pages",
    ] {
        lied.check(lie, 60_000, false, LOST);
    }
    for (lie, outcome) in [
        ("need: all", HOST),
        ("need: the end", ("CANCELLED", "CANCELLED")),
        ("gone: all", FINE),
        ("totals: all", FINE),
        ("report: notes", FINE),
        ("report: long notes", FINE),
        ("report: figures", FINE),
        ("failed: long", ("INTERNAL", "GUEST_TRAP")),
        ("failed: refused", ("INVALID_ARGUMENT", "BAD_PARAMETER")),
        ("failed: memory", ("RESOURCE_EXHAUSTED", "NO_MEMORY")),
    ] {
        lied.check(lie, 60_000, false, outcome);
    }
    lied.done(&before);
}

#[test]
fn what_a_worker_says_of_a_chain_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    lied.check_chain("", FINE);
    for lie in [
        "chain: fewer reports",
        "chain: no results",
        "chain: a kernel's end",
        "chain: port",
        "chain: larger",
        "chain: bytes",
        "chain: fails nowhere",
    ] {
        lied.check_chain(lie, LOST);
    }
    // Then they run one after the other.
    lied.check_chain("chain: stalls", FINE);
    lied.done(&before);
}

#[test]
fn what_a_worker_gives_as_bytes_is_held_against_what_it_was_asked() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    lied.check_inline("", FINE);
    for lie in [
        "result: a segment",
        "result: more bytes than asked for",
        "result: a byte less",
        "result: a byte more",
        "result: port",
        "result: dtype",
        "end: no results",
        "end: half",
    ] {
        lied.check_inline(lie, LOST);
    }
    lied.done(&before);
}

#[test]
fn a_worker_that_says_nothing_or_half_of_it_is_not_waited_for() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for (lie, deadline_ms, outcome) in [
        ("need: nothing", 100, LATE),
        ("end: silence", 100, LATE),
        ("end: stopped", 100, LATE),
        ("end: half", 600_000, LOST),
        ("end: without end", 600_000, LOST),
    ] {
        lied.check(lie, deadline_ms, false, outcome);
    }
    lied.done(&before);
}

#[test]
fn a_worker_that_takes_no_plugin_over_costs_the_run_its_time_and_the_plugin_nothing() {
    let mut lied = Lied::with(&[("STRAIT__WORKERS__STRIKES", "1")]);
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    let lose = |lied: &mut Lied| {
        lied.kill_worker();
        lied.host
            .eventually(&mut lied.client, "it is gone", |stats| {
                number(stats, "/workers/processes") == 0
            });
    };
    lose(&mut lied);
    lied.check("load: silence", 100, false, LATE);
    lose(&mut lied);
    lied.lie("load: silence");
    let mut waiting = scale_shift(json!("x"), 2.0, 1.0);
    waiting["deadline_ms"] = json!(600_000);
    let sequence = lied.client.begin(Op::Invoke, &waiting, &[]);
    lied.host
        .eventually(&mut lied.client, "it is being asked", |stats| {
            number(stats, "/workers/processes") == 1
        });
    lied.client.cancel(sequence);
    lied.honest();
    lied.done(&before);
}

#[test]
fn what_a_worker_does_to_its_descriptors_is_its_own_loss() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for (lie, once, kept) in [
        (
            "seal: seals",
            ("INVALID_ARGUMENT", "BAD_SEGMENT"),
            ("INVALID_ARGUMENT", "BAD_SEGMENT"),
        ),
        ("seal: future", HOST, HOST),
        ("seal: cut", FINE, FINE),
        (
            "seal: written",
            FINE,
            ("FAILED_PRECONDITION", "STILL_WRITABLE"),
        ),
    ] {
        for (seal, outcome) in [(false, once), (true, kept)] {
            // With what is new to a worker, and not in one that ends with the run.
            lied.kill_worker();
            lied.honest();
            lied.honest();
            lied.check(lie, 60_000, seal, outcome);
        }
    }
    lied.done(&before);
}

#[test]
fn a_worker_that_changes_what_is_the_hosts_in_a_result_is_lost() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    let broken = ("INTERNAL", "BAD_ANSWER");
    for lie in ["header: changed", "footer: changed"] {
        for how in ["published later", "published", "sealed"] {
            // With what is new to a worker, and not in one that ends with the run.
            lied.kill_worker();
            lied.honest();
            lied.honest();
            let lost = |lied: &mut Lied| {
                let stats = lied.client.ok(Op::Stats, json!({}));
                number(&stats, "/workers/lost")
            };
            let lost_before = lost(&mut lied);
            lied.lie(lie);
            let mut body = scale_shift(json!("y"), 2.0, 1.0);
            match how {
                "published" => body["publish"] = json!({"y": "z"}),
                "sealed" => body["seal"] = json!(true),
                _ => {}
            }
            let mut reply = lied.client.ask(Op::Invoke, body);
            if how == "published later" {
                let result = &reply.accepted()["results"][0];
                assert_eq!(lost(&mut lied), lost_before, "nobody has looked yet");
                let publish = json!({"segment": result["mapping"]["segment"], "name": "z"});
                let refused = lied.client.ask(Op::Publish, publish);
                let release = json!({"leases": [result["lease"]]});
                lied.client.ok(Op::Release, release);
                reply = refused;
            }
            let message = reply.refused(broken.0, broken.1);
            assert!(message.contains("header or footer"), "{how}: {message}");
            assert_eq!(lost(&mut lied), lost_before + 1, "{lie}, {how}");
            lied.host
                .eventually(&mut lied.client, "it is gone", |stats| {
                    number(stats, "/workers/processes") == 0
                });
            lied.honest();
        }
    }
    lied.done(&before);
}

#[test]
fn a_worker_that_does_not_start_holds_up_nobody() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for lie in [
        "start: garbage",
        "start: forgotten",
        "start: refusal",
        "start: end",
    ] {
        lied.kill_worker();
        lied.check(lie, 60_000, false, HOST);
    }
    lied.kill_worker();
    // A run that finds it dying would wait for one of its own.
    lied.host
        .eventually(&mut lied.client, "it is gone", |stats| {
            number(stats, "/workers/processes") == 0
        });
    lied.lie("start: silence");
    let mut others: Vec<_> = (0..2).map(|_| lied.host.greeted()).collect();
    let mut waiting = scale_shift(json!("x"), 2.0, 1.0);
    waiting["deadline_ms"] = json!(600_000);
    let sequence = lied.client.begin(Op::Invoke, &waiting, &[]);
    for other in &mut others {
        let mut late = waiting.clone();
        late["deadline_ms"] = json!(100);
        other.ask(Op::Invoke, late).refused(LATE.0, LATE.1);
        other.ok(Op::Stats, json!({}));
    }
    lied.client.ok(Op::Cancel, json!({"sequence": sequence}));
    lied.client
        .receive()
        .unwrap()
        .refused("CANCELLED", "CANCELLED");
    assert_eq!(all_children(lied.host.pid()), 1, "it was not waited for");
    lied.kill_worker();
    drop(others);
    lied.honest();
    lied.done(&before);
}

#[test]
fn where_walls_are_required_a_worker_without_one_runs_nothing() {
    let mut settings = vec![("STRAIT__WORKERS__REQUIRE_WALLS", "true")];
    if rustix::process::geteuid().is_root() {
        // Of which one is a user of its own.
        settings.push(("STRAIT__WORKERS__UIDS", "300000-300063"));
    }
    let mut lied = Lied::with(&settings);
    lied.honest();
    lied.kill_worker();
    lied.lie("start: a wall is lacking");
    let message = lied.invoke(60_000, false).refused(HOST.0, HOST.1);
    for part in ["a wall: not built", "workers.require_walls"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    lied.honest();
}

#[test]
fn a_control_channel_of_nonsense_is_the_workers_end() {
    let mut lied = Lied::start();
    lied.honest();
    let before = Holdings::of(&lied.host.settled(&mut lied.client));
    for lie in ["control: garbage", "control: forgotten", "control: twice"] {
        for _ in 0..3 {
            lied.lie(lie);
            put(&mut lied.client, "short", 10);
            let reply = lied
                .client
                .ask(Op::Invoke, scale_shift(json!("short"), 2.0, 1.0));
            let lease = reply.accepted()["results"][0]["lease"].clone();
            lied.client.ok(Op::Release, json!({"leases": [lease]}));
            lied.client.ok(Op::Drop, json!({"name": "short"}));
            lied.client.ok(Op::Stats, json!({}));
        }
        lied.honest();
    }
    lied.done(&before);
}
