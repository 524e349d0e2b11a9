//! The words of a panic where the host finds them: nothing of an instance can be called after a trap.

use core::fmt::{self, Display, Write};
use core::panic::Location;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

const FILE_BYTES_MAX: usize = 240;
const MESSAGE_BYTES_MAX: usize = 768;

/// The panic record of `wit/kernel.wit`. Atomics, since a static is shared as far as the compiler knows.
#[repr(C)]
struct Record {
    panicked: AtomicU32,
    line: AtomicU32,
    file_bytes: AtomicU32,
    message_bytes: AtomicU32,
    file: [AtomicU8; FILE_BYTES_MAX],
    message: [AtomicU8; MESSAGE_BYTES_MAX],
}

const _: () = assert!(size_of::<Record>() == 1024, "the contract's size");

static RECORD: Record = Record::new();

/// Where the record is, for `describe`.
pub(crate) fn address() -> u64 {
    core::ptr::from_ref(&RECORD).expose_provenance() as u64
}

/// Leaves a panic's place and message for the host, which shows them with the trap. The SDK's own panic handler
/// does it; a plugin with std calls this in its panic hook. Nothing is allocated, a long text is cut.
pub fn record_panic(place: Option<&Location<'_>>, message: impl Display) {
    RECORD.write(place, message);
}

impl Record {
    const fn new() -> Self {
        Self {
            panicked: AtomicU32::new(0),
            line: AtomicU32::new(0),
            file_bytes: AtomicU32::new(0),
            message_bytes: AtomicU32::new(0),
            file: [const { AtomicU8::new(0) }; FILE_BYTES_MAX],
            message: [const { AtomicU8::new(0) }; MESSAGE_BYTES_MAX],
        }
    }

    fn write(&self, place: Option<&Location<'_>>, message: impl Display) {
        self.line
            .store(place.map_or(0, Location::line), Ordering::Release);
        let file = place.map_or("", Location::file);
        // Of a long path the end says more.
        let cut = file.len().saturating_sub(FILE_BYTES_MAX);
        let file = &file[file.ceil_char_boundary(cut)..];
        self.file_bytes
            .store(Text::new(&self.file).fill(file), Ordering::Release);
        self.message_bytes
            .store(Text::new(&self.message).fill(message), Ordering::Release);
        self.panicked.store(1, Ordering::Release);
    }
}

/// A text that is cut, at a character's end, where there is no more room.
struct Text<'a> {
    room: &'a [AtomicU8],
    bytes: u32,
}

impl<'a> Text<'a> {
    fn new(room: &'a [AtomicU8]) -> Self {
        Self { room, bytes: 0 }
    }

    /// How many bytes it became.
    fn fill(mut self, text: impl Display) -> u32 {
        // An error says that the text was cut.
        let _ = write!(self, "{text}");
        self.bytes
    }
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.floor_char_boundary(self.room.len());
        let (now, later) = self.room.split_at(end);
        for (to, byte) in now.iter().zip(text.bytes()) {
            to.store(byte, Ordering::Release);
            self.bytes += 1;
        }
        self.room = later;
        if end == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::String, vec::Vec};

    fn text(bytes: &[AtomicU8], count: &AtomicU32) -> String {
        let bytes: Vec<u8> = bytes[..count.load(Ordering::Acquire) as usize]
            .iter()
            .map(|byte| byte.load(Ordering::Acquire))
            .collect();
        String::from_utf8(bytes).expect("cut between characters")
    }

    #[test]
    fn place_and_message_fit_the_record() {
        let place = Location::caller();
        let record = Record::new();
        record.write(Some(place), format_args!("{} of {}", 3, 2));
        assert_eq!(text(&record.message, &record.message_bytes), "3 of 2");
        assert!(text(&record.file, &record.file_bytes).ends_with("panic.rs"));
        assert_eq!(record.line.load(Ordering::Acquire), place.line());

        let record = Record::new();
        record.write(None, "€".repeat(1000));
        assert_eq!(
            text(&record.message, &record.message_bytes),
            "€".repeat(MESSAGE_BYTES_MAX / 3)
        );
        assert_eq!(text(&record.file, &record.file_bytes), "");
        assert_eq!(record.panicked.load(Ordering::Acquire), 1);
    }
}
