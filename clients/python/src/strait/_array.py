"""Tensors in mapped segments, and small ones that a reply brought: what calls and `Session.get` return."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from . import _dtypes
from ._connection import Connection
from ._errors import ReleasedError
from ._pages import Pages
from ._wire import CallInfo, SegmentMapping, Tensor

if TYPE_CHECKING:
    import pyarrow


class Placed:
    """The segments that a session has mapped, by address. Finalizers write to it, so it takes no lock."""

    def __init__(self) -> None:
        self.segments: Dict[int, "Segment"] = {}
        self.tensors: Dict[int, Tuple["Segment", Tensor]] = {}
        #: Bytes of views that had to be copies.
        self.copied_bytes = 0

    def find(self, array: "np.ndarray[Any, Any]") -> Optional[Tuple["Segment", Tensor]]:
        """The tensor that `array` is, if it is exactly one of them."""
        found = self.tensors.get(address(array))
        if found is None:
            return None
        tensor = found[1]
        same = (
            array.shape == tensor.shape
            and array.dtype == _dtypes.to_numpy(tensor.dtype)
            and array.flags.c_contiguous
        )
        return found if same else None


class Segment:
    """A segment that is mapped here, and the lease that holds it until the last view of its pages is gone."""

    def __init__(
        self, connection: Connection, placed: Placed, mapping: SegmentMapping, lease: int, pages: Pages
    ) -> None:
        self.connection = connection
        self.mapping = mapping
        self.lease = lease
        self.pages = pages
        #: The arrays through which it is filled.
        self.filling: List[weakref.ref[np.ndarray[Any, Any]]] = []
        self._placed = placed
        placed.segments[pages.address] = self
        for tensor in mapping.tensors:
            placed.tensors[pages.address + tensor.offset] = (self, tensor)

    def leaving(self) -> None:
        for tensor in self.mapping.tensors:
            self._placed.tensors.pop(self.pages.address + tensor.offset, None)
        self._placed.segments.pop(self.pages.address, None)

    def left(self) -> None:
        if self.pages.inherited and self.mapping.writers in ("host", "worker"):
            # What is released they may write to again, and a forked child may still read it.
            self.connection.lapse(self.lease)
        else:
            self.connection.drop([self.lease], self.mapping.bytes)


class LazyInfo:
    """What the host said about a call, read when somebody asks: most callers of small kernels do not."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._info: Optional[CallInfo] = None

    def read(self) -> CallInfo:
        if self._info is None:
            self._info = CallInfo.read(self._body)
        return self._info


def view_of(memory: memoryview, tensor: Tensor) -> "np.ndarray[Any, Any]":
    """The numpy array over a tensor's bytes; writable only if the memory is."""
    # Not `np.ndarray(buffer=…)`: that one looks through a read-only memoryview and can be made writable.
    dtype = _dtypes.to_numpy(tensor.dtype)
    if tensor.length == 0:
        return np.frombuffer(memory, np.uint8)[:0].view(dtype).reshape(tensor.shape)
    return np.frombuffer(memory, dtype, tensor.length // dtype.itemsize, tensor.offset).reshape(tensor.shape)


def address(array: "np.ndarray[Any, Any]") -> int:
    """Where an array's first element is."""
    return int(array.__array_interface__["data"][0])


class Array(NDArrayOperatorsMixin):
    """A tensor in a segment that this process has mapped, or a call's small result in its own memory; read-only.

    It acts as a numpy array in expressions and functions, without a copy. `release`, or the end of a `with` block,
    releases it; used after that it raises `ReleasedError`. The pages and the lease stay for as long as a view
    lives (`numpy`, `arrow`, a DLPack consumer), so a view never loses its memory. A forked child sees the
    same values; the lease is its parent's.

    A small result that came in the reply has neither a segment's pages nor a lease, so it never expires, and any session takes it.
    """

    def __init__(
        self, placed: Placed, segment: Optional[Segment], tensor: Tensor, memory: memoryview, info: Optional[LazyInfo] = None
    ) -> None:
        self._placed = placed
        # None: its elements are in `memory` alone, as the reply brought them.
        self._segment = segment
        self._tensor = tensor
        self._memory: Optional[memoryview] = memory
        self._numpy: Optional[np.ndarray[Any, Any]] = None
        self._info = info

    @property
    def info(self) -> Optional[CallInfo]:
        """What the host said about the call that made it; None for `Session.get`."""
        return None if self._info is None else self._info.read()

    @property
    def name(self) -> str:
        """The tensor's name in its segment: the output's port, or the column it was put from."""
        return self._tensor.name

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The numpy array's dtype."""
        return _dtypes.to_numpy(self._tensor.dtype)

    @property
    def dtype_name(self) -> str:
        """The protocol's name of the dtype: `"bfloat16"` also where ml_dtypes is missing and numpy sees uint16."""
        return self._tensor.dtype

    @property
    def shape(self) -> Tuple[int, ...]:
        """Sizes of the axes; the last one varies fastest."""
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._tensor.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self._tensor.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self._tensor.length

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._memory is None

    def numpy(self) -> "np.ndarray[Any, Any]":
        """The numpy array over its memory; not writable, and no copy.

        Only booleans that are stored as bytes other than 0 and 1 are copied, since numpy does not treat all of those
        as true everywhere; the copy is counted.
        """
        memory = self._usable()
        if self._numpy is None:
            view = view_of(memory, self._tensor)
            if view.dtype == np.bool_ and view.size and view.view(np.uint8).max() > 1:
                view = view.view(np.uint8) != 0
                view.flags.writeable = False
                self._placed.copied_bytes += view.nbytes
            self._numpy = view
        return self._numpy

    def _usable(self) -> memoryview:
        memory = self._memory
        if memory is None:
            raise ReleasedError(
                f"{self!r} was released; take what you need before, or keep a view: y.numpy() outlives the release"
            )
        return memory

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> "np.ndarray[Any, Any]":
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{array.dtype} to {np.dtype(dtype)} needs a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(out, Array) for out in kwargs.get("out", ())):
            raise ValueError("a result is read-only; pass another array as out")
        return getattr(ufunc, method)(*(_plain(value) for value in inputs), **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        """Hands the pages on without a copy; the consumer must know DLPack 1.0, which can say "read-only"."""
        try:
            return self.numpy().__dlpack__(**kwargs)
        except (BufferError, TypeError) as error:
            raise BufferError(
                f"{self!r} cannot be handed on by DLPack: {error}. For a consumer without read-only arrays, or for "
                "this dtype, hand on a copy: y.numpy().copy()"
            ) from None

    def __dlpack_device__(self) -> Tuple[int, int]:
        device: Tuple[int, int] = self.numpy().__dlpack_device__()
        return device

    def arrow(self) -> "pyarrow.Array":
        """A pyarrow array over the same pages, without a copy.

        One axis gives a primitive array, more a `FixedShapeTensorArray` over the first one; 0-d is one row. bool8 is
        pyarrow's bool8 (in tensors: int8), bfloat16 and the 8-bit floats are their bits, complex numbers have a last
        axis of 2.
        """
        import pyarrow as pa

        memory = self._usable()
        tensor = self._tensor
        shape, storage = list(tensor.shape) or [1], tensor.dtype
        if storage.startswith("complex"):
            shape, storage = [*shape, 2], {"complex64": "float32", "complex128": "float64"}[storage]
        bits = {"bool8": "int8", "bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
        kind = pa.from_numpy_dtype(np.dtype(bits.get(storage, storage)))
        buffer = pa.py_buffer(memory[tensor.offset : tensor.offset + tensor.length])
        count = tensor.length // _dtypes.SIZES[bits.get(storage, storage)]
        values = pa.Array.from_buffers(kind, count, [None, buffer])
        if len(shape) == 1:
            return pa.ExtensionArray.from_storage(pa.bool8(), values) if storage == "bool8" else values
        width = int(np.prod(shape[1:], dtype=np.int64))
        listed = pa.Array.from_buffers(pa.list_(kind, width), shape[0], [None], children=[values])
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, shape[1:]), listed)

    def arrow_tensor(self) -> "pyarrow.Tensor":
        """A `pyarrow.Tensor` over the same pages, without a copy; for the dtypes that pyarrow has tensors of."""
        import pyarrow as pa

        return pa.Tensor.from_numpy(self.numpy())

    def renew(self, lease: Optional[float] = None) -> float:
        """Renews its lease for that many seconds, or the host's default, and returns what was granted.

        Raises `LeaseExpiredError` if the lease is over. A session renews leases by itself unless it was made with
        `renew=False`. What came in a reply has no lease and is granted `inf`.
        """
        self._usable()
        if self._segment is None:
            return math.inf
        return self._segment.connection.renew([self._segment.lease], lease)

    def release(self) -> None:
        """Lets go of the tensor; when no view of it is left, its pages are unmapped and its lease is given back.

        The lease may go with others, within 20 ms or before the session's next call.
        """
        self._numpy = None
        self._memory = None

    def __copy__(self) -> "Array":
        """Another array over the same pages, which is released by itself."""
        return Array(self._placed, self._segment, self._tensor, self._usable(), self._info)

    def __deepcopy__(self, _: Any) -> "np.ndarray[Any, Any]":
        """A numpy array of this process's own memory."""
        return self.numpy().copy()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is memory of this process, mapped as a rule, and cannot be pickled; send a name (s.publish(name, y) here, "
            "s.get(name) there), which does not copy what is mapped, or a copy (y.numpy())"
        )

    def __enter__(self) -> "Array":
        self._usable()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getitem__(self, key: Any) -> Any:
        return self.numpy()[_plain(key)]

    def __len__(self) -> int:
        return len(self.numpy())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numpy())

    def __float__(self) -> float:
        return float(self.numpy())

    def __int__(self) -> int:
        return int(self.numpy())

    def __bool__(self) -> bool:
        return bool(self.numpy())

    def __repr__(self) -> str:
        state = ", released" if self.released else ""
        return f"<strait.Array {self.name!r}: {self.dtype_name} {list(self.shape)}{state}>"

    # As numpy arrays: `==` is element by element.
    __hash__ = None  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, Array) else value


class Arrays(Mapping):  # type: ignore[type-arg]
    """Several arrays by name, in their order: the tensors of a flight, or the outputs of a call."""

    def __init__(self, arrays: List[Tuple[str, Array]], info: Optional[LazyInfo] = None) -> None:
        self._arrays = dict(arrays)
        self._info = info

    @property
    def info(self) -> Optional[CallInfo]:
        """What the host said about the call; None for `Session.get`."""
        return None if self._info is None else self._info.read()

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def arrow(self) -> "pyarrow.RecordBatch":
        """A pyarrow record batch over the same pages, without a copy; the arrays must be equally long."""
        import pyarrow as pa

        return pa.RecordBatch.from_arrays([array.arrow() for array in self.values()], names=list(self))

    def __copy__(self) -> "Arrays":
        """Other arrays over the same pages."""
        return Arrays([(name, copy.copy(array)) for name, array in self.items()], self._info)

    def __deepcopy__(self, memo: Any) -> "Dict[str, np.ndarray[Any, Any]]":
        """Numpy arrays of this process's own memory, by name."""
        return {name: copy.deepcopy(array, memo) for name, array in self.items()}

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} are mapped pages of this process, which cannot be pickled; send a name, which copies nothing, or "
            "copies (copy.deepcopy of it)"
        )

    def release(self) -> None:
        """Releases each."""
        for array in self.values():
            array.release()

    def __enter__(self) -> "Arrays":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<strait.Arrays {list(self.values())}>"
