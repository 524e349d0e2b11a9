"""Arrays for the cases, and what each standard kernel must make of them, by numpy and ml_dtypes."""

import math
import zlib

import ml_dtypes
import numpy as np

NAMES = (
    "bool8 int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float8_e4m3fn float8_e5m2 float32 float64 "
    "complex64 complex128"
).split()
NARROW = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def numpy_dtype(name):
    if name == "bool8":
        return np.dtype(bool)
    return np.dtype(getattr(ml_dtypes, name, name))


def make(dtype, shape, fill, salt=""):
    """An array of that dtype; the same one for the same arguments."""
    random = np.random.default_rng(zlib.crc32(f"{dtype} {shape} {fill} {salt}".encode()))
    kind = numpy_dtype(dtype)
    count = math.prod(shape)
    if dtype == "bool8":
        return random.integers(0, 2, shape).astype(bool).reshape(shape)
    if fill == "any":
        return np.frombuffer(random.bytes(count * kind.itemsize), kind).reshape(shape)
    if fill == "special":
        values = _special(dtype, random, count)
    elif kind.kind in "iu":
        values = random.integers(0 if kind.kind == "u" else -100, 101, count)
    elif kind.kind == "c":
        values = random.normal(size=count) + 1j * random.normal(size=count)
    else:
        values = random.normal(1.0, 3.0, count)
    return np.asarray(values).astype(kind).reshape(shape)


def _special(dtype, random, count):
    kind = numpy_dtype(dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        edges = {limits.min, limits.min + 1, limits.max, limits.max - 1, limits.max // 2 + 1, 0, 1, 2, 127, 128, 129}
        edges = np.array([edge for edge in sorted(edges) if limits.min <= edge <= limits.max], kind)
        rest = np.frombuffer(random.bytes(count * kind.itemsize), kind)
    else:
        numbers = [0.0, -0.0, 0.5, -0.5, 1.0, 1.5, -1.5, 2.5, 127.5, 255.5, -129.0, 65519.0, 65520.0, 448.0, 464.0, 2.0**31, 2.0**53, -(2.0**63), 2.0**64, 1e38]
        with np.errstate(over="ignore"):
            edges = np.array([*numbers, np.nan, np.inf, -np.inf]).astype(kind)
        rest = (random.normal(size=count) * 100).astype(kind)
    return np.concatenate([edges, rest])[:count] if count >= len(edges) else np.concatenate([rest, edges])[:count]


def expected(kernel, parameters, x, dtype):
    """Result, its dtype's name, and notes."""
    with np.errstate(all="ignore"):
        if kernel == "cast":
            return _cast(x, dtype, parameters["to"]), parameters["to"], {}
        if kernel == "filter-finite":
            keep = np.isfinite(x)
            return x[keep], dtype, {"dropped": str(int(len(x) - keep.sum()))}
        # An integer is exact, also beyond 2^53.
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in parameters.items()}
        if kernel == "scale-shift":
            a, b = (x.dtype.type(numbers.get(name, default)) for name, default in (("a", 1.0), ("b", 0.0)))
            return np.asarray(a * x + b, x.dtype), dtype, {}
        if kernel == "clip":
            return _clip(x, numbers.get("lo", -math.inf), numbers.get("hi", math.inf)), dtype, {}
        if kernel == "zscore":
            wide = x.astype(np.longdouble)
            axis = int(numbers["axis"])
            scores = (wide - wide.mean(axis, keepdims=True)) / wide.std(axis, keepdims=True) if x.size else wide
            return scores, dtype if x.dtype.kind not in "iub" else "float64", {}
        if kernel == "cumsum":
            if x.dtype.kind in "iub":
                sums = np.cumsum(x, axis=0)
                return sums, sums.dtype.name, {}
            return _cast(np.cumsum(x.astype(np.float64), axis=0), "float64", dtype), dtype, {}
        if kernel == "rolling-mean":
            window, wide = numbers["window"], x.astype(np.longdouble)
            means = np.full(x.shape, np.nan, np.longdouble)
            for row in range(window - 1, len(x)):
                means[row] = wide[row + 1 - window : row + 1].mean(axis=0)
            return means, dtype if x.dtype.kind not in "iub" else "float64", {}
    raise ValueError(f"no reference for kernel {kernel!r}")


def _clip(x, lo, hi):
    if x.dtype.kind in "iub":
        return np.array([min(max(int(value), lo), hi) for value in x.ravel()], x.dtype).reshape(x.shape)
    wide = x.astype(np.float64)
    largest = float(ml_dtypes.finfo(x.dtype).max)
    # float8_e4m3fn has no infinity; its bounds stop at its largest value.
    low, high = (x.dtype.type(max(-largest, min(largest, v)) if x.dtype == ml_dtypes.float8_e4m3fn else v) for v in (lo, hi))
    y = np.where(wide <= float(low), low, x)
    return np.where(y.astype(np.float64) >= float(high), high, y).astype(x.dtype)


def _cast(x, dtype, to):
    kind = numpy_dtype(to)
    if to == dtype:
        return x
    if to == "bool8":
        return x.astype(np.complex128 if x.dtype.kind == "c" else np.longdouble) != 0 if x.dtype.kind not in "iub" else x != 0
    if to.startswith("complex"):
        if x.dtype.kind == "c":
            return x.astype(kind)
        part = "float32" if to == "complex64" else "float64"
        return _cast(x, dtype, part).astype(kind) if part != dtype else x.astype(kind)
    if kind.kind in "iu":
        if x.dtype.kind in "iub":
            return x.astype(kind)
        limits = np.iinfo(kind)
        return np.array([_to_integer(float(value), limits) for value in x.ravel()], kind).reshape(x.shape)
    if to in NARROW:
        return _to_odd(x).astype(kind)
    return x.astype(kind)


def _to_integer(value, limits):
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return limits.max if value > 0 else limits.min
    return min(max(int(value), limits.min), limits.max)


def _to_odd(x):
    """float32 of x, rounded to odd: rounding that once more to fewer bits is as if x had been rounded once."""
    exact = np.atleast_1d(x.astype(np.longdouble))
    near = exact.astype(np.float32)
    inexact = np.isfinite(near) & (near.astype(np.longdouble) != exact)
    even = near.view(np.uint32) & 1 == 0
    towards = np.where(exact > near.astype(np.longdouble), np.float32(np.inf), np.float32(-np.inf))
    return np.where(inexact & even, np.nextafter(near, towards), near).reshape(x.shape)


def check(actual, wanted, dtype, tolerance=0, zero_sign=None):
    """Fails unless the bytes `actual` are the array `wanted`, of that dtype, to the tolerance that README.md explains."""
    kind = numpy_dtype(dtype)
    actual = np.frombuffer(actual, kind).reshape(wanted.shape)
    if tolerance == 0:
        assert wanted.dtype == kind
        low = high = wanted
    else:
        slack = tolerance * 2.0**-52 * np.maximum(np.abs(wanted), 1)
        low, high = (_cast(value, "", dtype) if kind.kind == "V" or dtype in NARROW else value.astype(kind) for value in (wanted - slack, wanted + slack))
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(actual), nan), f"NaN in other places: {actual!r}, not {wanted!r}"
    if tolerance == 0:
        free = nan | ((wanted == 0) & (actual == 0)) if zero_sign == "any" else nan
        zero = np.zeros((), kind)
        same = np.where(free, zero, actual).tobytes() == np.where(free, zero, wanted).tobytes()
        assert same, f"{actual!r}, not {wanted!r}"
    else:
        wide = [np.where(nan, 0, value).astype(np.longdouble) for value in (low, actual, high)]
        inside = (wide[0] <= wide[1]) & (wide[1] <= wide[2])
        assert inside.all(), f"{actual!r}, not {wanted!r}"
