//! Frames and descriptors between real processes.

mod common;

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec};
use strait_memory::{Copied, FDS_MAX, FrameListener, FrameSocket, Open, Segment};

/// A directory that goes with its test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("strait-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("data.sock")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("ours");
    }
}

fn is_readable_within(fd: impl AsFd, seconds: i64) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut polled, Some(&timeout)).expect("pollable") > 0
}

#[test]
fn frames_stay_whole_and_carry_descriptors() {
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    let segment = Segment::<Open>::create(4096, &common::budget()).expect("fits");
    segment
        .write_at(0, b"here", &Copied::new())
        .expect("within");
    let fd = segment.client_fd();
    one.send(&[b"header", b"", b"body"], &[fd.as_fd(), fd.as_fd()])
        .expect("room");
    one.send(&[b"second"], &[]).expect("room");
    let mut buffer = [0; 64];
    let first = other.recv(&mut buffer).expect("a frame");
    assert_eq!(
        (&buffer[..first.bytes], first.fds.len(), first.truncated),
        (&b"headerbody"[..], 2, false)
    );
    let mut text = [0; 4];
    rustix::io::pread(&first.fds[1], &mut text, 0).expect("readable");
    assert_eq!(&text, b"here");
    let flags = rustix::io::fcntl_getfd(&first.fds[0]).expect("open");
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let second = other.recv(&mut buffer).expect("a frame");
    assert_eq!(
        (&buffer[..second.bytes], second.fds.len()),
        (&b"second"[..], 0)
    );
    drop(one);
    assert_eq!(other.recv(&mut buffer).expect("the end").bytes, 0);
    let error = other.send(&[b"x"], &[]).expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn what_does_not_fit_is_said_and_closed() {
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    let mut buffer = [0; 4];
    let fd = common::memfd(1);
    one.send(&[b"longer"], &[fd.as_fd()]).expect("room");
    let received = other.recv(&mut buffer).expect("a frame");
    assert!(received.truncated && received.fds.is_empty());
    assert_eq!((received.bytes, &buffer), (4, b"long"));

    let too_many = vec![fd.as_fd(); FDS_MAX + 1];
    let error = one.send(&[b"x"], &too_many).expect_err("17");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(
        error
            .to_string()
            .contains("at most 16 descriptors, not 1 and 17"),
        "{error}"
    );
    assert_eq!(
        one.send(&[b""], &[]).expect_err("empty").kind(),
        ErrorKind::InvalidInput
    );
    send_raw(&one, &too_many);
    let received = other.recv(&mut buffer).expect("a frame");
    assert!(received.truncated && received.fds.is_empty());
    one.send(&[b"x"], &[fd.as_fd(); FDS_MAX]).expect("room");
    let received = other.recv(&mut buffer).expect("a frame");
    assert_eq!((received.truncated, received.fds.len()), (false, FDS_MAX));
}

/// As a hostile sender would.
fn send_raw(socket: &FrameSocket, fds: &[std::os::fd::BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    let parts = [std::io::IoSlice::new(b"x")];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).expect("room");
}

#[test]
fn no_descriptor_is_left_behind() {
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    let fd = common::memfd(1);
    let inode = rustix::fs::fstat(&fd).expect("open").st_ino;
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .expect("/proc is there")
            .filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            .filter(|metadata| metadata.ino() == inode)
            .count()
    };
    let mut buffer = [0; 4];
    for _ in 0..100 {
        one.send(&[b"longer"], &[fd.as_fd(), fd.as_fd()])
            .expect("room");
        other.recv(&mut buffer).expect("a frame");
        send_raw(&one, &[fd.as_fd(); 17]);
        other.recv(&mut buffer).expect("a frame");
        one.send(&[b"x"], &[fd.as_fd()]).expect("room");
        drop(other.recv(&mut buffer).expect("a frame"));
    }
    assert_eq!(open(), 1);
}

#[test]
fn a_full_socket_does_not_wait_when_told_so() {
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    one.set_nonblocking(true).expect("a socket");
    other.set_nonblocking(true).expect("a socket");
    assert_eq!(
        other.recv(&mut [0; 4]).expect_err("nothing there").kind(),
        ErrorKind::WouldBlock
    );
    let frame = [7; 10_000];
    let mut sent = 0;
    let error = loop {
        match one.send(&[&frame], &[]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let mut buffer = [0; 20_000];
    for _ in 0..sent {
        assert_eq!(other.recv(&mut buffer).expect("a frame").bytes, frame.len());
    }
    assert_eq!(
        other.recv(&mut buffer).expect_err("no more").kind(),
        ErrorKind::WouldBlock
    );
}

#[test]
fn shutdown_wakes_a_reader() {
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| one.recv(&mut [0; 4]).expect("the end").bytes);
        one.shutdown().expect("connected");
        assert_eq!(reader.join().expect("no panic"), 0);
    });
    assert_eq!(other.recv(&mut [0; 4]).expect("the end").bytes, 0);
}

#[test]
fn a_path_has_one_listener() {
    let directory = Directory::new("one");
    let path = directory.socket();
    let error = FrameSocket::connect(&path).expect_err("nothing there");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("data.sock"), "{error}");
    let listener = FrameListener::bind(&path, 0o600).expect("free");
    let mode = std::fs::metadata(&path)
        .expect("bound")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = FrameListener::bind(&path, 0o600).expect_err("taken");
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert_eq!(listener.path(), path);
    drop(listener);
    assert!(!path.exists());

    // What a host leaves that was killed.
    let stale = std::os::unix::net::UnixListener::bind(&path).expect("free");
    drop(stale);
    assert_eq!(
        FrameSocket::connect(&path).expect_err("dead").kind(),
        ErrorKind::ConnectionRefused
    );
    let listener = FrameListener::bind(&path, 0o660).expect("nobody listens");
    let client = FrameSocket::connect(&path).expect("alive");
    // The probe of the second `bind` never got here, this connection does.
    let server = listener.accept().expect("a connection");
    client.send(&[b"x"], &[]).expect("room");
    assert_eq!(server.recv(&mut [0; 4]).expect("a frame").bytes, 1);
    drop(listener);

    std::fs::write(&path, "a file").expect("free");
    let error = FrameListener::bind(&path, 0o600).expect_err("not a socket");
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&path).expect("untouched"), b"a file");
    let long = directory.0.join("x".repeat(120));
    assert!(FrameListener::bind(&long, 0o600).is_err());
}

#[test]
fn of_many_hosts_that_start_at_once_one_gets_the_path() {
    let directory = Directory::new("many");
    let path = directory.socket();
    for _ in 0..20 {
        drop(std::os::unix::net::UnixListener::bind(&path).expect("free"));
        let bound = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| FrameListener::bind(&path, 0o600)))
                .collect();
            let listeners = threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"));
            listeners.filter_map(Result::ok).collect::<Vec<_>>()
        });
        assert_eq!(bound.len(), 1);
        FrameSocket::connect(&path).expect("the one that was bound is there");
    }
}

#[test]
fn the_exit_of_a_peer_is_seen_while_its_child_holds_the_socket() {
    const NAME: &str = "the_exit_of_a_peer_is_seen_while_its_child_holds_the_socket";
    if let Some(path) = std::env::var_os("STRAIT_PEER") {
        let socket = FrameSocket::connect(path.as_ref()).expect("the test listens");
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty()).expect("open");
        let child = Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep exists");
        socket
            .send(&[&child.id().to_le_bytes()], &[])
            .expect("room");
        // Waits for the test to have looked.
        socket.recv(&mut [0; 4]).expect("a frame");
        std::process::exit(0);
    }
    let directory = Directory::new("exit");
    let listener = FrameListener::bind(&directory.socket(), 0o600).expect("free");
    let mut child = Command::new(std::env::current_exe().expect("ours"))
        .args(["--exact", NAME, "--nocapture"])
        .env("STRAIT_PEER", directory.socket())
        .spawn()
        .expect("it runs");
    let socket = listener.accept().expect("a connection");
    let peer = socket.peer().expect("a unix socket");
    assert_eq!(peer.pid.cast_unsigned(), child.id());
    assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    assert_eq!(peer.gid, rustix::process::getegid().as_raw());
    let pidfd = peer.pidfd.expect("it lives");
    assert!(!is_readable_within(&pidfd, 0));
    let mut grandchild = [0; 4];
    assert_eq!(socket.recv(&mut grandchild).expect("a frame").bytes, 4);
    socket.send(&[b"x"], &[]).expect("room");
    assert!(is_readable_within(&pidfd, 30));
    assert!(child.wait().expect("ours").success());
    // No end of the connection: the grandchild has it.
    socket.set_nonblocking(true).expect("a socket");
    let end = socket.recv(&mut [0; 4]);
    assert_eq!(end.expect_err("still open").kind(), ErrorKind::WouldBlock);

    let grandchild = rustix::process::Pid::from_raw(i32::from_le_bytes(grandchild)).expect("not 0");
    rustix::process::kill_process(grandchild, rustix::process::Signal::TERM).expect("ours");
    socket.set_nonblocking(false).expect("a socket");
    assert_eq!(socket.recv(&mut [0; 4]).expect("the end").bytes, 0);
    assert!(socket.peer().expect("still known").pid > 0);
}
