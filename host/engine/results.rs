//! The results of one invocation, from announced columns to files that can be mapped.

use std::ops::Range;

use strait_memory::{Copied, GUEST_PAGE, MemoryError, ResultPages};
use strait_tensor::{Column, FileLayout, LayoutError, TensorPlace, TensorSpec};

use super::error::{Broken, Stage};
use super::job::{FilledBody, FilledOutput, InlineRoom, Results};
use super::placement::Spot;
use super::regions::Regions;

/// A result that is being made.
#[derive(Debug)]
pub(super) struct Making {
    pub(super) port: String,
    room: Room,
}

/// What is there for the largest tensor that it can become.
#[derive(Debug)]
enum Room {
    Pages(FileLayout, ResultPages),
    /// For some of its rows, in a file that is not its own.
    Part(TensorPlace, ResultPages),
    /// Nothing yet: it will be bytes.
    Inline(TensorPlace),
    /// It goes to another kernel, and is none.
    Linked(TensorPlace),
}

impl Making {
    /// Memory for what `open` announced, but for what has `inline` room.
    ///
    /// # Errors
    /// There is none, or no file can hold it.
    pub(super) fn all(
        columns: Vec<Column>,
        mut inline: Option<InlineRoom>,
        source: &dyn Results,
    ) -> Result<Vec<Self>, Broken> {
        let mut planned = Vec::with_capacity(columns.len());
        for column in columns {
            let layout = match InlineRoom::takes(&mut inline, column.reserve_bytes) {
                true => None,
                false => {
                    Some(plan(&column).map_err(|e| Stage::Open.broken_contract(e.to_string()))?)
                }
            };
            planned.push((column, layout));
        }
        let layouts = planned.iter().filter_map(|(_, layout)| layout.as_ref());
        let bytes: Vec<_> = layouts.map(|layout| layout.capacity).collect();
        let taken = match bytes.is_empty() {
            true => Vec::new(),
            false => source.take(&bytes).map_err(|e| Stage::Results.broke(e))?,
        };
        assert_eq!(
            taken.len(),
            bytes.len(),
            "pages for each result that has a file"
        );
        let mut taken = taken.into_iter();
        let made = planned.into_iter().map(|(column, layout)| Self {
            port: column.name.clone(),
            // Pages are taken only for what has a file.
            room: match layout.and_then(|layout| Some((layout, taken.next()?))) {
                Some((layout, pages)) => Room::Pages(layout, pages),
                None => Room::Inline(TensorPlace {
                    name: column.name,
                    spec: column.spec,
                    offset: 0,
                    length: column.reserve_bytes,
                }),
            },
        });
        Ok(made.collect())
    }

    /// What goes to another kernel of a chain.
    pub(super) fn linked(column: Column) -> Self {
        Self {
            port: column.name.clone(),
            room: Room::Linked(TensorPlace {
                name: column.name,
                spec: column.spec,
                offset: 0,
                length: column.reserve_bytes,
            }),
        }
    }

    pub(super) fn is_linked(&self) -> bool {
        matches!(self.room, Room::Linked(_))
    }

    /// What `open` announced, without memory.
    pub(super) fn announced(columns: Vec<Column>) -> Vec<Self> {
        let made = columns.into_iter().map(|column| Self {
            port: column.name.clone(),
            room: Room::Inline(TensorPlace {
                name: column.name,
                spec: column.spec,
                offset: 0,
                length: column.reserve_bytes,
            }),
        });
        made.collect()
    }

    /// The result of `spec`, which was written to its file, where the guest could write no further than `written` bytes from
    /// its first on; or whose elements are `bytes`.
    ///
    /// # Errors
    /// A shape that no file can hold; Linux refused.
    pub(super) fn streamed(
        self,
        spec: TensorSpec,
        written: u64,
        bytes: Vec<u8>,
    ) -> Result<FilledOutput, Broken> {
        const STAGE: Stage = Stage::Publish;
        let reserve_bytes = self.bound().length;
        let body = match self.room {
            Room::Inline(_) | Room::Linked(_) => FilledBody::Inline { spec, bytes },
            Room::Part(..) => return Err(STAGE.host("a part of a result is no result")),
            Room::Pages(layout, pages) => {
                let layout = replanned(layout, &self.port, spec, reserve_bytes)?;
                let tensor = &layout.tensors[0];
                let end = tensor.offset + written.max(tensor.length);
                frame(&pages, &layout, end).map_err(|e| STAGE.broke(e))?;
                FilledBody::Pages {
                    layout,
                    reserve_bytes,
                }
            }
        };
        Ok(FilledOutput {
            port: self.port,
            body,
        })
    }

    /// Where the tensor lies, as large as it can become; of one without pages the offset is 0.
    pub(super) fn bound(&self) -> &TensorPlace {
        match &self.room {
            // `plan` made a layout of one column.
            Room::Pages(layout, _) => &layout.tensors[0],
            Room::Part(place, _) | Room::Inline(place) | Room::Linked(place) => place,
        }
    }

    /// Its pages, if it is not to be bytes.
    pub(super) fn pages(&self) -> Option<&ResultPages> {
        match &self.room {
            Room::Pages(_, pages) | Room::Part(_, pages) => Some(pages),
            Room::Inline(_) | Room::Linked(_) => None,
        }
    }

    /// A part of it for each of `rows`, which are all rows in order: with those, until [`Self::join`], is its mapping. What is
    /// to be bytes has no parts.
    ///
    /// # Errors
    /// It cannot be cut there.
    pub(super) fn cut(&self, rows: &[Range<u64>]) -> Result<Vec<Self>, Broken> {
        const STAGE: Stage = Stage::Results;
        let pages = self
            .pages()
            .ok_or_else(|| STAGE.host("what has no pages cannot be cut"))?;
        let bound = self.bound();
        let all = bound.spec.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = bound.length / all;
        let starts = rows.iter().skip(1).map(|rows| rows.start);
        let cuts: Vec<_> = starts
            .map(|start| bound.offset + start * row_bytes)
            .collect();
        let parts = pages.split(&cuts).map_err(|e| STAGE.broke(e))?;
        let part = |(rows, pages): (&Range<u64>, ResultPages)| {
            let count = rows.end - rows.start;
            let mut place = bound.clone();
            if let Some(first) = place.spec.shape.first_mut() {
                *first = count;
            }
            place.offset += rows.start * row_bytes;
            place.length = count * row_bytes;
            Self {
                port: self.port.clone(),
                room: Room::Part(place, pages),
            }
        };
        Ok(rows.iter().zip(parts).map(part).collect())
    }

    /// Takes the mapping back from all of its `parts`.
    ///
    /// # Errors
    /// One of them was lost.
    pub(super) fn join(&self, parts: Vec<ResultPages>) -> Result<(), Broken> {
        match self.pages() {
            Some(pages) => pages.join(parts).map_err(|e| Stage::Run.broke(e)),
            None => Ok(()),
        }
    }

    /// Copies what is at `spot` out of the guest, into this part, if it is no window.
    ///
    /// # Errors
    /// Linux refused.
    pub(super) fn take_out(
        &self,
        spot: Spot,
        regions: &Regions,
        copied: &Copied,
    ) -> Result<(), Broken> {
        match (&self.room, spot) {
            (Room::Part(place, pages), Spot::Copy { .. }) => {
                copy_out(pages, place, spot, regions, copied)
            }
            _ => Ok(()),
        }
    }

    /// The result, whose parts have all of its rows and are joined.
    ///
    /// # Errors
    /// Linux refused.
    pub(super) fn joined(self) -> Result<FilledOutput, Broken> {
        const STAGE: Stage = Stage::Publish;
        let Room::Pages(layout, pages) = self.room else {
            return Err(STAGE.host("what was not cut cannot be joined"));
        };
        let tensor = &layout.tensors[0];
        let reserve_bytes = tensor.length;
        // A window ends with its guest page.
        let written_to = tensor.offset + tensor.length.next_multiple_of(GUEST_PAGE);
        frame(&pages, &layout, written_to).map_err(|e| STAGE.broke(e))?;
        Ok(FilledOutput {
            port: self.port,
            body: FilledBody::Pages {
                layout,
                reserve_bytes,
            },
        })
    }

    /// The result, of `shape`: bytes, or a file that can be mapped: a small one copied out of the guest, everything past the
    /// tensor zeroed, header and footer around it.
    ///
    /// # Errors
    /// A shape that no file can hold; Linux refused.
    pub(super) fn finish(
        self,
        shape: Vec<u64>,
        spot: Spot,
        regions: &Regions,
        copied: &Copied,
    ) -> Result<FilledOutput, Broken> {
        let spec = TensorSpec {
            dtype: self.bound().spec.dtype,
            shape,
        };
        let reserve_bytes = self.bound().length;
        let body = match self.room {
            Room::Part(..) => {
                return Err(Stage::Publish.host("a part of a result is no result"));
            }
            // Of one that is linked nobody asks.
            Room::Inline(_) | Room::Linked(_) => FilledBody::Inline {
                bytes: taken_out(&spec, spot, regions, copied)?,
                spec,
            },
            Room::Pages(layout, pages) => {
                let layout = replanned(layout, &self.port, spec, reserve_bytes)?;
                fill(&pages, &layout, spot, regions, copied)?;
                FilledBody::Pages {
                    layout,
                    reserve_bytes,
                }
            }
        };
        Ok(FilledOutput {
            port: self.port,
            body,
        })
    }
}

/// The tensor of `spec` at `spot`, copied out of the guest.
fn taken_out(
    spec: &TensorSpec,
    spot: Spot,
    regions: &Regions,
    copied: &Copied,
) -> Result<Vec<u8>, Broken> {
    let length = spec
        .bytes()
        .ok()
        .and_then(|bytes| usize::try_from(bytes).ok());
    let length =
        length.ok_or_else(|| Stage::Extents.host("a shape within its bound is too large"))?;
    let at = spot.address();
    let bytes = regions
        .with(at..at + length, <[u8]>::to_vec)
        .map_err(|e| Stage::Publish.broke(e))?;
    copied.add(length as u64);
    Ok(bytes)
}

/// Makes a file of what is in `pages` or in the guest.
fn fill(
    pages: &ResultPages,
    layout: &FileLayout,
    spot: Spot,
    regions: &Regions,
    copied: &Copied,
) -> Result<(), Broken> {
    let tensor = &layout.tensors[0];
    let (offset, end) = (tensor.offset, tensor.offset + tensor.length);
    let written_to = match spot {
        Spot::Window { bytes, .. } => offset + bytes as u64,
        Spot::Copy { .. } => {
            copy_out(pages, tensor, spot, regions, copied)?;
            end
        }
    };
    frame(pages, layout, written_to).map_err(|e| Stage::Publish.broke(e))
}

/// Copies `tensor` from its spot in the guest to its place in `pages`.
fn copy_out(
    pages: &ResultPages,
    tensor: &TensorPlace,
    spot: Spot,
    regions: &Regions,
    copied: &Copied,
) -> Result<(), Broken> {
    let (at, offset) = (spot.address(), tensor.offset);
    let bytes = usize::try_from(tensor.length).map_err(|e| Stage::Publish.host(e.to_string()))?;
    regions
        .with(at..at + bytes, |bytes| {
            pages.write_at(offset, bytes, copied)
        })
        .map_err(|e| Stage::Publish.broke(e))?
        .map_err(|e| Stage::Publish.broke(e))
}

/// Header and footer around the tensor in `pages`, and zeros wherever a consumer could see what was there
/// before; the guest wrote no further than to `written_to`.
fn frame(pages: &ResultPages, layout: &FileLayout, written_to: u64) -> Result<(), MemoryError> {
    let uncounted = Copied::new();
    let tensor = &layout.tensors[0];
    let padded = written_to.max(layout.footer_offset);
    pages.zero(tensor.offset + tensor.length..padded)?;
    pages.zero(layout.header.len() as u64..tensor.offset.min(GUEST_PAGE))?;
    pages.write_at(0, &layout.header, &uncounted)?;
    pages.write_at(layout.footer_offset, &layout.footer, &uncounted)
}

/// `layout`, or one for what its tensor has become.
fn replanned(
    layout: FileLayout,
    port: &str,
    spec: TensorSpec,
    reserve_bytes: u64,
) -> Result<FileLayout, Broken> {
    if layout.tensors[0].spec == spec {
        return Ok(layout);
    }
    let column = Column {
        name: port.to_owned(),
        spec,
        reserve_bytes,
    };
    plan(&column).map_err(|e| Stage::Extents.broken_contract(e.to_string()))
}

fn plan(column: &Column) -> Result<FileLayout, LayoutError> {
    FileLayout::plan(std::slice::from_ref(column))
}
