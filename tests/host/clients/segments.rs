//! What a client does to the memory that it shares with the host: ADOPT, seals, sizes, file leases.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use serde_json::{Value, json};
use strait_client::wire::Op;
use strait_memory::{ReadMapping, WriteMapping};

use super::{MOVED, place, sealed};
use crate::served::{
    Created, FINAL, FUTURE, Holdings, PAGE, SIZE, Served, check_call, memfd, ramp, scale_shift,
    seal, write,
};

fn unsealed(flags: MemfdFlags, bytes: u64) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(
        "strait-tests",
        flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd)
}

#[test]
fn what_cannot_be_adopted_is_refused() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, vec![0; 2 * 65_536]).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let one = || json!([place("x", 8, 0)]);
    let whole = || sealed(memfd(2 * PAGE), FINAL);
    let hole = unsealed(MemfdFlags::empty(), 2 * PAGE).unwrap();
    write(hole.as_fd(), 0, &[1; 4096]);
    let huge = unsealed(MemfdFlags::empty(), 8 << 30).unwrap();
    let (segment, tensor) = ("BAD_SEGMENT", "BAD_TENSOR");
    #[rustfmt::skip]
    let mut table: Vec<(&str, OwnedFd, Value, &str, &str)> = vec![
        ("a pipe", pipe, one(), segment, "not a memfd"),
        ("a socket", socket.into(), one(), segment, "not a memfd"),
        ("/dev/null", File::open("/dev/null").unwrap().into(), one(), segment, "not a memfd"),
        ("a file", File::open(&file).unwrap().into(), one(), segment, "not"),
        ("a directory", File::open("/").unwrap().into(), one(), segment, "not"),
        ("no seals", memfd(2 * PAGE), one(), segment, "F_SEAL_SHRINK"),
        ("a size that can change", sealed(memfd(2 * PAGE), SealFlags::WRITE), one(), segment, "F_SEAL_SHRINK"),
        ("a size that can grow", sealed(memfd(2 * PAGE), SealFlags::WRITE | SealFlags::SHRINK), one(), segment, "F_SEAL_SHRINK"),
        ("bytes that anybody can write", sealed(memfd(2 * PAGE), SIZE), one(), segment, "F_SEAL_WRITE"),
        ("a hole", sealed(unsealed(MemfdFlags::empty(), PAGE).unwrap(), FINAL), one(), segment, "hole"),
        ("a hole after the first page", sealed(hole, FINAL), json!([place("x", 1024, 0)]), segment, "hole at byte 4096"),
        ("an offset within a page", whole(), json!([place("x", 8, 4096)]), segment, "4096 past"),
        ("a range beyond the end", whole(), json!([place("x", 8, 2 * PAGE)]), segment, "131072"),
        ("an end that is no page's", sealed(memfd(PAGE + 64), FINAL), json!([place("x", 8, PAGE)]), segment, "65536"),
        ("an end beyond 2^64", whole(), json!([place("x", 8192, u64::MAX - 65_535)]), tensor, "2^64"),
        ("the same page twice", whole(), json!([place("x", 8, 0), place("y", 8, 0)]), segment, "range"),
        ("ranges that meet", whole(), json!([place("x", 8193, 0), place("y", 8, PAGE)]), segment, "range"),
        ("a length that is too short", whole(), json!([{"name": "x", "dtype": "float64", "shape": [8], "offset": 0, "length": 63}]), tensor, "64"),
        ("one name for two", whole(), json!([place("x", 8, 0), place("x", 8, PAGE)]), tensor, "`x`"),
        ("no tensors", whole(), json!([]), tensor, "tensor"),
        ("a size over 2^63", whole(), json!([place("x", u64::MAX / 8, 0)]), tensor, "float64"),
        ("more than the budget", sealed(huge, FINAL), one(), "BUDGET_EXCEEDED", "8589934592"),
    ];
    match unsealed(MemfdFlags::HUGETLB, 2 << 20) {
        Ok(fd) => table.push((
            "huge pages",
            sealed(fd, FINAL),
            one(),
            segment,
            "MFD_HUGETLB",
        )),
        Err(error) => eprintln!("not tested: memfd_create with MFD_HUGETLB: {error}"),
    }
    match tempfile::tempfile_in("/dev/shm") {
        Ok(file) => table.push((
            "a file on tmpfs",
            file.into(),
            one(),
            segment,
            "F_SEAL_SHRINK",
        )),
        Err(error) => eprintln!("not tested: a file in /dev/shm: {error}"),
    }
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    for (what, fd, tensors, reason, word) in table {
        let code = if reason == "BUDGET_EXCEEDED" {
            "RESOURCE_EXHAUSTED"
        } else {
            "INVALID_ARGUMENT"
        };
        let reply = client.ask_with(
            Op::Adopt,
            json!({"tensors": tensors, "name": "x"}),
            &[fd.as_fd()],
        );
        let message = reply.refused(code, reason);
        assert!(message.contains(word), "{what}: {message:?} lacks {word:?}");
    }
    assert_eq!(Holdings::of(&client.ok(Op::Stats, json!({}))), before);
    assert_eq!(client.ok(Op::List, json!({}))["flights"], json!([]));
}

#[test]
fn what_can_be_adopted_is_used_where_it_lies() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    let x = ramp(MOVED);
    let fresh = || {
        let fd = memfd(3 * PAGE + (MOVED * 8).next_multiple_of(PAGE));
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        write(fd.as_fd(), 3 * PAGE, &bytes);
        fd
    };
    let tensors = json!([
        place("small", 8, 0),
        place("x", MOVED, 3 * PAGE),
        place("none", 0, PAGE)
    ]);
    let input = |adopted: &Value| json!({"segment": adopted["mapping"]["segment"], "tensor": "x"});

    // Sealed; by a descriptor that only reads; with a name.
    let fd = sealed(fresh(), FINAL);
    let readonly: OwnedFd = File::open(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&fd)
    ))
    .unwrap()
    .into();
    for (name, fd) in [("a", &fd), ("b", &readonly)] {
        let adopted = client
            .ask_with(
                Op::Adopt,
                json!({"tensors": tensors, "name": name}),
                &[fd.as_fd()],
            )
            .accepted();
        assert_eq!(
            (
                &adopted["mapping"]["writers"],
                &adopted["mapping"]["tensors"]
            ),
            (&json!("none"), &tensors)
        );
        check_call(&mut client, input(&adopted), &x);
        check_call(&mut client, json!(format!("{name}#x")), &x);
        check_call(
            &mut client,
            json!({"name": name, "tensor": "small"}),
            &[0.0; 8],
        );
        check_call(&mut client, json!({"name": name, "tensor": "none"}), &[]);
        for (input, how) in [
            (
                json!(name),
                format!("flight `{name}` has 3 tensors; say which, as `{name}#TENSOR`"),
            ),
            (
                json!({"segment": adopted["mapping"]["segment"]}),
                "has 3 tensors; say which, by `tensor` beside `segment`".to_owned(),
            ),
        ] {
            let message = client
                .ask(Op::Invoke, scale_shift(input, 1.0, 0.0))
                .refused("INVALID_ARGUMENT", "BAD_INPUT");
            assert!(message.contains(&how), "{message}");
        }
        client.ok(Op::Drop, json!({"name": name}));
        client.ok(Op::Release, json!({"leases": [adopted["lease"]]}));
    }
    // Its creator still writes.
    let fd = fresh();
    let bytes = usize::try_from(rustix::fs::fstat(&fd).unwrap().st_size).unwrap();
    let mut pages = WriteMapping::new(&fd, bytes).unwrap();
    seal(&fd, FUTURE);
    let named = client.ask_with(
        Op::Adopt,
        json!({"tensors": tensors, "name": "a"}),
        &[fd.as_fd()],
    );
    named.refused("INVALID_ARGUMENT", "BAD_SEGMENT");
    let adopted = client
        .ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()])
        .accepted();
    assert_eq!(adopted["mapping"]["writers"], "creator");
    check_call(&mut client, input(&adopted), &x);
    pages.bytes_mut()[3 * 65_536..][..8].copy_from_slice(&1e6_f64.to_le_bytes());
    let changed: Vec<f64> = std::iter::once(1e6).chain(x[1..].iter().copied()).collect();
    check_call(&mut client, input(&adopted), &changed);
    client
        .ask(Op::Seal, json!({"segment": adopted["mapping"]["segment"]}))
        .refused("FAILED_PRECONDITION", "STILL_WRITABLE");
    drop(pages);
    assert_eq!(
        client.ok(Op::Seal, json!({"segment": adopted["mapping"]["segment"]}))["mapping"]["writers"],
        "none"
    );
    check_call(&mut client, input(&adopted), &changed);
    client.ok(Op::Release, json!({"leases": [adopted["lease"]]}));
    // It forbade every further seal, so it can be used and never sealed.
    let fd = sealed(fresh(), FUTURE | SealFlags::SEAL);
    let adopted = client
        .ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()])
        .accepted();
    check_call(&mut client, input(&adopted), &x);
    client
        .ask(
            Op::Publish,
            json!({"segment": adopted["mapping"]["segment"], "name": "a"}),
        )
        .refused("INVALID_ARGUMENT", "BAD_SEGMENT");
    client.ok(Op::Release, json!({"leases": [adopted["lease"]]}));
    let after = Holdings::of(&host.settled(&mut client));
    // The descriptors of results that the pool keeps warm are not counted.
    assert_eq!(after, before);
}

/// A byte of a segment.
type Place = fn(&Created) -> u64;

#[test]
fn the_hosts_own_bytes_of_a_segment_are_the_hosts() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    let footer = |created: &Created| created.bytes as u64 - 6;
    let places: [(&str, Place, bool); 4] = [
        ("the magic", |_| 0, true),
        ("the schema", |_| 64, true),
        ("the last byte", |created| created.bytes as u64 - 1, true),
        ("a tensor's padding", |created| created.offset + 48, false),
    ];
    for (what, at, refused) in places {
        let created = client.create(6);
        created.fill(&ramp(6));
        write(created.fd.as_fd(), at(&created), &[0xAA]);
        let reply = client.ask(
            Op::Publish,
            json!({"segment": created.segment, "name": "x"}),
        );
        if refused {
            assert!(
                reply
                    .refused("INVALID_ARGUMENT", "BAD_SEGMENT")
                    .contains("header or footer"),
                "{what}"
            );
            client
                .ask(Op::Lookup, json!({"name": "x"}))
                .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
            // Sealed as it is, so it cannot be mended.
            client
                .ask(Op::Seal, json!({"segment": created.segment}))
                .refused("INVALID_ARGUMENT", "BAD_SEGMENT");
        } else {
            reply.accepted();
            check_call(&mut client, json!("x"), &ramp(6));
            client.ok(Op::Drop, json!({"name": "x"}));
        }
        client.ok(Op::Release, json!({"leases": [created.lease]}));
    }
    // As an input its flatbuffers are never read.
    let created = client.create(6);
    created.fill(&ramp(6));
    write(created.fd.as_fd(), footer(&created), b"NOPE!!");
    check_call(&mut client, json!({"segment": created.segment}), &ramp(6));
    client.ok(Op::Release, json!({"leases": [created.lease]}));
    // Until this client has let go of it, it is charged.
    drop(created);
    host.eventually(&mut client, "as before", |stats| {
        Holdings::of(stats) == before
    });
}

#[test]
fn a_segment_keeps_its_size_whatever_its_client_does() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    // Both ways of using a tensor: a window, and a copy.
    for elements in [MOVED, 10] {
        let created = client.create(elements);
        let size = rustix::fs::fstat(&created.fd)
            .unwrap()
            .st_size
            .cast_unsigned();
        for bytes in [0, created.offset, size - 4096, size + 4096] {
            let cut = rustix::fs::ftruncate(&created.fd, bytes);
            assert_eq!(
                cut,
                Err(rustix::io::Errno::PERM),
                "to {bytes} of {size} bytes"
            );
        }
        created.fill(&ramp(elements));
        check_call(
            &mut client,
            json!({"segment": created.segment}),
            &ramp(elements),
        );
        assert!(
            rustix::fs::ftruncate(&created.fd, 0).is_err(),
            "nor when it is lent"
        );
        // What a hole reads as is the client's own affair.
        let punched = client.create(elements);
        punched.fill(&ramp(elements));
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&punched.fd, flags, punched.offset, PAGE).unwrap();
        let holed: Vec<f64> = ramp(elements)
            .into_iter()
            .enumerate()
            .map(|(i, v)| if i < 8192 { 0.0 } else { v })
            .collect();
        check_call(&mut client, json!({"segment": punched.segment}), &holed);
    }
    // A client that forbids the seals gets its own mistake named.
    let created = client.create(MOVED);
    seal(&created.fd, SealFlags::SEAL);
    client
        .ask(Op::Seal, json!({"segment": created.segment}))
        .refused("INVALID_ARGUMENT", "BAD_SEGMENT");
    client
        .ask(
            Op::Invoke,
            scale_shift(json!({"segment": created.segment}), 1.0, 0.0),
        )
        .refused("INVALID_ARGUMENT", "BAD_SEGMENT");
    // One that seals it first does the host's work.
    let created = client.create(10);
    created.fill(&ramp(10));
    seal(&created.fd, FINAL);
    client.ok(
        Op::Publish,
        json!({"segment": created.segment, "name": "x"}),
    );
    check_call(&mut client, json!("x"), &ramp(10));
}

#[test]
fn a_segment_that_is_mapped_writable_can_be_published_once_it_is_not() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let created = client.create(MOVED);
    created.fill(&ramp(MOVED));
    let pages = WriteMapping::new(&created.fd, created.bytes).unwrap();
    let publish = json!({"segment": created.segment, "name": "x"});
    for _ in 0..3 {
        let message = client
            .ask(Op::Publish, publish.clone())
            .refused("FAILED_PRECONDITION", "STILL_WRITABLE");
        assert!(message.contains("unmap"), "{message}");
        client
            .ask(Op::Seal, json!({"segment": created.segment}))
            .refused("FAILED_PRECONDITION", "STILL_WRITABLE");
        client
            .ask(Op::Lookup, json!({"name": "x"}))
            .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
        check_call(
            &mut client,
            json!({"segment": created.segment}),
            &ramp(MOVED),
        );
    }
    let pages = pages.replace_readonly(&created.fd).unwrap();
    let mapping = client.ok(Op::Publish, publish)["mapping"].clone();
    assert_eq!(mapping["writers"], "none");
    check_call(&mut client, json!("x"), &ramp(MOVED));
    let mapped = client.ask(Op::Map, json!({"name": "x"}));
    let twin = ReadMapping::new(&mapped.fds[0], created.bytes).unwrap();
    assert_eq!((twin.inode(), twin.bytes()), (pages.inode(), pages.bytes()));
    assert!(
        WriteMapping::new(&mapped.fds[0], created.bytes).is_err(),
        "what MAP gives cannot be written"
    );
    assert!(
        WriteMapping::new(&created.fd, created.bytes).is_err(),
        "nor can what CREATE gave, any more"
    );
}

/// Holds a write lease on the memfd that it has as stdin, opened anew, until it is killed.
fn hold_lease(fd: &OwnedFd) -> Option<Child> {
    let program = "import fcntl, os, sys, signal\n\
        signal.signal(signal.SIGIO, signal.SIG_IGN)\n\
        own = os.open('/proc/self/fd/0', os.O_RDWR)\n\
        os.close(0)\n\
        try: fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n\
        except OSError as error: print(error, flush=True); sys.exit()\n\
        print('held', flush=True)\n\
        signal.pause()\n";
    let mut child = Command::new("python3")
        .args(["-c", program])
        .stdin(Stdio::from(fd.try_clone().unwrap()))
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    if line == "held\n" {
        return Some(child);
    }
    eprintln!("not tested: no file lease: {line}");
    let _ = child.wait();
    None
}

#[test]
fn a_file_lease_on_a_memfd_holds_up_nobody() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let fd = sealed(memfd(2 * PAGE), FUTURE);
    let tensors = json!([place("x", 8, 0)]);
    let bad = ("INVALID_ARGUMENT", "BAD_SEGMENT");
    let adopted = client
        .ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()])
        .accepted();
    let id = json!({"segment": adopted["mapping"]["segment"]});
    let Some(mut holder) = hold_lease(&fd) else {
        return;
    };
    let begin = Instant::now();
    for op in [Op::Map, Op::Seal] {
        let message = client.ask(op, id.clone()).refused(bad.0, bad.1);
        assert!(message.contains("F_SETLEASE"), "{message}");
    }
    let message = client
        .ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()])
        .refused(bad.0, bad.1);
    assert!(message.contains("F_SETLEASE"), "{message}");
    match host.has_workers() {
        // Another process is given a descriptor as a client is.
        true => {
            let call = client.ask(Op::Invoke, scale_shift(id.clone(), 2.0, 1.0));
            call.refused(bad.0, bad.1);
        }
        false => check_call(&mut client, id.clone(), &[0.0; 8]),
    }
    // Linux's own wait would be 45 s for each.
    assert!(begin.elapsed() < Duration::from_secs(40));
    holder.kill().unwrap();
    holder.wait().unwrap();
    client.ask(Op::Map, id.clone()).accepted();
    client.ask(Op::Seal, id).accepted();
}
