//! A caller's arguments against a kernel's declaration, before any guest runs.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;
use strait_tensor::TensorSpec;

use super::{Description, Kernel, Number, ParameterDeclaration, ParameterKind, Port, Role, Value};

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
            ParameterKind::Reals => json
                .as_array()
                .and_then(|v| v.iter().map(real).collect::<Option<Vec<_>>>())
                .map(Value::Reals)
                .ok_or_else(wrong),
        }
    }

    /// Whether bounds and default fit the kind and each other.
    fn makes_sense(&self) -> Result<(), String> {
        for (what, bound) in [("minimum", self.minimum), ("maximum", self.maximum)] {
            if let Some(bound) = bound.filter(|v| !v.to_f64().is_finite()) {
                return Err(format!("its {what} is {bound}; no bound is none at all"));
            }
        }
        if let (Some(minimum), Some(maximum)) = (self.minimum, self.maximum)
            && minimum.compare(maximum) == Some(Ordering::Greater)
        {
            return Err(format!(
                "its minimum {minimum} is above its maximum {maximum}"
            ));
        }
        let Some(default) = &self.default else {
            return Ok(());
        };
        if !self.kind.takes(default) {
            return Err(format!(
                "it is of type {} and its default is {}",
                self.kind.name(),
                default.to_json()
            ));
        }
        self.in_range(default, None)
            .map_err(|e| format!("its default: {e}"))
    }

    fn in_range(&self, value: &Value, rank: Option<usize>) -> Result<(), String> {
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
            Value::Reals(v) => v.iter().try_for_each(|v| check(Number::Real(*v))),
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

impl ParameterKind {
    /// Whether it is the type of a value in the form that a kernel gets.
    fn takes(self, value: &Value) -> bool {
        match value {
            Value::Boolean(_) => self == Self::Boolean,
            Value::Number(Number::Real(_)) => matches!(self, Self::Real | Self::Number),
            Value::Number(_) => matches!(self, Self::Integer | Self::Number),
            Value::Axis(_) => self == Self::Axis,
            Value::Text(_) => self == Self::Text,
            Value::Reals(_) => self == Self::Reals,
        }
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
        parameter
            .makes_sense()
            .map_err(|e| format!("parameter `{}`: {e}", parameter.name))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn declaration(kind: ParameterKind) -> ParameterDeclaration {
        ParameterDeclaration {
            name: "p".to_owned(),
            kind,
            default: None,
            minimum: None,
            maximum: None,
            choices: Vec::new(),
            doc: String::new(),
        }
    }

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
                Some(Value::Reals(vec![1.0, f64::INFINITY])),
            ),
            (ParameterKind::Reals, json!(1), None),
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

    #[test]
    fn a_declaration_that_contradicts_itself_is_refused() {
        let refused = |change: &dyn Fn(&mut ParameterDeclaration), kind| {
            let mut changed = declaration(kind);
            change(&mut changed);
            changed.makes_sense().expect_err("refused")
        };
        let text = refused(
            &|p| p.minimum = Some(Number::Real(f64::NAN)),
            ParameterKind::Real,
        );
        assert!(text.contains("minimum is NaN"), "{text}");
        let text = refused(
            &|p| {
                p.minimum = Some(Number::Unsigned(u64::MAX));
                p.maximum = Some(Number::Integer(1));
            },
            ParameterKind::Integer,
        );
        assert!(text.contains("18446744073709551615 is above"), "{text}");
        let text = refused(
            &|p| p.default = Some(Value::Number(Number::Integer(1))),
            ParameterKind::Real,
        );
        assert!(text.contains("type real and its default is 1"), "{text}");
        let text = refused(
            &|p| {
                p.maximum = Some(Number::Integer(1 << 53));
                p.default = Some(Value::Number(Number::Integer((1 << 53) + 1)));
            },
            ParameterKind::Integer,
        );
        assert!(text.contains("its default: 9007199254740993"), "{text}");
        assert_eq!(
            ParameterDeclaration {
                default: Some(Value::Number(Number::Unsigned(u64::MAX))),
                ..declaration(ParameterKind::Number)
            }
            .makes_sense(),
            Ok(())
        );
    }
}
