//! Real hosts, the binary, and what crosses their sockets. Each test has a host of its own, in a process of its own
//! or with a Flight socket in this one, and counts nothing of this process, so they run side by side.
//!
//! `cargo test --test host clients::` runs one part of it. `floods` and `stress` are binaries of their own: their load
//! and their descriptors in flight, which Linux counts for each user, would be felt here.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

#[path = "../support/guest.rs"]
mod guest;
#[path = "../support/served.rs"]
mod served;

mod broken_out;
mod cli;
mod clients;
mod compilers;
mod cpu_time;
mod crew;
mod doctor;
mod exhaustion;
mod flight;
mod guests;
mod hostile_worker;
mod http2;
mod inline;
mod logs;
mod prepared;
mod protocol;
mod quarantine;
mod quotas;
mod remote;
mod runaways;
mod sealed;
mod second_uid;
mod walls;
mod workers;
