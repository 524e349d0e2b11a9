//! A bad network between client and host: slow, cut off anywhere, or with bytes that were changed.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::served::{Holdings, Random, Raw};

/// What it does to the bytes of one direction.
#[derive(Clone, Copy)]
enum Fault {
    None,
    /// At most so many bytes at a time, and a pause before each.
    Slow(usize, Duration),
    /// Nothing more after so many bytes: the connection is closed.
    Cut(usize),
    /// The byte there is another.
    Change(usize),
}

/// Passes on what comes, until either side ends.
async fn pass(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    fault: Fault,
) {
    let mut passed = 0;
    let mut buffer = vec![0; 64 << 10];
    let most = match fault {
        Fault::Slow(most, _) => most,
        _ => buffer.len(),
    };
    while let Ok(count @ 1..) = from.read(&mut buffer[..most]).await {
        let bytes = &mut buffer[..count];
        match fault {
            Fault::Slow(_, pause) => tokio::time::sleep(pause).await,
            Fault::Cut(at) if passed + count > at => {
                let _ = to.write_all(&bytes[..at.saturating_sub(passed)]).await;
                return;
            }
            Fault::Change(at) if (passed..passed + count).contains(&at) => bytes[at - passed] ^= 1,
            Fault::None | Fault::Cut(_) | Fault::Change(_) => {}
        }
        passed += count;
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}

/// A way to the host with those faults to it, and from it.
async fn through(host: SocketAddr, faults: (Fault, Fault)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(server) = TcpStream::connect(host).await else {
                    return;
                };
                let _ = server.set_nodelay(true);
                let (from_client, to_client) = client.into_split();
                let (from_host, to_host) = server.into_split();
                // The end of one direction is the end of both.
                tokio::select! {
                    () = pass(from_client, to_host, faults.0) => {}
                    () = pass(from_host, to_client, faults.1) => {}
                }
            });
        }
    });
    address
}

fn with_token() -> (Rig, String) {
    let mut made = String::new();
    let rig = Rig::start(|directory, _| {
        made = token(directory, &["alice"]);
        vec!["--tokens".into(), path(directory, "tokens.toml")]
    });
    (rig, made)
}

async fn dial(rig: &Rig, faults: (Fault, Fault)) -> Dial {
    Dial {
        address: through(rig.address, faults).await,
        ..rig.dial()
    }
}

#[test]
fn a_slow_network_changes_nothing() {
    let (rig, token) = with_token();
    let slow = Fault::Slow(1_300, Duration::from_micros(200));
    blocking(async {
        let mut client = dial(&rig, (slow, slow)).await.client().await.unwrap();
        put(&mut client, &token, "x", &ramp(50_000)).await.unwrap();
        let read = get(&mut client, &token, Ticket::new("x")).await.unwrap();
        assert!(read.into_iter().eq((0..50_000).map(f64::from)));
        let invoke = serde_json::json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2, "b": 1}});
        let called = info(
            &mut client,
            &token,
            FlightDescriptor::new_cmd(invoke.to_string()),
        )
        .await
        .unwrap();
        let ticket = called.endpoint[0].ticket.clone().unwrap();
        let read = get(&mut client, &token, ticket).await.unwrap();
        assert!(
            read.into_iter()
                .eq((0..50_000).map(|x| 2.0 * f64::from(x) + 1.0))
        );
    });
}

/// Puts and reads over a connection with those faults; whether it all went well.
async fn use_it(rig: &Rig, token: &str, faults: (Fault, Fault), flight: &str) -> bool {
    let Ok(mut client) = dial(rig, faults).await.client().await else {
        return false;
    };
    let uploaded = put(&mut client, token, flight, &ramp(20_000)).await;
    let read = get(&mut client, token, Ticket::new(flight.to_owned())).await;
    match read {
        Ok(read) => {
            assert!(
                read.into_iter().eq((0..20_000).map(f64::from)),
                "what is read is whole"
            );
            uploaded.is_ok()
        }
        Err(_) => false,
    }
}

#[test]
fn wherever_a_connection_is_cut_or_changed_nothing_is_left_and_nothing_is_false() {
    let (rig, token) = with_token();
    let mut watcher: Raw = rig.host.greeted();
    let before = Holdings::of(&rig.host.settled(&mut watcher));
    let mut random = Random::new();
    blocking(async {
        let all = (Fault::None, Fault::None);
        assert!(use_it(&rig, &token, all, "whole").await);
        let mut client = rig.client().await;
        for n in 0..40 {
            // Within the handshake, the upload (160 KB), the answers, or beyond all of it.
            let at = random.below(180_000) >> (n % 8);
            let fault = match n % 2 {
                0 => Fault::Cut(at),
                _ => Fault::Change(at),
            };
            let faults = match n % 4 {
                0 | 1 => (fault, Fault::None),
                _ => (Fault::None, fault),
            };
            let name = format!("x{n}");
            use_it(&rig, &token, faults, &name).await;
            // It is there as a whole, or not at all.
            if listed(&mut client, &token).await.unwrap().contains(&name) {
                let read = get(&mut client, &token, Ticket::new(name.clone()))
                    .await
                    .unwrap();
                assert!(read.into_iter().eq((0..20_000).map(f64::from)), "{name}");
                act(&mut client, &token, "drop", name).await.unwrap();
            }
        }
        act(&mut client, &token, "drop", "whole").await.unwrap();
    });
    rig.host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == before
    });
}
