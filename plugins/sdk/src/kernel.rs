//! What a plugin author implements.

use crate::bindings::strait::kernel::types::{self, Combine, Parameter};
use crate::steps::Run;
use crate::{Call, Dtype, Error, Parameters, Role, Spec, Streaming};
use alloc::{boxed::Box, format, vec::Vec};

/// One function over tensors.
///
/// A value of the type is one invocation that was opened: its parameters and whatever [`open`](Self::open)
/// prepared. Of a stream it is also what is carried from one chunk to the next; without one, [`run`](Self::run) may be
/// called more than once on it and must give the same each time.
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
    /// Whether `run` may be called for each chunk of rows, and how.
    const STREAMING: Streaming = Streaming::Whole;
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

    /// How many rows before each new one [`run`](Self::run) must see again, with [`Streaming::Rows`]: an
    /// [`Input`](crate::Input) has that many at its start, or as many as there have been ([`lead`](crate::Input::lead)).
    /// They are in the tensor itself, or the SDK keeps a copy of them between chunks.
    fn history(&self) -> usize {
        0
    }

    /// Reads the inputs and fills the outputs, all of them: they hold arbitrary values before.
    ///
    /// # Errors
    /// [`Error::failed`] if there is no result.
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error>;

    /// After the last row of a stream: gives what was held back, or a result that needs all rows, and makes the notes.
    /// The inputs have no new rows, or those that a [`Streaming::Free`] kernel did not consume. [`Call::written`] says how
    /// many rows there are; if there is not room for all, [`Call::more`] has it called again. Not called with
    /// [`Streaming::Whole`].
    ///
    /// # Errors
    /// [`Error::failed`] if there is no result.
    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        let _ = call;
        Ok(())
    }
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

    pub(crate) const fn is_whole(&self) -> bool {
        self.whole
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
                format!("it takes {names}; given: {given}"),
            ));
        }
        if rank < self.rank_min as usize || rank > self.rank_max as usize {
            let (minimum, maximum) = (self.rank_min, self.rank_max);
            let reason = format!("it takes tensors of {minimum} to {maximum} axes; given: {rank}");
            return Err(Error::bad_argument(self.name, reason));
        }
        if spec.role != self.role {
            let reason = format!("it takes role {:?}; given: {:?}", self.role, spec.role);
            return Err(Error::bad_argument(self.name, reason));
        }
        if spec.elements().is_none() {
            let (shape, dtype) = (&spec.shape, spec.dtype.name());
            let reason = format!("{shape:?} of {dtype} is more than a plugin can address");
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
    pub(crate) streaming: Streaming,
    pub(crate) describe: fn() -> types::Kernel,
    pub(crate) open: fn(Vec<Parameter>, &[Spec]) -> Result<OpenedKernel, Error>,
}

/// A kernel that was opened, its outputs' specs, and its [`Kernel::history`].
pub(crate) type OpenedKernel = (Box<dyn Run>, Vec<Spec>, usize);

impl Entry {
    /// The entry for `K`.
    #[must_use]
    pub const fn of<K: Kernel>() -> Self {
        Self {
            name: K::NAME,
            inputs: K::INPUTS,
            outputs: K::OUTPUTS,
            streaming: K::STREAMING,
            describe: describe::<K>,
            open: |parameters, inputs| {
                let (kernel, outputs) = K::open(K::Parameters::read(parameters)?, inputs)?;
                let history = kernel.history();
                Ok((Box::new(kernel), outputs, history))
            },
        }
    }
}

impl<K: Kernel> Run for K {
    fn run(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        Kernel::run(self, call)
    }

    fn finish(&mut self, call: &mut Call<'_>) -> Result<(), Error> {
        Kernel::finish(self, call)
    }
}

impl Entry {
    /// Whether tensors of these specs can go through the kernel as it streams.
    pub(crate) fn check_streams(
        &self,
        history: usize,
        inputs: &[Spec],
        outputs: &[Spec],
    ) -> Result<(), Error> {
        if self.streaming != Streaming::Rows {
            return match history {
                0 => Ok(()),
                _ => Err(Error::failed(format!(
                    "{} has a history, which only Streaming::Rows keeps",
                    self.name
                ))),
            };
        }
        let inputs = self.inputs.iter().zip(inputs);
        let mut streamed = inputs.filter(|(port, _)| !port.whole);
        let Some((first, spec)) = streamed.next() else {
            return Err(Error::failed(format!(
                "{} gives a row for a row, and all its inputs are whole",
                self.name
            )));
        };
        let (rows, first) = (spec.rows(), first.name);
        if let Some((port, spec)) = streamed.find(|(_, spec)| spec.rows() != rows) {
            let reason = format!("it has {} rows, {first} has {rows}", spec.rows());
            return Err(Error::bad_argument(port.name, reason));
        }
        let mut outputs = self.outputs.iter().zip(outputs);
        match outputs.find(|(_, spec)| spec.rows() != rows) {
            Some((port, spec)) => Err(Error::failed(format!(
                "{}: `open` answered {} rows for {}, which gives a row for a row and has {rows}",
                self.name,
                spec.rows(),
                port.name
            ))),
            None => Ok(()),
        }
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
        streaming: !matches!(K::STREAMING, Streaming::Whole),
        // This SDK gives a kernel no slice that is input and output at once.
        in_place: false,
        cost_hint: K::COST_HINT,
    }
}
