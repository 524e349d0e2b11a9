"""The protocol's dtypes and numpy's.

bfloat16 and the 8-bit floats are ml_dtypes' types where that package is installed; else their bits, as
uint16 and uint8 arrays, and `Array.dtype_name` tells.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

import numpy as np

ml_dtypes: Any
try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

#: Name in the protocol → bytes of an element.
SIZES: Dict[str, int] = {
    "bool8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def _numpy(name: str) -> "np.dtype[Any]":
    if name == "bool8":
        return np.dtype(np.bool_)
    if name in _BITS:
        named: "np.dtype[Any]" = np.dtype(_BITS[name] if ml_dtypes is None else getattr(ml_dtypes, name))
        return named
    return np.dtype(name).newbyteorder("<")


_NUMPY = {name: _numpy(name) for name in SIZES}
# Without ml_dtypes several names have the same numpy dtype; the plain one, which comes first here, wins.
_NAMES = {dtype: name for name, dtype in sorted(_NUMPY.items(), key=lambda item: item[0] not in _BITS)}


def to_numpy(name: str) -> "np.dtype[Any]":
    """The numpy dtype of a protocol dtype's elements; `KeyError` if there is none of that name."""
    return _NUMPY[name]


def to_name(dtype: Any) -> str:
    """The protocol's name of a dtype: of `"bfloat16"`, `np.float64`, `"<f8"`, `bool`, …

    Raises `TypeError` for dtypes that tensors cannot have.
    """
    if isinstance(dtype, str) and dtype in SIZES:
        return dtype
    found: Optional[str] = None
    try:
        wanted = np.dtype(dtype)
        found = _NAMES.get(wanted.newbyteorder("<") if wanted.kind in "iufc" else wanted)
    except TypeError:
        wanted = dtype
    if found is None:
        raise TypeError(f"dtype {wanted!r} has no place in a tensor; there are {', '.join(SIZES)}")
    return found
