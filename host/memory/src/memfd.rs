//! Memfds and the file descriptions that are open of them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::Inode;

pub(crate) fn inode_of(fd: BorrowedFd<'_>) -> rustix::io::Result<Inode> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(Inode {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

/// A file description of our own that only reads. `/proc/self/fd` stays open to a process
/// itself when it is not dumpable.
///
/// # Errors
/// `WOULDBLOCK` if somebody holds a write lease on the file (`F_SETLEASE`): without `O_NONBLOCK`
/// this would wait for that process, up to `fs.lease-break-time`.
pub(crate) fn reopen_readonly(fd: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    reopen(fd, OFlags::RDONLY)
}

/// A file description of our own with that `access`.
fn reopen(fd: BorrowedFd<'_>, access: OFlags) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::fs::open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        access | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    // Whoever gets it may take the flag for that of a socket.
    rustix::fs::fcntl_setfl(&fd, OFlags::empty())?;
    Ok(fd)
}

/// The description to keep of a memfd that the host made, which can write. The one that `memfd_create` gives is not
/// among those that Linux counts as open, see `held.rs`. Whoever is given one that reads cannot open it for writing, unless the
/// memfd is its own user's, or root's.
pub(crate) fn to_keep(fd: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let kept = reopen(fd, OFlags::RDWR)?;
    rustix::fs::fchmod(&kept, Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
    Ok(kept)
}

/// A copy of `program`, from where it is read next, that nobody can change and that can be run but not read: Linux makes no process
/// of it dumpable, from its first instruction on.
///
/// # Errors
/// Linux's. It may allow no memory to be run (`vm.memfd_noexec`).
pub fn unreadable_program(mut program: &File) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let create = |flags| rustix::fs::memfd_create("strait-program", flags);
    let copy = match create(flags | MemfdFlags::EXEC) {
        // Linux before 6.3 does not know EXEC.
        Err(rustix::io::Errno::INVAL) => create(flags),
        result => result,
    }?;
    let mut copy = File::from(copy);
    io::copy(&mut program, &mut copy)?;
    // What somebody has open for writing cannot be run.
    let run = reopen_readonly(std::os::fd::AsFd::as_fd(&copy))?;
    let fixed = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, fixed)?;
    rustix::fs::fchmod(&run, Mode::XUSR | Mode::XGRP | Mode::XOTH)?;
    Ok(run.into())
}

/// A memfd of no bytes that takes seals.
pub(crate) fn create_memfd() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create("strait", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know NOEXEC_SEAL.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create("strait", flags),
        result => result,
    }
}
