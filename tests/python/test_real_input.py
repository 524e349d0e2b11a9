"""Data that nobody here made, through kernels, by each way in: `strait run` on files, `strait call` on a
host, and stock pyarrow. Numpy and ml_dtypes say what is right.

Needs the host's program in STRAIT_BIN, and in STRAIT_FLIGHTS the file data/flights-200k.arrow of the npm package
vega-datasets; `cargo xtask test python` sets both up.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.compute
import pytest
import skimage.data
import strait as python_client
from conftest import command, put, stats, strait
from pyarrow import flight, ipc

# The setting's default: tensors from this size on are moved into the guest, smaller ones copied.
MOVE_MIN_BYTES = 512 << 10
# What .npy and Arrow have no word of their own for.
DTYPES = {"bfloat16": ml_dtypes.bfloat16}
# 200 faces and no faces, an .npy file as it lies in the package.
FACES = Path(skimage.data.__file__).parent / "lfw_subset.npy"


@dataclass
class Source:
    """A tensor in a file, and what numpy says is in it."""

    file: Path
    column: str | None
    array: np.ndarray

    @classmethod
    def npy(cls, file, array):
        np.save(file, array)
        return cls(file, None, array)

    def at(self, place):
        return f"{place}#{self.column}" if self.column else str(place)


@dataclass
class Outcome:
    array: np.ndarray
    copied_bytes: int


class Run:
    """`strait run`: files in, files out, no host."""

    def __init__(self, folder):
        self.folder = folder

    def steps(self, source, *steps):
        place = source.at(source.file)
        for number, (kernel, parameters) in enumerate(steps):
            out = self.folder / f"{number}.npy"
            words = [f"--param={name}={value}" for name, value in parameters.items()]
            said = strait("run", kernel, "--input", f"x={place}", *words, "--output", f"y={out}")
            [output] = said["outputs"]
            yield Outcome(load(out, output["dtype"]), said["copied_bytes"])
            place = out


class Call:
    """`strait put`, `call`, `get` on a host."""

    def __init__(self, folder, host):
        self.folder, self.host = folder, host

    def strait(self, *words):
        return strait(*words, directory=self.host.directory)

    def steps(self, source, *steps):
        said = self.strait("put", "call/x", source.file, "--replace")
        tensors = said["flight"]["mapping"]["tensors"]
        assert said["copied_bytes"] == sum(tensor["length"] for tensor in tensors), "one copy on the way in"
        place, out = source.at("call/x"), self.folder / "out.npy"
        for number, (kernel, parameters) in enumerate(steps):
            name = f"call/{number}"
            words = [f"--param={name}={value}" for name, value in parameters.items()]
            said = self.strait("call", kernel, "--input", f"x={place}", *words, "--output", f"y={name}", "--replace")
            self.strait("get", name, out)
            [tensor] = said["results"][0]["mapping"]["tensors"]
            yield Outcome(load(out, tensor["dtype"]), said["copied_bytes"])
            place = name


class Flight:
    """Stock pyarrow: do_put, get_flight_info of a command, do_get of its ticket."""

    def __init__(self, client):
        self.client = client

    def steps(self, source, *steps):
        column = source.column or "x"
        before = stats(self.client)["copied"]["flight_in"]
        mapping = put(self.client, "flight/x", pa.table({column: to_arrow(source.array)}))
        copied = stats(self.client)["copied"]["flight_in"] - before
        length = mapping["tensors"][0]["length"]
        assert copied in (length, 2 * length), "into the segment, and if it is short out of gRPC's buffer before"
        place = source.at("flight/x")
        for number, (kernel, parameters) in enumerate(steps):
            name = f"flight/{number}"
            info = self.client.get_flight_info(command(kernel, {"x": place}, publish={"y": name}, **parameters))
            [endpoint] = info.endpoints
            table = self.client.do_get(endpoint.ticket).read_all()
            yield Outcome(from_arrow(table), json.loads(info.app_metadata)["copied_bytes"])
            place = name


def load(file, dtype):
    array = np.load(file)
    return array.view(DTYPES[dtype]) if dtype in DTYPES else array


def to_arrow(array):
    return pa.array(array) if array.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(array)


def from_arrow(table):
    [field] = table.schema
    chunks = [
        chunk.to_numpy_ndarray() if isinstance(chunk, pa.FixedShapeTensorArray) else chunk.to_numpy()
        for chunk in table.column(0).chunks
    ]
    dtype = (field.metadata or {}).get(b"strait.dtype", b"").decode()
    array = np.concatenate(chunks)
    return array.view(DTYPES[dtype]) if dtype else array


@pytest.fixture(params=[Run, Call, Flight], ids=lambda way: way.__name__.lower())
def way(request, tmp_path):
    if request.param is Run:
        return Run(tmp_path)
    if request.param is Call:
        return Call(tmp_path, request.getfixturevalue("host"))
    return Flight(request.getfixturevalue("client"))


@pytest.fixture(scope="module")
def flights_file():
    return Path(os.environ["STRAIT_FLIGHTS"])


@pytest.fixture(scope="module")
def flights(flights_file):
    table = ipc.open_file(flights_file).read_all()
    assert [str(kind) for kind in table.schema.types] == ["int16", "int16", "float"]
    return {name: table[name].to_numpy() for name in table.column_names}


def counted(*arrays):
    """What the host has to copy to show a guest these tensors."""
    return sum(array.nbytes for array in arrays if array.nbytes < MOVE_MIN_BYTES)


def assert_is_zscore(y, x):
    """Population standard deviation along axis 0, held against long doubles."""
    exact = x.astype(np.longdouble)
    exact = (exact - exact.mean(axis=0)) / exact.std(axis=0)
    if x.dtype == np.float32:
        np.testing.assert_array_max_ulp(y, exact.astype(np.float32), maxulp=1)
        return
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=1e-12, atol=1e-13)


def test_put_lays_the_columns_anew_by_one_copy(host, client, flights_file, flights):
    put_file = strait("put", "flights", flights_file, "--replace", directory=host.directory)
    size = sum(column.nbytes for column in flights.values())
    assert put_file["copied_bytes"] == size
    tensors = put_file["flight"]["mapping"]["tensors"]
    assert {tensor["name"]: tensor["dtype"] for tensor in tensors} == {k: str(v.dtype) for k, v in flights.items()}
    assert all(tensor["offset"] % 65536 == 0 for tensor in tensors)

    before = stats(client)["copied"]["flight_in"]
    mapping = put(client, "flights/2", ipc.open_file(flights_file).read_all())
    # Into the segment, and nowhere before: one long message of nothing but values.
    assert stats(client)["copied"]["flight_in"] - before == size
    assert mapping["tensors"] == tensors

    for name in ["flights", "flights/2"]:
        table = client.do_get(flight.Ticket(name)).read_all()
        table.validate(full=True)
        for column, values in flights.items():
            np.testing.assert_array_equal(table[column].to_numpy(), values)


@pytest.mark.parametrize("column", ["delay", "distance", "time"])
def test_zscore_of_each_column(way, flights_file, flights, column):
    x = flights[column]
    [y] = way.steps(Source(flights_file, column, x), ("zscore", {"axis": 0}))
    assert_is_zscore(y.array, x)
    assert y.copied_bytes == counted(x, y.array)


@pytest.mark.parametrize("library", ["pyarrow", "pandas", "polars"])
def test_the_python_client_takes_the_table_of_each_library(host, flights_file, flights, library):
    table = ipc.open_file(flights_file).read_all()
    given = {"pyarrow": lambda: table, "pandas": table.to_pandas, "polars": lambda: polars.from_arrow(table)}[library]()
    with python_client.connect(f"unix://{host.directory}") as session:
        session.put("flights/python", given, replace=True)
        assert session.client_stats().copied_bytes == sum(column.nbytes for column in flights.values()), "one copy"
        for name, values in flights.items():
            for source in (given[name], f"flights/python#{name}"):
                y = session.call("zscore", source, axis=0)
                assert_is_zscore(y.numpy(), values)
            got = session.get(f"flights/python#{name}")
            assert got.dtype == values.dtype
            np.testing.assert_array_equal(got, values)


def test_the_python_client_refuses_what_is_missing(host, flights_file):
    table = ipc.open_file(flights_file).read_all()
    early = pa.compute.less(table["delay"], -30)
    gaps = table.set_column(0, "delay", pa.compute.if_else(early, pa.scalar(None, pa.int16()), table["delay"]))
    count = gaps["delay"].null_count
    assert count
    nullable = gaps.to_pandas(types_mapper={pa.int16(): pandas.Int16Dtype()}.get)
    with python_client.connect(f"unix://{host.directory}") as session:
        for given in (gaps, nullable, polars.from_arrow(gaps)):
            with pytest.raises(ValueError, match=f"column 'delay' has {count} nulls"):
                session.put("flights/gaps", given)
            with pytest.raises(ValueError, match=f"input 'x' has {count} nulls"):
                session.call("zscore", given["delay"], axis=0)
        assert session.stats()["own"] == {"leases": 0, "segments": 0}


@pytest.fixture(scope="module")
def tiled(flights, tmp_path_factory):
    """All columns side by side as float64, again and again: 100 MB."""
    rows = np.stack([column.astype(np.float64) for column in flights.values()], axis=1)
    x = np.tile(rows, (-(-100_000_000 // rows.nbytes), 1))
    return Source.npy(tmp_path_factory.mktemp("tiled") / "flights.npy", x)


def test_100_mb_are_moved_and_not_copied(way, tiled):
    [y] = way.steps(tiled, ("zscore", {"axis": 0}))
    assert_is_zscore(y.array, tiled.array)
    assert y.copied_bytes == 0


PICTURES = {
    # Grey, and so small that it is copied.
    "camera": skimage.data.camera,
    "camera in floats": lambda: skimage.data.camera() / np.float32(255),
    # Three colours; moved.
    "retina": skimage.data.retina,
}


@pytest.fixture(scope="module", params=[*PICTURES, "faces"])
def picture(request, tmp_path_factory):
    if request.param == "faces":
        return Source(FACES, None, np.load(FACES))
    return Source.npy(tmp_path_factory.mktemp("picture") / "picture.npy", PICTURES[request.param]())


def test_clip_of_a_picture(way, picture):
    x = picture.array
    lo, hi = (50, 200) if x.dtype == np.uint8 else (0.25, 0.75)
    [y] = way.steps(picture, ("clip", {"lo": lo, "hi": hi}))
    expected = np.clip(x, x.dtype.type(lo), x.dtype.type(hi))
    assert y.array.dtype == x.dtype and not np.array_equal(expected, x)
    np.testing.assert_array_equal(y.array, expected)
    assert y.copied_bytes == counted(x, y.array)


def test_a_picture_cast_to_bfloat16_and_back(way, picture):
    x = picture.array
    there, back = way.steps(picture, ("cast", {"to": "bfloat16"}), ("cast", {"to": str(x.dtype)}))
    expected = x.astype(ml_dtypes.bfloat16)
    assert there.array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(there.array.view(np.uint16), expected.view(np.uint16))
    assert back.array.dtype == x.dtype
    np.testing.assert_array_equal(back.array, expected.astype(x.dtype))
    assert there.copied_bytes == counted(x, there.array)
    assert back.copied_bytes == counted(there.array, back.array)
