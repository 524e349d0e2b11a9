//! Prepared streams: rows come in chunks, and what comes of them is what one invocation gives.

use std::time::Duration;

use serde_json::{Value, json};
use strait_client::wire::{self, Op};
use strait_client::{Dtype, Error, TensorSpec};

use super::{Prepared, bytes};
use crate::guest;
use crate::served::{Frame, Holdings, Random, Raw, Served, number, packet, ramp};

/// Rows of `x` for a stream of `kernel`, at most `most` with `width` columns at a time; `taps` beside them for those that have some.
pub(super) fn prepare(
    client: &mut Raw,
    kernel: &str,
    parameters: &Value,
    (most, width): (u64, u64),
) -> Prepared {
    let mut request = request(
        kernel,
        parameters,
        json!({"dtype": "float64", "shape": [most, width]}),
    );
    request["stream"] = json!(true);
    Prepared::by(client, request)
}

fn request(kernel: &str, parameters: &Value, x: Value) -> Value {
    let mut request = json!({"kernel": kernel, "inputs": {"x": x}, "parameters": parameters});
    if kernel == "fir" {
        request["inputs"]["taps"] = json!("taps");
    }
    request
}

/// A frame with `rows` of `width` columns each, as a chunk or as the last one.
pub(super) fn chunk(prepared: &Prepared, last: bool, rows: &[f64], width: u64) -> Vec<u8> {
    let count = rows.len() as u64 / width;
    let mut payload = wire::sizes(&[count, width]).to_vec();
    payload.extend(bytes(rows));
    payload.resize(
        usize::try_from(number(&prepared.told, "/request_bytes")).unwrap(),
        0xaa,
    );
    frame(last, 5, &payload)
}

pub(super) fn frame(last: bool, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let op = if last { Op::Last } else { Op::Chunk };
    let mut frame = packet(op as u8, sequence, b"");
    frame[12..16].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

impl Prepared {
    /// The outputs of all frames up to the OK to one chunk, appended to `outputs`; the OK.
    pub(crate) fn collect(&self, outputs: &mut [Vec<u8>]) -> Frame {
        loop {
            let reply = self.receive().expect("an answer");
            assert_eq!(reply.sequence(), 5);
            assert!(matches!(reply.op(), Op::Ok | Op::Chunk), "{}", reply.text);
            for (index, output) in outputs.iter_mut().enumerate() {
                let place = &self.told["outputs"][index];
                let rank = place["shape"].as_array().unwrap().len();
                let sizes = &reply.payload[64 * index..64 * (index + 1)];
                let shape = wire::shape(sizes, rank).expect("sizes");
                let whole: Vec<u64> = serde_json::from_value(place["shape"].clone()).unwrap();
                assert_eq!(shape[1..], whole[1..]);
                let length = shape.iter().product::<u64>() * number(place, "/length")
                    / whole.iter().product::<u64>();
                let from = usize::try_from(number(place, "/offset")).unwrap();
                output.extend(&reply.payload[from..from + usize::try_from(length).unwrap()]);
            }
            if reply.op() == Op::Ok {
                return reply;
            }
        }
    }
}

/// What one invocation gives: each output's bytes.
fn whole(
    client: &mut Raw,
    kernel: &str,
    parameters: &Value,
    x: &[f64],
    width: u64,
) -> Vec<Vec<u8>> {
    let length = 8 * x.len() as u64;
    let input = json!({"inline": {"dtype": "float64", "shape": [x.len() as u64 / width, width],
        "offset": 0, "length": length}});
    let mut request = request(kernel, parameters, input);
    request["inline_bytes"] = json!(32_768);
    let reply = client.ask_inline(Op::Invoke, &request, &bytes(x));
    let results = reply.accepted()["results"].clone();
    let results = results.as_array().unwrap().iter().map(|result| {
        let [from, length] = ["/inline/offset", "/inline/length"]
            .map(|field| usize::try_from(number(result, field)).unwrap());
        reply.payload[from..from + length].to_vec()
    });
    results.collect()
}

fn signal(random: &mut Random, count: u64) -> Vec<f64> {
    let special = [f64::NAN, f64::INFINITY, -0.0, 1e300, f64::NEG_INFINITY];
    let mut one = || match random.below(20) {
        0 => *random.one(&special),
        _ => random.below(2000) as f64 / 7.0 - 100.0,
    };
    (0..count).map(|_| one()).collect()
}

#[test]
fn however_the_rows_are_cut_the_result_is_that_of_one_invocation() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let taps = client.create(7);
    taps.fill(&ramp(7));
    client.ok(
        Op::Publish,
        json!({"segment": taps.segment, "name": "taps"}),
    );
    let mut random = Random::new();
    for (kernel, parameters) in [
        ("scale-shift", json!({"a": 3.5, "b": 0.1})),
        ("clip", json!({"lo": -1, "hi": 40.5})),
        ("cast", json!({"to": "float32"})),
        ("cumsum", json!({})),
        ("rolling-mean", json!({"window": 5})),
        ("fir", json!({})),
        ("zscore-running", json!({})),
        ("histogram", json!({"bins": 6, "lo": -50.0, "hi": 50.0})),
        ("filter-finite", json!({})),
    ] {
        let width = if kernel == "filter-finite" {
            1
        } else {
            1 + random.below(3) as u64
        };
        let is_flat = kernel == "filter-finite";
        let outputs = if kernel == "histogram" { 2 } else { 1 };
        for most in [1, 3, 16, 200] {
            let prepared = match is_flat {
                false => prepare(&mut client, kernel, &parameters, (most, width)),
                true => {
                    let mut request = request(
                        kernel,
                        &parameters,
                        json!({"dtype": "float64", "shape": [most]}),
                    );
                    request["stream"] = json!(true);
                    Prepared::by(&mut client, request)
                }
            };
            // One after another over the same socket: nothing of one is in the next.
            for rows in [0, 1, 7, 100] {
                let x = signal(&mut random, rows * width);
                let mut came = vec![Vec::new(); outputs];
                let mut rest = &x[..];
                loop {
                    // Of no rows, too, also as the last one.
                    let take = random
                        .below(1 + usize::try_from(most).unwrap())
                        .min(rest.len() / usize::try_from(width).unwrap());
                    let (now, then) = rest.split_at(take * usize::try_from(width).unwrap());
                    rest = then;
                    let last = rest.is_empty() && random.below(2) == 0;
                    let frame = match is_flat {
                        false => chunk(&prepared, last, now, width),
                        true => flat(&prepared, last, now),
                    };
                    prepared.socket.send(&[&frame], &[]).unwrap();
                    let ok = prepared.collect(&mut came);
                    assert!(last || ok.text.is_empty(), "{}", ok.text);
                    if last {
                        break;
                    }
                }
                let whole = match is_flat {
                    false => whole(&mut client, kernel, &parameters, &x, width),
                    true => whole_flat(&mut client, kernel, &parameters, &x),
                };
                assert_eq!(came, whole, "{kernel} {most} of {rows} rows of {width}");
            }
        }
    }
}

/// The same for tensors with one axis.
pub(crate) fn flat(prepared: &Prepared, last: bool, x: &[f64]) -> Vec<u8> {
    let mut payload = wire::sizes(&[x.len() as u64]).to_vec();
    payload.extend(bytes(x));
    payload.resize(
        usize::try_from(number(&prepared.told, "/request_bytes")).unwrap(),
        0,
    );
    frame(last, 5, &payload)
}

fn whole_flat(client: &mut Raw, kernel: &str, parameters: &Value, x: &[f64]) -> Vec<Vec<u8>> {
    let count = x.len() as u64;
    let input =
        json!({"inline": {"dtype": "float64", "shape": [count], "offset": 0, "length": 8 * count}});
    let mut request = request(kernel, parameters, input);
    request["inline_bytes"] = json!(32_768);
    let reply = client.ask_inline(Op::Invoke, &request, &bytes(x));
    let result = reply.accepted()["results"][0].clone();
    let length = usize::try_from(number(&result, "/inline/length")).unwrap();
    vec![reply.payload[..length].to_vec()]
}

#[test]
fn what_does_not_stream_is_refused_by_name() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let taps = client.create(3);
    taps.fill(&ramp(3));
    client.ok(
        Op::Publish,
        json!({"segment": taps.segment, "name": "taps"}),
    );
    let rows = || json!({"dtype": "float64", "shape": [4, 2]});
    for (kernel, inputs, reason, says) in [
        (
            "zscore",
            json!({"x": rows()}),
            "UNSUPPORTED",
            "does not stream",
        ),
        (
            "cumsum",
            json!({"x": "taps"}),
            "BAD_INPUT",
            "comes in chunks",
        ),
        (
            "fir",
            json!({"x": rows(), "taps": {"dtype": "float64", "shape": [3]}}),
            "BAD_INPUT",
            "comes whole",
        ),
        (
            "scale-shift",
            json!({"x": {"dtype": "float64", "shape": []}}),
            "BAD_INPUT",
            "most rows",
        ),
        (
            "cumsum",
            json!({"x": {"dtype": "float64", "shape": [0, 2]}}),
            "BAD_INPUT",
            "at least 1",
        ),
        ("cumsum", json!({}), "MISSING_INPUT", "`x`"),
    ] {
        let request = json!({"kernel": kernel, "inputs": inputs, "stream": true});
        let message = client
            .ask(Op::Prepare, request)
            .refused("INVALID_ARGUMENT", reason);
        assert!(message.contains(says), "{message}");
    }
}

/// Takes no row before it has as many as its first one says, then all; traps at a row of 2, spins at one of 3. Answers how often it ran.
const GATHERS: &str = "
;; It streams.
(func $step (param $mode i32) (result i32) (local $rows i64) (local $x i32)
  (local.set $rows (i64.load offset=8 (i32.wrap_i64 (global.get $in))))
  (local.set $x (i32.add (i32.wrap_i64 (global.get $x)) (i32.wrap_i64 (i64.load offset=16 (i32.wrap_i64 (global.get $in))))))
  (i32.store (i32.const 3000) (i32.add (i32.load (i32.const 3000)) (i32.const 1)))
  (if (i64.gt_u (local.get $rows) (i64.const 0)) (then
    (if (f64.eq (f64.load (local.get $x)) (f64.const 2)) (then unreachable))
    (if (f64.eq (f64.load (local.get $x)) (f64.const 3)) (then (loop $on (br $on))))
    (if (i32.and (i32.eqz (local.get $mode))
          (f64.lt (f64.convert_i64_u (local.get $rows)) (f64.load (local.get $x))))
      (then (return (i32.const 0))))
    (i64.store offset=24 (i32.wrap_i64 (global.get $in)) (local.get $rows))
    (f64.store (i32.add (i32.wrap_i64 (global.get $y)) (i32.wrap_i64 (i64.load offset=16 (i32.wrap_i64 (global.get $out)))))
      (f64.convert_i32_u (i32.load (i32.const 3000))))
    (i64.store offset=24 (i32.wrap_i64 (global.get $out)) (i64.const 1))))
  i32.const 0)";

fn gathers() -> Vec<u8> {
    guest::component_without_globals("gathers", GATHERS)
}

fn stream_of(client: &mut Raw, most: u64, deadline_ms: u64) -> Prepared {
    let request = json!({"kernel": "gathers/k", "stream": true, "deadline_ms": deadline_ms,
        "inputs": {"x": {"dtype": "float64", "shape": [most]}}});
    Prepared::by(client, request)
}

const NONE: [f64; 0] = [];

#[test]
fn rows_that_are_not_consumed_wait_for_more() {
    let host = Served::with_plugin(&gathers(), &[]);
    let mut client = host.greeted();
    let prepared = stream_of(&mut client, 4, 10_000);
    let send = |last, x: &[f64]| {
        prepared
            .socket
            .send(&[&flat(&prepared, last, x)], &[])
            .unwrap();
        let mut y = vec![Vec::new()];
        prepared.collect(&mut y);
        super::floats(&y[0])
    };
    for _ in 0..2 {
        // Three are asked for: none, none, the third brings all; then chunks larger than what is left of the room.
        assert_eq!(send(false, &[3.5]), NONE);
        assert_eq!(send(false, &[0.0]), NONE);
        assert_eq!(send(false, &[]), NONE);
        assert_eq!(send(false, &[0.0, 0.0]), [4.0]);
        assert_eq!(send(false, &[4.0, 0.0]), NONE);
        // Two fit beside those, and go; then one that is alone, which is less than it asks for.
        assert_eq!(send(false, &[0.0, 0.0, 2.5, 0.0]), [6.0]);
        assert_eq!(send(true, &[]), [8.0]);
    }
    // One that asks for more than there is room for gets nowhere.
    let frame = flat(&prepared, false, &[100.0, 0.0, 0.0, 0.0]);
    prepared.socket.send(&[&frame], &[]).unwrap();
    prepared.collect(&mut [Vec::new()]);
    let frame = flat(&prepared, false, &[0.0]);
    prepared.socket.send(&[&frame], &[]).unwrap();
    let reply = prepared.receive().unwrap();
    let message = reply.refused("INTERNAL", "BAD_ANSWER");
    assert!(
        message.contains("chunk 1 of a stream") && message.contains("consumes none"),
        "{message}"
    );
    assert!(prepared.receive().is_none(), "the stream is over");
}

#[test]
fn an_error_says_which_chunk_and_ends_the_stream() {
    let host = Served::with_plugin(&gathers(), &[]);
    let mut client = host.greeted();
    let mut watcher = host.greeted();
    let before = Holdings::of(&host.eventually(&mut watcher, "at rest", |_| true));
    let good = |prepared: &Prepared| flat(prepared, false, &[0.0]);
    let wrong_rows = |prepared: &Prepared| {
        let mut payload = wire::sizes(&[5]).to_vec();
        payload.resize(
            usize::try_from(number(&prepared.told, "/request_bytes")).unwrap(),
            0,
        );
        frame(false, 5, &payload)
    };
    type Bad<'a> = Box<dyn Fn(&Prepared) -> Vec<u8> + 'a>;
    let cases: Vec<(Bad<'_>, &str, &str)> = vec![
        (
            Box::new(|p| flat(p, false, &[2.0])),
            "INTERNAL",
            "GUEST_TRAP",
        ),
        (
            Box::new(|p| flat(p, true, &[2.0])),
            "INTERNAL",
            "GUEST_TRAP",
        ),
        (
            Box::new(|p| flat(p, false, &[3.0])),
            "DEADLINE_EXCEEDED",
            "DEADLINE",
        ),
        (Box::new(wrong_rows), "INVALID_ARGUMENT", "BAD_INPUT"),
        (
            Box::new(|_| frame(false, 5, &[0; 64])),
            "INVALID_ARGUMENT",
            "BAD_FRAME",
        ),
        (
            Box::new(|_| packet(Op::Call as u8, 5, b"")),
            "INVALID_ARGUMENT",
            "BAD_FRAME",
        ),
    ];
    for (bad, code, reason) in &cases {
        for at in [0, 3] {
            let prepared = stream_of(&mut client, 4, 300);
            for _ in 0..at {
                prepared.socket.send(&[&good(&prepared)], &[]).unwrap();
                prepared.collect(&mut [Vec::new()]);
            }
            // What is on its way behind it belongs to nothing.
            prepared.socket.send(&[&bad(&prepared)], &[]).unwrap();
            prepared.socket.send(&[&good(&prepared)], &[]).unwrap();
            let reply = prepared.receive().unwrap();
            let message = reply.refused(code, reason);
            // A frame that is none of a stream is not its first chunk.
            if at > 0 || *reason != "BAD_FRAME" {
                assert!(
                    message.contains(&format!("chunk {at} of a stream")),
                    "{message}"
                );
                assert_eq!(number(&reply.body(), "/details/chunk"), at);
                assert!(prepared.receive().is_none(), "{reason}: the stream is over");
            }
        }
    }
    // Cancelled while it runs, and left while it waits.
    let prepared = stream_of(&mut client, 4, 60_000);
    prepared
        .socket
        .send(&[&flat(&prepared, false, &[3.0])], &[])
        .unwrap();
    host.eventually(&mut watcher, "it runs", |stats| {
        number(stats, "/running") == 1 && number(stats, "/account/running") == 1
    });
    client.ok(Op::Cancel, json!({"prepared": prepared.number()}));
    prepared
        .receive()
        .unwrap()
        .refused("CANCELLED", "CANCELLED");
    assert!(prepared.receive().is_none());
    let prepared = stream_of(&mut client, 4, 60_000);
    prepared.socket.send(&[&good(&prepared)], &[]).unwrap();
    prepared.collect(&mut [Vec::new()]);
    drop((prepared, client));
    let after = host.settled(&mut watcher);
    assert_eq!(
        Holdings {
            sessions: before.sessions,
            fds: before.fds,
            ..Holdings::of(&after)
        },
        before,
        "nothing is left"
    );
}

#[test]
fn a_stream_has_no_turn_while_it_waits() {
    let host = Served::with_plugin(&gathers(), &[("STRAIT__ENGINE__WORKERS", "1")]);
    let mut client = host.greeted();
    let streams = [(); 3].map(|()| stream_of(&mut client, 4, 60_000));
    let mut counts = [0.0; 3];
    for round in 0..5 {
        for (prepared, count) in streams.iter().zip(&mut counts) {
            prepared
                .socket
                .send(&[&flat(prepared, round == 4, &[1.0])], &[])
                .unwrap();
            let mut y = vec![Vec::new()];
            prepared.collect(&mut y);
            *count += 1.0;
            assert_eq!(super::floats(&y[0]), [*count], "its own state");
        }
    }
    // One that does not read: another one runs meanwhile.
    let deaf = &streams[0];
    deaf.socket.set_nonblocking(true).unwrap();
    let (mut sent, mut refusals) = (0, 0);
    while refusals < 50 {
        match deaf.socket.send(&[&flat(deaf, false, &[1.0])], &[]) {
            Ok(()) => sent += 1,
            Err(_) => {
                refusals += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    let other = &streams[1];
    other
        .socket
        .send(&[&flat(other, true, &[1.0])], &[])
        .unwrap();
    let mut y = vec![Vec::new()];
    other.collect(&mut y);
    assert_eq!(super::floats(&y[0]), [1.0], "a stream anew");
    deaf.socket.set_nonblocking(false).unwrap();
    let mut y = vec![Vec::new()];
    for _ in 0..sent {
        deaf.collect(&mut y);
    }
    let counted: Vec<f64> = (1..=sent).map(f64::from).collect();
    assert_eq!(super::floats(&y[0]), counted);
}

#[test]
fn the_rust_client_streams() {
    let host = Served::with_plugin(&gathers(), &[]);
    let client = strait_client::Client::connect_to(&host.directory()).unwrap();
    let spec = |rows| TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![rows, 2],
    };
    let most = spec(16);
    let mut stream = client.prepare("cumsum").input("x", &most).stream().unwrap();
    assert_eq!(stream.inputs()[0].shape, [16, 2]);
    for round in 0..2 {
        let x = ramp(100);
        let mut sums: Vec<f64> = Vec::new();
        for rows in x.chunks(14) {
            let came = stream.chunk(&[rows.into()]).unwrap();
            assert!(came.notes.is_empty());
            sums.extend(came.tensor("y").unwrap().as_slice::<f64>().unwrap());
        }
        let came = stream.last(&[(&[0.0; 0][..]).into()]).unwrap();
        assert_eq!(came.tensor("y").unwrap().shape(), [0, 2]);
        let mut sum = [0.0; 2];
        for (at, y) in sums.iter().enumerate() {
            sum[at % 2] += x[at];
            assert_eq!(*y, sum[at % 2], "{round} {at}");
        }
        assert_eq!(sums.len(), x.len());
    }
    // More than was prepared, and a part of a row: not sent.
    for wrong in [34, 3] {
        let refused = stream.chunk(&[(&ramp(wrong)[..]).into()]).unwrap_err();
        assert!(
            matches!(refused, Error::Shape { .. } | Error::Length { .. }),
            "{refused}"
        );
    }
    let one = TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![4],
    };
    let mut stream = client
        .prepare("gathers/k")
        .input("x", &one)
        .stream()
        .unwrap();
    stream.chunk(&[(&[0.0][..]).into()]).unwrap();
    let Err(Error::Remote(failure)) = stream.chunk(&[(&[2.0][..]).into()]) else {
        panic!("it traps");
    };
    assert_eq!(
        (&*failure.reason, &failure.details["chunk"]),
        ("GUEST_TRAP", &json!(1))
    );
    let over = stream.chunk(&[(&[0.0][..]).into()]).unwrap_err();
    assert!(matches!(over, Error::Disconnected), "{over}");
    let refused = client
        .prepare("zscore")
        .input("x", &most)
        .stream()
        .unwrap_err();
    assert!(matches!(refused, Error::Remote(failure) if failure.reason == "UNSUPPORTED"));
}
