//! Frames with descriptors beside them: `SOCK_SEQPACKET` unix sockets and `SCM_RIGHTS`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::{Inode, Peer};

/// The most descriptors that travel beside one frame.
pub const FDS_MAX: usize = 16;

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(FDS_MAX));
const BACKLOG: i32 = 128;
/// How long another host that is starting in the same directory may take to bind its socket.
const LOCK_WAIT: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A socket that accepts connections at a path. Dropping it removes the path.
#[derive(Debug)]
pub struct FrameListener {
    fd: OwnedFd,
    path: PathBuf,
    inode: Inode,
}

impl FrameListener {
    /// Listens at `path`, for whoever `mode` lets write (0o600, 0o660). A path that a dead
    /// host left behind is replaced.
    ///
    /// # Errors
    /// `AddrInUse` if somebody listens there, or if something else than a socket is there;
    /// any other error of the operating system, with the path.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        Self::bind_at(path, mode).map_err(|error| {
            let text = format!("listening at {}: {error}", path.display());
            io::Error::new(error.kind(), text)
        })
    }

    fn bind_at(path: &Path, mode: u32) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        // Two hosts that start at once must not take each other's new socket for a stale one.
        let _lock = lock_directory(path)?;
        let fd = new_socket()?;
        match rustix::net::bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_if_stale(path, &address)?;
                rustix::net::bind(&fd, &address)?;
            }
            result => result?,
        }
        // Before `listen`, so that nobody whom the mode forbids has connected meanwhile.
        rustix::fs::chmod(path, Mode::from_raw_mode(mode))?;
        rustix::net::listen(&fd, BACKLOG)?;
        let inode = inode_of_path(path)?;
        Ok(Self {
            fd,
            path: path.to_owned(),
            inode,
        })
    }

    /// The next connection.
    ///
    /// # Errors
    /// `WouldBlock` if there is none and the listener does not block; any error of `accept`.
    pub fn accept(&self) -> io::Result<FrameSocket> {
        let fd = retry(|| rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC))?;
        Ok(FrameSocket { fd })
    }

    /// Whether `accept` waits.
    ///
    /// # Errors
    /// Any error of `fcntl`.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        set_nonblocking(self.fd.as_fd(), nonblocking)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for FrameListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for FrameListener {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl Drop for FrameListener {
    fn drop(&mut self) {
        // Another host may have taken the path over since.
        if inode_of_path(&self.path).is_ok_and(|inode| inode == self.inode) {
            // Nobody can be told; the next `bind` finds a stale socket and removes it.
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// A descriptor kept for the moment when there are no others: with its place a connection can
/// still be accepted, told so and closed.
#[derive(Debug)]
pub struct SpareDescriptor(Option<OwnedFd>);

impl SpareDescriptor {
    /// # Errors
    /// If there are none left already.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Some(Self::make()?)))
    }

    /// Leaves its place to what is opened next.
    pub fn give_up(&mut self) {
        self.0 = None;
    }

    /// Takes a place again, if there is one.
    pub fn refill(&mut self) {
        if self.0.is_none() {
            self.0 = Self::make().ok();
        }
    }

    fn make() -> rustix::io::Result<OwnedFd> {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
    }
}

/// One frame, as it came.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the frame that are in the buffer. 0: the other side closed the connection.
    pub bytes: usize,
    /// The descriptors beside it, each closed on `exec`.
    pub fds: Vec<OwnedFd>,
    /// The frame was longer than the buffer, or had too many descriptors. All descriptors were
    /// closed.
    pub truncated: bool,
    /// The frame is whole, but this process has no descriptors left for those beside it. All
    /// of them were closed.
    pub no_room: bool,
}

/// One connection, which carries frames.
#[derive(Debug)]
pub struct FrameSocket {
    fd: OwnedFd,
}

impl FrameSocket {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` if nobody listens there; any other error of
    /// `connect`; each with the path.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let connect = || {
            let fd = new_socket()?;
            let address = SocketAddrUnix::new(path)?;
            retry(|| rustix::net::connect(&fd, &address))?;
            Ok(Self { fd })
        };
        connect().map_err(|error: io::Error| {
            let text = format!("connecting to {}: {error}", path.display());
            io::Error::new(error.kind(), text)
        })
    }

    /// Two ends of one connection within this process.
    ///
    /// # Errors
    /// Any error of `socketpair`.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    /// Sends one frame, the concatenation of the parts of `frame`, with `fds` beside it.
    ///
    /// # Errors
    /// `InvalidInput` for an empty frame (it would look like the end of the connection) or
    /// more than [`FDS_MAX`] descriptors; `WouldBlock` if the other side is slow and the
    /// socket does not block; `BrokenPipe` if the other side is gone; any other error of `sendmsg`.
    pub fn send(&self, frame: &[&[u8]], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(frame, fds, SendFlags::empty())
    }

    /// The same without waiting, whether the socket blocks or not.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_now(&self, frame: &[&[u8]]) -> io::Result<()> {
        self.send_with(frame, &[], SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        frame: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        waiting: SendFlags,
    ) -> io::Result<()> {
        let bytes: usize = frame.iter().map(|part| part.len()).sum();
        if bytes == 0 || fds.len() > FDS_MAX {
            let text = format!(
                "a frame has at least 1 byte and at most {FDS_MAX} descriptors, not {bytes} and {}",
                fds.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let parts: Vec<_> = frame.iter().map(|part| IoSlice::new(part)).collect();
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "{} descriptors in {CONTROL_BYTES} bytes", fds.len());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::EOR | waiting;
        let sent = retry(|| rustix::net::sendmsg(&self.fd, &parts, &mut control, flags))?;
        // A sequenced packet is sent as a whole or not at all.
        assert_eq!(sent, bytes, "the operating system sent a part of a frame");
        Ok(())
    }

    /// Receives one frame into `buffer`.
    ///
    /// # Errors
    /// `WouldBlock` if there is none and the socket does not block; any error of `recvmsg`.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.recv_with(buffer, RecvFlags::empty())
    }

    /// The same without waiting, whether the socket blocks or not.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub fn recv_now(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.recv_with(buffer, RecvFlags::DONTWAIT)
    }

    fn recv_with(&self, buffer: &mut [u8], waiting: RecvFlags) -> io::Result<Received> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC | waiting;
        let message = retry(|| rustix::net::recvmsg(&self.fd, &mut parts, &mut control, flags))?;
        let mut fds = Vec::new();
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                fds.extend(received);
            }
        }
        // The control buffer has room to be aligned, into which one or two more may fit.
        let cut = message.flags.contains(ReturnFlags::CTRUNC);
        // Linux cuts only where our buffer ends, or where this process can take no more.
        let no_room = cut && fds.len() < FDS_MAX;
        let truncated =
            message.flags.contains(ReturnFlags::TRUNC) || (cut && !no_room) || fds.len() > FDS_MAX;
        if truncated || no_room {
            fds.clear();
        }
        Ok(Received {
            bytes: message.bytes,
            fds,
            truncated,
            no_room,
        })
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// Any error of `SO_PEERCRED`; that there are no descriptors left to watch it with.
    pub fn peer(&self) -> io::Result<Peer> {
        Peer::of(self.fd.as_fd())
    }

    /// Whether `send` and `recv` wait.
    ///
    /// # Errors
    /// Any error of `fcntl`.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        set_nonblocking(self.fd.as_fd(), nonblocking)
    }

    /// About how many bytes of what was sent, with what the kernel keeps beside them, the peer has not received yet:
    /// 0 if it has received all, and with it every descriptor.
    ///
    /// # Errors
    /// Any error of `SIOCOUTQ`.
    pub fn unread_bytes(&self) -> io::Result<u64> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the descriptor is open, and SIOCOUTQ (the number of TIOCOUTQ) writes one integer.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
            0 => Ok(u64::try_from(bytes).unwrap_or(0)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Ends the connection for every descriptor of it, in both directions: a thread that
    /// waits in [`Self::recv`] on it sees the end.
    ///
    /// # Errors
    /// Any error of `shutdown`.
    pub fn shutdown(&self) -> io::Result<()> {
        rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both)?;
        Ok(())
    }

    /// Ends what goes to the other side, which still receives what was sent.
    ///
    /// # Errors
    /// Any error of `shutdown`.
    pub fn shutdown_sending(&self) -> io::Result<()> {
        rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write)?;
        Ok(())
    }

    /// Ends what comes from the other side; what is to be sent there still can be.
    ///
    /// # Errors
    /// Any error of `shutdown`.
    pub fn shutdown_receiving(&self) -> io::Result<()> {
        rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read)?;
        Ok(())
    }
}

/// Around an end of a connection that was inherited or received.
impl From<OwnedFd> for FrameSocket {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<FrameSocket> for OwnedFd {
    fn from(socket: FrameSocket) -> Self {
        socket.fd
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// tokio's `AsyncFd` asks for the number.
impl AsRawFd for FrameSocket {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    flags.set(OFlags::NONBLOCK, nonblocking);
    rustix::fs::fcntl_setfl(fd, flags)?;
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Held until the descriptor is dropped.
///
/// # Errors
/// `WouldBlock` if somebody else keeps the lock, with their process ids where Linux shows them.
fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty())?;
    let begin = Instant::now();
    loop {
        match retry(|| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)) {
            Err(Errno::WOULDBLOCK) if begin.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(Errno::WOULDBLOCK) => {
                let who = match holders(&fd).as_slice() {
                    [] => "another process".to_owned(),
                    pids => format!("process {}", pids.join(", ")),
                };
                let text = format!(
                    "{who} holds a lock (flock) on the directory {} and has not released it for {} s; end it, or take another directory",
                    directory.display(),
                    LOCK_WAIT.as_secs()
                );
                return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
            }
            result => {
                result?;
                return Ok(fd);
            }
        }
    }
}

/// Ids of the processes that hold a `flock` on this file, as far as `/proc/locks` tells.
fn holders(fd: &OwnedFd) -> Vec<String> {
    let (Ok(stat), Ok(locks)) = (
        rustix::fs::fstat(fd),
        std::fs::read_to_string("/proc/locks"),
    ) else {
        return Vec::new();
    };
    let (major, minor) = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    let file = format!("{major:02x}:{minor:02x}:{}", stat.st_ino);
    locks
        .lines()
        .filter_map(|line| holder(line, &file))
        .collect()
}

/// `1: FLOCK  ADVISORY  WRITE 4242 00:1f:77 0 EOF`; one that waits has `->` after the number.
fn holder(line: &str, file: &str) -> Option<String> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    match fields.as_slice() {
        [_, "FLOCK", _, _, pid, locked, ..] if *locked == file => Some((*pid).to_owned()),
        _ => None,
    }
}

/// Removes the socket at `path` if nobody listens on it.
fn remove_if_stale(path: &Path, address: &SocketAddrUnix) -> rustix::io::Result<()> {
    let probe = new_socket()?;
    // A listener whose queue is full must not make us wait: it is alive.
    rustix::fs::fcntl_setfl(&probe, OFlags::NONBLOCK)?;
    let file_type = rustix::fs::FileType::from_raw_mode(rustix::fs::lstat(path)?.st_mode);
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) if file_type == rustix::fs::FileType::Socket => {
            rustix::fs::unlink(path)
        }
        _ => Err(Errno::ADDRINUSE),
    }
}

fn inode_of_path(path: &Path) -> rustix::io::Result<Inode> {
    let stat = rustix::fs::lstat(path)?;
    Ok(Inode {
        device: stat.st_dev,
        inode: stat.st_ino,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_lock() {
        let file = "00:1f:77";
        let of = |line| holder(line, file);
        assert_eq!(
            of("1: FLOCK  ADVISORY  WRITE 4242 00:1f:77 0 EOF"),
            Some("4242".to_owned())
        );
        assert_eq!(of("1: -> FLOCK  ADVISORY  WRITE 4243 00:1f:77 0 EOF"), None);
        assert_eq!(of("1: FLOCK  ADVISORY  WRITE 4242 00:1f:78 0 EOF"), None);
        assert_eq!(of("2: POSIX  ADVISORY  WRITE 4242 00:1f:77 0 EOF"), None);
        assert_eq!(of(""), None);
    }
}
