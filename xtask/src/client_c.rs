//! libstrait: its header, generated and checked in, and what is installed.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::environment::{cargo, cargo_target, venv, with_host};
use crate::tools::{self, output, run};

fn header() -> PathBuf {
    tools::root().join("clients/c/include/strait.h")
}

/// The files of clients/c/src, in the order in which the header tells of them.
const SOURCES: [&str; 12] = [
    "version",
    "failure",
    "error",
    "tensor",
    "client",
    "segment",
    "call",
    "answer",
    "prepared",
    "stream",
    "operation",
    "finish",
];

fn generate() -> Result<Vec<u8>> {
    let folder = tools::root().join("clients/c");
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml"))
        .map_err(|error| anyhow!("clients/c/cbindgen.toml: {error}"))?;
    let mut builder = cbindgen::Builder::new().with_config(config);
    // What stands in the places of pointers is in `pointer`. `lib` has modules alone: with it cbindgen would find them all twice.
    for name in SOURCES.iter().chain(&["pointer"]) {
        builder = builder.with_src(folder.join(format!("src/{name}.rs")));
    }
    for file in tools::files_under(&folder, Path::new("src"))? {
        let name = file
            .file_stem()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        ensure!(
            ["lib", "pointer"].contains(&name) || SOURCES.contains(&name),
            "{} is not in SOURCES of {}",
            file.display(),
            file!()
        );
    }
    let mut text = Vec::new();
    builder.generate()?.write(&mut text);
    let text = String::from_utf8(text).context("the header is not UTF-8")?;
    Ok(with_pointers(&text).into_bytes())
}

/// Pointers in the place of the names that cbindgen gives to Rust's types of them: `const char *` for `Text`.
fn with_pointers(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some((start, line)) = text
        .match_indices("typedef ")
        .map(|(at, _)| (at, text[at..].lines().next().unwrap_or_default()))
        .find(|(_, line)| line.contains('*') && line.ends_with(';'))
    {
        let (pointer, name) = line.rsplit_once('*').unwrap_or_default();
        let pointer = format!("{}*", pointer.trim_start_matches("typedef "));
        let (name, end) = (name.trim_end_matches(';').to_owned(), start + line.len());
        // With the comment above it.
        let start = text[..start].rfind("/**").unwrap_or(start);
        text.replace_range(start..end, "");
        let part = |c: char| c.is_alphanumeric() || c == '_';
        let mut replaced = String::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&format!("{name} ")) {
            let whole = !rest[..at].ends_with(part);
            replaced.push_str(&rest[..at]);
            replaced.push_str(if whole {
                &pointer
            } else {
                &rest[at..=at + name.len()]
            });
            rest = &rest[at + name.len() + 1..];
        }
        replaced.push_str(rest);
        text = replaced;
    }
    while text.contains("\n\n\n") {
        text = text.replace("\n\n\n", "\n\n");
    }
    text
}

/// Generates the header.
pub(crate) fn write_header() -> Result<()> {
    tools::write(&header(), &generate()?)
}

/// Fails if it is not what the sources give.
pub(crate) fn check_header() -> Result<()> {
    if tools::read(&header())? != generate()? {
        bail!("clients/c/include/strait.h does not fit clients/c/src: run: cargo xtask header");
    }
    Ok(())
}

/// The version of the interface, as the header has it: the number in the shared library's name.
fn abi_version() -> Result<String> {
    let text = String::from_utf8(tools::read(&header())?)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("#define STRAIT_ABI_VERSION "));
    Ok(line
        .context("strait.h says no STRAIT_ABI_VERSION")?
        .trim()
        .to_owned())
}

/// What a program that links libstrait.a needs besides, as rustc says: `-lgcc_s -lutil -lrt …`.
fn static_libraries() -> Result<String> {
    let mut rustc = cargo("rustc");
    rustc.args([
        "--package",
        "strait-c",
        "--crate-type",
        "staticlib",
        "--",
        "--print",
        "native-static-libs",
    ]);
    let said = rustc.output().context("cannot start cargo")?;
    let said = String::from_utf8_lossy(&said.stderr);
    let line = said
        .lines()
        .find_map(|line| line.split_once("native-static-libs: "));
    Ok(line
        .with_context(|| format!("rustc does not say what libstrait.a needs:\n{said}"))?
        .1
        .to_owned())
}

/// Builds libstrait and installs it below `prefix`.
pub(crate) fn install(prefix: &Path) -> Result<()> {
    let prefix = std::path::absolute(prefix)?;
    run(cargo("build").args(["--package", "strait-c"]))?;
    let built = cargo_target().join("release");
    let soname = format!("libstrait.so.{}", abi_version()?);
    let version = env!("CARGO_PKG_VERSION");
    let lib = prefix.join("lib");
    for (from, to) in [
        ("libstrait_c.so", soname.as_str()),
        ("libstrait_c.a", "libstrait.a"),
    ] {
        // Under another name first: a program that runs keeps the file that it has mapped.
        let new = lib.join(format!("{to}.new"));
        tools::write(&new, &tools::read(&built.join(from))?)?;
        std::fs::rename(&new, lib.join(to)).with_context(|| format!("cannot install {to}"))?;
    }
    let link = lib.join("libstrait.so");
    if link.symlink_metadata().is_ok() {
        std::fs::remove_file(&link)
            .with_context(|| format!("cannot replace {}", link.display()))?;
    }
    symlink(&soname, &link).with_context(|| format!("cannot make {}", link.display()))?;
    tools::write(&prefix.join("include/strait.h"), &tools::read(&header())?)?;
    let template = String::from_utf8(tools::read(&tools::root().join("clients/c/strait.pc.in"))?)?;
    let prefix_text = prefix.to_str().context("the prefix is not UTF-8")?;
    let filled = template
        .replace("@prefix@", prefix_text)
        .replace("@version@", version)
        .replace("@static@", &static_libraries()?);
    tools::write(&lib.join("pkgconfig/strait.pc"), filled.as_bytes())?;
    println!("libstrait {version} is below {}", prefix.display());
    Ok(())
}

/// The shared library exports our functions and nothing else, under the name that the header's version gives.
fn check_symbols(prefix: &Path) -> Result<()> {
    let library = prefix.join("lib/libstrait.so");
    let symbols = output(
        Command::new("nm")
            .args(["-D", "--defined-only", "--format=just-symbols"])
            .arg(&library),
    )?;
    let foreign: Vec<&str> = symbols
        .lines()
        .filter(|symbol| !symbol.starts_with("strait_"))
        .collect();
    ensure!(foreign.is_empty(), "libstrait.so exports {foreign:?}");
    let text = String::from_utf8(tools::read(&header())?)?;
    for symbol in symbols.lines() {
        ensure!(
            text.contains(&format!("{symbol}(")),
            "libstrait.so exports {symbol}, which strait.h does not declare"
        );
    }
    let dynamic = output(Command::new("readelf").arg("-d").arg(&library))?;
    let soname = format!("[libstrait.so.{}]", abi_version()?);
    ensure!(
        dynamic.contains(&soname),
        "the library's name is not {soname}:\n{dynamic}"
    );
    println!("{} functions, and no other symbol", symbols.lines().count());
    Ok(())
}

/// A compiler, pkg-config, the JSON library of the conformance driver, and valgrind with what it needs of the C library.
pub(crate) fn toolchain() -> Result<()> {
    for (program, package) in [
        ("cc", "gcc"),
        ("c++", "g++"),
        ("pkg-config", "pkg-config"),
        ("valgrind", "valgrind"),
        ("nm", "binutils"),
    ] {
        crate::setup::system(program, package)?;
    }
    if output(Command::new("pkg-config").args(["--exists", "json-c"])).is_err() {
        crate::setup::install("libjson-c-dev")?;
    }
    // What valgrind knows the C library by.
    if !Path::new("/usr/lib/debug/.build-id").exists() {
        crate::setup::install("libc6-dbg")?;
    }
    Ok(())
}

pub(crate) fn prefix() -> PathBuf {
    tools::root().join("target/client-c")
}

/// The step of `cargo xtask test`.
pub(crate) fn test() -> Result<()> {
    check_header()?;
    install(&prefix())?;
    check_symbols(&prefix())?;
    let mut pytest = with_host(crate::environment::command(venv().join("bin/python")));
    pytest.args([
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "clients/c/tests",
    ]);
    run(&mut pytest)
}
