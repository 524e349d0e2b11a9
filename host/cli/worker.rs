//! `worker`: the process that runs kernels for a host, which starts it and is at the other end of its stdin.

use std::io;
use std::os::fd::AsFd;

use clap::Args;
use strait_memory::process;

use super::failure::Failure;
use super::log;

#[derive(Debug, Args)]
pub(super) struct WorkerArgs {
    #[arg(long, default_value = "info")]
    log_level: String,
}

pub(super) fn worker(args: &WorkerArgs) -> Result<(), Failure> {
    log::start_for_a_host(&args.log_level)?;
    let failed = |error: io::Error| Failure::other("LINUX", format!("cannot begin: {error}"));
    process::raise_nofile().map_err(failed)?;
    let control = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    crate::worker::serve(control).map_err(|why| Failure::other("HOST", why))?;
    // Without a host nothing that still runs is for anybody.
    std::process::exit(0)
}
