//! Kernels and outcomes in the words of the wire, for both edges.

use std::sync::Arc;

use strait_protocol as wire;

use super::pipeline::{self, Asked};
use super::{Caller, Invoked};
use crate::engine::Report;
use crate::error::Status;
use crate::plugin::{Combine, Description, Kernel, KernelRef, Number, Port, Role, Value};

impl From<&KernelRef> for wire::Kernel {
    fn from(found: &KernelRef) -> Self {
        let Description { name, version, .. } = &found.plugin.description;
        kernel(name, version, found.kernel())
    }
}

/// A kernel of that plugin and version, or what is declared as if it were one.
fn kernel(plugin: &str, version: &str, kernel: &Kernel) -> wire::Kernel {
    let port = |p: &Port| wire::Port {
        name: p.name.clone(),
        dtypes: p.dtypes.clone(),
        rank_min: p.rank_min,
        rank_max: p.rank_max,
        role: match p.role {
            Role::Data => "data".to_owned(),
            Role::Mask => "mask".to_owned(),
        },
        whole: p.whole,
        doc: p.doc.clone(),
    };
    wire::Kernel {
        name: kernel.name.clone(),
        plugin: plugin.to_owned(),
        version: version.to_owned(),
        doc: kernel.doc.clone(),
        inputs: kernel.inputs.iter().map(port).collect(),
        outputs: kernel.outputs.iter().map(port).collect(),
        parameters: kernel
            .parameters
            .iter()
            .map(|p| wire::Parameter {
                name: p.name.clone(),
                kind: p.kind.name().to_owned(),
                default: p.default.as_ref().map(Value::to_json),
                minimum: p.minimum.and_then(Number::to_json_number),
                maximum: p.maximum.and_then(Number::to_json_number),
                choices: p.choices.clone(),
                doc: p.doc.clone(),
            })
            .collect(),
        signature: kernel.signature.as_ref().map(ToString::to_string),
        split_axis: kernel.split_axis,
        combine: kernel.combine.name().to_owned(),
        block_tree: match &kernel.combine {
            Combine::Tree(tree) => Some(wire::BlockTree {
                block_rows: tree.block_rows,
                partials: tree.partials.clone(),
                merge: tree.merge.clone(),
            }),
            Combine::None | Combine::Concatenate => None,
        },
        streaming: kernel.streaming,
        in_place: kernel.in_place,
    }
}

/// One entry of a listing.
enum Listed {
    Kernel(KernelRef),
    Named(String, Arc<wire::Pipeline>),
    /// A pipeline that was asked for as such.
    Described(Box<wire::Kernel>),
}

impl Listed {
    /// What listings are sorted by.
    fn names(&self) -> (&str, &str) {
        match self {
            Self::Kernel(found) => found.names(),
            Self::Named(name, _) => (pipeline::PLUGIN, name),
            Self::Described(kernel) => (pipeline::PLUGIN, &kernel.name),
        }
    }

    fn is_called(&self, asked: &str) -> bool {
        match self {
            Self::Kernel(found) => found.is_called(asked),
            Self::Named(name, _) => {
                asked == name || asked.split_once('/') == Some((pipeline::PLUGIN, name.as_str()))
            }
            Self::Described(_) => true,
        }
    }
}

impl Caller {
    /// The kernels that a listing asks for and that it may run, sorted by plugin and name, pipelines that have names among them; or the
    /// pipeline that it asks for, as if that were a kernel.
    ///
    /// # Errors
    /// What is wrong with that pipeline.
    pub fn kernels(
        &self,
        wanted: &wire::Kernels,
    ) -> Result<impl Iterator<Item = wire::Kernel>, Status> {
        let asked = match (&wanted.kernel, &wanted.pipeline) {
            (None, None) => None,
            (kernel, pipeline) => {
                let kernel = kernel.as_deref().unwrap_or_default();
                Some(Asked::of(kernel, pipeline.clone())?)
            }
        };
        let mut found = Vec::new();
        match asked.as_ref().and_then(Asked::pipeline) {
            Some(pipeline) => found.push(Listed::Described(Box::new(self.described(pipeline)?))),
            None => {
                let kernels = self.host.plugins.kernels().into_iter();
                found.extend(kernels.map(Listed::Kernel));
                let named = self.named_pipelines().into_iter();
                found.extend(named.map(|(name, pipeline)| Listed::Named(name, pipeline)));
            }
        }
        found.sort_by(|a, b| a.names().cmp(&b.names()));
        let after = wanted
            .after
            .as_deref()
            .map(|after| after.split_once('/').unwrap_or((after, "")));
        let listed = found.into_iter().filter(move |found| {
            let name = wanted.kernel.as_deref();
            after.is_none_or(|after| found.names() > after)
                && name.is_none_or(|name| found.is_called(name))
        });
        Ok(listed.filter_map(|found| match found {
            Listed::Kernel(found) => self.may_call(&found).then(|| wire::Kernel::from(&found)),
            // What it may not call, or nobody can any more, is not there.
            Listed::Named(name, pipeline) => self.described_as(Some(name), &pipeline).ok(),
            Listed::Described(kernel) => Some(*kernel),
        }))
    }

    /// What is called `name`: a kernel, or a pipeline.
    ///
    /// # Errors
    /// As [`Caller::kernel`] and [`Caller::declared`].
    pub fn describe(&self, name: &str) -> Result<wire::Kernel, Status> {
        match self.asked(name, None)? {
            Asked::Kernel => Ok(wire::Kernel::from(&self.kernel(name)?)),
            Asked::Pipeline(pipeline) => self.described(&pipeline),
            Asked::Named(name, pipeline) => self.described_as(Some(name), &pipeline),
        }
    }

    /// A pipeline as if it were a kernel.
    ///
    /// # Errors
    /// As [`Caller::declared`].
    pub fn described(&self, pipeline: &wire::Pipeline) -> Result<wire::Kernel, Status> {
        self.described_as(None, pipeline)
    }

    fn described_as(
        &self,
        name: Option<String>,
        pipeline: &wire::Pipeline,
    ) -> Result<wire::Kernel, Status> {
        let mut declared = self.declared(pipeline)?;
        declared.name = name.unwrap_or(declared.name);
        Ok(kernel(
            pipeline::PLUGIN,
            env!("CARGO_PKG_VERSION"),
            &declared,
        ))
    }
}

impl Invoked {
    /// The outcome on the wire; what a client may do with `results` is the edge's to say.
    #[must_use]
    pub fn to_wire(&self, results: Vec<wire::ResultEntry>, request_id: &str) -> wire::Invoked {
        let note = |(key, text): &(String, String)| wire::Note {
            key: key.clone(),
            text: text.clone(),
        };
        let Report {
            notes,
            copied_bytes,
            pages,
            minor_faults,
            slices,
            seconds,
        } = &self.report;
        wire::Invoked {
            results,
            notes: notes.iter().map(note).collect(),
            copied_bytes: *copied_bytes,
            input_written: false,
            pages: pages
                .iter()
                .map(|pages| wire::Pages {
                    port: pages.port.clone(),
                    device: pages.inode.map_or(0, |inode| inode.device),
                    inode: pages.inode.map_or(0, |inode| inode.inode),
                })
                .collect(),
            minor_faults: *minor_faults,
            slices: *slices,
            seconds: wire::Seconds {
                queue: self.queue_seconds,
                instantiate: seconds.instantiate,
                open: seconds.open,
                reserve: seconds.reserve,
                move_in: seconds.move_in,
                run: seconds.run,
                move_out: seconds.move_out,
                total: seconds.total + self.queue_seconds,
            },
            stages: self.stages.clone(),
            request_id: request_id.to_owned(),
        }
    }
}
