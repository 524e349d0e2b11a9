//! A caller's arguments against a kernel's declaration, before any guest runs.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;
use strait_tensor::TensorSpec;

use super::{Description, Kernel, ParameterDeclaration, ParameterKind, Port, Role, Value};

/// Most ports, parameters or kernels that one declaration may list.
const ITEMS_MAX: usize = 256;
/// Most outputs: each one's descriptor goes beside the reply.
const OUTPUTS_MAX: usize = 16;

/// Why a kernel cannot be invoked with these arguments.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CheckError {
    /// A port is given that the kernel does not have.
    #[error("kernel `{kernel}` has no input `{port}`; its inputs are {known}")]
    UnknownInput {
        /// The kernel.
        kernel: String,
        /// What was given.
        port: String,
        /// What there is.
        known: String,
    },
    /// A port is not given.
    #[error("kernel `{kernel}` needs input `{port}`; give it a tensor")]
    MissingInput {
        /// The kernel.
        kernel: String,
        /// What is missing.
        port: String,
    },
    /// A tensor does not fit its port.
    #[error("input `{port}` of kernel `{kernel}`: {reason}")]
    BadInput {
        /// The kernel.
        kernel: String,
        /// The port.
        port: String,
        /// What does not fit, and what would.
        reason: String,
    },
    /// A parameter is given that the kernel does not have.
    #[error("kernel `{kernel}` has no parameter `{name}`; its parameters are {known}")]
    UnknownParameter {
        /// The kernel.
        kernel: String,
        /// What was given.
        name: String,
        /// What there is.
        known: String,
    },
    /// A parameter without a default is not given.
    #[error("kernel `{kernel}` needs parameter `{name}` ({kind}): {doc}")]
    MissingParameter {
        /// The kernel.
        kernel: String,
        /// What is missing.
        name: String,
        /// Its type.
        kind: &'static str,
        /// What it does.
        doc: String,
    },
    /// A parameter's value does not fit.
    #[error("parameter `{name}` of kernel `{kernel}`: {reason}")]
    BadParameter {
        /// The kernel.
        kernel: String,
        /// The parameter.
        name: String,
        /// What does not fit, and what would.
        reason: String,
    },
    /// An output is named that the kernel does not have.
    #[error("kernel `{kernel}` has no output `{port}`; its outputs are {known}")]
    UnknownOutput {
        /// The kernel.
        kernel: String,
        /// What was given.
        port: String,
        /// What there is.
        known: String,
    },
}

/// Arguments that fit: inputs in the kernel's order, every parameter with a value.
#[derive(Clone, Debug)]
pub struct Invocable<T> {
    /// One for each input port, in order.
    pub inputs: Vec<T>,
    /// One for each declared parameter.
    pub parameters: Vec<(String, Value)>,
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.map(|n| format!("`{n}`")).collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl Kernel {
    /// Holds a caller's arguments against the declaration. `spec` gives an input's spec.
    ///
    /// # Errors
    /// [`CheckError`], the first that is found: ports, then parameters.
    pub fn check<T>(
        &self,
        mut inputs: BTreeMap<String, T>,
        spec: impl Fn(&T) -> TensorSpec,
        parameters: &BTreeMap<String, Json>,
    ) -> Result<Invocable<T>, CheckError> {
        if let Some(port) = inputs
            .keys()
            .find(|k| self.inputs.iter().all(|p| p.name != **k))
        {
            return Err(CheckError::UnknownInput {
                kernel: self.name.clone(),
                port: port.clone(),
                known: list(self.inputs.iter().map(|p| p.name.as_str())),
            });
        }
        let mut ordered = Vec::with_capacity(self.inputs.len());
        for port in &self.inputs {
            let input = inputs
                .remove(&port.name)
                .ok_or_else(|| CheckError::MissingInput {
                    kernel: self.name.clone(),
                    port: port.name.clone(),
                })?;
            port.fits(&spec(&input))
                .map_err(|reason| CheckError::BadInput {
                    kernel: self.name.clone(),
                    port: port.name.clone(),
                    reason,
                })?;
            ordered.push(input);
        }
        let rank = ordered.first().map(|first| spec(first).shape.len());
        let parameters = self.parameters(parameters, rank)?;
        Ok(Invocable {
            inputs: ordered,
            parameters,
        })
    }

    /// # Errors
    /// [`CheckError::UnknownOutput`] if one of `names` is not an output port.
    pub fn check_outputs<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), CheckError> {
        for name in names {
            if self.outputs.iter().all(|p| p.name != name) {
                return Err(CheckError::UnknownOutput {
                    kernel: self.name.clone(),
                    port: name.to_owned(),
                    known: list(self.outputs.iter().map(|p| p.name.as_str())),
                });
            }
        }
        Ok(())
    }

    fn parameters(
        &self,
        given: &BTreeMap<String, Json>,
        rank: Option<usize>,
    ) -> Result<Vec<(String, Value)>, CheckError> {
        if let Some(name) = given
            .keys()
            .find(|k| self.parameters.iter().all(|p| p.name != **k))
        {
            return Err(CheckError::UnknownParameter {
                kernel: self.name.clone(),
                name: name.clone(),
                known: list(self.parameters.iter().map(|p| p.name.as_str())),
            });
        }
        self.parameters
            .iter()
            .map(|declaration| {
                let bad = |reason| CheckError::BadParameter {
                    kernel: self.name.clone(),
                    name: declaration.name.clone(),
                    reason,
                };
                let value =
                    match given.get(&declaration.name) {
                        Some(json) => declaration.convert(json).map_err(bad)?,
                        None => declaration.default.clone().ok_or_else(|| {
                            CheckError::MissingParameter {
                                kernel: self.name.clone(),
                                name: declaration.name.clone(),
                                kind: declaration.kind.name(),
                                doc: declaration.doc.clone(),
                            }
                        })?,
                    };
                declaration.in_range(&value, rank).map_err(bad)?;
                Ok((declaration.name.clone(), value))
            })
            .collect()
    }
}

impl Port {
    /// Whether a tensor fits; the error says what would.
    ///
    /// # Errors
    /// The reason, in words.
    pub fn fits(&self, spec: &TensorSpec) -> Result<(), String> {
        if !self.dtypes.contains(&spec.dtype) {
            let takes: Vec<_> = self.dtypes.iter().map(|d| d.name()).collect();
            return Err(format!(
                "dtype {} is not one of {}; convert it with the kernel `cast`",
                spec.dtype.name(),
                takes.join(", ")
            ));
        }
        let rank = spec.shape.len();
        if rank < self.rank_min as usize || rank > self.rank_max as usize {
            return Err(format!(
                "shape {:?} has rank {rank}, the port takes {} to {}",
                spec.shape, self.rank_min, self.rank_max
            ));
        }
        Ok(())
    }
}

impl ParameterDeclaration {
    fn convert(&self, json: &Json) -> Result<Value, String> {
        let wrong = || format!("{json} is not of type {}", self.kind.name());
        match self.kind {
            ParameterKind::Boolean => json.as_bool().map(Value::Boolean).ok_or_else(wrong),
            ParameterKind::Integer => integer(json).map(Value::Integer).ok_or_else(wrong),
            ParameterKind::Real => real(json).map(Value::Real).ok_or_else(wrong),
            ParameterKind::Axis => integer(json)
                .and_then(|v| u32::try_from(v).ok())
                .map(Value::Axis)
                .ok_or_else(|| {
                    format!("{json} is not an axis: a whole number from 0 (the slowest)")
                }),
            ParameterKind::Text => json
                .as_str()
                .map(|v| Value::Text(v.to_owned()))
                .ok_or_else(wrong),
            ParameterKind::Reals => json
                .as_array()
                .and_then(|v| v.iter().map(real).collect::<Option<Vec<_>>>())
                .map(Value::Reals)
                .ok_or_else(wrong),
        }
    }

    fn in_range(&self, value: &Value, rank: Option<usize>) -> Result<(), String> {
        let check = |v: f64| {
            if self.minimum.is_some_and(|minimum| v < minimum) {
                return Err(format!(
                    "{v} is below the minimum {}",
                    self.minimum.unwrap_or(v)
                ));
            }
            if self.maximum.is_some_and(|maximum| v > maximum) {
                return Err(format!(
                    "{v} is above the maximum {}",
                    self.maximum.unwrap_or(v)
                ));
            }
            Ok(())
        };
        match value {
            #[expect(clippy::cast_precision_loss, reason = "bounds are f64 in the contract")]
            Value::Integer(v) => check(*v as f64),
            Value::Real(v) => check(*v),
            Value::Reals(v) => v.iter().try_for_each(|v| check(*v)),
            Value::Axis(v) => match rank {
                Some(rank) if *v as usize >= rank => Err(format!(
                    "axis {v} of a tensor of rank {rank}; axes count from 0 (the slowest)"
                )),
                _ => check(f64::from(*v)),
            },
            Value::Text(v) if !self.choices.is_empty() && !self.choices.contains(v) => {
                Err(format!(
                    "`{v}` is not one of {}",
                    list(self.choices.iter().map(String::as_str))
                ))
            }
            Value::Text(_) | Value::Boolean(_) => Ok(()),
        }
    }
}

/// A JSON number without a fraction; `2.0` counts, for languages that write it so.
fn integer(json: &Json) -> Option<i64> {
    json.as_i64().or_else(|| {
        let v = json.as_f64()?;
        // Beyond 2^53 a float no longer says which integer is meant.
        #[expect(clippy::cast_possible_truncation, reason = "whole and within 2^53")]
        (v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_992.0).then_some(v as i64)
    })
}

fn real(json: &Json) -> Option<f64> {
    match json {
        Json::Number(v) => v.as_f64(),
        Json::String(v) => match v.as_str() {
            "nan" => Some(f64::NAN),
            "inf" => Some(f64::INFINITY),
            "-inf" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// Whether a description makes sense in itself.
pub(super) fn description(description: &Description) -> Result<(), String> {
    if description.abi != 1 {
        return Err(format!(
            "contract revision {}, this host speaks 1",
            description.abi
        ));
    }
    word("plugin name", &description.name)?;
    word("plugin version", &description.version)?;
    count("kernels", description.kernels.len(), ITEMS_MAX)?;
    if description.kernels.is_empty() {
        return Err("it has no kernels".to_owned());
    }
    unique(
        "kernel",
        description.kernels.iter().map(|k| k.name.as_str()),
    )?;
    for kernel in &description.kernels {
        kernel_makes_sense(kernel).map_err(|e| format!("kernel `{}`: {e}", kernel.name))?;
    }
    Ok(())
}

fn kernel_makes_sense(kernel: &Kernel) -> Result<(), String> {
    count("inputs", kernel.inputs.len(), ITEMS_MAX)?;
    count("outputs", kernel.outputs.len(), OUTPUTS_MAX)?;
    count("parameters", kernel.parameters.len(), ITEMS_MAX)?;
    unique("input", kernel.inputs.iter().map(|p| p.name.as_str()))?;
    unique("output", kernel.outputs.iter().map(|p| p.name.as_str()))?;
    unique(
        "parameter",
        kernel.parameters.iter().map(|p| p.name.as_str()),
    )?;
    if kernel.outputs.is_empty() {
        return Err("it has no outputs".to_owned());
    }
    for port in kernel.inputs.iter().chain(&kernel.outputs) {
        if port.dtypes.is_empty() {
            return Err(format!("port `{}` takes no dtype", port.name));
        }
        if port.rank_min > port.rank_max {
            return Err(format!(
                "port `{}` takes ranks {} to {}",
                port.name, port.rank_min, port.rank_max
            ));
        }
        if port.role == Role::Mask && port.dtypes != [strait_tensor::Dtype::Bool8] {
            return Err(format!(
                "mask port `{}` must take bool8 and nothing else",
                port.name
            ));
        }
    }
    for parameter in &kernel.parameters {
        let Some(default) = &parameter.default else {
            continue;
        };
        let kind = match default {
            Value::Boolean(_) => ParameterKind::Boolean,
            Value::Integer(_) => ParameterKind::Integer,
            Value::Real(_) => ParameterKind::Real,
            Value::Axis(_) => ParameterKind::Axis,
            Value::Text(_) => ParameterKind::Text,
            Value::Reals(_) => ParameterKind::Reals,
        };
        if kind != parameter.kind {
            return Err(format!(
                "parameter `{}` is of type {} with a default of type {}",
                parameter.name,
                parameter.kind.name(),
                kind.name()
            ));
        }
        parameter
            .in_range(default, None)
            .map_err(|e| format!("the default of parameter `{}`: {e}", parameter.name))?;
    }
    Ok(())
}

fn count(what: &str, n: usize, max: usize) -> Result<(), String> {
    if n > max {
        Err(format!("{n} {what}, at most {max} are allowed"))
    } else {
        Ok(())
    }
}

fn word(what: &str, text: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    if text.is_empty() || text.len() > 64 || !text.chars().all(allowed) {
        return Err(format!(
            "{what} {text:?}: 1 to 64 characters from A-Z a-z 0-9 . _ - +"
        ));
    }
    Ok(())
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for name in names {
        word(&format!("{what} name"), name)?;
        if !seen.insert(name) {
            return Err(format!("two of {what} `{name}`"));
        }
    }
    Ok(())
}
