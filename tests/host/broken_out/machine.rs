//! The plugin that has broken out, and a host that runs it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use strait_client::wire::Op;
use tempfile::TempDir;
use wasmtime_environ::object::{Object, ObjectSection, ObjectSymbol};

use crate::guest;
use crate::served::{PATIENCE, Raw, Served, check_call, numbers, put, ramp};
use crate::workers::{MOVED, NO_SPARE, ON};

/// The guest's functions and what they become: System V, with two registers more in front, as wasmtime calls within a module.
const PRIMITIVES: [(&str, &[u8]); 6] = [
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
    (
        "primitive_map",
        &[
            0xb8, 9, 0, 0, 0, // mov eax, mmap
            0x31, 0xff, // xor edi, edi
            0x48, 0x89, 0xd6, // mov rsi, rdx
            0xba, 3, 0, 0, 0, // mov edx, PROT_READ | PROT_WRITE
            0x49, 0x89, 0xca, // mov r10, rcx
            0x49, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, // mov r8, -1
            0x45, 0x31, 0xc9, // xor r9d, r9d
            0x0f, 0x05, // syscall
            0xc3, // ret
        ],
    ),
    (
        "primitive_twice",
        &[
            0xb8, 25, 0, 0, 0, // mov eax, mremap
            0x48, 0x89, 0xd7, // mov rdi, rdx
            0x31, 0xf6, // xor esi, esi: what is shared is mapped a second time
            0x48, 0x89, 0xca, // mov rdx, rcx
            0x41, 0xba, 1, 0, 0, 0, // mov r10d, MREMAP_MAYMOVE
            0x0f, 0x05, // syscall
            0xc3, // ret
        ],
    ),
    ("primitive_load", &[0x48, 0x8b, 0x02, 0xc3]), // mov rax, [rdx]; ret
    ("primitive_store", &[0x48, 0x89, 0x0a, 0xc3]), // mov [rdx], rcx; ret
    ("primitive_stack", &[0x48, 0x89, 0xe0, 0xc3]), // mov rax, rsp; ret
];

/// Words of the input: up to `CALLS` calls of eight words each (number, three arguments, mask of those arguments and of those
/// data words that are offsets into the scratch), then the data that are put there. The fourth argument of a call is always 8. Number -1 is a load from the first argument,
/// -3 a new mapping of so many bytes with those flags, -4 a store to an address, -5 a second mapping of what so many bytes from an address
/// on are of.
pub(super) const CALLS: usize = 4;
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

fn placeholders() -> String {
    [
        placeholder("primitive_call", "i64 i64 i64 i64", "i64"),
        placeholder("primitive_map", "i64 i64", "i64"),
        placeholder("primitive_twice", "i64 i64", "i64"),
        placeholder("primitive_load", "i64", "i64"),
        placeholder("primitive_store", "i64 i64", ""),
        placeholder("primitive_stack", "", "i64"),
    ]
    .join("\n")
}

/// Ends its process in `function` of the contract.
pub(super) fn ending(function: &str, parameters: &str, result: &str) -> Vec<u8> {
    let exit = libc::SYS_exit_group;
    let text = format!(
        "(func ${function} (param {parameters}) (result {result})
           (drop (call $primitive_call (i64.const {exit}) (i64.const 0) (i64.const 0) (i64.const 0))) unreachable)"
    );
    guest::component(
        &format!("ends-in-{function}"),
        &format!("{}\n{text}", placeholders()),
    )
}

/// What its `run` does, with the primitives.
pub(super) fn running(name: &str, body: &str) -> Vec<u8> {
    let text = format!("(func $run (param i32) (result i32) {body} i32.const 0)");
    guest::component(name, &format!("{}\n{text}", placeholders()))
}

fn plugin() -> Vec<u8> {
    let functions = placeholders();
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
                (if (i64.eq (call $word (local.get $i)) (i64.const -3)) (then
                  (local.set $answer (call $primitive_map (call $word (i32.add (local.get $i) (i32.const 1)))
                    (call $word (i32.add (local.get $i) (i32.const 2)))))))
                (if (i64.eq (call $word (local.get $i)) (i64.const -4)) (then
                  (call $primitive_store (call $word (i32.add (local.get $i) (i32.const 1)))
                    (call $word (i32.add (local.get $i) (i32.const 2))))))
                (if (i64.eq (call $word (local.get $i)) (i64.const -5)) (then
                  (local.set $answer (call $primitive_twice (call $word (i32.add (local.get $i) (i32.const 1)))
                    (call $word (i32.add (local.get $i) (i32.const 2)))))))
                (i64.store (i32.add (i32.wrap_i64 (global.get $y)) (local.get $i)) (local.get $answer))
                (br_if $calls (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 8))) (i32.const {calls}))))
              i32.const 0)
            (func $there (param i64) (result i32) (i64.ge_s (local.get 0) (i64.const 0)))"
        ),
    )
}

/// Puts the primitives into those compiled plugins of `cache` that have their names.
fn break_out(cache: &Path, plugins: usize) {
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
    assert_eq!(broken, plugins * PRIMITIVES.len());
}

/// One system call: arguments, and which of them are offsets into the scratch.
#[derive(Clone, Copy)]
pub(super) struct Call(pub(super) i64, pub(super) [i64; 3], pub(super) i64);

pub(super) const fn call(number: libc::c_long, arguments: [i64; 3]) -> Call {
    Call(number, arguments, 0)
}

/// A new mapping.
pub(super) const fn map(bytes: i64, flags: libc::c_int) -> Call {
    Call(-3, [bytes, flags as i64, 0], 0)
}

/// A store of zeros.
pub(super) const fn wipe(address: i64) -> Call {
    Call(-4, [address, 0, 0], 0)
}

/// A second mapping of the same.
pub(super) const fn twice(address: i64, bytes: i64) -> Call {
    Call(-5, [address, bytes, 0], 0)
}

/// The first argument is an offset into the scratch.
pub(super) const FIRST: i64 = 1 << 1;
pub(super) const SECOND: i64 = 1 << 2;
pub(super) const THIRD: i64 = 1 << 3;

/// What the guest does: calls, and the data that they point to (and which of its words do in turn).
pub(super) struct Attempt {
    pub(super) calls: Vec<Call>,
    pub(super) data: Vec<u8>,
    pub(super) pointers: i64,
}

impl Attempt {
    pub(super) fn new(calls: impl Into<Vec<Call>>) -> Self {
        Self {
            calls: calls.into(),
            data: Vec::new(),
            pointers: 0,
        }
    }

    pub(super) fn with(calls: impl Into<Vec<Call>>, data: &[u8]) -> Self {
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
pub(super) struct Broken {
    pub(super) host: Served,
    pub(super) client: Raw,
    _cache: TempDir,
}

impl Broken {
    pub(super) fn new() -> Self {
        Self::with(&[plugin()])
    }

    /// With further settings.
    pub(super) fn set(more: &[(&str, &str)]) -> Self {
        Self::with_settings(&[plugin()], more)
    }

    pub(super) fn with(plugins: &[Vec<u8>]) -> Self {
        Self::with_settings(plugins, &[])
    }

    fn with_settings(plugins: &[Vec<u8>], more: &[(&str, &str)]) -> Self {
        let cache = TempDir::new().unwrap();
        let compiled = cache.path().join("compiled");
        let settings = [
            ON,
            NO_SPARE,
            ("STRAIT__ENGINE__CACHE", compiled.to_str().unwrap()),
            ("STRAIT__WORKERS__GRACE_MS", "200"),
            ("STRAIT__WORKERS__STRIKES", "0"),
        ];
        let settings = [&settings[..], more].concat();
        drop(Served::with_plugins(plugins, &settings));
        break_out(&compiled, plugins.len());
        let host = Served::with_plugins(plugins, &settings);
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
    pub(super) fn attempt(&mut self, attempt: &Attempt) -> Result<Vec<i64>, String> {
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

    /// How its workers have ended so far, in Linux's words, once `least` of them have.
    pub(super) fn ends(&self, least: usize) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let log = self.host.log();
            let ends = log.lines().filter_map(|line| {
                let about = line.split_once("a worker process has ended")?.1;
                Some(about.split_once("status=")?.1.to_owned())
            });
            let ends: Vec<_> = ends.collect();
            if ends.len() >= least {
                return ends;
            }
            assert!(begin.elapsed() < PATIENCE, "{ends:?} of {least}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The host, its worker and everybody's tensors are as they were.
    pub(super) fn check(&mut self, what: &str) {
        check_call(&mut self.client, json!("x"), &ramp(MOVED));
        let pid = self.host.pid();
        assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "{what}");
    }
}
