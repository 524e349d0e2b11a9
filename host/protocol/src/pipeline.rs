//! Kernels in a pipeline, as JSON: what INVOKE and KERNELS take beside the text for it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Kernels that run one after the other in one invocation, each on what the ones before it give.
///
/// An input that a stage does not name is bound as in the text of a pipeline: `docs/protocol.md`, "Pipelines".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// In the order in which they run: each takes only from those before it.
    pub stages: Vec<PipelineStage>,
    /// The pipeline's outputs, by name; none: those of the last stage, by the names of its ports.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub outputs: BTreeMap<String, StageInput>,
}

/// One kernel of a pipeline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineStage {
    /// What other stages and errors call it; none: its number, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `kernel` or `plugin/kernel`.
    pub kernel: String,
    /// Parameter to value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, Value>,
    /// Input port to where its tensor comes from.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, StageInput>,
}

/// Where a tensor comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum StageInput {
    /// `stage.port`; `.port` of the stage before (or, among a pipeline's outputs, of the last one); `stage`, if that has one output; or an
    /// input of the pipeline.
    Text(String),
    /// An input of the pipeline, whatever its name looks like.
    Input {
        /// Its name.
        input: String,
    },
}

/// What is told of a stage that has run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// Its name, or its number from 1.
    pub stage: String,
    /// The kernel's name.
    pub kernel: String,
    /// Bytes of its tensors that the host copied.
    pub copied_bytes: u64,
    /// Wall time from its instance to its results, in seconds.
    pub seconds: f64,
}

/// One pipeline in the answer to PIPELINES.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPipeline {
    /// Its name.
    pub name: String,
    /// As text.
    pub text: String,
    /// An operator made it, for everybody.
    pub shared: bool,
}

/// OK to PIPELINES.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipelineList {
    /// By name.
    pub pipelines: Vec<NamedPipeline>,
    /// Ask again with `after`.
    pub more: bool,
    /// The request's id.
    pub request_id: String,
}
