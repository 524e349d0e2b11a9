//! `run`: a kernel on files, on a host of this process's own that nobody else can reach.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use strait_memory::{ReadMapping, WriteMapping};
use strait_protocol as wire;
use strait_tensor::{NamedTensor, TensorSpec};

use super::arguments::{file_and_part, outputs, pair, parameters, unique};
use super::failure::Failure;
use super::hosting::{is_plugin, load_another, load_plugin, private_host, settings};
use super::inputs;
use super::progress::Progress;
use super::staging::{self, Staging};
use super::{log, output, pipelines};
use crate::error::Status;
use crate::plugin::{Kernel, Plugin};
use crate::session::{Host, Invoked};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// A standard kernel's name, FILE.wasm if it has one kernel, or FILE.wasm#KERNEL; or a pipeline of such, as
    /// "clip(lo=0) | FILE.wasm#KERNEL", or FILE.json with one.
    kernel: String,
    /// An input port's file (.npy, .npz, .safetensors, .csv, .arrow, .feather): PORT=FILE, or PORT=FILE#NAME for one of
    /// its tensors or columns (FILE.csv#A,B or FILE.csv#* for a matrix). FILE - is an Arrow stream on stdin.
    #[arg(long = "input", short, value_name = "PORT=FILE", value_parser = pair)]
    inputs: Vec<(String, String)>,
    /// A parameter's value; a list of numbers as 1,2,3.
    #[arg(long = "param", short, value_name = "NAME=VALUE", value_parser = pair)]
    parameters: Vec<(String, String)>,
    /// The file (the same formats) for an output, or - for an Arrow stream on stdout; without PORT, the kernel's only
    /// output. Several outputs may go into one file, except .npy: each under its port's name, or NAME of FILE#NAME.
    #[arg(long = "output", short, value_name = "[PORT=]FILE", required = true)]
    outputs: Vec<String>,
    /// Milliseconds that the kernel may take [default: from the settings, else 30 s].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    deadline_ms: Option<u64>,
    /// Rows that the kernel gets at a time, if it streams [default: all].
    #[arg(long, value_name = "ROWS")]
    chunk_rows: Option<NonZeroU64>,
    /// Slices to cut the rows into, if the kernel can be cut, at most 64 [default: as many as are worth it].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: Option<u32>,
    /// Settings in TOML, as for `serve`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Id of this run in log lines and errors: 1 to 64 characters from A-Z a-z 0-9 . _ : -
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(args: &RunArgs) -> Result<(), Failure> {
    // The guest's own words; what the host would log, the failure says.
    log::start(log::LogFormat::Human, "error,strait::guest=info")?;
    staging::watch_signals()?;
    let mut config = settings(args.config.as_deref())?;
    // Who runs it is who set the limit.
    let limits = &mut config.limits;
    limits.deadline_ms_max = limits.deadline_ms_max.max(args.deadline_ms.unwrap_or(0));
    config.engine.chunk_rows = args.chunk_rows.or(config.engine.chunk_rows);
    let host = private_host(config)?;
    let request_id = host.request_id(args.request_id.as_deref())?;
    on(&host, args, &request_id).map_err(|failure| failure.of_request(&request_id))
}

fn on(host: &Arc<Host>, args: &RunArgs, request_id: &Arc<str>) -> Result<(), Failure> {
    let (asked, declared) = find(host, &args.kernel)?;
    let kernel = &declared;
    let ports: Vec<&str> = kernel
        .outputs
        .iter()
        .map(|port| port.name.as_str())
        .collect();
    let targets = outputs(&kernel.name, &args.outputs, &ports)?;
    kernel
        .check_outputs(targets.keys().map(String::as_str))
        .map_err(Status::from)?;
    let mut staging = Staging::default();
    let mut writes = Vec::with_capacity(targets.len());
    for (port, text) in &targets {
        let (file, name) = file_and_part(text);
        writes.push(Write {
            port,
            file: text,
            target: staging.add(&file)?,
            name: name.unwrap_or_else(|| port.clone()),
        });
    }
    let has_stdout = staging.has_stdout();
    if has_stdout && args.json {
        return Err(staging::json_and_stream());
    }
    let kind = |name: &str| {
        let declared = kernel.parameters.iter().find(|p| p.name == name)?;
        Some(declared.kind.name().to_owned())
    };
    let invoke = wire::Invoke {
        parameters: parameters(&kernel.name, &args.parameters, kind)?,
        inputs: load_all(host, kernel, &args.inputs)?,
        deadline_ms: args.deadline_ms,
        threads: args.threads,
        ..asked
    };
    let caller = host.own_caller();
    let invoked = caller.invoke_and_wait(invoke, Arc::clone(request_id))?;
    let written = write_all(staging, &writes, &invoked)?;
    output::notes(
        invoked
            .report
            .notes
            .iter()
            .map(|(key, text)| (key.as_str(), text.as_str())),
    );
    if args.json {
        let outputs: Vec<_> = written
            .iter()
            .map(|(port, file, spec)| json!({ "port": port, "file": file, "dtype": spec.dtype, "shape": spec.shape }))
            .collect();
        let notes: Vec<_> = invoked
            .report
            .notes
            .iter()
            .map(|(key, text)| json!({ "key": key, "text": text }))
            .collect();
        return output::json(&json!({
            "kernel": kernel.name,
            "outputs": outputs,
            "notes": notes,
            "copied_bytes": invoked.report.copied_bytes,
            "minor_faults": invoked.report.minor_faults,
            "stages": invoked.stages,
            "slices": invoked.report.slices,
            "seconds": { "instantiate": invoked.report.seconds.instantiate, "run": invoked.report.seconds.run, "total": invoked.report.seconds.total },
            "request_id": &**request_id,
        }));
    }
    if has_stdout {
        return Ok(());
    }
    let rows = written
        .into_iter()
        .map(|(port, file, spec)| vec![port, output::spec(&spec), file]);
    output::text(&output::lines(&output::table(&[], rows)))
}

/// What to ask the host for, and how that declares itself.
fn find(host: &Arc<Host>, kernel: &str) -> Result<(wire::Invoke, Kernel), Failure> {
    if let Some(mut pipeline) = pipelines::pipeline(kernel)? {
        load_stages(host, &mut pipeline)?;
        let declared = host.own_caller().declared(&pipeline)?;
        let asked = wire::Invoke {
            pipeline: Some(pipeline),
            ..Default::default()
        };
        return Ok((asked, declared));
    }
    let (file, part) = file_and_part(kernel);
    let kernel = match is_plugin(&file) {
        true => of_file(host, &file, part.as_deref(), load_plugin)?,
        false => kernel.to_owned(),
    };
    let found = host.plugins().find(&kernel).map_err(Status::from)?;
    let asked = wire::Invoke {
        kernel,
        ..Default::default()
    };
    Ok((asked, found.kernel().clone()))
}

/// Loads the plugins' files that stages name, and gives those stages the names by which the host knows their kernels.
fn load_stages(host: &Arc<Host>, pipeline: &mut wire::Pipeline) -> Result<(), Failure> {
    let mut files = Vec::new();
    for stage in &pipeline.stages {
        let (file, part) = file_and_part(&stage.kernel);
        files.push(is_plugin(&file).then_some((file, part)));
    }
    if files.iter().all(Option::is_some) {
        // None of the standard ones is meant: a file may have that plugin's name.
        host.plugins().clear();
    }
    for (stage, file) in pipeline.stages.iter_mut().zip(files) {
        if let Some((file, part)) = file {
            stage.kernel = of_file(host, &file, part.as_deref(), load_another)?;
        }
    }
    Ok(())
}

/// The name of a kernel of a plugin's file, which `load` takes into the host.
fn of_file(
    host: &Arc<Host>,
    file: &Path,
    part: Option<&str>,
    load: impl FnOnce(&Arc<Host>, &Path) -> Result<Arc<Plugin>, Failure>,
) -> Result<String, Failure> {
    let shown = file.display();
    let plugin = load(host, file)?;
    let names: Vec<&str> = plugin
        .description
        .kernels
        .iter()
        .map(|k| k.name.as_str())
        .collect();
    let name = match (part, names.as_slice()) {
        (Some(part), _) => part,
        (None, [only]) => only,
        (None, _) => {
            let message = format!(
                "{shown} has {} kernels ({}); say which: {shown}#KERNEL",
                names.len(),
                names.join(", ")
            );
            return Err(Failure::input("AMBIGUOUS_KERNEL", message));
        }
    };
    match names.contains(&name) {
        true => Ok(format!("{}/{name}", plugin.description.name)),
        false => {
            let message = format!(
                "{shown} has no kernel `{name}`; it has {}",
                names.join(", ")
            );
            Err(Failure::input("KERNEL_NOT_FOUND", message))
        }
    }
}

/// Reads each input's file into a segment of the host, under the port's name.
fn load_all(
    host: &Arc<Host>,
    kernel: &Kernel,
    inputs: &[(String, String)],
) -> Result<BTreeMap<String, wire::Input>, Failure> {
    let inputs = unique("--input", inputs)?;
    // Before any file is read.
    let is_port = |name: &String| kernel.inputs.iter().any(|port| port.name == *name);
    if let Some(port) = inputs.keys().find(|name| !is_port(name)) {
        return Err(Status::from(kernel.unknown_input(port)).into());
    }
    let mut loaded = BTreeMap::new();
    for (port, text) in inputs {
        load(host, &port, &text)?;
        loaded.insert(
            port.clone(),
            wire::Input::Flight {
                name: port,
                tensor: None,
            },
        );
    }
    Ok(loaded)
}

fn load(host: &Arc<Host>, port: &str, text: &str) -> Result<(), Failure> {
    let (path, column) = file_and_part(text);
    let mut file = inputs::open(&path)?.file;
    let index = match (&column, file.tensors().len()) {
        (Some(column), _) => file.find(column)?,
        (None, 1) => 0,
        (None, 0) => {
            let why: Vec<&str> = file
                .unsupported()
                .iter()
                .map(|(_, reason)| reason.as_str())
                .collect();
            let message = format!(
                "{}: it has no column of numbers. {}",
                path.display(),
                why.join(". ")
            );
            return Err(Failure::input("BAD_FILE", message.trim_end()));
        }
        (None, count) => {
            let names: Vec<&str> = file
                .tensors()
                .iter()
                .map(|(name, _)| name.as_str())
                .collect();
            let message = format!(
                "{} has {count} tensors or columns; say which, as {port}={}#NAME: {}",
                path.display(),
                path.display(),
                names.join(", ")
            );
            return Err(Failure::input("BAD_INPUT", message));
        }
    };
    let TensorSpec { dtype, shape } = file.tensors()[index].1.clone();
    let caller = host.own_caller();
    let (segment, fd) = caller.create(vec![wire::NewTensor {
        name: port.to_owned(),
        dtype,
        shape,
    }])?;
    let place = &segment.tensors()[0];
    {
        let unmapped = |error: strait_memory::MappingError| {
            Failure::other("HOST", format!("input `{port}`: {error}"))
        };
        let mut pages = WriteMapping::new(&fd, range(place)?.end).map_err(unmapped)?;
        pages.back_with_huge_pages(range(place)?, host.births());
        let _bar = Progress::start(&format!("reading {}", path.display()), place.length);
        file.read_into(index, &mut pages.bytes_mut()[range(place)?])?;
    }
    caller.publish(&segment, port, false)?;
    Ok(())
}

/// Where a tensor of ours lies in its mapped segment.
fn range(place: &strait_tensor::TensorPlace) -> Result<std::ops::Range<usize>, Failure> {
    let at = |offset: u64| {
        usize::try_from(offset).map_err(|_| {
            Failure::other(
                "HOST",
                format!("tensor `{}` ends at byte {offset}", place.name),
            )
        })
    };
    Ok(at(place.offset)?..at(place.offset + place.length)?)
}

/// An output that is to be written.
#[derive(Debug)]
struct Write<'a> {
    port: &'a str,
    /// As the caller named it.
    file: &'a str,
    /// Its index among the staged ones.
    target: usize,
    /// What it is called in there.
    name: String,
}

/// Writes the outputs that were asked for; port, file and spec of each.
fn write_all(
    staging: Staging,
    writes: &[Write<'_>],
    invoked: &Invoked,
) -> Result<Vec<(String, String, TensorSpec)>, Failure> {
    let mut pages = Vec::with_capacity(writes.len());
    for Write { port, .. } in writes {
        let lost = || {
            Failure::other(
                "HOST",
                format!("the kernel has no output `{port}` any more"),
            )
        };
        let result = invoked
            .results
            .iter()
            .find(|result| result.port == *port)
            .ok_or_else(lost)?;
        let segment = result.segment().ok_or_else(lost)?;
        let place = segment.tensors().first().ok_or_else(lost)?.clone();
        let fd = segment.readonly_fd().map_err(Status::from)?;
        let mapping = ReadMapping::of_result(&fd, range(&place)?.end)
            .map_err(|error| Failure::other("HOST", format!("output `{port}`: {error}")))?;
        pages.push((place, mapping));
    }
    let mut targets: Vec<usize> = writes.iter().map(|write| write.target).collect();
    targets.sort_unstable();
    targets.dedup();
    // What is on its way to stdout cannot be taken back: files first.
    targets.sort_by_key(|&target| staging.is_stdout(target));
    for target in targets {
        let mut tensors = Vec::new();
        let mut shown = target.to_string();
        for (write, (place, mapping)) in writes.iter().zip(&pages) {
            if write.target == target {
                shown = write.file.to_owned();
                tensors.push(NamedTensor {
                    name: &write.name,
                    spec: &place.spec,
                    bytes: &mapping.bytes()[range(place)?],
                });
            }
        }
        let total = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
        let _bar = Progress::start(&format!("writing {shown}"), total);
        staging.write(target, &tensors)?;
    }
    staging.finish()?;
    let written = writes.iter().zip(pages).map(|(write, (place, _))| {
        let Write { port, file, .. } = write;
        ((*port).to_owned(), (*file).to_owned(), place.spec)
    });
    Ok(written.collect())
}
