//! Stages that run at once, rows going from one to the next while they are in the cache.
//!
//! ```text
//! stages:  a ─▶ b ─▶ c ─▶ d        b and c stream, and c alone takes what b gives: one run of the two
//! ```
//! Stages that follow each other are run so if all of them stream, and what goes between them is large, goes nowhere else, and is taken
//! in pieces. The engine may find that one of them needs more rows at a time than there is room for; and of several plugins that took
//! their worker process along nobody knows which did. Then the same stages run one after the other.

use std::ops::Range;

use super::plan::Origin;
use super::run::{Flow, Piped, Value, largest, lost};
use crate::engine::{Cause, Chain, Link, Source, link_bytes};
use crate::error::Status;
use crate::session::answer::Outputs;
use crate::session::caller::Caller;

/// What goes between two stages is at least so many links long, or it is quicker to keep it whole.
const LINKS_MIN: u64 = 2;

/// Stages that run at once, at least two, and what goes between them.
pub(super) struct Fused {
    pub(super) stages: Range<usize>,
    links: Vec<Link>,
}

impl Fused {
    /// Of these stages, which give what was `opened`, with links of about `asked` bytes; none if they cannot.
    fn new(piped: &Piped, stages: Range<usize>, opened: &[Outputs], asked: u64) -> Option<Self> {
        let plan = &piped.plan;
        let mut links: Vec<Link> = Vec::new();
        for stage in stages.clone() {
            let kernel = plan.stages[stage].kernel.kernel();
            if !kernel.streaming {
                return None;
            }
            let mut goes_on = stage == stages.start;
            let origins = plan.stages[stage].inputs.iter().enumerate();
            for (input, origin) in origins {
                let Origin::Stage(from, port) = *origin else {
                    continue;
                };
                if !stages.contains(&from) {
                    continue;
                }
                if kernel.inputs[input].whole {
                    return None;
                }
                goes_on = true;
                let of = (from - stages.start, port);
                let to = (stage - stages.start, input);
                if let Some(link) = links.iter_mut().find(|link| link.from == of) {
                    link.to.push(to);
                    continue;
                }
                let spec = &opened[from][port].1;
                let bytes = link_bytes(spec, asked)?;
                if spec.bytes().ok()? < LINKS_MIN.saturating_mul(bytes) || piped.leaves(from, port)
                {
                    return None;
                }
                links.push(Link {
                    from: of,
                    to: vec![to],
                    bytes,
                });
            }
            if !goes_on {
                return None;
            }
        }
        // Nobody else may want what is never there as a whole.
        let mut later = plan.stages[stages.end..]
            .iter()
            .flat_map(|stage| &stage.inputs);
        let first = stages.start;
        let linked = |origin: &Origin| match *origin {
            Origin::Stage(from, port) => {
                let mut links = links.iter();
                from >= first && links.any(|link| link.from == (from - first, port))
            }
            Origin::Input(_) => false,
        };
        (!later.any(linked)).then_some(Self { stages, links })
    }

    fn takes_within(&self, origin: Origin) -> bool {
        matches!(origin, Origin::Stage(from, _) if self.stages.contains(&from))
    }

    /// Whether what the stage gives there goes to another of them.
    fn is_linked(&self, stage: usize, port: usize) -> bool {
        let of = (stage - self.stages.start, port);
        self.links.iter().any(|link| link.from == of)
    }
}

impl Caller {
    /// The stages from `first` on that run at once; none if `first` runs alone. Where stages before them gave something else than was
    /// `announced`, they are opened once more.
    ///
    /// # Errors
    /// What they do not take of what is there now.
    pub(super) fn fused(
        &self,
        piped: &Piped,
        first: usize,
        (flow, opened, announced): (&Flow, &mut [Outputs], bool),
    ) -> Result<Option<Fused>, Status> {
        let asked = self.host().config().engine.link_bytes;
        let end = piped.plan.stages.len();
        let fused = |opened: &[Outputs], ends: Range<usize>| match asked {
            0 => None,
            asked => ends
                .rev()
                .find_map(|end| Fused::new(piped, first..end, opened, asked)),
        };
        let found = fused(opened, first + 2..end + 1);
        let (Some(found), false) = (&found, announced) else {
            return Ok(found);
        };
        let end = found.stages.end;
        for stage in found.stages.clone() {
            let inputs = piped.inputs_of(stage, |from, port| match from >= first {
                true => largest(&opened[from][port]),
                false => flow.look(from, port).map(Value::into_input),
            });
            let outputs = inputs.and_then(|inputs| self.open_stage(piped, stage, inputs));
            opened[stage] = outputs.map_err(|status| piped.plan.at_stage(stage, status))?;
        }
        Ok(fused(opened, end..end + 1))
    }

    /// Runs them; false if they are to be run one after the other.
    pub(super) fn run_fused(
        &self,
        piped: &Piped,
        fused: &Fused,
        opened: &[Outputs],
        flow: &mut Flow,
    ) -> Result<bool, Status> {
        let (plan, stages) = (&piped.plan, fused.stages.clone());
        let at = |stage: usize| move |status| plan.at_stage(stage, status);
        piped.check_time(stages.start).map_err(at(stages.start))?;
        let leaves = stages.clone().any(|stage| piped.gives(stage));
        let (inline, sealed) = (self.inline_of(leaves, flow), piped.seal && leaves);
        let (mut jobs, mut sources, mut charged) = (Vec::new(), Vec::new(), Vec::new());
        for stage in stages.clone() {
            let origins = &plan.stages[stage].inputs;
            let inputs = piped.inputs_of(stage, |from, port| {
                if stages.contains(&from) {
                    return largest(&opened[from][port]);
                }
                let value = flow.look(from, port)?;
                charged.extend(value.charge.clone());
                Ok(value.into_input())
            })?;
            let (job, means) = self
                .stage(piped, stage, inputs, inline)
                .map_err(at(stage))?;
            self.check_in_service(&job.kernel.plugin)
                .map_err(at(stage))?;
            let own = origins.iter().zip(means.inputs);
            sources.extend(
                own.map(|(origin, source)| match fused.takes_within(*origin) {
                    true => Source::Linked,
                    false => source,
                }),
            );
            jobs.push(job);
        }
        let chain = Chain {
            stages: jobs,
            links: fused.links.clone(),
        };
        let plugins = chain.stages.iter().map(|job| job.kernel.plugin.hash);
        let means = self.means(
            sources,
            plugins,
            sealed,
            piped.deadline,
            piped.cancel.clone(),
        );
        let done = match self.host().runner().chain(&chain, means) {
            Ok(done) => done,
            Err(failed) => {
                let one_by_one = match failed.cause {
                    Cause::Stalled => true,
                    Cause::Lost => !chain.is_of_one_plugin(),
                    _ => false,
                };
                if one_by_one {
                    return Ok(false);
                }
                let failing = failed.at.min(chain.stages.len() - 1);
                self.note_cost(&chain.stages[failing].kernel.plugin, &failed);
                return Err(plan.at_stage(stages.start + failing, failed.into()));
            }
        };
        drop(charged);
        flow.used.extend(done.used);
        for ((stage, job), report) in stages.clone().zip(&chain.stages).zip(done.reports) {
            flow.told(&plan.stages[stage].label, &job.kernel.kernel().name, report);
        }
        // What came from before has been taken.
        let origins = plan.stages[stages.clone()]
            .iter()
            .flat_map(|stage| &stage.inputs);
        for origin in origins {
            match *origin {
                Origin::Stage(from, port) if !stages.contains(&from) => {
                    drop(flow.pass(from, port)?);
                }
                Origin::Stage(..) | Origin::Input(_) => {}
            }
        }
        let mut outputs = done.outputs.into_iter();
        for stage in stages {
            for port in 0..plan.stages[stage].kernel.kernel().outputs.len() {
                if !fused.is_linked(stage, port) {
                    let missing = || lost("a result of a stage is missing");
                    let output = outputs.next().ok_or_else(missing)?;
                    self.given(piped, (stage, port), (output.body, sealed), flow)?;
                }
            }
        }
        Ok(true)
    }
}
