//! From which size on moving a tensor into a kernel beats copying it.

use indicatif::BinaryBytes;
use serde::Serialize;
use strait_memory::probe::{self, CopyAndMove, ProbeError};

use super::{Check, Subject};

const BREAK_EVEN: Subject = Subject::new(
    "speed",
    "copy or move",
    "below engine.move_min_bytes tensors are copied, from there on their pages are moved; what is \
     quicker depends on the machine",
);

/// The largest tensor that is measured.
pub(super) const BYTES_MAX: u64 = 8 << 20;
/// The smallest one: windows are whole pages of a guest.
const BYTES_MIN: u64 = 64 << 10;
const ROUNDS: usize = 15;

/// An input and an output of this size each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    bytes: u64,
    copy_us: f64,
    move_us: f64,
}

impl From<CopyAndMove> for Row {
    fn from(times: CopyAndMove) -> Self {
        Self {
            bytes: times.bytes,
            copy_us: times.copy.as_secs_f64() * 1e6,
            move_us: times.moved.as_secs_f64() * 1e6,
        }
    }
}

pub(super) fn check(move_min_bytes: u64) -> (Check, Vec<Row>) {
    let sizes = std::iter::successors(Some(BYTES_MIN), |size| Some(size * 2));
    let sizes: Vec<u64> = sizes.take_while(|size| *size <= BYTES_MAX).collect();
    match probe::copy_and_move(&sizes, ROUNDS) {
        Ok(times) => {
            let rows: Vec<Row> = times.into_iter().map(Row::from).collect();
            (judge(&rows, move_min_bytes), rows)
        }
        Err(error) => (not_measured(&error), Vec::new()),
    }
}

fn not_measured(error: &ProbeError) -> Check {
    BREAK_EVEN.warn(
        format!("not measured: {error}"),
        "what the checks above ask for; until it is measured, the setting is a guess",
    )
}

/// The first row from which on moving wins at every size; `rows` are by size.
fn break_even(rows: &[Row]) -> Option<&Row> {
    let losing = rows.iter().rposition(|row| row.move_us >= row.copy_us);
    rows.get(losing.map_or(0, |index| index + 1))
}

/// Off by a factor of two is within what such a measurement can tell.
fn judge(rows: &[Row], set: u64) -> Check {
    let settings = format!("engine.move_min_bytes is {}", BinaryBytes(set));
    let Some(row) = break_even(rows) else {
        let found = format!(
            "copying is quicker up to {} and maybe beyond; {settings}",
            BinaryBytes(BYTES_MAX)
        );
        return if set > BYTES_MAX {
            BREAK_EVEN.ok(found)
        } else {
            BREAK_EVEN.warn(
                format!("{found}; was the machine busy?"),
                format!("engine.move_min_bytes = {}, if it stays so", BYTES_MAX * 2),
            )
        };
    };
    let found = format!(
        "moving is quicker from {} on ({:.0} us, copying {:.0} us); {settings}",
        BinaryBytes(row.bytes),
        row.move_us,
        row.copy_us
    );
    if set > row.bytes * 2 || set < row.bytes / 2 {
        BREAK_EVEN.warn(found, format!("engine.move_min_bytes = {}", row.bytes))
    } else {
        BREAK_EVEN.ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn rows(moves_win: [bool; 4]) -> Vec<Row> {
        let row = |(index, wins): (usize, bool)| Row {
            bytes: BYTES_MIN << index,
            copy_us: 10.0,
            move_us: if wins { 5.0 } else { 15.0 },
        };
        moves_win.into_iter().enumerate().map(row).collect()
    }

    #[test]
    fn moving_must_win_at_every_size_from_there_on() {
        let of = |wins| break_even(&rows(wins)).map(|row| row.bytes);
        assert_eq!(of([true; 4]), Some(64 << 10));
        assert_eq!(of([false, true, true, true]), Some(128 << 10));
        assert_eq!(of([true, false, true, true]), Some(256 << 10));
        assert_eq!(of([false; 4]), None);
        assert_eq!(of([true, true, true, false]), None);
    }

    #[test]
    fn the_setting_may_be_off_by_two() {
        let at_128 = rows([false, true, true, true]);
        for (set, status) in [
            (63 << 10, Status::Warn),
            (64 << 10, Status::Ok),
            (256 << 10, Status::Ok),
            (257 << 10, Status::Warn),
            (u64::MAX, Status::Warn),
            (0, Status::Warn),
        ] {
            let check = judge(&at_128, set);
            assert_eq!(check.status, status, "{check:?}");
        }
        let change = judge(&at_128, 1 << 20).change;
        assert_eq!(change.as_deref(), Some("engine.move_min_bytes = 131072"));
        assert_eq!(judge(&rows([false; 4]), 1 << 20).status, Status::Warn);
        assert_eq!(judge(&rows([false; 4]), u64::MAX).status, Status::Ok);
    }

    #[test]
    fn without_a_measurement_there_is_a_warning() {
        let check = not_measured(&ProbeError::Wrong("no memory"));
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.contains("no memory"));
    }
}
