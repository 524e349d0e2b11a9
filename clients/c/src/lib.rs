//! libstrait: the Rust client behind a C interface. `strait.h` is generated from these files by `cargo xtask header`.
//!
//! ```text
//! finish                                     the ends of operations
//!  └▶ stream                                  chunks of rows
//!  └▶ client, segment, call, answer, prepared the functions of strait.h, by noun
//!      └▶ operation, tensor, error            what is started, what goes both ways
//!          └▶ pointer                         what C gives and is given; all of the `unsafe`
//!              └▶ failure                     why not; what is around every function
//! ```
//! The rules of the interface are `docs/decisions/0028-a-c-abi.md` and the head of `strait.h`.
//!
//! # What is deliberately absent
//! - No panic crosses the boundary: `failure::entry` makes it an error, or nothing where none can be returned.
//! - No callback into C, and no thread but the connection's own.
//! - No engine: nothing here knows wasmtime, which `tests/tidy.rs` holds.

#![allow(
    unsafe_code,
    reason = "functions that C finds by their names; tests/tidy.rs holds that unsafe code is in `pointer` alone"
)]
#![allow(
    missing_debug_implementations,
    reason = "nobody in Rust is given a handle"
)]

pub mod answer;
pub mod call;
pub mod client;
pub mod error;
pub mod failure;
pub mod finish;
pub mod operation;
pub mod pointer;
pub mod prepared;
pub mod segment;
pub mod stream;
pub mod tensor;
pub mod version;
