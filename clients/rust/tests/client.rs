//! The client against a peer whose every frame the test decides.

mod peer;

use std::os::fd::AsFd;
use std::time::Duration;

use peer::{Peer, connected, invoked, numbers, segment};
use rustix::fs::SealFlags;
use serde_json::json;
use strait_client::wire::Op;
use strait_client::{Client, Dtype, Error, NewTensor, Options, TensorSpec};
use strait_memory::FrameSocket;

fn greeted() -> (Client, Peer) {
    connected(&Options::default())
}

/// Runs `client_side` on a thread of its own beside the peer's part, and gives its result.
fn beside<T: Send>(client_side: impl FnOnce() -> T + Send, peer_side: impl FnOnce()) -> T {
    std::thread::scope(|scope| {
        let client = scope.spawn(client_side);
        peer_side();
        client.join().expect("the client does not panic")
    })
}

#[test]
fn the_greeting_is_kept_and_unknown_fields_are_ignored() {
    let (client, _peer) = greeted();
    assert_eq!(client.welcome().principal, "uid:1000");
    assert_eq!(client.welcome().move_min_bytes, 524_288);
    assert_eq!(client.draining(), None);
}

#[test]
fn another_protocol_version_is_told_with_the_hosts_words() {
    let (ours, theirs) = FrameSocket::pair().expect("a socket pair");
    let peer = Peer(theirs);
    let error = beside(
        || Client::over(ours, &Options::default()).map(drop),
        || {
            let hello = peer.expect(Op::Hello);
            peer.error(
                &hello,
                "FAILED_PRECONDITION",
                "PROTOCOL_VERSION",
                "version 2 is spoken here",
            );
        },
    )
    .expect_err("it was refused");
    assert_eq!(error.reason(), Some("PROTOCOL_VERSION"));
    assert!(
        error.to_string().contains("version 2 is spoken here"),
        "{error}"
    );
}

#[test]
fn no_host_names_the_socket() {
    let nowhere = tempfile::tempdir().expect("a temporary directory");
    let error = Client::connect_to(nowhere.path()).expect_err("nobody listens");
    assert!(
        matches!(&error, Error::NoHost { path, .. } if path.ends_with("data.sock")),
        "{error}"
    );
}

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
                &segment(name, "x", &[number, 0.5], "write"),
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
fn a_filled_segment_is_published_with_no_writable_mapping_left() {
    let (client, peer) = greeted();
    let made = segment("5e9", "x", &[0.0; 4], "none");
    let x = NewTensor {
        name: "x".into(),
        dtype: Dtype::Float64,
        shape: vec![4],
    };
    let mut open = beside(
        || client.create(&[x]),
        || {
            let asked = peer.expect(Op::Create);
            assert_eq!(
                asked.body["tensors"],
                json!([{"name": "x", "dtype": "float64", "shape": [4]}])
            );
            peer.grant(&asked, &made, 7, 60_000);
        },
    )
    .expect("it is granted");

    open.tensor_mut::<f64>("x")
        .expect("float64")
        .copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(numbers(&made, 4), [1.0, 2.0, 3.0, 4.0], "the same pages");
    assert!(matches!(
        open.tensor_mut::<f32>("x"),
        Err(Error::Dtype { .. })
    ));
    assert!(matches!(open.bytes_mut("y"), Err(Error::NoTensor { .. })));

    let taken = beside(
        || open.publish("job", false),
        || {
            let asked = peer.expect(Op::Publish);
            assert_eq!(
                asked.body,
                json!({"segment": "5e9", "name": "job", "replace": false})
            );
            // Linux refuses this while a writable mapping lives.
            let write = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
            rustix::fs::fcntl_add_seals(&made.fd, write).expect("nobody can write any more");
            peer.error(&asked, "ALREADY_EXISTS", "NAME_TAKEN", "job is taken");
        },
    )
    .expect_err("the name is taken");
    assert_eq!(taken.reason(), Some("NAME_TAKEN"));
    assert!(matches!(
        open.tensor_mut::<f64>("x"),
        Err(Error::NotWritable { .. })
    ));

    let flight = beside(
        || open.publish("job-2", true),
        || {
            let asked = peer.expect(Op::Publish);
            assert_eq!(asked.body["replace"], true);
            let mut mapping = made.mapping.clone();
            mapping["seal"] = json!("write");
            peer.ok(&asked, json!({ "mapping": mapping }));
        },
    )
    .expect("the second name is free");
    assert_eq!(flight.name, "job-2");
    assert_eq!(open.mapping(), &flight.mapping);
    drop(open);
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([7]));
}

#[test]
fn put_copies_once_and_counts_it() {
    let (client, peer) = greeted();
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![2],
    };
    let made = segment("5e9", "x", &[0.0; 2], "none");
    let flight = beside(
        || client.put("x", &spec, &[1.5, -2.5], true),
        || {
            peer.grant(&peer.expect(Op::Create), &made, 3, 60_000);
            let asked = peer.expect(Op::Publish);
            peer.ok(&asked, json!({ "mapping": made.mapping }));
        },
    );
    assert_eq!(flight.expect("it is published").name, "x");
    assert_eq!(numbers(&made, 2), [1.5, -2.5]);
    assert_eq!(client.copied_bytes(), 16);
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([3]));

    let short = client
        .put("x", &spec, &[1.5], true)
        .expect_err("one element is missing");
    assert_eq!(short.to_string(), "float64[2] has 16 bytes; 8 were given");
    let other = client
        .put("x", &spec, &[1.5f32, 2.5], true)
        .expect_err("float32 is not float64");
    assert!(matches!(other, Error::Dtype { .. }));
    assert!(
        !peer.hears_within(20),
        "nothing is asked for data that does not fit"
    );
}

#[test]
fn a_call_carries_what_was_set_and_gives_what_came() {
    let (client, peer) = greeted();
    let result = segment("a1", "y", &[0.25, 0.75], "host-write");
    let client = client.with_request_id("job-7").expect("it is allowed");
    let mut answer = beside(
        || {
            let call = client
                .call("zscore")
                .input("x", "flight#column")
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
                    "kernel": "zscore", "inputs": {"x": "flight#column"},
                    "parameters": {"axis": 1, "lo": "-inf"}, "publish": {"y": "out"},
                    "replace": true, "seal": false, "deadline_ms": 1500, "lease_ms": 9000,
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
    assert_eq!(answer.results[0].1.inode().inode, stat.st_ino);

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
fn an_expired_lease_is_told_apart_and_its_pages_stay() {
    let (client, peer) = greeted();
    let flight = segment("f1", "x", &[4.0], "write");
    let mapped = beside(
        || client.map("x"),
        || {
            peer.grant(&peer.expect(Op::Map), &flight, 9, 60_000);
        },
    )
    .expect("it is granted");
    mapped.lease().check().expect("it was just granted");
    let gone = json!({"lease": 9, "segment": "f1", "reason": "expired"});
    peer.send(Op::Gone, 0, &gone, &[]);
    beside(
        || client.ping(),
        || peer.ok(&peer.expect(Op::Ping), json!({})),
    )
    .expect("it is there");
    assert!(matches!(
        mapped.lease().check(),
        Err(Error::LeaseExpired { .. })
    ));
    let call = client
        .call("clip")
        .input("x", &mapped)
        .send()
        .expect_err("its lease is over");
    assert!(
        call.to_string().contains("lease 9 is over (expired)"),
        "{call}"
    );
    assert_eq!(
        mapped
            .tensor("x")
            .expect("mapped")
            .as_slice::<f64>()
            .expect("float64"),
        [4.0]
    );
    drop(mapped);
    assert!(
        !peer.hears_within(20),
        "a lease that is over is not released"
    );

    let late = beside(
        || client.map("x"),
        || {
            // The end comes before the client's thread looks at the grant.
            peer.send(
                Op::Gone,
                0,
                &json!({"lease": 10, "segment": "f1", "reason": "expired"}),
                &[],
            );
            peer.grant(&peer.expect(Op::Map), &flight, 10, 60_000);
        },
    )
    .expect("it was granted");
    assert!(matches!(
        late.lease().check(),
        Err(Error::LeaseExpired { .. })
    ));

    let remote = beside(
        || client.renew(&[late.lease()], None),
        || {
            let asked = peer.expect(Op::Renew);
            peer.error(
                &asked,
                "FAILED_PRECONDITION",
                "LEASE_EXPIRED",
                "lease 10 expired 3 ms ago",
            );
        },
    );
    assert!(
        matches!(remote, Err(Error::LeaseExpired { .. })),
        "{remote:?}"
    );
}

#[test]
fn leases_are_renewed_before_they_expire() {
    let (client, peer) = greeted();
    let flight = segment("f1", "x", &[4.0], "write");
    let grant = |lease| {
        let mapped = beside(
            || client.map("x"),
            || {
                peer.grant(&peer.expect(Op::Map), &flight, lease, 400);
            },
        );
        mapped.expect("it is granted")
    };
    let (first, second) = (grant(1), grant(2));
    let asked = peer.expect(Op::Renew);
    assert_eq!(asked.body, json!({"leases": [1, 2], "lease_ms": 400}));
    peer.ok(&asked, json!({"expires_ms": 200}));
    let asked = peer.expect(Op::Renew);
    assert_eq!(asked.body, json!({"leases": [1, 2], "lease_ms": 200}));

    // One of them is over: the other one is still to be kept.
    peer.error(
        &asked,
        "FAILED_PRECONDITION",
        "LEASE_EXPIRED",
        "lease 1 is over",
    );
    for _ in 0..2 {
        let asked = peer.expect(Op::Renew);
        if asked.body["leases"] == json!([1]) {
            peer.error(
                &asked,
                "FAILED_PRECONDITION",
                "LEASE_EXPIRED",
                "lease 1 is over",
            );
        } else {
            assert_eq!(asked.body["leases"], json!([2]));
            peer.ok(&asked, json!({"expires_ms": 600_000}));
        }
    }
    beside(
        || client.ping(),
        || peer.ok(&peer.expect(Op::Ping), json!({})),
    )
    .expect("it is there");
    assert!(first.lease().check().is_err());
    second.lease().check().expect("it was renewed");
}

#[test]
fn renewing_can_be_switched_off() {
    let options = Options {
        renew: false,
        lease: Some(Duration::from_millis(40)),
        ..Options::default()
    };
    let (client, peer) = connected(&options);
    let flight = segment("f1", "x", &[4.0], "write");
    let mapped = beside(
        || client.map("x"),
        || {
            let asked = peer.expect(Op::Map);
            assert_eq!(asked.body["lease_ms"], 40);
            peer.grant(&asked, &flight, 1, 40);
        },
    )
    .expect("it is granted");
    assert!(!peer.hears_within(120));
    let life = beside(
        || client.renew(&[mapped.lease()], Some(Duration::from_secs(5))),
        || {
            let asked = peer.expect(Op::Renew);
            assert_eq!(asked.body, json!({"leases": [1], "lease_ms": 5000}));
            peer.ok(&asked, json!({"expires_ms": 4000}));
        },
    );
    assert_eq!(life.expect("it is renewed"), Duration::from_secs(4));
}

#[test]
fn the_hosts_end_is_announced_and_then_ends_every_wait() {
    let (client, peer) = greeted();
    peer.send(Op::Shutdown, 0, &json!({"drain_ms": 60_000}), &[]);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3).map(|_| scope.spawn(|| client.ping())).collect();
        for _ in 0..3 {
            peer.expect(Op::Ping);
        }
        let left = client.draining().expect("it was announced");
        assert!(
            left > Duration::from_secs(30) && left <= Duration::from_secs(60),
            "{left:?}"
        );
        drop(peer);
        for caller in callers {
            let ended = caller.join().expect("no panic");
            assert!(matches!(ended, Err(Error::Disconnected)), "{ended:?}");
        }
    });
    assert!(matches!(client.ping(), Err(Error::Disconnected)));
}

#[test]
fn closing_ends_it_for_all_and_leaves_what_is_mapped() {
    let (client, peer) = greeted();
    let flight = segment("f1", "x", &[4.0], "write");
    let mapped = beside(
        || client.map("x"),
        || {
            peer.grant(&peer.expect(Op::Map), &flight, 1, 60_000);
        },
    )
    .expect("it is granted");
    let clone = client.clone();
    let waiting = beside(
        move || clone.ping(),
        || {
            peer.expect(Op::Ping);
            client.close();
        },
    );
    assert!(matches!(waiting, Err(Error::Disconnected)), "{waiting:?}");
    assert!(
        peer.next().is_none(),
        "the peer sees the end though a segment is still held"
    );
    assert!(matches!(mapped.lease().check(), Err(Error::Disconnected)));
    assert_eq!(
        mapped
            .tensor("x")
            .expect("mapped")
            .as_slice::<f64>()
            .expect("float64"),
        [4.0]
    );
    client.close();
}

#[test]
fn a_host_that_breaks_the_protocol_is_named() {
    let cases: [(&[u8], &str); 7] = [
        (b"HTTP/1.1 400 Bad Request", "frames start with \"ST\""),
        (
            b"ST\x02\x03\x02\0\0\0\0\0\0\0\0\0\0\0",
            "protocol version 2",
        ),
        (
            b"ST\x01\x03\x02\0\0\0\x05\0\0\0\0\0\0\0{}",
            "says 5 body bytes, the packet has 2",
        ),
        (
            b"ST\x01\x05\x02\0\0\0\x02\0\0\0\0\0\0\0{}",
            "Kernels is not for clients",
        ),
        (b"ST\x01\x41\0\0\0\0\x02\0\0\0\0\0\0\0{}", "not a Gone"),
        (b"ST\x01\xee\0\0\0\0\x02\0\0\0\0\0\0\0{}", "op 238"),
        (b"ST", "shorter than its header"),
    ];
    for (packet, says) in cases {
        let (client, peer) = greeted();
        let error = beside(
            || client.ping(),
            || {
                peer.expect(Op::Ping);
                peer.raw(packet, &[]);
            },
        )
        .expect_err("that is no reply");
        assert!(matches!(error, Error::Protocol(_)), "{error}");
        assert!(
            error.to_string().contains(says),
            "{error} does not say {says}"
        );
        let after = client
            .ping()
            .expect_err("the connection is over")
            .to_string();
        assert!(after.contains(says), "{after}");
    }
}

#[test]
fn a_frame_that_the_host_could_not_read_is_told() {
    let (client, peer) = greeted();
    let error = beside(
        || client.ping(),
        || {
            peer.expect(Op::Ping);
            let body = json!({
                "code": "INVALID_ARGUMENT", "reason": "BAD_FRAME", "message": "flags 0x1", "request_id": "-",
            });
            peer.send(Op::Error, 0, &body, &[]);
        },
    );
    assert!(
        error
            .expect_err("it is over")
            .to_string()
            .contains("refused a frame: flags 0x1")
    );
}

#[test]
fn replies_that_cannot_be_used_leave_no_lease_behind() {
    let (client, peer) = greeted();
    let good = segment("f1", "x", &[4.0], "write");

    let mut liar = segment("f2", "x", &[4.0], "write");
    liar.mapping["tensors"][0]["shape"] = json!([1 << 20]);
    liar.mapping["tensors"][0]["length"] = json!(8 << 20);
    let error = beside(
        || client.map("x"),
        || peer.grant(&peer.expect(Op::Map), &liar, 2, 60_000),
    );
    assert!(
        error
            .expect_err("it reaches out")
            .to_string()
            .contains("8388608 bytes at 65536")
    );
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([2]));

    let open = segment("f3", "x", &[4.0], "none");
    let error = beside(
        || client.map("x"),
        || peer.grant(&peer.expect(Op::Map), &open, 3, 60_000),
    );
    assert!(
        matches!(error, Err(Error::StillWritten { .. })),
        "{error:?}"
    );
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([3]));

    let error = beside(
        || client.map("x"),
        || {
            let asked = peer.expect(Op::Map);
            peer.ok(
                &asked,
                json!({"mapping": good.mapping, "lease": 4, "expires_ms": 60_000}),
            );
        },
    );
    assert!(matches!(error, Err(Error::Protocol(_))), "{error:?}");
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([4]));

    // Two results that both name the first of two descriptors.
    let error = beside(
        || client.call("two").send(),
        || {
            let asked = peer.expect(Op::Invoke);
            let entry = |port, lease| json!({"port": port, "mapping": good.mapping, "lease": lease, "expires_ms": 60_000, "fd": 0});
            let mut body = invoked(json!([entry("x", 5), entry("y", 6)]));
            body["request_id"] = json!("r");
            peer.send(
                Op::Ok,
                asked.sequence,
                &body,
                &[good.fd.as_fd(), good.fd.as_fd()],
            );
        },
    );
    assert!(
        error
            .expect_err("y has none")
            .to_string()
            .contains("result \"y\"")
    );
    let mut released: Vec<_> = (0..2)
        .map(|_| peer.expect(Op::Release).body["leases"][0].as_u64())
        .collect();
    released.sort_unstable();
    assert_eq!(released, [Some(5), Some(6)]);

    let error = beside(
        || client.ping(),
        || {
            let asked = peer.expect(Op::Ping);
            peer.send(Op::Ok, asked.sequence, &json!([]), &[]);
        },
    );
    assert!(matches!(error, Err(Error::Protocol(_))), "{error:?}");
    beside(
        || client.ping(),
        || peer.ok(&peer.expect(Op::Ping), json!({})),
    )
    .expect("one bad body does not end the connection");
}

#[test]
fn lists_are_read_page_by_page() {
    let (client, peer) = greeted();
    let mapping = segment("f", "x", &[1.0], "write").mapping;
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
    assert_eq!(
        (stats.process.fds, stats.own.segments, stats.pool.idle_bytes),
        (1, 21, 17)
    );
    assert_eq!(stats.all["copied"]["adopt"], 13);
}

#[test]
fn a_memfd_of_ones_own_is_handed_over() {
    let (client, peer) = greeted();
    let own = segment("-", "x", &[2.0], "write");
    let places: Vec<strait_client::TensorPlace> =
        serde_json::from_value(own.mapping["tensors"].clone()).expect("one tensor");
    let memfd = own.fd.try_clone().expect("a descriptor");
    let adopted = beside(
        || client.adopt(memfd, &places, Some("mine"), false),
        || {
            let asked = peer.expect(Op::Adopt);
            assert_eq!(asked.fds.len(), 1);
            assert_eq!(asked.body["name"], "mine");
            assert_eq!(asked.body["tensors"][0]["offset"], 65536);
            peer.ok(
                &asked,
                json!({"mapping": own.mapping, "lease": 8, "expires_ms": 60_000}),
            );
        },
    )
    .expect("it was taken");
    assert_eq!(adopted.lease().id(), 8);
    drop(adopted);
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([8]));
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
    let result = segment("a1", "y", &[0.25], "host-write");
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
    let flight = segment("f1", "x", &[4.0], "write");
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
                "TENSOR_NOT_FOUND",
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
            peer.error(&asked, "NOT_FOUND", "TENSOR_NOT_FOUND", "none");
            assert!(first.join().expect("no panic").is_err());
            peer.ok(&other, json!({}));
            second.join().expect("no panic").expect("it is answered");
        }
    });
}
