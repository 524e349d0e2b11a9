//! Moves while another thread maps and unmaps as fast as it can.
//!
//! A plain `mremap` leaves a hole for a moment, and what another thread maps there is then
//! overwritten by the move back. Here that must never happen.

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use strait_memory::{Copied, GuestSpaces, Lot, ResultPool, Segment};

const BLOCK: usize = 2 << 20;
const MOVES: usize = 10_000;

/// Blocks that other code of the process (a thread's stack, an allocator) would map.
struct Intruder {
    forbidden: Vec<Range<usize>>,
    landed: AtomicUsize,
    lost: AtomicUsize,
    mapped: AtomicUsize,
    stop: AtomicBool,
}

impl Intruder {
    fn run(&self) {
        let mut round: u8 = 0;
        while !self.stop.load(Ordering::Relaxed) {
            round = round.wrapping_add(1);
            let address = map_block();
            let block = address..address + BLOCK;
            let inside = |range: &&Range<usize>| range.start < block.end && block.start < range.end;
            if self.forbidden.iter().find(inside).is_some() {
                self.landed.fetch_add(1, Ordering::Relaxed);
            }
            for offset in (0..BLOCK).step_by(BLOCK / 4) {
                // SAFETY: the block was just mapped by this thread.
                unsafe { common::poke(address + offset, round) };
            }
            std::hint::spin_loop();
            for offset in (0..BLOCK).step_by(BLOCK / 4) {
                // SAFETY: the block is this thread's until it unmaps it.
                if unsafe { common::peek(address + offset) } != round {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            unmap_block(address);
            self.mapped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn map_block() -> usize {
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a null address lets the operating system choose unused addresses.
    let block = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), BLOCK, rights, MapFlags::PRIVATE)
    };
    block.expect("address space").expose_provenance()
}

fn unmap_block(address: usize) {
    let at = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: mapped by `map_block`, and nobody has a reference into it.
    unsafe { rustix::mm::munmap(at, BLOCK) }.expect("ours");
}

#[test]
fn no_mapping_lands_in_a_reservation() {
    let (budget, copied) = (common::budget(), Copied::new());
    let bytes = BLOCK as u64;
    let lot = Lot::new(10, 1 << 30);
    let pool = ResultPool::new(Arc::clone(&budget), 1 << 30);
    let expected = common::pattern(1, bytes);
    let segment = Segment::create(bytes, &budget).expect("fits");
    segment.write_at(0, &expected, &copied).expect("within");
    let segment = segment.seal().expect("unmapped");

    let space = GuestSpaces::new(1).take(1 << 30).expect("address space");
    space.make_accessible(0, 8 * BLOCK).expect("within");
    let result = pool
        .take(bytes, common::key(1), pool.budget())
        .expect("fits");
    let input = lot.take_input(&segment, 0..bytes).expect("room");
    let output = result.pages().take_parked().expect("at home");
    let home = |address: usize| address..address + BLOCK;
    let intruder = Intruder {
        forbidden: vec![
            space.base()..space.base() + space.bytes(),
            home(input.address()),
            home(output.address()),
        ],
        landed: AtomicUsize::new(0),
        lost: AtomicUsize::new(0),
        mapped: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
    };
    let (input, output) = std::thread::scope(|scope| {
        let (mut input, mut output) = (input, output);
        let _intruder = scope.spawn(|| intruder.run());
        for round in 0..MOVES / 2 {
            let (from, to) = (space.base() + BLOCK, space.base() + 4 * BLOCK);
            let reading = input.move_into(0..bytes, &space, from).expect("room");
            let writing = output.move_into(0..bytes, &space, to).expect("room");
            let place = (round * 4097) % BLOCK;
            // SAFETY: the window is in its guest.
            let byte = unsafe { common::peek(from + place) };
            // SAFETY: the window is in its guest, writable.
            unsafe { common::poke(to + place, byte) };
            input = reading.move_home().expect("covered");
            output = writing.move_home().expect("covered");
        }
        intruder.stop.store(true, Ordering::Relaxed);
        (input, output)
    });
    let mapped = intruder.mapped.load(Ordering::Relaxed);
    assert!(
        mapped > MOVES / 100,
        "only {mapped} blocks were mapped meanwhile"
    );
    assert_eq!(intruder.landed.load(Ordering::Relaxed), 0, "of {mapped}");
    assert_eq!(intruder.lost.load(Ordering::Relaxed), 0, "of {mapped}");
    assert!(!space.is_poisoned());

    lot.give_back(input);
    result.pages().put_parked(output);
    assert!(*segment.map().expect("sealed") == *expected);
    let mut written = vec![0; BLOCK];
    result.read_at(0, &mut written, &copied).expect("at home");
    for round in 0..MOVES / 2 {
        let place = (round * 4097) % BLOCK;
        assert_eq!(written[place], expected[place]);
    }
}
