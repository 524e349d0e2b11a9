"""Kernels that take their rows as they come, at once and in chunks, against numpy, pandas and scipy."""

import numpy as np
import pandas
import pytest
import scipy.signal
from conftest import strait

ROWS = 3000
DTYPES = ["float32", "float64"]


@pytest.fixture(params=[None, 1, 256, 100_000], ids=["at once", "1 row", "256 rows", "more rows than there are"])
def run(request, tmp_path):
    """`strait run`: arrays by port in, arrays by port out."""

    def run(kernel, outputs=("y",), parameters=None, **inputs):
        words = []
        for port, array in inputs.items():
            np.save(tmp_path / f"{port}.npy", array)
            words += ["--input", f"{port}={tmp_path / port}.npy"]
        words += [f"--output={port}={tmp_path / port}.out.npy" for port in outputs]
        words += [f"--param={name}={value}" for name, value in (parameters or {}).items()]
        if request.param:
            words += ["--chunk-rows", request.param]
        strait("run", kernel, *words)
        return [np.load(tmp_path / f"{port}.out.npy") for port in outputs]

    return run


@pytest.fixture(params=DTYPES)
def x(request):
    return np.random.default_rng(11).normal(3, 40, (ROWS, 3)).astype(request.param)


def assert_close(y, expected, x):
    """To a few roundings of x's dtype: the kernels compute in float64."""
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    ulps = 4 if x.dtype == np.float32 else 4096
    scale = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(y, expected, rtol=0, atol=ulps * np.finfo(x.dtype).eps * scale)


def test_cumsum_has_the_bits_of_numpys(run, x):
    [y] = run("cumsum", x=x)
    expected = np.cumsum(x.astype(np.float64), axis=0).astype(x.dtype)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "int64", "uint64"])
def test_cumsum_of_integers(run, dtype):
    x = np.random.default_rng(5).integers(0, 2 if dtype == "bool" else 100, (50, 2)).astype(dtype)
    if dtype == "int64":
        x[10] = np.iinfo(np.int64).max
    [y] = run("cumsum", x=x)
    expected = np.cumsum(x, axis=0)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("window", [1, 7, 300, ROWS, ROWS + 1])
def test_rolling_mean_as_pandas_has_it(run, x, window):
    [y] = run("rolling-mean", x=x, parameters={"window": window})
    expected = pandas.DataFrame(x.astype(np.float64)).rolling(window).mean().to_numpy()
    if window > ROWS:
        assert np.isnan(y).all() and y.shape == x.shape
    else:
        assert_close(y, expected, x)


@pytest.mark.parametrize("taps", [1, 16, 101])
def test_fir_as_scipy_has_it(run, x, taps):
    taps = np.random.default_rng(taps).normal(size=taps)
    [y] = run("fir", x=x, taps=taps)
    assert_close(y, scipy.signal.lfilter(taps, 1, x.astype(np.float64), axis=0), x)
    column = np.ascontiguousarray(x[:, 0])
    [y] = run("fir", x=column, taps=taps)
    assert_close(y, np.convolve(column.astype(np.float64), taps)[:ROWS], x)


def test_zscore_running_against_each_prefix(run, x):
    [y] = run("zscore-running", x=x)
    assert np.isnan(y[0]).all()
    wide = x.astype(np.longdouble)
    counts = np.arange(1, ROWS + 1)[:, None]
    mean = wide.cumsum(axis=0) / counts
    expected = np.empty_like(wide)
    for row in range(1, ROWS):
        expected[row] = (wide[row] - mean[row]) / wide[: row + 1].std(axis=0)
    assert_close(y[1:], expected[1:], x)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8"])
@pytest.mark.parametrize("bins", [1, 10, 997])
def test_histogram_counts_as_numpys(run, dtype, bins):
    x = np.random.default_rng(bins).normal(20, 60, (ROWS, 2))
    x = x.astype(dtype) if dtype.startswith("f") else np.clip(x, 0, 250).astype(dtype)
    lo, hi = 2.1, 77.7
    if dtype.startswith("f"):
        # What stands on an edge is where the bins could differ.
        x[: bins + 1, 0] = np.linspace(lo, hi, bins + 1)
        x[-3:, 1] = np.nan, np.inf, -np.inf
    counts, outside = run("histogram", ["counts", "outside"], {"bins": bins, "lo": lo, "hi": hi}, x=x)
    finite = x.astype(np.float64)[~np.isnan(x)]
    expected, _ = np.histogram(finite, bins, range=(lo, hi))
    assert counts.dtype == outside.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(outside, [(finite < lo).sum(), (finite > hi).sum(), np.isnan(x).sum()])


@pytest.mark.parametrize("shape", [(300, 40, 30), (5, 600, 700), (40, 3, 1), (7, 0, 3), (0, 4, 3), (4, 5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_as_numpy_has_it(run, dtype, shape):
    rows, terms, columns = shape
    random = np.random.default_rng(rows)
    a = random.normal(size=(rows, terms)).astype(dtype)
    b = random.normal(size=(terms, columns)).astype(dtype)
    [y] = run("matmul", a=a, b=b)
    assert (y.dtype, y.shape) == (a.dtype, (rows, columns))
    # A quarter of the bound of any order in which the terms can be added.
    bound = max(4, terms / 4) * np.finfo(dtype).eps * (np.abs(a).astype("f8") @ np.abs(b).astype("f8"))
    assert (np.abs(y - a.astype("f8") @ b.astype("f8")) <= bound).all()
    # Integers are exact in every order.
    a, b = np.rint(a * 8), np.rint(b * 8)
    [y] = run("matmul", a=a, b=b)
    np.testing.assert_array_equal(y, a @ b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_of_what_is_not_finite(run, dtype):
    a = np.array([[1, 0], [np.inf, 1], [np.nan, 2], [-np.inf, 1], [1, 1]], dtype)
    b = np.array([[1, -1, 0, np.inf], [np.inf, 1, 2, -np.inf]], dtype)
    [y] = run("matmul", a=a, b=b)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y, a @ b)
