//! Text from outside (a client's names, a guest's words, a plugin's symbols) as it may stand in
//! messages and log lines: on one line, without characters that steer a terminal, bounded.

use std::borrow::Cow;

/// Most bytes of a message.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// Most bytes of a guest's stack.
pub(crate) const BACKTRACE_BYTES_MAX: usize = 16 << 10;

/// Whether a terminal obeys a character instead of showing it: control characters, other line breaks,
/// and those that turn the direction of writing.
pub(crate) fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Most bytes of a name that are shown.
const NAME_BYTES_MAX: usize = 200;

/// What somebody calls something, short and on one line, for a message.
pub(crate) fn name(name: &str) -> String {
    let end = name.floor_char_boundary(NAME_BYTES_MAX);
    let shown = on_one_line(&name[..end]);
    // An escape is longer than what it stands for.
    let shown_end = shown.floor_char_boundary(NAME_BYTES_MAX);
    let is_cut = end < name.len() || shown_end < shown.len();
    format!("{}{}", &shown[..shown_end], if is_cut { "…" } else { "" })
}

/// `text` on one line, of at most `bytes_max` bytes and a mark that it was cut.
pub(crate) fn one_line(text: String, bytes_max: usize) -> String {
    bounded(text, bytes_max, is_obeyed)
}

/// `text` of several lines, likewise.
pub(crate) fn lines(text: String, bytes_max: usize) -> String {
    bounded(text, bytes_max, |c| is_obeyed(c) && c != '\n')
}

/// `text` with `escape` in the place of each character that is `bad`.
pub(crate) fn escaped(
    text: &str,
    bad: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    if !text.contains(&bad) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if bad(c) {
            safe.push_str(&escape(c));
        } else {
            safe.push(c);
        }
    }
    safe.into()
}

/// As [`escaped`], in Rust's own way.
pub(crate) fn escaped_by_default(text: &str, bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    escaped(text, bad, |c| c.escape_default().to_string())
}

/// As it stands on one line of ours: a name, path, message or note of somebody else.
pub(crate) fn on_one_line(text: &str) -> Cow<'_, str> {
    escaped_by_default(text, is_obeyed)
}

fn bounded(mut text: String, bytes_max: usize, bad: impl Fn(char) -> bool) -> String {
    let cut = text.len().saturating_sub(bytes_max);
    if cut > 0 {
        text.truncate(text.floor_char_boundary(bytes_max));
    }
    if let Cow::Owned(clean) = escaped_by_default(&text, bad) {
        text = clean;
    }
    if cut > 0 {
        text.push_str(&format!("… ({cut} bytes more)"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_is_escaped() {
        let check = |text: &str, expected: &str| {
            assert_eq!(one_line(text.to_owned(), 64), expected, "{text:?}");
        };
        check("x", "x");
        check("größer → 2", "größer → 2");
        check("a\nb\rc\0d", r"a\nb\rc\u{0}d");
        check("\u{1b}[31m", r"\u{1b}[31m");
        check(
            "\u{85}\u{9b}\u{2028}\u{202e}",
            r"\u{85}\u{9b}\u{2028}\u{202e}",
        );
        assert_eq!(lines("a\nb\tc".into(), 64), "a\nb\\tc");
    }

    #[test]
    fn names_are_short_and_on_one_line() {
        assert_eq!(name("größe"), "größe");
        assert_eq!(name("a\n\u{202e}"), "a\\n\\u{202e}");
        assert_eq!(name(&"ä".repeat(100)), "ä".repeat(100));
        assert_eq!(name(&"xä".repeat(100)), "xä".repeat(66) + "x…");
        assert_eq!(name(&"\u{1}".repeat(100)), "\\u{1}".repeat(40) + "…");
    }

    #[test]
    fn a_line_of_ours_stays_one() {
        assert_eq!(on_one_line("a\n\tb\r\0"), "a\\n\\tb\\r\\u{0}");
        assert_eq!(
            on_one_line("\u{202e}yp.npy\u{2028}\u{85}"),
            "\\u{202e}yp.npy\\u{2028}\\u{85}"
        );
        assert_eq!(on_one_line("sch\u{f6}n \u{6570}"), "sch\u{f6}n \u{6570}");
    }

    #[test]
    fn what_is_long_is_cut_between_characters() {
        assert_eq!(one_line("äää".into(), 3), "ä… (3 bytes more)");
        assert_eq!(one_line("ab\n".into(), 3), "ab\\n");
        let long = one_line("\n".repeat(60 << 20), MESSAGE_BYTES_MAX);
        assert!(long.len() < 3 * MESSAGE_BYTES_MAX, "{}", long.len());
    }
}
