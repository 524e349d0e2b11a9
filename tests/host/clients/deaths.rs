//! Clients that die at every step, and clients that do not read.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::json;
use strait_client::wire::Op;
use strait_memory::WriteMapping;

use super::{MOVED, host_with_spins, mappings, with};
use crate::guest;
use crate::served::{Holdings, Raw, Served, check_call, number, packet, put, ramp, scale_shift};

/// What the client process has done when it is killed.
const STEPS: [&str; 9] = [
    "connected",
    "greeted",
    "created",
    "filling",
    "published",
    "mapped",
    "running",
    "crowding",
    "deaf",
];

const THERE: &str = "strait-tests: there";
const FLOOD: usize = 100_000;

/// Not a test: the client process of `a_client_that_dies_leaves_nothing_behind`, which runs this
/// test binary again with these variables.
#[test]
#[ignore = "the process that another test kills"]
fn client_process() {
    let variables =
        ["STEP", "SOCKET", "HEIR"].map(|name| std::env::var(format!("TEST_CLIENT_{name}")));
    let [Ok(step), Ok(socket), Ok(heir)] = variables else {
        return;
    };
    let mut client = Raw::connect(Path::new(&socket)).unwrap();
    if step != "connected" {
        client.hello();
    }
    let mut pages = None;
    let mut held = Vec::new();
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "shared"}, "deadline_ms": 600_000});
    match step.as_str() {
        "connected" | "greeted" => {}
        "created" => held.push(client.create(MOVED).fd),
        "filling" => {
            let created = client.create(MOVED);
            pages = Some(WriteMapping::new(&created.fd, created.bytes).unwrap());
            held.push(created.fd);
        }
        "published" => put(&mut client, "left", MOVED),
        "mapped" => {
            held.extend(client.ask(Op::Map, json!({"name": "shared"})).fds);
            held.extend(
                client
                    .ask(Op::Invoke, scale_shift(json!("shared"), 3.0, 0.0))
                    .fds,
            );
            held.push(client.create(10).fd);
        }
        "running" => {
            let created = client.create(MOVED);
            let own = json!({"kernel": "spins/k", "inputs": {"x": {"segment": created.segment}}, "deadline_ms": 600_000});
            client.begin(Op::Invoke, &own, &[]);
            while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
        }
        "crowding" => {
            for _ in 0..40 {
                client.begin(Op::Invoke, &spin, &[]);
            }
            while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
        }
        "deaf" => {
            held.push(client.create(MOVED).fd);
            client.begin(Op::Invoke, &spin, &[]);
            flood(&client);
        }
        other => panic!("no step {other}"),
    }
    let mut heir_id = 0;
    if heir == "1" {
        // As a worker does that was forked: it has the connection, and a descriptor of a segment.
        let stdin = client.socket.as_fd().try_clone_to_owned().unwrap();
        let stdout = held
            .first()
            .map_or_else(Stdio::null, |fd| fd.try_clone().unwrap().into());
        let heir = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(stdin))
            .stdout(stdout)
            .stderr(Stdio::null())
            .spawn();
        heir_id = heir.unwrap().id();
    }
    println!("\n{THERE} {heir_id}");
    std::io::stdout().flush().unwrap();
    loop {
        match &mut pages {
            Some(pages) => pages.bytes_mut()[65_536..].fill(7),
            None => std::thread::park(),
        }
    }
}

/// Asks without reading the answers until the host does not read any more; answers how often.
fn flood(client: &Raw) -> usize {
    client.socket.set_nonblocking(true).unwrap();
    let ping = packet(
        Op::Ping as u8,
        50,
        format!(r#"{{"request_id":"{}"}}"#, "r".repeat(60)).as_bytes(),
    );
    let mut sent = 0;
    let mut waited = 0;
    while sent < FLOOD && waited < 100 {
        match client.socket.send(&[&ping], &[]) {
            Ok(()) => (sent, waited) = (sent + 1, 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                waited += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
    }
    client.socket.set_nonblocking(false).unwrap();
    sent
}

/// A client process at `step`; with `heir` another process keeps its connection open.
struct Client {
    child: Child,
    heir: Option<Pid>,
}

impl Client {
    fn start(socket: &Path, step: &str, heir: bool) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "clients::deaths::client_process",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("TEST_CLIENT_STEP", step)
            .env("TEST_CLIENT_SOCKET", socket)
            .env("TEST_CLIENT_HEIR", if heir { "1" } else { "0" })
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let there = lines.find_map(|line| {
            line.unwrap()
                .strip_prefix(THERE)
                .map(|heir| heir.trim().parse().unwrap())
        });
        let heir =
            Pid::from_raw(there.unwrap_or_else(|| panic!("the client process failed at {step}")));
        Self { child, heir }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may be dead as the test meant it to be.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(heir) = self.heir {
            let _ = rustix::process::kill_process(heir, Signal::KILL);
        }
    }
}

#[test]
fn a_client_that_dies_leaves_nothing_behind() {
    let host = host_with_spins();
    let mut watcher = host.greeted();
    put(&mut watcher, "shared", MOVED);
    let mut before: Option<Holdings> = None;
    let mut counts = Vec::new();
    // The first round warms what stays: the pool, parked mappings, idle guests.
    for round in 0..4 {
        for heir in [false, true] {
            for step in STEPS {
                let mut client = Client::start(&host.socket(), step, heir);
                if step != "connected" {
                    let stats = watcher.ok(Op::Stats, json!({}));
                    assert_eq!(number(&stats, "/sessions"), 2, "{step}: {stats}");
                }
                client.kill();
                host.eventually(&mut watcher, step, |stats| {
                    number(stats, "/sessions") == 1 && number(stats, "/running") == 0
                });
                if step == "published" {
                    check_call(&mut watcher, json!("left"), &ramp(MOVED));
                    watcher.ok(Op::Drop, json!({"name": "left"}));
                }
                check_call(&mut host.greeted(), json!("shared"), &ramp(MOVED));
                if let (Some(before), "created", true) = (&before, step, heir) {
                    let stats = watcher.ok(Op::Stats, json!({}));
                    let budget = Holdings::of(&stats).budget;
                    assert!(budget > before.budget, "its heir has the segment: {stats}");
                }
                // With its heir, and the descriptor that the heir has.
                drop(client);
                if let Some(before) = &before {
                    let what = format!("after {step} in round {round}, heir {heir}: {before:?}");
                    host.eventually(&mut watcher, &what, |stats| Holdings::of(stats) == *before);
                }
            }
        }
        let stats = host.settled(&mut watcher);
        before.get_or_insert_with(|| Holdings::of(&stats));
        counts.push((mappings(&stats), number(&stats, "/process/threads")));
    }
    // Threads come and go with their stacks; what each client left behind would be as many as there were.
    let (first, last) = (counts[1], counts[3]);
    let clients = 2 * 2 * STEPS.len() as u64;
    assert!(
        last.0 < first.0 + clients && last.1 < first.1 + clients,
        "mappings and threads after each round: {counts:?}"
    );
}

#[test]
fn a_client_that_does_not_listen_holds_up_nobody_else() {
    let host = host_with_spins();
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    let before = Holdings::of(&watcher.ok(Op::Stats, json!({})));
    let deaf = host.greeted();
    let sent = flood(&deaf);
    assert!(
        sent < FLOOD,
        "the host takes requests without end from a client that reads no replies"
    );
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
    // Nothing was lost: as many answers as requests.
    for index in 0..sent {
        let reply = deaf
            .receive()
            .unwrap_or_else(|| panic!("the end after {index} of {sent} replies"));
        assert_eq!((reply.op(), reply.sequence()), (Op::Ok, 50));
    }
    drop(deaf);
    // One that is deaf and refused is not kept waiting for.
    let deaf = host.greeted();
    flood(&deaf);
    drop(deaf);
    host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == before
    });
    // Nor does one keep the host from ending.
    let deaf = host.greeted();
    flood(&deaf);
    host.terminate();
    host.ended();
}

#[test]
fn a_client_that_does_not_read_is_not_waited_for_at_the_end() {
    let plugin_host = |settings| {
        let directory = tempfile::tempdir().unwrap();
        let plugin = directory.path().join("spins.wasm");
        let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
        fs::write(&plugin, guest::component("spins", &text)).unwrap();
        Served::with(&["--plugin", plugin.to_str().unwrap()], settings)
    };
    // Far longer than `ended` waits.
    let host = plugin_host(&[("STRAIT__SERVER__DRAIN_MS", "600000")]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let mut deaf = host.greeted();
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    deaf.begin(Op::Invoke, &spin, &[]);
    flood(&deaf);
    let last = with(&spin, "deadline_ms", json!(500));
    let sequence = client.begin(Op::Invoke, &last, &[]);
    client.ok(Op::Ping, json!({}));
    host.terminate();
    assert_eq!(client.receive().unwrap().op(), Op::Shutdown);
    let reply = client.receive().unwrap();
    assert_eq!(reply.sequence(), sequence);
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    client.ended();
    host.ended();
}
