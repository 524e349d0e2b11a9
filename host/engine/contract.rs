//! The guest's functions of `wit/kernel.wit` in the order in which they are called, and whether their answers keep
//! the contract.

use std::ops::Range;
use std::sync::Arc;

use strait_memory::MemoryError;
use strait_tensor::{Column, TensorPlace};

use super::abi::{self, types};
use super::chunk::{Chunk, RECORD_BYTES};
use super::error::{Broken, Cause, Limit, Stage, WASM32_BYTES};
use super::guest_memory::RESERVATION_BYTES;
use super::instance::{Instance, refused};
use super::job::{self, Job};
use super::placement::Spot;
use super::results::Making;
use crate::plugin::{Port, Role};

/// What `run` answers.
pub(super) const DONE: u32 = 0;
pub(super) const FAILED: u32 = 1;
pub(super) const MORE: u32 = 2;

/// Whether inputs, or inputs and outputs, of together `asked` bytes may be in the guest's memory.
pub(super) fn windows_fit(job: &Job, asked: u64) -> Result<(), Broken> {
    let limited = |limit, most| Err(Stage::Open.broke(Cause::Limit { limit, asked, most }));
    if asked >= RESERVATION_BYTES as u64 {
        return limited(Limit::Wasm32, WASM32_BYTES);
    }
    if asked > job.limits.window_bytes {
        return limited(Limit::Window, job.limits.window_bytes);
    }
    Ok(())
}

/// `open`, and its answer against the declaration and the limits.
pub(super) fn open(job: &Job, instance: &mut Instance) -> Result<Vec<Column>, Broken> {
    const STAGE: Stage = Stage::Open;
    let kernel = job.kernel.kernel();
    let parameters: Vec<_> = job
        .parameters
        .iter()
        .map(|(name, value)| abi::parameter_of(name, value))
        .collect();
    let specs: Vec<_> = job
        .inputs
        .iter()
        .map(|input| abi::spec_of(&input.place.spec, input.role))
        .collect();
    let answered = instance
        .call(STAGE, |guest, store| {
            guest.call_open(store, &kernel.name, &parameters, &specs)
        })?
        .map_err(|error| STAGE.broke(refused(error, Vec::new())))?;
    if answered.len() != kernel.outputs.len() {
        let (answered, declared) = (answered.len(), kernel.outputs.len());
        return Err(STAGE.broken_contract(format!("{answered} outputs, it declares {declared}")));
    }
    let column = |port: &Port, spec| {
        let spec = abi::spec(spec);
        port.fits(&spec)?;
        Column::new(port.name.clone(), spec).map_err(|e| e.to_string())
    };
    let columns = kernel
        .outputs
        .iter()
        .zip(answered)
        .map(|(port, spec)| column(port, spec).map_err(|e| misfit(port, &e)))
        .collect::<Result<Vec<_>, _>>()?;
    kernel
        .axes_fit(
            job.inputs.iter().map(|input| &input.place.spec),
            columns.iter().map(|column| &column.spec),
        )
        .map_err(|(port, e)| misfit(port, &e))?;
    let asked = reserve_bytes(&columns);
    if asked > job.limits.result_bytes {
        return Err(STAGE.broke(Cause::Limit {
            limit: Limit::Result,
            asked,
            most: job.limits.result_bytes,
        }));
    }
    Ok(columns)
}

/// Bytes of outputs, each at its largest.
pub(super) fn reserve_bytes(columns: &[Column]) -> u64 {
    let bytes = columns.iter().map(|column| column.reserve_bytes);
    bytes.fold(0, u64::saturating_add)
}

fn misfit(port: &Port, how: &str) -> Broken {
    Stage::Open.broken_contract(format!("output `{}`: {how}", port.name))
}

/// Room for every tensor: the memory that grew during `reserve`, whatever the guest answers.
pub(super) fn reserve(instance: &mut Instance, asked: u64) -> Result<Range<usize>, Broken> {
    const STAGE: Stage = Stage::Reserve;
    let memory = Arc::clone(instance.regions().memory());
    if asked.saturating_add(memory.size() as u64) > RESERVATION_BYTES as u64 {
        return Err(STAGE.broke(Cause::Limit {
            limit: Limit::Wasm32,
            asked,
            most: WASM32_BYTES,
        }));
    }
    instance.allow(asked);
    memory.take_growths();
    memory.take_refusal();
    let answered = instance.call(STAGE, |guest, store| guest.call_reserve(store, asked));
    if let Some(refusal) = memory.take_refusal() {
        // Whatever the guest made of that.
        return Err(STAGE.broke(MemoryError::from(refusal)));
    }
    answered?;
    let growths = memory.take_growths();
    let [grown] = growths.as_slice() else {
        return Err(STAGE.broken_contract(format!(
            "the memory grew {} times, it must grow once",
            growths.len()
        )));
    };
    if (grown.len() as u64) < asked {
        return Err(STAGE.broken_contract(format!(
            "the memory grew by {} bytes, {asked} were asked for",
            grown.len()
        )));
    }
    Ok(grown.clone())
}

/// `bind`: where tensors and chunk records will lie.
pub(super) fn bind(
    job: &Job,
    instance: &mut Instance,
    results: &[Making],
    records_at: usize,
    spots: &[Spot],
) -> Result<(), Broken> {
    const STAGE: Stage = Stage::Bind;
    let bound = |index: usize, tensor: &TensorPlace, role: Role| types::Tensor {
        address: spots[index].address() as u64,
        bytes: tensor.length,
        control: (records_at + RECORD_BYTES * index) as u64,
        spec: abi::spec_of(&tensor.spec, role),
    };
    let inputs: Vec<_> = job
        .inputs
        .iter()
        .enumerate()
        .map(|(index, input)| bound(index, &input.place, input.role))
        .collect();
    let outputs: Vec<_> = results
        .iter()
        .enumerate()
        .map(|(index, making)| bound(inputs.len() + index, making.bound(), Role::Data))
        .collect();
    instance
        .call(STAGE, |guest, store| {
            guest.call_bind(store, &inputs, &outputs)
        })?
        .map_err(|error| STAGE.broke(refused(error, Vec::new())))
}

/// Calls `run` until it is done with the last chunk; its last answer.
pub(super) fn run(
    instance: &mut Instance,
    chunk: &mut Chunk<'_>,
    records: Range<usize>,
) -> Result<u32, Broken> {
    const STAGE: Stage = Stage::Run;
    loop {
        instance
            .regions_mut()
            .with_mut(records.clone(), |records| chunk.write(records))
            .map_err(|e| STAGE.broke(e))?;
        let mode = u32::from(chunk.is_last());
        let answer = instance.call(STAGE, |guest, store| guest.call_run(store, mode))?;
        let more = answer == MORE;
        if !more && answer != DONE {
            return Ok(answer);
        }
        instance
            .regions()
            .with(records.clone(), |records| chunk.step(records, more))
            .map_err(|e| STAGE.broke(e))?
            .map_err(|lie| STAGE.broken_contract(lie))?;
        // After a store into an input there is nothing to go on with; the caller tells of it.
        let over = !more && chunk.is_last();
        if over || instance.faults().any_written() {
            return Ok(answer);
        }
        if !more {
            chunk.advance();
        }
    }
}

/// The outputs' true shapes, each within its bound. Of output `i` there are `written(i)` rows.
pub(super) fn extents(
    instance: &mut Instance,
    results: &[Making],
    written: impl Fn(usize) -> u64,
) -> Result<Vec<Vec<u64>>, Broken> {
    const STAGE: Stage = Stage::Extents;
    let extents = instance.call(STAGE, |guest, store| guest.call_extents(store))?;
    if extents.len() != results.len() {
        let (answered, outputs) = (extents.len(), results.len());
        return Err(STAGE.broken_contract(format!("{answered} extents for {outputs} outputs")));
    }
    let shapes = extents.into_iter().map(|extent| extent.shape);
    shapes
        .zip(results)
        .enumerate()
        .map(|(index, (shape, making))| {
            let (port, bound) = (&making.port, &making.bound().spec.shape);
            let within = shape.len() == bound.len()
                && shape.iter().zip(bound).all(|(size, most)| size <= most);
            if !within {
                let shown = &shape[..shape.len().min(16)];
                return Err(STAGE.broken_contract(format!(
                    "output `{port}` has shape {shown:?}, `open` announced at most {bound:?}"
                )));
            }
            let rows = shape.first().copied().unwrap_or(1);
            let written = written(index);
            if rows != written {
                return Err(STAGE.broken_contract(format!(
                    "output `{port}` has {rows} rows, its chunk record says that {written} were written"
                )));
            }
            Ok(shape)
        })
        .collect()
}

/// What the kernel has to say: (key, text).
pub(super) fn notes(instance: &mut Instance) -> Result<Vec<(String, String)>, Broken> {
    const STAGE: Stage = Stage::Notes;
    let notes = instance.call(STAGE, |guest, store| guest.call_notes(store))?;
    let notes = notes.into_iter().map(|note| (note.key, note.text));
    job::bounded_notes(notes.collect()).map_err(|how| STAGE.broken_contract(how))
}
