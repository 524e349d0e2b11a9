//! Segments, adoption and client mappings against a real operating system.

#![expect(
    clippy::single_range_in_vec_init,
    reason = "a list with one range in it is what is meant"
)]

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::{budget, fill, key, memfd, pattern, pwrite, seal_all, shared_mapping};
use rustix::fs::SealFlags;
use strait_memory::{
    AdoptError, Adopted, Budget, Copied, GUEST_PAGE, Growing, HugeBirths, MappingError,
    MemoryError, Open, PAGE, ReadMapping, ResultPool, Segment, SharedMapping, WriteMapping, adopt,
};

const MIB: u64 = 1 << 20;

#[test]
fn an_open_segment_copies_and_counts() {
    let (budget, copied) = (budget(), Copied::new());
    let segment = Segment::<Open>::create(PAGE + 1, &budget).expect("fits");
    assert_eq!(segment.bytes(), 2 * PAGE);
    assert_eq!(budget.used(), 2 * PAGE);
    segment
        .write_at(PAGE - 2, &[1, 2, 3, 4], &copied)
        .expect("within");
    let mut read = [0; 6];
    segment
        .read_at(PAGE - 3, &mut read, &copied)
        .expect("within");
    assert_eq!(read, [0, 1, 2, 3, 4, 0]);
    assert_eq!(copied.get(), 10);
    let inode = segment.inode();
    let error = segment
        .write_at(2 * PAGE - 1, &[1, 2], &copied)
        .expect_err("one too many");
    assert_eq!(
        error.to_string(),
        format!("bytes 8191 to 8193 are not within segment {inode} of 8192 bytes")
    );
    assert!(segment.read_at(u64::MAX, &mut read, &copied).is_err());
    assert_eq!(copied.get(), 10);
    drop(segment);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_segment_that_does_not_fit_names_the_numbers() {
    let budget = Budget::new("segment bytes", 10 * PAGE);
    let _taken = Segment::<Open>::create(8 * PAGE, &budget).expect("fits");
    let error = Segment::<Open>::create(3 * PAGE, &budget).expect_err("11 pages of 10");
    assert!(matches!(&error, MemoryError::Budget(exceeded) if exceeded.requested == 3 * PAGE));
    assert!(
        error
            .to_string()
            .starts_with("segment bytes: 12288 more would exceed the budget of 40960 by 4096")
    );
    assert!(Segment::<Open>::create(u64::MAX, &budget).is_err());
    assert_eq!(budget.used(), 8 * PAGE);
}

#[test]
fn sealing_ends_all_writing() {
    let (budget, copied) = (budget(), Copied::new());
    let segment = Segment::create(MIB, &budget).expect("fits");
    let bytes = pattern(1, MIB);
    segment.write_at(0, &bytes, &copied).expect("within");
    let client = segment.client_fd();
    let sealed = segment.seal().expect("nobody has it mapped");
    assert!(pwrite(&client, b"x", 0).is_err());
    assert!(shared_mapping(&client, MIB, true).is_err());
    let seals = sealed.seals().expect("a memfd");
    assert!(seals.no_writes() && seals.no_shrinking() && seals.no_growing());
    let mapped = sealed.map().expect("sealed");
    assert!(*mapped == *bytes);
    // The mapping outlives the segment, and its bytes stay charged.
    drop(sealed);
    assert_eq!(budget.used(), MIB);
    assert!(*mapped == *bytes);
    drop(mapped);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_segment_that_is_mapped_writable_comes_back_unsealed() {
    let segment = Segment::create(MIB, &budget()).expect("fits");
    let mut client = WriteMapping::new(segment.client_fd(), 1 << 20).expect("writable");
    client.bytes_mut()[7] = 7;
    let refused = segment.seal().expect_err("still mapped");
    assert!(
        matches!(refused.error, MemoryError::StillWritable { inode } if inode == client.inode())
    );
    let segment = refused.segment;
    // The client replaces its mapping in place, even by a descriptor that can write.
    let (address, fd) = (client.address(), segment.client_fd());
    let client = client.replace_readonly(fd).expect("the same segment");
    assert_eq!((client.address(), client.bytes()[7]), (address, 7));
    let sealed = segment.seal().expect("mapped read-only");
    assert_eq!(sealed.map().expect("sealed")[7], 7);
    assert_eq!(client.bytes()[7], 7);
}

#[test]
fn a_lent_segment_has_one_writer() {
    let copied = Copied::new();
    let segment = Segment::create(MIB, &budget()).expect("fits");
    let fd = segment.client_fd();
    let mut client = WriteMapping::new(&fd, 1 << 20).expect("writable");
    let lent = segment.lend_to_client().expect("no seals yet");
    client.bytes_mut()[9] = 9;
    let mut read = [0];
    lent.read_at(9, &mut read, &copied).expect("within");
    assert_eq!(read, [9]);
    assert!(WriteMapping::new(&fd, 1 << 20).is_err(), "a second writer");
    assert!(pwrite(&fd, b"x", 0).is_err());
    let refused = lent.seal().expect_err("the client still writes");
    assert!(matches!(refused.error, MemoryError::StillWritable { .. }));
    drop(client);
    let sealed = refused.segment.seal().expect("unmapped");
    assert_eq!(sealed.map().expect("sealed")[9], 9);
}

#[test]
fn a_client_can_lock_the_seals_of_what_it_made() {
    let fd = memfd(GUEST_PAGE);
    fill(&fd, 0, &pattern(1, GUEST_PAGE));
    seal_all(
        &fd,
        SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    );
    let Adopted::Lent(lent) = adopt(fd, &[0..100], &budget()).expect("a good memfd") else {
        panic!("it has no F_SEAL_WRITE");
    };
    let refused = lent.seal().expect_err("seals are locked");
    assert!(matches!(refused.error, MemoryError::SealsLocked { .. }));
    assert!(refused.to_string().contains("F_SEAL_SEAL"), "{refused}");
}

#[test]
fn a_readonly_descriptor_reads_only() {
    let segment = Segment::<Open>::create(MIB, &budget()).expect("fits");
    let fd = segment.readonly_fd().expect("fd");
    assert!(pwrite(&fd, b"x", 0).is_err());
    assert!(rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL).is_err());
    assert!(shared_mapping(&fd, MIB, true).is_err());
    assert!(shared_mapping(&fd, MIB, false).is_ok());
}

#[test]
fn adoption_takes_what_is_sealed() {
    let budget = budget();
    let bytes = pattern(3, 3 * GUEST_PAGE);
    let fd = memfd(4 * GUEST_PAGE);
    fill(&fd, 0, &bytes);
    seal_all(&fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
    let ranges = [
        0..5,
        2 * GUEST_PAGE..3 * GUEST_PAGE,
        4 * GUEST_PAGE..4 * GUEST_PAGE,
    ];
    let Adopted::Sealed(segment) = adopt(fd, &ranges, &budget).expect("a good memfd") else {
        panic!("it has F_SEAL_WRITE");
    };
    assert_eq!(budget.used(), 4 * GUEST_PAGE);
    assert!(segment.map().expect("sealed")[..bytes.len()] == *bytes);
    drop(segment);
    assert_eq!(budget.used(), 0);
}

#[test]
fn adoption_takes_a_descriptor_that_only_reads() {
    let fd = memfd(GUEST_PAGE);
    fill(&fd, 0, &pattern(1, GUEST_PAGE));
    seal_all(&fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let reader = std::fs::File::open(path).expect("ours");
    let adopted = adopt(reader.into(), &[0..GUEST_PAGE], &budget()).expect("a good memfd");
    assert!(matches!(adopted, Adopted::Sealed(_)));
}

/// Adopts `fd` and says which error came, leaving nothing behind in the budget.
fn refusal(fd: impl Into<OwnedFd>, ranges: &[std::ops::Range<u64>]) -> AdoptError {
    let budget = budget();
    let error = adopt(fd.into(), ranges, &budget).expect_err("must be refused");
    assert_eq!(budget.used(), 0);
    error
}

fn good(pages: u64) -> OwnedFd {
    let fd = memfd(pages * GUEST_PAGE);
    fill(&fd, 0, &pattern(1, pages * GUEST_PAGE));
    seal_all(&fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
    fd
}

#[test]
#[expect(
    clippy::reversed_empty_ranges,
    reason = "a range from outside can be reversed"
)]
fn adoption_refuses_and_says_why() {
    let all = [0..GUEST_PAGE];
    let (pipe, _writer) = std::io::pipe().expect("descriptors are left");
    assert!(matches!(refusal(pipe, &all), AdoptError::NotMemfd { .. }));
    let file = std::fs::File::open("/proc/self/exe").expect("ours");
    assert!(matches!(refusal(file, &all), AdoptError::NotMemfd { .. }));

    let plain = memfd(GUEST_PAGE);
    assert!(matches!(refusal(plain, &all), AdoptError::Resizable { .. }));
    let shrinkable = memfd(GUEST_PAGE);
    seal_all(&shrinkable, SealFlags::WRITE | SealFlags::GROW);
    let error = refusal(shrinkable, &all);
    assert_eq!(
        error.to_string(),
        "the memfd has the seals F_SEAL_WRITE | F_SEAL_GROW, but its size must be fixed; add F_SEAL_SHRINK | F_SEAL_GROW"
    );
    let writable = memfd(GUEST_PAGE);
    seal_all(&writable, SealFlags::SHRINK | SealFlags::GROW);
    assert!(matches!(
        refusal(writable, &all),
        AdoptError::Writable { .. }
    ));

    assert!(matches!(
        refusal(good(2), &[0..5, 4096..8000]),
        AdoptError::Unaligned {
            index: 1,
            start: 4096
        }
    ));
    assert!(matches!(
        refusal(good(2), &[0..2 * GUEST_PAGE + 1]),
        AdoptError::OutOfRange { index: 0, .. }
    ));
    assert!(matches!(
        refusal(good(2), &[GUEST_PAGE..5]),
        AdoptError::OutOfRange { .. }
    ));
    assert!(matches!(
        refusal(good(2), &[0..u64::MAX]),
        AdoptError::OutOfRange { .. }
    ));
    assert!(matches!(
        refusal(good(2), &[3 * GUEST_PAGE..3 * GUEST_PAGE]),
        AdoptError::OutOfRange { .. }
    ));
    assert!(matches!(
        refusal(good(3), &[GUEST_PAGE..GUEST_PAGE + 1, 0..GUEST_PAGE + 1]),
        AdoptError::Overlap {
            first: 1,
            second: 0,
            at: GUEST_PAGE
        }
    ));

    let hole = memfd(4 * GUEST_PAGE);
    fill(&hole, 0, &pattern(1, GUEST_PAGE));
    fill(&hole, 2 * GUEST_PAGE, &pattern(1, GUEST_PAGE));
    seal_all(
        &hole,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW,
    );
    assert!(matches!(
        refusal(hole, &[0..GUEST_PAGE, GUEST_PAGE..2 * GUEST_PAGE]),
        AdoptError::Hole {
            index: 1,
            at: GUEST_PAGE
        }
    ));

    let tight = Budget::new("segment bytes", GUEST_PAGE);
    assert!(matches!(
        adopt(good(2), &all, &tight),
        Err(AdoptError::Budget(_))
    ));
    assert_eq!(tight.used(), 0);
}

#[test]
fn adoption_refuses_huge_pages() {
    use rustix::fs::MemfdFlags;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    // Needs no huge pages: none is touched.
    let Ok(fd) = rustix::fs::memfd_create("huge", flags) else {
        eprintln!("no hugetlbfs here");
        return;
    };
    seal_all(&fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
    assert!(matches!(refusal(fd, &[]), AdoptError::NotTmpfs { .. }));
}

#[test]
fn client_mappings_insist_on_their_seals() {
    let copied = Copied::new();
    let open = memfd(GUEST_PAGE);
    assert!(matches!(
        ReadMapping::new(&open, 10),
        Err(MappingError::MissingSeals { .. })
    ));
    assert!(matches!(
        ReadMapping::of_result(&open, 10),
        Err(MappingError::MissingSeals { .. })
    ));
    assert!(matches!(
        SharedMapping::new(&open, 10),
        Err(MappingError::MissingSeals { .. })
    ));
    let (pipe, _writer) = std::io::pipe().expect("descriptors are left");
    assert!(matches!(
        ReadMapping::new(&pipe, 10),
        Err(MappingError::NotMemfd { .. })
    ));

    fill(&open, 0, &pattern(5, GUEST_PAGE));
    seal_all(
        &open,
        SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW,
    );
    assert!(ReadMapping::new(&open, 10).is_err());
    assert_eq!(
        ReadMapping::of_result(&open, 10).expect("lent").bytes(),
        &pattern(5, 10)[..]
    );
    let shared = SharedMapping::new(&open, 10).expect("fixed size");
    let mut read = [0; 4];
    shared.read_at(6, &mut read, &copied).expect("within");
    assert_eq!((read.as_slice(), copied.get()), (&pattern(5, 10)[6..], 4));
    assert!(matches!(
        shared.read_at(7, &mut read, &copied),
        Err(MappingError::OutOfRange { .. })
    ));
    let too_short = ReadMapping::of_result(&open, 100_000).expect_err("65536 bytes");
    assert!(
        too_short
            .to_string()
            .contains("has 65536 bytes, 34464 fewer than the 100000"),
        "{too_short}"
    );
    assert!(
        ReadMapping::of_result(&open, 0)
            .expect("no bytes")
            .bytes()
            .is_empty()
    );

    let other = memfd(GUEST_PAGE);
    let mapping = WriteMapping::new(&other, 4096).expect("writable");
    assert!(matches!(
        mapping.replace_readonly(&open),
        Err(MappingError::AnotherSegment { .. })
    ));
}

#[test]
fn two_mappings_of_one_segment_have_one_inode() {
    let segment = Segment::<Open>::create(MIB, &budget()).expect("fits");
    let inode = segment.inode();
    let sealed = segment.seal().expect("unmapped");
    let mapped = sealed.map().expect("sealed");
    let seen = strait_memory::process::inode_at(mapped.address() + 70_000).expect("/proc");
    assert_eq!(seen, Some((inode, 70_000)));
}

#[test]
fn descriptors_reopen_when_not_dumpable() {
    // In a process of its own, since other tests read /proc meanwhile.
    if std::env::var_os("STRAIT_NOT_DUMPABLE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().expect("ours"))
            .args([
                "--exact",
                "descriptors_reopen_when_not_dumpable",
                "--nocapture",
            ])
            .env("STRAIT_NOT_DUMPABLE", "1")
            .status()
            .expect("it runs");
        assert!(status.success());
        return;
    }
    if rustix::process::geteuid().is_root() {
        // Root may open anything: become somebody else, as a host does.
        rustix::thread::set_thread_res_gid(
            rustix::process::Gid::from_raw(65_533),
            rustix::process::Gid::from_raw(65_533),
            rustix::process::Gid::from_raw(65_533),
        )
        .expect("root may");
        rustix::thread::set_thread_res_uid(
            rustix::process::Uid::from_raw(65_533),
            rustix::process::Uid::from_raw(65_533),
            rustix::process::Uid::from_raw(65_533),
        )
        .expect("root may");
    }
    strait_memory::process::set_not_dumpable().expect("prctl");
    let segment = Segment::<Open>::create(PAGE, &budget()).expect("fits");
    let reader = segment.readonly_fd().expect("reopened");
    let mut reader = std::fs::File::from(Arc::into_inner(reader).expect("opened for us"));
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("readable");
    assert_eq!(bytes.len() as u64, PAGE);
    assert!(reader.write_all(b"x").is_err());
    let counts = strait_memory::process::counts().expect("/proc/self stays readable");
    assert!(counts.fds > 0 && counts.mappings > 0);
}

#[test]
fn a_budget_is_shared_by_threads() {
    let budget = Budget::new("segment bytes", 10 * PAGE);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let budget = Arc::clone(&budget);
            scope.spawn(move || {
                for _ in 0..200 {
                    let segment = Segment::<Open>::create(3 * PAGE, &budget);
                    assert!(budget.used() <= 10 * PAGE);
                    drop(segment);
                }
            });
        }
    });
    assert_eq!(budget.used(), 0);
    Segment::<Open>::create(10 * PAGE, &budget).expect("all is free again");
}

/// A write lease of another file description, which makes whoever opens the file wait.
fn lease(fd: &OwnedFd) -> std::fs::File {
    use std::os::fd::AsRawFd;
    const F_SETLEASE: libc::c_int = 1024;
    let own = std::fs::File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .expect("opened anew");
    // The operating system tells the holder by SIGIO, which would end the test.
    // SAFETY: ignoring a signal touches no memory.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    // SAFETY: F_SETLEASE takes an integer.
    let held = unsafe { libc::fcntl(own.as_raw_fd(), F_SETLEASE, libc::F_WRLCK) };
    assert_eq!(held, 0, "{}", std::io::Error::last_os_error());
    own
}

#[test]
fn a_file_lease_is_said_and_not_waited_for() {
    let fd = memfd(GUEST_PAGE);
    fill(&fd, 0, &[1; 65_536]);
    let future = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&fd, future).expect("sealable");
    let held = lease(&fd);
    let given = fd.try_clone().expect("descriptors are left");
    let error = adopt(given, &[0..8], &budget()).expect_err("leased");
    assert!(matches!(error, AdoptError::Leased), "{error}");
    drop(held);

    let given = fd.try_clone().expect("descriptors are left");
    let Adopted::Lent(segment) = adopt(given, &[0..8], &budget()).expect("free again") else {
        panic!("its sender can still write");
    };
    let held = lease(&fd);
    let error = segment.readonly_fd().expect_err("leased");
    assert!(matches!(error, MemoryError::Leased { .. }), "{error}");
    let refused = segment.seal().expect_err("leased");
    assert!(matches!(refused.error, MemoryError::Leased { .. }));
    drop(held);
    let sealed = refused.segment.seal().expect("free again");
    // From now on its descriptor is the one that is given away.
    let _held = sealed.readonly_fd().expect("no opening");
    let twice = sealed.readonly_fd().expect("no opening");
    assert!(Arc::strong_count(&twice) >= 3);
}

#[test]
fn idle_results_make_room_though_they_are_freed_elsewhere() {
    const BYTES: u64 = 24 * MIB;
    let budget = Budget::for_segments(BYTES, 1);
    budget.free_elsewhere().expect("a thread");
    let pool = ResultPool::new(Arc::clone(&budget), BYTES);
    for _ in 0..20 {
        drop(
            pool.take(BYTES, key(1), pool.budget())
                .expect("it is freed by now"),
        );
        assert_eq!(pool.stats().idle_segments, 1);
        Segment::<Open>::create(BYTES, &budget).expect("the idle one makes room");
    }
    drop(
        pool.take(BYTES, key(1), pool.budget())
            .expect("it is freed by now"),
    );
    pool.take(BYTES, key(2), pool.budget())
        .expect("another owner's idle one makes room");
}

#[test]
fn a_file_grows_while_it_is_filled_and_is_a_segment_at_its_end() {
    let budget = Budget::for_segments(64 * MIB, 1);
    let (births, copied) = (HugeBirths::new(), Copied::new());
    let growing = Growing::new(&budget).expect("a memfd");
    let writer = growing.clone();
    assert_eq!((growing.room(), budget.used()), (0, 0));
    let error = writer.write_at(0, &[1], &copied).expect_err("no room yet");
    assert!(matches!(error, MemoryError::OutOfRange { .. }), "{error}");

    growing.grow(5 * MIB + 1, 0..0, &births).expect("fits");
    assert_eq!(growing.room(), 5 * MIB + PAGE);
    let pattern: Vec<u8> = (0..=255).cycle().take(3 * 1024 * 1024).collect();
    writer.write_at(1, &pattern, &copied).expect("within");
    // More, and less, which changes nothing; too much, likewise.
    growing
        .grow(20 * MIB, 6 * MIB..20 * MIB, &births)
        .expect("fits");
    growing.grow(MIB, 0..0, &births).expect("is there");
    let error = growing.grow(65 * MIB, 0..0, &births).expect_err("65 of 64");
    assert!(matches!(error, MemoryError::Budget(_)), "{error}");
    assert_eq!((growing.room(), budget.used()), (20 * MIB, 20 * MIB));
    writer
        .write_at(19 * MIB, &pattern[..1024], &copied)
        .expect("within");
    let mut read = vec![0; 1024];
    writer
        .read_at(19 * MIB, &mut read, &copied)
        .expect("within");
    assert_eq!(read, pattern[..1024]);

    // The one place among segments is taken.
    let other = Segment::<Open>::create(PAGE, &budget).expect("fits");
    let second = Growing::new(&budget).expect("a memfd");
    let error = second.into_segment(PAGE).expect_err("2 of 1 segments");
    assert!(error.to_string().contains("segments"), "{error}");
    drop(other);

    let segment = growing.into_segment(19 * MIB + 1024).expect("cut");
    assert_eq!(
        (segment.bytes(), budget.used()),
        (19 * MIB + PAGE, 19 * MIB + PAGE)
    );
    let error = writer.write_at(0, &[1], &copied).expect_err("has no room");
    assert!(matches!(error, MemoryError::OutOfRange { .. }), "{error}");
    assert!(
        writer.grow(MIB, 0..0, &births).is_err(),
        "its length is fixed"
    );
    assert_eq!(budget.used(), 19 * MIB + PAGE);
    drop(writer);
    let segment = segment.seal().expect("nobody has it mapped");
    let bytes = segment.map().expect("sealed");
    assert!(bytes[1..].starts_with(&pattern) && bytes[0] == 0);
    assert_eq!(bytes[19 << 20..][..1024], pattern[..1024]);
    drop((bytes, segment));
    assert_eq!(budget.used(), 0);
    let dropped = Growing::new(&budget).expect("a memfd");
    dropped.grow(MIB, 0..0, &births).expect("fits");
    drop(dropped);
    assert_eq!(budget.used(), 0);
}
