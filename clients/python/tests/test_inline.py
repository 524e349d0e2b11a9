"""Small tensors that travel in the frames, against a real host."""

import copy
import math

import numpy as np
import pytest

import strait

pa = pytest.importorskip("pyarrow")

NOTHING = {"leases": 0, "segments": 0}


def held(session):
    return session.stats()["own"]


def test_a_small_call_makes_no_segment(session):
    x = np.arange(128.0)
    for _ in range(3):
        y = session.call("scale-shift", x, a=2)
        np.testing.assert_array_equal(y, 2 * x)
        assert (y.name, y.shape, y.dtype, y.dtype_name, y.nbytes) == ("y", (128,), np.float64, "float64", 1024)
        assert y.numpy().flags.aligned and y.info.copied_bytes == 2048
    stats = session.stats()
    assert (stats["own"], stats["account"]["bytes"]) == (NOTHING, 0)
    assert session.client_stats() == strait.ClientStats(copied_bytes=3 * 2 * 1024, calls=3, mappings=0, huge_bytes=0)


def test_what_is_larger_goes_into_segments(session, address):
    most = session.inline_bytes
    assert most > 0
    for size, mappings in [(most, 0), (most + 8, 2)]:
        x = np.arange(size // 8, dtype=np.float64)
        y = session.call("scale-shift", x, a=2)
        np.testing.assert_array_equal(y, 2 * x)
        assert session.client_stats().mappings == mappings
    small = np.ones(4)
    for asked, mappings in [(32, 0), (31, 1), (0, 1), (np.int64(32), 0)]:
        with strait.connect(address) as other:
            y = other.call("scale-shift", small, inline_bytes=asked)
            np.testing.assert_array_equal(y, small)
            assert other.client_stats().mappings == mappings
    for wrong in (-1, 2**70):
        with pytest.raises(strait.RemoteError, match="BAD_REQUEST"):
            session.call("scale-shift", small, inline_bytes=wrong)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "int16", "bool8", "bfloat16"])
def test_every_element_comes_back(session, dtype, shape):
    x = np.arange(math.prod(shape)).reshape(shape).astype(strait._dtypes.to_numpy(dtype))
    y = session.call("cast", x, to=dtype)
    assert (y.dtype_name, y.shape) == (dtype, shape) and held(session) == NOTHING
    np.testing.assert_array_equal(y, x)
    assert len(y.arrow()) == (shape[0] if shape else 1)


def test_elements_go_row_major_and_little_endian(session):
    x = np.arange(24.0).reshape(2, 3, 4)
    for given in (x.T, x[:, ::2], x.astype(">f8"), np.asfortranarray(x), np.broadcast_to(x[0], (5, 3, 4))):
        np.testing.assert_array_equal(session.call("scale-shift", given, a=2), 2 * given)
    assert held(session) == NOTHING


def test_a_small_result_acts_as_a_mapped_one(session, address):
    x = np.arange(10.0)
    y = session.call("scale-shift", x, a=2)
    for view in (y.numpy(), y.numpy()[2:], np.asarray(y)):
        with pytest.raises(ValueError):
            view.flags.writeable = True
    np.testing.assert_array_equal(y.arrow(), 2 * x)
    same = copy.copy(y)
    view = y.numpy()
    # As an input it travels again, in any session, for no lease of it can end.
    np.testing.assert_array_equal(session.call("scale-shift", y, a=2), 4 * x)
    with strait.connect(address) as other:
        np.testing.assert_array_equal(other.call("scale-shift", y, a=2), 4 * x)
    assert y.renew() == math.inf and held(session) == NOTHING
    y.release()
    for use in (y.numpy, y.arrow, y.renew, lambda: session.call("clip", y), lambda: session.put("x", y)):
        with pytest.raises(strait.ReleasedError, match="was released"):
            use()
    np.testing.assert_array_equal(view, same)


def test_a_small_result_is_published_by_a_copy(session):
    for publish in (session.put, session.publish):
        y = session.call("scale-shift", [1.0, 2.0], a=2)
        before = session.client_stats().copied_bytes
        publish("small", y)
        assert session.client_stats().copied_bytes - before == 16
        # As if it had been in a segment: the tensor has the port's name.
        np.testing.assert_array_equal(session.get("small#y"), [2.0, 4.0])
        np.testing.assert_array_equal(y, [2.0, 4.0])
        session.delete("small")
    named = session.call("scale-shift", [1.0, 2.0], publish={"y": "named"})
    assert session.client_stats().mappings == 1 and named.info.published == {"y": "named"}
    session.delete("named")
