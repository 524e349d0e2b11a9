//! Prepared kernels whose worker is killed: at rest, in a call, in a stream.

use serde_json::json;
use strait_client::wire::Op;

use super::memory::{COUNTS, REMEMBERS, SPINS};
use super::stream::flat;
use super::{Prepared, brought, floats, scale_shift, shifted};
use crate::guest;
use crate::served::{Served, number, ramp};
use crate::workers::{NO_SPARE, ON, kill, worker};

const LOST: (&str, &str) = ("UNAVAILABLE", "WORKER_LOST");

#[test]
fn a_call_whose_worker_is_killed_runs_again_once_and_the_next_is_prepared_anew() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[ON, NO_SPARE]);
    let mut client = host.greeted();
    let request = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 60_000});
    let prepared = Prepared::by(&mut client, request);
    let x = |what: f64| [what, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let counts = |told: &str| {
        let y = prepared.call(&x(COUNTS));
        assert_eq!(y[..3], [1.0; 3], "{told}");
    };
    counts("first");
    // At rest. It may be found dying.
    let first = worker(&host);
    kill(first);
    counts("after one at rest");
    counts("and again");
    // What is made ready after the answer is in the worker, too.
    host.eventually(&mut host.greeted(), "it waits", |stats| {
        number(stats, "/account/running") == 0
    });
    // In a call, and where that runs again.
    prepared.send(1, &prepared.payload(&x(SPINS)));
    let busy = |but: Option<i64>| {
        let mut pid = 0;
        host.eventually(&mut host.greeted(), "it runs", |_| {
            let workers = host.greeted().ok(Op::Workers, json!({}))["workers"].clone();
            let mut all = workers.as_array().unwrap().iter();
            let found = all.find(|one| one["running"] == 1 && one["pid"].as_i64() != but);
            pid = found.map_or(0, |one| one["pid"].as_i64().unwrap());
            pid != 0
        });
        kill(rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap());
        pid
    };
    let was = busy(None);
    busy(Some(was));
    prepared.receive().unwrap().refused(LOST.0, LOST.1);
    counts("after one that was lost");
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/running"), 0, "{stats}");
}

#[test]
fn a_stream_whose_worker_is_killed_says_at_which_chunk() {
    let settings = [ON, NO_SPARE, ("STRAIT__WORKERS__STREAMS", "1")];
    let host = Served::with(&[], &settings);
    let mut client = host.greeted();
    let request = || {
        json!({"kernel": "cumsum", "stream": true, "deadline_ms": 60_000,
            "inputs": {"x": {"dtype": "float64", "shape": [4]}}})
    };
    let send = |prepared: &Prepared, last| {
        let sent = flat(prepared, last, &ramp(4));
        prepared.socket.send(&[&sent], &[]).unwrap();
    };
    let sums = |prepared: &Prepared| {
        let mut y = vec![Vec::new()];
        prepared.collect(&mut y);
        floats(&y[0])[3]
    };
    let all: f64 = ramp(4).iter().sum();
    for _ in 0..2 {
        let prepared = Prepared::by(&mut client, request());
        send(&prepared, false);
        assert_eq!(sums(&prepared), all);
        // There is room for one.
        let second = Prepared::by(&mut client, request());
        send(&second, false);
        let refused = second.receive().unwrap();
        let message = refused.refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        assert!(message.contains("workers.streams"), "{message}");
        kill(worker(&host));
        send(&prepared, false);
        let lost = prepared.receive().unwrap();
        let message = lost.refused(LOST.0, LOST.1);
        assert!(message.contains("chunk 1 of a stream"), "{message}");
        assert!(prepared.receive().is_none(), "the stream is over");
        // Prepared before, and given its first chunk after that.
        let next = Prepared::by(&mut client, request());
        kill(worker(&host));
        host.eventually(&mut client, "it is gone", |stats| {
            number(stats, "/workers/processes") == 0
        });
        for _ in 0..2 {
            send(&next, false);
            assert_eq!(sums(&next), all);
            send(&next, true);
            assert_eq!(sums(&next), 2.0 * all);
        }
        let prepared = Prepared::by(&mut client, scale_shift(brought(4)));
        assert_eq!(prepared.call(&ramp(4)), shifted(&ramp(4)));
    }
}
