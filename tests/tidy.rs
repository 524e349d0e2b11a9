//! The rules of ARCHITECTURE.md that a compiler does not check.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where all Rust files are.
const RUST: [&str; 7] = [
    "host",
    "clients/rust",
    "clients/c",
    "xtask",
    "plugins",
    "tests",
    "benches",
];

/// Rust files below `root`.
fn sources(root: &str) -> Vec<PathBuf> {
    files(root, &["rs"])
}

/// Files below `root` that end so, without build output.
fn files(root: &str, ends: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::from(root)];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                waiting.push(path);
            } else if path
                .extension()
                .is_some_and(|end| ends.iter().any(|e| end == *e))
            {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no sources under {root}");
    found
}

/// The file without comments and string literals' insides do not matter here: only comments go.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .map(|line| format!("{line}\n"))
        .collect()
}

/// Whether `text` has `word` between characters that are not of an identifier.
fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

/// The rooms of `host/`, from left to right: a room may import itself and what is right of it. Rooms in one place know
/// nothing of each other.
const ROOMS: [&[&str]; 7] = [
    &["cli"],
    &["flight", "datasock"],
    &["session"],
    &["config", "worker", "access"],
    &["engine", "lease"],
    &["plugin"],
    &["error"],
];

#[test]
fn imports_run_to_the_right() {
    for (rank, rooms) in ROOMS.iter().enumerate() {
        for room in *rooms {
            let own: Vec<PathBuf> = sources("host")
                .into_iter()
                .filter(|p| {
                    p.starts_with(format!("host/{room}"))
                        || p.to_str() == Some(&format!("host/{room}.rs"))
                })
                .collect();
            assert!(!own.is_empty(), "room {room} is gone; mend ROOMS");
            let forbidden = ROOMS[..=rank]
                .iter()
                .flat_map(|r| r.iter())
                .filter(|r| *r != room);
            for other in forbidden {
                for path in &own {
                    let text = code(path);
                    assert!(
                        !text.contains(&format!("crate::{other}")),
                        "{} imports crate::{other}, which is left of {room}",
                        path.display()
                    );
                }
            }
        }
    }
}

#[test]
fn each_library_has_one_home() {
    let homes: [(&str, &[&str]); 8] = [
        ("wasmtime", &["host/engine"]),
        // The demo is also a Flight client.
        ("tonic", &["host/flight", "host/cli/demo/inline.rs"]),
        ("arrow_flight", &["host/flight", "host/cli/demo/inline.rs"]),
        ("prost", &["host/flight"]),
        ("rustls", &["host/flight"]),
        ("postcard", &["host/worker"]),
        ("mmap", &["host/memory"]),
        ("memfd_create", &["host/memory"]),
    ];
    let all = ["host", "clients/rust/src", "xtask"].map(sources).concat();
    for (word, allowed) in homes {
        for path in &all {
            if allowed.iter().any(|home| path.starts_with(home)) {
                continue;
            }
            let text = code(path);
            let used = text
                .lines()
                .any(|l| l.contains(&format!("{word}::")) || l.contains(&format!("{word}(")));
            assert!(
                !used,
                "{} uses {word}, whose home is {allowed:?}",
                path.display()
            );
        }
    }
}

#[test]
fn unsafe_stays_in_its_homes() {
    let homes = [
        "host/memory",
        "host/engine/guest_memory.rs",
        "host/engine/regions.rs",
        "host/engine/fault.rs",
        "host/engine/leash.rs",
        "host/engine/cache.rs",
        "plugins/sdk",
        // Writing where nobody may is what it is for.
        "plugins/tests/input-writer",
        // What C gives, and is given: pointers.
        "clients/c/src/pointer.rs",
    ];
    for path in RUST.map(sources).concat() {
        if homes.iter().any(|home| path.starts_with(home)) || path.ends_with("tidy.rs") {
            continue;
        }
        let text = code(&path);
        // Attributes name the lint; only the keyword itself counts.
        let text = text
            .replace("unsafe_code", "")
            // The name by which C finds a function.
            .replace("#[unsafe(no_mangle)]", "")
            .replace("unsafe_op_in_unsafe_fn", "");
        let found = text
            .lines()
            .find(|line| has_word(line, "unsafe") && !line.contains('"') && !line.contains('`'));
        assert!(
            found.is_none(),
            "{}: {found:?} is outside the homes of unsafe {homes:?}",
            path.display()
        );
    }
}

#[test]
fn no_client_contains_wasmtime() {
    for client in ["strait-client", "strait-c"] {
        let words = ["tree", "--offline", "--edges", "normal", "--prefix", "none"];
        let tree = Command::new(env!("CARGO"))
            .args(words)
            .args(["--package", client])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&tree.stdout);
        assert!(
            tree.status.success() && text.contains("strait-memory"),
            "{text}{}",
            String::from_utf8_lossy(&tree.stderr)
        );
        assert!(!text.contains("wasmtime"), "{text}");
    }
}

#[test]
fn the_contract_is_one_draft() {
    // 0.1.0 is a draft until the first release tag; what must hold now is that plugins and host
    // are built from the same text.
    let wit = fs::read_to_string("wit/kernel.wit").unwrap();
    assert!(wit.contains("package strait:kernel@0.1.0;"));
    assert_eq!(
        fs::read_dir("wit").unwrap().count(),
        1,
        "one file per version"
    );
}

/// The workspace's crates and those of it that each may depend on. The host may on all of them.
const CRATES: [(&str, &str, &[&str]); 7] = [
    ("strait-protocol", "host/protocol", &["strait-tensor"]),
    ("strait-memory", "host/memory", &[]),
    ("strait-tensor", "host/tensor", &[]),
    (
        "strait-ring",
        "host/ring",
        &["strait-memory", "strait-protocol"],
    ),
    (
        "strait-client",
        "clients/rust",
        &[
            "strait-protocol",
            "strait-memory",
            "strait-ring",
            "strait-tensor",
        ],
    ),
    ("strait-c", "clients/c", &["strait-client"]),
    ("xtask", "xtask", &[]),
];

#[test]
fn crates_depend_one_way() {
    for (name, folder, allowed) in CRATES {
        let manifest = fs::read_to_string(format!("{folder}/Cargo.toml")).unwrap();
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{folder}");
        let (_, rest) = manifest.split_once("[dependencies]").unwrap();
        let own = rest.split("\n[").next().unwrap_or(rest);
        for line in own.lines().filter(|line| line.starts_with("strait")) {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            assert!(
                allowed.contains(&dependency),
                "{name} depends on {dependency}; it may on {allowed:?}"
            );
        }
    }
    let members = fs::read_to_string("Cargo.toml").unwrap();
    let (_, rest) = members.split_once("members = [").unwrap();
    let members = rest.split(']').next().unwrap_or_default();
    for member in members.split(',').map(|m| m.trim().trim_matches('"')) {
        assert!(
            CRATES.iter().any(|(_, folder, _)| *folder == member),
            "{member} is a crate that CRATES does not know"
        );
    }
}

/// Where each crate's modules begin.
const ROOTS: [&str; 10] = [
    "host",
    "host/memory/src",
    "host/tensor/src",
    "host/protocol/src",
    "host/ring/src",
    "clients/rust/src",
    "clients/c/src",
    "xtask/src",
    "plugins/sdk/src",
    "plugins/kernels/src",
];

/// A module's path in its crate: `["cli", "demo", "roles"]` for `host/cli/demo/roles.rs`.
fn module(root: &str, file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(root).unwrap().with_extension("");
    let mut path: Vec<String> = relative
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .collect();
    if path
        .last()
        .is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str()))
    {
        path.pop();
    }
    path
}

/// The paths of a `use` tree or an expression at the start of `text`: `a::{b, c::d}` are two.
fn leaves(text: &str, before: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let mut path = before.to_vec();
    let mut at = 0;
    loop {
        let rest = &text[at..];
        at += rest.len() - rest.trim_start().len();
        let rest = &text[at..];
        if rest.starts_with('{') {
            at += 1;
            while at < text.len() && !text[at..].starts_with('}') {
                at += leaves(&text[at..], &path, found).max(1);
                let rest = text[at..].trim_start_matches([',', ' ', '\n']);
                at = text.len() - rest.len();
            }
            return at + 1;
        }
        let end = rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len());
        path.push(rest[..end].to_owned());
        at += end;
        match text[at..].strip_prefix("::") {
            Some(_) if end > 0 => at += 2,
            _ => break,
        }
    }
    // `a as b` in a group: what follows is not another path.
    if let Some(rest) = text[at..].strip_prefix(" as ") {
        let end = rest.find([',', '}', ';']).unwrap_or(rest.len());
        at = text.len() - rest.len() + end;
    }
    found.push(path);
    at
}

/// The paths of its crate that a module names by `crate::` and `super::`, outside of its tests.
fn named(own: &[String], text: &str) -> Vec<Vec<String>> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or(text);
    let part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in text.match_indices(start) {
            if text[..at].ends_with(part) {
                continue;
            }
            let mut rest = &text[at..];
            let mut before = own.to_vec();
            if let Some(absolute) = rest.strip_prefix("crate::") {
                (before, rest) = (Vec::new(), absolute);
            }
            while let Some(above) = rest.strip_prefix("super::") {
                before.pop();
                rest = above;
            }
            // `pub(in super::super)` ends so, and names nothing.
            leaves(rest, &before, &mut found);
        }
    }
    found
}

/// For each room (a module with modules in it, or a crate) who of it imports whom.
fn imports(root: &str) -> BTreeMap<Vec<String>, BTreeSet<(String, String)>> {
    let nested = |file: &Path| {
        ROOTS.iter().any(|other| {
            *other != root && Path::new(other).starts_with(root) && file.starts_with(other)
        }) || (root == "host"
            && ["host/memory", "host/tensor", "host/protocol", "host/ring"]
                .iter()
                .any(|folder| file.starts_with(folder)))
    };
    let files: Vec<PathBuf> = sources(root)
        .into_iter()
        .filter(|file| !nested(file))
        .collect();
    let modules: BTreeSet<Vec<String>> = files.iter().map(|file| module(root, file)).collect();
    let mut rooms: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for file in &files {
        let own = module(root, file);
        for mut other in named(&own, &code(file)) {
            // What is named may be an item of a module.
            while !modules.contains(&other) && other.pop().is_some() {}
            let common = own.iter().zip(&other).take_while(|(a, b)| a == b).count();
            // One that contains the other is its parent.
            if let (Some(from), Some(to)) = (own.get(common), other.get(common)) {
                let room = rooms.entry(own[..common].to_vec()).or_default();
                room.insert((from.clone(), to.clone()));
            }
        }
    }
    rooms
}

/// Those that can be reached from `start`.
fn reached<'a>(arrows: &'a BTreeSet<(String, String)>, start: &'a str) -> BTreeSet<&'a str> {
    let mut found = BTreeSet::new();
    let mut waiting = vec![start];
    while let Some(from) = waiting.pop() {
        for (_, to) in arrows.iter().filter(|(a, _)| a == from) {
            if found.insert(to.as_str()) {
                waiting.push(to);
            }
        }
    }
    found
}

#[test]
fn files_of_a_room_import_in_no_circle() {
    let mut found = BTreeSet::new();
    for root in ROOTS {
        for (room, arrows) in imports(root) {
            let place = Path::new(root).join(room.iter().collect::<PathBuf>());
            for (from, _) in &arrows {
                let circle: Vec<String> = reached(&arrows, from)
                    .into_iter()
                    .filter(|to| reached(&arrows, to).contains(from.as_str()))
                    .map(str::to_owned)
                    .collect();
                if circle.len() > 1 {
                    found.insert((place.display().to_string(), circle));
                }
            }
        }
    }
    assert!(found.is_empty(), "files that import each other: {found:#?}");
}

#[test]
fn paths_are_read_out_of_sources() {
    let own = ["a".to_owned(), "b".to_owned()];
    let check = |text: &str, expected: &[&str]| {
        let found: Vec<String> = named(&own, text).iter().map(|p| p.join("::")).collect();
        assert_eq!(found, expected, "{text}");
    };
    check("use super::c::D;", &["a::c::D"]);
    check(
        "use super::{c, d::{self, E as F}, g};",
        &["a::c", "a::d::self", "a::d::E", "a::g"],
    );
    check("x(super::super::y::z(1))", &["y::z"]);
    check("use crate::{p,\n    q::R};", &["p", "q::R"]);
    check("use other::crate_like; mycrate::x", &[]);
    check("#[cfg(test)]\nmod tests { use super::c; }", &[]);
}

const LINES_MAX: usize = 600;

/// Files that are longer, and why.
const LONG: &[(&str, &str)] = &[
    ("plugins/sdk/src/bindings.rs", "generated"),
    ("clients/c/include/strait.h", "generated"),
    ("clients/go/live_test.go", "a list of cases"),
    ("clients/go/prepared_test.go", "a list of cases"),
    ("clients/python/tests/test_channel.py", "a list of cases"),
    ("clients/python/tests/test_live.py", "a list of cases"),
    ("clients/python/tests/test_stream.py", "a list of cases"),
    ("tests/conformance/test_conformance.py", "a list of cases"),
    (
        "tests/conformance/drivers/go/main.go",
        "a command for each case",
    ),
];

#[test]
fn files_are_short() {
    let mut found = BTreeSet::new();
    let ours = [&RUST[..], &["clients", "examples"]].concat();
    let ends = ["rs", "py", "go", "jl", "c", "h", "cpp"];
    for path in ours.iter().flat_map(|root| files(root, &ends)) {
        if fs::read_to_string(&path).unwrap().lines().count() > LINES_MAX {
            found.insert(path.to_str().unwrap().to_owned());
        }
    }
    let known: BTreeSet<String> = LONG.iter().map(|(path, _)| (*path).to_owned()).collect();
    let new: Vec<_> = found.difference(&known).collect();
    assert!(new.is_empty(), "more than {LINES_MAX} lines: {new:#?}");
    let gone: Vec<_> = known.difference(&found).collect();
    assert!(gone.is_empty(), "short enough by now; mend LONG: {gone:#?}");
}
