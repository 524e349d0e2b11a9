//! Who is at the other end of a connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags};

/// Who connected.
#[derive(Debug)]
pub struct Peer {
    /// Its process id when it connected.
    pub pid: i32,
    /// Its effective user id when it connected.
    pub uid: u32,
    /// Its effective group id when it connected.
    pub gid: u32,
    /// Readable as soon as that process has exited, even while a child of it keeps the
    /// connection open. None if it had exited already, or cannot be watched.
    pub pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Of a connected socket; the errors are those of [`FrameSocket::peer`](crate::FrameSocket::peer).
    pub(crate) fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = peer_credentials(socket)?;
        let pidfd = match peer_pidfd(socket) {
            // Linux before 6.5.
            Err(Errno::NOPROTOOPT) => open_living(credentials.pid)?,
            // Not watched, its leases would outlive it.
            Err(full @ (Errno::MFILE | Errno::NFILE)) => return Err(full.into()),
            result => result.ok(),
        };
        Ok(Self {
            pid: credentials.pid,
            uid: credentials.uid,
            gid: credentials.gid,
            pidfd,
        })
    }
}

/// `SO_PEERCRED`. Not by rustix, whose `Pid` cannot be the 0 that Linux answers for a
/// process of another pid namespace.
fn peer_credentials(socket: BorrowedFd<'_>) -> rustix::io::Result<libc::ucred> {
    let nobody = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    // SAFETY: `ucred` is three integers, for which every answer is a value.
    unsafe { socket_option(socket, libc::SO_PEERCRED, nobody) }
}

/// `SO_PEERPIDFD`: of the very process that connected, with no race over its number.
fn peer_pidfd(socket: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    // SAFETY: the value is an integer, for which every answer is a value.
    let number: libc::c_int = unsafe { socket_option(socket, SO_PEERPIDFD, -1) }?;
    // SAFETY: on success the operating system made a new descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// An option of the socket level, read over `value`.
///
/// # Safety
/// Every pattern of bits is a `T`.
unsafe fn socket_option<T: Copy>(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
    mut value: T,
) -> rustix::io::Result<T> {
    let mut bytes = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the value and its length live over the call, and the length is that of the
    // value, so nothing is written beyond it.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut bytes,
        )
    };
    if result == 0 {
        return Ok(value);
    }
    let error = io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}

/// A pidfd by number. The process that connected may have exited and its number may be
/// another's, but while it is alive the number is its own.
fn open_living(pid: i32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(full @ (Errno::MFILE | Errno::NFILE)) => Err(full.into()),
        Err(_) => Ok(None),
        Ok(pidfd) => Ok((!is_readable(pidfd.as_fd())).then_some(pidfd)),
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    retry_on_intr(|| rustix::event::poll(&mut polled, Some(&now))).is_ok_and(|ready| ready > 0)
}
