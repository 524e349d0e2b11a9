//! Finding the tensors of IPC bytes that anybody may have written.
//!
//! Only metadata is read here, through a `Source` that goes no further than the bytes that there are.

use std::io::{self, Read, Seek};

use arrow_ipc::{MessageHeader, MetadataVersion, root_as_footer};

use super::batch::{Batch, Found, collect};
use super::schema::{Declared, declared};
use super::source::{Source, corrupt, message_prefix, parse, unsigned};
use super::{IpcError, MAGIC, MAGIC_END};
use crate::TensorPlace;

/// The first bytes of a Feather file of version 1.
const FEATHER_V1: &[u8] = b"FEA1";

/// Where each tensor of an uncompressed Arrow IPC *file* of one record batch lies: a segment of
/// ours, or any other such file.
///
/// Offsets of files that others wrote are multiples of 8 or 64 only, or of nothing at all. The
/// values are not looked at: a `bool8` may have other bytes than 0 and 1.
///
/// # Errors
/// [`IpcError`] for anything else; every column must be a tensor without nulls.
pub fn read_layout(bytes: &[u8]) -> Result<Vec<TensorPlace>, IpcError> {
    let mut source = Source::new(io::Cursor::new(bytes), bytes.len() as u64);
    let file = read_footer(&mut source)?;
    if file.batches.len() != 1 {
        return Err(IpcError::Batches {
            found: file.batches.len(),
        });
    }
    let found = collect(&mut source, file.columns, &file.batches)?;
    found.into_iter().map(in_place).collect()
}

fn in_place(found: Found) -> Result<TensorPlace, IpcError> {
    let (spec, pieces) = found.tensor?;
    let plain = match pieces.as_slice() {
        [piece] => piece.plain_offset().map(|offset| (offset, piece.bytes)),
        _ => None,
    };
    let Some((offset, length)) = plain else {
        return Err(IpcError::Compressed { column: found.name });
    };
    Ok(TensorPlace {
        name: found.name,
        spec,
        offset,
        length,
    })
}

/// The columns of an IPC file or stream of any number of batches, from the start of `reader`,
/// which has `bytes` bytes.
///
/// # Errors
/// [`IpcError`] if the whole is not valid; what is wrong with one column only is told there.
pub(crate) fn columns(reader: impl Read + Seek, bytes: u64) -> Result<Vec<Found>, IpcError> {
    let mut source = Source::new(reader, bytes);
    let Contents { columns, batches } = if source.starts_with(&MAGIC[..MAGIC_END.len()])? {
        read_footer(&mut source)?
    } else if source.starts_with(FEATHER_V1)? {
        return Err(IpcError::FeatherV1);
    } else {
        read_stream(&mut source)?
    };
    collect(&mut source, columns, &batches)
}

/// Columns, and the record batches that fill them.
struct Contents {
    columns: Vec<Declared>,
    batches: Vec<Batch>,
}

fn check_version(version: MetadataVersion) -> Result<MetadataVersion, IpcError> {
    match version {
        MetadataVersion::V4 | MetadataVersion::V5 => Ok(version),
        other => Err(IpcError::Invalid(format!(
            "version {} of the format; 4 and 5 are read: write it with a newer Arrow",
            i32::from(other.0) + 1
        ))),
    }
}

fn read_footer<R: Read + Seek>(source: &mut Source<R>) -> Result<Contents, IpcError> {
    const WHAT: &str = "the footer";
    let magic_bytes = MAGIC_END.len() as u64;
    let tail_bytes = 4 + magic_bytes;
    if !source.starts_with(MAGIC_END)? || source.bytes < MAGIC.len() as u64 + tail_bytes {
        return Err(IpcError::NotIpc(format!(
            "a file of {} bytes that does not begin with \"ARROW1\"",
            source.bytes
        )));
    }
    let tail: [u8; 10] = source.read_array("the end of the file", source.bytes - tail_bytes)?;
    if &tail[4..] != MAGIC_END {
        return Err(IpcError::NotIpc(
            "it begins as an IPC file but does not end with \"ARROW1\": it was cut off or is still \
             being written"
                .to_owned(),
        ));
    }
    let length = i32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]);
    let length = unsigned("the length of the footer", length.into())?;
    let offset = (source.bytes - tail_bytes)
        .checked_sub(length)
        .ok_or(IpcError::Truncated {
            what: WHAT,
            offset: 0,
            bytes: length,
            end: source.bytes,
        })?;
    let data = source.read(WHAT, offset, length)?;
    let footer = root_as_footer(&data).map_err(|error| corrupt(WHAT, offset, &error))?;
    let schema = footer
        .schema()
        .ok_or_else(|| IpcError::Invalid("the footer has no schema".to_owned()))?;
    let columns = declared(schema, check_version(footer.version())?).map_err(IpcError::Invalid)?;

    let mut batches = Vec::new();
    let mut sum = 0_u64;
    for block in footer.recordBatches().into_iter().flatten() {
        let batch = Batch {
            offset: unsigned("the offset of a record batch", block.offset())?,
            metadata_bytes: unsigned(
                "the metadata length of a record batch",
                block.metaDataLength().into(),
            )?,
            body_bytes: unsigned("the body length of a record batch", block.bodyLength())?,
        };
        sum = sum
            .saturating_add(batch.metadata_bytes.max(8))
            .saturating_add(batch.body_bytes);
        // Batches do not share bytes; a footer that repeats one would make us read it for ever.
        if sum > source.bytes {
            return Err(IpcError::Invalid(format!(
                "its first {} record batches claim {sum} bytes in a file of {}",
                batches.len() + 1,
                source.bytes
            )));
        }
        batches.push(batch);
    }
    Ok(Contents { columns, batches })
}

fn read_stream<R: Read + Seek>(source: &mut Source<R>) -> Result<Contents, IpcError> {
    let mut columns = None;
    let mut batches = Vec::new();
    let mut offset = 0;
    while let Some((metadata_offset, length)) = next_message(source, offset)? {
        let data = source.read("a message", metadata_offset, length)?;
        let message = parse(&data, metadata_offset)?;
        let body_bytes = unsigned("the length of a message's body", message.bodyLength())?;
        let body_offset = metadata_offset + length;
        source.check("the body of a message", body_offset, body_bytes)?;
        match message.header_type() {
            MessageHeader::Schema if columns.is_none() => {
                let schema = message
                    .header_as_schema()
                    .ok_or_else(|| IpcError::Invalid("a schema message without one".to_owned()))?;
                let version = check_version(message.version())?;
                columns = Some(declared(schema, version).map_err(IpcError::Invalid)?);
            }
            MessageHeader::RecordBatch if columns.is_some() => batches.push(Batch {
                offset,
                metadata_bytes: body_offset - offset,
                body_bytes,
            }),
            MessageHeader::DictionaryBatch if columns.is_some() => {}
            other => {
                return Err(IpcError::Invalid(format!(
                    "a message of kind {} at byte {offset}, where it has no place",
                    other.variant_name().unwrap_or("unknown")
                )));
            }
        }
        offset = body_offset + body_bytes;
    }
    let columns =
        columns.ok_or_else(|| IpcError::NotIpc("a stream without messages".to_owned()))?;
    Ok(Contents { columns, batches })
}

/// Offset and length of the metadata of the message at `offset`; none at the end of the stream.
fn next_message<R: Read + Seek>(
    source: &mut Source<R>,
    offset: u64,
) -> Result<Option<(u64, u64)>, IpcError> {
    const WHAT: &str = "the length of a message";
    if offset == source.bytes && offset > 0 {
        return Ok(None); // a stream may end without its marker
    }
    let (prefix_bytes, length) = message_prefix(source, offset)?;
    let Ok(length) = u64::try_from(length) else {
        return Err(IpcError::Invalid(format!(
            "{WHAT} at byte {offset} is {length}"
        )));
    };
    let start = offset + prefix_bytes;
    if offset == 0 && (length == 0 || source.check(WHAT, start, length).is_err()) {
        return Err(IpcError::NotIpc(format!(
            "it begins neither with \"ARROW1\" nor with a message ({} bytes in all)",
            source.bytes
        )));
    }
    Ok((length > 0).then_some((start, length)))
}
