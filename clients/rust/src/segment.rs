//! Segments that this process maps: one to fill, and those that are there to be read. How they
//! are asked for and published.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use strait_memory::{Inode, ReadMapping, WriteMapping};
use strait_tensor::{TensorPlace, TensorSpec};

use crate::connection::Connection;
use crate::element::{self, Element};
use crate::error::Error;
use crate::lease::Lease;
use crate::session::Session;
use crate::tensor::{TensorView, cast_mut, check, find, length, range};
use crate::wire::{self, Flight, Mapping, NewTensor, Op, Writers};

impl Session {
    pub(crate) async fn create(&self, tensors: &[NewTensor]) -> Result<OpenSegment, Error> {
        let body = wire::Create {
            tensors: tensors.to_vec(),
            lease_ms: self.lease_ms(),
            request_id: self.request_id(),
        };
        let granted = self.granted(Op::Create, &body, Vec::new()).await?;
        let (mapping, lease, fd) = granted.single_fd()?;
        OpenSegment::new(mapping, lease, fd, self.clone())
    }

    pub(crate) async fn publish(
        &self,
        segment: &mut OpenSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        segment.freeze()?;
        let flight = self
            .publish_id(&segment.mapping.segment, name, replace)
            .await?;
        segment.mapping = flight.mapping.clone();
        Ok(flight)
    }

    pub(crate) async fn publish_result(
        &self,
        segment: &MappedSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        segment.lease.check()?;
        self.publish_id(&segment.mapping.segment, name, replace)
            .await
    }

    async fn publish_id(&self, segment: &str, name: &str, replace: bool) -> Result<Flight, Error> {
        let body = wire::Publish {
            segment: segment.to_owned(),
            name: name.to_owned(),
            replace,
            request_id: self.request_id(),
        };
        let mapped: wire::Mapped = self.ask(Op::Publish, &body).await?;
        Ok(Flight {
            name: name.to_owned(),
            mapping: mapped.mapping,
        })
    }

    pub(crate) async fn put<T: Element>(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[T],
        replace: bool,
    ) -> Result<Flight, Error> {
        element::check::<T>(name, spec.dtype)?;
        self.put_bytes(name, spec, bytemuck::cast_slice(data), replace)
            .await
    }

    pub(crate) async fn put_bytes(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[u8],
        replace: bool,
    ) -> Result<Flight, Error> {
        let expected = spec.bytes()?;
        let given = data.len() as u64;
        if given != expected {
            return Err(Error::Length {
                spec: spec.clone(),
                expected,
                given,
            });
        }
        let mut segment = self.filled(name, spec, data).await?;
        self.publish(&mut segment, name, replace).await
    }

    /// A segment with a copy of `data`, which is as long as `spec` says, as its one tensor.
    pub(crate) async fn filled(
        &self,
        tensor: &str,
        spec: &TensorSpec,
        data: &[u8],
    ) -> Result<OpenSegment, Error> {
        let TensorSpec { dtype, shape } = spec.clone();
        let made = NewTensor {
            name: tensor.to_owned(),
            dtype,
            shape,
        };
        let mut segment = self.create(&[made]).await?;
        segment.bytes_mut(tensor)?.copy_from_slice(data);
        self.count_copied(data.len() as u64);
        Ok(segment)
    }

    pub(crate) async fn adopt(
        &self,
        memfd: OwnedFd,
        tensors: &[TensorPlace],
        name: Option<&str>,
        replace: bool,
    ) -> Result<AdoptedSegment, Error> {
        let body = wire::Adopt {
            tensors: tensors.iter().map(Into::into).collect(),
            name: name.map(str::to_owned),
            replace,
            lease_ms: self.lease_ms(),
            request_id: self.request_id(),
        };
        let granted = self.granted(Op::Adopt, &body, vec![memfd]).await?;
        Ok(AdoptedSegment {
            mapping: granted.mapping,
            lease: granted.lease,
        })
    }

    pub(crate) async fn map(&self, name: &str) -> Result<MappedSegment, Error> {
        let body = wire::Map {
            name: Some(name.to_owned()),
            segment: None,
            lease_ms: self.lease_ms(),
            request_id: self.request_id(),
        };
        let granted = self.granted(Op::Map, &body, Vec::new()).await?;
        let (mapping, lease, fd) = granted.single_fd()?;
        MappedSegment::new(mapping, lease, fd)
    }
}

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
    session: Session,
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
    fn new(mapping: Mapping, lease: Lease, fd: OwnedFd, session: Session) -> Result<Self, Error> {
        check(&mapping)?;
        let filling = Filling::Fresh(WriteMapping::new(&fd, length(&mapping)?)?, fd);
        Ok(Self {
            pages: Pages::new(filling, lease.connection()),
            mapping,
            session,
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
    /// [`Error::NotWritable`] once publishing has begun.
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

    /// The bytes of every tensor at once, in the order in which they were announced, for code that fills several at a time.
    ///
    /// # Errors
    /// [`Error::NotWritable`] once publishing has begun.
    pub fn every_bytes_mut(&mut self) -> Result<Vec<&mut [u8]>, Error> {
        let ranges: Vec<_> = self.mapping.tensors.iter().map(range).collect();
        let (mut rest, mut at) = (self.all_mut()?, 0);
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            // Tensors lie one behind the other; what would not is empty.
            let skipped = range.start.saturating_sub(at).min(rest.len());
            let (_, from_here) = rest.split_at_mut(skipped);
            let length = range.len().min(from_here.len());
            let (part, behind) = from_here.split_at_mut(length);
            parts.push(part);
            (rest, at) = (behind, range.end);
        }
        Ok(parts)
    }

    fn all_mut(&mut self) -> Result<&mut [u8], Error> {
        let filling = self.pages.get_mut()?;
        *filling = match std::mem::replace(filling, Filling::Unmapped) {
            // Now and not when it was made: this is the thread that is going to fill it.
            Filling::Fresh(mut pages, fd) => {
                for place in &self.mapping.tensors {
                    pages.back_with_huge_pages(range(place), self.session.births());
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

    /// Who made it.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Gives up writing, which the host needs to see before it can seal.
    fn freeze(&mut self) -> Result<(), Error> {
        let pages = self.pages.get_mut()?;
        *pages = match std::mem::replace(pages, Filling::Unmapped) {
            Filling::Fresh(writable, fd) | Filling::Writable(writable, fd) => {
                Filling::ReadOnly(writable.replace_readonly(&fd)?)
            }
            other => other,
        };
        Ok(())
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
        let pages = match mapping.writers {
            Writers::None => ReadMapping::new(&fd, length(&mapping)?)?,
            Writers::Host | Writers::Worker => ReadMapping::of_result(&fd, length(&mapping)?)?,
            writers @ (Writers::Creator | Writers::Anyone) => {
                return Err(Error::StillWritten {
                    segment: mapping.segment,
                    writers,
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

/// A memfd of your own that the host took over ([`Client::adopt`](crate::Client::adopt)).
/// Dropping it gives the lease back.
#[derive(Debug)]
pub struct AdoptedSegment {
    mapping: Mapping,
    lease: Lease,
}

impl AdoptedSegment {
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
