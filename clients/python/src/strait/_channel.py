"""Channels: what comes of a stream that another session feeds.

    producer ─ chunks ─▶ host ─ batches ─▶ a buffer that is used again ─▶ rows, copied
                           ◀──────── acknowledgements ────────┘

A channel is read over a socket of its own, with the parts of a prepared call; nothing else is sent there than acknowledgements.

An interrupt (Ctrl-C) may come between any two steps of Python code. No batch is lost by it, and none acknowledged twice, which
would be the reader's end: what was received, and sent, is written down by the step that does it.
"""

from __future__ import annotations

import asyncio
import operator
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Deque, Dict, NoReturn, Optional, Tuple, Union

from . import _wire
from ._errors import DisconnectedError, ProtocolError, from_host
from ._prepared import _CUT_FLAGS, _NOW, _OP_AT, _SEND_FLAGS, _SEQUENCE, _SEQUENCE_AT, Prepared, Result, Spec
from ._wire import HEADER, Op, milliseconds

if TYPE_CHECKING:
    from ._session import Session

_SEQUENCE_MASK = 0xFFFF_FFFF
_WAIT = 0


@dataclass(frozen=True)
class ChannelOptions:
    """How a channel is to be that a stream's rows go to; `Session.prepare_stream` takes it, or the name alone, as `channel`."""

    #: Its name, among those of this user's channels.
    name: str
    #: Most batches that wait for their acknowledgement, 1 to 1024, while the producer's next chunk waits; 8 if None.
    batches: Optional[int] = None
    #: Seconds without an acknowledgement, or without anybody who reads, after which the stream fails (`DEADLINE`); the host's
    #: `server.stall_ms` if None.
    wait: Optional[float] = None
    #: Seconds that a reader which left has to come back, or another one in its place; None: the stream then fails at once
    #: (`CONSUMER_LOST`).
    resume: Optional[float] = None


def asked(channel: Union[str, ChannelOptions]) -> Dict[str, Any]:
    """What a PREPARE says of a channel."""
    if isinstance(channel, str):
        channel = ChannelOptions(channel)
    elif not isinstance(channel, ChannelOptions):
        raise TypeError(f"channel is {type(channel).__name__}; it is a channel's name, or strait.ChannelOptions")
    body: Dict[str, Any] = {"name": channel.name}
    if channel.batches is not None:
        body["batches"] = operator.index(channel.batches)
    if channel.wait is not None:
        body["wait_ms"] = milliseconds(channel.wait)
    if channel.resume:
        body["resume_ms"] = milliseconds(channel.resume)
    return body


class ChannelReader:
    """What comes of a stream that another session feeds, batch by batch; made by `Session.read_channel`.

        with s.read_channel("levels") as channel:
            for y in channel:                    # or `async for`, in a task of asyncio's
                write(channel.number, y)

    A batch is a numpy array of the output's rows, at least one, or a dict of them by port if the kernel has more outputs: memory of its own,
    which the caller may keep and write to. The loop is over when the producer has sent its last chunk; then `notes` are what the
    kernel had to say.

    A batch is acknowledged when the next one is asked for, so that whoever comes back gets those again that were not done with; the end
    is, too, when it is there. Without `automatic` a batch is acknowledged by `acknowledge` alone, and the end with the last batch. A reader
    that left before the end loses the producer its stream, unless that lets one come back (`ChannelOptions.resume`); who comes back
    reads the channel again, from the first batch on that was not acknowledged.

    Raises `RemoteError` with the reason why no more comes: `PRODUCER_LOST`, or what the producer was told, at which chunk in
    `details["chunk"]`; `DisconnectedError` if the host has ended, and after any of these. An interrupt (Ctrl-C), and the cancellation of a
    task, ends the wait and nothing else: the reader can be gone on with, and the batch that was about to come still comes. (An interrupt at
    the very moment when `next(channel)` returns takes its batch along, and `number` has moved then; a loop has no such moment.)

    It is for one thread or task at a time, but for `close`.
    """

    def __init__(self, lane: Prepared, name: str, first: int, automatic: bool) -> None:
        self._lane = lane
        self._name = name
        self._automatic = automatic
        # What was received last and not read yet, written by that very step.
        self._received: Deque[Any] = deque(maxlen=1)
        # The batch that was read last (None: the end), and the number of the last one that the caller was given.
        # And the packet that it came in.
        self._held: Tuple[int, Optional[Result], Any] = (first - 1, None, None)
        self._number = first - 1
        self._acknowledged = first - 1
        # That an acknowledgement of `_sending` was sent, written by that very step.
        self._sent: Deque[Any] = deque(maxlen=1)
        self._sending = 0
        self._ended = False

    @property
    def kernel(self) -> str:
        """Whose outputs come."""
        return self._lane._kernel

    @property
    def outputs(self) -> Dict[str, Spec]:
        """The outputs, by port; axis 0 is as long as it can be in one batch."""
        return self._lane.outputs

    @property
    def number(self) -> int:
        """Number of the batch that came last; the channel's first one is 1. Before any came to this reader, of the one before."""
        return self._number

    @property
    def notes(self) -> Dict[str, str]:
        """What the kernel had to say, at the end; `{}` before."""
        return self._lane.notes

    def acknowledge(self, number: Optional[int] = None) -> None:
        """Acknowledges all batches up to that one, which are then not sent again to whoever comes back; None: all that came here.

        It does not wait. Raises `ValueError` for a batch that has not come; `DisconnectedError` if this has ended.
        """
        number = self._number if number is None else operator.index(number)
        if number > self._number:
            raise ValueError(f"batch {number} has not come; the last one is {self._number}")
        self._lane._connection.check_process()
        with self._lane._lock:
            if not self._is_over():
                self._lane._check_end()
                self._acknowledge(number)

    def close(self) -> None:
        """Leaves the channel, at once; whoever waits for a batch gets `DisconnectedError`. Without effect in a forked child."""
        self._lane.close()

    def __iter__(self) -> "ChannelReader":
        return self

    def __next__(self) -> Result:
        number = self._number
        try:
            while True:
                try:
                    batch = self._next(_WAIT)
                    break
                except BlockingIOError:
                    # After days; see `_address.interruptible`.
                    pass
            if batch is None:
                raise StopIteration
            return batch
        except BaseException:
            # It was not given to anybody.
            self._number = number
            raise

    def __aiter__(self) -> "ChannelReader":
        return self

    async def __anext__(self) -> Result:
        # Else a fast producer would keep the event loop to this task.
        await asyncio.sleep(0)
        number = self._number
        try:
            while True:
                try:
                    batch = self._next(_NOW)
                    break
                except BlockingIOError:
                    await self._readable()
            if batch is None:
                raise StopAsyncIteration
            return batch
        except BaseException:
            self._number = number
            raise

    def _next(self, flags: int) -> Optional[Result]:
        """The next batch, or None at the end; `BlockingIOError` if it is not there and `flags` say not to wait."""
        lane = self._lane
        lane._connection.check_process()
        if flags == _NOW and lane._lock.locked():
            lane._check_end()
            raise RuntimeError("another thread reads this channel; an event loop must not wait for that")
        with lane._lock:
            if self._is_over():
                return None
            lane._check_end()
            if self._held[0] == self._number:
                if self._automatic:
                    self._acknowledge(self._number)
                if self._received and self._received[0] is self._held[2]:
                    # An interrupt came before it was thrown away.
                    self._received.clear()
                while not self._received:
                    try:
                        self._received.extend(map(lane._socket.recvmsg_into, ([lane._buffer],), (0,), (flags,)))
                    except ConnectionResetError:
                        # The host left without having read all that was acknowledged. What it sent is still there.
                        pass
                packet = self._received[0]
                self._held = (*self._read(*packet), packet)
                self._received.clear()
            number, batch, _ = self._held
            if batch is None:
                self._take_end(number)
            else:
                self._number = number
            return batch

    async def _readable(self) -> None:
        """Waits until there is something to receive, or the end; other tasks go on."""
        lane = self._lane
        loop = asyncio.get_running_loop()
        with lane._lock:
            lane._check_end()
            if lane._watched:
                raise RuntimeError("another task waits for the next batch of this channel")
            # From here on `close` leaves the descriptor to this task: an event loop must not be left with one that is closed.
            lane._watched = True
        try:
            there: "asyncio.Future[None]" = loop.create_future()
            fd = lane._socket.fileno()
            loop.add_reader(fd, _told, there)
            try:
                await there
            finally:
                loop.remove_reader(fd)
        finally:
            lane._watched = False
            if lane._end is not None:
                lane._socket.close()

    def _read(self, length: int, ancillary: Any, flags: int, address: Any) -> Tuple[int, Optional[Result]]:
        """What was received, held against what must come next: its number, and the rows, or None at the end. An error is raised."""
        lane = self._lane
        number = self._held[0] + 1
        if not length:
            lane._over(None)
        if flags & _CUT_FLAGS:
            lane._wrong("it is longer than was said, or brings descriptors")
        _SEQUENCE.pack_into(lane._reply_header, _SEQUENCE_AT, number & _SEQUENCE_MASK)
        if length != HEADER.size + lane._reply_bytes or not lane._buffer.startswith(lane._reply_header):
            self._read_end(number, length)
            return number, None
        lane._shapes = None if lane._buffer.startswith(lane._reply_sizes, HEADER.size) else lane._smaller()
        for place, shape in zip(lane._outputs, lane._shapes or ()):
            if shape[1:] != place.shape[1:]:
                lane._wrong(f"output {place.port!r} has the shape {list(shape)}; but for its rows it is {list(place.shape)}")
        results = lane._results(None)
        if not any(map(len, results)):
            lane._wrong("a batch without rows")
        lane._session._count_copied(sum(result.nbytes for result in results))
        if len(results) == 1:
            return number, results[0]
        return number, {place.port: result for place, result in zip(lane._outputs, results)}

    def _read_end(self, number: int, length: int) -> None:
        """What is no batch: the end and its notes, or an error."""
        lane = self._lane
        try:
            op, sequence, body, payload = _wire.decode(lane._buffer, length)
        except ProtocolError as error:
            lane._wrong(str(error))
        if op == Op.ERROR and sequence == 0:
            lane._finish(DisconnectedError(f"the channel {self._name!r} has failed; read it again when its producer has begun anew"))
            lane._socket.close()
            raise from_host(body)
        if sequence != number & _SEQUENCE_MASK:
            lane._wrong(f"it has the sequence {sequence} where batch {number} comes next")
        if op == Op.CHUNK:
            lane._wrong(f"a batch with a payload of {len(payload)} bytes where {lane._reply_bytes} were said, and {length} in all")
        if op != Op.LAST or payload:
            lane._wrong(f"it is of op {op} with {len(payload)} bytes of payload; a CHUNK, LAST without a payload, or ERROR is due")
        lane.notes = lane._notes_in(body)

    def _take_end(self, number: int) -> None:
        self._ended = True
        if self._automatic or self._acknowledged == number - 1:
            self._acknowledge(number)

    def _is_over(self) -> bool:
        """Whether the end came; then nothing is left to be read."""
        return self._ended and self._acknowledged == self._held[0]

    def _acknowledge(self, number: int) -> None:
        """Tells the host that it need not keep the batches up to that one; the end, where that is the next. Under the lock."""
        if self._sent:
            # An interrupt came before that was noted.
            self._acknowledged = self._sending
            self._sent.clear()
        if self._ended and number >= self._held[0] - 1:
            number = self._held[0]
        if number <= self._acknowledged:
            return
        self._sending = number
        header = HEADER.pack(_wire.MAGIC, _wire.PROTOCOL, Op.OK, number & _SEQUENCE_MASK, 0, 0, *_wire.NO_TRACE, b"", 0)
        try:
            self._sent.extend(map(self._lane._socket.send, (header,), (_SEND_FLAGS | _NOW,)))
        except BlockingIOError:
            # The host has not taken hundreds of them: the next one says this, too.
            return
        except (BrokenPipeError, ConnectionResetError):
            # Why it is over is what is received next.
            pass
        self._acknowledged = number
        self._sent.clear()
        if self._is_over():
            # That was what it was for.
            self._lane._finish(DisconnectedError(f"the channel {self._name!r} is over"))
            self._lane._socket.close()

    def __enter__(self) -> "ChannelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("the reader of a channel belongs to its session and cannot be pickled; read the channel where it is to be used")

    def __repr__(self) -> str:
        state = "" if self._lane._end is None else ", ended"
        outputs = ", ".join(f"{port}: {spec}" for port, spec in self.outputs.items())
        return f"<strait.ChannelReader {self._name!r}: {self.kernel} -> ({outputs}), batch {self._number}{state}>"


def _told(there: "asyncio.Future[None]") -> None:
    if not there.done():
        there.set_result(None)


def read(session: "Session", name: str, automatic: bool, request_id: Optional[str]) -> ChannelReader:
    """What `Session.read_channel` says."""
    body = {"channel": name}
    if request_id is not None:
        body["request_id"] = request_id
    reply = session._connection.call(Op.STREAM, body)
    told = reply.body
    kernel, first = told.get("kernel"), told.get("first")
    if not isinstance(kernel, str) or type(first) is not int or first < 1:
        reply.close()
        raise ProtocolError(f"malformed OK to STREAM: of kernel {kernel!r}, from batch {first!r} on; they are counted from 1")
    # As a PREPARE would be answered whose calls bring nothing.
    reply.body = {"prepared": 0, "request_bytes": 0, "inputs": (), "reply_bytes": told.get("batch_bytes"), "outputs": told.get("outputs")}
    lane = Prepared(session, kernel, reply, {}, Op.STREAM)
    lane._called, lane._remedy = f"the channel {name!r}", "read it again"
    lane._header[_OP_AT] = Op.STREAM
    lane._reply_header[_OP_AT] = Op.CHUNK
    flat = [place.port for place in lane._outputs if not place.shape]
    if flat:
        lane.close()
        raise ProtocolError(f"the OK to STREAM: output {flat[0]!r} of a channel has no rows")
    session._prepared.add(lane)
    # The session may have been closed just before.
    session._connection.check()
    return ChannelReader(lane, name, first, automatic)
