//! Batches whose buffers are compressed: LZ4 frames or ZSTD, each buffer for itself, as Arrow has them.
//!
//! How much comes of them is what the schema and the number of rows say, not what the compressed bytes say: that much is charged and
//! allocated before anything is decoded, and nothing beyond it is.

use std::ops::Range;

use arrow_ipc::CompressionType;
use bytes::Bytes;
use strait_tensor::{Compression, inflate};

use super::refused::bad_tensor;
use crate::error::Status;

/// How the buffers of a batch are compressed, if they are.
///
/// # Errors
/// `BAD_TENSOR` for a way that nobody knows.
pub(super) fn of(batch: arrow_ipc::RecordBatch<'_>) -> Result<Option<Compression>, Status> {
    match batch.compression().map(|compression| compression.codec()) {
        None => Ok(None),
        Some(CompressionType::LZ4_FRAME) => Ok(Some(Compression::Lz4Frame)),
        Some(CompressionType::ZSTD) => Ok(Some(Compression::Zstd)),
        Some(other) => Err(bad_tensor(format!(
            "the batch is compressed in an unknown way ({}); send it uncompressed, or with LZ4 or ZSTD",
            other.0
        ))),
    }
}

/// Whether the message with that header is a compressed batch.
pub(super) fn is_compressed(header: &[u8]) -> bool {
    // One that cannot be read is refused when it is.
    let Ok(message) = arrow_ipc::root_as_message(header) else {
        return false;
    };
    let batch = message.header_as_record_batch();
    batch.is_some_and(|batch| batch.compression().is_some())
}

/// The values of each column, of which it has a name, the compressed bytes and how many come of them: one behind the other, and
/// where each is.
///
/// # Errors
/// `BAD_TENSOR` for bytes of which that does not come.
pub(super) fn inflated<'a>(
    compression: Compression,
    columns: impl Iterator<Item = (&'a str, &'a [u8], usize)>,
) -> Result<(Bytes, Vec<Range<usize>>), Status> {
    let mut body = Vec::new();
    let mut ranges = Vec::new();
    for (name, stored, size) in columns {
        let start = body.len();
        body.resize(start + size, 0);
        inflate(compression, stored, &mut body[start..]).map_err(|what| {
            bad_tensor(format!(
                "column `{name}`: its {} compressed bytes are damaged: {what}",
                stored.len()
            ))
        })?;
        ranges.push(start..start + size);
    }
    Ok((body.into(), ranges))
}
