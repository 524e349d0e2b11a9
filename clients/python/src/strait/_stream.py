"""Kernels that are given a tensor in chunks of rows.

    chunk ─▶ checks ─▶ cut to what was prepared ─▶ CHUNK ─▶ host
                   rows, joined ◀─ copied ◀─ CHUNK … OK ◀─┘

The parts are those of a prepared call. But after an exception a stream cannot go on, since some of its rows are
lost. So an exception ends the stream, and no reply has to be taken in later.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Mapping, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np

from . import _dtypes
from ._channel import ChannelOptions
from ._errors import DisconnectedError, ProtocolError, StraitError, from_host
from ._prepare import prepare
from ._prepared import _OP_AT, _SEND_FLAGS, Prepared, Result, Spec, _Place
from ._wire import Op

if TYPE_CHECKING:
    from ._session import Session

#: So large are the inputs of one packet if nobody says how many rows it is to have.
_PACKET_BYTES = 32 << 10
#: An element of an output may be wider than that of the input: a count, a sum.
_ELEMENT_BYTES_MIN = 8

_Rows = List["np.ndarray[Any, Any]"]


class PreparedStream:
    """A kernel that is ready for tensors that come in chunks of rows; made by `Session.prepare_stream`.

        with s.prepare_stream("cumsum", strait.Spec("float64", (4096, 3))) as sums:
            y = sums.chunk(x)
            rest = sums.last()

    A chunk is the next rows, axis 0, of the arrays of `inputs`, by position in that order or by port: any number of them, perhaps none. It returns
    its output rows as a prepared call returns its output. All rows of a stream, one after another, are bit for bit those of one call on
    all rows, however they were cut. After `last` the next chunk begins another stream.

    With a `channel` the rows go to whoever reads that (`Session.read_channel`), and not to this program: a chunk returns `{}`, and `outputs` are none.
    While the channel is full a chunk waits; `last` waits until everything was acknowledged, and is the end of this object, too. A stream that ends
    before that, as by `close`, is lost to the reader, who is told.

    An array of another dtype, or of other sizes beyond axis 0, is a `TypeError` or `ValueError`, and nothing of it is sent. Any other exception,
    including an interrupt, ends the stream in the host, and this object cannot be used any more; `RemoteError` says which chunk it was in
    `details["chunk"]`, where a chunk longer than `inputs` says counts as several. Chunks of several threads wait for each other.
    """

    def __init__(self, lane: Prepared, to_channel: bool) -> None:
        self._lane = lane
        self._to_channel = to_channel
        # A chunk was begun whose rows nobody has yet.
        self._under_way = False
        flat = [place.port for place in lane._outputs if not place.shape]
        if flat:
            lane.close()
            raise ProtocolError(f"the OK to PREPARE: output {flat[0]!r} of a stream has no rows")

    @property
    def inputs(self) -> Dict[str, Spec]:
        """What comes in chunks, by port and in the order of a chunk's arguments; the shapes begin with the most rows sent at a time."""
        return self._lane.inputs

    @property
    def outputs(self) -> Dict[str, Spec]:
        """The outputs; axis 0 is as long as it can be in one packet, and has no end in a stream."""
        return self._lane.outputs

    @property
    def notes(self) -> Dict[str, str]:
        """The kernel's notes on the last stream that ended with `last`; `{}` before."""
        return self._lane.notes

    def chunk(self, /, *arrays: Any, **by_port: Any) -> Result:
        """Sends the next rows and waits for their output.

        Raises `TypeError` or `ValueError` before anything is sent; `RemoteError` if the kernel fails; `DisconnectedError` if this has ended.
        """
        return self._send(Op.CHUNK, arrays, by_port)

    def last(self, /, *arrays: Any, **by_port: Any) -> Result:
        """Like `chunk`, with the last rows, and waits for all remaining output; without arrays, or with None, there are no more rows."""
        if all(array is None for array in (*arrays, *by_port.values())):
            by_port = {}
            arrays = tuple(np.empty((0, *place.shape[1:]), place.dtype) for place in self._lane._inputs)
        return self._send(Op.LAST, arrays, by_port)

    def close(self) -> None:
        """Ends it in the host; a chunk that is under way raises `DisconnectedError`. Without effect in a forked child."""
        if self._under_way:
            self._lane._ask_to_cancel()
        self._lane.close()

    def _send(self, op: Op, arrays: Tuple[Any, ...], by_port: Dict[str, Any]) -> Result:
        lane = self._lane
        lane._connection.check()
        if by_port or len(arrays) != len(lane._inputs):
            arrays = lane._in_order(arrays, by_port)
        whole = [_rows(place, array) for place, array in zip(lane._inputs, arrays)]
        pieces = max([1, *(-(-len(array) // place.shape[0]) for place, array in zip(lane._inputs, whole))])
        with lane._lock:
            if self._under_way:
                # An interrupt came where no exception could be seen to.
                self._end("was broken off")
            lane._check_end()
            self._under_way = True
            try:
                came: List[_Rows] = [[] for _ in lane._outputs]
                for index in range(pieces):
                    piece = [_piece(place, array, index) for place, array in zip(lane._inputs, whole)]
                    self._exchange(op if index == pieces - 1 else Op.CHUNK, piece, came)
                results = [_joined(rows) for rows in came]
                self._under_way = False
                if self._to_channel and op == Op.LAST:
                    # The host has ended it, and counts it for as long as this side does not.
                    self._end("is over")
            except BaseException as error:
                if isinstance(error, StraitError):
                    self._end("has failed")
                else:
                    lane._ask_to_cancel()
                    self._end("was broken off")
                raise
        if len(results) == 1:
            return results[0]
        return {place.port: result for place, result in zip(lane._outputs, results)}

    def _exchange(self, op: Op, piece: Sequence["np.ndarray[Any, Any]"], came: Sequence[_Rows]) -> None:
        """Sends a packet; what comes of it is appended to what came."""
        lane = self._lane
        parts, size = lane._parts(piece)
        lane._header[_OP_AT] = op
        lane._begin()
        try:
            lane._socket.sendmsg(parts, (), _SEND_FLAGS)
            answer = Op.CHUNK
            while answer == Op.CHUNK:
                try:
                    received = lane._socket.recvmsg_into([lane._buffer])
                except BlockingIOError:
                    # After days; see `_address.interruptible`.
                    continue
                # Anything else is held against an OK.
                answer = Op.CHUNK if lane._buffer[_OP_AT] == Op.CHUNK else Op.OK
                lane._reply_header[_OP_AT] = answer
                failure = lane._reply(received)
                if failure is not None:
                    raise from_host(failure)
                size += self._take(came)
        except (BrokenPipeError, ConnectionResetError) as error:
            lane._over(error)
        lane._session._count_call(size)

    def _take(self, came: Sequence[_Rows]) -> int:
        """Appends the rows in the frame that was received; their bytes."""
        lane = self._lane
        for place, shape in zip(lane._outputs, lane._shapes or ()):
            if shape[1:] != place.shape[1:]:
                lane._wrong(f"output {place.port!r} has the shape {list(shape)}; but for its rows it is {list(place.shape)}")
        size = 0
        for rows, result in zip(came, lane._results(None)):
            # One that has none, for its dtype and shape.
            if len(result) or not rows:
                rows.append(result)
            size += result.nbytes
        return size

    def _end(self, how: str) -> None:
        lane = self._lane
        lane._finish(DisconnectedError(f"the stream of {lane._kernel} {how}; prepare another one"))
        lane._socket.close()
        self._under_way = False

    def __enter__(self) -> "PreparedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream belongs to its session and cannot be pickled; prepare it where it is to be used")

    def __repr__(self) -> str:
        return repr(self._lane).replace("Prepared", "PreparedStream", 1)


def prepared(
    session: "Session",
    kernel: str,
    args: Sequence[Any],
    *,
    inputs: Optional[Mapping[str, Any]] = None,
    fixed: Optional[Mapping[str, Any]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
    channel: Union[str, ChannelOptions, None] = None,
    deadline: Optional[float] = None,
    limits: Optional[Mapping[str, int]] = None,
    request_id: Optional[str] = None,
    **named: Any,
) -> PreparedStream:
    """What `Session.prepare_stream` says; `named` are parameters and fixed inputs."""
    session._connection.check()
    ports = session._ports_of(kernel) if named else None
    whole = {port: named.pop(port) for port in ports or () if port in named}
    twice = [port for port in whole if port in (fixed or {})]
    if twice:
        raise TypeError(f"input {twice[0]!r} of kernel {kernel!r} was given twice, as fixed and by name")
    fixed, parameters = {**(fixed or {}), **whole}, {**(parameters or {}), **named}
    options: Dict[str, Any] = dict(channel=channel, deadline=deadline, limits=limits, request_id=request_id)
    made = prepare(session, kernel, args, stream=True, inputs=inputs, fixed=fixed, parameters=parameters, **options)
    return PreparedStream(made, channel is not None)


def stream(session: "Session", kernel: str, chunks: Iterable[Any], rows: Optional[int], options: Dict[str, Any]) -> Iterator[Result]:
    """What `Session.stream` says."""
    session._connection.check()
    if isinstance(chunks, (str, bytes, Mapping)) or hasattr(chunks, "__array__"):
        raise TypeError(f"chunks is one {type(chunks).__name__}; give an iterable of arrays, such as a list with one in it")
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}; at least 1 row is sent at a time")
    return _stream(session, kernel, iter(chunks), rows, options)


def _stream(session: "Session", kernel: str, chunks: Iterator[Any], rows: Optional[int], options: Dict[str, Any]) -> Iterator[Result]:
    try:
        first = next(chunks)
    except StopIteration:
        raise ValueError(
            f"no chunk came for {kernel!r}, so that its dtype and shape are not known; use prepare_stream with a Spec, and last()"
        ) from None
    if isinstance(first, Mapping):
        brought = dict(first)
    else:
        fixed = {*options, *(options.get("fixed") or ())}
        left = [port for port in session._ports_of(kernel) or () if port not in fixed]
        if len(left) > 1:
            raise TypeError(
                f"kernel {kernel!r} has the inputs {', '.join(left)}; give those that it takes whole by name; if several come in chunks, "
                "each chunk is a mapping from ports to arrays"
            )
        # Without such a kernel it is the host that says so.
        brought = dict.fromkeys(left, first)
    specs = {port: Spec.of(array, f"input {port!r}") for port, array in brought.items()}
    most = _fitting(specs.values()) if rows is None else rows
    specs = {port: Spec(spec.dtype, spec.shape and (most, *spec.shape[1:])) for port, spec in specs.items()}
    with prepared(session, kernel, (), inputs=specs, **options) as made:
        for chunk in itertools.chain((first,), chunks):
            yield made.chunk(**chunk) if isinstance(chunk, Mapping) else made.chunk(chunk)
        yield made.last()


def _fitting(specs: Iterable[Spec]) -> int:
    """Rows of all of these for one packet, with room in another for outputs like them."""
    row_bytes = 0
    for spec in specs:
        row = int(np.prod(spec.shape[1:], dtype=object))
        row_bytes += row * max(_dtypes.to_numpy(spec.dtype).itemsize, _ELEMENT_BYTES_MIN)
    return max(1, _PACKET_BYTES // max(row_bytes, 1))


def _rows(place: _Place, value: Any) -> "np.ndarray[Any, Any]":
    """Rows of an input, any number of them."""
    array = place.elements(value)
    if array.ndim != len(place.shape) or array.shape[1:] != place.shape[1:]:
        raise ValueError(
            f"input {place.port!r} has the shape {list(array.shape)}; rows of {list(place.shape[1:])} were prepared, along axis 0: reshape them, or "
            "prepare another stream"
        )
    return array


def _piece(place: _Place, array: "np.ndarray[Any, Any]", index: int) -> "np.ndarray[Any, Any]":
    """The packet of that index has these rows of it, as they are sent."""
    most = place.shape[0]
    return array[index * most : (index + 1) * most].astype(place.dtype, order="C", copy=False)


def _joined(rows: _Rows) -> "np.ndarray[Any, Any]":
    full = [array for array in rows if len(array)]
    if len(full) > 1:
        return np.concatenate(full)
    return full[0] if full else rows[0]
