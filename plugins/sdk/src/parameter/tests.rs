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
