//! Channels: `channel_produce`, `channel_read`.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use strait_client::{
    ChannelOptions, ChannelReader, Elements, Limits, Param, PreparedStream, TensorSpec,
};

use super::prepared::told;
use super::{Answer, Driver};

/// What the operations left open.
#[derive(Default)]
pub(super) struct Kept {
    streams: Vec<PreparedStream>,
    readers: Vec<ChannelReader>,
}

#[derive(Deserialize)]
pub(super) struct Produce {
    kernel: String,
    channel: ChannelOptions,
    inputs: Map<String, Value>,
    rows: u64,
    cuts: Vec<usize>,
    #[serde(default)]
    parameters: Map<String, Value>,
    limits: Option<Limits>,
    deadline_ms: Option<u64>,
    request_id: Option<String>,
    #[serde(default)]
    end: End,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum End {
    #[default]
    Last,
    Close,
    Keep,
}

#[derive(Deserialize)]
pub(super) struct Read {
    channel: String,
    batches: Option<usize>,
    #[serde(default)]
    acknowledge: bool,
    #[serde(default)]
    files: HashMap<String, String>,
    #[serde(default)]
    keep: bool,
    request_id: Option<String>,
}

/// A tensor with so many rows from `from` on.
fn rows<'a>(
    spec: &TensorSpec,
    bytes: &'a [u8],
    from: usize,
    count: usize,
) -> (TensorSpec, &'a [u8]) {
    let mut spec = spec.clone();
    let mut row = 0;
    if let Some(rows) = spec.shape.first_mut() {
        row = usize::try_from(*rows).map_or(0, |rows| bytes.len().checked_div(rows).unwrap_or(0));
        *rows = count as u64;
    }
    (spec, &bytes[from * row..(from + count) * row])
}

impl Driver {
    pub(super) fn channel_produce(&mut self, request: Produce) -> Answer {
        let client = self.client_as(request.request_id.as_deref())?;
        let mut tensors = Vec::new();
        for (port, input) in &request.inputs {
            let (spec, bytes) = self.elements(input)?;
            let mut most = spec.clone();
            if let Some(rows) = most.shape.first_mut() {
                *rows = request.rows;
            }
            tensors.push((port, most, spec, bytes));
        }
        let mut prepare = client.prepare(&request.kernel).channel(request.channel);
        for (port, most, ..) in &tensors {
            prepare = prepare.input(port, most);
        }
        for (name, value) in request.parameters {
            prepare = prepare.param(&name, Param::from(value));
        }
        if let Some(limits) = request.limits {
            prepare = prepare.limits(limits);
        }
        if let Some(milliseconds) = request.deadline_ms {
            prepare = prepare.deadline(Duration::from_millis(milliseconds));
        }
        let mut stream = prepare.stream()?;
        let order: Vec<_> = stream.inputs().iter().map(|x| x.port.clone()).collect();
        tensors.sort_by_key(|(port, ..)| order.iter().position(|known| known == *port));
        let mut cuts = request.cuts;
        if cuts.is_empty() && request.end == End::Last {
            cuts.push(0);
        }
        let mut from = 0;
        for (index, cut) in cuts.iter().enumerate() {
            let pieces: Vec<_> = tensors
                .iter()
                .map(|(_, _, spec, bytes)| rows(spec, bytes, from, *cut))
                .collect();
            let elements: Vec<_> = pieces
                .iter()
                .map(|(spec, bytes)| Elements::of_tensor(spec, bytes))
                .collect();
            match request.end == End::Last && index + 1 == cuts.len() {
                true => stream.last(&elements)?,
                false => stream.chunk(&elements)?,
            };
            from += cut;
        }
        if request.end == End::Keep {
            self.kept.streams.push(stream);
        }
        Ok(json!({ "chunks": cuts.len() }))
    }

    pub(super) fn channel_read(&mut self, request: Read) -> Answer {
        let client = self.client_as(request.request_id.as_deref())?;
        let mut reader = client.read_channel(&request.channel)?;
        let (kernel, outputs) = (reader.kernel().to_owned(), told(reader.outputs()));
        let (mut numbers, mut ended) = (Vec::new(), false);
        let mut rows: HashMap<String, Vec<u64>> = HashMap::new();
        while request.batches != Some(numbers.len()) {
            let Some(batch) = reader.next()? else {
                ended = true;
                break;
            };
            for port in batch.ports() {
                let tensor = batch.tensor(port)?;
                if let Some(file) = request.files.get(port) {
                    let mut file = OpenOptions::new().append(true).create(true).open(file)?;
                    file.write_all(tensor.bytes())?;
                }
                let count = tensor.shape().first().copied().unwrap_or_default();
                rows.entry(port.to_owned()).or_default().push(count);
            }
            numbers.push(reader.number());
        }
        if request.acknowledge {
            reader.acknowledge()?;
        }
        let note = |note: &strait_client::wire::Note| json!({"key": note.key, "text": note.text});
        let notes: Vec<_> = reader.notes().iter().map(note).collect();
        if request.keep {
            self.kept.readers.push(reader);
        }
        Ok(json!({
            "kernel": kernel, "outputs": outputs, "numbers": numbers, "rows": rows, "ended": ended, "notes": notes,
        }))
    }
}
