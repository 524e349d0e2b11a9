//! What a plugin author implements.

use crate::bindings::strait::kernel::types::{self, Combine, Parameter};
use crate::{Call, Dtype, Error, Parameters, Role, Spec};
use alloc::{boxed::Box, vec::Vec};

/// One function over tensors.
///
/// A value of the type is one invocation that was opened: its parameters and whatever [`open`](Self::open)
/// prepared. [`run`](Self::run) may be called more than once on it and must give the same each time.
pub trait Kernel: Sized + 'static {
    /// Lower case, words joined by `-`.
    const NAME: &'static str;
    /// The first line is one sentence for a listing.
    const DOC: &'static str;
    /// Ports in the order in which [`Call::input`] counts them.
    const INPUTS: &'static [Port];
    /// Ports in the order in which [`Call::output`] counts them.
    const OUTPUTS: &'static [Port];
    /// Which axes are equal, as a gufunc signature: `"(n),(k)->(m)"`, one pair of parentheses for each port. The names
    /// stand for the last axes of a tensor, and one name is one size wherever it stands; axes before the named ones
    /// are the same for all ports. The host checks it before [`open`](Self::open). Empty: no rule.
    const SIGNATURE: &'static str = "";
    /// The axis along which the host may cut all inputs and outputs, with the same result bit for bit.
    const SPLIT_AXIS: Option<u32> = None;
    /// Rough nanoseconds for each input element; 0 says nothing.
    const COST_HINT: f64 = 0.0;
    /// A struct declared by [`parameters!`](crate::parameters), or `()`.
    type Parameters: Parameters;

    /// Takes the checked parameters and the inputs' specs (one for each port; dtype, rank and role are
    /// checked) and answers the outputs' specs, one for each port: an upper bound where the data decides.
    /// Scratch memory is best allocated here.
    ///
    /// # Errors
    /// [`Error::bad_argument`] for what the declaration cannot express.
    fn open(parameters: Self::Parameters, inputs: &[Spec]) -> Result<(Self, Vec<Spec>), Error>;

    /// Reads the inputs and fills the outputs, all of them: they hold arbitrary values before.
    ///
    /// # Errors
    /// [`Error::failed`] if there is no result.
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error>;
}

/// One input or output of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    name: &'static str,
    dtypes: &'static [Dtype],
    rank_min: u32,
    rank_max: u32,
    role: Role,
    whole: bool,
    doc: &'static str,
}

impl Port {
    /// The highest rank of a tensor.
    pub const RANK_MAX: u32 = 8;

    /// A data port for tensors of every rank.
    #[must_use]
    pub const fn new(name: &'static str, dtypes: &'static [Dtype], doc: &'static str) -> Self {
        Self {
            name,
            dtypes,
            rank_min: 0,
            rank_max: Self::RANK_MAX,
            role: Role::Data,
            whole: false,
            doc,
        }
    }

    /// For tensors with `minimum` to `maximum` axes only.
    #[must_use]
    pub const fn rank(self, minimum: u32, maximum: u32) -> Self {
        Self {
            rank_min: minimum,
            rank_max: maximum,
            ..self
        }
    }

    /// The port takes a validity mask.
    #[must_use]
    pub const fn mask(self) -> Self {
        Self {
            role: Role::Mask,
            ..self
        }
    }

    /// An input that is never cut: a table, a filter's taps.
    #[must_use]
    pub const fn whole(self) -> Self {
        Self {
            whole: true,
            ..self
        }
    }

    /// The name that callers use.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn check(&self, spec: &Spec) -> Result<(), Error> {
        let rank = spec.shape.len();
        if !self.dtypes.contains(&spec.dtype) {
            let names: Vec<&str> = self.dtypes.iter().map(|dtype| dtype.name()).collect();
            let (given, names) = (spec.dtype.name(), names.join(", "));
            return Err(Error::bad_argument(
                self.name,
                alloc::format!("it takes {names}; given: {given}"),
            ));
        }
        if rank < self.rank_min as usize || rank > self.rank_max as usize {
            let (minimum, maximum) = (self.rank_min, self.rank_max);
            let reason =
                alloc::format!("it takes tensors of {minimum} to {maximum} axes; given: {rank}");
            return Err(Error::bad_argument(self.name, reason));
        }
        if spec.role != self.role {
            let reason = alloc::format!("it takes role {:?}; given: {:?}", self.role, spec.role);
            return Err(Error::bad_argument(self.name, reason));
        }
        if spec.elements().is_none() {
            let (shape, dtype) = (&spec.shape, spec.dtype.name());
            let reason = alloc::format!("{shape:?} of {dtype} is more than a plugin can address");
            return Err(Error::bad_argument(self.name, reason));
        }
        Ok(())
    }

    fn describe(&self) -> types::Port {
        types::Port {
            name: self.name.into(),
            dtypes: self.dtypes.into(),
            rank_min: self.rank_min,
            rank_max: self.rank_max,
            role: self.role,
            whole: self.whole,
            doc: self.doc.into(),
        }
    }
}

/// What [`export!`](crate::export) makes of a crate.
pub trait Plugin: 'static {
    /// The plugin's name.
    const NAME: &'static str;
    /// The plugin's version.
    const VERSION: &'static str;
    /// Its kernels.
    const KERNELS: &'static [Entry];
}

/// A [`Kernel`] whose type is forgotten.
#[derive(Debug)]
pub struct Entry {
    pub(crate) name: &'static str,
    pub(crate) inputs: &'static [Port],
    pub(crate) outputs: &'static [Port],
    pub(crate) describe: fn() -> types::Kernel,
    pub(crate) open: fn(Vec<Parameter>, &[Spec]) -> Result<OpenedKernel, Error>,
}

/// A kernel that was opened, and its outputs' specs.
pub(crate) type OpenedKernel = (Box<dyn Run>, Vec<Spec>);

impl Entry {
    /// The entry for `K`.
    #[must_use]
    pub const fn of<K: Kernel>() -> Self {
        Self {
            name: K::NAME,
            inputs: K::INPUTS,
            outputs: K::OUTPUTS,
            describe: describe::<K>,
            open: |parameters, inputs| {
                let (kernel, outputs) = K::open(K::Parameters::read(parameters)?, inputs)?;
                Ok((Box::new(kernel), outputs))
            },
        }
    }
}

/// An opened kernel whose type is forgotten.
pub(crate) trait Run {
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error>;
}

impl<K: Kernel> Run for K {
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        Kernel::run(self, call)
    }
}

fn describe<K: Kernel>() -> types::Kernel {
    types::Kernel {
        name: K::NAME.into(),
        doc: K::DOC.into(),
        inputs: K::INPUTS.iter().map(Port::describe).collect(),
        outputs: K::OUTPUTS.iter().map(Port::describe).collect(),
        parameters: K::Parameters::declare(),
        signature: K::SIGNATURE.into(),
        split_axis: K::SPLIT_AXIS,
        combine: if K::SPLIT_AXIS.is_some() {
            Combine::Concatenate
        } else {
            Combine::None
        },
        // This SDK hands a kernel whole tensors, and gives it no slice that is input and output at once.
        streaming: false,
        in_place: false,
        cost_hint: K::COST_HINT,
    }
}
