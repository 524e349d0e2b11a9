//! The bytes that anybody may have written: every length is held against them before it is used or allocated.

use std::io::{Read, Seek, SeekFrom};

use arrow_ipc::root_as_message;
use flatbuffers::InvalidFlatbuffer;

use super::{CONTINUATION, IpcError};
use crate::METADATA_BYTES_MAX;

/// A reader that refuses to go beyond its end before it allocates.
pub(super) struct Source<R> {
    pub(super) reader: R,
    pub(super) bytes: u64,
}

impl<R: Read + Seek> Source<R> {
    pub(super) fn new(reader: R, bytes: u64) -> Source<R> {
        Source { reader, bytes }
    }

    pub(super) fn check(
        &self,
        what: &'static str,
        offset: u64,
        bytes: u64,
    ) -> Result<(), IpcError> {
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
    pub(super) fn read(
        &mut self,
        what: &'static str,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, IpcError> {
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

    pub(super) fn read_array<const N: usize>(
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

    pub(super) fn starts_with(&mut self, magic: &[u8]) -> Result<bool, IpcError> {
        let length = self.bytes.min(magic.len() as u64);
        Ok(self.read("the first bytes", 0, length)? == magic)
    }
}

pub(super) fn unsigned(what: &str, value: i64) -> Result<u64, IpcError> {
    u64::try_from(value).map_err(|_| IpcError::Invalid(format!("{what} is {value}")))
}

/// The bytes before a message's metadata, and the length that they say. Before version 0.15 Arrow
/// wrote no continuation marker.
pub(super) fn message_prefix<R: Read + Seek>(
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

pub(super) fn parse(data: &[u8], offset: u64) -> Result<arrow_ipc::Message<'_>, IpcError> {
    root_as_message(data).map_err(|error| corrupt("a message", offset, &error))
}

pub(super) fn corrupt(what: &'static str, offset: u64, error: &InvalidFlatbuffer) -> IpcError {
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
