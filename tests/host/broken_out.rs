//! A plugin that has broken out of wasmtime: it runs machine code of its own in its worker process, and the walls around that
//! process are all that is left. Nothing here is pretended: the compiled plugin is changed where the host keeps it, so that four
//! functions of the guest become a system call, a load and a store anywhere, and the stack pointer.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;
use strait_client::wire::Op;
use tempfile::TempDir;
use wasmtime_environ::object::{Object, ObjectSection, ObjectSymbol};

use crate::guest;
use crate::served::{PATIENCE, Raw, Served, check_call, number, put, ramp, write};
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
            0x4d, 0x31, 0xd2, // xor r10, r10
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
/// data words that are offsets into the scratch), then the data that are put there. Number -1 is a load from the first argument.
const CALLS: usize = 4;
const DATA: usize = 20;
const WORDS: usize = 8 * CALLS + DATA;

/// Enough machine code to be replaced.
fn placeholder(name: &str, parameters: &str, result: &str) -> String {
    let work = "(i64.const 0x1234567812345678) (i64.xor) (i64.const 0x77) (i64.rotl)".repeat(6);
    let result = match result {
        "" => ("", "(drop)"),
        _ => ("(result i64)", ""),
    };
    format!(
        "(func ${name} (param {parameters}) {} (i64.const 1) {work} {})",
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

    fn words(&self) -> Vec<u8> {
        let mut words = vec![-2_i64; WORDS];
        for (at, call) in self.calls.iter().enumerate() {
            let at = at * 8;
            words[at] = call.0;
            words[at + 1..at + 4].copy_from_slice(&call.1);
            words[at + 4] = call.2;
        }
        words[5] = self.pointers;
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let data = &mut bytes[8 * 8 * CALLS..];
        data.fill(0);
        data[..self.data.len()].copy_from_slice(&self.data);
        bytes
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
        write(
            created.fd.as_fd(),
            created.tensor_offset(),
            &attempt.words(),
        );
        let publish = json!({"segment": created.segment, "name": "attempt", "replace": true});
        self.client.ok(Op::Publish, publish);
        self.client
            .ok(Op::Release, json!({"leases": [created.lease]}));
        let call =
            json!({"kernel": "escapes/k", "inputs": {"x": "attempt"}, "deadline_ms": 300});
        let reply = self.client.ask(Op::Invoke, call);
        if !reply.is_ok() {
            return Err(reply.body()["reason"].as_str().unwrap().to_owned());
        }
        let answers = crate::served::numbers(&reply);
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
