//! What a worker process may still do once it runs kernels.
//!
//! A plugin that has broken out of wasmtime is this process. It has the host's user, so Linux would let it touch the host itself.
//! Seccomp filters over all of its threads are the wall:
//!
//! - a worker has a list of what it may do (`ALLOWED`, and some calls by their arguments). The rest is refused (`EACCES`);
//!   what nobody tries by mistake (`FATAL`) is its end.
//! - a compiler has a list of what it may not do (`REFUSED`, `EPERM`): it runs no plugin, and compiling needs more of Linux.
//!
//! Beside that: no new privileges, no core files, and the first to go when memory is short.

use std::collections::BTreeMap;
use std::{fs, io};

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// What a worker calls, as it was seen to: memory, its sockets and descriptors, time, and its own end. No file can be opened,
/// no thread or process started, no socket made.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_munmap,
    libc::SYS_mremap,
    // Compiled plugins become executable by it; wasmtime asks for that page by page of what it was given.
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_brk,
    // Scrap memory for stores into inputs, made in the handler of the fault.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // The first that a thread does, of itself alone: the last ones may still be about it. glibc ends the process without.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What only an intruder calls.
const FATAL: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_perf_event_open,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_pivot_root,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
];

/// Calls that a compiler never needs: of other processes, of sockets, of the machine.
const REFUSED: &[libc::c_long] = &[
    // Programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_setsid,
    libc::SYS_setpgid,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_setrlimit,
    // Sockets: those that it has were given to it.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    // What is named for the whole machine.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semctl,
    libc::SYS_semtimedop,
    libc::SYS_msgget,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_msgctl,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    libc::SYS_inotify_init,
    libc::SYS_inotify_init1,
    libc::SYS_fanotify_init,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Who it is, and what it sees.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_personality,
    libc::SYS_modify_ldt,
    // Large parts of Linux in which holes are found.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_setup,
    libc::SYS_vmsplice,
    // The machine.
    libc::SYS_acct,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_settimeofday,
    libc::SYS_delete_module,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_vhangup,
];

/// linux/fcntl.h; libc does not name them all.
const F_SETOWN: u64 = 8;
const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;
const F_SETLEASE: u64 = 1024;
const F_NOTIFY: u64 = 1026;
const F_ADD_SEALS: u64 = 1033;
const F_SETFL: u64 = 4;
const F_GETFD: u64 = 1;
const F_GETFL: u64 = 3;
const F_DUPFD_CLOEXEC: u64 = 1030;
const F_GET_SEALS: u64 = 1034;
/// asm/ioctls.h and asm/sockios.h: who is sent a signal, and to put words into a terminal.
const FIOASYNC: u64 = 0x5452;
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;
const TIOCSTI: u64 = 0x5412;

/// Says that this process is the first to go when memory is short. Before it is not dumpable: from then on Linux lets only
/// root write there.
pub(super) fn go_first() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "1000")
}

/// Whom the walls are around.
#[derive(Clone, Copy, Debug)]
pub(super) enum Confined {
    /// It runs kernels; all of its threads stand.
    Worker,
    /// It compiles one plugin, and runs nothing of it.
    Compiler,
}

/// Does the rest, for all threads that there are and will be. Answers what this Linux would not do, in words; `first` is
/// what [`go_first`] answered.
pub(super) fn confine(first: io::Result<()>, who: Confined) -> Vec<String> {
    let mut lacking = Vec::new();
    let mut built = |wall: &str, outcome: Result<(), String>| {
        if let Err(why) = outcome {
            lacking.push(format!("{wall}: {why}"));
        }
    };
    let no_cores = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    built(
        "no core files",
        setrlimit(Resource::Core, no_cores).map_err(|e| e.to_string()),
    );
    built(
        "first to go when memory is short",
        first.map_err(|e| e.to_string()),
    );
    // Also sets that no privileges can be had any more, without which Linux takes no filter.
    let filtered = match who {
        Confined::Worker => worker_filters(),
        Confined::Compiler => compiler_filters(),
    };
    built("seccomp", filtered.map_err(|e| e.to_string()));
    lacking
}

fn own_pid() -> u64 {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    u64::from(own.unsigned_abs())
}

/// The list of what is allowed last: it does not allow to set another.
fn worker_filters() -> Result<(), seccompiler::Error> {
    let fatal: Rules = FATAL.iter().map(|call| (*call, Vec::new())).collect();
    let kill = SeccompAction::KillProcess;
    let fatal: BpfProgram =
        SeccompFilter::new(fatal, SeccompAction::Allow, kill, TargetArch::x86_64)?.try_into()?;
    let refuse = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    let allowed: BpfProgram = SeccompFilter::new(
        allowed(own_pid())?,
        refuse,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()?;
    apply_filter_all_threads(&fatal)?;
    apply_filter_all_threads(&allowed)
}

fn compiler_filters() -> Result<(), seccompiler::Error> {
    // The two may not be told apart by one filter: each has one answer.
    let refused = program(refused(own_pid())?, libc::EPERM)?;
    // So that glibc starts threads by `clone`, whose flags a filter can see.
    let unknown = program([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
    apply_filter_all_threads(&unknown)?;
    apply_filter_all_threads(&refused)
}

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

fn program(rules: Rules, errno: libc::c_int) -> Result<BpfProgram, BackendError> {
    let refuse = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}

/// What is allowed in the process `own`.
fn allowed(own: u64) -> Result<Rules, BackendError> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq};
    let when = SeccompCondition::new;
    let mut rules: Rules = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    let no_code = SeccompRule::new(vec![when(2, Dword, MaskedEq(executable), 0)?])?;
    rules.insert(libc::SYS_mmap, vec![no_code]);
    // A thread's name, also of that.
    let name = u64::from(libc::PR_SET_NAME.unsigned_abs());
    let named = SeccompRule::new(vec![when(0, Dword, Eq, name)?])?;
    rules.insert(libc::SYS_prctl, vec![named]);
    // `abort` sends a signal to itself.
    let itself = SeccompRule::new(vec![when(0, Dword, Eq, own)?])?;
    rules.insert(libc::SYS_tgkill, vec![itself]);
    // It may look at its own limits and change none.
    let looks = vec![when(0, Dword, Eq, 0)?, when(2, Qword, Eq, 0)?];
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(looks)?]);
    let fcntl = [F_GETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GET_SEALS]
        .into_iter()
        .map(|command| SeccompRule::new(vec![when(1, Dword, Eq, command)?]))
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_fcntl, fcntl);
    Ok(rules)
}

/// What is refused in the process `own`.
fn refused(own: u64) -> Result<Rules, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    let when = |argument, op, value| {
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            op,
            value,
        )?])
    };
    let whole = |argument, value| {
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Qword,
            Ne,
            value,
        )?])
    };
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let asynchronous = u64::from(libc::O_ASYNC.unsigned_abs());
    rules.insert(libc::SYS_clone, vec![when(0, MaskedEq(thread), 0)?]);
    // `abort` sends a signal to itself.
    rules.insert(libc::SYS_tgkill, vec![when(0, Ne, own)?]);
    // It may look at its own limits and change none.
    rules.insert(libc::SYS_prlimit64, vec![when(0, Ne, 0)?, whole(2, 0)?]);
    let commands = [
        F_SETOWN,
        F_SETSIG,
        F_SETOWN_EX,
        F_SETLEASE,
        F_NOTIFY,
        F_ADD_SEALS,
    ];
    let mut fcntl = commands
        .into_iter()
        .map(|command| when(1, Eq, command))
        .collect::<Result<Vec<_>, _>>()?;
    fcntl.push(SeccompRule::new(vec![
        SeccompCondition::new(1, SeccompCmpArgLen::Dword, Eq, F_SETFL)?,
        SeccompCondition::new(
            2,
            SeccompCmpArgLen::Dword,
            MaskedEq(asynchronous),
            asynchronous,
        )?,
    ])?);
    rules.insert(libc::SYS_fcntl, fcntl);
    let ioctl = [FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSTI]
        .into_iter()
        .map(|request| when(1, Eq, request))
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_ioctl, ioctl);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Output};

    use rustix::fs::{OFlags, SealFlags};
    use rustix::net::{AddressFamily, SocketType};
    use rustix::process::{Pid, PidfdFlags, getppid};

    use super::*;

    const CONFINED: &str = "TEST_CONFINED";

    fn refused(errno: i32, what: &str, result: io::Result<()>) {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(errno), "{what}: {error}");
        println!("refused: {what}");
    }

    /// Ways out that neither kind of process has.
    fn attempts(parent: Pid, file: &fs::File, errno: i32) {
        let refused = |what, result| refused(errno, what, result);
        let limit = Rlimit {
            current: Some(1),
            maximum: Some(1),
        };
        let parents = Some(parent);
        let cpus = rustix::thread::CpuSet::new();
        let asynchronous = OFlags::from_bits_retain(libc::O_ASYNC.unsigned_abs());
        let ways: [(&str, rustix::io::Result<()>); 10] = [
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
        ];
        for (what, result) in ways {
            refused(what, result.map_err(Into::into));
        }
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
            Ok("compiler") => in_all_threads(Confined::Compiler, |file| {
                attempts(parent, file, libc::EPERM);
                let spawned = Command::new("/bin/true").spawn();
                refused(libc::EPERM, "exec", spawned.map(drop));
                fs::read("/proc/self/maps").expect("files");
                std::thread::spawn(|| {}).join().expect("threads");
            }),
            Ok("exec") => {
                confine(go_first(), Confined::Worker);
                let error = Command::new("/bin/true").exec();
                println!("it lives: {error}");
            }
            _ => return,
        }
        println!("the process is confined");
    }

    fn worker(parent: Pid) {
        strait_memory::process::keep_mappings_open().expect("/proc");
        in_all_threads(Confined::Worker, |file| {
            use std::os::fd::AsRawFd;

            attempts(parent, file, libc::EACCES);
            let refused = |what, result| refused(libc::EACCES, what, result);
            refused("openat", fs::File::open("/dev/null").map(drop));
            let own = format!("/proc/self/fd/{}", file.as_raw_fd());
            refused("reopen of a descriptor", fs::File::open(own).map(drop));
            let pipe = rustix::pipe::pipe().map(drop);
            refused("pipe", pipe.map_err(Into::into));
            let flags = rustix::fs::fcntl_setfl(file, OFlags::NONBLOCK);
            refused("flags of a descriptor", flags.map_err(Into::into));
            let lock = rustix::fs::flock(file, rustix::fs::FlockOperation::LockShared);
            refused("lock", lock.map_err(Into::into));
            refused("thread", std::thread::Builder::new().spawn(|| {}).map(drop));
            // What it needs it can still do.
            let files = rustix::process::getrlimit(Resource::Nofile).current;
            assert!(files.is_some_and(|most| most > 1));
            let here = std::ptr::from_ref(file).addr();
            let found = strait_memory::process::inode_at(here).expect("its own mappings");
            assert_eq!(found, None, "a stack is of no file");
        });
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
        for (who, ways) in [("worker", 16), ("compiler", 11)] {
            let process = confined(who);
            let text = String::from_utf8_lossy(&process.stdout);
            let errors = String::from_utf8_lossy(&process.stderr);
            assert!(text.contains("the process is confined"), "{text}{errors}");
            assert_eq!(text.matches("refused: ").count(), 2 * ways, "{who}: {text}");
        }
    }

    #[test]
    fn a_worker_that_runs_a_program_is_killed() {
        let process = confined("exec");
        let text = String::from_utf8_lossy(&process.stdout);
        assert!(!text.contains("it lives"), "{text}");
        assert_eq!(process.status.signal(), Some(libc::SIGSYS));
    }
}
