//! What the tests of this crate share.
#![allow(
    dead_code,
    reason = "each test binary uses a part of this, and an expectation would have to name which"
)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use strait_memory::{
    Budget, Copied, GuestSpace, GuestSpaces, Parked, RecyclingKey, Sealed, Segment, Window,
};

/// Bytes in a mebibyte.
pub(crate) const MIB: u64 = 1 << 20;
/// What a guest reserves.
pub(crate) const GUEST_BYTES: usize = 4 << 30;

/// Enough for every test.
pub(crate) fn budget() -> Arc<Budget> {
    Budget::new("segment bytes", 1 << 40)
}

/// Results of equal `number` may be recycled for each other.
pub(crate) fn key(number: u64) -> RecyclingKey {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&number.to_le_bytes());
    RecyclingKey(key)
}

/// Bytes that differ in every place and for every seed.
pub(crate) fn pattern(seed: u64, bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|index| {
            (index.wrapping_mul(31) ^ (index >> 8) ^ seed.wrapping_mul(0x9e37_79b9)).to_le_bytes()
                [0]
        })
        .collect()
}

/// A memfd as a client makes it.
pub(crate) fn memfd(bytes: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("client", flags).expect("descriptors are left");
    rustix::fs::ftruncate(&fd, bytes).expect("not sealed");
    fd
}

/// Writes all of `bytes`.
pub(crate) fn fill(fd: impl AsFd, offset: u64, bytes: &[u8]) {
    assert_eq!(pwrite(fd, bytes, offset).expect("writable"), bytes.len());
}

/// As the system call.
pub(crate) fn pwrite(fd: impl AsFd, bytes: &[u8], offset: u64) -> rustix::io::Result<usize> {
    rustix::io::pwrite(fd, bytes, offset)
}

/// Adds seals.
pub(crate) fn seal_all(fd: impl AsFd, seals: SealFlags) {
    rustix::fs::fcntl_add_seals(fd, seals).expect("sealable");
}

/// Maps `fd` shared, as anybody with the descriptor could, and unmaps it.
pub(crate) fn shared_mapping(fd: impl AsFd, bytes: u64, writable: bool) -> rustix::io::Result<()> {
    let protection = if writable {
        ProtFlags::READ | ProtFlags::WRITE
    } else {
        ProtFlags::READ
    };
    let bytes = usize::try_from(bytes).expect("64 bits");
    // SAFETY: a null address lets the operating system choose unused addresses.
    let at = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            MapFlags::SHARED,
            fd,
            0,
        )
    }?;
    // SAFETY: the mapping was just made, and nobody has a reference into it.
    unsafe { rustix::mm::munmap(at, bytes) }
}

/// A byte of memory that no reference can be made to.
///
/// # Safety
/// `address` is mapped readable.
pub(crate) unsafe fn peek(address: usize) -> u8 {
    let at = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: the caller knows that it is readable.
    unsafe { at.read_volatile() }
}

/// Writes a byte of memory that no reference can be made to.
///
/// # Safety
/// `address` is mapped writable, and nobody has a reference to it.
pub(crate) unsafe fn poke(address: usize, byte: u8) {
    let at = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: the caller knows that it is writable.
    unsafe { at.write_volatile(byte) }
}

/// Copies of bytes that no reference can be made to.
///
/// # Safety
/// All of them are mapped readable.
pub(crate) unsafe fn peek_all(address: usize, bytes: usize) -> Vec<u8> {
    let mut copy = vec![0; bytes];
    let at = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: the caller knows that they are readable, and `copy` is ours.
    unsafe { std::ptr::copy_nonoverlapping(at, copy.as_mut_ptr(), bytes) };
    copy
}

/// Bytes of address space that show segments, by the operating system's list.
pub(crate) fn segment_bytes_mapped() -> u64 {
    mapped_bytes(|line| line.contains("/memfd:strait"))
}

fn mapped_bytes(counts: impl Fn(&&str) -> bool) -> u64 {
    let hex = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    std::fs::read_to_string("/proc/self/maps")
        .expect("/proc is there")
        .lines()
        .filter(counts)
        .map(|line| {
            let (from, rest) = line.split_once('-').expect("a range");
            let (to, _) = rest.split_once(' ').expect("a range");
            hex(to) - hex(from)
        })
        .sum()
}

/// Open descriptors of segments.
pub(crate) fn segment_fds() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("/proc is there")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().contains("/memfd:strait"))
        .count()
}

/// Page faults of this thread that needed no disk.
pub(crate) fn thread_faults() -> i64 {
    // SAFETY: `rusage` is a struct of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `rusage` of ours that lives over the call.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(result, 0);
    usage.ru_minflt
}

/// Bytes of address space that are reserved without access.
pub(crate) fn reserved_bytes() -> u64 {
    mapped_bytes(|line| line.contains(" ---p "))
}

pub(crate) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}

/// A sealed segment with `pattern(seed)` in it.
pub(crate) fn sealed(budget: &Arc<Budget>, seed: u64, bytes: u64) -> Segment<Sealed> {
    let segment = Segment::create(bytes, budget).expect("fits");
    segment
        .write_at(0, &pattern(seed, bytes), &Copied::new())
        .expect("within");
    segment.seal().expect("unmapped")
}

/// A guest with its first `bytes` accessible.
pub(crate) fn guest(bytes: u64) -> Arc<GuestSpace> {
    let space = GuestSpaces::new(0)
        .take(GUEST_BYTES)
        .expect("address space");
    space.make_accessible(0, to_usize(bytes)).expect("within");
    space
}

pub(crate) fn window(
    parked: Parked,
    part: std::ops::Range<u64>,
    space: &Arc<GuestSpace>,
    offset: u64,
) -> Window {
    parked
        .move_into(part, space, space.base() + to_usize(offset))
        .expect("there is room")
}
