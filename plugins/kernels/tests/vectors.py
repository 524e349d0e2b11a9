"""Writes vectors.txt: what numpy and ml_dtypes say about conversions. cast.rs holds `cast` against it.

    python vectors.py > vectors.txt        (numpy, ml_dtypes)

Lines:
  sweep FROM TO HASH            FNV-1a 64 of the results (bytes, little-endian) over a whole range of inputs
  cast FROM TO INPUTS RESULTS   elements in hexadecimal, as they lie in memory
NaNs are written as the quiet NaN of their sign.
"""

import warnings

import ml_dtypes
import numpy as np

warnings.simplefilter("ignore")

DTYPES = {
    "bool8": np.bool_, "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2, "float32": np.float32, "float64": np.float64,
    "complex64": np.complex64, "complex128": np.complex128,
}
NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def quiet(values):
    """The quiet NaN of its sign in place of each NaN; complex parts on their own."""
    if values.dtype.kind in "biu":
        return values
    if values.dtype.kind == "c":
        return quiet(values.view(values.real.dtype)).view(values.dtype)
    bits = values.view(BITS[values.dtype.itemsize]).copy()
    sign = bits.dtype.type(1 << (8 * values.dtype.itemsize - 1))
    nan = np.abs(np.array([np.nan], np.float32).astype(values.dtype).view(bits.dtype)[0] & ~sign)
    where = np.isnan(values.astype(np.float64))
    bits[where] = (bits[where] & sign) | nan
    return bits.view(values.dtype)


def fnv(data):
    state = 0xCBF29CE484222325
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return state


def sweep(name_from, name_to, values):
    print("sweep", name_from, name_to, f"{fnv(quiet(values.astype(DTYPES[name_to])).tobytes()):016x}")


def cast(name_from, name_to, values):
    values = np.array(values)
    print("cast", name_from, name_to, values.tobytes().hex(), quiet(values.astype(DTYPES[name_to])).tobytes().hex())


def sources(name):
    """A few values of a dtype, its limits among them."""
    dtype = np.dtype(DTYPES[name])
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        small = [0, 1, 2, 3, 100, limits.max, limits.max - 1, limits.max // 2, limits.max // 3, limits.min]
        return np.array(small + ([-1, -2, -100] if limits.min < 0 else []), dtype)
    numbers = [0.0, -0.0, 0.25, 0.75, 1.0, -1.0, 1.5, 2.5, -2.5, 3.1, 100.0, -100.0, 127.9, 240.0]
    special = [np.inf, -np.inf, np.nan, 1e-7, -1e-3, 447.0, 448.0, 6e4, 65519.0, 65520.0, 3e38]
    if dtype.kind == "c":
        parts = np.array(numbers + special, np.float32)
        # Every value beside every sort of imaginary part.
        return np.concatenate([parts + 1j * np.roll(parts, shift) for shift in (1, 8)]).astype(dtype)
    return np.array(numbers + special, np.float32).astype(dtype)


def in_range(values, to):
    """Those whose conversion numpy defines."""
    if to.kind not in "iu" or values.dtype.kind in "biu":
        return values
    wide, limits = values.astype(np.float64), np.iinfo(to)
    return values[np.isfinite(wide) & (np.trunc(wide) >= limits.min) & (wide < float(limits.max))]


print(f"# numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}")

upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
floats = (upper[:, None] | lower[None, :]).ravel().view(np.float32)
for name in NARROW:
    sweep("float32", name, floats)
    codes = np.arange(1 << (8 * np.dtype(DTYPES[name]).itemsize))
    codes = codes.astype(BITS[np.dtype(DTYPES[name]).itemsize]).view(DTYPES[name])
    sweep(name, "float32", codes)
    sweep(name, "float64", codes)

for name_from in DTYPES:
    for name_to, to in DTYPES.items():
        if name_from.startswith("complex") and not name_to.startswith(("complex", "bool")):
            continue
        cast(name_from, name_to, in_range(sources(name_from), np.dtype(to)))
