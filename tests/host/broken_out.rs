//! A plugin that has broken out of wasmtime: it runs machine code of its own in its worker process, and the walls around that
//! process are all that is left. Nothing here is pretended: the compiled plugin is changed where the host keeps it, so that four
//! functions of the guest become a system call, a load and a store anywhere, and the stack pointer.

use std::fs;
use std::path::Path;

use serde_json::json;
use strait_client::wire::Op;
use tempfile::TempDir;
use wasmtime_environ::object::{Object, ObjectSection, ObjectSymbol};

use crate::guest;
use crate::served::{Holdings, Raw, Served, check_call, numbers, put, ramp};
use crate::workers::{MOVED, ON, all_children, worker};

/// The guest's functions and what they become: System V, with two registers more in front, as wasmtime calls within a module.
const PRIMITIVES: [(&str, &[u8]); 4] = [
    (
        "primitive_call",
        &[
            0x48, 0x89, 0xd0, // mov rax, rdx
            0x48, 0x89, 0xcf, // mov rdi, rcx
            0x4c, 0x89, 0xc6, // mov rsi, r8
            0x4c, 0x89, 0xca, // mov rdx, r9
            0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
            0x4d, 0x31, 0xc0, // xor r8, r8
            0x4d, 0x31, 0xc9, // xor r9, r9
            0x0f, 0x05, // syscall
            0xc3, // ret
        ],
    ),
    ("primitive_load", &[0x48, 0x8b, 0x02, 0xc3]), // mov rax, [rdx]; ret
    ("primitive_store", &[0x48, 0x89, 0x0a, 0xc3]), // mov [rdx], rcx; ret
    ("primitive_stack", &[0x48, 0x89, 0xe0, 0xc3]), // mov rax, rsp; ret
];

/// Words of the input: up to `CALLS` calls of eight words each (number, three arguments, mask of those arguments and of those
/// data words that are offsets into the scratch), then the data that are put there. The fourth argument of a call is always 8. Number -1 is a load from the first argument.
const CALLS: usize = 4;
const DATA: usize = 20;
const WORDS: usize = 8 * CALLS + DATA;

/// Enough machine code to be replaced.
fn placeholder(name: &str, parameters: &str, result: &str) -> String {
    let work = "(i64.const 0x1234567812345679) (i64.mul) (i64.const 0x7654321076543210) (i64.xor)"
        .repeat(4);
    let result = match result {
        "" => ("", "(drop)"),
        _ => ("(result i64)", ""),
    };
    format!(
        "(func ${name} (param {parameters}) {} (global.get $bytes) {work} {})",
        result.0, result.1
    )
}

fn plugin() -> Vec<u8> {
    let functions = [
        placeholder("primitive_call", "i64 i64 i64 i64", "i64"),
        placeholder("primitive_load", "i64", "i64"),
        placeholder("primitive_store", "i64 i64", ""),
        placeholder("primitive_stack", "", "i64"),
    ]
    .join("\n");
    let calls = 8 * CALLS;
    guest::component(
        "escapes",
        &format!(
            "{functions}
            (func $word (param i32) (result i64) (i64.load (i32.add (i32.wrap_i64 (global.get $x)) (i32.mul (local.get 0) (i32.const 8)))))
            ;; The value, or that offset into the scratch.
            (func $based (param $value i64) (param $mask i64) (param $bit i32) (param $scratch i64) (result i64)
              (select (i64.add (local.get $value) (local.get $scratch)) (local.get $value)
                (i32.wrap_i64 (i64.and (i64.shr_u (local.get $mask) (i64.extend_i32_u (local.get $bit))) (i64.const 1)))))
            (func $argument (param $call i32) (param $index i32) (param $scratch i64) (result i64)
              (call $based (call $word (i32.add (local.get $call) (local.get $index))) (call $word (i32.add (local.get $call) (i32.const 4)))
                (local.get $index) (local.get $scratch)))
            (func $run (param i32) (result i32) (local $i i32) (local $s i64) (local $answer i64)
              (local.set $s (i64.and (i64.sub (call $primitive_stack) (i64.const 8192)) (i64.const -64)))
              (loop $data
                (call $primitive_store (i64.add (local.get $s) (i64.extend_i32_u (i32.mul (local.get $i) (i32.const 8))))
                  (call $based (call $word (i32.add (local.get $i) (i32.const {calls}))) (call $word (i32.const 5)) (local.get $i) (local.get $s)))
                (br_if $data (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const {DATA}))))
              (local.set $i (i32.const 0))
              (loop $calls
                (if (call $there (call $word (local.get $i))) (then
                  (local.set $answer (call $primitive_call (call $word (local.get $i))
                    (call $argument (local.get $i) (i32.const 1) (local.get $s))
                    (call $argument (local.get $i) (i32.const 2) (local.get $s))
                    (call $argument (local.get $i) (i32.const 3) (local.get $s))))))
                (if (i64.eq (call $word (local.get $i)) (i64.const -1)) (then
                  (local.set $answer (call $primitive_load (call $word (i32.add (local.get $i) (i32.const 1)))))))
                (i64.store (i32.add (i32.wrap_i64 (global.get $y)) (local.get $i)) (local.get $answer))
                (br_if $calls (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 8))) (i32.const {calls}))))
              i32.const 0)
            (func $there (param i64) (result i32) (i64.ge_s (local.get 0) (i64.const 0)))"
        ),
    )
}

/// Puts the primitives into the one compiled plugin of `cache` that has their names.
fn break_out(cache: &Path) {
    let mut broken = 0;
    for entry in fs::read_dir(cache).unwrap() {
        let path = entry.unwrap().path();
        let mut artifact = fs::read(&path).unwrap();
        let places = {
            let elf = wasmtime_environ::object::File::parse(&*artifact).unwrap();
            let text = elf.section_by_name(".text").unwrap().file_range().unwrap();
            let place = |name: &str| {
                let symbol = elf.symbols().find(|symbol| {
                    symbol
                        .name()
                        .is_ok_and(|symbol| symbol.ends_with(&format!("::{name}")))
                })?;
                Some((text.0 + symbol.address(), symbol.size()))
            };
            PRIMITIVES.map(|(name, _)| place(name))
        };
        for (place, (name, code)) in places.into_iter().zip(PRIMITIVES) {
            let Some((at, bytes)) = place else {
                continue;
            };
            assert!(bytes >= code.len() as u64, "{name} has {bytes} bytes");
            let at = usize::try_from(at).unwrap();
            artifact[at..at + code.len()].copy_from_slice(code);
            broken += 1;
        }
        fs::write(&path, artifact).unwrap();
    }
    assert_eq!(broken, PRIMITIVES.len());
}

/// One system call: arguments, and which of them are offsets into the scratch.
#[derive(Clone, Copy)]
struct Call(i64, [i64; 3], i64);

const fn call(number: libc::c_long, arguments: [i64; 3]) -> Call {
    Call(number, arguments, 0)
}

/// The first argument is an offset into the scratch.
const FIRST: i64 = 1 << 1;
const SECOND: i64 = 1 << 2;
const THIRD: i64 = 1 << 3;

/// What the guest does: calls, and the data that they point to (and which of its words do in turn).
struct Attempt {
    calls: Vec<Call>,
    data: Vec<u8>,
    pointers: i64,
}

impl Attempt {
    fn new(calls: impl Into<Vec<Call>>) -> Self {
        Self {
            calls: calls.into(),
            data: Vec::new(),
            pointers: 0,
        }
    }

    fn with(calls: impl Into<Vec<Call>>, data: &[u8]) -> Self {
        Self {
            data: data.to_vec(),
            ..Self::new(calls)
        }
    }

    /// As the input has them.
    fn words(&self) -> Vec<f64> {
        let mut words = [-2_i64; WORDS];
        for (at, call) in self.calls.iter().enumerate() {
            let at = at * 8;
            words[at] = call.0;
            words[at + 1..at + 4].copy_from_slice(&call.1);
            words[at + 4] = call.2;
        }
        words[5] = self.pointers;
        let mut data = [0; 8 * DATA];
        data[..self.data.len()].copy_from_slice(&self.data);
        for (word, bytes) in words[8 * CALLS..].iter_mut().zip(data.as_chunks().0) {
            *word = i64::from_le_bytes(*bytes);
        }
        words
            .map(|word| f64::from_bits(word.cast_unsigned()))
            .to_vec()
    }
}

/// A host whose plugin `escapes` runs machine code.
struct Broken {
    host: Served,
    client: Raw,
    _cache: TempDir,
}

impl Broken {
    fn new() -> Self {
        let cache = TempDir::new().unwrap();
        let compiled = cache.path().join("compiled");
        let settings = [
            ON,
            ("STRAIT__ENGINE__CACHE", compiled.to_str().unwrap()),
            ("STRAIT__WORKERS__GRACE_MS", "200"),
        ];
        drop(Served::with_plugin(&plugin(), &settings));
        break_out(&compiled);
        let host = Served::with_plugin(&plugin(), &settings);
        let mut client = host.greeted();
        put(&mut client, "x", MOVED);
        check_call(&mut client, json!("x"), &ramp(MOVED));
        Self {
            host,
            client,
            _cache: cache,
        }
    }

    /// What each call answered, or the code and reason that the invocation ended with.
    fn attempt(&mut self, attempt: &Attempt) -> Result<Vec<i64>, String> {
        let created = self.client.create(WORDS as u64);
        created.fill(&attempt.words());
        let publish = json!({"segment": created.segment, "name": "attempt", "replace": true});
        self.client.ok(Op::Publish, publish);
        self.client
            .ok(Op::Release, json!({"leases": [created.lease]}));
        let call = json!({"kernel": "escapes/k", "inputs": {"x": "attempt"}, "deadline_ms": 300});
        let reply = self.client.ask(Op::Invoke, call);
        if let Some(reason) = reply.body()["reason"].as_str() {
            return Err(reason.to_owned());
        }
        let answers = numbers(&reply);
        let lease = reply.body()["results"][0]["lease"].clone();
        self.client.ok(Op::Release, json!({"leases": [lease]}));
        Ok(answers[..attempt.calls.len()]
            .iter()
            .map(|answer| answer.to_bits().cast_signed())
            .collect())
    }

    /// The host, its worker and everybody's tensors are as they were.
    fn check(&mut self, what: &str) {
        check_call(&mut self.client, json!("x"), &ramp(MOVED));
        let pid = self.host.pid();
        assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "{what}");
    }
}

/// What the filter over a worker's calls answers.
const REFUSED: [i64; 3] = [
    -(libc::EPERM as i64),
    -(libc::EACCES as i64),
    -(libc::ENOSYS as i64),
];

#[test]
fn what_reaches_beyond_the_worker_is_refused() {
    let mut broken = Broken::new();
    let host = i64::from(broken.host.pid());
    let own = i64::from(worker(&broken.host).as_raw_nonzero().get());
    // That the machine code runs at all.
    let answers = broken.attempt(&Attempt::new([
        call(libc::SYS_getpid, [0; 3]),
        call(libc::SYS_getppid, [0; 3]),
    ]));
    assert_eq!(answers, Ok(vec![own, host]));
    let zeros = [0; 64];
    let kill = i64::from(libc::SIGKILL);
    let with =
        |number, arguments, mask, data: &[u8]| Attempt::with([Call(number, arguments, mask)], data);
    let path = |number, arguments, mask| with(number, arguments, mask, b"/proc/self/status\0");
    let attempts = [
        (
            "kill of the host",
            with(libc::SYS_kill, [host, kill, 0], 0, &zeros),
        ),
        ("kill of all", with(libc::SYS_kill, [-1, 0, 0], 0, &zeros)),
        (
            "signal to the host's thread",
            with(libc::SYS_tkill, [host, kill, 0], 0, &zeros),
        ),
        (
            "signal to a thread of the host",
            with(libc::SYS_tgkill, [host, host, kill], 0, &zeros),
        ),
        (
            "queued signal",
            with(libc::SYS_rt_sigqueueinfo, [host, kill, 0], THIRD, &zeros),
        ),
        (
            "pidfd of the host",
            with(libc::SYS_pidfd_open, [host, 0, 0], 0, &zeros),
        ),
        (
            "ptrace",
            with(
                libc::SYS_ptrace,
                [i64::from(libc::PTRACE_ATTACH), host, 0],
                0,
                &zeros,
            ),
        ),
        (
            "the host's memory",
            with(libc::SYS_process_vm_readv, [host, 0, 0], SECOND, &zeros),
        ),
        ("fork", with(libc::SYS_fork, [0; 3], 0, &zeros)),
        (
            "clone",
            with(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0], 0, &zeros),
        ),
        ("clone3", with(libc::SYS_clone3, [0, 64, 0], FIRST, &zeros)),
        ("exec", path(libc::SYS_execve, [0; 3], FIRST)),
        (
            "socket",
            with(
                libc::SYS_socket,
                [i64::from(libc::AF_INET), i64::from(libc::SOCK_STREAM), 0],
                0,
                &zeros,
            ),
        ),
        (
            "connect",
            with(libc::SYS_connect, [0, 0, 64], SECOND, &zeros),
        ),
        (
            "who is sent a signal",
            with(
                libc::SYS_fcntl,
                [0, i64::from(libc::F_SETOWN), host],
                0,
                &zeros,
            ),
        ),
        (
            "which signal",
            with(libc::SYS_fcntl, [0, 10, kill], 0, &zeros),
        ),
        (
            "signals of a socket",
            with(
                libc::SYS_fcntl,
                [0, i64::from(libc::F_SETFL), i64::from(libc::O_ASYNC)],
                0,
                &zeros,
            ),
        ),
        (
            "signals by ioctl",
            with(libc::SYS_ioctl, [0, 0x5452, 0], THIRD, &1_u32.to_le_bytes()),
        ),
        (
            "owner by ioctl",
            with(libc::SYS_ioctl, [0, 0x8901, 0], THIRD, &1_u32.to_le_bytes()),
        ),
        (
            "limits of the host",
            with(
                libc::SYS_prlimit64,
                [host, i64::from(libc::RLIMIT_NOFILE), 0],
                THIRD,
                &zeros,
            ),
        ),
        (
            "own limits",
            with(
                libc::SYS_prlimit64,
                [0, i64::from(libc::RLIMIT_NOFILE), 0],
                THIRD,
                &zeros,
            ),
        ),
        (
            "CPUs of the host",
            with(
                libc::SYS_sched_setaffinity,
                [host, 8, 0],
                THIRD,
                &1_u64.to_le_bytes(),
            ),
        ),
        (
            "priority of the host",
            with(libc::SYS_setpriority, [0, host, 19], 0, &zeros),
        ),
        (
            "a write lease",
            with(
                libc::SYS_fcntl,
                [0, 1024, i64::from(libc::F_WRLCK)],
                0,
                &zeros,
            ),
        ),
        ("seals", with(libc::SYS_fcntl, [0, 1033, 1], 0, &zeros)),
        (
            "io_uring",
            with(libc::SYS_io_uring_setup, [8, 0, 0], SECOND, &zeros),
        ),
        ("bpf", with(libc::SYS_bpf, [0, 0, 64], SECOND, &zeros)),
        (
            "userfaultfd",
            with(libc::SYS_userfaultfd, [0; 3], 0, &zeros),
        ),
        (
            "perf events",
            with(libc::SYS_perf_event_open, [0, 0, -1], FIRST, &zeros),
        ),
        (
            "namespaces",
            with(
                libc::SYS_unshare,
                [i64::from(libc::CLONE_NEWUSER), 0, 0],
                0,
                &zeros,
            ),
        ),
        ("another user", with(libc::SYS_setuid, [1, 0, 0], 0, &zeros)),
        ("keys", with(libc::SYS_keyctl, [0; 3], 0, &zeros)),
        ("reboot", with(libc::SYS_reboot, [0; 3], 0, &zeros)),
    ];
    for (what, attempt) in attempts {
        match broken.attempt(&attempt) {
            Ok(answers) => assert!(
                REFUSED.contains(&answers[0]),
                "{what} answered {answers:?}: no wall of the worker's calls (seccomp) stopped it"
            ),
            // A filter that kills.
            Err(reason) => assert_eq!(reason, "WORKER_LOST", "{what}"),
        }
        broken.check(what);
    }
}

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
            Attempt::new([call(libc::SYS_pause, [0; 3])]),
            "DEADLINE",
        ),
        (
            "sleep with all signals blocked",
            Attempt::with([blocked, call(libc::SYS_pause, [0; 3])], &all_signals),
            "DEADLINE",
        ),
    ];
    for (what, attempt, reason) in attempts {
        assert_eq!(broken.attempt(&attempt), Err(reason.to_owned()), "{what}");
        broken.check(what);
    }
    assert_eq!(all_children(broken.host.pid()), 1);
}

#[test]
fn no_descriptor_of_a_worker_makes_a_file_shorter() {
    let mut broken = Broken::new();
    let answers = |calls: Vec<Call>| broken.attempt(&Attempt::new(calls));
    let shorter = |fd: i64| call(libc::SYS_ftruncate, [fd, 0, 0]);
    // 2 is the log that it shares with its host.
    let fds: Vec<i64> = (3..35).collect();
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
