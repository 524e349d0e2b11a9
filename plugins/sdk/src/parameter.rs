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
mod tests {
    use super::*;
    use crate::parameters;
    use alloc::vec;

    parameters! {
        struct Sample {
            /// How
            /// many.
            #[minimum(1)]
            #[maximum(9)]
            count: i64 = 5,
            factor: f64,
            /// Which.
            #[choices("left", "right")]
            side: String = "left",
            along: Axis = Axis(1),
            weights: Vec<f64> = vec![0.5],
            strict: bool = false,
        }
    }

    fn given(name: &str, value: Value) -> Parameter {
        Parameter {
            name: name.to_string(),
            value,
        }
    }

    parameters! {
        struct Wide {
            /// Any number.
            limit: Number = u64::MAX,
            /// A signed one.
            #[minimum(-9_007_199_254_740_993i64)]
            signed: i64 = 0,
            /// An unsigned one.
            #[maximum(u64::MAX - 1)]
            unsigned: u64 = 1u64 << 63,
            /// Several.
            #[maximum(u64::MAX - 1)]
            list: Vec<u64> = vec![1u64 << 63, 7],
        }
    }

    #[test]
    fn integers_keep_every_bit() {
        let declared = Wide::declare();
        assert_eq!(
            declared[0].default,
            Some(Value::Number(Number::Unsigned(u64::MAX)))
        );
        assert_eq!(declared[2].minimum, Some(Number::Integer(0)));
        assert_eq!(declared[2].maximum, Some(Number::Unsigned(u64::MAX - 1)));
        let read = |name: &str, value: Number| Wide::read(vec![given(name, Value::Number(value))]);
        let list = |numbers: &[Number]| {
            Wide::read(vec![given("list", Value::Numbers(numbers.to_vec()))]).map(|w| w.list)
        };
        assert_eq!(list(&[]), Ok(vec![]));
        assert_eq!(
            list(&[Number::Unsigned(u64::MAX - 1), Number::Integer(3)]),
            Ok(vec![u64::MAX - 1, 3])
        );
        assert!(list(&[Number::Unsigned(u64::MAX)]).is_err());
        assert!(list(&[Number::Integer(-1)]).is_err());
        assert!(list(&[Number::Integer(1), Number::Real(2.0)]).is_err());
        let odd = (1i64 << 53) + 1;
        assert_eq!(read("limit", odd.into()).map(|w| w.limit), Ok(odd.into()));
        assert_eq!(read("limit", 0.5.into()).map(|w| w.limit), Ok(0.5.into()));
        assert_eq!(read("signed", (-odd).into()).map(|w| w.signed), Ok(-odd));
        assert_eq!(
            read("unsigned", (u64::MAX - 1).into()).map(|w| w.unsigned),
            Ok(u64::MAX - 1)
        );
        for (name, value, reason) in [
            (
                "signed",
                Number::from(-odd - 1),
                "-9007199254740994 is out of range: give at least -9007199254740993",
            ),
            (
                "signed",
                (1u64 << 63).into(),
                "9223372036854775808 is out of range: give at most 9223372036854775807",
            ),
            (
                "signed",
                1.0.into(),
                "it takes: integer; given: real number",
            ),
            (
                "unsigned",
                (-1).into(),
                "-1 is out of range: give at least 0",
            ),
            (
                "unsigned",
                u64::MAX.into(),
                "18446744073709551615 is out of range: give at most 18446744073709551614",
            ),
        ] {
            let Err(Error::BadArgument(bad)) = read(name, value) else {
                panic!("{name} {value}")
            };
            assert_eq!((bad.name.as_str(), bad.reason.as_str()), (name, reason));
        }
    }

    fn refusal(parameters: Vec<Parameter>) -> (String, String) {
        match Sample::read(parameters) {
            Err(Error::BadArgument(bad)) => (bad.name, bad.reason),
            other => panic!("expected a bad argument, got {other:?}"),
        }
    }

    #[test]
    fn declarations_carry_everything() {
        let declared = Sample::declare();
        let names: Vec<&str> = declared
            .iter()
            .map(|declaration| declaration.name.as_str())
            .collect();
        assert_eq!(
            names,
            ["count", "factor", "side", "along", "weights", "strict"]
        );
        assert_eq!(declared[0].doc, "How many.");
        assert_eq!(
            (declared[0].minimum, declared[0].maximum),
            (Some(1.into()), Some(9.into()))
        );
        assert_eq!(declared[0].default, Some(Value::Number(5.into())));
        assert!(declared[1].default.is_none());
        assert_eq!(declared[2].choices, ["left", "right"]);
        assert!(matches!(declared[3].default, Some(Value::Axis(1))));
    }

    #[test]
    fn given_values_and_defaults() {
        let read = Sample::read(vec![
            given("factor", Value::Number(2.0.into())),
            given("side", Value::Text("right".into())),
            given("count", Value::Number(9.into())),
        ]);
        let expected = Sample {
            count: 9,
            factor: 2.0,
            side: "right".into(),
            along: Axis(1),
            weights: vec![0.5],
            strict: false,
        };
        assert_eq!(read.expect("all are valid"), expected);
    }

    #[test]
    fn each_mistake_is_named() {
        let factor = || given("factor", Value::Number(2.0.into()));
        let refused = |parameter| refusal(vec![factor(), parameter]);
        assert_eq!(
            refusal(vec![]),
            (
                "factor".into(),
                "it has no default: give it (real number)".into()
            )
        );
        assert_eq!(
            refused(factor()),
            ("factor".into(), "it is given twice: give it once".into())
        );
        assert_eq!(
            refused(given("cuont", Value::Number(1.into()))),
            (
                "cuont".into(),
                "unknown: this kernel's parameters are count, factor, side, along, weights, strict"
                    .into()
            )
        );
        assert_eq!(
            refused(given("count", Value::Number(10.into()))),
            ("count".into(), "10 is out of range: give at most 9".into())
        );
        assert_eq!(
            refused(given("count", Value::Number(2.0.into()))),
            (
                "count".into(),
                "it takes: integer; given: real number".into()
            )
        );
        assert_eq!(
            refused(given("side", Value::Text("up".into()))),
            (
                "side".into(),
                "\"up\" is none of its values: left, right".into()
            )
        );
    }

    #[test]
    fn axes_divide_a_shape() {
        let spec = Spec::new(crate::Dtype::Int8, [2, 3, 4]);
        let split = |axis| {
            Axis(axis)
                .split("x", &spec)
                .map_err(|error| format!("{error:?}"))
        };
        assert_eq!(
            split(0),
            Ok(AxisSplit {
                outer: 1,
                length: 2,
                inner: 12
            })
        );
        assert_eq!(
            split(1),
            Ok(AxisSplit {
                outer: 2,
                length: 3,
                inner: 4
            })
        );
        assert_eq!(
            split(2),
            Ok(AxisSplit {
                outer: 6,
                length: 4,
                inner: 1
            })
        );
        assert!(split(3).is_err_and(|error| error.contains("axis 3 of x, which has 3 axes")));
    }
}
