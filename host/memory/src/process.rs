//! What the operating system says about this process, and what it allows it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};

use crate::Inode;

/// Counts of what this process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Open descriptors.
    pub fds: u64,
    /// Mappings, as the lines of `/proc/self/maps`.
    pub mappings: u64,
    /// Threads.
    pub threads: u64,
    /// Page faults that needed no disk, since the process began.
    pub minor_faults: u64,
    /// Resident memory.
    pub resident_bytes: u64,
}

/// Counts as of now.
///
/// # Errors
/// Any error of reading `/proc/self`.
pub fn counts() -> io::Result<Counts> {
    // The descriptor that lists the others is not counted.
    let fds = (fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1);
    let maps = fs::read("/proc/self/maps")?;
    let mappings = maps.iter().filter(|byte| **byte == b'\n').count() as u64;
    let status = fs::read_to_string("/proc/self/status")?;
    Ok(Counts {
        fds,
        mappings,
        threads: field(&status, "Threads:").unwrap_or(0),
        minor_faults: minor_faults()?,
        resident_bytes: field(&status, "VmRSS:").unwrap_or(0) * 1024,
    })
}

/// Page faults of the process that needed no disk, since it began. Cheap enough to be
/// called before and after an invocation.
///
/// # Errors
/// Any error of `getrusage`.
pub fn minor_faults() -> io::Result<u64> {
    // SAFETY: `rusage` is a struct of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `rusage` of ours that lives over the call.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(usage.ru_minflt).unwrap_or(0))
}

/// CPU time that all threads of process `pid` have used, those that have ended among them; of a child also after its end, until it is waited for.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: the pointer is to a clock's id of ours that lives over the call.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a `timespec` of ours that lives over the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Ok(Duration::new(
        seconds,
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}

/// The list of this process's mappings, for when no file can be opened any more.
static MAPS: OnceLock<File> = OnceLock::new();

/// Opens what [`inode_at`] reads, which needs no further file from then on.
///
/// # Errors
/// Any error of opening `/proc/self/maps`.
pub fn keep_mappings_open() -> io::Result<()> {
    if MAPS.get().is_none() {
        // If another thread was quicker, its file is as good.
        let _ = MAPS.set(File::open("/proc/self/maps")?);
    }
    Ok(())
}

fn mappings_text() -> io::Result<String> {
    let Some(file) = MAPS.get() else {
        return fs::read_to_string("/proc/self/maps");
    };
    let (mut text, mut part) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        // At an offset of our own: threads share the file's.
        match file.read_at(&mut part, text.len() as u64)? {
            0 => return String::from_utf8(text).map_err(io::Error::other),
            count => text.extend_from_slice(&part[..count]),
        }
    }
}

/// What is mapped at `address` of this process, by the operating system's own list: the
/// file, and the offset in it of the byte at `address`. None for memory without a file.
///
/// # Errors
/// Any error of reading `/proc/self/maps`.
pub fn inode_at(address: usize) -> io::Result<Option<(Inode, u64)>> {
    let maps = mappings_text()?;
    Ok(maps.lines().find_map(|line| file_at(line, address as u64)))
}

/// `from-to rights offset major:minor inode path`, all numbers but the inode in hexadecimal.
fn file_at(line: &str, address: u64) -> Option<(Inode, u64)> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut fields = line.split_ascii_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let (from, to) = (hex(from)?, hex(to)?);
    if !(from..to).contains(&address) {
        return None;
    }
    let offset = hex(fields.nth(1)?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    let inode = fields.next()?.parse().ok().filter(|inode| *inode != 0)?;
    Some((Inode { device, inode }, offset + (address - from)))
}

/// Hides `/proc/PID/mem` and `/proc/PID/fd` from other processes of the same user, who
/// could write sealed memory there.
///
/// # Errors
/// Any error of `prctl(PR_SET_DUMPABLE)`.
pub fn set_not_dumpable() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Raises the number of descriptors that may be open to the hard limit; answers it.
///
/// # Errors
/// Any error of `setrlimit`.
pub fn raise_nofile() -> io::Result<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        rustix::process::setrlimit(Resource::Nofile, raised)?;
    }
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// How many mappings a process may have (`vm.max_map_count`).
pub fn mappings_max() -> u64 {
    // Linux's own default, where `/proc/sys` is hidden.
    const DEFAULT: u64 = 65_530;
    fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT)
}

/// Bytes of memory that can still be used: what the machine has available, or what is left
/// of the limit of this process's control group (v2) or of one above it, if that is less.
///
/// # Errors
/// Any error of reading `/proc/meminfo`.
pub fn memory_available() -> io::Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let machine = field(&info, "MemAvailable:").ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "no MemAvailable in /proc/meminfo",
        )
    })? * 1024;
    Ok(machine.min(group_available().unwrap_or(u64::MAX)))
}

/// None if there is no control group v2, or none with a limit.
fn group_available() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = std::path::Path::new("/sys/fs/cgroup");
    let number = |path: std::path::PathBuf| -> Option<u64> {
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    std::path::Path::new(own)
        .ancestors()
        .filter_map(|group| {
            let group = root.join(group);
            // "max" is not a number: no limit.
            let limit = number(group.join("memory.max"))?;
            Some(limit.saturating_sub(number(group.join("memory.current"))?))
        })
        .min()
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let line = "7f00000000-7f00010000 r--p 00020000 00:01 4242    /memfd:strait (deleted)";
        let inode = Inode {
            device: rustix::fs::makedev(0, 1),
            inode: 4242,
        };
        let last = 0x7f_0000_ffff;
        assert_eq!(file_at(line, 0x7f_0000_1000), Some((inode, 0x21000)));
        assert_eq!(file_at(line, last), Some((inode, 0x2ffff)));
        assert_eq!(file_at(line, last + 1), None);
        assert_eq!(file_at("1000-2000 rw-p 00000000 00:00 0", 0x1000), None);
        assert_eq!(file_at("nonsense", 0), None);
    }

    #[test]
    fn this_process() {
        let counts = counts().expect("/proc is there");
        assert!(counts.fds >= 3 && counts.mappings > 5 && counts.threads >= 1);
        assert!(counts.minor_faults > 100 && counts.resident_bytes > 1 << 20);
        assert!(mappings_max() > 1000);
        let available = memory_available().expect("/proc is there");
        assert!(available > 1 << 20);
        let on_the_heap = Box::new(0_u8);
        let address = (&raw const *on_the_heap).addr();
        assert_eq!(inode_at(address).expect("/proc is there"), None);
        let (code, _) = inode_at(this_process as *const () as usize)
            .expect("/proc is there")
            .expect("code comes from a file");
        assert_ne!(code.inode, 0);
    }

    #[test]
    fn cpu_time_of_a_child_until_it_is_waited_for() {
        let burn = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        let mut child = std::process::Command::new("sh")
            .args(["-c", burn])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let own = cpu_time(std::process::id()).expect("this process");
        // Its end closes it.
        let mut output = child.stdout.take().expect("a pipe");
        io::copy(&mut output, &mut io::sink()).expect("nothing");
        let used = cpu_time(child.id()).expect("it was not waited for");
        assert!(used > Duration::from_millis(1), "{used:?}");
        child.wait().expect("a child");
        assert!(cpu_time(child.id()).is_err(), "it is no more");
        assert!(cpu_time(std::process::id()).expect("this process") >= own);
        assert!(cpu_time(u32::MAX).is_err());
    }
}
