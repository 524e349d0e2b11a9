//! Random sequences of everything that can happen to segments, against a simple model.

#[path = "../common/mod.rs"]
mod common;
mod slices;
mod steps;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use common::{key, pattern, peek_all, poke, segment_bytes_mapped, segment_fds};
use proptest::prelude::*;
use steps::{ROOM, Step, step};
use strait_memory::{
    Budget, Client, Copied, GUEST_PAGE, GuestSpace, GuestSpaces, Lent, Lot, MemoryError, Open,
    Parked, PoolSegment, ResultPool, Scrap, Sealed, Segment, Window, WriteMapping,
};

const GUEST_BYTES: usize = 1 << 30;
const PAGE_USIZE: usize = 65_536;

enum Kind {
    Open(Segment<Open>),
    Lent(Segment<Lent<Client>>),
    Sealed(Segment<Sealed>),
}

/// A segment, the client's mapping of it, and what must be in it.
struct Known {
    kind: Option<Kind>,
    client: Option<WriteMapping>,
    bytes: Vec<u8>,
}

impl Known {
    /// `None` if an open segment cannot be parked.
    fn park(&self, lot: &Arc<Lot>, range: Range<u64>) -> Option<Parked> {
        match self.kind.as_ref().expect("put back") {
            Kind::Open(_) => None,
            Kind::Lent(segment) => Some(lot.take_input(segment, range).expect("room")),
            Kind::Sealed(segment) => Some(lot.take_input(segment, range).expect("room")),
        }
    }

    fn seal(&mut self) {
        let writable = self.client.is_some();
        let check = |error: &MemoryError| {
            assert!(matches!(error, MemoryError::StillWritable { .. }) && writable);
        };
        self.kind = self.kind.take().map(|kind| match kind {
            Kind::Open(segment) => segment.seal().map_or_else(
                |refused| {
                    check(&refused.error);
                    Kind::Open(refused.segment)
                },
                Kind::Sealed,
            ),
            Kind::Lent(segment) => segment.seal().map_or_else(
                |refused| {
                    check(&refused.error);
                    Kind::Lent(refused.segment)
                },
                Kind::Sealed,
            ),
            sealed @ Kind::Sealed(_) => sealed,
        });
        let sealed = matches!(self.kind, Some(Kind::Sealed(_)));
        assert_ne!(
            sealed, writable,
            "sealed exactly when nobody has it mapped writable"
        );
    }
}

/// A result and what must be in it.
struct KnownResult {
    segment: PoolSegment,
    bytes: Vec<u8>,
    away: bool,
}

/// Something parked or in a guest, and of which segment.
struct In<T> {
    of: u64,
    what: T,
    part: Range<u64>,
}

struct World {
    budget: Arc<Budget>,
    copied: Copied,
    lot: Arc<Lot>,
    pool: Arc<ResultPool>,
    spaces: Arc<GuestSpaces>,
    guests: Vec<Arc<GuestSpace>>,
    segments: BTreeMap<u64, Known>,
    /// Segments whose descriptor was asked for.
    handed_out: BTreeSet<u64>,
    results: BTreeMap<u64, KnownResult>,
    parked: Vec<In<Parked>>,
    inputs: Vec<In<Window>>,
    outputs: Vec<In<Window>>,
    next: u64,
}

impl World {
    fn new() -> Self {
        let budget = Budget::new("segment bytes", 1 << 40);
        let spaces = GuestSpaces::new(2);
        Self {
            copied: Copied::new(),
            lot: Lot::new(1000, 64 * GUEST_PAGE),
            pool: ResultPool::new(Arc::clone(&budget), 64 * GUEST_PAGE),
            guests: (0..2).map(|_| new_guest(&spaces)).collect(),
            spaces,
            budget,
            segments: BTreeMap::new(),
            results: BTreeMap::new(),
            parked: Vec::new(),
            handed_out: BTreeSet::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            next: 0,
        }
    }

    fn name(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The most recent segment: steps follow each other more often that way.
    fn last(&mut self) -> Option<(u64, &mut Known)> {
        self.segments
            .iter_mut()
            .next_back()
            .map(|(name, known)| (*name, known))
    }

    fn last_result(&mut self) -> Option<(u64, &mut KnownResult)> {
        self.results
            .iter_mut()
            .next_back()
            .map(|(name, known)| (*name, known))
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each step")]
    fn take(&mut self, step: Step) {
        match step {
            Step::Create { pages } => {
                let bytes = pages * GUEST_PAGE;
                let segment = Segment::create(bytes, &self.budget).expect("fits");
                let known = Known {
                    kind: Some(Kind::Open(segment)),
                    client: None,
                    bytes: vec![0; to_usize(bytes)],
                };
                let name = self.name();
                self.segments.insert(name, known);
            }
            Step::WriteOpen { place, seed } => {
                let data = pattern(seed, 5_000);
                let copied = Copied::new();
                let Some((
                    _,
                    Known {
                        kind: Some(Kind::Open(segment)),
                        bytes,
                        ..
                    },
                )) = self.last()
                else {
                    return;
                };
                let place = place * 10_000;
                let end = to_usize(place) + data.len();
                match segment.write_at(place, &data, &copied) {
                    Ok(()) => bytes[to_usize(place)..end].copy_from_slice(&data),
                    Err(_) => assert!(end > bytes.len()),
                }
                self.copied.add(copied.get());
            }
            Step::ClientMaps => {
                let Some((name, known)) = self.last() else {
                    return;
                };
                if let (Some(Kind::Open(segment)), None) = (&known.kind, &known.client) {
                    let fd = segment.client_fd();
                    known.client = Some(WriteMapping::new(fd, known.bytes.len()).expect("open"));
                    self.handed_out.insert(name);
                }
            }
            Step::ClientWrites { seed } => {
                let Some((_, known)) = self.last() else {
                    return;
                };
                if let Some(client) = &mut known.client {
                    let data = pattern(seed, known.bytes.len() as u64);
                    client.bytes_mut().copy_from_slice(&data);
                    known.bytes = data;
                }
            }
            Step::ClientUnmaps => {
                let Some((_, known)) = self.last() else {
                    return;
                };
                known.client = None;
            }
            Step::Lend => {
                let Some((_, known)) = self.last() else {
                    return;
                };
                known.kind = known.kind.take().map(|kind| match kind {
                    Kind::Open(segment) => Kind::Lent(segment.lend_to_client().expect("no seals")),
                    other => other,
                });
            }
            Step::Seal => {
                let Some((_, known)) = self.last() else {
                    return;
                };
                known.seal();
            }
            Step::TakeResult { pages, owner } => {
                let segment = self
                    .pool
                    .take(pages * GUEST_PAGE, key(owner), self.pool.budget())
                    .expect("fits");
                let mut bytes = vec![0; to_usize(segment.bytes())];
                segment
                    .read_at(0, &mut bytes, &self.copied)
                    .expect("at home");
                // Each owner writes bytes of its own parity, see `owned`.
                assert!(
                    bytes
                        .iter()
                        .all(|byte| *byte == 0 || u64::from(*byte) % 2 == owner)
                );
                let name = self.name() * 2 + owner;
                self.next = name;
                self.results.insert(
                    name,
                    KnownResult {
                        segment,
                        bytes,
                        away: false,
                    },
                );
            }
            Step::WriteResult { place, seed } => {
                let Some((name, known)) = self.last_result() else {
                    return;
                };
                let data = owned(name, &pattern(seed, 5_000));
                let (from, end) = (
                    to_usize(place * 10_000),
                    to_usize(place * 10_000) + data.len(),
                );
                match known
                    .segment
                    .pages()
                    .write_at(place * 10_000, &data, &Copied::new())
                {
                    Ok(()) => {
                        assert!(!known.away);
                        known.bytes[from..end].copy_from_slice(&data);
                    }
                    Err(MemoryError::Away { .. }) => assert!(known.away),
                    Err(_) => assert!(end > known.bytes.len()),
                }
            }
            Step::ParkInput { from, pages } => {
                let lot = Arc::clone(&self.lot);
                let Some((of, known)) = self.last() else {
                    return;
                };
                let end = (from + pages).min(known.bytes.len() as u64 / GUEST_PAGE);
                if from >= end {
                    return;
                }
                let part = from * GUEST_PAGE..end * GUEST_PAGE;
                if let Some(what) = known.park(&lot, part.clone()) {
                    self.parked.push(In { of, what, part });
                }
            }
            Step::MoveInput {
                from,
                pages,
                guest,
                at,
            } => {
                let Some(In { of, what, part }) = self.parked.pop() else {
                    return;
                };
                let whole = what.bytes() / GUEST_PAGE;
                let range = from * GUEST_PAGE..(from + pages).min(whole) * GUEST_PAGE;
                let space = &self.guests[guest];
                let at_address = space.base() + to_usize(at) * PAGE_USIZE;
                match what.move_into(range.clone(), space, at_address) {
                    Ok(window) => {
                        let file = part.start + range.start..part.start + range.end;
                        self.inputs.push(In {
                            of,
                            what: window,
                            part: file,
                        });
                    }
                    Err(refused) => {
                        assert!(!space.is_poisoned());
                        self.parked.push(In {
                            of,
                            what: refused.parked,
                            part,
                        });
                    }
                }
            }
            Step::MoveResult {
                from,
                pages,
                guest,
                at,
            } => {
                let space = Arc::clone(&self.guests[guest]);
                let Some((of, known)) = self.last_result() else {
                    return;
                };
                let whole = known.segment.bytes() / GUEST_PAGE;
                let part = from * GUEST_PAGE..(from + pages).min(whole) * GUEST_PAGE;
                let Some(parked) = known.segment.pages().take_parked() else {
                    assert!(known.away);
                    return;
                };
                let at_address = space.base() + to_usize(at) * PAGE_USIZE;
                match parked.move_into(part.clone(), &space, at_address) {
                    Ok(what) => {
                        known.away = true;
                        self.outputs.push(In { of, what, part });
                    }
                    Err(refused) => known.segment.pages().put_parked(refused.parked),
                }
            }
            Step::SliceResult { cut, at, byte } => self.slice_result(cut, at, byte),
            Step::GuestWrites { place, byte } => self.guest_writes(place, byte),
            Step::HomeInput => {
                if let Some(In { of, what, .. }) = self.inputs.pop() {
                    let dirty = what.is_dirty();
                    let parked = what.move_home().expect("covered");
                    assert_eq!(parked.is_spent(), dirty);
                    let part = parked.file_offset()..parked.file_offset() + parked.bytes();
                    if !dirty {
                        self.parked.push(In {
                            of,
                            what: parked,
                            part,
                        });
                    }
                } else if let Some(In { of, what, .. }) = self.outputs.pop() {
                    let parked = what.move_home().expect("covered");
                    if let Some(known) = self.results.get_mut(&of) {
                        known.segment.pages().put_parked(parked);
                        known.away = false;
                    }
                }
            }
            Step::DropInput => drop(self.inputs.pop()),
            Step::GiveBack => {
                if let Some(In { what, .. }) = self.parked.pop() {
                    self.lot.give_back(what);
                }
            }
            Step::DropGuest { guest } => {
                self.guests[guest] = new_guest(&self.spaces);
            }
            Step::DropSegment => {
                if self.next.is_multiple_of(2) {
                    self.segments.pop_first();
                } else {
                    self.results.pop_first();
                }
            }
            Step::Forget => {
                if let Some((_, known)) = self.last() {
                    let inode = match known.kind.as_ref().expect("put back") {
                        Kind::Open(segment) => segment.inode(),
                        Kind::Lent(segment) => segment.inode(),
                        Kind::Sealed(segment) => segment.inode(),
                    };
                    self.lot.forget(inode);
                }
            }
        }
    }

    /// A kernel writes its result, or (as only host code can) its input.
    fn guest_writes(&mut self, place: u64, byte: u8) {
        if let Some(In { of, what, part }) = self.outputs.last() {
            let byte = owned(*of, &[byte])[0];
            let offset = to_usize(place % what.bytes());
            // SAFETY: the window is in its guest, writable.
            unsafe { poke(what.address() + offset, byte) };
            if let Some(known) = self.results.get_mut(of) {
                known.bytes[to_usize(part.start) + offset] = byte;
            }
        } else if let Some(In { what, .. }) = self.inputs.last() {
            if !what.is_dirty() {
                let range = what.fault_range();
                // SAFETY: the window is in its guest.
                assert!(unsafe { range.divert_in_signal(&Scrap::new()) });
            }
            let offset = to_usize(place % what.bytes());
            // SAFETY: the window is in its guest, and was made writable.
            unsafe { poke(what.address() + offset, byte) };
        }
    }

    fn check(&self) {
        let pool = self.pool.stats();
        let lot = self.lot.stats();
        for known in self.segments.values() {
            let mut bytes = vec![0; known.bytes.len()];
            match known.kind.as_ref().expect("put back") {
                Kind::Open(segment) => segment
                    .read_at(0, &mut bytes, &self.copied)
                    .expect("within"),
                Kind::Lent(segment) => segment
                    .read_at(0, &mut bytes, &self.copied)
                    .expect("within"),
                Kind::Sealed(segment) => {
                    let seals = segment.seals().expect("a memfd");
                    assert!(seals.no_writes() && seals.no_shrinking() && seals.no_growing());
                    bytes.copy_from_slice(&segment.map().expect("sealed"));
                }
            }
            assert!(bytes == known.bytes);
        }
        for known in self.results.values().filter(|known| !known.away) {
            let mut bytes = vec![0; known.bytes.len()];
            known
                .segment
                .read_at(0, &mut bytes, &self.copied)
                .expect("at home");
            assert!(bytes == known.bytes);
        }
        for In { of, what, part } in &self.inputs {
            if let (Some(known), false) = (self.segments.get(of), what.is_dirty()) {
                // SAFETY: the window is in its guest.
                let seen = unsafe { peek_all(what.address(), to_usize(what.bytes())) };
                assert!(seen == known.bytes[to_usize(part.start)..to_usize(part.end)]);
            }
        }

        let parked: u64 = self.parked.iter().map(|parked| parked.what.bytes()).sum();
        let inputs = self.inputs.len() as u64;
        assert_eq!(
            lot.mappings,
            lot.idle_mappings + self.parked.len() as u64 + inputs
        );
        let away: Vec<_> = self.results.values().filter(|known| known.away).collect();
        // A result that was dropped while its pages were in a guest leaves the pool, but
        // its mapping (and so the segment's charge) stays with the window.
        let orphans = self
            .outputs
            .iter()
            .filter(|output| !self.results.contains_key(&output.of))
            .count();
        assert_eq!(away.len() + orphans, self.outputs.len());
        assert_eq!(
            pool.segments,
            pool.idle_segments + self.results.len() as u64 + orphans as u64
        );

        // Every byte of every mapping is where the model says, and none is left over.
        let clients: u64 = self
            .segments
            .values()
            .filter(|known| known.client.is_some())
            .map(|known| known.bytes.len() as u64)
            .sum();
        let least = parked + clients + lot.idle_bytes + pool.idle_bytes;
        let results: u64 = self
            .results
            .values()
            .filter(|known| !known.away)
            .map(|known| known.segment.bytes())
            .sum();
        let least = least + results;
        let windows: u64 = self
            .inputs
            .iter()
            .chain(&self.outputs)
            .map(|window| window.what.bytes())
            .sum();
        let mapped = segment_bytes_mapped();
        assert!(
            mapped >= least + windows,
            "{mapped} mapped, {least} at home, {windows} in guests"
        );
        if self.inputs.is_empty() && self.outputs.is_empty() {
            assert_eq!(mapped, least);
        }
        // A segment that was handed out and dropped keeps a descriptor to ask by, until its last mapping is home.
        let kept: BTreeSet<u64> = self
            .parked
            .iter()
            .map(|parked| parked.of)
            .chain(self.inputs.iter().map(|input| input.of))
            .filter(|of| self.handed_out.contains(of) && !self.segments.contains_key(of))
            .collect();
        let fds = self.segments.len()
            + kept.len()
            + self.results.len()
            + usize::try_from(pool.idle_segments).expect("few");
        assert_eq!(segment_fds(), fds);
    }
}

fn new_guest(spaces: &Arc<GuestSpaces>) -> Arc<GuestSpace> {
    let space = spaces.take(GUEST_BYTES).expect("address space");
    let room = to_usize(ROOM * GUEST_PAGE);
    space.make_accessible(0, room).expect("within");
    // SAFETY: just made accessible.
    let seen = unsafe { peek_all(space.base(), room) };
    assert!(seen.iter().all(|byte| *byte == 0), "another guest's bytes");
    space
}

/// `bytes` in which every one that is not 0 shows by its parity whose they are.
fn owned(name: u64, bytes: &[u8]) -> Vec<u8> {
    let parity = u8::try_from(name % 2).expect("a bit");
    bytes.iter().map(|byte| (byte & !1) | parity).collect()
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}

// One test in this file, since it counts what the whole process has mapped.
proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
    ))]
    #[test]
    fn segments_follow_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            world.check();
        }
        let budget = Arc::clone(&world.budget);
        drop(world);
        prop_assert_eq!(budget.used(), 0);
        prop_assert_eq!(segment_bytes_mapped(), 0);
        prop_assert_eq!(segment_fds(), 0);
    }
}
