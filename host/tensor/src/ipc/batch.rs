//! What a record batch holds of each column.

use std::io::{Read, Seek};
use std::ops::Range;

use arrow_ipc::{Buffer, CompressionType, FieldNode, RecordBatch};

use super::IpcError;
use super::piece::{Codec, Piece};
use super::schema::{Declared, Node};
use super::source::{Source, message_prefix, parse, unsigned};
use crate::TensorSpec;

/// A column, with its pieces in order, or why it is none of ours.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) tensor: Result<(TensorSpec, Vec<Piece>), IpcError>,
}

/// A record batch message: its metadata with any length before it, and the body behind.
pub(super) struct Batch {
    pub(super) offset: u64,
    pub(super) metadata_bytes: u64,
    pub(super) body_bytes: u64,
}

/// Walks the batches and gives each column its pieces.
pub(super) fn collect<R: Read + Seek>(
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
            let spec = row.spec(rows).ok_or_else(|| {
                not_a_tensor(format!("it says that it is 0-d but has {rows} rows"))
            })?;
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
        let (Some(bytes), Some(rows), Some(place)) = (bytes, rows, last) else {
            return Err(IpcError::Invalid(format!(
                "column {name:?}: {values} values of {value_bytes} bytes cannot be counted"
            )));
        };
        column.rows = rows;
        if self.is_zstd {
            column.is_zstd = true;
            return Ok(Vec::new());
        }
        column.pieces.push(self.piece(name, place, bytes)?);
        let several = levels.iter().filter(|(nulls, ..)| *nulls > 0).count() > 1;
        let level = |(nulls, validity, values, in_a_row): (u64, Option<(u64, u64)>, u64, u64)| {
            let validity = validity
                .filter(|_| several && nulls > 0)
                .map(|place| self.piece(name, place, values.div_ceil(8)));
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

    fn piece(&self, name: &str, place: (u64, u64), bytes: u64) -> Result<Piece, IpcError> {
        let (offset, stored_bytes) = place;
        Piece::new(name, self.codec, offset, stored_bytes, bytes)
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
