"""Makes the fixtures beside it: files as numpy, ml_dtypes, pyarrow, safetensors and pandas write
them, and in expected.json what is in them (row-major, little-endian).

    pip install numpy==2.4.6 ml_dtypes==0.6.0 pyarrow==26.0.1 safetensors==0.8.0 pandas==3.1.1
    python make.py
"""

import io
import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas
import pyarrow as pa
from pyarrow import feather
from safetensors import numpy as safetensors

HERE = Path(__file__).parent
expected = {}


def note(file, name, array):
    """Says that `file` has the tensor `name` with the values of `array`."""
    array = np.asarray(array)
    dtype = {"bool": "bool8"}.get(array.dtype.name, array.dtype.name)
    plain = array.astype(array.dtype.newbyteorder("<")) if array.dtype.kind in "iufc" else array
    expected.setdefault(file, []).append(
        {"name": name, "dtype": dtype, "shape": array.shape, "hex": plain.tobytes("C").hex()}
    )


def npy(name, array, version=None):
    with open(HERE / f"{name}.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=version, allow_pickle=True)


def make_npy():
    ramp = np.arange(24) * 1.25 - 3
    arrays = {
        "f8": ramp.reshape(2, 3, 4),
        "f4_1d": ramp.astype("f4"),
        "f2": ramp.reshape(4, 6).astype("f2"),
        "i1": np.arange(-3, 3, dtype="i1"),
        "u2": np.array([[1, 2, 65535]], "u2"),
        "u8": np.array([2**64 - 1, 5], "u8"),
        "bool": np.array([[True, False, True]]),
        "c8": (ramp[:6] + 1j * ramp[6:12]).reshape(3, 2).astype("c8"),
        "c16": ramp[:4] - 2j * ramp[4:8],
        "scalar": np.array(2.5),
        "no_rows": np.zeros((0, 3), "f4"),
        "no_columns": np.zeros((3, 0), "i8"),
        "rank8": np.arange(24, dtype="i2").reshape(2, 1, 2, 1, 2, 1, 3, 1),
        "fortran_f8": np.asfortranarray(ramp.reshape(4, 6)),
        "fortran_i4_3d": np.asfortranarray(np.arange(24, dtype="i4").reshape(2, 3, 4)),
        "fortran_u1": np.asfortranarray(np.arange(6, dtype="u1").reshape(3, 2)),
        "fortran_f2": np.asfortranarray(ramp.reshape(3, 8).astype("f2")),
        "fortran_c16": np.asfortranarray((ramp + 1j).reshape(6, 4)),
        "fortran_row": np.asfortranarray(ramp.reshape(1, 24)),
        "fortran_empty": np.asfortranarray(np.zeros((3, 0, 2))),
        "big_f8": ramp.astype(">f8"),
        "big_f4": ramp.reshape(6, 4).astype(">f4"),
        "big_i2": np.arange(-3, 3, dtype=">i2"),
        "big_u8": np.array([1, 2**63], ">u8"),
        "big_c8": (ramp[:6] + 1j * ramp[6:12]).astype(">c8"),
        "big_c16": (ramp[:6] - 1j * ramp[6:12]).astype(">c16"),
        "big_fortran_c8": np.asfortranarray((ramp + 2j).reshape(4, 6).astype(">c8")),
        "big_fortran_i4": np.asfortranarray(np.arange(12, dtype=">i4").reshape(3, 4)),
        "bf16": ramp.reshape(3, 8).astype(ml_dtypes.bfloat16),
        "fortran_bf16": np.asfortranarray(ramp.reshape(3, 8).astype(ml_dtypes.bfloat16)),
        "e5m2": ramp.astype(ml_dtypes.float8_e5m2),
    }
    for name, array in arrays.items():
        npy(name, array)
        note(f"{name}.npy", name, array)
    for version in (2, 3):
        npy(f"version{version}", ramp, version=(version, 0))
        note(f"version{version}.npy", f"version{version}", ramp)
    # Files that are refused; the test says why.
    for name, array in {
        "refused_e4m3fn": ramp.astype(ml_dtypes.float8_e4m3fn),
        "refused_object": np.array([{}, 1], object),
        "refused_bytes": np.array([b"ab", b"c"]),
        "refused_text": np.array(["ab", "c"]),
        "refused_structured": np.zeros(2, [("a", "i4"), ("b", "f8")]),
        "refused_date": np.array(["2020-01-01"], "M8[s]"),
        "refused_delta": np.array([5], "m8[ms]"),
        "refused_longdouble": np.zeros(2, np.longdouble),
        "refused_opaque": np.zeros(2, "V7"),
    }.items():
        npy(name, array)
    two = (HERE / "f4_1d.npy").read_bytes() + (HERE / "f4_1d.npy").read_bytes()
    (HERE / "refused_two_arrays.npy").write_bytes(two)
    (HERE / "refused_cut_off.npy").write_bytes((HERE / "f4_1d.npy").read_bytes()[:-1])


def write_ipc(file, batches, stream=False, **options):
    schema = batches[0].schema
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(HERE / file, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)


def make_arrow():
    x = np.arange(40, dtype="f8") * 0.5
    i = np.arange(40, dtype="i2")
    image = np.arange(40 * 6, dtype="u1").reshape(40, 2, 3)
    tensor_type = pa.fixed_shape_tensor(pa.uint8(), [2, 3])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), 6)
    images = pa.ExtensionArray.from_storage(tensor_type, lists)
    nested = pa.FixedSizeListArray.from_arrays(
        pa.FixedSizeListArray.from_arrays(pa.array(image.reshape(-1)), 3), 2
    )
    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, 5, -1] * 10, pa.int8()))
    batch = pa.record_batch(
        {"x": x, "i": i, "image": images, "nested": nested, "flags": flags}
    )
    halves = [batch.slice(0, 15), batch.slice(15)]
    for file, batches, options in [
        ("one_batch.arrow", [batch], {}),
        ("two_batches.arrow", halves, {}),
        ("lz4.feather", halves, {"compression": "lz4"}),
        ("stream.arrow", halves, {"stream": True}),
        ("stream_lz4.arrow", halves, {"stream": True, "compression": "lz4"}),
        ("legacy_stream.arrow", halves, {"stream": True, "use_legacy_format": True}),
        ("version4.arrow", [batch], {"metadata_version": pa.ipc.MetadataVersion.V4}),
    ]:
        write_ipc(file, batches, **options)
        for name, array in [("x", x), ("i", i), ("image", image), ("nested", image)]:
            note(file, name, array)
        note(file, "flags", np.array([False, True, True, True] * 10))
    write_ipc("zstd.arrow", [batch.select(["x"])], compression="zstd")
    noise = np.random.default_rng(1).integers(0, 2**63, 20)
    write_ipc("lz4_incompressible.arrow", [pa.record_batch({"noise": noise})], compression="lz4")
    note("lz4_incompressible.arrow", "noise", noise)

    # A column of numbers behind each kind of column that is none.
    others = {
        "null": pa.nulls(3),
        "bits": pa.array([True, False, True]),
        "text": pa.array(["a", "bc", ""]),
        "large_text": pa.array(["a", "bc", ""], pa.large_string()),
        "bytes": pa.array([b"a", b"bc", b""]),
        "text_view": pa.array(["a", "a text that is longer than twelve", ""], pa.string_view()),
        "fixed_bytes": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)),
        "list": pa.array([[1], [], [2, 3]]),
        "large_list": pa.array([[1], [], [2, 3]], pa.large_list(pa.int64())),
        "list_view": pa.array([[1], [], [2, 3]], pa.list_view(pa.int64())),
        "struct": pa.array([{"a": 1, "b": "x"}] * 3),
        "map": pa.array([[("k", 1)], [], []], pa.map_(pa.string(), pa.int64())),
        "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
        "date": pa.array([1, 2, 3], pa.date32()),
        "timestamp": pa.array([1, 2, 3], pa.timestamp("us")),
        "duration": pa.array([1, 2, 3], pa.duration("s")),
        "decimal": pa.array([1, 2, 3], pa.decimal128(5)),
        "dense_union": pa.UnionArray.from_dense(
            pa.array([0, 1, 0], pa.int8()),
            pa.array([0, 0, 1], pa.int32()),
            [pa.array([1, 2]), pa.array(["x"])],
        ),
        "sparse_union": pa.UnionArray.from_sparse(
            pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["x", "y", "z"])]
        ),
        "run_end": pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), [1.0, 2.0]),
        "text_lists": pa.FixedSizeListArray.from_arrays(pa.array(list("abcdef")), 2),
        "permuted": pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int8(), [2, 1], permutation=[1, 0]),
            pa.FixedSizeListArray.from_arrays(pa.array([1] * 6, pa.int8()), 2),
        ),
        "nulls": pa.array([1.0, None, 3.0]),
        "list_nulls": pa.FixedSizeListArray.from_arrays(
            pa.array([1.0, None, 3.0, 4.0, 5.0, 6.0]), 2
        ),
    }
    columns = {}
    for number, (name, array) in enumerate(others.items()):
        columns[name] = array
        columns[f"after_{name}"] = pa.array([number, number + 1, number + 2], pa.int32())
    batch = pa.record_batch(columns)
    write_ipc("every_kind.arrow", [batch])
    write_ipc("every_kind_stream.arrow", [batch], stream=True)
    for file in ("every_kind.arrow", "every_kind_stream.arrow"):
        for number, name in enumerate(others):
            note(file, f"after_{name}", np.arange(number, number + 3, dtype="i4"))
    empty = pa.schema([("x", pa.float64()), ("v", pa.list_(pa.int8(), 2))]).empty_table()
    with pa.ipc.new_file(HERE / "no_batches.arrow", empty.schema):
        pass
    note("no_batches.arrow", "x", np.zeros(0))
    note("no_batches.arrow", "v", np.zeros((0, 2), "i1"))


def make_nulls():
    """Columns with nulls, in two batches; the second begins within a byte of the validity."""
    rows = 300
    row = pa.list_(pa.int64(), 2)
    masked = np.zeros(rows, bool)
    masked[1] = True

    def padded(first, rest, kind):
        return pa.array(first + [rest] * (rows - len(first)), kind)

    many = [None if i % 3 == 0 else [None if i % 6 == 2 else i, None] for i in range(rows)]
    columns = {
        "values": padded([1, None], 0, pa.int64()),
        "rows": padded([[1, 2], None], [3, 4], row),
        "rows_over_values": pa.FixedSizeListArray.from_arrays(
            pa.array(np.arange(2 * rows)), 2, mask=pa.array(masked)
        ),
        "in_rows": padded([[1, None], [None, 4]], [5, 6], row),
        "rows_and_in_rows": padded([[1, None], None, [None, 5]], [6, 7], row),
        "lists_in_lists": padded(
            [[[1, None], None], None, [[5, 6], [None, 8]]], [[0, 0], [0, 0]], pa.list_(row, 2)
        ),
        "many": pa.array(many, row),
    }
    batch = pa.record_batch(columns)
    halves = [batch.slice(0, 101), batch.slice(101)]
    write_ipc("nulls.arrow", halves)
    write_ipc("nulls_lz4.arrow", halves, compression="lz4")


def make_npz():
    ramp = np.arange(24) * 1.25 - 3
    arrays = {
        "x": ramp.reshape(4, 6),
        "counts": np.arange(-5, 5, dtype="i2"),
        "fortran": np.asfortranarray(ramp.reshape(2, 3, 4).astype("f4")),
        "big": ramp.reshape(3, 8).astype(">f8"),
        "mask": np.array([[True, False], [False, True]]),
        "none": np.zeros((0, 3), "f4"),
        "scalar": np.array(7, "u1"),
        "bf16": ramp.astype(ml_dtypes.bfloat16),
        "folder/y": ramp.astype("c8"),
        "\u00e4": ramp[:2],
    }
    for file, save in (("stored.npz", np.savez), ("deflated.npz", np.savez_compressed)):
        save(HERE / file, text=np.array(["ab"]), **arrays)
        for name, array in arrays.items():
            note(file, name, array)
    # Not numpy's: a member that is no array, and other methods of compression.
    plain = io.BytesIO()
    np.save(plain, ramp)
    with zipfile.ZipFile(HERE / "mixed.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr(zipfile.ZipInfo("lzma.npy"), plain.getvalue(), zipfile.ZIP_LZMA)
        archive.writestr(zipfile.ZipInfo("good.npy"), plain.getvalue(), zipfile.ZIP_DEFLATED)
    note("mixed.npz", "good", ramp)


def make_safetensors():
    ramp = np.arange(24) * 1.25 - 3
    arrays = {
        "layer.weight": ramp.reshape(4, 6).astype("f4"),
        "layer.bias": ramp[:5].astype("f2"),
        "bf16": ramp.reshape(2, 3, 4).astype(ml_dtypes.bfloat16),
        "e4m3": ramp.astype(ml_dtypes.float8_e4m3fn),
        "e5m2": ramp.astype(ml_dtypes.float8_e5m2),
        "f8": ramp,
        "c8": ramp.astype("c8"),
        "mask": np.array([True, False, True]),
        "ids": np.arange(6, dtype="i8").reshape(2, 3),
        "u2": np.arange(3, dtype="u2"),
        "scalar": np.array(2, "i4"),
        "none": np.zeros((0, 3), "u8"),
    }
    safetensors.save_file(arrays, HERE / "several.safetensors", metadata={"format": "np"})
    for name, array in arrays.items():
        note("several.safetensors", name, array)


def make_csv():
    frame = pandas.DataFrame(
        {
            "x": [0.1, -2.5e300, np.nan, np.inf],
            "count": [1, -2, 3, 2**53 + 1],
            "large": np.array([1, 2, 3, 2**64 - 1], "u8"),
            "flag": [True, False, True, True],
            "a, b": [1.5, 2, 3, 4],
            "name": ["one", "two", "three", 'fo"ur'],
        }
    )
    frame.to_csv(HERE / "pandas.csv")
    frame.to_csv(HERE / "windows.csv", encoding="utf-8-sig", lineterminator="\r\n", index=False)
    for file in ("pandas.csv", "windows.csv"):
        for name in ("x", "count", "large", "flag", "a, b"):
            note(file, name, frame[name].to_numpy())
    note("pandas.csv", "0", np.arange(4))
    square = np.arange(6).reshape(2, 3) / 3
    np.savetxt(HERE / "savetxt.csv", square, delimiter=",")
    for column in range(3):
        note("savetxt.csv", str(column), square[:, column])


make_npy()
make_arrow()
make_nulls()
make_npz()
make_safetensors()
make_csv()
feather.write_feather(pa.table({"x": [1.0, 2.0]}), HERE / "version1.feather", version=1)
lines = ",\n".join(
    f"{json.dumps(file)}: [\n" + ",\n".join(f"  {json.dumps(t)}" for t in tensors) + "\n]"
    for file, tensors in expected.items()
)
(HERE / "expected.json").write_text(f"{{\n{lines}\n}}\n")
