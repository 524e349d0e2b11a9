//! What `/proc` and `/sys` say, as values.

use std::path::{Path, PathBuf};

/// A file's text; empty where there is none to read, which every reader here takes for "not said".
pub(super) fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// A file that holds one number.
pub(super) fn number(path: impl AsRef<Path>) -> Option<u64> {
    read(path).trim().parse().ok()
}

/// The value after `name:` at the start of a line.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        Some(
            line.strip_prefix(name)?
                .trim_start()
                .strip_prefix(':')?
                .trim(),
        )
    })
}

/// The chosen word of `always [madvise] never`.
pub(super) fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

/// Capabilities in effect, from `/proc/PID/status`.
pub(super) fn capabilities(status: &str) -> u64 {
    field(status, "CapEff")
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .unwrap_or(0)
}

/// A process in the words of `/proc/PID/status`: its effective uid and its name. None for a thread
/// of the kernel and for a process that is dead, which have no memory.
pub(super) fn process(status: &str) -> Option<(u32, &str)> {
    field(status, "VmSize")?;
    let uid = field(status, "Uid")?.split_whitespace().nth(1)?;
    Some((uid.parse().ok()?, field(status, "Name")?))
}

/// True if `/proc/PID/uid_map` is that of the machine and not of a user namespace.
pub(super) fn all_uids(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// This process's group of the version 1 `memory` controller, from `/proc/self/cgroup`.
pub(super) fn memory_group_v1(groups: &str) -> Option<PathBuf> {
    let own = groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let memory = controllers.split(',').any(|name| name == "memory");
        memory.then_some(path)
    })?;
    Some(PathBuf::from(own.trim_start_matches('/')))
}

/// This process's group of version 2, from `/proc/self/cgroup`.
pub(super) fn group_v2(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "\
Name:\tbash
State:\tS (sleeping)
Uid:\t1000\t1001\t1002\t1003
VmSize:\t    8524 kB
CapEff:\t000001ffffffffff
";

    #[test]
    fn a_process_has_a_name_an_effective_uid_and_memory() {
        assert_eq!(process(STATUS), Some((1001, "bash")));
        let dead = STATUS.replace("VmSize", "Other");
        assert_eq!(process(&dead), None);
        assert_eq!(process(""), None);
        assert_eq!(capabilities(STATUS), 0x1ff_ffff_ffff);
        assert_eq!(capabilities("nothing"), 0);
    }

    #[test]
    fn a_field_is_a_whole_name() {
        assert_eq!(field(STATUS, "State"), Some("S (sleeping)"));
        assert_eq!(
            field("vendor_id\t: GenuineIntel\n", "vendor_id"),
            Some("GenuineIntel")
        );
        assert_eq!(field(STATUS, "Nam"), None);
        assert_eq!(field(STATUS, "Uid2"), None);
    }

    #[test]
    fn the_chosen_word_is_in_brackets() {
        for (text, word) in [
            ("always [madvise] never\n", Some("madvise")),
            ("[always] madvise never", Some("always")),
            ("always madvise", None),
            ("", None),
        ] {
            assert_eq!(chosen(text), word, "{text:?}");
        }
    }

    #[test]
    fn a_namespace_maps_less_than_all_uids() {
        assert!(all_uids("         0          0 4294967295\n"));
        assert!(!all_uids("         0       1000          1\n"));
        assert!(!all_uids(""));
    }

    #[test]
    fn the_groups_of_both_versions() {
        let mixed = "12:cpu,cpuacct:/a\n5:memory:/docker/x\n1:name=systemd:/a\n0::/init\n";
        assert_eq!(memory_group_v1(mixed), Some("docker/x".into()));
        assert_eq!(group_v2(mixed), Some("/init"));
        assert_eq!(memory_group_v1("0::/user.slice\n"), None);
        assert_eq!(group_v2("5:memory:/\n"), None);
    }
}
