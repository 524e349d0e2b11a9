//! The program of these tests' workers: between the host and a worker, and as honest as the file `lie` says.

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::fs::SealFlags;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustix::process::{Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::json;
use strait::engine::{Failed, Report};
use strait_memory::{FDS_MAX, FrameSocket, WriteMapping};
use strait_tensor::TensorSpec;

use crate::served::{memfd, seal};

/// Of a packet: whether more of the message follow.
const LAST: u8 = 0;
const MORE: u8 = 1;
/// Of a message of the worker on a lane: what it is.
const LOADED: u8 = 0;
const NEED: u8 = 1;
const ENDED: u8 = 2;
/// Of a message to the worker on a lane.
const GRANTED: u8 = 2;

/// As `host/worker/messages.rs` has it.
#[derive(Debug, Serialize, Deserialize)]
struct Ended {
    outcome: Result<Outcome, Failed>,
    gone: Vec<usize>,
    totals: [u64; 4],
    counts: [u64; 6],
}

#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    Filled(Vec<Filled>, Report),
    Specs(Vec<(String, TensorSpec)>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Filled {
    port: String,
    spec: TensorSpec,
    body: FilledIn,
}

#[derive(Debug, Serialize, Deserialize)]
enum FilledIn {
    Segment { reserve_bytes: u64 },
    Inline(Vec<u8>),
}

/// What to lie about now.
fn lie() -> String {
    fs::read_to_string("lie").unwrap_or_default()
}

/// A whole message, without the first bytes of its packets. None: the other side is gone.
fn receive(socket: &FrameSocket) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut buffer = vec![0; 1 << 17];
    let (mut message, mut fds) = (Vec::new(), Vec::new());
    loop {
        let received = socket.recv(&mut buffer).ok()?;
        let (more, part) = buffer[..received.bytes].split_first()?;
        message.extend_from_slice(part);
        fds.extend(received.fds);
        if *more == LAST {
            return Some((message, fds));
        }
    }
}

/// Whether the other side still listens.
fn send(socket: &FrameSocket, message: &[u8], fds: &[OwnedFd]) -> bool {
    let mut parts = message.chunks(60 << 10).peekable();
    let mut fds = fds.chunks(FDS_MAX).peekable();
    loop {
        let (part, beside) = (
            parts.next().unwrap_or_default(),
            fds.next().unwrap_or_default(),
        );
        let more = parts.peek().is_some() || fds.peek().is_some();
        let beside: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
        if socket.send(&[&[u8::from(more)], part], &beside).is_err() {
            return false;
        }
        if !more {
            return true;
        }
    }
}

fn need(bytes: &[u64]) -> Vec<u8> {
    [vec![NEED], postcard::to_allocvec(bytes).unwrap()].concat()
}

/// The end of a run, changed.
fn ended(message: &[u8], change: impl FnOnce(&mut Ended)) -> Vec<u8> {
    let mut ended = postcard::from_bytes(&message[1..]).unwrap();
    change(&mut ended);
    [vec![ENDED], postcard::to_allocvec(&ended).unwrap()].concat()
}

fn filled(message: &[u8], change: impl FnOnce(&mut Filled)) -> Vec<u8> {
    ended(message, |ended| {
        if let Ok(Outcome::Filled(filled, _)) = &mut ended.outcome {
            change(&mut filled[0]);
        }
    })
}

fn reported(message: &[u8], change: impl FnOnce(&mut Report)) -> Vec<u8> {
    ended(message, |ended| {
        if let Ok(Outcome::Filled(_, report)) = &mut ended.outcome {
            change(report);
        }
    })
}

/// Says something else than `message`, or nothing; whether to go on.
fn say(host: &FrameSocket, message: &[u8]) -> bool {
    let kind = message[0];
    let lie = lie();
    let text = || "x".repeat(1 << 20);
    let changed = match (kind, &*lie) {
        (ENDED, "report: pages") => reported(message, |report| {
            let page = json!({"port": "x", "inode": null});
            report.pages = vec![serde_json::from_value(page).unwrap(); 1000];
        }),
        (LOADED, "load: silence") => return true,
        (LOADED, "load: garbage") => vec![LOADED, 0, 255, 255, 255],
        (LOADED, "load: a need") => need(&[1]),
        (NEED, "need: none") => need(&[]),
        (NEED, "need: two") => need(&[1, 1]),
        (NEED, "need: all") => need(&[u64::MAX]),
        (NEED, "need: twice") => return send(host, message, &[]) && send(host, message, &[]),
        (NEED, "need: a plugin") => vec![LOADED],
        (NEED, "need: what there is not") => vec![77],
        (NEED, "need: more than follows") => vec![NEED, 255, 255, 255, 255, 15],
        (NEED, "need: nothing") => return true,
        (NEED, "need: the end") => {
            let failed = r#"{"kernel":"","stage":"Run","cause":"Cancelled"}"#;
            let ended = Ended {
                outcome: Err(serde_json::from_str(failed).unwrap()),
                gone: vec![7],
                totals: [0; 4],
                counts: [0; 6],
            };
            let ended = [vec![ENDED], postcard::to_allocvec(&ended).unwrap()].concat();
            send(host, &ended, &[]);
            // The worker itself still waits.
            return false;
        }
        (NEED, "need: a result") => {
            let ended = Ended {
                outcome: Ok(Outcome::Filled(Vec::new(), Report::default())),
                gone: Vec::new(),
                totals: [0; 4],
                counts: [0; 6],
            };
            let ended = [vec![ENDED], postcard::to_allocvec(&ended).unwrap()].concat();
            send(host, &ended, &[]);
            // The worker itself still waits.
            return false;
        }
        (ENDED, "end: a need") => need(&[1]),
        (ENDED, "end: half") => return host.send(&[&[MORE], &message[..1]], &[]).is_ok(),
        (ENDED, "end: silence") => return true,
        (ENDED, "end: without end") => {
            while host.send(&[&[MORE]], &[]).is_ok() {}
            return false;
        }
        (ENDED, "end: too long") => {
            while host.send(&[&[MORE], &[0; 60 << 10]], &[]).is_ok() {}
            return false;
        }
        (ENDED, "end: too long a packet") => {
            return host.send(&[&[LAST], &[0; 100 << 10]], &[]).is_ok();
        }
        (ENDED, "end: another kind") => return host.send(&[&[7], message], &[]).is_ok(),
        (ENDED, "end: more behind") => [message, &[0]].concat(),
        (ENDED, "end: an empty packet") => {
            let none: [IoSlice<'_>; 0] = [];
            let mut control = SendAncillaryBuffer::default();
            return rustix::net::sendmsg(host, &none, &mut control, SendFlags::NOSIGNAL).is_ok();
        }
        (ENDED, "end: a descriptor") => return send(host, message, &[memfd(1)]),
        (ENDED, "end: 100 descriptors") => {
            let fds: Vec<_> = (0..100).map(|_| memfd(1)).collect();
            return send(host, message, &fds);
        }
        (ENDED, "end: the lane's") => {
            let _ = host.shutdown();
            return false;
        }
        (ENDED, "end: the process'") => std::process::exit(1),
        (ENDED, "end: stopped") => {
            kill_process(rustix::process::getpid(), Signal::STOP).unwrap();
            return true;
        }
        (ENDED, "end: specs") => ended(message, |ended| {
            ended.outcome = Ok(Outcome::Specs(Vec::new()))
        }),
        (ENDED, "end: no results") => ended(message, |ended| {
            ended.outcome = Ok(Outcome::Filled(Vec::new(), Report::default()));
        }),
        (ENDED, "gone: all") => ended(message, |ended| ended.gone = vec![0, 0, 1, usize::MAX]),
        (ENDED, "totals: all") => ended(message, |ended| {
            (ended.totals, ended.counts) = ([u64::MAX; 4], [u64::MAX; 6]);
        }),
        (ENDED, "result: port") => filled(message, |filled| filled.port = "z".to_owned()),
        (ENDED, "result: long port") => filled(message, |filled| filled.port = text()),
        (ENDED, "result: larger") => filled(message, |filled| filled.spec.shape = vec![1 << 40]),
        (ENDED, "result: past counting") => filled(message, |filled| {
            filled.spec.shape = vec![0, u64::MAX, u64::MAX]
        }),
        (ENDED, "result: axes") => filled(message, |filled| filled.spec.shape = vec![1; 1000]),
        (ENDED, "result: two axes") => filled(message, |filled| filled.spec.shape = vec![1, 1]),
        (ENDED, "result: dtype") => filled(message, |filled| {
            filled.spec.dtype = strait_tensor::Dtype::Bool8;
        }),
        (ENDED, "result: reserved less") => filled(message, |filled| {
            filled.body = FilledIn::Segment { reserve_bytes: 1 };
        }),
        (ENDED, "result: reserved all") => {
            let reserve_bytes = u64::MAX;
            filled(message, |filled| {
                filled.body = FilledIn::Segment { reserve_bytes }
            })
        }
        (ENDED, "result: a segment") => {
            let reserve_bytes = 64 << 10;
            filled(message, |filled| {
                filled.body = FilledIn::Segment { reserve_bytes }
            })
        }
        (ENDED, "result: bytes") => filled(message, |filled| {
            let bytes = filled.spec.bytes().unwrap();
            filled.body = FilledIn::Inline(vec![0; usize::try_from(bytes).unwrap()]);
        }),
        (ENDED, "result: more bytes than asked for") => filled(message, |filled| {
            filled.spec.shape = vec![8193];
            filled.body = FilledIn::Inline(vec![0; 8 * 8193]);
        }),
        (ENDED, "result: a byte less") => filled(message, |filled| {
            let bytes = filled.spec.bytes().unwrap();
            filled.body = FilledIn::Inline(vec![0; usize::try_from(bytes).unwrap() - 1]);
        }),
        (ENDED, "result: a byte more") => filled(message, |filled| {
            let bytes = filled.spec.bytes().unwrap();
            filled.body = FilledIn::Inline(vec![0; usize::try_from(bytes).unwrap() + 1]);
        }),
        (ENDED, "report: notes") => reported(message, |report| {
            report.notes = vec![("\u{1b}[2J\n".to_owned(), "\u{202e}".repeat(100)); 8];
        }),
        (ENDED, "report: many notes") => reported(message, |report| {
            report.notes = vec![("a".to_owned(), "b".to_owned()); 1000];
        }),
        (ENDED, "report: long notes") => reported(message, |report| {
            report.notes = vec![(text(), text())];
        }),
        (ENDED, "report: figures") => reported(message, |report| {
            report.copied_bytes = u64::MAX;
            report.minor_faults = u64::MAX;
            report.seconds.total = f64::NAN;
            report.seconds.run = f64::INFINITY;
        }),
        (ENDED, "failed: long") => ended(message, |ended| {
            let cause = json!({"Trap": {"trap": text(), "panic": {"message": text(), "file": text(), "line": 1}, "backtrace": text()}});
            let failed = json!({"kernel": text(), "stage": "Run", "cause": cause});
            ended.outcome = Err(serde_json::from_value(failed).unwrap());
        }),
        (ENDED, "failed: refused") => ended(message, |ended| {
            let refused = json!({"refusal": {"Argument": text()}, "reason": text(), "diagnostic": vec![7; 1 << 20]});
            let failed = json!({"kernel": "k", "stage": "Open", "cause": {"Refused": refused}});
            ended.outcome = Err(serde_json::from_value(failed).unwrap());
        }),
        _ => message.to_vec(),
    };
    send(host, &changed, &[])
}

/// What the host says, changed, before the worker hears it.
fn hear(message: &[u8], fds: &[OwnedFd]) {
    if message[0] != GRANTED || fds.is_empty() {
        return;
    }
    match &*lie() {
        "seal: seals" => seal(&fds[0], SealFlags::SEAL),
        "seal: future" => seal(&fds[0], SealFlags::FUTURE_WRITE),
        "seal: cut" => assert!(rustix::fs::ftruncate(&fds[0], 0).is_err()),
        "seal: written" => {
            let bytes = rustix::fs::fstat(&fds[0]).unwrap().st_size;
            let pages = WriteMapping::new(&fds[0], usize::try_from(bytes).unwrap()).unwrap();
            std::thread::spawn(move || {
                let mut pages = pages;
                while !lie().is_empty() {
                    pages.bytes_mut()[65_536..].fill(7);
                }
            });
        }
        _ => {}
    }
}

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
    while let Some((message, _)) = receive(&host) {
        if !send(&own, &message, &[]) {
            break;
        }
    }
    std::process::exit(0)
}
