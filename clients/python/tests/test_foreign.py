"""Arrays of other libraries: kept exactly or refused. Needs no host."""

import array
import datetime
import decimal
import fractions
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from strait._foreign import as_numpy, read

ml_dtypes = pytest.importorskip("ml_dtypes")
pa = pytest.importorskip("pyarrow")

BIG = 2**53 + 1


def check(given, wanted, dtype=None):
    """`given` is a tensor of exactly these elements, shape and dtype."""
    wanted = np.asarray(wanted, dtype)
    got = as_numpy(given, "x")
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(got, wanted)


def refused(given, error, says):
    with pytest.raises(error, match=says):
        as_numpy(given, "x")


# numpy and Python


def test_masked_arrays():
    refused(np.ma.array([1, -999, 3], mask=[0, 1, 0]), ValueError, "x has 1 masked elements of 3; fill.*filled.*compressed")
    refused(np.ma.array(np.ones((2, 2)), mask=True), ValueError, "4 masked elements of 4")
    refused(np.ma.masked, ValueError, "1 masked")
    refused([np.ma.array([1, 2], mask=[0, 1])], ValueError, "1 masked elements of 2")
    refused([1.0, np.ma.masked], ValueError, "1 nulls")
    refused(np.ma.array([(1, 2.0)], dtype=[("a", int), ("b", float)], mask=[(0, 1)]), ValueError, "1 masked")
    check(np.ma.array([1, 2, 3]), [1, 2, 3], "int64")
    check(np.ma.array([1.5, 2.5], mask=[0, 0]), [1.5, 2.5])


def test_an_array_answers_a_masked_one():
    class Variable:
        def __array__(self, dtype=None, copy=None):
            return np.ma.array([1, 2], mask=[False, True])

    refused(Variable(), ValueError, "1 masked")


@pytest.mark.parametrize(
    "given",
    [
        np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2],
        np.arange(6.0).astype(">f8"),
        np.array(2.5),
        np.empty((0, 3)),
        np.asfortranarray(np.ones((2, 3))),
        np.broadcast_to(np.float64(1), (4,)),
    ],
    ids=["strided", "big-endian", "0-d", "empty", "fortran", "broadcast"],
)
def test_numpy_arrays_of_every_layout(given):
    given.flags.writeable = False
    got = as_numpy(given, "x")
    assert got.shape == given.shape
    np.testing.assert_array_equal(got, given)


def test_what_numpy_knows():
    check(np.array([[1, 2]]).view(np.matrix), [[1, 2]])
    check(memoryview(array.array("d", [1, 2])), [1.0, 2.0])
    check(bytearray(b"\x01\x02"), [1, 2], "uint8")
    check(range(3), [0, 1, 2])
    check(np.int64(7), 7)
    check(2**64 - 1, 2**64 - 1, "uint64")
    check(True, True)


def test_lists():
    check([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    check([], [], "float64")
    check([1, 2.5, True], [1, 2.5, 1])
    check([1, 2**63], [1, 2**63], "uint64")
    check([np.uint64(2**63), 1], [2**63, 1], "uint64")
    check([0.5, 2**60], [0.5, 2.0**60])
    check((np.arange(2), [3, 4]), [[0, 1], [3, 4]])
    check([pa.array([1, BIG]), pa.array([3, 4])], [[1, BIG], [3, 4]])
    check([np.float32(1.5), np.float32(2)], [1.5, 2], "float32")
    # Integers are never made floats that are other numbers.
    refused([-1, 2**63], TypeError, "negative integers and some beyond 2.63-1")
    refused([np.uint64(1), -1], TypeError, "negative integers")
    refused([0.5, BIG], TypeError, "the integer 9007199254740993 among floats")
    refused([[0.5], [np.int64(BIG)]], TypeError, "9007199254740993")
    refused([1, None], ValueError, "x has 1 nulls")
    refused([pa.array([1, None])], ValueError, "x has 1 nulls")
    refused([[1], [1, 2]], ValueError, "x is a list that does not make an array")
    refused([[[[[[[[[1]]]]]]]]], ValueError, "at most 8 axes")


@pytest.mark.parametrize(
    "given, error, says",
    [
        (None, TypeError, "x is NoneType"),
        (2**64, TypeError, "18446744073709551616; an integer tensor reaches"),
        (decimal.Decimal("1.5"), TypeError, "decimal.Decimal"),
        ([fractions.Fraction(1, 3)], TypeError, "fractions.Fraction"),
        ({1, 2}, TypeError, "x is set"),
        ("abc", TypeError, "<U3"),
        (b"abc", TypeError, "S3"),
        (datetime.datetime(2020, 1, 1), TypeError, "datetime.datetime"),
        (np.array(["2020"], "M8[s]"), TypeError, "M8.*integers that they are counted in"),
        (np.timedelta64(3, "s"), TypeError, "m8"),
        (np.longdouble(1), TypeError, "astype..float64"),
        (np.zeros(2, [("a", int)]), TypeError, "fields one by one"),
        (np.array([1, "a"], object), TypeError, "elements are int, str"),
        (np.array([1, None, None], object), ValueError, "2 nulls"),
    ],
    ids=str,
)
def test_what_has_no_place(given, error, says):
    refused(given, error, says)


# DLPack


class OnlyDLPack:
    """Hands on an array by DLPack and in no other way."""

    def __init__(self, array, device=(1, 0)):
        self._array, self._device = array, device

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._device


def test_dlpack():
    for given in (np.arange(6).reshape(2, 3)[:, ::-1], np.float32([1, 2]), np.array([True, False]), np.empty((0, 2))):
        check(OnlyDLPack(given), given)
    check([OnlyDLPack(np.arange(3)), OnlyDLPack(np.arange(3))], [[0, 1, 2], [0, 1, 2]])
    refused(OnlyDLPack(np.ones(3), (2, 0)), TypeError, "OnlyDLPack on DLPack device type 2; bring it into main memory")


# Arrow


def fixed(values, kind=None, width=2):
    return pa.array(values, pa.list_(kind or pa.int16(), width))


def tensors(values, shape, **how):
    """A fixed-shape tensor column of these flat rows."""
    kind = pa.fixed_shape_tensor(pa.int32(), shape, **how)
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


def test_arrow_encodings_keep_the_dtype():
    check(pa.array([7, BIG, 7]).dictionary_encode(), [7, BIG, 7])
    check(pa.array([7, BIG, 7]).dictionary_encode()[1:], [BIG, 7])
    check(pa.RunEndEncodedArray.from_arrays([2, 3], [5, BIG]), [5, 5, BIG])
    check(pa.RunEndEncodedArray.from_arrays([2, 3], [5, None])[:2], [5, 5])
    check(pa.chunked_array([pa.array([1, 2]).dictionary_encode(), pa.array([BIG]).dictionary_encode()]), [1, 2, BIG])
    check(pa.chunked_array([[1], [2, 3]], pa.int8()), [1, 2, 3], "int8")
    check(pa.array([True, False, True])[1:], [False, True])
    check(pa.array(np.float16([1.5])), [1.5], "float16")
    check(pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, 7], pa.int8())), [False, True, True])
    check(pa.scalar(2**63, pa.uint64()), 2**63, "uint64")
    check(pa.Tensor.from_numpy(np.ones((2, 3), np.float32)), np.ones((2, 3)), "float32")


def test_arrow_nulls_are_refused_at_every_depth():
    one = [
        pa.array([1, None]),
        pa.chunked_array([[1], [None]]),
        pa.DictionaryArray.from_arrays(pa.array([0, None]), pa.array([1])),
        pa.RunEndEncodedArray.from_arrays([2, 3], [5, None]),
        fixed([[1, 2], None, [3, 4]]),
        fixed([[1, 2], [3, None]]),
        tensors([[1, 2, 3, 4], [1, 2, None, 4]], [2, 2]),
        tensors([[1, 2, 3, 4], None], [2, 2]),
        pa.array([[[1, 2], [3, None]]], pa.list_(pa.list_(pa.int64(), 2), 2)),
        pa.scalar(None, pa.int64()),
        pa.nulls(1),
    ]
    for given in one:
        refused(given, ValueError, "^x has 1 nulls; fill or drop them")
    # As often as the dictionary's null is used.
    refused(pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 1]), pa.array([1, None])), ValueError, "2 nulls")
    refused(pa.RunEndEncodedArray.from_arrays([2, 5], [5, None]), ValueError, "3 nulls")
    check(pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array([1])), [1, 1])


def test_lists_of_a_fixed_size_are_axes():
    check(fixed([[1, 2], [3, 4]]), [[1, 2], [3, 4]], "int16")
    check(fixed([[1, 2], [3, 4], [5, 6]])[1:], [[3, 4], [5, 6]], "int16")
    check(fixed([[1, 2], None, [5, 6]])[2:], [[5, 6]], "int16")
    check(pa.array([[[1], [2]], [[3], [4]]], pa.list_(pa.list_(pa.int64(), 1), 2)), [[[1], [2]], [[3], [4]]])
    check(fixed([[], []], width=0), np.empty((2, 0)), "int16")
    check(pa.chunked_array([fixed([[1, 2]]), fixed([[3, 4]])]), [[1, 2], [3, 4]], "int16")
    check(pa.chunked_array([], pa.list_(pa.int16(), 2)), np.empty((0, 2)), "int16")


def test_fixed_shape_tensors():
    rows = [list(range(n, n + 6)) for n in (0, 6, 12)]
    column = tensors(rows, [2, 3])
    check(column, np.arange(18).reshape(3, 2, 3), "int32")
    check(column[1:], np.arange(6, 18).reshape(2, 2, 3), "int32")
    check(pa.chunked_array([column[:1], column[1:]]), np.arange(18).reshape(3, 2, 3), "int32")
    turned = tensors(rows, [2, 3], permutation=[1, 0])
    check(turned, turned.to_numpy_ndarray(), "int32")
    assert as_numpy(turned, "x").shape == (3, 3, 2)
    # Of no rows, in no chunk: a permutation is what pyarrow makes no empty array of.
    for kind in (column.type, turned.type, pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 2, 3))).type):
        assert as_numpy(pa.chunked_array([], kind), "x").shape[0] == 0
    table = pa.table({"d": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 2, 2)))})
    check(table.filter([False] * 3), np.empty((0, 2, 2)))


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.float64(), pa.bool_(), pa.bool8(), pa.dictionary(pa.int8(), pa.int16()), pa.run_end_encoded(pa.int32(), pa.int64())], ids=str
)
def test_no_chunks(kind):
    assert as_numpy(pa.chunked_array([], kind), "x").shape == (0,)


@pytest.mark.parametrize(
    "given, says",
    [
        (pa.array(["a"]), "Arrow type string has no place"),
        (pa.array(["a"]).dictionary_encode(), "Arrow type string"),
        (pa.array([[1, 2]]), "FixedSizeList: x.cast"),
        (pa.array([datetime.datetime(2020, 1, 1)]), "integers that they are counted in: give x.cast"),
        (pa.array([decimal.Decimal("1.5")]), "decimal128"),
        (pa.array([b"0" * 16], pa.uuid()), "extension type arrow.uuid.*x.storage"),
        (pa.nulls(0), "Arrow type null"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrow_types_without_a_place(given, says):
    refused(given, TypeError, says)


class OnlyArrow:
    """Speaks one of Arrow's C interfaces and nothing else."""

    def __init__(self, of, way):
        setattr(type(self), way, lambda _, requested_schema=None: getattr(of, way)(requested_schema))


def speaking(of, way):
    return type("OnlyArrow", (OnlyArrow,), {})(of, way)


def test_arrow_c_interfaces():
    column = pa.array([1, BIG])
    check(speaking(column, "__arrow_c_array__"), [1, BIG])
    check(speaking(pa.chunked_array([column, column]), "__arrow_c_stream__"), [1, BIG, 1, BIG])
    refused(speaking(pa.array([1, None]), "__arrow_c_array__"), ValueError, "1 nulls")
    table = pa.table({"a": [1, 2], "b": [1.5, 2.5]})
    for given in (table, table.to_batches()[0], table.to_reader(), speaking(table, "__arrow_c_stream__"), speaking(table.to_batches()[0], "__arrow_c_array__")):
        columns = read(given, "x")
        assert [(name, column.dtype.name, column.tolist()) for name, column in columns] == [
            ("a", "int64", [1, 2]),
            ("b", "float64", [1.5, 2.5]),
        ]


def test_tables_as_one_tensor():
    check(pa.table({"a": [1, BIG], "b": [3, 4]}), [[1, 3], [BIG, 4]])
    check(pa.table({"a": [1, 2]}), [[1], [2]])
    check({"a": [1, 2], "b": [3, 4]}, [[1, 3], [2, 4]])
    refused(pa.table({"a": [1], "b": [1.5]}), TypeError, r"2 dtypes \(float64, int64\)")
    refused({"a": [1], "b": [1, 2]}, TypeError, "equally long.*'b' .2.")
    refused({}, ValueError, "without columns")
    refused(pa.table({"a": [1, None]}), ValueError, "column 'a' has 1 nulls")


def test_without_pyarrow_arrow_arrays_are_refused_by_name():
    program = """
import sys; sys.modules["pyarrow"] = None
from strait._foreign import as_numpy
class Column:
    def __arrow_c_array__(self, requested_schema=None): raise AssertionError
    def __array__(self, dtype=None, copy=None): raise AssertionError
try: as_numpy(Column(), "x")
except TypeError as error: print(error)
"""
    source = Path(__file__).resolve().parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(source)}, capture_output=True, text=True, check=True
    )
    assert "x is __main__.Column, an Arrow array; reading it needs pyarrow" in done.stdout


# pandas, polars, xarray, torch


def test_pandas():
    pd = pytest.importorskip("pandas")
    check(pd.Series([1, 2, 3], index=[5, 6, 7]), [1, 2, 3])
    check(pd.Series([1, np.nan]), [1, np.nan])
    check(pd.Series([1, BIG], dtype="Int64"), [1, BIG])
    check(pd.Series([1, BIG], dtype="int64[pyarrow]"), [1, BIG])
    check(pd.Series([True, False], dtype="boolean"), [True, False])
    check(pd.Series([1.5, 2], dtype="Float32"), [1.5, 2], "float32")
    check(pd.Series([BIG, 1, BIG]).astype("category"), [BIG, 1, BIG])
    check(pd.Series(pd.arrays.SparseArray([0, 0, BIG])), [0, 0, BIG])
    check(pd.Series(pd.arrays.SparseArray([0, np.nan, 1.0])), [0, np.nan, 1])
    check(pd.Index([1, 2]), [1, 2])
    check(pd.array([1, 2]), [1, 2])
    check([pd.Series([1, 2]), pd.Series([3, 4])], [[1, 2], [3, 4]])
    for dtype in ("Int64", "Float64", "boolean", "int64[pyarrow]", "category", "object"):
        refused(pd.Series([1, None, 1], dtype=dtype), ValueError, "x has 1 nulls")
    refused(pd.Series(["a"]), TypeError, "no place in a tensor")
    refused(pd.Series(pd.to_datetime(["2020-01-01"])), TypeError, "M8")
    refused(pd.Series(pd.to_datetime(["2020-01-01"]).tz_localize("UTC")), TypeError, "datetime64.*UTC")
    refused(pd.MultiIndex.from_tuples([(1, 2)]), TypeError, "elements are tuple")
    frame = pd.DataFrame({"a": [1, BIG], "b": [3, 4]})
    check(frame, [[1, 3], [BIG, 4]])
    assert [(name, column.dtype.name) for name, column in read(frame.assign(b=[1.5, 2.5]), "x")] == [("a", "int64"), ("b", "float64")]
    refused(frame.assign(b=[1.5, 2.5]), TypeError, "2 dtypes")
    with pytest.raises(ValueError, match="column 'b' has 1 nulls"):
        read(frame.assign(b=pd.array([1, None])), "x")


def test_polars():
    pl = pytest.importorskip("polars")
    check(pl.Series([1, BIG]), [1, BIG])
    check(pl.Series([1.5], dtype=pl.Float32), [1.5], "float32")
    check(pl.Series([True, False]), [True, False])
    check(pl.Series([], dtype=pl.UInt8), [], "uint8")
    check(pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)), [[1, 2], [3, 4]])
    refused(pl.Series([1, None]), ValueError, "x has 1 nulls")
    refused(pl.Series([[1, 2], [3, None]], dtype=pl.Array(pl.Int64, 2)), ValueError, "x has 1 nulls")
    refused(pl.Series(["a"]), TypeError, "no place in a tensor")
    refused(pl.Series([[1]]), TypeError, "FixedSizeList")
    refused(pl.Series([datetime.date(2020, 1, 1)]), TypeError, "date32")
    check(pl.DataFrame({"a": [1, BIG], "b": [3, 4]}), [[1, 3], [BIG, 4]])
    columns = read(pl.DataFrame({"a": [1, BIG], "b": [1.5, 2.5]}), "x")
    assert [(name, column.dtype.name, column.tolist()) for name, column in columns] == [
        ("a", "int64", [1, BIG]),
        ("b", "float64", [1.5, 2.5]),
    ]


def test_xarray():
    xr = pytest.importorskip("xarray")
    grid = xr.DataArray(np.arange(6).reshape(2, 3), dims=("a", "b"), coords={"a": [1, 2]})
    check(grid, np.arange(6).reshape(2, 3))
    check(grid.T, np.arange(6).reshape(2, 3).T)
    check(grid.variable, np.arange(6).reshape(2, 3))
    refused(xr.DataArray(np.array(["2020"], "M8[ns]")), TypeError, "M8")
    columns = read(xr.Dataset({"u": grid, "v": ("t", [1.5])}), "x")
    assert [(name, column.shape) for name, column in columns] == [("u", (2, 3)), ("v", (1,))]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch():
    torch = pytest.importorskip("torch")
    grid = torch.arange(6.0).reshape(2, 3)
    for given in (grid, grid.clone().requires_grad_(), torch.nn.Parameter(grid.clone())):
        check(given, np.arange(6).reshape(2, 3), "float32")
    check(grid.T, np.arange(6).reshape(2, 3).T, "float32")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        check(grid.T.to(getattr(torch, name)), np.arange(6).reshape(2, 3).T, name)
    check(torch.tensor([1 + 2j]).conj(), [1 - 2j], "complex64")
    check([torch.tensor(1.5), torch.tensor(2.5)], [1.5, 2.5], "float32")
    refused(grid.to_sparse(), TypeError, "to_dense")
    refused(grid.to("meta"), TypeError, "device meta; give x.cpu")
    masked = torch.masked.masked_tensor(grid, grid > 2)
    refused(masked, ValueError, "3 masked elements")
