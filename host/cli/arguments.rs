//! What arguments mean that several commands take: ports, parameters, columns of files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use strait_protocol::real_to_json;

use super::failure::Failure;

/// `KEY=VALUE`, for clap.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it must have the form KEY=VALUE".to_owned()),
    }
}

/// The pairs of a repeatable option as a map.
pub(super) fn unique(
    option: &str,
    pairs: &[(String, String)],
) -> Result<BTreeMap<String, String>, Failure> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value.clone()).is_some() {
            return Err(Failure::usage(format!(
                "{option} {key}=... is given twice; once is enough"
            )));
        }
    }
    Ok(map)
}

/// `[PORT=]VALUE` of `--output`, resolved: without a port it is the kernel's only output.
pub(super) fn outputs(
    kernel: &str,
    given: &[String],
    ports: &[&str],
) -> Result<BTreeMap<String, String>, Failure> {
    let mut pairs = Vec::with_capacity(given.len());
    for text in given {
        pairs.push(match (text.split_once('='), ports) {
            (Some((port, value)), _) => (port.to_owned(), value.to_owned()),
            (None, [port]) => ((*port).to_owned(), text.clone()),
            (None, _) => {
                return Err(Failure::input(
                    "UNKNOWN_OUTPUT",
                    format!("kernel `{kernel}` has several outputs ({}); say which one --output {text} is: PORT={text}", ports.join(", ")),
                ));
            }
        });
    }
    unique("--output", &pairs)
}

/// A parameter's text as JSON, by the kind that the kernel declares. A parameter that it does not
/// declare stays text: the host says better what is wrong with it.
pub(super) fn parameters(
    kernel: &str,
    given: &[(String, String)],
    kind: impl Fn(&str) -> Option<String>,
) -> Result<BTreeMap<String, serde_json::Value>, Failure> {
    unique("--param", given)?
        .into_iter()
        .map(
            |(name, text)| match typed(kind(&name).as_deref().unwrap_or("text"), &text) {
                Ok(value) => Ok((name, value)),
                Err(expected) => Err(Failure::input(
                    "BAD_PARAMETER",
                    format!("parameter `{name}` of kernel `{kernel}`: {text:?} is not {expected}"),
                )),
            },
        )
        .collect()
}

/// The text as a value of that kind, or what would be one.
fn typed(kind: &str, text: &str) -> Result<serde_json::Value, &'static str> {
    let real = |text: &str| text.trim().parse::<f64>().map(real_to_json);
    match kind {
        "boolean" => text
            .parse::<bool>()
            .map(Into::into)
            .map_err(|_| "true or false"),
        "integer" => text
            .parse::<i64>()
            .map(Into::into)
            .or_else(|_| text.parse::<u64>().map(Into::into))
            .map_err(|_| "an integer, such as 3, from -2^63 to 2^64-1"),
        "number" => {
            number(text).ok_or("a number, such as 3 or 1.5 (nan, inf and -inf are allowed)")
        }
        "real" => real(text).map_err(|_| "a number, such as 1.5 (nan, inf and -inf are allowed)"),
        "axis" => text
            .parse::<u32>()
            .map(Into::into)
            .map_err(|_| "an axis: 0, 1, ... from the slowest"),
        "integers" | "reals" if text.trim().is_empty() => Ok(serde_json::Value::Array(Vec::new())),
        "integers" => {
            let integers: Result<Vec<_>, _> = text
                .split(',')
                .map(|text| typed("integer", text.trim()))
                .collect();
            integers
                .map(Into::into)
                .map_err(|_| "a list of integers, such as 1,2,3, from -2^63 to 2^64-1")
        }
        "reals" => {
            let numbers: Result<Vec<_>, _> = text.split(',').map(real).collect();
            numbers
                .map(Into::into)
                .map_err(|_| "a list of numbers, such as 1,2.5,3")
        }
        _ => Ok(text.into()),
    }
}

/// A number as it is written: an integer stays exact.
fn number(text: &str) -> Option<serde_json::Value> {
    let text = text.trim();
    let real = text.parse::<f64>().ok()?;
    // `-0` has a sign as a float only.
    let integer = (real != 0.0 || !real.is_sign_negative())
        .then(|| typed("integer", text).ok())
        .flatten();
    Some(integer.unwrap_or_else(|| real_to_json(real)))
}

/// Principals and groups in words, of which each may be several; a bare name is that of a token.
pub(super) fn grantees(words: &[String]) -> Vec<String> {
    let words = words.iter().flat_map(|word| word.split(','));
    let words = words.map(str::trim).filter(|word| !word.is_empty());
    let full = |word: &str| match word.contains(':') {
        true => word.to_owned(),
        false => format!("token:{word}"),
    };
    words.map(full).collect()
}

/// `FILE#PART` in its parts. A file that is really called so is meant as a whole.
pub(super) fn file_and_part(text: &str) -> (PathBuf, Option<String>) {
    match text.split_once('#') {
        Some((file, part)) if !Path::new(text).exists() => (file.into(), Some(part.to_owned())),
        _ => (text.into(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parameters_become_what_the_kernel_declares() {
        for (kind, text, value) in [
            ("boolean", "true", json!(true)),
            ("integer", "-3", json!(-3)),
            ("integer", "18446744073709551615", json!(u64::MAX)),
            (
                "number",
                "9007199254740993",
                json!(9_007_199_254_740_993_u64),
            ),
            ("number", "-9223372036854775808", json!(i64::MIN)),
            ("number", " 18446744073709551615", json!(u64::MAX)),
            (
                "number",
                "18446744073709551616",
                json!(18_446_744_073_709_551_616.0),
            ),
            ("number", "1e3", json!(1000.0)),
            ("number", "2.0", json!(2.0)),
            ("number", "-0", json!(-0.0)),
            ("number", "-inf", json!("-inf")),
            ("real", "2", json!(2.0)),
            ("real", "1e-3", json!(0.001)),
            ("real", "nan", json!("nan")),
            ("real", "-inf", json!("-inf")),
            ("axis", "1", json!(1)),
            ("text", "a,b", json!("a,b")),
            ("text", "", json!("")),
            ("reals", "1, 2.5,inf", json!([1.0, 2.5, "inf"])),
            ("reals", "", json!([])),
            ("integers", "1, 18446744073709551615", json!([1, u64::MAX])),
        ] {
            assert_eq!(typed(kind, text), Ok(value), "{kind} {text:?}");
        }
        for (kind, text) in [
            ("boolean", "1"),
            ("integer", "1.5"),
            ("integer", "18446744073709551616"),
            ("number", "0x10"),
            ("number", "two"),
            ("number", ""),
            ("real", "two"),
            ("real", ""),
            ("axis", "-1"),
            ("reals", "1,,2"),
            ("integers", "1,2.5"),
        ] {
            assert!(typed(kind, text).is_err(), "{kind} {text:?}");
        }
    }

    #[test]
    fn an_output_without_a_port_is_the_only_one() {
        let text = |given: &[&str], ports: &[&str]| {
            let given: Vec<String> = given.iter().map(|&g| g.to_owned()).collect();
            outputs("k", &given, ports).map_err(|failure| failure.to_string())
        };
        let map = |port: &str, name: &str| BTreeMap::from([(port.to_owned(), name.to_owned())]);
        assert_eq!(text(&["result"], &["y"]), Ok(map("y", "result")));
        assert_eq!(text(&["y=a=b"], &["y"]), Ok(map("y", "a=b")));
        assert!(text(&["result"], &["y", "z"]).is_err_and(|e| e.contains("y, z")));
        assert!(text(&["y=a", "b"], &["y"]).is_err_and(|e| e.contains("twice")));
    }

    #[test]
    fn a_file_may_have_a_part() {
        let split = |text| {
            let (file, part) = file_and_part(text);
            (file.display().to_string(), part)
        };
        assert_eq!(
            split("no-such.arrow#delay"),
            ("no-such.arrow".into(), Some("delay".into()))
        );
        assert_eq!(split("no-such.npy"), ("no-such.npy".into(), None));
    }

    #[test]
    fn a_bare_name_is_a_tokens() {
        let words = ["alice,group:lab", "uid:7", " cert:a b ,"].map(str::to_owned);
        assert_eq!(
            grantees(&words),
            ["token:alice", "group:lab", "uid:7", "cert:a b"]
        );
    }
}
