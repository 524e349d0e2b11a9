//! The greeting, the end, and hosts that break the protocol.

use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::json;
use strait_client::wire::{HEADER_BYTES, Op};
use strait_client::{Client, Error, Options};
use strait_memory::FrameSocket;

use super::{beside, greeted};
use crate::peer::{Peer, invoked, segment};

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
fn the_hosts_end_is_announced_and_then_ends_every_wait() {
    let (client, peer) = greeted();
    peer.send(Op::Shutdown, 0, &json!({"drain_ms": 60_000}), &[]);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3).map(|_| scope.spawn(|| client.ping())).collect();
        for _ in 0..3 {
            peer.expect(Op::Ping);
        }
        // What came before the replies is read before them, and those do not come.
        let left = loop {
            match client.draining() {
                Some(left) => break left,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
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
    let flight = segment("f1", "x", &[4.0], "none");
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
    let cases: [(&[u8], &str, &str); 8] = [
        (b"HTTP/1.1 400 Bad Request", "", "frames start with \"ST\""),
        (b"ST\x01\x03\x02\0\0\0\x02", "{}", "protocol version 1"),
        (
            b"ST\x02\x03\x02\0\0\0\x05",
            "{}",
            "says 5 body bytes and 0 of payload, the packet has 2",
        ),
        (
            b"ST\x02\x04\x02\0\0\0\0\0\0\0\x02",
            "{}",
            "only INVOKE, CALL, CHUNK, LAST and the answers to them carry a payload",
        ),
        (
            b"ST\x02\x05\x02\0\0\0\x02",
            "{}",
            "Kernels is not for clients",
        ),
        (b"ST\x02\x41\0\0\0\0\x02", "{}", "not a Gone"),
        (b"ST\x02\xee\0\0\0\0\x02", "{}", "op 238"),
        (b"ST\x02", "", "shorter than its header"),
    ];
    for (header, body, says) in cases {
        let mut packet = header.to_vec();
        if !body.is_empty() {
            packet.resize(HEADER_BYTES, 0);
            packet.extend_from_slice(body.as_bytes());
        }
        let (client, peer) = greeted();
        let error = beside(
            || client.ping(),
            || {
                peer.expect(Op::Ping);
                peer.raw(&packet, &[]);
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
    let good = segment("f1", "x", &[4.0], "none");

    let mut liar = segment("f2", "x", &[4.0], "none");
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

    let open = segment("f3", "x", &[4.0], "anyone");
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
