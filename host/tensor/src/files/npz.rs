//! numpy's `.npz`: a zip archive with an `.npy` for each array, stored or deflated.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::named::NamedTensor;
use super::npy;
use crate::TensorSpec;

/// Deflate makes at most this of a byte.
const EXPANSION_MAX: u64 = 1032;

/// An open archive. Small reads of its lists are buffered, large ones of data are not.
pub(super) type Archive = ZipArchive<BufReader<File>>;

/// A member of the archive.
#[derive(Debug)]
pub(super) struct Entry {
    /// Without `.npy`.
    pub(super) name: String,
    /// What it is; or why it cannot be a tensor.
    pub(super) tensor: Result<(TensorSpec, Data), String>,
}

/// Where an array's elements are.
#[derive(Debug)]
pub(super) struct Data {
    member: usize,
    npy: npy::Data,
    /// Of the elements in the file, if they are not compressed.
    offset: Option<u64>,
}

impl Data {
    pub(super) fn npy(&self) -> &npy::Data {
        &self.npy
    }

    pub(super) fn offset(&self) -> Option<u64> {
        self.offset
    }
}

/// The archive in a file of `bytes` bytes, and its members.
///
/// # Errors
/// What is wrong with it as a whole.
pub(super) fn open(file: File, bytes: u64) -> Result<(Archive, Vec<Entry>), String> {
    let damaged = |error: ZipError| format!("not a .npz, or damaged: {error}");
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
    if archive.has_duplicate_names() {
        return Err("two of its arrays have one name; save them again under two".to_owned());
    }
    let mut entries = Vec::with_capacity(archive.len().min(1 << 16));
    for member in 0..archive.len() {
        let entry = archive.by_index_data(member).map_err(damaged)?;
        if entry.is_dir() {
            continue;
        }
        let shown = String::from_utf8_lossy(entry.name_raw()).into_owned();
        let Some(name) = shown.strip_suffix(".npy").map(str::to_owned) else {
            entries.push(Entry {
                tensor: Err(format!("{shown:?} in it is no .npy")),
                name: shown,
            });
            continue;
        };
        let tensor = member_header(&mut archive, member, bytes)
            .map_err(|reason| format!("array {name:?}: {reason}"));
        entries.push(Entry { name, tensor });
    }
    Ok((archive, entries))
}

fn member_header(
    archive: &mut Archive,
    member: usize,
    bytes: u64,
) -> Result<(TensorSpec, Data), String> {
    let entry = archive
        .by_index_data(member)
        .map_err(|error| error.to_string())?;
    let (size, stored) = (entry.size(), entry.compressed_size());
    let most = match entry.compression() {
        _ if entry.encrypted() => {
            return Err("it is encrypted; save it without a password".to_owned());
        }
        CompressionMethod::Stored => stored,
        CompressionMethod::Deflated => stored.saturating_mul(EXPANSION_MAX),
        method => {
            return Err(format!(
                "it is compressed with {method}; save it with numpy.savez or savez_compressed"
            ));
        }
    };
    // A caller allocates what is announced.
    if stored > bytes || size > most {
        return Err(format!(
            "{size} bytes are announced, {stored} of them in the file, which has {bytes} and cannot hold that"
        ));
    }
    let is_stored = entry.compression() == CompressionMethod::Stored;
    let mut reader = archive
        .by_index(member)
        .map_err(|error| error.to_string())?;
    let start = reader.data_start();
    let (spec, npy) = npy::open(&mut reader, size).map_err(|reason| reason.to_string())?;
    let offset = start.filter(|_| is_stored).map(|at| at + npy.offset());
    Ok((
        spec,
        Data {
            member,
            npy,
            offset,
        },
    ))
}

/// Why an array could not be read.
#[derive(Debug)]
pub(super) enum Problem {
    Io(io::Error),
    Content(String),
}

/// Gives `read` the elements, as a reader that ends where they end, and checks that they were all there and the
/// archive's checksum fits.
pub(super) fn read<T>(
    archive: &mut Archive,
    data: &Data,
    name: &str,
    read: impl FnOnce(&mut dyn Read) -> io::Result<T>,
) -> Result<T, Problem> {
    let damaged = |reason: String| Problem::Content(format!("array {name:?}: damaged: {reason}"));
    let io = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged("it ends before its data does".to_owned()),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other => {
            damaged(error.to_string())
        }
        _ => Problem::Io(error),
    };
    let mut reader = match archive.by_index(data.member) {
        Ok(reader) => reader,
        Err(ZipError::Io(error)) => return Err(io(error)),
        Err(error) => return Err(damaged(error.to_string())),
    };
    let header = data.npy.offset();
    let skipped = io::copy(&mut (&mut reader).take(header), &mut io::sink()).map_err(io)?;
    if skipped != header {
        return Err(damaged("it ends within its header".to_owned()));
    }
    let done = read(&mut reader).map_err(io)?;
    // The checksum is looked at where the data ends.
    match reader.read(&mut [0]).map_err(io)? {
        0 => Ok(done),
        _ => Err(damaged("it goes on after its data".to_owned())),
    }
}

/// Whether all names can be those of members.
///
/// # Errors
/// One that cannot.
pub(super) fn check(tensors: &[NamedTensor<'_>]) -> Result<(), String> {
    let long = tensors
        .iter()
        .find(|tensor| tensor.name.len() + ".npy".len() > usize::from(u16::MAX));
    match long {
        Some(tensor) => Err(format!(
            "a name of {} bytes; .npz has at most 65531",
            tensor.name.len()
        )),
        None => Ok(()),
    }
}

/// Writes the archive as `numpy.savez` does: nothing is compressed.
pub(super) fn write(file: &mut File, tensors: &[NamedTensor<'_>]) -> io::Result<()> {
    let mut archive = ZipWriter::new(file);
    for NamedTensor { name, spec, bytes } in tensors {
        let header = npy::header(spec);
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(header.len() as u64 + bytes.len() as u64 > u64::from(u32::MAX));
        archive.start_file(format!("{name}.npy"), options)?;
        archive.write_all(&header)?;
        archive.write_all(bytes)?;
    }
    archive.finish()?;
    Ok(())
}
