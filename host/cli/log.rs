//! Log lines on stderr.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::failure::Failure;
use crate::text::{escaped_by_default, is_obeyed};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum LogFormat {
    /// Text, coloured on terminals.
    Human,
    /// One JSON object a line.
    Json,
}

/// The options of a worker process that has its lines told by this one.
pub(super) fn options(filter: &str) -> Vec<String> {
    vec![format!("--log-level={filter}")]
}

/// Log lines go to stderr from now on.
pub(super) fn start(format: LogFormat, filter: &str) -> Result<(), Failure> {
    let colour = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer();
    let lines = match format {
        LogFormat::Human => lines
            .with_writer(move || OneLine { colour })
            .with_ansi(colour)
            .boxed(),
        // JSON escapes by itself.
        LogFormat::Json => lines
            .with_writer(io::stderr)
            .json()
            .flatten_event(true)
            .boxed(),
    };
    init(lines, filter)
}

/// Each event goes to stderr as `worker::log` reads it.
pub(super) fn start_for_a_host(filter: &str) -> Result<(), Failure> {
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .json()
        .without_time();
    init(lines, filter)
}

fn init<L>(lines: L, filter: &str) -> Result<(), Failure>
where
    L: Layer<tracing_subscriber::Registry> + Send + Sync,
{
    let wrong = |error: &dyn std::fmt::Display| {
        Failure::input(
            "BAD_SETTING",
            format!("log level {filter:?}: {error}; use error, warn, info, debug or trace"),
        )
    };
    let parsed: Targets = filter.parse().map_err(|error| wrong(&error))?;
    // What they say at `debug` is for those who build compilers.
    let parsed = parsed
        .with_target("cranelift", Level::INFO)
        .with_target("wasmtime", Level::INFO);
    tracing_subscriber::registry()
        .with(lines.with_filter(parsed))
        .try_init()
        .map_err(|error| wrong(&error))
}

/// Stderr, on which each event is one line whatever texts of guests and clients stand in it:
/// the formatter writes an event in one piece.
struct OneLine {
    /// The formatter's own colours stay; it escapes those of others.
    colour: bool,
}

impl OneLine {
    fn clean<'a>(&self, event: &'a [u8]) -> Cow<'a, [u8]> {
        let bad = |c: char| is_obeyed(c) && !(self.colour && c == '\u{1b}');
        let text = String::from_utf8_lossy(event);
        let line = text.strip_suffix('\n').unwrap_or(&text);
        match escaped_by_default(line, bad) {
            Cow::Borrowed(_) => Cow::Borrowed(event),
            Cow::Owned(clean) => Cow::Owned((clean + "\n").into_bytes()),
        }
    }
}

impl Write for OneLine {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(&self.clean(event))?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let clean = |colour, event: &str| {
            let clean = OneLine { colour }.clean(event.as_bytes()).into_owned();
            String::from_utf8(clean).expect("text")
        };
        assert_eq!(clean(false, "INFO fine\n"), "INFO fine\n");
        assert_eq!(
            clean(false, "INFO a\nERROR forged\r\0\n"),
            "INFO a\\nERROR forged\\r\\u{0}\n"
        );
        assert_eq!(clean(false, "\u{1b}[2K\n"), "\\u{1b}[2K\n");
        assert_eq!(
            clean(true, "\u{1b}[32mINFO\u{1b}[0m a\u{9b}\n"),
            "\u{1b}[32mINFO\u{1b}[0m a\\u{9b}\n"
        );
    }
}
