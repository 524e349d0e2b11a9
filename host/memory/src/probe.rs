//! What this machine can do, by trying it: the features that segments, moves and kernels need,
//! and from which size on a move beats two copies.
//!
//! Nothing of a try stays behind. A feature that is refused is an error that says at which step,
//! with the operating system's answer.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{self, Advice, MprotectFlags};

use crate::memfd::reopen_readonly;
use crate::pages::{Cover, FileAccess, Reservation};
use crate::{
    Budget, Copied, FrameSocket, GUEST_PAGE, GuestSpaces, HUGE_USIZE, Lot, MemoryError, PAGE_USIZE,
    Parked, PoolSegment, RecyclingKey, ResultPool, Sealed, Segment, to_usize,
};

/// The segment of most tries.
const TRY_BYTES: usize = 64 << 10;
/// One step of huge pages at birth.
const COLLAPSE_BYTES: usize = 8 << 20;

/// A feature is not there, or does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The operating system refused.
    #[error("{step}: {source}")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It was let through, or came out wrong.
    #[error("{0}")]
    Wrong(&'static str),
    /// A segment or mapping of ours could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The error of `step`, for `map_err`.
fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ProbeError {
    move |source| ProbeError::Refused {
        step,
        source: source.into(),
    }
}

fn memfd(bytes: usize, more: MemfdFlags) -> Result<OwnedFd, ProbeError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | more;
    let fd = rustix::fs::memfd_create("strait-probe", flags).map_err(at("creating a memfd"))?;
    rustix::fs::ftruncate(&fd, bytes as u64).map_err(at("sizing a memfd"))?;
    Ok(fd)
}

fn map(fd: &OwnedFd, bytes: usize, access: FileAccess) -> Result<Reservation, ProbeError> {
    Reservation::of_file(fd.as_fd(), bytes, access).map_err(at("mapping a memfd"))
}

fn seal(fd: &OwnedFd, seals: SealFlags, step: &'static str) -> Result<(), ProbeError> {
    rustix::fs::fcntl_add_seals(fd, seals).map_err(at(step))
}

/// `result` must be a refusal with `errno`.
fn refused<T>(
    result: Result<T, Errno>,
    errno: Errno,
    wrong: &'static str,
) -> Result<(), ProbeError> {
    match result {
        Err(found) if found == errno => Ok(()),
        _ => Err(ProbeError::Wrong(wrong)),
    }
}

/// Seals that end all writing (`F_SEAL_WRITE`, `SHRINK`, `GROW`): not added while somebody can
/// still write, kept afterwards; and a descriptor that only reads, by way of `/proc/self/fd`.
///
/// # Errors
/// [`ProbeError`].
pub fn seals() -> Result<(), ProbeError> {
    let fd = memfd(TRY_BYTES, MemfdFlags::empty())?;
    let writer = map(&fd, TRY_BYTES, FileAccess::SharedReadWrite)?;
    refused(
        rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE),
        Errno::BUSY,
        "F_SEAL_WRITE was not refused although somebody had the memory mapped writable",
    )?;
    drop(writer);
    seal(&fd, SealFlags::SHRINK, "adding F_SEAL_SHRINK")?;
    seal(&fd, SealFlags::GROW, "adding F_SEAL_GROW")?;
    seal(&fd, SealFlags::WRITE, "adding F_SEAL_WRITE")?;
    refused(
        rustix::io::pwrite(&fd, &[1], 0),
        Errno::PERM,
        "a write went through in spite of F_SEAL_WRITE",
    )?;
    for bytes in [TRY_BYTES as u64 / 2, TRY_BYTES as u64 * 2] {
        refused(
            rustix::fs::ftruncate(&fd, bytes),
            Errno::PERM,
            "a sealed memfd changed its size",
        )?;
    }
    let reading = reopen_readonly(fd.as_fd()).map_err(at("reopening it through /proc/self/fd"))?;
    map(&reading, TRY_BYTES, FileAccess::PrivateRead)?;
    Ok(())
}

/// Results that the host alone goes on writing: `F_SEAL_FUTURE_WRITE` lets the mapping that is
/// there write, and no other.
///
/// # Errors
/// [`ProbeError`].
pub fn future_write_seal() -> Result<(), ProbeError> {
    let fd = memfd(TRY_BYTES, MemfdFlags::empty())?;
    let writer = map(&fd, TRY_BYTES, FileAccess::SharedReadWrite)?;
    let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    seal(&fd, seals, "adding F_SEAL_FUTURE_WRITE and F_SEAL_SEAL")?;
    // SAFETY: mapped writable above, of a memfd that is sealed against shrinking, and nothing
    // moves it.
    unsafe { writer.copy_in(0, &[7]) };
    let mut byte = [0];
    rustix::io::pread(&fd, &mut byte, 0).map_err(at("reading a memfd"))?;
    if byte != [7] {
        return Err(ProbeError::Wrong(
            "the mapping from before F_SEAL_FUTURE_WRITE no longer writes",
        ));
    }
    match Reservation::of_file(fd.as_fd(), TRY_BYTES, FileAccess::SharedReadWrite) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        _ => {
            return Err(ProbeError::Wrong(
                "a new writable mapping was made in spite of F_SEAL_FUTURE_WRITE",
            ));
        }
    }
    refused(
        rustix::io::pwrite(&fd, &[1], 0),
        Errno::PERM,
        "a write went through in spite of F_SEAL_FUTURE_WRITE",
    )
}

/// Memory that can never be executed as a program (`MFD_NOEXEC_SEAL`, Linux 6.3).
///
/// # Errors
/// [`ProbeError`].
pub fn noexec_seal() -> Result<(), ProbeError> {
    let fd = memfd(TRY_BYTES, MemfdFlags::NOEXEC_SEAL)?;
    let seals = rustix::fs::fcntl_get_seals(&fd).map_err(at("F_GET_SEALS"))?;
    if seals.contains(SealFlags::EXEC) {
        Ok(())
    } else {
        Err(ProbeError::Wrong(
            "the memfd has no F_SEAL_EXEC although it was asked for",
        ))
    }
}

/// Moves of warm mappings that leave no hole (`MREMAP_DONTUNMAP` on file mappings, Linux 5.13),
/// private as inputs are and shared as results are.
///
/// # Errors
/// [`ProbeError`].
pub fn moves() -> Result<(), ProbeError> {
    let fd = memfd(TRY_BYTES, MemfdFlags::empty())?;
    seal(&fd, SealFlags::SHRINK, "adding F_SEAL_SHRINK")?;
    rustix::io::pwrite(&fd, &[42], 0).map_err(at("writing a memfd"))?;
    for access in [FileAccess::PrivateRead, FileAccess::SharedReadWrite] {
        let reserve = || Reservation::new(TRY_BYTES, HUGE_USIZE, 0).map_err(at("reserving"));
        let (home, guest) = (reserve()?, reserve()?);
        home.map_file(0..TRY_BYTES, fd.as_fd(), 0, access)
            .map_err(at("mapping a memfd"))?;
        home.transfer(0..TRY_BYTES, &guest, 0, Cover::Nothing)
            .map_err(at("mremap with MREMAP_DONTUNMAP"))?;
        let mut byte = [0];
        // SAFETY: the pages that were just moved here are readable, of a memfd that is sealed
        // against shrinking, and nothing moves them during the call.
        unsafe { guest.copy_out(0, &mut byte) };
        if byte != [42] {
            return Err(ProbeError::Wrong("the moved pages hold other bytes"));
        }
        home.cover(0..TRY_BYTES, Cover::Nothing)
            .map_err(at("covering what a move left"))?;
    }
    Ok(())
}

/// Faulting a whole mapping in by one call (`MADV_POPULATE_READ`, Linux 5.14).
///
/// # Errors
/// [`ProbeError`].
pub fn populate() -> Result<(), ProbeError> {
    let fd = memfd(TRY_BYTES, MemfdFlags::empty())?;
    let mapped = map(&fd, TRY_BYTES, FileAccess::SharedRead)?;
    let address = std::ptr::with_exposed_provenance_mut(mapped.start());
    // SAFETY: the range is the mapping made above; reading its pages in changes no byte.
    unsafe { mm::madvise(address, TRY_BYTES, Advice::LinuxPopulateRead) }
        .map_err(at("MADV_POPULATE_READ"))
}

/// Eight MiB of a new segment in huge pages.
#[derive(Clone, Copy, Debug)]
pub struct Collapsed {
    /// Bytes that Linux then maps in huge pages, by its own list; none where it does not say.
    pub huge_bytes: Option<u64>,
    /// Bytes that were asked for.
    pub asked_bytes: u64,
    /// How long that took.
    pub took: Duration,
}

/// Huge pages at birth (`MADV_COLLAPSE` of a nearly empty segment, Linux 6.1).
///
/// # Errors
/// [`ProbeError`].
pub fn huge_pages() -> Result<Collapsed, ProbeError> {
    let fd = memfd(COLLAPSE_BYTES, MemfdFlags::empty())?;
    seal(&fd, SealFlags::SHRINK, "adding F_SEAL_SHRINK")?;
    let mapped = map(&fd, COLLAPSE_BYTES, FileAccess::SharedReadWrite)?;
    let begin = Instant::now();
    // SAFETY: mapped shared and writable from offset 0 at a multiple of 2 MiB (`of_file` does that
    // from 4 MiB on), of a memfd of our own that is sealed against shrinking and that nobody has
    // written, and nothing moves it.
    if !unsafe { mapped.collapse(0..COLLAPSE_BYTES) } {
        return Err(at("MADV_COLLAPSE")(io::Error::last_os_error()));
    }
    let took = begin.elapsed();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    Ok(Collapsed {
        huge_bytes: mapped_huge(&smaps, mapped.start()),
        asked_bytes: COLLAPSE_BYTES as u64,
        took,
    })
}

/// `ShmemPmdMapped` of the mapping that starts at `address`, in the words of `/proc/PID/smaps`.
fn mapped_huge(smaps: &str, address: usize) -> Option<u64> {
    let start = format!("{address:x}-");
    let mut lines = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .skip(1);
    let kib = lines
        .by_ref()
        // The next mapping begins with an address, not with a word and a colon.
        .take_while(|line| {
            line.split_whitespace()
                .next()
                .is_some_and(|w| w.ends_with(':'))
        })
        .find_map(|line| line.strip_prefix("ShmemPmdMapped:"))?;
    let kib: u64 = kib.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Address space of one guest: 4 GiB and a little, reserved and not used.
///
/// # Errors
/// [`ProbeError`].
pub fn guest_address_space() -> Result<(), ProbeError> {
    Reservation::new((4 << 30) + (64 << 20), HUGE_USIZE, 0)
        .map(drop)
        .map_err(at("reserving 4160 MiB of addresses"))
}

/// Memory that is written and then executed, as every just-in-time compiler needs it.
///
/// # Errors
/// [`ProbeError`].
pub fn executable_memory() -> Result<(), ProbeError> {
    let pages = Reservation::new(PAGE_USIZE, PAGE_USIZE, 0).map_err(at("reserving"))?;
    pages
        .cover(0..PAGE_USIZE, Cover::ReadWrite)
        .map_err(at("mapping memory"))?;
    let address = std::ptr::with_exposed_provenance_mut(pages.start());
    let executable = MprotectFlags::READ | MprotectFlags::EXEC;
    // SAFETY: the page is ours, has no references into it and is never jumped to.
    unsafe { mm::mprotect(address, PAGE_USIZE, executable) }
        .map_err(at("making memory executable (mprotect with PROT_EXEC)"))
}

/// Frames with descriptors over a unix socket (`SOCK_SEQPACKET`, `SCM_RIGHTS`) and who sent them
/// (`SO_PEERCRED`).
///
/// # Errors
/// [`ProbeError`].
pub fn descriptors_over_sockets() -> Result<(), ProbeError> {
    let fd = memfd(PAGE_USIZE, MemfdFlags::empty())?;
    let (here, there) = FrameSocket::pair().map_err(at("a pair of SOCK_SEQPACKET sockets"))?;
    here.send(&[b"probe"], &[fd.as_fd()])
        .map_err(at("sending a descriptor"))?;
    let mut buffer = [0; 16];
    let received = there
        .recv(&mut buffer)
        .map_err(at("receiving a descriptor"))?;
    if received.fds.len() != 1 {
        return Err(ProbeError::Wrong("the descriptor did not arrive"));
    }
    there.peer().map_err(at("SO_PEERCRED"))?;
    Ok(())
}

/// A descriptor of the process at the other end of a socket (`SO_PEERPIDFD`, Linux 6.5).
///
/// # Errors
/// [`ProbeError`].
pub fn peer_pidfd() -> Result<(), ProbeError> {
    // Not in every version of the libc crate.
    const SO_PEERPIDFD: libc::c_int = 77;
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().map_err(at("a socket pair"))?;
    let mut fd: libc::c_int = -1;
    let mut bytes: libc::socklen_t = 4;
    // SAFETY: both pointers are to variables of ours of the sizes that the call is told, which
    // live over it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut bytes,
        )
    };
    if result != 0 {
        return Err(at("SO_PEERPIDFD")(io::Error::last_os_error()));
    }
    // SAFETY: the call just made this descriptor for us, and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

/// Filters of system calls that end a process (seccomp, `SECCOMP_RET_KILL_PROCESS`).
///
/// # Errors
/// [`ProbeError`].
pub fn seccomp() -> Result<(), ProbeError> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: this operation only reads the integer, which lives over the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(at("SECCOMP_GET_ACTION_AVAIL")(io::Error::last_os_error())),
    }
}

/// Version of Landlock's interface.
///
/// # Errors
/// [`ProbeError`].
pub fn landlock_version() -> Result<u32, ProbeError> {
    const CREATE_RULESET_VERSION: libc::c_int = 1;
    // SAFETY: with this flag the call takes no attributes and makes nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            null_mut::<libc::c_void>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).map_err(|_| at("landlock_create_ruleset")(io::Error::last_os_error()))
}

/// What the tensors of one invocation cost, beyond the kernel itself.
#[derive(Clone, Copy, Debug)]
pub struct CopyAndMove {
    /// Bytes of the input, and of the output.
    pub bytes: u64,
    /// Copied into the guest and out of it: median.
    pub copy: Duration,
    /// Moved in and home: median.
    pub moved: Duration,
}

/// Measures an input and an output of each of `sizes` (bytes, whole guest pages): copied into and
/// out of a fresh guest, and moved into one and home, in turn, as invocations do it. The guest reads
/// each page of its input and writes each of its output.
///
/// # Errors
/// [`ProbeError`].
pub fn copy_and_move(sizes: &[u64], rounds: usize) -> Result<Vec<CopyAndMove>, ProbeError> {
    sizes
        .iter()
        .map(|bytes| Bench::new(*bytes)?.measure(rounds))
        .collect()
}

/// One size's input and output, warm.
struct Bench {
    bytes: u64,
    spaces: Arc<GuestSpaces>,
    lot: Arc<Lot>,
    input: Segment<Sealed>,
    output: PoolSegment,
    copied: Copied,
}

impl Bench {
    fn new(bytes: u64) -> Result<Self, ProbeError> {
        assert!(
            bytes > 0 && bytes.is_multiple_of(GUEST_PAGE),
            "{bytes} bytes are not whole guest pages"
        );
        let budget = Budget::new("segment bytes", u64::MAX);
        let input = Segment::create(bytes, &budget)?;
        let copied = Copied::new();
        input.write_at(0, &vec![1; to_usize(bytes)], &copied)?;
        let input = input.seal().map_err(|refused| refused.error)?;
        let pool = ResultPool::new(budget, 0);
        let output = pool.take(bytes, RecyclingKey([0; 32]), pool.budget())?;
        output.pages().zero(0..bytes)?;
        Ok(Self {
            bytes,
            spaces: GuestSpaces::new(1),
            lot: Lot::new(16, u64::MAX),
            input,
            output,
            copied,
        })
    }

    fn measure(mut self, rounds: usize) -> Result<CopyAndMove, ProbeError> {
        // Once for what is made on first use.
        self.copy()?;
        self.moved()?;
        let mut times = (Vec::new(), Vec::new());
        for _ in 0..rounds.max(1) {
            times.0.push(self.copy()?);
            times.1.push(self.moved()?);
        }
        Ok(CopyAndMove {
            bytes: self.bytes,
            copy: median(times.0),
            moved: median(times.1),
        })
    }

    /// Offsets of input and output in the guest, and its size: each at a multiple of 2 MiB.
    fn places(&self) -> (Range<usize>, Range<usize>, usize) {
        let bytes = to_usize(self.bytes);
        let second = bytes.next_multiple_of(HUGE_USIZE);
        let all = second + bytes;
        (0..bytes, second..all, all)
    }

    fn copy(&mut self) -> Result<Duration, ProbeError> {
        let (from, to, all) = self.places();
        let begin = Instant::now();
        let space = self.spaces.take(all).map_err(MemoryError::from)?;
        space.make_accessible(0, all).map_err(MemoryError::from)?;
        let guest = std::ptr::with_exposed_provenance_mut::<u8>(space.base());
        // SAFETY: the guest's memory is ours, `all` bytes that were just made readable and
        // writable, and nothing else refers to it while this slice lives.
        let guest = unsafe { std::slice::from_raw_parts_mut(guest, all) };
        self.input.read_at(0, &mut guest[from], &self.copied)?;
        for page in guest[to.clone()].chunks_mut(PAGE_USIZE) {
            page[0] = 1;
        }
        self.output.pages().write_at(0, &guest[to], &self.copied)?;
        drop(space);
        Ok(begin.elapsed())
    }

    fn moved(&mut self) -> Result<Duration, ProbeError> {
        let (from, to, all) = self.places();
        let whole = 0..self.bytes;
        let begin = Instant::now();
        let space = self.spaces.take(all).map_err(MemoryError::from)?;
        space.make_accessible(0, all).map_err(MemoryError::from)?;
        let go = |parked: Parked, offset: usize| {
            parked
                .move_into(whole.clone(), &space, space.base() + offset)
                .map_err(|refused| MemoryError::from(refused.error))
        };
        let parked = self
            .lot
            .take_input(&self.input, whole.clone())
            .map_err(MemoryError::from)?;
        let input = go(parked, from.start)?;
        let parked = self.output.pages().take_parked().ok_or(ProbeError::Wrong(
            "the result's mapping is not at home after a move",
        ))?;
        let output = go(parked, to.start)?;
        for offset in (0..to.len()).step_by(PAGE_USIZE) {
            let read = std::ptr::with_exposed_provenance::<u8>(input.address() + offset);
            let write = std::ptr::with_exposed_provenance_mut::<u8>(output.address() + offset);
            // SAFETY: the input's window is mapped readable there, of a memfd that is sealed
            // against shrinking and writing.
            let byte = unsafe { read.read_volatile() };
            // SAFETY: the output's window is mapped writable there, of a memfd that is sealed
            // against shrinking, and nobody else has a mapping of it.
            unsafe { write.write_volatile(byte) };
        }
        let wrong = |_| ProbeError::Wrong("a window could not be moved home");
        self.lot.give_back(input.move_home().map_err(wrong)?);
        self.output
            .pages()
            .put_parked(output.move_home().map_err(wrong)?);
        drop(space);
        Ok(begin.elapsed())
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_by_the_words_of_smaps() {
        let smaps = "\
7f0000000000-7f0000800000 rw-s 00000000 00:01 7  /memfd:a (deleted)
Size:               8192 kB
ShmemPmdMapped:     4096 kB
VmFlags: rd wr sh
7f0000800000-7f0000900000 rw-s 00000000 00:01 8  /memfd:b (deleted)
Size:               1024 kB
";
        assert_eq!(mapped_huge(smaps, 0x7f00_0000_0000), Some(4 << 20));
        // Not the next mapping's line, and not the one before.
        assert_eq!(mapped_huge(smaps, 0x7f00_0080_0000), None);
        assert_eq!(mapped_huge(smaps, 0x1000), None);
        assert_eq!(mapped_huge("", 0), None);
    }

    #[test]
    fn what_this_crate_cannot_do_without_is_there_when_its_other_tests_pass() {
        seals().expect("seals");
        future_write_seal().expect("F_SEAL_FUTURE_WRITE");
        moves().expect("moves");
        descriptors_over_sockets().expect("descriptors");
        guest_address_space().expect("addresses");
        executable_memory().expect("executable memory");
    }

    #[test]
    fn a_measurement_leaves_nothing_behind() {
        let before = crate::process::counts().expect("/proc is there");
        let sizes = [GUEST_PAGE, 1 << 20];
        let times = copy_and_move(&sizes, 3).expect("measured");
        assert_eq!(times.iter().map(|t| t.bytes).collect::<Vec<_>>(), sizes);
        assert!(
            times
                .iter()
                .all(|t| !t.copy.is_zero() && !t.moved.is_zero())
        );
        // Other tests of this process open and close descriptors, too; many rounds would show.
        let after = crate::process::counts().expect("/proc is there");
        assert!(after.fds < before.fds + 8, "{before:?} {after:?}");
    }

    #[test]
    fn a_refusal_names_its_step() {
        let error = at("MADV_COLLAPSE")(Errno::INVAL);
        assert!(
            error
                .to_string()
                .starts_with("MADV_COLLAPSE: Invalid argument"),
            "{error}"
        );
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |millis: &[u64]| {
            median(millis.iter().map(|m| Duration::from_millis(*m)).collect()).as_millis()
        };
        assert_eq!((of(&[9, 1, 5]), of(&[3]), of(&[])), (5, 3, 0));
    }
}
