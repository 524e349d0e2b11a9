//! The values of an upload from their arrival to the segment that is to have them.
//!
//! ```text
//! short, few:           ─▶ Vec of each column, or the message ─ copy ▶ segment
//! long, or many so far: ─▶ file, where the segment has them ───────▶ the file becomes the segment
//!                           └─ elsewhere (several long batches of several columns) ── copy ──▶ segment
//! ```
//! How long a tensor gets is known at the end only. The first column's offset does not depend on it from 4 MiB on,
//! so a single column grows in place, however many batches come; several columns are in place if there is one batch.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use strait_memory::{Copied, Growing, MemoryError, Open, Segment};
use strait_tensor::layout::{HUGE_ALIGN_BYTES, HUGE_MIN_BYTES, TENSOR_ALIGN_BYTES};
use strait_tensor::{FileLayout, TensorPlace};

use super::bodies::Route;
use super::refused::host_bug;
use crate::error::Status;
use crate::session::{Caller, Host};

/// A single column's file grows by as much as it has, up to this, so that what is to come finds huge pages.
const AHEAD_BYTES_MAX: u64 = 32 << 20;
/// What is copied at a time from the file into a segment.
const COPY_BYTES: usize = 256 << 10;
/// More than that is freed on a thread of its own.
const DROPPED_HERE_BYTES_MAX: usize = 1 << 20;

/// Values of one column, in order.
#[derive(Debug)]
enum Part {
    Here(Vec<u8>),
    /// A part of a message that is nearly all values, as it came.
    Kept(Bytes),
    InFile(Range<u64>),
}

/// All that came of one column.
#[derive(Debug, Default)]
pub(super) struct Values {
    parts: Vec<Part>,
    /// The last of them: short ones are put together.
    gathered: Vec<u8>,
}

impl Values {
    /// Adds a copy of `bytes`.
    pub(super) fn gather(&mut self, bytes: &[u8]) {
        self.gathered.extend_from_slice(bytes);
    }

    /// Keeps `bytes` as they came.
    pub(super) fn keep(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.flush();
            self.parts.push(Part::Kept(bytes));
        }
    }

    /// How many bytes are in memory of this process.
    pub(super) fn held_bytes(&self) -> u64 {
        let held = self.parts.iter().map(|part| match part {
            Part::Here(bytes) => bytes.len() as u64,
            Part::Kept(bytes) => bytes.len() as u64,
            Part::InFile(_) => 0,
        });
        held.sum::<u64>() + self.gathered.len() as u64
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.gathered.is_empty()
    }

    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            self.parts
                .push(Part::Here(std::mem::take(&mut self.gathered)));
        }
    }

    fn is_in_file(&mut self, range: Range<u64>) {
        self.flush();
        match self.parts.last_mut() {
            Some(Part::InFile(last)) if last.end == range.start => last.end = range.end,
            _ => self.parts.push(Part::InFile(range)),
        }
    }

    /// Whether all of it is at `range` of the file.
    fn is_at(&self, range: &Range<u64>) -> bool {
        match self.parts.as_slice() {
            [] => range.is_empty(),
            [Part::InFile(only)] => only == range,
            _ => false,
        }
    }
}

impl Drop for Values {
    /// On a thread of their own if they are many: an upload may be dropped on a thread of the runtime.
    fn drop(&mut self) {
        let here = |part: &Part| matches!(part, Part::Here(_) | Part::Kept(_));
        if (self.parts.iter().any(here) || self.gathered.len() > DROPPED_HERE_BYTES_MAX)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let values = (
                std::mem::take(&mut self.parts),
                std::mem::take(&mut self.gathered),
            );
            runtime.spawn_blocking(move || drop(values));
        }
    }
}

/// The file of an upload that has one.
#[derive(Debug)]
pub(super) struct Staged {
    file: Growing,
    host: Arc<Host>,
    /// Where the next values go.
    end: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// One column, which begins here.
    Single(u64),
    /// Several. The first batch goes to where it would be if it were the only one.
    Several(Option<FileLayout>),
}

impl Staged {
    /// A file for columns of which `values` came so far. `layout` is that of the batch at hand.
    ///
    /// # Errors
    /// As [`Caller::begin_filling`].
    pub(super) fn begin<'a>(
        caller: &Caller,
        layout: FileLayout,
        values: impl Iterator<Item = &'a mut Values>,
    ) -> Result<Self, Status> {
        let mut values: Vec<_> = values.collect();
        let mut staged = Self {
            file: caller.begin_filling(&layout)?,
            host: Arc::clone(caller.host()),
            end: 0,
            kind: Kind::Several(None),
        };
        match (layout.tensors.as_slice(), values.as_mut_slice()) {
            ([tensor], [values]) => {
                staged.end = tensor.offset.next_multiple_of(HUGE_ALIGN_BYTES);
                staged.kind = Kind::Single(staged.end);
                values.flush();
                for part in std::mem::take(&mut values.parts) {
                    match part {
                        Part::Here(bytes) => staged.append(&bytes, values)?,
                        Part::Kept(bytes) => staged.append(&bytes, values)?,
                        // There was no file before this one.
                        Part::InFile(_) => {}
                    }
                }
            }
            (_, values) if values.iter().all(|values| values.is_empty()) => {
                staged.end = layout.capacity.next_multiple_of(TENSOR_ALIGN_BYTES);
                staged.kind = Kind::Several(Some(layout));
            }
            _ => {}
        }
        Ok(staged)
    }

    /// Whether all values go there, short ones as well.
    pub(super) fn has_all(&self) -> bool {
        matches!(self.kind, Kind::Single(_))
    }

    /// Whether there is room for so many bytes: making it takes time that no runtime thread has.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.end.saturating_add(bytes) <= self.file.room()
    }

    fn append(&mut self, bytes: &[u8], values: &mut Values) -> Result<(), Status> {
        let range = 0..bytes.len();
        let route = self.place(std::slice::from_ref(&range), std::iter::once(values))?;
        Ok(route.write(0, bytes)?)
    }

    /// Where a batch goes whose columns have their values in `ranges` of its body.
    ///
    /// # Errors
    /// `BUDGET_EXCEEDED`, `QUOTA_EXCEEDED`.
    pub(super) fn place<'a>(
        &mut self,
        ranges: &[Range<usize>],
        values: impl Iterator<Item = &'a mut Values>,
    ) -> Result<Route, Status> {
        let layout = match &mut self.kind {
            Kind::Single(_) => None,
            Kind::Several(first) => first.take(),
        };
        let offsets: Vec<u64> = if let Some(layout) = layout {
            let offsets = layout.tensors.iter().map(|tensor| tensor.offset);
            let offsets: Vec<_> = offsets.collect();
            let huge = offsets.first().copied().unwrap_or(0)..layout.footer_offset;
            self.file.grow(layout.capacity, huge, self.host.births())?;
            offsets
        } else {
            // Of a single column each batch follows the one before it.
            let begin = self.end;
            let offset = |range: &Range<usize>| {
                let offset = self.end;
                self.end += range.len() as u64;
                offset
            };
            let offsets = ranges.iter().map(offset).collect();
            self.make_room(begin)?;
            offsets
        };
        let mut pieces = Vec::with_capacity(ranges.len());
        for ((range, offset), values) in ranges.iter().zip(offsets).zip(values) {
            if !range.is_empty() {
                values.is_in_file(offset..offset + range.len() as u64);
                pieces.push((range.start as u64..range.end as u64, offset));
            }
        }
        Ok(Route {
            file: self.file.clone(),
            pieces,
            host: Arc::clone(&self.host),
        })
    }

    /// Room for what is to lie between `begin` and the end.
    fn make_room(&self, begin: u64) -> Result<(), MemoryError> {
        if self.has_room(0) {
            return Ok(());
        }
        let from = self.file.room().max(begin);
        let ahead = match self.kind {
            Kind::Single(start) => (begin - start).min(AHEAD_BYTES_MAX),
            Kind::Several(_) => 0,
        };
        if ahead >= HUGE_MIN_BYTES {
            let more = (self.end + ahead).next_multiple_of(HUGE_ALIGN_BYTES);
            let grown = self.file.grow(more, from..more, self.host.births());
            if !matches!(grown, Err(MemoryError::Budget(_))) {
                return grown;
            }
        }
        self.file.grow(self.end, from..self.end, self.host.births())
    }
}

/// The segment of `layout` with all `values` in it, some of which may be in the file of `staged`. Blocks.
///
/// # Errors
/// As [`Caller::allocate_to_fill`].
pub(super) fn finish(
    staged: Option<Staged>,
    caller: &Caller,
    layout: &FileLayout,
    mut values: Vec<Values>,
) -> Result<Segment<Open>, Status> {
    values.iter_mut().for_each(Values::flush);
    let in_place = |(values, place): (&Values, &TensorPlace)| {
        values.is_at(&(place.offset..place.offset + place.length))
    };
    let file = staged.map(|staged| staged.file);
    let file = match file {
        Some(file) if values.iter().zip(&layout.tensors).all(in_place) => {
            return caller.filled(file, layout);
        }
        file => file,
    };
    let copied = caller.host().uploads_copied();
    let segment = caller.allocate_to_fill(layout)?;
    for (mut values, place) in values.into_iter().zip(&layout.tensors) {
        let mut offset = place.offset;
        for part in std::mem::take(&mut values.parts) {
            // Each goes as soon as it is in the segment.
            match (part, &file) {
                (Part::Here(bytes), _) => {
                    segment.write_at(offset, &bytes, copied)?;
                    offset += bytes.len() as u64;
                }
                (Part::Kept(bytes), _) => {
                    segment.write_at(offset, &bytes, copied)?;
                    offset += bytes.len() as u64;
                }
                (Part::InFile(range), Some(file)) => {
                    let length = range.end - range.start;
                    copy(file, range, &segment, offset, copied)?;
                    offset += length;
                }
                (Part::InFile(range), None) => {
                    return Err(host_bug(
                        "storing an upload",
                        format!("{range:?} of no file"),
                    ));
                }
            }
        }
    }
    Ok(segment)
}

fn copy(
    file: &Growing,
    range: Range<u64>,
    segment: &Segment<Open>,
    mut offset: u64,
    copied: &Copied,
) -> Result<(), MemoryError> {
    let mut buffer = vec![0; COPY_BYTES];
    for start in range.clone().step_by(COPY_BYTES) {
        let length = usize::try_from(range.end - start).unwrap_or(COPY_BYTES);
        let part = &mut buffer[..length.min(COPY_BYTES)];
        file.read_at(start, part, copied)?;
        segment.write_at(offset, part, copied)?;
        offset += part.len() as u64;
    }
    Ok(())
}
