//! Everything a developer would otherwise type.

mod bindings;
mod client_c;
mod environment;
mod plugins;
mod setup;
mod test;
mod toolchain;
mod tools;
mod wheel;

use anyhow::{Result, bail};
use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask COMMAND

  setup                     make sure that a wasm toolchain exists: rustup's target, or a private one under target/
  build-plugins [--check]   build the plugins into target/plugins and plugins/prebuilt
                            (--check: into target/plugins only, and fail if plugins/prebuilt does not match)
  check-prebuilt            fail if plugins/prebuilt does not match the sources; needs no toolchain
  bindings [--check]        generate the SDK's bindings from wit/ (--check: fail if they differ)
  header [--check]          generate clients/c/include/strait.h from clients/c/src (--check: fail if it differs)
  install-c --prefix DIR    build libstrait and put it, its header and its pkg-config file below DIR
  wheel                     build a Python wheel with the client and the `strait` program into target/dist
  test [STEP...]            set up what the tests need under target/ and run them, all or these steps:
";

fn usage() -> String {
    USAGE.to_string() + &test::list()
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["setup"] => toolchain::setup().map(|toolchain| println!("{toolchain}")),
        ["build-plugins"] => plugins::build(plugins::Mode::Install),
        ["build-plugins", "--check"] => plugins::build(plugins::Mode::Check),
        ["check-prebuilt"] => plugins::check_prebuilt(),
        ["bindings"] => bindings::write(),
        ["bindings", "--check"] => bindings::check(),
        ["header"] => client_c::write_header(),
        ["header", "--check"] => client_c::check_header(),
        ["install-c", "--prefix", prefix] => client_c::install(prefix.as_ref()),
        ["wheel"] => wheel::build(),
        ["test", ref steps @ ..] => test::test(steps),
        [] | ["help" | "--help" | "-h"] => {
            print!("{}", usage());
            Ok(())
        }
        _ => bail!("unknown command: {}\n\n{}", arguments.join(" "), usage()),
    }
}
