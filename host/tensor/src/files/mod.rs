//! Tensor files, read into and written from a caller's buffer.
//!
//! ```text
//! Format::of ─▶ TensorFile::open ─▶ npy ◀─ npz    safetensors    csv    ipc (Arrow)
//!                  │  read_into: into the caller's memory at once        │
//!                  └▶ scan: block by block, for who only looks           │
//! write_tensors ─▶ a file beside it, renamed when it is complete ◀───────┘
//! ```

mod csv;
mod error;
mod format;
mod named;
mod npy;
mod npz;
mod safetensors;
mod scan;
mod transpose;
mod write;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::ipc::{self, IpcError, Piece};
use crate::{Dtype, TensorSpec};
use error::{check_buffer, io_error};

pub use error::FileError;
pub use format::Format;
pub use named::NamedTensor;
pub use npy::NpyError;
pub use scan::Storage;
pub use write::{write, write_stream, write_tensors};

/// An open file with tensors in it. Opening reads headers only, but for `.csv`, which has none.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: Vec<(String, TensorSpec)>,
    /// For each of `tensors`.
    sources: Vec<Source>,
    unsupported: Vec<(String, String)>,
    /// Of `.npz`.
    archive: Option<npz::Archive>,
    /// Of `.csv`.
    table: Option<csv::Table>,
}

/// Where a tensor's bytes come from.
#[derive(Debug)]
enum Source {
    Npy(npy::Data),
    Npz(npz::Data),
    /// As they are, from this byte on.
    Plain(u64),
    /// These columns of the table.
    Csv(Vec<usize>),
    Arrow(Vec<Piece>),
}

impl TensorFile {
    /// Opens a file by its extension.
    ///
    /// * `.npy`: one tensor, named as the file without its extension. `V2` elements are read as
    ///   bfloat16, which is what ml_dtypes writes.
    /// * `.npz`: such files in a zip archive, stored or deflated, each named as there.
    /// * `.safetensors`: all tensors whose dtype is one of [`Dtype`].
    /// * `.csv`: each column of numbers, after a header unless the first line is numbers only (the
    ///   columns are then called 0, 1, ...). A column of integers is int64 (or uint64), of true and
    ///   false bool8, any other float64, where an empty cell is NaN. [`TensorFile::find`] also makes a
    ///   matrix of several.
    /// * `.arrow`, `.feather`: an Arrow IPC file or stream, plain or LZ4; each column of numbers,
    ///   fixed-size lists of numbers or fixed-shape tensors, its record batches one after the
    ///   other.
    ///
    /// What else is in it, such as columns of other kinds, with nulls, or compressed with ZSTD, is in
    /// [`TensorFile::unsupported`].
    ///
    /// # Errors
    /// [`FileError`] for an unknown extension, what is no regular file, and for headers that are
    /// damaged, of an unknown kind, or announce more bytes than there are.
    pub fn open(path: &Path) -> Result<TensorFile, FileError> {
        let format = Format::of(path).ok_or_else(|| FileError::Extension {
            path: path.to_owned(),
        })?;
        let io = |doing| move |error| io_error(path, doing, error);
        if !fs::metadata(path).map_err(io("open it"))?.is_file() {
            return Err(FileError::NotAFile {
                path: path.to_owned(),
            });
        }
        // Somebody's lease on the file, or a pipe that came there just now, would make us wait.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(io("open it"))?;
        TensorFile::of(path, file, format)
    }

    /// The tensors of a regular file that is open already. `path` is what errors call it.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn of(path: &Path, file: File, format: Format) -> Result<TensorFile, FileError> {
        let bytes = file
            .metadata()
            .map_err(|error| io_error(path, "read its size", error))?
            .len();
        let mut opened = TensorFile {
            path: path.to_owned(),
            file,
            tensors: Vec::new(),
            sources: Vec::new(),
            unsupported: Vec::new(),
            archive: None,
            table: None,
        };
        opened.rewind()?;
        match format {
            Format::Npy => opened.read_npy_header(bytes)?,
            Format::Npz => opened.read_npz_members(bytes)?,
            Format::Safetensors => opened.read_safetensors_header(bytes)?,
            Format::Csv => opened.read_csv_columns()?,
            Format::Arrow => opened.read_arrow_columns(bytes)?,
        }
        Ok(opened)
    }

    fn rewind(&mut self) -> Result<(), FileError> {
        let rewound = self.file.rewind();
        rewound.map_err(|error| io_error(&self.path, "read it", error))
    }

    fn read_npy_header(&mut self, bytes: u64) -> Result<(), FileError> {
        let (spec, data) = npy::open(&self.file, bytes).map_err(|reason| FileError::Npy {
            path: self.path.clone(),
            reason,
        })?;
        self.tensors.push((self.stem(), spec));
        self.sources.push(Source::Npy(data));
        Ok(())
    }

    /// What a tensor is called whose file gives it no name.
    fn stem(&self) -> String {
        let name = self.path.file_stem().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn read_npz_members(&mut self, bytes: u64) -> Result<(), FileError> {
        let file = self.file.try_clone();
        let file = file.map_err(|error| io_error(&self.path, "open it again", error))?;
        let (archive, entries) = npz::open(file, bytes).map_err(|reason| self.content(reason))?;
        self.archive = Some(archive);
        for npz::Entry { name, tensor } in entries {
            let source = tensor.map(|(spec, data)| (spec, Source::Npz(data)));
            self.add(name, source);
        }
        Ok(())
    }

    fn read_safetensors_header(&mut self, bytes: u64) -> Result<(), FileError> {
        let entries = safetensors::open(&self.file, bytes).map_err(|problem| match problem {
            safetensors::Problem::Io(error) => io_error(&self.path, "read its header", error),
            safetensors::Problem::Content(reason) => self.content(reason),
        })?;
        for safetensors::Entry { name, tensor } in entries {
            let source = tensor.map(|(spec, offset)| (spec, Source::Plain(offset)));
            self.add(name, source);
        }
        Ok(())
    }

    fn read_csv_columns(&mut self) -> Result<(), FileError> {
        let table = csv::open(&self.file).map_err(|problem| self.csv(problem))?;
        for (index, (name, column)) in table.columns().enumerate() {
            let source = column.map(|spec| (spec, Source::Csv(vec![index])));
            self.add(name.to_owned(), source.map_err(str::to_owned));
        }
        self.table = Some(table);
        Ok(())
    }

    fn read_arrow_columns(&mut self, bytes: u64) -> Result<(), FileError> {
        let columns = ipc::columns(io::BufReader::new(&self.file), bytes)
            .map_err(|reason| self.ipc(reason))?;
        for column in columns {
            let source = column
                .tensor
                .map(|(spec, pieces)| (spec, Source::Arrow(pieces)));
            self.add(column.name, source.map_err(|reason| reason.to_string()));
        }
        Ok(())
    }

    fn add(&mut self, name: String, tensor: Result<(TensorSpec, Source), String>) {
        match tensor {
            Ok((spec, source)) => {
                self.tensors.push((name, spec));
                self.sources.push(source);
            }
            Err(reason) => self.unsupported.push((name, reason)),
        }
    }

    fn content(&self, reason: String) -> FileError {
        FileError::Content {
            path: self.path.clone(),
            reason,
        }
    }

    fn npz(&self, problem: npz::Problem) -> FileError {
        match problem {
            npz::Problem::Io(error) => io_error(&self.path, "read it", error),
            npz::Problem::Content(reason) => self.content(reason),
        }
    }

    fn csv(&self, problem: csv::Problem) -> FileError {
        match problem {
            csv::Problem::Io(error) => io_error(&self.path, "read it", error),
            csv::Problem::Content(reason) => self.content(reason),
        }
    }

    fn ipc(&self, reason: IpcError) -> FileError {
        match reason {
            IpcError::Io(error) => io_error(&self.path, "read it", error),
            reason => FileError::Ipc {
                path: self.path.clone(),
                reason: Box::new(reason),
            },
        }
    }

    /// The tensors, by their order in the file.
    pub fn tensors(&self) -> &[(String, TensorSpec)] {
        &self.tensors
    }

    /// Columns that cannot be tensors, each with the reason and what to do about it.
    pub fn unsupported(&self) -> &[(String, String)] {
        &self.unsupported
    }

    /// The index of the tensor called `name`.
    ///
    /// In a `.csv`, `a,b,c` is a matrix of these columns, and `*` of all: added to the tensors, and float64 where
    /// their dtypes differ.
    ///
    /// # Errors
    /// [`FileError`] if there is none, with the names that there are; if several columns have that
    /// name; or with the reason why the column cannot be a tensor.
    pub fn find(&mut self, name: &str) -> Result<usize, FileError> {
        let path = self.path.clone();
        let tensors = self
            .tensors
            .iter()
            .enumerate()
            .filter(|(_, (n, _))| n == name);
        let tensors: Vec<usize> = tensors.map(|(index, _)| index).collect();
        let others = self.unsupported.iter().filter(|(n, _)| n == name);
        let reasons: Vec<&String> = others.map(|(_, reason)| reason).collect();
        match (tensors.as_slice(), reasons.as_slice()) {
            (&[index], []) => Ok(index),
            ([], &[reason]) => Err(FileError::NotATensor {
                path,
                reason: reason.clone(),
            }),
            ([], []) => match self.table.as_ref().and_then(|table| table.matrix(name)) {
                Some(Ok((spec, columns))) => {
                    let name = match name {
                        csv::ALL_COLUMNS => self.stem(),
                        name => name.to_owned(),
                    };
                    self.tensors.push((name, spec));
                    self.sources.push(Source::Csv(columns));
                    Ok(self.tensors.len() - 1)
                }
                Some(Err(reason)) => Err(self.content(reason)),
                None => Err(FileError::NoTensor {
                    path,
                    name: name.to_owned(),
                    known: self.known(),
                }),
            },
            _ => Err(FileError::Ambiguous {
                path,
                name: name.to_owned(),
                count: tensors.len() + reasons.len(),
            }),
        }
    }

    /// The tensors' names for an error message.
    fn known(&self) -> String {
        const SHOWN_MAX: usize = 20;
        let shown: Vec<String> = self
            .tensors
            .iter()
            .take(SHOWN_MAX)
            .map(|(name, _)| format!("{name:?}"))
            .collect();
        match self.tensors.len() {
            0 => "no tensors".to_owned(),
            count if count > SHOWN_MAX => {
                format!("{} and {} more", shown.join(", "), count - SHOWN_MAX)
            }
            _ => shown.join(", "),
        }
    }

    /// Reads tensor `index` into `destination`: row-major, little-endian, `bool8` as 0 and 1.
    ///
    /// Plain row-major little-endian data goes from the file into `destination` with no copy
    /// between. After an error the content of `destination` is unspecified.
    ///
    /// # Errors
    /// [`FileError`] if there is no such tensor, if `destination` has not exactly
    /// [`TensorSpec::bytes`] bytes, if the file cannot be read, or if what is compressed is damaged.
    pub fn read_into(&mut self, index: usize, destination: &mut [u8]) -> Result<(), FileError> {
        self.read_all_into(&mut [(index, destination)])
    }

    /// Reads several tensors, each into its place: a `.csv` is read once for all of them.
    ///
    /// # Errors
    /// As [`TensorFile::read_into`].
    pub fn read_all_into(&mut self, wanted: &mut [(usize, &mut [u8])]) -> Result<(), FileError> {
        for (index, destination) in &*wanted {
            let (name, spec) = self.tensor(*index)?;
            check_buffer(&self.path, name, spec, destination.len())?;
        }
        if let Some(table) = &self.table {
            let mut parts: Vec<(Dtype, &[usize], &mut [u8])> = Vec::with_capacity(wanted.len());
            for (index, destination) in wanted {
                if let Source::Csv(columns) = &self.sources[*index] {
                    parts.push((self.tensors[*index].1.dtype, columns, destination));
                }
            }
            return table
                .read(&self.file, &mut parts)
                .map_err(|problem| self.csv(problem));
        }
        wanted
            .iter_mut()
            .try_for_each(|(index, destination)| self.read_one(*index, destination))
    }

    /// The name and spec of a tensor.
    fn tensor(&self, index: usize) -> Result<&(String, TensorSpec), FileError> {
        self.tensors.get(index).ok_or_else(|| FileError::Index {
            path: self.path.clone(),
            index,
            count: self.tensors.len(),
        })
    }

    /// `destination` has the tensor's size.
    fn read_one(&mut self, index: usize, destination: &mut [u8]) -> Result<(), FileError> {
        let (name, spec) = &self.tensors[index];
        let io = |error| io_error(&self.path, "read its data", error);
        match (&self.sources[index], &mut self.archive) {
            (Source::Npy(data), _) => {
                let at = self.file.seek(SeekFrom::Start(data.offset()));
                at.and_then(|_| data.read_into(&self.file, spec, destination))
                    .map_err(io)?;
            }
            (Source::Npz(data), Some(archive)) => {
                let read = npz::read(archive, data, name, |reader| {
                    data.npy().read_into(reader, spec, destination)
                });
                read.map_err(|problem| self.npz(problem))?;
            }
            (Source::Plain(offset), _) => {
                let at = self.file.seek(SeekFrom::Start(*offset));
                at.and_then(|_| io::Read::read_exact(&mut self.file, destination))
                    .map_err(io)?;
            }
            (Source::Arrow(pieces), _) => {
                let mut rest = &mut *destination;
                for piece in pieces {
                    let length = usize::try_from(piece.bytes).expect("a part of a slice");
                    // The pieces' rows sum up to those of the tensor.
                    let (part, behind) = rest.split_at_mut(length);
                    piece
                        .read_into(&self.file, name, part)
                        .map_err(|reason| self.ipc(reason))?;
                    rest = behind;
                }
            }
            (Source::Npz(_) | Source::Csv(_), _) => unreachable!("their file was opened with them"),
        }
        normalise(spec.dtype, destination);
        Ok(())
    }
}

/// numpy and Arrow both count every byte but 0 as true; kernels may rely on 0 and 1.
fn normalise(dtype: Dtype, bytes: &mut [u8]) {
    if dtype == Dtype::Bool8 {
        for byte in bytes {
            *byte = u8::from(*byte != 0);
        }
    }
}
