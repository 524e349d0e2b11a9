//! Why bytes are not, or not usefully, Arrow IPC.

use std::io;

use crate::{LayoutError, METADATA_BYTES_MAX};

/// Bytes that are not, or not usefully, Arrow IPC.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// Not the bytes of an IPC file or stream.
    #[error("not Arrow IPC: {0}")]
    NotIpc(String),
    /// Ends before what it announces.
    #[error("{what} at byte {offset} needs {bytes} bytes, but the data ends at byte {end}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// The length of the data.
        end: u64,
    },
    /// The format that Feather was before it was Arrow IPC.
    #[error(
        "Feather version 1, which is not Arrow IPC; write it as version 2, which pyarrow does by default"
    )]
    FeatherV1,
    /// Metadata of a size that nobody means.
    #[error("{what} of {bytes} bytes; at most {METADATA_BYTES_MAX} are read")]
    MetadataTooLarge {
        /// Which metadata.
        what: &'static str,
        /// Its length.
        bytes: u64,
    },
    /// Metadata that the flatbuffer verifier refuses.
    #[error("{what} at byte {offset} is corrupt: {found}")]
    Flatbuffer {
        /// Which metadata.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// What the verifier found.
        found: String,
    },
    /// Metadata that contradicts itself or the data.
    #[error("invalid Arrow IPC: {0}")]
    Invalid(String),
    /// Other than one record batch where one is needed.
    #[error("{found} record batches; exactly one is needed here: combine them before writing")]
    Batches {
        /// How many there are.
        found: usize,
    },
    /// A column with nulls.
    #[error(
        "column {column:?} has {nulls} null{}; tensors have none: fill or drop them, or pass them as \
         a mask of their own",
        if *nulls == 1 { "" } else { "s" }
    )]
    Nulls {
        /// The column.
        column: String,
        /// How many: rows, and values in rows that are not null themselves.
        nulls: u64,
    },
    /// A column that cannot be a tensor.
    #[error("column {column:?} cannot be a tensor: {reason}")]
    NotATensor {
        /// The column.
        column: String,
        /// Why.
        reason: String,
    },
    /// A compressed body where the bytes are needed as they lie.
    #[error("column {column:?} is compressed; write the file with compression \"uncompressed\"")]
    Compressed {
        /// The column.
        column: String,
    },
    /// A column compressed by something that is not read.
    #[error(
        "column {column:?} is compressed with ZSTD; write the file with compression \"lz4\" or \
         \"uncompressed\""
    )]
    Zstd {
        /// The column.
        column: String,
    },
    /// A tensor too large to count.
    #[error("column {column:?}: {reason}")]
    Layout {
        /// The column.
        column: String,
        /// What cannot be counted.
        reason: LayoutError,
    },
    /// The data could not be read.
    #[error("cannot read the data: {0}")]
    Io(io::Error),
}

impl From<io::Error> for IpcError {
    fn from(error: io::Error) -> IpcError {
        IpcError::Io(error)
    }
}
