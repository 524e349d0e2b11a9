//! Segments and leases: what is mapped, handed over, renewed and let go of.

use std::time::Duration;

use rustix::fs::SealFlags;
use serde_json::json;
use strait_client::wire::Op;
use strait_client::{Dtype, Error, NewTensor, Options, TensorSpec};

use super::{beside, greeted};
use crate::peer::{connected, numbers, segment};

#[test]
fn a_filled_segment_is_published_with_no_writable_mapping_left() {
    let (client, peer) = greeted();
    let made = segment("5e9", "x", &[0.0; 4], "anyone");
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
            mapping["writers"] = json!("none");
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
    let made = segment("5e9", "x", &[0.0; 2], "anyone");
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
fn an_expired_lease_is_told_apart_and_its_pages_stay() {
    let (client, peer) = greeted();
    let flight = segment("f1", "x", &[4.0], "none");
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
    let flight = segment("f1", "x", &[4.0], "none");
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
    let flight = segment("f1", "x", &[4.0], "none");
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
fn a_memfd_of_ones_own_is_handed_over() {
    let (client, peer) = greeted();
    let own = segment("-", "x", &[2.0], "none");
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
