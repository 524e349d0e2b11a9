//! The lies that the file `lie` names.

use std::fs;
use std::io::IoSlice;
use std::os::fd::OwnedFd;

use parking_lot::Mutex;
use rustix::fs::SealFlags;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustix::process::{Signal, kill_process};
use serde_json::json;
use strait::engine::Report;
use strait_memory::{FrameSocket, WriteMapping};
use strait_tensor::{Dtype, TensorSpec};

use super::mutate;
use super::packet::{LAST, MORE, send};
use super::said::{
    self, ENDED, Ended, FilledIn, GRANTED, KEEPS, LOADED, NEED, Outcome, PIECE, Piece, WAITS,
    chained, ended, filled, need, piece, reported,
};
use crate::served::{memfd, seal};

/// What to lie about now.
pub(super) fn lie() -> String {
    fs::read_to_string("lie").unwrap_or_default()
}

/// Says something else than `message`, or nothing; whether to go on.
pub(super) fn say(host: &FrameSocket, message: &[u8]) -> bool {
    let kind = message[0];
    let lie = lie();
    if let Some(seed) = lie.strip_prefix("mutate ") {
        return mutate::say(host, message, seed);
    }
    let text = || "x".repeat(100 << 10);
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
            let mut ended = Ended::with(Err(serde_json::from_str(failed).unwrap()));
            ended.gone = vec![7];
            send(host, &said::message(ENDED, &ended), &[]);
            // The worker itself still waits.
            return false;
        }
        (NEED, "need: a result") => {
            let filled = Outcome::Filled(Vec::new(), Report::default());
            send(host, &said::message(ENDED, &Ended::with(Ok(filled))), &[]);
            // The worker itself still waits.
            return false;
        }
        (ENDED, "end: a need") => need(&[1]),
        (ENDED, "end: a long need") => need(&[7; 100_000]),
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
        (ENDED, "header: changed") => {
            write_in_result(false);
            message.to_vec()
        }
        (ENDED, "footer: changed") => {
            write_in_result(true);
            message.to_vec()
        }
        (PIECE, "piece: silence") => return true,
        (PIECE, "piece: without end") => {
            let none = piece(message, |piece| {
                (piece.outputs[0].0.shape[0], piece.done) = (0, false);
                piece.outputs[0].1.clear();
            });
            while send(host, &none, &[]) {}
            return false;
        }
        (WAITS, "waits: silence") => return true,
        (ENDED, "gone: all") => ended(message, |ended| ended.gone = vec![0, 0, 1, usize::MAX]),
        (ENDED, "totals: all") => ended(message, |ended| {
            (ended.totals, ended.counts) = ([u64::MAX; 5], [u64::MAX; 6]);
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
            filled.spec.dtype = Dtype::Bool8;
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
        (ENDED, "chain: fewer reports") => chained(message, |filled, mut reports| {
            reports.pop();
            Ok(Outcome::Chained(filled, reports))
        }),
        (ENDED, "chain: no results") => chained(message, |_, reports| {
            Ok(Outcome::Chained(Vec::new(), reports))
        }),
        (ENDED, "chain: a kernel's end") => chained(message, |filled, mut reports| {
            Ok(Outcome::Filled(filled, reports.remove(0)))
        }),
        (ENDED, "chain: port") => chained(message, |mut filled, reports| {
            filled[0].port = "z".to_owned();
            Ok(Outcome::Chained(filled, reports))
        }),
        (ENDED, "chain: larger") => chained(message, |mut filled, reports| {
            filled[0].spec.shape = vec![1 << 40];
            Ok(Outcome::Chained(filled, reports))
        }),
        (ENDED, "chain: bytes") => chained(message, |mut filled, reports| {
            filled[0].body = FilledIn::Inline(vec![0; 8]);
            Ok(Outcome::Chained(filled, reports))
        }),
        (ENDED, "chain: fails nowhere") => chained(message, |_, _| {
            let failed = json!({"kernel": text(), "stage": "Run", "cause": "Cancelled", "at": 7});
            Err(serde_json::from_value(failed).unwrap())
        }),
        (ENDED, "chain: stalls") => chained(message, |_, _| {
            let failed = json!({"kernel": "", "stage": "Run", "cause": "Stalled", "at": 1});
            Err(serde_json::from_value(failed).unwrap())
        }),
        (ENDED, "failed: long") => ended(message, |ended| {
            let cause = json!({"Trap": {"trap": text(), "panic": {"message": text(), "file": text(), "line": 1}, "backtrace": text()}});
            let failed = json!({"kernel": text(), "stage": "Run", "cause": cause});
            ended.outcome = Err(serde_json::from_value(failed).unwrap());
        }),
        (ENDED, "failed: memory") => ended(message, |ended| {
            let status = json!({"code": "RESOURCE_EXHAUSTED", "reason": "NO_MEMORY", "backtrace": text(),
                "message": "\u{1b}[2J\n".repeat(10_000), "details": "{}"});
            let failed = json!({"kernel": "k", "stage": "Run", "cause": {"Memory": status}});
            ended.outcome = Err(serde_json::from_value(failed).unwrap());
        }),
        (ENDED, "failed: refused") => ended(message, |ended| {
            let refused = json!({"refusal": {"Argument": text()}, "reason": text(), "diagnostic": vec![7; 100 << 10]});
            let failed = json!({"kernel": "k", "stage": "Open", "cause": {"Refused": refused}});
            ended.outcome = Err(serde_json::from_value(failed).unwrap());
        }),
        _ => match of_prepared(kind, &lie, message) {
            Some(said) => return said.iter().all(|message| send(host, message, &[])),
            None => message.to_vec(),
        },
    };
    send(host, &changed, &[])
}

/// What is said in the place of a message of what is prepared, and of a stream.
fn of_prepared(kind: u8, lie: &str, message: &[u8]) -> Option<Vec<Vec<u8>>> {
    let outcome = |outcome| said::message(ENDED, &Ended::with(Ok(outcome)));
    let streamed = |notes: usize| {
        outcome(Outcome::Streamed(vec![
            ("a".to_owned(), "b".to_owned());
            notes
        ]))
    };
    let specs = |change: fn(&mut (String, TensorSpec))| {
        ended(message, |ended| {
            if let Ok(Outcome::Specs(specs)) = &mut ended.outcome {
                change(&mut specs[0]);
            }
        })
    };
    let all = |kind| said::message(kind, &u64::MAX);
    let part = |change: fn(&mut Piece)| piece(message, change);
    let said = match (kind, lie) {
        (ENDED, "end: streamed") => streamed(0),
        (ENDED, "end: many notes") => streamed(1000),
        (ENDED, "specs: none") => outcome(Outcome::Specs(Vec::new())),
        (ENDED, "specs: port") => specs(|(port, _)| port.push('z')),
        (ENDED, "specs: dtype") => specs(|(_, spec)| spec.dtype = Dtype::Bool8),
        (ENDED, "specs: larger") => specs(|(_, spec)| spec.shape[0] = 1 << 40),
        (ENDED, "waits: first") => return Some(vec![all(WAITS), message.to_vec()]),
        (ENDED, "keeps: of a run") => all(KEEPS),
        (ENDED, "piece: of a run") => said::message(PIECE, &Piece::default()),
        (WAITS, "waits: all") => all(WAITS),
        (WAITS, "waits: a need") => need(&[1]),
        (WAITS, "waits: twice") => return Some(vec![message.to_vec(), message.to_vec()]),
        (PIECE, "keeps: all") => all(KEEPS),
        (PIECE, "piece: a need") => need(&[1]),
        (PIECE, "piece: waits") => all(WAITS),
        (PIECE, "piece: the end") => streamed(0),
        (PIECE, "piece: another end") => outcome(Outcome::Filled(Vec::new(), Report::default())),
        (PIECE, "piece: none") => part(|piece| piece.outputs.clear()),
        (PIECE, "piece: one more") => part(|piece| piece.outputs.push(piece.outputs[0].clone())),
        (PIECE, "piece: more rows") => part(|piece| {
            let (spec, bytes) = &mut piece.outputs[0];
            spec.shape[0] += 1;
            bytes.extend([0; 8]);
        }),
        (PIECE, "piece: rows past counting") => part(|piece| {
            piece.outputs[0].0.shape = vec![0, u64::MAX, u64::MAX];
        }),
        (PIECE, "piece: columns") => part(|piece| piece.outputs[0].0.shape.push(1)),
        (PIECE, "piece: no rows") => part(|piece| {
            piece.outputs[0].0.shape.clear();
            piece.outputs[0].1.truncate(8);
        }),
        (PIECE, "piece: dtype") => part(|piece| piece.outputs[0].0.dtype = Dtype::Int64),
        (PIECE, "piece: a byte less") => part(|piece| {
            piece.outputs[0].1.pop();
        }),
        (PIECE, "piece: a byte more") => part(|piece| piece.outputs[0].1.push(0)),
        _ => return None,
    };
    Some(vec![said])
}

/// The result that was granted last, writable here as long as something is to be changed in it.
static RESULT: Mutex<Option<WriteMapping>> = Mutex::new(None);

/// Changes a byte of it: of its header, or the last one of its footer, behind which it is zero.
fn write_in_result(in_footer: bool) {
    let mut pages = RESULT.lock().take().expect("a result that is new here");
    let bytes = pages.bytes_mut();
    let last = bytes.iter().rposition(|byte| *byte != 0);
    let at = if in_footer { last } else { Some(64) };
    bytes[at.expect("a footer")] ^= 0xff;
}

/// What the host says, changed, before the worker hears it.
pub(super) fn hear(message: &[u8], fds: &[OwnedFd]) {
    if message[0] != GRANTED || fds.is_empty() {
        return;
    }
    match &*lie() {
        "seal: seals" => seal(&fds[0], SealFlags::SEAL),
        "seal: future" => seal(&fds[0], SealFlags::FUTURE_WRITE),
        "seal: cut" => assert!(rustix::fs::ftruncate(&fds[0], 0).is_err()),
        "header: changed" | "footer: changed" => *RESULT.lock() = Some(mapped(&fds[0])),
        "seal: written" => {
            let mut pages = mapped(&fds[0]);
            std::thread::spawn(move || {
                while !lie().is_empty() {
                    pages.bytes_mut()[65_536..].fill(7);
                }
            });
        }
        _ => {}
    }
}

fn mapped(fd: &OwnedFd) -> WriteMapping {
    let bytes = rustix::fs::fstat(fd).unwrap().st_size;
    WriteMapping::new(fd, usize::try_from(bytes).unwrap()).unwrap()
}
