//! Words to the host, while the kernel runs or around it. A plugin that uses this imports `strait:kernel/log-sink`.

use crate::bindings::strait::kernel::log_sink;

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
