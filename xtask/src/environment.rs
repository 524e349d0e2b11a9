//! Commands in the checkout: with what was set up, and without the user's settings.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use crate::tools;

/// A command in the checkout. What was set up goes before what the machine has, and no setting of the user's
/// for strait is seen.
pub(crate) fn command(program: impl Into<OsString>) -> Command {
    let root = tools::root();
    let mut command = Command::new(program.into());
    let settings = std::env::vars_os().map(|(name, _)| name);
    for name in settings.filter(|name| name.to_string_lossy().starts_with("STRAIT_")) {
        command.env_remove(name);
    }
    let own = [venv().join("bin"), root.join("target/julia/bin")];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path)));
    command
        .current_dir(&root)
        .env(
            "PATH",
            path.expect("parts of a PATH, and folders under the checkout"),
        )
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("JULIA_DEPOT_PATH", root.join("target/julia-depot"))
        // Go would download another version of itself.
        .env("GOTOOLCHAIN", "local");
    command
}

/// Cargo in the one profile that tests, demo and command line share.
pub(crate) fn cargo(what: &str) -> Command {
    let mut cargo = command(env_or("CARGO", "cargo"));
    cargo.args([what, "--release"]);
    cargo
}

/// Tells a test where to find the programs and the data set that were made.
pub(crate) fn with_host(mut command: Command) -> Command {
    let target = cargo_target();
    let release = target.join("release");
    command
        .env("STRAIT_BIN", release.join("strait"))
        .env("STRAIT_IPC_SAMPLES", release.join("examples/ipc_samples"))
        .env("STRAIT_TEST_PLUGINS", target.join("tmp/guests"))
        .env("STRAIT_FLIGHTS", flights())
        .env("STRAIT__ENGINE__CACHE", target.join("tmp/compiled"))
        .env("CARGO_TARGET_DIR", &target);
    command
}

pub(crate) fn cargo_target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    tools::root().join(target.unwrap_or_else(|| "target".into()))
}

pub(crate) fn venv() -> PathBuf {
    tools::root().join("target/venv")
}

pub(crate) fn env_or(name: &str, default: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| default.into())
}

pub(crate) fn flights() -> PathBuf {
    tools::root().join("target/node/node_modules/vega-datasets/data/flights-200k.arrow")
}
