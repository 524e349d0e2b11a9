//! The Python client as a wheel that brings the host's program, so that one `pip install` is all that a laptop needs.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::environment::{cargo, cargo_target, command, venv};
use crate::setup;
use crate::tools::{self, output, run};

/// Libraries of other packages than glibc and the compiler's own would have to be in the wheel.
const LIBRARIES: [&str; 7] = [
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
];

/// `cargo xtask wheel`.
pub(crate) fn build() -> Result<()> {
    run(cargo("build").args(["--bin", "strait"]))?;
    setup::python_packages()?;
    let wheel = pack(&tools::root().join("target/dist"))?;
    println!("{}", wheel.display());
    Ok(())
}

/// The wheel of the program that was built last, alone in `folder`.
fn pack(folder: &Path) -> Result<PathBuf> {
    let program = cargo_target().join("release/strait");
    let tag = format!("py3-none-{}", platform(&program)?);
    if folder.exists() {
        std::fs::remove_dir_all(folder)
            .with_context(|| format!("cannot replace {}", folder.display()))?;
    }
    let mut pip = pip();
    pip.args(["wheel", "--quiet", "--no-deps", "--no-build-isolation"])
        .arg("--wheel-dir")
        .arg(folder)
        .arg(tools::root().join("clients/python"))
        .env("STRAIT_WHEEL_PROGRAM", &program)
        .env("STRAIT_WHEEL_TAG", &tag);
    run(&mut pip)?;
    let [name] = &tools::files_under(folder, Path::new(""))?[..] else {
        bail!("{} has more than one wheel, or none", folder.display());
    };
    let wheel = folder.join(name);
    ensure!(
        name.to_string_lossy().ends_with(&format!("-{tag}.whl")),
        "{} is not tagged {tag}",
        wheel.display()
    );
    Ok(wheel)
}

fn pip() -> Command {
    let mut pip = command(venv().join("bin/python"));
    pip.args(["-m", "pip", "--disable-pip-version-check"]);
    pip
}

/// The platform tag that says what a program needs: the glibc of the youngest symbol that it links.
fn platform(program: &Path) -> Result<String> {
    let dump = |what: &str| {
        output(Command::new("objdump").arg(what).arg(program))
            .context("objdump (Debian's package binutils) says what the program needs")
    };
    let headers = dump("-p")?;
    ensure!(
        headers.contains("file format elf64-x86-64"),
        "{} is not a program for x86-64",
        program.display()
    );
    for library in headers
        .lines()
        .filter_map(|line| line.trim().strip_prefix("NEEDED"))
    {
        let library = library.trim();
        ensure!(
            LIBRARIES.contains(&library),
            "{} needs {library}, which not every Linux has",
            program.display()
        );
    }
    let minor = youngest_glibc(&dump("-T")?)
        .with_context(|| format!("{} links no glibc", program.display()))?;
    Ok(format!("manylinux_2_{minor}_x86_64"))
}

/// The highest minor version of glibc among the symbols' versions, as in `GLIBC_2.34`.
fn youngest_glibc(symbols: &str) -> Option<u32> {
    let versions = symbols.split("GLIBC_2.").skip(1);
    let minor = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit());
        text[..end.unwrap_or(text.len())].parse().ok()
    };
    versions.filter_map(minor).max()
}

/// Installs the wheel where there is nothing but Python and numpy, and runs a program there.
pub(crate) fn test() -> Result<()> {
    let tmp = tools::root().join("target/tmp/wheel");
    let wheel = pack(&tmp.join("dist"))?;
    let laptop = tmp.join("venv");
    run(command(venv().join("bin/python"))
        .args(["-m", "venv", "--clear", "--without-pip"])
        .arg(&laptop))?;
    let python = laptop.join("bin/python");
    run(pip()
        .arg("--python")
        .arg(&python)
        .args(["install", "--quiet", "--no-deps", "--no-index"])
        .arg(&wheel))?;
    lend_numpy(&python)?;
    let laptop_command = |program: PathBuf| {
        let mut command = command(program);
        // No Rust, and no cache of another host.
        command
            .env("PATH", laptop.join("bin"))
            .env("XDG_CACHE_HOME", tmp.join("cache"));
        command
    };
    run(laptop_command(laptop.join("bin/strait")).arg("--version"))?;
    run(laptop_command(python).arg(tools::root().join("clients/python/tests/from_the_wheel.py")))
}

/// numpy is the venv's of the other tests, for it would come from the network.
fn lend_numpy(python: &Path) -> Result<()> {
    let site = |python: &Path| {
        let text = "import sysconfig; print(sysconfig.get_path('platlib'), end='')";
        output(Command::new(python).args(["-c", text])).map(PathBuf::from)
    };
    let (from, to) = (site(&venv().join("bin/python"))?, site(python)?);
    for name in ["numpy", "numpy.libs"] {
        std::os::unix::fs::symlink(from.join(name), to.join(name))
            .with_context(|| format!("cannot link {name} into {}", to.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::youngest_glibc;

    #[test]
    fn the_youngest_symbol_counts() {
        let symbols = "DF *UND* (GLIBC_2.2.5) read\nDF *UND* (GLIBC_2.34) x\nDF *UND* (GLIBC_2.9) y\nDF (GCC_3.0) z";
        assert_eq!(youngest_glibc(symbols), Some(34));
        assert_eq!(
            youngest_glibc("DF *UND* (GLIBC_PRIVATE) x (GCC_4.2.0) y"),
            None
        );
    }
}
