//! Parking and moving, one rule at a time.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use common::{
    GUEST_BYTES, MIB, budget, guest, key, pattern, peek, peek_all, poke, sealed, to_usize, window,
};
use strait_memory::{
    Access, FaultRange, GUEST_PAGE, GuestSpaces, HUGE, Lot, ParkError, ResultPool, Scrap, Segment,
    process,
};

#[test]
fn an_input_is_the_same_pages_in_the_guest() {
    let (budget, lot) = (budget(), Lot::new(10, 1 << 30));
    let segment = sealed(&budget, 1, 8 * MIB);
    let parked = lot.take_input(&segment, 2 * MIB..6 * MIB).expect("room");
    assert_eq!((parked.bytes(), parked.file_offset()), (4 * MIB, 2 * MIB));
    assert_eq!(parked.address() as u64 % HUGE, 0);
    assert_eq!(parked.access(), Access::ReadOnly);
    let home = parked.address();
    let space = guest(16 * MIB);
    let window = window(parked, MIB..3 * MIB, &space, 5 * MIB);
    assert_eq!(
        (window.address(), window.bytes()),
        (space.base() + (5 << 20), 2 * MIB)
    );
    let seen = process::inode_at(window.address() + 12_345).expect("/proc");
    assert_eq!(seen, Some((segment.inode(), 3 * MIB + 12_345)));
    let expected = &pattern(1, 8 * MIB)[3 << 20..5 << 20];
    // SAFETY: the window is in the guest, readable.
    assert!(unsafe { peek_all(window.address(), 2 << 20) } == expected);
    // Nothing at home while it is away, and the rest still there.
    assert_eq!(process::inode_at(home + (1 << 20)).expect("/proc"), None);
    assert!(process::inode_at(home).expect("/proc").is_some());

    let parked = window.move_home().expect("covered");
    assert_eq!(parked.address(), home);
    assert_eq!(
        process::inode_at(home + (1 << 20)).expect("/proc"),
        Some((segment.inode(), 3 * MIB))
    );
    assert_eq!(
        process::inode_at(space.base() + (5 << 20)).expect("/proc"),
        None
    );
    // SAFETY: the guest's memory is covered read-write.
    let seen = unsafe { peek_all(space.base() + (5 << 20), 2 << 20) };
    assert!(seen.iter().all(|byte| *byte == 0));
    // SAFETY: the same, and nobody has references into it.
    unsafe { poke(space.base() + (6 << 20), 1) };
    lot.give_back(parked);
    let again = lot.take_input(&segment, 2 * MIB..6 * MIB).expect("idle");
    assert_eq!(
        (again.address(), lot.stats().reused, lot.stats().mapped),
        (home, 1, 1)
    );
}

#[test]
fn an_input_can_be_parked_twice_and_goes_with_its_segment() {
    let (budget, lot) = (budget(), Lot::new(10, 1 << 30));
    let segment = sealed(&budget, 1, MIB);
    let one = lot.take_input(&segment, 0..MIB).expect("room");
    let two = lot.take_input(&segment, 0..MIB).expect("room");
    assert_ne!(one.address(), two.address());
    let half = lot.take_input(&segment, 0..MIB / 2).expect("room");
    lot.give_back(one);
    lot.give_back(half);
    assert_eq!(
        (lot.stats().idle_mappings, lot.stats().idle_bytes),
        (2, 3 * MIB / 2)
    );
    drop(segment);
    assert_eq!((lot.stats().idle_mappings, lot.stats().mappings), (0, 1));
    // The one in use keeps the bytes, and is not kept when it comes back.
    assert_eq!(budget.used(), MIB);
    lot.give_back(two);
    assert_eq!((lot.stats().mappings, budget.used()), (0, 0));
}

#[test]
fn a_lot_is_bounded_by_count_and_bytes() {
    let (budget, lot) = (budget(), Lot::new(3, 5 * MIB));
    let segments: Vec<_> = (0..4).map(|seed| sealed(&budget, seed, 2 * MIB)).collect();
    let park = |index: usize| lot.take_input(&segments[index], 0..2 * MIB);
    let three: Vec<_> = (0..3).map(|index| park(index).expect("room")).collect();
    let error = park(3).expect_err("a fourth");
    assert!(
        matches!(&error, ParkError::TooMany(exceeded) if exceeded.limit == 3),
        "{error}"
    );
    three.into_iter().for_each(|parked| lot.give_back(parked));
    // 6 MiB came, 5 may stay: the oldest went.
    assert_eq!(
        (lot.stats().idle_mappings, lot.stats().idle_bytes),
        (2, 4 * MIB)
    );
    let _first = park(0).expect("room");
    assert_eq!(lot.stats().reused, 0);
    let _second = park(3).expect("an idle one makes room");
    assert_eq!((lot.stats().mappings, lot.stats().idle_mappings), (3, 1));
    let _third = park(2).expect("idle");
    assert_eq!(lot.stats().reused, 1);
    lot.forget(segments[1].inode());
    assert!(matches!(park(1), Err(ParkError::TooMany(_))));
}

#[test]
fn what_is_not_whole_guest_pages_is_refused() {
    let (budget, lot) = (budget(), Lot::new(3, 5 * MIB));
    let segment = sealed(&budget, 1, MIB);
    for range in [
        1..MIB,
        0..MIB - 4096,
        0..MIB + GUEST_PAGE,
        MIB..MIB,
        0..u64::MAX,
    ] {
        let error = lot
            .take_input(&segment, range.clone())
            .expect_err("not pages");
        assert!(
            matches!(error, ParkError::NotGuestPages { .. }),
            "{range:?}: {error}"
        );
    }
    let space = guest(MIB);
    for part in [0..1, 4096..GUEST_PAGE, 0..2 * MIB, 0..0] {
        let parked = lot.take_input(&segment, 0..MIB).expect("room");
        let refused = parked
            .move_into(part, &space, space.base())
            .expect_err("not pages");
        assert!(
            matches!(refused.error, ParkError::NotGuestPages { .. }),
            "{refused}"
        );
        lot.give_back(refused.parked);
    }
    assert_eq!(lot.stats().mapped, 1, "each came back");
}

#[test]
fn windows_stay_in_accessible_memory_and_do_not_meet() {
    let (budget, lot) = (budget(), Lot::new(30, 5 * MIB));
    let segment = sealed(&budget, 1, MIB);
    let park = || lot.take_input(&segment, 0..MIB).expect("room");
    let space = guest(4 * MIB);
    let base = space.base();
    for at in [
        base + (3 << 20) + 4096,
        base - 4096,
        base + 1,
        0,
        usize::MAX - 4095,
        base + (4 << 20),
    ] {
        let refused = park().move_into(0..MIB, &space, at).expect_err("outside");
        assert!(
            matches!(refused.error, ParkError::OutsideGuest { .. }),
            "{refused}"
        );
    }
    let _window = window(park(), 0..MIB, &space, MIB);
    for offset in [GUEST_PAGE, MIB, 2 * MIB - GUEST_PAGE] {
        let refused = park()
            .move_into(0..MIB, &space, base + to_usize(offset))
            .expect_err("taken");
        assert!(
            matches!(refused.error, ParkError::Occupied { other_at, .. } if other_at == base + (1 << 20))
        );
    }
    let error = space
        .make_accessible(1 << 20, 2 << 20)
        .expect_err("a window is there");
    assert!(matches!(error, ParkError::Occupied { .. }), "{error}");
    space
        .make_accessible(4 << 20, 5 << 20)
        .expect("growing beside a window");
    for (from, to) in [(0, GUEST_BYTES + 4096), (1, 4096), (8192, 4096)] {
        assert!(matches!(
            space.make_accessible(from, to),
            Err(ParkError::OutsideGuest { .. })
        ));
    }
    assert!(!space.is_poisoned());
    space.poison();
    let refused = park()
        .move_into(0..MIB, &space, base)
        .expect_err("poisoned");
    assert!(matches!(refused.error, ParkError::Poisoned { .. }));
}

#[test]
fn a_reservation_is_reused_without_a_trace() {
    let (budget, lot) = (budget(), Lot::new(30, 1 << 30));
    let segment = sealed(&budget, 1, MIB);
    let spaces = GuestSpaces::new(1);
    let space = spaces.take(GUEST_BYTES).expect("address space");
    let base = space.base();
    space.make_accessible(0, 4 << 20).expect("within");
    // SAFETY: just made accessible.
    unsafe { poke(base + 5, 77) };
    let window = window(
        lot.take_input(&segment, 0..MIB).expect("room"),
        0..MIB,
        &space,
        MIB,
    );
    // The memory goes before its window does.
    drop(space);
    assert_eq!(spaces.idle(), 0);
    drop(window);
    assert_eq!((spaces.idle(), lot.stats().mappings), (1, 0));
    assert!(
        spaces
            .take(GUEST_BYTES / 2)
            .is_ok_and(|other| other.base() != base)
    );

    let again = spaces.take(GUEST_BYTES).expect("idle");
    assert_eq!(again.base(), base);
    assert!(again.make_accessible(0, 2 << 20).is_ok());
    // SAFETY: just made accessible.
    let seen = unsafe { peek_all(base, 2 << 20) };
    assert!(seen.iter().all(|byte| *byte == 0));
    let second = spaces.take(GUEST_BYTES).expect("address space");
    again.poison();
    drop(again);
    assert_eq!(spaces.idle(), 0, "a poisoned one is not kept");
    drop(second);
    assert_eq!(spaces.idle(), 1);
}

#[test]
fn a_dirty_input_never_comes_back() {
    let (budget, lot) = (budget(), Lot::new(30, 1 << 30));
    let segment = sealed(&budget, 9, MIB);
    let space = guest(4 * MIB);
    let window = window(
        lot.take_input(&segment, 0..MIB).expect("room"),
        0..MIB,
        &space,
        MIB,
    );
    let range = window.fault_range();
    assert!(range.contains(window.address()) && !range.contains(range.end) && range.read_only);
    let last = range.end - 1;
    let original = pattern(9, MIB);
    let scrap = Scrap::new();
    assert_eq!(scrap.dirtied_bytes(), 0);
    // SAFETY: the window is in its guest.
    assert!(unsafe { range.divert_in_signal(&scrap) });
    // SAFETY: the window shows scrap, which is writable.
    unsafe { poke(last, !original[original.len() - 1]) };
    // SAFETY: as above.
    assert_eq!(unsafe { peek(range.start) }, 0);
    assert!(window.is_dirty());
    assert_eq!(
        scrap.dirtied_bytes(),
        8192,
        "the pages looked at and written"
    );
    // Faulting again although writable: the pages are replaced, then there is no way on.
    // SAFETY: the window is in its guest.
    assert!(unsafe { range.divert_in_signal(&scrap) });
    // SAFETY: the window's pages are zero pages now.
    assert_eq!(unsafe { peek(last) }, 0);
    // SAFETY: the window is in its guest.
    assert!(!unsafe { range.divert_in_signal(&scrap) });

    let parked = window.move_home().expect("covered");
    assert!(parked.is_spent());
    let refused = parked
        .move_into(0..MIB, &space, space.base())
        .expect_err("spent");
    assert!(matches!(refused.error, ParkError::Spent { .. }));
    lot.give_back(refused.parked);
    assert_eq!((lot.stats().idle_mappings, lot.stats().mappings), (0, 0));
    assert!(*segment.map().expect("sealed") == *original);
    let parked = lot.take_input(&segment, 0..MIB).expect("room");
    let fresh = parked
        .move_into(0..MIB, &space, space.base())
        .expect("room");
    // SAFETY: the window is in its guest.
    assert!(unsafe { peek_all(fresh.address(), 1 << 20) } == original);
    fresh.set_dirty();
    assert!(fresh.move_home().expect("covered").is_spent());
}

static SCRAP: Scrap = Scrap::new();
static RANGE: OnceLock<FaultRange> = OnceLock::new();
static FAULTS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_fault(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the operating system hands a valid record to a SA_SIGINFO handler.
    let record = unsafe { &*info };
    // SAFETY: this is how the address of a SIGSEGV is stored.
    let address = unsafe { record.si_addr() }.addr();
    let range = RANGE.get().filter(|range| range.contains(address));
    // SAFETY: the test keeps the window in its guest while the handler is installed.
    let handled = range.is_some_and(|range| unsafe { range.divert_in_signal(&SCRAP) });
    FAULTS.fetch_add(1, Ordering::Relaxed);
    if !handled {
        // SAFETY: ends the process, which is what an unexpected fault must do.
        unsafe { libc::_exit(99) };
    }
}

#[test]
fn a_real_fault_is_survived_once_for_a_window() {
    // In a process of its own, since a handler is the process's.
    const NAME: &str = "a_real_fault_is_survived_once_for_a_window";
    if std::env::var_os("STRAIT_FAULT").is_none() {
        let status = std::process::Command::new(std::env::current_exe().expect("ours"))
            .args(["--exact", NAME, "--nocapture"])
            .env("STRAIT_FAULT", "1")
            .status()
            .expect("it runs");
        assert!(status.success(), "{status}");
        return;
    }
    let lot = Lot::new(30, 1 << 30);
    let segment = sealed(&budget(), 4, MIB);
    let space = guest(4 * MIB);
    let window = window(
        lot.take_input(&segment, 0..MIB).expect("room"),
        0..MIB,
        &space,
        MIB,
    );
    RANGE.set(window.fault_range()).expect("once");
    // SAFETY: all zeros is a `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_fault as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the record lives over the call, and the handler is async-signal-safe.
    let installed =
        unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) };
    assert_eq!(installed, 0);
    for offset in [0, 5_000, 1_000_000] {
        // SAFETY: the handler makes it writable.
        unsafe { poke(window.address() + offset, 0xee) };
        // SAFETY: the window is in its guest.
        assert_eq!(unsafe { peek(window.address() + offset) }, 0xee);
    }
    assert_eq!(FAULTS.load(Ordering::Relaxed), 1);
    assert!(window.is_dirty());
    assert!(window.move_home().expect("covered").is_spent());
    assert!(*segment.map().expect("sealed") == *pattern(4, MIB));
}

#[test]
fn a_parked_input_does_not_hinder_sealing() {
    let lot = Lot::new(10, 1 << 30);
    let segment = Segment::create(MIB, &budget()).expect("fits");
    let lent = segment.lend_to_client().expect("no seals yet");
    let space = guest(4 * MIB);
    let idle = lot.take_input(&lent, 0..MIB).expect("room");
    let used = lot.take_input(&lent, 0..MIB).expect("room");
    lot.give_back(idle);
    let window = window(used, 0..MIB, &space, 0);
    let sealed = lent.seal().expect("private mappings only");
    assert_eq!(window.inode(), sealed.inode());
    lot.give_back(window.move_home().expect("covered"));
    assert_eq!(lot.stats().idle_mappings, 2);
}

#[test]
fn warm_calls_take_no_page_faults() {
    let (budget, lot) = (budget(), Lot::new(10, 1 << 30));
    let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
    let bytes = 64 * MIB;
    let segment = sealed(&budget, 1, bytes);
    let spaces = GuestSpaces::new(1);
    let mut faults = 0;
    for _ in 0..3 {
        let result = pool.take(bytes, key(1), pool.budget()).expect("fits");
        let before = common::thread_faults();
        let space = spaces.take(GUEST_BYTES).expect("address space");
        space.make_accessible(0, 256 << 20).expect("within");
        let input = lot.take_input(&segment, 0..bytes).expect("room");
        let input = window(input, 0..bytes, &space, 2 * MIB);
        let output = window(
            result.pages().take_parked().expect("at home"),
            0..bytes,
            &space,
            128 * MIB,
        );
        for offset in (0..to_usize(bytes)).step_by(4096) {
            // SAFETY: the window is in its guest.
            let byte = unsafe { peek(input.address() + offset) };
            // SAFETY: the window is in its guest, writable.
            unsafe { poke(output.address() + offset, byte) };
        }
        lot.give_back(input.move_home().expect("covered"));
        result
            .pages()
            .put_parked(output.move_home().expect("covered"));
        faults = common::thread_faults() - before;
    }
    // Mapped anew it would be over 17 000.
    assert!(faults < 64, "{faults} page faults in a warm call");
}
