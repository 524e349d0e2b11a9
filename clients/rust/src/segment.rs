//! Segments that this process maps: one to fill, and those that are there to be read.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_memory::{Inode, ReadMapping, WriteMapping};
use strait_tensor::{Dtype, TensorPlace};

use crate::asynchronous::AsyncClient;
use crate::connection::Connection;
use crate::element::{self, Element};
use crate::error::Error;
use crate::lease::Lease;
use crate::wire::{Flight, Mapping, Seal};

/// Tensors start on page boundaries; this much of it is enough for every element type, and is
/// checked so that no cast to a slice can fail later.
const ALIGN_BYTES: u64 = 64;

/// A mapping, for the process that made it. A forked child has no pages there
/// (`MADV_DONTFORK`), and by now something else of its own may lie at their addresses.
#[derive(Debug)]
struct Pages<M> {
    /// Empty in drop only.
    mapped: Option<M>,
    connection: Arc<Connection>,
}

impl<M> Pages<M> {
    fn new(mapped: M, connection: &Arc<Connection>) -> Self {
        Self {
            mapped: Some(mapped),
            connection: Arc::clone(connection),
        }
    }

    fn get(&self) -> Result<&M, Error> {
        self.connection.check_owner()?;
        Ok(self.mapped.as_ref().expect("it is taken out in drop only"))
    }

    fn get_mut(&mut self) -> Result<&mut M, Error> {
        self.connection.check_owner()?;
        Ok(self.mapped.as_mut().expect("it is taken out in drop only"))
    }
}

impl<M> Drop for Pages<M> {
    fn drop(&mut self) {
        if self.connection.check_owner().is_err() {
            std::mem::forget(self.mapped.take());
        }
    }
}

/// A segment to fill: made by [`Client::create`](crate::Client::create), mapped writable.
///
/// It can be a call's input as it is, or be published. Dropping it unmaps it and gives its lease
/// back; unless it was published it is then gone.
#[derive(Debug)]
pub struct OpenSegment {
    // Unmapped before the lease ends: fields are dropped in this order.
    pages: Pages<Filling>,
    mapping: Mapping,
    client: AsyncClient,
    lease: Lease,
}

#[derive(Debug)]
enum Filling {
    /// Nobody has written to it: the next write is the first.
    Fresh(WriteMapping, OwnedFd),
    Writable(WriteMapping, OwnedFd),
    ReadOnly(ReadMapping),
    /// The exchange of one for the other failed.
    Unmapped,
}

impl OpenSegment {
    pub(crate) fn new(
        mapping: Mapping,
        lease: Lease,
        fd: OwnedFd,
        client: AsyncClient,
    ) -> Result<Self, Error> {
        check(&mapping)?;
        let filling = Filling::Fresh(WriteMapping::new(&fd, length(&mapping)?)?, fd);
        Ok(Self {
            pages: Pages::new(filling, lease.connection()),
            mapping,
            client,
            lease,
        })
    }

    /// What the host said about the segment.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The right that holds it.
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// A tensor's elements, row-major.
    ///
    /// # Errors
    /// [`Error::NoTensor`], [`Error::Dtype`] if its elements are not `T`, and
    /// [`Error::NotWritable`] once publishing was begun.
    pub fn tensor_mut<T: Element>(&mut self, name: &str) -> Result<&mut [T], Error> {
        let place = find(&self.mapping, name)?;
        element::check::<T>(name, place.spec.dtype)?;
        let range = range(place);
        Ok(cast_mut(self.all_mut()?.get_mut(range).unwrap_or_default()))
    }

    /// A tensor's bytes: little-endian, row-major.
    ///
    /// # Errors
    /// As [`OpenSegment::tensor_mut`], but for the dtype.
    pub fn bytes_mut(&mut self, name: &str) -> Result<&mut [u8], Error> {
        let range = range(find(&self.mapping, name)?);
        Ok(self.all_mut()?.get_mut(range).unwrap_or_default())
    }

    fn all_mut(&mut self) -> Result<&mut [u8], Error> {
        let filling = self.pages.get_mut()?;
        *filling = match std::mem::replace(filling, Filling::Unmapped) {
            // Now and not when it was made: this is the thread that is going to fill it.
            Filling::Fresh(mut pages, fd) => {
                for place in &self.mapping.tensors {
                    pages.back_with_huge_pages(range(place), self.client.births());
                }
                Filling::Writable(pages, fd)
            }
            other => other,
        };
        match filling {
            Filling::Writable(pages, _) => Ok(pages.bytes_mut()),
            _ => Err(Error::NotWritable {
                segment: self.mapping.segment.clone(),
            }),
        }
    }

    /// A tensor as it is now.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let place = find(&self.mapping, name)?;
        let all = match self.pages.get()? {
            Filling::Fresh(pages, _) | Filling::Writable(pages, _) => pages.bytes(),
            Filling::ReadOnly(pages) => pages.bytes(),
            Filling::Unmapped => {
                return Err(Error::NotWritable {
                    segment: self.mapping.segment.clone(),
                });
            }
        };
        Ok(TensorView::of(place, all))
    }

    /// Gives the segment a name under which others find it; it then lives on without this client.
    /// Its writable mapping is replaced by a read-only one first, at the same address, even if the
    /// host refuses the name. Asynchronous code uses [`AsyncClient::publish`].
    ///
    /// # Errors
    /// [`Error::Remote`] with `NAME_TAKEN` if another flight has the name and `replace` is false.
    pub fn publish(&mut self, name: &str, replace: bool) -> Result<Flight, Error> {
        let client = self.client.clone();
        client
            .connection()
            .wait(client.publish(self, name, replace))
    }

    /// Gives up writing, which the host needs to see before it can seal.
    pub(crate) fn freeze(&mut self) -> Result<(), Error> {
        let pages = self.pages.get_mut()?;
        *pages = match std::mem::replace(pages, Filling::Unmapped) {
            Filling::Fresh(writable, fd) | Filling::Writable(writable, fd) => {
                Filling::ReadOnly(writable.replace_readonly(&fd)?)
            }
            other => other,
        };
        Ok(())
    }

    pub(crate) fn published(&mut self, mapping: Mapping) {
        self.mapping = mapping;
    }
}

/// A segment mapped to be read: a flight, or a call's result.
///
/// Nobody writes to its pages while it lives. Dropping it unmaps it and gives its lease back.
#[derive(Debug)]
pub struct MappedSegment {
    // Unmapped before the lease ends: fields are dropped in this order.
    pages: Pages<ReadMapping>,
    inode: Inode,
    mapping: Mapping,
    lease: Lease,
}

impl MappedSegment {
    pub(crate) fn new(mapping: Mapping, lease: Lease, fd: OwnedFd) -> Result<Self, Error> {
        check(&mapping)?;
        let pages = match mapping.seal {
            Seal::Write => ReadMapping::new(&fd, length(&mapping)?)?,
            Seal::HostWrite => ReadMapping::of_result(&fd, length(&mapping)?)?,
            seal @ (Seal::ClientWrite | Seal::None) => {
                return Err(Error::StillWritten {
                    segment: mapping.segment,
                    seal,
                });
            }
        };
        let inode = pages.inode();
        Ok(Self {
            pages: Pages::new(pages, lease.connection()),
            inode,
            mapping,
            lease,
        })
    }

    /// What the host said about the segment.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The right that holds it.
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Which memory it is: equal for two mappings of the same pages.
    #[must_use]
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// One of its tensors.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Forked`] in a child of the process that mapped it.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let place = find(&self.mapping, name)?;
        Ok(TensorView::of(place, self.pages.get()?.bytes()))
    }

    /// Its tensors, in their order.
    ///
    /// # Errors
    /// [`Error::Forked`] in a child of the process that mapped it.
    pub fn tensors(&self) -> Result<impl Iterator<Item = TensorView<'_>>, Error> {
        let all = self.pages.get()?.bytes();
        Ok(self
            .mapping
            .tensors
            .iter()
            .map(move |place| TensorView::of(place, all)))
    }
}

/// A memfd of one's own that the host took over ([`Client::adopt`](crate::Client::adopt)).
/// Dropping it gives the lease back.
#[derive(Debug)]
pub struct AdoptedSegment {
    mapping: Mapping,
    lease: Lease,
}

impl AdoptedSegment {
    pub(crate) fn new(mapping: Mapping, lease: Lease) -> Self {
        Self { mapping, lease }
    }

    /// What the host said about the segment.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The right that holds it.
    #[must_use]
    pub fn lease(&self) -> &Lease {
        &self.lease
    }
}

/// A tensor in a mapped segment.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    place: &'a TensorPlace,
    bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    fn of(place: &'a TensorPlace, all: &'a [u8]) -> Self {
        Self {
            place,
            bytes: all.get(range(place)).unwrap_or_default(),
        }
    }

    /// Its name in the segment.
    #[must_use]
    pub fn name(&self) -> &'a str {
        &self.place.name
    }

    /// The type of its elements.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.place.spec.dtype
    }

    /// The sizes of its axes, the last one fastest. Empty: one element.
    #[must_use]
    pub fn shape(&self) -> &'a [u64] {
        &self.place.spec.shape
    }

    /// Its bytes: little-endian, row-major, contiguous.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its elements, row-major.
    ///
    /// # Errors
    /// [`Error::Dtype`] if they are not `T`.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], Error> {
        element::check::<T>(self.name(), self.dtype())?;
        Ok(cast(self.bytes))
    }
}

/// Holds the host's word against itself, so that later no tensor reaches out of its segment.
fn check(mapping: &Mapping) -> Result<(), Error> {
    let wrong = |what: String| {
        Err(Error::Protocol(format!(
            "mapping of segment {}: {what}",
            mapping.segment
        )))
    };
    if mapping.strait_mmap != 1 {
        return wrong(format!(
            "its version is {}, known is 1",
            mapping.strait_mmap
        ));
    }
    for TensorPlace {
        name,
        spec,
        offset,
        length,
    } in &mapping.tensors
    {
        match spec.bytes() {
            Ok(bytes) if bytes == *length => {}
            Ok(bytes) => {
                return wrong(format!(
                    "tensor {name:?} is {spec} with {bytes} bytes, not {length}"
                ));
            }
            Err(error) => return wrong(format!("tensor {name:?}: {error}")),
        }
        if offset
            .checked_add(*length)
            .is_none_or(|end| end > mapping.bytes)
        {
            return wrong(format!(
                "tensor {name:?} has {length} bytes at {offset}, the segment {} in all",
                mapping.bytes
            ));
        }
        if *length > 0 && offset % ALIGN_BYTES != 0 {
            return wrong(format!(
                "tensor {name:?} is at {offset}, no multiple of {ALIGN_BYTES}"
            ));
        }
    }
    Ok(())
}

fn find<'a>(mapping: &'a Mapping, name: &str) -> Result<&'a TensorPlace, Error> {
    mapping
        .tensors
        .iter()
        .find(|place| place.name == name)
        .ok_or_else(|| Error::NoTensor {
            name: name.to_owned(),
            known: mapping
                .tensors
                .iter()
                .map(|place| place.name.clone())
                .collect(),
        })
}

fn length(mapping: &Mapping) -> Result<usize, Error> {
    usize::try_from(mapping.bytes).map_err(|_| {
        Error::Protocol(format!(
            "a segment of {} bytes, more than there are addresses",
            mapping.bytes
        ))
    })
}

/// Within the mapped bytes: [`check`] saw to it, and both mappings cover `mapping.bytes`.
fn range(place: &TensorPlace) -> Range<usize> {
    // A place in mapped memory is an address offset, so it fits.
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    at(place.offset)..at(place.offset + place.length)
}

/// An empty tensor may lie anywhere, the others are aligned: [`check`] saw to it.
fn cast<T: Element>(bytes: &[u8]) -> &[T] {
    if bytes.is_empty() {
        &[]
    } else {
        bytemuck::cast_slice(bytes)
    }
}

fn cast_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    if bytes.is_empty() {
        &mut []
    } else {
        bytemuck::cast_slice_mut(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use strait_tensor::TensorSpec;

    fn mapping(shape: &[u64], offset: u64, length: u64) -> Mapping {
        let spec = TensorSpec {
            dtype: Dtype::Float64,
            shape: shape.to_vec(),
        };
        Mapping {
            strait_mmap: 1,
            host_id: String::new(),
            socket: String::new(),
            segment: "0123".into(),
            generation: 1,
            bytes: 1 << 17,
            seal: Seal::Write,
            tensors: vec![TensorPlace {
                name: "x".into(),
                spec,
                offset,
                length,
            }],
        }
    }

    #[test]
    fn places_that_reach_out_are_refused() {
        let text = |shape: &[u64], offset, length| {
            check(&mapping(shape, offset, length))
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(text(&[8192], 1 << 16, 1 << 16), None);
        assert_eq!(
            text(&[0, 5], (1 << 17) - 1, 0),
            None,
            "an empty tensor may lie anywhere"
        );
        for (shape, offset, length, says) in [
            (
                &[8193][..],
                1 << 16,
                65544,
                "65544 bytes at 65536, the segment 131072 in all",
            ),
            (&[8192], 1 << 16, 1 << 17, "with 65536 bytes, not 131072"),
            (&[1], u64::MAX - 7, 8, "at 18446744073709551608"),
            (&[1], 65544, 8, "no multiple of 64"),
            (&[u64::MAX, u64::MAX], 0, 8, "float64"),
        ] {
            let text = text(shape, offset, length).unwrap_or_default();
            assert!(text.contains(says), "{text:?} does not say {says:?}");
        }
        let newer = Mapping {
            strait_mmap: 2,
            ..mapping(&[1], 0, 8)
        };
        assert!(check(&newer).is_err());
    }

    #[test]
    fn a_missing_tensor_is_answered_with_those_that_there_are() {
        let error = find(&mapping(&[1], 0, 8), "y").expect_err("there is only x");
        assert_eq!(
            error.to_string(),
            "no tensor \"y\" in the segment; it has x"
        );
    }
}
