//! System calls of a plugin that has broken out, one by one, and which wall each meets.

use super::machine::{Attempt, Broken, Call, FIRST, SECOND, THIRD, call};
use crate::workers::worker;

#[test]
fn what_reaches_beyond_the_worker_is_refused() {
    let mut broken = Broken::new();
    let host = i64::from(broken.host.pid());
    let own = i64::from(worker(&broken.host).as_raw_nonzero().get());
    // That the machine code runs at all.
    let answers = broken.attempt(&Attempt::new([call(libc::SYS_getpid, [0; 3])]));
    assert_eq!(answers, Ok(vec![own]));
    let zeros = [0; 64];
    let kill = i64::from(libc::SIGKILL);
    let with =
        |number, arguments, mask, data: &[u8]| Attempt::with([Call(number, arguments, mask)], data);
    let path = |number, arguments, mask| with(number, arguments, mask, b"/proc/self/status\0");
    let refused = [
        (
            "kill of the host",
            with(libc::SYS_kill, [host, kill, 0], 0, &zeros),
        ),
        ("kill of all", with(libc::SYS_kill, [-1, 0, 0], 0, &zeros)),
        (
            "signal to the host's thread",
            with(libc::SYS_tkill, [host, kill, 0], 0, &zeros),
        ),
        (
            "signal to a thread of the host",
            with(libc::SYS_tgkill, [host, host, kill], 0, &zeros),
        ),
        (
            "queued signal",
            with(libc::SYS_rt_sigqueueinfo, [host, kill, 0], THIRD, &zeros),
        ),
        (
            "pidfd of the host",
            with(libc::SYS_pidfd_open, [host, 0, 0], 0, &zeros),
        ),
        ("a file", path(libc::SYS_open, [0; 3], FIRST)),
        (
            "its own descriptor anew",
            with(
                libc::SYS_openat,
                [i64::from(libc::AT_FDCWD), 0, i64::from(libc::O_RDWR)],
                SECOND,
                b"/proc/self/fd/0\0",
            ),
        ),
        (
            "a thread",
            with(
                libc::SYS_clone,
                [
                    i64::from(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND),
                    0,
                    0,
                ],
                SECOND,
                &zeros,
            ),
        ),
        ("fork", with(libc::SYS_fork, [0; 3], 0, &zeros)),
        (
            "clone",
            with(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0], 0, &zeros),
        ),
        ("clone3", with(libc::SYS_clone3, [0, 64, 0], FIRST, &zeros)),
        (
            "socket",
            with(
                libc::SYS_socket,
                [i64::from(libc::AF_INET), i64::from(libc::SOCK_STREAM), 0],
                0,
                &zeros,
            ),
        ),
        (
            "connect",
            with(libc::SYS_connect, [0, 0, 64], SECOND, &zeros),
        ),
        (
            "who is sent a signal",
            with(
                libc::SYS_fcntl,
                [0, i64::from(libc::F_SETOWN), host],
                0,
                &zeros,
            ),
        ),
        (
            "which signal",
            with(libc::SYS_fcntl, [0, 10, kill], 0, &zeros),
        ),
        (
            "signals of a socket",
            with(
                libc::SYS_fcntl,
                [0, i64::from(libc::F_SETFL), i64::from(libc::O_ASYNC)],
                0,
                &zeros,
            ),
        ),
        (
            "signals by ioctl",
            with(libc::SYS_ioctl, [0, 0x5452, 0], THIRD, &1_u32.to_le_bytes()),
        ),
        (
            "owner by ioctl",
            with(libc::SYS_ioctl, [0, 0x8901, 0], THIRD, &1_u32.to_le_bytes()),
        ),
        (
            "limits of the host",
            with(
                libc::SYS_prlimit64,
                [host, i64::from(libc::RLIMIT_NOFILE), 0],
                THIRD,
                &zeros,
            ),
        ),
        (
            "own limits",
            with(
                libc::SYS_prlimit64,
                [0, i64::from(libc::RLIMIT_NOFILE), 0],
                THIRD,
                &zeros,
            ),
        ),
        (
            "CPUs of the host",
            with(
                libc::SYS_sched_setaffinity,
                [host, 8, 0],
                THIRD,
                &1_u64.to_le_bytes(),
            ),
        ),
        (
            "priority of the host",
            with(libc::SYS_setpriority, [0, host, 19], 0, &zeros),
        ),
        (
            "a write lease",
            with(
                libc::SYS_fcntl,
                [0, 1024, i64::from(libc::F_WRLCK)],
                0,
                &zeros,
            ),
        ),
        ("seals", with(libc::SYS_fcntl, [0, 1033, 1], 0, &zeros)),
        ("another user", with(libc::SYS_setuid, [1, 0, 0], 0, &zeros)),
        ("keys", with(libc::SYS_keyctl, [0; 3], 0, &zeros)),
        (
            "memory that is writable and executable",
            with(libc::SYS_mprotect, [0, 4096, 7], FIRST, &zeros),
        ),
        (
            "executable memory of a file",
            with(libc::SYS_mmap, [0, 4096, 5], 0, &zeros),
        ),
        (
            "the same by keys",
            with(libc::SYS_pkey_mprotect, [0, 4096, 7], FIRST, &zeros),
        ),
        ("reboot", with(libc::SYS_reboot, [0; 3], 0, &zeros)),
        (
            "a number of x32",
            with(0x4000_0000 | libc::SYS_getpid, [0; 3], 0, &zeros),
        ),
        (
            "another file to open",
            with(
                libc::SYS_openat2,
                [i64::from(libc::AT_FDCWD), 0, 0],
                SECOND | THIRD,
                b"/proc/self/status\0",
            ),
        ),
        ("the end of a file", path(libc::SYS_unlink, [0; 3], FIRST)),
        (
            "the end of memory of the machine",
            with(libc::SYS_madvise, [0, 4096, 100], FIRST, &zeros),
        ),
        (
            "the same softly",
            with(libc::SYS_madvise, [0, 4096, 101], FIRST, &zeros),
        ),
        (
            "the end of what others have mapped",
            with(
                libc::SYS_madvise,
                [0, 4096, i64::from(libc::MADV_REMOVE)],
                FIRST,
                &zeros,
            ),
        ),
        (
            "capabilities",
            with(libc::SYS_capset, [0, 0, 0], FIRST | SECOND, &zeros),
        ),
    ];
    for (what, attempt) in refused {
        // By the filter over its calls, before Linux looks at them.
        let answers = broken.attempt(&attempt);
        assert_eq!(answers, Ok(vec![-i64::from(libc::EACCES)]), "{what}");
        broken.check(what);
    }
    assert_eq!(broken.ends(0), [] as [String; 0]);
    let killed = [
        (
            "ptrace",
            with(
                libc::SYS_ptrace,
                [i64::from(libc::PTRACE_ATTACH), host, 0],
                0,
                &zeros,
            ),
        ),
        (
            "the host's memory",
            with(libc::SYS_process_vm_readv, [host, 0, 0], SECOND, &zeros),
        ),
        ("exec", path(libc::SYS_execve, [0; 3], FIRST)),
        (
            "io_uring",
            with(libc::SYS_io_uring_setup, [8, 0, 0], SECOND, &zeros),
        ),
        ("bpf", with(libc::SYS_bpf, [0, 0, 64], SECOND, &zeros)),
        (
            "userfaultfd",
            with(libc::SYS_userfaultfd, [0; 3], 0, &zeros),
        ),
        (
            "perf events",
            with(libc::SYS_perf_event_open, [0, 0, -1], FIRST, &zeros),
        ),
        (
            "namespaces",
            with(
                libc::SYS_unshare,
                [i64::from(libc::CLONE_NEWUSER), 0, 0],
                0,
                &zeros,
            ),
        ),
        (
            "namespaces of others",
            with(libc::SYS_setns, [0; 3], 0, &zeros),
        ),
        ("mount", path(libc::SYS_mount, [0; 3], FIRST)),
        (
            "a module",
            with(libc::SYS_init_module, [0; 3], FIRST, &zeros),
        ),
    ];
    for (what, attempt) in killed {
        let before = broken.ends(0).len();
        assert_eq!(
            broken.attempt(&attempt),
            Err("WORKER_LOST".to_owned()),
            "{what}"
        );
        // The second time in one of its own.
        let ends = broken.ends(before + 2);
        let by_filter = |end: &String| end.contains("SIGSYS");
        assert!(ends[before..].iter().all(by_filter), "{what}: {ends:?}");
        broken.check(what);
    }
}

/// As Linux itself would let it, with a file of its own.
#[test]
fn nothing_is_changed_about_memory_that_a_worker_makes() {
    let mut broken = Broken::new();
    let flags = i64::from(libc::MFD_CLOEXEC);
    let create = Call(libc::SYS_memfd_create, [0, flags, 0], FIRST);
    let file = broken.attempt(&Attempt::with([create], b"scrap\0\0\0"));
    let file = file.unwrap()[0];
    assert!(file > 0);
    let host = i64::from(broken.host.pid());
    let fcntl = |command: i64, argument: i64| call(libc::SYS_fcntl, [file, command, argument]);
    let attempts = [
        ("a write lease", fcntl(1024, i64::from(libc::F_WRLCK))),
        ("a read lease", fcntl(1024, i64::from(libc::F_RDLCK))),
        ("seals", fcntl(1033, 1)),
        (
            "whom a signal is sent",
            fcntl(i64::from(libc::F_SETOWN), host),
        ),
        ("which signal", fcntl(10, i64::from(libc::SIGKILL))),
        ("its mode", call(libc::SYS_fchmod, [file, 0o777, 0])),
        ("its owner", call(libc::SYS_fchown, [file, 1, 1])),
        (
            "a lock",
            call(libc::SYS_flock, [file, i64::from(libc::LOCK_EX), 0]),
        ),
    ];
    let refused = -i64::from(libc::EACCES);
    for (what, attempt) in attempts {
        let answers = broken.attempt(&Attempt::new([attempt]));
        assert_eq!(answers, Ok(vec![refused]), "{what}");
    }
    let path = format!("/proc/self/fd/{file}\0");
    let anew = [libc::AT_FDCWD, 0, libc::O_RDWR].map(i64::from);
    let anew = Call(libc::SYS_openat, anew, SECOND);
    let answers = broken.attempt(&Attempt::with([anew], path.as_bytes()));
    assert_eq!(answers, Ok(vec![refused]), "opened anew");
    // It is still the same worker's.
    assert!(broken.attempt(&Attempt::new([call(libc::SYS_close, [file, 0, 0])])) == Ok(vec![0]));
    broken.check("it made memory");
}
