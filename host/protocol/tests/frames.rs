//! The headers of `tests/conformance/frames.json`, which every client's tests read too.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use serde_json::Value;
use strait_protocol::{
    BODY_BYTES_MAX, FrameError, HEADER_BYTES, Header, Op, PAYLOAD_BYTES_MAX, TraceContext, VERSION,
    payload_room,
};

fn table(part: &str) -> Vec<Value> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/conformance/frames.json"
    );
    let mut all: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(all["version"], VERSION);
    let Value::Array(part) = all[part].take() else {
        panic!("no {part} in {path}");
    };
    assert!(!part.is_empty());
    part
}

fn bytes(case: &Value, field: &str) -> Vec<u8> {
    let hex = case[field].as_str().unwrap();
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

#[test]
fn headers_are_byte_exact() {
    for case in table("frames") {
        let name = &case["name"];
        let body = case["body"].as_str().unwrap();
        let packet = bytes(&case, "hex");
        let payload = match case["payload"].is_null() {
            true => Vec::new(),
            false => bytes(&case, "payload"),
        };
        let header = Header {
            op: Op::try_from(u8::try_from(case["op"].as_u64().unwrap()).unwrap()).unwrap(),
            sequence: u32::try_from(case["sequence"].as_u64().unwrap()).unwrap(),
            body_bytes: u32::try_from(body.len()).unwrap(),
            payload_bytes: u32::try_from(payload.len()).unwrap(),
            trace: TraceContext {
                trace_id: bytes(&case, "trace_id").try_into().unwrap(),
                parent_id: bytes(&case, "parent_id").try_into().unwrap(),
                flags: u8::try_from(case["trace_flags"].as_u64().unwrap()).unwrap(),
            },
        };
        let written = [&header.encode()[..], body.as_bytes(), &payload].concat();
        assert_eq!(written, packet, "{name}");
        let read = Header::decode(&packet).unwrap();
        assert_eq!(read, (header, body.as_bytes(), &payload[..]), "{name}");
        assert_eq!(Header::sequence_of(&packet), header.sequence, "{name}");
        let id = header.trace.id().map(|id| id.to_string());
        let traced = header.trace != TraceContext::NONE;
        assert_eq!(
            id.as_deref(),
            traced.then(|| case["trace_id"].as_str().unwrap())
        );
    }
}

#[test]
fn what_is_no_frame_of_this_version_is_named() {
    for case in table("refused") {
        let error = Header::decode(&bytes(&case, "hex"))
            .expect_err(case["name"].as_str().unwrap())
            .to_string();
        for word in case["says"].as_array().unwrap() {
            let word = word.as_str().unwrap();
            assert!(
                error.contains(word),
                "{}: {error:?} does not say {word:?}",
                case["name"]
            );
        }
    }
}

#[test]
fn a_payload_is_bounded_and_only_where_one_is_expected() {
    let frame = |op, payload: usize| {
        let header = Header {
            op,
            sequence: 1,
            body_bytes: 2,
            payload_bytes: u32::try_from(payload).unwrap(),
            trace: TraceContext::NONE,
        };
        [&header.encode()[..], b"{}", &vec![7; payload]].concat()
    };
    for op in [Op::Invoke, Op::Ok] {
        let packet = frame(op, PAYLOAD_BYTES_MAX);
        let (_, body, payload) = Header::decode(&packet).unwrap();
        assert_eq!((body, payload.len()), (&b"{}"[..], PAYLOAD_BYTES_MAX));
        let error = Header::decode(&frame(op, PAYLOAD_BYTES_MAX + 1)).unwrap_err();
        assert_eq!(error, FrameError::PayloadTooLong(PAYLOAD_BYTES_MAX + 1));
    }
    for op in [Op::Ping, Op::Create, Op::Error, Op::Gone] {
        let error = Header::decode(&frame(op, 1)).unwrap_err();
        assert_eq!(error, FrameError::Payload(1), "{op:?}");
    }
}

#[test]
fn a_longest_frame_fits_a_sockets_buffer() {
    // What Linux gives a socket by itself; a frame needs 32 bytes more than it has.
    let buffer = 212_992;
    assert_eq!(payload_room(buffer), PAYLOAD_BYTES_MAX);
    let frame = HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX;
    assert!(frame + 32 <= buffer);
    assert_eq!(payload_room(HEADER_BYTES + BODY_BYTES_MAX + 32 + 5), 5);
    assert_eq!(payload_room(0), 0);
}

#[test]
fn any_bytes_are_a_frame_or_refused() {
    let good = bytes(&table("frames")[0], "hex");
    for cut in 0..good.len() {
        Header::decode(&good[..cut]).expect_err("it was cut");
    }
    for at in 0..HEADER_BYTES {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // What is left to a sender's choice: the op, the sequence and the trace.
            let free = (3..8).contains(&at) || (16..41).contains(&at);
            assert!(
                free || Header::decode(&bad).is_err(),
                "byte {at}, bit {bit}"
            );
        }
    }
}
