//! A chain of kernels as it is told to a worker, and what is believed of the answers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::exchange::{Exchange, Trouble, senseless};
use super::messages::{Answer, Ask, Ended, Filled, Outcome, RunChain};
use crate::engine::{Chain, ChainDone, Failed};
use crate::plugin::Plugin;

/// Of inputs, in the order in which they are told.
type Descriptors = Vec<Arc<OwnedFd>>;

impl Exchange<'_> {
    /// From the first word to the last.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn chained(&mut self, run: u64, chain: &Chain) -> Result<ChainDone, Trouble> {
        self.set_leaving(chain.leaving().count());
        let mut hashes = Vec::new();
        for job in &chain.stages {
            let plugin = &job.kernel.plugin;
            self.has(plugin)?;
            hashes.push(plugin.hash);
        }
        // Nothing else counts as the same plugin as several.
        let company = match chain.is_of_one_plugin() {
            true => hashes[0],
            false => Plugin::hash(&hashes.concat()),
        };
        let telling = self.join_as(run, company);
        let (told, fds) = self.told_chain(run, chain)?;
        self.ask(&Ask::Chain(Box::new(told)), &fds)?;
        let ended = loop {
            match self.answer()? {
                Answer::Need(bytes) if self.may_need() => self.grant(&bytes)?,
                Answer::Ended(ended) => break ended,
                answer => return Err(senseless(format!("{} during a chain", answer.kind()))),
            }
        };
        drop(telling);
        self.chain_given(chain, *ended)
    }

    fn told_chain(&self, run: u64, chain: &Chain) -> Result<(RunChain, Descriptors), Trouble> {
        let (mut stages, mut descriptors) = (Vec::new(), Vec::new());
        let mut sources = self.sources();
        for job in &chain.stages {
            let (own, rest) = sources.split_at(job.inputs.len().min(sources.len()));
            sources = rest;
            let (told, fds) = self.told_of(job, own, run, false)?;
            stages.push(told);
            descriptors.extend(fds);
        }
        let links = chain.links.clone();
        Ok((RunChain { stages, links }, descriptors))
    }

    /// Believes what the worker says as far as it fits what it was asked.
    fn chain_given(&mut self, chain: &Chain, ended: Ended) -> Result<ChainDone, Trouble> {
        let (filled, reports) = match self.noted(ended) {
            Ok(Outcome::Chained(filled, reports)) => (filled, reports),
            Ok(_) => return Err(senseless("it has not done what it was asked")),
            Err(Trouble::Failed(failed)) => {
                let Some(job) = chain.stages.get(failed.at) else {
                    return Err(senseless("a kernel failed that is none of the chain"));
                };
                return Err(Trouble::Failed(Failed {
                    // What it is called, it need not say.
                    kernel: job.kernel.kernel().name.clone(),
                    ..failed
                }));
            }
            Err(trouble) => return Err(trouble),
        };
        leaving(chain, &filled).map_err(senseless)?;
        if reports.len() != chain.stages.len() {
            return Err(senseless(format!("it has {} reports", reports.len())));
        }
        let reports = reports.into_iter().zip(&chain.stages);
        let reports = reports.map(|(report, job)| report.checked(job));
        let reports = reports.collect::<Result<_, _>>().map_err(senseless)?;
        Ok(ChainDone {
            outputs: self.outputs(filled)?,
            reports,
            used: Vec::new(),
        })
    }
}

/// Whether outputs are those that the kernels declare, as far as that can be known: their sizes depend on what went through the links.
fn leaving(chain: &Chain, filled: &[Filled]) -> Result<(), String> {
    let ports = chain.leaving();
    if ports.clone().count() != filled.len() {
        return Err(format!("it has {} results", filled.len()));
    }
    for ((stage, port), one) in ports.zip(filled) {
        let misfit = |how: &str| format!("output `{}` of stage {stage}: {how}", port.name);
        if one.port != port.name {
            return Err(misfit("it has another name"));
        }
        one.spec.bytes().map_err(|e| misfit(&e.to_string()))?;
        port.fits(&one.spec).map_err(|e| misfit(&e))?;
    }
    Ok(())
}
