//! The results of one invocation, from announced columns to files that can be mapped.

use strait_memory::{Copied, GUEST_PAGE, MemoryError, ResultPages};
use strait_tensor::{Column, FileLayout, LayoutError, TensorPlace, TensorSpec};

use super::error::{Broken, Stage};
use super::job::{FilledOutput, Results};
use super::placement::Spot;
use super::regions::Regions;

/// A result that is being made.
#[derive(Debug)]
pub(super) struct Making {
    pub(super) port: String,
    /// Of the largest tensor that it can become.
    layout: FileLayout,
    pub(super) pages: ResultPages,
}

impl Making {
    /// Memory for what `open` announced.
    ///
    /// # Errors
    /// There is none, or no file can hold it.
    pub(super) fn all(columns: Vec<Column>, source: &dyn Results) -> Result<Vec<Self>, Broken> {
        let planned = columns
            .into_iter()
            .map(|column| Ok((plan(&column)?, column.name)))
            .collect::<Result<Vec<_>, LayoutError>>()
            .map_err(|e| Stage::Open.broken_contract(e.to_string()))?;
        let bytes: Vec<_> = planned.iter().map(|(layout, _)| layout.capacity).collect();
        let taken = source.take(&bytes).map_err(|e| Stage::Results.broke(e))?;
        assert_eq!(taken.len(), planned.len(), "pages for each result");
        let made = planned.into_iter().zip(taken);
        Ok(made
            .map(|((layout, port), pages)| Self {
                port,
                layout,
                pages,
            })
            .collect())
    }

    /// Where the tensor lies, as large as it can become.
    pub(super) fn bound(&self) -> &TensorPlace {
        // `plan` made a layout of one column.
        &self.layout.tensors[0]
    }

    /// Makes the result fit to be mapped: of `shape`, a small one copied out of the guest, everything past the tensor
    /// zeroed, the file's header and footer around it.
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
        let reserve_bytes = self.bound().length;
        let layout = match self.bound().spec.shape == shape {
            true => self.layout,
            false => self
                .plan_for(shape)
                .map_err(|e| Stage::Extents.broken_contract(e.to_string()))?,
        };
        let pages = &self.pages;
        let tensor = &layout.tensors[0];
        let (offset, end) = (tensor.offset, tensor.offset + tensor.length);
        let written_to = match spot {
            Spot::Window { bytes, .. } => offset + bytes as u64,
            Spot::Copy { at, .. } => {
                let bytes = usize::try_from(tensor.length)
                    .map_err(|e| Stage::Publish.host(e.to_string()))?;
                regions
                    .with(at..at + bytes, |bytes| {
                        pages.write_at(offset, bytes, copied)
                    })
                    .map_err(|e| Stage::Publish.broke(e))?
                    .map_err(|e| Stage::Publish.broke(e))?;
                end
            }
        };
        frame(pages, &layout, written_to).map_err(|e| Stage::Publish.broke(e))?;
        Ok(FilledOutput {
            reserve_bytes,
            port: self.port,
            layout,
        })
    }

    /// The file of the same tensor in its true shape, which is not the largest.
    fn plan_for(&self, shape: Vec<u64>) -> Result<FileLayout, LayoutError> {
        let bound = self.bound();
        plan(&Column {
            name: self.port.clone(),
            spec: TensorSpec {
                dtype: bound.spec.dtype,
                shape,
            },
            reserve_bytes: bound.length,
        })
    }
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

fn plan(column: &Column) -> Result<FileLayout, LayoutError> {
    FileLayout::plan(std::slice::from_ref(column))
}
