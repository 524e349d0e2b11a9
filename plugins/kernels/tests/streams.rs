//! Every kernel that streams gives the same bits however its rows are cut, and the same slice by slice where it says
//! that it can be sliced.

#![expect(clippy::unwrap_used, reason = "a test's own numbers")]

use strait_plugin::prelude::*;
use testing::{assert_streams, invoke};

use standard::{
    Cast, Clip, CumSum, FilterFinite, Fir, Histogram, MatMul, RollingMean, ScaleShift,
    ZScoreRunning,
};

/// A number's sequence, the same for the same seed (xorshift64*, Vigna 2016).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % end
    }

    /// Of many magnitudes.
    fn real(&mut self) -> f64 {
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        unit * [1e-3, 1.0, 1e3, 1e9][self.below(4)]
    }

    /// Now and then what is not finite, and zeros of both signs.
    fn special(&mut self) -> f64 {
        match self.below(40) {
            0 => f64::NAN,
            1 => f64::INFINITY,
            2 => f64::NEG_INFINITY,
            3 => -f64::NAN,
            4..7 => -0.0,
            7..9 => 0.0,
            _ => self.real(),
        }
    }
}

/// Row counts and rows of every kind: none, one, narrow, wide, wider than what is converted at a time, of no elements.
const SHAPES: &[&[u64]] = &[
    &[0],
    &[1],
    &[2],
    &[333],
    &[1100],
    &[0, 5],
    &[5, 0],
    &[1, 7],
    &[97, 3],
    &[40, 2, 5],
    &[30, 130],
    &[7, 1500],
];

fn tensor<T: Real>(numbers: &mut Numbers, shape: &[u64], specials: bool) -> Tensor {
    let count: u64 = shape.iter().product();
    let next = |_| {
        T::from_f64(match specials {
            true => numbers.special(),
            false => numbers.real(),
        })
    };
    Tensor::shaped(&(0..count).map(next).collect::<Vec<T>>(), shape)
}

/// Calls `check` with tensors of all shapes with at least `rank` axes, with and without what is not finite.
fn each_tensor<T: Real>(ranks: core::ops::RangeInclusive<usize>, mut check: impl FnMut(&Tensor)) {
    let mut numbers = Numbers(0x5eed);
    let scalar: &[u64] = &[];
    for shape in SHAPES.iter().chain([&scalar]) {
        if ranks.contains(&shape.len()) {
            for specials in [false, true] {
                check(&tensor::<T>(&mut numbers, shape, specials));
            }
        }
    }
}

fn number(name: &'static str, value: impl Into<Number>) -> (&'static str, Value) {
    (name, Value::Number(value.into()))
}

fn streams<K: Kernel>(parameters: &[(&str, Value)], x: &Tensor) {
    assert_streams::<K>(parameters, core::slice::from_ref(x));
}

#[test]
fn cumsum() {
    each_tensor::<f64>(1..=8, |x| streams::<CumSum>(&[], x));
    each_tensor::<f32>(1..=8, |x| streams::<CumSum>(&[], x));
    each_tensor::<F16>(1..=1, |x| streams::<CumSum>(&[], x));
    each_tensor::<i32>(1..=2, |x| streams::<CumSum>(&[], x));
    each_tensor::<u64>(1..=2, |x| streams::<CumSum>(&[], x));
    each_tensor::<Bool8>(1..=1, |x| streams::<CumSum>(&[], x));
}

#[test]
fn rolling_mean() {
    for window in [1, 2, 3, 10, 64, 1000, i64::MAX] {
        let parameters = [number("window", window)];
        each_tensor::<f64>(1..=8, |x| streams::<RollingMean>(&parameters, x));
    }
    let parameters = [number("window", 5)];
    each_tensor::<f32>(1..=8, |x| streams::<RollingMean>(&parameters, x));
    each_tensor::<Bf16>(1..=1, |x| streams::<RollingMean>(&parameters, x));
    each_tensor::<i16>(1..=2, |x| streams::<RollingMean>(&parameters, x));
}

#[test]
fn zscore_running() {
    each_tensor::<f64>(1..=8, |x| streams::<ZScoreRunning>(&[], x));
    each_tensor::<f32>(1..=8, |x| streams::<ZScoreRunning>(&[], x));
    each_tensor::<u8>(1..=2, |x| streams::<ZScoreRunning>(&[], x));
}

#[test]
fn fir() {
    let mut numbers = Numbers(7);
    for count in [1, 2, 5, 33, 400] {
        for specials in [false, true] {
            let taps = tensor::<f64>(&mut numbers, &[count], specials);
            let filter = |x: &Tensor| assert_streams::<Fir>(&[], &[x.clone(), taps.clone()]);
            each_tensor::<f64>(1..=8, filter);
            if count == 5 {
                each_tensor::<f32>(1..=8, filter);
            }
        }
    }
    let taps = tensor::<f32>(&mut numbers, &[9], false);
    each_tensor::<f64>(1..=2, |x| {
        assert_streams::<Fir>(&[], &[x.clone(), taps.clone()]);
    });
}

/// Matrices to multiply with: no terms, no columns, and more of both than are taken at a time.
fn each_product<T: Real>(mut check: impl FnMut(&Tensor, &Tensor)) {
    let mut numbers = Numbers(0xa11);
    for [rows, terms, columns] in [
        [0, 3, 2],
        [3, 0, 2],
        [3, 2, 0],
        [1, 1, 1],
        [9, 7, 5],
        [40, 259, 3],
        [13, 2, 300],
        [6, 515, 257],
    ] {
        for specials in [false, true] {
            let a = tensor::<T>(&mut numbers, &[rows, terms], specials);
            check(&a, &tensor::<T>(&mut numbers, &[terms, columns], specials));
        }
    }
}

#[test]
fn matmul() {
    each_product::<f64>(|a, b| assert_streams::<MatMul>(&[], &[a.clone(), b.clone()]));
    each_product::<f32>(|a, b| assert_streams::<MatMul>(&[], &[a.clone(), b.clone()]));
}

#[test]
fn histogram() {
    for bins in [1, 10, 1500] {
        let parameters = [
            number("bins", bins),
            number("lo", -2.5),
            number("hi", 300.0),
        ];
        each_tensor::<f64>(0..=8, |x| streams::<Histogram>(&parameters, x));
        each_tensor::<f32>(1..=2, |x| streams::<Histogram>(&parameters, x));
        each_tensor::<u8>(0..=2, |x| streams::<Histogram>(&parameters, x));
    }
}

#[test]
fn filter_finite() {
    each_tensor::<f64>(1..=1, |x| streams::<FilterFinite>(&[], x));
    each_tensor::<F8E5m2>(1..=1, |x| streams::<FilterFinite>(&[], x));
    each_tensor::<Bool8>(1..=1, |x| streams::<FilterFinite>(&[], x));
}

#[test]
fn elementwise() {
    let affine = [number("a", 1.5), number("b", -0.25)];
    each_tensor::<f64>(0..=8, |x| streams::<ScaleShift>(&affine, x));
    each_tensor::<f32>(0..=8, |x| streams::<ScaleShift>(&affine, x));
    let bounds = [number("lo", -3), number("hi", 250.5)];
    each_tensor::<f64>(0..=8, |x| streams::<Clip>(&bounds, x));
    each_tensor::<i16>(0..=2, |x| streams::<Clip>(&bounds, x));
    each_tensor::<F8E4m3fn>(0..=2, |x| streams::<Clip>(&bounds, x));
    for to in ["bfloat16", "int8", "complex128", "float64", "bool8"] {
        let to = [("to", Value::Text(to.into()))];
        each_tensor::<f64>(0..=8, |x| streams::<Cast>(&to, x));
        each_tensor::<F16>(1..=2, |x| streams::<Cast>(&to, x));
        each_tensor::<Bool8>(0..=1, |x| streams::<Cast>(&to, x));
    }
}

/// Cuts x along the kernel's split axis, which is axis 0, and puts the results one after the other. What is `whole` comes
/// with each slice.
fn slices_beside<K: Kernel>(parameters: &[(&str, Value)], x: &Tensor, whole: &[Tensor]) {
    assert_eq!(K::SPLIT_AXIS, Some(0), "{}", K::NAME);
    let [rows, ..] = x.shape[..] else { return };
    let run = |x: &Tensor| {
        let inputs = [core::slice::from_ref(x), whole].concat();
        invoke::<K>(parameters, &inputs).unwrap().outputs.remove(0)
    };
    let at_once = run(x);
    let mut numbers = Numbers(rows + 11);
    for _ in 0..20 {
        let (mut row, mut shape, mut bytes) = (0, x.shape.clone(), Vec::new());
        let row_bytes = x.bytes.len() / usize::try_from(rows.max(1)).unwrap();
        while row < rows {
            let most = usize::try_from(rows - row).unwrap();
            let taken = 1 + numbers.below(most);
            let start = usize::try_from(row).unwrap() * row_bytes;
            shape[0] = taken as u64;
            row += taken as u64;
            let slice = Tensor {
                dtype: x.dtype,
                shape: shape.clone(),
                bytes: x.bytes[start..start + taken * row_bytes].to_vec(),
            };
            let part = run(&slice);
            assert_eq!(part.shape[0], taken as u64, "{}", K::NAME);
            bytes.extend_from_slice(&part.bytes);
        }
        assert!(bytes == at_once.bytes, "{} of {:?}", K::NAME, x.shape);
    }
}

fn slices<K: Kernel>(parameters: &[(&str, Value)], x: &Tensor) {
    slices_beside::<K>(parameters, x, &[]);
}

#[test]
fn slices_give_what_the_whole_gives() {
    let affine = [number("a", 1.5), number("b", -0.25)];
    each_tensor::<f64>(1..=8, |x| slices::<ScaleShift>(&affine, x));
    each_tensor::<f32>(1..=8, |x| slices::<ScaleShift>(&affine, x));
    let bounds = [number("lo", -3), number("hi", 250.5)];
    each_tensor::<f64>(1..=8, |x| slices::<Clip>(&bounds, x));
    each_tensor::<Bf16>(1..=2, |x| slices::<Clip>(&bounds, x));
    let to = [("to", Value::Text("float16".into()))];
    each_tensor::<f64>(1..=8, |x| slices::<Cast>(&to, x));
    each_tensor::<i64>(1..=2, |x| slices::<Cast>(&to, x));
    each_product::<f64>(|a, b| slices_beside::<MatMul>(&[], a, core::slice::from_ref(b)));
}

/// Who adds a kernel that streams or can be sliced adds it to the tests above.
#[test]
fn no_kernel_is_left_out() {
    fn traits<K: Kernel>() -> (&'static str, bool, bool) {
        let name = core::any::type_name::<K>().rsplit("::").next().unwrap();
        let streams = K::STREAMING != Streaming::Whole;
        (name, streams, K::SPLIT_AXIS.is_some())
    }
    let tried = [
        traits::<ScaleShift>(),
        traits::<Clip>(),
        traits::<standard::ZScore>(),
        traits::<Cast>(),
        traits::<FilterFinite>(),
        traits::<CumSum>(),
        traits::<RollingMean>(),
        traits::<Fir>(),
        traits::<ZScoreRunning>(),
        traits::<Histogram>(),
        traits::<MatMul>(),
    ];
    let sliced: Vec<&str> = tried.iter().filter(|t| t.2).map(|t| t.0).collect();
    assert_eq!(sliced, ["ScaleShift", "Clip", "Cast", "MatMul"]);
    let whole: Vec<&str> = tried.iter().filter(|t| !t.1).map(|t| t.0).collect();
    assert_eq!(whole, ["ZScore"]);
    let (_, exported) = include_str!("../src/lib.rs").split_once("export!").unwrap();
    let (_, list) = exported.split_once('[').unwrap();
    let (list, _) = list.split_once(']').unwrap();
    let offered = list
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty());
    assert!(offered.eq(tried.map(|t| t.0)), "{list}");
}
