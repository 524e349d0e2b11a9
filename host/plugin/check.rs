//! A caller's arguments against a kernel's declaration, before any guest runs.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::Value as Json;
use strait_tensor::TensorSpec;

use super::signature::Shaped;
use super::{Kernel, Number, ParameterDeclaration, ParameterKind, Port, Value};

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

/// Names in a message.
pub(super) fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
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
            return Err(self.unknown_input(port));
        }
        let mut ordered = Vec::with_capacity(self.inputs.len());
        for port in &self.inputs {
            let input = inputs
                .remove(&port.name)
                .ok_or_else(|| self.missing_input(&port.name))?;
            port.fits(&spec(&input))
                .map_err(|reason| CheckError::BadInput {
                    kernel: self.name.clone(),
                    port: port.name.clone(),
                    reason,
                })?;
            ordered.push(input);
        }
        let specs: Vec<TensorSpec> = ordered.iter().map(&spec).collect();
        self.axes_fit(&specs, &[])
            .map_err(|(port, reason)| CheckError::BadInput {
                kernel: self.name.clone(),
                port: port.name.clone(),
                reason,
            })?;
        let rank = specs.first().map(|first| first.shape.len());
        let parameters = self.parameters(parameters, rank)?;
        Ok(Invocable {
            inputs: ordered,
            parameters,
        })
    }

    /// There is no such input.
    #[must_use]
    pub fn unknown_input(&self, port: &str) -> CheckError {
        CheckError::UnknownInput {
            kernel: self.name.clone(),
            port: port.to_owned(),
            known: list(self.inputs.iter().map(|p| p.name.as_str())),
        }
    }

    /// That input is not given.
    #[must_use]
    pub fn missing_input(&self, port: &str) -> CheckError {
        CheckError::MissingInput {
            kernel: self.name.clone(),
            port: port.to_owned(),
        }
    }

    /// Holds shapes against the kernel's signature: those of all inputs, in order, and of all outputs or of none yet.
    ///
    /// # Errors
    /// The first port whose tensor does not fit, and why.
    pub fn axes_fit<'a>(
        &self,
        inputs: impl IntoIterator<Item = &'a TensorSpec>,
        outputs: impl IntoIterator<Item = &'a TensorSpec>,
    ) -> Result<(), (&Port, String)> {
        let Some(signature) = &self.signature else {
            return Ok(());
        };
        let inputs = self.inputs.iter().zip(inputs);
        let outputs = self.outputs.iter().zip(outputs);
        let tensors: Vec<Shaped<'_>> = inputs
            .map(|(port, spec)| port.shaped("input", spec))
            .chain(outputs.map(|(port, spec)| port.shaped("output", spec)))
            .collect();
        signature.check(&tensors).map_err(|(index, reason)| {
            let port = match self.inputs.get(index) {
                Some(input) => input,
                None => &self.outputs[index - self.inputs.len()],
            };
            (port, reason)
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
    fn shaped<'a>(&self, side: &str, spec: &'a TensorSpec) -> Shaped<'a> {
        Shaped {
            port: format!("{side} `{}`", self.name),
            whole: self.whole,
            shape: &spec.shape,
        }
    }

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
            ParameterKind::Integer => Number::from_json(json)
                .ok_or_else(wrong)?
                .to_integer()
                .map(Value::Number)
                .ok_or_else(|| format!("{json} is not a whole number from -2^63 to 2^64-1")),
            ParameterKind::Real => real(json)
                .map(|v| Value::Number(Number::Real(v)))
                .ok_or_else(wrong),
            ParameterKind::Number => Number::from_json(json).map(Value::Number).ok_or_else(wrong),
            ParameterKind::Axis => match Number::from_json(json).and_then(Number::to_integer) {
                Some(Number::Integer(v)) => u32::try_from(v).map(Value::Axis).ok(),
                _ => None,
            }
            .ok_or_else(|| format!("{json} is not an axis: a whole number from 0 (the slowest)")),
            ParameterKind::Text => json
                .as_str()
                .map(|v| Value::Text(v.to_owned()))
                .ok_or_else(wrong),
            ParameterKind::Integers => json
                .as_array()
                .ok_or_else(wrong)?
                .iter()
                .map(|json| {
                    Number::from_json(json)
                        .and_then(Number::to_integer)
                        .ok_or_else(|| format!("{json} is not a whole number from -2^63 to 2^64-1"))
                })
                .collect::<Result<_, _>>()
                .map(Value::Numbers),
            ParameterKind::Reals => json
                .as_array()
                .and_then(|v| v.iter().map(|v| real(v).map(Number::Real)).collect())
                .map(Value::Numbers)
                .ok_or_else(wrong),
        }
    }

    pub(super) fn in_range(&self, value: &Value, rank: Option<usize>) -> Result<(), String> {
        // A NaN compares with nothing: it fails wherever there is a bound.
        let check = |v: Number| match (self.minimum, self.maximum) {
            (Some(minimum), _) if v.compare(minimum).is_none_or(Ordering::is_lt) => {
                Err(format!("{v} is out of range: the minimum is {minimum}"))
            }
            (_, Some(maximum)) if v.compare(maximum).is_none_or(Ordering::is_gt) => {
                Err(format!("{v} is out of range: the maximum is {maximum}"))
            }
            _ => Ok(()),
        };
        match value {
            Value::Number(v) => check(*v),
            Value::Numbers(v) => v.iter().try_for_each(|v| check(*v)),
            Value::Axis(v) => match rank {
                Some(rank) if *v as usize >= rank => Err(format!(
                    "axis {v} of a tensor of rank {rank}; axes count from 0 (the slowest)"
                )),
                _ => check(Number::Integer((*v).into())),
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

fn real(json: &Json) -> Option<f64> {
    Number::from_json(json).map(Number::to_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::description::declaration;
    use serde_json::json;

    #[test]
    fn each_kind_takes_what_it_says() {
        let odd = 9_007_199_254_740_993_i64;
        let number = |v| Some(Value::Number(v));
        for (kind, json, value) in [
            (
                ParameterKind::Integer,
                json!(odd),
                number(Number::Integer(odd)),
            ),
            (
                ParameterKind::Integer,
                json!(2.0),
                number(Number::Integer(2)),
            ),
            (
                ParameterKind::Integer,
                json!(u64::MAX),
                number(Number::Unsigned(u64::MAX)),
            ),
            (ParameterKind::Integer, json!(2.5), None),
            (ParameterKind::Integer, json!(1e20), None),
            (ParameterKind::Integer, json!("inf"), None),
            (ParameterKind::Integer, json!("2"), None),
            (ParameterKind::Integer, json!(true), None),
            (ParameterKind::Real, json!(2), number(Number::Real(2.0))),
            (
                ParameterKind::Real,
                json!("-inf"),
                number(Number::Real(f64::NEG_INFINITY)),
            ),
            (ParameterKind::Real, json!([1]), None),
            (
                ParameterKind::Number,
                json!(-odd),
                number(Number::Integer(-odd)),
            ),
            (
                ParameterKind::Number,
                json!(1_u64 << 63),
                number(Number::Unsigned(1 << 63)),
            ),
            (ParameterKind::Number, json!(2.0), number(Number::Real(2.0))),
            (ParameterKind::Number, json!("1"), None),
            (ParameterKind::Axis, json!(1.0), Some(Value::Axis(1))),
            (ParameterKind::Axis, json!(u64::MAX), None),
            (ParameterKind::Axis, json!(-1), None),
            (
                ParameterKind::Reals,
                json!([1, "inf"]),
                Some(Value::Numbers(vec![
                    Number::Real(1.0),
                    Number::Real(f64::INFINITY),
                ])),
            ),
            (ParameterKind::Reals, json!(1), None),
            (
                ParameterKind::Integers,
                json!([odd, u64::MAX, 2.0]),
                Some(Value::Numbers(vec![
                    Number::Integer(odd),
                    Number::Unsigned(u64::MAX),
                    Number::Integer(2),
                ])),
            ),
            (ParameterKind::Integers, json!([1, 2.5]), None),
            (ParameterKind::Integers, json!(1), None),
        ] {
            let converted = declaration(kind).convert(&json).ok();
            assert_eq!(converted, value, "{} from {json}", kind.name());
        }
    }

    #[test]
    fn bounds_are_exact() {
        let two_53 = 1_i64 << 53;
        let within = |minimum, maximum, json: Json| {
            let declaration = ParameterDeclaration {
                minimum,
                maximum,
                ..declaration(ParameterKind::Number)
            };
            let value = declaration.convert(&json).expect("a number");
            declaration.in_range(&value, None)
        };
        let odd = Some(Number::Integer(two_53 + 1));
        assert_eq!(within(None, odd, json!(two_53 + 1)), Ok(()));
        assert_eq!(
            within(None, odd, json!(two_53 + 2)),
            Err("9007199254740994 is out of range: the maximum is 9007199254740993".to_owned())
        );
        assert_eq!(
            within(odd, None, json!(two_53)),
            Err("9007199254740992 is out of range: the minimum is 9007199254740993".to_owned())
        );
        let unsigned = Some(Number::Unsigned(u64::MAX - 1));
        assert_eq!(within(unsigned, None, json!(u64::MAX)), Ok(()));
        assert!(within(None, unsigned, json!(u64::MAX)).is_err());
        assert!(within(Some(Number::Real(0.5)), None, json!(0)).is_err());
        assert!(within(odd, None, json!("nan")).is_err());
        assert_eq!(within(None, None, json!("nan")), Ok(()));
    }
}
