//! The walls around a worker process, and around one that compiles.
//!
//! A plugin that has broken out of wasmtime is this process. It has the host's user, so Linux would let it touch the host itself.
//! What stands in its way, each put up by the process itself before it has anything to do:
//!
//! - limits: memory of its own, descriptors, the size of files, no core files; and it is the first to go when memory is short,
//! - no capability, also where the host is root (`users.rs`),
//! - no path, no TCP port, and no signal to or abstract socket of anybody (Landlock), also where a system call slips through,
//! - the system calls that it may make (`calls.rs`).

use std::fs;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetError, Scope,
};
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, dumpable_behavior, getrlimit, setrlimit,
};
use serde::{Deserialize, Serialize};
use strait_memory::SCRAP_BYTES;

use super::calls;

/// What a compiler has open, with room to spare.
const COMPILER_FILES: u64 = 64;

/// What stands around each worker, as far as its Linux does it: what it lacks begins with one of these names.
const WALLS: [&str; 7] = [
    "no capabilities",
    "Landlock",
    "seccomp",
    "no core files",
    "limit of descriptors",
    "limit of file sizes",
    "limit of memory",
];
/// What stands around that of a host that is root, and of another one.
const WALLS_OF_ROOT: [&str; 2] = ["a user of its own", "first to go when memory is short"];
const WALLS_OF_OTHERS: [&str; 1] = ["hidden from its user from its start"];

/// What stands around a worker of a host that `is_root` or not, and that lacks these.
pub(super) fn standing(lacking: &[String], is_root: bool) -> Vec<&'static str> {
    let is_lacking = |wall: &&str| lacking.iter().any(|lack| lack.starts_with(wall));
    let more: &[_] = match is_root {
        true => &WALLS_OF_ROOT,
        false => &WALLS_OF_OTHERS,
    };
    let walls = WALLS.iter().chain(more);
    walls.filter(|wall| !is_lacking(wall)).copied().collect()
}

/// What a process that runs kernels may have at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// Memory of its own, in bytes: all that it can write but segments. Guests count with the addresses that they have
    /// made accessible, where windows lie among them.
    pub memory_bytes: u64,
    /// Descriptors.
    pub files: u64,
}

/// Says that this process is the first to go when memory is short. Before it is not dumpable: from then on Linux lets only
/// root write there.
pub(super) fn go_first() -> Vec<String> {
    // A program that nobody can read was never dumpable: then only root could say so, and hiding is worth more.
    if matches!(dumpable_behavior(), Ok(DumpableBehavior::NotDumpable)) {
        return Vec::new();
    }
    let gone = fs::write("/proc/self/oom_score_adj", "1000");
    let lacking = gone.map_err(|e| format!("first to go when memory is short: {e}"));
    lacking.err().into_iter().collect()
}

/// Shuts this thread, and those that it starts from now on, out of all that has a name: Landlock is a matter of threads.
/// Answers what this Linux would not do, in words.
pub(super) fn shut_out() -> Option<String> {
    match landlocked() {
        Ok(status) => unknown_to(status.landlock),
        Err(error) => Some(format!("Landlock: {error}")),
    }
}

/// As much as this Linux knows; no rule allows anything.
fn landlocked() -> Result<RestrictionStatus, RulesetError> {
    const NEWEST: ABI = ABI::V10;
    Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()
}

/// What a Landlock does not know that a worker should have. Later versions know more, which seccomp alone refuses otherwise.
fn unknown_to(landlock: LandlockStatus) -> Option<String> {
    let version = match landlock {
        LandlockStatus::NotImplemented => {
            return Some("Landlock: not in this Linux, or refused by a filter".to_owned());
        }
        LandlockStatus::NotEnabled => {
            return Some(
                "Landlock: not among the security modules that this Linux was started with (lsm=)"
                    .to_owned(),
            );
        }
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
    };
    let known_since = [
        (ABI::V3, "truncation"),
        (ABI::V4, "TCP ports"),
        (ABI::V6, "signals and abstract sockets"),
    ];
    let unknown = known_since
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|(_, what)| *what);
    let unknown: Vec<_> = unknown.collect();
    (!unknown.is_empty()).then(|| format!("Landlock: this Linux's has no {}", unknown.join(", ")))
}

/// Whom the walls are around.
#[derive(Clone, Copy, Debug)]
pub(super) enum Confined {
    /// It runs kernels; all of its threads stand.
    Worker(Bounds),
    /// It compiles one plugin, and runs nothing of it.
    Compiler,
}

/// Does the rest, for all threads that there are and will be. Answers what this Linux would not do, in words, after what
/// is `lacking` already.
pub(super) fn confine(mut lacking: Vec<String>, who: Confined) -> Vec<String> {
    let mut built = |wall: &str, outcome: Result<(), String>| {
        if let Err(why) = outcome {
            lacking.push(format!("{wall}: {why}"));
        }
    };
    for (wall, resource, most) in limits(who) {
        built(wall, limit(resource, most).map_err(|e| e.to_string()));
    }
    // It makes no files, and none by mistake that anybody could read.
    rustix::process::umask(Mode::RWXU | Mode::RWXG | Mode::RWXO);
    // Also sets that no privileges can be had any more, without which Linux takes no filter.
    built("seccomp", calls::filter().map_err(|e| e.to_string()));
    lacking
}

/// # Errors
/// A wall is lacking, and all are `required`.
pub(super) fn check(lacking: &[String], required: bool) -> Result<(), String> {
    if !required || lacking.is_empty() {
        return Ok(());
    }
    Err(format!(
        "it lacks a wall ({}), and the setting workers.require_walls allows none that does",
        lacking.join("; ")
    ))
}

/// What Linux is to hold the process to. A compiler has its addresses limited already.
fn limits(who: Confined) -> Vec<(&'static str, Resource, u64)> {
    let (files, file_bytes) = match who {
        // Of the memory without a name that can be shared, a worker needs scrap for stores into inputs.
        Confined::Worker(bounds) => (bounds.files, SCRAP_BYTES as u64),
        Confined::Compiler => (COMPILER_FILES, 0),
    };
    let mut limits = vec![
        ("no core files", Resource::Core, 0),
        ("limit of descriptors", Resource::Nofile, files),
        ("limit of file sizes", Resource::Fsize, file_bytes),
    ];
    if let Confined::Worker(bounds) = who {
        limits.push(("limit of memory", Resource::Data, bounds.memory_bytes));
    }
    limits
}

/// No more than `most` from now on, nor than now.
fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let most = getrlimit(resource)
        .maximum
        .map_or(most, |now| now.min(most));
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(resource, limit)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{TcpListener, TcpStream};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Output};

    use rustix::fs::{OFlags, SealFlags};
    use rustix::net::{AddressFamily, SocketType};
    use rustix::process::{Pid, PidfdFlags, getppid};

    use super::*;

    const CONFINED: &str = "TEST_CONFINED";
    const WORKER: Confined = Confined::Worker(Bounds {
        memory_bytes: 1 << 30,
        files: 100,
    });

    fn refused(errno: i32, what: &str, result: io::Result<()>) {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(errno), "{what}: {error}");
        println!("refused: {what}");
    }

    /// Ways out that neither kind of process has.
    fn attempts(parent: Pid, file: &fs::File) {
        use std::os::fd::AsRawFd;

        let refused = |what, result| refused(libc::EACCES, what, result);
        let limit = Rlimit {
            current: Some(1),
            maximum: Some(1),
        };
        let parents = Some(parent);
        let cpus = rustix::thread::CpuSet::new();
        let asynchronous = OFlags::from_bits_retain(libc::O_ASYNC.unsigned_abs());
        let ways: [(&str, rustix::io::Result<()>); 13] = [
            (
                "kill of the parent",
                rustix::process::test_kill_process(parent),
            ),
            (
                "pidfd_open",
                rustix::process::pidfd_open(parent, PidfdFlags::empty()).map(drop),
            ),
            (
                "setpriority",
                rustix::process::setpriority_process(parents, 5),
            ),
            (
                "sched_setaffinity",
                rustix::thread::sched_setaffinity(parents, &cpus),
            ),
            (
                "prlimit on the parent",
                rustix::process::prlimit(parents, Resource::Nofile, limit).map(drop),
            ),
            ("setrlimit", setrlimit(Resource::Nofile, limit)),
            (
                "socket",
                rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).map(drop),
            ),
            ("O_ASYNC", rustix::fs::fcntl_setfl(file, asynchronous)),
            ("seals", rustix::fs::fcntl_add_seals(file, SealFlags::SEAL)),
            ("setsid", rustix::process::setsid().map(drop)),
            ("pipe", rustix::pipe::pipe().map(drop)),
            (
                "flags of a descriptor",
                rustix::fs::fcntl_setfl(file, OFlags::NONBLOCK),
            ),
            (
                "lock",
                rustix::fs::flock(file, rustix::fs::FlockOperation::LockShared),
            ),
        ];
        for (what, result) in ways {
            refused(what, result.map_err(Into::into));
        }
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        refused("reopen of a descriptor", fs::File::open(own).map(drop));
        refused("thread", std::thread::Builder::new().spawn(|| {}).map(drop));
        files();
    }

    /// To look at, to make, to change and to take away what has a path.
    fn files() {
        use rustix::fs::{AtFlags, CWD, FileType, ResolveFlags};

        let refused = |what, result: rustix::io::Result<()>| {
            refused(libc::EACCES, what, result.map_err(Into::into));
        };
        // Nothing comes of that where the wall is lacking.
        let (path, new) = ("/proc/self/status", "/proc/self/new");
        let create = OFlags::CREATE | OFlags::WRONLY;
        let mode = Mode::RUSR | Mode::WUSR;
        let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
        let open = |path: &str, flags| rustix::fs::open(path, flags, mode).map(drop);
        let beneath = ResolveFlags::BENEATH;
        refused("open to read", open(path, OFlags::RDONLY));
        refused("open to write", open(path, OFlags::WRONLY));
        refused("open to create", open(new, create));
        refused(
            "openat2",
            rustix::fs::openat2(CWD, path, OFlags::RDONLY, Mode::empty(), beneath).map(drop),
        );
        refused("unlink", rustix::fs::unlink(path));
        refused("rename", rustix::fs::rename(path, new));
        refused("link", rustix::fs::link(path, new));
        refused("symlink", rustix::fs::symlink(path, new));
        refused("chmod", rustix::fs::chmod(path, mode));
        refused("chown", rustix::fs::chown(path, Some(uid), Some(gid)));
        refused("mkdir", rustix::fs::mkdir(new, mode));
        let pipe = FileType::Fifo;
        refused("mknod", rustix::fs::mknodat(CWD, new, pipe, mode, 0));
        let is_there = rustix::fs::Access::EXISTS;
        refused("access", rustix::fs::access(path, is_there));
        refused(
            "stat",
            rustix::fs::statat(CWD, path, AtFlags::empty()).map(drop),
        );
    }

    /// In threads that were there before, and this one.
    fn in_all_threads(who: Confined, attempts: impl Fn(&fs::File) + Sync) {
        let file = tempfile::tempfile().expect("a file");
        let confined = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let before = scope.spawn(|| {
                confined.wait();
                attempts(&file);
            });
            assert_eq!(confine(go_first(), who), Vec::<String>::new());
            confined.wait();
            before.join().expect("no panic");
            attempts(&file);
        });
    }

    /// Not a test: the process that `what_confined_processes_cannot_do` starts.
    #[test]
    #[ignore = "the process that another test starts"]
    fn confined_process() {
        let parent = getppid().expect("it has one");
        match std::env::var(CONFINED).as_deref() {
            Ok("worker") => worker(parent),
            Ok("compiler") => in_all_threads(Confined::Compiler, |file| attempts(parent, file)),
            Ok("shut out") => shut_out_of_names(parent),
            Ok("no Landlock") => {
                calls::without(libc::SYS_landlock_create_ruleset).expect("a filter");
                let lacking = shut_out().expect("a wall is lacking");
                assert!(
                    lacking.starts_with("Landlock: not in this Linux"),
                    "{lacking}"
                );
                fs::read("/proc/self/maps").expect("files, and it goes on");
            }
            Ok("worker that runs a program") => runs_a_program(WORKER),
            Ok("compiler that runs a program") => runs_a_program(Confined::Compiler),
            _ => return,
        }
        println!("the process is confined");
    }

    fn runs_a_program(who: Confined) {
        confine(go_first(), who);
        let error = Command::new("/bin/true").exec();
        println!("it lives: {error}");
    }

    fn worker(parent: Pid) {
        strait_memory::process::keep_mappings_open().expect("/proc");
        in_all_threads(WORKER, |file| {
            attempts(parent, file);
            // What it needs it can still do.
            let files = getrlimit(Resource::Nofile);
            assert_eq!((files.current, files.maximum), (Some(100), Some(100)));
            let here = std::ptr::from_ref(file).addr();
            let found = strait_memory::process::inode_at(here).expect("its own mappings");
            assert_eq!(found, None, "a stack is of no file");
        });
    }

    /// By Landlock alone.
    fn shut_out_of_names(parent: Pid) {
        let name = format!("strait-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a name");
        let _others = UnixListener::bind_addr(&address).expect("an abstract socket");
        let port = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = port.local_addr().expect("it has one");
        if let Some(lacking) = shut_out() {
            // What it lacks cannot be tried.
            eprintln!("not tested: {lacking}");
            return;
        }
        let attempts = || {
            let denied = |what, result| refused(libc::EACCES, what, result);
            denied("file", fs::File::open("/dev/null").map(drop));
            denied("new file", fs::write("/tmp/strait-no-file", "").map(drop));
            denied("directory", fs::read_dir("/").map(drop));
            denied("TCP connection", TcpStream::connect(port).map(drop));
            denied("TCP port", TcpListener::bind("127.0.0.1:0").map(drop));
            let connected = UnixStream::connect_addr(&address).map(drop);
            refused(libc::EPERM, "abstract socket", connected);
            let killed = rustix::process::test_kill_process(parent);
            refused(libc::EPERM, "signal", killed.map_err(Into::into));
        };
        attempts();
        std::thread::scope(|scope| {
            scope.spawn(attempts).join().expect("no panic");
        });
    }

    #[test]
    fn each_version_of_landlock_is_told_by_what_it_does_not_know() {
        let of = |effective_abi| {
            unknown_to(LandlockStatus::Available {
                effective_abi,
                kernel_abi: None,
            })
        };
        let told = |parts: &str| Some(format!("Landlock: this Linux's has no {parts}"));
        assert_eq!(
            of(ABI::V1),
            told("truncation, TCP ports, signals and abstract sockets")
        );
        assert_eq!(of(ABI::V3), told("TCP ports, signals and abstract sockets"));
        assert_eq!(of(ABI::V5), told("signals and abstract sockets"));
        assert_eq!((of(ABI::V6), of(ABI::V10)), (None, None));
        let off = unknown_to(LandlockStatus::NotEnabled).expect("a wall is lacking");
        assert!(off.contains("lsm="), "{off}");
    }

    fn confined(who: &str) -> Output {
        let own = std::env::current_exe().expect("this program");
        Command::new(own)
            .args(["--exact", "worker::confine::tests::confined_process"])
            .args(["--ignored", "--nocapture"])
            .env(CONFINED, who)
            .output()
            .expect("it starts")
    }

    #[test]
    fn what_confined_processes_cannot_do() {
        let kinds = [
            ("worker", 29),
            ("compiler", 29),
            ("shut out", 7),
            ("no Landlock", 0),
        ];
        for (who, ways) in kinds {
            let process = confined(who);
            let text = String::from_utf8_lossy(&process.stdout);
            let errors = String::from_utf8_lossy(&process.stderr);
            assert!(text.contains("the process is confined"), "{text}{errors}");
            assert_eq!(text.matches("refused: ").count(), 2 * ways, "{who}: {text}");
        }
    }

    #[test]
    fn who_runs_a_program_is_killed() {
        for who in ["worker", "compiler"] {
            let process = confined(&format!("{who} that runs a program"));
            let text = String::from_utf8_lossy(&process.stdout);
            assert!(!text.contains("it lives"), "{text}");
            assert_eq!(process.status.signal(), Some(libc::SIGSYS), "{who}");
        }
    }

    #[test]
    fn what_a_worker_does_not_lack_stands() {
        let lacking = ["seccomp: no".to_owned(), "Landlock: no TCP".to_owned()];
        for is_root in [true, false] {
            let all = standing(&[], is_root);
            let left = standing(&lacking, is_root);
            assert_eq!(left.len(), all.len() - 2);
            assert!(!left.contains(&"seccomp") && left.contains(&"no core files"));
            assert_eq!(all.contains(&WALLS_OF_ROOT[0]), is_root);
        }
        for (wall, _, _) in limits(WORKER) {
            assert!(WALLS.contains(&wall), "{wall}");
        }
    }

    #[test]
    fn where_all_walls_are_required_none_may_be_lacking() {
        let lacking = ["seccomp: no".to_owned(), "Landlock: no".to_owned()];
        assert_eq!((check(&lacking, false), check(&[], true)), (Ok(()), Ok(())));
        let why = check(&lacking, true).expect_err("two are lacking");
        for part in ["seccomp: no; Landlock: no", "workers.require_walls"] {
            assert!(why.contains(part), "{why}");
        }
    }
}
