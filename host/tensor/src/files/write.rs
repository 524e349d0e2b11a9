//! Tensors into files, which appear when they are complete.

use std::fs::{File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::error::{FileError, check_buffer, io_error};
use super::format::Format;
use super::named::NamedTensor;
use super::{csv, npy, npz, safetensors};
use crate::{Column, FileLayout, TensorSpec};

/// What is left to do once there is a file.
type WriteTo<'a> = Box<dyn FnOnce(&mut File) -> io::Result<()> + 'a>;

/// Writes one tensor into a file: [`write_tensors`].
///
/// # Errors
/// As there.
pub fn write(path: &Path, name: &str, spec: &TensorSpec, bytes: &[u8]) -> Result<(), FileError> {
    write_tensors(path, &[NamedTensor { name, spec, bytes }])
}

/// Writes tensors into a file by its extension.
///
/// * `.npy`: exactly as numpy and ml_dtypes would (`float8_e4m3fn` then comes back from numpy as raw
///   bytes); one tensor, whose name is not kept.
/// * `.npz`: each such a file, not compressed, as `numpy.savez` has them.
/// * `.safetensors`: no `complex128`, for which the format has no word.
/// * `.csv`: a header and a line for each row; a tensor of rank 2 takes a column for each of its own.
///   Numbers are written so that they read back as the same; no complex ones.
/// * `.arrow`, `.feather`: the columns of one record batch, hence of one leading axis.
///
/// The file appears, or replaces an older one, when it is complete: it is written under another
/// name in the same directory. After an error nothing is left behind.
///
/// # Errors
/// [`FileError`] for an unknown extension, if a tensor's bytes are not exactly
/// [`TensorSpec::bytes`], for what the format cannot hold, and if the operating system refuses.
pub fn write_tensors(path: &Path, tensors: &[NamedTensor<'_>]) -> Result<(), FileError> {
    let format = Format::of(path).ok_or_else(|| FileError::Extension {
        path: path.to_owned(),
    })?;
    let refused = |reason| FileError::Content {
        path: path.to_owned(),
        reason,
    };
    for (index, tensor) in tensors.iter().enumerate() {
        check_buffer(path, tensor.name, tensor.spec, tensor.bytes.len())?;
        if tensors[..index]
            .iter()
            .any(|other| other.name == tensor.name)
        {
            return Err(refused(format!("two tensors are called {:?}", tensor.name)));
        }
    }
    // What cannot be written is refused before there is a file.
    let write: WriteTo<'_> = match format {
        Format::Npy => {
            let &[tensor] = tensors else {
                return Err(refused(format!(
                    ".npy holds one tensor and here are {}; write .npz",
                    tensors.len()
                )));
            };
            Box::new(move |file| {
                file.write_all(&npy::header(tensor.spec))?;
                file.write_all(tensor.bytes)
            })
        }
        Format::Npz => {
            npz::check(tensors).map_err(refused)?;
            Box::new(|file| npz::write(file, tensors))
        }
        Format::Safetensors => {
            let order = safetensors::order(tensors);
            let header = safetensors::header(&order).map_err(refused)?;
            Box::new(move |file| {
                file.write_all(&header)?;
                order
                    .iter()
                    .try_for_each(|tensor| file.write_all(tensor.bytes))
            })
        }
        Format::Csv => {
            let columns = csv::columns(tensors).map_err(refused)?;
            Box::new(move |file| csv::write(file, &columns))
        }
        Format::Arrow => {
            let layout = plan(path, tensors)?;
            Box::new(move |file| write_segment(file, &layout, tensors))
        }
    };
    let mut partial = tempfile::Builder::new()
        .prefix(".strait-")
        .suffix(".partial")
        // As of every file that a program makes: the umask takes from it.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(path.with_file_name(""))
        .map_err(|error| io_error(path, "create a file beside it", error))?;
    write(partial.as_file_mut()).map_err(|error| io_error(path, "write it", error))?;
    partial
        .persist(path)
        .map_err(|error| io_error(path, "move the finished file there", error.error))?;
    Ok(())
}

/// Writes tensors of one leading axis as one Arrow IPC stream: schema, one record batch, end.
///
/// `path` is what errors call it.
///
/// # Errors
/// [`FileError`] as [`write_tensors`] for `.arrow`.
pub fn write_stream(
    path: &Path,
    mut stream: impl Write,
    tensors: &[NamedTensor<'_>],
) -> Result<(), FileError> {
    for tensor in tensors {
        check_buffer(path, tensor.name, tensor.spec, tensor.bytes.len())?;
    }
    let layout = plan(path, tensors)?;
    let mut write = || {
        // The file's magic is not of the stream, nor is its footer but for the mark of the end.
        stream.write_all(&layout.header[8..])?;
        let mut at = layout.header.len() as u64;
        for (place, tensor) in layout.tensors.iter().zip(tensors) {
            io::copy(
                &mut io::Read::take(io::repeat(0), place.offset - at),
                &mut stream,
            )?;
            stream.write_all(tensor.bytes)?;
            at = place.offset + place.length;
        }
        let gap = layout.footer_offset - at;
        io::copy(&mut io::Read::take(io::repeat(0), gap), &mut stream)?;
        stream.write_all(&layout.footer[..8])?;
        stream.flush()
    };
    write().map_err(|error| io_error(path, "write it", error))
}

fn plan(path: &Path, tensors: &[NamedTensor<'_>]) -> Result<FileLayout, FileError> {
    let columns: Result<Vec<Column>, _> = tensors
        .iter()
        .map(|tensor| Column::new(tensor.name, tensor.spec.clone()))
        .collect();
    columns
        .and_then(|columns| FileLayout::plan(&columns))
        .map_err(|reason| FileError::Layout {
            path: path.to_owned(),
            reason,
        })
}

/// Gaps stay holes of the file.
fn write_segment(
    file: &mut File,
    layout: &FileLayout,
    tensors: &[NamedTensor<'_>],
) -> io::Result<()> {
    file.write_all(&layout.header)?;
    for (place, tensor) in layout.tensors.iter().zip(tensors) {
        file.seek(SeekFrom::Start(place.offset))?;
        file.write_all(tensor.bytes)?;
    }
    file.seek(SeekFrom::Start(layout.footer_offset))?;
    file.write_all(&layout.footer)
}
