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
//! Client, AsyncClient             two faces: whoever waits is a thread, or a task of any executor
//!  └▶ segment, call, prepared, …   the verbs, by noun
//!      └▶ session                 what every request carries, and how it is asked
//!          └▶ lease, tensor       a right to a segment; the tensors in it
//!              └▶ connection      data.sock: replies to whoever waits, renewal of leases
//! ```
//! [`Client`] is for threads, [`AsyncClient`] for tasks; both may share one connection. Imports
//! run down this page only. The protocol is `docs/protocol.md`; [`wire`] has its frames and bodies.
//!
//! # What is deliberately absent
//! - No `unsafe` and no `mmap`: strait-memory maps, and gives slices only of pages that nobody
//!   writes to.
//! - No async runtime: the connection has one thread of its own, which wakes whoever waits.
//! - No reconnecting: leases and unpublished segments end with their connection, so a silent new
//!   one would not have what the caller had.

pub mod address;
mod argument;
mod asynchronous;
mod call;
mod channel;
mod client;
mod connection;
mod element;
mod elements;
mod error;
mod lease;
mod link;
mod listing;
mod output;
mod prepared;
mod segment;
mod session;
mod stats;
mod stream;
mod tensor;

pub use argument::{CallInput, Param};
pub use asynchronous::AsyncClient;
pub use call::{Call, CallResult, CancelHandle};
pub use channel::ChannelReader;
pub use client::{Client, Flights};
pub use element::Element;
pub use elements::Elements;
pub use error::Error;
pub use lease::Lease;
pub use output::{InlineTensor, Output};
pub use prepared::{Prepare, Prepared, PreparedResult};
pub use segment::{AdoptedSegment, MappedSegment, OpenSegment};
pub use session::Options;
pub use stats::Stats;
pub use strait_memory::Inode;
/// The protocol's frames and bodies.
pub use strait_protocol as wire;
pub use strait_tensor::{Dtype, TensorPlace, TensorSpec};
pub use stream::{PreparedStream, Rows};
pub use tensor::TensorView;
pub use wire::{
    ChannelOptions, Flight, Kernel, Limits, Mapping, NamedPipeline, NewTensor, Pipeline,
    PipelineStage, PublishPipeline, StageInput, StageReport, Welcome,
};
