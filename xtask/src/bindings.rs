//! The SDK's bindings, generated from `wit/` and checked in: a plugin then builds in seconds.

use crate::tools;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use wit_bindgen_core::{Files, WorldGenerator};
use wit_parser::Resolve;

fn path() -> PathBuf {
    tools::root().join("plugins/sdk/src/bindings.rs")
}

fn generate() -> Result<Vec<u8>> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(tools::root().join("wit"))?;
    let world = resolve.select_world(&[package], Some("plugin"))?;
    let options = wit_bindgen_rust::Opts {
        format: true,
        pub_export_macro: true,
        additional_derive_attributes: vec!["PartialEq".to_string()],
        ..Default::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files)?;
    let (_, source) = files.iter().next().context("the generator gave no file")?;
    Ok(source.to_vec())
}

/// Generates them.
pub(crate) fn write() -> Result<()> {
    tools::write(&path(), &generate()?)
}

/// Fails if they are not what `wit/` gives.
pub(crate) fn check() -> Result<()> {
    if tools::read(&path())? != generate()? {
        bail!("plugins/sdk/src/bindings.rs does not fit wit/: run: cargo xtask bindings");
    }
    Ok(())
}
