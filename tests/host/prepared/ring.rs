//! Prepared calls through a ring, by clients that do what they should and that do not.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SealFlags};
use rustix::process::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::{Value, json};
use strait_client::wire::{self, Op, Side, Word};
use strait_client::{Client, Dtype, Error, Options, TensorSpec};
use strait_memory::SharedPages;

use super::memory::{COUNTS, REMEMBERS, SPINS};
use super::{Prepared, brought, call_frame, scale_shift, shifted};
use crate::guest;
use crate::served::{Frame, Holdings, PATIENCE, Raw, Served, number, ramp};

const CLIENT: Word = Word::Tail(Side::Client);
const HOST: Word = Word::Tail(Side::Host);

/// A client by hand: it sleeps never, and wakes the host always.
struct Ringing {
    prepared: Prepared,
    fd: OwnedFd,
    memory: SharedPages,
    layout: wire::Ring,
    sent: u32,
    received: u32,
}

impl Ringing {
    fn by(client: &mut Raw, mut request: Value) -> Self {
        request["ring"] = json!(true);
        let mut reply = client.ask(Op::Prepare, request);
        let told = reply.accepted();
        assert_eq!(reply.fds.len(), 2, "{told}");
        let fd = reply.fds.pop().unwrap();
        let layout: wire::Ring = serde_json::from_value(told["ring"].clone()).unwrap();
        let bytes = usize::try_from(layout.bytes).unwrap();
        Self {
            memory: SharedPages::open(&fd, bytes).unwrap(),
            prepared: Prepared::of(reply),
            fd,
            layout,
            sent: 0,
            received: 0,
        }
    }

    fn set(&self, word: Word, value: u32) {
        self.memory
            .word(word.offset())
            .store(value, Ordering::SeqCst);
    }

    fn wake(&self) {
        // One that is awake, or that does not receive, needs none.
        let _ = self.prepared.socket.send_now(&[&[0]]);
    }

    fn put(&mut self, frame: &[u8]) {
        let (at, _) = self.layout.slot(Side::Client, self.sent);
        self.memory.write(usize::try_from(at).unwrap(), frame);
        self.sent = self.sent.wrapping_add(1);
        self.set(CLIENT, self.sent);
    }

    fn send(&mut self, sequence: u32, x: &[f64]) {
        let frame = call_frame(sequence, &self.prepared.payload(x));
        self.put(&frame);
        self.wake();
    }

    fn answered(&self) -> bool {
        let tail = self.memory.word(HOST.offset()).load(Ordering::SeqCst);
        tail != self.received
    }

    /// The next reply, from its slot or, where the slot says so, from the socket.
    fn receive(&mut self) -> Frame {
        let begun = Instant::now();
        while !self.answered() {
            assert!(begun.elapsed() < PATIENCE, "no answer");
            std::thread::sleep(Duration::from_micros(100));
        }
        let (at, _) = self.layout.slot(Side::Host, self.received);
        self.received = self.received.wrapping_add(1);
        let bytes = usize::try_from(number(&self.prepared.told, "/reply_bytes")).unwrap();
        let mut frame = vec![0; wire::HEADER_BYTES + bytes];
        self.memory.read(usize::try_from(at).unwrap(), &mut frame);
        let header = *frame.first_chunk().unwrap();
        if header[8..12] != [0; 4] {
            let told = self.last_word().expect("what the slot tells of");
            assert_eq!(told.header, header);
            return told;
        }
        let (_, _, payload) = wire::Header::decode(&frame).unwrap();
        Frame {
            header,
            text: String::new(),
            payload: payload.to_vec(),
            fds: Vec::new(),
        }
    }

    /// The next frame on the socket that is none to wake this side.
    fn last_word(&self) -> Option<Frame> {
        let mut buffer = vec![0; wire::HEADER_BYTES + wire::BODY_BYTES_MAX];
        loop {
            let received = self.prepared.socket.recv(&mut buffer).unwrap();
            match received.bytes {
                0 => return None,
                1 => {}
                bytes => {
                    let (_, body, _) = wire::Header::decode(&buffer[..bytes]).unwrap();
                    return Some(Frame {
                        header: *buffer.first_chunk().unwrap(),
                        text: String::from_utf8(body.to_vec()).unwrap(),
                        payload: Vec::new(),
                        fds: Vec::new(),
                    });
                }
            }
        }
    }

    fn call(&mut self, x: &[f64]) -> Vec<f64> {
        self.send(7, x);
        let reply = self.receive();
        assert_eq!(reply.sequence(), 7);
        self.prepared.output(&reply)
    }
}

#[test]
fn calls_through_a_ring_make_nothing_but_their_answers() {
    for spin in ["0", "50000"] {
        let host = Served::with(&[], &[("STRAIT__SERVER__SPIN_US", spin)]);
        let mut client = host.greeted();
        let before = Holdings::of(&host.settled(&mut client));
        let mut moved = 0;
        for count in [1, 2, 128, 2000, 16_000] {
            let mut ring = Ringing::by(&mut client, scale_shift(brought(count)));
            for seed in 0..5 {
                let x: Vec<f64> = ramp(count).iter().map(|x| x + f64::from(seed)).collect();
                assert_eq!(ring.call(&x), shifted(&x), "{count}");
                moved += 8 * count;
            }
            // Two under way, answered in order.
            let x = ramp(count);
            ring.send(1, &x);
            ring.send(2, &x);
            for sequence in [1, 2] {
                let reply = ring.receive();
                assert_eq!(reply.sequence(), sequence);
                assert_eq!(ring.prepared.output(&reply), shifted(&x));
                moved += 8 * count;
            }
            // One that is wrong is told so, and the next one runs.
            let mut wrong = ring.prepared.payload(&x);
            wrong[..64].copy_from_slice(&wire::sizes(&[count + 1]));
            ring.put(&call_frame(3, &wrong));
            ring.wake();
            let reply = ring.receive();
            assert_eq!(reply.sequence(), 3);
            reply.refused("INVALID_ARGUMENT", "BAD_INPUT");
            assert_eq!(ring.call(&x), shifted(&x));
            moved += 8 * count;
        }
        let stats = host.eventually(&mut client, "all have ended", |stats| {
            number(stats, "/account/connections") == 1 && number(stats, "/account/bytes") == 0
        });
        for place in ["frame_in", "frame_out", "guest_in", "guest_out"] {
            let copied = number(&stats, &format!("/copied/{place}"));
            assert_eq!(copied, moved, "{place} {stats}");
        }
        assert_eq!(Holdings::of(&host.settled(&mut client)), before);
    }
}

#[test]
fn a_ring_is_charged_as_long_as_its_client_has_it() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let ring = Ringing::by(&mut client, scale_shift(brought(8)));
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/account/segments"), 1, "{stats}");
    let Ringing {
        memory,
        prepared,
        fd,
        layout,
        ..
    } = ring;
    drop((prepared, fd));
    let elsewhere = |bytes| {
        host.eventually(&mut host.greeted(), "what is elsewhere", |stats| {
            number(stats, "/account/elsewhere_bytes") == bytes
        })
    };
    elsewhere(layout.bytes);
    drop(memory);
    elsewhere(0);
    let refused =
        json!({"kernel": "cumsum", "inputs": {"x": brought(8)}, "stream": true, "ring": true});
    let refused = client.ask(Op::Prepare, refused);
    refused.refused("INVALID_ARGUMENT", "UNSUPPORTED");
}

#[test]
fn a_client_that_breaks_the_protocol_ends_its_ring_alone() {
    type Deed = fn(&mut Ringing);
    let deeds: [(&str, Deed); 10] = [
        ("3 frames into the ring", |ring| {
            ring.set(CLIENT, ring.sent + 3);
        }),
        ("4294967295 frames into", |ring| {
            ring.set(CLIENT, ring.sent - 1);
        }),
        ("2147483647 frames into", |ring| ring.set(CLIENT, 1 << 31)),
        ("frames into the ring", |ring| {
            let all = ring.layout.bytes;
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&ring.fd, hole, 0, all).unwrap();
        }),
        ("starts with", |ring| ring.put(&[255; 200])),
        ("4294967295 of payload", |ring| {
            let mut frame = call_frame(9, &ring.prepared.payload(&ramp(8)));
            frame[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
            ring.put(&frame);
        }),
        ("64 body bytes", |ring| {
            let mut frame = call_frame(9, &ring.prepared.payload(&ramp(8)));
            frame[8..12].copy_from_slice(&64_u32.to_le_bytes());
            ring.put(&frame);
        }),
        ("it takes Call only", |ring| {
            let mut frame = call_frame(9, &ring.prepared.payload(&ramp(8)));
            frame[3] = Op::Chunk as u8;
            ring.put(&frame);
        }),
        ("CALLs go into slots", |ring| {
            let frame = call_frame(9, &ring.prepared.payload(&ramp(8)));
            ring.prepared.socket.send(&[&frame], &[]).unwrap();
        }),
        ("CALLs go into slots", |ring| {
            let fd = ring.fd.as_fd();
            ring.prepared.socket.send(&[&[0]], &[fd]).unwrap();
        }),
    ];
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let before = Holdings::of(&host.settled(&mut client));
    for (says, deed) in deeds {
        let mut ring = Ringing::by(&mut client, scale_shift(brought(8)));
        let x = ramp(8);
        assert_eq!(ring.call(&x), shifted(&x));
        // What its seals forbid.
        assert!(rustix::fs::ftruncate(&ring.fd, 0).is_err());
        assert!(rustix::fs::fcntl_add_seals(&ring.fd, SealFlags::WRITE).is_err());
        deed(&mut ring);
        ring.wake();
        let told = ring.last_word().expect("what was wrong");
        let message = told.refused("INVALID_ARGUMENT", "BAD_FRAME");
        assert!(message.contains(says), "{message}");
        assert!(ring.last_word().is_none(), "the end");
        let mut other = Ringing::by(&mut client, scale_shift(brought(8)));
        assert_eq!(other.call(&x), shifted(&x), "{says}");
    }
    assert_eq!(Holdings::of(&host.settled(&mut client)), before);
}

#[test]
fn a_client_that_wakes_always_or_never_harms_itself() {
    let host = Served::with(&[], &[("STRAIT__SERVER__SPIN_US", "0")]);
    let mut client = host.greeted();
    let mut ring = Ringing::by(&mut client, scale_shift(brought(8)));
    let x = ramp(8);
    for _ in 0..10_000 {
        ring.wake();
    }
    // It says that it sleeps, and never receives.
    ring.set(Word::Asleep(Side::Client), u32::MAX);
    for _ in 0..1000 {
        assert_eq!(ring.call(&x), shifted(&x));
    }
    let mut second = Ringing::by(&mut client, scale_shift(brought(8)));
    let asleep = second.memory.word(Word::Asleep(Side::Host).offset());
    let begun = Instant::now();
    while asleep.load(Ordering::SeqCst) == 0 {
        assert!(begun.elapsed() < PATIENCE, "the host does not sleep");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    let frame = call_frame(5, &second.prepared.payload(&x));
    second.put(&frame);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!second.answered(), "nobody woke the host");
    second.wake();
    assert_eq!(second.receive().sequence(), 5);
}

#[test]
fn calls_of_a_ring_are_cancelled_and_drained_as_others() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    let host = Served::with_plugin(&plugin, &[("STRAIT__SERVER__SPIN_US", "50000")]);
    let mut client = host.greeted();
    let request = json!({"kernel": "kept/k", "inputs": {"x": brought(8)}, "deadline_ms": 60_000});
    let mut ring = Ringing::by(&mut client, request.clone());
    let x = |what| [what, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let mut watcher = host.greeted();
    for _ in 0..2 {
        ring.send(1, &x(SPINS));
        ring.send(2, &x(COUNTS));
        host.eventually(&mut watcher, "it runs", |stats| {
            number(stats, "/running") == 1
        });
        let asked = json!({"prepared": ring.prepared.number()});
        assert_eq!(client.ok(Op::Cancel, asked)["cancelled"], true);
        ring.receive().refused("CANCELLED", "CANCELLED");
        let reply = ring.receive();
        assert_eq!(ring.prepared.output(&reply)[..3], [1.0; 3]);
    }
    // Its client goes while it runs, and while the host looks for more.
    let mut other = Ringing::by(&mut host.greeted(), request);
    other.send(1, &x(SPINS));
    drop(other);
    host.eventually(&mut watcher, "it has ended", |stats| {
        number(stats, "/running") == 0 && number(stats, "/account/connections") == 3
    });
    ring.call(&x(COUNTS));
    host.terminate();
    assert!(ring.last_word().is_none(), "the end");
    drop((client, watcher));
    host.ended();
}

fn options(spin: Duration) -> Options {
    Options {
        spin,
        ..Options::default()
    }
}

fn vector() -> TensorSpec {
    TensorSpec {
        dtype: Dtype::Float64,
        shape: vec![8],
    }
}

#[test]
fn a_client_notices_the_end_of_its_host() {
    let plugin = guest::component_without_globals("kept", REMEMBERS);
    for spin in [Duration::ZERO, Duration::from_millis(50)] {
        let host = Served::with_plugin(&plugin, &[]);
        let client = Client::connect_with(&host.directory(), &options(spin)).unwrap();
        let prepare = client.prepare("kept/k").input("x", &vector());
        let prepare = prepare.deadline(Duration::from_secs(60));
        let mut prepared = prepare.ring().send().unwrap();
        let mut x = [0.0; 8];
        for _ in 0..3 {
            let result = prepared.call(&[(&x[..]).into()]).unwrap();
            assert_eq!(
                result.tensor("y").unwrap().as_slice::<f64>().unwrap()[0],
                1.0
            );
        }
        // A trap is that call's alone.
        x[0] = 2.0;
        let trapped = prepared.call(&[(&x[..]).into()]).expect_err("a trap");
        assert!(matches!(trapped, Error::Remote(failure) if failure.reason == "GUEST_TRAP"));
        x[0] = SPINS;
        std::thread::scope(|scope| {
            let call = scope.spawn(|| prepared.call(&[(&x[..]).into()]).map(drop));
            std::thread::sleep(Duration::from_millis(100));
            host.signal(Signal::KILL);
            let ended = call.join().unwrap().expect_err("the host is gone");
            assert!(matches!(ended, Error::Disconnected), "{ended}");
        });
    }
}

#[test]
fn on_one_processor_nobody_spins_and_calls_are_answered() {
    let mut one = rustix::thread::CpuSet::new();
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    one.set((0..1024).find(|cpu| all.is_set(*cpu)).unwrap());
    // Of this thread, and of the host that it starts.
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let host = Served::with(&[], &[("STRAIT__SERVER__SPIN_US", "50000")]);
    let client = Client::connect_with(&host.directory(), &options(Duration::ZERO)).unwrap();
    let prepare = client.prepare("scale-shift").input("x", &vector());
    let mut prepared = prepare.param("a", 2).param("b", 1).ring().send().unwrap();
    for call in 0..100 {
        let x = [f64::from(call); 8];
        let result = prepared.call(&[(&x[..]).into()]).unwrap();
        assert_eq!(
            result.tensor("y").unwrap().as_slice::<f64>().unwrap(),
            shifted(&x)
        );
    }
}

const QUIET: &str = "STRAIT_TEST_QUIET_CALLS";

#[test]
fn steady_calls_make_no_system_call() {
    if let Some(directory) = std::env::var_os(QUIET) {
        return quiet(directory.as_ref());
    }
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return;
    }
    let host = Served::with(&[], &[("STRAIT__SERVER__SPIN_US", "50000")]);
    // Where others keep the processors from the host for too long the client sleeps, and dies of it.
    for _ in 0..20 {
        let this = std::env::current_exe().unwrap();
        let status = Command::new(this)
            .args([
                "--exact",
                "prepared::ring::steady_calls_make_no_system_call",
            ])
            .env(QUIET, host.directory())
            .status()
            .unwrap();
        if status.success() {
            return;
        }
        assert_eq!(status.signal(), Some(Signal::SYS.as_raw()), "{status}");
    }
    panic!("the client made system calls each time");
}

/// Ends this process, by the filter if the thread that calls makes a system call.
fn quiet(directory: &std::path::Path) {
    let longest = options(Duration::from_millis(50));
    let client = Client::connect_with(directory, &longest).unwrap();
    let prepare = client.prepare("scale-shift").input("x", &vector());
    let mut prepared = prepare.param("a", 2).param("b", 1).ring().send().unwrap();
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::new(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .unwrap()
    .try_into()
    .unwrap();
    static DONE: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(move || {
        let x = [1.0; 8];
        let mut right = true;
        for call in 0..10_500 {
            if call == 500 {
                seccompiler::apply_filter(&filter).unwrap();
            }
            right &= prepared.call(&[(&x[..]).into()]).is_ok_and(|result| {
                let y = result.tensor("y").ok();
                y.is_some_and(|y| y.as_slice::<f64>().is_ok_and(|y| y == [3.0; 8]))
            });
        }
        DONE.store(right, Ordering::Release);
        // Not even its own end would be allowed.
        loop {
            std::hint::spin_loop();
        }
    });
    let begun = Instant::now();
    while !DONE.load(Ordering::Acquire) {
        assert!(begun.elapsed() < PATIENCE, "calls went wrong");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::process::exit(0);
}
