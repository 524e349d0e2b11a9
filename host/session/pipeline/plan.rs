//! Which kernel's output goes to which kernel's input.
//!
//! An input that its stage does not name gets the output of the stage before if it is the first that takes data, and is an input of the
//! pipeline otherwise: `docs/protocol.md`, "Pipelines", has the rules.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use strait_protocol as wire;

use super::PipelineError;
use super::graph::From;
use crate::error::{Code, Reason, Status};
use crate::plugin::{Combine, ITEMS_MAX, Kernel, KernelRef, OUTPUTS_MAX, Port, Role};
use crate::text::name as shown;

/// Where a stage's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::session) enum Origin {
    /// The pipeline's input of that index.
    Input(usize),
    /// What an earlier stage gives, by its index and that of its port.
    Stage(usize, usize),
}

/// One kernel, and what it gets.
#[derive(Clone, Debug)]
pub(in crate::session) struct Stage {
    pub(in crate::session) kernel: KernelRef,
    /// Its name, or its number from 1.
    pub(in crate::session) label: String,
    pub(in crate::session) parameters: BTreeMap<String, Json>,
    /// In the kernel's order.
    pub(in crate::session) inputs: Vec<Origin>,
}

/// A pipeline whose kernels are there and fit together, as far as their declarations say.
#[derive(Clone, Debug)]
pub(in crate::session) struct Plan {
    pub(in crate::session) stages: Vec<Stage>,
    /// The pipeline's inputs, in the order in which stages take them.
    pub(in crate::session) inputs: Vec<String>,
    /// The pipeline's outputs: name, stage and port.
    pub(in crate::session) outputs: Vec<(String, usize, usize)>,
}

/// A stage as it is being wired.
struct Wiring<'a> {
    plan: Plan,
    asked: &'a [wire::PipelineStage],
    at: usize,
}

impl Plan {
    /// Finds each kernel by `find`, and wires them.
    ///
    /// # Errors
    /// `BAD_PIPELINE`, and what `find` says, by the stage that it concerns.
    pub(super) fn new(
        pipeline: &wire::Pipeline,
        find: impl Fn(&str) -> Result<KernelRef, Status>,
    ) -> Result<Self, Status> {
        let mut stages = Vec::with_capacity(pipeline.stages.len());
        for (index, stage) in pipeline.stages.iter().enumerate() {
            let number = index + 1;
            let kernel = find(&stage.kernel)
                .map_err(|status| at_stage(status, number, &shown(&stage.kernel)))?;
            stages.push(Stage {
                kernel,
                label: stage.name.clone().unwrap_or_else(|| number.to_string()),
                parameters: stage.parameters.clone(),
                inputs: Vec::new(),
            });
        }
        let mut wiring = Wiring {
            plan: Self {
                stages,
                inputs: Vec::new(),
                outputs: Vec::new(),
            },
            asked: &pipeline.stages,
            at: 0,
        };
        let free = wiring.free_names()?;
        for at in 0..pipeline.stages.len() {
            wiring.at = at;
            wiring.wire(&free)?;
        }
        wiring.at = pipeline.stages.len();
        wiring.leave(&pipeline.outputs)?;
        wiring.plan.check()?;
        Ok(wiring.plan)
    }

    /// What the stage at `index` gives at `port`.
    pub(in crate::session) fn port(&self, stage: usize, port: usize) -> &Port {
        &self.stages[stage].kernel.kernel().outputs[port]
    }

    /// The pipeline's inputs of `index` as stages take it: their ports.
    fn takers(&self, index: usize) -> impl Iterator<Item = &Port> {
        let stages = self.stages.iter();
        stages.flat_map(move |stage| {
            let ports = stage.kernel.kernel().inputs.iter();
            let taken = ports.zip(&stage.inputs);
            taken
                .filter_map(move |(port, origin)| (*origin == Origin::Input(index)).then_some(port))
        })
    }

    /// The pipeline as if it were a kernel of that name.
    pub(super) fn declaration(&self, doc: String) -> Kernel {
        let names: Vec<_> = self
            .stages
            .iter()
            .map(|stage| stage.kernel.kernel().name.as_str())
            .collect();
        let inputs = self.inputs.iter().enumerate().filter_map(|(index, name)| {
            let mut takers = self.takers(index);
            let mut port = takers.next()?.clone();
            port.name.clone_from(name);
            for taker in takers {
                port.dtypes.retain(|dtype| taker.dtypes.contains(dtype));
                port.rank_min = port.rank_min.max(taker.rank_min);
                port.rank_max = port.rank_max.min(taker.rank_max);
                port.whole |= taker.whole;
            }
            Some(port)
        });
        let outputs = self.outputs.iter().map(|(name, stage, port)| Port {
            name: name.clone(),
            ..self.port(*stage, *port).clone()
        });
        Kernel {
            name: shown(&names.join(" | ")),
            doc,
            inputs: inputs.collect(),
            outputs: outputs.collect(),
            parameters: Vec::new(),
            signature: None,
            split_axis: None,
            combine: Combine::None,
            streaming: false,
            in_place: false,
        }
    }

    /// A failure of the stage at `index`, as it is told.
    pub(in crate::session) fn at_stage(&self, index: usize, status: Status) -> Status {
        at_stage(status, index + 1, &self.stages[index].kernel.kernel().name)
    }

    /// Whether all that is given is taken, and could be.
    fn check(&self) -> Result<(), Status> {
        for (index, stage) in self.stages.iter().enumerate() {
            let kernel = stage.kernel.kernel();
            for (port, origin) in kernel.inputs.iter().zip(&stage.inputs) {
                if let Origin::Stage(from, output) = *origin {
                    let given = self.port(from, output);
                    fits(port, given).map_err(|how| {
                        let message = format!(
                            "input `{}` of kernel `{}`: output `{}` of stage {} (`{}`) {how}",
                            port.name,
                            kernel.name,
                            given.name,
                            from + 1,
                            self.stages[from].kernel.kernel().name,
                        );
                        let status = Status::new(Code::InvalidArgument, Reason::BadInput, message);
                        self.at_stage(index, status.with("name", port.name.as_str()))
                    })?;
                }
            }
            let taken = self.stages.iter().flat_map(|stage| &stage.inputs);
            let mut taken =
                taken.filter(|origin| matches!(origin, Origin::Stage(from, _) if *from == index));
            let leaves = self.outputs.iter().any(|(_, from, _)| *from == index);
            if taken.next().is_none() && !leaves {
                return Err(wrong(
                    index,
                    &stage.kernel,
                    "nothing takes what it gives; name it in a later stage, as `port: stage.port`, or among the outputs, or leave the stage out".to_owned(),
                ));
            }
        }
        if self.inputs.len() > ITEMS_MAX || self.outputs.len() > OUTPUTS_MAX {
            let what = format!(
                "it has {} inputs and {} outputs, at most {ITEMS_MAX} and {OUTPUTS_MAX} are possible",
                self.inputs.len(),
                self.outputs.len()
            );
            return Err(PipelineError::Graph(what).into());
        }
        for (index, name) in self.inputs.iter().enumerate() {
            let takers: Vec<_> = self.takers(index).collect();
            for (n, taker) in takers.iter().enumerate() {
                if let Some(other) = takers[..n].iter().find(|other| fits(taker, other).is_err()) {
                    let what = format!(
                        "its input `{name}` goes to ports `{}` and `{}`, and no tensor fits both",
                        other.name, taker.name
                    );
                    return Err(PipelineError::Graph(what).into());
                }
            }
        }
        Ok(())
    }
}

/// Whether a tensor can be what `given` says and what `port` takes.
fn fits(port: &Port, given: &Port) -> Result<(), String> {
    if !given.dtypes.iter().any(|dtype| port.dtypes.contains(dtype)) {
        let names = |port: &Port| {
            let names: Vec<_> = port.dtypes.iter().map(|dtype| dtype.name()).collect();
            names.join(", ")
        };
        return Err(format!(
            "is of dtype {}, it takes {}; convert it with the kernel `cast`",
            names(given),
            names(port)
        ));
    }
    if given.rank_max < port.rank_min || given.rank_min > port.rank_max {
        return Err(format!(
            "has rank {} to {}, it takes {} to {}",
            given.rank_min, given.rank_max, port.rank_min, port.rank_max
        ));
    }
    Ok(())
}

/// `status`, told of stage `number`, whose kernel that is.
fn at_stage(mut status: Status, number: usize, kernel: &str) -> Status {
    status.message = format!("stage {number} (`{kernel}`): {}", status.message);
    status.with("stage", number).with("kernel", kernel)
}

fn wrong(index: usize, kernel: &KernelRef, what: String) -> Status {
    let error = PipelineError::Stage {
        number: index + 1,
        kernel: kernel.kernel().name.clone(),
        what,
    };
    Status::from(error)
        .with("stage", index + 1)
        .with("kernel", kernel.kernel().name.as_str())
}

impl Wiring<'_> {
    /// What does not fit at the stage that is being wired, or at the outputs.
    fn wrong(&self, what: String) -> Status {
        match self.plan.stages.get(self.at) {
            Some(stage) => wrong(self.at, &stage.kernel, what),
            None => PipelineError::Graph(format!("its outputs: {what}")).into(),
        }
    }

    fn kernel(&self, stage: usize) -> &Kernel {
        self.plan.stages[stage].kernel.kernel()
    }

    /// The port of the stage at `at` that what the stage before gives goes to, without anybody's word: the first that takes data and is
    /// not named, if nothing of the stage takes from there by name.
    fn follows(&self, at: usize) -> Option<usize> {
        let asked = &self.asked[at].inputs;
        let before = at.checked_sub(1)?;
        let is_before = |from: &wire::StageInput| match From::of(from) {
            From::Before(_) => true,
            From::Port(stage, _) => self.earlier(at, stage) == Some(before),
            From::Name(stage) => self.named(stage) == Some(before),
            From::Input(_) => false,
        };
        if asked.values().any(is_before) {
            return None;
        }
        let mut ports = self.kernel(at).inputs.iter();
        ports.position(|port| port.role == Role::Data && !asked.contains_key(&port.name))
    }

    /// What the ports that no stage names, and nothing goes to, are called as inputs of the pipeline: by stage and port.
    fn free_names(&self) -> Result<BTreeMap<(usize, usize), String>, Status> {
        let mut free: BTreeMap<&str, Vec<(usize, usize)>> = BTreeMap::new();
        for (at, asked) in self.asked.iter().enumerate() {
            let follows = self.follows(at);
            for (index, port) in self.kernel(at).inputs.iter().enumerate() {
                if !asked.inputs.contains_key(&port.name) && follows != Some(index) {
                    free.entry(&port.name).or_default().push((at, index));
                }
            }
        }
        let mut names = BTreeMap::new();
        for (port, places) in free {
            let is_alone = places.len() == 1;
            for (at, index) in places {
                let name = match is_alone {
                    true => port.to_owned(),
                    false => format!("{}.{port}", self.plan.stages[at].label),
                };
                names.insert((at, index), name);
            }
        }
        Ok(names)
    }

    /// Gives each input of the stage at `at` its origin.
    fn wire(&mut self, free: &BTreeMap<(usize, usize), String>) -> Result<(), Status> {
        let at = self.at;
        let kernel = self.plan.stages[at].kernel.clone();
        let kernel = kernel.kernel();
        let asked = &self.asked[at];
        if let Some(port) = asked
            .inputs
            .keys()
            .find(|name| kernel.inputs.iter().all(|port| port.name != **name))
        {
            let error = kernel.unknown_input(port);
            return Err(self.plan.at_stage(at, error.into()));
        }
        let follows = self.follows(at);
        for (index, port) in kernel.inputs.iter().enumerate() {
            let origin = match (asked.inputs.get(&port.name), free.get(&(at, index))) {
                (Some(from), _) => self.origin(from)?,
                (None, Some(name)) => self.input(name),
                (None, None) if follows == Some(index) => {
                    let before = at - 1;
                    Origin::Stage(before, self.only_output(before)?)
                }
                (None, None) => {
                    return Err(self.wrong(format!("input `{}` gets nothing", port.name)));
                }
            };
            self.plan.stages[at].inputs.push(origin);
        }
        Ok(())
    }

    /// The pipeline's outputs.
    fn leave(&mut self, asked: &BTreeMap<String, wire::StageInput>) -> Result<(), Status> {
        let last = self.at - 1;
        if asked.is_empty() {
            let ports = self.kernel(last).outputs.iter().enumerate();
            let outputs = ports.map(|(index, port)| (port.name.clone(), last, index));
            self.plan.outputs = outputs.collect();
            return Ok(());
        }
        for (name, from) in asked {
            match self.origin(from)? {
                Origin::Stage(stage, port) => self.plan.outputs.push((name.clone(), stage, port)),
                Origin::Input(_) => {
                    return Err(self.wrong(format!(
                        "`{name}` would be an input of the pipeline; an output is what a stage gives: a stage, STAGE.PORT or .PORT"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The stage before `at` of that name or number.
    fn earlier(&self, at: usize, name: &str) -> Option<usize> {
        let mut stages = self.plan.stages[..at].iter();
        let by_number = || {
            name.parse::<usize>()
                .ok()?
                .checked_sub(1)
                .filter(|index| *index < at)
        };
        stages
            .position(|stage| stage.label == name)
            .or_else(by_number)
    }

    /// The stage that has that name, and not merely that number: a number alone is the name of an input.
    fn named(&self, name: &str) -> Option<usize> {
        let mut stages = self.asked.iter();
        stages.position(|stage| stage.name.as_deref() == Some(name))
    }

    fn origin(&mut self, from: &wire::StageInput) -> Result<Origin, Status> {
        let at = self.at;
        match From::of(from) {
            From::Input(name) => Ok(self.input(name)),
            From::Name(name) => match self.named(name) {
                Some(stage) if stage < at => Ok(Origin::Stage(stage, self.only_output(stage)?)),
                Some(_) => Err(self.wrong(format!(
                    "`{name}` is a stage that does not come before it; a stage takes from earlier ones"
                ))),
                None => Ok(self.input(name)),
            },
            From::Before(port) => match at.checked_sub(1) {
                Some(before) => Ok(Origin::Stage(before, self.output(before, port)?)),
                None => Err(self.wrong(format!("`.{port}`: there is no stage before the first"))),
            },
            From::Port(stage, port) => match self.earlier(at, stage) {
                Some(found) => Ok(Origin::Stage(found, self.output(found, port)?)),
                None => Err(self.wrong(format!(
                    "`{stage}.{port}`: no stage before it is called `{stage}`; an input of the pipeline with a dot in its name is written in quotes"
                ))),
            },
        }
    }

    /// The pipeline's input of that name.
    fn input(&mut self, name: &str) -> Origin {
        let inputs = &mut self.plan.inputs;
        let index = inputs.iter().position(|input| input == name);
        Origin::Input(index.unwrap_or_else(|| {
            inputs.push(name.to_owned());
            inputs.len() - 1
        }))
    }

    fn output(&self, stage: usize, port: &str) -> Result<usize, Status> {
        let outputs = &self.kernel(stage).outputs;
        let found = outputs.iter().position(|output| output.name == port);
        found.ok_or_else(|| self.choose(stage, &format!("has no output `{}`", shown(port))))
    }

    /// The one output of a stage, or the one that is data.
    fn only_output(&self, stage: usize) -> Result<usize, Status> {
        let outputs = &self.kernel(stage).outputs;
        if outputs.len() == 1 {
            return Ok(0);
        }
        let mut data = (0..outputs.len()).filter(|index| outputs[*index].role == Role::Data);
        match (data.next(), data.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(self.choose(stage, "has several outputs; say which")),
        }
    }

    fn choose(&self, stage: usize, what: &str) -> Status {
        let label = &self.plan.stages[stage].label;
        let kernel = self.kernel(stage);
        let names: Vec<_> = kernel
            .outputs
            .iter()
            .map(|port| format!("`{label}.{}`", port.name))
            .collect();
        self.wrong(format!(
            "stage {} (`{}`) {what}: {}",
            stage + 1,
            kernel.name,
            names.join(", ")
        ))
    }
}
