"""Segments as stock pyarrow sees them.

STRAIT_IPC_SAMPLES is the built example `ipc_samples` of strait-tensor:

    cargo build --release -p strait-tensor --example ipc_samples
    STRAIT_IPC_SAMPLES=target/release/examples/ipc_samples pytest tests/python/test_ipc_layout.py
"""

import gc
import json
import os
import subprocess
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

SAMPLES = os.environ.get("STRAIT_IPC_SAMPLES")
if SAMPLES is None:
    pytest.skip("STRAIT_IPC_SAMPLES names no example", allow_module_level=True)

KEEP = tempfile.TemporaryDirectory(prefix="ipc-samples-")
DIRECTORY = Path(KEEP.name)
subprocess.run([SAMPLES, str(DIRECTORY)], check=True)
CASES = json.loads((DIRECTORY / "cases.json").read_text())
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])

# What numpy can view the bytes as; the others go by their storage.
LOGICAL = {
    "bool8": np.int8,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
STORAGE = {
    "bool8": np.int8,
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
    "complex64": np.float32,
    "complex128": np.float64,
}


def pattern(tensor):
    """The bytes that ipc_samples writes."""
    data = (np.arange(tensor["length"], dtype=np.uint64) % 251 * 37 + 11) % 251
    return (data & (1 if tensor["dtype"] == "bool8" else 0xFF)).astype(np.uint8)


def same_bits(array, tensor):
    return np.array_equal(np.ascontiguousarray(array).view(np.uint8).reshape(-1), pattern(tensor))


def to_numpy(column):
    """A column as pyarrow gives it: fixed-shape tensors in their shape, without a copy."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.to_numpy(zero_copy_only=True)


def check_batch(batch, case):
    assert batch.schema.names == [tensor["name"] for tensor in case["tensors"]]
    for field, column, tensor in zip(batch.schema, batch.columns, case["tensors"]):
        check_column(field, column, tensor)


def check_column(field, column, tensor):
    dtype, shape = tensor["dtype"], tensor["shape"]
    metadata = field.metadata or {}
    is_complex = dtype.startswith("complex")
    rows = shape[0] if shape else 1
    inner = shape[1:] + ([2] if is_complex else [])
    assert len(column) == rows
    assert column.null_count == 0
    if inner:
        assert isinstance(column.type, pa.FixedShapeTensorType)
        assert column.type.shape == inner
    elif dtype == "bool8":
        assert isinstance(column.type, pa.Bool8Type)
    named = dtype in STORAGE and not (dtype == "bool8" and not inner)
    assert metadata.get(b"strait.dtype") == (dtype.encode() if named else None)
    assert metadata.get(b"strait.shape") == (b"[]" if not shape else None)
    array = to_numpy(column)
    assert array.dtype == np.dtype(STORAGE.get(dtype, dtype))
    assert array.shape == (rows, *inner)
    assert array.nbytes == tensor["length"]
    if is_complex:
        array = array.view(dtype)
    elif dtype in LOGICAL:
        array = array.view(LOGICAL[dtype])
    array = array.reshape(shape)
    assert array.itemsize * array.size == tensor["length"]
    assert same_bits(array, tensor)


@by_name
def test_a_mapped_file_is_read_without_allocation(case):
    path = DIRECTORY / f"{case['name']}.arrow"
    # What an earlier test left to the collector must not go in between.
    gc.collect()
    with pa.memory_map(str(path)) as source:
        before = pa.total_allocated_bytes()
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 1
        batch = reader.get_batch(0)
        batch.validate(full=True)
        check_batch(batch, case)
        assert pa.total_allocated_bytes() <= before


@by_name
def test_from_byte_8_on_it_is_a_stream(case):
    data = (DIRECTORY / f"{case['name']}.arrow").read_bytes()
    with pa.ipc.open_stream(pa.py_buffer(data)[8:]) as reader:
        batches = list(reader)
    assert len(batches) == 1
    batches[0].validate(full=True)
    check_batch(batches[0], case)


@by_name
def test_the_buffers_lie_where_the_mapping_says(case):
    path = DIRECTORY / f"{case['name']}.arrow"
    assert path.stat().st_size == case["bytes"]
    data = pa.py_buffer(path.read_bytes())
    batch = pa.ipc.open_file(data).get_batch(0)
    for column, tensor in zip(batch.columns, case["tensors"]):
        assert tensor["offset"] % 65536 == 0
        assert tensor["offset"] + tensor["length"] <= case["footer_offset"]
        values = column.buffers()[-1]
        if tensor["length"] > 0:
            assert values.address - data.address == tensor["offset"]
            assert values.size == tensor["length"]
    assert case["footer_offset"] % 65536 == 0


def test_large_tensors_start_on_huge_pages():
    huge = next(case for case in CASES if case["name"] == "huge")
    assert [tensor["offset"] % (2 << 20) for tensor in huge["tensors"]] == [65536, 0]
    shrunk = next(case for case in CASES if case["name"] == "shrunk")
    assert shrunk["tensors"][0]["offset"] == 2 << 20
    assert shrunk["footer_offset"] == (2 << 20) + 65536
