"""Tensor files that strait writes, read by the libraries whose formats they are; and the other way round.

Needs the host's program in STRAIT_BIN; `cargo xtask test python` sets everything up.
"""

import io
import os
import subprocess

import ml_dtypes
import numpy as np
import pandas
import pyarrow as pa
import pytest
from conftest import PATIENCE_SECONDS, environment, strait
from safetensors import numpy as safetensors

RAMP = np.arange(24) * 1.25 - 3
# What .npy has a word for and .safetensors too.
ARRAYS = {
    "f8": RAMP.reshape(4, 6),
    "f4": RAMP.reshape(2, 3, 4).astype("f4"),
    "f2": RAMP.astype("f2"),
    "i1": np.arange(-3, 3, dtype="i1"),
    "u8": np.array([[2**64 - 1, 5]], "u8"),
    "mask": np.array([True, False, True]),
    "c8": (RAMP + 2j).astype("c8"),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 3), "i4"),
}


def same(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def copy(source, name, target):
    """A tensor through a kernel that leaves it as it is, from one file into another."""
    dtype = {"bool": "bool8"}.get(ARRAYS[name].dtype.name, ARRAYS[name].dtype.name)
    strait("run", "cast", "-i", f"x={source}#{name}", "-p", f"to={dtype}", "-o", f"{target}#{name}")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_npz_and_safetensors_both_ways(tmp_path, name, save):
    save(tmp_path / "in.npz", **ARRAYS)
    copy(tmp_path / "in.npz", name, tmp_path / "out.safetensors")
    read = safetensors.load_file(tmp_path / "out.safetensors")
    assert list(read) == [name]
    same(read[name], ARRAYS[name])

    safetensors.save_file(ARRAYS, tmp_path / "in.safetensors", metadata={"format": "np"})
    copy(tmp_path / "in.safetensors", name, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as read:
        assert read.files == [name]
        same(read[name], ARRAYS[name])


def test_a_flight_of_many_dtypes(tmp_path, host):
    columns = {n: np.resize(a, (3, 2)) for n, a in ARRAYS.items() if a.size}
    columns["bf16"] = RAMP[:6].reshape(3, 2).astype(ml_dtypes.bfloat16)
    safetensors.save_file(columns, tmp_path / "in.safetensors")
    strait("put", "many", tmp_path / "in.safetensors", "--replace", directory=host.directory)
    strait("get", "many", tmp_path / "out.safetensors", directory=host.directory)
    strait("get", "many", tmp_path / "out.npz", directory=host.directory)
    read = safetensors.load_file(tmp_path / "out.safetensors")
    with np.load(tmp_path / "out.npz") as archive:
        assert set(read) == set(archive.files) == set(columns)
        for name, array in columns.items():
            same(read[name], array)
            # numpy itself reads ml_dtypes' as raw bytes.
            same(archive[name].view(array.dtype), array)


def test_csv_both_ways(tmp_path, host):
    frame = pandas.DataFrame(
        {
            "x": [0.1, -2.5e300, np.nan, np.inf],
            "n": [1, -2, 3, 2**53 + 1],
            "flag": [True, False, True, True],
            "a, b": [1.5, 2, 3, 4],
        }
    )
    frame.to_csv(tmp_path / "in.csv", index=False)
    strait("put", "table", tmp_path / "in.csv", "--replace", directory=host.directory)
    strait("get", "table", tmp_path / "out.csv", directory=host.directory)
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "out.csv"), frame, check_exact=True)

    square = np.random.default_rng(7).normal(size=(50, 3))
    np.savetxt(tmp_path / "square.csv", square, delimiter=",", fmt="%.17g")
    source, target = f"x={tmp_path}/square.csv#*", tmp_path / "copy.csv"
    strait("run", "scale-shift", "-i", source, "-o", target)
    same(np.loadtxt(target, delimiter=",", skiprows=1), square)


def stream(*words, stdin=b""):
    words = [os.environ["STRAIT_BIN"], *map(str, words)]
    done = subprocess.run(
        words, input=stdin, env=environment(), capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rows", [0, 1, 5, 300_000])
def test_pyarrow_at_both_ends_of_a_pipe(rows):
    x = np.arange(rows, dtype="f8")
    table = pa.table({"x": x, "other": pa.array(["text"] * rows)})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100_000)
    out = stream("run", "scale-shift", "-i", "x=-#x", "-p", "a=2", "-o", "-", stdin=sink.getvalue())
    with pa.ipc.open_stream(out) as reader:
        read = reader.read_all()
    read.validate(full=True)
    assert read.column_names == ["y"]
    same(read["y"].to_numpy(), 2 * x)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1", "f2"])
def test_inspect_says_what_numpy_says(tmp_path, dtype):
    array = (np.random.default_rng(3).normal(size=(100, 70)) * 50 + 100).astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(array))
    [said] = strait("inspect", tmp_path / "x.npy")["tensors"]
    assert (said["min"], said["max"]) == (array.min(), array.max())
    assert said["mean"] == pytest.approx(array.mean(dtype="f8"), rel=1e-12)
    assert said["layout"] == "column-major"
    counts, edges = np.histogram(array.astype("f8"), 16)
    assert [part["count"] for part in said["histogram"]] == counts.tolist()
    assert [part["low"] for part in said["histogram"]] == pytest.approx(edges[:-1].tolist())
