//! Looking through a tensor of a file without memory for the whole of it.

use std::io::{self, Read, Seek, SeekFrom};

use super::error::{FileError, io_error};
use super::{Source, TensorFile, normalise, npz};
use crate::Dtype;

/// What is read at a time: whole elements of any dtype.
const BLOCK_BYTES: usize = 1 << 20;

/// How a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Where its bytes begin, if they lie there as they are and together.
    pub offset: Option<u64>,
    /// How they lie there, such as `row-major` or `column-major, big-endian`.
    pub layout: String,
}

impl TensorFile {
    /// How tensor `index` lies in the file.
    ///
    /// # Errors
    /// [`FileError`] if there is no such tensor.
    pub fn storage(&self, index: usize) -> Result<Storage, FileError> {
        let (_, spec) = self.tensor(index)?;
        let of_npy = |data: &super::npy::Data| {
            let order = match data.fortran_order() && spec.shape.len() > 1 {
                true => "column-major",
                false => "row-major",
            };
            let bytes = if data.big_endian() {
                ", big-endian"
            } else {
                ""
            };
            format!("{order}{bytes}")
        };
        Ok(match &self.sources[index] {
            Source::Npy(data) => Storage {
                offset: Some(data.offset()),
                layout: of_npy(data),
            },
            Source::Npz(data) => {
                let compressed = match data.offset() {
                    None => ", deflated",
                    Some(_) => "",
                };
                Storage {
                    offset: data.offset(),
                    layout: of_npy(data.npy()) + compressed,
                }
            }
            Source::Plain(offset) => Storage {
                offset: Some(*offset),
                layout: "row-major".to_owned(),
            },
            Source::Csv(_) => Storage {
                offset: None,
                layout: "text".to_owned(),
            },
            Source::Arrow(pieces) => {
                let is_plain = pieces.iter().all(|piece| piece.plain_offset().is_some());
                let compressed = if is_plain { "" } else { ", LZ4" };
                Storage {
                    offset: match &pieces[..] {
                        [only] => only.plain_offset(),
                        _ => None,
                    },
                    layout: match pieces.len() {
                        0 | 1 => format!("row-major{compressed}"),
                        count => format!("row-major in {count} record batches{compressed}"),
                    },
                }
            }
        })
    }

    /// Gives `each` the elements of tensor `index` block by block: whole ones, little-endian, `bool8` as 0 and 1, in the
    /// order in which they lie in the file.
    ///
    /// Needs memory for one block; for a whole record batch where that is compressed, and for the tensor if it is of
    /// a `.csv`.
    ///
    /// # Errors
    /// As [`TensorFile::read_into`].
    pub fn scan(&mut self, index: usize, each: &mut dyn FnMut(&[u8])) -> Result<(), FileError> {
        let (name, spec) = self.tensor(index)?.clone();
        let bytes = spec.bytes().map_err(|reason| FileError::Layout {
            path: self.path.clone(),
            reason,
        })?;
        let io = |error| io_error(&self.path, "read its data", error);
        match (&self.sources[index], &mut self.archive) {
            (Source::Npy(data), _) => {
                let at = self.file.seek(SeekFrom::Start(data.offset()));
                at.map_err(io)?;
                let mut each = |block: &mut [u8]| {
                    data.to_little_endian(spec.dtype, block);
                    each(block);
                };
                blocks(&mut &self.file, bytes, spec.dtype, &mut each).map_err(io)
            }
            (Source::Npz(data), Some(archive)) => {
                let mut each = |block: &mut [u8]| {
                    data.npy().to_little_endian(spec.dtype, block);
                    each(block);
                };
                let read = npz::read(archive, data, &name, |reader| {
                    blocks(reader, bytes, spec.dtype, &mut each)
                });
                read.map_err(|problem| self.npz(problem))
            }
            (Source::Plain(offset), _) => {
                self.file.seek(SeekFrom::Start(*offset)).map_err(io)?;
                blocks(&mut &self.file, bytes, spec.dtype, &mut |block| each(block)).map_err(io)
            }
            (Source::Arrow(pieces), _) => {
                for piece in pieces {
                    if let Some(offset) = piece.plain_offset() {
                        let at = (&self.file).seek(SeekFrom::Start(offset));
                        at.map_err(io)?;
                        blocks(&mut &self.file, piece.bytes, spec.dtype, &mut |block| {
                            each(block)
                        })
                        .map_err(io)?;
                        continue;
                    }
                    let mut part = buffer(piece.bytes).map_err(io)?;
                    let read = piece.read_into(&self.file, &name, &mut part);
                    read.map_err(|reason| self.ipc(reason))?;
                    normalise(spec.dtype, &mut part);
                    each(&part);
                }
                Ok(())
            }
            (Source::Npz(_) | Source::Csv(_), _) => {
                self.scan_all(&[index], &mut |_, block| each(block))
            }
        }
    }

    /// The same for several tensors: `each` is also told which one of `indices` the block is of. A `.csv` is read once
    /// for all of them.
    ///
    /// # Errors
    /// As [`TensorFile::scan`].
    pub fn scan_all(
        &mut self,
        indices: &[usize],
        each: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), FileError> {
        if self.table.is_none() {
            return (0..indices.len())
                .try_for_each(|i| self.scan(indices[i], &mut |block| each(i, block)));
        }
        let io = |error| io_error(&self.path, "read its data", error);
        let mut all = Vec::with_capacity(indices.len());
        for &index in indices {
            let bytes = self.tensor(index)?.1.bytes();
            let bytes = bytes.map_err(|reason| FileError::Layout {
                path: self.path.clone(),
                reason,
            })?;
            all.push(buffer(bytes).map_err(io)?);
        }
        let mut wanted: Vec<(usize, &mut [u8])> = indices
            .iter()
            .copied()
            .zip(all.iter_mut().map(Vec::as_mut_slice))
            .collect();
        self.read_all_into(&mut wanted)?;
        for (i, bytes) in all.iter().enumerate() {
            each(i, bytes);
        }
        Ok(())
    }
}

/// Zeros, or an error where there is no memory for so many.
fn buffer(bytes: u64) -> io::Result<Vec<u8>> {
    let full = || {
        io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!("no memory for {bytes} bytes"),
        )
    };
    let bytes = usize::try_from(bytes).map_err(|_| full())?;
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).map_err(|_| full())?;
    buffer.resize(bytes, 0);
    Ok(buffer)
}

/// Reads `bytes` bytes in blocks.
fn blocks(
    reader: &mut dyn Read,
    bytes: u64,
    dtype: Dtype,
    each: &mut dyn FnMut(&mut [u8]),
) -> io::Result<()> {
    let mut left = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut block = vec![0; BLOCK_BYTES.min(left)];
    while left > 0 {
        let part = &mut block[..BLOCK_BYTES.min(left)];
        reader.read_exact(part)?;
        normalise(dtype, part);
        each(part);
        left -= part.len();
    }
    Ok(())
}
