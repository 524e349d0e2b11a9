//! A job whose rows are more than fit one guest: how many of them there is room for. Numbers only.

use strait_memory::GUEST_PAGE;
use strait_tensor::Column;

use super::contract;
use super::job::{Job, Supplies};

/// What is known of a job whose rows are more than fit.
pub(super) struct Tall {
    rows: u64,
    /// Bytes of a row of each input that is cut, together.
    row_bytes: u64,
    /// Of the narrowest one.
    narrowest: u64,
    /// Bytes for what is cut.
    room_bytes: u64,
    /// Rows of a first look.
    pub(super) few: u64,
}

impl Tall {
    /// None if `job`'s rows cannot come by windows, or have no room.
    pub(super) fn of(job: &Job, supplies: &Supplies, room_bytes: u64) -> Option<Self> {
        let (mut room_bytes, mut row_bytes, mut narrowest) = (room_bytes, 0_u64, u64::MAX);
        let mut all = None;
        let ports = job.kernel.kernel().inputs.iter().zip(&job.inputs);
        for ((port, input), source) in ports.zip(&supplies.inputs) {
            let place = &input.place;
            if port.whole {
                room_bytes = room_bytes.checked_sub(place.length)?;
                continue;
            }
            let rows = *place.spec.shape.first().filter(|rows| **rows > 0)?;
            let row = place.length / rows;
            if source.is_inline() || row == 0 || *all.get_or_insert(rows) != rows {
                return None;
            }
            row_bytes = row_bytes.saturating_add(row);
            narrowest = narrowest.min(row);
        }
        let rows = all?;
        // An eighth: what comes out may be wider than what goes in.
        let few = (room_bytes / row_bytes.saturating_mul(8)).min(rows);
        (few > 0).then_some(Self {
            rows,
            row_bytes,
            narrowest,
            room_bytes,
            few,
        })
    }

    /// `job` on tensors of `rows` rows.
    pub(super) fn job(&self, job: &Job, rows: u64) -> Job {
        let mut room = job.clone();
        let kernel = job.kernel.clone();
        for (port, input) in kernel.kernel().inputs.iter().zip(&mut room.inputs) {
            let place = &mut input.place;
            if let Some(first) = place.spec.shape.first_mut().filter(|_| !port.whole) {
                place.length = place.length / self.rows * rows;
                *first = rows;
            }
        }
        room
    }

    /// As many rows as there is room for, given the outputs of a few.
    pub(super) fn rows(&self, few: &[Column]) -> Option<u64> {
        let given = contract::reserve_bytes(few).div_ceil(self.few);
        let row = self.row_bytes.saturating_add(given);
        let rows = (self.room_bytes / row).min(self.rows);
        // Each window begins at a multiple of its alignment, up to that much before the rows that come next.
        (rows.saturating_mul(self.narrowest) >= 4 * GUEST_PAGE).then_some(rows)
    }

    /// The outputs for all rows at their largest, given those for a few and for `rows`: either as many rows as there are of
    /// the inputs, or always the same.
    pub(super) fn columns(
        &self,
        rows: u64,
        few: &[Column],
        room: &[Column],
    ) -> Option<Vec<Column>> {
        let column = |(few, room): (&Column, &Column)| {
            let mut spec = room.spec.clone();
            let before = few.spec.shape.first().copied();
            if let Some(first) = spec.shape.first_mut() {
                if *first == rows && before == Some(self.few) {
                    *first = self.rows;
                } else if Some(*first) != before {
                    return None;
                }
            }
            Column::new(room.name.clone(), spec).ok()
        };
        few.iter().zip(room).map(column).collect()
    }
}
