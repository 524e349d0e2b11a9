//! A thousand rounds of everything leave nothing behind.

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::SealFlags;
use strait_memory::{
    Adopted, Copied, FrameSocket, GUEST_PAGE, GuestSpaces, Lot, ReadMapping, ResultPool, Scrap,
    Segment, WriteMapping, adopt, process,
};

// One test in this file, since it counts what the whole process holds.
#[test]
fn a_thousand_rounds_leave_nothing_behind() {
    let (budget, copied) = (common::budget(), Copied::new());
    let lot = Lot::new(8, 8 * GUEST_PAGE);
    let pool = ResultPool::new(Arc::clone(&budget), 8 * GUEST_PAGE);
    let spaces = GuestSpaces::new(2);
    let (one, other) = FrameSocket::pair().expect("descriptors are left");
    let mut before = None;
    for round in 0..1_000 {
        // What grows once (an allocator's memory, idle stores) has grown by then.
        if round == 100 {
            before = Some((
                process::counts().expect("/proc is there"),
                common::reserved_bytes(),
            ));
        }
        let bytes = (1 + round % 3) * GUEST_PAGE;
        let segment = Segment::create(bytes, &budget).expect("fits");
        let mut client = WriteMapping::new(segment.client_fd(), 100).expect("open");
        client.bytes_mut()[0] = 1;
        let lent = segment.lend_to_client().expect("no seals");
        let lent = lent.seal().expect_err("mapped").segment;
        let fd = lent.readonly_fd().expect("fd");
        drop(client.replace_readonly(&fd).expect("the same"));
        let sealed = lent.seal().expect("read-only mappings only");
        assert_eq!(sealed.map().expect("sealed")[0], 1);

        one.send(&[b"x"], &[fd.as_fd(), fd.as_fd()]).expect("room");
        drop(other.recv(&mut [0; 8]).expect("a frame"));
        drop(one.peer().expect("a unix socket"));
        let foreign = common::memfd(bytes);
        common::fill(&foreign, 0, &common::pattern(1, bytes));
        common::seal_all(
            &foreign,
            SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW,
        );
        let Adopted::Sealed(foreign) =
            adopt(foreign, std::slice::from_ref(&(0..bytes)), &budget).expect("good")
        else {
            panic!("it has F_SEAL_WRITE");
        };
        assert!(adopt(common::memfd(bytes), &[], &budget).is_err());

        let space = spaces.take(1 << 32).expect("address space");
        space.make_accessible(0, 1 << 21).expect("within");
        let result = pool
            .take(bytes, common::key(round % 2), pool.budget())
            .expect("fits");
        let place = |page: usize| space.base() + page * 65_536;
        let output = result.pages().take_parked().expect("at home");
        let output = output
            .move_into(0..GUEST_PAGE, &space, place(10))
            .expect("room");
        let input = lot.take_input(&foreign, 0..bytes).expect("room");
        let input = input
            .move_into(0..GUEST_PAGE, &space, place(20))
            .expect("room");
        let dropped = lot.take_input(&sealed, 0..bytes).expect("room");
        let dropped = dropped
            .move_into(0..GUEST_PAGE, &space, place(25))
            .expect("room");
        let refused = lot.take_input(&sealed, 0..bytes).expect("room");
        let refused = refused
            .move_into(0..GUEST_PAGE, &space, place(25))
            .expect_err("taken");
        drop(dropped);
        if round % 5 == 0 {
            // SAFETY: the window is in its guest.
            assert!(unsafe { input.fault_range().divert_in_signal(&Scrap::new()) });
        }
        if round % 7 == 0 {
            space.poison();
        }
        lot.give_back(input.move_home().expect("covered"));
        lot.give_back(refused.parked);
        result
            .pages()
            .put_parked(output.move_home().expect("covered"));
        result.pages().write_at(0, b"y", &copied).expect("at home");
        let consumer = result.readonly_fd().expect("lent");
        drop(ReadMapping::of_result(consumer, 100).expect("lent"));
        if round % 3 == 0 {
            result.never_recycle();
        }
        let sealable = pool.take_sealable(bytes, pool.budget()).expect("fits");
        drop(sealable.seal().expect("at home"));
    }
    let (before, reserved) = before.expect("round 100 came");
    let after = process::counts().expect("/proc is there");
    assert_eq!(after.fds, before.fds);
    assert_eq!(after.threads, before.threads);
    // An allocator maps a little by itself (a sanitizer's more); one in each round would be 900.
    assert!(
        after.mappings < before.mappings + 100,
        "{before:?} {after:?}"
    );
    // Ranges without access merge, so that their count would not tell.
    assert!(common::reserved_bytes() < reserved + 16 * GUEST_PAGE);
    let idle = pool.stats().idle_bytes;
    assert_eq!(budget.used(), idle);
    assert_eq!(
        lot.stats().mappings,
        0,
        "all segments of the rounds are gone"
    );
    assert_eq!(common::segment_bytes_mapped(), idle);
    drop((pool, lot, spaces));
    assert_eq!(
        (
            budget.used(),
            common::segment_bytes_mapped(),
            common::segment_fds()
        ),
        (0, 0, 0)
    );
}
