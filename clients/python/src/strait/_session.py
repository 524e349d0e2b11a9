"""Sessions: what a program does with a host."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from . import _address, _channel, _dtypes, _foreign, _parameters, _pipeline, _prepare, _stream
from ._array import Array, Arrays, LazyInfo, Placed, Segment, view_of
from ._call import Call, Scratch
from ._channel import ChannelReader
from ._connection import Connection
from ._errors import ProtocolError, RemoteError
from ._pages import HUGE_MIN_BYTES, Pages
from ._prepared import Prepared, Result
from ._reply import Grant, Reply
from ._stream import PreparedStream
from ._wire import ALIGN_BYTES, Flight, Kernel, Op, SegmentMapping, Tensor, milliseconds

VERSION = "0.1.0"
#: Segments that are kept for the next array that has to be copied in: at most so many, of so many bytes in all.
_SCRATCH_COUNT_MAX = 8
_SCRATCH_BYTES_MAX = 256 << 20
#: A segment of which less is left is not used for another call.
_LEASE_LEFT_MIN = 0.05
#: A forked child has what its parent can write to mapped writable for a moment, until its first line of Python runs or
#: it executes another program. For so long, and so often, the host is asked again to seal such a segment.
_STILL_WRITABLE_SECONDS = 1.0
_STILL_WRITABLE_INTERVAL = 0.002


@dataclass(frozen=True)
class ClientStats:
    """What this side of a session counted."""

    #: Tensor bytes that were copied: into segments or frames because they were not in a segment, out of frames, or to be numpy's
    #: truth values.
    copied_bytes: int
    #: Calls that were sent.
    calls: int
    #: Segments that are mapped now.
    mappings: int
    #: Bytes of segments made here that got huge pages before they were filled.
    huge_bytes: int


@dataclass
class _Copies:
    """What a call copies of its inputs: small ones into its frame, others into segments."""

    payload: bytearray = field(default_factory=bytearray)
    scratch: List[Scratch] = field(default_factory=list)


class Session:
    """A connection to a host, for any number of threads; made by `connect`.

    It belongs to the process that connected: in a forked child everything that needs the host raises `ForkedError`, so
    connect again there; results that are mapped show the same values, and arrays of `empty` are the child's own copies.
    It ends with `close` or a `with` block; arrays that are mapped stay readable.
    """

    def __init__(self, connection: Connection, lease: Optional[float]) -> None:
        self._connection = connection
        self._lease = None if lease is None else milliseconds(lease)
        self._placed = Placed()
        self._lock = threading.Lock()
        self._scratch: List[Scratch] = []
        # Whatever has a socket of its own.
        self._prepared: "weakref.WeakSet[Prepared]" = weakref.WeakSet()
        self._ports = _pipeline.Ports()
        self._copied_bytes = 0
        self._huge_bytes = 0
        self._calls = 0

    # The host

    @property
    def host_id(self) -> str:
        """Id of the host's process."""
        return str(self._connection.welcome.get("host_id", ""))

    @property
    def move_min_bytes(self) -> int:
        """From this size on a kernel works on a tensor's own pages; smaller tensors are copied by the host, which is faster."""
        return int(self._connection.welcome.get("move_min_bytes", 0))

    @property
    def inline_bytes(self) -> int:
        """Up to this size a call's ordinary arrays and results travel in its frames and not in segments; 0: none do."""
        return int(self._connection.welcome.get("inline_bytes", 0))

    @property
    def draining(self) -> Optional[float]:
        """Seconds until the host ends, once it has announced that; else None."""
        return self._connection.draining

    def ping(self) -> None:
        """Asks whether the host is there."""
        self._connection.call(Op.PING, {})

    def stats(self) -> Dict[str, Any]:
        """The host's counts at this moment, as docs/protocol.md lists them under STATS."""
        return self._connection.call(Op.STATS, {}).body

    def client_stats(self) -> ClientStats:
        """This side's counts."""
        return ClientStats(self._copied_bytes + self._placed.copied_bytes, self._calls, len(self._placed.segments), self._huge_bytes)

    def kernels(self, name: Optional[_pipeline.Asked] = None) -> List[Kernel]:
        """All kernels with their ports, parameters and docs, sorted by plugin and name; with `name` those of that name, or that pipeline."""
        body = {} if name is None else _pipeline.fields(name)
        return [Kernel.read(entry) for entry in self._all(Op.KERNELS, "kernels", body, _kernel_key)]

    def close(self) -> None:
        """Ends the session. What is mapped stays readable; leases and unpublished segments end."""
        if self._connection.close():
            with self._lock:
                self._scratch.clear()
            for prepared in list(self._prepared):
                prepared.close()

    def __reduce__(self) -> Any:
        raise TypeError("a session belongs to the process that connected and cannot be pickled; connect where it is to be used")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Arrays in segments

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any = np.float64) -> "np.ndarray[Any, Any]":
        """A numpy array of zeros in shared memory, to be filled and passed to `call` or `publish` without a copy.

        It must be passed whole: a slice or reshaped view of it is copied. While a call uses it, do not write to it.
        `dtype`: numpy's, or one of the protocol's names (`"bfloat16"`).
        """
        return self._create([("x", _dtypes.to_name(dtype), _shape(shape))])[1][0]

    def _create(
        self, tensors: Sequence[Tuple[str, str, Tuple[int, ...]]]
    ) -> Tuple[Segment, List["np.ndarray[Any, Any]"]]:
        wanted = {"tensors": [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in tensors]}
        reply = self._connection.call(Op.CREATE, self._with_lease(wanted, None))
        with Grant(self._connection, reply) as grant:
            segment, memory = self._place(grant, reply.body, 0, writable=True)
        for tensor in segment.mapping.tensors:
            if tensor.length >= HUGE_MIN_BYTES:
                huge = segment.pages.collapse(tensor.offset, tensor.length)
                with self._lock:
                    self._huge_bytes += huge
        arrays = [view_of(memory, tensor) for tensor in segment.mapping.tensors]
        segment.filling = [weakref.ref(array) for array in arrays]
        return segment, arrays

    def _place(self, grant: Grant, granted: Mapping[str, Any], index: Any, writable: bool) -> Tuple[Segment, memoryview]:
        """Maps a segment that a reply grants, of the descriptor with that index."""
        mapping = SegmentMapping.read(granted.get("mapping"))
        lease, expires_ms = granted.get("lease"), granted.get("expires_ms")
        if not isinstance(lease, int) or not isinstance(expires_ms, (int, float)):
            raise ProtocolError(f"a segment without a lease: {lease!r}, {expires_ms!r}")
        fd = grant.fd(index)
        pages = Pages(fd, mapping.bytes, True) if writable else Pages.readonly(fd, mapping.bytes, mapping.writers)
        segment = Segment(self._connection, self._placed, mapping, lease, pages)
        if writable:
            pages.fd = grant.keep(index)
        memory = pages.lend(segment)
        grant.leases.discard(lease)
        self._connection.hold(lease, int(expires_ms))
        return segment, memory

    def _with_lease(self, body: Dict[str, Any], lease: Optional[float]) -> Dict[str, Any]:
        lease_ms = self._lease if lease is None else milliseconds(lease)
        if lease_ms is not None:
            body["lease_ms"] = lease_ms
        return body

    # Flights

    def put(self, name: str, x: Any, *, replace: bool = False) -> None:
        """Makes `x` a flight: other programs find it by that name, and it lives on without this session.

        An array of `empty` or a call's result in a segment is published as it is (`publish`); any other array is copied once. A
        table (pyarrow, pandas, polars) or a mapping from names to arrays becomes a flight with a tensor for each column
        or entry; `"name#tensor"` names one of them.

        Raises `ValueError` for nulls and masked elements, `TypeError` for anything but arrays of numbers or booleans.
        Raises `RemoteError` with `NAME_TAKEN` if there is such a flight and `replace` is false.
        """
        if isinstance(x, Array):
            self.publish(name, x, replace=replace)
            return
        found = _foreign.read(x, f"tensor {name!r}")
        if isinstance(found, np.ndarray):
            if self._placed.find(found) is not None:
                self.publish(name, found, replace=replace)
                return
            columns = [(name, found)]
        else:
            columns = found
            if not columns:
                raise ValueError(f"table {name!r} has no columns; a flight has at least one")
        self._put(name, [(column, _dtypes.to_name(values.dtype), values) for column, values in columns], replace)

    def _put(self, name: str, tensors: Sequence[Tuple[str, str, "np.ndarray[Any, Any]"]], replace: bool) -> None:
        """Publishes copies of these, each with its name and dtype."""
        segment, arrays = self._create([(tensor, dtype, values.shape) for tensor, dtype, values in tensors])
        for array, (_, _, values) in zip(arrays, tensors):
            self._copy(array, values)
        self._publish(name, segment, replace)

    def publish(self, name: str, x: Union[Array, "np.ndarray[Any, Any]"], *, replace: bool = False) -> None:
        """`put` without a copy, for an array of `empty` or a call's result. (One that came in the reply is copied, and counted.)

        From then on the array of `empty` is read-only. A writable view that was taken of it before no longer writes to
        the flight.
        """
        if isinstance(x, Array):
            memory = x._usable()
            if x._segment is not None:
                self._publish(name, x._segment, replace)
            else:
                self._put(name, [(x.name, x.dtype_name, view_of(memory, x._tensor))], replace)
            return
        found = self._placed.find(_foreign.as_numpy(x, f"tensor {name!r}"))
        if found is None:
            raise ValueError("only a whole array of Session.empty, or a call's result, can be published; use put")
        self._publish(name, found[0], replace)

    def _publish(self, name: str, segment: Segment, replace: bool) -> None:
        self._connection.check()
        until = time.monotonic() + _STILL_WRITABLE_SECONDS
        if segment.pages.fd is not None:
            # Sealing ends all writing, so this process must give it up first.
            segment.pages.end_writing()
            for reference in segment.filling:
                array = reference()
                if array is not None:
                    array.flags.writeable = False
        while True:
            try:
                body = {"segment": segment.mapping.segment, "name": name, "replace": replace}
                self._connection.call(Op.PUBLISH, body)
                return
            except RemoteError as error:
                # A child that was just forked has not given it up yet.
                if error.reason != "STILL_WRITABLE" or time.monotonic() > until:
                    raise
                time.sleep(_STILL_WRITABLE_INTERVAL)

    def get(self, name: str, *, lease: Optional[float] = None) -> Union[Array, Arrays]:
        """The flight of that name, mapped: an `Array`, or `Arrays` if it has several tensors; `"name#tensor"` gives one.

        `lease`: the lease's life in seconds, renewed unless the session was made with `renew=False`.

        Raises `RemoteError` with `FLIGHT_NOT_FOUND`.
        """
        flight, _, tensor = name.partition("#")
        reply = self._connection.call(Op.MAP, self._with_lease({"name": flight}, lease))
        with Grant(self._connection, reply) as grant:
            segment, memory = self._place(grant, reply.body, 0, writable=False)
        tensors = segment.mapping.tensors
        if tensor:
            return Array(self._placed, segment, segment.mapping.tensor(tensor), memory)
        if len(tensors) == 1:
            return Array(self._placed, segment, tensors[0], memory)
        return Arrays([(tensor.name, Array(self._placed, segment, tensor, memory)) for tensor in tensors])

    def lookup(self, name: str) -> Flight:
        """What a flight is, without mapping it; `RemoteError` with `FLIGHT_NOT_FOUND` if there is none."""
        body = self._connection.call(Op.LOOKUP, {"name": name}).body
        return Flight(name, SegmentMapping.read(body.get("mapping")).tensors)

    def list(self) -> List[Flight]:
        """This user's flights, sorted by name."""
        entries = self._all(Op.LIST, "flights", {}, lambda entry: entry["name"])
        return [Flight(entry["name"], SegmentMapping.read(entry["mapping"]).tensors) for entry in entries]

    def delete(self, name: str) -> None:
        """Removes a flight's name; its memory is freed when the last lease ends."""
        self._connection.call(Op.DROP, {"name": name})

    def _all(self, op: Op, key: str, body: Dict[str, Any], after: Any) -> Iterable[Dict[str, Any]]:
        found: List[Dict[str, Any]] = []
        while True:
            page = self._connection.call(op, body).body
            try:
                found += page[key]
                if not page.get("more") or not page[key]:
                    return found
                body = {**body, "after": after(found[-1])}
            except (KeyError, TypeError) as error:
                raise ProtocolError(f"a malformed answer to {op.name}: {error!r}") from None

    # Calls

    def call(self, kernel: _pipeline.Asked, *inputs: Any, **options: Any) -> Union[Array, Arrays]:
        """Runs a kernel, or a pipeline, and returns its output: an `Array`, or `Arrays` by port if it has more than one or none.

            y = s.call("zscore", x, axis=0)
            y = s.call("clip(lo=0, hi=1) | cast(to=int8)", x)   # or the same as JSON: {"stages": [...]}

        Positional inputs take the kernel's ports in their order; see `start` for everything else.
        """
        return self.start(kernel, *inputs, **options).result()

    def start(
        self,
        kernel: _pipeline.Asked,
        *args: Any,
        inputs: Optional[Mapping[str, Any]] = None,
        parameters: Optional[Mapping[str, Any]] = None,
        publish: Optional[Mapping[str, str]] = None,
        replace: bool = False,
        seal: bool = False,
        map: bool = True,
        deadline: Optional[float] = None,
        lease: Optional[float] = None,
        limits: Optional[Mapping[str, int]] = None,
        inline_bytes: Optional[int] = None,
        verify: bool = False,
        threads: Optional[int] = None,
        request_id: Optional[str] = None,
        idempotency_key: Optional[str] = None,
        **more_parameters: Any,
    ) -> "Call":
        """Sends a call and returns at once; `Call.result` waits for it, `Call.cancel` ends it.

        Inputs, by position or by port in `inputs`: an array of `empty` or a result (no copy), a flight's name
        (`"x"`, `"x#tensor"`), or any other array or list of numbers (one copy, counted in `client_stats`: up to
        `Session.inline_bytes` into the request itself).

        Keyword arguments that are not listed here are the kernel's parameters (a pipeline has none of its own); `parameters` takes
        those whose names are listed. `axis` is 0-based and row-major, as in numpy, and not negative.

        `publish`: names for outputs, by port; `replace`: even if other flights have them. `seal`: outputs are sealed permanently.
        `map`: whether outputs in segments are mapped here; if not, publish them all. `deadline`: seconds from the host's
        receipt. `lease`: lifetime of the outputs' leases in seconds. `limits`: lower than the host's own. `inline_bytes`: the
        largest output that may come in the reply and not in a segment, `Session.inline_bytes` if None; 0: none may. `verify`:
        fill `CallInfo.pages`. `threads`: slices to cut the rows into, if the kernel can be cut (1 to 64; None: as many as are worth
        it). `request_id`: id in the host's log. `idempotency_key`: a repeat within a minute gets the same results, without another run.

        Raises `TypeError` or `ValueError` for arguments that no kernel could take; `RemoteError`s come with the result.
        """
        self._connection.check()
        given = dict(inputs or {})
        if args:
            given.update(self._by_position(kernel, args, given))
        copies = _Copies()
        copy = functools.partial(self._copied, copies)
        body = _pipeline.fields(kernel)
        body["inputs"] = {port: self._input(port, value, copy) for port, value in given.items()}
        body.update(_parameters.options({**(parameters or {}), **more_parameters}, deadline, limits, request_id))
        if publish:
            body["publish"] = dict(publish)
        for option, wanted in (("replace", replace), ("seal", seal), ("verify", verify)):
            if wanted:
                body[option] = True
        if not map:
            body["map"] = False
        inline_bytes = self.inline_bytes if inline_bytes is None else int(inline_bytes)
        if inline_bytes:
            body["inline_bytes"] = inline_bytes
        for name, value in (("threads", threads), ("idempotency_key", idempotency_key)):
            if value is not None:
                body[name] = value
        pending = self._connection.request(Op.INVOKE, self._with_lease(body, lease), payload=copies.payload)
        with self._lock:
            self._calls += 1
        return Call(self, _pipeline.name(kernel), pending, given, copies.scratch)

    def prepare(
        self,
        kernel: str,
        *args: Any,
        inputs: Optional[Mapping[str, Any]] = None,
        fixed: Optional[Mapping[str, Any]] = None,
        parameters: Optional[Mapping[str, Any]] = None,
        deadline: Optional[float] = None,
        limits: Optional[Mapping[str, int]] = None,
        request_id: Optional[str] = None,
        **more_parameters: Any,
    ) -> Prepared:
        """Makes a kernel ready to be called again and again on small arrays; a call then takes a fraction of the time of `call`.

            scale = s.prepare("scale-shift", x, a=2.0)
            y = scale(x)

        Inputs, by position or by port in `inputs`: `Spec`s, or arrays that stand for their dtype and shape (or anything else that has
        both); each call brings the elements, at most as many along each axis. In `fixed`, by port, inputs that are the same for all calls:
        an array of `empty` or a result, which must no longer be written to, a flight's name (allowed among the others, too), or any other
        array, which is copied into a segment now. The inputs that a call brings have at most 128 KiB together, and so do its outputs.

        `deadline` (in seconds), `limits` and `request_id` apply to each call. Everything that `start` says about parameters applies.
        """
        parameters = {**(parameters or {}), **more_parameters}
        options: Dict[str, Any] = dict(deadline=deadline, limits=limits, request_id=request_id)
        return _prepare.prepare(self, kernel, args, inputs=inputs, fixed=fixed, parameters=parameters, **options)

    def prepare_stream(self, kernel: str, *args: Any, **options: Any) -> PreparedStream:
        """Makes a kernel ready for tensors that come in chunks of rows, along axis 0.

            with s.prepare_stream("cumsum", strait.Spec("float64", (4096, 3))) as sums:
                y = sums.chunk(x)

        Like `prepare`, with the same options; the shapes begin with the largest number of rows sent at a time. Inputs that the kernel
        takes whole are `fixed`; they may also be given by keyword, as parameters are: `taps="taps"`.

        `channel`: a name, or `ChannelOptions`: what comes of the chunks goes to whoever reads the channel of that name, in this process or in another
        one of this user's. Raises `RemoteError` with `NAME_TAKEN` if there is such a channel.
        """
        return _stream.prepared(self, kernel, args, **options)

    def read_channel(self, name: str, *, automatic: bool = True, request_id: Optional[str] = None) -> ChannelReader:
        """Reads the channel of that name, which a stream of this user's feeds (`prepare_stream` with `channel`).

            with s.read_channel("levels") as channel:
                for y in channel:
                    ...

        `automatic`: a batch is acknowledged when the next one is asked for; False: by `ChannelReader.acknowledge` alone. `request_id`: in
        the host's log and in errors.

        Raises `RemoteError`: `CHANNEL_NOT_FOUND` before its producer has prepared it and after its end, `WRONG_STATE` while somebody
        else reads it. It ends with `close`, a `with` block, its session, or when it is collected.
        """
        return _channel.read(self, name, automatic, request_id)

    def stream(self, kernel: str, chunks: Iterable[Any], *, rows: Optional[int] = None, **options: Any) -> Iterator[Result]:
        """A kernel's output chunk by chunk: for each chunk what a prepared call would return, and once more with the rest.

            for y in s.stream("fir", chunks, taps="taps"):
                ...

        `chunks`: any iterable of arrays that differ only in their number of rows, axis 0, or of mappings from ports to those. All
        output rows are, one after another, bit for bit those of one call on all rows; how many come with which chunk, perhaps none,
        is up to the kernel. `rows`: the most that are sent at a time, longer chunks being cut; None: as many as have about 32 KiB.
        The options are those of `prepare_stream`.

        The stream ends in the host when the loop ends, for whatever reason, and nobody holds the iterator any more.
        """
        return _stream.stream(self, kernel, chunks, rows, options)

    def _forget_ports(self, kernel: str, error: RemoteError) -> None:
        """Another version of the plugin may be loaded by now."""
        if error.reason in ("UNKNOWN_INPUT", "MISSING_INPUT"):
            self._ports.pop(kernel, None)

    def _by_position(self, kernel: _pipeline.Asked, args: Sequence[Any], given: Mapping[str, Any]) -> Dict[str, Any]:
        ports = self._ports_of(kernel)
        if ports is None:
            # The call itself is to say so.
            return {}
        if len(args) > len(ports):
            raise TypeError(f"kernel {kernel!r} has {len(ports)} inputs ({', '.join(ports)}); {len(args)} were given")
        twice = [port for port in ports[: len(args)] if port in given]
        if twice:
            raise TypeError(f"input {twice[0]!r} of kernel {kernel!r} was given by position and by name")
        return dict(zip(ports, args))

    def _ports_of(self, kernel: _pipeline.Asked) -> Optional[List[str]]:
        """The kernel's inputs in their order; None if there is no such kernel."""
        ports = self._ports.get(_pipeline.name(kernel))
        if ports is None:
            kinds = self.kernels(kernel)
            if not kinds:
                return None
            ports = [port.name for port in kinds[0].inputs]
            if any([port.name for port in other.inputs] != ports for other in kinds):
                known = ", ".join(f"{found.plugin}/{found.name}" for found in kinds)
                raise ValueError(f"several plugins have a kernel {kernel!r}: name one of {known}")
            self._ports[_pipeline.name(kernel)] = ports
        return ports

    def _input(self, port: str, value: Any, copy: Callable[[str, "np.ndarray[Any, Any]"], Any]) -> Any:
        """An input as a request names it; `copy` takes what the host cannot see yet."""
        if isinstance(value, str):
            return value
        if isinstance(value, Array):
            memory = value._usable()
            if value._segment is not None:
                return self._by_segment(value._segment, value._tensor)
            return copy(value.dtype_name, view_of(memory, value._tensor))
        # What is in a segment has a dtype that tensors have.
        found = self._placed.find(value) if type(value) is np.ndarray else None
        if found is None:
            array = _foreign.as_numpy(value, f"input {port!r}")
            found = self._placed.find(array)
        if found is not None:
            return self._by_segment(*found)
        return copy(_dtypes.to_name(array.dtype), array)

    def _copied(self, copies: _Copies, dtype: str, array: "np.ndarray[Any, Any]") -> Dict[str, Any]:
        payload, length = copies.payload, array.nbytes
        offset = -(-len(payload) // ALIGN_BYTES) * ALIGN_BYTES
        if length <= self.inline_bytes and offset + length <= self._connection.payload_room:
            payload += bytes(offset - len(payload))
            payload += array.astype(_dtypes.to_numpy(dtype), copy=False).tobytes()
            self._count_copied(length)
            return {"inline": {"dtype": dtype, "shape": array.shape, "offset": offset, "length": length}}
        copy = self._take_scratch(dtype, array.shape)
        copies.scratch.append(copy)
        self._copy(copy.array, array)
        return {"segment": copy.segment.mapping.segment}

    def _in_segment(self, kept: List[Any], dtype: str, array: "np.ndarray[Any, Any]") -> Dict[str, str]:
        """Copies an array into a segment for as long as it is `kept`."""
        segment, arrays = self._create([("x", dtype, array.shape)])
        self._copy(arrays[0], array)
        # The lease is the array's: without one it would be given back before the host has the request.
        kept.append(arrays[0])
        return {"segment": segment.mapping.segment}

    def _by_segment(self, segment: Segment, tensor: Tensor) -> Dict[str, str]:
        if segment.connection is not self._connection:
            raise ValueError(
                f"array {tensor.name!r} is in a segment of another session; publish it there and pass its name, or pass a copy"
            )
        self._connection.check_lease(segment.lease)
        return {"segment": segment.mapping.segment, "tensor": tensor.name}

    def _copy(self, into: "np.ndarray[Any, Any]", array: "np.ndarray[Any, Any]") -> None:
        np.copyto(into, array, casting="equiv")
        self._count_copied(into.nbytes)

    def _count_copied(self, size: int) -> None:
        with self._lock:
            self._copied_bytes += size

    def _count_call(self, size: int) -> None:
        with self._lock:
            self._copied_bytes += size
            self._calls += 1

    def _take_scratch(self, dtype: str, shape: Tuple[int, ...]) -> Scratch:
        key = (dtype, shape)
        with self._lock:
            for index in range(len(self._scratch) - 1, -1, -1):
                if self._scratch[index].key == key:
                    found = self._scratch.pop(index)
                    if self._connection.expires_in(found.segment.lease) > _LEASE_LEFT_MIN:
                        return found
        segment, arrays = self._create([("x", dtype, shape)])
        return Scratch(key, segment, arrays[0])

    def _give_scratch(self, scratch: List[Scratch]) -> None:
        """The call is answered, so its copies may be written again."""
        with self._lock:
            if not self._connection.closed:
                self._scratch += scratch
            while self._scratch and (
                len(self._scratch) > _SCRATCH_COUNT_MAX
                or sum(kept.segment.mapping.bytes for kept in self._scratch) > _SCRATCH_BYTES_MAX
            ):
                self._scratch.pop(0)
        scratch.clear()

    def _results(self, reply: Reply) -> Union[Array, Arrays]:
        info = LazyInfo(reply.body)
        arrays: List[Tuple[str, Array]] = []
        with Grant(self._connection, reply) as grant:
            for result in reply.body["results"]:
                port, inline = str(result["port"]), result.get("inline")
                if (inline is None) == (result.get("mapping") is None):
                    raise ProtocolError(f"result {port!r} is to be in a segment or in the reply: {result!r}")
                segment: Optional[Segment] = None
                if inline is not None:
                    tensor, memory = Tensor.read_inline(port, inline, reply.payload), memoryview(reply.payload)
                    # Out of the frame.
                    self._count_copied(tensor.length)
                elif result.get("fd") is not None:
                    segment, memory = self._place(grant, result, result["fd"], writable=False)
                    tensor = segment.mapping.tensor(port)
                else:
                    # Published, and not mapped.
                    continue
                arrays.append((port, Array(self._placed, segment, tensor, memory, info)))
        return arrays[0][1] if len(arrays) == 1 else Arrays(arrays, info)


def _kernel_key(entry: Mapping[str, Any]) -> str:
    return f"{entry['plugin']}/{entry['name']}"


def _shape(shape: Union[int, Sequence[int]]) -> Tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    return tuple(int(size) for size in sizes)
