//! Pipelines that have names: a principal's own, and those that operators made for everybody.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use strait_memory::Charge;
use strait_protocol as wire;

use super::{Asked, graph, print};
use crate::error::{Code, Reason, Status};
use crate::lease::Principal;
use crate::session::caller::Caller;
use crate::text::name as shown;

/// Most of them that one principal may have made.
const COUNT_MAX: usize = 1024;
/// Longest of them, as text, in bytes.
const TEXT_BYTES_MAX: usize = 16 << 10;
/// Longest name in bytes, as a kernel's.
const NAME_BYTES_MAX: usize = 64;

/// Whose it is: nobody's alone are those for everybody.
type Key = (Option<Principal>, String);

#[derive(Clone, Debug)]
struct Kept {
    pipeline: Arc<wire::Pipeline>,
    text: Arc<str>,
    /// Who made it.
    maker: Principal,
    /// Among its maker's names and bytes.
    _charges: Arc<(Charge, Charge)>,
}

/// All of a host's.
#[derive(Debug, Default)]
pub(in crate::session) struct NamedPipelines {
    // Never held while anything else is locked.
    kept: Mutex<BTreeMap<Key, Kept>>,
}

impl NamedPipelines {
    /// What `principal` means by a name: its own, or else one for everybody.
    fn find(&self, principal: &Principal, name: &str) -> Option<Kept> {
        let kept = self.kept.lock();
        if kept.is_empty() {
            return None;
        }
        let own = kept.get(&(Some(principal.clone()), name.to_owned()));
        own.or_else(|| kept.get(&(None, name.to_owned()))).cloned()
    }

    /// All that `principal` can call, by name.
    fn all(&self, principal: &Principal) -> BTreeMap<String, (Kept, bool)> {
        let kept = self.kept.lock();
        let mut all = BTreeMap::new();
        // Those for everybody come first, and its own take their places.
        for ((owner, name), one) in kept.iter() {
            if owner.as_ref().is_none_or(|owner| owner == principal) {
                all.insert(name.clone(), (one.clone(), owner.is_none()));
            }
        }
        all
    }
}

/// A name as kernels have them.
fn check_name(name: &str) -> Result<(), Status> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(allowed) {
        return Ok(());
    }
    let message = format!(
        "`{}` cannot be a pipeline's name, which has 1 to {NAME_BYTES_MAX} characters from A-Z a-z 0-9 . _ - +",
        shown(name)
    );
    Err(Status::new(Code::InvalidArgument, Reason::BadName, message))
}

impl Caller {
    /// What a request that names a kernel asks for.
    ///
    /// # Errors
    /// As [`Asked::of`].
    pub(in crate::session) fn asked(
        &self,
        kernel: &str,
        pipeline: Option<wire::Pipeline>,
    ) -> Result<Asked, Status> {
        let asked = Asked::of(kernel, pipeline)?;
        if !matches!(asked, Asked::Kernel) {
            return Ok(asked);
        }
        let name = kernel.strip_prefix("pipeline/").unwrap_or(kernel);
        match self.host().pipelines.find(self.principal(), name) {
            // What a plugin has is meant first.
            Some(kept) if self.host().plugins().find(kernel).is_err() => {
                Ok(Asked::Named(name.to_owned(), kept.pipeline))
            }
            Some(_) | None => Ok(asked),
        }
    }

    /// The pipelines after the name `after` that it can call, its own and those for everybody, by name.
    pub fn pipelines(&self, after: Option<&str>) -> Vec<wire::NamedPipeline> {
        let all = self.host().pipelines.all(self.principal()).into_iter();
        let asked = all.filter(|(name, _)| Some(name.as_str()) > after);
        let told = asked.map(|(name, (kept, shared))| wire::NamedPipeline {
            name,
            text: kept.text.to_string(),
            shared,
        });
        told.collect()
    }

    /// The same as they are called, by name.
    pub(in crate::session) fn named_pipelines(&self) -> Vec<(String, Arc<wire::Pipeline>)> {
        let all = self.host().pipelines.all(self.principal()).into_iter();
        all.map(|(name, (kept, _))| (name, kept.pipeline)).collect()
    }

    /// Gives a pipeline a name, until it is dropped or the host ends.
    ///
    /// # Errors
    /// `BAD_NAME`, `NAME_TAKEN`, `QUOTA_EXCEEDED`; `NO_RIGHT` to make one for everybody; as [`Caller::declared`].
    pub fn publish_pipeline(&self, asked: wire::PublishPipeline) -> Result<(), Status> {
        let wire::PublishPipeline {
            name,
            kernel,
            pipeline,
            replace,
            shared,
        } = asked;
        self.check_put()?;
        if shared {
            self.check_admin("publish pipelines for everybody")?;
        }
        check_name(&name)?;
        let pipeline = match (pipeline, kernel.is_empty()) {
            (Some(pipeline), true) => {
                graph::check(&pipeline)?;
                pipeline
            }
            // One kernel is a pipeline, too.
            (None, false) => super::parse(&kernel)?,
            _ => return Err(super::either()),
        };
        self.declared(&pipeline)?;
        let text = print(&pipeline);
        if text.len() > TEXT_BYTES_MAX {
            let message = format!(
                "a pipeline of {} bytes as text; one that has a name has at most {TEXT_BYTES_MAX}",
                text.len()
            );
            return Err(Status::new(
                Code::InvalidArgument,
                Reason::BadPipeline,
                message,
            ));
        }
        let charges = (self.account().name()?, self.charge(2 * text.len() as u64)?);
        let kept = Kept {
            pipeline: Arc::new(pipeline),
            text: text.into(),
            maker: self.principal().clone(),
            _charges: Arc::new(charges),
        };
        let key = ((!shared).then(|| self.principal().clone()), name);
        let mut all = self.host().pipelines.kept.lock();
        let is_there = all.contains_key(&key);
        if is_there && !replace {
            let name = &key.1;
            let message = format!(
                "there is a pipeline `{name}` already; drop it, set replace, or take another name"
            );
            let taken = Status::new(Code::AlreadyExists, Reason::NameTaken, message);
            return Err(taken.with("name", name.as_str()));
        }
        let made = all.values().filter(|one| one.maker == *self.principal());
        if !is_there && made.count() >= COUNT_MAX {
            let message = format!(
                "{} has made {COUNT_MAX} pipelines with names, the most that one may; drop some",
                self.principal()
            );
            return Err(
                Status::new(Code::ResourceExhausted, Reason::QuotaExceeded, message)
                    .with("limit", COUNT_MAX),
            );
        }
        let before = all.insert(key, kept);
        drop(all);
        drop(before);
        Ok(())
    }

    /// Takes a pipeline's name away: its own, or else, for an operator, one for everybody. Calls of it that are under way go on.
    ///
    /// # Errors
    /// `KERNEL_NOT_FOUND`, `NO_RIGHT`.
    pub fn drop_pipeline(&self, name: &str) -> Result<(), Status> {
        self.check_put()?;
        let own = (Some(self.principal().clone()), name.to_owned());
        let mut all = self.host().pipelines.kept.lock();
        if let Some(gone) = all.remove(&own) {
            drop(all);
            drop(gone);
            return Ok(());
        }
        let shared = (None, name.to_owned());
        if !all.contains_key(&shared) {
            let message = format!(
                "there is no pipeline `{}` of {}; PIPELINES (`strait pipelines`) lists those there are",
                shown(name),
                self.principal()
            );
            return Err(Status::new(Code::NotFound, Reason::KernelNotFound, message));
        }
        self.check_admin("drop pipelines that are for everybody")?;
        let gone = all.remove(&shared);
        drop(all);
        drop(gone);
        Ok(())
    }
}
