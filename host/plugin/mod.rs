//! What a plugin says it offers, held against what a caller asks for.
//!
//! A [`Plugin`] is a wasm artifact with its [`Description`]; [`Plugins`] are the loaded ones.
//! This room knows nothing of wasmtime: `engine` compiles the bytes and calls `describe`.

mod check;
mod description;
mod number;
mod signature;

use serde::{Deserialize, Serialize};
use std::any::Any;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use sha2::{Digest, Sha256};
pub use strait_tensor::{Dtype, TensorSpec};

pub use check::{CheckError, Invocable};
pub use description::{ITEMS_MAX, OUTPUTS_MAX};
pub use number::Number;
pub use signature::Signature;

/// Sha-256 of a plugin's bytes: names the compiled component.
pub type PluginHash = [u8; 32];

/// In hexadecimal digits.
pub(crate) fn hex(hash: &PluginHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a port takes numbers or a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Numbers.
    Data,
    /// One `bool8` for each element: false hides it.
    Mask,
}

/// An input or output of a kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Port {
    /// Unique among the kernel's inputs (outputs).
    pub name: String,
    /// What it takes (input) or can give (output).
    pub dtypes: Vec<Dtype>,
    /// Least rank.
    pub rank_min: u32,
    /// Greatest rank.
    pub rank_max: u32,
    /// Numbers or a mask.
    pub role: Role,
    /// An input that is never cut into chunks or slices.
    pub whole: bool,
    /// For people.
    pub doc: String,
}

/// The types that a parameter can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ParameterKind {
    /// true or false.
    Boolean,
    /// A whole number from -2^63 to 2^64-1.
    Integer,
    /// A 64-bit float.
    Real,
    /// Either, as the caller wrote it.
    Number,
    /// 0-based axis of the first input, row-major.
    Axis,
    /// Text.
    Text,
    /// A list of whole numbers.
    Integers,
    /// A list of 64-bit floats.
    Reals,
}

impl ParameterKind {
    /// As the protocol spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Boolean => "boolean",
            Self::Integer => "integer",
            Self::Real => "real",
            Self::Number => "number",
            Self::Axis => "axis",
            Self::Text => "text",
            Self::Integers => "integers",
            Self::Reals => "reals",
        }
    }
}

/// A parameter's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Value {
    /// See [`ParameterKind::Boolean`].
    Boolean(bool),
    /// See [`ParameterKind::Integer`], [`ParameterKind::Real`] and [`ParameterKind::Number`].
    Number(Number),
    /// See [`ParameterKind::Axis`].
    Axis(u32),
    /// See [`ParameterKind::Text`].
    Text(String),
    /// See [`ParameterKind::Integers`] and [`ParameterKind::Reals`].
    Numbers(Vec<Number>),
}

impl Value {
    /// As JSON; numbers that JSON does not have become `"nan"`, `"inf"`, `"-inf"`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Boolean(v) => (*v).into(),
            Self::Number(v) => v.to_json(),
            Self::Axis(v) => (*v).into(),
            Self::Text(v) => v.as_str().into(),
            Self::Numbers(v) => v.iter().map(|v| v.to_json()).collect(),
        }
    }
}

/// A parameter as the plugin declares it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ParameterDeclaration {
    /// Unique in the kernel.
    pub name: String,
    /// Its type.
    pub kind: ParameterKind,
    /// None: the caller must give it.
    pub default: Option<Value>,
    /// Least number.
    pub minimum: Option<Number>,
    /// Greatest number.
    pub maximum: Option<Number>,
    /// Allowed texts; empty allows any.
    pub choices: Vec<String>,
    /// For people.
    pub doc: String,
}

/// How a reduction gives the same bits on any slicing: by two other kernels of the plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTree {
    /// Rows of one block; blocks count from row 0 of the whole tensor.
    pub block_rows: u64,
    /// The kernel that gives one row for each block.
    pub partials: String,
    /// The kernel that makes the result of all those rows, in order.
    pub merge: String,
}

/// How the results of slices are put together again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Combine {
    /// Not at all: there are no slices.
    None,
    /// One after the other along the split axis.
    Concatenate,
    /// As a reduction.
    Tree(BlockTree),
}

impl Combine {
    /// As the protocol spells it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Concatenate => "concatenate",
            Self::Tree(_) => "tree",
        }
    }
}

/// A kernel as the plugin declares it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// Unique in the plugin.
    pub name: String,
    /// For people; the first line is for a listing.
    pub doc: String,
    /// In the order that the guest expects.
    pub inputs: Vec<Port>,
    /// In the order that the guest answers.
    pub outputs: Vec<Port>,
    /// In any order.
    pub parameters: Vec<ParameterDeclaration>,
    /// Which axes are equal; none: no rule.
    pub signature: Option<Signature>,
    /// The axis along which it may be cut into slices.
    pub split_axis: Option<u32>,
    /// How the slices' results are put together.
    pub combine: Combine,
    /// May be run chunk by chunk.
    pub streaming: bool,
    /// An output may share its first input's pages.
    pub in_place: bool,
}

/// A plugin's answer to `describe`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Revision of the contract: 1.
    pub abi: u32,
    /// The plugin's name.
    pub name: String,
    /// The plugin's version.
    pub version: String,
    /// What it offers.
    pub kernels: Vec<Kernel>,
    /// Guest address at which an instance leaves the words of its panic; 0: nowhere.
    pub panic_record: u64,
}

/// A loaded wasm artifact.
#[derive(Debug)]
pub struct Plugin {
    /// Of `bytes`.
    pub hash: PluginHash,
    /// The component.
    pub bytes: Arc<[u8]>,
    /// What it offers, checked.
    pub description: Description,
    /// What whoever runs it keeps for it, for as long as it lives.
    pub kept: Option<Arc<dyn Any + Send + Sync>>,
}

/// Largest file that is read as a plugin; those that we know have 1 MiB at most.
const FILE_BYTES_MAX: u64 = 256 << 20;

impl Plugin {
    /// The bytes of a plugin's file.
    ///
    /// # Errors
    /// If it is no regular file, has more than 256 MiB, or cannot be read.
    pub fn read(path: &Path) -> io::Result<Vec<u8>> {
        let metadata = fs::metadata(path)?;
        let refused = |reason| Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        if !metadata.is_file() {
            return refused("it is not a regular file".to_owned());
        }
        if metadata.len() > FILE_BYTES_MAX {
            return refused(format!(
                "it has {} bytes; a plugin has at most {FILE_BYTES_MAX}",
                metadata.len()
            ));
        }
        // Somebody's lease on the file, or a pipe that came there just now, would make us wait.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Sha-256 of a plugin's bytes.
    #[must_use]
    pub fn hash(bytes: &[u8]) -> PluginHash {
        Sha256::digest(bytes).into()
    }

    /// A plugin whose description makes sense.
    ///
    /// # Errors
    /// [`PluginError::Description`] that names the kernel and what is wrong with it.
    pub fn new(bytes: Arc<[u8]>, description: Description) -> Result<Self, PluginError> {
        description::check(&description).map_err(|reason| PluginError::Description {
            plugin: description.name.clone(),
            reason,
        })?;
        Ok(Self {
            hash: Self::hash(&bytes),
            bytes,
            description,
            kept: None,
        })
    }
}

/// Why a plugin could not be loaded or a kernel not be found.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum PluginError {
    /// The description contradicts itself.
    #[error("plugin `{plugin}` describes itself wrongly: {reason}; its author must fix `describe`")]
    Description {
        /// The plugin's name.
        plugin: String,
        /// What is wrong.
        reason: String,
    },
    /// Another plugin has the name.
    #[error("a plugin named `{0}` is loaded already; give the new one another name")]
    NameTaken(String),
    /// No loaded plugin has the kernel.
    #[error("no loaded plugin has a kernel `{kernel}`; there are {known}")]
    KernelNotFound {
        /// What was asked for.
        kernel: String,
        /// What there is.
        known: String,
    },
    /// More than one loaded plugin has the kernel.
    #[error("kernel `{kernel}` is in several plugins; say which: {choices}")]
    Ambiguous {
        /// What was asked for.
        kernel: String,
        /// `plugin/kernel` of each.
        choices: String,
    },
}

/// A kernel and the plugin that has it.
#[derive(Clone, Debug)]
pub struct KernelRef {
    /// The plugin.
    pub plugin: Arc<Plugin>,
    index: usize,
}

impl KernelRef {
    /// The kernel at `index` of a plugin's description, if there is one.
    #[must_use]
    pub fn new(plugin: &Arc<Plugin>, index: usize) -> Option<Self> {
        let plugin = Arc::clone(plugin);
        (index < plugin.description.kernels.len()).then_some(Self { plugin, index })
    }

    /// Its place in the plugin's description.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The kernel's declaration.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.plugin.description.kernels[self.index]
    }

    /// Its plugin's name and its own: what listings are sorted by.
    #[must_use]
    pub fn names(&self) -> (&str, &str) {
        (&self.plugin.description.name, &self.kernel().name)
    }

    /// Whether `name` means it: `kernel` or `plugin/kernel`.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        let (plugin, kernel) = self.names();
        let qualified = name
            .strip_prefix(plugin)
            .and_then(|rest| rest.strip_prefix('/'));
        name == kernel || qualified == Some(kernel)
    }
}

/// The loaded plugins, by name.
#[derive(Debug, Default)]
pub struct Plugins {
    by_name: RwLock<BTreeMap<String, Arc<Plugin>>>,
}

impl Plugins {
    /// Adds a plugin. The same bytes twice are one plugin.
    ///
    /// # Errors
    /// [`PluginError::NameTaken`] if other bytes have its name.
    pub fn add(&self, plugin: Plugin) -> Result<Arc<Plugin>, PluginError> {
        let mut by_name = self.by_name.write();
        if let Some(loaded) = by_name.get(&plugin.description.name) {
            if loaded.hash == plugin.hash {
                return Ok(Arc::clone(loaded));
            }
            return Err(PluginError::NameTaken(plugin.description.name));
        }
        let plugin = Arc::new(plugin);
        by_name.insert(plugin.description.name.clone(), Arc::clone(&plugin));
        Ok(plugin)
    }

    /// Takes all of them away.
    pub fn clear(&self) {
        let mut by_name = self.by_name.write();
        by_name.clear();
    }

    /// All of them, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Plugin>> {
        self.by_name.read().values().cloned().collect()
    }

    /// All kernels, sorted by plugin and name.
    #[must_use]
    pub fn kernels(&self) -> Vec<KernelRef> {
        let by_name = self.by_name.read();
        let mut all: Vec<KernelRef> = by_name
            .values()
            .flat_map(|plugin| {
                (0..plugin.description.kernels.len()).map(|index| KernelRef {
                    plugin: Arc::clone(plugin),
                    index,
                })
            })
            .collect();
        all.sort_by(|a, b| a.names().cmp(&b.names()));
        all
    }

    /// The kernel that `kernel` or `plugin/kernel` means.
    ///
    /// # Errors
    /// [`PluginError::KernelNotFound`], [`PluginError::Ambiguous`].
    pub fn find(&self, name: &str) -> Result<KernelRef, PluginError> {
        let kernels = self.kernels();
        let mut matches: Vec<&KernelRef> = kernels.iter().filter(|k| k.is_called(name)).collect();
        match matches.len() {
            1 => Ok(matches.remove(0).clone()),
            0 => Err(PluginError::KernelNotFound {
                kernel: name.to_owned(),
                known: kernels
                    .iter()
                    .map(|k| format!("`{}`", k.kernel().name))
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
            _ => Err(PluginError::Ambiguous {
                kernel: name.to_owned(),
                choices: matches
                    .into_iter()
                    .map(|found| {
                        let (plugin, kernel) = found.names();
                        format!("{plugin}/{kernel}")
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
            }),
        }
    }
}
