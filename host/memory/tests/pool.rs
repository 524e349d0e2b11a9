//! The result pool, one rule at a time.

mod common;

use std::fs::{OpenOptions, Permissions, metadata, set_permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{MIB, budget, guest, key, peek, poke, shared_mapping, window};
use rustix::fs::{SealFlags, fcntl_add_seals};
use strait_memory::{
    Access, Budget, Copied, Filler, GUEST_PAGE, Host, HugeBirths, Lent, Lot, MemoryError,
    PoolSegment, ResultPages, ResultPool, Scrap, Segment,
};

#[test]
fn a_result_is_written_in_the_guest_and_by_nobody_else() {
    let (budget, copied) = (budget(), Copied::new());
    let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
    let result = pool.take(5 * MIB, key(1000), pool.budget()).expect("fits");
    assert_eq!((result.bytes(), budget.used()), (5 * MIB, 5 * MIB));
    result
        .pages()
        .write_at(0, b"ARROW1", &copied)
        .expect("within");
    let space = guest(16 * MIB);
    let parked = result.pages().take_parked().expect("at home");
    assert!(matches!(
        result.pages().write_at(0, b"x", &copied),
        Err(MemoryError::Away { .. })
    ));
    assert!(matches!(
        result.read_at(0, &mut [0], &copied),
        Err(MemoryError::Away { .. })
    ));
    assert!(result.pages().take_parked().is_none());
    let window = window(parked, GUEST_PAGE..4 * MIB, &space, 2 * MIB + GUEST_PAGE);
    // SAFETY: the window is writable.
    unsafe { poke(window.address() + 3, 42) };
    let range = window.fault_range();
    // SAFETY: the window is in its guest.
    let handled = unsafe { range.divert_in_signal(&Scrap::new()) };
    assert!(!handled, "a result never faults like this");
    result
        .pages()
        .put_parked(window.move_home().expect("covered"));

    let mut read = [0; 6];
    result
        .read_at(GUEST_PAGE, &mut read, &copied)
        .expect("within");
    assert_eq!(read, [0, 0, 0, 42, 0, 0]);
    result
        .pages()
        .zero(GUEST_PAGE + 3..GUEST_PAGE + 4)
        .expect("within");
    result
        .read_at(GUEST_PAGE, &mut read, &copied)
        .expect("within");
    assert_eq!((read, copied.get()), ([0; 6], 18));
    assert!(result.pages().zero(5 * MIB - 1..5 * MIB + 1).is_err());
    assert!(result.pages().write_at(5 * MIB, b"x", &copied).is_err());

    let fd = result.readonly_fd().expect("lent");
    assert!(common::pwrite(&fd, b"x", 0).is_err());
    assert!(shared_mapping(&fd, MIB, true).is_err());
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let reopened = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("the mode allows it");
    assert!(common::pwrite(&reopened, b"x", 0).is_err());
    assert!(shared_mapping(&reopened, MIB, true).is_err());
    assert!(rustix::fs::ftruncate(&reopened, 0).is_err());
    assert!(rustix::fs::fcntl_add_seals(&reopened, rustix::fs::SealFlags::WRITE).is_err());
    let consumer = strait_memory::ReadMapping::of_result(&fd, 6).expect("lent");
    assert_eq!(consumer.bytes(), b"ARROW1");
    assert_eq!(consumer.inode(), result.inode());
}

#[test]
fn results_are_recycled_for_their_owner_only() {
    let (budget, copied) = (budget(), Copied::new());
    let pool = ResultPool::new(Arc::clone(&budget), 10 * MIB);
    let mine = pool.take(MIB, key(1), pool.budget()).expect("fits");
    mine.pages().write_at(0, b"mine", &copied).expect("within");
    let inode = mine.inode();
    drop(mine);
    assert_eq!(
        (pool.stats().idle_segments, pool.stats().idle_bytes),
        (1, MIB)
    );

    let theirs = pool.take(MIB, key(2), pool.budget()).expect("fits");
    assert_ne!(theirs.inode(), inode);
    let mut read = [1; 4];
    theirs.read_at(0, &mut read, &copied).expect("within");
    assert_eq!(read, [0; 4]);
    let bigger = pool.take(2 * MIB, key(1), pool.budget()).expect("fits");
    assert_ne!(bigger.inode(), inode);
    let again = pool.take(MIB - 100, key(1), pool.budget()).expect("idle");
    assert_eq!(again.inode(), inode);
    assert_eq!((pool.stats().recycled, pool.stats().created), (1, 3));

    again.never_recycle();
    drop(again);
    drop(theirs);
    drop(bigger);
    let stats = pool.stats();
    assert_eq!(
        (
            stats.segments,
            stats.idle_segments,
            stats.bytes,
            budget.used()
        ),
        (2, 2, 3 * MIB, 3 * MIB)
    );
    assert_ne!(
        pool.take(MIB, key(1), pool.budget()).expect("fits").inode(),
        inode
    );
    drop(pool);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_result_whose_pages_were_lost_is_not_recycled() {
    let pool = ResultPool::new(budget(), 10 * MIB);
    let lost = pool.take(MIB, key(1), pool.budget()).expect("fits");
    drop(lost.pages().take_parked());
    drop(lost);
    assert_eq!(pool.stats().segments, 0);

    let swapped = pool.take(MIB, key(1), pool.budget()).expect("fits");
    let other = pool.take(MIB, key(1), pool.budget()).expect("fits");
    drop(swapped.pages().take_parked());
    swapped
        .pages()
        .put_parked(other.pages().take_parked().expect("at home"));
    assert!(matches!(
        swapped.read_at(0, &mut [0], &Copied::new()),
        Err(MemoryError::Away { .. })
    ));
}

#[test]
fn a_result_whose_parts_do_not_come_home_in_order_is_lost() {
    let pool = ResultPool::new(budget(), 10 * MIB);
    let away = |result: &PoolSegment| {
        assert!(!result.pages().is_home());
        let read = result.read_at(0, &mut [0], &Copied::new());
        assert!(matches!(read, Err(MemoryError::Away { .. })));
    };
    let cuts = [GUEST_PAGE, 3 * GUEST_PAGE];
    type Change = fn(&mut Vec<ResultPages>);
    let changes: [Change; 3] = [
        |parts| parts.swap(0, 1),
        |parts| drop(parts.pop()),
        |parts| drop(parts[1].take_parked()),
    ];
    for change in changes {
        let result = pool.take(MIB, key(1), pool.budget()).expect("fits");
        let mut parts = result.pages().split(&cuts).expect("cut");
        assert_eq!(parts.len(), 3);
        away(&result);
        assert!(result.pages().split(&cuts).is_err());
        // A part is not the whole, nor another part.
        let parked = parts[2].take_parked().expect("at home");
        result.pages().put_parked(parked);
        away(&result);
        let other = pool.take(MIB, key(1), pool.budget()).expect("fits");
        let mut others = other.pages().split(&cuts).expect("cut");
        others[0].put_parked(others[1].take_parked().expect("at home"));
        assert_eq!(
            others.iter().map(ResultPages::is_home).collect::<Vec<_>>(),
            [true, false, true]
        );
        let third = pool.take(MIB, key(1), pool.budget()).expect("fits");
        let mut thirds = third.pages().split(&cuts).expect("cut");
        change(&mut thirds);
        assert!(third.pages().join(thirds).is_err());
        away(&third);
        parts.clear();
        others.clear();
        drop((result, other, third));
        assert_eq!(pool.stats().segments, 0);
    }
    let whole = pool.take(MIB, key(1), pool.budget()).expect("fits");
    for wrong in [0, 100, MIB, MIB + GUEST_PAGE] {
        assert!(whole.pages().split(&[wrong]).is_err(), "{wrong}");
    }
    assert!(whole.pages().split(&[GUEST_PAGE, GUEST_PAGE]).is_err());
    assert!(whole.pages().is_home());
    let parts = whole.pages().split(&cuts).expect("cut");
    whole.pages().join(parts).expect("in order");
    assert!(whole.pages().is_home());
}

#[test]
fn a_result_that_an_invocation_still_reads_is_not_recycled() {
    let (lot, pool) = (Lot::new(10, 1 << 30), ResultPool::new(budget(), 10 * MIB));
    let result = pool.take(MIB, key(1), pool.budget()).expect("fits");
    let input = result.park_as_input(&lot, GUEST_PAGE..MIB).expect("lent");
    assert_eq!(
        (input.access(), input.inode()),
        (Access::ReadOnly, result.inode())
    );
    drop(result);
    assert_eq!(pool.stats().idle_segments, 0);
    lot.give_back(input);
    assert_eq!(lot.stats().mappings, 0, "its segment is gone");

    let mut result = pool.take(MIB, key(1), pool.budget()).expect("fits");
    lot.give_back(result.park_as_input(&lot, 0..MIB).expect("lent"));
    let inode = result.inode();
    drop(result);
    result = pool.take(MIB, key(1), pool.budget()).expect("idle");
    assert_eq!(result.inode(), inode);
    result
        .pages()
        .write_at(7, b"n", &Copied::new())
        .expect("within");
    // The idle input mapping shows what is there now.
    let input = result.park_as_input(&lot, 0..MIB).expect("idle");
    assert_eq!(lot.stats().reused, 1);
    let space = guest(MIB);
    let window = window(input, 0..MIB, &space, 0);
    // SAFETY: the window is in its guest.
    assert_eq!(unsafe { peek(window.address() + 7) }, b'n');
}

#[test]
fn idle_results_make_room() {
    let budget = Budget::new("segment bytes", 8 * MIB);
    let pool = ResultPool::new(Arc::clone(&budget), 3 * MIB);
    for bytes in [MIB, 2 * MIB, 2 * MIB] {
        // Each of another owner, so that none is used again.
        drop(
            pool.take(bytes, key(bytes + pool.stats().created), pool.budget())
                .expect("fits"),
        );
    }
    assert_eq!((pool.stats().idle_bytes, budget.used()), (2 * MIB, 2 * MIB));
    let segment =
        Segment::<strait_memory::Open>::create(7 * MIB, &budget).expect("the idle one goes");
    assert_eq!((pool.stats().segments, budget.used()), (0, 7 * MIB));
    let error = pool
        .take(2 * MIB, key(1), pool.budget())
        .expect_err("9 MiB of 8");
    assert!(matches!(error, MemoryError::Budget(_)), "{error}");
    drop(segment);
    pool.take(8 * MIB, key(1), pool.budget()).expect("fits");
}

#[test]
fn a_sealable_result_is_sealed_for_good() {
    let pool = ResultPool::new(budget(), 10 * MIB);
    let lot = Lot::new(10, 1 << 30);
    let mut result = pool.take_sealable(MIB, pool.budget()).expect("fits");
    assert!(matches!(
        result.readonly_fd(),
        Err(MemoryError::MissingSeals { .. })
    ));
    assert!(matches!(
        result.park_as_input(&lot, 0..MIB),
        Err(MemoryError::MissingSeals { .. })
    ));
    let space = guest(4 * MIB);
    let window = window(
        result.pages().take_parked().expect("at home"),
        0..MIB,
        &space,
        0,
    );
    // SAFETY: the window is writable.
    unsafe { poke(window.address() + 3, 42) };
    let refused = result.seal().expect_err("its pages are in a guest");
    assert!(
        matches!(refused.error, MemoryError::StillWritable { .. }),
        "{refused}"
    );
    result = refused.segment;
    result
        .pages()
        .put_parked(window.move_home().expect("covered"));
    let sealed = result.seal().expect("at home");
    assert_eq!(sealed.map().expect("sealed")[..5], [0, 0, 0, 42, 0]);
    assert_eq!(pool.stats().segments, 0, "it is not the pool's any more");

    let lent = pool.take(MIB, key(1), pool.budget()).expect("fits");
    let refused = lent.seal().expect_err("lent for good");
    assert!(matches!(refused.error, MemoryError::SealsLocked { .. }));
    drop(refused);
    assert_eq!(pool.stats().idle_segments, 1);
}

#[test]
fn a_full_quota_frees_its_own_idle_results_and_nobody_elses() {
    let host = Budget::for_segments(8 * MIB, 8);
    let pool = ResultPool::new(Arc::clone(&host), u64::MAX);
    let mine = host.child_for_segments(&"uid:1000".into(), 4 * MIB, 8);
    let theirs = host.child_for_segments(&"uid:1001".into(), 8 * MIB, 8);
    drop(pool.take(MIB, key(2), &theirs).expect("fits"));
    drop(pool.take(3 * MIB, key(1), &mine).expect("fits"));
    assert_eq!(
        (mine.used(), theirs.used(), host.used()),
        (3 * MIB, MIB, 4 * MIB)
    );
    let result = pool.take(2 * MIB, key(1), &mine).expect("room is made");
    assert_eq!(
        (mine.used(), theirs.used(), host.used()),
        (2 * MIB, MIB, 3 * MIB)
    );
    let error = pool.take(3 * MIB, key(1), &mine).expect_err("5 MiB of 4");
    assert!(
        matches!(&error, MemoryError::Budget(exceeded) if exceeded.is_quota()),
        "{error}"
    );
    assert_eq!(theirs.used(), MIB, "it was not asked");
    // The host's own budget full: anybody's.
    drop(result);
    let all = pool.take(7 * MIB, key(2), &theirs).expect("room is made");
    assert_eq!((mine.used(), theirs.used()), (0, 7 * MIB));
    // A key of an account that is gone finds nothing of it.
    drop(all);
    let again = host.child_for_segments(&"uid:1001".into(), 8 * MIB, 8);
    pool.take(7 * MIB, key(2), &again).expect("room is made");
    assert_eq!((theirs.used(), pool.stats().recycled), (0, 0));
}

/// A process that says when it lets go.
#[derive(Debug)]
struct Elsewhere(u64, Arc<AtomicU64>);

impl Filler for Elsewhere {
    fn process(&self) -> u64 {
        self.0
    }

    fn is_there(&self) -> bool {
        true
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn another_process_fills_a_result_and_then_nobody_else_can() {
    let (budget, copied) = (budget(), Copied::new());
    let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
    let let_go = Arc::new(AtomicU64::new(0));
    let take = |process, key| {
        pool.take_for(process, MIB, key, pool.budget())
            .expect("fits")
    };
    let mut result = take(7, Some(key(1)));
    assert!(result.is_unlent() && !result.is_sealable());
    assert!(result.readonly_fd().is_err(), "it can still be written");
    // The other process, played by this one.
    let counted = Budget::new("mapped", u64::MAX);
    let received = |fd: &OwnedFd| {
        let fd = fd.try_clone().expect("a descriptor");
        let place = counted.try_reserve(1).expect("unlimited");
        ResultPages::received(fd, (MIB, MIB), place, &counted, &HugeBirths::new()).expect("mapped")
    };
    let fd = result.new_fd().expect("it is new");
    let pages = received(&fd);
    assert_eq!(pages.inode(), result.inode());
    pages.write_at(3, b"there", &copied).expect("within");
    result
        .lend_to(Box::new(Elsewhere(7, Arc::clone(&let_go))))
        .expect("lent");
    assert!(
        rustix::io::pwrite(&fd, b"x", 0).is_err(),
        "by no descriptor"
    );
    pages
        .write_at(3, b"again", &copied)
        .expect("by the mapping that was there");
    let mut read = [0; 5];
    result.read_at(3, &mut read, &copied).expect("within");
    assert_eq!(&read, b"again");
    let seals = rustix::fs::fcntl_get_seals(result.readonly_fd().expect("lent")).expect("a memfd");
    let (lent, locked) = (SealFlags::FUTURE_WRITE, SealFlags::SEAL);
    assert!(seals.contains(lent) && !seals.contains(locked), "{seals:?}");
    assert!(
        result
            .lend_to(Box::new(Elsewhere(7, Arc::clone(&let_go))))
            .is_err()
    );
    assert_eq!(let_go.load(Ordering::Relaxed), 1, "the second one only");

    // It waits for the same process, key and capacity.
    let inode = result.inode();
    drop(result);
    assert_eq!(pool.stats().idle_segments, 1);
    for other in [take(8, Some(key(1))), take(7, Some(key(2))), take(7, None)] {
        assert!(other.inode() != inode && other.new_fd().is_some());
    }
    let mut here = pool.take(MIB, key(1), pool.budget()).expect("fits");
    assert_ne!(here.inode(), inode);
    let again = take(7, Some(key(1)));
    assert!(again.inode() == inode && again.new_fd().is_none());
    again.never_recycle();
    drop(again);
    assert_eq!(
        let_go.load(Ordering::Relaxed),
        2,
        "before its memory is free"
    );

    // And it does not wait for one that is gone.
    let mut lost = take(9, Some(key(1)));
    lost.lend_to(Box::new(Elsewhere(9, Arc::clone(&let_go))))
        .expect("lent");
    drop(lost);
    pool.forget(7);
    assert_eq!(pool.stats().idle_segments, 1);
    pool.forget(9);
    assert_eq!(
        (pool.stats().idle_segments, let_go.load(Ordering::Relaxed)),
        (0, 3)
    );

    // One that is to be sealed is so once nobody has it mapped.
    let sealable = take(7, None);
    let pages = received(&sealable.new_fd().expect("it is new"));
    let refused = sealable.seal().expect_err("it is mapped");
    assert!(matches!(refused.error, MemoryError::StillWritable { .. }));
    drop(pages);
    refused.segment.seal().expect("by nobody");
    assert!(here.ending().is_none() && !here.is_filled_elsewhere());
}

#[test]
fn a_result_that_another_process_filled_is_sealed_once_that_has_let_go() {
    let (budget, copied) = (budget(), Copied::new());
    let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
    let let_go = Arc::new(AtomicU64::new(0));
    let counted = Budget::new("mapped", u64::MAX);
    let filled = || {
        let mut result = pool
            .take_for(7, MIB, Some(key(1)), pool.budget())
            .expect("fits");
        let fd = result.new_fd().expect("it is new");
        let fd = fd.try_clone().expect("a descriptor");
        let place = counted.try_reserve(1).expect("unlimited");
        let births = HugeBirths::new();
        let pages = ResultPages::received(fd, (MIB, MIB), place, &counted, &births);
        let pages = pages.expect("mapped");
        pages.write_at(3, b"there", &copied).expect("within");
        let filler = Elsewhere(7, Arc::clone(&let_go));
        result.lend_to(Box::new(filler)).expect("lent");
        (result, pages)
    };
    let read = |result: &PoolSegment| {
        let mut read = [0; 5];
        result.read_at(3, &mut read, &copied).expect("within");
        read
    };
    // One that says that it has let go, and has not.
    let (mut result, pages) = filled();
    let refused = result.ending().expect("filled elsewhere").end();
    assert!(
        matches!(refused, Err(MemoryError::KeptWritable { inode }) if inode == result.inode()),
        "{refused:?}"
    );
    assert_eq!(let_go.load(Ordering::Relaxed), 1);
    assert_eq!(&read(&result), b"there");
    let refused = result.seal().expect_err("it is mapped");
    assert!(matches!(refused.error, MemoryError::StillWritable { .. }));
    result = refused.segment;
    assert!(result.is_filled_elsewhere());
    drop(pages);
    // Then it has.
    result.ending().expect("again").end().expect("by nobody");
    let sealed = result.seal().expect("by nobody");
    assert_eq!(sealed.map().expect("sealed")[3..8], *b"there");
    let stats = pool.stats();
    assert_eq!((stats.segments, stats.idle_segments), (0, 0));
    assert_eq!(budget.used(), MIB, "as long as it is there");
    drop(sealed);
    // One whose end nobody brings about is not filled again, either.
    let (mut result, pages) = filled();
    drop(result.ending());
    assert_eq!(let_go.load(Ordering::Relaxed), 2);
    assert_eq!(&read(&result), b"there");
    drop((result, pages));
    assert_eq!(pool.stats().idle_segments, 0);
}

#[test]
fn who_reads_a_result_can_add_no_seals_but_its_own_user() {
    let pool = ResultPool::new(budget(), 1 << 30);
    let mut result = pool
        .take_for(7, MIB, Some(key(1)), pool.budget())
        .expect("fits");
    let filler = Elsewhere(7, Arc::default());
    result.lend_to(Box::new(filler)).expect("lent");
    let fd = result.readonly_fd().expect("lent");
    assert!(fcntl_add_seals(&fd, SealFlags::SEAL).is_err(), "it reads");
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mode = metadata(&path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o444, "for nobody to open for writing");
    // Its user may change that, and then forbid further seals: so nobody gets to see it.
    set_permissions(&path, Permissions::from_mode(0o600)).expect("its user");
    let writer = OpenOptions::new().write(true).open(&path);
    fcntl_add_seals(writer.expect("its user"), SealFlags::SEAL).expect("none has it yet");
    let refused = result.ending().expect("filled elsewhere").end();
    assert!(
        matches!(refused, Err(MemoryError::SealsLocked { .. })),
        "{refused:?}"
    );
}

#[test]
fn what_is_received_has_the_size_that_was_told() {
    let counted = Budget::new("mapped", u64::MAX);
    let pool = ResultPool::new(budget(), 1 << 30);
    let result = pool.take_for(1, MIB, None, pool.budget()).expect("fits");
    let fd = || {
        result
            .new_fd()
            .expect("new")
            .try_clone()
            .expect("a descriptor")
    };
    for bytes in [0, MIB - 4096, MIB + 4096, u64::MAX] {
        let place = counted.try_reserve(1).expect("unlimited");
        let births = HugeBirths::new();
        assert!(ResultPages::received(fd(), (bytes, bytes), place, &counted, &births).is_err());
        assert!(Segment::<Lent<Host>>::received(fd(), bytes, &counted).is_err());
    }
    let segment = Segment::<Lent<Host>>::received(fd(), MIB, &counted).expect("right");
    assert_eq!((segment.inode(), segment.bytes()), (result.inode(), MIB));
    drop(segment);
    assert_eq!(counted.used(), 0);
}
