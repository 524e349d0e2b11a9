//! Kernels for people: their ports and parameters.

use std::fmt::Write;
use std::path::Path;

use strait_client::Kernel;
use strait_client::wire::{self, Parameter, Port};
use strait_tensor::Dtype;

use super::failure::Failure;
use super::hosting::{load_plugin, private_host, settings};
use super::output;

/// The kernels of a plugin's file.
pub(super) fn of_file(file: &Path) -> Result<Vec<Kernel>, Failure> {
    let host = private_host(settings(None)?)?;
    load_plugin(&host, file)?;
    Ok(host
        .own_caller()
        .kernels(&wire::Kernels::default())?
        .collect())
}

/// A kernel for people, several lines.
pub(super) fn describe(kernel: &Kernel) -> String {
    let Kernel {
        name,
        plugin,
        version,
        doc,
        ..
    } = kernel;
    let mut lines = doc.lines();
    let mut text = format!(
        "{name}  ({plugin} {version})  {}\n",
        lines.next().unwrap_or_default()
    );
    let rows = kernel
        .inputs
        .iter()
        .map(|p| port("input", p))
        .chain(kernel.outputs.iter().map(|p| port("output", p)))
        .chain(kernel.parameters.iter().map(parameter));
    for line in output::lines(&output::table(&[], rows)).lines() {
        let _ = writeln!(text, "   {line}");
    }
    text
}

fn port(direction: &str, port: &Port) -> Vec<String> {
    let mut kind = dtypes(&port.dtypes);
    if port.role != "data" {
        kind = format!("{} {kind}", port.role);
    }
    let rank = match (port.rank_min, port.rank_max) {
        (0, max) if max as usize >= strait_tensor::RANK_MAX => String::new(),
        (min, max) if min == max => format!("rank {min}"),
        (min, max) => format!("rank {min} to {max}"),
    };
    let kind = if rank.is_empty() {
        kind
    } else {
        format!("{kind}, {rank}")
    };
    vec![
        direction.to_owned(),
        port.name.clone(),
        port.doc.clone(),
        kind,
    ]
}

/// The names, or a word for well-known sets.
fn dtypes(dtypes: &[Dtype]) -> String {
    let all = |set: &dyn Fn(&Dtype) -> bool| {
        dtypes.len() > 2
            && Dtype::ALL
                .iter()
                .all(|dtype| set(dtype) == dtypes.contains(dtype))
    };
    if all(&|_| true) {
        return "any dtype".to_owned();
    }
    if all(&|dtype| !dtype.is_complex()) {
        return "any dtype but complex".to_owned();
    }
    dtypes
        .iter()
        .map(|dtype| dtype.name())
        .collect::<Vec<_>>()
        .join(" ")
}

fn parameter(parameter: &Parameter) -> Vec<String> {
    let mut kind = parameter.kind.clone();
    if !parameter.choices.is_empty() {
        kind = parameter.choices.join("|");
    }
    match (&parameter.minimum, &parameter.maximum) {
        (Some(min), Some(max)) => kind = format!("{kind} from {min} to {max}"),
        (Some(min), None) => kind = format!("{kind} from {min}"),
        (None, Some(max)) => kind = format!("{kind} up to {max}"),
        (None, None) => {}
    }
    let kind = match &parameter.default {
        Some(serde_json::Value::String(text)) => format!("{kind}, default {text}"),
        Some(value) => format!("{kind}, default {value}"),
        None => format!("{kind}, required"),
    };
    vec![
        "param".to_owned(),
        parameter.name.clone(),
        parameter.doc.clone(),
        kind,
    ]
}
