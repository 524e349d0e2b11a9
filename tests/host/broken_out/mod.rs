//! A plugin that has broken out of wasmtime: it runs machine code of its own in its worker process, and the walls around that
//! process are all that is left. Nothing here is pretended: the compiled plugin is changed where the host keeps it, so that four
//! functions of the guest become a system call, a load and a store anywhere, and the stack pointer.

mod calls;
mod machine;

use std::os::fd::AsRawFd;
use std::time::Instant;

use serde_json::json;
use strait_client::wire::Op;

use crate::guest;
use crate::sealed::mapped_writable;
use crate::served::{Frame, Holdings, check_call, numbers, put, ramp, scale_shift};
use crate::workers::{MOVED, all_children, worker};
use machine::{
    Attempt, Broken, CALLS, Call, FIRST, SECOND, call, ending, map, running, twice, wipe,
};

#[test]
fn what_ends_the_worker_ends_nothing_else() {
    let mut broken = Broken::new();
    let all_signals = [0xff; 8];
    let blocked = Call(libc::SYS_rt_sigprocmask, [0, 0, 0], SECOND);
    let attempts = [
        (
            "exit",
            Attempt::new([call(libc::SYS_exit_group, [0; 3])]),
            "WORKER_LOST",
        ),
        (
            "the end of a lane's thread",
            Attempt::new([call(libc::SYS_exit, [0; 3])]),
            "DEADLINE",
        ),
        (
            "a load from nowhere",
            Attempt::new([call(-1, [8, 0, 0])]),
            "WORKER_LOST",
        ),
        (
            "sleep",
            Attempt::new([call(libc::SYS_poll, [0, 0, -1])]),
            "DEADLINE",
        ),
        (
            "sleep with all signals blocked",
            Attempt::with([blocked, call(libc::SYS_poll, [0, 0, -1])], &all_signals),
            "DEADLINE",
        ),
    ];
    for (what, attempt, reason) in attempts {
        assert_eq!(broken.attempt(&attempt), Err(reason.to_owned()), "{what}");
        broken.check(what);
    }
    // Over what the worker itself lives on. What comes of it is its own affair.
    let heap = broken.attempt(&Attempt::new([call(libc::SYS_brk, [0; 3])]));
    let heap = heap.unwrap()[0];
    for below in [8, 64, 4096, 65_536] {
        let stores = [0, 8, 16, 24].map(|further| wipe(heap - below + further));
        match broken.attempt(&Attempt::new(stores)) {
            Ok(_) => {}
            Err(reason) => assert_eq!(reason, "WORKER_LOST", "{below}"),
        }
        for _ in 0..2 {
            check_call(&mut broken.client, json!("x"), &ramp(MOVED));
        }
    }
    let pid = broken.host.pid();
    broken
        .host
        .eventually(&mut broken.client, "one is left", |_| {
            all_children(pid) == 1
        });
}

#[test]
fn a_worker_that_aborts_is_lost() {
    let (getpid, gettid, tgkill) = (libc::SYS_getpid, libc::SYS_gettid, libc::SYS_tgkill);
    let own = |number| {
        format!(
            "(call $primitive_call (i64.const {number}) (i64.const 0) (i64.const 0) (i64.const 0))"
        )
    };
    let abort = format!(
        "(drop (call $primitive_call (i64.const {tgkill}) {} {} (i64.const {})))",
        own(getpid),
        own(gettid),
        libc::SIGABRT
    );
    let mut broken = Broken::with(&[running("aborts", &abort)]);
    let call = json!({"kernel": "aborts/k", "inputs": {"x": "x"}});
    let reply = broken.client.ask(Op::Invoke, call);
    reply.refused("UNAVAILABLE", "WORKER_LOST");
    let ends = broken.ends(2);
    assert!(ends.iter().all(|end| end.contains("SIGABRT")), "{ends:?}");
    broken.check("it was lost twice");
}

/// Short lines, which cost whoever reads them the most.
#[test]
fn a_worker_that_writes_without_end_takes_no_time_of_the_hosts() {
    let write = libc::SYS_write;
    let lines = i64::from_le_bytes(*b"a\nb\nc\nd\n");
    let body = format!(
        "(local $at i64) (local $end i64)
        (local.set $end (i64.and (i64.sub (call $primitive_stack) (i64.const 4096)) (i64.const -64)))
        (local.set $at (i64.sub (local.get $end) (i64.const 4096)))
        (loop $l
          (call $primitive_store (local.get $at) (i64.const {lines}))
          (br_if $l (i64.lt_u (local.tee $at (i64.add (local.get $at) (i64.const 8))) (local.get $end))))
        (loop $l
          (drop (call $primitive_call (i64.const {write}) (i64.const 2) (i64.sub (local.get $end) (i64.const 4096)) (i64.const 4096)))
          (br $l))"
    );
    let mut broken = Broken::with(&[running("writes", &body)]);
    let pid = broken.host.pid().unsigned_abs();
    let used = || strait_memory::process::cpu_time(pid).unwrap();
    let (begin, before) = (Instant::now(), used());
    let call = json!({"kernel": "writes/k", "inputs": {"x": "x"}, "deadline_ms": 3000});
    let reply = broken.client.ask(Op::Invoke, call);
    reply.refused("DEADLINE_EXCEEDED", "DEADLINE");
    let (elapsed, used) = (begin.elapsed(), used() - before);
    eprintln!("{used:?} of the host's in {elapsed:?}");
    assert!(used < elapsed / 4, "{used:?} of the host's in {elapsed:?}");
    assert!(broken.host.log().contains("it has to wait"));
    broken.check("its log is full");
}

#[test]
fn no_descriptor_of_a_worker_makes_a_file_shorter() {
    let mut broken = Broken::new();
    let answers = |calls: Vec<Call>| broken.attempt(&Attempt::new(calls));
    let shorter = |fd: i64| call(libc::SYS_ftruncate, [fd, 0, 0]);
    let fds: Vec<i64> = (0..32).collect();
    let answered: Vec<_> = fds
        .chunks(CALLS)
        .map(|fds| fds.iter().map(|fd| shorter(*fd)).collect())
        .map(answers)
        .collect();
    for answers in answered {
        let answers = answers.unwrap();
        assert!(answers.iter().all(|answer| *answer < 0), "{answers:?}");
    }
    broken.check("it is as long as it was");
}

#[test]
fn memory_beyond_a_workers_own_limit_is_not_to_be_had() {
    const GIB: i64 = 1 << 30;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // That Linux promises no memory for it is not what stops it.
    let lazy = private | libc::MAP_NORESERVE;
    let limit = (2 * GIB).to_string();
    let mut broken = Broken::set(&[("STRAIT__WORKERS__MEMORY_BYTES", &limit)]);
    let attempt = |broken: &mut Broken, calls: &[Call]| broken.attempt(&Attempt::new(calls));
    let full = -i64::from(libc::ENOMEM);
    assert!(attempt(&mut broken, &[map(GIB / 16, lazy)]).unwrap()[0] > 0);
    let large = attempt(&mut broken, &[map(8 * GIB, lazy)]);
    assert_eq!(large, Ok(vec![full]));
    let many = attempt(&mut broken, &[map(3 * GIB / 4, lazy); CALLS]).unwrap();
    assert_eq!(many[CALLS - 1], full, "{many:?}");
    // Its own kernels go on, or are told so, and everybody else's memory is there.
    broken.check("the worker has nearly all that it may have");

    // Memory that could be shared counts for no process.
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let refused = -i64::from(libc::EACCES);
    let attempts = [map(4096, shared), map(4096, private | libc::MAP_SHARED)];
    let answers = attempt(&mut broken, &attempts);
    assert_eq!(answers, Ok(vec![refused; 2]));
    let named = |flags: libc::c_uint| {
        let create = Call(libc::SYS_memfd_create, [0, i64::from(flags), 0], FIRST);
        Attempt::with([create], b"large\0\0\0")
    };
    let huge = broken.attempt(&named(libc::MFD_HUGETLB | libc::MFD_CLOEXEC));
    assert_eq!(huge, Ok(vec![refused]));
    let file = broken.attempt(&named(libc::MFD_CLOEXEC)).unwrap()[0];
    assert!(file > 0);
    let longer = |bytes| call(libc::SYS_ftruncate, [file, bytes, 0]);
    assert_eq!(attempt(&mut broken, &[longer(2 << 20)]), Ok(vec![0]));
    // Beyond its limit Linux ends a process that does not want to hear of it.
    let ended = worker(&broken.host);
    let longest = attempt(&mut broken, &[longer(8 * GIB)]);
    // The second time, in a worker that has no such file.
    assert_eq!(longest, Ok(vec![-i64::from(libc::EBADF)]));
    broken.check("the worker wanted a large file");
    assert_ne!(worker(&broken.host), ended);
}

#[test]
fn a_worker_has_only_as_many_descriptors_as_it_may_need() {
    let mut broken = Broken::set(&[("STRAIT__MEMORY__SEGMENTS", "64")]);
    let pid = worker(&broken.host).as_raw_nonzero();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let most = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok())
        .unwrap();
    let duplicate = |least: i64| call(libc::SYS_fcntl, [0, 1030, least]);
    let attempt = Attempt::new([duplicate(most - 1), duplicate(most - 1), duplicate(most)]);
    let (full, beyond) = (-i64::from(libc::EMFILE), -i64::from(libc::EINVAL));
    assert_eq!(broken.attempt(&attempt), Ok(vec![most - 1, full, beyond]));
    broken.check("the worker has another descriptor");
}

/// On any of its sockets: a message that makes no sense, alone and with a descriptor.
#[test]
fn what_a_worker_sends_uninvited_is_not_believed() {
    let mut broken = Broken::new();
    let at_rest = |broken: &mut Broken| {
        let nothing = broken.attempt(&Attempt::new([call(libc::SYS_getpid, [0; 3])]));
        nothing.unwrap();
        broken.check("the next call");
        Holdings::of(&broken.host.settled(&mut broken.client))
    };
    let before = at_rest(&mut broken);
    for fd in 0..12 {
        for with_descriptor in [false, true] {
            let words: [u64; 13] = [
                0, // msghdr: no name
                0,
                7 * 8, // iov
                1,
                9 * 8, // control
                if with_descriptor { 20 } else { 0 },
                0,
                12 * 8, // iov: the byte below
                2,
                20, // cmsghdr: its length, SOL_SOCKET and SCM_RIGHTS
                1 | 1 << 32,
                0, // descriptor 0
                0x0501,
            ];
            let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let send = Call(libc::SYS_sendmsg, [fd, 0, 0], SECOND);
            let attempt = Attempt {
                pointers: 1 << 2 | 1 << 4 | 1 << 7,
                ..Attempt::with([send], &data)
            };
            let what = format!("a message on descriptor {fd}, with one: {with_descriptor}");
            // It comes back, or the host has ended the worker over it.
            if let Err(reason) = broken.attempt(&attempt) {
                assert_eq!(reason, "WORKER_LOST", "{what}");
            }
            broken.check(&what);
        }
    }
    assert_eq!(at_rest(&mut broken), before);
}

/// Its end in each of the functions that the host calls, with inputs and results as windows and as copies.
#[test]
fn wherever_a_worker_ends_nothing_is_lost_but_the_call() {
    // The last words of a kernel that has failed are not asked for here.
    let functions = guest::FUNCTIONS
        .into_iter()
        .filter(|(function, ..)| *function != "last_error");
    let plugins: Vec<_> = functions
        .clone()
        .map(|(function, parameters, result)| ending(function, parameters, result))
        .collect();
    let mut broken = Broken::with(&plugins);
    put(&mut broken.client, "small", 10);
    let kept = broken.client.ask(
        Op::Invoke,
        json!({"kernel": "scale-shift", "inputs": {"x": "x"}, "parameters": {"a": 2.0, "b": 1.0}}),
    );
    let delivered = numbers(&kept);
    let before = Holdings::of(&broken.host.settled(&mut broken.client));
    for (function, ..) in functions {
        for input in ["x", "small"] {
            let call = json!({"kernel": format!("ends-in-{function}/k"), "inputs": {"x": input}});
            let message = broken
                .client
                .ask(Op::Invoke, call)
                .refused("UNAVAILABLE", "WORKER_LOST");
            assert!(message.contains("ask again"), "{function}: {message}");
            // Its input, too, is as it was.
            broken.check(function);
            check_call(&mut broken.client, json!("small"), &ramp(10));
            assert_eq!(numbers(&kept), delivered, "{function}");
        }
    }
    assert_eq!(
        Holdings::of(&broken.host.settled(&mut broken.client)),
        before
    );
}

/// A result of `scale-shift`, and where the worker has it mapped writable.
fn delivered(broken: &mut Broken) -> (Frame, std::ops::Range<u64>) {
    let reply = broken
        .client
        .ask(Op::Invoke, scale_shift(json!("x"), 2.0, 1.0));
    assert_eq!(
        reply.accepted()["results"][0]["mapping"]["writers"],
        "worker"
    );
    let place = mapped_writable(worker(&broken.host), &reply.fds[0]);
    (reply, place.expect("it is mapped"))
}

fn publish(broken: &mut Broken, result: &Frame) -> Frame {
    let segment = &result.body()["results"][0]["mapping"]["segment"];
    let publish = json!({"segment": segment, "name": "y"});
    broken.client.ask(Op::Publish, publish)
}

fn has_no_name(broken: &mut Broken, result: &Frame) {
    let looked_up = broken.client.ask(Op::Lookup, json!({"name": "y"}));
    looked_up.refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    let lease = &result.body()["results"][0]["lease"];
    broken.client.ok(Op::Release, json!({"leases": [lease]}));
    broken.check("a result without a name");
}

#[test]
fn a_result_that_a_worker_can_still_write_gets_no_name() {
    let mut broken = Broken::new();
    let before = Holdings::of(&broken.host.settled(&mut broken.client));
    let (result, place) = delivered(&mut broken);
    let (address, bytes) = (place.start.cast_signed(), place.end - place.start);
    let second = twice(address, bytes.cast_signed());
    let answers = broken.attempt(&Attempt::new([second])).unwrap();
    assert!(answers[0] > 0, "{answers:?}");
    for _ in 0..2 {
        let refused = publish(&mut broken, &result);
        let message = refused.refused("FAILED_PRECONDITION", "STILL_WRITABLE");
        assert!(message.contains("worker"), "{message}");
    }
    // What it keeps is not what the host knew of.
    let kept = mapped_writable(worker(&broken.host), &result.fds[0]).expect("a second mapping");
    assert_eq!(kept.start, answers[0].cast_unsigned());
    has_no_name(&mut broken, &result);
    // The same at once: the next result of `escapes` lies where the last one did.
    let publishing = |broken: &mut Broken, publish: bool| {
        let mut call = json!({"kernel": "escapes/k", "inputs": {"x": "attempt"}});
        if publish {
            call["publish"] = json!({"y": "y"});
        }
        broken.client.ask(Op::Invoke, call)
    };
    broken
        .attempt(&Attempt::new([call(libc::SYS_getpid, [0; 3])]))
        .unwrap();
    let last = publishing(&mut broken, false);
    let place = mapped_writable(worker(&broken.host), &last.fds[0]).expect("it is mapped");
    let bytes = (place.end - place.start).cast_signed();
    let lease = &last.accepted()["results"][0]["lease"];
    broken.client.ok(Op::Release, json!({"leases": [lease]}));
    broken
        .attempt(&Attempt::new([twice(place.start.cast_signed(), bytes)]))
        .unwrap();
    publishing(&mut broken, true).refused("FAILED_PRECONDITION", "STILL_WRITABLE");
    let looked_up = broken.client.ask(Op::Lookup, json!({"name": "y"}));
    looked_up.refused("NOT_FOUND", "FLIGHT_NOT_FOUND");
    broken.client.ok(Op::Drop, json!({"name": "attempt"}));
    // What a worker keeps is charged until it ends.
    crate::workers::kill(worker(&broken.host));
    for _ in 0..2 {
        broken.check("its worker is gone");
    }
    drop((result, last));
    assert_eq!(
        Holdings::of(&broken.host.settled(&mut broken.client)),
        before
    );
}

#[test]
fn a_header_or_footer_of_a_workers_own_gets_no_name() {
    let mut broken = Broken::new();
    let (result, _) = delivered(&mut broken);
    let bytes = &result.body()["results"][0]["mapping"]["bytes"];
    let bytes = bytes.as_i64().unwrap();
    let lease = &result.body()["results"][0]["lease"];
    broken.client.ok(Op::Release, json!({"leases": [lease]}));
    // In the schema, in what is zero behind it, in the footer.
    for offset in [64, 40_000, bytes - 64] {
        let (result, place) = delivered(&mut broken);
        let address = place.start.cast_signed() + offset;
        let store = match offset {
            40_000 => Call(-4, [address, 1, 0], 0),
            _ => wipe(address),
        };
        broken.attempt(&Attempt::new([store])).unwrap();
        for _ in 0..2 {
            let refused = publish(&mut broken, &result);
            let message = refused.refused("INTERNAL", "BAD_ANSWER");
            assert!(message.contains("header or footer"), "{message}");
        }
        has_no_name(&mut broken, &result);
    }
    // And once it has a name, there is no way left.
    let (result, place) = delivered(&mut broken);
    publish(&mut broken, &result).accepted();
    let whole = || std::fs::read(format!("/proc/self/fd/{}", result.fds[0].as_raw_fd())).unwrap();
    let published = whole();
    let store = Attempt::new([wipe(place.start.cast_signed() + 64)]);
    // There is nothing, or what the attempt itself was given.
    if let Err(reason) = broken.attempt(&store) {
        assert_eq!(reason, "WORKER_LOST");
    }
    assert!(whole() == published, "it was changed");
    let expected: Vec<_> = ramp(MOVED).iter().map(|x| 2.0 * x + 1.0).collect();
    assert_eq!(numbers(&result), expected);
    broken.check("it is sealed");
}
