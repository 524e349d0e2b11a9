//! Whether anybody else still has a segment that the host is done with.
//!
//! Its memory is not free as long as somebody has it open or mapped, whatever its lease said, so it stays
//! charged until Linux says that nobody has. It says so by a write lease (`fcntl(F_SETLEASE, F_WRLCK)`), which
//! is given only to the one open file description of a file; a mapping keeps its description open, and so does
//! a descriptor in flight. The lease is given back at once. Not seen: a descriptor that was opened with
//! `O_PATH`, and the description that `memfd_create` itself gives (so the host closes its own and opens
//! another, see `Segment::create`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use crate::memfd::reopen_readonly;

/// linux/fcntl.h; libc does not name it.
const F_SETSIG: libc::c_int = 10;

/// Those who have a file, but for the descriptor to ask with.
#[derive(Debug)]
pub(crate) struct Holders(Asking);

#[derive(Debug)]
enum Asking {
    /// The description that was handed out, as long as another cannot be opened.
    Shared(Arc<OwnedFd>),
    /// A description of our own, which nobody else ever had.
    Own(OwnedFd),
}

impl Holders {
    /// Of the file behind a descriptor that was handed out. None if it cannot be told.
    pub(crate) fn of(handed_out: Arc<OwnedFd>) -> Option<Self> {
        Asking::Shared(handed_out).opened().map(Self)
    }

    /// True as long as somebody has it; false, too, if it cannot be told.
    pub(crate) fn are_any(&mut self) -> bool {
        if let Asking::Shared(fd) = &self.0 {
            match Asking::Shared(Arc::clone(fd)).opened() {
                Some(asking) => self.0 = asking,
                None => return false,
            }
        }
        match &self.0 {
            Asking::Shared(_) => true,
            Asking::Own(fd) => lease_is_refused(fd.as_fd()),
        }
    }
}

impl Asking {
    /// With a description of our own, if Linux gives one now. None if it cannot be told who has the file.
    fn opened(self) -> Option<Self> {
        let Self::Shared(shared) = self else {
            return Some(self);
        };
        match reopen_readonly(shared.as_fd()) {
            // `shared` is closed here: ours is not to be counted.
            Ok(own) => {
                // Somebody who opens the file in the instant of our lease has us sent a signal: one that is
                // ignored by default, in the place of SIGIO, which is not.
                set(own.as_fd(), F_SETSIG, libc::SIGURG).ok()?;
                Some(Self::Own(own))
            }
            // Later, perhaps: nobody gets away with a lease of his own, or with all our descriptors.
            Err(Errno::WOULDBLOCK | Errno::MFILE | Errno::NFILE) => Some(Self::Shared(shared)),
            Err(_) => None,
        }
    }
}

fn lease_is_refused(fd: BorrowedFd<'_>) -> bool {
    match set(fd, libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => {
            // Closing gives it back in any case.
            let _ = set(fd, libc::F_SETLEASE, libc::F_UNLCK);
            false
        }
        // Any other error means that this Linux does not tell (`fs.leases-enable` is 0).
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn set(fd: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: `fd` is open, and both commands that are used here take an integer.
    match unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
