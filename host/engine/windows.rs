//! The windows of one invocation: pages of segments in a guest's memory, and the way home.

use std::sync::Arc;

use strait_memory::{
    FaultRange, GuestSpace, InputSource, Lot, MemoryError, Parked, ResultPages, Window,
};

use super::error::{Broken, Stage};
use super::job::{Job, Source};
use super::placement::Spot;
use super::results::Making;

/// The windows that are in. Whatever happens they go home before the store ends: losing the one
/// writable mapping of a result would lose its segment, and a guest's teardown must never meet
/// pages of a segment.
#[derive(Debug)]
pub(super) struct Windows<'e> {
    lot: &'e Lot,
    /// Each with the index of its input.
    inputs: Vec<(usize, Window)>,
    /// Each with the index of its result.
    outputs: Vec<(usize, Window)>,
    results: Vec<Making>,
}

impl<'e> Windows<'e> {
    /// Moves the pages of inputs and `results` into `space`, where `spots` (inputs first) says that they move.
    ///
    /// # Errors
    /// A mapping could not be made or moved; all are home again.
    pub(super) fn enter(
        lot: &'e Lot,
        space: &Arc<GuestSpace>,
        job: &Job,
        sources: &[Source<dyn InputSource>],
        results: Vec<Making>,
        spots: &[Spot],
    ) -> Result<Self, Broken> {
        let mut windows = Self {
            lot,
            inputs: Vec::new(),
            outputs: Vec::new(),
            results,
        };
        let (of_inputs, of_outputs) = spots.split_at(job.inputs.len());
        let go = |parked: Parked, from: u64, at: usize, bytes: usize| {
            parked
                .move_into(from..from + bytes as u64, space, space.base() + at)
                .map_err(|refused| Stage::Place.broke(MemoryError::from(refused.error)))
        };
        for (index, ((input, source), spot)) in
            job.inputs.iter().zip(sources).zip(of_inputs).enumerate()
        {
            // What has no segment has no window.
            if let (Spot::Window { at, bytes }, Source::Segment(source)) = (*spot, source) {
                let range = input.place.offset..input.place.offset + bytes as u64;
                let parked = source.park(range).map_err(|e| Stage::Place.broke(e))?;
                windows.inputs.push((index, go(parked, 0, at, bytes)?));
            }
        }
        for (index, spot) in of_outputs.iter().enumerate() {
            if let Spot::Window { at, bytes } = *spot
                && !windows.results[index].is_linked()
            {
                let making = &windows.results[index];
                let parked = making
                    .pages()
                    .and_then(ResultPages::take_parked)
                    .ok_or_else(|| Stage::Place.host("a result's mapping is not at home"))?;
                // A part's mapping does not begin with the file.
                let offset = making.bound().offset - parked.file_offset();
                windows
                    .outputs
                    .push((index, go(parked, offset, at, bytes)?));
            }
        }
        Ok(windows)
    }

    /// Where a store would be one into an input.
    pub(super) fn read_only(&self) -> Vec<FaultRange> {
        self.inputs
            .iter()
            .map(|(_, window)| window.fault_range())
            .collect()
    }

    /// The input of the window that is [`Self::read_only`]'s `index`, with the `linked` inputs behind those.
    pub(super) fn input(&self, index: usize, linked: &[usize]) -> Option<usize> {
        match self.inputs.get(index) {
            Some((input, _)) => Some(*input),
            None => linked.get(index - self.inputs.len()).copied(),
        }
    }

    /// The results that are being made.
    pub(super) fn results(&self) -> &[Making] {
        &self.results
    }

    /// Moves all of them home.
    ///
    /// # Errors
    /// What went wrong with one of them: the guest's memory is poisoned and its mapping may be lost.
    pub(super) fn home(mut self) -> Result<Vec<Making>, Broken> {
        self.go_home().map_err(|problem| Stage::Run.host(problem))?;
        Ok(std::mem::take(&mut self.results))
    }

    fn go_home(&mut self) -> Result<(), String> {
        let mut problem = None;
        for (_, window) in self.inputs.drain(..) {
            match window.move_home() {
                Ok(parked) => self.lot.give_back(parked),
                Err(poisoned) => problem = Some(poisoned.to_string()),
            }
        }
        for (index, window) in self.outputs.drain(..) {
            match window.move_home() {
                Ok(parked) => {
                    if let Some(pages) = self.results[index].pages() {
                        pages.put_parked(parked);
                    }
                }
                Err(poisoned) => problem = Some(poisoned.to_string()),
            }
        }
        problem.map_or(Ok(()), Err)
    }
}

impl Drop for Windows<'_> {
    fn drop(&mut self) {
        // On the failure path there is nobody to tell; the poisoned guest space is not reused.
        if let Err(problem) = self.go_home() {
            tracing::error!(problem, "a window could not be moved home");
        }
    }
}
