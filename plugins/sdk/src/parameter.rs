//! Parameters: from what a caller gave to a typed struct. See [`parameters!`](crate::parameters).

use crate::bindings::strait::kernel::types::{Parameter, ParameterDeclaration};
use crate::{Error, Number, ParameterKind, Spec, Value};
use alloc::{
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::cmp::Ordering;

/// A kernel's parameters; written by [`parameters!`](crate::parameters). `()` is none.
pub trait Parameters: Sized {
    /// What the kernel's description says about them.
    fn declare() -> Vec<ParameterDeclaration>;

    /// Checks what was given and fills in the defaults.
    ///
    /// # Errors
    /// [`Error::BadArgument`] that names the parameter: unknown, given twice, missing, of another kind,
    /// out of range, or not one of the choices.
    fn read(given: Vec<Parameter>) -> Result<Self, Error>;
}

impl Parameters for () {
    fn declare() -> Vec<ParameterDeclaration> {
        Vec::new()
    }

    fn read(given: Vec<Parameter>) -> Result<Self, Error> {
        resolve(&[], given).map(|_| ())
    }
}

/// An axis as it is counted on the wire: 0 is the first and slowest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Axis(pub u32);

/// A row-major tensor seen along one axis: `outer` blocks of `length` rows of `inner` elements.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AxisSplit {
    /// Product of the dimensions before the axis.
    pub outer: usize,
    /// The axis' own dimension.
    pub length: usize,
    /// Product of the dimensions after the axis.
    pub inner: usize,
}

impl Axis {
    /// How the axis divides the tensor at port `port`.
    ///
    /// # Errors
    /// [`Error::BadArgument`] for `axis` if the tensor has no such axis.
    pub fn split(self, port: &str, spec: &Spec) -> Result<AxisSplit, Error> {
        let rank = spec.shape.len();
        let axis = self.0 as usize;
        let Some(&length) = spec.shape.get(axis) else {
            return Err(Error::bad_argument(
                "axis",
                format!("axis {axis} of {port}, which has {rank} axes: give one below {rank}"),
            ));
        };
        let too_large =
            || Error::bad_argument(port, format!("the shape {:?} is too large", spec.shape));
        let product = |shape: &[u64]| -> Result<usize, Error> {
            let product = shape
                .iter()
                .try_fold(1u64, |product, &size| product.checked_mul(size));
            product
                .and_then(|product| usize::try_from(product).ok())
                .ok_or_else(too_large)
        };
        Ok(AxisSplit {
            outer: product(&spec.shape[..axis])?,
            length: usize::try_from(length).map_err(|_| too_large())?,
            inner: product(&spec.shape[axis + 1..])?,
        })
    }
}

/// A type that a parameter can have.
pub trait ParameterType: Sized {
    /// The kind that a description shows.
    const KIND: ParameterKind;
    /// The least value, unless a declaration says another one.
    const MINIMUM: Option<Number> = None;

    /// As a default value.
    fn into_value(self) -> Value;

    /// From a value of that kind.
    ///
    /// # Errors
    /// [`Error::BadArgument`] for `name` if it is of another kind or absent.
    fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error>;
}

macro_rules! parameter_types {
    ($($type:ty => $variant:ident, $wrap:expr, $unwrap:expr;)+) => {
        $(
            impl ParameterType for $type {
                const KIND: ParameterKind = ParameterKind::$variant;

                fn into_value(self) -> Value {
                    Value::$variant($wrap(self))
                }

                fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
                    match value {
                        Some(Value::$variant(value)) => Ok($unwrap(value)),
                        Some(other) => Err(wrong_kind(name, Self::KIND, &other)),
                        None => Err(missing(name, Self::KIND)),
                    }
                }
            }
        )+
    };
}

parameter_types! {
    bool => Boolean, core::convert::identity, core::convert::identity;
    Axis => Axis, |axis: Axis| axis.0, Axis;
    String => Text, core::convert::identity, core::convert::identity;
}

macro_rules! lists {
    ($($type:ty => $kind:ident;)+) => {
        $(
            impl ParameterType for Vec<$type> {
                const KIND: ParameterKind = ParameterKind::$kind;
                const MINIMUM: Option<Number> = <$type as ParameterType>::MINIMUM;

                fn into_value(self) -> Value {
                    Value::Numbers(self.into_iter().map(Number::from).collect())
                }

                fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
                    match value {
                        Some(Value::Numbers(numbers)) => numbers
                            .into_iter()
                            .map(|number| <$type>::from_value(Some(Value::Number(number)), name))
                            .collect(),
                        Some(other) => Err(wrong_kind(name, Self::KIND, &other)),
                        None => Err(missing(name, Self::KIND)),
                    }
                }
            }
        )+
    };
}

lists! {
    i64 => Integers;
    u64 => Integers;
    f64 => Reals;
}

impl ParameterType for Number {
    const KIND: ParameterKind = ParameterKind::Number;

    fn into_value(self) -> Value {
        Value::Number(self)
    }

    fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
        given_number(value, name, Self::KIND)
    }
}

impl ParameterType for f64 {
    const KIND: ParameterKind = ParameterKind::Real;

    fn into_value(self) -> Value {
        Value::Number(self.into())
    }

    fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
        match given_number(value, name, Self::KIND)? {
            Number::Real(real) => Ok(real),
            other => Err(wrong_kind(name, Self::KIND, &Value::Number(other))),
        }
    }
}

impl ParameterType for i64 {
    const KIND: ParameterKind = ParameterKind::Integer;

    fn into_value(self) -> Value {
        Value::Number(self.into())
    }

    fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
        match given_number(value, name, Self::KIND)? {
            Number::Integer(integer) => Ok(integer),
            Number::Unsigned(integer) => Err(out_of_range(
                name,
                integer.into(),
                &format!("give at most {}", Self::MAX),
            )),
            other => Err(wrong_kind(name, Self::KIND, &Value::Number(other))),
        }
    }
}

impl ParameterType for u64 {
    const KIND: ParameterKind = ParameterKind::Integer;
    const MINIMUM: Option<Number> = Some(Number::Integer(0));

    fn into_value(self) -> Value {
        Value::Number(self.into())
    }

    fn from_value(value: Option<Value>, name: &str) -> Result<Self, Error> {
        match given_number(value, name, Self::KIND)? {
            Number::Integer(integer) => Self::try_from(integer)
                .map_err(|_| out_of_range(name, integer.into(), "give at least 0")),
            Number::Unsigned(integer) => Ok(integer),
            other => Err(wrong_kind(name, Self::KIND, &Value::Number(other))),
        }
    }
}

fn given_number(value: Option<Value>, name: &str, kind: ParameterKind) -> Result<Number, Error> {
    match value {
        Some(Value::Number(number)) => Ok(number),
        Some(other) => Err(wrong_kind(name, kind, &other)),
        None => Err(missing(name, kind)),
    }
}

fn kind_name(kind: ParameterKind) -> &'static str {
    match kind {
        ParameterKind::Boolean => "boolean",
        ParameterKind::Integer => "integer",
        ParameterKind::Real => "real number",
        ParameterKind::Number => "number",
        ParameterKind::Axis => "axis",
        ParameterKind::Text => "text",
        ParameterKind::Integers => "list of integers",
        ParameterKind::Reals => "list of real numbers",
    }
}

/// The narrowest kind that takes a value.
fn kind_of(value: &Value) -> ParameterKind {
    match value {
        Value::Boolean(_) => ParameterKind::Boolean,
        Value::Number(Number::Integer(_) | Number::Unsigned(_)) => ParameterKind::Integer,
        Value::Number(Number::Real(_)) => ParameterKind::Real,
        Value::Axis(_) => ParameterKind::Axis,
        Value::Text(_) => ParameterKind::Text,
        Value::Numbers(numbers) if numbers.iter().any(is_real) => ParameterKind::Reals,
        Value::Numbers(_) => ParameterKind::Integers,
    }
}

fn is_real(number: &Number) -> bool {
    matches!(number, Number::Real(_))
}

fn takes(kind: ParameterKind, value: &Value) -> bool {
    match value {
        Value::Numbers(numbers) => match kind {
            ParameterKind::Integers => !numbers.iter().any(is_real),
            ParameterKind::Reals => numbers.iter().all(is_real),
            _ => false,
        },
        Value::Number(_) if kind == ParameterKind::Number => true,
        _ => kind == kind_of(value),
    }
}

fn wrong_kind(name: &str, kind: ParameterKind, value: &Value) -> Error {
    Error::bad_argument(
        name,
        format!(
            "it takes: {}; given: {}",
            kind_name(kind),
            kind_name(kind_of(value))
        ),
    )
}

fn out_of_range(name: &str, number: Number, remedy: &str) -> Error {
    Error::bad_argument(name, format!("{number} is out of range: {remedy}"))
}

fn missing(name: &str, kind: ParameterKind) -> Error {
    Error::bad_argument(
        name,
        format!("it has no default: give it ({})", kind_name(kind)),
    )
}

#[doc(hidden)]
#[must_use]
pub fn declare<T: ParameterType>(name: &str, doc: &[&str]) -> ParameterDeclaration {
    ParameterDeclaration {
        name: name.to_string(),
        kind: T::KIND,
        default: None,
        minimum: T::MINIMUM,
        maximum: None,
        choices: Vec::new(),
        doc: doc_text(doc),
    }
}

/// The lines of a doc comment as one text: each without its leading blank.
#[doc(hidden)]
#[must_use]
pub fn doc_text(lines: &[&str]) -> String {
    let mut text = String::new();
    for line in lines {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(line.trim());
    }
    text
}

/// Values in the order of the declarations, each given or defaulted and checked against its declaration.
#[doc(hidden)]
pub fn resolve(
    declared: &[ParameterDeclaration],
    given: Vec<Parameter>,
) -> Result<Vec<Value>, Error> {
    let mut values: Vec<Option<Value>> = declared.iter().map(|_| None).collect();
    for Parameter { name, value } in given {
        let Some(index) = declared
            .iter()
            .position(|declaration| declaration.name == name)
        else {
            return Err(Error::bad_argument(name, unknown(declared)));
        };
        check(&declared[index], &value)?;
        if values[index].replace(value).is_some() {
            return Err(Error::bad_argument(name, "it is given twice: give it once"));
        }
    }
    declared
        .iter()
        .zip(values)
        .map(|(declaration, value)| {
            value
                .or_else(|| declaration.default.clone())
                .ok_or_else(|| missing(&declaration.name, declaration.kind))
        })
        .collect()
}

fn unknown(declared: &[ParameterDeclaration]) -> String {
    if declared.is_empty() {
        return "unknown: this kernel has no parameters".to_string();
    }
    let names: Vec<&str> = declared
        .iter()
        .map(|declaration| declaration.name.as_str())
        .collect();
    format!("unknown: this kernel's parameters are {}", names.join(", "))
}

fn check(declaration: &ParameterDeclaration, value: &Value) -> Result<(), Error> {
    let name = &declaration.name;
    if !takes(declaration.kind, value) {
        return Err(wrong_kind(name, declaration.kind, value));
    }
    let in_range = |number: Number| {
        // A NaN compares with nothing: it fails wherever there is a limit.
        let remedy = match (declaration.minimum, declaration.maximum) {
            (Some(minimum), _) if number.compare(minimum).is_none_or(Ordering::is_lt) => {
                format!("give at least {minimum}")
            }
            (_, Some(maximum)) if number.compare(maximum).is_none_or(Ordering::is_gt) => {
                format!("give at most {maximum}")
            }
            _ => return Ok(()),
        };
        Err(out_of_range(name, number, &remedy))
    };
    match value {
        Value::Boolean(_) => Ok(()),
        Value::Number(number) => in_range(*number),
        Value::Axis(axis) => in_range(i64::from(*axis).into()),
        Value::Numbers(numbers) => numbers.iter().try_for_each(|&number| in_range(number)),
        Value::Text(text)
            if declaration.choices.is_empty() || declaration.choices.contains(text) =>
        {
            Ok(())
        }
        Value::Text(text) => Err(Error::bad_argument(
            name,
            format!(
                "{text:?} is none of its values: {}",
                declaration.choices.join(", ")
            ),
        )),
    }
}

#[cfg(test)]
mod tests;
