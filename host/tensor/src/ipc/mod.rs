//! The Arrow IPC format, as far as fixed-width tensors need it.
//!
//! `arrow-ipc`'s own writer aligns buffers to 64 bytes at most and begins at byte 64 of the file,
//! and its reader copies; so both are written here, over its verified flatbuffers.

mod batch;
mod error;
mod inflate;
mod piece;
mod read;
mod schema;
mod source;
mod write;

pub use error::IpcError;
pub use inflate::{Compression, inflate};
pub(crate) use piece::Piece;
pub(crate) use read::columns;
pub use read::read_layout;
pub use schema::{SchemaColumn, SchemaMessage, read_schema};
pub use write::{BatchColumn, batch_message};
pub(crate) use write::{Framing, frame, schema_bytes};

/// The first bytes of an IPC file; six of them, without the padding, also end it.
const MAGIC: [u8; 8] = *b"ARROW1\0\0";
/// What a file ends with, after the length of its footer.
const MAGIC_END: &[u8] = b"ARROW1";
/// Precedes the length of each message.
const CONTINUATION: [u8; 4] = [0xff; 4];
