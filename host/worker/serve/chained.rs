//! Chains of kernels in a worker.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Granted, Worker, deadline, told};
use crate::engine::{CancelToken, Chain, Failed, Logged, Results, Supplies, Used};
use crate::worker::channel::Channel;
use crate::worker::messages::{Ended, Outcome, RunChain};

impl Worker {
    pub(super) fn chain(
        self: &Arc<Self>,
        lane: &Arc<Mutex<Channel>>,
        chain: RunChain,
        fds: Vec<OwnedFd>,
    ) -> (Ended, Vec<Used>) {
        let number = chain.stages.first().map_or(0, |run| run.run);
        self.granted(lane, number, Vec::new(), |cancel, granted| {
            self.chained(chain, fds, cancel, granted)
        })
    }

    fn chained(
        &self,
        chain: RunChain,
        fds: Vec<OwnedFd>,
        cancel: CancelToken,
        granted: &Arc<Granted>,
    ) -> Result<(Outcome, Vec<Used>), Failed> {
        let left_us = chain.stages.first().map_or(0, |run| run.left_us);
        let deadline = deadline(left_us);
        let mut fds = fds.into_iter();
        let (mut stages, mut inputs) = (Vec::new(), Vec::new());
        for (at, run) in chain.stages.into_iter().enumerate() {
            let (job, sources) = self
                .job(run, &mut fds)
                .map_err(|failed| Failed { at, ..failed })?;
            stages.push(job);
            inputs.extend(sources);
        }
        let supplies = Supplies {
            inputs,
            results: Arc::clone(granted) as Arc<dyn Results>,
            deadline,
            cancel,
            logged: Logged::default(),
        };
        let links = chain.links;
        let filled = self.engine.fill_chain(&Chain { stages, links }, supplies)?;
        let outcome = Outcome::Chained(told(filled.outputs), filled.reports);
        Ok((outcome, filled.used))
    }
}
