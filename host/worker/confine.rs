//! What a worker process may no longer do once it runs kernels.
//!
//! A plugin that has broken out of wasmtime is this process. It has the host's user, so Linux would let it touch the host itself:
//! the calls that reach other processes, the network or the machine are refused (`EPERM`) by a seccomp filter over all of its
//! threads. Beside that: no new privileges, no core files, and the first to go when memory is short.
//!
//! The process still compiles plugins, so it may open files and make executable memory.

use std::collections::BTreeMap;
use std::{fs, io};

use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// Calls that a worker never needs: of other processes, of sockets, of the machine.
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

/// Does the rest, for all threads that there are and will be. Answers what this Linux would not do, in words; `first` is
/// what [`go_first`] answered.
pub(super) fn confine(first: io::Result<()>) -> Vec<String> {
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
    built("seccomp", filter().map_err(|e| e.to_string()));
    lacking
}

fn filter() -> Result<(), seccompiler::Error> {
    // The two may not be told apart by one filter: each has one answer.
    let own = u64::from(
        rustix::process::getpid()
            .as_raw_nonzero()
            .get()
            .unsigned_abs(),
    );
    let refused = program(refused(own)?, libc::EPERM)?;
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
    use std::process::Command;

    use rustix::fs::{OFlags, SealFlags};
    use rustix::net::{AddressFamily, SocketType};
    use rustix::process::{Pid, PidfdFlags, getppid};

    use super::*;

    /// Not a test: the process that `a_confined_process_reaches_nobody_else` starts.
    #[test]
    #[ignore = "the process that another test starts"]
    fn confined_process() {
        if std::env::var_os("TEST_CONFINED").is_none() {
            return;
        }
        let before = std::thread::spawn(std::thread::park);
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(confine(go_first()), Vec::<String>::new());
        let parent = getppid().expect("it has one");
        let errno = |what: &str, result: io::Result<()>| {
            let error = result.expect_err(what);
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{what}: {error}");
            println!("refused: {what}");
        };
        let limit = Rlimit {
            current: Some(1),
            maximum: Some(1),
        };
        let attempts = |parent: Pid| {
            errno("exec", Command::new("/bin/true").spawn().map(drop));
            errno(
                "kill",
                rustix::process::test_kill_process(parent).map_err(Into::into),
            );
            errno(
                "pidfd",
                rustix::process::pidfd_open(parent, PidfdFlags::empty())
                    .map(drop)
                    .map_err(Into::into),
            );
            errno(
                "priority",
                rustix::process::setpriority_process(Some(parent), 5).map_err(Into::into),
            );
            errno(
                "affinity",
                rustix::thread::sched_setaffinity(Some(parent), &rustix::thread::CpuSet::new())
                    .map_err(Into::into),
            );
            errno(
                "limits of others",
                rustix::process::prlimit(Some(parent), Resource::Nofile, limit)
                    .map(drop)
                    .map_err(Into::into),
            );
            errno(
                "own limits",
                setrlimit(Resource::Nofile, limit).map_err(Into::into),
            );
            errno(
                "socket",
                rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)
                    .map(drop)
                    .map_err(Into::into),
            );
            errno(
                "signals",
                rustix::fs::fcntl_setfl(
                    &file,
                    OFlags::from_bits_retain(libc::O_ASYNC.unsigned_abs()),
                )
                .map_err(Into::into),
            );
            errno(
                "seals",
                rustix::fs::fcntl_add_seals(&file, SealFlags::SEAL).map_err(Into::into),
            );
            errno(
                "session",
                rustix::process::setsid().map(drop).map_err(Into::into),
            );
        };
        attempts(parent);
        // Threads that were there, and new ones.
        std::thread::scope(|scope| scope.spawn(|| attempts(parent)).join().expect("no panic"));
        before.thread().unpark();
        before.join().expect("no panic");
        // What it needs it can still do.
        assert!(
            rustix::process::getrlimit(Resource::Nofile)
                .current
                .is_some_and(|most| most > 1)
        );
        rustix::fs::fcntl_setfl(&file, OFlags::NONBLOCK).expect("not asynchronous");
        fs::read("/proc/self/maps").expect("files");
        println!("the process is confined");
    }

    #[test]
    fn a_confined_process_reaches_nobody_else() {
        let own = std::env::current_exe().expect("this program");
        let confined = Command::new(own)
            .args(["--exact", "worker::confine::tests::confined_process"])
            .args(["--ignored", "--nocapture"])
            .env("TEST_CONFINED", "1")
            .output()
            .expect("it starts");
        let text = String::from_utf8_lossy(&confined.stdout);
        let errors = String::from_utf8_lossy(&confined.stderr);
        assert!(text.contains("the process is confined"), "{text}{errors}");
        assert_eq!(text.matches("refused: ").count(), 2 * 11, "{text}");
    }
}
