//! A plugin on its way in: one process compiles it, another runs its `describe`, and the host keeps the artifact.
//!
//! ```text
//! load ── a turn ──▶ cache, or compiler ──▶ sealed artifact ──▶ describer ──▶ Plugin
//!                    never runs the plugin                      never sees how it was compiled
//! ```
//! Both processes are of one plugin, and end with it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::process::{Resource, Rlimit, setrlimit};
use sha2::{Digest, Sha256};
use strait_memory::{Budget, FrameSocket};

use super::artifact::Artifact;
use super::channel::{Channel, ReceiveError};
use super::confine::{self, Confined};
use super::messages::{Answer, Ask, Compile, Control, Controlled};
use super::process::Process;
use super::program::{Program, Recipe, Spawned};
use crate::engine::{
    ArtifactKey, Cache, Cause, EngineConfig, Failed, Interruption, LoadError, Stage, compile,
    keeps_memory_only,
};
use crate::plugin::{Description, Plugin};

/// What a plugin gets to describe itself: the engine ends it after half of that, where it can.
const DESCRIBE_MAX: Duration = Duration::from_secs(10);
/// What Linux gets to take a compiler apart that has ended, and how often that is looked at.
const END_MAX: Duration = Duration::from_secs(10);
const END_LOOK: Duration = Duration::from_millis(2);
/// What an artifact may have beside a multiple of its plugin's bytes: much of it is the same for all.
const ARTIFACT_BYTES_BASE: usize = 16 << 20;
const ARTIFACT_TIMES: usize = 16;
const ARTIFACT_BYTES_MAX: usize = 512 << 20;
/// Descriptors, sockets and a log need some addresses before anything is compiled.
const BYTES_MIN: u64 = 64 << 20;

/// What loading plugins may cost.
#[derive(Clone, Copy, Debug)]
pub struct CompilerSettings {
    /// Of CPU for one plugin. By the clock, and with the wait for a turn, twice as long.
    pub seconds: u64,
    /// Addresses of the process that compiles.
    pub bytes: u64,
    /// Plugins that are loaded at a time.
    pub at_once: usize,
}

/// Loads plugins in processes of their own.
#[derive(Debug)]
pub(super) struct Compilers {
    settings: CompilerSettings,
    engine: EngineConfig,
    program: Arc<Program>,
    /// Of the program and the settings that change machine code.
    build: OnceLock<u64>,
    cache: Cache,
    describers: Recipe,
    counted: Arc<Budget>,
    taken: Mutex<usize>,
    given_back: Condvar,
}

impl Compilers {
    /// For workers of `recipe`, with what was kept in `cache`.
    pub(super) fn new(settings: CompilerSettings, recipe: &Recipe, cache: Cache) -> Self {
        Self {
            settings,
            engine: recipe.start.engine.clone(),
            program: Arc::clone(&recipe.program),
            build: OnceLock::new(),
            cache,
            describers: Recipe::describer(
                Arc::clone(&recipe.program),
                recipe.start.engine.clone(),
                recipe.require_walls,
            ),
            counted: Budget::new("compiled plugins", u64::MAX),
            taken: Mutex::default(),
            given_back: Condvar::new(),
        }
    }

    /// # Errors
    /// [`LoadError`]; no process of it is left then.
    pub(super) fn load(&self, bytes: Arc<[u8]>) -> Result<Plugin, LoadError> {
        let until = Instant::now() + Duration::from_secs(2 * self.settings.seconds);
        let _turn = self.turn(until)?;
        let key = ArtifactKey {
            plugin: Plugin::hash(&bytes),
            build: self.build().map_err(host)?,
        };
        let memory_only = keeps_memory_only(&bytes);
        let kept = self.cache.read(&key);
        let kept = kept.map(|kept| self.described(&kept, memory_only));
        let (artifact, description) = match kept {
            Some(Ok(described)) => described,
            tried => {
                if let Some(Err(error)) = tried {
                    tracing::warn!(%error, "a compiled plugin of the cache is compiled anew");
                }
                let compiled = self.compile(&bytes, until)?;
                let described = self.described(&compiled, memory_only)?;
                self.cache.write(&key, &compiled);
                described
            }
        };
        let mut plugin = Plugin::new(bytes, description)?;
        plugin.kept = Some(Arc::new(artifact));
        Ok(plugin)
    }

    fn turn(&self, until: Instant) -> Result<Turn<'_>, LoadError> {
        let at_once = self.settings.at_once;
        let mut taken = self.taken.lock();
        while *taken >= at_once {
            if self.given_back.wait_until(&mut taken, until).timed_out() && *taken >= at_once {
                let seconds = 2 * self.settings.seconds;
                return Err(LoadError::CompilersBusy { at_once, seconds });
            }
        }
        *taken += 1;
        Ok(Turn(self))
    }

    /// wasmtime itself checks its version and settings again; this keeps two builds out of each other's way.
    fn build(&self) -> io::Result<u64> {
        if let Some(build) = self.build.get() {
            return Ok(*build);
        }
        let (mut digest, mut part, mut at) = (Sha256::new(), vec![0; 256 << 10], 0);
        loop {
            match self.program.file.read_at(&mut part, at)? {
                0 => break,
                count => {
                    digest.update(&part[..count]);
                    at += count as u64;
                }
            }
        }
        let mut build = DefaultHasher::new();
        digest.finalize().as_slice().hash(&mut build);
        (self.engine.interruption == Interruption::Checks).hash(&mut build);
        Ok(*self.build.get_or_init(|| build.finish()))
    }

    /// Has a process compile a plugin.
    fn compile(&self, plugin: &[u8], until: Instant) -> Result<Vec<u8>, LoadError> {
        let begin = Instant::now();
        let require_walls = self.describers.require_walls;
        confine::check(self.program.lacking.as_slice(), require_walls).map_err(host)?;
        let (own, its) = FrameSocket::pair().map_err(host)?;
        let mut process = Compiler(self.program.spawn(its, "compiler").map_err(host)?);
        let mut channel = Channel::new(own).map_err(host)?;
        let work = Control::Compile(Compile {
            uid: process.0.uid(),
            engine: self.engine.clone(),
            seconds: self.settings.seconds,
            bytes: self.settings.bytes.max(BYTES_MIN),
            require_walls,
            plugin: plugin.to_vec(),
        });
        let most = plugin.len().saturating_mul(ARTIFACT_TIMES);
        let most = most
            .saturating_add(ARTIFACT_BYTES_BASE)
            .min(ARTIFACT_BYTES_MAX);
        let answer = match channel.send(&work, &[]) {
            Ok(()) => channel.receive(most, 0, Some(until)),
            Err(error) => Err(error.into()),
        };
        let artifact = match answer {
            Ok((Controlled::Compiled(compiled), _)) => compiled?,
            Ok((other, _)) => {
                let answer = format!("it answered {}", other.kind());
                return Err(LoadError::CompilerLost(answer));
            }
            Err(ReceiveError::Late) => return Err(self.took_long()),
            Err(ReceiveError::Gone) => return Err(self.ended(process.end().map_err(host)?)),
            Err(error @ ReceiveError::Bad(_)) => {
                return Err(LoadError::CompilerLost(error.to_string()));
            }
        };
        tracing::info!(
            bytes = plugin.len(),
            artifact_bytes = artifact.len(),
            ms = begin.elapsed().as_millis(),
            "a plugin was compiled"
        );
        Ok(artifact)
    }

    fn took_long(&self) -> LoadError {
        LoadError::CompileTime {
            seconds: self.settings.seconds,
        }
    }

    /// What it means that a compiler ended without an answer.
    fn ended(&self, status: Option<ExitStatus>) -> LoadError {
        let Some(status) = status else {
            return LoadError::CompilerLost("it closed its socket and did not end".to_owned());
        };
        match status.signal() {
            // At the soft limit of CPU time, and at the hard one.
            Some(libc::SIGXCPU | libc::SIGKILL) => self.took_long(),
            // What Rust does without memory, and without stack.
            Some(libc::SIGABRT) => LoadError::CompileMemory {
                bytes: self.settings.bytes.max(BYTES_MIN),
            },
            _ => LoadError::CompilerLost(status.to_string()),
        }
    }

    /// Has a process run a plugin's `describe`.
    fn described(
        &self,
        artifact: &[u8],
        memory_only: bool,
    ) -> Result<(Artifact, Description), LoadError> {
        let artifact = Artifact::new(artifact, memory_only, &self.counted).map_err(host)?;
        let process = Process::start(&self.describers, || false).map_err(host)?;
        let answer = describe(&process, &artifact);
        process.end_here();
        let description = answer.map_err(|error| match error {
            ReceiveError::Late => {
                let ms = u64::try_from(DESCRIBE_MAX.as_millis()).unwrap_or(u64::MAX);
                let late = Failed::new("(describe)", Stage::Describe, Cause::Deadline(ms));
                LoadError::Describe(late)
            }
            ReceiveError::Gone | ReceiveError::Bad(_) => {
                LoadError::DescriberLost(error.to_string())
            }
        })??;
        Ok((artifact, description))
    }
}

fn describe(
    process: &Arc<Process>,
    artifact: &Artifact,
) -> Result<Result<Description, LoadError>, ReceiveError> {
    let fd = artifact
        .fd()
        .map_err(|e| ReceiveError::Bad(e.to_string()))?;
    let mut lane = process.lane();
    lane.ask(&Ask::Describe(artifact.bytes()), &[fd.as_fd()])?;
    match lane.description(Instant::now() + DESCRIBE_MAX)? {
        Answer::Described(described) => Ok(*described),
        answer => Err(ReceiveError::Bad(format!("{} for a plugin", answer.kind()))),
    }
}

fn host(error: impl std::fmt::Display) -> LoadError {
    LoadError::NoWorker(error.to_string())
}

/// The right to have one plugin compiled and described.
struct Turn<'a>(&'a Compilers);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock() -= 1;
        self.0.given_back.notify_one();
    }
}

/// A process that compiles. It is gone when this has dropped.
struct Compiler(Spawned);

impl Compiler {
    /// How one has ended that has closed its socket; none if it lives on for [`END_MAX`], which nothing honest does.
    fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        let until = Instant::now() + END_MAX;
        loop {
            match self.0.child.try_wait()? {
                None if Instant::now() < until => std::thread::sleep(END_LOOK),
                ended => return Ok(ended),
            }
        }
    }
}

impl Drop for Compiler {
    fn drop(&mut self) {
        // It may have ended, and been waited for.
        let _ = self.0.child.kill();
        let _ = self.0.child.wait();
    }
}

/// Inside the compiler process: all of its life.
///
/// # Errors
/// The host is gone.
pub(super) fn obey(
    control: &mut Channel,
    work: Compile,
    lacking: Vec<String>,
) -> Result<(), String> {
    let compiled = limited(&work).and_then(|()| {
        let lacking = confine::confine(lacking, Confined::Compiler);
        for wall in &lacking {
            tracing::warn!(wall, "a compiler process lacks a wall");
        }
        confine::check(&lacking, work.require_walls).map_err(host)?;
        compile(&work.engine, work.plugin, work.bytes)
    });
    let answer = Controlled::Compiled(compiled);
    control.send(&answer, &[]).map_err(|e| e.to_string())
}

/// Linux ends this process beyond them, host or no host.
fn limited(work: &Compile) -> Result<(), LoadError> {
    let limit = |resource, current, maximum| {
        let limit = Rlimit {
            current: Some(current),
            maximum: Some(maximum),
        };
        setrlimit(resource, limit)
            .map_err(|e| LoadError::CompilerLost(format!("it could not be limited: {e}")))
    };
    limit(Resource::Cpu, work.seconds, work.seconds + 1)?;
    limit(Resource::As, work.bytes, work.bytes)
}
