//! `inspect`: what is in a file, a flight or a plugin.

use std::path::Path;

use clap::Args;
use indicatif::BinaryBytes;
use serde_json::{Value, json};
use strait_client::wire::real_to_json;
use strait_tensor::{Format, Histogram, Number, Statistics, Storage, TensorSpec};

use super::arguments::file_and_part;
use super::connection::Connection;
use super::failure::Failure;
use super::hosting::is_plugin;
use super::progress::Progress;
use super::staging::STREAM;
use super::{inputs, output, signature};
use crate::text::on_one_line;

/// Parts of a histogram.
const PARTS: usize = 16;
/// Characters of its longest bar.
const BAR_WIDTH: u64 = 40;
/// The most that an offset is told to be aligned to.
const ALIGN_MAX: u64 = 2 << 20;

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A .npy, .npz, .safetensors, .csv, .arrow or .feather file, or - for an Arrow stream on stdin (FILE#NAME for one of
    /// its tensors or columns); a plugin's FILE.wasm; else one of the host's flights: NAME, or NAME#TENSOR.
    what: String,
    /// Treat the name as a flight even if a file of that name exists.
    #[arg(long)]
    flight: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

/// What was found out about a tensor.
#[derive(Debug)]
struct Tensor {
    name: String,
    spec: TensorSpec,
    bytes: u64,
    storage: Storage,
    statistics: Statistics,
    histogram: Option<Histogram>,
}

impl Tensor {
    fn new(name: &str, spec: &TensorSpec, bytes: u64, storage: Storage) -> Tensor {
        Tensor {
            name: name.to_owned(),
            spec: spec.clone(),
            bytes,
            storage,
            statistics: Statistics::new(spec.dtype),
            histogram: None,
        }
    }
}

pub(super) fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let (path, part) = file_and_part(&args.what);
    let is_file = path == Path::new(STREAM) || Format::of(&path).is_some() || path.is_file();
    if !args.flight && is_plugin(&path) {
        return plugin(args, &path);
    }
    let (tensors, unsupported) = if !args.flight && is_file {
        of_file(&path, part.as_deref())?
    } else {
        (of_flight(args)?, Vec::new())
    };
    if args.connection.json {
        let unsupported: Vec<Value> = unsupported
            .iter()
            .map(|(name, reason)| json!({ "name": name, "reason": reason }))
            .collect();
        let tensors: Vec<Value> = tensors.iter().map(as_json).collect();
        return output::json(&json!({
            "what": args.what, "tensors": tensors, "unsupported": unsupported,
        }));
    }
    for (_, reason) in &unsupported {
        output::complain(&format!("strait: no tensor: {}", on_one_line(reason)));
    }
    let lines: Vec<_> = tensors.iter().flat_map(lines).collect();
    if lines.is_empty() {
        return Ok(());
    }
    output::bars(&lines)
}

fn plugin(args: &InspectArgs, path: &Path) -> Result<(), Failure> {
    let kernels = signature::of_file(path)?;
    if args.connection.json {
        return output::json(&json!({ "what": args.what, "kernels": kernels }));
    }
    let described: Vec<String> = kernels.iter().map(signature::describe).collect();
    output::text(described.join("\n").trim_end())
}

type Unsupported = Vec<(String, String)>;

fn of_file(path: &Path, part: Option<&str>) -> Result<(Vec<Tensor>, Unsupported), Failure> {
    let mut file = inputs::open(path)?.file;
    let (indices, unsupported) = match part {
        Some(part) => (vec![file.find(part)?], Vec::new()),
        None => (
            (0..file.tensors().len()).collect(),
            file.unsupported().to_vec(),
        ),
    };
    let mut found = Vec::with_capacity(indices.len());
    for &index in &indices {
        let (name, spec) = &file.tensors()[index];
        let bytes = spec
            .bytes()
            .map_err(|error| Failure::input("BAD_FILE", format!("{}: {error}", path.display())))?;
        found.push(Tensor::new(name, spec, bytes, file.storage(index)?));
    }
    // Once for the ends, and once for what lies between them.
    let total: u64 = found.iter().map(|tensor| tensor.bytes * 2).sum();
    let _bar = Progress::start(&format!("reading {}", path.display()), total);
    file.scan_all(&indices, &mut |i, block| found[i].statistics.add(block))?;
    for tensor in &mut found {
        tensor.histogram = Histogram::new(&tensor.statistics, PARTS);
    }
    file.scan_all(&indices, &mut |i, block| {
        if let Some(histogram) = &mut found[i].histogram {
            histogram.add(block);
        }
    })?;
    Ok((found, unsupported))
}

fn of_flight(args: &InspectArgs) -> Result<Vec<Tensor>, Failure> {
    let (name, part) = match args.what.split_once('#') {
        Some((name, part)) => (name, Some(part)),
        None => (args.what.as_str(), None),
    };
    let client = args.connection.client()?;
    let segment = client.map(name)?;
    let views: Vec<_> = match part {
        Some(part) => vec![segment.tensor(part)?],
        None => segment.tensors()?.collect(),
    };
    let _bar = Progress::waiting(&format!("reading {name}"));
    let mut found = Vec::with_capacity(views.len());
    for view in views {
        let spec = TensorSpec {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
        };
        let mut places = segment.mapping().tensors.iter();
        let place = places.find(|place| place.name == view.name());
        let storage = Storage {
            offset: place.map(|place| place.offset),
            layout: "row-major".to_owned(),
        };
        let bytes = view.bytes();
        let mut tensor = Tensor::new(view.name(), &spec, bytes.len() as u64, storage);
        tensor.statistics.add(bytes);
        tensor.histogram = Histogram::new(&tensor.statistics, PARTS);
        if let Some(histogram) = &mut tensor.histogram {
            histogram.add(bytes);
        }
        found.push(tensor);
    }
    Ok(found)
}

/// The largest power of two that the offset is a multiple of, as far as anybody asks.
fn alignment(offset: u64) -> u64 {
    match offset {
        0 => ALIGN_MAX,
        offset => (1 << offset.trailing_zeros()).min(ALIGN_MAX),
    }
}

/// What the numbers are of that are shown.
fn measured(spec: &TensorSpec) -> &'static str {
    if spec.dtype.is_complex() {
        "magnitude"
    } else {
        "value"
    }
}

fn as_json(tensor: &Tensor) -> Value {
    let Tensor {
        name,
        spec,
        bytes,
        storage,
        statistics,
        histogram,
    } = tensor;
    let number = |number: Number| match number {
        // serde_json has no 128 bits; all of ours are in i64 or u64.
        Number::Integer(integer) => i64::try_from(integer)
            .map(Value::from)
            .or_else(|_| u64::try_from(integer).map(Value::from))
            .unwrap_or(Value::Null),
        Number::Real(real) => real_to_json(real),
    };
    let parts = histogram.iter().flat_map(Histogram::parts);
    let parts: Vec<Value> = parts
        .map(|(low, high, count)| json!({ "low": low, "high": high, "count": count }))
        .collect();
    let (min, max) = statistics.range().unzip();
    json!({
        "name": name,
        "dtype": spec.dtype,
        "shape": spec.shape,
        "bytes": bytes,
        "layout": storage.layout,
        "offset": storage.offset,
        "alignment": storage.offset.map(alignment),
        "measured": measured(spec),
        "count": statistics.count(),
        "nan": statistics.nan(),
        "infinite": statistics.infinite(),
        "min": min.map(number),
        "max": max.map(number),
        "mean": statistics.mean().map(real_to_json),
        "histogram": parts,
    })
}

/// For people: lines of text, bar, text.
fn lines(tensor: &Tensor) -> Vec<(String, String, String)> {
    let Tensor {
        name,
        spec,
        bytes,
        storage,
        statistics,
        ..
    } = tensor;
    let plain = |text: String| (text, String::new(), String::new());
    let aligned = match storage.offset {
        Some(offset) => format!(
            ", at byte {offset}, aligned to {}",
            BinaryBytes(alignment(offset))
        ),
        None => String::new(),
    };
    let mut lines = vec![
        plain(format!(
            "{name}  {}  {}",
            output::spec(spec),
            BinaryBytes(*bytes)
        )),
        plain(format!("   {}{aligned}", storage.layout)),
    ];
    let of = match measured(spec) {
        "magnitude" => "magnitude: ",
        _ => "",
    };
    let mut numbers = match (statistics.range(), statistics.mean()) {
        (Some((min, max)), mean) => {
            let mean = mean.map_or_else(|| "none".to_owned(), real);
            format!("{of}min {}, max {}, mean {mean}", exact(min), exact(max))
        }
        (None, _) if statistics.count() == 0 => "no elements".to_owned(),
        (None, _) => "no numbers".to_owned(),
    };
    for (count, what) in [
        (statistics.nan(), "NaN"),
        (statistics.infinite(), "infinite"),
    ] {
        if count > 0 {
            numbers += &format!(", {count} {what}");
        }
    }
    lines.push(plain(format!("   {numbers}")));
    lines.extend(tensor.histogram.iter().flat_map(bars));
    lines
}

fn bars(histogram: &Histogram) -> Vec<(String, String, String)> {
    let parts: Vec<_> = histogram.parts().collect();
    let most = parts.iter().map(|(_, _, count)| *count).max().unwrap_or(0);
    let ranges: Vec<String> = parts
        .iter()
        .map(
            |&(low, high, _)| match histogram.is_discrete() || low == high {
                true => real(low),
                false => format!("{} to {}", real(low), real(high)),
            },
        )
        .collect();
    let width = ranges.iter().map(String::len).max().unwrap_or(0);
    let drawn = parts.iter().zip(ranges).map(|(&(_, _, count), range)| {
        let length = (u128::from(count) * u128::from(BAR_WIDTH)).div_ceil(u128::from(most.max(1)));
        let bar = "\u{2588}".repeat(usize::try_from(length).unwrap_or(0));
        (format!("   {range:>width$}  "), bar, format!(" {count}"))
    });
    drawn.collect()
}

fn exact(number: Number) -> String {
    match number {
        Number::Integer(integer) => integer.to_string(),
        Number::Real(number) => real(number),
    }
}

/// Six significant digits, without zeros behind them.
fn real(number: f64) -> String {
    let text = format!("{number:.5e}");
    let Some((digits, exponent)) = text.split_once('e') else {
        return text; // inf
    };
    match exponent.parse::<i32>() {
        Ok(exponent @ -4..=9) => {
            let decimals = usize::try_from(5 - exponent).unwrap_or(0);
            trimmed(&format!("{number:.decimals$}"))
        }
        _ => format!("{}e{exponent}", trimmed(digits)),
    }
}

fn trimmed(digits: &str) -> String {
    let digits = match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.'),
        false => digits,
    };
    if digits == "-0" { "0" } else { digits }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (1.0, "1"),
            (-2.5, "-2.5"),
            (1.0 / 3.0, "0.333333"),
            (123_456_789.0, "123456789"),
            (0.000_123_456_7, "0.000123457"),
            (1e-5, "1e-5"),
            (6.25e300, "6.25e300"),
            (1e10, "1e10"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(real(number), text);
        }
    }

    #[test]
    fn an_offset_is_aligned_to_a_power_of_two() {
        for (offset, aligned) in [
            (0, 2 << 20),
            (8, 8),
            (192, 64),
            (65536, 65536),
            (6 << 20, 2 << 20),
        ] {
            assert_eq!(alignment(offset), aligned);
        }
    }
}
