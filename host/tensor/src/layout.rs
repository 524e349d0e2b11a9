//! Where the parts of a segment lie.
//!
//! ```text
//! 0        8                         64 KiB             2 MiB
//! ├ magic ─┼ schema ┬ record batch ──┼ small tensor ┬┄┄┄┼ tensor of 4 MiB and more ┬┄┼ end of stream, footer ┤
//!          └ a valid IPC stream from here           └ hole                         └ to 64 KiB
//! ```
//! Header and footer belong to the host: no window ever covers them, or a guest could write the
//! flatbuffers that a consumer parses.

use arrow_schema::Schema;

use crate::arrow::{check_row, schema, values};
use crate::ipc::{self, SchemaMessage};
use crate::{LayoutError, METADATA_BYTES_MAX, TensorPlace, TensorSpec};

/// Each tensor starts on a multiple of this, and its region ends on one: a wasm page.
pub const TENSOR_ALIGN_BYTES: u64 = 64 << 10;
/// Tensors that may be at least this large start on a multiple of [`HUGE_ALIGN_BYTES`].
pub const HUGE_MIN_BYTES: u64 = 4 << 20;
/// A huge page: the kernel asks for equal offsets and addresses modulo this.
pub const HUGE_ALIGN_BYTES: u64 = 2 << 20;
/// [`FileLayout::capacity`] is a multiple of this.
pub const PAGE_BYTES: u64 = 4 << 10;

/// A column to be laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Unique within the file.
    pub name: String,
    /// What lies in it now.
    pub spec: TensorSpec,
    /// The most bytes it may have: at least those of `spec`. This alone decides the offsets, so a
    /// result that turns out smaller than its bound stays where it was computed.
    pub reserve_bytes: u64,
}

impl Column {
    /// A column that reserves exactly its own bytes.
    ///
    /// # Errors
    /// As [`TensorSpec::bytes`].
    pub fn new(name: impl Into<String>, spec: TensorSpec) -> Result<Column, LayoutError> {
        let reserve_bytes = spec.bytes()?;
        Ok(Column {
            name: name.into(),
            spec,
            reserve_bytes,
        })
    }
}

/// An Arrow IPC file around tensors: write `header` at 0 and `footer` at `footer_offset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLayout {
    /// In the order of the columns.
    pub tensors: Vec<TensorPlace>,
    /// From byte 0 up to the body, which starts where this ends.
    pub header: Vec<u8>,
    /// The end-of-stream marker and the file's footer, up to the end of the file.
    pub footer: Vec<u8>,
    /// Where `footer` begins: a multiple of [`TENSOR_ALIGN_BYTES`] behind every tensor.
    pub footer_offset: u64,
    /// Length of the IPC file: where the footer ends.
    pub bytes: u64,
    /// Bytes of a memory object that holds the file however large its tensors get within their
    /// `reserve_bytes`: a multiple of [`PAGE_BYTES`].
    pub capacity: u64,
}

impl FileLayout {
    /// Lays `columns` out, in order.
    ///
    /// The offsets depend on the names and `reserve_bytes` alone: planning again with smaller
    /// specs moves the footer and nothing else.
    ///
    /// # Errors
    /// [`LayoutError`]: no columns, equal names, different leading axes, a row of more than
    /// `i32::MAX` values, or sizes that cannot be counted.
    pub fn plan(columns: &[Column]) -> Result<FileLayout, LayoutError> {
        let rows = check(columns)?;
        let schema = schema(columns.iter().map(|c| (c.name.as_str(), &c.spec)))?;
        Self::frame(columns, rows, &schema, metadata_bytes_max(columns, 0)?)
    }

    /// The same with a schema of the caller's, which declares just `columns`: its metadata,
    /// nullability and kinds of lists are kept in the file.
    ///
    /// # Errors
    /// As [`FileLayout::plan`].
    ///
    /// # Panics
    /// If `schema` declares other columns: [`crate::read_schema`] tells what it declares.
    pub fn plan_as(columns: &[Column], schema: &Schema) -> Result<FileLayout, LayoutError> {
        let rows = check(columns)?;
        // Lists of empty lists may have values without having bytes.
        for (column, field) in columns.iter().zip(schema.fields()) {
            if values(field, rows).is_none() {
                return Err(LayoutError::Overflow {
                    spec: column.spec.clone(),
                });
            }
        }
        let metadata_bytes = metadata_bytes_max(columns, ipc::schema_bytes(schema))?;
        let layout = Self::frame(columns, rows, schema, metadata_bytes)?;
        assert!(
            SchemaMessage::in_header(&layout.header, &layout.tensors).is_some(),
            "the schema declares other tensors than {:?}",
            layout.tensors
        );
        Ok(layout)
    }

    fn frame(
        columns: &[Column],
        rows: u64,
        schema: &Schema,
        metadata_bytes: u64,
    ) -> Result<FileLayout, LayoutError> {
        // The bound decides, not the bytes written: digits of a shape must not move a tensor.
        let body_offset = (8 + metadata_bytes).next_multiple_of(TENSOR_ALIGN_BYTES);

        let mut tensors = Vec::with_capacity(columns.len());
        let mut end = body_offset;
        for column in columns {
            let (place, region_end) = place(column, end)?;
            tensors.push(place);
            end = region_end;
        }
        let footer_offset = tensors.last().map_or(body_offset, |last| {
            (last.offset + last.length).next_multiple_of(TENSOR_ALIGN_BYTES)
        });
        let capacity = end + metadata_bytes.next_multiple_of(PAGE_BYTES);
        if capacity > i64::MAX.cast_unsigned() {
            return Err(LayoutError::FileOverflow {
                name: columns[columns.len() - 1].name.clone(),
            });
        }

        let ipc::Framing { header, footer } =
            ipc::frame(schema, &tensors, rows, body_offset, footer_offset);
        let bytes = footer_offset + footer.len() as u64;
        assert!(
            header.len() as u64 == body_offset && bytes <= capacity,
            "{} columns: header of {} bytes for a body at {body_offset}, file of {bytes} bytes in \
             {capacity}",
            columns.len(),
            header.len(),
        );
        Ok(FileLayout {
            tensors,
            header,
            footer,
            footer_offset,
            bytes,
            capacity,
        })
    }
}

/// Checks what does not depend on offsets and answers the number of rows.
fn check(columns: &[Column]) -> Result<u64, LayoutError> {
    let first = columns.first().ok_or(LayoutError::NoTensors)?;
    let first_rows = first.spec.rows();
    let mut names = std::collections::HashSet::new();
    for column in columns {
        let Column { name, spec, .. } = column;
        if !names.insert(name) {
            return Err(LayoutError::NameTwice { name: name.clone() });
        }
        if spec.rows() != first_rows {
            return Err(LayoutError::RowsDiffer {
                first: first.name.clone(),
                first_rows,
                name: name.clone(),
                rows: spec.rows(),
            });
        }
        let bytes = spec.bytes()?;
        if column.reserve_bytes < bytes {
            return Err(LayoutError::ReserveTooSmall {
                name: name.clone(),
                reserve_bytes: column.reserve_bytes,
                spec: spec.clone(),
                bytes,
            });
        }
        check_row(name, spec)?;
    }
    Ok(first_rows)
}

/// The place of `column` at or after `free`, and where its region ends.
fn place(column: &Column, free: u64) -> Result<(TensorPlace, u64), LayoutError> {
    let align = if column.reserve_bytes >= HUGE_MIN_BYTES {
        HUGE_ALIGN_BYTES
    } else {
        TENSOR_ALIGN_BYTES
    };
    let length = column.spec.bytes()?;
    let find = || {
        let offset = free.checked_next_multiple_of(align)?;
        let end = offset
            .checked_add(column.reserve_bytes)?
            .checked_next_multiple_of(TENSOR_ALIGN_BYTES)?;
        // Far from the end of i64, so that what is added to it later cannot overflow.
        (end <= 1 << 62).then_some((offset, end))
    };
    let (offset, end) = find().ok_or_else(|| LayoutError::FileOverflow {
        name: column.name.clone(),
    })?;
    let place = TensorPlace {
        name: column.name.clone(),
        spec: column.spec.clone(),
        offset,
        length,
    };
    Ok((place, end))
}

/// An upper bound of the bytes of header and footer, each, from the number and names of the
/// columns alone, and `schema_bytes` of a schema that is not ours.
fn metadata_bytes_max(columns: &[Column], schema_bytes: u64) -> Result<u64, LayoutError> {
    // The widest column (7 inner axes of 19 digits, a dtype of our own) takes 497 bytes beside its
    // name, what is around the columns less than 200; `frame` checks that they fit.
    let around = schema_bytes.saturating_add(1024);
    let bytes = columns.iter().fold(around, |bytes, column| {
        bytes
            .saturating_add(640)
            .saturating_add(column.name.len() as u64)
    });
    if bytes > u64::from(METADATA_BYTES_MAX) {
        return Err(LayoutError::HeaderTooLarge {
            columns: columns.len(),
            bytes,
        });
    }
    Ok(bytes)
}
