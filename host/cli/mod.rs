//! The command line.
//!
//! ```text
//! main ─▶ serve                     a host in the foreground
//!      ├▶ tensors: put ls get rm    ┐ over the data socket, by strait-client
//!      ├▶ kernels: kernels call     ┘
//!      ├▶ run                       a host of its own in this process, no sockets
//!      ├▶ doctor                    what this machine lacks for a host, and what to change
//!      └▶ demo                      a host, a producer and a consumer, each a process
//! failure: what went wrong, as text, JSON and exit code    output: stdout, tables, progress
//! staging: output files that appear when they are complete             log: lines on stderr
//! ```

mod demo;
mod doctor;
mod failure;
mod kernels;
mod log;
mod output;
mod run;
mod serve;
mod staging;
mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use strait_client::{Client, address};

use failure::Failure;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  anything that is not below, such as a full disk or a mistake of strait itself
  2  usage: unknown option, missing argument (text only, no JSON)
  3  bad input: a file, name, port, parameter or setting that does not fit
  4  the kernel failed, trapped, ran into a limit or its deadline, or was cancelled
  5  no host, or the connection to it broke
  6  `doctor`: a host cannot run here, or not as it is set
  130, 143  ended by SIGINT, SIGTERM (`serve` drains and exits 0)

Errors go to stderr: what, the reason code of docs/protocol.md, what to do, the request id.
With --json they also go to stdout, as {\"error\": {\"reason\", \"message\", \"exit_code\", ...}}.";

/// Sandboxed WebAssembly kernels over shared tensors, with no copy on the way in or out.
#[derive(Debug, Parser)]
#[command(name = "strait", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show it all on this machine: a producer, a sandboxed kernel, a consumer, no copy.
    Demo(demo::DemoArgs),
    /// Run a host in the foreground until SIGTERM or SIGINT.
    Serve(serve::ServeArgs),
    /// Try what a host needs of this machine and user; says what to change, and why.
    Doctor(doctor::DoctorArgs),
    /// Run a kernel on files, without a host.
    Run(run::RunArgs),
    /// Run a kernel on the host's tensors.
    Call(kernels::CallArgs),
    /// List kernels with their ports and parameters.
    Kernels(kernels::KernelsArgs),
    /// Give the host a tensor from a file.
    Put(tensors::PutArgs),
    /// Write a tensor of the host to a file.
    Get(tensors::GetArgs),
    /// List the host's tensors.
    Ls(tensors::LsArgs),
    /// Take tensors' names away; their memory goes when nobody uses it any more.
    Rm(tensors::RmArgs),
    #[command(hide = true)]
    DemoProducer(demo::RoleArgs),
    #[command(hide = true)]
    DemoConsumer(demo::RoleArgs),
}

/// Where the host is, and how to talk with it.
#[derive(Debug, Args)]
struct Connection {
    /// The host's directory as unix:///DIRECTORY [default: $STRAIT_ADDRESS, else the usual places].
    #[arg(long, value_name = "URL")]
    address: Option<String>,
    /// Names this request in the host's log and in errors: 1 to 64 of A-Z a-z 0-9 . _ : -
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
}

impl Connection {
    fn client(&self) -> Result<Client, Failure> {
        let directory = address::directory(self.address.as_deref())
            .map_err(|e| Failure::from(strait_client::Error::from(e)))?;
        let options = strait_client::Options {
            name: concat!("strait-cli/", env!("CARGO_PKG_VERSION")).into(),
            ..Default::default()
        };
        let client = Client::connect_with(&directory, &options)?;
        match &self.request_id {
            Some(id) => Ok(client.with_request_id(id)?),
            None => Ok(client),
        }
    }
}

/// Reads the command line, does it, and answers the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let (json, done) = match &command {
        Command::Demo(args) => (args.json, demo::demo(args)),
        Command::Serve(args) => (false, serve::serve(args)),
        Command::Doctor(args) => (args.json, doctor::doctor(args)),
        Command::Run(args) => (args.json, run::run(args)),
        Command::Call(args) => (args.connection.json, kernels::call(args)),
        Command::Kernels(args) => (args.connection.json, kernels::kernels(args)),
        Command::Put(args) => (args.connection.json, tensors::put(args)),
        Command::Get(args) => (args.connection.json, tensors::get(args)),
        Command::Ls(args) => (args.connection.json, tensors::ls(args)),
        Command::Rm(args) => (args.connection.json, tensors::rm(args)),
        Command::DemoProducer(args) => (false, demo::producer(args)),
        Command::DemoConsumer(args) => (false, demo::consumer(args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(json),
    }
}

/// `KEY=VALUE`, for clap.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it must have the form KEY=VALUE".to_owned()),
    }
}

/// The pairs of a repeatable option as a map.
fn unique(option: &str, pairs: &[(String, String)]) -> Result<BTreeMap<String, String>, Failure> {
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
fn outputs(
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
fn parameters(
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
    let real = |text: &str| text.trim().parse::<f64>().map(json_number);
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
        "number" => number(text).ok_or("a number, such as 3 or 1.5 (nan, inf and -inf count)"),
        "real" => real(text).map_err(|_| "a number, such as 1.5 (nan, inf and -inf count)"),
        "axis" => text
            .parse::<u32>()
            .map(Into::into)
            .map_err(|_| "an axis: 0, 1, ... from the slowest"),
        "reals" if text.trim().is_empty() => Ok(serde_json::Value::Array(Vec::new())),
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
    Some(integer.unwrap_or_else(|| json_number(real)))
}

/// The protocol's words for what JSON has no number for.
fn json_number(number: f64) -> serde_json::Value {
    let word = || {
        if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
    };
    serde_json::Number::from_f64(number).map_or_else(|| word().into(), Into::into)
}

/// `FILE#PART` in its parts. A file that is really called so is meant as a whole.
fn file_and_part(text: &str) -> (PathBuf, Option<String>) {
    match text.split_once('#') {
        Some((file, part)) if !Path::new(text).exists() => (file.into(), Some(part.to_owned())),
        _ => (text.into(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use serde_json::json;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

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
}
