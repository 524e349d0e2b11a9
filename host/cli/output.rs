//! Stdout, stderr, tables and progress.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use strait_tensor::TensorSpec;

use super::failure::Failure;
use crate::text::{escaped, escaped_by_default, is_obeyed};

/// Writes text and a line feed to stdout.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    write(&harmless(text))
}

/// A colour of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
}

/// Writes lines to stdout, each with a label before it, in colour where stdout is a terminal (and
/// `NO_COLOR` is not set).
pub(super) fn labelled(lines: &[(Option<Colour>, String, String)]) -> Result<(), Failure> {
    let coloured =
        io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
    let lines: Vec<String> = lines
        .iter()
        .map(|(colour, label, text)| {
            let (label, text) = (line(label), line(text));
            let code = match colour {
                Some(Colour::Green) => 32,
                Some(Colour::Yellow) => 33,
                Some(Colour::Red) => 31,
                None => 0,
            };
            if coloured && code != 0 {
                format!("\u{1b}[{code}m{label}\u{1b}[0m{text}")
            } else {
                format!("{label}{text}")
            }
        })
        .collect();
    write(&lines.join("\n"))
}

fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush());
    written.map_err(|error| Failure::stdout(&error))
}

/// Writes one JSON object and a line feed to stdout.
pub(super) fn json(value: &impl Serialize) -> Result<(), Failure> {
    match serde_json::to_string(value) {
        // What JSON leaves as it is and a terminal obeys stands in strings only.
        Ok(line) => text(&escaped(&line, is_obeyed, |c| {
            format!("\\u{:04x}", u32::from(c))
        })),
        Err(error) => Err(Failure::other(
            "OUTPUT",
            format!("the answer is not JSON: {error}"),
        )),
    }
}

/// Writes to stderr. If that is closed there is nobody to tell.
pub(super) fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "{}", harmless(text));
}

/// What somebody else said, on one line: a name, path, message or note.
pub(super) fn line(text: &str) -> Cow<'_, str> {
    escaped_by_default(text, is_obeyed)
}

/// Lines of ours, with control characters escaped wherever they come from.
fn harmless(text: &str) -> Cow<'_, str> {
    let bad = |c: char| is_obeyed(c) && c != '\n' && c != '\t';
    escaped_by_default(text, bad)
}

/// A table without frame lines; columns whose heading ends with `>` are right-aligned.
pub(super) fn table(heading: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    let right: Vec<bool> = heading.iter().map(|name| name.ends_with('>')).collect();
    let cell = |index: usize, text: &str| {
        let cell = Cell::new(line(text));
        match right.get(index) {
            Some(true) => cell.set_alignment(CellAlignment::Right),
            _ => cell,
        }
    };
    if !heading.is_empty() {
        table.set_header(
            heading
                .iter()
                .enumerate()
                .map(|(i, name)| cell(i, name.trim_end_matches('>'))),
        );
    }
    for row in rows {
        table.add_row(row.iter().enumerate().map(|(i, text)| cell(i, text)));
    }
    table
}

/// A table's lines, without the blanks that frame them.
pub(super) fn lines(table: &Table) -> String {
    let text = table.to_string();
    text.lines()
        .map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end())
        .collect::<Vec<_>>()
        .join("\n")
}

/// As in `float64 [2, 3]`.
pub(super) fn spec(spec: &TensorSpec) -> String {
    format!("{} {:?}", spec.dtype, spec.shape)
}

/// As in `1.5 MiB`.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.1} {}", UNITS[unit])
}

/// Shown before a bar appears: what is done by then needs none.
const BAR_AFTER: Duration = Duration::from_secs(1);
const BAR_EVERY: Duration = Duration::from_millis(100);

/// A bar on the terminal for work that takes a while, as long as it lives.
#[derive(Debug)]
pub(super) struct Progress {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Shows `what` and how much of `total` bytes this process has read or written since now, by
    /// Linux's own count. Nothing is shown if stderr is no terminal.
    pub(super) fn start(what: &str, total: u64) -> Self {
        Self::show(what, Some(total))
    }

    /// Shows `what` and the time since now, for work that cannot tell how far it is.
    pub(super) fn waiting(what: &str) -> Self {
        Self::show(what, None)
    }

    fn show(what: &str, total: Option<u64>) -> Self {
        let what = line(what).into_owned();
        if !io::stderr().is_terminal() {
            return Self {
                stop: None,
                thread: None,
            };
        }
        let (stop, stopped) = mpsc::channel();
        let before = transferred();
        let thread = std::thread::Builder::new()
            .name("progress".into())
            .spawn(move || {
                if stopped.recv_timeout(BAR_AFTER) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let (bar, style) = match total {
                    Some(total) => (
                        ProgressBar::new(total),
                        "{msg} {bar:30} {bytes}/{total_bytes} {elapsed}",
                    ),
                    None => (ProgressBar::new_spinner(), "{msg} {spinner} {elapsed}"),
                };
                let bar = bar.with_message(what);
                let style = ProgressStyle::with_template(style);
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                loop {
                    if let Some(total) = total {
                        bar.set_position(transferred().saturating_sub(before).min(total));
                    }
                    bar.tick();
                    if stopped.recv_timeout(BAR_EVERY) != Err(RecvTimeoutError::Timeout) {
                        break;
                    }
                }
                bar.finish_and_clear();
            });
        // Without the thread there is no bar; the work goes on.
        Self {
            stop: Some(stop),
            thread: thread.ok(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It only draws.
            let _ = thread.join();
        }
    }
}

/// Bytes that this process read and wrote by system calls; 0 where Linux does not count them.
fn transferred() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let field = |name| {
        io.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    field("rchar:")
        .unwrap_or(0)
        .saturating_add(field("wchar:").unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (104_857_600, "100.0 MiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(harmless("plain\ttext\n"), "plain\ttext\n");
        assert_eq!(harmless("\u{1b}[2Jgone"), "\\u{1b}[2Jgone");
        assert_eq!(line("a\n\tb\r\0"), "a\\n\\tb\\r\\u{0}");
        assert_eq!(
            line("\u{202e}yp.npy\u{2028}\u{85}"),
            "\\u{202e}yp.npy\\u{2028}\\u{85}"
        );
        assert_eq!(line("sch\u{f6}n \u{6570}"), "sch\u{f6}n \u{6570}");
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        let table = table(
            &["NAME", "BYTES>"],
            [
                vec!["x".into(), "8".into()],
                vec!["long".into(), "128".into()],
            ],
        );
        let text = lines(&table);
        assert!(text.lines().all(|line| line == line.trim_end()), "{text:?}");
        assert!(text.contains("  8"), "{text:?}");
    }

    #[test]
    fn this_process_has_read_something() {
        assert!(transferred() > 0);
    }
}
