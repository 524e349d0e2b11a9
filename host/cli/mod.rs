//! The command line. A command imports only what stands below the line; only this file imports commands.
//!
//! ```text
//! main ─▶ serve                     a host in the foreground
//!      ├▶ tensors: put ls get rm    ┐ over the data socket, by strait-client
//!      ├▶ kernels: kernels call     │
//!      ├▶ share: share unshare      │
//!      ├▶ limits, workers, plugins  ┘
//!      ├▶ token                     the file of tokens, without a host
//!      ├▶ inspect                   what is in a file, a flight or a plugin
//!      ├▶ run                       a host of its own in this process, no sockets
//!      ├▶ doctor                    what this machine lacks for a host, and what to change
//!      ├▶ demo                      a host, a producer and a consumer, each a process
//!      └▶ worker                    what a host starts for its kernels; not for people
//! ──────────────────────────────────────────────────────────────────────────────────────────
//! connection: --address and its like    arguments: ports, parameters, FILE#COLUMN
//! hosting: settings, a host in this process    directory: where the sockets are, and whose
//! inputs: tensor files and stdin    staging: output files that appear when they are complete
//! signature: kernels for people    log: lines on stderr
//! output: stdout, tables    progress: bars on a terminal
//! tcp: Flight over TCP, and who is let in there    reload: files that are read again
//! failure: what went wrong, as text, JSON and exit code
//! ```

mod arguments;
mod connection;
mod demo;
mod directory;
mod doctor;
mod failure;
mod hosting;
mod inputs;
mod inspect;
mod kernels;
mod limits;
mod log;
mod output;
mod plugins;
mod progress;
mod reload;
mod run;
mod serve;
mod share;
mod signature;
mod staging;
mod tcp;
mod tensors;
mod token;
mod worker;
mod workers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::json;

use failure::{Exit, Failure};

const AFTER_HELP: &str = "\
A flight is a name in a host for one or more tensors in one piece of shared memory.

Exit codes:
  0  done
  1  anything else, such as a full disk or a bug in strait
  2  usage: unknown option, missing argument (text only, no JSON)
  3  bad input: a file, name, port, parameter or setting that is wrong
  4  the kernel failed, trapped, ran into a limit or its deadline, or was cancelled
  5  no host, or the connection to it broke
  6  `doctor`: a host cannot run here, or not with these settings
  130, 143  ended by SIGINT, SIGTERM (`serve` drains and exits 0)

Errors go to stderr: what went wrong, the reason (see docs/protocol.md), what to do, the request id.
With --json they also go to stdout, as {\"error\": {\"reason\", \"message\", \"exit_code\", ...}}.";

/// Sandboxed WebAssembly kernels over shared tensors, with no copy on the way in or out.
#[derive(Debug, Parser)]
#[command(name = "strait", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show strait at work on this machine: a producer, a sandboxed kernel and a consumer, without a copy.
    Demo(demo::DemoArgs),
    /// Run a host in the foreground until SIGTERM or SIGINT.
    Serve(serve::ServeArgs),
    /// Check whether this machine and user have what a host needs; say what to change, and why.
    Doctor(doctor::DoctorArgs),
    /// Run a kernel on files, without a host.
    Run(run::RunArgs),
    /// Run a kernel on the host's tensors.
    Call(kernels::CallArgs),
    /// List kernels with their ports and parameters.
    Kernels(kernels::KernelsArgs),
    /// Copy the tensors of a file into a new flight.
    Put(tensors::PutArgs),
    /// Write the tensors of a flight to a file.
    Get(tensors::GetArgs),
    /// Show what is in a tensor file, a flight or a plugin: dtypes, shapes, layout, values.
    Inspect(inspect::InspectArgs),
    /// List your flights and their tensors.
    Ls(tensors::LsArgs),
    /// Remove flights; their memory is freed once nobody uses it.
    Rm(tensors::RmArgs),
    /// Let others read a flight, or show who may.
    Share(share::ShareArgs),
    /// Let others no longer read a flight.
    Unshare(share::UnshareArgs),
    /// Show each principal's quotas and usage, and change quotas (operators only).
    Limits(limits::LimitsArgs),
    /// Show the worker processes (operators: all; others: their own).
    Workers(workers::WorkersArgs),
    /// Make, list and revoke the tokens by which clients are let in over TCP.
    Token(token::TokenArgs),
    /// List loaded plugins, show which are out of service, and re-enable them.
    Plugins(plugins::PluginsArgs),
    #[command(hide = true)]
    Worker(worker::WorkerArgs),
    #[command(hide = true)]
    DemoProducer(demo::RoleArgs),
    #[command(hide = true)]
    DemoConsumer(demo::RoleArgs),
}

/// Reads the command line, does it, and answers the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let (json, done) = match &command {
        Command::Demo(args) => (args.json, demo::demo(args)),
        Command::Serve(args) => (args.json, serve::serve(args)),
        Command::Doctor(args) => (args.json, doctor::doctor(args)),
        Command::Run(args) => (args.json, run::run(args)),
        Command::Call(args) => (args.connection.json, kernels::call(args)),
        Command::Kernels(args) => (args.connection.json, kernels::kernels(args)),
        Command::Put(args) => (args.connection.json, tensors::put(args)),
        Command::Get(args) => (args.connection.json, tensors::get(args)),
        Command::Inspect(args) => (args.connection.json, inspect::inspect(args)),
        Command::Ls(args) => (args.connection.json, tensors::ls(args)),
        Command::Rm(args) => (args.connection.json, tensors::rm(args)),
        Command::Share(args) => (args.connection.json, share::share(args)),
        Command::Unshare(args) => (args.connection.json, share::unshare(args)),
        Command::Limits(args) => (args.connection.json, limits::limits(args)),
        Command::Workers(args) => (args.connection.json, workers::workers(args)),
        Command::Plugins(args) => (args.connection.json, plugins::plugins(args)),
        Command::Token(args) => (args.json, token::token(args)),
        Command::Worker(args) => (false, worker::worker(args)),
        Command::DemoProducer(args) => (false, demo::producer(args)),
        Command::DemoConsumer(args) => (false, demo::consumer(args)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure, json),
    }
}

/// Tells on stderr, with `json` also on stdout.
fn report(failure: &Failure, json: bool) -> ExitCode {
    if failure.exit() != Exit::Quiet {
        output::complain(&failure.to_string());
        if json && !failure.is_answered() {
            // Stdout may be gone; the exit code says the rest.
            let _ = output::json(&json!({ "error": failure.to_json() }));
        }
    }
    ExitCode::from(failure.exit() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
