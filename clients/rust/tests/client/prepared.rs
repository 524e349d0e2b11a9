//! Prepared calls against a host by hand: what it says is held against what it said before.

use std::os::fd::AsFd;

use serde_json::{Value, json};
use strait_client::wire::{self, Header, Op, TraceContext};
use strait_client::{Client, Dtype, Elements, Error, Prepared, TensorSpec};
use strait_memory::FrameSocket;

use super::greeted;
use crate::peer::Peer;

fn spec(sizes: &[u64]) -> TensorSpec {
    TensorSpec {
        dtype: Dtype::Float64,
        shape: sizes.to_vec(),
    }
}

/// The OK to a PREPARE of `k` with an `x` and a `y` of three float64s.
pub(super) fn told() -> Value {
    let place = |port: &str| json!({"port": port, "dtype": "float64", "shape": [3], "offset": 64, "length": 24});
    json!({"prepared": 4, "request_bytes": 128, "inputs": [place("x")], "reply_bytes": 128,
        "outputs": [place("y")], "request_id": "r"})
}

/// What the client makes of `told` and one descriptor.
fn prepare(client: &Client, peer: &Peer, told: &Value) -> (Result<Prepared, Error>, Peer) {
    let (ours, theirs) = FrameSocket::pair().expect("a socket pair");
    let prepared = std::thread::scope(|scope| {
        let prepared = scope.spawn(|| {
            let prepare = client.prepare("k").input("x", &spec(&[3]));
            prepare.param("a", 2.0).send()
        });
        let asked = peer.expect(Op::Prepare);
        let inputs = json!({"x": {"dtype": "float64", "shape": [3]}});
        assert_eq!(
            (&asked.body["kernel"], &asked.body["inputs"]),
            (&json!("k"), &inputs)
        );
        assert_eq!(asked.body["parameters"], json!({"a": 2.0}));
        peer.send(Op::Ok, asked.sequence, told, &[theirs.as_fd()]);
        prepared.join().expect("no panic")
    });
    (prepared, Peer(ours))
}

/// A reply to a CALL.
pub(super) fn reply(op: Op, sequence: u32, body: &str, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        op,
        sequence,
        body_bytes: u32::try_from(body.len()).expect("short"),
        payload_bytes: u32::try_from(payload.len()).expect("short"),
        trace: TraceContext::NONE,
    };
    [&header.encode()[..], body.as_bytes(), payload].concat()
}

pub(super) fn payload(sizes: &[u64], elements: &[f64]) -> Vec<u8> {
    let mut payload = wire::sizes(sizes).to_vec();
    payload.extend(elements.iter().flat_map(|element| element.to_le_bytes()));
    payload.resize(128, 0);
    payload
}

/// What the call makes of `reply`, which is given its sequence.
fn call(
    prepared: &mut Prepared,
    calls: &Peer,
    reply: impl FnOnce(u32) -> Vec<u8> + Send,
) -> Result<(Vec<f64>, usize), Error> {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 1024];
            let received = calls.0.recv(&mut buffer).expect("a CALL");
            let (header, body, came) = Header::decode(&buffer[..received.bytes]).expect("a frame");
            assert_eq!((header.op, body), (Op::Call, &b""[..]));
            assert_eq!(came, payload(&[3], &[1.0, 2.0, 3.0]));
            calls.raw(&reply(header.sequence), &[]);
        });
        let result = prepared.call(&[(&[1.0, 2.0, 3.0][..]).into()])?;
        let y = result.tensor("y")?;
        assert_eq!(y.shape().len(), 1);
        assert!(matches!(result.tensor("z"), Err(Error::NoTensor { .. })));
        Ok((y.as_slice()?.to_vec(), result.notes.len()))
    })
}

#[test]
fn a_call_is_one_frame_and_its_reply_another() {
    let (client, peer) = greeted();
    let (prepared, calls) = prepare(&client, &peer, &told());
    let mut prepared = prepared.expect("as the protocol has it");
    assert_eq!((prepared.number(), prepared.inputs().len()), (4, 1));
    for round in 0..3 {
        let whole = payload(&[3], &[f64::from(round), 5.0, 6.0]);
        let came = call(&mut prepared, &calls, |sequence| {
            reply(Op::Ok, sequence, "", &whole)
        });
        assert_eq!(
            came.expect("a result"),
            (vec![f64::from(round), 5.0, 6.0], 0)
        );
        // Fewer than there could be, and something to say.
        let part = payload(&[1], &[7.0]);
        let notes = r#"{"notes":[{"key":"k","text":"t"}]}"#;
        let came = call(&mut prepared, &calls, |sequence| {
            reply(Op::Ok, sequence, notes, &part)
        });
        assert_eq!(came.expect("a result"), (vec![7.0], 1));
        // An error is that call's alone.
        let error =
            r#"{"code":"INTERNAL","reason":"GUEST_TRAP","message":"it trapped","request_id":"r"}"#;
        let came = call(&mut prepared, &calls, |sequence| {
            reply(Op::Error, sequence, error, &[])
        });
        assert!(matches!(came, Err(Error::Remote(failure)) if failure.reason == "GUEST_TRAP"));
    }
    assert_eq!(client.copied_bytes(), 9 * 24 + 3 * (24 + 8));
    // What does not fit is not sent.
    for wrong in [&[1.0, 2.0][..], &[1.0; 4], &[]] {
        let refused = prepared.call(&[wrong.into()]).expect_err("refused");
        assert!(matches!(refused, Error::Length { .. }), "{refused}");
    }
    let refused = prepared
        .call(&[(&[1_f32; 6][..]).into()])
        .expect_err("refused");
    assert!(matches!(refused, Error::Dtype { .. }), "{refused}");
    let one = Elements::from(&[1.0, 2.0, 3.0][..]);
    for wrong in [&[][..], &[one, one]] {
        let refused = prepared.call(wrong).expect_err("refused");
        assert!(matches!(refused, Error::Inputs { .. }), "{refused}");
    }
    for wrong in [&[4][..], &[3, 1], &[]] {
        let elements = vec![0.0; usize::try_from(wrong.iter().product::<u64>()).expect("few")];
        let shaped = Elements::from(&elements).shaped(wrong);
        let refused = prepared.call(&[shaped]).expect_err("refused");
        assert!(matches!(refused, Error::Shape { .. }), "{refused}");
    }
    assert!(!calls.hears_within(50));
    // The end of its socket.
    drop(calls);
    let refused = prepared.call(&[one]).expect_err("refused");
    assert!(matches!(refused, Error::Disconnected), "{refused}");
}

#[test]
fn a_call_may_bring_less() {
    let (client, peer) = greeted();
    let (prepared, calls) = prepare(&client, &peer, &told());
    let mut prepared = prepared.expect("as the protocol has it");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 1024];
            let received = calls.0.recv(&mut buffer).expect("a CALL");
            let (header, _, came) = Header::decode(&buffer[..received.bytes]).expect("a frame");
            assert_eq!(came, payload(&[2], &[8.0, 9.0]));
            calls.raw(
                &reply(Op::Ok, header.sequence, "", &payload(&[0], &[])),
                &[],
            );
        });
        let two = Elements::from(&[8.0, 9.0][..]).shaped(&[2]);
        let result = prepared.call(&[two]).expect("a result");
        let y = result.tensor("y").expect("it has one");
        assert_eq!((y.shape(), y.bytes().len()), (&[0][..], 0));
    });
}

#[test]
fn a_host_that_says_something_else_is_not_believed() {
    let (client, peer) = greeted();
    let with = |pointer: &str, value: Value| {
        let mut told = told();
        *told.pointer_mut(pointer).expect("it is there") = value;
        told
    };
    for wrong in [
        with("/request_bytes", json!(127)),
        with("/reply_bytes", json!(1 << 20)),
        with("/inputs/0/offset", json!(0)),
        with("/outputs/0/offset", json!(65)),
        with("/outputs/0/length", json!(25)),
        with("/outputs/0/shape", json!([u64::MAX, 2])),
        with("/outputs/0/shape", json!([1, 1, 1, 1, 1, 1, 1, 1, 3])),
        with("/outputs", json!([])),
        with("/inputs", json!(7)),
    ] {
        let (refused, _calls) = prepare(&client, &peer, &wrong);
        let refused = refused.expect_err("refused");
        assert!(matches!(refused, Error::Protocol(_)), "{wrong}: {refused}");
    }
    let whole = payload(&[3], &[1.0, 1.0, 1.0]);
    type Lie<'a> = Box<dyn Fn(u32) -> Vec<u8> + Send + Sync + 'a>;
    let lies: Vec<Lie<'_>> = vec![
        Box::new(|sequence| reply(Op::Ok, sequence + 1, "", &whole)),
        Box::new(|sequence| reply(Op::Ok, 0, "", &whole[..usize::from(sequence > 0) * 128])),
        Box::new(|sequence| reply(Op::Ok, sequence, "", &whole[..64])),
        Box::new(|sequence| reply(Op::Ok, sequence, "", &[])),
        Box::new(|sequence| reply(Op::Ok, sequence, "", &vec![0; 70_000])),
        Box::new(|sequence| reply(Op::Ok, sequence, "", &payload(&[4], &[]))),
        Box::new(|sequence| reply(Op::Ok, sequence, "", &payload(&[3, 1], &[]))),
        Box::new(|sequence| reply(Op::Ok, sequence, "notes", &whole)),
        Box::new(|sequence| reply(Op::Error, sequence, "", &[])),
        Box::new(|sequence| reply(Op::Ping, sequence, "", &[])),
        Box::new(|_| b"STRAIT".to_vec()),
        Box::new(|sequence| {
            let mut packet = reply(Op::Ok, sequence, "", &whole);
            packet.resize(300_000, 0);
            packet.truncate(150_000);
            packet
        }),
    ];
    for (index, lie) in lies.iter().enumerate() {
        let (prepared, calls) = prepare(&client, &peer, &told());
        let mut prepared = prepared.expect("as the protocol has it");
        let refused = call(&mut prepared, &calls, lie).expect_err("a lie");
        assert!(matches!(refused, Error::Protocol(_)), "{index}: {refused}");
        // Whose the next reply would be is not known any more.
        let refused = prepared
            .call(&[(&[1.0, 2.0, 3.0][..]).into()])
            .expect_err("over");
        assert!(matches!(refused, Error::Disconnected), "{index}: {refused}");
    }
}
