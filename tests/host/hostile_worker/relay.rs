//! The program of these tests' workers: between the host and a worker, and as honest as the file `lie` says.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;

use strait_memory::FrameSocket;

use super::lies::{hear, lie, say};
use super::mutate;
use super::packet::{receive, send};
use super::said::LANE;

/// Not a test: the program of this file's workers.
#[test]
#[ignore = "the process that other tests start"]
fn worker_process() {
    if std::env::var_os("TEST_WORKER").is_none() {
        return;
    }
    let host = FrameSocket::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    match &*lie() {
        "start: garbage" => {
            send(&host, &[0xff; 1000], &[]);
            std::thread::park();
        }
        "start: forgotten" => {
            send(&host, &[1, 0, 0, 0, 0, 0, 0], &[]);
            std::thread::park();
        }
        "start: refusal" => {
            send(&host, &[0, 1, 2, b'n', b'o'], &[]);
            std::thread::park();
        }
        "start: a wall is lacking" => {
            let lacks: Result<_, String> = Ok(vec!["a wall: not built"]);
            let started = postcard::to_allocvec(&lacks).unwrap();
            send(&host, &[vec![0], started].concat(), &[]);
            std::thread::park();
        }
        "start: silence" => std::thread::park(),
        "start: end" => return,
        _ => {}
    }
    let (start, lanes) = receive(&host).expect("the settings");
    let (own, its) = FrameSocket::pair().unwrap();
    Command::new(env!("CARGO_BIN_EXE_strait"))
        .arg("worker")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pairs: Vec<_> = lanes.iter().map(|_| FrameSocket::pair().unwrap()).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let theirs: Vec<_> = theirs.into_iter().map(OwnedFd::from).collect();
    assert!(send(&own, &start, &theirs));
    drop(theirs);
    for (host, worker) in lanes.into_iter().zip(ours) {
        pass_on(host, worker);
    }
    let own = Arc::new(own);
    let host = Arc::new(host);
    let (up_own, up_host) = (Arc::clone(&own), Arc::clone(&host));
    std::thread::spawn(move || {
        while let Some((message, _)) = receive(&up_own) {
            let said = match message[0] {
                // That it has started.
                0 => String::new(),
                _ => lie(),
            };
            if let Some(seed) = said.strip_prefix("mutate ") {
                if !mutate::say(&up_host, &message, seed) {
                    break;
                }
                continue;
            }
            let said: &[&[u8]] = match &*said {
                "control: garbage" => &[&[9, 9]],
                "control: forgotten" => &[&[1]],
                "control: twice" => &[&message, &message],
                _ => &[&message],
            };
            for message in said {
                send(&up_host, message, &[]);
            }
        }
    });
    while let Some((message, lanes)) = receive(&host) {
        let mut theirs = Vec::new();
        if message[0] == LANE {
            for lane in lanes {
                let (ours, its) = FrameSocket::pair().unwrap();
                pass_on(lane, ours);
                theirs.push(OwnedFd::from(its));
            }
        }
        if !send(&own, &message, &theirs) {
            break;
        }
    }
    std::process::exit(0)
}

/// What is said on one lane, in both directions.
fn pass_on(host: OwnedFd, worker: FrameSocket) {
    let (host, worker) = (Arc::new(FrameSocket::from(host)), Arc::new(worker));
    let (hears, speaks) = (Arc::clone(&host), Arc::clone(&worker));
    std::thread::spawn(move || {
        while let Some((message, fds)) = receive(&hears) {
            hear(&message, &fds);
            if !send(&speaks, &message, &fds) {
                break;
            }
        }
        let _ = speaks.shutdown();
    });
    std::thread::spawn(move || {
        while let Some((message, _)) = receive(&worker) {
            if !say(&host, &message) {
                break;
            }
        }
        let _ = host.shutdown();
    });
}
