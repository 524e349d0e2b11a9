//! What one principal may have of a host, and that the others are served whatever it does.

use std::future::Future;
use std::time::{Duration, Instant};

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightDescriptor};
use futures::TryStreamExt;
use serde_json::{Value, json};
use strait_client::wire::Op;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::cli;
use crate::guest;
use crate::served::{PATIENCE, Raw, Served, as_user, check_call, number, put, ramp, scale_shift};

const OTHER: u32 = 4242;

/// With the kernel `spins/k`, which never ends, open to every user; none if this user cannot become another.
fn shared_host(settings: &[(&str, &str)]) -> Option<Served> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return None;
    }
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let host = Served::with_plugin(&guest::component("spins", &text), settings);
    host.open_to_all();
    Some(host)
}

/// An invocation of ten minutes.
fn spin() -> Value {
    json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000})
}

#[test]
fn queued_invocations_of_one_user_leave_the_next_turn_to_another() {
    let workers = [
        ("STRAIT__ENGINE__WORKERS", "2"),
        ("STRAIT__QUOTA__QUEUED", "300"),
    ];
    let Some(host) = shared_host(&workers) else {
        return;
    };
    put(&mut host.greeted(), "x", 3);
    let mut clients: Vec<Raw> = (0..5).map(|_| host.greeted()).collect();
    for client in &mut clients {
        for _ in 0..256 {
            client.begin(Op::Invoke, &spin(), &[]);
        }
    }
    // 1280 in all: two run, one more may not, its quota waits, and the rest is refused by name.
    let mut watcher = host.greeted();
    let stats = host.eventually(&mut watcher, "its quota is full", |stats| {
        number(stats, "/account/queued") == 300 && number(stats, "/account/queue_refused") > 0
    });
    let account = &stats["account"];
    assert_eq!(
        (&account["running"], &account["queued"]),
        (&json!(2), &json!(300)),
        "{account}"
    );
    // Which of them it was depends on who was read first.
    let told = |client: &&Raw| client.readable(Duration::from_millis(10));
    let mut asked = clients.iter().cycle().take(6000);
    let refused = asked.find(told).expect("somebody is told");
    let message = refused
        .receive()
        .unwrap()
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("300 invocations of uid:0 are waiting")
            && message.contains("quota.queued is 300"),
        "{message}"
    );
    as_user(OTHER, || {
        let mut client = host.greeted();
        put(&mut client, "x", 3);
        for _ in 0..50 {
            check_call(&mut client, json!("x"), &ramp(3));
        }
    });
    assert_eq!(
        number(&watcher.ok(Op::Stats, json!({})), "/account/running"),
        2
    );
    // Whoever goes takes what waits along.
    drop(clients);
    host.eventually(&mut watcher, "nothing waits or runs", |stats| {
        number(stats, "/account/queued") == 0 && number(stats, "/account/running") == 0
    });
    check_call(&mut watcher, json!("x"), &ramp(3));
}

#[test]
fn a_user_whose_runs_are_bounded_leaves_a_worker_to_others() {
    let settings = [
        ("STRAIT__ENGINE__WORKERS", "3"),
        ("STRAIT__QUOTA__RUNNING", "1"),
    ];
    let Some(host) = shared_host(&settings) else {
        return;
    };
    let mut first = host.greeted();
    put(&mut first, "x", 3);
    let running = first.begin(Op::Invoke, &spin(), &[]);
    host.eventually(&mut host.greeted(), "it runs", |stats| {
        number(stats, "/account/running") == 1
    });
    let waits = first.begin(
        Op::Invoke,
        &json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 100}),
        &[],
    );
    let late = first.receive().unwrap();
    assert_eq!(late.sequence(), waits);
    let message = late.refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(message.contains("still waiting for a worker"), "{message}");
    as_user(OTHER, || {
        let mut client = host.greeted();
        put(&mut client, "x", 3);
        check_call(&mut client, json!("x"), &ramp(3));
    });
    first.ok(Op::Cancel, json!({"sequence": running}));
}

/// A plugin whose kernel `k` spins in `open` already.
const SPINS_IN_OPEN: &str =
    "(func $open (param i32 i32 i32 i32 i32 i32) (result i32) (loop $on (br $on)) i32.const 0)";

fn blocking<T>(future: impl Future<Output = T>) -> T {
    // On this thread, whose user it is.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future)
}

async fn flight(host: &Served) -> FlightServiceClient<Channel> {
    let address = format!("unix:{}", host.directory().join("flight.sock").display());
    let endpoint = Endpoint::from_shared(address).unwrap();
    FlightServiceClient::new(endpoint.connect().await.unwrap())
}

#[test]
fn asking_for_a_schema_waits_and_ends_as_an_invocation_does() {
    let plugin = guest::component("spins", SPINS_IN_OPEN);
    let settings = [
        ("STRAIT__ENGINE__WORKERS", "2"),
        ("STRAIT__QUOTA__QUEUED", "40"),
        ("STRAIT__QUOTA__RUNNING", "1"),
    ];
    let host = Served::with_plugin(&plugin, &settings);
    let mut watcher = host.greeted();
    put(&mut watcher, "x", 3);
    let threads = number(&watcher.ok(Op::Stats, json!({})), "/process/threads");
    let cmd = |deadline_ms: u64| {
        let call = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms});
        FlightDescriptor::new_cmd(call.to_string())
    };
    blocking(async {
        let client = flight(&host).await;
        let flood: Vec<_> = (0..530)
            .map(|_| {
                let mut client = client.clone();
                tokio::spawn(async move { client.get_schema(cmd(600_000)).await })
            })
            .collect();
        let full = |stats: &Value| {
            number(stats, "/account/queued") == 40
                && number(stats, "/account/queue_refused") == 530 - 41
        };
        let begin = Instant::now();
        let mut stats = watcher.ok(Op::Stats, json!({}));
        while !full(&stats) && begin.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
            stats = watcher.ok(Op::Stats, json!({}));
        }
        assert!(full(&stats), "{stats}");
        assert_eq!(number(&stats, "/account/running"), 1);
        let now = number(&stats, "/process/threads");
        assert!(now <= threads + 8, "{threads} threads became {now}");
        let (refused, waiting): (Vec<_>, Vec<_>) =
            flood.into_iter().partition(JoinHandle::is_finished);
        for refused in refused {
            let status = refused.await.unwrap().unwrap_err();
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            assert!(status.message().contains("quota.queued is 40"), "{status}");
        }
        // Whoever hangs up gives its place back, queued or running.
        for call in waiting {
            call.abort();
        }
    });
    let at_rest = |stats: &Value| {
        number(stats, "/account/queued") == 0 && number(stats, "/account/running") == 0
    };
    host.eventually(&mut watcher, "nothing waits or runs", at_rest);
    let late = blocking(async { flight(&host).await.get_schema(cmd(100)).await.unwrap_err() });
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    let stats = host.eventually(&mut watcher, "nothing runs", at_rest);
    assert!(number(&stats, "/account/invocations") >= 2, "{stats}");
    check_call(&mut watcher, json!("x"), &ramp(3));
}

#[test]
fn leases_are_counted_on_all_connections_of_a_user() {
    let host = Served::with(&[], &[("STRAIT__QUOTA__LEASES", "5")]);
    let mut first = host.greeted();
    put(&mut first, "x", 3);
    let mut second = host.greeted();
    for _ in 0..3 {
        first.ok(Op::Map, json!({"name": "x"}));
    }
    let lease = second.ok(Op::Map, json!({"name": "x"}))["lease"].clone();
    second.ok(Op::Map, json!({"name": "x"}));
    for (op, body) in [
        (Op::Map, json!({"name": "x"})),
        (Op::Invoke, scale_shift(json!("x"), 1.0, 0.0)),
    ] {
        let message = second
            .ask(op, body)
            .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        assert!(
            message.contains("leases of uid:")
                && message.contains("quota of 5 by 1")
                && message.contains("RELEASE"),
            "{message}"
        );
    }
    let stats = second.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/account/leases"), 5);
    assert_eq!(number(&stats, "/account/leases_refused"), 2);
    assert_eq!(number(&stats, "/account/invocations"), 0);
    // What is not mapped takes none.
    let mut unmapped = scale_shift(json!("x"), 1.0, 0.0);
    unmapped["map"] = json!(false);
    unmapped["publish"] = json!({"y": "y"});
    second.ok(Op::Invoke, unmapped);
    second.ok(Op::Release, json!({"leases": [lease]}));
    check_call(&mut second, json!("x"), &ramp(3));
    drop(first);
    host.eventually(&mut second, "theirs are free", |stats| {
        number(stats, "/account/leases") == 1
    });
}

#[test]
fn whoever_is_no_operator_sees_its_own_figures() {
    let Some(host) = shared_host(&[]) else {
        return;
    };
    let mut operator = host.greeted();
    put(&mut operator, "x", 100_000);
    check_call(&mut operator, json!("x"), &ramp(100_000));
    let by_flight = || {
        blocking(async {
            let action = Action::new("stats", "");
            let answers = flight(&host).await.do_action(action).await.unwrap();
            let mut answers: Vec<_> = answers.into_inner().try_collect().await.unwrap();
            serde_json::from_slice::<Value>(&answers.remove(0).body).unwrap()
        })
    };
    let own = [
        "process",
        "budget_used_bytes",
        "copied_bytes",
        "copied",
        "huge",
        "pool",
        "parked",
        "accounts",
    ];
    as_user(OTHER, || {
        let mut client = host.greeted();
        for stats in [client.ok(Op::Stats, json!({})), by_flight()] {
            assert!(own.iter().all(|name| stats.get(name).is_none()), "{stats}");
            let counts = [
                "segments",
                "segment_bytes",
                "flights",
                "leases",
                "invocations",
                "running",
            ];
            assert!(counts.iter().all(|name| stats[name] == 0), "{stats}");
            assert_eq!(
                (&stats["sessions"], &stats["account"]["bytes"]),
                (&json!(1), &json!(0))
            );
        }
        put(&mut client, "x", 3);
        check_call(&mut client, json!("x"), &ramp(3));
        client.ok(Op::Map, json!({"name": "x"}));
        let stats = client.ok(Op::Stats, json!({}));
        assert_eq!(number(&stats, "/segments"), 1, "{stats}");
        assert_eq!(
            (number(&stats, "/leases"), number(&stats, "/invocations")),
            (1, 1),
            "{stats}"
        );
    });
    for stats in [operator.ok(Op::Stats, json!({})), by_flight()] {
        assert!(own.iter().all(|name| stats.get(name).is_some()), "{stats}");
        assert_eq!(
            (number(&stats, "/segments"), number(&stats, "/invocations")),
            (2, 2),
            "{stats}"
        );
        assert_eq!(
            (
                number(&stats, "/accounts"),
                number(&stats, "/account/invocations")
            ),
            (2, 1),
            "{stats}"
        );
    }
}

#[test]
fn operators_see_and_change_quotas_while_the_host_runs() {
    let settings =
        "[quota]\nsegments = 50\n[quota.of.\"uid:4242\"]\nsegments = 2\nbytes = \"none\"\n";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("strait.toml");
    std::fs::write(&path, settings).unwrap();
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = Served::start(&["--config", path.to_str().unwrap()]);
    host.open_to_all();
    let mut operator = host.greeted();
    let list = operator.ok(Op::Limits, json!({}));
    assert_eq!(list["default"]["segments"], 50, "{list}");
    let names: Vec<_> = list["accounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| &a["principal"])
        .collect();
    // One of them has not come yet.
    assert_eq!(names, ["uid:0", "uid:4242"]);
    assert_eq!(
        list["accounts"][1]["set"],
        json!({"segments": 2, "bytes": "none"})
    );
    let mut set = |body: Value| operator.ok(Op::Limits, body);
    as_user(OTHER, || {
        let mut client = host.greeted();
        for body in [
            json!({}),
            json!({"principal": "uid:4242", "set": {"segments": 9}}),
        ] {
            let message = client
                .ask(Op::Limits, body)
                .refused("PERMISSION_DENIED", "NO_RIGHT");
            assert!(
                message.contains("uid:4242") && message.contains("`admin`"),
                "{message}"
            );
        }
        let tensor = || json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [1]}]});
        let _two = [client.create(1), client.create(1)];
        let mut refused = |limit: u64| {
            let message = client
                .ask(Op::Create, tensor())
                .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
            assert!(
                message.contains(&format!(
                    "segments of uid:4242: 1 more would exceed its quota of {limit}"
                )),
                "{message}"
            );
        };
        refused(2);
        let list = set(json!({"principal": "uid:4242", "set": {"segments": 3}}));
        assert_eq!(list["accounts"][1]["quotas"]["segments"], 3, "{list}");
        let _third = client.create(1);
        let list = set(json!({"principal": "uid:4242", "set": {"segments": 1, "leases": 0}}));
        assert_eq!(list["accounts"][1]["stats"]["segments"], 3, "{list}");
        let message = client
            .ask(Op::Create, tensor())
            .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        assert!(message.contains("leases of uid:4242"), "{message}");
        // What it has stays usable.
        client.ok(Op::Ping, json!({}));
        set(json!({"principal": "uid:4242", "set": {"segments": "default", "leases": "default"}}));
        let _more: Vec<_> = (0..47).map(|_| client.create(1)).collect();
        client
            .ask(Op::Create, tensor())
            .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        set(json!({"set": {"segments": 60}}));
        client.create(1);
        let list = set(json!({"set": {"segments": "default"}}));
        assert_eq!(list["default"]["segments"], 50, "{list}");
    });
    for (body, what) in [
        (json!({"principal": "1000", "set": {}}), "uid:1000"),
        (json!({"set": {"byte": 1}}), "`bytes`"),
        (json!({"set": {"bytes": -1}}), "body"),
    ] {
        let message = operator
            .ask(Op::Limits, body)
            .refused("INVALID_ARGUMENT", "BAD_REQUEST");
        assert!(message.contains(what), "{message}");
    }
    let strait = |arguments: &[&str]| {
        let output = cli::run(host.path(), arguments);
        (
            cli::code(&output),
            cli::stdout(&output),
            cli::stderr(&output),
        )
    };
    let (code, table, error) = strait(&["limits", "set", "uid:7", "bytes=2GiB", "running=none"]);
    assert_eq!(code, 0, "{error}");
    assert!(
        table
            .lines()
            .any(|line| line.contains("uid:7") && line.contains("2.00 GiB*")),
        "{table}"
    );
    let (code, text, _) = strait(&["limits", "--json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (code, &list["accounts"][2]["quotas"]["bytes"]),
        (0, &json!(2_u64 << 30)),
        "{list}"
    );
    for wrong in [
        ["uid:7", "byte=1"],
        ["uid:7", "bytes=much"],
        ["uid:7", "bytes"],
    ] {
        let (code, _, error) = strait(&["limits", "set", wrong[0], wrong[1]]);
        assert_eq!(code, 2, "{error}");
    }
}

#[test]
fn a_quota_that_is_raised_lets_what_waits_begin() {
    let Some(host) = shared_host(&[
        ("STRAIT__ENGINE__WORKERS", "2"),
        ("STRAIT__QUOTA__RUNNING", "1"),
    ]) else {
        return;
    };
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    for _ in 0..2 {
        client.begin(Op::Invoke, &spin(), &[]);
    }
    let mut operator = host.greeted();
    let state = |running: u64, queued: u64| {
        move |stats: &Value| {
            number(stats, "/account/running") == running
                && number(stats, "/account/queued") == queued
        }
    };
    host.eventually(&mut operator, "one waits", state(1, 1));
    operator.ok(Op::Limits, json!({"set": {"running": 2}}));
    host.eventually(&mut operator, "both run", state(2, 0));
}

#[test]
fn descriptors_that_nobody_receives_are_bounded() {
    let settings = [("STRAIT__QUOTA__DESCRIPTORS", "100")];
    let Some(host) = shared_host(&settings) else {
        return;
    };
    let mut watcher = host.greeted();
    put(&mut watcher, "x", 3);
    // Each of them could have more than a hundred on its way.
    let mut clients: Vec<Raw> = (0..26).map(|_| host.greeted()).collect();
    for client in &mut clients {
        for _ in 0..30 {
            client.begin(Op::Map, &json!({"name": "x"}), &[]);
        }
    }
    let stats = host.eventually(&mut watcher, "all are answered", |stats| {
        number(stats, "/account/descriptors_refused") == 26 * 30 - 100
    });
    assert_eq!(number(&stats, "/account/descriptors"), 100, "{stats}");
    assert_eq!(
        number(&stats, "/account/leases"),
        100,
        "what was refused is undone: {stats}"
    );
    let message = watcher
        .ask(Op::Map, json!({"name": "x"}))
        .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    assert!(
        message.contains("descriptors in flight of uid:0")
            && message.contains("quota of 100 by 1")
            && message.contains("receive"),
        "{message}"
    );
    as_user(OTHER, || {
        let mut client = host.greeted();
        put(&mut client, "x", 3);
        check_call(&mut client, json!("x"), &ramp(3));
    });
    // Whoever says that it sends no more, so that the host ends the connection, still has them on their way.
    for client in &clients {
        rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Write).unwrap();
    }
    let stats = host.eventually(&mut watcher, "their sessions have ended", |stats| {
        number(stats, "/account/sessions") == 1
    });
    assert_eq!(number(&stats, "/account/descriptors"), 100, "{stats}");
    // Receiving them is as good as going.
    let mut received = 0;
    while let Some(frame) = clients[0].receive() {
        received += frame.fds.len() as u64;
    }
    let left = 100 - received;
    host.eventually(&mut watcher, "they were received", |stats| {
        number(stats, "/account/descriptors") == left
    });
    drop(clients);
    host.eventually(&mut watcher, "they are gone", |stats| {
        number(stats, "/account/descriptors") == 0
    });
    check_call(&mut watcher, json!("x"), &ramp(3));
}

#[test]
fn a_call_whose_answer_has_no_place_gives_no_names() {
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let workers = [("STRAIT__ENGINE__WORKERS", "1")];
    let host = Served::with_plugin(&guest::component("spins", &text), &workers);
    let (mut operator, mut client) = (host.greeted(), host.greeted());
    put(&mut client, "x", 3);
    let running = client.begin(Op::Invoke, &spin(), &[]);
    let mut call = scale_shift(json!("x"), 1.0, 0.0);
    call["publish"] = json!({"y": "y"});
    let waiting = client.begin(Op::Invoke, &call, &[]);
    host.eventually(&mut operator, "one runs and one waits", |stats| {
        number(stats, "/account/running") == 1 && number(stats, "/account/queued") == 1
    });
    operator.ok(Op::Limits, json!({"set": {"descriptors": 0}}));
    client.begin(Op::Cancel, &json!({"sequence": running}), &[]);
    let mut frames = std::iter::from_fn(|| client.receive());
    let answer = frames.find(|frame| frame.sequence() == waiting).unwrap();
    answer.refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    let unnamed = client.ask(Op::Lookup, json!({"name": "y"}));
    unnamed.refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
}

#[test]
fn small_segments_take_little_memory_that_nobody_is_charged_for() {
    const COUNT: u64 = 4000;
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let resident =
        |client: &mut Raw| number(&client.ok(Op::Stats, json!({})), "/process/resident_bytes");
    if client.ok(Op::Limits, json!({}))["host"]["segments"]
        .as_u64()
        .unwrap()
        < 2 * COUNT
    {
        eprintln!("not tested: this user may not open {COUNT} segments");
        return;
    }
    let leases: Vec<u64> = (0..64).map(|_| client.create(2).lease).collect();
    client.ok(Op::Release, json!({"leases": leases}));
    let before = resident(&mut client);
    for _ in 0..COUNT {
        client.create(2);
    }
    let each = resident(&mut client).saturating_sub(before) / COUNT;
    assert!(each < 8 << 10, "{each} bytes each");
}
