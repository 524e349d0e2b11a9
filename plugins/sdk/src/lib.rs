//! Write strait kernels in Rust: typed parameters and a function over slices.
//!
//! A plugin is a `cdylib` crate for `wasm32-unknown-unknown` with one or more types that implement
//! [`Kernel`] and one [`export!`]:
//!
//! ```
//! use strait_plugin::prelude::*;
//!
//! parameters! {
//!     /// What `negate-above` is told.
//!     pub struct Above {
//!         /// Values above this change their sign.
//!         limit: f64 = 0.0,
//!     }
//! }
//!
//! /// Changes the sign of all values above a limit.
//! pub struct NegateAbove {
//!     limit: f64,
//! }
//!
//! impl Kernel for NegateAbove {
//!     const NAME: &str = "negate-above";
//!     const DOC: &str = "Changes the sign of all values above `limit`.";
//!     const INPUTS: &[Port] = &[Port::new("x", &[Dtype::Float64], "Any shape.")];
//!     const OUTPUTS: &[Port] = &[Port::new("y", &[Dtype::Float64], "Shape of x.")];
//!     type Parameters = Above;
//!
//!     fn open(above: Above, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error> {
//!         Ok((Self { limit: above.limit }, vec![inputs[0].clone()]))
//!     }
//!
//!     fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
//!         let x = call.input::<f64>(0)?;
//!         let mut y = call.output::<f64>(0)?;
//!         map(&x, &mut y, |v| if v > self.limit { -v } else { v });
//!         Ok(())
//!     }
//! }
//!
//! strait_plugin::export!("signs", [NegateAbove]);
//! # fn main() {
//! let y = testing::invoke::<NegateAbove>(&[("limit", Value::Number(1.0.into()))], &[Tensor::new(&[1.0, 2.0])]).unwrap();
//! assert_eq!(y.outputs[0].values::<f64>(), [1.0, -2.0]);
//! # }
//! ```
//!
//! What lies where:
//!
//! ```text
//! export!  ──▶ abi ──▶ instance ──▶ kernel, parameter, number   describe, open, bind, run, extents, notes
//!              │        │
//!              │        └─▶ steps ──▶ kept ──▶ lines      chunks of any size to calls; earlier rows, in aligned memory
//!              │             └─▶ call ──▶ window, element, float   windows as slices, element types
//!              └─▶ bindings (generated from wit/)          └─▶ map: loops that become wide SIMD code
//! ```
//!
//! Tensor memory is visible only inside [`Kernel::run`]; the SDK keeps no reference to it in between.

#![cfg_attr(target_arch = "wasm32", no_std)]

extern crate alloc;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod abi;
#[allow(
    missing_docs,
    missing_debug_implementations,
    unsafe_code,
    unreachable_pub,
    clippy::pedantic,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::allow_attributes_without_reason,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "generated code; which of these it trips depends on the target"
)]
#[rustfmt::skip]
#[doc(hidden)]
pub mod bindings;
mod call;
mod element;
mod float;
mod instance;
mod kept;
mod kernel;
mod lines;
#[cfg(feature = "log")]
pub mod log;
mod map;
mod number;
mod panic;
mod parameter;
#[cfg(all(target_arch = "wasm32", feature = "runtime"))]
mod runtime;
mod steps;
mod streaming;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;
mod window;

pub use bindings::strait::kernel::types::{
    BadArgument, Dtype, Error, Failure, Note, Number, ParameterKind, Role, Spec, Value,
};
pub use call::{Call, Input, Output};
pub use element::{Bool8, Complex, Element, Real, dtypes};
pub use float::{Bf16, F8E4m3fn, F8E5m2, F16, sqrt};
pub use instance::Instance;
pub use kernel::{Entry, Kernel, Plugin, Port};
pub use map::map;
pub use panic::record_panic;
pub use parameter::{Axis, AxisSplit, ParameterType, Parameters};
pub use streaming::Streaming;

#[doc(hidden)]
pub mod macro_support {
    //! What the macros' expansions need by a path that always resolves.
    pub use crate::bindings::strait::kernel::types::{Parameter, ParameterDeclaration};
    pub use crate::parameter::{declare, doc_text, resolve};
    pub use alloc::{format, string::String, vec::Vec};
}

/// Everything that a plugin usually needs.
pub mod prelude {
    #[cfg(not(target_arch = "wasm32"))]
    pub use crate::testing::{self, Tensor};
    pub use crate::{
        Axis, Bf16, Bool8, Call, Complex, Dtype, Element, Error, F8E4m3fn, F8E5m2, F16, Input,
        Kernel, Number, Output, Port, Real, Spec, Streaming, Value, dispatch, dtypes, map,
        parameters,
    };
    pub use alloc::{boxed::Box, format, string::String, vec, vec::Vec};
}

/// Makes the crate a plugin: `export!("name", [KernelA, KernelB]);`, once in a `cdylib` crate.
///
/// The plugin's version is the crate's.
#[macro_export]
macro_rules! export {
    ($name:expr, [$($kernel:ty),+ $(,)?]) => {
        #[doc(hidden)]
        pub(crate) struct StraitPlugin;

        impl $crate::Plugin for StraitPlugin {
            const NAME: &'static str = $name;
            const VERSION: &'static str = env!("CARGO_PKG_VERSION");
            const KERNELS: &'static [$crate::Entry] = &[$($crate::Entry::of::<$kernel>()),+];
        }

        #[cfg(target_arch = "wasm32")]
        #[doc(hidden)]
        type StraitExports = $crate::abi::Exports<StraitPlugin>;

        #[cfg(target_arch = "wasm32")]
        $crate::__export_plugin_impl!(StraitExports with_types_in $crate::bindings);
    };
}

/// Runs a block with `T` bound to the Rust type of a [`Dtype`].
///
/// `dispatch!(dtype, T in [f32, f64] => { … })`, or instead of the list one of the words `all`, `reals`,
/// `floats`, `integers`. The block is a `Result<_, Error>`; a dtype outside the list is an error.
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, $t:ident in all => $body:block) => {
        $crate::dispatch!($dtype, $t in [
            $crate::Bool8, i8, i16, i32, i64, u8, u16, u32, u64, $crate::F16, $crate::Bf16,
            $crate::F8E4m3fn, $crate::F8E5m2, f32, f64, $crate::Complex<f32>, $crate::Complex<f64>,
        ] => $body)
    };
    ($dtype:expr, $t:ident in reals => $body:block) => {
        $crate::dispatch!($dtype, $t in [
            $crate::Bool8, i8, i16, i32, i64, u8, u16, u32, u64, $crate::F16, $crate::Bf16,
            $crate::F8E4m3fn, $crate::F8E5m2, f32, f64,
        ] => $body)
    };
    ($dtype:expr, $t:ident in floats => $body:block) => {
        $crate::dispatch!($dtype, $t in [
            $crate::F16, $crate::Bf16, $crate::F8E4m3fn, $crate::F8E5m2, f32, f64,
        ] => $body)
    };
    ($dtype:expr, $t:ident in integers => $body:block) => {
        $crate::dispatch!($dtype, $t in [i8, i16, i32, i64, u8, u16, u32, u64] => $body)
    };
    ($dtype:expr, $t:ident in [$($type:ty),+ $(,)?] => $body:block) => {{
        let dtype: $crate::Dtype = $dtype;
        $(
            if dtype == <$type as $crate::Element>::DTYPE {
                type $t = $type;
                $body
            } else
        )+
        {
            Err($crate::Error::unhandled(dtype))
        }
    }};
}

/// Declares a kernel's parameters once: a struct whose fields are the parameters, by name.
///
/// A field's doc comment is the parameter's doc, its type (`bool`, `i64`, `u64`, `f64`, [`Number`], [`Axis`],
/// `String`, `Vec<i64>`, `Vec<u64>`, `Vec<f64>`) the kind, the value after `=` the default; without one the caller must give it. Before the
/// field may stand `#[minimum(…)]`, `#[maximum(…)]` (for numbers and lists of them) and `#[choices("…", …)]` (for text),
/// in this order, after the doc comment.
///
/// ```
/// strait_plugin::parameters! {
///     /// Parameters of a filter.
///     pub struct Parameters {
///         /// Elements that one result looks at.
///         #[minimum(1)]
///         pub window: i64 = 5,
///         /// What happens at the edges.
///         #[choices("shrink", "drop")]
///         pub edges: String = "drop",
///         /// Cut-off in cycles for each sample.
///         #[minimum(0.0)] #[maximum(0.5)]
///         pub frequency: f64,
///     }
/// }
/// ```
#[macro_export]
macro_rules! parameters {
    (
        $(#[$meta:meta])*
        $visibility:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])*
                $(#[minimum($minimum:expr)])?
                $(#[maximum($maximum:expr)])?
                $(#[choices($($choice:literal),+ $(,)?)])?
                $field_visibility:vis $field:ident : $type:ty $(= $default:expr)?
            ),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $visibility struct $name {
            $( $(#[doc = $doc])* $field_visibility $field: $type, )*
        }

        impl $crate::Parameters for $name {
            fn declare() -> $crate::macro_support::Vec<$crate::macro_support::ParameterDeclaration> {
                let declared: &[$crate::macro_support::ParameterDeclaration] = &[$({
                    #[allow(unused_mut, reason = "a parameter may have no default, limit or choice")]
                    let mut declaration = $crate::macro_support::declare::<$type>(
                        stringify!($field),
                        &[$($doc),*],
                    );
                    $(
                        let default: $type = ($default).into();
                        declaration.default = Some($crate::ParameterType::into_value(default));
                    )?
                    $( declaration.minimum = Some(($minimum).into()); )?
                    $( declaration.maximum = Some(($maximum).into()); )?
                    $( declaration.choices.extend([$($choice.into()),+]); )?
                    declaration
                }),*];
                declared.into()
            }

            fn read(
                given: $crate::macro_support::Vec<$crate::macro_support::Parameter>,
            ) -> Result<Self, $crate::Error> {
                let mut values = $crate::macro_support::resolve(&Self::declare(), given)?.into_iter();
                Ok(Self {
                    $( $field: $crate::ParameterType::from_value(values.next(), stringify!($field))?, )*
                })
            }
        }
    };
}
