"""A session over Flight: the same verbs as near the host, and everything that travels is copied and counted."""

import asyncio
import gc
import pickle
import threading
import time

import numpy as np
import pytest
from conftest import serve_own

import strait
from strait import _dtypes

pa = pytest.importorskip("pyarrow")

SHAPES = [(), (0,), (5,), (3, 4), (2, 3, 4), (3, 0), (0, 4), (7, 1, 2)]


@pytest.fixture(scope="module")
def address():
    """A host that no other tests have: what is left in it is counted."""
    yield from serve_own()


@pytest.fixture
def far(address):
    with strait.connect(address.replace("unix://", "grpc+unix://") + "/flight.sock") as far:
        yield far


@pytest.fixture
def clean(session):
    """Nothing is left in the host when the test is over."""
    yield
    until = time.monotonic() + 20
    while True:
        # What earlier tests' exceptions still hold keeps their connections open.
        gc.collect()
        found = session.stats()
        left = {key: found[key] for key in ("flights", "leases", "running")}
        left["segments"] = found["account"]["segments"] - found["pool"]["idle_segments"]
        # The session itself, and the one that is tested.
        left["connections"] = max(found["account"]["connections"] - 2, 0)
        if not any(left.values()):
            return
        assert time.monotonic() < until, left
        time.sleep(0.05)


def of_dtype(dtype, shape):
    size = int(np.prod(shape, dtype=int))
    bits = np.random.default_rng(3).integers(0, 256, size * _dtypes.SIZES[dtype], np.uint8)
    if dtype == "bool8":
        bits &= 1
    return bits.view(_dtypes.to_numpy(dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", _dtypes.SIZES)
def test_every_dtype_and_shape_there_and_back(session, far, dtype):
    for shape in SHAPES:
        x = of_dtype(dtype, shape)
        before = far.client_stats().copied_bytes
        far.put("far/x", x, replace=True)
        y = far.get("far/x")
        assert (y.dtype_name, y.shape, y.name) == (dtype, shape, "far/x")
        assert y.numpy().tobytes() == x.tobytes() and not y.numpy().flags.writeable
        assert far.client_stats().copied_bytes - before == 2 * x.nbytes
        [tensor] = far.lookup("far/x").tensors
        assert (tensor.dtype, tensor.shape, tensor.length) == (dtype, shape, x.nbytes)
        near = session.get("far/x")
        assert (near.dtype_name, near.shape) == (dtype, shape) and near.numpy().tobytes() == x.tobytes()
        near.release()
    far.delete("far/x")


def test_what_is_put_near_is_read_far(session, far, clean):
    x = np.arange(12.0).reshape(3, 4)
    session.put("far/near", x)
    np.testing.assert_array_equal(far.get("far/near"), x)
    session.put("far/table", {"a": np.arange(3), "b": np.ones((3, 2), np.float32)})
    table = far.get("far/table")
    assert list(table) == ["a", "b"] and table["b"].shape == (3, 2)
    np.testing.assert_array_equal(far.get("far/table#a"), [0, 1, 2])
    with pytest.raises(KeyError, match="a, b"):
        far.get("far/table#c")
    assert [flight.name for flight in far.list()] == ["far/near", "far/table"]
    assert [tensor.name for tensor in far.list()[1].tensors] == ["a", "b"]
    far.delete("far/near")
    far.delete("far/table")


def test_tables(far, clean):
    far.put("far/t", pa.table({"a": [1, 2, 3], "b": [1.5, 2.5, 3.5]}))
    assert {name: array.dtype_name for name, array in far.get("far/t").items()} == {"a": "int64", "b": "float64"}
    with pytest.raises(strait.RemoteError) as taken:
        far.put("far/t", [1.0])
    assert (taken.value.code, taken.value.reason) == ("ALREADY_EXISTS", "NAME_TAKEN")
    far.put("far/t", [1.0], replace=True)
    far.delete("far/t")
    with pytest.raises(strait.LocalOnlyError, match="equally long"):
        far.put("far/t", {"a": [1.0], "b": [1.0, 2.0]})


def test_a_small_call_is_one_message(session, far, clean):
    x = np.random.default_rng(1).normal(size=(100, 10))
    made = session.stats()["account"]["peak_bytes"]
    y = far.call("zscore", x, axis=0)
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), rtol=1e-9, atol=1e-12)
    assert y.info.copied_bytes == 16000 and far.client_stats().copied_bytes == 16000 and far.client_stats().calls == 1
    assert y.renew() == float("inf")
    np.testing.assert_array_equal(far.call("scale-shift", y, a=2.0), 2 * y)
    assert made >= 0


@pytest.mark.parametrize("size", [5_000, 300_000, 12_500_000])
def test_calls_of_any_size(far, clean, size):
    x = np.random.default_rng(2).normal(size=size)
    y = far.call("scale-shift", x, a=2.0, b=1.0)
    np.testing.assert_array_equal(y, 2 * x + 1)
    assert far.client_stats().copied_bytes == 2 * x.nbytes


def test_names_in_and_out(far, clean):
    x = np.random.default_rng(2).normal(size=300_000)
    far.put("far/in", x)
    y = far.call("scale-shift", "far/in", a=3.0, publish={"y": "far/out"})
    np.testing.assert_array_equal(y, 3 * x)
    nothing = far.call("scale-shift", "far/in", a=4.0, publish={"y": "far/out"}, replace=True, map=False)
    assert list(nothing) == [] and nothing.info.published == {"y": "far/out"}
    np.testing.assert_array_equal(far.get("far/out"), 4 * x)
    far.delete("far/in")
    far.delete("far/out")


def test_several_outputs(far, clean):
    x = np.random.default_rng(5).normal(size=100_000)
    counts = far.call("histogram", x, bins=10, lo=-1.0, hi=1.0)
    assert set(counts) == {"counts", "outside"}
    assert counts["counts"].numpy().sum() + counts["outside"].numpy().sum() == x.size


def test_several_at_once_and_from_threads(far, clean):
    x = np.random.default_rng(6).normal(size=100_000)
    calls = [far.start("scale-shift", x, a=float(k)) for k in range(8)]
    for k, call in enumerate(calls):
        np.testing.assert_array_equal(call.result(60), k * x)
        assert call.done()
    wrong = []

    def ask(k):
        for _ in range(10):
            if not (far.call("scale-shift", x[:1000], a=float(k)).numpy() == k * x[:1000]).all():
                wrong.append(k)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_errors_are_the_hosts(far, clean):
    def error(kind, call):
        with pytest.raises(kind) as caught:
            call()
        return caught.value

    missing = error(KeyError, lambda: far.get("far/nope"))
    assert isinstance(missing, strait.RemoteError) and isinstance(missing, strait.NotFoundError)
    assert (missing.code, missing.reason, missing.details["name"]) == ("NOT_FOUND", "FLIGHT_NOT_FOUND", "far/nope")
    assert missing.message.startswith("there is no flight `far/nope`") and missing.message.endswith("shows those there are")
    assert error(strait.RemoteError, lambda: far.call("nope", [1.0])).reason == "KERNEL_NOT_FOUND"
    wrong = error(strait.RemoteError, lambda: far.call("scale-shift", [1.0], c=1, request_id="mine-1"))
    assert (wrong.code, wrong.reason, wrong.request_id) == ("INVALID_ARGUMENT", "UNKNOWN_PARAMETER", "mine-1")
    assert error(strait.RemoteError, lambda: far.prepare("fir", np.ones(3), request_id="mine-2")).request_id == "mine-2"
    assert error(KeyError, lambda: far.read_channel("far/nothing")).reason == "CHANNEL_NOT_FOUND"
    assert error(KeyError, lambda: far.delete("far/nope")).reason == "FLIGHT_NOT_FOUND"
    far.ping()


def test_what_needs_shared_memory_says_what_to_do(far):
    with pytest.raises(strait.LocalOnlyError, match="put copies.*publish="):
        far.publish("far/x", np.ones(3))
    with pytest.raises(NotImplementedError):
        far.publish("far/x", np.ones(3))
    x = far.empty((2, 3), "int16")
    x[:] = 3
    far.put("far/x", x)
    assert far.get("far/x").numpy().sum() == 18
    far.delete("far/x")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(far)


def test_the_host_is_described(session, far):
    assert far.host_id == session.host_id and far.inline_bytes == session.inline_bytes
    assert [kernel.name for kernel in far.kernels()] == [kernel.name for kernel in session.kernels()]
    assert far.kernels("zscore") == session.kernels("zscore")
    assert far.stats()["account"]["quotas"] == session.stats()["account"]["quotas"]


def test_an_idempotency_key_of_ones_own(session, far):
    runs = session.stats()["invocations"]
    one = far.call("scale-shift", np.arange(4.0), a=2.0, idempotency_key="far-own")
    two = far.call("scale-shift", np.arange(4.0), a=2.0, idempotency_key="far-own")
    np.testing.assert_array_equal(one, two)
    assert session.stats()["invocations"] == runs + 1
    with pytest.raises(strait.RemoteError, match="IDEMPOTENCY_KEY_REUSED"):
        far.call("scale-shift", np.arange(4.0), a=3.0, idempotency_key="far-own")


def test_prepared_calls(far, clean):
    x = np.arange(128.0)
    with far.prepare("scale-shift", x, a=2.0) as scale:
        np.testing.assert_array_equal(scale(x), 2 * x)
        np.testing.assert_array_equal(scale(x[:50]), 2 * x[:50])
        out = np.empty(128)
        assert scale(x, out=out) is out
        with pytest.raises(ValueError, match="at most"):
            scale(np.arange(129.0))
    with pytest.raises(strait.DisconnectedError):
        scale(x)
    taps = np.array([0.5, 0.25])
    with far.prepare("fir", x, fixed={"taps": taps}) as fir:
        np.testing.assert_allclose(fir(x), np.convolve(x, taps)[:128])


def test_a_prepared_call_that_fails_does_not_end_it(far, clean):
    with far.prepare("matmul", strait.Spec("float64", (4, 4)), strait.Spec("float64", (4, 4))) as product:
        with pytest.raises(strait.RemoteError) as caught:
            product(np.ones((4, 3)), np.ones((4, 4)))
        assert caught.value.reason == "BAD_INPUT"
        np.testing.assert_array_equal(product(np.eye(4), np.full((4, 4), 3.0)), np.full((4, 4), 3.0))


def test_streams(far, clean):
    x = np.random.default_rng(8).normal(size=(10_000, 3))
    came = list(far.stream("cumsum", [x[:10], x[10:10], x[10:7000], x[7000:]]))
    np.testing.assert_array_equal(np.concatenate(came), far.call("cumsum", x))


@pytest.mark.parametrize("reads", ["for", "async for"])
def test_channels(far, clean, reads):
    x = np.arange(300.0).reshape(100, 3)
    got = []

    async def later(channel):
        async for y in channel:
            got.append((channel.number, y))

    def read():
        with far.read_channel("far/levels") as channel:
            if reads == "for":
                got.extend((channel.number, y) for y in channel)
            else:
                asyncio.run(later(channel))

    with far.prepare_stream("cumsum", strait.Spec("float64", (16, 3)), channel="far/levels") as sums:
        reader = threading.Thread(target=read)
        reader.start()
        for first in range(0, 100, 10):
            assert sums.chunk(x[first : first + 10]) == {}
        sums.last()
    reader.join()
    assert [number for number, _ in got] == list(range(1, 11))
    np.testing.assert_array_equal(np.concatenate([y for _, y in got]), np.cumsum(x, axis=0))


def test_a_reader_that_comes_back(far, session, clean):
    """Far and near are the same to a channel: what was not acknowledged is read again."""
    options = strait.ChannelOptions("far/back", resume=30)
    with session.prepare_stream("cumsum", strait.Spec("float64", (4,)), channel=options) as sums:
        for _ in range(3):
            sums.chunk(np.ones(2))
        with far.read_channel("far/back", automatic=False) as channel:
            first = next(channel)
            next(channel)
            channel.acknowledge(1)
        np.testing.assert_array_equal(first, [1.0, 2.0])
        with far.read_channel("far/back") as channel:
            np.testing.assert_array_equal(next(channel), [3.0, 4.0])
            assert channel.number == 2
            ending = threading.Thread(target=sums.last)
            ending.start()
            assert sum(1 for _ in channel) == 1
            ending.join()


def test_a_producer_that_leaves_is_told_of(far, clean):
    sums = far.prepare_stream("cumsum", strait.Spec("float64", (4,)), channel="far/lost")
    with far.read_channel("far/lost") as channel:
        sums.chunk(np.ones(2))
        assert len(next(channel)) == 2
        sums.close()
        with pytest.raises(strait.RemoteError) as caught:
            next(channel)
    assert caught.value.reason == "PRODUCER_LOST"


def test_the_end_of_a_session(address):
    far = strait.connect(address.replace("unix://", "grpc+unix://") + "/flight.sock")
    scale = far.prepare("scale-shift", np.ones(3))
    far.close()
    far.close()
    for use in (far.ping, lambda: far.call("scale-shift", [1.0]), lambda: far.get("x"), lambda: scale(np.ones(3)), far.list):
        with pytest.raises(strait.DisconnectedError):
            use()


def test_no_host():
    for address in ["grpc+tcp://127.0.0.1:1", "grpc+unix:///nowhere/flight.sock"]:
        with pytest.raises(strait.NoHostError, match="no host answers at grpc"):
            strait.connect(address)
    with pytest.raises(ConnectionError):
        strait.connect("grpc+tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    "address, options, words",
    [
        ("grpc+tls://", {}, "grpc\\+tls://HOST:PORT"),
        ("grpc+unix://flight.sock", {}, "unix"),
        ("grpc+tcp://example.test:1", {"token": "t"}, "in the clear"),
        ("grpc+tcp://127.0.0.1:1", {"ca": "x"}, "grpc\\+tls"),
        ("grpc+tls://127.0.0.1:1", {"ca": "/no/such/file"}, "cannot be read"),
        ("grpc+tls://127.0.0.1:1", {"token": "a\nb"}, "no token has"),
        ("unix:///tmp", {"token": "t"}, "over the network"),
    ],
)
def test_options_that_are_wrong_are_told(address, options, words):
    with pytest.raises(ValueError, match=words):
        strait.connect(address, **options)
