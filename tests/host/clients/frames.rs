//! Frames that are wrong, and replies that would not fit into one.

use std::os::fd::AsFd;

use serde_json::json;
use strait_client::wire::{BODY_BYTES_MAX, HEADER_BYTES, Op};

use super::{host_with_spins, place, sealed};
use crate::served::{
    FINAL, Holdings, PAGE, Served, check_call, memfd, number, packet, put, ramp, scale_shift,
    send_with,
};

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
        closing("a byte less than a header", ping(b"")[..HEADER_BYTES - 1].to_vec(), 0),
        patched("wrong magic", 0, b"XT", false),
        patched("version 0", 2, &[0], false),
        patched("version 3", 2, &[3], false),
        closing("a frame of version 1", b"ST\x01\x16\x07\0\0\0\x02\0\0\0\0\0\0\0{}".to_vec(), 0),
        patched("length: more than there is", 8, &3_u32.to_le_bytes(), false),
        patched("length: less than there is", 8, &1_u32.to_le_bytes(), false),
        patched("length: u32::MAX", 8, &u32::MAX.to_le_bytes(), false),
        patched("length: body and payload change places", 8, &[0, 0, 0, 0, 2], true),
        patched("payload: more than there is", 12, &1_u32.to_le_bytes(), false),
        patched("payload: u32::MAX", 8, &[2, 0, 0, 0, 255, 255, 255, 255], false),
        patched("a reserved byte", 41, &[1], true),
        patched("the last reserved byte", 43, &[128], true),
        patched("flags 1", 44, &1_u32.to_le_bytes(), true),
        patched("flags: the highest", 44, &(1_u32 << 31).to_le_bytes(), true),
        patched("op 0", 3, &[0], true),
        patched("op 28", 3, &[28], true),
        patched("op 63", 3, &[63], true),
        patched("op 255", 3, &[255], true),
        patched("sequence 0", 4, &[0; 4], true),
        closing("a body one byte too long", ping(&vec![b' '; BODY_BYTES_MAX + 1]), 0),
        closing("a body far too long", ping(&vec![b' '; 100_000]), 0),
        closing("17 descriptors", ping(b"{}"), 17),
        closing("64 descriptors", ping(b"{}"), 64),
        refused("a descriptor with PING", Op::Ping, "{}", 1, BAD_FRAME),
        refused("a descriptor with HELLO", Op::Hello, r#"{"protocol":2,"client":"c"}"#, 1, BAD_FRAME),
        refused("a descriptor with CANCEL", Op::Cancel, r#"{"sequence":1}"#, 1, BAD_FRAME),
        refused("16 descriptors with INVOKE", Op::Invoke, r#"{"kernel":"clip","inputs":{}}"#, 16, BAD_FRAME),
        refused("ADOPT without a descriptor", Op::Adopt, r#"{"tensors":[]}"#, 0, BAD_FRAME),
        refused("ADOPT with two", Op::Adopt, r#"{"tensors":[]}"#, 2, BAD_FRAME),
        refused("WELCOME from a client", Op::Welcome, "{}", 0, BAD_FRAME),
        refused("OK from a client", Op::Ok, "{}", 0, BAD_FRAME),
        refused("ERROR from a client", Op::Error, "{}", 0, BAD_FRAME),
        refused("GONE from a client", Op::Gone, "{}", 0, BAD_FRAME),
        refused("SHUTDOWN from a client", Op::Shutdown, "{}", 0, BAD_FRAME),
        refused("PREPARE of nothing", Op::Prepare, "{}", 0, BAD_REQUEST),
        refused("a descriptor with PREPARE", Op::Prepare, r#"{"kernel":"clip","inputs":{}}"#, 1, BAD_FRAME),
        refused("CALL", Op::Call, "no JSON", 0, BAD_FRAME),
        refused("STREAM", Op::Stream, "{}", 0, ("INVALID_ARGUMENT", "BAD_REQUEST")),
        refused("CHUNK", Op::Chunk, "{}", 0, BAD_FRAME),
        refused("LAST", Op::Last, "", 0, BAD_FRAME),
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
        refused("a name nobody has", Op::Lookup, r#"{"name":"x"}"#, 0, ("NOT_FOUND", "FLIGHT_NOT_FOUND")),
        refused("a name that is too long", Op::Drop, format!(r#"{{"name":"{long_name}"}}"#), 0, ("NOT_FOUND", "FLIGHT_NOT_FOUND")),
        refused("an unknown kernel", Op::Invoke, r#"{"kernel":"nix","inputs":{}}"#, 0, ("NOT_FOUND", "KERNEL_NOT_FOUND")),
        refused("a size over 2^63", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[18446744073709551615]}]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("a segment over the budget", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[1099511627776]}]}"#, 0, ("RESOURCE_EXHAUSTED", "BUDGET_EXCEEDED")),
        refused("nine axes", Op::Create, r#"{"tensors":[{"name":"x","dtype":"int8","shape":[1,1,1,1,1,1,1,1,1]}]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("no tensors", Op::Create, r#"{"tensors":[]}"#, 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
        refused("too many tensors", Op::Create, many_tensors(), 0, ("INVALID_ARGUMENT", "BAD_TENSOR")),
    ];
    let mut watcher = host.greeted();
    watcher.ok(Op::Ping, json!({}));
    let before = Holdings::of(&host.settled(&mut watcher));
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
fn hello_comes_first_and_speaks_version_2() {
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
            "protocol 1",
            r#"{"protocol":1,"client":"c"}"#,
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
            r#"{"protocol":2,"cleint":"c"}"#,
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
    client.cancel(running);
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
                .refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
            assert!(message.len() < 1000 && !message.contains('\n'), "{message}");
        }
        for invoke in [
            scale_shift(json!(name), 1.0, 0.0),
            scale_shift(json!({"name": "x", "tensor": name}), 1.0, 0.0),
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
