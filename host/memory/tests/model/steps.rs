//! What can happen to segments.

use proptest::prelude::*;

/// What each guest can use, in guest pages.
pub(crate) const ROOM: u64 = 128;

/// One thing that happens to them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Create {
        pages: u64,
    },
    WriteOpen {
        place: u64,
        seed: u64,
    },
    ClientMaps,
    ClientWrites {
        seed: u64,
    },
    ClientUnmaps,
    Lend,
    Seal,
    TakeResult {
        pages: u64,
        owner: u64,
    },
    WriteResult {
        place: u64,
        seed: u64,
    },
    ParkInput {
        from: u64,
        pages: u64,
    },
    MoveInput {
        from: u64,
        pages: u64,
        guest: usize,
        at: u64,
    },
    MoveResult {
        from: u64,
        pages: u64,
        guest: usize,
        at: u64,
    },
    /// A result goes into both guests, cut in two.
    SliceResult {
        cut: u64,
        at: [u64; 2],
        byte: u8,
    },
    GuestWrites {
        place: u64,
        byte: u8,
    },
    HomeInput,
    DropInput,
    GiveBack,
    DropGuest {
        guest: usize,
    },
    DropSegment,
    Forget,
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let pages = || 1..40_u64;
    prop_oneof![
        3 => pages().prop_map(|pages| Step::Create { pages }),
        2 => (0..40_u64, any::<u64>()).prop_map(|(place, seed)| Step::WriteOpen { place, seed }),
        2 => Just(Step::ClientMaps),
        2 => any::<u64>().prop_map(|seed| Step::ClientWrites { seed }),
        2 => Just(Step::ClientUnmaps),
        2 => Just(Step::Lend),
        3 => Just(Step::Seal),
        3 => (pages(), 0..2_u64).prop_map(|(pages, owner)| Step::TakeResult { pages, owner }),
        2 => (0..40_u64, any::<u64>()).prop_map(|(place, seed)| Step::WriteResult { place, seed }),
        4 => (0..8_u64, pages()).prop_map(|(from, pages)| Step::ParkInput { from, pages }),
        5 => (0..8_u64, pages(), 0..2_usize, 0..ROOM).prop_map(|(from, pages, guest, at)| Step::MoveInput { from, pages, guest, at }),
        5 => (0..8_u64, pages(), 0..2_usize, 0..ROOM).prop_map(|(from, pages, guest, at)| Step::MoveResult { from, pages, guest, at }),
        4 => (0..20_u64, [0..ROOM, 0..ROOM], any::<u8>()).prop_map(|(cut, at, byte)| Step::SliceResult { cut, at, byte }),
        4 => (any::<u64>(), any::<u8>()).prop_map(|(place, byte)| Step::GuestWrites { place, byte }),
        3 => Just(Step::HomeInput),
        1 => Just(Step::DropInput),
        3 => Just(Step::GiveBack),
        1 => (0..2_usize).prop_map(|guest| Step::DropGuest { guest }),
        2 => Just(Step::DropSegment),
        1 => Just(Step::Forget),
    ]
}
