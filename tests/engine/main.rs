//! A host without sockets in this process, and guests in it. Descriptors and threads of this process are counted, so
//! one host at a time (`support::Rig`), and nothing here opens a file before it has its turn.
//!
//! `cargo test --test engine hostile::` runs one part of it.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test that cannot go on ends; small numbers"
)]

#[path = "../support/mod.rs"]
mod support;

mod chunks;
mod compilers;
mod guest_exports;
mod guest_modules;
mod hostile;
mod input_stores;
mod invocations;
mod pipelines;
mod retries;
mod simulation;
mod slices;
