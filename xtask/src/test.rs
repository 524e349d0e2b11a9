//! `cargo xtask test`: sets up what the tests need and runs them all.
//!
//! What is set up lies under target/: a venv, an npm package, Julia, a wasm toolchain. Each is made once and
//! again when what it is made from changes. System packages are installed only by root, and it is said; anybody
//! else is told what to type. A step of a client or an example whose folder does not exist is left out.

use crate::environment::{cargo, command, env_or, venv, with_host};
use crate::setup::{data, go, julia, python_packages};
use crate::toolchain;
use crate::tools::{self, output, run};
use crate::{bindings, client_c, plugins, wheel};
use anyhow::{Result, ensure};
use std::process::Command;
use std::time::{Duration, Instant};

/// Something that steps need and that is not in the checkout.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Need {
    Wasm,
    Python,
    Data,
    Go,
    Julia,
    C,
    Programs,
}

impl Need {
    fn about(self) -> &'static str {
        match self {
            Self::Wasm => "a Rust toolchain for wasm",
            Self::Python => "Python packages in target/venv",
            Self::Data => "vega-datasets in target/node",
            Self::Go => "Go",
            Self::Julia => "Julia in target/julia",
            Self::C => "a C compiler, json-c and valgrind",
            Self::Programs => "the host and the examples, in release",
        }
    }

    fn prepare(self) -> Result<()> {
        match self {
            Self::Wasm => toolchain::setup().map(|toolchain| println!("{toolchain}")),
            Self::Python => python_packages(),
            Self::Data => data(),
            Self::Go => go(),
            Self::Julia => julia(),
            Self::C => client_c::toolchain(),
            Self::Programs => programs(),
        }
    }
}

struct Step {
    name: &'static str,
    about: &'static str,
    /// Without this folder of the checkout the step is left out.
    folder: &'static str,
    needs: &'static [Need],
    run: fn() -> Result<()>,
}

/// In the order in which they run: what is quick to fail comes early.
const STEPS: &[Step] = &[
    Step {
        name: "prebuilt",
        about: "plugins/prebuilt and the SDK's bindings fit the sources",
        folder: "plugins/prebuilt",
        needs: &[],
        run: || plugins::check_prebuilt().and_then(|()| bindings::check()),
    },
    Step {
        name: "plugins",
        about: "the SDK and the kernels, natively",
        folder: "plugins",
        needs: &[],
        run: native_plugins,
    },
    Step {
        name: "python",
        about: "stock pyarrow and real input against the host",
        folder: "tests/python",
        needs: &[Need::Python, Need::Data, Need::Programs],
        run: || pytest(&["tests/python", "--ignore=tests/python/test_examples.py"]),
    },
    Step {
        name: "rust",
        about: "all tests of the workspace",
        folder: "tests",
        needs: &[],
        run: || run(cargo("test").args(["--workspace", "--no-fail-fast"])),
    },
    Step {
        name: "workers",
        about: "the tests of engine and host once more, with kernels in worker processes",
        folder: "tests",
        needs: &[],
        run: || {
            let tests = [
                "--workspace",
                "--test",
                "engine",
                "--test",
                "host",
                "--no-fail-fast",
            ];
            run(cargo("test").args(tests).env("STRAIT_TEST_WORKERS", "1"))
        },
    },
    Step {
        name: "rebuilt",
        about: "the plugins, built anew, through the same tests",
        folder: "plugins",
        needs: &[Need::Wasm, Need::Python, Need::Data, Need::Programs],
        run: rebuilt_plugins,
    },
    Step {
        name: "memory",
        about: "the crate that maps memory, with the address sanitizer",
        folder: "host/memory",
        needs: &[],
        run: sanitized_memory,
    },
    Step {
        name: "client-python",
        about: "the Python client",
        folder: "clients/python/tests",
        needs: &[Need::Python, Need::Programs],
        run: || pytest(&["clients/python"]),
    },
    Step {
        name: "wheel",
        about: "the Python client with the host's program: from the wheel to a call",
        folder: "clients/python",
        needs: &[Need::Python, Need::Programs],
        run: wheel::test,
    },
    Step {
        name: "client-go",
        about: "the Go client: gofmt, vet, tests with the race detector",
        folder: "clients/go",
        needs: &[Need::Go, Need::Programs],
        run: client_go,
    },
    Step {
        name: "client-julia",
        about: "the Julia client",
        folder: "clients/julia/test",
        needs: &[Need::Julia, Need::Programs],
        run: client_julia,
    },
    Step {
        name: "client-c",
        about: "libstrait: header, symbols, programs in C and C++, also under sanitizers and valgrind",
        folder: "clients/c/tests",
        needs: &[Need::Python, Need::C, Need::Programs],
        run: client_c::test,
    },
    Step {
        name: "conformance",
        about: "every client language through the same cases",
        folder: "tests/conformance",
        needs: &[Need::Python, Need::C, Need::Go, Need::Julia, Need::Programs],
        run: || pytest(&["tests/conformance"]),
    },
    Step {
        name: "examples",
        about: "every program in examples/",
        folder: "examples",
        needs: &[Need::Python, Need::Go, Need::Julia, Need::Programs],
        run: examples,
    },
];

/// The steps and what each one does, for the usage.
pub(crate) fn list() -> String {
    let line = |step: &Step| format!("    {:<16}{}\n", step.name, step.about);
    STEPS.iter().map(line).collect()
}

/// Runs the steps of these names, all without names; fails when one of them fails, at the end.
pub(crate) fn test(names: &[&str]) -> Result<()> {
    for name in names {
        let known = STEPS.iter().any(|step| step.name == *name);
        ensure!(known, "there is no step {name}; the steps are\n{}", list());
    }
    let named = |step: &&Step| names.is_empty() || names.contains(&step.name);
    let (chosen, left_out): (Vec<&Step>, Vec<&Step>) = STEPS
        .iter()
        .filter(named)
        .partition(|step| tools::root().join(step.folder).is_dir());
    let needs = prepare(&chosen);
    let outcomes: Vec<Outcome> = chosen
        .iter()
        .map(|step| {
            let missing = needs
                .iter()
                .find(|(need, outcome)| step.needs.contains(need) && outcome.failure.is_some());
            match missing {
                None => Outcome::of(step.name, step.about, step.run),
                Some((need, _)) => Outcome::without(step.name, need.about()),
            }
        })
        .collect();
    heading("summary", "");
    for outcome in needs.iter().map(|(_, outcome)| outcome).chain(&outcomes) {
        println!("{outcome}");
    }
    for step in left_out {
        println!("{:<16} left out: no {}", step.name, step.folder);
    }
    let failed = outcomes.iter().filter(|o| o.failure.is_some()).count();
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    ensure!(failed == 0, "{failed} of {} steps failed", outcomes.len());
    Ok(())
}

fn prepare(steps: &[&Step]) -> Vec<(Need, Outcome)> {
    let mut needs: Vec<Need> = Vec::new();
    for need in steps.iter().flat_map(|step| step.needs) {
        if !needs.contains(need) {
            needs.push(*need);
        }
    }
    // What takes minutes comes after what fails in seconds.
    needs.sort_by_key(|need| *need == Need::Programs);
    needs
        .into_iter()
        .map(|need| (need, Outcome::of("setup", need.about(), || need.prepare())))
        .collect()
}

/// How a step or a part of the setup went.
struct Outcome {
    name: &'static str,
    about: &'static str,
    took: Duration,
    failure: Option<String>,
}

impl Outcome {
    fn of(name: &'static str, about: &'static str, run: impl FnOnce() -> Result<()>) -> Self {
        heading(name, about);
        let start = Instant::now();
        let failure = run().err().map(|error| format!("{error:#}"));
        let outcome = Self {
            name,
            about,
            took: start.elapsed(),
            failure,
        };
        println!("{outcome}");
        outcome
    }

    fn without(name: &'static str, about: &'static str) -> Self {
        Self {
            name,
            about,
            took: Duration::ZERO,
            failure: Some(format!("could not be set up: {about}")),
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.took.as_secs_f64();
        match &self.failure {
            None => write!(
                f,
                "{:<16} ok     {seconds:6.1} s  {}",
                self.name, self.about
            ),
            Some(why) => write!(f, "{:<16} FAILED {seconds:6.1} s  {why}", self.name),
        }
    }
}

fn heading(name: &str, about: &str) {
    println!("\n== {name} {about}");
}

// What is set up.

/// Builds all that the steps start, and the guests that misbehave.
fn programs() -> Result<()> {
    run(cargo("build").args(["--workspace", "--bins", "--examples"]))?;
    run(cargo("test").args(["--workspace", "--test", "host", "guests::"]))
}

// What the steps do.

fn native_plugins() -> Result<()> {
    let root = tools::root();
    let mut cargo = command(env_or("CARGO", "cargo"));
    cargo
        .current_dir(root.join("plugins"))
        .args(["test", "--quiet", "--workspace", "--locked"])
        .env("CARGO_TARGET_DIR", root.join("target/plugins-native"));
    run(&mut cargo)
}

/// Builds the plugins and compares them with the prebuilt ones. The same compiler gives the same bytes, so that
/// what was tested is what was built. Another one gives others: then the tests that run kernels run again, with
/// its standard plugin in the place of the one that is built in.
fn rebuilt_plugins() -> Result<()> {
    plugins::build(plugins::Mode::Check)?;
    let root = tools::root();
    let built = root.join("target/plugins/standard.wasm");
    if tools::read(&built)? == tools::read(&root.join("plugins/prebuilt/standard.wasm"))? {
        println!("target/plugins/standard.wasm is plugins/prebuilt/standard.wasm, byte for byte");
        return Ok(());
    }
    println!(
        "another compiler, other bytes: running the tests of kernels with target/plugins/standard.wasm"
    );
    let mut tests = cargo("test");
    tests.args(["--workspace", "--test", "engine", "invocations::"]);
    let mut real_input = pytest_command(&["tests/python/test_real_input.py"]);
    for tests in [&mut tests, &mut real_input] {
        run(tests.env("STRAIT__SERVER__STANDARD_PLUGIN", &built))?;
    }
    Ok(())
}

/// The sanitizer is in every toolchain from rustup, behind an unstable option.
fn sanitized_memory() -> Result<()> {
    let root = tools::root();
    let mut cargo = command(env_or("CARGO", "cargo"));
    cargo
        .current_dir(root.join("host/memory"))
        .args([
            "test",
            "--target",
            "x86_64-unknown-linux-gnu",
            "--no-fail-fast",
        ])
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env("RUSTDOCFLAGS", "-Zsanitizer=address")
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", root.join("target/asan"));
    run(&mut cargo)
}

fn client_go() -> Result<()> {
    let go = |program: &str| {
        let mut go = with_host(command(program));
        go.current_dir(tools::root().join("clients/go"));
        go
    };
    let unformatted = output(go("gofmt").args(["-l", "."]))?;
    ensure!(unformatted.is_empty(), "run: gofmt -w {unformatted}");
    run(go("go").args(["vet", "./..."]))?;
    // Go would answer from its cache when only the host has changed.
    run(go("go").args(["test", "-race", "-count=1", "./..."]))
}

fn client_julia() -> Result<()> {
    let client = tools::root().join("clients/julia");
    let mut paths = client.clone().into_os_string();
    paths.push(":@stdlib");
    run(with_host(command("julia"))
        .arg("--startup-file=no")
        .arg(client.join("test/runtests.jl"))
        .env("JULIA_LOAD_PATH", paths))
}

fn examples() -> Result<()> {
    let pipeline = tools::root().join("examples/go-julia");
    let mut go = command("go");
    // Without cgo the program that embeds Julia is left out; `run` builds it, knowing where Julia is.
    go.args(["test", "-count=1", "./..."])
        .env("CGO_ENABLED", "0");
    run(go.current_dir(&pipeline))?;
    let mut julia = command("julia");
    julia.args(["--startup-file=no", "json_numbers_test.jl"]);
    run(julia.current_dir(&pipeline))?;
    pytest(&["tests/python/test_examples.py"])
}

fn pytest(arguments: &[&str]) -> Result<()> {
    run(&mut pytest_command(arguments))
}

fn pytest_command(arguments: &[&str]) -> Command {
    let mut pytest = with_host(command(venv().join("bin/python")));
    pytest.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]);
    // Where a test hangs is said, so that a run that is cut off tells something.
    pytest
        .args(["-o", "faulthandler_timeout=300"])
        .args(arguments);
    pytest
}
