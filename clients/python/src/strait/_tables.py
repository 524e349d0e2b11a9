"""Tensors as Arrow columns, both ways: what goes over Flight to a host that is not on this machine.

The elements are not looked at: a column is made of an array's own memory, and what comes is copied once to where it belongs.
"""

from __future__ import annotations

import json
import math
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import pyarrow as pa

from . import _dtypes
from ._errors import ProtocolError
from ._wire import Tensor

#: Arrow's names of the types that elements are stored in → ours.
_STORED = {"halffloat": "float16", "float": "float32", "double": "float64"}
#: dtypes that Arrow has no type for, and what their elements are stored as.
_STORAGE = {
    "bool8": "int8",
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
    "complex64": "float32",
    "complex128": "float64",
}
_ROW_MAX = 2**31 - 1

Column = Tuple[str, str, "np.ndarray[Any, Any]"]


def schema(columns: Sequence[Column]) -> Any:
    """The schema of tensors, each with its name and dtype."""
    return pa.schema([_field(name, dtype, array.shape) for name, dtype, array in columns])


def batch(columns: Sequence[Column], first: int, last: int, of: Any) -> Any:
    """Rows of equally long tensors as a record batch of that schema, over their own memory, which must be in order."""
    arrays = []
    for (_, dtype, array), field in zip(columns, of):
        rows = array.reshape(1, *array.shape) if array.ndim == 0 else array[first:last]
        storage = pa.from_numpy_dtype(np.dtype(_STORAGE.get(dtype, dtype)))
        count = rows.nbytes // np.dtype(_STORAGE.get(dtype, dtype)).itemsize
        # Of no elements numpy has no buffer; of ml_dtypes' types it gives none away.
        data = pa.py_buffer(rows.reshape(-1).view(np.uint8) if rows.size else b"")
        values = pa.Array.from_buffers(storage, count, [None, data])
        if pa.types.is_fixed_size_list(field.type):
            values = pa.Array.from_buffers(field.type, len(rows), [None], children=[values])
        arrays.append(values)
    return pa.RecordBatch.from_arrays(arrays, schema=of)


def _field(name: str, dtype: str, shape: Tuple[int, ...]) -> Any:
    metadata: Dict[str, str] = {}
    if not shape:
        metadata["strait.shape"] = "[]"
    row = list(shape[1:]) + ([2] if dtype.startswith("complex") else [])
    kind = pa.from_numpy_dtype(np.dtype(_STORAGE.get(dtype, dtype)))
    if row:
        if math.prod(row) > _ROW_MAX:
            raise ValueError(
                f"tensor {name!r} has {math.prod(row)} elements in a row, and Arrow has at most {_ROW_MAX}: reshape it, so that its first axis is longer"
            )
        kind = pa.list_(kind, math.prod(row))
        # By hand, as the host writes it: not every pyarrow has these types.
        metadata["ARROW:extension:name"] = "arrow.fixed_shape_tensor"
        metadata["ARROW:extension:metadata"] = json.dumps({"shape": row}, separators=(",", ":"))
    elif dtype == "bool8":
        metadata["ARROW:extension:name"] = "arrow.bool8"
        metadata["ARROW:extension:metadata"] = ""
    if dtype in _STORAGE and "ARROW:extension:name" not in metadata or (row and dtype in _STORAGE):
        metadata["strait.dtype"] = dtype
    return pa.field(name, kind, nullable=False, metadata=metadata)


def tensors(of: Any, rows: int) -> List[Tensor]:
    """What the columns of a schema are, as tables of so many rows; each at the start of memory of its own."""
    return [_tensor(field, rows) for field in of]


def _tensor(field: Any, rows: int) -> Tensor:
    metadata = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    kind = field.type
    row: List[int] = []
    extension = metadata.get("ARROW:extension:name")
    if isinstance(kind, pa.BaseExtensionType):
        extension = kind.extension_name
        if extension == "arrow.fixed_shape_tensor":
            row = list(kind.shape)
        kind = kind.storage_type
    elif extension == "arrow.fixed_shape_tensor":
        row = list(json.loads(metadata.get("ARROW:extension:metadata", "{}")).get("shape", ()))
    lists: List[int] = []
    while pa.types.is_fixed_size_list(kind):
        lists.append(kind.list_size)
        kind = kind.value_type
    row = row or lists
    stored = _STORED.get(str(kind), str(kind))
    dtype = metadata.get("strait.dtype", "bool8" if extension == "arrow.bool8" else stored)
    if dtype not in _dtypes.SIZES or _STORAGE.get(dtype, dtype) != stored:
        raise ProtocolError(f"column {field.name!r} is of the Arrow type {field.type} with the dtype {dtype!r}, which is no tensor of strait's")
    if dtype.startswith("complex"):
        row = row[:-1]
    shape = (rows, *row)
    if metadata.get("strait.shape") == "[]":
        shape = ()
    return Tensor(field.name, dtype, shape, 0, math.prod(shape) * _dtypes.SIZES[dtype])


def elements(column: Any) -> "np.ndarray[Any, Any]":
    """The bytes of a column's elements."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    data = column.buffers()[1]
    width = column.type.bit_width // 8
    if data is None:
        return np.empty(0, np.uint8)
    start = column.offset * width
    return np.frombuffer(data, np.uint8)[start : start + len(column) * width]


class Filling:
    """Tensors of one table while their rows come; memory of this process."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.memory = [np.empty(tensor.length, np.uint8) for tensor in tensors]

    def part(self, first: int, last: int) -> "_Part":
        """Where rows go that come by themselves, from the first up to the last."""
        return _Part(self, first, last)

    @property
    def nbytes(self) -> int:
        return sum(tensor.length for tensor in self.tensors)


class _Part:
    def __init__(self, filling: Filling, first: int, last: int) -> None:
        self._places = []
        for tensor, memory in zip(filling.tensors, filling.memory):
            rows = tensor.shape[0] if tensor.shape else 1
            row_bytes = tensor.length // rows if rows else 0
            self._places.append((tensor, memory[first * row_bytes : last * row_bytes]))
        self._at = [0] * len(self._places)

    def add(self, batch: Any) -> None:
        """The rows of a record batch, behind those that came."""
        if batch.num_columns != len(self._places):
            raise ProtocolError(f"a batch of {batch.num_columns} columns, where {len(self._places)} tensors were announced")
        for index, (tensor, memory) in enumerate(self._places):
            data = elements(batch.column(index))
            at = self._at[index]
            if at + len(data) > len(memory):
                raise ProtocolError(f"tensor {tensor.name!r} has more than the {len(memory)} bytes that were announced")
            memory[at : at + len(data)] = data
            self._at[index] = at + len(data)

    def end(self) -> None:
        for (tensor, memory), at in zip(self._places, self._at):
            if at != len(memory):
                raise ProtocolError(f"tensor {tensor.name!r} ended after {at} of {len(memory)} bytes")
