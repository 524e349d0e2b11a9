//! Where the tensors of one invocation lie in the guest: from their sizes to addresses. Numbers only; nothing here
//! touches memory.
//!
//! ```text
//! room, what `reserve` grew:  │ chunk records │ tensor │ gap │ tensor │ …
//! ```
//! A tensor that is moved starts at the same place within 2 MiB as in its segment and at home, so that whole
//! page tables move; one that is copied starts at a multiple of 64 bytes.

use std::ops::Range;

use strait_memory::{GUEST_PAGE, HUGE};

use super::chunk::RECORD_BYTES;
use super::fault;

/// Alignment of copied tensors in the guest, in bytes.
const COPY_ALIGN: usize = 64;

/// A tensor that needs a place. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    /// Whether it has pages that could be moved.
    pub(super) has_pages: bool,
    /// Whether there is no other way.
    pub(super) linked: bool,
    /// Where it starts in its segment: a multiple of [`GUEST_PAGE`] if it moves.
    pub(super) offset: u64,
    /// Its length.
    pub(super) length: u64,
}

/// Where a tensor is while `run` is running. Guest addresses, sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    /// A window: the segment's own pages.
    Window { at: usize, bytes: usize },
    /// A copy.
    Copy { at: usize, bytes: usize },
}

impl Spot {
    pub(super) fn address(self) -> usize {
        match self {
            Self::Window { at, .. } | Self::Copy { at, .. } => at,
        }
    }
}

/// What an invocation's tensors need of the guest's memory.
#[derive(Debug)]
pub(super) struct Placement {
    /// Each with whether its pages move.
    tensors: Vec<(Tensor, bool)>,
}

impl Placement {
    /// For `inputs`, then `outputs`. From `move_min_bytes` on they are moved, as far as the fault handler can watch
    /// so many inputs.
    pub(super) fn new(
        inputs: impl Iterator<Item = Tensor>,
        outputs: impl Iterator<Item = Tensor>,
        move_min_bytes: u64,
    ) -> Self {
        let big = |tensor: &Tensor| {
            tensor.linked || (tensor.has_pages && tensor.length >= move_min_bytes.max(1))
        };
        let mut tensors: Vec<_> = inputs
            .enumerate()
            .map(|(index, tensor)| (tensor, big(&tensor) && index < fault::WINDOWS_MAX))
            .collect();
        tensors.extend(outputs.map(|tensor| (tensor, big(&tensor))));
        Self { tensors }
    }

    /// Bytes that are enough wherever the room starts: whole guest pages, or `u64::MAX` if nothing is.
    pub(super) fn room_bytes(&self) -> u64 {
        let records = GUEST_PAGE + (RECORD_BYTES * self.tensors.len()) as u64;
        let needed = self.tensors.iter().fold(records, |sum, (tensor, moves)| {
            // Each window may need up to 2 MiB before it to be in place.
            let slack = match moves {
                true => HUGE + GUEST_PAGE,
                false => COPY_ALIGN as u64,
            };
            sum.saturating_add(tensor.length).saturating_add(slack)
        });
        needed
            .checked_next_multiple_of(GUEST_PAGE)
            .unwrap_or(u64::MAX)
    }

    /// The tensors' spots in `room`, which starts at a guest page, after as many chunk records. None if they do not
    /// fit, which a room of [`Self::room_bytes`] rules out.
    pub(super) fn within(&self, room: &Range<usize>) -> Option<Vec<Spot>> {
        let mut cursor = room
            .start
            .checked_add(RECORD_BYTES.checked_mul(self.tensors.len())?)?;
        let spots = self
            .tensors
            .iter()
            .map(|(tensor, moves)| match moves {
                true => window(&mut cursor, tensor),
                false => copy(&mut cursor, tensor),
            })
            .collect::<Option<Vec<_>>>()?;
        (cursor <= room.end).then_some(spots)
    }
}

fn window(cursor: &mut usize, tensor: &Tensor) -> Option<Spot> {
    let bytes = tensor.length.checked_next_multiple_of(GUEST_PAGE)?;
    let bytes = usize::try_from(bytes).ok()?;
    let huge = usize::try_from(HUGE).ok()?;
    let phase = usize::try_from(tensor.offset % HUGE).ok()?;
    let at = cursor.checked_add(huge - 1 - phase)? / huge * huge + phase;
    *cursor = at.checked_add(bytes)?;
    Some(Spot::Window { at, bytes })
}

fn copy(cursor: &mut usize, tensor: &Tensor) -> Option<Spot> {
    let bytes = usize::try_from(tensor.length).ok()?;
    let at = cursor.checked_next_multiple_of(COPY_ALIGN)?;
    *cursor = at.checked_add(bytes)?;
    Some(Spot::Copy { at, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 64 << 10;
    const MIB: usize = 1 << 20;

    fn tensor(offset: usize, length: usize) -> Tensor {
        Tensor {
            has_pages: true,
            linked: false,
            offset: offset as u64,
            length: length as u64,
        }
    }

    #[test]
    fn windows_keep_their_place_in_2_mib_and_copies_are_packed() {
        let inputs = [tensor(PAGE, 3 * MIB + 1), tensor(PAGE, 8)];
        let outputs = [tensor(2 * MIB, MIB), tensor(PAGE, 100)];
        let placement = Placement::new(inputs.into_iter(), outputs.into_iter(), 64 << 10);
        let spots = placement
            .within(&(5 * PAGE..32 * MIB))
            .expect("there is room");
        let window_end = 2 * MIB + 3 * MIB + 2 * PAGE;
        assert_eq!(
            spots,
            [
                Spot::Window {
                    at: 2 * MIB + PAGE,
                    bytes: 3 * MIB + PAGE
                },
                Spot::Copy {
                    at: window_end,
                    bytes: 8
                },
                Spot::Window {
                    at: 6 * MIB,
                    bytes: MIB
                },
                Spot::Copy {
                    at: 7 * MIB,
                    bytes: 100
                },
            ]
        );
    }

    #[test]
    fn inputs_beyond_what_can_be_watched_and_empty_tensors_are_copied() {
        let inputs = vec![tensor(PAGE, PAGE); fault::WINDOWS_MAX + 1];
        let outputs = [tensor(PAGE, PAGE), tensor(PAGE, 0)];
        let placement = Placement::new(inputs.into_iter(), outputs.into_iter(), 0);
        let spots = placement.within(&(0..1 << 30)).expect("there is room");
        let copies: Vec<usize> = spots
            .iter()
            .enumerate()
            .filter_map(|(index, spot)| matches!(spot, Spot::Copy { .. }).then_some(index))
            .collect();
        assert_eq!(copies, [fault::WINDOWS_MAX, fault::WINDOWS_MAX + 2]);
    }

    #[test]
    fn what_has_no_pages_is_copied() {
        let inline = Tensor {
            has_pages: false,
            ..tensor(0, 3 * MIB)
        };
        let placement = Placement::new([inline].into_iter(), [inline].into_iter(), 0);
        let spots = placement.within(&(0..1 << 30)).expect("there is room");
        assert!(
            spots.iter().all(|spot| matches!(spot, Spot::Copy { .. })),
            "{spots:?}"
        );
    }

    #[test]
    fn what_cannot_be_placed_is_none_and_asks_for_everything() {
        let huge = Tensor {
            has_pages: true,
            linked: false,
            offset: 0,
            length: u64::MAX - 1,
        };
        for move_min_bytes in [0, u64::MAX] {
            let placement = Placement::new([huge].into_iter(), [huge].into_iter(), move_min_bytes);
            assert_eq!(placement.room_bytes(), u64::MAX);
            assert_eq!(placement.within(&(0..usize::MAX)), None);
        }
        let small = Placement::new([tensor(0, 9)].into_iter(), [].into_iter(), u64::MAX);
        assert_eq!(small.within(&(0..72)), None);
        assert_eq!(
            small.within(&(0..73)),
            Some(vec![Spot::Copy { at: 64, bytes: 9 }])
        );
    }

    proptest! {
        #[test]
        fn a_room_of_the_size_asked_for_holds_all_tensors_apart(
            pages in proptest::collection::vec((1..200_usize, 0..300_000_usize), 0..80),
            inputs in 0..80_usize,
            move_min_bytes in prop_oneof![Just(0), Just(65_536), Just(u64::MAX)],
            start in 0..1000_usize,
        ) {
            let tensors: Vec<Tensor> = pages
                .iter()
                .map(|(page, length)| tensor(page * PAGE, *length))
                .collect();
            let (of_inputs, of_outputs) = tensors.split_at(inputs.min(tensors.len()));
            let placement =
                Placement::new(of_inputs.iter().copied(), of_outputs.iter().copied(), move_min_bytes);
            let asked = usize::try_from(placement.room_bytes()).expect("small");
            prop_assert!(asked.is_multiple_of(PAGE));
            let room = start * PAGE..start * PAGE + asked;
            let spots = placement.within(&room).expect("it fits");
            prop_assert_eq!(spots.len(), tensors.len());
            let mut free = room.start + RECORD_BYTES * tensors.len();
            for (spot, tensor) in spots.iter().zip(&tensors) {
                let bytes = match *spot {
                    Spot::Window { at, bytes } => {
                        prop_assert_eq!(at as u64 % HUGE, tensor.offset % HUGE);
                        prop_assert!(bytes.is_multiple_of(PAGE) && bytes as u64 >= tensor.length);
                        bytes
                    }
                    Spot::Copy { at, bytes } => {
                        prop_assert!(at.is_multiple_of(COPY_ALIGN));
                        prop_assert_eq!(bytes as u64, tensor.length);
                        bytes
                    }
                };
                prop_assert!(spot.address() >= free, "spots overlap");
                free = spot.address() + bytes;
            }
            prop_assert!(free <= room.end);
        }
    }
}
