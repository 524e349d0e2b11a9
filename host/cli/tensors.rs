//! `put`, `get`, `ls`, `rm`: flights and files.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use strait_client::NewTensor;
use strait_tensor::{Format, NamedTensor, TensorFile, TensorSpec};

use super::arguments::{file_and_part, grantees};
use super::connection::Connection;
use super::failure::Failure;
use super::inputs;
use super::output;
use super::progress::Progress;
use super::staging::{self, STREAM, Staging};
use crate::text::on_one_line;

#[derive(Debug, Args)]
pub(super) struct PutArgs {
    /// The name of the new flight.
    name: String,
    /// A .npy, .npz, .safetensors, .csv, .arrow or .feather file, or - for an Arrow stream on stdin. FILE#NAME takes
    /// one tensor or column, FILE.csv#A,B or FILE.csv#* a matrix of columns, FILE alone all numeric ones.
    file: String,
    /// Take only this tensor or column.
    #[arg(long)]
    column: Option<String>,
    /// Replace the flight that already has this name.
    #[arg(long)]
    replace: bool,
    /// Share it with these, separated by commas: token:alice (or just alice), uid:1000, cert:pipeline, group:lab. They see it as
    /// OWNER/NAME.
    #[arg(long, value_name = "WHO")]
    share: Vec<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// The flight: NAME, or NAME#TENSOR for one of its tensors.
    name: String,
    /// Where to write it: .npy, .npz, .safetensors, .csv, .arrow or .feather, or - for an Arrow stream on stdout. An
    /// existing file is replaced.
    file: PathBuf,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// The flights' names.
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

/// The tensors of `file` to read, by index; columns that cannot be tensors are named on stderr.
fn chosen(file: &mut TensorFile, path: &Path, column: Option<&str>) -> Result<Vec<usize>, Failure> {
    if let Some(column) = column {
        return Ok(vec![file.find(column)?]);
    }
    for (_, reason) in file.unsupported() {
        output::complain(&format!("strait: left out: {}", on_one_line(reason)));
    }
    if file.tensors().is_empty() {
        return Err(Failure::input(
            "BAD_FILE",
            format!("{}: it has no column of numbers", path.display()),
        ));
    }
    Ok((0..file.tensors().len()).collect())
}

pub(super) fn put(args: &PutArgs) -> Result<(), Failure> {
    let (path, part) = file_and_part(&args.file);
    let column = match (&args.column, &part) {
        (Some(_), Some(_)) => {
            return Err(Failure::usage(format!(
                "{} names a column, and so does --column; one is enough",
                args.file
            )));
        }
        (column, part) => column.as_deref().or(part.as_deref()),
    };
    let inputs::Opened {
        mut file,
        mut copied_bytes,
    } = inputs::open(&path)?;
    let chosen = chosen(&mut file, &path, column)?;
    // A .npy file has no name for its array; the flight's is the natural one.
    let nameless = Format::of(&path) == Some(Format::Npy);
    let tensors: Vec<NewTensor> = chosen
        .iter()
        .map(|&index| {
            let (name, TensorSpec { dtype, shape }) = file.tensors()[index].clone();
            NewTensor {
                name: if nameless { args.name.clone() } else { name },
                dtype,
                shape,
            }
        })
        .collect();

    let client = args.connection.client()?;
    let mut segment = client.create(&tensors)?;
    {
        let total = segment
            .mapping()
            .tensors
            .iter()
            .map(|tensor| tensor.length)
            .sum();
        copied_bytes += total;
        let _bar = Progress::start(&format!("reading {}", path.display()), total);
        let parts = segment.every_bytes_mut()?;
        let mut wanted: Vec<_> = chosen.iter().copied().zip(parts).collect();
        file.read_all_into(&mut wanted)?;
    }
    let flight = segment.publish(&args.name, args.replace)?;
    let with = grantees(&args.share);
    if !with.is_empty() {
        let with: Vec<&str> = with.iter().map(String::as_str).collect();
        client.share(&args.name, &with, &[])?;
    }
    if args.connection.json {
        return output::json(&json!({ "flight": flight, "copied_bytes": copied_bytes }));
    }
    output::text(&output::lines(&output::table(
        &[],
        output::flight_rows(&flight),
    )))
}

pub(super) fn get(args: &GetArgs) -> Result<(), Failure> {
    let (name, tensor) = match args.name.split_once('#') {
        Some((name, tensor)) => (name, Some(tensor)),
        None => (args.name.as_str(), None),
    };
    if args.file == Path::new(STREAM) && args.connection.json {
        return Err(staging::json_and_stream());
    }
    staging::watch_signals()?;
    let mut staging = Staging::default();
    staging.add(&args.file)?;
    let client = args.connection.client()?;
    let segment = client.map(name)?;
    let views: Vec<_> = match tensor {
        Some(tensor) => vec![segment.tensor(tensor)?],
        None => segment.tensors()?.collect(),
    };
    let holds_several = Format::of(&args.file).is_none_or(Format::holds_several);
    if !holds_several && views.len() != 1 {
        let names: Vec<_> = views.iter().map(|view| view.name()).collect();
        return Err(Failure::input(
            "BAD_INPUT",
            format!(
                "flight `{name}` has {} tensors ({}) and .npy holds one; take {name}#TENSOR, or write .npz or .arrow",
                names.len(),
                names.join(", ")
            ),
        ));
    }
    let specs: Vec<TensorSpec> = views
        .iter()
        .map(|view| TensorSpec {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
        })
        .collect();
    let tensors: Vec<NamedTensor<'_>> = views
        .iter()
        .zip(&specs)
        .map(|(view, spec)| NamedTensor {
            name: view.name(),
            spec,
            bytes: view.bytes(),
        })
        .collect();
    {
        let total = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
        let _bar = Progress::start(&format!("writing {}", args.file.display()), total);
        staging.write(0, &tensors)?;
    }
    staging.finish()?;
    if args.connection.json {
        let described: Vec<_> = tensors
            .iter()
            .map(|NamedTensor { name, spec, .. }| {
                json!({ "name": name, "dtype": spec.dtype, "shape": spec.shape })
            })
            .collect();
        return output::json(&json!({ "name": name, "file": args.file, "tensors": described }));
    }
    Ok(())
}

pub(super) fn ls(args: &LsArgs) -> Result<(), Failure> {
    let client = args.connection.client()?;
    let flights = client.list().collect::<Result<Vec<_>, _>>()?;
    if args.connection.json {
        return output::json(&json!({ "flights": flights }));
    }
    if flights.is_empty() {
        return Ok(());
    }
    let heading = ["NAME", "DTYPE", "SHAPE", "SIZE>", "WRITERS"];
    output::text(&output::lines(&output::table(
        &heading,
        flights.iter().flat_map(output::flight_rows),
    )))
}

pub(super) fn rm(args: &RmArgs) -> Result<(), Failure> {
    let client = args.connection.client()?;
    for name in &args.names {
        client.drop_flight(name)?;
    }
    if args.connection.json {
        return output::json(&json!({ "dropped": args.names }));
    }
    Ok(())
}
