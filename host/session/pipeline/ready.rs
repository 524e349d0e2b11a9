//! A pipeline that is prepared: each stage is ready, and a call goes from one to the next as bytes.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use strait_tensor::TensorSpec;

use super::plan::{Origin, Plan};
use super::run::{Piped, largest, prefixed};
use crate::engine::{
    Batches, Brought, CancelToken, Cause, Done, Failed, Output, OutputBody, Ready, Report,
    Stage as During,
};
use crate::error::{Code, Reason, Status};
use crate::plugin::{KernelRef, Plugin};
use crate::session::answer::Outputs;
use crate::session::caller::Caller;

/// What is known of a prepared pipeline beside what runs it.
#[derive(Debug)]
pub(in crate::session) struct ReadyPipeline {
    pub(in crate::session) name: String,
    plan: Plan,
    trouble: Mutex<Trouble>,
}

/// Where a call failed last, and of what, if that is not the engine's affair.
#[derive(Debug, Default)]
struct Trouble {
    at: usize,
    refused: Option<Status>,
}

/// The stages, each ready.
#[derive(Debug)]
struct Stages {
    known: Arc<ReadyPipeline>,
    /// The pipeline's inputs, at their largest, and whether a call brings them.
    inputs: Vec<(TensorSpec, bool)>,
    stages: Vec<Box<dyn Ready>>,
    /// What each stage gives at most.
    largest: Vec<Outputs>,
    /// Stages that the last call got to.
    ran: usize,
}

impl Caller {
    /// Has each stage told all but the elements. Blocks.
    pub(in crate::session) fn prepare_pipeline(
        &self,
        piped: Piped,
        name: String,
    ) -> Result<(Box<dyn Ready>, Arc<ReadyPipeline>), Status> {
        let plan = piped.plan();
        let mut stages: Vec<Box<dyn Ready>> = Vec::with_capacity(plan.stages.len());
        let mut opened: Vec<Outputs> = Vec::with_capacity(plan.stages.len());
        for index in 0..plan.stages.len() {
            let inputs = piped.inputs_of(index, |from, port| largest(&opened[from][port]));
            let ready = inputs.and_then(|inputs| {
                piped.check_time(index)?;
                let (job, means) = self.stage(&piped, index, inputs, piped.inline())?;
                let plugin = Arc::clone(&job.kernel.plugin);
                self.check_in_service(&plugin)?;
                let ready = Arc::clone(self.host().runner()).prepare(job, means);
                Ok(ready.inspect_err(|failed| self.note_cost(&plugin, failed))?)
            });
            let ready = ready.map_err(|status| plan.at_stage(index, status))?;
            opened.push(ready.outputs());
            stages.push(ready);
        }
        let inputs = piped.inputs().iter();
        let inputs = inputs.map(|(found, place)| (place.spec.clone(), found.is_inline()));
        let inputs = inputs.collect();
        let known = Arc::new(ReadyPipeline {
            name,
            plan: piped.into_plan(),
            trouble: Mutex::default(),
        });
        let chain = Stages {
            known: Arc::clone(&known),
            inputs,
            stages,
            largest: opened,
            ran: 0,
        };
        Ok((Box::new(chain), known))
    }
}

impl ReadyPipeline {
    /// The kernels of its stages.
    pub(in crate::session) fn kernels(&self) -> impl Iterator<Item = &KernelRef> {
        self.plan.stages.iter().map(|stage| &stage.kernel)
    }

    /// The plugin of the stage that failed last.
    pub(in crate::session) fn failing(&self) -> &Arc<Plugin> {
        let at = self.trouble.lock().at;
        &self.plan.stages[at].kernel.plugin
    }

    /// What is told of that.
    pub(in crate::session) fn told(&self, failed: Failed) -> Status {
        let mut trouble = self.trouble.lock();
        let status = trouble.refused.take();
        self.plan
            .at_stage(trouble.at, status.unwrap_or_else(|| failed.into()))
    }
}

impl Stages {
    fn run_stage(
        &mut self,
        index: usize,
        brought: &[Option<Brought>],
        given: &[Vec<Brought>],
        (deadline, cancel): (Instant, &CancelToken),
    ) -> Result<Done, Failed> {
        let stage = &self.known.plan.stages[index];
        let kernel = stage.kernel.kernel();
        let mut trouble = self.known.trouble.lock();
        *trouble = Trouble {
            at: index,
            refused: None,
        };
        let (mut specs, mut own) = (Vec::new(), Vec::new());
        for origin in &stage.inputs {
            let (most, from) = match *origin {
                Origin::Input(input) => (&self.inputs[input].0, brought[input].as_ref()),
                Origin::Stage(from, port) => (&self.largest[from][port].1, given[from].get(port)),
            };
            let shape = from.map_or(&most.shape, |brought| &brought.shape);
            specs.push(TensorSpec {
                dtype: most.dtype,
                shape: shape.clone(),
            });
            own.extend(from.cloned());
        }
        if let Err((port, how)) = kernel.axes_fit(&specs, []) {
            let message = format!("input `{}` of kernel `{}`: {how}", port.name, kernel.name);
            let refused = Status::new(Code::InvalidArgument, Reason::BadInput, message);
            trouble.refused = Some(refused);
            return Err(Failed::new(&kernel.name, During::Open, Cause::Cancelled));
        }
        drop(trouble);
        self.ran = index + 1;
        self.stages[index].run(own, deadline, cancel)
    }

    /// What a stage gave, for later ones.
    fn given(&self, index: usize, done: &mut Done) -> Result<Vec<Brought>, Failed> {
        let kernel = &self.known.plan.stages[index].kernel.kernel().name;
        let outputs = done.outputs.drain(..).zip(&self.largest[index]);
        let given = outputs.map(|(output, (port, most))| match output.body {
            OutputBody::Inline { spec, bytes } if is_within(&spec.shape, &most.shape) => Ok(Brought {
                shape: spec.shape,
                elements: bytes.into(),
            }),
            OutputBody::Inline { spec, .. } => {
                let how = format!(
                    "it gave output `{port}` the sizes {:?}, and for the largest inputs it said {:?}",
                    spec.shape, most.shape
                );
                Err(Failed::new(kernel, During::Extents, Cause::Contract(how)))
            }
            OutputBody::Segment { .. } => {
                let lost = Cause::Host("a prepared stage left no bytes".to_owned());
                Err(Failed::new(kernel, During::Results, lost))
            }
        });
        given.collect()
    }
}

impl Ready for Stages {
    fn outputs(&self) -> Outputs {
        let outputs = self.known.plan.outputs.iter();
        let largest = outputs.map(|(name, stage, port)| {
            let (_, spec) = &self.largest[*stage][*port];
            (name.clone(), spec.clone())
        });
        largest.collect()
    }

    fn waiting_bytes(&self) -> u64 {
        let bytes = self.stages.iter().map(|ready| ready.waiting_bytes());
        bytes.fold(0, u64::saturating_add)
    }

    fn run(
        &mut self,
        brought: Vec<Brought>,
        deadline: Instant,
        cancel: &CancelToken,
    ) -> Result<Done, Failed> {
        let mut brought = brought.into_iter();
        let inputs = self.inputs.iter();
        let brought: Vec<_> = inputs
            .map(|(_, is_brought)| is_brought.then(|| brought.next()).flatten())
            .collect();
        self.ran = 0;
        let mut report = Report::default();
        let mut given: Vec<Vec<Brought>> = Vec::with_capacity(self.stages.len());
        for index in 0..self.stages.len() {
            let mut done = self.run_stage(index, &brought, &given, (deadline, cancel))?;
            given.push(self.given(index, &mut done)?);
            let label = &self.known.plan.stages[index].label;
            report.notes.extend(prefixed(label, done.report.notes));
        }
        let outputs = self.known.plan.outputs.iter();
        let outputs = outputs.map(|(name, stage, port)| {
            let given = &given[*stage][*port];
            let body = OutputBody::Inline {
                spec: TensorSpec {
                    dtype: self.largest[*stage][*port].1.dtype,
                    shape: given.shape.clone(),
                },
                bytes: given.elements.to_vec(),
            };
            Output {
                port: name.clone(),
                body,
            }
        });
        Ok(Done {
            outputs: outputs.collect(),
            report,
            used: None,
        })
    }

    fn stream(
        &mut self,
        _batches: &mut dyn Batches,
        _cancel: &CancelToken,
    ) -> Result<Vec<(String, String)>, Failed> {
        // PREPARE refuses it.
        let cause = Cause::Host("a pipeline does not stream".to_owned());
        Err(Failed::new(&self.known.name, During::Run, cause))
    }

    fn renew(&mut self) -> Result<(), Failed> {
        let mut result = Ok(());
        for (index, ready) in self.stages.iter_mut().enumerate().take(self.ran) {
            let renewed = ready.renew();
            if renewed.is_err() {
                self.known.trouble.lock().at = index;
                result = renewed;
            }
        }
        result
    }
}

/// Whether `shape` is at most `most` along each axis.
fn is_within(shape: &[u64], most: &[u64]) -> bool {
    shape.len() == most.len() && shape.iter().zip(most).all(|(size, most)| size <= most)
}
