//! Client of a strait host on the same machine: tensors in shared memory, kernels by name.
//!
//! ```no_run
//! use strait_client::{Client, Dtype, NewTensor};
//!
//! fn main() -> Result<(), strait_client::Error> {
//!     let client = Client::connect(None)?;
//!     let x = NewTensor { name: "x".into(), dtype: Dtype::Float64, shape: vec![1000, 1000] };
//!     let mut segment = client.create(&[x])?;
//!     for (index, element) in segment.tensor_mut::<f64>("x")?.iter_mut().enumerate() {
//!         *element = index as f64;
//!     }
//!     let result = client.call("zscore").input("x", &segment).param("axis", 0).send()?;
//!     println!("{:?}", &result.tensor("y")?.as_slice::<f64>()?[..3]);
//!     Ok(())
//! }
//! ```
//! Nothing is copied here: the kernel reads the pages that the loop filled, and `y` is a view of
//! the pages that the kernel wrote.
//!
//! ```text
//! Client ─ waits on ─▶ AsyncClient ─▶ Connection ─ frames (wire) ─▶ data.sock
//!                          │              └ reader thread: replies, lease renewal
//!                          └─▶ OpenSegment, MappedSegment: a mapping and the Lease that holds it
//! ```
//! [`Client`] is for threads, [`AsyncClient`] for tasks of any executor; both may share one
//! connection. The protocol is `docs/protocol.md`; [`wire`] has its frames and bodies.
//!
//! # What is deliberately absent
//! - No `unsafe` and no `mmap`: strait-memory maps, and gives slices only of pages that nobody
//!   writes to.
//! - No async runtime: the connection has one thread of its own, which wakes whoever waits.
//! - No reconnecting: leases and unpublished segments end with their connection, so a silent new
//!   one could not be what the caller had.

pub mod address;
mod asynchronous;
mod call;
mod client;
mod connection;
mod element;
mod error;
mod lease;
mod reader;
mod segment;
mod stats;
pub mod wire;

pub use asynchronous::AsyncClient;
pub use call::{Call, CallInput, CallResult, CancelHandle, Param};
pub use client::{Client, Flights, Options};
pub use element::Element;
pub use error::Error;
pub use lease::Lease;
pub use segment::{AdoptedSegment, MappedSegment, OpenSegment, TensorView};
pub use stats::{OwnStats, ParkedStats, PoolStats, ProcessStats, Stats};
pub use strait_memory::Inode;
pub use strait_tensor::{Dtype, TensorPlace, TensorSpec};
pub use wire::{Flight, Kernel, Limits, Mapping, NewTensor, Welcome};
