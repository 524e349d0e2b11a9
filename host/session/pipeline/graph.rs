//! Whether a pipeline's JSON makes sense in itself, before anybody knows its kernels.

use std::collections::BTreeSet;

use serde_json::Value;
use strait_protocol::{Pipeline, StageInput};

use super::PipelineError;
use crate::plugin::{ITEMS_MAX, OUTPUTS_MAX};
use crate::text::name as shown;

/// Most stages of a pipeline.
pub(super) const STAGES_MAX: usize = 32;
/// Longest name of a stage, port or kernel in bytes.
const NAME_BYTES_MAX: usize = 200;

/// Where a tensor comes from, of which the names have been taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From<'a> {
    /// A port of the stage before.
    Before(&'a str),
    /// A port of a stage, by name or number.
    Port(&'a str, &'a str),
    /// A stage with one output, or an input of the pipeline.
    Name(&'a str),
    /// An input of the pipeline.
    Input(&'a str),
}

impl<'a> From<'a> {
    pub(super) fn of(from: &'a StageInput) -> Self {
        match from {
            StageInput::Input { input } => Self::Input(input),
            StageInput::Text(text) => match text.split_once('.') {
                Some(("", port)) => Self::Before(port),
                Some((stage, port)) => Self::Port(stage, port),
                None => Self::Name(text),
            },
        }
    }
}

/// A word as plugins name ports, parameters and kernels by.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    !text.is_empty()
        && text.len() <= NAME_BYTES_MAX
        && text.chars().all(allowed)
        && !text.contains("->")
}

/// What a stage may be called: nothing that could be a number, or has a dot.
fn is_stage_name(text: &str) -> bool {
    let begins = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(begins) && text.len() <= 64 && is_name(text) && !text.contains(['.', '+'])
}

fn wrong<T>(what: String) -> Result<T, PipelineError> {
    Err(PipelineError::Graph(what))
}

/// Holds a pipeline against the rules for names, counts and values.
///
/// # Errors
/// [`PipelineError`]: what is wrong, and with which stage.
pub(super) fn check(pipeline: &Pipeline) -> Result<(), PipelineError> {
    let count = pipeline.stages.len();
    if count == 0 || count > STAGES_MAX {
        return wrong(format!(
            "it has {count} stages, 1 to {STAGES_MAX} are possible"
        ));
    }
    let mut names = BTreeSet::new();
    for (index, stage) in pipeline.stages.iter().enumerate() {
        let number = index + 1;
        if let Some(name) = &stage.name {
            let shown = shown(name);
            if !is_stage_name(name) {
                return wrong(format!(
                    "stage {number} is named `{shown}`; a name begins with a letter or _, and has letters, digits, _ and - (at most 64)"
                ));
            }
            if !names.insert(name.as_str()) {
                return wrong(format!("two stages are named `{shown}`"));
            }
        }
        if stage.kernel.is_empty() || stage.kernel.len() > 4096 {
            return wrong(format!("stage {number} names no kernel"));
        }
        if stage.inputs.len() > ITEMS_MAX || stage.parameters.len() > ITEMS_MAX {
            return wrong(format!(
                "stage {number} has more inputs or parameters than the {ITEMS_MAX} that a kernel can have"
            ));
        }
        for name in stage.inputs.keys().chain(stage.parameters.keys()) {
            if !is_name(name) {
                return wrong(format!(
                    "stage {number}: no input or parameter can have the name `{}`",
                    shown(name)
                ));
            }
        }
        for (name, value) in &stage.parameters {
            if !is_value(value) {
                return wrong(format!(
                    "stage {number}: parameter `{name}` is neither a boolean, a number, text, nor a list of such"
                ));
            }
        }
        for from in stage.inputs.values() {
            source(from, &format!("stage {number}"))?;
        }
    }
    if pipeline.outputs.len() > OUTPUTS_MAX {
        return wrong(format!(
            "it has {} outputs, at most {OUTPUTS_MAX} are possible",
            pipeline.outputs.len()
        ));
    }
    for (name, from) in &pipeline.outputs {
        if !is_name(name) {
            return wrong(format!("no output can have the name `{}`", shown(name)));
        }
        source(from, &format!("output `{name}`"))?;
    }
    Ok(())
}

fn source(from: &StageInput, whose: &str) -> Result<(), PipelineError> {
    let fine = match From::of(from) {
        From::Before(port) | From::Name(port) | From::Input(port) => is_name(port),
        From::Port(stage, port) => {
            let is_number = !stage.is_empty() && stage.bytes().all(|b| b.is_ascii_digit());
            (is_number || is_stage_name(stage)) && is_name(port)
        }
    };
    let (StageInput::Text(text) | StageInput::Input { input: text }) = from;
    match fine {
        true => Ok(()),
        false => wrong(format!(
            "{whose}: `{}` is neither a stage, STAGE.PORT, .PORT nor the name of an input (one with a dot is written in quotes)",
            shown(text)
        )),
    }
}

fn is_value(value: &Value) -> bool {
    let is_plain =
        |value: &Value| matches!(value, Value::Bool(_) | Value::Number(_) | Value::String(_));
    match value {
        Value::Array(values) => values.iter().all(is_plain),
        other => is_plain(other),
    }
}
