//! A part of a tensor as it lies in a file.

use std::io::{self, Read, Seek, SeekFrom};

use super::IpcError;

/// No codec that is read makes more than this out of a byte; LZ4 makes 255.
const EXPANSION_MAX: u64 = 256;

/// How the bytes of a buffer lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    Plain,
    /// A length (`i64`, -1: plain bytes follow), then a frame.
    Lz4Frame,
}

/// One record batch's part of a column.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    offset: u64,
    /// Bytes in the file from `offset` on; those of the piece itself if it is plain.
    stored_bytes: u64,
    /// Bytes of the tensor.
    pub(crate) bytes: u64,
    codec: Codec,
}

impl Piece {
    /// `bytes` bytes of the tensor, which lie as `codec` has them in `stored_bytes` bytes from `offset` on. `name`
    /// is the column's, for errors.
    pub(super) fn new(
        name: &str,
        codec: Codec,
        offset: u64,
        stored_bytes: u64,
        bytes: u64,
    ) -> Result<Piece, IpcError> {
        // An empty buffer has no length in front of it, whatever the codec.
        let codec = if bytes == 0 { Codec::Plain } else { codec };
        let is_possible = match codec {
            Codec::Plain => stored_bytes >= bytes,
            // A caller allocates what is announced, so it must be what LZ4 can hold.
            Codec::Lz4Frame => {
                stored_bytes >= 8 && stored_bytes.saturating_mul(EXPANSION_MAX) >= bytes
            }
        };
        if !is_possible {
            return Err(IpcError::Invalid(format!(
                "column {name:?}: a buffer of {stored_bytes} bytes cannot hold {bytes} bytes of \
                 values"
            )));
        }
        Ok(Piece {
            offset,
            stored_bytes: if codec == Codec::Plain {
                bytes
            } else {
                stored_bytes
            },
            bytes,
            codec,
        })
    }

    /// Where it lies, if its bytes lie there as they are.
    pub(crate) fn plain_offset(&self) -> Option<u64> {
        (self.codec == Codec::Plain).then_some(self.offset)
    }

    /// Reads it into `part`, which has exactly its size. `name` is the column's, for errors.
    pub(crate) fn read_into(
        &self,
        mut reader: impl Read + Seek,
        name: &str,
        part: &mut [u8],
    ) -> Result<(), IpcError> {
        reader.seek(SeekFrom::Start(self.offset))?;
        match self.codec {
            Codec::Plain => reader.read_exact(part)?,
            Codec::Lz4Frame => {
                let mut length = [0; 8];
                reader.read_exact(&mut length)?;
                match i64::from_le_bytes(length) {
                    // "Not compressed after all", as writers do where it does not pay.
                    -1 if self.stored_bytes - 8 >= self.bytes => reader.read_exact(part)?,
                    length if u64::try_from(length).is_ok_and(|length| length >= self.bytes) => {
                        let frame = io::BufReader::new(reader.take(self.stored_bytes - 8));
                        lz4_flex::frame::FrameDecoder::new(frame)
                            .read_exact(part)
                            .map_err(|error| {
                                IpcError::Invalid(format!(
                                    "column {name:?}: damaged LZ4 data of {} bytes at byte {}: {error}",
                                    self.stored_bytes, self.offset
                                ))
                            })?;
                    }
                    length => {
                        return Err(IpcError::Invalid(format!(
                            "column {name:?}: compressed data of {length} bytes where {} belong",
                            self.bytes
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}
