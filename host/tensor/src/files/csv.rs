//! Numbers as comma-separated text: a header, then a line for each row.
//!
//! A file is read twice: once for its columns' dtypes and the number of rows, which nothing else tells, and once for
//! the numbers. What is kept of it in between is its header.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom};

use ::csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder, Writer};

use super::named::NamedTensor;
use crate::element::{self, Element};
use crate::{Dtype, TensorSpec};

/// Of one row; a file without a line break would be one.
const ROW_BYTES_MAX: u64 = 64 << 20;
const COLUMNS_MAX: usize = 1 << 16;
/// What asks for a matrix of all columns.
pub(super) const ALL_COLUMNS: &str = "*";

/// A file's columns, with what they are.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<Column>,
    rows: u64,
    has_header: bool,
}

#[derive(Debug)]
struct Column {
    name: String,
    kind: Result<Dtype, String>,
}

/// What is wrong with a file, or what reading it failed of.
#[derive(Debug)]
pub(super) enum Problem {
    Io(io::Error),
    Content(String),
}

/// What has been seen in a column.
#[derive(Debug, Default)]
struct Seen {
    empty: bool,
    boolean: bool,
    negative: bool,
    integer: bool,
    above_i64: bool,
    real: bool,
    /// Why it is no column of numbers.
    problem: Option<String>,
}

/// A cell.
enum Cell {
    Empty,
    Boolean(bool),
    Signed(i64),
    Unsigned(u64),
    Real(f64),
}

impl Cell {
    /// What the text says, or why it says no number.
    fn parse(text: &[u8]) -> Result<Cell, &'static str> {
        let text = text.trim_ascii();
        let Ok(text) = std::str::from_utf8(text) else {
            return Err("not UTF-8");
        };
        if text.is_empty() {
            return Ok(Cell::Empty);
        }
        if let Ok(integer) = text.parse::<i64>() {
            // As a float it has a sign.
            return Ok(match integer {
                0 if text.starts_with('-') => Cell::Real(-0.0),
                _ => Cell::Signed(integer),
            });
        }
        if let Ok(integer) = text.parse::<u64>() {
            return Ok(Cell::Unsigned(integer));
        }
        if let Ok(real) = text.parse::<f64>() {
            let is_word = text.contains(['i', 'I']);
            return if real.is_infinite() && !is_word {
                Err("beyond what a float64 holds")
            } else {
                Ok(Cell::Real(real))
            };
        }
        match text {
            _ if text.eq_ignore_ascii_case("true") => Ok(Cell::Boolean(true)),
            _ if text.eq_ignore_ascii_case("false") => Ok(Cell::Boolean(false)),
            _ => Err("not a number"),
        }
    }
}

impl Seen {
    fn add(&mut self, text: &[u8], row: u64) {
        match Cell::parse(text) {
            Ok(Cell::Empty) => self.empty = true,
            Ok(Cell::Boolean(_)) => self.boolean = true,
            Ok(Cell::Signed(integer)) => {
                self.integer = true;
                self.negative |= integer < 0;
            }
            Ok(Cell::Unsigned(_)) => {
                self.integer = true;
                self.above_i64 = true;
            }
            Ok(Cell::Real(_)) => self.real = true,
            Err(why) => {
                const SHOWN_MAX: usize = 40;
                let shown = String::from_utf8_lossy(text.get(..SHOWN_MAX).unwrap_or(text));
                self.problem = Some(format!("row {row}: {shown:?} is {why}"));
            }
        }
    }

    fn dtype(self) -> Result<Dtype, String> {
        let is_number = self.integer || self.real;
        match self {
            Seen {
                problem: Some(problem),
                ..
            } => Err(problem),
            Seen { boolean: true, .. } if is_number => {
                Err("true or false and numbers are mixed; write 1 and 0".to_owned())
            }
            Seen {
                boolean: true,
                empty: true,
                ..
            } => Err("some of its cells are empty and the others true or false; fill them".to_owned()),
            Seen { boolean: true, .. } => Ok(Dtype::Bool8),
            Seen { real: true, .. } | Seen { empty: true, .. } | Seen { integer: false, .. } => {
                Ok(Dtype::Float64)
            }
            Seen {
                above_i64: true,
                negative: true,
                ..
            } => Err(
                "no dtype holds both its integers below 0 and those above 2^63-1; write the column with a decimal point"
                    .to_owned(),
            ),
            Seen {
                above_i64: true, ..
            } => Ok(Dtype::Uint64),
            _ => Ok(Dtype::Int64),
        }
    }
}

/// Ends with an error where a row is longer than any table's.
struct Rows<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Rows<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let text = format!("a row of more than {} MiB", ROW_BYTES_MAX >> 20);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let read = self.inner.read(buffer)?;
        self.left = self.left.saturating_sub(read as u64);
        Ok(read)
    }
}

/// Reads rows, all of one length.
struct Records<R> {
    reader: Reader<Rows<R>>,
    record: ByteRecord,
    /// Read so far, the header among them. The reader's lines are off by one behind CRLF.
    rows: u64,
}

impl<R: Read> Records<R> {
    fn new(inner: R) -> Records<R> {
        let rows = Rows {
            inner,
            left: ROW_BYTES_MAX,
        };
        Records {
            reader: ReaderBuilder::new()
                .has_headers(false)
                .buffer_capacity(1 << 18)
                .from_reader(rows),
            record: ByteRecord::new(),
            rows: 0,
        }
    }

    /// The next row and its number, from 1.
    fn next(&mut self) -> Result<Option<(&ByteRecord, u64)>, Problem> {
        self.reader.get_mut().left = ROW_BYTES_MAX;
        match self.reader.read_byte_record(&mut self.record) {
            Ok(true) => {
                self.rows += 1;
                Ok(Some((&self.record, self.rows)))
            }
            Ok(false) => Ok(None),
            Err(error) => Err(problem(error, self.rows + 1)),
        }
    }
}

fn problem(error: ::csv::Error, row: u64) -> Problem {
    match error.into_kind() {
        ErrorKind::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
            Problem::Content(format!("not a table of numbers: {error}"))
        }
        ErrorKind::Io(error) => Problem::Io(error),
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => Problem::Content(format!(
            "row {row} has {len} cells and row 1 has {expected_len}; give every row as many"
        )),
        kind => Problem::Content(format!("not a table: {kind:?}")),
    }
}

/// Looks through the whole file.
pub(super) fn open(file: impl Read) -> Result<Table, Problem> {
    let mut records = Records::new(file);
    let Some((first, row)) = records.next()? else {
        return Err(Problem::Content(
            "it is empty; the first line names the columns".to_owned(),
        ));
    };
    if first.len() > COLUMNS_MAX {
        return Err(Problem::Content(format!(
            "{} columns; at most {COLUMNS_MAX} are read",
            first.len()
        )));
    }
    // Names that are all numbers are none.
    let has_header = !first.iter().all(|cell| {
        matches!(
            Cell::parse(cell),
            Ok(Cell::Signed(_) | Cell::Unsigned(_) | Cell::Real(_))
        )
    });
    let mut names = Vec::with_capacity(first.len());
    let mut seen: Vec<Seen> = first.iter().map(|_| Seen::default()).collect();
    let mut rows = 0;
    for (index, cell) in first.iter().enumerate() {
        let name = cell.trim_ascii();
        if !has_header {
            seen[index].add(cell, row);
            names.push(index.to_string());
        } else if name.is_empty() {
            names.push(index.to_string());
        } else {
            let name = std::str::from_utf8(name).map_err(|_| {
                Problem::Content(format!("the name of column {index} is not UTF-8"))
            })?;
            names.push(name.to_owned());
        }
    }
    rows += u64::from(!has_header);
    while let Some((record, row)) = records.next()? {
        rows += 1;
        for (cell, seen) in record.iter().zip(&mut seen) {
            if seen.problem.is_none() {
                seen.add(cell, row);
            }
        }
    }
    let columns = names.into_iter().zip(seen).map(|(name, seen)| Column {
        kind: seen
            .dtype()
            .map_err(|why| format!("column {name:?}: {why}")),
        name,
    });
    Ok(Table {
        columns: columns.collect(),
        rows,
        has_header,
    })
}

impl Table {
    /// Each column's name, and its spec or why it is no tensor.
    pub(super) fn columns(&self) -> impl Iterator<Item = (&str, Result<TensorSpec, &str>)> {
        self.columns.iter().map(|column| {
            let spec = column.kind.as_ref().map(|&dtype| TensorSpec {
                dtype,
                shape: vec![self.rows],
            });
            (column.name.as_str(), spec.map_err(String::as_str))
        })
    }

    /// The columns that `text` asks for, as the columns of one tensor: `a,b,c`, or `*` for all. `None` if it asks for
    /// no such thing.
    pub(super) fn matrix(&self, text: &str) -> Option<Result<(TensorSpec, Vec<usize>), String>> {
        if text != ALL_COLUMNS && !text.contains(',') {
            return None;
        }
        Some(self.chosen(text))
    }

    fn chosen(&self, text: &str) -> Result<(TensorSpec, Vec<usize>), String> {
        let chosen: Vec<usize> = if text == ALL_COLUMNS {
            (0..self.columns.len()).collect()
        } else {
            let find = |name: &str| {
                let mut found = (0..self.columns.len()).filter(|&i| self.columns[i].name == name);
                match (found.next(), found.next()) {
                    (Some(index), None) => Ok(index),
                    (None, _) => Err(format!("no column {name:?}")),
                    _ => Err(format!("several columns are called {name:?}; rename them")),
                }
            };
            text.split(',')
                .map(|name| find(name.trim()))
                .collect::<Result<_, _>>()?
        };
        let dtypes: Result<Vec<Dtype>, &String> = chosen
            .iter()
            .map(|&index| self.columns[index].kind.as_ref().map(|&dtype| dtype))
            .collect();
        let dtypes = dtypes.map_err(|why| format!("{why}; choose the columns as #a,b,c"))?;
        let first = dtypes.first().copied().unwrap_or(Dtype::Float64);
        let dtype = if dtypes.iter().all(|&dtype| dtype == first) {
            first
        } else if dtypes.contains(&Dtype::Bool8) {
            return Err(
                "some of the columns are of true and false and others of numbers".to_owned(),
            );
        } else {
            Dtype::Float64
        };
        let shape = vec![self.rows, chosen.len() as u64];
        Ok((TensorSpec { dtype, shape }, chosen))
    }

    /// Reads the file once into several tensors: each a dtype, the columns that lie side by side in it, and its bytes.
    pub(super) fn read(
        &self,
        mut file: impl Read + Seek,
        wanted: &mut [(Dtype, &[usize], &mut [u8])],
    ) -> Result<(), Problem> {
        file.seek(SeekFrom::Start(0)).map_err(Problem::Io)?;
        let changed = || Problem::Content("it was changed while it was read".to_owned());
        let mut records = Records::new(file);
        if self.has_header {
            records.next()?;
        }
        for row in 0..self.rows {
            let Some((record, _)) = records.next()? else {
                return Err(changed());
            };
            for (dtype, columns, bytes) in &mut *wanted {
                let size = usize::try_from(dtype.size()).unwrap_or(16);
                let line = columns.len() * size;
                let start = usize::try_from(row).map_err(|_| changed())? * line;
                let cells = bytes[start..start + line].chunks_exact_mut(size);
                for (&column, target) in columns.iter().zip(cells) {
                    let cell = record.get(column).map(Cell::parse);
                    store(*dtype, cell, target).ok_or_else(changed)?;
                }
            }
        }
        match records.next()? {
            None => Ok(()),
            Some(_) => Err(changed()),
        }
    }
}

/// Puts the number into its place, if it is still one of that dtype.
fn store(dtype: Dtype, cell: Option<Result<Cell, &str>>, target: &mut [u8]) -> Option<()> {
    let cell = cell?.ok()?;
    match (dtype, cell) {
        (Dtype::Bool8, Cell::Boolean(truth)) => target.fill(truth.into()),
        (Dtype::Int64, Cell::Signed(number)) => target.copy_from_slice(&number.to_le_bytes()),
        (Dtype::Uint64, Cell::Signed(number)) => {
            target.copy_from_slice(&u64::try_from(number).ok()?.to_le_bytes());
        }
        (Dtype::Uint64, Cell::Unsigned(number)) => target.copy_from_slice(&number.to_le_bytes()),
        (Dtype::Float64, cell) => target.copy_from_slice(&real(&cell)?.to_le_bytes()),
        _ => return None,
    }
    Some(())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "an integer among floats is read as the nearest one, as any decimal number is"
)]
fn real(cell: &Cell) -> Option<f64> {
    match cell {
        Cell::Empty => Some(f64::NAN),
        Cell::Signed(number) => Some(*number as f64),
        Cell::Unsigned(number) => Some(*number as f64),
        Cell::Real(number) => Some(*number),
        Cell::Boolean(_) => None,
    }
}

/// Columns to be written, of one length.
#[derive(Debug)]
pub(super) struct Columns<'a> {
    columns: Vec<Written<'a>>,
    rows: usize,
}

#[derive(Debug)]
struct Written<'a> {
    name: String,
    tensor: NamedTensor<'a>,
    /// Of `tensor`'s columns.
    index: usize,
    of: usize,
}

/// The columns of tensors: one of a vector, several of a matrix.
///
/// # Errors
/// What a table of numbers cannot hold.
pub(super) fn columns<'a>(tensors: &[NamedTensor<'a>]) -> Result<Columns<'a>, String> {
    let mut columns = Vec::new();
    let mut rows: Option<(u64, &str)> = None;
    for &tensor in tensors {
        let NamedTensor { name, spec, .. } = tensor;
        if spec.dtype.is_complex() {
            return Err(format!(
                "tensor {name:?}: a .csv has no {}; write .npy or .arrow",
                spec.dtype
            ));
        }
        let (height, names) = match spec.shape[..] {
            [] => (1, vec![name.to_owned()]),
            [height] => (height, vec![name.to_owned()]),
            [height, width] if width <= COLUMNS_MAX as u64 => {
                (height, (0..width).map(|i| format!("{name}.{i}")).collect())
            }
            [_, width] => {
                return Err(format!(
                    "tensor {name:?}: {width} columns; .csv has at most {COLUMNS_MAX}; write .npy"
                ));
            }
            _ => {
                return Err(format!(
                    "tensor {name:?} has {} axes and .csv two at most; reshape it or write .npy",
                    spec.shape.len()
                ));
            }
        };
        match rows {
            Some((rows, first)) if rows != height => {
                return Err(format!(
                    "tensor {first:?} has {rows} rows and {name:?} {height}; write each to a file of its own"
                ));
            }
            _ => rows = Some((height, name)),
        }
        let of = names.len();
        columns.extend(names.into_iter().enumerate().map(|(index, name)| Written {
            name,
            tensor,
            index,
            of,
        }));
    }
    if columns.is_empty() {
        return Err("no columns; .csv has at least one".to_owned());
    }
    let is_number =
        |name: &str| !matches!(Cell::parse(name.as_bytes()), Err(_) | Ok(Cell::Boolean(_)));
    if columns.iter().all(|column| is_number(&column.name)) {
        return Err(format!(
            "a header of numbers such as {:?} would read as data; use another name",
            columns[0].name
        ));
    }
    let rows = rows.map_or(0, |(rows, _)| rows);
    let rows = usize::try_from(rows).map_err(|_| format!("{rows} rows"))?;
    Ok(Columns { columns, rows })
}

/// Writes the table.
pub(super) fn write(file: &mut File, columns: &Columns<'_>) -> io::Result<()> {
    let mut writer = Writer::from_writer(BufWriter::with_capacity(1 << 18, file));
    let names = columns.columns.iter().map(|column| &column.name);
    writer.write_record(names)?;
    let mut text = String::new();
    for row in 0..columns.rows {
        for column in &columns.columns {
            let NamedTensor { spec, bytes, .. } = column.tensor;
            let size = usize::try_from(spec.dtype.size()).unwrap_or(16);
            let start = (row * column.of + column.index) * size;
            text.clear();
            element::for_each(spec.dtype, &bytes[start..start + size], |element| {
                push(&mut text, element);
            });
            writer.write_field(&text)?;
        }
        writer.write_record(None::<&[u8]>)?;
    }
    writer.flush()
}

/// The shortest text that reads back as the same number; a float has a point or an exponent.
fn push(text: &mut String, element: Element) {
    // A String takes all that is written to it.
    let _ = match element {
        Element::Boolean(truth) => write!(text, "{truth}"),
        Element::Integer(number) => write!(text, "{number}"),
        Element::Single(number) if number.is_nan() => write!(text, "nan"),
        Element::Double(number) if number.is_nan() => write!(text, "nan"),
        Element::Single(number) => write!(text, "{number:?}"),
        Element::Double(number) => write!(text, "{number:?}"),
        // Refused when the columns were made.
        Element::Complex(re, im) => write!(text, "{re:?}{im:+?}j"),
    };
}
