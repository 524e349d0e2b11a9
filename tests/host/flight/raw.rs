//! HTTP/2 by hand: bytes that no gRPC library would send.

use std::time::Duration;

use arrow_flight::Empty;
use strait::session::FlightState;

use super::{MIB, Rig, eventually, f64s, floats, path, state, within};

/// What gRPC C++ sends for a unix socket: `%2F` in `:authority`.
#[tokio::test(flavor = "multi_thread")]
async fn an_encoded_path_as_authority_is_no_obstacle() {
    let rig = Rig::new().await;
    rig.put("x", floats(3)).await.unwrap();
    let socket = tokio::net::UnixStream::connect(rig.directory.path().join("flight.sock"))
        .await
        .unwrap();
    let answer = raw_list_actions(socket).await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("One result for each kernel"), "{text}");
    rig.end().await;
}

/// One ListActions in HTTP/2 by hand; answers what came back until the trailers or a reset.
async fn raw_list_actions(mut socket: tokio::net::UnixStream) -> Vec<u8> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let sent = [
        PREFACE.to_vec(),
        frame(4, 0, 0, b""),
        frame(1, 4, 1, &headers("ListActions")),
        frame(0, 1, 1, &[0; 5]),
    ]
    .concat();
    // A byte at a time: the repair has no other bytes to look at.
    for byte in sent {
        socket.write_all(&[byte]).await.unwrap();
        socket.flush().await.unwrap();
    }
    let mut answer = Vec::new();
    loop {
        let mut header = [0; 9];
        socket.read_exact(&mut header).await.unwrap();
        let length =
            usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let mut payload = vec![0; length];
        socket.read_exact(&mut payload).await.unwrap();
        let (kind, ends) = (header[3], header[4] & 1 != 0 && header[3] != 4);
        answer.extend(payload);
        if ends || kind == 3 || kind == 7 {
            return answer;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_grpc_do_no_harm() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rig = Rig::new().await;
    let preface = PREFACE;
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        [preface, &[0xff; 64]].concat(),
        [preface, &[0, 0, 4, 1, 0x0c, 0, 0, 0, 1, 0xff, 0, 0, 0]].concat(),
    ] {
        let mut socket = tokio::net::UnixStream::connect(rig.directory.path().join("flight.sock"))
            .await
            .unwrap();
        socket.write_all(&garbage).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // The host closes; whether it says why is HTTP/2's affair.
        let _ = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer))
            .await
            .unwrap();
    }
    rig.put("x", floats(3)).await.unwrap();
    rig.end().await;
}

/// The day this fails h2 takes `%` in an authority, and `host/flight/authority.rs` can go.
#[tokio::test]
async fn h2_alone_refuses_the_authority_of_grpc_cpp() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    let incoming = futures::stream::iter([Ok::<_, std::io::Error>(theirs)]);
    let routes = tonic::service::Routes::default();
    let server = tonic::transport::Server::builder().add_routes(routes);
    let served = tokio::spawn(server.serve_with_incoming(incoming));
    let call = [
        PREFACE.to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 5, 1, &headers("ListActions")),
    ];
    ours.write_all(&call.concat()).await.unwrap();
    let kind = loop {
        let mut head = [0; 9];
        ours.read_exact(&mut head).await.unwrap();
        let [a, b, c, kind, _, _, _, _, stream] = head;
        let length = u32::from_be_bytes([0, a, b, c]);
        let mut payload = vec![0; length as usize];
        ours.read_exact(&mut payload).await.unwrap();
        if stream == 1 {
            break kind;
        }
    };
    assert_eq!(kind, 3, "RST_STREAM; 1 would be an answer");
    drop(ours);
    served.await.unwrap().unwrap();
}

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame of HTTP/2.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a call.
fn headers(method: &str) -> Vec<u8> {
    let literal = |name: &str, value: &str| {
        let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        [vec![0x40], text(name), text(value)].concat()
    };
    let path = format!("/arrow.flight.protocol.FlightService/{method}");
    [
        vec![0x83, 0x86],
        literal(":path", &path),
        literal(":authority", "tmp%2Fa%2Fflight.sock"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat()
}

/// A DoGet of `x` whose client has room for everything, and says so.
pub(super) fn raw_do_get() -> Vec<u8> {
    let window = (1_u32 << 30).to_be_bytes();
    let settings = [&[0, 4], &window[..]].concat();
    let ticket = [&[0, 0, 0, 0, 3, 0x0a, 1], &b"x"[..]].concat();
    [
        PREFACE.to_vec(),
        frame(4, 0, 0, &settings),
        frame(8, 0, 0, &window),
        frame(1, 4, 1, &headers("DoGet")),
        frame(0, 1, 1, &ticket),
    ]
    .concat()
}

pub(super) async fn raw(directory: &std::path::Path, sent: &[u8]) -> tokio::net::UnixStream {
    use tokio::io::AsyncWriteExt;
    let socket = directory.join("flight.sock");
    let mut socket = tokio::net::UnixStream::connect(socket).await.unwrap();
    socket.write_all(sent).await.unwrap();
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_must_go_on_with_what_it_began() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rig = Rig::with(|config| {
        config.server.request_ms = Some(300);
        config.server.stall_ms = Some(600);
    })
    .await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let settings = frame(4, 0, 0, b"");
    let block = headers("ListActions");
    for begun in [
        vec![],
        PREFACE[..10].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &settings, &[0, 0]].concat(),
        [PREFACE, &settings, &frame(1, 0, 1, &block[..20])].concat(),
        [PREFACE, &settings, &frame(1, 4, 1, &block)[..20]].concat(),
    ] {
        let mut socket = raw(rig.directory.path(), &begun).await;
        let mut answer = Vec::new();
        // What it says, if anything, is HTTP/2's affair.
        let _ = within(
            "the end of what was only begun",
            socket.read_to_end(&mut answer),
        )
        .await;
    }
    // Byte by byte, each in time, the whole too late.
    let mut socket = raw(rig.directory.path(), &[]).await;
    let dripped = async {
        for byte in PREFACE {
            if socket.write_all(&[*byte]).await.is_err() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        false
    };
    assert!(within("the drip ends", dripped).await);
    // Whole, and then silent: an idle connection.
    let idle = rig.client().await;
    let mut quiet = raw(rig.directory.path(), &[PREFACE, &settings].concat()).await;
    // One that takes nothing of what it asked for.
    let mut deaf = raw(rig.directory.path(), &raw_do_get()).await;
    eventually("it is read for", || {
        state(&rig, "x").0 == FlightState::Streaming
    })
    .await;
    eventually("it is no longer waited for", || {
        state(&rig, "x") == (FlightState::Uploaded, 0)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut answer = Vec::new();
    let _ = within("the deaf one's end", deaf.read_to_end(&mut answer)).await;
    assert!(answer.len() < 64 * MIB, "{}", answer.len());
    idle.clone().list_actions(Empty {}).await.unwrap();
    quiet.write_all(&frame(1, 5, 1, &block)).await.unwrap();
    let mut start = [0; 9];
    within("an answer", quiet.read_exact(&mut start))
        .await
        .unwrap();
    drop((idle, quiet));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_do_no_harm() {
    use tokio::io::AsyncWriteExt;
    let rig = Rig::with(|config| {
        config.server.request_ms = Some(500);
        config.server.stall_ms = Some(500);
    })
    .await;
    rig.put("x", floats(8 * MIB)).await.unwrap();
    let used = rig.used();
    let start = [PREFACE, &frame(4, 0, 0, b"")].concat();
    let get = headers("DoGet");
    let ticket = [&[0, 0, 0, 0, 3, 0x0a, 1], &b"x"[..]].concat();
    let ids = || (0..20_000_u32).map(|n| 2 * n + 1);
    let floods: [(&str, Vec<u8>); 7] = [
        (
            "calls that are reset at once",
            ids()
                .flat_map(|id| [frame(1, 4, id, &get), frame(3, 0, id, &[0, 0, 0, 8])].concat())
                .collect(),
        ),
        (
            "reads that are reset at once",
            ids()
                .flat_map(|id| {
                    let read = [frame(1, 4, id, &get), frame(0, 1, id, &ticket)].concat();
                    [read, frame(3, 0, id, &[0, 0, 0, 8])].concat()
                })
                .collect(),
        ),
        (
            "more calls than there may be",
            ids().flat_map(|id| frame(1, 4, id, &get)).collect(),
        ),
        (
            "a header block without end",
            std::iter::once(frame(1, 0, 1, &get))
                .chain((0..100_000).map(|_| frame(9, 0, 1, &[0x82])))
                .flatten()
                .collect(),
        ),
        ("pings", frame(6, 0, 0, &[0; 8]).repeat(100_000)),
        ("settings", frame(4, 0, 0, b"").repeat(100_000)),
        (
            "empty data",
            [frame(1, 4, 1, &get), frame(0, 0, 1, b"").repeat(100_000)].concat(),
        ),
    ];
    for (what, flood) in floods {
        let mut socket = raw(rig.directory.path(), &start).await;
        // Until the host has had enough; nothing is read.
        let sent = tokio::time::timeout(Duration::from_secs(2), socket.write_all(&flood)).await;
        rig.info(path("x")).await.unwrap();
        assert_eq!(
            f64s(&rig.get("x").await.unwrap()).len(),
            8 * MIB,
            "{what}: {sent:?}"
        );
        drop(socket);
        eventually(what, || state(&rig, "x") == (FlightState::Uploaded, 0)).await;
        eventually(what, || rig.used() == used).await;
    }
    rig.end().await;
}
