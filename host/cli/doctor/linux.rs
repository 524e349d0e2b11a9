//! Features of Linux, each tried.

use std::time::Duration;

use indicatif::BinaryBytes;
use strait_memory::probe::{self, Collapsed, ProbeError};

use super::{Check, Status, Subject, text};
use crate::config::Config;
use crate::worker;

const SEALS: Subject = Subject::new(
    "linux",
    "seals",
    "a tensor is immutable and safe to map because Linux guards the seals of its memfd",
);
const FUTURE_WRITE: Subject = Subject::new(
    "linux",
    "future-write seal",
    "results are read-only for everybody else while the host goes on reusing their memory",
);
const NOEXEC: Subject = Subject::new(
    "linux",
    "noexec seal",
    "shared memory can never be run as a program; without it, segments are what they were before Linux 6.3",
);
const SOCKETS: Subject = Subject::new(
    "linux",
    "descriptor passing",
    "tensors reach clients as descriptors over a SOCK_SEQPACKET socket, which also says who the clients are",
);
const MOVES: Subject = Subject::new(
    "linux",
    "moves",
    "tensors go into a kernel's memory and back by moving page tables, and a move must leave no hole",
);
const ADDRESSES: Subject = Subject::new(
    "linux",
    "guest addresses",
    "each running kernel reserves 4 GiB of address space, most of which it never uses",
);
const EXECUTABLE: Subject = Subject::new(
    "linux",
    "executable memory",
    "kernels are compiled to machine code when they are loaded",
);
const COLLAPSE: Subject = Subject::new(
    "linux",
    "huge pages at birth",
    "filling a new segment in 4 KiB pages takes several times as long, and so does reading it for the first time",
);
const THP: Subject = Subject::new(
    "linux",
    "transparent huge pages",
    "strait asks for huge pages itself and does not depend on these settings",
);
const POPULATE: Subject = Subject::new(
    "linux",
    "populate",
    "clients that map a tensor can fault it in with one call instead of page by page",
);
const PIDFD: Subject = Subject::new(
    "linux",
    "pidfd",
    "identifies a client's process unambiguously; strait does not need it yet",
);
const SECCOMP: Subject = Subject::new(
    "linux",
    "seccomp",
    "bounds the system calls of worker processes; without it they lack a wall",
);
const LANDLOCK: Subject = Subject::new(
    "linux",
    "Landlock",
    "keeps worker processes from files, TCP, and signals to others; without it, or before version 6, they lack a wall",
);
const CGROUPS: Subject = Subject::new(
    "linux",
    "control groups",
    "segments count as memory of the host's group; strait reads limits of version 2 only",
);

const WALLS: Subject = Subject::new(
    "linux",
    "worker walls",
    "code that breaks out of a kernel's sandbox is still in a worker process, which these walls keep from everything else",
);

/// Those that a worker process of that host would lack.
pub(super) fn walls(config: &Config) -> Check {
    let change = match config.workers.require_walls {
        true => {
            "a host with workers.require_walls does not run here; run it where Linux, or the container around it, has them, and one that is root with workers.uids"
        }
        false => {
            "run the host where Linux, or the container around it, has them, and one that is root with workers.uids"
        }
    };
    let program = config.workers.program.as_deref();
    let lacking = config
        .worker_uids()
        .map_err(std::io::Error::other)
        .and_then(|uids| worker::lacking_walls(program, config.engine(), uids));
    match lacking {
        Ok(lacks) if lacks.is_empty() => WALLS.ok(match rustix::process::geteuid().is_root() {
            true => "all stand",
            false => {
                "all stand; only root could say that workers are the first to go when memory is short"
            }
        }),
        Ok(lacks) if config.workers.enabled && config.workers.require_walls => {
            WALLS.fail(lacks.join("; "), change)
        }
        Ok(lacks) => WALLS.warn(lacks.join("; "), change),
        Err(error) if config.workers.enabled => WALLS.fail(
            error.to_string(),
            "see workers.program and the limits of processes",
        ),
        Err(error) => WALLS.warn(
            error.to_string(),
            "a host with workers.enabled does not run here",
        ),
    }
}

pub(super) fn checks() -> Vec<Check> {
    let newer = |version: &str| {
        format!("Linux {version} or later; in a container, look at its seccomp profile, too")
    };
    vec![
        needed(SEALS, probe::seals(), "memfd seals work", newer("5.13")),
        needed(
            FUTURE_WRITE,
            probe::future_write_seal(),
            "new writers are refused, the old one still writes",
            newer("5.13"),
        ),
        optional(NOEXEC, probe::noexec_seal().map(|()| "kept".to_owned())),
        needed(
            SOCKETS,
            probe::descriptors_over_sockets(),
            "SOCK_SEQPACKET, SCM_RIGHTS and SO_PEERCRED work",
            "allow unix sockets of type SOCK_SEQPACKET (a sandbox or seccomp profile refuses them)".to_owned(),
        ),
        needed(
            MOVES,
            probe::moves(),
            "MREMAP_DONTUNMAP works on file mappings",
            newer("5.13"),
        ),
        needed(
            ADDRESSES,
            probe::guest_address_space(),
            "4 GiB can be reserved",
            "no limit on address space: ulimit -v unlimited (systemd: LimitAS=infinity)".to_owned(),
        ),
        needed(
            EXECUTABLE,
            probe::executable_memory(),
            "written memory can be made executable",
            "MemoryDenyWriteExecute=no in the systemd unit, or a policy (SELinux execmem) that allows it".to_owned(),
        ),
        huge(quickest(probe::huge_pages)),
        transparent_huge_pages(
            &text::read("/sys/kernel/mm/transparent_hugepage/enabled"),
            &text::read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ),
        optional(POPULATE, probe::populate().map(|()| "MADV_POPULATE_READ works".to_owned())),
        pidfd(),
        seccomp(probe::seccomp(), &text::read("/proc/self/status")),
        optional(
            LANDLOCK,
            probe::landlock_version().map(|version| format!("version {version} of its interface")),
        ),
        control_groups(&text::read("/proc/self/cgroup")),
    ]
}

fn needed(subject: Subject, tried: Result<(), ProbeError>, works: &str, change: String) -> Check {
    match tried {
        Ok(()) => subject.ok(works),
        Err(error) => subject.fail(error.to_string(), change),
    }
}

fn optional(subject: Subject, tried: Result<String, ProbeError>) -> Check {
    match tried {
        Ok(found) => subject.ok(found),
        Err(error) => subject.info(format!("not here: {error}")),
    }
}

/// The best of a few tries: the first one may meet memory that the machine had not used before.
fn quickest(attempt: impl Fn() -> Result<Collapsed, ProbeError>) -> Result<Collapsed, ProbeError> {
    let mut best = attempt()?;
    for _ in 0..2 {
        let next = attempt()?;
        if next.took < best.took {
            best = next;
        }
    }
    Ok(best)
}

fn huge(tried: Result<Collapsed, ProbeError>) -> Check {
    /// Whoever fills a segment gives up on huge pages above 2 ms for each MiB.
    const SLOW: Duration = Duration::from_millis(16);
    let collapsed = match tried {
        Ok(collapsed) => collapsed,
        Err(error) => {
            return COLLAPSE.warn(
                format!("not here, so pages of 4 KiB: {error}"),
                "Linux 6.1 or later, built with CONFIG_TRANSPARENT_HUGEPAGE",
            );
        }
    };
    let found = format!(
        "{} in {:.1} ms",
        BinaryBytes(collapsed.asked_bytes),
        collapsed.took.as_secs_f64() * 1e3
    );
    match collapsed.huge_bytes {
        Some(huge) if huge < collapsed.asked_bytes => COLLAPSE.warn(
            format!("{found}, but only {} are in huge pages", BinaryBytes(huge)),
            "free memory in larger pieces: echo 1 > /proc/sys/vm/compact_memory",
        ),
        _ if collapsed.took > SLOW => COLLAPSE.warn(
            format!("{found}: too slow, so most of a segment stays in pages of 4 KiB"),
            "free memory in larger pieces: echo 1 > /proc/sys/vm/compact_memory",
        ),
        Some(_) => COLLAPSE.ok(found),
        None => COLLAPSE.ok(format!("{found}; /proc/self/smaps does not say how many")),
    }
}

fn transparent_huge_pages(enabled: &str, shmem: &str) -> Check {
    let word = |text| text::chosen(text).unwrap_or("not said").to_owned();
    THP.info(format!(
        "enabled={}, shmem_enabled={}",
        word(enabled),
        word(shmem)
    ))
}

fn pidfd() -> Check {
    let own = rustix::process::getpid();
    let opened = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty());
    let found = match (opened, probe::peer_pidfd()) {
        (Ok(_), Ok(())) => return PIDFD.ok("pidfd_open and SO_PEERPIDFD work"),
        (Ok(_), Err(error)) => format!("pidfd_open works; {error}"),
        (Err(error), _) => format!("not here: pidfd_open: {error}"),
    };
    PIDFD.info(found)
}

fn seccomp(tried: Result<(), ProbeError>, status: &str) -> Check {
    let filters = match text::field(status, "Seccomp") {
        Some("0") => "this process has no filter",
        Some("1" | "2") => "this process is under a filter",
        _ => "Linux does not say whether this process is under a filter",
    };
    match tried {
        Ok(()) => SECCOMP.ok(format!("filters can be added; {filters}")),
        Err(error) => SECCOMP.info(format!("not here: {error}; {filters}")),
    }
}

fn control_groups(groups: &str) -> Check {
    let (v1, v2) = (text::memory_group_v1(groups), text::group_v2(groups));
    let (status, found) = match (v1, v2) {
        (Some(path), _) => (
            Status::Info,
            format!("memory is in version 1, group /{}", path.display()),
        ),
        (None, Some(path)) => (Status::Ok, format!("version 2, group {path}")),
        (None, None) => (Status::Info, "none that limits memory".to_owned()),
    };
    CGROUPS.check(status, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collapsed(huge_bytes: Option<u64>, millis: u64) -> Result<Collapsed, ProbeError> {
        Ok(Collapsed {
            huge_bytes,
            asked_bytes: 8 << 20,
            took: Duration::from_millis(millis),
        })
    }

    #[test]
    fn huge_pages_must_be_many_and_quick() {
        for (tried, status, part) in [
            (
                collapsed(Some(8 << 20), 1),
                Status::Ok,
                "8.00 MiB in 1.0 ms",
            ),
            (collapsed(None, 1), Status::Ok, "does not say"),
            (collapsed(Some(2 << 20), 1), Status::Warn, "only 2.00 MiB"),
            (collapsed(Some(8 << 20), 17), Status::Warn, "too slow"),
            (Err(ProbeError::Wrong("refused")), Status::Warn, "refused"),
        ] {
            let check = huge(tried);
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.found.contains(part), "{check:?}");
            assert_eq!(check.change.is_some(), status == Status::Warn, "{check:?}");
        }
    }

    #[test]
    fn what_is_needed_fails_and_what_is_not_does_not() {
        let wrong = || ProbeError::Wrong("it is not there");
        let check = needed(SEALS, Err(wrong()), "works", "newer".to_owned());
        assert_eq!(
            (check.status, check.change),
            (Status::Fail, Some("newer".into()))
        );
        assert_eq!(needed(SEALS, Ok(()), "works", String::new()).found, "works");
        assert_eq!(optional(LANDLOCK, Err(wrong())).status, Status::Info);
        assert_eq!(seccomp(Err(wrong()), "Seccomp:\t2\n").status, Status::Info);
        assert!(
            seccomp(Ok(()), "Seccomp:\t2\n")
                .found
                .contains("under a filter")
        );
    }

    #[test]
    fn groups_and_settings_are_told() {
        assert_eq!(control_groups("0::/app\n").found, "version 2, group /app");
        assert_eq!(
            control_groups("5:memory:/x\n0::/\n").found,
            "memory is in version 1, group /x"
        );
        assert_eq!(
            transparent_huge_pages("always [madvise] never", "").found,
            "enabled=madvise, shmem_enabled=not said"
        );
    }
}
