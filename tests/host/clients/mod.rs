//! Clients that break the protocol, that cheat, and that die: each is answered as `docs/protocol.md`
//! says, the host stays, nothing is left behind, and the next client is served.

mod deaths;
mod frames;
mod resources;
mod segments;
mod sessions;
mod shared_runs;

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::SealFlags;
use serde_json::{Value, json};

use crate::guest;
use crate::served::{Served, number, seal};

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

fn place(name: &str, elements: u64, offset: u64) -> Value {
    json!({"name": name, "dtype": "float64", "shape": [elements], "offset": offset, "length": elements * 8})
}

fn sealed(fd: OwnedFd, seals: SealFlags) -> OwnedFd {
    seal(&fd, seals);
    fd
}

/// `base` with a field set.
fn with(base: &Value, field: &str, value: Value) -> Value {
    let mut changed = base.clone();
    changed[field] = value;
    changed
}
