//! How workers and compilers are started: the program that they run, and the thread that starts them.
//!
//! Linux ends such a process when the thread that started it ends, if it has asked for that ([`super::users::end_with_host`]): so that thread has to
//! be there for as long as the host.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, mpsc};

use strait_memory::{FrameSocket, unreadable_program};

use super::confine::Bounds;
use super::log;
use super::messages::Start;
use super::users::{User, Users};
use crate::engine::EngineConfig;

/// A `describe` has 64 MiB for itself, and a compiled plugin is half a GiB at most.
const DESCRIBER: Bounds = Bounds {
    memory_bytes: 2 << 30,
    files: 64,
};

/// How workers are started.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) role: Role,
    pub(super) program: Arc<Program>,
    pub(super) lanes: usize,
    /// None is started where a wall is lacking.
    pub(super) require_walls: bool,
    pub(super) start: Start,
    /// Of all that were started.
    pub(super) census: Arc<Census>,
}

/// What a process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// To run kernels.
    Worker,
    /// To describe one plugin.
    Describer,
}

impl Recipe {
    /// For one that only describes a plugin, or says which walls it has: it is none of the workers that operators count.
    pub(super) fn describer(
        program: Arc<Program>,
        engine: EngineConfig,
        require_walls: bool,
    ) -> Self {
        Self {
            role: Role::Describer,
            program,
            lanes: 1,
            require_walls,
            start: Start {
                engine: EngineConfig {
                    // The host's alone.
                    cache: None,
                    threads: 1,
                    ..engine
                },
                parked_mappings_max: 0,
                parked_bytes_max: 0,
                bounds: DESCRIBER,
                uid: None,
                streams: 0,
            },
            census: Arc::default(),
        }
    }

    /// What the log calls one.
    pub(super) fn name(&self, number: u64) -> Arc<str> {
        match self.role {
            Role::Worker => number.to_string().into(),
            Role::Describer => "describer".into(),
        }
    }

    /// What this process has open for each: the lanes, control twice, and the log.
    pub(super) fn fds(&self) -> u64 {
        self.lanes as u64 + 3
    }
}

/// Counts of workers.
#[derive(Debug, Default)]
pub(super) struct Census {
    pub(super) started: AtomicU64,
    pub(super) living: AtomicU64,
    pub(super) lost: AtomicU64,
    /// Descriptors that this process has open for them.
    pub(super) fds: AtomicU64,
}

/// What workers and compilers run.
#[derive(Debug)]
pub(super) struct Program {
    /// Opened once: an upgrade in its place changes nothing for this host.
    pub(super) file: File,
    /// A wall that its processes lack.
    pub(super) lacking: Option<String>,
    /// Users for them; none: they have the host's.
    users: Option<Arc<Users>>,
    starts: mpsc::Sender<Request>,
}

/// A process that is to have that socket, and who waits for it.
struct Request {
    socket: FrameSocket,
    started: mpsc::Sender<io::Result<Child>>,
}

fn start(file: &File, arguments: &[String], socket: FrameSocket) -> io::Result<Child> {
    Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .arg0("strait-worker")
        .args(arguments)
        .env_clear()
        // What the terminal sends to the host is the host's to tell.
        .process_group(0)
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
}

impl Program {
    /// That file; none: the program that this process runs.
    ///
    /// # Errors
    /// It cannot be opened, or Linux gives no thread.
    pub(super) fn open(
        path: Option<&Path>,
        arguments: Vec<String>,
        uids: Option<RangeInclusive<u32>>,
    ) -> io::Result<Self> {
        let path = path.unwrap_or(Path::new("/proc/self/exe"));
        let file = File::open(path).map_err(|error| {
            let path = path.display();
            io::Error::new(
                error.kind(),
                format!("the program of workers, {path}: {error}"),
            )
        })?;
        let (program, lacking) = match rustix::process::geteuid().is_root() {
            // Whoever else is root needs no way into its memory.
            true => {
                let lacking = uids.is_none().then(|| {
                    "a user of its own: it is root as its host is, without the setting workers.uids"
                        .to_owned()
                });
                (file.try_clone()?, lacking)
            }
            false => match unreadable_program(&file) {
                Ok(program) => (program, None),
                Err(error) => (
                    file.try_clone()?,
                    Some(format!("hidden from its user from its start: {error}")),
                ),
            },
        };
        let (starts, asked) = mpsc::channel::<Request>();
        std::thread::Builder::new()
            .name("strait-spawner".to_owned())
            .spawn(move || {
                for one in asked {
                    // Whoever asked waits.
                    let _ = one.started.send(start(&program, &arguments, one.socket));
                }
            })?;
        Ok(Self {
            file,
            lacking,
            users: uids.map(Users::new),
            starts,
        })
    }

    /// A process of it with that socket, and nothing else of the host's. What it writes on stderr is told in the log with `name`.
    ///
    /// # Errors
    /// Linux gives none.
    pub(super) fn spawn(&self, socket: FrameSocket, name: &str) -> io::Result<Spawned> {
        let user = self.users.as_ref().map(Users::take).transpose()?;
        let gone = || io::Error::other("the thread that starts worker processes has ended");
        let (started, answer) = mpsc::channel();
        self.starts
            .send(Request { socket, started })
            .map_err(|_| gone())?;
        let mut child = answer.recv().map_err(|_| gone())??;
        let relayed = match child.stderr.take() {
            Some(stderr) => log::relay(name, stderr),
            None => Ok(()),
        };
        if let Err(error) = relayed {
            // It has not begun.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(Spawned { child, user })
    }
}

/// A process, and the user that it is to become.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) child: Child,
    user: Option<User>,
}

impl Spawned {
    pub(super) fn uid(&self) -> Option<u32> {
        self.user.as_ref().map(|user| user.uid)
    }

    /// Ends it, unless it has ended by itself. It is still to be waited for.
    pub(super) fn kill(&mut self) {
        if let Some(user) = &mut self.user {
            user.leave();
        }
        // It may have ended.
        let _ = self.child.kill();
    }
}
