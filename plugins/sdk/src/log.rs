//! Words to the host, while the kernel runs or around it. A plugin that uses this imports `strait:kernel/log-sink`.

use crate::bindings::strait::kernel::log_sink;
use core::fmt::{self, Write};

/// How much a message matters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Level {
    /// The invocation fails.
    Error = 0,
    /// The result may not be what the caller thinks.
    Warn = 1,
    /// What the operator may want to know.
    Info = 2,
    /// What the author wants to know.
    Debug = 3,
}

/// Logs a message. The host bounds how much one invocation may log.
pub fn log(level: Level, message: &str) {
    log_sink::log(
        level as u32,
        message.as_ptr().addr() as u64,
        message.len() as u64,
    );
}

/// Tells that `done` of `total` units of work are done; `total` 0 means unknown.
pub fn progress(done: u64, total: u64) {
    log_sink::progress(done, total);
}

/// A message that is cut, at a character's end, where the buffer is full: a panic may be about memory, so it
/// must not allocate.
struct Buffer {
    bytes: [u8; 1024],
    used: usize,
}

impl Write for Buffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut end = text.len().min(self.bytes.len() - self.used);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes[self.used..self.used + end].copy_from_slice(&text.as_bytes()[..end]);
        self.used += end;
        if end == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

#[cfg_attr(
    not(target_arch = "wasm32"),
    allow(dead_code, reason = "the panic handler is wasm's")
)]
pub(crate) fn panicked(info: &core::panic::PanicInfo<'_>) {
    let mut buffer = Buffer {
        bytes: [0; 1024],
        used: 0,
    };
    // A message that was cut is still worth logging.
    let _ = write!(buffer, "{info}");
    let bytes = &buffer.bytes[..buffer.used];
    log_sink::log(
        Level::Error as u32,
        bytes.as_ptr().addr() as u64,
        bytes.len() as u64,
    );
}
