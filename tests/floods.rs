//! Very many wrong things at once on the data socket: garbage, descriptors of every kind, INVOKEs and
//! CANCELs in every order. The host stays, serves everybody else meanwhile, and keeps nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/served.rs"]
mod served;

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use serde_json::{Value, json};
use served::{
    FINAL, Holdings, PAGE, Random, Raw, SIZE, Served, check_call, memfd, number, packet, put, ramp,
    scale_shift, seal, try_send_with,
};
use strait_client::wire::{HEADER_BYTES, Op, VERSION};

/// Above `move_min_bytes`.
const MOVED: u64 = 100_000;

/// The host with the flight `x`, and somebody who watches it.
fn warm(host: Served) -> (Served, Raw, Holdings) {
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    // What stays warm is warm before the count.
    for _ in 0..4 {
        check_call(&mut watcher, json!("x"), &ramp(MOVED));
    }
    let before = Holdings::of(&host.settled(&mut watcher));
    (host, watcher, before)
}

/// As it was, and right.
fn as_before(host: &Served, watcher: &mut Raw, before: &Holdings, what: &str) {
    host.eventually(watcher, &format!("{what}: {before:?}"), |stats| {
        Holdings::of(stats) == *before
    });
    check_call(&mut host.greeted(), json!("x"), &ramp(MOVED));
}

// ---- Garbage ----

/// Requests that make sense, to be spoilt. None gives anything a name.
fn requests() -> Vec<(Op, Value)> {
    let tensor = |offset: u64| json!({"name": "x", "dtype": "float64", "shape": [1000], "offset": offset, "length": 8000});
    let none = "0123456789abcdef0123456789abcdef";
    vec![
        (Op::Hello, json!({"protocol": VERSION, "client": "garbage"})),
        (
            Op::Create,
            json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [1000]}], "lease_ms": 1000}),
        ),
        (
            Op::Adopt,
            json!({"tensors": [tensor(PAGE)], "lease_ms": 1000}),
        ),
        (Op::Seal, json!({"segment": none})),
        (Op::Publish, json!({"segment": none, "name": "y"})),
        (Op::Lookup, json!({"name": "x"})),
        (Op::List, json!({"after": "a"})),
        (Op::Map, json!({"name": "x", "lease_ms": 1000})),
        (Op::Release, json!({"leases": [1, 2, 3]})),
        (Op::Renew, json!({"leases": [1], "lease_ms": 1000})),
        (
            Op::Invoke,
            json!({"kernel": "scale-shift", "inputs": {"x": {"name": "x", "tensor": "x"}}, "parameters": {"a": 2.5}, "deadline_ms": 1000, "limits": {"guest_bytes": 1_000_000}}),
        ),
        (Op::Cancel, json!({"sequence": 7})),
        (Op::Drop, json!({"name": "y"})),
        (Op::Kernels, json!({"kernel": "zscore"})),
        (Op::Stats, json!({})),
        (Op::Ping, json!({"request_id": "p-1"})),
    ]
}

/// One packet that is garbage in one way or another.
fn garbage(random: &mut Random, requests: &[(Op, Value)]) -> Vec<u8> {
    let (op, body) = random.one(requests);
    let sequence = u32::try_from(random.below(4)).unwrap();
    let mut bytes = packet(*op as u8, sequence, body.to_string().as_bytes());
    match random.below(9) {
        // From nothing to more than a frame may be.
        0 => {
            let count = *random.one(&[1, 47, 48, 49, 100, 4096, 61_488, 61_489, 70_000]);
            return random.bytes(count);
        }
        1 => bytes.truncate(1 + random.below(bytes.len())),
        2 => bytes[2] = random.next().to_le_bytes()[0],
        3 => {
            let count = random.next().to_le_bytes();
            bytes[8..12].copy_from_slice(&count[..4]);
        }
        4 => bytes[3] = random.next().to_le_bytes()[0],
        5 => {
            let count = random.below(2000);
            let body = random.bytes(count);
            bytes = packet(*op as u8, 1, &body);
        }
        // A few bytes of the body, which leaves many that still make sense.
        6 => {
            for _ in 0..1 + random.below(3) {
                let at = random.below(bytes.len() - HEADER_BYTES) + HEADER_BYTES;
                bytes[at] = *random.one(b"0123456789-.,:{}[]\"\\\xff\0ex");
            }
        }
        7 => bytes[random.below(HEADER_BYTES)] = random.next().to_le_bytes()[0],
        _ => {}
    }
    bytes
}

/// Garbage that happens to take away the name that the others use.
fn drops_x(packet: &[u8]) -> bool {
    packet.get(3) == Some(&(Op::Drop as u8)) && packet.windows(3).any(|name| name == b"\"x\"")
}

#[test]
fn connections_of_garbage_leave_nothing() {
    let (host, mut watcher, before) = warm(Served::start(&[]));
    let mut random = Random::new();
    let requests = requests();
    let pipe = rustix::pipe::pipe().unwrap();
    let mut open = Vec::new();
    for index in 0..800 {
        let mut client = host.connect();
        if random.below(2) == 0 {
            client.hello();
        }
        client.socket.set_nonblocking(true).unwrap();
        for _ in 0..1 + random.below(8) {
            let count = *random.one(&[0, 0, 0, 1, 1, 2, 16, 17, 253]);
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| pipe.1.as_fd()).collect();
            let packet = garbage(&mut random, &requests);
            // The host may have closed it already.
            if !drops_x(&packet) && try_send_with(&client, &packet, &fds).is_err() {
                break;
            }
        }
        // Some go at once, some never read and stay for a while.
        if random.below(4) == 0 {
            open.push(client);
        } else {
            drop(client);
        }
        if index % 200 == 199 {
            check_call(&mut watcher, json!("x"), &ramp(MOVED));
            open.clear();
            as_before(&host, &mut watcher, &before, "after garbage");
        }
    }
    // Nobody has the pipe's writing end any more.
    drop(pipe.1);
    assert_eq!(rustix::io::read(&pipe.0, &mut [0; 1]).unwrap(), 0);
}

// ---- Descriptors ----

/// What is not a sealed memfd with data where the tensor is.
fn odd_descriptors(directory: &std::path::Path) -> Vec<(&'static str, OwnedFd)> {
    let open = |path: &str, flags: OFlags| {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::RWXU).unwrap()
    };
    let path = directory.join("log");
    let log = path.to_str().unwrap();
    let hole = rustix::fs::memfd_create("hole", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&hole, 2 * PAGE).unwrap();
    let short = memfd(PAGE);
    let shrinks = memfd(2 * PAGE);
    for fd in [&hole, &short] {
        seal(fd, FINAL);
    }
    seal(
        &shrinks,
        rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::GROW,
    );
    let sized = memfd(2 * PAGE);
    seal(&sized, SIZE);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut odd = vec![
        ("a pipe to read", reader),
        ("a pipe to write", writer),
        ("a memfd without seals", memfd(2 * PAGE)),
        ("a memfd that may shrink", shrinks),
        ("a memfd that may be written", sized),
        ("a memfd of nothing", hole),
        ("a memfd that is too short", short),
        ("/dev/zero", open("/dev/zero", OFlags::RDWR)),
        ("/dev/null", open("/dev/null", OFlags::RDWR)),
        ("a directory", open("/", OFlags::RDONLY | OFlags::DIRECTORY)),
        ("a file", open(log, OFlags::RDONLY)),
        ("a path", open(log, OFlags::PATH)),
        ("a path of a directory", open("/", OFlags::PATH)),
        ("/proc/self/maps", open("/proc/self/maps", OFlags::RDONLY)),
        (
            "an epoll",
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap(),
        ),
        (
            "an eventfd",
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
        ),
        (
            "a socket",
            std::os::unix::net::UnixStream::pair().unwrap().0.into(),
        ),
        (
            "a frame socket",
            strait_memory::FrameSocket::pair()
                .unwrap()
                .0
                .as_fd()
                .try_clone_to_owned()
                .unwrap(),
        ),
        (
            "a TCP listener",
            std::net::TcpListener::bind("127.0.0.1:0").unwrap().into(),
        ),
    ];
    // Not every machine has huge pages to promise.
    let huge = MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING;
    if let Ok(huge) = rustix::fs::memfd_create("huge", huge)
        && rustix::fs::ftruncate(&huge, 2 << 20).is_ok()
    {
        seal(&huge, FINAL);
        odd.push(("a memfd of huge pages", huge));
    }
    odd
}

#[test]
fn descriptors_of_every_other_kind_are_no_segments() {
    let (host, mut watcher, before) = warm(Served::start(&[]));
    let odd = odd_descriptors(host.directory().parent().unwrap());
    let adopt = json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [100], "offset": PAGE, "length": 800}], "name": "odd"});
    let mut client = host.greeted();
    for _ in 0..20 {
        for (what, fd) in &odd {
            let reply = client.ask_with(Op::Adopt, adopt.clone(), &[fd.as_fd()]);
            assert_eq!(reply.op(), Op::Error, "{what} was adopted: {}", reply.text);
            reply.refused("INVALID_ARGUMENT", "BAD_SEGMENT");
        }
    }
    drop(client);
    as_before(&host, &mut watcher, &before, "after odd descriptors");
}

/// One that asks for descriptors and never reads them.
#[test]
fn descriptors_that_are_never_read_are_bounded() {
    let (host, mut watcher, before) = warm(Served::start(&[]));
    let map = json!({"name": "x"}).to_string();
    let mut deaf = Vec::new();
    for _ in 0..4 {
        let client = host.greeted();
        client.socket.set_nonblocking(true).unwrap();
        let mut waited = 0;
        let mut sent = 0;
        while waited < 20 {
            match client
                .socket
                .send(&[&packet(Op::Map as u8, 9, map.as_bytes())], &[])
            {
                Ok(()) => (sent, waited) = (sent + 1, 0),
                Err(_) => {
                    waited += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            assert!(sent < 50_000, "the host takes requests without end");
        }
        deaf.push(client);
        check_call(&mut watcher, json!("x"), &ramp(MOVED));
    }
    let stats = watcher.ok(Op::Stats, json!({}));
    let fds = number(&stats, "/process/fds");
    // What waits for a client is a few dozen frames of each.
    assert!(fds < before.fds + 4 * 50, "{fds} descriptors, {before:?}");
    drop(deaf);
    as_before(
        &host,
        &mut watcher,
        &before,
        "after descriptors that nobody read",
    );
}

// ---- Cancels ----

#[test]
fn a_storm_of_cancels_answers_every_invoke_once() {
    let text = std::fs::read_to_string("tests/guests/spins.wat").unwrap();
    let served = Served::with_plugin(&guest::component("spins", &text), &[]);
    let (host, mut watcher, before) = warm(served);
    let mut random = Random::new();
    let mut ended = [0_u32; 2];
    for _ in 0..40 {
        let mut client = host.greeted();
        let (mut open, mut spins) = (HashSet::new(), Vec::new());
        // Requests that are answered by OK, whatever becomes of the others.
        let mut plain = HashSet::new();
        let cancel = |client: &mut Raw, sequence: u32, plain: &mut HashSet<u32>| {
            plain.insert(client.begin(Op::Cancel, &json!({"sequence": sequence}), &[]));
        };
        for _ in 0..30 {
            // Before it comes, at once, twice, or some other one.
            let way = random.below(5);
            if way == 0 {
                let ping = client.begin(Op::Ping, &json!({}), &[]);
                plain.insert(ping);
                cancel(&mut client, ping + 2, &mut plain);
            }
            let spins_on = random.below(3) > 0;
            let call = if spins_on {
                json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000})
            } else {
                scale_shift(json!("x"), 2.0, 1.0)
            };
            let sequence = client.begin(Op::Invoke, &call, &[]);
            open.insert(sequence);
            if spins_on {
                spins.push(sequence);
            }
            match way {
                1 => cancel(&mut client, sequence, &mut plain),
                2 => (0..2).for_each(|_| cancel(&mut client, sequence, &mut plain)),
                3 => {
                    let earlier = sequence - u32::try_from(random.below(8)).unwrap();
                    cancel(&mut client, earlier, &mut plain);
                }
                _ => {}
            }
        }
        // All that would run for ever, from the first or from the last on.
        if random.below(2) == 0 {
            spins.reverse();
        }
        for sequence in spins {
            cancel(&mut client, sequence, &mut plain);
        }
        // Some do not wait for the answers.
        if random.below(4) == 0 {
            continue;
        }
        while !open.is_empty() || !plain.is_empty() {
            let frame = client.receive().unwrap();
            if plain.remove(&frame.sequence()) {
                frame.accepted();
                continue;
            }
            assert!(open.remove(&frame.sequence()), "{}", frame.text);
            let done = frame.op() == Op::Ok;
            if !done {
                frame.refused("CANCELLED", "CANCELLED");
            }
            ended[usize::from(done)] += 1;
        }
    }
    assert!(ended[0] > 300 && ended[1] > 50, "{ended:?}");
    as_before(&host, &mut watcher, &before, "after a storm of cancels");
}
