//! Finding the tensors of IPC bytes that anybody may have written.
//!
//! Only metadata is read here. Every length is held against the bytes that there are before it is
//! used or allocated.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use arrow_ipc::{
    Buffer, CompressionType, FieldNode, MessageHeader, MetadataVersion, RecordBatch,
    root_as_footer, root_as_message,
};
use flatbuffers::InvalidFlatbuffer;

use super::schema::{Declared, Node, declared};
use super::{CONTINUATION, MAGIC, MAGIC_END, METADATA_BYTES_MAX};
use crate::{LayoutError, TensorPlace, TensorSpec};

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
    /// A column that is no tensor.
    #[error("column {column:?} is no tensor: {reason}")]
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

/// The first bytes of a Feather file of version 1.
const FEATHER_V1: &[u8] = b"FEA1";
/// No codec that is read makes more than this out of a byte; LZ4 makes 255.
const EXPANSION_MAX: u64 = 256;

/// How the bytes of a buffer lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codec {
    Plain,
    /// A length (`i64`, -1: plain bytes follow), then a frame.
    Lz4Frame,
}

/// One record batch's part of a column.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    offset: u64,
    /// Bytes in the file from `offset` on; those of the piece itself if it is plain.
    stored_bytes: u64,
    /// Bytes of the tensor.
    pub(crate) bytes: u64,
    codec: Codec,
}

impl Piece {
    /// Reads it into `part`, which has exactly its size. `name` is the column's, for errors.
    pub(crate) fn read_into(
        &self,
        mut reader: impl Read + Seek,
        name: &str,
        part: &mut [u8],
    ) -> Result<(), IpcError> {
        reader.seek(SeekFrom::Start(self.offset))?;
        match self.codec {
            Codec::Plain => reader.read_exact(part)?,
            Codec::Lz4Frame => {
                let mut length = [0; 8];
                reader.read_exact(&mut length)?;
                match i64::from_le_bytes(length) {
                    // "Not compressed after all", as writers do where it does not pay.
                    -1 if self.stored_bytes - 8 >= self.bytes => reader.read_exact(part)?,
                    length if u64::try_from(length).is_ok_and(|length| length >= self.bytes) => {
                        let frame = io::BufReader::new(reader.take(self.stored_bytes - 8));
                        lz4_flex::frame::FrameDecoder::new(frame)
                            .read_exact(part)
                            .map_err(|error| {
                                IpcError::Invalid(format!(
                                    "column {name:?}: damaged LZ4 data of {} bytes at byte {}: {error}",
                                    self.stored_bytes, self.offset
                                ))
                            })?;
                    }
                    length => {
                        return Err(IpcError::Invalid(format!(
                            "column {name:?}: compressed data of {length} bytes where {} belong",
                            self.bytes
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}

/// A column, with its pieces in order, or why it is none of ours.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) tensor: Result<(TensorSpec, Vec<Piece>), IpcError>,
}

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
    match pieces.as_slice() {
        [piece] if piece.codec == Codec::Plain => Ok(TensorPlace {
            name: found.name,
            spec,
            offset: piece.offset,
            length: piece.bytes,
        }),
        _ => Err(IpcError::Compressed { column: found.name }),
    }
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

/// A reader that refuses to go beyond its end before it allocates.
struct Source<R> {
    reader: R,
    bytes: u64,
}

impl<R: Read + Seek> Source<R> {
    fn new(reader: R, bytes: u64) -> Source<R> {
        Source { reader, bytes }
    }

    fn check(&self, what: &'static str, offset: u64, bytes: u64) -> Result<(), IpcError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(IpcError::Truncated {
                what,
                offset,
                bytes,
                end: self.bytes,
            }),
        }
    }

    /// Metadata: at most [`METADATA_BYTES_MAX`].
    fn read(&mut self, what: &'static str, offset: u64, bytes: u64) -> Result<Vec<u8>, IpcError> {
        self.check(what, offset, bytes)?;
        let length = u32::try_from(bytes)
            .ok()
            .filter(|&length| length <= METADATA_BYTES_MAX)
            .ok_or(IpcError::MetadataTooLarge { what, bytes })?;
        let mut data = vec![0; length as usize];
        self.reader.seek(SeekFrom::Start(offset))?;
        self.reader.read_exact(&mut data)?;
        Ok(data)
    }

    fn read_array<const N: usize>(
        &mut self,
        what: &'static str,
        offset: u64,
    ) -> Result<[u8; N], IpcError> {
        self.check(what, offset, N as u64)?;
        let mut data = [0; N];
        self.reader.seek(SeekFrom::Start(offset))?;
        self.reader.read_exact(&mut data)?;
        Ok(data)
    }

    fn starts_with(&mut self, magic: &[u8]) -> Result<bool, IpcError> {
        let length = self.bytes.min(magic.len() as u64);
        Ok(self.read("the first bytes", 0, length)? == magic)
    }
}

/// Columns, and the record batches that fill them.
struct Contents {
    columns: Vec<Declared>,
    batches: Vec<Batch>,
}

/// A record batch message: its metadata with any length before it, and the body behind.
struct Batch {
    offset: u64,
    metadata_bytes: u64,
    body_bytes: u64,
}

fn unsigned(what: &str, value: i64) -> Result<u64, IpcError> {
    u64::try_from(value).map_err(|_| IpcError::Invalid(format!("{what} is {value}")))
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

/// The bytes before a message's metadata, and the length that they say. Before version 0.15 Arrow
/// wrote no continuation marker.
fn message_prefix<R: Read + Seek>(
    source: &mut Source<R>,
    offset: u64,
) -> Result<(u64, i32), IpcError> {
    const WHAT: &str = "the start of a message";
    let first: [u8; 4] = source.read_array(WHAT, offset)?;
    if first == CONTINUATION {
        let second: [u8; 4] = source.read_array(WHAT, offset + 4)?;
        Ok((8, i32::from_le_bytes(second)))
    } else {
        Ok((4, i32::from_le_bytes(first)))
    }
}

fn parse(data: &[u8], offset: u64) -> Result<arrow_ipc::Message<'_>, IpcError> {
    root_as_message(data).map_err(|error| corrupt("a message", offset, &error))
}

fn corrupt(what: &'static str, offset: u64, error: &InvalidFlatbuffer) -> IpcError {
    // The lines behind the first name the flatbuffer fields on the way there.
    let found = error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    IpcError::Flatbuffer {
        what,
        offset,
        found,
    }
}

/// Walks the batches and gives each column its pieces.
fn collect<R: Read + Seek>(
    source: &mut Source<R>,
    declared: Vec<Declared>,
    batches: &[Batch],
) -> Result<Vec<Found>, IpcError> {
    let mut gathered: Vec<Gathered> = declared.into_iter().map(Gathered::new).collect();
    for batch in batches {
        read_batch(source, batch, &mut gathered)?;
    }
    Ok(gathered.into_iter().map(Gathered::finish).collect())
}

/// A column while its batches are being read.
struct Gathered {
    declared: Declared,
    rows: u64,
    nulls: u64,
    is_zstd: bool,
    pieces: Vec<Piece>,
}

impl Gathered {
    fn new(declared: Declared) -> Gathered {
        Gathered {
            declared,
            rows: 0,
            nulls: 0,
            is_zstd: false,
            pieces: Vec::new(),
        }
    }

    fn finish(self) -> Found {
        let Gathered {
            declared: Declared { name, tensor, .. },
            rows,
            nulls,
            is_zstd,
            pieces,
        } = self;
        let tensor = (|| {
            let not_a_tensor = |reason| IpcError::NotATensor {
                column: name.clone(),
                reason,
            };
            let row = tensor.map_err(not_a_tensor)?;
            if is_zstd {
                return Err(IpcError::Zstd {
                    column: name.clone(),
                });
            }
            if nulls > 0 {
                return Err(IpcError::Nulls {
                    column: name.clone(),
                    nulls,
                });
            }
            if row.is_0d && rows != 1 {
                return Err(not_a_tensor(format!(
                    "it says that it is 0-d but has {rows} rows"
                )));
            }
            let leading = (!row.is_0d).then_some(rows);
            let spec = TensorSpec {
                dtype: row.dtype,
                shape: leading.into_iter().chain(row.shape).collect(),
            };
            spec.bytes().map_err(|reason| IpcError::Layout {
                column: name.clone(),
                reason,
            })?;
            Ok((spec, pieces))
        })();
        Found { name, tensor }
    }
}

/// Checks a batch against the schema and the file, and appends its part to each column.
fn read_batch<R: Read + Seek>(
    source: &mut Source<R>,
    batch: &Batch,
    gathered: &mut [Gathered],
) -> Result<(), IpcError> {
    source.check(
        "the metadata of a record batch",
        batch.offset,
        batch.metadata_bytes,
    )?;
    let (prefix_bytes, length) = message_prefix(source, batch.offset)?;
    let length = unsigned("the length of a record batch's metadata", length.into())?;
    if prefix_bytes + length > batch.metadata_bytes {
        return Err(IpcError::Invalid(format!(
            "the record batch at byte {} has {length} bytes of metadata in {} bytes",
            batch.offset, batch.metadata_bytes
        )));
    }
    let data = source.read(
        "a record batch's metadata",
        batch.offset + prefix_bytes,
        length,
    )?;
    let message = parse(&data, batch.offset + prefix_bytes)?;
    let body_bytes = unsigned("the length of a message's body", message.bodyLength())?;
    if body_bytes != batch.body_bytes {
        return Err(IpcError::Invalid(format!(
            "the record batch at byte {} says that its body has {body_bytes} bytes, the footer {}",
            batch.offset, batch.body_bytes
        )));
    }
    let body_offset = batch.offset + batch.metadata_bytes;
    source.check("the body of a record batch", body_offset, body_bytes)?;
    let record = message.header_as_record_batch().ok_or_else(|| {
        IpcError::Invalid(format!(
            "the message at byte {} is no record batch",
            batch.offset
        ))
    })?;
    let mut walk = Walk::new(record, body_offset, body_bytes)?;
    for column in gathered {
        let levels = walk.column(column)?;
        column.nulls = column.nulls.saturating_add(count_nulls(
            &mut source.reader,
            &column.declared.name,
            walk.rows,
            levels,
        )?);
    }
    walk.finish()
}

/// The nulls of one field node of a tensor: of a list, outer before inner, or of its values.
struct Level {
    nulls: u64,
    /// A bit for each value, 0 where it is null; for levels with nulls, if there are several.
    validity: Option<Piece>,
    /// Values in one row of the column.
    values: u64,
}

/// Counts those of one batch: what lies in a list that is null itself does not count again.
fn count_nulls(
    mut reader: impl Read + Seek,
    name: &str,
    rows: u64,
    levels: Vec<Level>,
) -> Result<u64, IpcError> {
    if levels.iter().all(|level| level.validity.is_none()) {
        return Ok(levels.iter().map(|level| level.nulls).sum());
    }
    let mut validities = Vec::new();
    for level in levels {
        let mut bits = Vec::new();
        if let Some(piece) = level.validity {
            bits.resize(usize::try_from(piece.bytes).expect("bytes of this file"), 0);
            piece.read_into(&mut reader, name, &mut bits)?;
        }
        validities.push((bits, level.values));
    }
    Ok(nulls_in(&validities, 0..rows))
}

/// Those among the values `range` of the first level.
fn nulls_in(levels: &[(Vec<u8>, u64)], range: Range<u64>) -> u64 {
    let Some(((bits, values), deeper)) = levels.split_first() else {
        return 0;
    };
    let size = deeper
        .first()
        .map_or(0, |(_, inner)| inner.checked_div(*values).unwrap_or(0));
    let is_null = |at: u64| {
        let byte = usize::try_from(at / 8).ok().and_then(|byte| bits.get(byte));
        byte.is_some_and(|byte| byte >> (at % 8) & 1 == 0)
    };
    range
        .map(|at| {
            if is_null(at) {
                1
            } else {
                nulls_in(deeper, at * size..(at + 1) * size)
            }
        })
        .sum()
}

/// Goes through the nodes and buffers of a record batch, in the order of the schema.
struct Walk {
    rows: u64,
    codec: Codec,
    is_zstd: bool,
    body_offset: u64,
    body_bytes: u64,
    nodes: std::vec::IntoIter<FieldNode>,
    buffers: std::vec::IntoIter<Buffer>,
    view_counts: std::vec::IntoIter<i64>,
}

impl Walk {
    fn new(record: RecordBatch<'_>, body_offset: u64, body_bytes: u64) -> Result<Walk, IpcError> {
        let compression = record.compression().map(|compression| compression.codec());
        let codec = match compression {
            None => Codec::Plain,
            Some(CompressionType::LZ4_FRAME) => Codec::Lz4Frame,
            // Refused later by the column's name; until then nobody looks at the values.
            Some(CompressionType::ZSTD) => Codec::Plain,
            Some(other) => {
                return Err(IpcError::Invalid(format!(
                    "unknown compression {}",
                    other.0
                )));
            }
        };
        let nodes: Vec<FieldNode> = record.nodes().into_iter().flatten().copied().collect();
        let buffers: Vec<Buffer> = record.buffers().into_iter().flatten().copied().collect();
        let view_counts: Vec<i64> = record
            .variadicBufferCounts()
            .into_iter()
            .flatten()
            .collect();
        Ok(Walk {
            rows: unsigned("the length of a record batch", record.length())?,
            codec,
            is_zstd: compression == Some(CompressionType::ZSTD),
            body_offset,
            body_bytes,
            nodes: nodes.into_iter(),
            buffers: buffers.into_iter(),
            view_counts: view_counts.into_iter(),
        })
    }

    /// Appends the batch's part to the column and answers what its nulls are counted from.
    fn column(&mut self, column: &mut Gathered) -> Result<Vec<Level>, IpcError> {
        let name = &column.declared.name;
        let mut values = self.rows;
        let mut last = None;
        let mut levels = Vec::new();
        for node in &column.declared.nodes {
            let nulls;
            (values, nulls) = self.node(name, node)?;
            let buffers = self.buffers(name, node)?;
            last = buffers.map(|(_, last)| last).or(last);
            levels.push((nulls, buffers.map(|(first, _)| first), values, node.values));
        }
        let Ok(row) = &column.declared.tensor else {
            return Ok(Vec::new());
        };
        let value_bytes = row.dtype.size() / if row.dtype.is_complex() { 2 } else { 1 };
        let bytes = values.checked_mul(value_bytes);
        let rows = column.rows.checked_add(self.rows);
        let (Some(bytes), Some(rows), Some((offset, stored_bytes))) = (bytes, rows, last) else {
            return Err(IpcError::Invalid(format!(
                "column {name:?}: {values} values of {value_bytes} bytes cannot be counted"
            )));
        };
        column.rows = rows;
        if self.is_zstd {
            column.is_zstd = true;
            return Ok(Vec::new());
        }
        column
            .pieces
            .push(self.piece(name, offset, stored_bytes, bytes)?);
        let several = levels.iter().filter(|(nulls, ..)| *nulls > 0).count() > 1;
        let level = |(nulls, validity, values, in_a_row): (u64, Option<(u64, u64)>, u64, u64)| {
            let validity = validity
                .filter(|_| several && nulls > 0)
                .map(|(offset, stored)| self.piece(name, offset, stored, values.div_ceil(8)));
            Ok(Level {
                nulls,
                validity: validity.transpose()?,
                values: in_a_row,
            })
        };
        levels.into_iter().map(level).collect()
    }

    /// Checks the next node; answers its values in a tensor of this many rows, and its nulls.
    fn node(&mut self, name: &str, node: &Node) -> Result<(u64, u64), IpcError> {
        let found = self.nodes.next().ok_or_else(|| {
            IpcError::Invalid(format!(
                "column {name:?}: the record batch has no node for it"
            ))
        })?;
        let length = unsigned("the length of a node", found.length())?;
        let nulls = unsigned("a count of nulls", found.null_count())?;
        match self.rows.checked_mul(node.values) {
            Some(values) if values <= length => Ok((values, nulls)),
            _ => Err(IpcError::Invalid(format!(
                "column {name:?}: {length} values for {} rows of {}",
                self.rows, node.values
            ))),
        }
    }

    /// Takes the buffers of a node; answers offset (in the file) and length of the first and the
    /// last one.
    #[expect(clippy::type_complexity, reason = "two pairs")]
    fn buffers(
        &mut self,
        name: &str,
        node: &Node,
    ) -> Result<Option<((u64, u64), (u64, u64))>, IpcError> {
        let invalid = |reason| IpcError::Invalid(format!("column {name:?}: {reason}"));
        let mut count = node.buffers as u64;
        if node.is_view {
            let views = self
                .view_counts
                .next()
                .ok_or_else(|| invalid("the record batch does not say how many buffers it has"))?;
            count = count.saturating_add(unsigned("a count of buffers", views)?);
        }
        let mut ends = None;
        for _ in 0..count {
            let buffer = self
                .buffers
                .next()
                .ok_or_else(|| invalid("the record batch has too few buffers for it"))?;
            let offset = unsigned("the offset of a buffer", buffer.offset())?;
            let length = unsigned("the length of a buffer", buffer.length())?;
            match offset.checked_add(length) {
                Some(end) if end <= self.body_bytes => {}
                _ => {
                    return Err(IpcError::Invalid(format!(
                        "column {name:?}: a buffer of {length} bytes at {offset} in a body of {}",
                        self.body_bytes
                    )));
                }
            }
            let this = (self.body_offset + offset, length);
            ends = Some((ends.map_or(this, |(first, _)| first), this));
        }
        Ok(ends)
    }

    fn piece(
        &self,
        name: &str,
        offset: u64,
        stored_bytes: u64,
        bytes: u64,
    ) -> Result<Piece, IpcError> {
        // An empty buffer has no length in front of it, whatever the codec.
        let codec = if bytes == 0 { Codec::Plain } else { self.codec };
        let is_possible = match codec {
            Codec::Plain => stored_bytes >= bytes,
            // A caller allocates what is announced, so it must be what LZ4 can hold.
            Codec::Lz4Frame => {
                stored_bytes >= 8 && stored_bytes.saturating_mul(EXPANSION_MAX) >= bytes
            }
        };
        if !is_possible {
            return Err(IpcError::Invalid(format!(
                "column {name:?}: a buffer of {stored_bytes} bytes cannot hold {bytes} bytes of \
                 values"
            )));
        }
        Ok(Piece {
            offset,
            stored_bytes: if codec == Codec::Plain {
                bytes
            } else {
                stored_bytes
            },
            bytes,
            codec,
        })
    }

    fn finish(mut self) -> Result<(), IpcError> {
        let (nodes, buffers) = (self.nodes.len(), self.buffers.len());
        if self.nodes.next().is_some() || self.buffers.next().is_some() {
            return Err(IpcError::Invalid(format!(
                "a record batch has {nodes} nodes and {buffers} buffers more than its schema"
            )));
        }
        Ok(())
    }
}
