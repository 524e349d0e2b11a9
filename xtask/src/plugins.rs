//! The plugins of this repository: build, install, and tell whether what is installed fits the sources.

use crate::toolchain::{self, Toolchain};
use crate::tools;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use wit_component::ComponentEncoder;

const MEND: &str = "run: cargo xtask build-plugins";

struct Plugin {
    /// The crate.
    package: &'static str,
    /// Its folder in plugins/.
    folder: &'static str,
    /// The component in target/plugins/ and plugins/prebuilt/; beside it lies a .json.
    component: &'static str,
}

const PLUGINS: &[Plugin] = &[
    Plugin {
        package: "standard",
        folder: "kernels",
        component: "standard.wasm",
    },
    Plugin {
        package: "moving-average",
        folder: "examples/moving-average",
        component: "examples/moving-average.wasm",
    },
    Plugin {
        package: "input-writer",
        folder: "tests/input-writer",
        component: "tests/input-writer.wasm",
    },
];

/// What a prebuilt component was made from.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Origin {
    /// Over all sources that go into it, plugins/Cargo.lock among them.
    source_sha256: String,
    wit_sha256: String,
    rustc: String,
    wit_bindgen: String,
    wit_component: String,
    component_sha256: String,
    component_bytes: usize,
}

/// What [`build`] does with what it built.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    /// Copies it to plugins/prebuilt/.
    Install,
    /// Compares it with plugins/prebuilt/.
    Check,
}

/// Builds all plugins into target/plugins/.
pub(crate) fn build(mode: Mode) -> Result<()> {
    let root = tools::root();
    let toolchain = toolchain::find()?;
    let modules = compile(&root, &toolchain)?;
    for plugin in PLUGINS {
        let module =
            tools::read(&modules.join(format!("{}.wasm", plugin.package.replace('-', "_"))))?;
        let component = ComponentEncoder::default()
            .module(&module)
            .and_then(|encoder| encoder.validate(true).encode())
            .with_context(|| format!("{} is no component for wit/kernel.wit", plugin.package))?;
        check_paths(plugin, &toolchain, &component)?;
        tools::write(
            &root.join("target/plugins").join(plugin.component),
            &component,
        )?;
        let origin = plugin.origin(&root, &toolchain.version, &component)?;
        match mode {
            Mode::Install => install(&root, plugin, &component, &origin)?,
            Mode::Check => compare(&root, plugin, &origin)?,
        }
        println!(
            "{}: {} bytes, sha256 {}",
            plugin.component, origin.component_bytes, origin.component_sha256
        );
    }
    Ok(())
}

/// Checks plugins/prebuilt/ against the sources without building.
pub(crate) fn check_prebuilt() -> Result<()> {
    let root = tools::root();
    for plugin in PLUGINS {
        let component = tools::read(&plugin.prebuilt(&root)).context(MEND)?;
        let installed = plugin.installed_origin(&root)?;
        let expected = plugin.origin(&root, &installed.rustc, &component)?;
        plugin.fits(&installed, &expected)?;
    }
    Ok(())
}

fn compile(root: &Path, toolchain: &Toolchain) -> Result<PathBuf> {
    let mut flags = plugin_flags(root)?;
    flags.extend(toolchain.remap(root));
    // Toolchains do not share folders: cargo would not notice a private one that changed in place.
    let target = root
        .join("target/plugins-build")
        .join(&tools::sha256(toolchain.to_string().as_bytes())[..16]);
    let mut cargo = toolchain.cargo(&root.join("plugins"), &flags);
    cargo
        .args([
            "build",
            "--quiet",
            "--locked",
            "--release",
            "--target",
            "wasm32-unknown-unknown",
        ])
        .env("CARGO_TARGET_DIR", &target);
    for plugin in PLUGINS {
        cargo.args(["--package", plugin.package]);
    }
    tools::run(&mut cargo)?;
    Ok(target.join("wasm32-unknown-unknown/release"))
}

/// The flags that every author of a plugin uses: those in plugins/.cargo/config.toml. (Flags from the environment
/// replace them, so that they are read and handed on.)
fn plugin_flags(root: &Path) -> Result<Vec<String>> {
    let path = root.join("plugins/.cargo/config.toml");
    let text = String::from_utf8(tools::read(&path)?)?;
    let quoted = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","));
    let flags: Vec<String> = quoted.map(str::to_string).collect();
    ensure!(
        !flags.is_empty(),
        "{}: expected rustflags, one quoted flag a line",
        path.display()
    );
    Ok(flags)
}

/// A path of the machine that built it would make a component differ from machine to machine.
fn check_paths(plugin: &Plugin, toolchain: &Toolchain, component: &[u8]) -> Result<()> {
    let home = std::env::var("HOME").unwrap_or_default();
    let root = tools::root();
    for path in [
        root.to_string_lossy(),
        toolchain.sysroot.to_string_lossy(),
        home.into(),
    ] {
        let found = path.len() > 1
            && component
                .windows(path.len())
                .any(|bytes| bytes == path.as_bytes());
        ensure!(!found, "{} contains the path {path}", plugin.component);
    }
    Ok(())
}

fn install(root: &Path, plugin: &Plugin, component: &[u8], origin: &Origin) -> Result<()> {
    tools::write(&plugin.prebuilt(root), component)?;
    let mut json = serde_json::to_string_pretty(origin)?;
    json.push('\n');
    tools::write(
        &plugin.prebuilt(root).with_extension("json"),
        json.as_bytes(),
    )
}

fn compare(root: &Path, plugin: &Plugin, built: &Origin) -> Result<()> {
    let installed = plugin.installed_origin(root)?;
    // Another compiler gives other bytes from the same sources.
    let same_tools = installed.rustc == built.rustc;
    let expected = Origin {
        rustc: installed.rustc.clone(),
        component_sha256: if same_tools {
            &built.component_sha256
        } else {
            &installed.component_sha256
        }
        .clone(),
        component_bytes: if same_tools {
            built.component_bytes
        } else {
            installed.component_bytes
        },
        source_sha256: built.source_sha256.clone(),
        wit_sha256: built.wit_sha256.clone(),
        wit_bindgen: built.wit_bindgen.clone(),
        wit_component: built.wit_component.clone(),
    };
    plugin.fits(&installed, &expected)
}

impl Plugin {
    fn prebuilt(&self, root: &Path) -> PathBuf {
        root.join("plugins/prebuilt").join(self.component)
    }

    fn installed_origin(&self, root: &Path) -> Result<Origin> {
        let path = self.prebuilt(root).with_extension("json");
        let json = tools::read(&path).context(MEND)?;
        serde_json::from_slice(&json)
            .with_context(|| format!("cannot read {}: {MEND}", path.display()))
    }

    fn origin(&self, root: &Path, rustc: &str, component: &[u8]) -> Result<Origin> {
        let wit = tools::files_under(root, Path::new("wit"))?;
        Ok(Origin {
            source_sha256: tools::sha256_of_files(root, self.sources(root)?)?,
            wit_sha256: tools::sha256_of_files(root, wit)?,
            rustc: rustc.to_string(),
            wit_bindgen: pinned("wit-bindgen-rust")?,
            wit_component: pinned("wit-component")?,
            component_sha256: tools::sha256(component),
            component_bytes: component.len(),
        })
    }

    fn sources(&self, root: &Path) -> Result<Vec<PathBuf>> {
        let plugins = Path::new("plugins");
        let mut files: Vec<PathBuf> = ["Cargo.toml", "Cargo.lock", ".cargo/config.toml"]
            .iter()
            .map(|name| plugins.join(name))
            .collect();
        for package in ["sdk", self.folder] {
            files.push(plugins.join(package).join("Cargo.toml"));
            files.extend(tools::files_under(
                root,
                &plugins.join(package).join("src"),
            )?);
        }
        Ok(files)
    }

    /// Fails with the first thing in which they differ.
    fn fits(&self, installed: &Origin, expected: &Origin) -> Result<()> {
        let pairs = [
            (
                "the sources",
                &installed.source_sha256,
                &expected.source_sha256,
            ),
            ("wit/", &installed.wit_sha256, &expected.wit_sha256),
            ("wit-bindgen", &installed.wit_bindgen, &expected.wit_bindgen),
            (
                "wit-component",
                &installed.wit_component,
                &expected.wit_component,
            ),
            (
                "the component",
                &installed.component_sha256,
                &expected.component_sha256,
            ),
        ];
        for (what, installed, expected) in pairs {
            if installed != expected {
                let component = self.component;
                bail!(
                    "plugins/prebuilt/{component} does not fit {what}: {installed} recorded, {expected} found; {MEND}"
                );
            }
        }
        Ok(())
    }
}

/// The exact version of a dependency of this very crate.
fn pinned(dependency: &str) -> Result<String> {
    let line = include_str!("../Cargo.toml").lines().find_map(|line| {
        line.strip_prefix(dependency)?
            .trim()
            .strip_prefix("= \"=")?
            .strip_suffix('"')
            .map(str::to_string)
    });
    line.with_context(|| format!("xtask/Cargo.toml pins no exact version of {dependency}"))
}
