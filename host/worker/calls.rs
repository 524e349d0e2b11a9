//! Which system calls a confined process may make: seccomp filters over all of its threads.
//!
//! - a worker has a list of what it may do ([`ALLOWED`], and some calls by their arguments). The rest is refused (`EACCES`);
//!   what nobody tries by mistake ([`FATAL`]) is its end.
//! - a compiler has a list of what it may not do ([`REFUSED`], `EPERM`): it runs no plugin, and compiling needs more of Linux.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// What a worker calls, as it was seen to: memory, its sockets and descriptors, time, and its own end. No file can be opened,
/// no thread or process started, no socket made.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_brk,
    // Of scrap memory for stores into inputs.
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

/// asm-generic/mman-common.h: how a mapping is shared.
const MAP_TYPE: u64 = 0xf;
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

fn own_pid() -> u64 {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    u64::from(own.unsigned_abs())
}

/// The list of what is allowed last: it does not allow to set another.
pub(super) fn filter_worker() -> Result<(), seccompiler::Error> {
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

pub(super) fn filter_compiler() -> Result<(), seccompiler::Error> {
    // The two may not be told apart by one filter: each has one answer.
    let refused = program(refused(own_pid())?, libc::EPERM)?;
    // So that glibc starts threads by `clone`, whose flags a filter can see.
    let unknown = program([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
    apply_filter_all_threads(&unknown)?;
    apply_filter_all_threads(&refused)
}

/// Has Linux answer that it does not know `call`, as a container may.
#[cfg(test)]
pub(super) fn without(call: libc::c_long) -> Result<(), seccompiler::Error> {
    let unknown = program([(call, Vec::new())].into(), libc::ENOSYS)?;
    apply_filter_all_threads(&unknown)
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
    let writable = u64::from(libc::PROT_WRITE.unsigned_abs());
    let no_code = || when(2, Dword, MaskedEq(executable), 0);
    // Compiled plugins become executable by it, one page after the other, and nobody writes there any more: no page is both.
    let no_writing = when(2, Dword, MaskedEq(writable), 0)?;
    let protects = [no_code()?, no_writing].map(|bits| SeccompRule::new(vec![bits]));
    let protects = protects.into_iter().collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_mprotect, protects);
    // Memory without a file is its own, which has a limit: shared it would count for nobody.
    let anonymous = u64::from(libc::MAP_ANONYMOUS.unsigned_abs());
    let private = u64::from(libc::MAP_PRIVATE.unsigned_abs());
    let of_file = when(3, Dword, MaskedEq(anonymous), 0)?;
    let alone = when(3, Dword, MaskedEq(MAP_TYPE), private)?;
    let maps = [of_file, alone].map(|flags| SeccompRule::new(vec![no_code()?, flags]));
    let maps = maps.into_iter().collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_mmap, maps);
    // Scrap memory for stores into inputs, made in the handler of the fault.
    let scrap = SeccompRule::new(vec![when(1, Dword, Eq, u64::from(libc::MFD_CLOEXEC))?])?;
    rules.insert(libc::SYS_memfd_create, vec![scrap]);
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
