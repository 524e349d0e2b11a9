"""Sessions with a host that is not on this machine: the same verbs, and what travels is copied.

    FarSession ── small arrays: in the call's message ───────────────▶ host
         ├── larger ones: DoPut without a name, then the call ───────▶
         ◀── small results: in the answer; larger ones: DoGet, in parts that are read at once
         └── prepared calls, streams, channels: `_bridge`

A call has an idempotency key, so that it can be asked again when the connection was lost, and still runs once. What was uploaded for it,
and what it left, has no name: the host keeps that for a minute, and this side says when it is done with it.
"""

from __future__ import annotations

from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple, Union

import numpy as np

from . import _dtypes, _foreign
from ._array import Array, Arrays, LazyInfo, view_of
from ._errors import LocalOnlyError
from ._flight import Remote
from ._remote import FarConnection, Fetched, FarReply
from ._reply import Reply
from ._session import Session, _Copies, _shape
from ._tables import Column
from ._wire import ALIGN_BYTES, Flight, Tensor


class FarSession(Session):
    """A session with a host that is not on this machine; made by `connect("grpc+tls://HOST:PORT", …)`.

    Everything that `Session` says holds, but that nothing is mapped: what goes to the host and what comes from there is copied, and counted in
    `client_stats().copied_bytes`. Results are memory of this process and have no leases. What cannot be done without shared memory
    raises `LocalOnlyError`, which says what to do instead.
    """

    _connection: FarConnection  # type: ignore[assignment]

    def __init__(self, remote: Remote) -> None:
        super().__init__(FarConnection(remote), None)  # type: ignore[arg-type]

    # Arrays

    def empty(self, shape: Union[int, Sequence[int]], dtype: Any = np.float64) -> "np.ndarray[Any, Any]":
        """A numpy array of zeros, as for a host on this machine; but it is this process's own memory, and is copied with each call."""
        self._connection.check()
        return np.zeros(_shape(shape), _dtypes.to_numpy(_dtypes.to_name(dtype)))

    def publish(self, name: str, x: Any, *, replace: bool = False) -> NoReturn:
        """Not from afar: raises `LocalOnlyError`."""
        raise LocalOnlyError(
            f"publish({name!r}, …) gives a segment of this machine a name, without a copy, and the host is at {self._connection.address}: "
            "put copies an array there, and call(…, publish={port: name}) names a result where it is"
        )

    def put(self, name: str, x: Any, *, replace: bool = False) -> None:
        """As `Session.put`; the elements are always copied, to the host. The columns of a table, or the arrays of a mapping, must be equally long.

        With `replace` it is put again after a lost connection; without, whether it was put is then not known, and the `DisconnectedError`
        says so.
        """
        if isinstance(x, Array):
            self._put(name, [(x.name, x.dtype_name, view_of(x._usable(), x._tensor))], replace)
            return
        found = _foreign.read(x, f"tensor {name!r}")
        columns = [(name, found)] if isinstance(found, np.ndarray) else found
        if not columns:
            raise ValueError(f"table {name!r} has no columns; a flight has at least one")
        self._put(name, [(column, _dtypes.to_name(values.dtype), values) for column, values in columns], replace)

    def _put(self, name: str, tensors: Sequence[Column], replace: bool) -> None:
        self._connection.check()
        lengths = {values.shape[:1] for _, _, values in tensors}
        if len(lengths) > 1:
            shapes = ", ".join(f"{column!r} {list(values.shape)}" for column, _, values in tensors)
            raise LocalOnlyError(
                f"table {name!r} has columns that are not equally long ({shapes}), which only a session on the host's machine can put; put each by itself"
            )
        columns = [(column, dtype, _ordered(dtype, values)) for column, dtype, values in tensors]
        self._connection.put(name, columns, replace)
        self._count_copied(sum(values.nbytes for _, _, values in columns))

    def get(self, name: str, *, lease: Optional[float] = None) -> Union[Array, Arrays]:
        """The flight of that name, copied from the host: an `Array`, or `Arrays`, as from `Session.get`. `lease` is of no meaning here.

        A long one is read in several parts at once. Raises `NotFoundError` with `FLIGHT_NOT_FOUND`.
        """
        self._connection.check()
        wanted, _, tensor = name.partition("#")
        fetched = self._connection.fetch(wanted)
        self._count_copied(fetched.nbytes)
        arrays = self._arrays(fetched, None)
        if tensor:
            found = dict(arrays).get(tensor)
            if found is None:
                raise KeyError(f"no tensor {tensor!r} in the flight; it has {', '.join(name for name, _ in arrays)}")
            return found
        return arrays[0][1] if len(arrays) == 1 else Arrays(arrays)

    def _arrays(self, fetched: Fetched, info: Optional[LazyInfo]) -> List[Tuple[str, Array]]:
        return [
            (tensor.name, Array(self._placed, None, tensor, memoryview(memory.data).toreadonly(), info))
            for tensor, memory in zip(fetched.tensors, fetched.memory)
        ]

    def lookup(self, name: str) -> Flight:
        """What a flight is, without its elements; `NotFoundError` with `FLIGHT_NOT_FOUND` if there is none."""
        self._connection.check()
        return Flight(name, tuple(self._connection.describe(name)))

    def list(self) -> List[Flight]:
        """This principal's flights, sorted by name."""
        self._connection.check()
        return [Flight(name, tuple(tensors)) for name, tensors in self._connection.flights()]

    # Calls

    def _input(self, port: str, value: Any, copy: Any) -> Any:
        if isinstance(value, Array):
            return copy(value.dtype_name, view_of(value._usable(), value._tensor))
        return super()._input(port, value, copy)

    def _copied(self, copies: _Copies, dtype: str, array: "np.ndarray[Any, Any]") -> Dict[str, Any]:
        payload, length = copies.payload, array.nbytes
        offset = -(-len(payload) // ALIGN_BYTES) * ALIGN_BYTES
        self._count_copied(length)
        if length <= self.inline_bytes and offset + length <= self._connection.payload_room:
            payload += bytes(offset - len(payload))
            payload += array.astype(_dtypes.to_numpy(dtype), copy=False).tobytes()
            return {"inline": {"dtype": dtype, "shape": array.shape, "offset": offset, "length": length}}
        segment = self._connection.upload([("x", dtype, _ordered(dtype, array))])
        copies.scratch.append(segment)  # type: ignore[arg-type]
        return {"segment": segment}

    def _give_scratch(self, scratch: List[Any]) -> None:
        """The call is answered: what was uploaded for it may go."""
        self._connection.release(scratch)
        scratch.clear()

    def _in_segment(self, kept: List[Any], dtype: str, array: "np.ndarray[Any, Any]") -> Dict[str, str]:
        segment = self._connection.upload([("x", dtype, _ordered(dtype, array))])
        self._count_copied(array.nbytes)
        return {"segment": segment}

    def _results(self, reply: Reply) -> Union[Array, Arrays]:
        assert isinstance(reply, FarReply)
        info = LazyInfo(reply.body)
        arrays: List[Tuple[str, Array]] = []
        for result in reply.body["results"]:
            port, inline = str(result["port"]), result.get("inline")
            if inline is not None:
                tensor = Tensor.read_inline(port, inline, reply.payload)
                self._count_copied(tensor.length)
                arrays.append((port, Array(self._placed, None, tensor, memoryview(reply.payload), info)))
            elif port in reply.fetched:
                fetched = reply.fetched[port]
                self._count_copied(fetched.nbytes)
                arrays.append((port, self._arrays(fetched, info)[0][1]))
        return arrays[0][1] if len(arrays) == 1 else Arrays(arrays, info)


def _ordered(dtype: str, array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """The array as its elements travel: in order, little-endian; a copy only if it is not."""
    # Not `ascontiguousarray`, which makes an axis of none.
    return np.asarray(array.astype(_dtypes.to_numpy(dtype), order="C", copy=False))
