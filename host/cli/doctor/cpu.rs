//! What compiled kernels need of the processor.

use super::{Check, Subject, text};

const SIMD: Subject = Subject::new(
    "cpu",
    "vector instructions",
    "kernels use 128-bit SIMD; an instruction the processor lacks becomes a function call for each vector, or several others",
);
const COUNT: Subject = Subject::new(
    "cpu",
    "processors",
    "there is one worker thread for each (engine.workers)",
);

pub(super) fn checks() -> Vec<Check> {
    let features = [
        ("SSSE3", std::is_x86_feature_detected!("ssse3")),
        ("SSE4.1", std::is_x86_feature_detected!("sse4.1")),
        ("SSE4.2", std::is_x86_feature_detected!("sse4.2")),
        ("POPCNT", std::is_x86_feature_detected!("popcnt")),
        ("AVX", std::is_x86_feature_detected!("avx")),
        ("AVX2", std::is_x86_feature_detected!("avx2")),
        ("FMA", std::is_x86_feature_detected!("fma")),
        ("BMI1", std::is_x86_feature_detected!("bmi1")),
        ("BMI2", std::is_x86_feature_detected!("bmi2")),
        ("LZCNT", std::is_x86_feature_detected!("lzcnt")),
    ];
    let wide = std::is_x86_feature_detected!("avx512f");
    vec![
        simd(&text::read("/proc/cpuinfo"), &features, wide),
        count(
            online(&text::read("/sys/devices/system/cpu/online")),
            rustix::thread::sched_getaffinity(None)
                .ok()
                .map(|set| u64::from(set.count())),
            std::thread::available_parallelism()
                .ok()
                .map(|count| count.get() as u64),
        ),
    ]
}

fn simd(cpuinfo: &str, features: &[(&str, bool)], wide: bool) -> Check {
    let model = text::field(cpuinfo, "model name")
        .or_else(|| text::field(cpuinfo, "vendor_id"))
        .unwrap_or("a processor that /proc/cpuinfo does not name");
    let names = |have: bool| {
        let names = features.iter().filter(|feature| feature.1 == have);
        names
            .map(|feature| feature.0)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let missing = names(false);
    let wide = if wide { ", AVX-512" } else { "" };
    if missing.is_empty() {
        SIMD.ok(format!("{model}: {}{wide}", names(true)))
    } else {
        SIMD.warn(
            format!("{model} lacks {missing}"),
            "a processor of 2013 or later; for a virtual machine, the host's own model (qemu: -cpu host)",
        )
    }
}

/// How many processors `0-3,8` names.
fn online(ranges: &str) -> Option<u64> {
    ranges.trim().split(',').try_fold(0, |sum, range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
        Some(sum + to.checked_sub(from)? + 1)
    })
}

/// `usable` also counts what quotas of control groups leave.
fn count(online: Option<u64>, allowed: Option<u64>, usable: Option<u64>) -> Check {
    let text = |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
    let found = format!(
        "{} usable, of {} allowed to this process and {} online",
        text(usable),
        text(allowed),
        text(online)
    );
    match (allowed, usable) {
        (Some(allowed), Some(usable)) if usable < allowed => {
            COUNT.info(format!("{found}: a quota of the control group"))
        }
        (_, Some(1)) => COUNT.info(format!("{found}: one kernel at a time")),
        _ => COUNT.ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn ranges_of_processors() {
        for (text, count) in [
            ("0-1\n", Some(2)),
            ("0", Some(1)),
            ("0-3,8,10-11", Some(7)),
            ("3-1", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(online(text), count, "{text:?}");
        }
    }

    #[test]
    fn what_a_processor_lacks_is_named() {
        let info = "vendor_id\t: GenuineIntel\nmodel name\t: Some CPU\n";
        let check = simd(info, &[("AVX", true), ("AVX2", true)], true);
        assert_eq!(check.found, "Some CPU: AVX, AVX2, AVX-512");
        assert_eq!(check.status, Status::Ok);
        let check = simd("", &[("AVX", true), ("AVX2", false), ("FMA", false)], false);
        assert!(check.found.ends_with("lacks AVX2, FMA"), "{check:?}");
        assert_eq!(check.status, Status::Warn);
    }

    #[test]
    fn processors_by_affinity_and_quota() {
        let of = |online, allowed, usable| count(Some(online), Some(allowed), Some(usable));
        assert_eq!(of(8, 8, 8).status, Status::Ok);
        assert!(of(8, 8, 2).found.contains("quota"));
        assert!(of(8, 1, 1).found.contains("one kernel at a time"));
        assert_eq!(count(None, None, None).status, Status::Ok);
    }
}
