//! Memory that others still have after the host has let go of it stays charged until they are done with it.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{fill, key, memfd, pattern, seal_all};
use rustix::fs::{Mode, OFlags, SealFlags};
use strait_memory::{
    Adopted, Budget, Elsewhere, FrameSocket, MemoryError, Open, ReadMapping, ResultPool, Segment,
    WriteMapping, adopt,
};

const BYTES: u64 = 128 << 10;
const BYTES_USIZE: usize = 128 << 10;
const ONE: Elsewhere = Elsewhere {
    segments: 1,
    bytes: BYTES,
};
const NONE: Elsewhere = Elsewhere {
    segments: 0,
    bytes: 0,
};

/// A host's budget for one segment of `BYTES`, and a principal's part of it.
fn budgets() -> (Arc<Budget>, Arc<Budget>) {
    let host = Budget::for_segments(BYTES, 1);
    host.free_elsewhere().expect("a thread");
    let child = host.child_for_segments(&"uid:1000".into(), BYTES, 1);
    (host, child)
}

/// `held` keeps a segment that is gone charged to `budget`, and its end ends that.
fn check<T>(budget: &Arc<Budget>, held: T) {
    assert_eq!((budget.used(), budget.elsewhere()), (BYTES, ONE));
    let full = Segment::create(BYTES, budget).expect_err("somebody has the memory");
    assert!(matches!(full, MemoryError::Budget(_)), "{full}");
    drop(held);
    // A full budget asks at once.
    drop(Segment::create(BYTES, budget).expect("it is free again"));
    assert_eq!((budget.used(), budget.elsewhere()), (0, NONE));
}

fn duplicate(fd: impl AsFd) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).expect("descriptors are left")
}

#[test]
fn a_segment_that_its_client_still_has_open_or_mapped() {
    let (host, budget) = budgets();
    let segment = Segment::create(BYTES, &budget).expect("fits");
    let theirs = duplicate(segment.client_fd());
    drop(segment);
    assert_eq!(host.elsewhere(), ONE);
    check(&budget, theirs);

    let segment = Segment::create(BYTES, &budget).expect("fits");
    let mapping = WriteMapping::new(segment.client_fd(), BYTES_USIZE).expect("open");
    drop(segment);
    check(&budget, mapping);

    // A description that they opened for themselves.
    let segment = Segment::create(BYTES, &budget).expect("fits");
    let own = rustix::fs::open(
        format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&segment.client_fd())
        ),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .expect("readable");
    drop(segment);
    check(&budget, own);
    assert_eq!((host.used(), host.elsewhere()), (0, NONE));
}

#[test]
fn a_result_that_is_mapped_or_in_flight() {
    let (host, budget) = budgets();
    let pool = ResultPool::new(host, 0);
    for in_flight in [false, true] {
        let result = pool.take(BYTES, key(1), &budget).expect("fits");
        let fd = result.readonly_fd().expect("lent");
        if in_flight {
            let (ours, theirs) = FrameSocket::pair().expect("descriptors are left");
            assert_eq!(ours.unread_bytes().expect("a socket"), 0);
            ours.send(&[b"y"], &[fd.as_fd()])
                .expect("room in the socket");
            assert!(ours.unread_bytes().expect("a socket") > 0);
            drop((fd, result));
            let mut frame = [0; 8];
            assert_eq!(budget.elsewhere(), ONE);
            let received = theirs.recv(&mut frame).expect("a frame");
            assert_eq!(ours.unread_bytes().expect("a socket"), 0);
            check(&budget, received);
        } else {
            let mapping = ReadMapping::of_result(duplicate(&fd), BYTES_USIZE).expect("lent");
            drop((fd, result));
            check(&budget, mapping);
        }
    }
}

#[test]
fn a_sealed_segment_of_which_only_the_descriptor_that_filled_it_is_left() {
    let (_host, budget) = budgets();
    let segment = Segment::create(BYTES, &budget).expect("fits");
    let theirs = duplicate(segment.client_fd());
    let sealed = segment.seal().expect("nobody maps it");
    let read = sealed.map().expect("sealed");
    drop(sealed);
    assert_eq!((budget.used(), budget.elsewhere()), (BYTES, NONE));
    drop(read);
    check(&budget, theirs);
}

#[test]
fn it_is_uncharged_in_time_though_nobody_asks_for_room() {
    let (host, budget) = budgets();
    let segment = Segment::create(BYTES, &budget).expect("fits");
    let theirs = duplicate(segment.client_fd());
    drop(segment);
    drop(theirs);
    let begun = Instant::now();
    while host.used() > 0 {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "never asked again"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!((host.elsewhere(), budget.used()), (NONE, 0));
}

#[test]
fn what_nobody_was_given_or_a_client_made_is_uncharged_at_once() {
    let (_host, budget) = budgets();
    let segment = Segment::<Open>::create(BYTES, &budget).expect("fits");
    drop(segment);
    assert_eq!(budget.used(), 0);
    let made = memfd(BYTES);
    fill(&made, 0, &pattern(1, BYTES));
    seal_all(
        &made,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW,
    );
    let adopted =
        adopt(duplicate(&made), std::slice::from_ref(&(0..BYTES)), &budget).expect("sealed");
    assert!(matches!(adopted, Adopted::Sealed(_)));
    drop(adopted);
    assert_eq!((budget.used(), budget.elsewhere()), (0, NONE));
}
