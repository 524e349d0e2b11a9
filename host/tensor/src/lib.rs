//! Tensors without a machine below them: no memory is mapped here and no file descriptor is passed.
//!
//! ```text
//! Dtype ─▶ TensorSpec ─▶ Column ─▶ FileLayout::plan ─▶ header, tensor offsets, footer of a segment
//!              │                                            │ the same bytes
//!              └──────── TensorPlace ◀──── read_layout ◀────┘
//! TensorFile / write_tensors: .npy, .npz, .safetensors, .csv and .arrow files to and from a caller's buffer
//! Statistics, Histogram: what is in a tensor, for people
//! ```
//!
//! A segment is an Arrow IPC file whose tensors start on multiples of [`layout::TENSOR_ALIGN_BYTES`],
//! so that each can be a window of a guest, with the file's own header and footer outside every
//! window. Whatever is read here may come from a hostile writer: sizes are checked before they are
//! believed or allocated, and nothing panics.

mod arrow;
mod dtype;
mod element;
mod files;
mod ipc;
pub mod layout;
mod spec;
mod statistics;

pub use arrow::{Row, check_row, kept_schema};
pub use dtype::{Dtype, UnknownDtype};
pub use files::{
    FileError, Format, NamedTensor, NpyError, Storage, TensorFile, write, write_stream,
    write_tensors,
};
pub use ipc::{
    BatchColumn, Compression, IpcError, SchemaColumn, SchemaMessage, batch_message, inflate,
    read_layout, read_schema,
};
pub use layout::{Column, FileLayout};
pub use spec::{LayoutError, RANK_MAX, TensorPlace, TensorSpec};
pub use statistics::{Histogram, Number, Statistics};

/// The most bytes of one message's metadata, or of a footer, that are written or read.
const METADATA_BYTES_MAX: u32 = 64 << 20;
