//! A Rust toolchain that can build for wasm32-unknown-unknown.
//!
//! The first that is there: the target of the rustc on the PATH; a private toolchain under
//! `target/wasm-toolchain`. [`setup`] makes one: by `rustup target add`, or, where rustup cannot download, from
//! Debian's `rustc-web` packages. Those bring a rustc and the standard library's source of the same version;
//! the library for wasm is built from that source once. Nothing is installed system-wide.

use crate::tools::{self, output, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-unknown-unknown";
/// Written when all of a private toolchain is in place.
const COMPLETE: &str = "complete";
/// wit-bindgen's output and the SDK need this rustc.
const RUSTC_MINOR_MIN: u32 = 95;

/// What a cargo for wasm needs in its environment.
#[derive(Debug)]
pub(crate) struct Toolchain {
    /// `rustc --version`.
    pub(crate) version: String,
    /// Its sysroot.
    pub(crate) sysroot: PathBuf,
    /// A private toolchain's rustc, its shared libraries, and a linker from elsewhere; `None`: rustup's.
    private: Option<Private>,
}

#[derive(Debug)]
struct Private {
    rustc: PathBuf,
    libraries: PathBuf,
    linker: PathBuf,
}

impl std::fmt::Display for Toolchain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "wasm toolchain: {} in {}",
            self.version,
            self.sysroot.display()
        )
    }
}

impl Toolchain {
    /// `cargo`, set up to build for wasm in `folder` with these flags for rustc.
    pub(crate) fn cargo(&self, folder: &Path, rustflags: &[String]) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(folder);
        // They would take precedence over what is set here, or end up in the output: an incremental
        // build has other bytes.
        for name in [
            "CARGO_INCREMENTAL",
            "RUSTFLAGS",
            "CARGO_BUILD_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "RUSTC_WRAPPER",
        ] {
            cargo.env_remove(name);
        }
        cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\u{1f}"));
        if let Some(private) = &self.private {
            cargo
                .env("RUSTC", &private.rustc)
                .env("LD_LIBRARY_PATH", &private.libraries)
                .env(
                    "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER",
                    &private.linker,
                );
        }
        cargo
    }

    /// Flags that take this machine's paths out of what is compiled in `folder`.
    pub(crate) fn remap(&self, folder: &Path) -> Vec<String> {
        let mut paths = vec![
            (folder.to_path_buf(), "/strait"),
            (self.sysroot.clone(), "/rust"),
        ];
        let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
        paths.extend(cargo_home.or(home).map(|path| (path, "/cargo")));
        paths
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
            .collect()
    }
}

/// The toolchain to build with.
pub(crate) fn find() -> Result<Toolchain> {
    match find_rustup()? {
        Some(toolchain) => Ok(toolchain),
        None => find_private()?.context("no wasm toolchain: run: cargo xtask setup"),
    }
}

/// Makes sure that there is one.
pub(crate) fn setup() -> Result<Toolchain> {
    if let Ok(toolchain) = find() {
        return Ok(toolchain);
    }
    let by_rustup = Command::new("rustup")
        .args(["target", "add", TARGET])
        .output();
    let why_not = match &by_rustup {
        Ok(output) if output.status.success() => return find(),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_string(),
        Err(error) => format!("cannot start rustup: {error}"),
    };
    eprintln!("rustup gives no {TARGET} here; taking Debian's rustc-web into a private folder");
    install_private().with_context(|| {
        format!(
            "no wasm toolchain could be set up.\n\
             Either make `rustup target add {TARGET}` work; it said:\n{why_not}\n\
             or this, which needs Debian 12 or later:"
        )
    })?;
    find()
}

fn find_rustup() -> Result<Option<Toolchain>> {
    let rustc = || Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let libraries = output(rustc().args(["--print", "target-libdir", "--target", TARGET]))?;
    if !Path::new(libraries.trim()).is_dir() {
        return Ok(None);
    }
    let sysroot = output(rustc().args(["--print", "sysroot"]))?.trim().into();
    Ok(Some(Toolchain {
        version: version(&mut rustc())?,
        sysroot,
        private: None,
    }))
}

fn version(rustc: &mut Command) -> Result<String> {
    Ok(output(rustc.arg("--version"))?.trim().to_string())
}

fn private_folder() -> PathBuf {
    tools::root().join("target/wasm-toolchain")
}

fn find_private() -> Result<Option<Toolchain>> {
    let Ok(entries) = std::fs::read_dir(private_folder()) else {
        return Ok(None);
    };
    let complete = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join(COMPLETE).is_file());
    let newest = complete
        .max_by_key(|path| version_key(&path.file_name().unwrap_or_default().to_string_lossy()));
    newest.map(|prefix| private_at(&prefix)).transpose()
}

/// "1.96.0+dfsg1-1~deb12u2" as numbers, so that 1.100 is newer than 1.96.
fn version_key(version: &str) -> Vec<u32> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

fn private_at(prefix: &Path) -> Result<Toolchain> {
    let private = Private {
        rustc: prefix.join("usr/bin/rustc"),
        libraries: prefix
            .join("usr/lib")
            .join(format!("{}-linux-gnu", std::env::consts::ARCH)),
        linker: find_linker()?,
    };
    let version = version(Command::new(&private.rustc).env("LD_LIBRARY_PATH", &private.libraries))?;
    Ok(Toolchain {
        version,
        sysroot: prefix.join("usr"),
        private: Some(private),
    })
}

/// Debian's rustc has no linker for wasm; rustup's toolchains do, whatever targets they have.
fn find_linker() -> Result<PathBuf> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let host = format!(
        "lib/rustlib/{}-unknown-linux-gnu/bin/rust-lld",
        std::env::consts::ARCH
    );
    let bundled = Path::new(sysroot.trim()).join(host);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(bundled)
        .chain(std::env::split_paths(&path).map(|folder| folder.join("wasm-ld")))
        .find(|linker| linker.is_file())
        .context("no linker for wasm: install a Rust toolchain by rustup (it has rust-lld), or Debian's package lld")
}

fn install_private() -> Result<()> {
    let packages = Packages::find()?;
    let folder = private_folder();
    let prefix = folder.join(&packages.version);
    let partial = folder.join(format!("partial-{}", std::process::id()));
    std::fs::create_dir_all(&partial)
        .with_context(|| format!("cannot create {}", partial.display()))?;
    let installed = packages
        .extract_into(&partial)
        .and_then(|()| build_std(&partial));
    if let Err(error) = installed {
        // What is left would only take up room; the error is what matters.
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    tools::write(&partial.join(COMPLETE), packages.version.as_bytes())?;
    if prefix.exists() {
        std::fs::remove_dir_all(&prefix)
            .with_context(|| format!("cannot replace {}", prefix.display()))?;
    }
    std::fs::rename(&partial, &prefix)
        .with_context(|| format!("cannot create {}", prefix.display()))
}

/// Debian packages of one rustc.
struct Packages {
    version: String,
    names: Vec<String>,
}

impl Packages {
    fn find() -> Result<Self> {
        let version = match candidate("rustc-web")? {
            Some(version) => version,
            None => {
                update_lists()?;
                candidate("rustc-web")?.context(
                    "apt knows no package rustc-web: it is in Debian's (security) archive since Debian 12",
                )?
            }
        };
        let numbers = version_key(&version);
        let [1, minor, ..] = numbers[..] else {
            bail!("rustc-web has version {version}, expected 1.x");
        };
        if minor < RUSTC_MINOR_MIN {
            bail!("rustc-web is {version}; the plugins need 1.{RUSTC_MINOR_MIN} or later");
        }
        let std = format!("libstd-rust-web-1.{minor}");
        let depends = output(Command::new("apt-cache").args(["depends", &std]))?;
        let llvm = depends
            .split_whitespace()
            .find(|word| word.starts_with("libllvm"))
            .with_context(|| format!("{std} names no libllvm among its dependencies"))?;
        let exact = |name: &str| format!("{name}={version}");
        let names = vec![
            exact("rustc-web"),
            exact("rust-web-src"),
            exact("libstd-rust-web-dev"),
            exact(&std),
            llvm.to_string(),
        ];
        Ok(Self { version, names })
    }

    /// Downloads and unpacks them. `apt-get download` takes only files whose hashes stand in lists that are
    /// signed by Debian's keys; unsigned sources would need an option that is not given here.
    fn extract_into(&self, prefix: &Path) -> Result<()> {
        let downloads = prefix.join("downloads");
        std::fs::create_dir_all(&downloads)?;
        let download = || {
            let mut apt = Command::new("apt-get");
            apt.args(["download", "-qq", "-o", "APT::Sandbox::User=root"])
                .args(&self.names);
            run(apt.current_dir(&downloads))
        };
        if let Err(error) = download() {
            eprintln!("{error:#}\nthe package lists may be old");
            update_lists()?;
            download()?;
        }
        for entry in std::fs::read_dir(&downloads)? {
            let package = entry?.path();
            if package
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("rust-web-src_"))
            {
                unpack_library_source(&package, prefix)?;
            } else {
                run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(prefix))?;
            }
        }
        std::fs::remove_dir_all(&downloads)?;
        Ok(())
    }
}

/// The version of a package that apt would install.
fn candidate(package: &str) -> Result<Option<String>> {
    let policy = output(
        Command::new("apt-cache")
            .args(["policy", package])
            .env("LC_ALL", "C"),
    )
    .context("this needs apt")?;
    let line = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"));
    Ok(line
        .map(str::trim)
        .filter(|version| *version != "(none)")
        .map(str::to_string))
}

fn update_lists() -> Result<()> {
    let user = output(Command::new("id").arg("-u"))?;
    if user.trim() != "0" {
        bail!("apt's package lists are missing or old: run: sudo apt-get update");
    }
    eprintln!("running apt-get update");
    run(Command::new("apt-get").args(["update", "-qq"]))
}

/// The package holds the source of the whole compiler; a tenth of it is the library.
fn unpack_library_source(package: &Path, prefix: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let stream = archive.stdout.take().context("dpkg-deb has no output")?;
    let patterns = ["./usr/src/rustc-*/library", "./usr/lib/rustlib/src"];
    run(Command::new("tar")
        .arg("-x")
        .arg("-C")
        .arg(prefix)
        .arg("--wildcards")
        .args(patterns)
        .stdin(stream))?;
    if !archive.wait()?.success() {
        bail!("dpkg-deb could not unpack {}", package.display());
    }
    Ok(())
}

/// Builds the standard library for wasm and puts it where rustc looks for it.
fn build_std(prefix: &Path) -> Result<()> {
    let work = prefix.join("std");
    let manifest =
        "[package]\nname = \"empty\"\nedition = \"2024\"\n[lib]\npath = \"lib.rs\"\n[workspace]\n";
    tools::write(&work.join("Cargo.toml"), manifest.as_bytes())?;
    tools::write(&work.join("lib.rs"), b"#![no_std]\n")?;
    let toolchain = private_at(prefix)?;
    eprintln!("building the standard library for wasm (once, about a minute)");
    // Plugins are linked with LTO, which needs the bitcode.
    let mut flags = vec![
        "-Ctarget-feature=+simd128,+bulk-memory".to_string(),
        "-Cembed-bitcode=yes".to_string(),
    ];
    flags.extend(toolchain.remap(&work));
    let mut cargo = toolchain.cargo(&work, &flags);
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "--target",
            TARGET,
            "-Zbuild-std=std,panic_abort",
        ])
        .env("CARGO_TARGET_DIR", work.join("target"))
        // Building the library needs an unstable option; plugins use none.
        .env("RUSTC_BOOTSTRAP", "1");
    run(&mut cargo)?;
    let libraries = prefix.join("usr/lib/rustlib").join(TARGET).join("lib");
    std::fs::create_dir_all(&libraries)?;
    for entry in std::fs::read_dir(work.join("target").join(TARGET).join("release/deps"))? {
        let file = entry?;
        let name = file.file_name().to_string_lossy().into_owned();
        if name.ends_with(".rlib") && !name.starts_with("libempty") {
            std::fs::copy(file.path(), libraries.join(name))?;
        }
    }
    std::fs::remove_dir_all(&work)?;
    Ok(())
}
