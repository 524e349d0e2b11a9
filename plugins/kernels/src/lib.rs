//! The standard kernels of strait.
//!
//! Each kernel is a plain generic function over slices in a module of its own, beneath the declaration that
//! makes it one. Dtypes, rounding and edge cases are numpy's unless a kernel's docs say otherwise.

#![cfg_attr(target_arch = "wasm32", no_std)]
#![forbid(unsafe_code)]

mod cast;
mod clip;
mod filter_finite;
mod moments;
mod scale_shift;
mod zscore;

pub use cast::Cast;
pub use clip::Clip;
pub use filter_finite::FilterFinite;
pub use scale_shift::ScaleShift;
pub use zscore::ZScore;

strait_plugin::export!("standard", [ScaleShift, Clip, ZScore, Cast, FilterFinite]);
