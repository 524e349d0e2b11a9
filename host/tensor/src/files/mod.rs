//! Tensor files: `.npy`, and `.arrow` / `.feather`, read into and written from a caller's buffer.

mod npy;
mod transpose;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::ipc::{self, IpcError, Piece};
use crate::{Column, Dtype, FileLayout, LayoutError, TensorSpec};

pub use npy::NpyError;

/// A tensor file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system said no.
    #[error("{}: cannot {doing}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the operating system said.
        error: io::Error,
    },
    /// An extension that stands for no format.
    #[error(
        "{}: the extension must say the format: .npy, .arrow or .feather",
        path.display()
    )]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// A directory, pipe or device.
    #[error(
        "{}: not a regular file but a directory, pipe, socket or device; write the tensor to a file first",
        path.display()
    )]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A `.npy` that is damaged or of a kind that is not read.
    #[error("{}: {reason}", path.display())]
    Npy {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: NpyError,
    },
    /// An Arrow file that is damaged or of a kind that is not read.
    #[error("{}: {reason}", path.display())]
    Ipc {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: Box<IpcError>,
    },
    /// A name that the file does not have.
    #[error("{}: no tensor {name:?}; it has {known}", path.display())]
    NoTensor {
        /// The file.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// The names that there are, for people.
        known: String,
    },
    /// A name that several columns have.
    #[error("{}: {count} columns are called {name:?}; rename them", path.display())]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
        /// How many columns have it.
        count: usize,
    },
    /// A column that cannot be a tensor.
    #[error("{}: {reason}", path.display())]
    NotATensor {
        /// The file.
        path: PathBuf,
        /// The column, why it cannot be one, and what to do.
        reason: String,
    },
    /// An index beyond the tensors.
    #[error("{}: no tensor {index}; it has {count}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// The index asked for.
        index: usize,
        /// How many tensors there are.
        count: usize,
    },
    /// A buffer of another size than the tensor.
    #[error(
        "{}: tensor {name:?}, {spec}, has {needed} bytes, the buffer for it {given}",
        path.display()
    )]
    BufferSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What it is.
        spec: TensorSpec,
        /// Its bytes.
        needed: u64,
        /// The buffer's bytes.
        given: usize,
    },
    /// A tensor that cannot be laid out.
    #[error("{}: {reason}", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: LayoutError,
    },
}

/// An open file with tensors in it. Opening reads headers only.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: Vec<(String, TensorSpec)>,
    /// For each of `tensors`.
    sources: Vec<Source>,
    unsupported: Vec<(String, String)>,
}

/// Where a tensor's bytes come from.
#[derive(Debug)]
enum Source {
    Npy(npy::Data),
    Arrow(Vec<Piece>),
}

enum Format {
    Npy,
    Arrow,
}

impl Format {
    fn of(path: &Path) -> Result<Format, FileError> {
        let extension = path.extension().map(|e| e.to_ascii_lowercase());
        match extension.as_deref().and_then(|e| e.to_str()) {
            Some("npy") => Ok(Format::Npy),
            Some("arrow" | "feather") => Ok(Format::Arrow),
            _ => Err(FileError::Extension {
                path: path.to_owned(),
            }),
        }
    }
}

impl TensorFile {
    /// Opens a file by its extension.
    ///
    /// * `.npy`: one tensor, named as the file without its extension. `V2` elements are read as
    ///   bfloat16, which is what ml_dtypes writes.
    /// * `.arrow`, `.feather`: an Arrow IPC file or stream, plain or LZ4; each column of numbers,
    ///   fixed-size lists of numbers or fixed-shape tensors, its record batches one after the
    ///   other. Columns of other kinds, with nulls, or compressed with ZSTD are in [`TensorFile::unsupported`].
    ///
    /// # Errors
    /// [`FileError`] for an unknown extension, what is no regular file, and for headers that are
    /// damaged, of an unknown kind, or announce more bytes than there are.
    pub fn open(path: &Path) -> Result<TensorFile, FileError> {
        let format = Format::of(path)?;
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
        let bytes = file.metadata().map_err(io("read its size"))?.len();
        let mut opened = TensorFile {
            path: path.to_owned(),
            file,
            tensors: Vec::new(),
            sources: Vec::new(),
            unsupported: Vec::new(),
        };
        match format {
            Format::Npy => opened.read_npy_header(bytes)?,
            Format::Arrow => opened.read_arrow_columns(bytes)?,
        }
        Ok(opened)
    }

    fn read_npy_header(&mut self, bytes: u64) -> Result<(), FileError> {
        let (spec, data) = npy::open(&self.file, bytes).map_err(|reason| FileError::Npy {
            path: self.path.clone(),
            reason,
        })?;
        let name = self.path.file_stem().unwrap_or_default();
        self.tensors
            .push((name.to_string_lossy().into_owned(), spec));
        self.sources.push(Source::Npy(data));
        Ok(())
    }

    fn read_arrow_columns(&mut self, bytes: u64) -> Result<(), FileError> {
        let columns = ipc::columns(io::BufReader::new(&self.file), bytes)
            .map_err(|reason| self.ipc(reason))?;
        for column in columns {
            match column.tensor {
                Ok((spec, pieces)) => {
                    self.tensors.push((column.name, spec));
                    self.sources.push(Source::Arrow(pieces));
                }
                Err(reason) => self.unsupported.push((column.name, reason.to_string())),
            }
        }
        Ok(())
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
    /// # Errors
    /// [`FileError`] if there is none, with the names that there are; if several columns have that
    /// name; or with the reason why the column cannot be a tensor.
    pub fn find(&self, name: &str) -> Result<usize, FileError> {
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
            ([], []) => Err(FileError::NoTensor {
                path,
                name: name.to_owned(),
                known: self.known(),
            }),
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
    /// [`TensorSpec::bytes`] bytes, if the file cannot be read, or if compressed data is damaged.
    pub fn read_into(&mut self, index: usize, destination: &mut [u8]) -> Result<(), FileError> {
        let (Some((name, spec)), Some(source)) = (self.tensors.get(index), self.sources.get(index))
        else {
            return Err(FileError::Index {
                path: self.path.clone(),
                index,
                count: self.tensors.len(),
            });
        };
        check_buffer(&self.path, name, spec, destination.len())?;
        match source {
            Source::Npy(data) => data
                .read_into(&self.file, spec, destination)
                .map_err(|error| io_error(&self.path, "read its data", error))?,
            Source::Arrow(pieces) => {
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
        }
        if spec.dtype == Dtype::Bool8 {
            // numpy and Arrow both count every byte but 0 as true; kernels may rely on 0 and 1.
            for byte in destination {
                *byte = u8::from(*byte != 0);
            }
        }
        Ok(())
    }
}

fn io_error(path: &Path, doing: &'static str, error: io::Error) -> FileError {
    let error = match error.kind() {
        // Lengths were held against the file's when it was opened.
        io::ErrorKind::UnexpectedEof => io::Error::new(
            error.kind(),
            "it was truncated while it was read; write a new file under another name, then rename that",
        ),
        _ => error,
    };
    FileError::Io {
        path: path.to_owned(),
        doing,
        error,
    }
}

fn check_buffer(path: &Path, name: &str, spec: &TensorSpec, given: usize) -> Result<(), FileError> {
    let needed = spec.bytes().map_err(|reason| FileError::Layout {
        path: path.to_owned(),
        reason,
    })?;
    if needed == given as u64 {
        return Ok(());
    }
    Err(FileError::BufferSize {
        path: path.to_owned(),
        name: name.to_owned(),
        spec: spec.clone(),
        needed,
        given,
    })
}

/// Writes one tensor into a file by its extension: `.npy`, exactly as numpy and ml_dtypes would
/// (`float8_e4m3fn` then comes back from numpy as raw bytes), or `.arrow` / `.feather`, with `name`
/// as the column's.
///
/// The file appears, or replaces an older one, when it is complete: it is written under another
/// name in the same directory. After an error nothing is left behind.
///
/// # Errors
/// [`FileError`] for an unknown extension, if `bytes` has not exactly [`TensorSpec::bytes`] bytes,
/// for a row that Arrow cannot hold, and if the operating system refuses.
pub fn write(path: &Path, name: &str, spec: &TensorSpec, bytes: &[u8]) -> Result<(), FileError> {
    let format = Format::of(path)?;
    check_buffer(path, name, spec, bytes.len())?;
    let layout = match format {
        Format::Npy => None,
        Format::Arrow => {
            let plan = Column::new(name, spec.clone()).and_then(|c| FileLayout::plan(&[c]));
            Some(plan.map_err(|reason| FileError::Layout {
                path: path.to_owned(),
                reason,
            })?)
        }
    };
    let mut partial = Partial::create(path)?;
    let written = match &layout {
        None => partial
            .file
            .write_all(&npy::header(spec))
            .and_then(|()| partial.file.write_all(bytes)),
        Some(layout) => write_segment(&mut partial.file, layout, bytes),
    };
    written.map_err(|error| io_error(path, "write it", error))?;
    partial.finish(path)
}

/// Gaps stay holes of the file.
fn write_segment(file: &mut File, layout: &FileLayout, bytes: &[u8]) -> io::Result<()> {
    file.write_all(&layout.header)?;
    for tensor in &layout.tensors {
        file.seek(SeekFrom::Start(tensor.offset))?;
        file.write_all(bytes)?;
    }
    file.seek(SeekFrom::Start(layout.footer_offset))?;
    file.write_all(&layout.footer)
}

/// A file under a temporary name, removed unless it is finished.
struct Partial {
    file: File,
    path: Option<PathBuf>,
}

impl Partial {
    fn create(target: &Path) -> Result<Partial, FileError> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!(".strait-{}-{number}.partial", std::process::id());
            let path = target.with_file_name(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    return Ok(Partial {
                        file,
                        path: Some(path),
                    });
                }
                // Of another process with our id: one that died, or in another pid namespace.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error(target, "create a file beside it", error)),
            }
        }
    }

    fn finish(mut self, target: &Path) -> Result<(), FileError> {
        if let Some(path) = &self.path {
            fs::rename(path, target)
                .map_err(|error| io_error(target, "move the finished file there", error))?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Nobody is left to tell: the caller has the error that led here.
            let _ = fs::remove_file(path);
        }
    }
}
