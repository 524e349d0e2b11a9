//! Whose process this is, and who else has that uid.

use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};

use super::{Check, Subject, text};

const USER: Subject = Subject::new(
    "users",
    "user",
    "whoever runs code in the host has its user's rights",
);
const SHARED: Subject = Subject::new(
    "users",
    "who shares the uid",
    "Linux denies little to a process of the host's own uid: it can stop the host and trace clients",
);
const IN_FLIGHT: Subject = Subject::new(
    "users",
    "descriptors in flight",
    "descriptors that were sent and not yet received count for all processes of a uid together: one \
     client of the host's uid that does not read can stop all sending (ETOOMANYREFS)",
);
const NAMESPACE: Subject = Subject::new(
    "users",
    "user namespace",
    "users that a namespace does not map all look like the overflow uid, and the host refuses that one",
);
const PTRACE: Subject = Subject::new(
    "users",
    "ptrace",
    "the host itself cannot be traced by its user; its clients can if this is 0",
);

const CAP_SYS_ADMIN: u64 = 1 << 21;
const CAP_SYS_RESOURCE: u64 = 1 << 24;

pub(super) fn checks() -> Vec<Check> {
    let uid = rustix::process::geteuid().as_raw();
    let others = others(uid);
    let exempt = text::capabilities(&text::read("/proc/self/status"))
        & (CAP_SYS_ADMIN | CAP_SYS_RESOURCE)
        != 0;
    vec![
        user(uid),
        shared(uid, &others),
        in_flight(
            exempt,
            !others.is_empty(),
            getrlimit(Resource::Nofile).maximum,
        ),
        namespace(
            uid,
            &text::read("/proc/self/uid_map"),
            text::number("/proc/sys/kernel/overflowuid"),
        ),
        ptrace(text::number("/proc/sys/kernel/yama/ptrace_scope")),
    ]
}

/// Names of the other processes of `uid` that this one can see, with how many there are of each.
fn others(uid: u32) -> BTreeMap<String, usize> {
    let own = std::process::id().to_string();
    let mut names = BTreeMap::new();
    // Where /proc is hidden nobody is seen; the text says so.
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in entries {
        let pid = entry.file_name();
        let is_pid = pid
            .to_str()
            .is_some_and(|pid| pid != own && pid.bytes().all(|byte| byte.is_ascii_digit()));
        if !is_pid {
            continue;
        }
        // A process that ended meanwhile has no text, and none counts.
        let status = text::read(entry.path().join("status"));
        if let Some((_, name)) = text::process(&status).filter(|(owner, _)| *owner == uid) {
            *names.entry(name.to_owned()).or_default() += 1;
        }
    }
    names
}

fn user(uid: u32) -> Check {
    if uid == 0 {
        USER.warn(
            "root",
            "run the host as a user of its own: useradd --system strait (systemd: User=strait or DynamicUser=yes)",
        )
    } else {
        USER.ok(format!("uid {uid}"))
    }
}

fn shared(uid: u32, others: &BTreeMap<String, usize>) -> Check {
    const NAMED: usize = 5;
    let count: usize = others.values().sum();
    if count == 0 {
        return SHARED.ok(format!("no other process that can be seen has uid {uid}"));
    }
    let mut names: Vec<_> = others.iter().collect();
    names.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), (*name).clone()));
    let mut list: Vec<String> = names
        .iter()
        .take(NAMED)
        .map(|(name, count)| match count {
            1 => (*name).clone(),
            count => format!("{name} ({count})"),
        })
        .collect();
    if names.len() > NAMED {
        list.push("…".to_owned());
    }
    let noun = if count == 1 { "process" } else { "processes" };
    SHARED.info(format!(
        "{count} other {noun}: {}; give the host a uid of its own where its clients do not trust each other",
        list.join(", ")
    ))
}

fn in_flight(exempt: bool, shared: bool, files: Option<u64>) -> Check {
    match files {
        _ if exempt => IN_FLIGHT.ok("no limit, by CAP_SYS_ADMIN or CAP_SYS_RESOURCE"),
        None => IN_FLIGHT.ok("no limit"),
        Some(files) if shared => IN_FLIGHT.warn(
            format!("{files} for the host and every other process of its uid together"),
            "run the host under a uid of its own (systemd: User=strait or DynamicUser=yes)",
        ),
        Some(files) => IN_FLIGHT.ok(format!("{files}, for the host alone")),
    }
}

fn namespace(uid: u32, uid_map: &str, overflow: Option<u64>) -> Check {
    if overflow == Some(u64::from(uid)) {
        return NAMESPACE.fail(
            format!("this is the overflow uid {uid}, whose connections every host refuses"),
            "map this user into the namespace (newuidmap, docker: --userns), or take another user",
        );
    }
    if text::all_uids(uid_map) {
        NAMESPACE.ok("none: every uid is itself")
    } else {
        NAMESPACE.info("inside one: clients whose uid it does not map are refused")
    }
}

fn ptrace(scope: Option<u64>) -> Check {
    match scope {
        Some(0) => {
            PTRACE.info("kernel.yama.ptrace_scope=0: processes of one uid can trace each other")
        }
        Some(scope) => PTRACE.ok(format!("kernel.yama.ptrace_scope={scope}")),
        None => PTRACE.info("no Yama: processes of one uid can trace each other"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn who_shares_the_uid_is_counted_and_named() {
        let of = |names: &[(&str, usize)]| {
            let names = names
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count));
            shared(7, &names.collect())
        };
        assert_eq!(of(&[]).status, Status::Ok);
        assert!(
            of(&[("bash", 1)])
                .found
                .starts_with("1 other process: bash;")
        );
        let check = of(&[("a", 1), ("b", 3), ("c", 1), ("d", 1), ("e", 1), ("f", 1)]);
        assert!(
            check
                .found
                .starts_with("8 other processes: b (3), a, c, d, e, …;"),
            "{check:?}"
        );
        assert_eq!(check.status, Status::Info);
    }

    #[test]
    fn descriptors_in_flight_are_shared_by_a_uid() {
        assert_eq!(in_flight(true, true, Some(64)).status, Status::Ok);
        assert_eq!(in_flight(false, false, Some(64)).status, Status::Ok);
        assert_eq!(in_flight(false, true, None).status, Status::Ok);
        let check = in_flight(false, true, Some(64));
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.starts_with("64 for"), "{check:?}");
    }

    #[test]
    fn the_overflow_uid_cannot_be_served() {
        let all = "0 0 4294967295\n";
        assert_eq!(namespace(65534, all, Some(65534)).status, Status::Fail);
        assert_eq!(namespace(1000, all, Some(65534)).status, Status::Ok);
        assert_eq!(namespace(0, "0 1000 1\n", None).status, Status::Info);
        assert_eq!(user(0).status, Status::Warn);
        assert_eq!(user(1000).found, "uid 1000");
        assert_eq!(ptrace(Some(1)).status, Status::Ok);
        assert_eq!(ptrace(Some(0)).status, Status::Info);
        assert_eq!(ptrace(None).status, Status::Info);
    }

    #[test]
    fn a_child_of_this_test_is_seen() {
        let uid = rustix::process::geteuid().as_raw();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep is there");
        let seen = others(uid);
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        assert!(seen.values().sum::<usize>() >= 1, "{seen:?}");
    }
}
