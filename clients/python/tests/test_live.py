"""Against a real host: run with STRAIT_BIN."""

import copy
import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import re
import subprocess
import threading
import time

import numpy as np
import pytest

import strait
from strait import _dtypes, _pages

ml_dtypes = pytest.importorskip("ml_dtypes")
pa = pytest.importorskip("pyarrow")


READONLY_DLPACK = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 1)


def address_of(array):
    return np.asarray(array).__array_interface__["data"][0]


def settle(read, wanted):
    until = time.monotonic() + 10
    while read() != wanted and time.monotonic() < until:
        time.sleep(0.02)
    return read()


def filled(session, shape, dtype=np.float64):
    x = session.empty(shape, dtype)
    x[...] = np.random.default_rng(1).normal(size=shape).astype(x.dtype)
    return x


def test_the_first_program(session):
    x = filled(session, (1000, 100))
    y = session.call("zscore", x, axis=0, verify=True)
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), rtol=1e-9, atol=1e-12)
    assert y.info.copied_bytes == 0 and {page.port for page in y.info.pages} == {"x", "y"}
    assert session.client_stats() == strait.ClientStats(copied_bytes=0, calls=1, mappings=2, huge_bytes=0)
    assert session.move_min_bytes > 0 and session.host_id and session.draining is None
    session.ping()


def test_a_result_acts_as_a_numpy_array(session):
    x = filled(session, (3, 4))
    y = session.call("scale-shift", x, a=2)
    assert (y.shape, y.ndim, y.size, y.nbytes, y.dtype, y.dtype_name, len(y)) == ((3, 4), 2, 12, 96, np.float64, "float64", 3)
    assert address_of(y) == address_of(y.numpy()) == address_of(np.asarray(y))
    assert address_of(np.array(y)) != address_of(y)
    np.testing.assert_array_equal(y + 1, 2 * x + 1)
    np.testing.assert_array_equal(np.sin(y), np.sin(2 * x))
    np.testing.assert_array_equal(y[1:, 2], 2 * x[1:, 2])
    np.testing.assert_array_equal([row.sum() for row in y], (2 * x).sum(1))
    np.testing.assert_array_equal(np.asarray(y, np.float32), (2 * x).astype(np.float32))
    assert (y == y.numpy()).all() and np.concatenate([y, y]).shape == (6, 4)
    x += y
    with pytest.raises(ValueError, match="read-only"):
        y += 1


def test_results_cannot_be_written(session):
    y = session.call("scale-shift", filled(session, 10))
    with pytest.raises(ValueError, match="read-only"):
        y.numpy()[0] = 1
    for view in (y.numpy(), y.numpy()[2:], y.numpy().view(np.uint8)):
        with pytest.raises(ValueError):
            view.flags.writeable = True


def test_views_outlive_the_release(session):
    leases = lambda: session.stats()["own"]["leases"]
    x = filled(session, 100000)
    y = session.call("scale-shift", x, a=3)
    view = y.numpy()[10:]
    y.release()
    y.release()
    assert y.released and "released" in repr(y)
    for use in (y.numpy, y.arrow, lambda: y + 1, lambda: len(y), lambda: session.call("clip", y), y.renew, lambda: y.__enter__()):
        with pytest.raises(strait.ReleasedError, match="was released"):
            use()
    assert session.client_stats().mappings == 2 and settle(leases, 2) == 2
    np.testing.assert_array_equal(view, 3 * x[10:])
    del view
    assert session.client_stats().mappings == 1 and settle(leases, 1) == 1
    with session.call("scale-shift", x) as z:
        assert session.client_stats().mappings == 2
    assert z.released and session.client_stats().mappings == 1


def test_what_is_dropped_is_given_back(session):
    kept = [session.call("scale-shift", filled(session, 10), inline_bytes=0) for _ in range(5)]
    assert session.client_stats().mappings == 5
    loop = [kept]
    loop.append(loop)
    del kept, loop
    gc.collect()
    assert session.client_stats().mappings == 0
    assert settle(lambda: session.stats()["own"], {"leases": 0, "segments": 0}) == {"leases": 0, "segments": 0}


def test_arrays_that_are_not_in_a_segment_are_copied_once(session):
    x = np.arange(24.0).reshape(2, 3, 4)
    inputs = [x, x.T, x[:, ::2], x.astype(">f8"), np.asfortranarray(x), x.astype(np.float32), x.tolist(), pa.array([1.0, 2.0])]
    for given in inputs:
        before = session.client_stats().copied_bytes
        y = session.call("scale-shift", given, a=2)
        wanted = 2 * np.asarray(given)
        np.testing.assert_array_equal(y, wanted)
        # Into a frame, and the result out of one.
        assert session.client_stats().copied_bytes - before == 2 * wanted.nbytes
    part = filled(session, (10, 10))
    np.testing.assert_array_equal(session.call("scale-shift", part[2:5]), part[2:5])
    np.testing.assert_array_equal(session.call("scale-shift", part.reshape(100)), part.reshape(100))
    np.testing.assert_array_equal(session.call("scale-shift", part.T), part.T)


def test_copies_reuse_their_segments(session):
    x = np.ones((300, 300))
    for _ in range(20):
        session.call("scale-shift", x)
    assert session.client_stats().mappings == 1
    for size in range(1, 30):
        session.call("scale-shift", np.ones(size))
    assert session.client_stats().mappings <= 8


def test_inputs_that_no_kernel_could_take(session):
    with pytest.raises(TypeError, match="input 'x': dtype.*has no place"):
        session.call("scale-shift", np.array(["a"]))
    with pytest.raises(ValueError, match="1 nulls"):
        session.call("scale-shift", pa.array([1.0, None]))
    with pytest.raises(TypeError, match="1 inputs .x.; 2 were given"):
        session.call("scale-shift", 1.0, 2.0)
    with pytest.raises(TypeError, match="by position and by name"):
        session.call("scale-shift", 1.0, inputs={"x": 2.0})
    with pytest.raises(TypeError, match="parameter 'a' is dict"):
        session.call("scale-shift", 1.0, a={})
    with pytest.raises(ValueError, match="positive"):
        session.call("scale-shift", 1.0, deadline=0)
    with pytest.raises(strait.RemoteError, match="KERNEL_NOT_FOUND"):
        session.call("no-such-kernel", 1.0)
    with pytest.raises(TypeError):
        session.empty(3, "M8[s]")
    assert settle(lambda: session.stats()["running"], 0) == 0


def test_an_array_of_another_session(session, address):
    x = filled(session, 10)
    y = session.call("scale-shift", x, inline_bytes=0)
    with strait.connect(address) as other:
        with pytest.raises(ValueError, match="another session"):
            other.call("scale-shift", y)
        # Numpy's own arrays are known only to the session that made them: a copy.
        np.testing.assert_array_equal(other.call("scale-shift", x, inline_bytes=0), x)
        assert other.client_stats().copied_bytes == x.nbytes


def test_publishing_ends_writing(session):
    x = filled(session, (50, 50))
    stale = x[1:]
    wanted = x.copy()
    with pytest.raises(ValueError, match="only a whole array"):
        session.publish("part", x[1:])
    session.publish("published", x)
    assert not x.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1
    # A view from before does not crash, and does not reach the flight.
    stale[:] = -1
    np.testing.assert_array_equal(session.get("published"), wanted)
    with pytest.raises(strait.RemoteError) as caught:
        session.put("published", wanted)
    assert caught.value.reason == "NAME_TAKEN"
    session.put("published", wanted + 1, replace=True)
    np.testing.assert_array_equal(session.get("published#published"), wanted + 1)
    assert [flight.name for flight in session.list()] == ["published"]
    assert session.lookup("published").tensors[0].shape == (50, 50)
    session.delete("published")
    assert session.list() == []


def test_a_refused_name_can_be_tried_again(session):
    x, y = filled(session, 5), filled(session, 5)
    session.publish("taken", x)
    with pytest.raises(strait.RemoteError, match="NAME_TAKEN"):
        session.publish("taken", y)
    session.publish("free", y)
    np.testing.assert_array_equal(session.get("free"), y)
    for name in ("taken", "free"):
        session.delete(name)


def test_results_are_published_as_they_are(session):
    y = session.call("scale-shift", filled(session, 100000), a=2)
    before = session.client_stats().copied_bytes
    session.put("result", y)
    assert session.client_stats().copied_bytes == before
    np.testing.assert_array_equal(session.get("result"), y)
    session.call("scale-shift", "result", publish={"y": "result"}, replace=True, a=2, map=False)
    np.testing.assert_array_equal(session.get("result"), 2 * y)
    session.delete("result")


def test_record_batches(session):
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([1, 2, 3], pa.int16()),
            pa.array([1.5, 2.5, float("nan")]),
            pa.array([True, False, True]),
            pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(3, 2, 2)),
        ],
        names=["a", "b", "c", "d"],
    )
    session.put("batch", batch)
    assert session.client_stats().copied_bytes == 6 + 24 + 3 + 48
    with session.get("batch") as columns:
        assert list(columns) == ["a", "b", "c", "d"]
        back = columns.arrow()
        assert back.num_rows == 3 and back.column(0).equals(batch.column(0)) and back.column(3).equals(batch.column(3))
        np.testing.assert_array_equal(columns["b"], [1.5, 2.5, np.nan])
        np.testing.assert_array_equal(columns["c"], [True, False, True])
        assert back.column(0).buffers()[1].address == address_of(columns["a"])
        np.testing.assert_array_equal(session.call("scale-shift", columns["b"], a=2), [3.0, 5.0, np.nan])
        np.testing.assert_array_equal(session.call("scale-shift", "batch#b", a=2), [3.0, 5.0, np.nan])
    table = pa.table({"a": pa.chunked_array([[1, 2], [3]]), "b": [1.0, 2.0, 3.0]})
    session.put("batch", table, replace=True)
    np.testing.assert_array_equal(session.get("batch#a"), [1, 2, 3])
    with pytest.raises(KeyError, match="it has a, b"):
        session.get("batch#z")
    with pytest.raises(ValueError, match="column 'a' has 1 nulls"):
        session.put("nulls", pa.table({"a": [1, None]}))
    session.delete("batch")


def foreign_tables():
    import pandas as pd
    import polars as pl
    import xarray as xr

    columns = {"a": np.array([1, 2**53 + 1, -3]), "b": np.array([0.5, np.nan, 2.0], np.float32)}
    yield pa.table(columns)
    yield pa.table(columns).to_reader()
    yield pd.DataFrame(columns)
    yield pl.DataFrame(columns)
    yield xr.Dataset({name: ("t", column) for name, column in columns.items()})
    yield columns


def test_tables_of_other_libraries(session):
    pytest.importorskip("pandas"), pytest.importorskip("polars"), pytest.importorskip("xarray")
    for table in foreign_tables():
        session.put("table", table, replace=True)
        got = session.get("table")
        assert [(name, column.dtype_name) for name, column in got.items()] == [("a", "int64"), ("b", "float32")]
        np.testing.assert_array_equal(got["a"], [1, 2**53 + 1, -3])
        np.testing.assert_array_equal(got["b"], np.array([0.5, np.nan, 2.0], np.float32))
        # What was got can be put.
        session.put("copy", got, replace=True)
        np.testing.assert_array_equal(session.get("copy#a"), [1, 2**53 + 1, -3])
    for name in ("table", "copy"):
        session.delete(name)
    with pytest.raises(ValueError, match="table 'none' has no columns"):
        session.put("none", {})


def test_arrays_of_other_libraries(session):
    pd, pl, xr = pytest.importorskip("pandas"), pytest.importorskip("polars"), pytest.importorskip("xarray")
    rows = np.arange(6.0).reshape(3, 2)
    given = [
        pd.DataFrame(rows),
        pl.DataFrame(rows, schema=["a", "b"]),
        xr.DataArray(rows),
        pa.array(rows.tolist(), pa.list_(pa.float64(), 2)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(rows),
        pa.chunked_array([pa.FixedShapeTensorArray.from_numpy_ndarray(rows)[:1], pa.FixedShapeTensorArray.from_numpy_ndarray(rows)[1:]]),
        pl.Series(rows, dtype=pl.Array(pl.Float64, 2)),
        np.ma.array(rows),
        rows.view(np.matrix),
    ]
    for array in given:
        before = session.client_stats().copied_bytes
        np.testing.assert_array_equal(session.call("scale-shift", array, a=2), 2 * rows)
        assert session.client_stats().copied_bytes - before == 2 * rows.nbytes
        np.testing.assert_array_equal(session.call("scale-shift", inputs={"x": array}, a=2), 2 * rows)
        if not isinstance(array, (pd.DataFrame, pl.DataFrame)):
            session.put("rows", array, replace=True)
            np.testing.assert_array_equal(session.get("rows"), rows)
    session.delete("rows")
    np.testing.assert_array_equal(session.call("scale-shift", pl.Series([1.0, 2.0]), a=2), [2.0, 4.0])
    table = pa.table({"d": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 2, 2)))}).filter([False] * 3)
    session.put("empty", table)
    assert session.get("empty").shape == (0, 2, 2)
    assert session.call("scale-shift", table).shape == (0, 2, 2)
    session.delete("empty")


def test_masks_and_nulls_are_refused_and_leave_nothing_behind(session):
    x = session.empty(3)
    x[:] = [1.0, -999.0, 3.0]
    before = settle(lambda: session.stats()["own"], {"leases": 1, "segments": 1})
    # Also over the pages of `empty`, where the array without its mask could be taken as it is.
    for given in (np.ma.array(x, mask=[0, 1, 0]), np.ma.array([1.0, -999.0], mask=[0, 1]), pa.array([1.0, None])):
        for use in (
            lambda: session.put("masked", given),
            lambda: session.publish("masked", given),
            lambda: session.call("scale-shift", given),
            lambda: session.call("scale-shift", inputs={"x": given}),
            lambda: session.put("masked", {"a": [1.0], "b": given}),
        ):
            with pytest.raises(ValueError, match="has 1 (masked|nulls)"):
                use()
    assert session.list() == [] and session.stats()["own"] == before and session.client_stats().copied_bytes == 0
    # Without a masked element it is its data, in place.
    np.testing.assert_array_equal(session.call("scale-shift", np.ma.array(x), a=2, inline_bytes=0), 2 * x)
    assert session.client_stats().copied_bytes == 0


@pytest.mark.parametrize("name", list(_dtypes.SIZES))
def test_arrow_and_dlpack_see_the_same_pages(session, name):
    for shape in [(5,), (2, 3), (), (0,), (2, 0, 3)]:
        x = session.empty(shape, name)
        x.reshape(-1).view(np.uint8)[:] = 1
        session.put("pages", x, replace=True)
        y = session.get("pages")
        assert y.dtype == x.dtype and y.dtype_name == name
        column = y.arrow()
        assert len(column) == (shape[0] if shape else 1)
        if x.size:
            leaf = column.buffers()[-1]
            assert leaf.address == address_of(y) and not leaf.is_mutable
        if x.dtype.kind in "iuf" and x.size and not name.startswith(("bfloat", "float8")):
            tensor = y.arrow_tensor()
            assert tensor.shape == shape and not tensor.is_mutable and address_of(tensor.to_numpy()) == address_of(y)
        if READONLY_DLPACK and x.dtype.kind in "iufcb" and not name.startswith(("bfloat", "float8")):
            shared = np.from_dlpack(y)
            assert address_of(shared) == address_of(y) and shared.shape == shape and not shared.flags.writeable
        assert y.__dlpack_device__()[0] == 1
    with pytest.raises(BufferError, match="hand on a copy"):
        y.__dlpack__()
    session.delete("pages")


def test_copies_and_pickles(session):
    x = filled(session, (3, 4))
    y = session.call("scale-shift", x, a=2, inline_bytes=0)
    session.put("columns", {"a": x, "b": [1.0, 2.0, 3.0]})
    columns = session.get("columns")
    mappings = session.client_stats().mappings
    for refused in (y, columns, session, session.start("scale-shift", x), [y], {"result": y}):
        for dumps in (pickle.dumps, lambda value: pickle.dumps(value, protocol=2)):
            with pytest.raises(TypeError, match="cannot be pickled; (send|connect|take)"):
                dumps(refused)
    # Views of the pages are plain numpy arrays; so are those of `empty`.
    for plain in (y.numpy(), x):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(plain)), plain)
    deep = copy.deepcopy({"y": y})["y"]
    assert type(deep) is np.ndarray and deep.flags.writeable and address_of(deep) != address_of(y)
    np.testing.assert_array_equal(deep, y)
    same = copy.copy(y)
    assert address_of(same) == address_of(y) and same.info is y.info
    y.release()
    np.testing.assert_array_equal(same, 2 * x)
    with pytest.raises(strait.ReleasedError):
        copy.copy(y)
    assert {name: type(value) for name, value in copy.deepcopy(columns).items()} == {"a": np.ndarray, "b": np.ndarray}
    shallow = copy.copy(columns)
    assert type(shallow) is strait.Arrays and address_of(shallow["a"]) == address_of(columns["a"])
    del same, shallow
    with pytest.raises(TypeError, match="connect where"):
        copy.deepcopy(session)
    session.delete("columns")
    assert settle(lambda: session.client_stats().mappings, mappings - 1) == mappings - 1


def test_any_byte_but_zero_is_true(session):
    for stored in ([0, 1, 1, 0], [0, 1, 2, 255]):
        x = session.empty(4, "bool8")
        x.view(np.uint8)[:] = stored
        session.put("truth", x, replace=True)
        y = session.get("truth")
        before = session.client_stats().copied_bytes
        wanted = [byte != 0 for byte in stored]
        assert [(y == True).tolist(), (~y).tolist(), y.numpy().tolist()] == [wanted, [not one for one in wanted], wanted]  # noqa: E712
        assert y.arrow().storage.to_numpy().astype(bool).tolist() == wanted
        assert session.client_stats().copied_bytes - before == (0 if max(stored) == 1 else 4)
        with pytest.raises(ValueError, match="read-only"):
            y.numpy()[0] = True
    session.delete("truth")


def test_arrow_outlives_the_array(session):
    x = filled(session, 1000)
    column = session.call("scale-shift", x, a=2, inline_bytes=0).arrow()
    gc.collect()
    assert session.client_stats().mappings == 2
    np.testing.assert_array_equal(column.to_numpy(), 2 * x)
    del column
    assert session.client_stats().mappings == 1


def test_threads_share_a_session(session):
    x = filled(session, (200, 20))
    wrong = []

    def work(index):
        for number in range(20):
            given = x if number % 2 else np.array(x)
            if not np.array_equal(session.call("scale-shift", given, a=index, b=number), index * x + number):
                wrong.append((index, number))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and session.client_stats().calls == 160


def test_calls_under_way(session):
    x = filled(session, (2000, 1000))
    calls = [session.start("zscore", x, axis=axis) for axis in (0, 1)]
    with pytest.raises(TimeoutError):
        calls[0].result(timeout=1e-6)
    for axis, call in enumerate(calls):
        y = call.result()
        assert call.done() and call.result() is y
        np.testing.assert_allclose(y.numpy()[:2], ((x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True))[:2])
        call.cancel()


def test_kernels_say_what_they_take(session):
    kernels = {kernel.name: kernel for kernel in session.kernels()}
    zscore = kernels["zscore"]
    (axis,) = zscore.parameters
    assert (axis.name, axis.kind, axis.default) == ("axis", "axis", 0) and axis.doc
    assert zscore.inputs[0].rank_min == 1 and "bfloat16" in zscore.inputs[0].dtypes and zscore.doc
    assert (zscore.signature, zscore.split_axis, zscore.combine, zscore.block_tree) == ("()->()", None, "none", None)
    clip = kernels["clip"]
    assert (clip.signature, clip.split_axis, clip.combine) == ("()->()", 0, "concatenate") and not clip.inputs[0].whole
    assert [kernel.name for kernel in session.kernels("clip")] == ["clip"]


def test_integer_parameters_are_exact_up_to_the_kernel(session):
    if session.kernels("clip")[0].parameters[0].kind == "real":
        pytest.skip("this host has an older clip, whose bounds are float64")
    big = 2**53
    for given, bounds, wanted in [
        (np.array([big, big + 1, big + 2]), {"hi": big + 1}, [big, big + 1, big + 1]),
        (np.array([-big - 6, -big - 1]), {"lo": np.int64(-big - 1)}, [-big - 1, -big - 1]),
        (np.array([2**63, 5], np.uint64), {"hi": np.uint64(2**63 - 1)}, [2**63 - 1, 5]),
        (np.array([2**64 - 1, 5], np.uint64), {"lo": 2**64 - 2}, [2**64 - 1, 2**64 - 2]),
        (np.array([-(2**63), 5]), {"hi": -(2**63) + 1}, [-(2**63), -(2**63) + 1]),
    ]:
        assert session.call("clip", given, **bounds).numpy().tolist() == wanted


def test_many_flights_are_listed_page_by_page(session):
    names = [f"{'long name ' * 15}{index:03}" for index in range(150)]
    for name in names:
        session.put(name, np.ones(1))
    assert [flight.name for flight in session.list()] == names
    for name in names:
        session.delete(name)


def test_leases_without_renewal_end(address):
    with strait.connect(address, renew=False, lease=0.1) as session:
        large = np.ones(100_000)
        y = session.call("scale-shift", large)
        time.sleep(0.4)
        with pytest.raises(strait.LeaseExpiredError):
            y.renew()
        with pytest.raises(strait.LeaseExpiredError):
            session.call("scale-shift", y)
        np.testing.assert_array_equal(y, large)
        # A copy goes into a new segment, for that of the first call has ended.
        np.testing.assert_array_equal(session.call("scale-shift", large, a=2), 2 * large)


def test_arrays_after_the_session(address):
    with strait.connect(address) as session:
        y = session.call("scale-shift", [1.0, 2.0])
    with pytest.raises(strait.DisconnectedError):
        session.ping()
    np.testing.assert_array_equal(y, [1.0, 2.0])
    y.release()
    del session, y


HUGE = 2 << 20


def linux_collapses():
    """Whether Linux makes huge pages of a memfd's, asked without the client's code."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t
    fd = os.memfd_create("probe")
    os.ftruncate(fd, HUGE)
    around = libc.mmap(None, size(2 * HUGE), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    start = ctypes.c_void_p(-(-around // HUGE) * HUGE)
    map_fixed = 0x10
    libc.mmap(start, size(HUGE), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | map_fixed, fd, 0)
    ctypes.memset(start, 0, 1)
    collapsed = libc.madvise(start, size(HUGE), 25) == 0
    libc.munmap(ctypes.c_void_p(around), size(2 * HUGE))
    os.close(fd)
    return collapsed


def huge_pages_of(array):
    """KiB under the mapping of an array that are huge pages."""
    found = False
    for line in open("/proc/self/smaps"):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            found = int(bounds[1], 16) <= address_of(array) < int(bounds[2], 16)
        elif found and line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1])
    return 0


def test_large_arrays_are_born_in_huge_pages(session):
    x = session.empty((16, 1 << 18))
    assert not x.any()
    huge = session.client_stats().huge_bytes
    # At least one step, if Linux can: the clock may end it after that.
    assert huge % HUGE == 0 and huge <= x.nbytes
    if linux_collapses():
        assert huge >= 8 << 20
        assert huge_pages_of(x) == huge >> 10
    x[:] = np.arange(16)[:, None]
    y = session.call("scale-shift", x, a=2)
    session.put("huge", x)
    for array in (y, session.get("huge")):
        # Also whoever reads maps at the phase that huge pages need.
        assert (address_of(array) - array._tensor.offset) % HUGE == 0
    np.testing.assert_array_equal(y, 2 * x)
    session.delete("huge")


def test_small_arrays_are_not_touched(session):
    session.empty(((4 << 20) - 8) // 8)
    session.put("columns", {"a": np.zeros(1000), "b": np.zeros(1000)})
    assert session.client_stats().huge_bytes == 0
    session.delete("columns")


@pytest.mark.parametrize("setting, value, huge", [("_MADV_COLLAPSE", 9999, 0), ("_STEP_SECONDS_MAX", -1, 8 << 20), ("_reserve", lambda length: None, None)])
def test_without_huge_pages_all_is_as_ever(session, monkeypatch, setting, value, huge):
    """Linux does not know the advice; a step takes too long; there are no addresses to choose from."""
    monkeypatch.setattr(_pages, setting, value)
    x = session.empty(4 << 20)
    got = session.client_stats().huge_bytes
    assert huge is None or got == (huge if linux_collapses() else 0)
    x[:] = np.arange(4 << 20)
    np.testing.assert_array_equal(session.call("scale-shift", x, a=2), 2 * x)


def test_large_mappings_leave_no_addresses_behind(session):
    def addresses():
        gc.collect()
        return sum(1 for _ in open("/proc/self/maps")), int(re.search(r"VmSize:\s+(\d+)", open("/proc/self/status").read())[1])

    def work():
        x = session.empty(1 << 19)
        session.call("scale-shift", x).release()
        with pytest.raises(OSError):
            _pages._map(None, 4 << 20, False, 1 << 20)

    work()
    before = addresses()
    for _ in range(30):
        work()
    lines, size = addresses()
    assert abs(lines - before[0]) <= 4 and size - before[1] < 4 << 10


class Child:
    """A forked child that does `work` when it is told to, and answers what that says."""

    def __init__(self, work):
        self._told, telling = os.pipe()
        answering, self._answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.read(self._told, 1)
                os.write(self._answer, repr(work()).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(self._told)
        os.close(self._answer)
        self._tell, self._hear = telling, answering

    def answer(self):
        os.write(self._tell, b"!")
        said = os.read(self._hear, 10000).decode()
        os.close(self._tell)
        os.close(self._hear)
        assert os.waitpid(self.pid, 0)[1] == 0
        return said


def memfds():
    return sum("memfd" in line for line in open("/proc/self/maps"))


def test_a_forked_child_has_the_values_and_not_the_session(session):
    x = filled(session, (2, 100_000))
    y = session.call("scale-shift", x)
    view, wanted = y.numpy()[1], x.sum()
    running = session.start("scale-shift", x)

    def work():
        refused = 0
        for use in (session.ping, lambda: session.call("clip", y), lambda: session.empty(3), y.renew, running.result, lambda: session.publish("x", x)):
            try:
                use()
            except strait.ForkedError:
                refused += 1
        same = x.sum() == y.numpy().sum() == np.asarray(y).sum() == wanted and view.sum() == y[1].sum()
        # What the child writes is its own.
        x[:] = -1
        y.release()
        session.close()
        return refused, bool(same), float(x.sum())

    child = Child(work)
    assert child.answer() == str((6, True, -200_000.0))
    np.testing.assert_array_equal(session.call("scale-shift", y), x)
    np.testing.assert_array_equal(running.result(), x)
    assert x.sum() == wanted


def test_a_forked_child_unmaps_what_it_lets_go_of(session):
    x, y = filled(session, 1000), session.call("scale-shift", np.ones(1000), inline_bytes=0)
    held = [x, y]
    del x, y

    def work():
        before = memfds()
        held.clear()
        gc.collect()
        return before - memfds()

    child = Child(work)
    assert child.answer() == "2"
    np.testing.assert_array_equal(held[1], np.ones(1000))


def test_a_parent_publishes_what_a_living_child_inherited(session):
    x = filled(session, 1000)
    wanted = x.copy()
    child = Child(lambda: x.tolist() == wanted.tolist())
    session.publish("inherited", x)
    np.testing.assert_array_equal(session.get("inherited"), wanted)
    assert child.answer() == "True"
    session.delete("inherited")


def test_the_host_does_not_recycle_what_a_child_may_read(session):
    """A released result is written to again by a later call; a child that has it mapped would see that."""
    x = filled(session, 100_000)
    y = session.call("scale-shift", x)
    view = y.numpy()
    child = Child(lambda: bool((view == x).all()))
    y.release()
    del view
    assert settle(lambda: session.stats()["own"]["leases"], 1) == 1
    for a in range(2, 12):
        session.call("scale-shift", x, a=a).release()
    assert child.answer() == "True"
    # What was made after the fork is released, and recycled, as ever.
    assert settle(lambda: session.stats()["own"]["leases"], 1) == 1
    assert session.stats()["pool"]["idle_segments"] >= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_of_forked_processes(session):
    given = np.arange(2_000_000.0)
    y = session.call("scale-shift", given, a=2)
    x = session.empty(1000)
    x[:] = 1
    globals()["_forked"] = (y, x)
    try:
        with multiprocessing.get_context("fork").Pool(3) as pool:
            sums = pool.map(_part_of_forked, range(20))
            assert sums == [float(2 * given[n::20].sum()) + 1000 for n in range(20)]
            session.publish("pooled", x)
    finally:
        del globals()["_forked"]
    session.delete("pooled")


def _part_of_forked(n):
    y, x = _forked
    return float(y.numpy()[n::20].sum() + x.sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_publishing_while_others_fork(session):
    """A child has what its parent writes to mapped writable until its first line of Python: the host is asked again."""
    stop = threading.Event()

    def fork():
        while not stop.is_set():
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            subprocess.run(["/bin/true"], check=True)

    forker = threading.Thread(target=fork)
    forker.start()
    try:
        for number in range(60):
            session.put("busy", np.full(10, number), replace=True)
            assert session.get("busy")[0] == number
    finally:
        stop.set()
        forker.join()
    session.delete("busy")


def test_nothing_is_left_behind(address):
    def counts():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sum("memfd" in line for line in open("/proc/self/maps"))

    before = counts()
    for _ in range(20):
        with strait.connect(address) as session:
            x = session.empty(1000)
            y = session.call("scale-shift", x)
            session.put("left", y, replace=True)
            with pytest.raises(strait.RemoteError):
                session.call("scale-shift", y, slope=1)
            session.delete("left")
        del x, y, session
    assert settle(counts, before) == before
    threads = lambda: [t for t in threading.enumerate() if t.name == "strait-keeper"]
    assert len(settle(threads, [])) <= 1
