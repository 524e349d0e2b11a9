//! Huge pages at birth: what is counted is what Linux maps, and nothing else changes.

mod common;

use std::sync::Arc;

use common::{budget, key};
use strait_memory::{Copied, HUGE, HugeBirths, ReadMapping, ResultPool, Segment, WriteMapping};

const MIB: u64 = 1 << 20;

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}

/// Bytes that Linux maps in huge pages of shared memory in the mapping that has `address`.
fn mapped_huge(address: usize) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("/proc is there");
    let mut here = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-').and_then(|(from, to)| {
            let hex = |text| usize::from_str_radix(text, 16).ok();
            Some((hex(from)?, hex(to)?))
        }) {
            here = (from..to).contains(&address);
        } else if here && first == "ShmemPmdMapped:" {
            let kib: u64 = words.next().and_then(|n| n.parse().ok()).expect("kB");
            return kib << 10;
        }
    }
    panic!("no mapping at {address:#x}");
}

#[test]
fn a_large_result_is_born_in_huge_pages() {
    let pool = ResultPool::new(budget(), 0);
    for (bytes, asked) in [
        (4 * MIB, 0),
        (6 * MIB - 4096, 0),
        (6 * MIB, 4 * MIB),
        (33 * MIB, 30 * MIB),
    ] {
        let before = pool.stats();
        let result = pool.take(bytes, key(1), pool.budget()).expect("fits");
        let parked = result.pages().take_parked().expect("at home");
        let stats = pool.stats();
        assert_eq!(
            stats.huge_asked_bytes - before.huge_asked_bytes,
            asked,
            "{bytes}"
        );
        let huge = stats.huge_bytes - before.huge_bytes;
        assert!(huge <= asked, "{huge} of {asked}");
        assert_eq!(mapped_huge(parked.address()), huge, "{bytes}");
        result.pages().put_parked(parked);
        let mut all = vec![1; to_usize(bytes)];
        result.read_at(0, &mut all, &Copied::new()).expect("within");
        assert!(all.iter().all(|byte| *byte == 0), "{bytes} bytes of zeros");
    }
}

#[test]
fn a_filled_segment_is_mapped_huge_by_its_consumers() {
    let (budget, births) = (budget(), HugeBirths::new());
    let bytes = 20 * MIB + 4096;
    let segment = Segment::create(bytes, &budget).expect("fits");
    let mut filling = WriteMapping::new(segment.client_fd(), to_usize(bytes)).expect("mapped");
    filling.back_with_huge_pages(to_usize(HUGE)..to_usize(bytes), &births);
    // What there is no whole huge page for is not asked for.
    filling.back_with_huge_pages(100..to_usize(HUGE), &births);
    filling.back_with_huge_pages(to_usize(bytes)..to_usize(bytes) + 1, &births);
    assert_eq!(births.asked_bytes(), 18 * MIB);
    assert_eq!(mapped_huge(filling.address()), births.huge_bytes());
    assert!(filling.bytes().iter().all(|byte| *byte == 0));
    filling.bytes_mut().fill(7);
    let written = filling
        .replace_readonly(segment.readonly_fd().expect("descriptors"))
        .expect("the same segment");
    drop(written);
    let sealed = segment.seal().expect("nobody writes");
    let reading = ReadMapping::new(sealed.readonly_fd().expect("descriptors"), to_usize(bytes))
        .expect("sealed");
    assert!(reading.bytes().iter().all(|byte| *byte == 7));
    assert_eq!(mapped_huge(reading.address()), births.huge_bytes());
    assert!(reading.address().is_multiple_of(to_usize(HUGE)));
}

#[test]
fn a_segment_that_the_host_fills_is_born_in_huge_pages() {
    let (budget, births) = (budget(), HugeBirths::new());
    let segment = Segment::create(16 * MIB, &budget).expect("fits");
    segment.back_with_huge_pages(2 * MIB..15 * MIB, &births);
    assert_eq!(births.asked_bytes(), 12 * MIB);
    let copied = Copied::new();
    let bytes: Vec<u8> = (0..255).cycle().take(to_usize(16 * MIB)).collect();
    segment.write_at(0, &bytes, &copied).expect("within");
    let sealed = segment.seal().expect("nobody writes");
    assert!(*sealed.map().expect("sealed") == *bytes);
    let small = Segment::create(4096, &Arc::clone(&budget)).expect("fits");
    small.back_with_huge_pages(0..1 << 40, &births);
    assert_eq!(births.asked_bytes(), 12 * MIB);
}
