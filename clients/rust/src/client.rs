//! The client for threads.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use std::vec;

use strait_memory::FrameSocket;
use strait_tensor::{TensorPlace, TensorSpec};

use crate::asynchronous::AsyncClient;
use crate::call::Call;
use crate::connection::Face;
use crate::element::Element;
use crate::error::Error;
use crate::lease::Lease;
use crate::reader::{park, wait};
use crate::segment::{AdoptedSegment, MappedSegment, OpenSegment};
use crate::stats::Stats;
use crate::wire::{Flight, Kernel, Mapping, NewTensor, Welcome};

/// How a client behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether leases are renewed in the background, at half of their life. Without it a lease
    /// ends when it expires, and [`Lease::check`] tells. On at first.
    pub renew: bool,
    /// Life of leases; the host's own default if none is named, and never more than its maximum.
    pub lease: Option<Duration>,
    /// Name and version by which the host's log knows this client.
    pub name: String,
}

impl Default for Options {
    fn default() -> Self {
        let name = concat!("strait-rust/", env!("CARGO_PKG_VERSION")).into();
        Self {
            renew: true,
            lease: None,
            name,
        }
    }
}

/// A connection to a host. Any number of threads may use it at once; clones share it.
///
/// It ends by [`Client::close`], or when the last clone, segment and lease of it is dropped. It
/// belongs to the process that connected: after a fork the child gets [`Error::Forked`].
#[derive(Clone, Debug)]
pub struct Client(AsyncClient);

impl Client {
    /// Connects to the host at `address` (`unix:///DIRECTORY`), or without one to the host that
    /// [`address::directory`](crate::address::directory) finds.
    ///
    /// # Errors
    /// [`Error::Address`] or [`Error::NoHost`] if there is none, [`Error::Remote`] if it speaks
    /// another protocol version.
    pub fn connect(address: Option<&str>) -> Result<Self, Error> {
        Self::greeted(AsyncClient::connect(address))
    }

    /// Connects to the host whose runtime directory is `directory`.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_to(directory: &Path) -> Result<Self, Error> {
        Self::connect_with(directory, &Options::default())
    }

    /// [`Client::connect_to`] with other than the usual options.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_with(directory: &Path, options: &Options) -> Result<Self, Error> {
        Self::greeted(AsyncClient::connect_with(directory, options))
    }

    fn greeted(client: impl Future<Output = Result<AsyncClient, Error>>) -> Result<Self, Error> {
        // Until the greeting there is no connection that this thread could receive from.
        wait(client, park).map(|client| Self(client.facing(Face::Thread)))
    }

    fn wait<F: Future>(&self, future: F) -> F::Output {
        self.0.connection().wait(future)
    }

    pub(crate) fn inner(&self) -> &AsyncClient {
        &self.0
    }

    /// The same connection, as futures.
    #[must_use]
    pub fn asynchronous(&self) -> AsyncClient {
        self.0.facing(Face::Task)
    }

    /// The same connection, whose every request from here carries this id into the host's log
    /// lines and errors.
    ///
    /// # Errors
    /// [`Error::RequestId`] unless it is 1 to 64 characters from `A-Z a-z 0-9 . _ : -`.
    pub fn with_request_id(&self, id: &str) -> Result<Self, Error> {
        self.0.with_request_id(id).map(Self)
    }

    /// What the host said when it was connected to.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        self.0.welcome()
    }

    /// Time until the host ends, once it announced that.
    #[must_use]
    pub fn draining(&self) -> Option<Duration> {
        self.0.draining()
    }

    /// Tensor bytes that this client copied: those that went through `put`.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.0.copied_bytes()
    }

    /// Bytes of segments to fill that this client backed with huge pages, before their first write.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.0.huge_bytes()
    }

    /// Ends the connection for every clone and segment of it. What is mapped stays readable.
    pub fn close(&self) {
        self.0.close();
    }

    /// A segment with room for tensors, to be filled in place. Its bytes are zero. All tensors of
    /// a segment share the size of their leading axis.
    ///
    /// # Errors
    /// [`Error::Remote`] if the host refuses, [`Error::Memory`] if it cannot be mapped.
    pub fn create(&self, tensors: &[NewTensor]) -> Result<OpenSegment, Error> {
        self.wait(self.0.create(tensors))
    }

    /// Gives a call's result a name, as it is.
    ///
    /// # Errors
    /// [`Error::Remote`] with `NAME_TAKEN` if another flight has the name and `replace` is false.
    pub fn publish_result(
        &self,
        segment: &MappedSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        self.wait(self.0.publish_result(segment, name, replace))
    }

    /// Copies a tensor into a segment of its own and publishes it; the column has the same name.
    /// Filling [`Client::create`]'s segment in place saves this copy.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Length`] if `data` is not what `spec` says, and as
    /// [`Client::create`] and [`OpenSegment::publish`].
    pub fn put<T: Element>(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[T],
        replace: bool,
    ) -> Result<Flight, Error> {
        self.wait(self.0.put(name, spec, data, replace))
    }

    /// [`Client::put`] for bytes of any dtype: little-endian, row-major, contiguous.
    ///
    /// # Errors
    /// As [`Client::put`].
    pub fn put_bytes(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[u8],
        replace: bool,
    ) -> Result<Flight, Error> {
        self.wait(self.0.put_bytes(name, spec, data, replace))
    }

    /// Hands over a memfd of one's own, sealed as the protocol asks (ADOPT), and with a name
    /// publishes it. It need not be an Arrow file.
    ///
    /// # Errors
    /// [`Error::Remote`] with `BAD_SEGMENT` and the reason if the host does not take it.
    pub fn adopt(
        &self,
        memfd: OwnedFd,
        tensors: &[TensorPlace],
        name: Option<&str>,
        replace: bool,
    ) -> Result<AdoptedSegment, Error> {
        self.wait(self.0.adopt(memfd, tensors, name, replace))
    }

    /// Maps a flight's pages, read-only.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND` if there is no such flight, [`Error::Memory`] if
    /// it cannot be mapped.
    pub fn map(&self, name: &str) -> Result<MappedSegment, Error> {
        self.wait(self.0.map(name))
    }

    /// Gives leases a new life, counted from now; without `life` the host's default.
    /// It answers the life that the host granted.
    ///
    /// # Errors
    /// [`Error::LeaseExpired`] if one of them is over; then none is renewed.
    pub fn renew(&self, leases: &[&Lease], life: Option<Duration>) -> Result<Duration, Error> {
        self.wait(self.0.renew(leases, life))
    }

    /// What a flight is, without mapping it.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND`.
    pub fn lookup(&self, name: &str) -> Result<Mapping, Error> {
        self.wait(self.0.lookup(name))
    }

    /// The flights of this principal, sorted by name; asked for page by page. A flight that comes
    /// or goes meanwhile may be seen or not.
    #[must_use]
    pub fn list(&self) -> Flights<'_> {
        Flights {
            client: self,
            page: Vec::new().into_iter(),
            after: None,
            more: true,
        }
    }

    /// Takes a flight's name away; its memory goes when the last lease ends.
    ///
    /// # Errors
    /// [`Error::Remote`] with `TENSOR_NOT_FOUND`.
    pub fn drop_flight(&self, name: &str) -> Result<(), Error> {
        self.wait(self.0.drop_flight(name))
    }

    /// All kernels, sorted by plugin and name; with `name` those of that name.
    ///
    /// # Errors
    /// The ends of the connection; [`Error::Remote`] with `KERNEL_NOT_FOUND`.
    pub fn kernels(&self, name: Option<&str>) -> Result<Vec<Kernel>, Error> {
        self.wait(self.0.kernels(name))
    }

    /// The host's counts, with this client's own copied bytes.
    ///
    /// # Errors
    /// The ends of the connection.
    pub fn stats(&self) -> Result<Stats, Error> {
        self.wait(self.0.stats())
    }

    /// Asks whether the host is there.
    ///
    /// # Errors
    /// The ends of the connection.
    pub fn ping(&self) -> Result<(), Error> {
        self.wait(self.0.ping())
    }

    /// Begins a call of `kernel`, or `plugin/kernel` where two plugins have one of that name.
    pub fn call(&self, kernel: &str) -> Call<'_, Self> {
        Call::new(self, kernel, self.0.lease_ms())
    }

    /// Begins a session over a connected socket, such as one that a service manager handed over.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(socket: FrameSocket, options: &Options) -> Result<Self, Error> {
        Self::greeted(AsyncClient::over(socket, options))
    }
}

/// What [`Client::list`] answers.
#[derive(Debug)]
pub struct Flights<'a> {
    client: &'a Client,
    page: vec::IntoIter<Flight>,
    after: Option<String>,
    more: bool,
}

impl Iterator for Flights<'_> {
    type Item = Result<Flight, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(flight) = self.page.next() {
            return Some(Ok(flight));
        }
        if !self.more {
            return None;
        }
        match self.client.wait(self.client.0.list_page(self.after.take())) {
            Ok(page) => {
                self.more = page.more;
                self.after = page.flights.last().map(|flight| flight.name.clone());
                self.page = page.flights.into_iter();
                self.page.next().map(Ok)
            }
            Err(error) => {
                self.more = false;
                Some(Err(error))
            }
        }
    }
}
