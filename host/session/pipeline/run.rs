//! The stages of a pipeline, one after the other, or several at once.
//!
//! ```text
//! Piped ── open each stage on the largest that those before it can give ──▶ run each (fused.rs: some at once) ──▶ Ran
//! ```
//! Both happen in one turn. The first finds what does not fit before anything runs; the second sees the true shapes.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use strait_memory::Charge;
use strait_protocol as wire;
use strait_tensor::{TensorPlace, TensorSpec};

use super::plan::{Origin, Plan};
use crate::engine::{
    CancelToken, Failed, FramePart, InlineRoom, Job, Limits, Means, OutputBody, Report, Used,
};
use crate::error::{Code, Reason, Status};
use crate::plugin::{CheckError, KernelRef, Value as Parameter};
use crate::session::answer::{InlineBytes, Outputs, ResultBody};
use crate::session::caller::Caller;
use crate::session::prepare::{Checked, Deadline, Found, Resolved, apart, threads, tightened};

/// Tensors in the order in which they are taken.
pub(super) type Inputs = Vec<(Found, TensorPlace)>;

/// A pipeline and what it is to run on.
#[derive(Debug)]
pub(in crate::session) struct Piped {
    pub(super) plan: Plan,
    /// One for each of the plan's.
    pub(super) inputs: Inputs,
    verify: bool,
    pub(super) seal: bool,
    threads: Option<NonZeroU32>,
    limits: Limits,
    inline: Option<InlineRoom>,
    pub(super) deadline: Deadline,
    request_id: Arc<str>,
    pub(super) cancel: CancelToken,
}

/// What a run has left: one kernel's or a pipeline's.
#[derive(Debug)]
pub(in crate::session) struct Ran {
    /// Output to what it has become.
    pub(in crate::session) results: Vec<(String, ResultBody)>,
    pub(in crate::session) report: Report,
    /// Of a pipeline.
    pub(in crate::session) stages: Vec<wire::StageReport>,
}

/// What a stage has given.
#[derive(Clone, Debug)]
pub(super) struct Value {
    found: Found,
    place: TensorPlace,
    /// Of bytes that are in no segment.
    pub(super) charge: Option<Arc<Charge>>,
}

impl Value {
    pub(super) fn into_input(self) -> (Found, TensorPlace) {
        (self.found, self.place)
    }
}

/// What is there between stages.
pub(super) struct Flow {
    /// By stage and port; what nobody needs any more is none.
    given: Vec<Vec<Option<Value>>>,
    /// How many later stages still take it, and, for one that leaves, the pipeline itself.
    takers: Vec<Vec<usize>>,
    /// For results that leave in the reply.
    room: Option<InlineRoom>,
    report: Report,
    stages: Vec<wire::StageReport>,
    pub(super) used: Vec<Used>,
}

impl Caller {
    /// Checks a request for a pipeline, as [`Caller::check`] does one for a kernel. What the tensors themselves must be like is found by
    /// [`Caller::open_pipeline`].
    pub(in crate::session) fn check_pipeline(
        &self,
        pipeline: &wire::Pipeline,
        inline: Option<InlineRoom>,
        invoke: &mut wire::Invoke,
        mut resolved: Resolved,
        deadline: Deadline,
        (request_id, cancel): (Arc<str>, CancelToken),
    ) -> Result<Checked<Piped>, Status> {
        self.host().admit()?;
        let plan = self.plan(pipeline)?;
        for (index, stage) in plan.stages.iter().enumerate() {
            self.check_in_service(&stage.kernel.plugin)
                .map_err(|status| plan.at_stage(index, status))?;
        }
        self.check_publisher(invoke)?;
        let declared = plan.declaration(String::new());
        if let Some(port) = resolved.keys().find(|port| !plan.inputs.contains(port)) {
            return Err(declared.unknown_input(port).into());
        }
        if let Some(name) = invoke.parameters.keys().next() {
            return Err(CheckError::UnknownParameter {
                kernel: declared.name.clone(),
                name: name.clone(),
                known: "those of its stages".to_owned(),
            }
            .into());
        }
        let mut inputs = Vec::with_capacity(plan.inputs.len());
        for name in &plan.inputs {
            let input = resolved.remove(name);
            inputs.push(input.ok_or_else(|| declared.missing_input(name))??);
        }
        let naming = self.naming(invoke, &declared)?;
        let limits = tightened(
            self.host().config().limits.limits(),
            invoke.limits.unwrap_or_default(),
        )?;
        let charge = self.charge_framed(inputs.iter())?;
        let work = Piped {
            plan,
            inputs,
            verify: invoke.verify,
            seal: naming.seal,
            threads: threads(invoke.threads)?,
            limits,
            inline,
            deadline,
            request_id,
            cancel,
        };
        Ok(Checked {
            work,
            naming,
            charge,
        })
    }

    /// The outputs that a pipeline would have, at their largest: each stage's `open` is asked, and nothing runs.
    pub(in crate::session) fn open_pipeline(&self, piped: &Piped) -> Result<Outputs, Status> {
        let opened = self.open_stages(piped)?;
        let outputs = piped.plan.outputs.iter();
        Ok(outputs
            .map(|(name, stage, port)| (name.clone(), opened[*stage][*port].1.clone()))
            .collect())
    }

    /// What each stage would give.
    fn open_stages(&self, piped: &Piped) -> Result<Vec<Outputs>, Status> {
        let plan = &piped.plan;
        let mut opened: Vec<Outputs> = Vec::with_capacity(plan.stages.len());
        for index in 0..plan.stages.len() {
            piped.check_time(index)?;
            let inputs = piped.inputs_of(index, |from, port| largest(&opened[from][port]));
            let outputs = inputs.and_then(|inputs| self.open_stage(piped, index, inputs));
            opened.push(outputs.map_err(|status| plan.at_stage(index, status))?);
        }
        Ok(opened)
    }

    /// What a stage would give on those inputs.
    pub(super) fn open_stage(
        &self,
        piped: &Piped,
        index: usize,
        inputs: Inputs,
    ) -> Result<Outputs, Status> {
        let (job, means) = self.stage(piped, index, inputs, None)?;
        let plugin = &job.kernel.plugin;
        self.check_in_service(plugin)?;
        let opened = self.host().runner().open_only(&job, means);
        Ok(opened.inspect_err(|failed| self.note_cost(plugin, failed))?)
    }

    /// Runs a pipeline to its end, if its stages fit. Blocks.
    pub(in crate::session) fn run_pipeline(
        &self,
        piped: &Piped,
    ) -> (Result<Ran, Status>, Vec<Used>) {
        let begin = Instant::now();
        let opened = match self.open_stages(piped) {
            Ok(opened) => opened,
            Err(status) => return (Err(status), Vec::new()),
        };
        let mut flow = Flow::new(piped);
        let ran = self
            .run_stages(piped, opened, &mut flow)
            .and_then(|()| self.leaving(piped, &mut flow));
        let ran = ran.map(|results| {
            flow.report.seconds.total = begin.elapsed().as_secs_f64();
            Ran {
                results,
                report: flow.report,
                stages: flow.stages,
            }
        });
        (ran, flow.used)
    }

    /// Runs the stages, which give what was `opened` at their largest. What they gave and is needed is in `flow`.
    fn run_stages(
        &self,
        piped: &Piped,
        mut opened: Vec<Outputs>,
        flow: &mut Flow,
    ) -> Result<(), Status> {
        let mut index = 0;
        let mut announced = true;
        while index < piped.plan.stages.len() {
            let fused = self.fused(piped, index, (flow, &mut opened, announced))?;
            let end = match &fused {
                Some(fused) => fused.stages.end,
                None => index + 1,
            };
            let at_once = match &fused {
                Some(fused) => self.run_fused(piped, fused, &opened, flow)?,
                None => false,
            };
            if !at_once {
                for index in index..end {
                    self.run_stage(piped, index, flow)
                        .map_err(|status| piped.plan.at_stage(index, status))?;
                }
            }
            for (stage, opened) in opened.iter().enumerate().take(end).skip(index) {
                announced &= flow.is_announced(stage, opened);
            }
            index = end;
        }
        Ok(())
    }

    fn run_stage(&self, piped: &Piped, index: usize, flow: &mut Flow) -> Result<(), Status> {
        piped.check_time(index)?;
        let stage = &piped.plan.stages[index];
        let (inputs, _charged) = flow.take(piped, index)?;
        let inline = self.inline_of(piped.gives(index), flow);
        let (job, means) = self.stage(piped, index, inputs, inline)?;
        let plugin = &job.kernel.plugin;
        self.check_in_service(plugin)?;
        let done = self.host().runner().invoke(&job, means);
        let mut done = done.inspect_err(|failed| self.note_cost(plugin, failed))?;
        flow.used.extend(done.used.take());
        flow.told(&stage.label, &job.kernel.kernel().name, done.report);
        for (port, output) in done.outputs.into_iter().enumerate() {
            self.given(
                piped,
                (index, port),
                (output.body, piped.seals(index)),
                flow,
            )?;
        }
        Ok(())
    }

    /// Keeps what a stage has given at a port for those that take it.
    pub(super) fn given(
        &self,
        piped: &Piped,
        (stage, port): (usize, usize),
        (body, sealed): (OutputBody, bool),
        flow: &mut Flow,
    ) -> Result<(), Status> {
        let value = self.value(body, sealed)?;
        let leaves = piped.leaves(stage, port);
        if let (true, Found::Inline(bytes), Some(room)) = (leaves, &value.found, &mut flow.room) {
            let taken = wire::padded(bytes.len() as u64).unwrap_or(u64::MAX);
            room.together = room.together.saturating_sub(taken);
        }
        if flow.takers[stage][port] > 0 {
            flow.given[stage][port] = Some(value);
        }
        Ok(())
    }

    /// Which results of stages are bytes and not segments: what `leaves` as the caller wants it, what stays as it is quickest.
    pub(super) fn inline_of(&self, leaves: bool, flow: &Flow) -> Option<InlineRoom> {
        if leaves {
            return flow.room;
        }
        let each = self.host().config().limits.inline_bytes;
        (each > 0).then_some(InlineRoom {
            each,
            together: wire::PAYLOAD_BYTES_MAX as u64,
        })
    }

    /// What the stage at `index` is to do, on those inputs.
    pub(super) fn stage(
        &self,
        piped: &Piped,
        index: usize,
        inputs: Inputs,
        inline: Option<InlineRoom>,
    ) -> Result<(Job, Means), Status> {
        let stage = &piped.plan.stages[index];
        let kernel = stage.kernel.clone();
        let declared = kernel.kernel();
        let ports = declared.inputs.iter().map(|port| port.name.clone());
        let named: BTreeMap<_, _> = ports.zip(inputs).collect();
        let checked = declared.check(named, |(_, place)| place.spec.clone(), &stage.parameters)?;
        let parameters: Vec<(String, Parameter)> = checked.parameters;
        let (inputs, sources) = apart(declared, checked.inputs);
        let plugins = [kernel.plugin.hash].into_iter();
        let seal = piped.seals(index);
        let means = self.means(sources, plugins, seal, piped.deadline, piped.cancel.clone());
        let job = Job {
            inputs,
            parameters,
            verify: piped.verify,
            threads: piped.threads,
            limits: piped.limits,
            inline,
            deadline_ms: piped.deadline.ms,
            request_id: Arc::clone(&piped.request_id),
            kernel,
        };
        Ok((job, means))
    }

    /// What a stage gave, for others to take.
    fn value(&self, body: OutputBody, seal: bool) -> Result<Value, Status> {
        match body {
            OutputBody::Inline { spec, bytes } => {
                let length = bytes.len() as u64;
                let charge = self.charge(length)?;
                Ok(Value {
                    found: Found::Inline(bytes.into()),
                    place: TensorPlace {
                        name: String::new(),
                        spec,
                        offset: 0,
                        length,
                    },
                    charge: Some(Arc::new(charge)),
                })
            }
            OutputBody::Segment { layout, segment } => {
                let live = self.live_result(layout, segment)?;
                if seal {
                    // What can be sealed cannot be an input before it is.
                    live.seal()?;
                }
                let place = live.tensors().first().cloned();
                let place = place.ok_or_else(|| lost("a result without a tensor"))?;
                Ok(Value {
                    found: Found::Segment(live),
                    place,
                    charge: None,
                })
            }
        }
    }

    /// The pipeline's outputs.
    fn leaving(&self, piped: &Piped, flow: &mut Flow) -> Result<Vec<(String, ResultBody)>, Status> {
        let outputs = piped.plan.outputs.iter();
        let results = outputs.map(|(name, stage, port)| {
            let value = flow.pass(*stage, *port)?;
            let body = match value.found {
                Found::Segment(segment) => ResultBody::Segment(segment),
                Found::Inline(bytes) => {
                    let charge = self.charge(bytes.len() as u64)?;
                    let bytes = InlineBytes::new(bytes.to_vec(), charge);
                    ResultBody::Inline(value.place.spec, Arc::new(bytes))
                }
            };
            Ok((name.clone(), body))
        });
        results.collect()
    }
}

impl Piped {
    /// The inputs of the stage at `index`, in its kernel's order: the pipeline's own, and what is `given` by earlier stages at a port.
    pub(super) fn inputs_of(
        &self,
        index: usize,
        mut given: impl FnMut(usize, usize) -> Result<(Found, TensorPlace), Status>,
    ) -> Result<Inputs, Status> {
        let origins = self.plan.stages[index].inputs.iter();
        origins
            .map(|origin| match *origin {
                Origin::Input(input) => Ok(self.inputs[input].clone()),
                Origin::Stage(stage, port) => given(stage, port),
            })
            .collect()
    }

    /// Names it in log lines.
    pub(in crate::session) fn request_id(&self) -> &Arc<str> {
        &self.request_id
    }

    /// Ends it.
    pub(in crate::session) fn cancel(&self) -> &CancelToken {
        &self.cancel
    }

    /// The kernel of its last stage.
    pub(in crate::session) fn last_kernel(&self) -> Option<&KernelRef> {
        self.plan.stages.last().map(|stage| &stage.kernel)
    }

    /// One for each of its plan's inputs.
    pub(in crate::session) fn inputs(&self) -> &[(Found, TensorPlace)] {
        &self.inputs
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn into_plan(self) -> Plan {
        self.plan
    }

    pub(super) fn inline(&self) -> Option<InlineRoom> {
        self.inline
    }

    /// Whether what the stage gives at `port` is one of the pipeline's outputs.
    pub(super) fn leaves(&self, stage: usize, port: usize) -> bool {
        let mut outputs = self.plan.outputs.iter();
        outputs.any(|(_, from, output)| (*from, *output) == (stage, port))
    }

    /// Whether anything that the stage gives is one of the pipeline's outputs.
    pub(super) fn gives(&self, stage: usize) -> bool {
        self.plan.outputs.iter().any(|(_, from, _)| *from == stage)
    }

    /// Whether the results of the stage are sealed for good.
    fn seals(&self, stage: usize) -> bool {
        self.seal && self.gives(stage)
    }

    /// Whether anybody still waits, before the stage at `index`.
    pub(super) fn check_time(&self, index: usize) -> Result<(), Status> {
        let kernel = &self.plan.stages[index].kernel.kernel().name;
        if self.cancel.is_cancelled() {
            return Err(Failed::cancelled(kernel).into());
        }
        if Instant::now() >= self.deadline.at {
            return Err(Failed::late(kernel, self.deadline.ms).into());
        }
        Ok(())
    }
}

impl Flow {
    fn new(piped: &Piped) -> Self {
        let plan = &piped.plan;
        let ports = plan
            .stages
            .iter()
            .map(|stage| stage.kernel.kernel().outputs.len());
        let mut takers: Vec<Vec<usize>> = ports.map(|ports| vec![0; ports]).collect();
        for origin in plan.stages.iter().flat_map(|stage| &stage.inputs) {
            if let Origin::Stage(stage, port) = *origin {
                takers[stage][port] += 1;
            }
        }
        for (_, stage, port) in &plan.outputs {
            takers[*stage][*port] += 1;
        }
        let given = takers.iter().map(|ports| vec![None; ports.len()]);
        Self {
            given: given.collect(),
            takers,
            room: piped.inline,
            report: Report::default(),
            stages: Vec::new(),
            used: Vec::new(),
        }
    }

    /// What the stage gave there, which is gone from here once nobody else takes it.
    pub(super) fn pass(&mut self, stage: usize, port: usize) -> Result<Value, Status> {
        let left = &mut self.takers[stage][port];
        *left = left.saturating_sub(1);
        let place = &mut self.given[stage][port];
        let value = match *left {
            0 => place.take(),
            _ => place.clone(),
        };
        value.ok_or_else(|| lost("a stage's output is not there any more"))
    }

    /// What the stage gave there, which stays.
    pub(super) fn look(&self, stage: usize, port: usize) -> Result<Value, Status> {
        let value = self.given[stage][port].clone();
        value.ok_or_else(|| lost("a stage's output is not there any more"))
    }

    /// Whether what the stage gave and others take is as large as it could become.
    fn is_announced(&self, stage: usize, opened: &Outputs) -> bool {
        let mut given = self.given[stage].iter().zip(opened);
        given.all(|(value, (_, spec))| value.as_ref().is_none_or(|value| value.place.spec == *spec))
    }

    /// The inputs of the stage at `index`, in its kernel's order, and what those are charged with that are bytes.
    fn take(&mut self, piped: &Piped, index: usize) -> Result<(Inputs, Vec<Arc<Charge>>), Status> {
        let mut charged = Vec::new();
        let inputs = piped.inputs_of(index, |stage, port| {
            let value = self.pass(stage, port)?;
            charged.extend(value.charge.clone());
            Ok(value.into_input())
        })?;
        Ok((inputs, charged))
    }

    /// Adds what a stage reports to what is told of the whole.
    pub(super) fn told(&mut self, label: &str, kernel: &str, report: Report) {
        let Report {
            notes,
            copied_bytes,
            pages,
            minor_faults,
            slices,
            seconds,
        } = report;
        let all = &mut self.report;
        all.notes.extend(prefixed(label, notes));
        all.pages.extend(pages.into_iter().map(|mut pages| {
            pages.port = format!("{label}.{}", pages.port);
            pages
        }));
        all.copied_bytes += copied_bytes;
        all.minor_faults += minor_faults;
        all.slices += slices;
        all.seconds.add_parts(&seconds);
        all.seconds.total += seconds.total;
        self.stages.push(wire::StageReport {
            stage: label.to_owned(),
            kernel: kernel.to_owned(),
            copied_bytes,
            seconds: seconds.total,
        });
    }
}

/// Notes of a stage, as they are told of the whole.
pub(super) fn prefixed(
    label: &str,
    notes: Vec<(String, String)>,
) -> impl Iterator<Item = (String, String)> {
    let notes = notes.into_iter();
    notes.map(move |(key, text)| (format!("{label}.{key}"), text))
}

/// A tensor that there is not yet, as large as it can become.
pub(super) fn largest((name, spec): &(String, TensorSpec)) -> Result<(Found, TensorPlace), Status> {
    let place = TensorPlace {
        name: name.clone(),
        spec: spec.clone(),
        offset: 0,
        length: spec.bytes()?,
    };
    Ok((Found::Inline(FramePart::default()), place))
}

pub(super) fn lost(what: &str) -> Status {
    Status::new(Code::Internal, Reason::Host, what)
}
