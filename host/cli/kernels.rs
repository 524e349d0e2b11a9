//! `kernels` and `call`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use strait_client::Flight;
use strait_client::wire::{self, Note};

use super::arguments::{outputs, pair, parameters, unique};
use super::connection::Connection;
use super::failure::Failure;
use super::hosting::{is_plugin, private_host, settings};
use super::signature::{describe, of_file};
use super::{output, pipelines};
use crate::session::print_pipeline;

#[derive(Debug, Args)]
pub(super) struct KernelsArgs {
    /// Only this kernel: KERNEL or PLUGIN/KERNEL, or a pipeline, whose inputs and outputs are shown; or all kernels of FILE.wasm, without
    /// a host.
    kernel: Option<String>,
    /// List the standard kernels available to `run`, without a host.
    #[arg(long)]
    local: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct CallArgs {
    /// The kernel: KERNEL, or PLUGIN/KERNEL if two plugins have one of that name; or a pipeline, as "clip(lo=0) | cast(to=int8)", or
    /// FILE.json with one.
    kernel: String,
    /// The flight for an input port: PORT=NAME, or PORT=NAME#TENSOR if it has several tensors.
    #[arg(long = "input", short, value_name = "PORT=NAME", value_parser = pair)]
    inputs: Vec<(String, String)>,
    /// A parameter's value; a list of numbers as 1,2,3.
    #[arg(long = "param", short, value_name = "NAME=VALUE", value_parser = pair)]
    parameters: Vec<(String, String)>,
    /// The flight that an output becomes; without PORT, the kernel's only output.
    #[arg(long = "output", short, value_name = "[PORT=]NAME", required = true)]
    outputs: Vec<String>,
    /// Replace flights that already have these names.
    #[arg(long)]
    replace: bool,
    /// Seal the outputs permanently, so that not even the host can write to their memory again.
    #[arg(long)]
    seal: bool,
    /// Milliseconds that the call may take [default and maximum: the host's].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    deadline_ms: Option<u64>,
    /// Slices to cut the rows into, if the kernel can be cut, at most 64 [default: as many as are worth it].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Option<u32>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

pub(super) fn kernels(args: &KernelsArgs) -> Result<(), Failure> {
    let file = args
        .kernel
        .as_deref()
        .map(Path::new)
        .filter(|file| is_plugin(file));
    let asked = args.kernel.as_deref().filter(|_| file.is_none());
    let pipeline = asked.map(pipelines::pipeline).transpose()?.flatten();
    let asked = match &pipeline {
        Some(pipeline) => Some(print_pipeline(pipeline)),
        None => asked.map(str::to_owned),
    };
    let kernels = match file {
        Some(file) => of_file(file)?,
        None if args.local => private_host(settings(None)?)?
            .own_caller()
            .kernels(&wire::Kernels {
                kernel: asked.clone(),
                ..Default::default()
            })?
            .collect(),
        None => args.connection.client()?.kernels(asked.as_deref())?,
    };
    if let Some(name) = asked
        && kernels.is_empty()
    {
        return Err(Failure::input(
            "KERNEL_NOT_FOUND",
            format!("no loaded plugin has a kernel `{name}`"),
        ));
    }
    if args.connection.json {
        return output::json(&json!({ "kernels": kernels }));
    }
    output::text(
        kernels
            .iter()
            .map(describe)
            .collect::<Vec<_>>()
            .join("\n")
            .trim_end(),
    )
}

pub(super) fn call(args: &CallArgs) -> Result<(), Failure> {
    let inputs = unique("--input", &args.inputs)?;
    let pipeline = pipelines::pipeline(&args.kernel)?;
    let kernel = &pipeline
        .as_ref()
        .map_or_else(|| args.kernel.clone(), print_pipeline);
    let client = args.connection.client()?;
    // If there is none, or several, the host says so below.
    let declared = client.kernels(Some(kernel))?;
    let declared = declared.first();
    let ports: Vec<&str> = declared.map_or_else(Vec::new, |d| {
        d.outputs.iter().map(|p| p.name.as_str()).collect()
    });
    let publish = match declared {
        Some(_) => outputs(kernel, &args.outputs, &ports)?,
        None => BTreeMap::new(),
    };
    let kind = |name: &str| {
        Some(
            declared?
                .parameters
                .iter()
                .find(|p| p.name == name)?
                .kind
                .clone(),
        )
    };
    let parameters = parameters(kernel, &args.parameters, kind)?;

    let mut call = client
        .call(kernel)
        .replace(args.replace)
        .seal(args.seal)
        .map(publish.len() < ports.len());
    for (port, name) in &inputs {
        call = call.input(port, name);
    }
    for (name, value) in parameters {
        call = call.param(&name, value);
    }
    for (port, name) in &publish {
        call = call.publish(port, name);
    }
    if let Some(deadline) = args.deadline_ms {
        call = call.deadline(Duration::from_millis(deadline));
    }
    if let Some(threads) = args.threads {
        call = call.threads(threads);
    }
    let result = call.send()?;

    let port_of = |flight: &Flight| {
        publish
            .iter()
            .find(|(_, name)| **name == flight.name)
            .map(|(port, _)| port)
    };
    if args.connection.json {
        let results: Vec<_> = result
            .published
            .iter()
            .map(|flight| json!({ "port": port_of(flight), "name": flight.name, "mapping": flight.mapping }))
            .collect();
        return output::json(&json!({
            "kernel": kernel,
            "results": results,
            "notes": result.notes,
            "copied_bytes": result.copied_bytes,
            "minor_faults": result.minor_faults,
            "stages": result.stages,
            "slices": result.slices,
            "seconds": result.seconds,
            "request_id": result.request_id,
        }));
    }
    output::notes(
        result
            .notes
            .iter()
            .map(|Note { key, text }| (key.as_str(), text.as_str())),
    );
    let rows = result.published.iter().flat_map(output::flight_rows);
    output::text(&output::lines(&output::table(&[], rows)))
}
