//! A slice: a job on some of the rows of another one, from whose results it has parts.

use super::{Bound, Finished, Opened};
use crate::engine::Engine;
use crate::engine::contract;
use crate::engine::error::{Broken, Stage};
use crate::engine::job::{Filled, FilledOutput, Job, Report, Supplies};
use crate::engine::results::Making;
use crate::engine::spare::Used;
use strait_tensor::Column;

/// What a slice leaves beside its rows, which are in its parts of the results.
pub(in crate::engine) struct Slice {
    pub(in crate::engine) report: Report,
    pub(in crate::engine) used: Used,
    /// It has written as many rows as there is room for.
    pub(in crate::engine) is_full: bool,
}

/// Runs `job`, a slice of another one, from a fresh instance to the end, into `parts` of that one's results.
///
/// # Errors
/// [`Broken`]; the parts are home then.
pub(in crate::engine) fn slice(
    engine: &Engine,
    job: &Job,
    supplies: &Supplies,
    parts: Vec<Making>,
) -> Result<Slice, Broken> {
    let opened = Opened::open(engine, job, supplies)?;
    let announced = opened.columns.iter().map(|column| &column.spec);
    let bounds = parts.iter().map(|part| &part.bound().spec);
    if !announced.clone().eq(bounds.clone()) {
        let (announced, bound) = announced
            .zip(bounds)
            .find(|(announced, bound)| announced != bound)
            .ok_or_else(|| Stage::Open.host("a slice has other outputs than the whole"))?;
        return Err(Stage::Open.broken_contract(format!(
            "for a slice it announced {announced}, {bound} of the whole are its rows; it must not split along an axis whose slices differ otherwise"
        )));
    }
    opened.bind_to(parts)?.enter()?.run()?.leave()
}

impl<'a> Opened<'a> {
    /// The outputs at their largest.
    pub(in crate::engine) fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Rows of its first input that is cut.
    pub(in crate::engine) fn rows(&self) -> Option<u64> {
        let job = self.call.job;
        let mut inputs = job.kernel.kernel().inputs.iter().zip(&job.inputs);
        let (_, input) = inputs.find(|(port, _)| !port.whole)?;
        input.place.spec.shape.first().copied()
    }

    /// The same with the `parts` that there are for the results.
    fn bind_to(self, parts: Vec<Making>) -> Result<Bound<'a>, Broken> {
        self.call.bind(parts, None)
    }

    /// Runs it to its end.
    pub(in crate::engine) fn whole(self) -> Result<Filled, Broken> {
        self.bind()?.enter()?.run()?.publish()
    }

    /// Ends it with the `outputs` that slices have made, and what `told` adds to the report.
    pub(in crate::engine) fn sliced(
        mut self,
        outputs: Vec<FilledOutput>,
        told: impl FnOnce(&mut Report),
    ) -> Filled {
        told(&mut self.call.report);
        let (report, used) = self.call.end();
        Filled {
            outputs,
            report,
            used,
        }
    }
}

impl Finished<'_> {
    /// Ends a slice, whose rows are in its parts of the results then.
    fn leave(self) -> Result<Slice, Broken> {
        let Self {
            mut call,
            placed,
            results,
        } = self;
        let written = |index| placed.chunk.written(index);
        let shapes = contract::extents(&mut call.instance, &results, written)?;
        call.report.notes = contract::notes(&mut call.instance)?;
        let copied_in = call.copied.get();
        let regions = call.instance.regions();
        let spots = &placed.spots[call.job.inputs.len()..];
        for (part, spot) in results.iter().zip(spots) {
            part.take_out(*spot, regions, &call.copied)?;
        }
        let copied_out = call.copied.get() - copied_in;
        call.engine.copies.guest_out.add(copied_out);
        let bounds = results.iter().map(|part| &part.bound().spec.shape);
        let is_full = shapes.iter().eq(bounds);
        let (report, used) = call.end();
        Ok(Slice {
            report,
            used,
            is_full,
        })
    }
}
