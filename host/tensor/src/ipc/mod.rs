//! The Arrow IPC format, as far as fixed-width tensors need it.
//!
//! `arrow-ipc`'s own writer aligns buffers to 64 bytes at most and begins at byte 64 of the file,
//! and its reader copies; so both are written here, over its verified flatbuffers.

mod read;
mod schema;
mod write;

pub use read::{IpcError, read_layout};
pub(crate) use read::{Piece, columns};
pub use schema::{Row, SchemaColumn, message_bytes, read_schema, schema_message};
pub(crate) use write::{Framing, field, frame, schema_bytes, values};

/// The first bytes of an IPC file; six of them, without the padding, also end it.
const MAGIC: [u8; 8] = *b"ARROW1\0\0";
/// What a file ends with, after the length of its footer.
const MAGIC_END: &[u8] = b"ARROW1";
/// Precedes the length of each message.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// The most bytes of one message's metadata, or of a footer, that are written or read.
pub(crate) const METADATA_BYTES_MAX: u32 = 64 << 20;

/// Field metadata: a dtype that Arrow has no type for.
const DTYPE_KEY: &str = "strait.dtype";
/// Field metadata: a shape that the storage cannot tell, which is only the 0-d one.
const SHAPE_KEY: &str = "strait.shape";
/// The value of [`SHAPE_KEY`] for a 0-d tensor.
const SHAPE_0D: &str = "[]";
/// Field metadata: the name of an extension type, and its parameters.
const EXTENSION_NAME: &str = "ARROW:extension:name";
const EXTENSION_METADATA: &str = "ARROW:extension:metadata";
const FIXED_SHAPE_TENSOR: &str = "arrow.fixed_shape_tensor";
const BOOL8: &str = "arrow.bool8";
