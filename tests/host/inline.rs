//! Small tensors that travel in the frames: no segment, no descriptor, no lease.

use arrow_flight::FlightDescriptor;
use arrow_flight::flight_service_client::FlightServiceClient;
use std::os::fd::AsFd;

use serde_json::{Value, json};
use strait_client::wire::{self, Op};

use crate::guest;
use crate::served::{Frame, Raw, Served, number, numbers, put, ramp, read, scale_shift};

const INLINE_BYTES: u64 = 32 << 10;

fn bytes(values: &[f64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    let each = bytes.chunks_exact(8);
    each.map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// `count` float64s from `offset` of the payload on.
fn inline(count: u64, offset: u64) -> Value {
    json!({"inline": {"dtype": "float64", "shape": [count], "offset": offset, "length": 8 * count}})
}

/// 2 x + 1 of `input`, with results up to `most` bytes in the reply.
fn call(input: Value, most: u64) -> Value {
    let mut call = scale_shift(input, 2.0, 1.0);
    call["inline_bytes"] = json!(most);
    call
}

/// The one result, which is in the reply.
fn result(reply: &Frame) -> Vec<f64> {
    let entry = reply.accepted()["results"][0].clone();
    assert!(reply.fds.is_empty(), "{entry}");
    for absent in ["mapping", "lease", "expires_ms", "fd"] {
        assert_eq!(entry.get(absent), None, "{entry}");
    }
    let [offset, length] = ["/inline/offset", "/inline/length"]
        .map(|field| usize::try_from(number(&entry, field)).unwrap());
    floats(&reply.payload[offset..offset + length])
}

fn shifted(x: &[f64]) -> Vec<f64> {
    x.iter().map(|x| 2.0 * x + 1.0).collect()
}

fn stats(client: &mut Raw) -> Value {
    client.ok(Op::Stats, json!({}))
}

#[test]
fn a_small_call_makes_nothing_but_its_answer() {
    let host = Served::start(&[]);
    let mut client = host.connect();
    assert_eq!(number(&client.hello(), "/inline_bytes"), INLINE_BYTES);
    let x = ramp(128);
    for _ in 0..3 {
        let reply = client.ask_inline(Op::Invoke, &call(inline(128, 0), INLINE_BYTES), &bytes(&x));
        assert_eq!(result(&reply), shifted(&x));
        assert_eq!(number(&reply.body(), "/copied_bytes"), 2 * 1024);
        let spec = &reply.body()["results"][0]["inline"];
        assert_eq!(
            (&spec["dtype"], &spec["shape"]),
            (&json!("float64"), &json!([128]))
        );
    }
    let stats = stats(&mut client);
    for nothing in [
        "/segments",
        "/segment_bytes",
        "/leases",
        "/account/bytes",
        "/account/peak_descriptors",
    ] {
        let count = stats.pointer(nothing).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(count, 0, "{nothing} {stats}");
    }
    assert_eq!(number(&stats, "/pool/segments"), 0, "{stats}");
    for place in ["frame_in", "frame_out", "guest_in", "guest_out"] {
        assert_eq!(
            number(&stats, &format!("/copied/{place}")),
            3 * 1024,
            "{stats}"
        );
    }
}

#[test]
fn frames_and_segments_mix() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let x = ramp(100);
    put(&mut client, "x", 100);
    // A flight in, bytes out.
    let reply = client.ask(Op::Invoke, call(json!("x"), 4096));
    assert_eq!(result(&reply), shifted(&x));
    // Bytes in, a segment out.
    let reply = client.ask_inline(
        Op::Invoke,
        &scale_shift(inline(100, 0), 2.0, 1.0),
        &bytes(&x),
    );
    assert_eq!(numbers(&reply), shifted(&x));
    assert!(reply.payload.is_empty());
    // What gets a name or a seal is a segment.
    let mut named = call(inline(100, 0), 4096);
    named["publish"] = json!({"y": "y"});
    let reply = client.ask_inline(Op::Invoke, &named, &bytes(&x));
    assert_eq!(numbers(&reply), shifted(&x));
    assert_eq!(
        numbers(&client.ask(Op::Invoke, scale_shift(json!("y"), 1.0, 0.0))),
        shifted(&x)
    );
    let mut sealed = call(inline(100, 0), 4096);
    sealed["seal"] = json!(true);
    let reply = client.ask_inline(Op::Invoke, &sealed, &bytes(&x));
    assert_eq!(reply.body()["results"][0]["mapping"]["writers"], "none");
    assert_eq!(numbers(&reply), shifted(&x));
    // Nothing is mapped, and yet it comes.
    let mut unmapped = call(json!("x"), 4096);
    unmapped["map"] = json!(false);
    assert_eq!(result(&client.ask(Op::Invoke, unmapped)), shifted(&x));
}

#[test]
fn what_is_larger_than_asked_for_is_a_segment() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    for (count, most, comes) in [
        (16, 128, true),
        (17, 128, false),
        (1, 8, true),
        (1, 7, false),
        (1, 0, false),
        (4096, INLINE_BYTES, true),
        // The host's own bound stands.
        (4096, u64::MAX, true),
    ] {
        let x = ramp(count);
        let reply = client.ask_inline(Op::Invoke, &call(inline(count, 0), most), &bytes(&x));
        let y = match comes {
            true => result(&reply),
            false => numbers(&reply),
        };
        assert_eq!(y, shifted(&x), "{count} of at most {most} bytes");
    }
    put(&mut client, "big", 4097);
    let reply = client.ask(Op::Invoke, call(json!("big"), u64::MAX));
    assert_eq!(numbers(&reply), shifted(&ramp(4097)));
}

#[test]
fn tensors_of_one_element_of_none_and_at_any_place() {
    // Tensors this small would be moved, if they had pages.
    let host = Served::with(&[], &[("STRAIT__ENGINE__MOVE_MIN_BYTES", "1")]);
    let mut client = host.greeted();
    let scalar = json!({"inline": {"dtype": "float64", "shape": [], "offset": 3, "length": 8}});
    let payload = [&[9, 9, 9], &bytes(&[20.5])[..], &[9]].concat();
    let reply = client.ask_inline(Op::Invoke, &call(scalar, 64), &payload);
    assert_eq!(result(&reply), [42.0]);
    assert_eq!(reply.body()["results"][0]["inline"]["shape"], json!([]));
    let empty = json!({"inline": {"dtype": "float64", "shape": [3, 0], "offset": 0, "length": 0}});
    let reply = client.ask_inline(Op::Invoke, &call(empty, 64), &[]);
    assert_eq!(result(&reply), Vec::<f64>::new());
    assert_eq!(reply.body()["results"][0]["inline"]["shape"], json!([3, 0]));
    let x = ramp(4096);
    let reply = client.ask_inline(Op::Invoke, &call(inline(4096, 0), INLINE_BYTES), &bytes(&x));
    assert_eq!(result(&reply), shifted(&x));
    // A frame as long as it may be, most of it of no use.
    let mut payload = vec![0; wire::PAYLOAD_BYTES_MAX];
    let last = payload.len() - 8;
    payload[last..].copy_from_slice(&20.5_f64.to_le_bytes());
    let reply = client.ask_inline(Op::Invoke, &call(inline(1, last as u64), 8), &payload);
    assert_eq!(result(&reply), [42.0]);
    // Small integers, where the elements stand at odd places.
    let mut odd = json!({"kernel": "cast", "inputs": {"x": {"inline": {"dtype": "int16", "shape": [2, 2], "offset": 1, "length": 8}}}, "parameters": {"to": "float64"}});
    odd["inline_bytes"] = json!(4096);
    let payload = [0, 1, 0, 2, 0, 255, 255, 0, 128];
    let reply = client.ask_inline(Op::Invoke, &odd, &payload);
    assert_eq!(result(&reply), [1.0, 2.0, -1.0, -32768.0]);
}

#[test]
fn what_is_not_in_the_frame_is_refused_and_nothing_is_left() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let with = |field: &str, value: Value| {
        let mut input = inline(2, 0);
        input["inline"][field] = value;
        input
    };
    for (input, says) in [
        (
            inline(3, 0),
            "24 bytes from 0 on are not in the frame's payload of 16 bytes",
        ),
        (inline(2, 1), "from 1 on"),
        (inline(1, u64::MAX), "from 18446744073709551615 on"),
        (with("length", json!(8)), "has 16 bytes, not 8"),
        (with("length", json!(u64::MAX)), "has 16 bytes"),
        (with("shape", json!([u64::MAX, 2])), "inline input `x`"),
        (
            with("shape", json!([1, 1, 1, 1, 1, 1, 1, 1, 1])),
            "inline input `x`",
        ),
        (with("dtype", json!("float32")), "has 8 bytes, not 16"),
    ] {
        let reply = client.ask_inline(Op::Invoke, &call(input, 64), &[0; 16]);
        let message = reply.refused("INVALID_ARGUMENT", "BAD_INPUT");
        assert!(message.contains(says), "{message}");
    }
    for (field, value) in [
        ("dtype", json!("float63")),
        ("shape", json!([-1])),
        ("offset", json!(-1)),
        ("offset", json!(0.5)),
        ("tensor", json!("x")),
    ] {
        let reply = client.ask_inline(Op::Invoke, &call(with(field, value), 64), &[0; 16]);
        reply.refused("INVALID_ARGUMENT", "BAD_REQUEST");
    }
    let long = call(inline(4097, 0), 64);
    let message = client
        .ask_inline(Op::Invoke, &long, &[0; 8 * 4097])
        .refused("INVALID_ARGUMENT", "BAD_INPUT");
    assert!(
        message.contains("32776 bytes") && message.contains("make a segment"),
        "{message}"
    );
    let message = client
        .ask_inline(Op::Ping, &json!({}), &[0; 16])
        .refused("INVALID_ARGUMENT", "BAD_FRAME");
    assert!(message.contains("only INVOKE"), "{message}");
    assert_eq!(number(&stats(&mut client), "/account/bytes"), 0);
    let reply = client.ask_inline(Op::Invoke, &call(inline(2, 0), 64), &bytes(&[1.0, 2.0]));
    assert_eq!(result(&reply), [3.0, 5.0]);
}

#[test]
fn a_host_may_have_no_tensors_in_frames() {
    let host = Served::with(&[], &[("STRAIT__LIMITS__INLINE_BYTES", "0")]);
    let mut client = host.connect();
    assert_eq!(number(&client.hello(), "/inline_bytes"), 0);
    put(&mut client, "x", 3);
    let reply = client.ask(Op::Invoke, call(json!("x"), INLINE_BYTES));
    assert_eq!(numbers(&reply), shifted(&ramp(3)));
    let message = client
        .ask_inline(Op::Invoke, &call(inline(3, 0), 64), &bytes(&ramp(3)))
        .refused("INVALID_ARGUMENT", "BAD_INPUT");
    assert!(message.contains("at most 0"), "{message}");
}

#[test]
fn a_repeat_is_the_same_request_by_its_elements() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let keyed = |offset: u64, most: u64| {
        let mut call = call(inline(2, offset), most);
        call["idempotency_key"] = json!("k");
        call
    };
    let x = bytes(&[1.0, 2.0]);
    let moved = [&[7; 24], &x[..]].concat();
    for (request, payload) in [(keyed(0, 64), &x), (keyed(24, 64), &moved)] {
        let reply = client.ask_inline(Op::Invoke, &request, payload);
        assert_eq!(result(&reply), [3.0, 5.0]);
    }
    assert_eq!(number(&stats(&mut client), "/invocations"), 1);
    let other = bytes(&[1.0, 3.0]);
    for (request, payload, says) in [
        (keyed(0, 64), &other, "`inputs`"),
        (keyed(0, 0), &x, "`inline_bytes`"),
    ] {
        let message = client
            .ask_inline(Op::Invoke, &request, payload)
            .refused("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED");
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn what_waits_in_the_host_is_charged() {
    const EACH: u64 = 16 << 10;
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let plugin = guest::component("spins", &text);
    // Three of them fit, and nothing else.
    let quota = (3 * EACH).to_string();
    let settings = [
        ("STRAIT__QUOTA__BYTES", &*quota),
        ("STRAIT__ENGINE__WORKERS", "1"),
    ];
    let host = Served::with_plugin(&plugin, &settings);
    let mut client = host.greeted();
    let spin =
        json!({"kernel": "spins/k", "inputs": {"x": inline(EACH / 8, 0)}, "inline_bytes": EACH});
    let payload = vec![0; usize::try_from(EACH).unwrap()];
    let begin = |client: &mut Raw| client.begin_inline(Op::Invoke, &spin, &payload);
    let running: Vec<u32> = (0..3).map(|_| begin(&mut client)).collect();
    let mut watcher = host.greeted();
    host.eventually(&mut watcher, "three are under way", |stats| {
        number(stats, "/account/bytes") == 3 * EACH
    });
    let refused = begin(&mut client);
    let reply = client.receive().unwrap();
    assert_eq!(reply.sequence(), refused);
    reply.refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
    // Those that wait first: the one that runs would let the next one begin.
    running
        .iter()
        .rev()
        .for_each(|sequence| client.cancel(*sequence));
    host.eventually(&mut watcher, "nothing is charged", |stats| {
        number(stats, "/account/bytes") == 0
    });
}

#[test]
fn a_repeat_over_flight_is_refused_what_comes_in_frames() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let mut keyed = call(json!("x"), 64);
    keyed["idempotency_key"] = json!("k");
    let reply = client.ask(Op::Invoke, keyed.clone());
    assert_eq!(result(&reply), shifted(&ramp(3)));
    let socket = format!("unix:{}", host.directory().join("flight.sock").display());
    let refused = tokio::runtime::Runtime::new().unwrap().block_on(async {
        let endpoint = tonic::transport::Endpoint::from_shared(socket).unwrap();
        let mut flight = FlightServiceClient::new(endpoint.connect_lazy());
        let descriptor = FlightDescriptor::new_cmd(keyed.to_string());
        flight.get_flight_info(descriptor).await
    });
    let status = refused.expect_err("Flight has no frames");
    assert!(status.message().contains("`inline_bytes`"), "{status}");
}

/// Copies `x` to `y`, and the first element of `x2` to `y2`; each output has the shape of its input.
const TWO: &str = "
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
  (memory.copy (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (global.get $bytes)))
  (f64.store (i32.wrap_i64 (global.get $y2)) (f64.load (i32.wrap_i64 (global.get $x2))))
  i32.const 0)";

#[test]
fn of_several_results_some_come_in_the_reply_whichever_is_first() {
    let host = Served::with_plugin(&guest::component("two", TWO), &[]);
    let mut client = host.greeted();
    let big = ramp(8192);
    put(&mut client, "big", 8192);
    let small = inline(2, 0);
    // Twice each: in a worker the second time finds segments granted ahead.
    for small_is_first in [true, false, true, false] {
        let (x, x2) = match small_is_first {
            true => (small.clone(), json!("big")),
            false => (json!("big"), small.clone()),
        };
        let call =
            json!({"kernel": "two/k", "inputs": {"x": x, "x2": x2}, "inline_bytes": INLINE_BYTES});
        let reply = client.ask_inline(Op::Invoke, &call, &bytes(&[4.0, 5.0]));
        let results = reply.accepted()["results"].clone();
        let (of_small, of_big) = match small_is_first {
            true => (&results[0], &results[1]),
            false => (&results[1], &results[0]),
        };
        assert_eq!(number(of_small, "/inline/length"), 16, "{results}");
        assert_eq!(of_small.get("mapping"), None, "{results}");
        assert_eq!(of_big.get("inline"), None, "{results}");
        assert_eq!((&of_big["fd"], reply.fds.len()), (&json!(0), 1));
        let place = &of_big["mapping"]["tensors"][0];
        let there = read(reply.fds[0].as_fd(), number(place, "/offset"), 8192);
        let came = floats(&reply.payload);
        match small_is_first {
            true => assert_eq!((came, there[0]), (vec![4.0, 5.0], big[0])),
            false => assert_eq!((came[0], there), (4.0, big.clone())),
        }
        client.ok(Op::Release, json!({"leases": [of_big["lease"]]}));
    }
}
