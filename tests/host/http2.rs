//! HTTP/2 that no decent client sends, in raw frames on `flight.sock`: floods, bombs, streams that hang,
//! and uploads whose message heads were tampered with. The host stays, its memory is bounded, and a
//! stock client is served afterwards.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{Float64Array, Int32Array, RecordBatch};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Criteria, FlightData, FlightDescriptor, Ticket};
use arrow_schema::{DataType, Field, Schema};
use futures::{TryStreamExt, stream};
use serde_json::json;
use strait_client::wire::Op;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::served::{Holdings, Random, Raw, Served, number, put};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What the host's memory may grow by, whatever a client sends: stacks and buffers included.
const GROWTH: u64 = 128 << 20;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [head, payload.to_vec()].concat()
}

/// A field of a header block, not indexed, not compressed.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    [vec![0], text(name), text(value)].concat()
}

/// The header block of a call.
fn call(method: &str) -> Vec<u8> {
    let path = format!("/arrow.flight.protocol.FlightService/{method}");
    let post_over_http = vec![0x83, 0x86];
    [
        post_over_http,
        literal(":path", &path),
        literal(":authority", "localhost"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat()
}

fn headers(stream: u32, method: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &call(method))
}

/// A gRPC message.
fn message(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[0], &length[..], body].concat()
}

/// A ticket for the flight `x`.
fn ticket() -> Vec<u8> {
    message(&[0x0a, 1, b'x'])
}

struct Rig {
    host: Served,
    watcher: Raw,
    before: Holdings,
    resident: u64,
}

impl Rig {
    fn new() -> Self {
        let host = Served::start(&[]);
        let mut watcher = host.greeted();
        put(&mut watcher, "x", 1 << 20);
        let rig = |stats: &serde_json::Value| {
            (
                Holdings::of(stats),
                number(stats, "/process/resident_bytes"),
            )
        };
        stock(&host);
        let (before, resident) = rig(&host.settled(&mut watcher));
        Self {
            host,
            watcher,
            before,
            resident,
        }
    }

    /// A connection that has sent nothing.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.host.directory().join("flight.sock")).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    /// One that has sent `bytes` after the preface. The host may have closed it before their end.
    fn sent(&self, bytes: &[u8]) -> UnixStream {
        let mut stream = self.connect();
        let _ = stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), bytes].concat());
        stream
    }

    /// Sends `bytes` again and again without reading, until the host closes, or reads no more, or `most`
    /// times; answers how often.
    fn flood(&self, first: &[u8], most: u32, mut bytes: impl FnMut(u32) -> Vec<u8>) -> u32 {
        let mut stream = self.sent(first);
        let sent = (0..most).find(|n| stream.write_all(&bytes(*n)).is_err());
        sent.unwrap_or(most)
    }

    fn check(&mut self, what: &str) {
        stock(&self.host);
        let stats = self.host.eventually(
            &mut self.watcher,
            &format!("as before, after {what}: {:?}", self.before),
            |stats| Holdings::of(stats) == self.before,
        );
        let grown = number(&stats, "/process/resident_bytes").saturating_sub(self.resident);
        assert!(grown < GROWTH, "{grown} bytes more after {what}");
    }
}

fn blocking<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(future)
}

async fn client(host: &Served) -> FlightServiceClient<Channel> {
    let address = format!("unix:{}", host.directory().join("flight.sock").display());
    let endpoint = Endpoint::from_shared(address).unwrap();
    FlightServiceClient::new(endpoint.connect().await.unwrap())
}

/// A stock client lists.
async fn listed(client: &mut FlightServiceClient<Channel>) {
    let listed = client.list_flights(Criteria::default()).await.unwrap();
    let listed: Vec<_> = listed.into_inner().try_collect().await.unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
}

/// It lists and reads.
fn stock(host: &Served) {
    blocking(async {
        let mut client = client(host).await;
        listed(&mut client).await;
        let stream = client.do_get(Ticket::new("x")).await.unwrap().into_inner();
        let messages: Vec<FlightData> = stream.try_collect().await.unwrap();
        let bytes: usize = messages.iter().map(|message| message.data_body.len()).sum();
        assert_eq!(bytes, 8 << 20);
    });
}

#[test]
fn floods_of_frames_are_bounded() {
    let mut rig = Rig::new();
    let stream = |n: u32| 2 * n + 1;
    let began = Instant::now();
    rig.flood(&[], 20_000, |n| {
        let reset = frame(RST_STREAM, 0, stream(n), &8_u32.to_be_bytes());
        [headers(stream(n), "ListFlights"), reset].concat()
    });
    rig.check("a rapid reset");
    rig.flood(&[], 20_000, |n| {
        let get = frame(DATA, END_STREAM, stream(n), &ticket());
        let reset = frame(RST_STREAM, 0, stream(n), &8_u32.to_be_bytes());
        [headers(stream(n), "DoGet"), get, reset].concat()
    });
    rig.check("a rapid reset of reads");
    let open = frame(HEADERS, 0, 1, &call("ListFlights"));
    for (name, part) in [
        ("empty", vec![]),
        ("short", literal("x-more", "1")),
        ("long", literal("x-more", &"y".repeat(100)).repeat(100)),
    ] {
        let part = frame(CONTINUATION, 0, 1, &part);
        let sent = rig.flood(&open, 100_000, |_| part.clone());
        assert!(sent < 100_000, "{name} CONTINUATIONs without end");
        rig.check("a flood of CONTINUATION");
    }
    rig.flood(&[], 200_000, |_| frame(PING, 0, 0, b"12345678"));
    rig.check("a flood of PING");
    rig.flood(&[], 200_000, |n| {
        let window = [&[0, 4][..], &(65_535 + n).to_be_bytes()].concat();
        frame(SETTINGS, 0, 0, &window)
    });
    rig.check("a flood of SETTINGS");
    rig.flood(&[], 200_000, |n| {
        frame(PRIORITY, 0, stream(n), &[0, 0, 0, 0, 1])
    });
    rig.check("a flood of PRIORITY");
    rig.flood(&headers(1, "DoPut"), 200_000, |_| frame(DATA, 0, 1, &[]));
    rig.check("a flood of empty DATA");
    rig.flood(&[], 200_000, |_| frame(0xee, 0xff, 0, &[7; 32]));
    rig.check("a flood of unknown frames");
    let took = began.elapsed();
    assert!(took < Duration::from_secs(50), "{took:?}");
}

#[test]
fn frames_that_are_wrong_end_their_connection_or_stream() {
    let mut rig = Rig::new();
    for bytes in [
        &b""[..],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\x0b",
        b"PRI * HTTP/2.0\r\n\r\nSM",
        &[PREFACE, PREFACE].concat(),
        &[PREFACE, &headers(1, "ListFlights")].concat(),
    ] {
        let mut stream = rig.connect();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // The end, and no timeout; a reset is an end, too.
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset,
                "{bytes:?}"
            );
        }
    }
    rig.check("bad prefaces");
    let list = headers(1, "ListFlights");
    let update = |stream: u32, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    let huge = literal("x-long", &"y".repeat(120)).repeat(8000);
    let parts: Vec<u8> = [frame(HEADERS, 0, 1, &call("ListFlights"))]
        .into_iter()
        .chain(
            huge.chunks(16_000)
                .map(|part| frame(CONTINUATION, 0, 1, part)),
        )
        .chain([frame(CONTINUATION, END_HEADERS, 1, &[])])
        .flatten()
        .collect();
    // A field of 4 KiB in the table, and then 12000 references to it in one block.
    let indexed = [0x40, 1, b'z', 0x7f, 0xa1, 0x1e].to_vec();
    let bomb = [indexed, vec![b'a'; 4000], vec![0xbe; 12_000]].concat();
    #[rustfmt::skip]
    let table = [
        ("a window of 0", update(0, 0)),
        ("a stream's window of 0", [list.clone(), update(1, 0)].concat()),
        ("too large a window", [update(0, 0x7fff_ffff), update(0, 0x7fff_ffff)].concat()),
        ("too large a stream's window", [list.clone(), update(1, 0x7fff_ffff), update(1, 0x7fff_ffff)].concat()),
        ("a window of an idle stream", update(77, 1)),
        ("large headers", parts),
        ("a bomb of headers", frame(HEADERS, END_HEADERS, 1, &bomb)),
        ("a frame of 16 MiB", frame(DATA, 0, 1, &vec![0; (1 << 24) - 1])),
        ("headers on stream 0", headers(0, "ListFlights")),
        ("headers on an even stream", headers(2, "ListFlights")),
        ("headers on an older stream", [headers(9, "ListFlights"), headers(3, "ListFlights")].concat()),
        ("data on an idle stream", frame(DATA, 0, 5, b"data")),
        ("data on stream 0", frame(DATA, 0, 0, b"data")),
        ("data after the end", [list.clone(), frame(DATA, END_STREAM, 1, &message(b"")), frame(DATA, 0, 1, b"more")].concat()),
        ("a promise", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])),
        ("half of SETTINGS", frame(SETTINGS, 0, 0, &[0, 4, 0])),
        ("SETTINGS of a stream", frame(SETTINGS, 0, 1, &[])),
        ("SETTINGS beyond 2^31", frame(SETTINGS, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff])),
        ("a short PING", frame(PING, 0, 0, b"1234567")),
        ("a reset of an idle stream", frame(RST_STREAM, 0, 9, &[0; 4])),
        ("a CONTINUATION of nothing", frame(CONTINUATION, END_HEADERS, 1, &call("ListFlights"))),
        ("something within headers", [frame(HEADERS, 0, 1, &call("ListFlights")), frame(PING, 0, 0, b"12345678")].concat()),
        ("more padding than there is", frame(DATA, 8, 1, &[255, 0])),
        ("an index beyond the table", frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff, 0xff, 0x7f])),
        ("an endless integer", frame(HEADERS, END_HEADERS, 1, &[0xff; 64])),
        ("a string beyond its block", frame(HEADERS, END_HEADERS, 1, &[0, 0x7f, 0xff, 0x7f])),
        ("no path", frame(HEADERS, END_HEADERS, 1, &[0x83, 0x86])),
        ("a length of 4 GiB", [headers(1, "DoGet"), frame(DATA, END_STREAM, 1, &[0, 0xff, 0xff, 0xff, 0xff, 0x0a])].concat()),
        ("a compressed message", [headers(1, "DoGet"), frame(DATA, END_STREAM, 1, &[1, 0, 0, 0, 3, 0x0a, 1, b'x'])].concat()),
    ];
    for (what, bytes) in table {
        let mut stream = rig.sent(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // Whether by GOAWAY, by a reset or with an answer: it ends.
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{what}");
        }
        drop(stream);
        stock(&rig.host);
    }
    rig.check("wrong frames");
}

/// Streams that have begun and do not go on: uploads without an end, reads without a window. The places
/// for reads and uploads are taken then, and for nothing else.
#[test]
fn streams_that_hang_hold_up_nobody_else() {
    let mut rig = Rig::new();
    let streams = || (0..1000).map(|n| 2 * n + 1);
    let uploads: Vec<u8> = streams().flat_map(|n| headers(n, "DoPut")).collect();
    let no_window = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    let read = |n: u32| [headers(n, "DoGet"), frame(DATA, END_STREAM, n, &ticket())].concat();
    let reads: Vec<u8> = streams().take(200).flat_map(read).collect();
    let half: Vec<u8> = streams()
        .flat_map(|n| [headers(n, "DoPut"), frame(DATA, 0, n, &[0, 0, 1, 0, 0, 1])].concat())
        .collect();
    let mut open = vec![
        rig.sent(&uploads),
        rig.sent(&half),
        rig.sent(&[no_window, reads].concat()),
        rig.sent(&frame(HEADERS, 0, 1, &call("ListFlights"))),
        rig.sent(&[0, 0]),
    ];
    open.extend((0..100).map(|_| rig.connect()));
    std::thread::sleep(Duration::from_millis(300));
    blocking(async { listed(&mut client(&rig.host).await).await });
    let stats = rig.watcher.ok(Op::Stats, json!({}));
    let grown = number(&stats, "/process/resident_bytes").saturating_sub(rig.resident);
    assert!(grown < GROWTH, "{grown} bytes more for streams that hang");
    drop(open);
    rig.check("streams that hang");
}

#[test]
fn a_valid_session_with_wrong_bytes_does_no_harm() {
    let mut rig = Rig::new();
    let mut random = Random::new();
    let valid = [
        frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]),
        headers(1, "ListFlights"),
        frame(DATA, END_STREAM, 1, &message(b"")),
        headers(3, "DoGet"),
        frame(DATA, END_STREAM, 3, &ticket()),
        frame(WINDOW_UPDATE, 0, 0, &[0, 1, 0, 0]),
        headers(5, "DoAction"),
        frame(DATA, END_STREAM, 5, &message(b"\x0a\x05stats")),
        frame(PING, 0, 0, b"12345678"),
    ]
    .concat();
    for _ in 0..400 {
        let mut bytes = valid.clone();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.next().to_le_bytes()[0],
                2 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let mut stream = rig.sent(&bytes);
        // Some read a little first.
        if random.below(4) == 0 {
            let _ = stream.read(&mut [0; 1000]);
        }
    }
    rig.check("sessions with wrong bytes");
}

/// A valid upload of two columns and three batches.
async fn upload() -> Vec<FlightData> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("a", DataType::Float64, false),
        Field::new("b", DataType::Int32, false),
    ]));
    let batch = |start: i32| {
        let a: Float64Array = (0..100).map(|i| f64::from(i + start)).collect();
        let b: Int32Array = (start..start + 100).collect();
        RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(a), Arc::new(b)]).unwrap()
    };
    let batches = [0, 100, 200].map(|start| Ok(batch(start)));
    FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(FlightDescriptor::new_path(vec!["up".to_owned()])))
        .build(stream::iter(batches))
        .try_collect()
        .await
        .unwrap()
}

#[test]
fn an_upload_with_wrong_bytes_is_refused_or_is_what_it_says() {
    let mut rig = Rig::new();
    let mut random = Random::new();
    let (mut taken, mut refused) = (0, 0);
    blocking(async {
        let valid = upload().await;
        let mut client = client(&rig.host).await;
        for round in 0..600 {
            let mut data = valid.clone();
            for _ in 0..1 + random.below(3) {
                let index = random.below(data.len());
                let mut head = data[index].data_header.to_vec();
                let at = random.below(head.len());
                match random.below(6) {
                    0 => head[at] ^= 1 << random.below(8),
                    1 => head[at] = random.next().to_le_bytes()[0],
                    // A number of some size where there may be one: 4 or 8 bytes.
                    2 | 3 => {
                        let number = *random.one(&[0, 1, u64::MAX, 1 << 31, 1 << 62, 65_536]);
                        let at = at / 8 * 8;
                        let width = (*random.one(&[4, 8])).min(head.len() - at);
                        head[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
                    }
                    4 => head.truncate(at.max(1)),
                    _ => {
                        let body = data[index].data_body.len();
                        let keep = random.below(body + 1);
                        data[index].data_body = data[index].data_body.slice(..keep);
                    }
                }
                data[index].data_header = head.into();
            }
            let result = match client.do_put(stream::iter(data)).await {
                Ok(results) => results.into_inner().try_collect::<Vec<_>>().await,
                Err(status) => Err(status),
            };
            match result {
                Ok(_) => {
                    taken += 1;
                    let read = client.do_get(Ticket::new("up")).await.unwrap();
                    let read: Vec<FlightData> = read.into_inner().try_collect().await.unwrap();
                    assert!(!read.is_empty());
                    let drop = arrow_flight::Action::new("drop", "up");
                    let dropped = client.do_action(drop).await.unwrap().into_inner();
                    dropped.try_collect::<Vec<_>>().await.unwrap();
                }
                Err(status) => {
                    refused += 1;
                    let expected = [
                        Code::InvalidArgument,
                        Code::ResourceExhausted,
                        Code::Unimplemented,
                    ];
                    assert!(
                        expected.contains(&status.code()),
                        "round {round}: {status:?}"
                    );
                    assert!(status.message().len() > 12, "round {round}: {status:?}");
                }
            }
        }
    });
    eprintln!("{taken} taken, {refused} refused");
    assert!(
        taken > 20 && refused > 200,
        "{taken} taken, {refused} refused"
    );
    rig.check("uploads with wrong bytes");
}
