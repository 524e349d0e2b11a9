//! Clients that break the protocol, that cheat, and that die: each is answered as `docs/protocol.md`
//! says, the host stays, nothing is left behind, and the next client is served.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/served.rs"]
mod served;

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use served::{
    Created, FINAL, FUTURE, Frame, Holdings, PAGE, Raw, SIZE, Served, as_user, check_call, memfd,
    number, numbers, packet, put, ramp, scale_shift, seal, send_with, write,
};
use strait_client::wire::{BODY_BYTES_MAX, Op};
use strait_memory::{ReadMapping, WriteMapping};

/// Above `move_min_bytes`: such a tensor becomes a window.
const MOVED: u64 = 100_000;

/// A host with the kernel `spins/k`, which never ends.
fn host_with_spins() -> Served {
    let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
    Served::with_plugin(&guest::component("spins", &text), &[])
}

/// Beside those that are parked, and those of results that the pool keeps warm.
fn mappings(stats: &Value) -> u64 {
    number(stats, "/process/mappings")
        .saturating_sub(number(stats, "/parked/mappings") + number(stats, "/pool/idle_segments"))
}

// ---- Frames that are wrong ----

/// A frame that is wrong, and what comes of it.
struct Bad {
    what: &'static str,
    packet: Vec<u8>,
    fds: usize,
    answer: (&'static str, &'static str),
    stays: bool,
}

const BAD_FRAME: (&str, &str) = ("INVALID_ARGUMENT", "BAD_FRAME");
const BAD_REQUEST: (&str, &str) = ("INVALID_ARGUMENT", "BAD_REQUEST");

/// The connection stays.
fn refused(
    what: &'static str,
    op: Op,
    body: impl AsRef<[u8]>,
    fds: usize,
    answer: (&'static str, &'static str),
) -> Bad {
    Bad {
        what,
        packet: packet(op as u8, 7, body.as_ref()),
        fds,
        answer,
        stays: true,
    }
}

/// A good PING whose header has `bytes` at `offset`.
fn patched(what: &'static str, offset: usize, bytes: &[u8], stays: bool) -> Bad {
    let mut packet = packet(Op::Ping as u8, 7, b"{}");
    packet[offset..offset + bytes.len()].copy_from_slice(bytes);
    Bad {
        what,
        packet,
        fds: 0,
        answer: BAD_FRAME,
        stays,
    }
}

/// Sends it on a connection of its own; checks the answer, what becomes of the connection, and
/// that the host keeps no descriptor that came with it.
fn check_bad(host: &Served, bad: &Bad, greeted: bool) {
    let what = bad.what;
    let mut client = if greeted {
        host.greeted()
    } else {
        host.connect()
    };
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let copies: Vec<_> = (0..bad.fds).map(|_| writer.as_fd()).collect();
    send_with(&client, &bad.packet, &copies);
    drop(writer);
    let reply = client
        .receive()
        .unwrap_or_else(|| panic!("{what}: closed without a word"));
    reply.refused(bad.answer.0, bad.answer.1);
    let sequence = bad
        .packet
        .get(4..8)
        .map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()));
    assert_eq!(reply.sequence(), sequence, "{what}");
    // The end of the pipe: nobody has its writing end any more.
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0, "{what}");
    if bad.stays {
        if !greeted {
            client.hello();
        }
        assert_eq!(
            client
                .ask(Op::Ping, json!({"request_id": "after"}))
                .accepted(),
            json!({"request_id": "after"}),
            "{what}"
        );
    } else {
        client.ended();
    }
}

#[test]
fn a_frame_that_is_wrong_is_answered_by_what_is_wrong() {
    let host = Served::start(&[]);
    let ping = |body: &[u8]| packet(Op::Ping as u8, 7, body);
    let closing = |what, packet, fds| Bad {
        what,
        packet,
        fds,
        answer: BAD_FRAME,
        stays: false,
    };
    let long_name = "n".repeat(201);
    #[rustfmt::skip]
    let table = [
        closing("one byte", b"S".to_vec(), 0),
        closing("a byte less than a header", ping(b"")[..15].to_vec(), 0),
        patched("wrong magic", 0, b"XT", false),
        patched("version 0", 2, &[0], false),
        patched("version 2", 2, &[2], false),
        patched("length: more than there is", 8, &3_u32.to_le_bytes(), false),
        patched("length: less than there is", 8, &1_u32.to_le_bytes(), false),
        patched("length: u32::MAX", 8, &u32::MAX.to_le_bytes(), false),
        patched("flags 1", 12, &1_u32.to_le_bytes(), true),
        patched("flags: the highest", 12, &(1_u32 << 31).to_le_bytes(), true),
        patched("op 0", 3, &[0], true),
        patched("op 23", 3, &[23], true),
        patched("op 63", 3, &[63], true),
        patched("op 255", 3, &[255], true),
        patched("sequence 0", 4, &[0; 4], true),
        closing("a body one byte too long", ping(&vec![b' '; BODY_BYTES_MAX + 1]), 0),
        closing("a body far too long", ping(&vec![b' '; 100_000]), 0),
        closing("17 descriptors", ping(b"{}"), 17),
        closing("64 descriptors", ping(b"{}"), 64),
        refused("a descriptor with PING", Op::Ping, "{}", 1, BAD_FRAME),
        refused("a descriptor with HELLO", Op::Hello, r#"{"protocol":1,"client":"c"}"#, 1, BAD_FRAME),
        refused("a descriptor with CANCEL", Op::Cancel, r#"{"sequence":1}"#, 1, BAD_FRAME),
        refused("16 descriptors with INVOKE", Op::Invoke, r#"{"kernel":"clip","inputs":{}}"#, 16, BAD_FRAME),
        refused("ADOPT without a descriptor", Op::Adopt, r#"{"tensors":[]}"#, 0, BAD_FRAME),
        refused("ADOPT with two", Op::Adopt, r#"{"tensors":[]}"#, 2, BAD_FRAME),
        refused("WELCOME from a client", Op::Welcome, "{}", 0, BAD_FRAME),
        refused("OK from a client", Op::Ok, "{}", 0, BAD_FRAME),
        refused("ERROR from a client", Op::Error, "{}", 0, BAD_FRAME),
        refused("GONE from a client", Op::Gone, "{}", 0, BAD_FRAME),
        refused("SHUTDOWN from a client", Op::Shutdown, "{}", 0, BAD_FRAME),
        refused("PREPARE", Op::Prepare, "{}", 0, ("UNIMPLEMENTED", "UNSUPPORTED_OP")),
        refused("CALL", Op::Call, "no JSON", 0, ("UNIMPLEMENTED", "UNSUPPORTED_OP")),
        refused("STREAM", Op::Stream, "{}", 0, ("UNIMPLEMENTED", "UNSUPPORTED_OP")),
        refused("CHUNK", Op::Chunk, "{}", 0, ("UNIMPLEMENTED", "UNSUPPORTED_OP")),
        refused("not JSON", Op::Ping, "hello", 0, BAD_REQUEST),
        refused("half of JSON", Op::Ping, r#"{"request_id":"#, 0, BAD_REQUEST),
        refused("JSON and more", Op::Ping, "{} {}", 0, BAD_REQUEST),
        refused("blanks", Op::Ping, "  ", 0, BAD_REQUEST),
        refused("a list", Op::Lookup, r#"["x"]"#, 0, BAD_REQUEST),
        refused("an empty list", Op::List, "[]", 0, BAD_REQUEST),
        refused("null", Op::Stats, "null", 0, BAD_REQUEST),
        refused("deep nesting", Op::Invoke, "{\"inputs\":".repeat(5000), 0, BAD_REQUEST),
        refused("not UTF-8", Op::Lookup, b"{\"name\":\"\xff\xfe\"}", 0, BAD_REQUEST),
        refused("half of a surrogate", Op::Lookup, r#"{"name":"\ud800"}"#, 0, BAD_REQUEST),
        refused("a field that does not exist", Op::Stats, r#"{"verbose":true}"#, 0, BAD_REQUEST),
        refused("a misspelt option", Op::Publish, r#"{"segment":"0","name":"x","replaec":true}"#, 0, BAD_REQUEST),
        refused("one in an inner object", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[1],"fill":0}]}"#, 0, BAD_REQUEST),
        refused("one in an input", Op::Invoke, r#"{"kernel":"clip","inputs":{"x":{"name":"x","colum":"c"}}}"#, 0, BAD_REQUEST),
        refused("an input by two names", Op::Invoke, r#"{"kernel":"clip","inputs":{"x":{"name":"x","segment":"0"}}}"#, 0, BAD_REQUEST),
        refused("a field twice", Op::Lookup, r#"{"name":"x","name":"y"}"#, 0, BAD_REQUEST),
        refused("a missing field", Op::Lookup, "{}", 0, BAD_REQUEST),
        refused("a wrong type", Op::Lookup, r#"{"name":7}"#, 0, BAD_REQUEST),
        refused("a negative number", Op::Map, r#"{"name":"x","lease_ms":-1}"#, 0, BAD_REQUEST),
        refused("MAP of both", Op::Map, r#"{"name":"x","segment":"00000000000000000000000000000000"}"#, 0, BAD_REQUEST),
        refused("MAP of nothing", Op::Map, "{}", 0, BAD_REQUEST),
        refused("no segment id", Op::Map, r#"{"segment":"xyz"}"#, 0, BAD_REQUEST),
        refused("an unknown dtype", Op::Create, r#"{"tensors":[{"name":"x","dtype":"float65","shape":[1]}]}"#, 0, BAD_REQUEST),
        refused("an empty request id", Op::Ping, r#"{"request_id":""}"#, 0, BAD_REQUEST),
        refused("a request id with a blank", Op::Ping, r#"{"request_id":"a b"}"#, 0, BAD_REQUEST),
        refused("a request id of 65", Op::Ping, format!(r#"{{"request_id":"{}"}}"#, "r".repeat(65)), 0, BAD_REQUEST),
        refused("a segment nobody has", Op::Seal, r#"{"segment":"00000000000000000000000000000000"}"#, 0, ("NOT_FOUND", "SEGMENT_NOT_FOUND")),
        refused("a name nobody has", Op::Lookup, r#"{"name":"x"}"#, 0, ("NOT_FOUND", "TENSOR_NOT_FOUND")),
        refused("a name that is too long", Op::Drop, format!(r#"{{"name":"{long_name}"}}"#), 0, ("NOT_FOUND", "TENSOR_NOT_FOUND")),
        refused("an unknown kernel", Op::Invoke, r#"{"kernel":"nix","inputs":{}}"#, 0, ("NOT_FOUND", "KERNEL_NOT_FOUND")),
        refused("a size over 2^63", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[18446744073709551615]}]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("a segment over the budget", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[1099511627776]}]}"#, 0, ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED")),
        refused("nine axes", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[1,1,1,1,1,1,1,1,1]}]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("no tensors", Op::Create, r#"{"tensors":[]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("too many tensors", Op::Create, many_tensors(), 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
    ];
    let mut watcher = host.greeted();
    watcher.ok(Op::Ping, json!({}));
    let before = Holdings::of(&watcher.ok(Op::Stats, json!({})));
    for bad in &table {
        check_bad(&host, bad, true);
    }
    host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == before
    });
    // An empty packet cannot be told from the end.
    let client = host.greeted();
    send_with(&client, b"", &[]);
    client.ended();
    put(&mut watcher, "x", 10);
    check_call(&mut watcher, json!("x"), &ramp(10));
}

/// A CREATE of more tensors than a segment may have.
fn many_tensors() -> String {
    let one = |i| format!(r#"{{"name":"{i}","dtype":"int8","shape":[1]}}"#);
    let all: Vec<_> = (0..1000).map(one).collect();
    format!(r#"{{"tensors":[{}]}}"#, all.join(","))
}

#[test]
fn more_tensors_than_a_reply_can_name_are_refused_and_leave_nothing() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let too_many = ("INVALID_ARGUMENT", "BAD_TENSOR");
    let create = serde_json::from_str(&many_tensors()).unwrap();
    client
        .ask(Op::Create, create)
        .refused(too_many.0, too_many.1);
    let fd = sealed(memfd(PAGE), FINAL);
    let tensors = json!([place(&"n".repeat(BODY_BYTES_MAX - 200), 8, 0)]);
    client
        .ask_with(
            Op::Adopt,
            json!({"tensors": tensors, "name": "big"}),
            &[fd.as_fd()],
        )
        .refused(too_many.0, too_many.1);
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(stats["own"], json!({"leases": 0, "segments": 0}));
    assert_eq!(
        (number(&stats, "/segments"), number(&stats, "/flights")),
        (0, 0)
    );
}

#[test]
fn hello_comes_first_and_speaks_version_1() {
    let host = Served::start(&[]);
    let hello = |what, body: &str, answer, stays| Bad {
        what,
        packet: packet(Op::Hello as u8, 7, body.as_bytes()),
        fds: 0,
        answer,
        stays,
    };
    let early = ("FAILED_PRECONDITION", "NO_HELLO");
    for bad in [
        refused("PING before HELLO", Op::Ping, "{}", 0, early),
        refused(
            "CREATE before HELLO",
            Op::Create,
            r#"{"tensors":[]}"#,
            0,
            early,
        ),
        refused(
            "CANCEL before HELLO",
            Op::Cancel,
            r#"{"sequence":1}"#,
            0,
            early,
        ),
        refused(
            "ADOPT before HELLO",
            Op::Adopt,
            r#"{"tensors":[]}"#,
            1,
            early,
        ),
        hello(
            "protocol 2",
            r#"{"protocol":2,"client":"c"}"#,
            ("FAILED_PRECONDITION", "PROTOCOL_VERSION"),
            false,
        ),
        hello(
            "protocol 0",
            r#"{"protocol":0,"client":"c"}"#,
            ("FAILED_PRECONDITION", "PROTOCOL_VERSION"),
            false,
        ),
        hello(
            "a misspelt HELLO",
            r#"{"protocol":1,"cleint":"c"}"#,
            BAD_REQUEST,
            true,
        ),
        hello("an empty HELLO", "", BAD_REQUEST, true),
    ] {
        check_bad(&host, &bad, false);
    }
    let mut client = host.greeted();
    client.hello();
}

#[test]
fn a_sequence_in_use_is_refused_and_its_invoke_goes_on() {
    let host = host_with_spins();
    let mut client = host.greeted();
    put(&mut client, "x", 10);
    let running = client.begin(
        Op::Invoke,
        &json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000}),
        &[],
    );
    client.send(&packet(Op::Ping as u8, running, b""), &[]);
    let reply = client.receive().unwrap();
    assert_eq!(reply.sequence(), running);
    assert!(reply.refused(BAD_FRAME.0, BAD_FRAME.1).contains("in use"));
    assert_eq!(
        client.ok(Op::Cancel, json!({"sequence": running + 100}))["cancelled"],
        false
    );
    // The two replies may come in either order.
    let cancel = client.begin(Op::Cancel, &json!({"sequence": running}), &[]);
    for _ in 0..2 {
        let reply = client.receive().unwrap();
        if reply.sequence() == cancel {
            assert_eq!(reply.accepted()["cancelled"], true);
        } else {
            assert_eq!(reply.sequence(), running);
            reply.refused("CANCELLED", "CANCELLED");
        }
    }
    assert_eq!(
        client.ok(Op::Cancel, json!({"sequence": running}))["cancelled"],
        false
    );
    client.send(&packet(Op::Ping as u8, running, b""), &[]);
    assert_eq!(
        client.receive().unwrap().sequence(),
        running,
        "it is free again"
    );
}

// ---- ADOPT ----

fn place(name: &str, elements: u64, offset: u64) -> Value {
    json!({"name": name, "dtype": "float64", "shape": [elements], "offset": offset, "length": elements * 8})
}

fn unsealed(flags: MemfdFlags, bytes: u64) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(
        "strait-tests",
        flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd)
}

fn sealed(fd: OwnedFd, seals: SealFlags) -> OwnedFd {
    seal(&fd, seals);
    fd
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
    let input = |adopted: &Value| json!({"segment": adopted["mapping"]["segment"], "column": "x"});

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
            (&adopted["mapping"]["seal"], &adopted["mapping"]["tensors"]),
            (&json!("write"), &tensors)
        );
        check_call(&mut client, input(&adopted), &x);
        check_call(&mut client, json!(format!("{name}#x")), &x);
        check_call(
            &mut client,
            json!({"name": name, "column": "small"}),
            &[0.0; 8],
        );
        check_call(&mut client, json!({"name": name, "column": "none"}), &[]);
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
    assert_eq!(adopted["mapping"]["seal"], "client-write");
    check_call(&mut client, input(&adopted), &x);
    pages.bytes_mut()[3 * 65_536..][..8].copy_from_slice(&1e6_f64.to_le_bytes());
    let changed: Vec<f64> = std::iter::once(1e6).chain(x[1..].iter().copied()).collect();
    check_call(&mut client, input(&adopted), &changed);
    client
        .ask(Op::Seal, json!({"segment": adopted["mapping"]["segment"]}))
        .refused("FAILED_PRECONDITION", "STILL_WRITABLE");
    drop(pages);
    assert_eq!(
        client.ok(Op::Seal, json!({"segment": adopted["mapping"]["segment"]}))["mapping"]["seal"],
        "write"
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
    let after = Holdings::of(&client.ok(Op::Stats, json!({})));
    // The descriptors of results that the pool keeps warm are not counted.
    assert_eq!(after, before);
}

// ---- Segments that a client cheats with ----

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
                .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
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
    assert_eq!(Holdings::of(&client.ok(Op::Stats, json!({}))), before);
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
            .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
        check_call(
            &mut client,
            json!({"segment": created.segment}),
            &ramp(MOVED),
        );
    }
    let pages = pages.replace_readonly(&created.fd).unwrap();
    let mapping = client.ok(Op::Publish, publish)["mapping"].clone();
    assert_eq!(mapping["seal"], "write");
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

// ---- Clients that die ----

/// What the client process has done when it is killed.
const STEPS: [&str; 9] = [
    "connected",
    "greeted",
    "created",
    "filling",
    "published",
    "mapped",
    "running",
    "crowding",
    "deaf",
];
const THERE: &str = "strait-tests: there";
const FLOOD: usize = 100_000;

/// Not a test: the client process of `a_client_that_dies_leaves_nothing_behind`, which runs this
/// test binary again with these variables.
#[test]
#[ignore = "the process that another test kills"]
fn client_process() {
    let variables =
        ["STEP", "SOCKET", "HEIR"].map(|name| std::env::var(format!("TEST_CLIENT_{name}")));
    let [Ok(step), Ok(socket), Ok(heir)] = variables else {
        return;
    };
    let mut client = Raw::connect(Path::new(&socket)).unwrap();
    if step != "connected" {
        client.hello();
    }
    let mut pages = None;
    let mut held = Vec::new();
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "shared"}, "deadline_ms": 600_000});
    match step.as_str() {
        "connected" | "greeted" => {}
        "created" => held.push(client.create(MOVED).fd),
        "filling" => {
            let created = client.create(MOVED);
            pages = Some(WriteMapping::new(&created.fd, created.bytes).unwrap());
            held.push(created.fd);
        }
        "published" => put(&mut client, "left", MOVED),
        "mapped" => {
            held.extend(client.ask(Op::Map, json!({"name": "shared"})).fds);
            held.extend(
                client
                    .ask(Op::Invoke, scale_shift(json!("shared"), 3.0, 0.0))
                    .fds,
            );
            held.push(client.create(10).fd);
        }
        "running" => {
            let created = client.create(MOVED);
            let own = json!({"kernel": "spins/k", "inputs": {"x": {"segment": created.segment}}, "deadline_ms": 600_000});
            client.begin(Op::Invoke, &own, &[]);
            while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
        }
        "crowding" => {
            for _ in 0..40 {
                client.begin(Op::Invoke, &spin, &[]);
            }
            while number(&client.ok(Op::Stats, json!({})), "/running") == 0 {}
        }
        "deaf" => {
            held.push(client.create(MOVED).fd);
            client.begin(Op::Invoke, &spin, &[]);
            flood(&client);
        }
        other => panic!("no step {other}"),
    }
    let mut heir_id = 0;
    if heir == "1" {
        // As a worker does that was forked: it has the connection, and a descriptor of a segment.
        let stdin = client.socket.as_fd().try_clone_to_owned().unwrap();
        let stdout = held
            .first()
            .map_or_else(Stdio::null, |fd| fd.try_clone().unwrap().into());
        let heir = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(stdin))
            .stdout(stdout)
            .stderr(Stdio::null())
            .spawn();
        heir_id = heir.unwrap().id();
    }
    println!("\n{THERE} {heir_id}");
    std::io::stdout().flush().unwrap();
    loop {
        match &mut pages {
            Some(pages) => pages.bytes_mut()[65_536..].fill(7),
            None => std::thread::park(),
        }
    }
}

/// Asks without reading the answers until the host does not read any more; answers how often.
fn flood(client: &Raw) -> usize {
    client.socket.set_nonblocking(true).unwrap();
    let ping = packet(
        Op::Ping as u8,
        50,
        format!(r#"{{"request_id":"{}"}}"#, "r".repeat(60)).as_bytes(),
    );
    let mut sent = 0;
    let mut waited = 0;
    while sent < FLOOD && waited < 100 {
        match client.socket.send(&[&ping], &[]) {
            Ok(()) => (sent, waited) = (sent + 1, 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                waited += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
    }
    client.socket.set_nonblocking(false).unwrap();
    sent
}

/// A client process at `step`; with `heir` another process keeps its connection open.
struct Client {
    child: Child,
    heir: Option<Pid>,
}

impl Client {
    fn start(socket: &Path, step: &str, heir: bool) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "client_process",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("TEST_CLIENT_STEP", step)
            .env("TEST_CLIENT_SOCKET", socket)
            .env("TEST_CLIENT_HEIR", if heir { "1" } else { "0" })
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let there = lines.find_map(|line| {
            line.unwrap()
                .strip_prefix(THERE)
                .map(|heir| heir.trim().parse().unwrap())
        });
        let heir =
            Pid::from_raw(there.unwrap_or_else(|| panic!("the client process failed at {step}")));
        Self { child, heir }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may be dead as the test meant it to be.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(heir) = self.heir {
            let _ = rustix::process::kill_process(heir, Signal::KILL);
        }
    }
}

#[test]
fn a_client_that_dies_leaves_nothing_behind() {
    let host = host_with_spins();
    let mut watcher = host.greeted();
    put(&mut watcher, "shared", MOVED);
    let mut before = None;
    let mut counts = Vec::new();
    // The first round warms what stays: the pool, parked mappings, idle guests.
    for round in 0..4 {
        for heir in [false, true] {
            for step in STEPS {
                let mut client = Client::start(&host.socket(), step, heir);
                if step != "connected" {
                    let stats = watcher.ok(Op::Stats, json!({}));
                    assert_eq!(number(&stats, "/sessions"), 2, "{step}: {stats}");
                }
                client.kill();
                host.eventually(&mut watcher, step, |stats| {
                    number(stats, "/sessions") == 1 && number(stats, "/running") == 0
                });
                if step == "published" {
                    check_call(&mut watcher, json!("left"), &ramp(MOVED));
                    watcher.ok(Op::Drop, json!({"name": "left"}));
                }
                check_call(&mut host.greeted(), json!("shared"), &ramp(MOVED));
                if let Some(before) = &before {
                    let what = format!("after {step} in round {round}, heir {heir}: {before:?}");
                    host.eventually(&mut watcher, &what, |stats| Holdings::of(stats) == *before);
                }
            }
        }
        let stats = host.settled(&mut watcher);
        before.get_or_insert_with(|| Holdings::of(&stats));
        counts.push((mappings(&stats), number(&stats, "/process/threads")));
    }
    // Threads come and go with their stacks; what each client left behind would be as many as there were.
    let (first, last) = (counts[1], counts[3]);
    let clients = 2 * 2 * STEPS.len() as u64;
    assert!(
        last.0 < first.0 + clients && last.1 < first.1 + clients,
        "mappings and threads after each round: {counts:?}"
    );
}

#[test]
fn a_client_that_does_not_listen_holds_up_nobody_else() {
    let host = host_with_spins();
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    let before = Holdings::of(&watcher.ok(Op::Stats, json!({})));
    let deaf = host.greeted();
    let sent = flood(&deaf);
    assert!(
        sent < FLOOD,
        "the host takes requests without end from a client that reads no replies"
    );
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
    // Nothing was lost: as many answers as requests.
    for index in 0..sent {
        let reply = deaf
            .receive()
            .unwrap_or_else(|| panic!("the end after {index} of {sent} replies"));
        assert_eq!((reply.op(), reply.sequence()), (Op::Ok, 50));
    }
    drop(deaf);
    // One that is deaf and refused is not kept waiting for.
    let deaf = host.greeted();
    flood(&deaf);
    drop(deaf);
    host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == before
    });
    // Nor does one keep the host from ending.
    let deaf = host.greeted();
    flood(&deaf);
    host.terminate();
    host.ended();
}

// ---- Leases ----

fn gone(client: &Raw, lease: &Value, segment: &Value) {
    let frame = client
        .receive()
        .expect("GONE comes over a connection that stays");
    assert_eq!(
        (frame.op(), frame.sequence()),
        (Op::Gone, 0),
        "{}",
        frame.text
    );
    assert_eq!(
        frame.body(),
        json!({"lease": lease, "segment": segment, "reason": "expired"})
    );
}

#[test]
fn a_lease_that_expires_is_announced_and_what_is_mapped_stays() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", MOVED);
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    let late = ("FAILED_PRECONDITION", "LEASE_EXPIRED");

    // A created segment ends with its lease.
    let body =
        json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [MOVED]}], "lease_ms": 50});
    let created = client.ask(Op::Create, body).accepted();
    assert_eq!(created["expires_ms"], 50);
    let (lease, segment) = (&created["lease"], &created["mapping"]["segment"]);
    gone(&client, lease, segment);
    client
        .ask(Op::Publish, json!({"segment": segment, "name": "late"}))
        .refused(late.0, late.1);
    client
        .ask(Op::Seal, json!({"segment": segment}))
        .refused(late.0, late.1);
    client
        .ask(Op::Map, json!({"segment": segment}))
        .refused(late.0, late.1);
    client
        .ask(
            Op::Invoke,
            scale_shift(json!({"segment": segment}), 1.0, 0.0),
        )
        .refused(late.0, late.1);
    client
        .ask(Op::Renew, json!({"leases": [lease]}))
        .refused(late.0, late.1);
    assert_eq!(
        client.ok(Op::Release, json!({"leases": [lease]}))["released"],
        0
    );

    // A renewed one lives on; when one of several is gone none is renewed.
    let first = client.ok(Op::Map, json!({"name": "x", "lease_ms": 400}));
    let second = client.ok(Op::Map, json!({"name": "x", "lease_ms": 400}));
    client
        .ask(
            Op::Renew,
            json!({"leases": [second["lease"], lease], "lease_ms": 600_000}),
        )
        .refused(late.0, late.1);
    assert_eq!(
        client.ok(
            Op::Renew,
            json!({"leases": [first["lease"]], "lease_ms": 600_000})
        )["expires_ms"],
        600_000
    );
    gone(&client, &second["lease"], &second["mapping"]["segment"]);
    client.ok(Op::Map, json!({"segment": first["mapping"]["segment"]}));
    assert_eq!(
        client.ok(Op::Stats, json!({}))["own"],
        json!({"leases": 2, "segments": 1})
    );

    // A result that is mapped when its lease expires: nobody writes there again.
    let mut invoke = scale_shift(json!("x"), 3.0, 0.0);
    invoke["lease_ms"] = json!(50);
    let reply = client.ask(Op::Invoke, invoke);
    let result = reply.accepted()["results"][0].clone();
    let bytes = usize::try_from(result["mapping"]["bytes"].as_u64().unwrap()).unwrap();
    let pages = ReadMapping::of_result(&reply.fds[0], bytes).unwrap();
    let snapshot = pages.bytes().to_vec();
    gone(&client, &result["lease"], &result["mapping"]["segment"]);
    for b in 1..20 {
        let reply = client.ask(Op::Invoke, scale_shift(json!("x"), 0.0, f64::from(b)));
        let other = ReadMapping::of_result(&reply.fds[0], bytes).unwrap();
        assert_ne!(other.inode(), pages.inode());
        client.ok(
            Op::Release,
            json!({"leases": [reply.body()["results"][0]["lease"]]}),
        );
    }
    assert!(
        pages.bytes() == snapshot,
        "an expired result's pages changed under their reader"
    );
    drop(client);
    let mut client = host.greeted();
    host.eventually(&mut client, "as before", |stats| {
        Holdings::of(stats) == before
    });
}

#[test]
fn a_lease_is_its_sessions_own() {
    let host = Served::start(&[]);
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let created = one.create(10);
    created.fill(&ramp(10));
    let id = json!({"segment": created.segment});
    let missing = ("NOT_FOUND", "SEGMENT_NOT_FOUND");
    for op in [Op::Map, Op::Seal] {
        other.ask(op, id.clone()).refused(missing.0, missing.1);
    }
    other
        .ask(
            Op::Publish,
            json!({"segment": created.segment, "name": "stolen"}),
        )
        .refused(missing.0, missing.1);
    other
        .ask(Op::Invoke, scale_shift(id.clone(), 1.0, 0.0))
        .refused(missing.0, missing.1);
    other
        .ask(Op::Renew, json!({"leases": [created.lease]}))
        .refused("FAILED_PRECONDITION", "LEASE_EXPIRED");
    assert_eq!(
        other.ok(Op::Release, json!({"leases": [created.lease, 0, u64::MAX]}))["released"],
        0
    );
    one.ok(Op::Map, id);
    assert_eq!(
        one.ok(
            Op::Release,
            json!({"leases": [created.lease, created.lease]})
        )["released"],
        1
    );
}

// ---- Many ----

#[test]
fn many_clients_at_once_and_many_one_after_another() {
    let host = Served::start(&[]);
    let mut watcher = host.greeted();
    put(&mut watcher, "x", MOVED);
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
    let start = Holdings::of(&host.settled(&mut watcher));
    std::thread::scope(|scope| {
        for index in 0..64_u64 {
            let host = &host;
            scope.spawn(move || {
                let mut client = host.greeted();
                let count = 1000 + index;
                let name = format!("of-{index}");
                put(&mut client, &name, count);
                for _ in 0..4 {
                    check_call(&mut client, json!(name), &ramp(count));
                    check_call(&mut client, json!("x"), &ramp(MOVED));
                }
                client.ok(Op::Drop, json!({"name": name}));
            });
        }
    });
    host.eventually(&mut watcher, "as before", |stats| {
        Holdings::of(stats) == start
    });
    let mut counts = Vec::new();
    for turn in 0..1000 {
        match turn % 4 {
            0 => drop(host.connect()),
            1 => drop(host.greeted()),
            2 => {
                // It does not wait for the answers.
                let mut client = host.greeted();
                client.begin(
                    Op::Create,
                    &json!({"tensors": [{"name": "x", "dtype": "float64", "shape": [MOVED]}]}),
                    &[],
                );
                client.begin(Op::Invoke, &scale_shift(json!("x"), 1.0, 0.0), &[]);
            }
            _ => {
                let mut client = host.greeted();
                client.create(10);
                client.ok(Op::Map, json!({"name": "x"}));
            }
        }
        if turn % 250 == 249 {
            let stats = host.eventually(&mut watcher, "as before", |stats| {
                Holdings::of(stats) == start
            });
            counts.push(mappings(&stats));
        }
    }
    // A mapping that one connection in four left behind would be 62 in each quarter.
    assert!(
        counts.last().unwrap() < &(counts[0] + 62),
        "mappings after each 250 connections: {counts:?}"
    );
    check_call(&mut watcher, json!("x"), &ramp(MOVED));
}

// ---- Principals ----

#[test]
fn one_user_sees_nothing_of_anothers() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can become another user");
        return;
    }
    let host = Served::start(&[]);
    let (directory, socket): (PathBuf, PathBuf) = (host.directory(), host.socket());
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let mut root = host.greeted();
    put(&mut root, "x", 10);
    let created = root.create(10);
    created.fill(&ramp(10));
    // The way to it is open, the directory itself is not, and then the socket is not.
    mode(directory.parent().unwrap(), 0o755);
    let denied = |socket: &Path| as_user(4242, || Raw::connect(socket).err().map(|e| e.kind()));
    assert_eq!(denied(&socket), Some(std::io::ErrorKind::PermissionDenied));
    assert_eq!(
        as_user(4242, || fs::read_dir(&directory).err().map(|e| e.kind())),
        Some(std::io::ErrorKind::PermissionDenied)
    );
    mode(&directory, 0o755);
    assert_eq!(denied(&socket), Some(std::io::ErrorKind::PermissionDenied));
    mode(&socket, 0o666);
    as_user(4242, || {
        let mut client = Raw::connect(&socket).unwrap();
        assert_eq!(client.hello()["principal"], "uid:4242");
        assert_eq!(client.ok(Op::List, json!({}))["flights"], json!([]));
        let missing = ("NOT_FOUND", "TENSOR_NOT_FOUND");
        for op in [Op::Lookup, Op::Map, Op::Drop] {
            client
                .ask(op, json!({"name": "x"}))
                .refused(missing.0, missing.1);
        }
        client
            .ask(Op::Invoke, scale_shift(json!("x"), 1.0, 0.0))
            .refused(missing.0, missing.1);
        client
            .ask(Op::Map, json!({"segment": created.segment}))
            .refused("NOT_FOUND", "SEGMENT_NOT_FOUND");
        assert_eq!(
            client.ok(Op::Release, json!({"leases": [created.lease]}))["released"],
            0
        );
        assert_eq!(client.ok(Op::Stats, json!({}))["flights"], 0);
        // A name of one's own, and not the other's.
        put(&mut client, "x", 20);
        check_call(&mut client, json!("x"), &ramp(20));
    });
    check_call(&mut root, json!("x"), &ramp(10));
    assert_eq!(root.ok(Op::Stats, json!({}))["flights"], 1);
    let overflow: u32 = fs::read_to_string("/proc/sys/kernel/overflowuid")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    as_user(overflow, || {
        let client = Raw::connect(&socket).unwrap();
        client
            .receive()
            .unwrap()
            .refused("PERMISSION_DENIED", "PRINCIPAL");
        client.ended();
    });
}

/// What a host's process leaves when it goes.
#[test]
fn a_host_that_ends_says_so_and_removes_its_sockets() {
    let host = host_with_spins();
    let mut client = host.greeted();
    put(&mut client, "x", 10);
    let running = client.begin(
        Op::Invoke,
        &json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 500}),
        &[],
    );
    let mut idle = host.greeted();
    host.eventually(&mut idle, "it runs", |stats| number(stats, "/running") == 1);
    let directory = host.directory();
    host.terminate();
    assert_eq!(idle.receive().unwrap().op(), Op::Shutdown);
    idle.ended();
    assert_eq!(client.receive().unwrap().op(), Op::Shutdown);
    // What runs may finish, nothing new begins.
    let start = Instant::now();
    client
        .ask(
            Op::Create,
            json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]}),
        )
        .refused("UNAVAILABLE", "DRAINING");
    client
        .ask(Op::Invoke, scale_shift(json!("x"), 1.0, 0.0))
        .refused("UNAVAILABLE", "DRAINING");
    let reply = client.receive().unwrap();
    assert_eq!(
        reply.sequence(),
        running,
        "after {} ms",
        start.elapsed().as_millis()
    );
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    client.ended();
    host.ended();
    let left: Vec<_> = fs::read_dir(&directory)
        .map(|d| d.map(|e| e.unwrap().file_name()).collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
}

// ---- Idempotency keys ----

const REUSED: (&str, &str) = ("FAILED_PRECONDITION", "IDEMPOTENCY_KEY_REUSED");

/// `base` with a field set.
fn with(base: &Value, field: &str, value: Value) -> Value {
    let mut changed = base.clone();
    changed[field] = value;
    changed
}

#[test]
fn an_idempotency_key_belongs_to_one_request() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    put(&mut client, "other", 3);
    let runs = |client: &mut Raw| number(&client.ok(Op::Stats, json!({})), "/invocations");
    let first = with(
        &scale_shift(json!("x"), 2.0, 0.0),
        "idempotency_key",
        json!("K"),
    );
    let reply = client.ask(Op::Invoke, first.clone());
    assert_eq!(numbers(&reply), [-14.0, -13.0, -12.0]);
    let segment = reply.body()["results"][0]["mapping"]["segment"].clone();

    // How long it may take, how it is given and what it is called are the caller's own affair.
    for (field, value) in [
        ("request_id", json!("again")),
        ("deadline_ms", json!(5000)),
        ("lease_ms", json!(5000)),
        ("map", json!(false)),
        ("limits", json!({})),
        ("inputs", json!({"x": {"name": "x"}})),
    ] {
        let again = client.ok(Op::Invoke, with(&first, field, value));
        assert_eq!(
            again["results"][0]["mapping"]["segment"], segment,
            "{field}"
        );
    }
    let mut second_session = host.greeted();
    let again = second_session.ok(Op::Invoke, first.clone());
    assert_eq!(again["results"][0]["mapping"]["segment"], segment);
    assert_eq!(runs(&mut client), 1);

    for (field, value) in [
        ("kernel", json!("standard/scale-shift")),
        ("kernel", json!("zscore")),
        ("inputs", json!({"x": "other"})),
        ("inputs", json!({"x": {"name": "x", "column": "x"}})),
        ("parameters", json!({"a": 3.0, "b": 0.0})),
        ("parameters", json!({"a": 2.0})),
        ("publish", json!({"y": "y"})),
        ("replace", json!(true)),
        ("seal", json!(true)),
        ("verify", json!(true)),
        ("limits", json!({"log_bytes": 1})),
    ] {
        let message = client
            .ask(Op::Invoke, with(&first, field, value))
            .refused(REUSED.0, REUSED.1);
        assert!(
            message.contains("`K`") && message.contains(&format!("`{field}`")),
            "{field}: {message}"
        );
    }
    let clip = json!({"kernel": "clip", "inputs": {"x": "x"}, "idempotency_key": "K"});
    second_session
        .ask(Op::Invoke, clip)
        .refused(REUSED.0, REUSED.1);
    client
        .ask(Op::Lookup, json!({"name": "y"}))
        .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
    assert_eq!(runs(&mut client), 1);

    // A name that is another tensor's now makes it another request; one that is gone does not.
    put(&mut client, "x", 3);
    let message = client
        .ask(Op::Invoke, first.clone())
        .refused(REUSED.0, REUSED.1);
    assert!(
        message.contains("input `x` is another tensor's"),
        "{message}"
    );
    client.ok(Op::Drop, json!({"name": "x"}));
    let again = client.ok(Op::Invoke, first);
    assert_eq!(again["results"][0]["mapping"]["segment"], segment);

    // In place, once.
    let doubled = json!({"kernel": "scale-shift", "inputs": {"x": "other"}, "parameters": {"a": 2.0, "b": 0.0},
                         "publish": {"y": "other"}, "replace": true, "idempotency_key": "twice"});
    for _ in 0..3 {
        assert_eq!(
            numbers(&client.ask(Op::Invoke, doubled.clone())),
            [-14.0, -13.0, -12.0]
        );
    }
    let now = client.ask(Op::Invoke, scale_shift(json!("other"), 1.0, 0.0));
    assert_eq!(numbers(&now), [-14.0, -13.0, -12.0]);

    // What failed may be tried again, as something else, too.
    let bad =
        json!({"kernel": "scale-shift", "inputs": {"x": "nothing"}, "idempotency_key": "fails"});
    client
        .ask(Op::Invoke, bad)
        .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
    let good = with(
        &scale_shift(json!("other"), 1.0, 0.0),
        "idempotency_key",
        json!("fails"),
    );
    client.ok(Op::Invoke, good);
}

/// A host with one worker, which spins for `client`; answers the spinning call's sequence.
fn busy_host(client: &mut Option<Raw>) -> (Served, u32) {
    let directory = tempfile::tempdir().unwrap();
    let plugin = directory.path().join("spins.wasm");
    let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
    fs::write(&plugin, guest::component("spins", &text)).unwrap();
    let host = Served::with(
        &["--plugin", plugin.to_str().unwrap()],
        &[
            ("STRAIT__ENGINE__WORKERS", "1"),
            ("STRAIT__ENGINE__QUEUE_LEN", "2"),
        ],
    );
    let mut spinner = host.greeted();
    put(&mut spinner, "x", 3);
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    let sequence = spinner.begin(Op::Invoke, &spin, &[]);
    while number(&spinner.ok(Op::Stats, json!({})), "/running") == 0 {}
    *client = Some(spinner);
    (host, sequence)
}

/// Ends the call `sequence` of `client`, which waits in the queue or runs.
fn cancel(client: &mut Raw, sequence: u32) {
    let asked = client.begin(Op::Cancel, &json!({"sequence": sequence}), &[]);
    for _ in 0..2 {
        let reply = client.receive().unwrap();
        if reply.sequence() == asked {
            assert_eq!(reply.accepted()["cancelled"], true);
        } else {
            assert_eq!(reply.sequence(), sequence);
            reply.refused("CANCELLED", "CANCELLED");
        }
    }
}

#[test]
fn whoever_leaves_a_shared_run_leaves_it_to_the_others() {
    let mut spinner = None;
    let (host, spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let keyed = with(
        &scale_shift(json!("x"), 2.0, 0.0),
        "idempotency_key",
        json!("K"),
    );
    let mut clients: Vec<_> = (0..4).map(|_| host.greeted()).collect();
    let sequences: Vec<_> = clients
        .iter_mut()
        .map(|client| client.begin(Op::Invoke, &keyed, &[]))
        .collect();
    // One with a shorter time; the first by a cancel; another with its connection.
    let mut hasty = host.greeted();
    hasty
        .ask(Op::Invoke, with(&keyed, "deadline_ms", json!(50)))
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    cancel(&mut clients[0], sequences[0]);
    drop(clients.remove(1));
    assert_eq!(number(&spinner.ok(Op::Stats, json!({})), "/running"), 1);
    cancel(&mut spinner, spin);
    let replies: Vec<_> = clients[1..].iter().map(|c| c.receive().unwrap()).collect();
    for reply in &replies {
        assert_eq!(numbers(reply), [-14.0, -13.0, -12.0]);
    }
    let segment = |reply: &Frame| reply.body()["results"][0]["mapping"]["segment"].clone();
    assert_eq!(segment(&replies[0]), segment(&replies[1]));
    let stats = spinner.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/invocations"), 2, "the spin, and one run");
}

#[test]
fn a_shared_run_ends_when_nobody_waits_and_its_key_is_free() {
    let mut spinner = None;
    let (host, _spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let spin = |client: &mut Raw, deadline_ms: u64| {
        let body = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": deadline_ms, "idempotency_key": "S"});
        client.begin(Op::Invoke, &body, &[])
    };
    // In the queue.
    let (mut one, mut other) = (host.greeted(), host.greeted());
    let (first, second) = (spin(&mut one, 600_000), spin(&mut other, 600_000));
    cancel(&mut one, first);
    cancel(&mut other, second);
    // Running: each caller has its own deadline, and the last one's ends it.
    cancel(&mut spinner, _spin);
    spin(&mut one, 300);
    spin(&mut other, 600);
    for client in [&one, &other] {
        client
            .receive()
            .unwrap()
            .refused("DEADLINE_EXCEEDED", "DEADLINE");
    }
    host.eventually(&mut spinner, "it has ended", |stats| {
        number(stats, "/running") == 0
    });
    let mut call = scale_shift(json!("x"), 1.0, 0.0);
    call["idempotency_key"] = json!("S");
    assert_eq!(numbers(&spinner.ask(Op::Invoke, call)), ramp(3));
}

// ---- Deadlines and cancels in the queue ----

#[test]
fn a_deadline_and_a_cancel_count_in_the_queue() {
    let mut spinner = None;
    let (host, spin) = busy_host(&mut spinner);
    let mut spinner = spinner.unwrap();
    let mut client = host.greeted();
    let call = scale_shift(json!("x"), 1.0, 0.0);
    let message = client
        .ask(Op::Invoke, with(&call, "deadline_ms", json!(0)))
        .refused("INVALID_ARGUMENT", "BAD_LIMIT");
    assert!(message.contains("at least 1"), "{message}");
    let message = client
        .ask(Op::Invoke, with(&call, "deadline_ms", json!(100)))
        .refused("DEADLINE_EXCEEDED", "DEADLINE");
    assert!(
        message.contains("100 ms") && message.contains("worker"),
        "{message}"
    );
    // The queue takes two; each way out of it makes room.
    for round in 0..3 {
        let mut queued = host.greeted();
        let sequences = [0, 1].map(|_| queued.begin(Op::Invoke, &call, &[]));
        queued.ok(Op::Ping, json!({}));
        client
            .ask(Op::Invoke, call.clone())
            .refused("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED");
        match round {
            0 => sequences
                .iter()
                .for_each(|sequence| cancel(&mut queued, *sequence)),
            1 => {
                drop(queued);
                host.eventually(&mut spinner, "it is gone", |stats| {
                    number(stats, "/sessions") == 2
                });
            }
            _ => {
                cancel(&mut queued, sequences[0]);
                let late = with(&call, "deadline_ms", json!(50));
                queued
                    .ask(Op::Invoke, late)
                    .refused("DEADLINE_EXCEEDED", "DEADLINE");
                cancel(&mut queued, sequences[1]);
            }
        }
    }
    let stats = spinner.ok(Op::Stats, json!({}));
    assert_eq!(
        (number(&stats, "/running"), number(&stats, "/invocations")),
        (1, 1),
        "the spin alone was run"
    );
    cancel(&mut spinner, spin);
    check_call(&mut client, json!("x"), &ramp(3));
}

// ---- Descriptors ----

#[test]
fn with_no_descriptors_left_a_connection_is_told_and_the_others_are_served() {
    let host = Served::with_files(60, &[], &[]);
    let mut first = host.greeted();
    put(&mut first, "x", 3);
    let full = ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED");
    let mut connected = Vec::new();
    let refused = loop {
        assert!(connected.len() < 60, "60 descriptors hold 60 connections");
        let mut client = host.connect();
        let hello = json!({"protocol": 1, "client": "strait-tests"});
        let sequence = client.begin(Op::Hello, &hello, &[]);
        let reply = client.receive().expect("it is told");
        assert_eq!(reply.sequence(), sequence);
        if reply.op() != Op::Welcome {
            break (client, reply);
        }
        connected.push(client);
    };
    let message = refused.1.refused(full.0, full.1);
    assert!(message.contains("open files"), "{message}");
    refused.0.ended();
    assert!(connected.len() > 5, "only {} were served", connected.len());
    // Nor is one that says nothing kept waiting.
    let silent = host.connect();
    silent.receive().unwrap().refused(full.0, full.1);
    silent.ended();
    for _ in 0..20 {
        drop(host.connect());
    }
    // What needs a descriptor says so; what needs none goes on.
    let flights = first.ok(Op::List, json!({}));
    assert_eq!(flights["flights"][0]["name"], "x");
    first.ok(Op::Map, json!({"name": "x"}));
    let one = json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]});
    // A connection takes two descriptors, so one may be left.
    let mut held = 0;
    let refused = loop {
        let reply = first.ask(Op::Create, one.clone());
        if reply.op() == Op::Error {
            break reply;
        }
        held += 1;
    };
    assert!(held < 3, "{held} more segments");
    refused.refused(full.0, full.1);
    let fd = sealed(memfd(PAGE), FINAL);
    let tensors = json!([place("x", 8, 0)]);
    first
        .ask_with(Op::Adopt, json!({"tensors": tensors}), &[fd.as_fd()])
        .refused(full.0, full.1);
    let lines = host.log().matches("were refused").count();
    assert!((1..=4).contains(&lines), "{lines} lines: {}", host.log());
    drop(connected);
    host.eventually(&mut first, "they are gone", |stats| {
        number(stats, "/sessions") == 1
    });
    check_call(&mut host.greeted(), json!("x"), &ramp(3));
    first.ok(Op::Create, one);
}

#[test]
fn idle_results_make_room_for_segments() {
    let host = Served::with_files(100, &[], &[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let mut leases = Vec::new();
    for _ in 0..49 {
        let reply = client.ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0));
        leases.push(reply.accepted()["results"][0]["lease"].clone());
    }
    let full = ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED");
    client
        .ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0))
        .refused(full.0, full.1);
    client.ok(Op::Release, json!({"leases": leases}));
    client.ok(Op::Drop, json!({"name": "x"}));
    let stats = client.ok(Op::Stats, json!({}));
    assert_eq!(number(&stats, "/pool/idle_segments"), 49);
    let created: Vec<_> = (0..50).map(|_| client.create(1)).collect();
    let one = json!({"tensors": [{"name": "x", "dtype": "int8", "shape": [1]}]});
    let message = client.ask(Op::Create, one).refused(full.0, full.1);
    assert!(message.contains("budget of 50"), "{message}");
    let last = client.ask(Op::Map, json!({"segment": created[49].segment}));
    last.accepted();
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
    check_call(&mut client, id.clone(), &[0.0; 8]);
    // Linux's own wait would be 45 s for each.
    assert!(begin.elapsed() < Duration::from_secs(40));
    holder.kill().unwrap();
    holder.wait().unwrap();
    client.ask(Op::Map, id.clone()).accepted();
    client.ask(Op::Seal, id).accepted();
}

#[test]
fn a_lock_on_the_runtime_directory_is_an_error_that_says_whose() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = directory.path().join("host");
    fs::create_dir(&runtime).unwrap();
    fs::set_permissions(&runtime, Permissions::from_mode(0o700)).unwrap();
    let held = File::open(&runtime).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_strait"))
        .args(["serve", "--directory", runtime.to_str().unwrap()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    let own = format!("process {}", std::process::id());
    assert!(
        text.contains("flock") && text.contains(&own) && text.contains(runtime.to_str().unwrap()),
        "{text}"
    );
    assert_eq!(fs::read_dir(&runtime).unwrap().count(), 0);
}

// ---- Replies that would not fit ----

#[test]
fn what_a_reply_could_not_tell_is_refused_before_it_is_done() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    let before = Holdings::of(&client.ok(Op::Stats, json!({})));
    let quotes = |index: u64, bytes: usize| format!("{}{index:03}", "\"".repeat(bytes - 3));
    let tensor = |index, bytes| json!({"name": quotes(index, bytes), "dtype": "float8_e4m3fn", "shape": [1, 1, 1, 1, 1, 1, 1, 1]});
    let tensors = |bytes| (0..128).map(|i| tensor(i, bytes)).collect::<Vec<_>>();
    let longest = "\"".repeat(200);
    let mut made = 0;
    for bytes in [60, 120, 150, 170, 180, 185, 190, 195, 199, 200] {
        let reply = client.ask(Op::Create, json!({"tensors": tensors(bytes)}));
        if reply.op() == Op::Error {
            let message = reply.refused("INVALID_ARGUMENT", "BAD_TENSOR");
            assert!(message.contains("128 tensors") && message.contains("shorter names"));
            continue;
        }
        made += 1;
        let body = reply.accepted();
        let segment = &body["mapping"]["segment"];
        client.ok(Op::Publish, json!({"segment": segment, "name": longest}));
        let id = "r".repeat(64);
        for op in [Op::Lookup, Op::Map] {
            client.ok(op, json!({"name": longest, "request_id": id}));
        }
        let listed = client.ok(Op::List, json!({"request_id": id}));
        assert_eq!(listed["flights"][0]["name"], longest);
        client.ok(Op::Drop, json!({"name": longest}));
    }
    assert!((3..10).contains(&made), "{made}");
    // The same at the other way in.
    let fd = sealed(memfd(128 * PAGE), FINAL);
    let placed = |index: u64, bytes| {
        let mut placed = tensor(index, bytes);
        (placed["offset"], placed["length"]) = (json!(index * PAGE), json!(1));
        placed
    };
    // The longest that a request can say.
    let adopt = (0..200)
        .rev()
        .map(|bytes| (0..128).map(|i| placed(i, bytes)).collect::<Vec<_>>())
        .map(|tensors| json!({"tensors": tensors}))
        .find(|body| body.to_string().len() <= BODY_BYTES_MAX)
        .unwrap();
    let message = client
        .ask_with(Op::Adopt, adopt, &[fd.as_fd()])
        .refused("INVALID_ARGUMENT", "BAD_TENSOR");
    assert!(message.contains("128 tensors"), "{message:.300}");
    assert_eq!(client.ok(Op::List, json!({}))["flights"], json!([]));
    drop(client);
    let mut client = host.greeted();
    host.eventually(&mut client, "as before", |stats| {
        Holdings::of(stats) == before
    });
}

#[test]
fn an_error_about_a_long_name_fits_a_frame_and_a_line() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    for text in ["\u{1}", "\"", "\n", "é"] {
        let name = text.repeat(9_000);
        for op in [Op::Lookup, Op::Drop] {
            let message = client
                .ask(op, json!({"name": name}))
                .refused("NOT_FOUND", "TENSOR_NOT_FOUND");
            assert!(message.len() < 1000 && !message.contains('\n'), "{message}");
        }
        for invoke in [
            scale_shift(json!(name), 1.0, 0.0),
            scale_shift(json!({"name": "x", "column": name}), 1.0, 0.0),
            json!({"kernel": name, "inputs": {"x": "x"}}),
            json!({"kernel": "scale-shift", "inputs": {name.clone(): "x"}}),
            json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {name.clone(): 1}}),
            json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "publish": {"y": name}}),
            json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "publish": {name.clone(): "y"}}),
        ] {
            let reply = client.ask(Op::Invoke, invoke);
            assert_eq!(reply.op(), Op::Error, "{}", reply.text);
        }
    }
    check_call(&mut client, json!("x"), &ramp(3));
}

// ---- What takes long, and the end ----

#[test]
fn memory_that_is_let_go_of_is_there_for_the_next() {
    let host = Served::start(&[]);
    let mut client = host.greeted();
    // Three quarters of the budget: each needs what the one before it had.
    for round in 0..12 {
        let created = client.create((3 << 29) / 8);
        for part in 0..16 {
            write(
                created.fd.as_fd(),
                created.offset + part * (90 << 20),
                &[1; 1 << 20],
            );
        }
        match round % 3 {
            0 => drop(client.ok(Op::Release, json!({"leases": [created.lease]}))),
            1 => {
                client.ok(
                    Op::Publish,
                    json!({"segment": created.segment, "name": "big"}),
                );
                client.ok(Op::Release, json!({"leases": [created.lease]}));
                client.ok(Op::Drop, json!({"name": "big"}));
            }
            _ => {
                drop(client);
                client = host.greeted();
                host.eventually(&mut client, "it is gone", |stats| {
                    number(stats, "/sessions") == 1
                });
            }
        }
    }
}

#[test]
fn a_client_that_does_not_read_is_not_waited_for_at_the_end() {
    let plugin_host = |settings| {
        let directory = tempfile::tempdir().unwrap();
        let plugin = directory.path().join("spins.wasm");
        let text = fs::read_to_string("tests/guests/spins.wat").unwrap();
        fs::write(&plugin, guest::component("spins", &text)).unwrap();
        Served::with(&["--plugin", plugin.to_str().unwrap()], settings)
    };
    // Far longer than `ended` waits.
    let host = plugin_host(&[("STRAIT__SERVER__DRAIN_MS", "600000")]);
    let mut client = host.greeted();
    put(&mut client, "x", 3);
    let mut deaf = host.greeted();
    let spin = json!({"kernel": "spins/k", "inputs": {"x": "x"}, "deadline_ms": 600_000});
    deaf.begin(Op::Invoke, &spin, &[]);
    flood(&deaf);
    let last = with(&spin, "deadline_ms", json!(500));
    let sequence = client.begin(Op::Invoke, &last, &[]);
    client.ok(Op::Ping, json!({}));
    host.terminate();
    assert_eq!(client.receive().unwrap().op(), Op::Shutdown);
    let reply = client.receive().unwrap();
    assert_eq!(reply.sequence(), sequence);
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    client.ended();
    host.ended();
}
