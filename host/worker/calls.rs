//! Which system calls a confined process may make: seccomp filters over all of its threads.
//!
//! There is a list of what it may do ([`ALLOWED`], and some calls by their arguments). The rest is refused (`EACCES`), whatever
//! else Linux learns and by whatever number (x32) it has it; what nobody tries by mistake ([`FATAL`]) is its end.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

/// What a worker calls, as it was seen to (a compiler, which starts no thread, calls less): memory, its sockets and descriptors, time, and its own end. No file can be opened,
/// no thread or process started, no socket made.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_munmap,
    libc::SYS_mremap,
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

/// asm-generic/mman-common.h: how a mapping is shared.
const MAP_TYPE: u64 = 0xf;
/// linux/fcntl.h; libc does not name them all.
const F_GETFD: u64 = 1;
const F_GETFL: u64 = 3;
const F_DUPFD_CLOEXEC: u64 = 1030;
const F_GET_SEALS: u64 = 1034;
/// linux/mman.h; libc does not name it.
const MADV_COLLAPSE: libc::c_int = 25;
/// What is advised of memory: by wasmtime and the allocator, of mappings that no child is to have, of results that are born
/// in huge pages.
const ADVICE: [libc::c_int; 3] = [libc::MADV_DONTNEED, libc::MADV_DONTFORK, MADV_COLLAPSE];
fn own_pid() -> u64 {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    u64::from(own.unsigned_abs())
}

/// The list of what is allowed last: it does not allow to set another.
pub(super) fn filter() -> Result<(), seccompiler::Error> {
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

/// Has Linux answer that it does not know `call`, as a container may.
#[cfg(test)]
pub(super) fn without(call: libc::c_long) -> Result<(), seccompiler::Error> {
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = [(call, Vec::new())].into();
    let allow = SeccompAction::Allow;
    let filter: BpfProgram =
        SeccompFilter::new(rules, allow, unknown, TargetArch::x86_64)?.try_into()?;
    apply_filter_all_threads(&filter)
}

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

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
    // Others take pages from whoever shares them, or (of root) from the machine.
    let advice = ADVICE
        .into_iter()
        .map(|advice| SeccompRule::new(vec![when(2, Dword, Eq, u64::from(advice.unsigned_abs()))?]))
        .collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_madvise, advice);
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
