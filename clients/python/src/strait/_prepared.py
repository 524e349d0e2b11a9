"""Kernels that are made ready once and called again and again.

    call ─▶ checks ─▶ header, sizes, the arrays' own memory ─▶ one packet ─▶ host
                                      results, copied ◀─ a buffer that is used again ◀─┘

A prepared kernel has a socket of its own, on which a thread of the host answers. The caller sends and receives by
itself, so nobody else is woken.

An interrupt (Ctrl-C) may come between any two steps of Python code, and no call may get another call's reply. So what
has been done is written down by the step that does it (`_steps`), and a call begins by taking in what is left of the one before.
"""

from __future__ import annotations

import operator
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Deque, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np

from . import _address, _dtypes, _foreign, _wire
from ._array import Array, view_of
from ._connection import Connection
from ._errors import DisconnectedError, ProtocolError, StraitError, from_host
from ._reply import Grant, Reply
from ._wire import ALIGN_BYTES, AXES_MAX, BODY_BYTES_MAX, HEADER, PAYLOAD_BYTES_MAX, Op, Tensor

if TYPE_CHECKING:
    from ._session import Session

#: The sizes of one tensor, as they stand before the elements.
_SIZES = struct.Struct(f"<{AXES_MAX}Q")
_SEQUENCE = struct.Struct("<I")
_OP_AT = 3
_SEQUENCE_AT = 4
#: What is sent behind a tensor that is smaller than it could be.
_GAP = memoryview(bytes(PAYLOAD_BYTES_MAX))
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_NOW = int(socket.MSG_DONTWAIT)
_CUT_FLAGS = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_SHUTDOWN = int(socket.SHUT_RDWR)
#: So often the host is asked again to end a call: it is not one yet while the host has not looked at its socket.
_CANCEL_SECONDS_MAX = 0.05

Result = Union["np.ndarray[Any, Any]", Dict[str, "np.ndarray[Any, Any]"]]


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its elements."""

    #: The protocol's name: `"float64"`. It is made of whatever names a dtype: `np.float32`, `"<f4"`, `"bfloat16"`.
    dtype: str
    #: Sizes of the axes; the last one varies fastest.
    shape: Tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtypes.to_name(self.dtype))
        sizes = (self.shape,) if isinstance(self.shape, (int, np.integer)) else tuple(self.shape)
        object.__setattr__(self, "shape", tuple(map(int, sizes)))

    @classmethod
    def of(cls, value: Any, what: str) -> "Spec":
        """Of an array, or anything else that has a dtype and a shape; `what` names it in errors."""
        if isinstance(value, Spec):
            return value
        if isinstance(value, Array):
            return cls(value.dtype_name, value.shape)
        try:
            return cls(value.dtype, value.shape)
        except (AttributeError, TypeError):
            array = _foreign.as_numpy(value, what)
            return cls(_dtypes.to_name(array.dtype), array.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class _Place:
    """A tensor's place in the payload of each call, or of each reply."""

    __slots__ = ("port", "spec", "dtype", "shape", "offset", "room", "plain", "truth")

    def __init__(self, tensor: Tensor) -> None:
        self.port = tensor.name
        self.spec = Spec(tensor.dtype, tensor.shape)
        dtype = _dtypes.to_numpy(tensor.dtype)
        #: numpy hands its memory on as it is; of a type that it does not know itself (bfloat16) only as bytes.
        self.plain = dtype.isbuiltin == 1
        # numpy's own object, which most arrays have and is found equal at once.
        self.dtype = np.dtype(dtype.str) if self.plain else dtype
        #: Truth values: a byte that is neither 0 nor 1 is true, which numpy would not see everywhere.
        self.truth = self.dtype.kind == "b"
        #: The largest, as all here.
        self.shape = tensor.shape
        self.offset = tensor.offset
        #: Bytes that it has in each packet, however small it is.
        self.room = -(-tensor.length // ALIGN_BYTES) * ALIGN_BYTES

    def taken(self, value: Any) -> "np.ndarray[Any, Any]":
        """What a call brings, as it is sent; a copy only if its elements do not lie in order, or are of another library."""
        array = self.elements(value)
        if not _within(array.shape, self.shape):
            raise ValueError(
                f"input {self.port!r} has the shape {list(array.shape)}, and at most {list(self.shape)} was prepared, axis by axis; prepare a "
                "larger shape by itself"
            )
        return array.astype(self.dtype, order="C", copy=False)

    def elements(self, value: Any) -> "np.ndarray[Any, Any]":
        """`value` as an array of the dtype that was prepared, of any shape, byte order and strides."""
        what = f"input {self.port!r}"
        if isinstance(value, Array):
            array, dtype = view_of(value._usable(), value._tensor), value.dtype_name
        else:
            array = _foreign.as_numpy(value, what)
            # What is only bits without ml_dtypes cannot be told apart.
            same = array.dtype.newbyteorder("<") == self.dtype
            dtype = self.spec.dtype if same else _dtypes.to_name(array.dtype)
        if dtype != self.spec.dtype:
            raise TypeError(f"{what} is {dtype}, and {self.spec} was prepared; convert it, or prepare {dtype}")
        return array

    def view(self, buffer: memoryview, shape: Tuple[int, ...]) -> "np.ndarray[Any, Any]":
        """The elements in a reply; of booleans their bytes."""
        dtype = np.dtype(np.uint8) if self.truth else self.dtype
        return np.ndarray(shape, dtype, buffer, HEADER.size + self.offset)


class Prepared:
    """A kernel that is ready to be called; made by `Session.prepare`.

        scale = s.prepare("scale-shift", x, a=2.0)
        y = scale(x)

    A call takes the arrays of `inputs` by position, in that order, or by port. Each may be smaller than what was prepared along
    each axis. It returns the output as a numpy array, or a dict of them by port if the kernel has more than one output or none: memory of
    its own, made for each call, which the caller may keep and write to.

    Calls of several threads wait for each other; a signal handler must not call it. After an exception, including an interrupt, it can be
    called again, unless that was `DisconnectedError` or `ProtocolError`. It ends with `close`, a `with` block, its
    session, or when it is garbage-collected.
    """

    def __init__(self, session: "Session", kernel: str, reply: Reply, wanted: Mapping[str, Spec], op: Op = Op.PREPARE) -> None:
        self._session = session
        self._connection: Connection = session._connection
        self._kernel = kernel
        # What it is, and what to do after its end, in words.
        self._called, self._remedy = f"what was prepared of {kernel}", "prepare it again"
        self._pid = os.getpid()
        # Held by the one call that is under way.
        self._lock = threading.Lock()
        # Held by whoever cancels it, and then none begins.
        self._cancelling = threading.Lock()
        # A task waits for its socket, with an event loop, and closes it after the end.
        self._watched = False
        self._end: Optional[StraitError] = None
        #: What the kernel had to say in the last call that succeeded.
        self.notes: Dict[str, str] = {}
        # What the last call has done: its packet was sent, and the reply received. Written by those very steps.
        self._steps: Deque[Any] = deque(maxlen=2)
        # A call is on its way, or may be at any moment: it is before what it has done says so.
        self._under_way = False
        self._sequence = 0
        # Of the last reply's outputs; None: the largest.
        self._shapes: Optional[List[Tuple[int, ...]]] = None
        with Grant(self._connection, reply) as grant:
            self._number, self._inputs, request_bytes, self._outputs, self._reply_bytes = _read(reply.body, op)
            told = {place.port: place.spec for place in self._inputs}
            if told != dict(wanted):
                raise ProtocolError(f"the OK to PREPARE: calls bring {told}, where {dict(wanted)} was asked")
            if len(reply.fds) != 1:
                raise ProtocolError(f"the OK to {op.name} has {len(reply.fds)} descriptors; it brings one, a socket")
            grant.fd(0)
            self._socket = _open(grant.keep(0), request_bytes, op)
        # Written to in each call.
        self._header = bytearray(HEADER.pack(_wire.MAGIC, _wire.PROTOCOL, Op.CALL, 0, 0, request_bytes, *_wire.NO_TRACE, b"", 0))
        self._reply_header = bytearray(HEADER.pack(_wire.MAGIC, _wire.PROTOCOL, Op.OK, 0, 0, self._reply_bytes, *_wire.NO_TRACE, b"", 0))
        self._sizes = b"".join(_sizes(place.shape) for place in self._inputs)
        self._reply_sizes = b"".join(_sizes(place.shape) for place in self._outputs)
        # An ERROR, or an OK with what the kernel has to say.
        self._buffer = bytearray(HEADER.size + BODY_BYTES_MAX + self._reply_bytes)
        self._memory = memoryview(self._buffer)
        self._usual = not any(place.truth for place in self._outputs)
        self._views = [place.view(self._memory, place.shape) for place in self._outputs]

    @property
    def inputs(self) -> Dict[str, Spec]:
        """What each call brings, at most, by port and in the order of a call's arguments."""
        return {place.port: place.spec for place in self._inputs}

    @property
    def outputs(self) -> Dict[str, Spec]:
        """The outputs, as large as they can be."""
        return {place.port: place.spec for place in self._outputs}

    def __call__(self, *arrays: Any, out: Any = None, **by_port: Any) -> Result:
        """Runs the kernel on these and waits for its output.

        `out`: where the elements go, instead of fresh memory: an array of the output's dtype and largest shape, or a mapping from ports
        to those. The return value is then that array, or as many of its elements, from the first on, as the result's shape has.

        Raises `TypeError` or `ValueError` before anything is sent if the arrays are not what was prepared; `RemoteError` if the kernel fails,
        which does not affect other calls; `DisconnectedError`. An interrupt (Ctrl-C) ends the call in the host, too.
        """
        self._connection.check()
        if by_port or len(arrays) != len(self._inputs):
            arrays = self._in_order(arrays, by_port)
        parts, size = self._parts(arrays)
        into = None if out is None else self._into(out)
        with self._lock:
            self._begin()
            self._exchange(parts)
            failure = self._reply(self._steps[1])
            self._under_way = False
            self._steps.clear()
            if failure is not None:
                self._session._count_call(size)
                raise from_host(failure)
            results = self._results(into)
        if len(results) == 1:
            self._session._count_call(size + results[0].nbytes)
            return results[0]
        self._session._count_call(size + sum(result.nbytes for result in results))
        return {place.port: result for place, result in zip(self._outputs, results)}

    def _in_order(self, arrays: Sequence[Any], by_port: Dict[str, Any]) -> Tuple[Any, ...]:
        ports = [place.port for place in self._inputs]
        unknown = [port for port in by_port if port not in ports[len(arrays) :]]
        if unknown:
            how = "was given by position and by name" if unknown[0] in ports else "is none that calls bring"
            raise TypeError(f"input {unknown[0]!r} {how}; prepared were {', '.join(ports) or 'none'}")
        if len(arrays) + len(by_port) != len(ports):
            raise TypeError(
                f"calls of this {self._kernel} bring {len(ports)} inputs ({', '.join(ports)}); {len(arrays) + len(by_port)} were given"
            )
        return (*arrays, *(by_port[port] for port in ports[len(arrays) :]))

    def _parts(self, arrays: Sequence[Any]) -> Tuple[List[Any], int]:
        """The packet of a call, in parts, and the bytes of tensors in it."""
        parts: List[Any] = [self._header, self._sizes]
        size = 0
        shapes: Optional[List[Tuple[int, ...]]] = None
        for place, array in zip(self._inputs, arrays):
            same = type(array) is np.ndarray and array.dtype == place.dtype and array.shape == place.shape
            if not (same and array.flags.c_contiguous):
                array = place.taken(array)
                if array.shape != place.shape and shapes is None:
                    shapes = [place.shape for place in self._inputs]
            if shapes is not None:
                shapes[self._inputs.index(place)] = array.shape
            parts.append(array if place.plain else array.reshape(-1).view(np.uint8))
            length = array.nbytes
            size += length
            if length != place.room:
                parts.append(_GAP[: place.room - length])
        if shapes is not None:
            parts[1] = b"".join(map(_sizes, shapes))
        return parts, size

    def _into(self, out: Any) -> List[Optional["np.ndarray[Any, Any]"]]:
        if not isinstance(out, Mapping):
            if len(self._outputs) != 1:
                raise TypeError(f"out is to be a mapping from ports to arrays; {self._kernel} has {len(self._outputs)} outputs")
            out = {self._outputs[0].port: out}
        unknown = set(out) - {place.port for place in self._outputs}
        if unknown:
            raise TypeError(f"out for {min(unknown)!r}, which is no output of {self._kernel}")
        into = [out.get(place.port) for place in self._outputs]
        for place, array in zip(self._outputs, into):
            if array is None:
                continue
            if type(array) is not np.ndarray or array.dtype != place.dtype or array.shape != place.shape:
                given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise TypeError(f"out for {place.port!r} is {given}; a numpy array of {place.spec} is needed")
            if not array.flags.writeable:
                raise ValueError(f"out for {place.port!r} cannot be written to")
        return into

    # One call. All of it under the lock.

    def _begin(self) -> None:
        self._under_way = False
        if self._cancelling.locked():
            # What ends the call before must not end this one.
            with self._cancelling:
                pass
        self._check_end()
        if self._steps:
            self._settle()
        self._sequence = self._sequence % 0xFFFF_FFFF + 1
        _SEQUENCE.pack_into(self._header, _SEQUENCE_AT, self._sequence)
        _SEQUENCE.pack_into(self._reply_header, _SEQUENCE_AT, self._sequence)
        self._under_way = True

    def _check_end(self) -> None:
        if self._end is not None:
            raise type(self._end)(*self._end.args)

    def _exchange(self, parts: List[Any]) -> None:
        steps = self._steps
        try:
            # One step each, for `map` and `extend` run no Python code: an interrupt comes before or after both.
            steps.extend(map(self._socket.sendmsg, (parts,), ((),), (_SEND_FLAGS,)))
            while len(steps) == 1:
                try:
                    steps.extend(map(self._socket.recvmsg_into, ([self._buffer],)))
                except BlockingIOError:
                    # After days; see `_address.interruptible`.
                    pass
        except (BrokenPipeError, ConnectionResetError) as error:
            self._over(error)
        except BaseException:
            if len(steps) == 1:
                self._ask_to_cancel()
            raise

    def _settle(self) -> None:
        """Takes in the reply to a call that was broken off, lest the next one takes it for its own."""
        steps = self._steps
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while len(steps) == 1:
            if not poll.poll(_CANCEL_SECONDS_MAX * 1000):
                self._ask_to_cancel()
                continue
            try:
                steps.extend(map(self._socket.recvmsg_into, ([self._buffer],), (0,), (_NOW,)))
            except BlockingIOError:
                pass
            except ConnectionResetError as error:
                self._over(error)
        self._reply(steps[1])
        # What was asked is done in order: a cancel that is still on its way would end the next call.
        self._connection.call(Op.PING, {}).close()
        steps.clear()

    def _reply(self, received: Tuple[int, Any, int, Any]) -> Optional[Dict[str, Any]]:
        """Holds the reply that was received against its call: what failed, or None, and then the payload is where the views are."""
        length, _, flags, _ = received
        if not length:
            self._over(None)
        buffer, sizes_at = self._buffer, HEADER.size
        if flags & _CUT_FLAGS:
            self._wrong("it is longer than was said, or brings descriptors")
        if length != sizes_at + self._reply_bytes or not buffer.startswith(self._reply_header):
            failure = self._unusual(length)
            if failure is not None:
                return failure
        else:
            self.notes = {}
        self._shapes = None if buffer.startswith(self._reply_sizes, sizes_at) else self._smaller()
        return None

    def _unusual(self, length: int) -> Optional[Dict[str, Any]]:
        """A reply that is not an OK without a body."""
        try:
            op, sequence, body, payload = _wire.decode(self._buffer, length)
        except ProtocolError as error:
            self._wrong(str(error))
        if sequence != self._sequence:
            self._wrong(f"it has the sequence {sequence} where {self._sequence} was asked")
        if op == Op.ERROR:
            return body
        if op != self._reply_header[_OP_AT]:
            self._wrong(f"it is of op {op}")
        if len(payload) != self._reply_bytes:
            self._wrong(f"a payload of {len(payload)} bytes where {self._reply_bytes} were said")
        notes = self._notes_in(body)
        # To where it is without a body.
        self._memory[HEADER.size : HEADER.size + len(payload)] = payload
        self.notes = notes
        return None

    def _notes_in(self, body: Mapping[str, Any]) -> Dict[str, str]:
        try:
            return {str(note["key"]): str(note["text"]) for note in body.get("notes", ())}
        except (KeyError, TypeError) as error:
            self._wrong(f"malformed notes: {error!r}")

    def _smaller(self) -> List[Tuple[int, ...]]:
        """The shapes of a reply's outputs, some of which are smaller than they could be."""
        shapes = []
        for index, place in enumerate(self._outputs):
            sizes = _SIZES.unpack_from(self._buffer, HEADER.size + index * _SIZES.size)
            shape, rest = sizes[: len(place.shape)], sizes[len(place.shape) :]
            if any(rest) or not _within(shape, place.shape):
                self._wrong(f"output {place.port!r} has the sizes {list(sizes)}; it is at most {list(place.shape)}")
            shapes.append(shape)
        return shapes

    def _results(self, into: Optional[List[Optional["np.ndarray[Any, Any]"]]]) -> List["np.ndarray[Any, Any]"]:
        if self._usual and into is None and self._shapes is None:
            return [view.copy() for view in self._views]
        results = []
        for index, (place, view) in enumerate(zip(self._outputs, self._views)):
            out = None if into is None else into[index]
            if self._shapes is not None:
                view = place.view(self._memory, self._shapes[index])
                if out is not None:
                    corner: Tuple[Any, ...] = (*map(slice, view.shape), Ellipsis)
                    out = out[corner]
            if place.truth:
                results.append(np.asarray(np.not_equal(view, 0, out=out)))
            elif out is None:
                results.append(view.copy())
            else:
                np.copyto(out, view)
                results.append(out)
        return results

    # Ends

    def cancel(self) -> None:
        """Ends the call that is under way, which then raises `RemoteError` with the code `CANCELLED`; from another thread.

        Returns when that call is over, and at once if there is none.
        """
        self._connection.check_process()
        pause = 0.001
        with self._cancelling:
            while self._under_way and len(self._steps) < 2 and self._lock.locked() and self._end is None:
                # Also for a while in vain: the host may not have looked at its socket yet.
                self._connection.call(Op.CANCEL, {"prepared": self._number}).close()
                time.sleep(pause)
                pause = min(2 * pause, _CANCEL_SECONDS_MAX)

    def _ask_to_cancel(self) -> None:
        try:
            self._connection.request(Op.CANCEL, {"prepared": self._number}, abandoned=True)
        except StraitError:
            # The session's end was the call's, too.
            pass

    def _over(self, error: Optional[OSError]) -> NoReturn:
        """The host, the session or `close` ended it."""
        if self._end is None:
            self._connection.look()
            why = "" if error is None else f" ({error})"
            self._finish(self._connection.end or DisconnectedError(f"the host has ended {self._called}{why}; {self._remedy}"))
        self._socket.close()
        self._check_end()
        raise AssertionError("it has ended")

    def _wrong(self, what: str) -> NoReturn:
        """No later reply could be trusted."""
        self._finish(ProtocolError(f"the reply to {Op(self._header[_OP_AT]).name}: {what}"))
        self._socket.close()
        self._check_end()
        raise AssertionError("it has ended")

    def _finish(self, end: StraitError) -> None:
        if self._end is None:
            self._end = end
        try:
            # Ends it also where a forked child has the socket, and wakes who waits for a reply.
            self._socket.shutdown(_SHUTDOWN)
        except OSError:
            # The host was faster.
            pass

    def close(self) -> None:
        """Ends it in the host; a call that is under way raises `DisconnectedError`. Without effect in a forked child."""
        if os.getpid() != self._pid:
            return
        self._finish(DisconnectedError(f"{self._called} was closed; {self._remedy}"))
        # Else whoever is in a call closes it.
        if self._lock.acquire(blocking=False):
            try:
                if not self._watched:
                    self._socket.close()
            finally:
                self._lock.release()

    def __del__(self) -> None:
        # One that never came up has no socket.
        sock = getattr(self, "_socket", None)
        if sock is not None:
            if os.getpid() == self._pid:
                self._finish(_COLLECTED)
            sock.close()

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("what is prepared belongs to its session and cannot be pickled; prepare it where it is to be called")

    def __repr__(self) -> str:
        def named(places: List[_Place]) -> str:
            return ", ".join(f"{place.port}: {place.spec}" for place in places)

        state = "" if self._end is None else ", ended"
        return f"<strait.Prepared {self._kernel!r}: ({named(self._inputs)}) -> ({named(self._outputs)}){state}>"


_COLLECTED = DisconnectedError("it was collected")


def _sizes(shape: Tuple[int, ...]) -> bytes:
    return _SIZES.pack(*shape, *(0,) * (AXES_MAX - len(shape)))


def _within(shape: Tuple[int, ...], most: Tuple[int, ...]) -> bool:
    return len(shape) == len(most) and all(map(operator.le, shape, most))


def _read(body: Mapping[str, Any], op: Op) -> Tuple[int, List[_Place], int, List[_Place], int]:
    """What the OK to PREPARE, or STREAM, says, held against itself."""
    try:
        number, inputs, outputs = int(body["prepared"]), _places(body, "inputs"), _places(body, "outputs")
        request_bytes, reply_bytes = int(body["request_bytes"]), int(body["reply_bytes"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"malformed OK to {op.name}: {error!r}") from None
    for places, size in ((inputs, request_bytes), (outputs, reply_bytes)):
        end = len(places) * _SIZES.size
        for place in places:
            if place.misfit(PAYLOAD_BYTES_MAX) is not None or place.offset != end:
                wrong = place.misfit(PAYLOAD_BYTES_MAX) or f"it is at {place.offset}, and belongs at {end}"
                raise ProtocolError(f"the OK to {op.name}: port {place.name!r}: {wrong}")
            end += -(-place.length // ALIGN_BYTES) * ALIGN_BYTES
        if end != size or size > PAYLOAD_BYTES_MAX or len({place.name for place in places}) != len(places):
            raise ProtocolError(f"the OK to {op.name}: {size} bytes for {len(places)} ports, which have {end}, each once")
    return number, list(map(_Place, inputs)), request_bytes, list(map(_Place, outputs)), reply_bytes


def _places(body: Mapping[str, Any], key: str) -> List[Tensor]:
    return [Tensor.read({**place, "name": place["port"]}) for place in body[key]]


def _open(fd: int, request_bytes: int, op: Op) -> socket.socket:
    """The socket for calls of so many bytes."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ProtocolError(f"the OK to {op.name} brings a descriptor that is no socket: {error}") from None
    try:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise ProtocolError(f"the OK to {op.name} brings a socket of another kind: {sock.family!r}, {sock.type!r}")
        sock.settimeout(None)
        _address.interruptible(sock)
        room = _wire.packet_room(sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        if HEADER.size + request_bytes > room:
            raise ValueError(
                f"a call has {HEADER.size + request_bytes} bytes, and Linux sends at most {room} at once here; prepare smaller shapes, or raise "
                "net.core.wmem_default"
            )
        return sock
    except BaseException:
        sock.close()
        raise
