//! Where a guest panicked: the record that it leaves in its memory before it traps. After a trap no
//! function of an instance can be called, but its memory can be read.

use super::regions::Regions;
use crate::text;
use serde::{Deserialize, Serialize};

/// Size of the record, and where in it the texts begin.
const RECORD_BYTES: u64 = 1024;
const FILE_AT: usize = 16;
const MESSAGE_AT: usize = 256;

/// A guest's panic, in its own words, on one line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Panic {
    /// What it said.
    pub message: String,
    /// The source file; empty if it did not say.
    pub file: String,
    /// The line in it; 0 if it did not say.
    pub line: u32,
}

impl Panic {
    /// The panic of a guest that trapped, if it left one at `address`.
    pub(super) fn read(regions: &Regions, address: u64) -> Option<Self> {
        if address == 0 {
            return None;
        }
        Self::decode(&regions.read(address, RECORD_BYTES).ok()?)
    }

    /// None if there was no panic, or if the record is none.
    fn decode(record: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(record.get(at..at + 4)?);
            Some(u32::from_le_bytes(word))
        };
        let text = |from: usize, end: usize, bytes: u32| {
            let bytes = usize::try_from(bytes).ok()?;
            let text = record.get(from..end)?.get(..bytes)?;
            let text = String::from_utf8_lossy(text).into_owned();
            Some(text::one_line(text, text::MESSAGE_BYTES_MAX))
        };
        (word(0)? == 1).then_some(())?;
        Some(Self {
            line: word(4)?,
            file: text(FILE_AT, MESSAGE_AT, word(8)?)?,
            message: text(MESSAGE_AT, record.len(), word(12)?)?,
        })
    }
}

impl std::fmt::Display for Panic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.file.is_empty() {
            write!(f, "panicked: {}", self.message)
        } else {
            write!(
                f,
                "panicked at {}:{}: {}",
                self.file, self.line, self.message
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(words: [u32; 4], file: &[u8], message: &[u8]) -> Vec<u8> {
        let mut record = vec![0xff; 1024];
        for (to, word) in record.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        record[FILE_AT..FILE_AT + file.len()].copy_from_slice(file);
        record[MESSAGE_AT..MESSAGE_AT + message.len()].copy_from_slice(message);
        record
    }

    #[test]
    fn a_record_is_read_and_bounded() {
        let panic = Panic::decode(&record([1, 7, 6, 5], b"src/ab", b"a\nb\xffc")).expect("a panic");
        assert_eq!(panic.to_string(), "panicked at src/ab:7: a\\nb\u{fffd}c");
        let panic = Panic::decode(&record([1, 0, 0, 1], b"", b"a")).expect("a panic");
        assert_eq!(panic.to_string(), "panicked: a");
        for words in [
            [0, 0, 0, 0],
            [2, 0, 0, 0],
            [1, 0, 241, 0],
            [1, 0, 0, 769],
            [1, 0, u32::MAX, u32::MAX],
        ] {
            assert_eq!(Panic::decode(&record(words, b"", b"")), None, "{words:?}");
        }
        assert_eq!(Panic::decode(&[1, 0, 0, 0]), None);
    }
}
