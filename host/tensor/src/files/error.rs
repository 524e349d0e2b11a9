//! What a tensor file can be refused for.

use std::io;
use std::path::{Path, PathBuf};

use super::format::Format;
use super::npy::NpyError;
use crate::ipc::IpcError;
use crate::{LayoutError, TensorSpec};

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
        "{}: the extension must say the format: {}",
        path.display(),
        Format::EXTENSIONS
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
    /// A `.npz`, `.safetensors` or `.csv` that is damaged or of a kind that is not read, or a tensor
    /// that the format has no way to write.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what to do.
        reason: String,
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

pub(super) fn io_error(path: &Path, doing: &'static str, error: io::Error) -> FileError {
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

pub(super) fn check_buffer(
    path: &Path,
    name: &str,
    spec: &TensorSpec,
    given: usize,
) -> Result<(), FileError> {
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
