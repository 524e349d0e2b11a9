//! Several kernels in one invocation.
//!
//! ```text
//! text ──parse──▶ wire::Pipeline ──▶ Plan (kernels found, tensors wired) ──▶ Piped (inputs found) ──▶ open, run
//!   "a | b"         (or as JSON)       what is declared of it as of a kernel     one turn, one deadline
//! ```
//! What a stage gives is a result like any other, which nobody but later stages sees; it goes when the last of them has had it.

mod fused;
mod graph;
mod named;
mod plan;
mod ready;
mod run;
#[cfg(test)]
mod tests;
mod text;

use std::sync::Arc;

use strait_protocol as wire;

use super::caller::Caller;
use crate::error::{Code, Reason, Status};
use crate::plugin::{Kernel, KernelRef};

pub(super) use named::NamedPipelines;
pub(super) use plan::Plan;
pub(super) use ready::ReadyPipeline;
pub(super) use run::{Piped, Ran};
pub use text::{is_pipeline, parse, print};

/// The plugin that pipelines are listed under.
pub(super) const PLUGIN: &str = "pipeline";

/// Why there is no such pipeline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PipelineError {
    /// The text cannot be read.
    #[error("the pipeline's text, character {at}: {what}")]
    Text {
        /// Counted from 1.
        at: usize,
        /// What was expected, and what is there.
        what: String,
    },
    /// It makes no sense in itself.
    #[error("the pipeline: {0}")]
    Graph(String),
    /// A stage does not fit those before it.
    #[error("stage {number} (`{kernel}`): {what}")]
    Stage {
        /// Its number, from 1.
        number: usize,
        /// Its kernel.
        kernel: String,
        /// What does not fit.
        what: String,
    },
}

/// What a request that names a kernel asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// One kernel, by its name.
    Kernel,
    /// Several.
    Pipeline(wire::Pipeline),
    /// Several, by the name that they have.
    Named(String, Arc<wire::Pipeline>),
}

impl Asked {
    /// Of the fields `kernel` and `pipeline` of a request.
    ///
    /// # Errors
    /// `BAD_REQUEST` unless there is one of them; `BAD_PIPELINE`.
    pub(super) fn of(kernel: &str, pipeline: Option<wire::Pipeline>) -> Result<Self, Status> {
        match pipeline {
            Some(pipeline) if kernel.is_empty() => {
                graph::check(&pipeline)?;
                Ok(Self::Pipeline(pipeline))
            }
            None if !kernel.is_empty() => match is_pipeline(kernel) {
                true => Ok(Self::Pipeline(parse(kernel)?)),
                false => Ok(Self::Kernel),
            },
            Some(_) | None => Err(either()),
        }
    }

    /// The pipeline, if it is one.
    pub(super) fn pipeline(&self) -> Option<&wire::Pipeline> {
        match self {
            Self::Kernel => None,
            Self::Pipeline(pipeline) => Some(pipeline),
            Self::Named(_, pipeline) => Some(pipeline),
        }
    }

    /// What is asked for, in messages: kernels without their plugins.
    pub(super) fn name(&self, kernel: &str) -> String {
        let last = |kernel: &str| kernel.rsplit('/').next().unwrap_or(kernel).to_owned();
        match self {
            Self::Kernel => last(kernel),
            Self::Named(name, _) => name.clone(),
            Self::Pipeline(pipeline) => {
                let stages = pipeline.stages.iter();
                let names: Vec<_> = stages.map(|stage| last(&stage.kernel)).collect();
                crate::text::name(&names.join(" | "))
            }
        }
    }
}

/// A request names a kernel and a pipeline, or neither.
fn either() -> Status {
    Status::new(
        Code::InvalidArgument,
        Reason::BadRequest,
        "it takes either `kernel`, which may be a pipeline's text, or `pipeline`",
    )
}

impl Caller {
    /// The stages of a pipeline, found and wired.
    ///
    /// # Errors
    /// `BAD_PIPELINE`; what the kernel of a stage cannot be found or run for, and tensors that can never fit, by that stage.
    pub(super) fn plan(&self, pipeline: &wire::Pipeline) -> Result<Plan, Status> {
        Plan::new(pipeline, |name| self.kernel(name))
    }

    /// A pipeline as if it were a kernel: its ports, and no parameters.
    ///
    /// # Errors
    /// As an INVOKE of it is answered that says nothing of its inputs.
    pub fn declared(&self, pipeline: &wire::Pipeline) -> Result<Kernel, Status> {
        graph::check(pipeline)?;
        Ok(self.plan(pipeline)?.declaration(print(pipeline)))
    }

    /// The kernel of that name, which may be to stream.
    ///
    /// # Errors
    /// `UNSUPPORTED` for a pipeline; as [`Caller::kernel`].
    pub fn kernel_to_stream(&self, name: &str) -> Result<KernelRef, Status> {
        if self.asked(name, None)?.pipeline().is_some() {
            let message = "a pipeline does not stream; call it with whole tensors, or stream each of its kernels";
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::Unsupported,
                message,
            ));
        }
        self.kernel(name)
    }
}
