//! Stdout, stderr and tables.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use indicatif::BinaryBytes;
use serde::Serialize;
use strait_client::Flight;
use strait_tensor::TensorSpec;

use super::failure::Failure;
use crate::text::{escaped, escaped_by_default, is_obeyed, on_one_line};

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
    let is_coloured = is_coloured();
    let lines: Vec<String> = lines
        .iter()
        .map(|(colour, label, text)| {
            let colour = colour.filter(|_| is_coloured);
            painted(colour, label) + &on_one_line(text)
        })
        .collect();
    write(&lines.join("\n"))
}

/// The same with the label, a bar, between two texts.
pub(super) fn bars(lines: &[(String, String, String)]) -> Result<(), Failure> {
    let colour = Some(Colour::Green).filter(|_| is_coloured());
    let lines: Vec<String> = lines
        .iter()
        .map(|(before, bar, after)| {
            let (before, after) = (on_one_line(before), on_one_line(after));
            format!("{before}{}{after}", painted(colour, bar))
                .trim_end()
                .to_owned()
        })
        .collect();
    write(&lines.join("\n"))
}

fn is_coloured() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}

fn painted(colour: Option<Colour>, text: &str) -> String {
    let text = on_one_line(text);
    let code = match colour {
        _ if text.is_empty() => 0,
        Some(Colour::Green) => 32,
        Some(Colour::Yellow) => 33,
        Some(Colour::Red) => 31,
        None => 0,
    };
    match code {
        0 => text.into_owned(),
        code => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
    }
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
        let cell = Cell::new(on_one_line(text));
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

/// A line for each tensor of a flight; a flight of several shows them as name#tensor.
pub(super) fn flight_rows(flight: &Flight) -> Vec<Vec<String>> {
    let writers = flight.mapping.writers.name();
    let tensors = &flight.mapping.tensors;
    let name = |tensor: &str| match tensors.len() {
        1 => flight.name.clone(),
        _ => format!("{}#{tensor}", flight.name),
    };
    tensors
        .iter()
        .map(|tensor| {
            vec![
                name(&tensor.name),
                tensor.spec.dtype.name().to_owned(),
                format!("{:?}", tensor.spec.shape),
                BinaryBytes(tensor.length).to_string(),
                writers.to_owned(),
            ]
        })
        .collect()
}

/// What a kernel had to say, on stderr: stdout is for results.
pub(super) fn notes<'a>(notes: impl IntoIterator<Item = (&'a str, &'a str)>) {
    for (key, text) in notes {
        complain(&format!(
            "note: {}: {}",
            on_one_line(key),
            on_one_line(text)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(harmless("plain\ttext\n"), "plain\ttext\n");
        assert_eq!(harmless("\u{1b}[2Jgone"), "\\u{1b}[2Jgone");
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
}
