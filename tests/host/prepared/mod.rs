//! Kernels that are prepared once and called again and again, each over a socket of its own.

mod attack;
mod channel;
mod channel_circle;
mod channel_client;
mod channel_ends;
mod channel_flight;
mod life;
mod lost;
mod memory;
mod ring;
pub(super) mod stream;

use std::os::fd::OwnedFd;

use serde_json::{Value, json};
use strait_client::wire::{self, Op};
use strait_memory::FrameSocket;

use memory::{COUNTS, REMEMBERS, SPINS};

use crate::guest;
use crate::served::{Frame, Holdings, Raw, Served, number, packet, put, ramp};

/// One prepared kernel, as its client has it.
pub(super) struct Prepared {
    told: Value,
    pub(super) socket: FrameSocket,
}

fn bytes(values: &[f64]) -> Vec<u8> {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes());
    bytes.collect()
}

pub(super) fn floats(bytes: &[u8]) -> Vec<f64> {
    let each = bytes.chunks_exact(8);
    each.map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// `count` float64s, which each call brings.
pub(super) fn brought(count: u64) -> Value {
    json!({"dtype": "float64", "shape": [count]})
}

/// 2 x + 1.
pub(super) fn scale_shift(x: Value) -> Value {
    json!({"kernel": "scale-shift", "inputs": {"x": x}, "parameters": {"a": 2.0, "b": 1.0}})
}

impl Prepared {
    pub(super) fn of(mut reply: Frame) -> Self {
        let told = reply.accepted();
        assert_eq!(reply.fds.len(), 1, "{told}");
        let fd: OwnedFd = reply.fds.pop().unwrap();
        Self {
            told,
            socket: fd.into(),
        }
    }

    pub(super) fn by(client: &mut Raw, request: Value) -> Self {
        Self::of(client.ask(Op::Prepare, request))
    }

    fn number(&self) -> u64 {
        number(&self.told, "/prepared")
    }

    /// The payload of a CALL with `x` in its one place.
    pub(super) fn payload(&self, x: &[f64]) -> Vec<u8> {
        let mut payload = wire::sizes(&[x.len() as u64]).to_vec();
        assert_eq!(number(&self.told, "/inputs/0/offset"), payload.len() as u64);
        payload.extend(bytes(x));
        payload.resize(payload.len().next_multiple_of(64), 0);
        assert_eq!(number(&self.told, "/request_bytes"), payload.len() as u64);
        payload
    }

    pub(super) fn send(&self, sequence: u32, payload: &[u8]) {
        let frame = call_frame(sequence, payload);
        self.socket.send(&[&frame], &[]).unwrap();
    }

    pub(super) fn receive(&self) -> Option<Frame> {
        let mut buffer =
            vec![0; wire::HEADER_BYTES + wire::BODY_BYTES_MAX + wire::PAYLOAD_BYTES_MAX];
        let received = self.socket.recv(&mut buffer).unwrap();
        assert!(!received.truncated && received.fds.is_empty());
        if received.bytes == 0 {
            return None;
        }
        let packet = &buffer[..received.bytes];
        let (_, body, payload) = wire::Header::decode(packet).unwrap();
        Some(Frame {
            header: *packet.first_chunk().unwrap(),
            text: String::from_utf8(body.to_vec()).unwrap(),
            payload: payload.to_vec(),
            fds: Vec::new(),
        })
    }

    pub(super) fn ask(&self, payload: &[u8]) -> Frame {
        self.send(7, payload);
        let reply = self.receive().expect("an answer");
        assert_eq!(reply.sequence(), 7);
        reply
    }

    /// The one output of a call on `x`.
    pub(super) fn call(&self, x: &[f64]) -> Vec<f64> {
        self.output(&self.ask(&self.payload(x)))
    }

    fn output(&self, reply: &Frame) -> Vec<f64> {
        assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
        assert_eq!(
            reply.payload.len() as u64,
            number(&self.told, "/reply_bytes")
        );
        let shape = wire::shape(&reply.payload[..64], 1).expect("one axis");
        let from = usize::try_from(number(&self.told, "/outputs/0/offset")).unwrap();
        let length = 8 * usize::try_from(shape[0]).unwrap();
        let (elements, rest) = reply.payload[from..].split_at(length);
        assert!(rest.iter().all(|byte| *byte == 0), "zeros behind it");
        floats(elements)
    }
}

fn call_frame(sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = packet(Op::Call as u8, sequence, b"");
    let bytes = u32::try_from(payload.len()).unwrap();
    frame[12..16].copy_from_slice(&bytes.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

pub(super) fn shifted(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| 2.0 * x + 1.0).collect()
}

#[test]
fn calls_make_nothing_but_their_answers() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for count in [1, 2, 128, 2000, 16_000] {
        let prepared = Prepared::by(&mut client, scale_shift(brought(count)));
        for seed in 0..4 {
            let x: Vec<f64> = ramp(count).iter().map(|x| x + f64::from(seed)).collect();
            assert_eq!(prepared.call(&x), shifted(&x), "{count}");
        }
    }
    // Without axes, and without elements.
    for (shape, elements) in [(json!([]), 1), (json!([0]), 0), (json!([3, 0, 5]), 0)] {
        let request = scale_shift(json!({"dtype": "float64", "shape": shape}));
        let prepared = Prepared::by(&mut client, request);
        let sizes: Vec<u64> = serde_json::from_value(shape.clone()).unwrap();
        let mut payload = wire::sizes(&sizes).to_vec();
        payload.extend(bytes(&vec![4.0; elements]));
        payload.resize(payload.len().next_multiple_of(64), 0);
        let reply = prepared.ask(&payload);
        assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
        assert_eq!(wire::shape(&reply.payload[..64], sizes.len()), Some(sizes));
        assert_eq!(
            floats(&reply.payload[64..64 + 8 * elements]),
            vec![9.0; elements]
        );
    }
    let stats = host.eventually(&mut client, "all have ended", |stats| {
        number(stats, "/account/connections") == 1
    });
    for nothing in ["/segments", "/leases", "/account/bytes", "/pool/segments"] {
        assert_eq!(number(&stats, nothing), 0, "{nothing} {stats}");
    }
    let moved = 8 * (4 * (1 + 2 + 128 + 2000 + 16_000) + 1);
    for place in ["frame_in", "frame_out", "guest_in", "guest_out"] {
        assert_eq!(
            number(&stats, &format!("/copied/{place}")),
            moved,
            "{stats}"
        );
    }
}

#[test]
fn a_call_is_ended_by_its_number_and_the_next_one_runs() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[]);
    let mut client = host.greeted();
    let request = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 60_000});
    let prepared = Prepared::by(&mut client, request);
    let x = |what| prepared.payload(&[what, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    for _ in 0..3 {
        prepared.send(1, &x(SPINS));
        prepared.send(2, &x(COUNTS));
        host.eventually(&mut host.greeted(), "it runs", |stats| {
            number(stats, "/running") == 1
        });
        let asked = json!({"prepared": prepared.number()});
        assert_eq!(client.ok(Op::Cancel, asked)["cancelled"], true);
        let reply = prepared.receive().unwrap();
        assert_eq!(reply.sequence(), 1);
        reply.refused("CANCELLED", "CANCELLED");
        let reply = prepared.receive().unwrap();
        assert_eq!(reply.sequence(), 2);
        assert_eq!(prepared.output(&reply)[..3], [1.0; 3]);
    }
    let other = json!({"prepared": prepared.number() + 1});
    assert_eq!(client.ok(Op::Cancel, other)["cancelled"], false);
    for wrong in [json!({}), json!({"prepared": 1, "sequence": 1})] {
        let message = client
            .ask(Op::Cancel, wrong)
            .refused("INVALID_ARGUMENT", "BAD_REQUEST");
        assert!(
            message.contains("either `sequence` or `prepared`"),
            "{message}"
        );
    }
}

#[test]
fn what_is_no_call_is_told_so_and_the_next_one_runs() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let prepared = Prepared::by(&mut client, scale_shift(brought(8)));
    let x = ramp(8);
    let good = prepared.payload(&x);
    let sizes = |shape: &[u64]| {
        let mut payload = good.clone();
        payload[..64].copy_from_slice(&wire::sizes(shape));
        call_frame(9, &payload)
    };
    let mut other_word = sizes(&[8]);
    other_word[wire::HEADER_BYTES + 63] = 1;
    let mut reserved = call_frame(9, &good);
    reserved[44] = 1;
    let mut with_body = packet(Op::Call as u8, 9, b"{}");
    with_body[12..16].copy_from_slice(&u32::try_from(good.len()).unwrap().to_le_bytes());
    with_body.extend_from_slice(&good);
    let mut long = good.clone();
    long.extend([0; 64]);
    for (frame, reason, says) in [
        (call_frame(9, &[]), "BAD_FRAME", "a payload of 0 bytes"),
        (
            call_frame(9, &good[..64]),
            "BAD_FRAME",
            "a payload of 64 bytes",
        ),
        (call_frame(9, &long), "BAD_FRAME", "more than the 128 bytes"),
        (
            sizes(&[9]),
            "BAD_INPUT",
            "not within those that were prepared, [8]",
        ),
        (sizes(&[u64::MAX]), "BAD_INPUT", "input `x`"),
        (sizes(&[8, 1]), "BAD_INPUT", "input `x`"),
        (other_word, "BAD_INPUT", "input `x`"),
        (reserved, "BAD_FRAME", "flags"),
        (with_body, "BAD_FRAME", "more than the 128 bytes"),
        (
            packet(Op::Call as u8, 9, b"{}"),
            "BAD_FRAME",
            "neither a body nor",
        ),
        (
            packet(Op::Ping as u8, 9, b""),
            "BAD_FRAME",
            "it takes Call only",
        ),
        (packet(200, 9, b""), "BAD_FRAME", "op 200"),
        (
            packet(Op::Call as u8, 9, b"")[..20].to_vec(),
            "BAD_FRAME",
            "shorter than its header",
        ),
        (
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            "BAD_FRAME",
            "starts with",
        ),
    ] {
        prepared.socket.send(&[&frame], &[]).unwrap();
        let message = prepared
            .receive()
            .expect("an answer")
            .refused("INVALID_ARGUMENT", reason);
        assert!(message.contains(says), "{message}");
        assert_eq!(prepared.call(&x), shifted(&x), "{says}");
    }
    // A descriptor beside a CALL is closed.
    let before = number(&client.ok(Op::Stats, json!({})), "/process/fds");
    let frame = call_frame(9, &good);
    let beside = std::fs::File::open("/dev/null").unwrap();
    let fd = std::os::fd::AsFd::as_fd(&beside);
    prepared.socket.send(&[&frame], &[fd]).unwrap();
    prepared
        .receive()
        .unwrap()
        .refused("INVALID_ARGUMENT", "BAD_FRAME");
    assert_eq!(
        number(&client.ok(Op::Stats, json!({})), "/process/fds"),
        before
    );
    // CALL has no place on the connection.
    client.socket.send(&[&frame], &[]).unwrap();
    let message = client
        .receive()
        .unwrap()
        .refused("INVALID_ARGUMENT", "BAD_FRAME");
    assert!(message.contains("the OK to PREPARE"), "{message}");
    assert_eq!(prepared.call(&x), shifted(&x));
}

#[test]
fn what_cannot_be_prepared_is_refused_and_leaves_nothing() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 8);
    let before = host.settled(&mut client);
    let room = wire::PAYLOAD_BYTES_MAX as u64 / 8;
    let with = |field: &str, value: Value| {
        let mut request = scale_shift(brought(8));
        request[field] = value;
        request
    };
    for (request, code, reason, says) in [
        (
            scale_shift(brought(room)),
            "INVALID_ARGUMENT",
            "BAD_INPUT",
            "a frame has room for",
        ),
        (
            scale_shift(brought(u64::MAX)),
            "INVALID_ARGUMENT",
            "BAD_INPUT",
            "`x`",
        ),
        (
            scale_shift(json!({"dtype": "float64", "shape": vec![1; 9]})),
            "INVALID_ARGUMENT",
            "BAD_INPUT",
            "`x`",
        ),
        (
            scale_shift(json!({"dtype": "float65", "shape": [1]})),
            "INVALID_ARGUMENT",
            "BAD_REQUEST",
            "the body",
        ),
        (
            scale_shift(
                json!({"inline": {"dtype": "float64", "shape": [1], "offset": 0, "length": 8}}),
            ),
            "INVALID_ARGUMENT",
            "BAD_INPUT",
            "PREPARE takes no bytes",
        ),
        (
            scale_shift(json!("none")),
            "NOT_FOUND",
            "FLIGHT_NOT_FOUND",
            "none",
        ),
        (
            scale_shift(json!({"segment": "00000000000000000000000000000000"})),
            "NOT_FOUND",
            "SEGMENT_NOT_FOUND",
            "0000",
        ),
        (
            with("kernel", json!("none")),
            "NOT_FOUND",
            "KERNEL_NOT_FOUND",
            "none",
        ),
        (
            with("inputs", json!({})),
            "INVALID_ARGUMENT",
            "MISSING_INPUT",
            "`x`",
        ),
        (
            with("parameters", json!({"a": 1.0, "c": 1.0})),
            "INVALID_ARGUMENT",
            "UNKNOWN_PARAMETER",
            "`c`",
        ),
        (
            with("deadline_ms", json!(0)),
            "INVALID_ARGUMENT",
            "BAD_LIMIT",
            "deadline_ms",
        ),
        (
            with("limits", json!({"result_bytes": u64::MAX})),
            "INVALID_ARGUMENT",
            "BAD_LIMIT",
            "result_bytes",
        ),
        (
            with("limits", json!({"result_bytes": 63})),
            "RESOURCE_EXHAUSTED",
            "LIMIT_RESULT_BYTES",
            "63",
        ),
        (
            with("limits", json!({"guest_bytes": 65_536})),
            "RESOURCE_EXHAUSTED",
            "LIMIT_GUEST_BYTES",
            "65536",
        ),
        (
            with("publish", json!({"y": "y"})),
            "INVALID_ARGUMENT",
            "BAD_REQUEST",
            "publish",
        ),
    ] {
        let message = client
            .ask(Op::Prepare, request.clone())
            .refused(code, reason);
        assert!(message.contains(says), "{message}");
    }
    // What a flight gives is too large for a reply.
    put(&mut client, "large", 20_000);
    client
        .ask(Op::Prepare, scale_shift(json!("large")))
        .refused("RESOURCE_EXHAUSTED", "LIMIT_RESULT_BYTES");
    client.ok(Op::Drop, json!({"name": "large"}));
    let after = host.settled(&mut client);
    assert_eq!(Holdings::of(&after), Holdings::of(&before));
    assert_eq!(number(&after, "/account/connections"), 1);
}

/// The sum of both inputs' first elements; each output has the shape of its input.
const ADDS: &str = "
(global $shape2 (mut i32) (i32.const 0))
(func $open (param i32 i32 i32 i32 i32 i32) (result i32)
  (global.set $shape (i32.load offset=4 (local.get 4)))
  (global.set $rank (i32.load offset=8 (local.get 4)))
  (global.set $shape2 (i32.load offset=16 (local.get 4)))
  (i32.store8 (i32.const 512) (i32.const 0))
  (i32.store (i32.const 516) (local.get 4))
  (i32.store (i32.const 520) (local.get 5))
  i32.const 512)
(func $extents (result i32)
  (i32.store (i32.const 560) (global.get $shape))
  (i32.store (i32.const 564) (global.get $rank))
  (i32.store (i32.const 568) (global.get $shape2))
  (i32.store (i32.const 572) (global.get $rank))
  (i32.store (i32.const 552) (i32.const 560))
  (i32.store (i32.const 556) (i32.const 2))
  i32.const 552)
(func $run (param i32) (result i32)
  (f64.store (i32.wrap_i64 (global.get $y)) (f64.add
    (f64.load (i32.wrap_i64 (global.get $x))) (f64.load (i32.wrap_i64 (global.get $x2)))))
  i32.const 0)";

#[test]
fn an_input_can_be_the_same_for_all_calls() {
    let plugin = guest::component_without_globals("adds", ADDS);
    let host = Served::with_plugin(&plugin, &[("STRAIT__ENGINE__MOVE_MIN_BYTES", "65536")]);
    let mut client = host.greeted();
    // A copy and a window, a flight and a segment of this session.
    for (count, named) in [(4, true), (4, false), (8192, true), (8192, false)] {
        let created = client.create(count);
        let mut fixed = ramp(count);
        created.fill(&fixed);
        let input = match named {
            true => {
                client.ok(
                    Op::Publish,
                    json!({"segment": created.segment, "name": "fixed"}),
                );
                json!("fixed")
            }
            false => json!({"segment": created.segment}),
        };
        let request = json!({"kernel": "adds/k", "inputs": {"x": brought(4), "x2": input}});
        let prepared = Prepared::by(&mut client, request);
        let call = |x: f64| prepared.call_two(&[x, 0.0, 0.0, 0.0]);
        assert_eq!(call(1.0)[0], fixed[0] + 1.0);
        // It is there whether anybody else has it or not.
        if named {
            client.ok(Op::Drop, json!({"name": "fixed"}));
        } else {
            // Until it is published its creator may change it between calls.
            fixed[0] = 100.0;
            // A worker only maps what cannot be written anew.
            let writable = count < 8192 && !host.has_workers();
            if writable {
                created.fill(&fixed);
                assert_eq!(call(1.0)[0], 101.0);
            } else {
                fixed[0] = ramp(1)[0];
            }
        }
        client.ok(Op::Release, json!({"leases": [created.lease]}));
        for n in 0..3 {
            assert_eq!(
                call(f64::from(n))[0],
                fixed[0] + f64::from(n),
                "{count} {named}"
            );
        }
    }
    let stats = host.eventually(&mut client, "all have ended", |stats| {
        number(stats, "/account/connections") == 1
    });
    assert_eq!(number(&stats, "/segments"), 0, "{stats}");
}

impl Prepared {
    /// The first of two outputs.
    fn call_two(&self, x: &[f64]) -> Vec<f64> {
        let reply = self.ask(&self.payload(x));
        assert_eq!(reply.op(), Op::Ok, "{}", reply.text);
        let from = usize::try_from(number(&self.told, "/outputs/0/offset")).unwrap();
        floats(&reply.payload[from..from + 8 * x.len()])
    }
}
