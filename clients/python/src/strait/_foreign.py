"""Arrays of other libraries as numpy arrays: kept exactly, or refused, never with something left out.

What a tensor cannot hold is refused with advice on what to do: nulls and masks, text, dates, lists of any length. What is
only encoded in another way is decoded with its dtype kept: dictionaries, runs, chunks, lists of a fixed size. An
integer never becomes a float here. None of the libraries is imported unless an array of it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, List, Sequence, Tuple, Union

import numpy as np

from . import _dtypes

Columns = List[Tuple[str, "np.ndarray[Any, Any]"]]

_AXES_MAX = 8
#: From here on not every integer is a float64.
_EXACT_MAX = 2**53
_CPU_DEVICES = (1, 3, 11)


def as_numpy(value: Any, what: str) -> "np.ndarray[Any, Any]":
    """`value` as a numpy array of a dtype that tensors have; `what` names it in errors. A table is rows × columns.

    Raises `ValueError` for nulls and masked elements, `TypeError` for anything but arrays of numbers or booleans.
    """
    found = read(value, what)
    return found if isinstance(found, np.ndarray) else _stacked(found, what)


def read(value: Any, what: str) -> Union["np.ndarray[Any, Any]", Columns]:
    """`as_numpy`, but the columns of what is a table, or a mapping from names to arrays."""
    if type(value) is np.ndarray:
        return _checked(value, what)
    pandas = sys.modules.get("pandas")
    if isinstance(value, np.ma.MaskedArray):
        array = _unmasked(value, what)
    elif isinstance(value, (list, tuple)):
        array = _from_sequence(value, what)
    elif isinstance(value, Mapping):
        return [(str(name), as_numpy(column, f"column {name!r}")) for name, column in value.items()]
    elif pandas is not None and isinstance(value, pandas.DataFrame):
        named = ((str(name), value.iloc[:, index]) for index, name in enumerate(value.columns))
        return [(name, _from_pandas(pandas, column, f"column {name!r}")) for name, column in named]
    elif pandas is not None and isinstance(value, (pandas.Series, pandas.Index, pandas.api.extensions.ExtensionArray)):
        array = _from_pandas(pandas, value, what)
    elif _is_torch(value):
        array = _from_torch(value, what)
    elif _is_xarray(value):
        # It speaks Arrow, too, but then it is a table of its coordinates and elements.
        array = _from_numpy_speaker(value, what)
    elif _speaks_arrow(value):
        return _from_arrow_speaker(value, what)
    elif hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        array = _from_dlpack(value, what)
    else:
        array = _from_numpy_speaker(value, what)
    return _checked(array, what)


def _stacked(columns: Columns, what: str) -> "np.ndarray[Any, Any]":
    """A table as one tensor: rows × columns, or its only column if that has further axes."""
    if not columns:
        raise ValueError(f"{what} is a table without columns")
    if len(columns) == 1 and columns[0][1].ndim > 1:
        return columns[0][1]
    dtypes = sorted({_dtypes.to_name(column.dtype) for _, column in columns})
    if len(dtypes) != 1:
        raise TypeError(
            f"{what} is a table whose columns have {len(dtypes)} dtypes ({', '.join(dtypes)}), and a tensor has one; "
            "give one column, or cast them to one dtype before"
        )
    if any(column.ndim != 1 for _, column in columns) or len({len(column) for _, column in columns}) != 1:
        shapes = ", ".join(f"{name!r} {list(column.shape)}" for name, column in columns)
        raise TypeError(f"{what} is a table whose columns are not one-dimensional and equally long ({shapes}); give one column")
    return np.stack([column for _, column in columns], axis=1)


def _checked(array: "np.ndarray[Any, Any]", what: str) -> "np.ndarray[Any, Any]":
    """The array, if its dtype has a place in a tensor; else what to do instead."""
    try:
        _dtypes.to_name(array.dtype)
        return array
    except TypeError as error:
        refusal = str(error)
    missing = sum(map(_is_missing, array.flat)) if array.dtype.kind == "O" else 0
    if missing:
        raise ValueError(_nulls(missing, what))
    raise TypeError(f"{what}: {refusal}{_remedy(array)}")


def _remedy(array: "np.ndarray[Any, Any]") -> str:
    kind = array.dtype.kind
    if kind == "O":
        found = sorted({type(element).__name__ for element in array.flat})
        return f". Its elements are {', '.join(found[:4])}; convert it before, as by x.astype('float64')"
    if kind in "mM":
        return ". Times are stored as the integers that they are counted in: give x.view('int64'), and keep the unit"
    if kind == "V" and array.dtype.names:
        return ". Give its fields one by one, or as a mapping from names to arrays to put"
    if kind in "fc":
        return f". Convert it, as by x.astype('{'float64' if kind == 'f' else 'complex128'}')"
    return ""


def _is_missing(element: Any) -> bool:
    return element is None or element is np.ma.masked or type(element).__name__ in ("NAType", "NaTType")


def _nulls(count: int, what: str) -> str:
    return f"{what} has {count} nulls; fill or drop them first, a tensor has none"


def _unmasked(array: Any, what: str) -> "np.ndarray[Any, Any]":
    count = int(np.count_nonzero(np.ma.getmaskarray(array)))
    if count:
        raise ValueError(
            f"{what} has {count} masked elements of {array.size}; fill them (x.filled(…)) or drop them "
            "(x.compressed()) first, a tensor has no mask"
        )
    return np.asarray(array.data)


def _from_numpy_speaker(value: Any, what: str) -> "np.ndarray[Any, Any]":
    try:
        array = np.asanyarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} is {_named(value)}, which numpy cannot make an array of: {error}") from None
    if isinstance(array, np.ma.MaskedArray):
        return _unmasked(array, what)
    if array.dtype.kind == "O" and isinstance(value, int):
        raise TypeError(f"{what} is {value}; an integer tensor reaches from -2^63 to 2^64-1")
    if array.dtype.kind == "O" and array.ndim == 0:
        raise TypeError(
            f"{what} is {_named(value)}; give an array, or numbers and booleans of Python or numpy, or lists of them"
        )
    return np.asarray(array)


def _named(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _from_dlpack(value: Any, what: str) -> "np.ndarray[Any, Any]":
    device = int(value.__dlpack_device__()[0])
    if device not in _CPU_DEVICES:
        raise TypeError(f"{what} is {_named(value)} on DLPack device type {device}; bring it into main memory first")
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, AttributeError) as error:
        raise TypeError(
            f"{what} is {_named(value)}, which numpy cannot take by DLPack: {error}; convert it to a numpy array"
        ) from None


def is_array(value: Any) -> bool:
    """Whether it is an array or scalar of numpy or of a library that `read` knows; lists and tables are not."""
    return isinstance(value, np.generic) or hasattr(value, "__array__") or hasattr(value, "__dlpack__") or _speaks_arrow(value)


# Lists


class _Leaves:
    """What numpy's rules for mixed lists could change."""

    def __init__(self) -> None:
        self.floats = False
        #: Integers that a float may not hold.
        self.large: List[int] = []


def _from_sequence(values: Sequence[Any], what: str) -> "np.ndarray[Any, Any]":
    leaves = _Leaves()
    values = _opened(values, what, leaves, 1)
    try:
        array = np.asarray(values)
        if array.size and array.dtype.kind == "f" and not leaves.floats:
            # Integers, some of which are beyond int64: numpy makes floats of them.
            if array.min() < 0:
                raise TypeError(f"{what} has negative integers and some beyond 2^63-1; no dtype holds both")
            array = np.asarray(values, np.uint64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what} is a list that does not make an array: {error}") from None
    lost = [number for number in leaves.large if int(float(number)) != number] if array.dtype.kind in "fc" else []
    if lost:
        raise TypeError(f"{what} has the integer {lost[0]} among floats, which cannot hold it exactly")
    return array


def _opened(values: Sequence[Any], what: str, leaves: _Leaves, depth: int) -> Sequence[Any]:
    """The same lists, with arrays of other libraries in them converted."""
    if depth > _AXES_MAX:
        raise ValueError(f"{what} is a list nested deeper than {_AXES_MAX}; a tensor has at most {_AXES_MAX} axes")
    kinds = set(map(type, values))
    if kinds <= {int, float, bool}:
        leaves.floats |= float in kinds
        if int in kinds:
            leaves.large += [value for value in values if type(value) is int and abs(value) > _EXACT_MAX]
        return values
    opened: List[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            opened.append(_opened(value, what, leaves, depth + 1))
            continue
        if _is_missing(value):
            raise ValueError(_nulls(sum(map(_is_missing, values)), what))
        if isinstance(value, (int, float, complex)) and not isinstance(value, np.generic):
            opened.append(value)
            leaves.floats |= not isinstance(value, int)
            numbers = [value] if isinstance(value, int) else []
        else:
            array = as_numpy(value, what)
            opened.append(array)
            leaves.floats |= array.dtype.kind not in "iub"
            numbers = array.ravel().tolist() if array.dtype.kind in "iu" else []
        leaves.large += [number for number in numbers if abs(number) > _EXACT_MAX]
    return opened


# pandas


def _from_pandas(pandas: Any, series: Any, what: str) -> "np.ndarray[Any, Any]":
    """A Series, Index or extension array; the labels are left to whoever holds it."""
    dtype = series.dtype
    if isinstance(dtype, np.dtype):
        # NaN is a value of these dtypes. (What else numpy has no dtype for are objects.)
        return _checked(np.asarray(series.to_numpy()), what)
    values = series if isinstance(series, pandas.api.extensions.ExtensionArray) else series.array
    if getattr(dtype, "pyarrow_dtype", None) is not None:
        return _from_arrow(_pyarrow(series, what), values.__arrow_array__(), what)
    if isinstance(dtype, pandas.SparseDtype):
        return _checked(np.asarray(values.to_dense()), what)
    missing = int(values.isna().sum())
    if missing:
        raise ValueError(_nulls(missing, what))
    if isinstance(dtype, pandas.CategoricalDtype):
        categories = _from_pandas(pandas, dtype.categories, what)
        return np.asarray(categories[values.codes])
    numpy_dtype = getattr(dtype, "numpy_dtype", None)
    if numpy_dtype is None:
        raise TypeError(f"{what}: pandas dtype {dtype} has no place in a tensor; convert it, as by x.astype('int64')")
    return _checked(values.to_numpy(dtype=numpy_dtype), what)


# xarray and torch


def _is_xarray(value: Any) -> bool:
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(value, (xarray.DataArray, xarray.Variable))


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def _from_torch(tensor: Any, what: str) -> "np.ndarray[Any, Any]":
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise TypeError(f"{what} is a torch tensor on device {tensor.device}; give x.cpu()")
    if hasattr(tensor, "get_mask"):
        mask = tensor.get_mask()
        if not bool(mask.all()):
            count = int((~mask).sum())
            raise ValueError(f"{what} has {count} masked elements; fill or drop them first, a tensor has no mask")
        tensor = tensor.get_data()
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # What numpy has no dtype for goes as its bits.
    name = str(tensor.dtype).rpartition(".")[2]
    bits = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}.get(name)
    if bits is not None and _dtypes.ml_dtypes is None:
        raise TypeError(f"{what} is a torch tensor of {tensor.dtype}, which needs ml_dtypes here: install that, or convert it")
    try:
        if bits is not None:
            return np.asarray(tensor.view(getattr(torch, bits)).numpy().view(_dtypes.to_numpy(name)))
        return np.asarray(tensor.numpy())
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{what} is a torch tensor of {tensor.dtype} that is not a plain array: {error}") from None


# Arrow


def _speaks_arrow(value: Any) -> bool:
    if hasattr(value, "__arrow_c_stream__") or hasattr(value, "__arrow_c_array__"):
        return True
    pa = sys.modules.get("pyarrow")
    if pa is None:
        return False
    return isinstance(value, (pa.Array, pa.ChunkedArray, pa.Table, pa.RecordBatch, pa.Scalar, pa.Tensor))


def _pyarrow(value: Any, what: str) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
    except ImportError:
        raise TypeError(
            f"{what} is {_named(value)}, an Arrow array; reading it needs pyarrow: install that, or give a numpy array"
        ) from None
    return pyarrow


def _from_arrow_speaker(value: Any, what: str) -> Union["np.ndarray[Any, Any]", Columns]:
    pa = _pyarrow(value, what)
    if isinstance(value, pa.Tensor):
        return _checked(value.to_numpy(), what)
    if isinstance(value, pa.Scalar):
        return np.asarray(_from_arrow(pa, pa.array([value.as_py()], type=value.type), what)[0])
    if not isinstance(value, (pa.Array, pa.ChunkedArray, pa.Table, pa.RecordBatch)):
        try:
            # A stream can be read once, so it is not asked first whether it is one of tables, which come as structs.
            value = pa.chunked_array(value) if hasattr(value, "__arrow_c_stream__") else pa.array(value)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise TypeError(f"{what} is {_named(value)}, which pyarrow cannot take: {error}") from None
    if isinstance(value, (pa.Table, pa.RecordBatch)):
        names, columns = value.schema.names, value.columns
    elif pa.types.is_struct(value.type):
        names, columns = [field.name for field in value.type], value.flatten()
    else:
        return _from_arrow(pa, value, what)
    return [(name, _from_arrow(pa, column, f"column {name!r}")) for name, column in zip(names, columns)]


def _from_arrow(pa: Any, column: Any, what: str) -> "np.ndarray[Any, Any]":
    """An array or chunked array; lists of a fixed size and fixed-shape tensors give it further axes."""
    chunks = [column]
    if isinstance(column, pa.ChunkedArray):
        chunks = column.chunks or [_no_rows(pa, column.type)]
    decoded = [_decoded(pa, chunk, what) for chunk in chunks]
    nulls = sum(count for _, count in decoded)
    if nulls:
        raise ValueError(_nulls(nulls, what))
    return decoded[0][0] if len(decoded) == 1 else np.concatenate([array for array, _ in decoded])


def _no_rows(pa: Any, kind: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        # pyarrow makes no arrays of some extension types, such as tensors with a permutation, but of their storage.
        return pa.ExtensionArray.from_storage(kind, pa.nulls(0, kind.storage_type))
    return pa.nulls(0, kind)


def _decoded(pa: Any, array: Any, what: str) -> Tuple["np.ndarray[Any, Any]", int]:
    """An Arrow array as numpy's, and how many nulls it has at any depth; with nulls the numpy array means nothing."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        values, nulls = _decoded(pa, array.dictionary, what)
        if nulls or array.null_count:
            # A null in the dictionary counts as often as it is used.
            return values, array.dictionary_decode().null_count
        return values[array.indices.to_numpy(zero_copy_only=False)], 0
    if str(kind).startswith("run_end_encoded"):
        return _decoded(pa, pa.compute.run_end_decode(array), what)
    if pa.types.is_fixed_size_list(kind):
        # Of a null row nothing comes out here.
        inner, nulls = _decoded(pa, array.flatten(), what)
        nulls += array.null_count
        return (inner if nulls else inner.reshape(len(array), kind.list_size, *inner.shape[1:])), nulls
    if isinstance(kind, pa.BaseExtensionType):
        return _extension(pa, array, what)
    if array.null_count:
        return np.empty(0), array.null_count
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return np.asarray(array.to_numpy(zero_copy_only=False)), 0
    remedy = "cast it before, or give another column"
    if pa.types.is_temporal(kind):
        remedy = "times are stored as the integers that they are counted in: give x.cast('int64'), and keep the unit"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        remedy = "rows of one length are a FixedSizeList: x.cast(pyarrow.list_(type, length))"
    raise TypeError(f"{what}: Arrow type {kind} has no place in a tensor; {remedy}")


def _extension(pa: Any, array: Any, what: str) -> Tuple["np.ndarray[Any, Any]", int]:
    name = array.type.extension_name
    if name not in ("arrow.fixed_shape_tensor", "arrow.bool8"):
        raise TypeError(f"{what}: Arrow extension type {name} has no place in a tensor; if its storage has, give x.storage")
    inner, nulls = _decoded(pa, array.storage, what)
    if nulls:
        return inner, nulls
    if name == "arrow.bool8":
        return inner != 0, 0
    kind = array.type
    inner = inner.reshape(len(array), *kind.shape)
    if kind.permutation is not None:
        # It says which axis of the storage each axis of the tensor is.
        inner = inner.transpose(0, *(axis + 1 for axis in kind.permutation))
    return inner, 0
