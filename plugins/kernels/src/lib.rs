//! The standard kernels of strait.
//!
//! Each kernel is a plain generic function over slices in a module of its own, beneath the declaration that
//! makes it one. Dtypes, rounding and edge cases are numpy's unless a kernel's docs say otherwise.

#![cfg_attr(target_arch = "wasm32", no_std)]
#![forbid(unsafe_code)]

mod cast;
mod clip;
mod columns;
mod cumsum;
mod filter_finite;
mod fir;
mod histogram;
mod matmul;
mod moments;
mod rolling_mean;
mod scale_shift;
mod zscore;
mod zscore_running;

pub use cast::Cast;
pub use clip::Clip;
pub use cumsum::CumSum;
pub use filter_finite::FilterFinite;
pub use fir::Fir;
pub use histogram::Histogram;
pub use matmul::MatMul;
pub use rolling_mean::RollingMean;
pub use scale_shift::ScaleShift;
pub use zscore::ZScore;
pub use zscore_running::ZScoreRunning;

strait_plugin::export!(
    "standard",
    [
        ScaleShift,
        Clip,
        ZScore,
        Cast,
        FilterFinite,
        CumSum,
        RollingMean,
        Fir,
        ZScoreRunning,
        Histogram,
        MatMul,
    ]
);
