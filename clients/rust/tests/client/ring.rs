//! Prepared calls through a ring, against a host by hand that says and does something else.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use strait_client::wire::{self, Op, Side, Word};
use strait_client::{Client, Dtype, Error, Options, Prepared, TensorSpec};
use strait_memory::{Budget, FrameSocket, SharedPages};

use super::prepared::{payload, reply, told};
use crate::peer::{Peer, connected};

/// The host's end.
struct Host {
    calls: Peer,
    memory: SharedPages,
    layout: wire::Ring,
}

impl Host {
    /// Answers the first call with `frame`, for its sequence, in its slot and with that many frames in all.
    fn answer(&self, frame: &[u8], tail: u32) {
        let (at, _) = self.layout.slot(Side::Host, 0);
        self.memory.write(usize::try_from(at).expect("few"), frame);
        let word = self.memory.word(Word::Tail(Side::Host).offset());
        word.store(tail, Ordering::SeqCst);
        self.calls.raw(&[0], &[]);
    }

    /// Waits for the first call: its sequence.
    fn asked(&self) -> u32 {
        let tail = self.memory.word(Word::Tail(Side::Client).offset());
        while tail.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut frame = [0; 48 + 128];
        let (at, _) = self.layout.slot(Side::Client, 0);
        self.memory
            .read(usize::try_from(at).expect("few"), &mut frame);
        let (header, _, came) = wire::Header::decode(&frame).expect("a frame");
        assert_eq!(came, payload(&[3], &[1.0, 2.0, 3.0]));
        header.sequence
    }
}

fn ring_told() -> (Value, wire::Ring) {
    let layout = wire::Ring::of(128, 128).expect("short");
    let mut told = told();
    told["ring"] = serde_json::to_value(layout).expect("numbers");
    (told, layout)
}

fn prepare(
    client: &Client,
    peer: &Peer,
    told: &Value,
    memory: Option<&OwnedFd>,
) -> (Result<Prepared, Error>, Peer) {
    let (ours, theirs) = FrameSocket::pair().expect("a socket pair");
    let spec = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![3],
    };
    let prepared = std::thread::scope(|scope| {
        let prepared = scope.spawn(|| client.prepare("k").input("x", &spec).ring().send());
        let asked = peer.expect(Op::Prepare);
        assert_eq!(asked.body["ring"], true);
        let fds = [theirs.as_fd()].into_iter().chain(memory.map(AsFd::as_fd));
        peer.send(Op::Ok, asked.sequence, told, &fds.collect::<Vec<_>>());
        prepared.join().expect("no panic")
    });
    (prepared, Peer(ours))
}

fn memory(bytes: u64) -> (SharedPages, Arc<OwnedFd>) {
    let budget = Budget::for_segments(1 << 20, 8);
    let memory = SharedPages::create(usize::try_from(bytes).expect("few"), &budget);
    let memory = memory.expect("it fits");
    let fd = memory.descriptor().expect("it was made here");
    (memory, fd)
}

/// What the client makes of what the host does with its first call.
fn with_host(spin: Duration, host_side: impl FnOnce(Host, u32) + Send) -> Result<Vec<f64>, Error> {
    let options = Options {
        spin,
        ..Options::default()
    };
    let (client, peer) = connected(&options);
    let (told, layout) = ring_told();
    let (memory, fd) = memory(layout.bytes);
    let (prepared, calls) = prepare(&client, &peer, &told, Some(&fd));
    let mut prepared = prepared.expect("as the protocol has it");
    let host = Host {
        calls,
        memory,
        layout,
    };
    let elements = [1.0, 2.0, 3.0];
    let first = std::thread::scope(|scope| {
        scope.spawn(move || {
            let sequence = host.asked();
            host_side(host, sequence);
        });
        let result = prepared.call(&[(&elements[..]).into()])?;
        Ok(result.tensor("y")?.as_slice::<f64>()?.to_vec())
    });
    if !matches!(&first, Ok(_) | Err(Error::Remote(_))) {
        // Whose the next reply would be is not known any more.
        let refused = prepared.call(&[(&elements[..]).into()]).expect_err("over");
        assert!(matches!(refused, Error::Disconnected), "{refused}");
    }
    first
}

const ERROR: &str =
    r#"{"code":"INTERNAL","reason":"GUEST_TRAP","message":"it trapped","request_id":"r"}"#;

#[test]
fn a_reply_comes_in_its_slot_or_on_the_socket_as_the_slot_says() {
    for spin in [Duration::ZERO, Duration::from_millis(50)] {
        let whole = payload(&[3], &[4.0, 5.0, 6.0]);
        let came = with_host(spin, |host, sequence| {
            // More than is needed to wake it.
            host.calls.raw(&[0], &[]);
            host.answer(&reply(Op::Ok, sequence, "", &whole), 1);
            std::thread::sleep(Duration::from_millis(20));
        });
        assert_eq!(came.expect("a result"), [4.0, 5.0, 6.0]);
        let came = with_host(spin, |host, sequence| {
            let notes = r#"{"notes":[{"key":"k","text":"t"}]}"#;
            let frame = reply(Op::Ok, sequence, notes, &whole);
            host.answer(&frame[..wire::HEADER_BYTES], 1);
            host.calls.raw(&frame, &[]);
        });
        assert_eq!(came.expect("a result"), [4.0, 5.0, 6.0]);
        let came = with_host(spin, |host, sequence| {
            let frame = reply(Op::Error, sequence, ERROR, &[]);
            host.answer(&frame[..wire::HEADER_BYTES], 1);
            host.calls.raw(&frame, &[]);
        });
        assert!(matches!(came, Err(Error::Remote(failure)) if failure.reason == "GUEST_TRAP"));
        // What a host says before it ends a ring.
        let came = with_host(spin, |host, _| {
            host.calls.raw(&reply(Op::Error, 0, ERROR, &[]), &[]);
        });
        assert!(matches!(came, Err(Error::Remote(failure)) if failure.reason == "GUEST_TRAP"));
        let came = with_host(spin, |host, _| drop(host));
        assert!(matches!(came, Err(Error::Disconnected)));
    }
}

#[test]
fn a_host_that_does_something_else_in_a_ring_is_not_believed() {
    type Lie = fn(Host, u32);
    let lies: [Lie; 10] = [
        |host, sequence| host.answer(&reply(Op::Ok, sequence, "", &payload(&[3], &[])), 2),
        |host, sequence| host.answer(&reply(Op::Ok, sequence, "", &payload(&[3], &[])), u32::MAX),
        |host, sequence| host.answer(&reply(Op::Ok, sequence + 1, "", &payload(&[3], &[])), 1),
        |host, sequence| host.answer(&reply(Op::Ok, sequence, "", &payload(&[4], &[])), 1),
        |host, sequence| {
            let mut frame = reply(Op::Ok, sequence, "", &payload(&[3], &[]));
            frame[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
            host.answer(&frame, 1);
        },
        |host, sequence| host.answer(&reply(Op::Ping, sequence, "", &payload(&[3], &[])), 1),
        |host, _| host.answer(&[0xa5; 192], 1),
        |host, _| host.answer(&[0; 192], 1),
        // Another frame than the slot tells of.
        |host, sequence| {
            let frame = reply(Op::Error, sequence, ERROR, &[]);
            host.answer(&frame[..wire::HEADER_BYTES], 1);
            host.calls
                .raw(&reply(Op::Ok, sequence, "", &payload(&[3], &[])), &[]);
        },
        |host, sequence| {
            host.calls
                .raw(&reply(Op::Ok, sequence, "", &payload(&[3], &[])), &[]);
        },
    ];
    for (index, lie) in lies.into_iter().enumerate() {
        // Until the client has looked at it.
        let stays = |host: Host, sequence| {
            let calls =
                FrameSocket::from(host.calls.0.as_fd().try_clone_to_owned().expect("one more"));
            lie(host, sequence);
            std::thread::sleep(Duration::from_millis(50));
            drop(calls);
        };
        let refused = with_host(Duration::ZERO, stays).expect_err("a lie");
        let wrong = matches!(refused, Error::Protocol(_))
            // A frame of garbage tells of a body, which does not come.
            || (index == 6 && matches!(refused, Error::Disconnected));
        assert!(wrong, "{index}: {refused}");
    }
}

#[test]
fn a_ring_that_is_not_as_it_must_be_is_not_mapped() {
    let (client, peer) = connected(&Options::default());
    let (told, layout) = ring_told();
    let (_memory, fd) = memory(layout.bytes);
    let refused = |told: &Value, fd: Option<&OwnedFd>| {
        let (refused, _calls) = prepare(&client, &peer, told, fd);
        refused.expect_err("refused")
    };
    assert!(matches!(refused(&told, None), Error::Protocol(_)));
    for (field, value) in [
        ("bytes", json!(layout.bytes + 4096)),
        ("slots", json!(3)),
        ("requests", json!(0)),
        ("reply_stride", json!(64)),
        ("replies", json!(u64::MAX)),
    ] {
        let mut wrong = told.clone();
        wrong["ring"][field] = value;
        assert!(
            matches!(refused(&wrong, Some(&fd)), Error::Protocol(_)),
            "{field}"
        );
    }
    let mut none = told.clone();
    none["ring"] = Value::Null;
    assert!(matches!(refused(&none, Some(&fd)), Error::Protocol(_)));
    let (_short, fd) = memory(4096);
    assert!(matches!(refused(&told, Some(&fd)), Error::Memory(_)));
    // One whose size can change.
    let file = tempfile::tempfile().expect("a file");
    file.set_len(layout.bytes).expect("room");
    assert!(matches!(
        refused(&told, Some(&file.into())),
        Error::Memory(_)
    ));
}
