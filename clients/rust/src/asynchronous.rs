//! The client as futures. They run on any executor: the connection's own thread wakes them.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use strait_memory::FrameSocket;
use strait_tensor::{TensorPlace, TensorSpec};

use crate::address;
use crate::call::{Call, CallResult};
use crate::channel::ChannelReader;
use crate::connection::{Connection, Waiter};
use crate::element::Element;
use crate::error::Error;
use crate::lease::Lease;
use crate::output::Output;
use crate::prepared::{Prepare, Prepared};
use crate::segment::{AdoptedSegment, MappedSegment, OpenSegment};
use crate::session::{self, Options, Session};
use crate::stats::Stats;
use crate::stream::PreparedStream;
use crate::wire::{
    Flight, Kernel, Mapping, NewTensor, Plugin, QuotaList, QuotaSettings, Welcome, Worker,
};

/// A connection to a host whose operations are futures. Clones share the connection.
///
/// Every future can be dropped at any time: what the host still grants is released, and a call
/// that was sent is cancelled. Bytes are copied (by [`AsyncClient::put`] alone) on the task that
/// awaits, about 100 ms for a gigabyte.
#[derive(Clone, Debug)]
pub struct AsyncClient(pub(crate) Session);

impl AsyncClient {
    /// Connects to the host at `address` (`unix:///DIRECTORY`), or without one to the host that
    /// [`address::directory`] finds.
    ///
    /// # Errors
    /// [`Error::Address`] or [`Error::NoHost`] if there is none, [`Error::Remote`] if it speaks
    /// another protocol version.
    pub async fn connect(address: Option<&str>) -> Result<Self, Error> {
        Self::connect_with(&address::directory(address)?, &Options::default()).await
    }

    /// Connects to the host whose runtime directory is `directory`.
    ///
    /// # Errors
    /// As [`AsyncClient::connect`].
    pub async fn connect_with(directory: &Path, options: &Options) -> Result<Self, Error> {
        let connection = session::connect(directory, options)?;
        let session = Session::greet(connection, options, Waiter::Task).await?;
        Ok(Self(session))
    }

    /// Begins a session over a connected socket, such as one that a service manager handed over.
    ///
    /// # Errors
    /// As [`AsyncClient::connect`].
    pub async fn over(socket: FrameSocket, options: &Options) -> Result<Self, Error> {
        let connection = Connection::open(socket, options.renew)?;
        let session = Session::greet(connection, options, Waiter::Task).await?;
        Ok(Self(session))
    }

    /// The same connection, with this id in each of its requests, and so in the host's log lines
    /// and errors.
    ///
    /// # Errors
    /// [`Error::RequestId`] unless it is 1 to 64 characters from `A-Z a-z 0-9 . _ : -`.
    pub fn with_request_id(&self, id: &str) -> Result<Self, Error> {
        self.0.with_request_id(id).map(Self)
    }

    /// What the host said when the client connected.
    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        self.0.welcome()
    }

    /// Time until the host ends, once it announced that.
    #[must_use]
    pub fn draining(&self) -> Option<Duration> {
        self.0.connection().draining()
    }

    /// Tensor bytes that this client copied: those that went through `put`.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.0.copied_bytes()
    }

    /// Bytes of segments to fill that this client backed with huge pages, before their first write.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.0.births().huge_bytes()
    }

    /// Ends the connection for every clone and segment of it. What is mapped stays readable.
    pub fn close(&self) {
        self.0.connection().close();
    }

    /// A segment with room for tensors, to be filled in place. Its bytes are zero. All tensors of
    /// a segment share the size of their leading axis.
    ///
    /// # Errors
    /// [`Error::Remote`] if the host refuses, [`Error::Memory`] if it cannot be mapped.
    pub async fn create(&self, tensors: &[NewTensor]) -> Result<OpenSegment, Error> {
        self.0.create(tensors).await
    }

    /// Makes a segment a flight: others find it by that name, and it outlives this client.
    /// Its writable mapping is replaced by a read-only one first, even if the host refuses the name.
    ///
    /// # Errors
    /// [`Error::Remote`] with `NAME_TAKEN` if another flight has the name and `replace` is false.
    pub async fn publish(
        &self,
        segment: &mut OpenSegment,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        self.0.publish(segment, name, replace).await
    }

    /// Publishes a call's result: pages as they are, and of one that came in the reply a copy.
    ///
    /// # Errors
    /// As [`AsyncClient::publish`].
    pub async fn publish_result(
        &self,
        output: &Output,
        name: &str,
        replace: bool,
    ) -> Result<Flight, Error> {
        self.0.publish_output(output, name, replace).await
    }

    /// Copies a tensor into a segment of its own and publishes it as a flight of that name.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Length`] if `data` is not what `spec` says, and as
    /// [`AsyncClient::create`] and [`AsyncClient::publish`].
    pub async fn put<T: Element>(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[T],
        replace: bool,
    ) -> Result<Flight, Error> {
        self.0.put(name, spec, data, replace).await
    }

    /// [`AsyncClient::put`] for bytes of any dtype: little-endian, row-major, contiguous.
    ///
    /// # Errors
    /// As [`AsyncClient::put`].
    pub async fn put_bytes(
        &self,
        name: &str,
        spec: &TensorSpec,
        data: &[u8],
        replace: bool,
    ) -> Result<Flight, Error> {
        self.0.put_bytes(name, spec, data, replace).await
    }

    /// Hands over a memfd of your own, sealed as the protocol asks (ADOPT), and publishes it if
    /// it is given a name. It need not be an Arrow file.
    ///
    /// # Errors
    /// [`Error::Remote`] with `BAD_SEGMENT` and the reason if the host does not take it.
    pub async fn adopt(
        &self,
        memfd: OwnedFd,
        tensors: &[TensorPlace],
        name: Option<&str>,
        replace: bool,
    ) -> Result<AdoptedSegment, Error> {
        self.0.adopt(memfd, tensors, name, replace).await
    }

    /// Maps a flight's pages, read-only.
    ///
    /// # Errors
    /// [`Error::Remote`] with `FLIGHT_NOT_FOUND` if there is no such flight, [`Error::Memory`] if
    /// it cannot be mapped.
    pub async fn map(&self, name: &str) -> Result<MappedSegment, Error> {
        self.0.map(name).await
    }

    /// Gives leases a new life, counted from now; without `life` the host's default.
    /// Returns the life that the host granted.
    ///
    /// # Errors
    /// [`Error::LeaseExpired`] if one of them is over; then none is renewed.
    pub async fn renew(
        &self,
        leases: &[&Lease],
        life: Option<Duration>,
    ) -> Result<Duration, Error> {
        self.0.renew(leases, life).await
    }

    /// What a flight is, without mapping it.
    ///
    /// # Errors
    /// [`Error::Remote`] with `FLIGHT_NOT_FOUND`.
    pub async fn lookup(&self, name: &str) -> Result<Mapping, Error> {
        self.0.lookup(name).await
    }

    /// All flights of this principal, sorted by name.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn list(&self) -> Result<Vec<Flight>, Error> {
        self.0.list().await
    }

    /// Removes a flight's name; its memory is freed when the last lease ends.
    ///
    /// # Errors
    /// [`Error::Remote`] with `FLIGHT_NOT_FOUND`.
    pub async fn drop_flight(&self, name: &str) -> Result<(), Error> {
        self.0.drop_flight(name).await
    }

    /// Lets others read a flight: principals such as `token:alice` and groups such as `group:lab` in `add`; and no longer those in
    /// `remove`, where `*` stands for everybody. Answers whom it is shared with then. They see it as `OWNER/NAME`.
    ///
    /// # Errors
    /// [`Error::Remote`] with `FLIGHT_NOT_FOUND`, `NO_RIGHT`, `BAD_REQUEST` for whom it cannot be shared with.
    pub async fn share(
        &self,
        name: &str,
        add: &[&str],
        remove: &[&str],
    ) -> Result<Vec<String>, Error> {
        self.0.share(name, (add, remove)).await
    }

    /// All kernels, sorted by plugin and name; with `name` those of that name.
    ///
    /// # Errors
    /// If the connection has ended; [`Error::Remote`] with `KERNEL_NOT_FOUND`.
    pub async fn kernels(&self, name: Option<&str>) -> Result<Vec<Kernel>, Error> {
        self.0.kernels(name).await
    }

    /// The host's counts, with this client's own copied bytes.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn stats(&self) -> Result<Stats, Error> {
        self.0.stats().await
    }

    /// What each principal may have of the host, and has. For operators of the host.
    ///
    /// # Errors
    /// `NO_RIGHT`, or if the connection has ended.
    pub async fn limits(&self) -> Result<QuotaList, Error> {
        self.0.limits(None, None).await
    }

    /// Changes quotas of `principal`, or of all that have none of their own, until the host ends; returns what
    /// holds then. For operators of the host.
    ///
    /// # Errors
    /// `NO_RIGHT`, `BAD_REQUEST`, or if the connection has ended.
    pub async fn set_limits(
        &self,
        principal: Option<&str>,
        changes: QuotaSettings,
    ) -> Result<QuotaList, Error> {
        self.0.limits(principal, Some(changes)).await
    }

    /// The processes that run the host's kernels: all of them for its operators, one's own for others; none if the host
    /// itself runs them.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn workers(&self) -> Result<Vec<Worker>, Error> {
        self.0.workers().await
    }

    /// The loaded plugins, and the worker processes that their kernels cost lately: everybody's for the host's operators, one's own
    /// for others.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn plugins(&self) -> Result<Vec<Plugin>, Error> {
        self.0.plugins(None).await
    }

    /// Puts a plugin back into service, for `principal` or for everybody; for operators of the host. Returns all plugins.
    ///
    /// # Errors
    /// `NO_RIGHT`; `BAD_REQUEST` for a plugin or a principal that the host does not know.
    pub async fn enable_plugin(
        &self,
        plugin: &str,
        principal: Option<&str>,
    ) -> Result<Vec<Plugin>, Error> {
        self.0.plugins(Some((plugin, principal))).await
    }

    /// Asks whether the host is there.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn ping(&self) -> Result<(), Error> {
        self.0.ping().await
    }

    /// Begins a call of `kernel`, or `plugin/kernel` if two plugins have one of that name.
    pub fn call(&self, kernel: &str) -> Call<'_, Self> {
        Call::new(&self.0, kernel)
    }

    /// Begins what makes a kernel ready to be called again and again, on small tensors: see [`Prepared`], whose calls wait on
    /// the calling thread.
    pub fn prepare(&self, kernel: &str) -> Prepare<'_, Self> {
        Prepare::new(&self.0, kernel)
    }

    /// Reads the channel of that name, as [`Client::read_channel`](crate::Client::read_channel); its batches are waited for on the
    /// calling thread.
    ///
    /// # Errors
    /// As there.
    pub async fn read_channel(&self, name: &str) -> Result<ChannelReader, Error> {
        self.0.read_channel(name).await
    }

    /// Ends the call that is under way on the [`Prepared`] of that number; it then fails with `CANCELLED`. False if there is none.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn cancel_prepared(&self, number: u64) -> Result<bool, Error> {
        self.0.cancel_prepared(number).await
    }
}

impl Prepare<'_, AsyncClient> {
    /// Has the host make it ready.
    ///
    /// # Errors
    /// [`Error::Remote`] if the host refuses, as it would a call; [`Error::LeaseExpired`] if a fixed input's lease is over,
    /// and the ends of the connection.
    pub async fn send(self) -> Result<Prepared, Error> {
        self.run().await
    }

    /// Has the host make it ready for chunks of rows: the shapes of inputs begin with the most rows of one.
    ///
    /// # Errors
    /// As [`Self::send`]; `UNSUPPORTED` for a kernel that must see whole tensors.
    pub async fn stream(self) -> Result<PreparedStream, Error> {
        self.of_chunks().run().await.map(PreparedStream)
    }
}

impl Call<'_, AsyncClient> {
    /// Runs the kernel. Dropping the future cancels the kernel; results that were already under
    /// way are released.
    ///
    /// # Errors
    /// As for the blocking call.
    pub async fn send(self) -> Result<CallResult, Error> {
        self.run().await
    }
}
