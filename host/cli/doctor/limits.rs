//! Limits of processes and users, and the machine's memory.

use indicatif::BinaryBytes;
use rustix::process::{Resource, getrlimit};
use strait_memory::process;

use super::{Check, Subject, text};
use crate::config::Config;

const FILES: Subject = Subject::new(
    "limits",
    "open files",
    "each live segment and each connection takes a descriptor; the host raises the soft limit to the hard one",
);
const MAPPINGS: Subject = Subject::new(
    "limits",
    "mappings",
    "warm tensors and running kernels are mappings of one process, and Linux limits their number (vm.max_map_count)",
);
const FILE_SIZE: Subject = Subject::new(
    "limits",
    "file size",
    "Linux counts segments as files: one above the limit kills the host with SIGXFSZ",
);
const ADDRESS_SPACE: Subject = Subject::new(
    "limits",
    "address space",
    "each running kernel reserves 4 GiB of address space, and some stays reserved for the next",
);
const DATA: Subject = Subject::new(
    "limits",
    "data",
    "kernels' own memory counts against this limit",
);
const THREADS: Subject = Subject::new(
    "limits",
    "threads",
    "the limit counts all threads of the user, of every process",
);
const LOCKED: Subject = Subject::new(
    "limits",
    "locked memory",
    "strait locks no memory, so a small limit does no harm",
);
const MEMORY: Subject = Subject::new(
    "limits",
    "memory",
    "segments are memory that cannot be dropped; by default they may have half of what is available",
);
const GROUP: Subject = Subject::new(
    "limits",
    "memory of the group",
    "strait does not read limits of version 1 control groups, and Linux kills whatever exceeds them",
);
const OVERCOMMIT: Subject = Subject::new(
    "limits",
    "overcommit",
    "with strict accounting (2), memory that a kernel may use counts as used",
);

/// Fewer descriptors than this do not start a host.
const FILES_MIN: u64 = 32;
/// With fewer a busy host runs out of them.
const FILES_GOOD: u64 = 4096;
/// What a host has open beside segments: sockets, the poller, streams, files being read.
const FILES_SPARE: u64 = 16;
/// Linux's own default.
const MAPPINGS_GOOD: u64 = 65_530;
const THREADS_GOOD: u64 = 1024;
const MEMORY_MIN: u64 = 128 << 20;
const MEMORY_GOOD: u64 = 1 << 30;
/// One guest's reservation, with its guards.
const GUEST_ADDRESSES: u64 = (4 << 30) + (64 << 20);

pub(super) fn checks(config: &Config) -> Vec<Check> {
    let files = getrlimit(Resource::Nofile);
    let kernels = u64::try_from(config.workers()).unwrap_or(u64::MAX);
    let idle = u64::try_from(config.engine().idle_guests_max).unwrap_or(u64::MAX);
    let root = rustix::process::geteuid().is_root();
    let available = process::memory_available().ok();
    let mut checks = vec![
        open_files(files.current, files.maximum, config.memory.segments),
        mappings(process::mappings_max(), config.parked_mappings_max()),
        file_size(
            getrlimit(Resource::Fsize).current,
            config.limits.result_bytes,
        ),
        address_space(
            getrlimit(Resource::As).current,
            kernels.saturating_add(idle),
        ),
        data(
            getrlimit(Resource::Data).current,
            kernels.saturating_mul(config.limits.guest_bytes),
        ),
        threads(getrlimit(Resource::Nproc).current, root),
        LOCKED.info(limit(getrlimit(Resource::Memlock).current)),
        memory(available, config.budget_bytes()),
        overcommit(text::number("/proc/sys/vm/overcommit_memory")),
    ];
    let groups = text::read("/proc/self/cgroup");
    if let (Some(least), Some(available)) = (group_v1_limit(&groups), available) {
        checks.extend(group(least, available, config.budget_bytes()));
    }
    checks
}

/// Whether a file of that many bytes can be made without a signal.
pub(super) fn files_can_have(bytes: u64) -> bool {
    getrlimit(Resource::Fsize)
        .current
        .is_none_or(|limit| limit >= bytes)
}

fn limit(of: Option<u64>) -> String {
    of.map_or_else(
        || "no limit".to_owned(),
        |most| BinaryBytes(most).to_string(),
    )
}

fn open_files(soft: Option<u64>, hard: Option<u64>, segments: Option<u64>) -> Check {
    let Some(hard) = hard else {
        return FILES.ok("no limit");
    };
    let soft = soft.unwrap_or(hard);
    let room = segments.unwrap_or(hard / 2);
    let found = format!("soft {soft}, hard {hard}: {room} segments at a time");
    let raise =
        "ulimit -Hn 65536 as root (systemd: LimitNOFILE=65536, docker: --ulimit nofile=65536)";
    if hard < FILES_MIN {
        FILES.fail(found, raise)
    } else if room.saturating_add(FILES_SPARE) > hard {
        FILES.warn(
            format!("{found}, which leaves no descriptors for connections"),
            format!("memory.segments = {}, or {raise}", hard / 2),
        )
    } else if hard < FILES_GOOD {
        FILES.warn(found, raise)
    } else {
        FILES.ok(found)
    }
}

fn mappings(max: u64, parked: u64) -> Check {
    let found = format!("{max}, of which {parked} for warm tensors");
    if parked > max / 2 {
        MAPPINGS.warn(
            found,
            format!(
                "sysctl vm.max_map_count={}, or a smaller memory.parked_mappings",
                parked.saturating_mul(8)
            ),
        )
    } else if max < MAPPINGS_GOOD {
        MAPPINGS.warn(found, format!("sysctl vm.max_map_count={MAPPINGS_GOOD}"))
    } else {
        MAPPINGS.ok(found)
    }
}

fn file_size(most: Option<u64>, result_bytes: u64) -> Check {
    let unlimited = "ulimit -f unlimited (systemd: LimitFSIZE=infinity)";
    match most {
        None => FILE_SIZE.ok("no limit"),
        Some(most) if most < super::speed::BYTES_MAX => FILE_SIZE.fail(
            format!(
                "{}: too little for a tensor, and for what doctor would try and measure",
                BinaryBytes(most)
            ),
            unlimited,
        ),
        Some(most) if most < result_bytes => FILE_SIZE.warn(
            format!(
                "{}, less than the {} that results may have",
                BinaryBytes(most),
                BinaryBytes(result_bytes)
            ),
            unlimited,
        ),
        Some(most) => FILE_SIZE.ok(BinaryBytes(most).to_string()),
    }
}

fn address_space(most: Option<u64>, guests: u64) -> Check {
    let needed = guests.saturating_mul(GUEST_ADDRESSES);
    match most {
        Some(most) if most < needed => ADDRESS_SPACE.warn(
            format!(
                "{}, but {guests} guests reserve {}",
                BinaryBytes(most),
                BinaryBytes(needed)
            ),
            "ulimit -v unlimited (systemd: LimitAS=infinity)",
        ),
        most => ADDRESS_SPACE.ok(limit(most)),
    }
}

fn data(most: Option<u64>, kernels_bytes: u64) -> Check {
    match most {
        Some(most) if most < kernels_bytes => DATA.warn(
            format!(
                "{}, but kernels may have {} at once (engine.workers times limits.guest_bytes)",
                BinaryBytes(most),
                BinaryBytes(kernels_bytes)
            ),
            "ulimit -d unlimited (systemd: LimitDATA=infinity)",
        ),
        most => DATA.ok(limit(most)),
    }
}

fn threads(most: Option<u64>, root: bool) -> Check {
    match most {
        _ if root => THREADS.ok("no limit for root"),
        None => THREADS.ok("no limit"),
        Some(most) if most < THREADS_GOOD => THREADS.warn(
            most.to_string(),
            format!("ulimit -u {THREADS_GOOD} (systemd: LimitNPROC={THREADS_GOOD})"),
        ),
        Some(most) => THREADS.ok(most.to_string()),
    }
}

fn memory(available: Option<u64>, budget: u64) -> Check {
    let Some(available) = available else {
        return MEMORY.warn(
            format!(
                "/proc/meminfo does not say; segments may have {}",
                BinaryBytes(budget)
            ),
            "memory.budget_bytes = what segments may have",
        );
    };
    let found = format!(
        "{} available, segments may have {}",
        BinaryBytes(available),
        BinaryBytes(budget)
    );
    let more = "free memory, or a higher memory.max of the control group";
    if available < MEMORY_MIN {
        MEMORY.fail(found, more)
    } else if budget > available {
        MEMORY.warn(
            found,
            format!("memory.budget_bytes = {} or less", available / 2),
        )
    } else if available < MEMORY_GOOD {
        MEMORY.warn(found, more)
    } else {
        MEMORY.ok(found)
    }
}

/// The least limit of the version 1 groups that this process is in.
fn group_v1_limit(groups: &str) -> Option<u64> {
    let own = text::memory_group_v1(groups)?;
    let root = std::path::Path::new("/sys/fs/cgroup/memory");
    own.ancestors()
        .filter_map(|group| text::number(root.join(group).join("memory.limit_in_bytes")))
        .min()
}

/// A limit of version 1 below what strait takes for available. None if it does not matter.
fn group(least: u64, available: u64, budget: u64) -> Option<Check> {
    if least >= available {
        return None;
    }
    let found = format!(
        "{} by control groups of version 1, segments may have {}",
        BinaryBytes(least),
        BinaryBytes(budget)
    );
    Some(if budget > least / 2 {
        GROUP.warn(found, format!("memory.budget_bytes = {}", least / 2))
    } else {
        GROUP.ok(found)
    })
}

fn overcommit(mode: Option<u64>) -> Check {
    match mode {
        Some(2) => OVERCOMMIT.warn(
            "vm.overcommit_memory=2",
            "sysctl vm.overcommit_memory=0, or a higher vm.overcommit_ratio",
        ),
        Some(mode) => OVERCOMMIT.ok(format!("vm.overcommit_memory={mode}")),
        None => OVERCOMMIT.info("vm.overcommit_memory cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status::{self, Fail, Ok, Warn};
    use super::*;

    fn is(check: &Check, status: Status, part: &str) {
        assert_eq!(check.status, status, "{check:?}");
        let all = format!("{} {}", check.found, check.change.as_deref().unwrap_or(""));
        assert!(all.contains(part), "{check:?} lacks {part:?}");
        assert_eq!(check.change.is_some(), status >= Warn, "{check:?}");
    }

    #[test]
    fn open_files_are_judged_by_the_hard_limit() {
        for (soft, hard, segments, status, part) in [
            (Some(1024), Some(524_288), None, Ok, "262144 segments"),
            (None, None, None, Ok, "no limit"),
            (Some(64), Some(64), None, Warn, "32 segments"),
            (Some(16), Some(16), None, Fail, "LimitNOFILE"),
            (
                Some(8192),
                Some(8192),
                Some(8190),
                Warn,
                "memory.segments = 4096",
            ),
            (Some(8192), Some(8192), Some(8000), Ok, "8000 segments"),
            (
                Some(1),
                Some(1 << 20),
                Some(u64::MAX),
                Warn,
                "no descriptors",
            ),
        ] {
            is(&open_files(soft, hard, segments), status, part);
        }
    }

    #[test]
    fn mappings_must_do_for_what_is_parked() {
        is(&mappings(65_530, 8191), Ok, "8191 for warm");
        is(&mappings(4096, 512), Warn, "vm.max_map_count=65530");
        is(&mappings(65_530, 60_000), Warn, "vm.max_map_count=480000");
    }

    #[test]
    fn sizes_that_would_end_the_host() {
        is(&file_size(None, 2 << 30), Ok, "no limit");
        is(&file_size(Some(4 << 30), 2 << 30), Ok, "4.00 GiB");
        is(&file_size(Some(1 << 30), 2 << 30), Warn, "2.00 GiB");
        is(&file_size(Some(1 << 20), 2 << 30), Fail, "ulimit -f");
        is(&address_space(None, 18), Ok, "no limit");
        is(&address_space(Some(16 << 30), 18), Warn, "LimitAS");
        is(&address_space(Some(1 << 50), 18), Ok, "1.00 PiB");
        is(&data(Some(1 << 20), 1 << 29), Warn, "guest_bytes");
        is(&data(None, 1 << 29), Ok, "no limit");
        is(&threads(Some(100), false), Warn, "ulimit -u");
        is(&threads(Some(100), true), Ok, "root");
        is(&threads(Some(4096), false), Ok, "4096");
    }

    #[test]
    fn memory_is_held_against_the_budget() {
        is(&memory(Some(8 << 30), 4 << 30), Ok, "8.00 GiB available");
        is(
            &memory(Some(8 << 30), 9 << 30),
            Warn,
            "budget_bytes = 4294967296",
        );
        is(&memory(Some(512 << 20), 256 << 20), Warn, "memory.max");
        is(&memory(Some(64 << 20), 32 << 20), Fail, "64.00 MiB");
        is(&memory(None, 1 << 30), Warn, "does not say");
        is(&overcommit(Some(0)), Ok, "=0");
        is(&overcommit(Some(2)), Warn, "overcommit_ratio");
        is(&overcommit(None), Status::Info, "cannot be read");
    }

    #[test]
    fn a_group_of_version_1_matters_below_what_is_available() {
        assert_eq!(group(u64::MAX, 8 << 30, 4 << 30), None);
        let check = group(1 << 30, 8 << 30, 4 << 30).expect("it matters");
        is(&check, Warn, "memory.budget_bytes = 536870912");
        let check = group(1 << 30, 8 << 30, 1 << 28).expect("it matters");
        is(&check, Ok, "256.00 MiB");
    }
}
