//! Requests and their answers: in any order, from many threads, cancelled and dropped.

use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::json;
use strait_client::Error;
use strait_client::wire::Op;

use super::{beside, greeted};
use crate::peer::{invoked, segment};

#[test]
fn replies_and_descriptors_find_their_own_callers_in_any_order() {
    let (client, peer) = greeted();
    let count = 8;
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..count)
            .map(|index| {
                let client = &client;
                scope.spawn(move || {
                    let segment = client
                        .map(&format!("flight-{index}"))
                        .expect("it is granted");
                    let tensor = segment.tensor("x").expect("it has one");
                    assert_eq!(tensor.shape(), [2]);
                    assert_eq!(
                        tensor.as_slice::<f64>().expect("float64"),
                        [f64::from(index), 0.5]
                    );
                })
            })
            .collect();
        let mut asked: Vec<_> = (0..count).map(|_| peer.expect(Op::Map)).collect();
        asked.reverse();
        for asked in &asked {
            let name = asked.body["name"].as_str().expect("a name");
            let number: f64 = name
                .trim_start_matches("flight-")
                .parse()
                .expect("a number");
            let lease = 100 + u64::from(asked.sequence);
            peer.grant(
                asked,
                &segment(name, "x", &[number, 0.5], "none"),
                lease,
                60_000,
            );
        }
        callers
            .into_iter()
            .for_each(|caller| caller.join().expect("each got its own"));
    });
    let mut released: Vec<_> = (0..count)
        .map(|_| peer.expect(Op::Release).body["leases"][0].as_u64())
        .collect();
    released.sort_unstable();
    released.dedup();
    assert_eq!(released.len(), 8);
}

#[test]
fn a_call_carries_what_was_set_and_gives_what_came() {
    let (client, peer) = greeted();
    let result = segment("a1", "y", &[0.25, 0.75], "host");
    let client = client.with_request_id("job-7").expect("it is allowed");
    let mut answer = beside(
        || {
            let call = client
                .call("zscore")
                .input("x", "flight#tensor")
                .param("axis", 1);
            let call = call
                .param("lo", f64::NEG_INFINITY)
                .publish("y", "out")
                .replace(true);
            let call = call.verify(true).deadline(Duration::from_millis(1500));
            call.lease(Duration::from_secs(9)).send()
        },
        || {
            let asked = peer.expect(Op::Invoke);
            assert_eq!(
                asked.body,
                json!({
                    "kernel": "zscore", "inputs": {"x": "flight#tensor"},
                    "parameters": {"axis": 1, "lo": "-inf"}, "publish": {"y": "out"},
                    "replace": true, "seal": false, "inline_bytes": 4096, "deadline_ms": 1500, "lease_ms": 9000,
                    "verify": true, "request_id": "job-7",
                })
            );
            let mut body = invoked(json!([{
                "port": "y", "mapping": result.mapping, "lease": 11, "expires_ms": 9000, "fd": 0,
                "name": "out",
            }]));
            body["pages"] = json!([{"port": "x", "device": 1, "inode": 2}]);
            body["request_id"] = json!("job-7");
            peer.send(Op::Ok, asked.sequence, &body, &[result.fd.as_fd()]);
        },
    )
    .expect("it ran");
    assert_eq!(answer.request_id, "job-7");
    assert_eq!(answer.published[0].name, "out");
    assert_eq!(answer.notes[0].text, "t");
    assert_eq!((answer.pages[0].device, answer.pages[0].inode), (1, 2));
    let y = answer.tensor("y").expect("a port");
    assert_eq!(y.as_slice::<f64>().expect("float64"), [0.25, 0.75]);
    let stat = rustix::fs::fstat(&result.fd).expect("it is open");
    assert_eq!(
        answer.results[0].1.segment().expect("mapped").inode().inode,
        stat.st_ino
    );

    let kept = answer.take("y").expect("a port");
    assert!(answer.take("y").is_err());
    drop(answer);
    assert!(!peer.hears_within(20), "what was taken out is still held");
    drop(kept);
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([11]));
}

#[test]
fn a_failure_comes_with_the_hosts_text_code_and_backtrace() {
    let (client, peer) = greeted();
    let error = beside(|| client.call("bad").request_id("r-1").send(), || {
        let asked = peer.expect(Op::Invoke);
        let body = json!({
            "code": "INTERNAL", "reason": "GUEST_TRAP", "message": "unreachable", "request_id": "r-1",
            "backtrace": "0: run", "details": {"port": "x"},
        });
        peer.send(Op::Error, asked.sequence, &body, &[]);
    })
    .expect_err("it trapped");
    assert_eq!(
        error.to_string(),
        "unreachable [INTERNAL GUEST_TRAP, request r-1]"
    );
    let Error::Remote(failure) = error else {
        panic!("not the host's word: {error}")
    };
    assert_eq!(failure.backtrace.as_deref(), Some("0: run"));
    assert_eq!(failure.details["port"], "x");
    let refused = client
        .call("bad")
        .request_id("no spaces")
        .send()
        .expect_err("not an id");
    assert!(matches!(refused, Error::RequestId(_)));
}

#[test]
fn a_call_is_cancelled_from_another_thread() {
    let (client, peer) = greeted();
    let call = client.call("spin");
    let cancel = call.cancel_handle();
    let error = beside(
        move || call.send(),
        || {
            let asked = peer.expect(Op::Invoke);
            cancel.cancel();
            let stop = peer.expect(Op::Cancel);
            assert_eq!(stop.body["sequence"], asked.sequence);
            peer.error(&asked, "CANCELLED", "CANCELLED", "cancelled");
            peer.ok(&stop, json!({"cancelled": true}));
        },
    )
    .expect_err("it was cancelled");
    assert_eq!(error.reason(), Some("CANCELLED"));
    cancel.cancel();

    let call = client.call("spin");
    call.cancel_handle().cancel();
    let error = call.send().expect_err("it was cancelled before");
    assert_eq!(error.reason(), Some("CANCELLED"));
    assert!(
        !peer.hears_within(20),
        "neither a late cancel nor a cancelled call is sent"
    );
}

#[test]
fn lists_are_read_page_by_page() {
    let (client, peer) = greeted();
    let mapping = segment("f", "x", &[1.0], "none").mapping;
    let entry = |name| json!({"name": name, "mapping": mapping});
    let names = beside(
        || {
            client
                .list()
                .map(|flight| flight.map(|flight| flight.name))
                .collect::<Result<Vec<_>, _>>()
        },
        || {
            let asked = peer.expect(Op::List);
            assert_eq!(asked.body, json!({}));
            peer.ok(
                &asked,
                json!({"flights": [entry("a"), entry("b")], "more": true}),
            );
            let asked = peer.expect(Op::List);
            assert_eq!(asked.body, json!({"after": "b"}));
            peer.ok(&asked, json!({"flights": [entry("c")], "more": false}));
        },
    );
    assert_eq!(names.expect("three flights"), ["a", "b", "c"]);

    let endless = beside(
        || client.list().collect::<Vec<_>>(),
        || {
            peer.ok(&peer.expect(Op::List), json!({"flights": [], "more": true}));
        },
    );
    assert!(
        matches!(endless[..], [Err(Error::Protocol(_))]),
        "{endless:?}"
    );

    let kernel = |plugin, name| {
        json!({"name": name, "plugin": plugin, "version": "0.1.0", "doc": "", "inputs": [],
               "outputs": [], "parameters": [], "split_axis": null, "streaming": false,
               "in_place": false})
    };
    let kernels = beside(
        || client.kernels(None),
        || {
            peer.ok(
                &peer.expect(Op::Kernels),
                json!({"kernels": [kernel("p", "a")], "more": true}),
            );
            let asked = peer.expect(Op::Kernels);
            assert_eq!(asked.body, json!({"after": "p/a"}));
            peer.ok(
                &asked,
                json!({"kernels": [kernel("q", "a")], "more": false}),
            );
        },
    );
    let kernels = kernels.expect("two kernels");
    assert_eq!(
        kernels
            .iter()
            .map(|kernel| &*kernel.plugin)
            .collect::<Vec<_>>(),
        ["p", "q"]
    );
}

#[test]
fn counts_are_read_as_the_protocol_lists_them() {
    let (client, peer) = greeted();
    let stats = beside(|| client.stats(), || {
        let asked = peer.expect(Op::Stats);
        peer.ok(&asked, json!({
            "process": {"fds": 1, "mappings": 2, "threads": 3, "minor_faults": 4, "resident_bytes": 5},
            "segments": 6, "segment_bytes": 7, "flights": 8, "leases": 9, "sessions": 10,
            "invocations": 11, "running": 12, "copied_bytes": 13, "copied": {"adopt": 13},
            "pool": {"segments": 14, "bytes": 15, "idle_segments": 16, "idle_bytes": 17},
            "parked": {"mappings": 18, "idle_mappings": 18, "idle_bytes": 19}, "own": {"leases": 20, "segments": 21},
        }));
    })
    .expect("they are whole");
    let host = stats.counts.host.expect("for an operator");
    assert_eq!(
        (
            host.process.fds,
            stats.counts.own.segments,
            host.pool.idle_bytes
        ),
        (1, 21, 17)
    );
    assert_eq!(stats.all["copied"]["adopt"], 13);
}

#[test]
fn more_requests_than_the_socket_holds_are_kept_in_order() {
    let (client, peer) = greeted();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let count = 3000;
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let client = client.asynchronous();
            let waits: Vec<_> = (0..count)
                .map(|index| {
                    let client = client
                        .with_request_id(&format!("r{index}"))
                        .expect("it is allowed");
                    runtime.spawn(async move { client.ping().await })
                })
                .collect();
            runtime.block_on(async {
                for wait in waits {
                    wait.await.expect("no panic").expect("it was answered");
                }
            });
        });
        // The socket is full before the first one is read.
        std::thread::sleep(Duration::from_millis(100));
        for index in 0..count {
            let asked = peer.expect(Op::Ping);
            assert_eq!(asked.body["request_id"], format!("r{index}"));
            peer.ok(&asked, json!({}));
        }
        asking.join().expect("all were answered");
    });
}

#[test]
fn a_dropped_future_cancels_its_call_and_releases_what_still_arrives() {
    let (client, peer) = greeted();
    let client = client.asynchronous();
    let result = segment("a1", "y", &[0.25], "host");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(async {
        let patience = Duration::from_millis(30);
        let called = tokio::time::timeout(patience, client.call("slow").send()).await;
        assert!(called.is_err(), "nobody answered");
        let mapped = tokio::time::timeout(patience, client.map("slow")).await;
        assert!(mapped.is_err(), "nobody answered");
    });
    let call = peer.expect(Op::Invoke);
    let cancel = peer.expect(Op::Cancel);
    assert_eq!(cancel.body["sequence"], call.sequence);
    let map = peer.expect(Op::Map);

    // Too late for the cancel: the kernel was done.
    let mut body = invoked(json!([{
        "port": "y", "mapping": result.mapping, "lease": 11, "expires_ms": 9000, "fd": 0,
    }]));
    body["request_id"] = json!("r");
    peer.send(Op::Ok, call.sequence, &body, &[result.fd.as_fd()]);
    peer.ok(&cancel, json!({"cancelled": false}));
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([11]));
    peer.grant(&map, &result, 12, 9000);
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([12]));
}

#[test]
fn a_future_dropped_after_its_answer_came_releases_it() {
    let (client, peer) = greeted();
    let flight = segment("f1", "x", &[4.0], "none");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let client = client.asynchronous();
    runtime.expect("a runtime").block_on(async {
        let mut map = Box::pin(client.map("x"));
        let first = std::future::poll_fn(|context| {
            std::task::Poll::Ready(map.as_mut().poll(context).is_ready())
        });
        assert!(!first.await, "nobody answered yet");
        peer.grant(&peer.expect(Op::Map), &flight, 5, 60_000);
        // The next request is answered after it, so then it lies there.
        let (asked, answered) = (client.ping(), async {
            peer.ok(&peer.expect(Op::Ping), json!({}));
        });
        let (pinged, ()) = tokio::join!(asked, answered);
        pinged.expect("it is there");
        drop(map);
    });
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([5]));
}

#[test]
fn many_threads_share_one_connection() {
    let (client, peer) = greeted();
    let (threads, rounds) = (8, 250);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let client = client
                .with_request_id(&format!("t{thread}"))
                .expect("it is allowed");
            scope.spawn(move || {
                for _ in 0..rounds {
                    let error = client.lookup("nothing").expect_err("there is nothing");
                    let text = error.to_string();
                    assert!(text.ends_with(&format!("request t{thread}]")), "{text}");
                }
            });
        }
        for _ in 0..threads * rounds {
            let asked = peer.expect(Op::Lookup);
            peer.error(
                &asked,
                "NOT_FOUND",
                "FLIGHT_NOT_FOUND",
                "there is no flight \"nothing\"",
            );
        }
    });
}

#[test]
fn threads_and_tasks_share_one_connection() {
    let (client, peer) = greeted();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .build();
    let runtime = runtime.expect("a runtime");
    let (threads, tasks, rounds) = (4, 16, 200);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..rounds).for_each(|_| client.ping().expect("it is answered")));
        }
        let spawned: Vec<_> = (0..tasks)
            .map(|_| {
                let client = client.asynchronous();
                runtime.spawn(async move {
                    for _ in 0..rounds {
                        client.ping().await.expect("it is answered");
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        for _ in 0..(threads + tasks) * rounds {
            peer.ok(&peer.expect(Op::Ping), json!({}));
        }
        runtime.block_on(async {
            for task in spawned {
                task.await.expect("no panic");
            }
        });
    });
}

#[test]
fn a_thread_that_leaves_lets_the_next_one_receive() {
    let (client, peer) = greeted();
    std::thread::scope(|scope| {
        // A series of quick calls, after which the reader thread keeps away from the socket.
        let series = scope.spawn(|| (0..50).for_each(|_| client.ping().expect("it is answered")));
        for _ in 0..50 {
            peer.ok(&peer.expect(Op::Ping), json!({}));
        }
        series.join().expect("no panic");
        for _ in 0..100 {
            let first = scope.spawn(|| client.lookup("first").map(drop));
            let asked = peer.expect(Op::Lookup);
            let second = scope.spawn(|| client.drop_flight("second"));
            let other = peer.expect(Op::Drop);
            peer.error(&asked, "NOT_FOUND", "FLIGHT_NOT_FOUND", "none");
            assert!(first.join().expect("no panic").is_err());
            peer.ok(&other, json!({}));
            second.join().expect("no panic").expect("it is answered");
        }
    });
}
