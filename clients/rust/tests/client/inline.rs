//! Small tensors in the frames: what is sent, and what is believed of an answer.

use serde_json::{Value, json};
use strait_client::wire::Op;
use strait_client::{CallInput, CallResult, Dtype, Error, Output, TensorSpec};

use super::{beside, greeted};
use crate::peer::{Peer, invoked, segment};

fn spec(dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        dtype,
        shape: shape.to_vec(),
    }
}

fn bytes(numbers: &[f64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// The result `y` of a call that `peer` answers with `inline` and `payload`.
fn answered(inline: &Value, payload: &[u8]) -> Result<CallResult, Error> {
    let (client, peer) = greeted();
    beside(
        || client.call("k").send(),
        || {
            let asked = peer.expect(Op::Invoke);
            let mut body = invoked(json!([{"port": "y", "inline": inline}]));
            body["request_id"] = json!("r");
            peer.send_with(Op::Ok, asked.sequence, &body, payload, &[]);
        },
    )
}

#[test]
fn small_elements_go_into_the_frame_and_come_in_it() {
    let (client, peer) = greeted();
    let (x, n) = (spec(Dtype::Float64, &[2, 1]), spec(Dtype::Int16, &[]));
    let mut answer = beside(
        || {
            let call = client.call("k").input("x", (&x, &[0.5, -1.0][..]));
            call.input("n", CallInput::of_bytes(&n, &[1, 2])).send()
        },
        || {
            let asked = peer.expect(Op::Invoke);
            assert_eq!(
                asked.body["inputs"],
                json!({
                    "x": {"inline": {"dtype": "float64", "shape": [2, 1], "offset": 0, "length": 16}},
                    "n": {"inline": {"dtype": "int16", "shape": [], "offset": 16, "length": 2}},
                })
            );
            assert_eq!(asked.body["inline_bytes"], 4096);
            assert_eq!(asked.payload, [&bytes(&[0.5, -1.0])[..], &[1, 2]].concat());
            let mut body = invoked(json!([
                {"port": "n", "inline": {"dtype": "uint8", "shape": [3], "offset": 0, "length": 3}},
                {"port": "y", "inline": {"dtype": "float64", "shape": [2], "offset": 64, "length": 16}},
            ]));
            body["request_id"] = json!("r");
            let payload = [&[7, 8, 9][..], &[0; 61], &bytes(&[1.5, 2.5])].concat();
            peer.send_with(Op::Ok, asked.sequence, &body, &payload, &[]);
        },
    )
    .expect("it ran");
    // Into the frame, and out of one.
    assert_eq!(client.copied_bytes(), 18 + 19);
    let y = answer.tensor("y").expect("a port");
    assert_eq!((y.name(), y.shape()), ("y", &[2][..]));
    assert_eq!(y.as_slice::<f64>().expect("float64"), [1.5, 2.5]);
    let n = answer.tensor("n").expect("a port");
    assert_eq!(n.as_slice::<u8>().expect("uint8"), [7, 8, 9]);

    // It goes on as it came, and is published by a copy.
    let kept = answer.take("y").expect("a port");
    assert!(matches!(kept, Output::Inline(_)) && kept.segment().is_none());
    drop(answer);
    beside(
        || client.call("k").input("x", &kept).send(),
        || {
            let asked = peer.expect(Op::Invoke);
            assert_eq!(asked.payload, bytes(&[1.5, 2.5]));
            peer.ok(&asked, invoked(json!([])));
        },
    )
    .expect("it ran");
    beside(
        || client.publish_result(&kept, "name", false),
        || published(&peer, "y"),
    )
    .expect("it was published");
    drop(client);
    // Of the segment that it was copied into; nothing of the results.
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([3]));
}

/// Grants a segment and its name.
fn published(peer: &Peer, what: &str) {
    let made = segment("a1", what, &[0.0, 0.0], "anyone");
    let asked = peer.expect(Op::Create);
    assert_eq!(asked.body["tensors"][0]["shape"], json!([2]), "{what}");
    assert_eq!(asked.body["tensors"][0]["name"], what);
    peer.grant(&asked, &made, 3, 60_000);
    let asked = peer.expect(Op::Publish);
    let mut mapping = made.mapping.clone();
    mapping["writers"] = json!("none");
    peer.ok(&asked, json!({"name": "name", "mapping": mapping}));
}

#[test]
fn what_is_too_large_for_a_frame_goes_into_a_segment_of_the_calls_own() {
    let (client, peer) = greeted();
    let numbers = vec![0.25; 513];
    let spec = spec(Dtype::Float64, &[513]);
    let made = segment("a1", "x", &vec![0.0; 513], "anyone");
    beside(
        || {
            let call = client.call("k").input("x", (&spec, &numbers[..]));
            call.inline_bytes(0).send()
        },
        || {
            let asked = peer.expect(Op::Create);
            peer.grant(&asked, &made, 3, 60_000);
            let asked = peer.expect(Op::Invoke);
            assert_eq!(asked.body["inputs"], json!({"x": {"segment": "a1"}}));
            assert_eq!(asked.body.get("inline_bytes"), None);
            assert!(asked.payload.is_empty());
            assert_eq!(crate::peer::numbers(&made, 513), numbers);
            assert!(!peer.hears_within(20), "it is held until the answer");
            peer.ok(&asked, invoked(json!([])));
        },
    )
    .expect("it ran");
    assert_eq!(peer.expect(Op::Release).body["leases"], json!([3]));
    assert_eq!(client.copied_bytes(), 8 * 513);
}

#[test]
fn elements_that_are_not_what_they_are_said_to_be_are_not_sent() {
    let (client, peer) = greeted();
    let two = spec(Dtype::Float64, &[2]);
    let error = client
        .call("k")
        .input("x", (&two, &[1.0_f32, 2.0][..]))
        .send();
    assert!(matches!(error, Err(Error::Dtype { .. })), "{error:?}");
    let error = client.call("k").input("x", (&two, &[1.0_f64][..])).send();
    assert!(
        matches!(error, Err(Error::Length { given: 8, .. })),
        "{error:?}"
    );
    assert!(!peer.hears_within(20));
}

#[test]
fn an_answer_that_reaches_out_of_its_payload_is_refused() {
    let inline = |shape: Value, offset: u64, length: u64| json!({"dtype": "float64", "shape": shape, "offset": offset, "length": length});
    let payload = bytes(&[1.0, 2.0]);
    let fine = answered(&inline(json!([2]), 0, 16), &payload).expect("it is right");
    let y = fine.tensor("y").expect("a port");
    assert_eq!(y.as_slice::<f64>().expect("float64"), [1.0, 2.0]);
    let empty = answered(&inline(json!([0]), 16, 0), &payload).expect("nothing is somewhere");
    assert!(empty.tensor("y").expect("a port").bytes().is_empty());
    for (wrong, says) in [
        (
            inline(json!([3]), 0, 24),
            "24 bytes at 0 of a payload of 16",
        ),
        (inline(json!([1]), 64, 8), "8 bytes at 64"),
        (inline(json!([1]), u64::MAX, 8), "of a payload of 16"),
        (inline(json!([2]), 0, 8), "has 16 bytes, not 8"),
        (inline(json!([1]), 8, 8), "not aligned"),
        (inline(json!([u64::MAX, 2]), 0, 16), "inline result \"y\""),
        (Value::Null, "neither a mapping nor bytes"),
    ] {
        let error = answered(&wrong, &payload).expect_err("it is wrong");
        let text = error.to_string();
        assert!(text.contains(says), "{text:?} does not say {says:?}");
    }
}
