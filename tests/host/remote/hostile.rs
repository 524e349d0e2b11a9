//! Clients that keep a host busy before, or without, saying who they are.

use std::io::Read;

use tokio::io::AsyncWriteExt;

use super::*;
use crate::served::number;

fn with_token() -> (Rig, String) {
    let mut made = String::new();
    let rig = Rig::start(|directory, _| {
        made = token(directory, &["alice"]);
        let file = path(directory, "tokens.toml");
        vec!["--tokens".into(), file]
    });
    (rig, made)
}

fn descriptors(rig: &Rig) -> u64 {
    let mut watcher = rig.host.greeted();
    let stats = watcher.ok(strait_client::wire::Op::Stats, serde_json::json!({}));
    number(&stats, "/process/fds")
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn abandoned_handshakes_are_few_and_do_not_last() {
    let (rig, token) = with_token();
    let before = descriptors(&rig);
    // Some say nothing, some a part of a hello.
    let idle: Vec<_> = (0..400)
        .map(|n| {
            let mut stream = std::net::TcpStream::connect(rig.address).unwrap();
            if n % 2 == 0 {
                // The host may be done with it already.
                let _ = std::io::Write::write_all(&mut stream, &[0x16, 3, 1, 2, 0, 1]);
            }
            stream
        })
        .collect();
    blocking(async {
        listed(&mut rig.client().await, &token).await.unwrap();
    });
    let held = descriptors(&rig);
    assert!(held < before + 300, "{held} descriptors, {before} before");
    eventually("all of them given up", || descriptors(&rig) <= before + 2);
    for mut stream in idle {
        let mut rest = Vec::new();
        // Closed or reset: its end.
        let _ = stream.read_to_end(&mut rest);
    }
}

#[test]
fn connections_that_say_nothing_after_the_handshake_do_not_last() {
    let (rig, token) = with_token();
    let before = descriptors(&rig);
    blocking(async {
        let dial = rig.dial();
        let mut idle = Vec::new();
        for _ in 0..300 {
            let mut stream = dial.handshake().await.unwrap();
            // What HTTP/2 begins with, and no call.
            let _ = stream
                .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
                .await;
            idle.push(stream);
        }
        listed(&mut rig.client().await, &token).await.unwrap();
        let held = descriptors(&rig);
        assert!(held < before + 290, "{held} descriptors, {before} before");
        eventually("strangers are gone", || descriptors(&rig) <= before + 3);
        drop(idle);
    });
}

#[test]
fn a_flood_of_key_updates_ends_its_connection_only() {
    let (rig, token) = with_token();
    blocking(async {
        let mut client = rig.client().await;
        put(&mut client, &token, "x", &ramp(100_000)).await.unwrap();
        let mut flood = rig.dial().handshake().await.unwrap();
        let mut sent = 0;
        let ended = async {
            loop {
                // Each asks the host to answer with one of its own.
                if flood.get_mut().1.refresh_traffic_keys().is_err() {
                    return;
                }
                if flood.flush().await.is_err() {
                    return;
                }
                sent += 1;
            }
        };
        let end = tokio::time::timeout(Duration::from_secs(30), ended).await;
        assert!(
            end.is_ok(),
            "{sent} key updates, and the host still listens"
        );
        // Meanwhile and after it others are served.
        assert_eq!(
            get(&mut client, &token, Ticket::new("x"))
                .await
                .unwrap()
                .len(),
            100_000
        );
        listed(&mut rig.client().await, &token).await.unwrap();
    });
}

#[test]
fn who_guesses_tokens_waits_longer_and_longer() {
    let (rig, token) = with_token();
    blocking(async {
        let mut client = rig.client().await;
        let mut first = Duration::ZERO;
        for n in 0..40 {
            let begin = Instant::now();
            refused(
                listed(&mut client, "strait_guess").await,
                Code::Unauthenticated,
                "TOKEN_UNKNOWN",
            );
            if n == 39 {
                // 30 beyond those that are free, less what was forgiven meanwhile.
                first = begin.elapsed();
            }
        }
        assert!(first >= Duration::from_millis(100), "{first:?}");
        // Who has one waits for nobody's guesses.
        listed(&mut client, &token).await.unwrap();
    });
    rig.logged(&["tokens were refused", "of_address"]);
}
