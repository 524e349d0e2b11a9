"""Prepared streams against a scripted host, which lies, and against a real one."""

import gc
import itertools
import os
import pickle
import random
import socket
import struct
import tempfile
import time

import numpy as np
import pytest

import strait
from conftest import serve
from strait import _dtypes, _wire
from strait._wire import Op
from test_connection import Caller, goes_on, interrupt_main_thread, open_fds, scripted  # noqa: F401
from test_interrupt import notebook, spinning  # noqa: F401
from test_prepared import Lane, orders, sizes

SPEC = strait.Spec("float64", (4, 2))
PLACE = {"port": "x", "dtype": "float64", "shape": [4, 2], "offset": 64, "length": 64}
TOLD = {"prepared": 3, "request_bytes": 128, "inputs": [PLACE], "reply_bytes": 128, "outputs": [{**PLACE, "port": "y"}]}
NONE = np.empty((0, 2))


def payload(rows, shape=None):
    rows = np.asarray(rows, float)
    shape = rows.shape if shape is None else shape
    return (sizes(*shape) + rows.tobytes()).ljust(128, b"\0")


class StreamLane(Lane):
    """The host's end of a stream's socket."""

    def expect(self, wanted=Op.CHUNK):
        """The next chunk's sequence and rows."""
        op, sequence, body, data = _wire.decode(self.socket.recv(_wire.FRAME_BYTES_MAX))
        assert (op, body, len(data)) == (wanted, {}, 128)
        shape = struct.unpack_from("<8Q", data)
        assert shape[1:] == (2, 0, 0, 0, 0, 0, 0)
        return sequence, np.frombuffer(data, np.float64, 2 * shape[0], 64).reshape(-1, 2)



def prepare_stream(peer, session, told=TOLD, **options):
    """The stream, or the error of that; the host's end; what was asked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller = Caller(lambda: session.prepare_stream("k", **{"inputs": {"x": SPEC}, **options}))
    sequence, body = peer.expect(Op.PREPARE)
    peer.say(Op.OK, sequence, told, [ours.fileno()])
    ours.close()
    return caller.result(), StreamLane(theirs), body


@pytest.fixture
def ready(scripted):  # noqa: F811
    peer, session = scripted()
    stream, lane, _ = prepare_stream(peer, session)
    yield peer, session, stream, lane
    lane.socket.close()


def is_ended(stream, error=strait.DisconnectedError):
    for use in (stream.chunk, stream.last):
        with pytest.raises(error):
            use(NONE)
    return True


def test_what_is_asked_and_sent(scripted):  # noqa: F811
    peer, session = scripted()
    stream, lane, body = prepare_stream(peer, session, fixed={"t": "flight#t"}, deadline=1.5, request_id="r")
    assert body == {
        "kernel": "k",
        "stream": True,
        "inputs": {"x": {"dtype": "float64", "shape": [4, 2]}, "t": "flight#t"},
        "deadline_ms": 1500,
        "request_id": "r",
    }
    assert stream.inputs == {"x": SPEC} and stream.outputs == {"y": SPEC}
    assert repr(stream) == "<strait.PreparedStream 'k': (x: float64 [4, 2]) -> (y: float64 [4, 2])>"
    x = np.arange(20.0).reshape(10, 2)

    # Ten rows are three chunks; of the first come two frames and of the second none.
    caller = Caller(lambda: stream.chunk(x))
    sequence, rows = lane.expect()
    assert np.array_equal(rows, x[:4])
    lane.say(Op.CHUNK, sequence, data=payload(x[:3]))
    lane.say(Op.CHUNK, sequence, data=payload(NONE))
    lane.say(Op.OK, sequence, data=payload(x[3:4]))
    other, rows = lane.expect()
    assert np.array_equal(rows, x[4:8]) and other not in (0, sequence)
    lane.say(Op.OK, other, data=payload(NONE))
    sequence, rows = lane.expect()
    assert np.array_equal(rows, x[8:])
    lane.say(Op.OK, sequence, data=payload(x[4:6]))
    assert np.array_equal(caller.result(), x[:6])
    assert (session.client_stats().copied_bytes, session.client_stats().calls) == (160 + 96, 3)

    # None at all: dtype and shape are right.
    caller = Caller(lambda: stream.chunk(x=NONE))
    lane.say(Op.OK, lane.expect()[0], data=payload(NONE))
    y = caller.result()
    assert (y.shape, y.dtype, stream.notes) == ((0, 2), np.float64, {})

    # Only the last piece is the last one. Its notes are the stream's.
    caller = Caller(lambda: stream.last(x[:5]))
    lane.say(Op.OK, lane.expect()[0], data=payload(x[:4]))
    sequence, rows = lane.expect(Op.LAST)
    assert np.array_equal(rows, x[4:5])
    lane.say(Op.CHUNK, sequence, data=payload(x[4:8]))
    lane.say(Op.OK, sequence, {"notes": [{"key": "k", "text": "t"}]}, payload(x[8:]))
    assert np.array_equal(caller.result(), x) and stream.notes == {"k": "t"}

    # And then another one begins.
    for last in (stream.last, lambda: stream.last(None), lambda: stream.last(x=None)):
        caller = Caller(last)
        sequence, rows = lane.expect(Op.LAST)
        assert rows.shape == (0, 2)
        lane.say(Op.OK, sequence, data=payload(x[:1]))
        assert np.array_equal(caller.result(), x[:1])
    lane.socket.close()


@pytest.mark.parametrize(
    "given, error, says",
    [
        ((np.zeros((1, 2), int),), TypeError, "'x' is int64, and float64 .4, 2. was prepared"),
        ((np.zeros((1, 2), np.float32),), TypeError, "'x' is float32"),
        ((np.zeros((1, 3)),), ValueError, r"shape \[1, 3\]; rows of \[2\]"),
        ((np.zeros(2),), ValueError, r"shape \[2\]"),
        ((np.zeros((1, 2, 1)),), ValueError, r"shape \[1, 2, 1\]"),
        ((np.float64(1),), ValueError, r"shape \[\]"),
        ((np.ma.array([[1.0, 2.0]], mask=[[0, 1]]),), ValueError, "1 masked"),
        ((None,), TypeError, "NoneType"),
        ((), TypeError, "bring 1 inputs .x.; 0 were given"),
        ((NONE, NONE), TypeError, "2 were given"),
        (dict(z=NONE), TypeError, "'z' is none that calls bring"),
    ],
)
def test_misfits_are_refused_before_anything_is_sent(ready, given, error, says):
    _, session, stream, lane = ready
    with pytest.raises(error, match=says):
        stream.chunk(**given) if isinstance(given, dict) else stream.chunk(*given)
    # And the stream goes on.
    caller = Caller(lambda: stream.chunk(NONE))
    lane.say(Op.OK, lane.expect()[0], data=payload([[1, 2]]))
    assert caller.result().tolist() == [[1.0, 2.0]]
    assert session.client_stats().calls == 1


@pytest.mark.parametrize("spec", [strait.Spec("float64", ()), strait.Spec("float64", (0, 2)), 1.5])
def test_what_has_no_rows_is_not_prepared(scripted, spec):  # noqa: F811
    peer, session = scripted()
    with pytest.raises(ValueError, match="most rows of a chunk, at least 1"):
        session.prepare_stream("k", inputs={"x": spec})
    assert goes_on(peer, session)


def test_an_output_without_rows_is_a_lie(scripted):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    flat = {**TOLD, "outputs": [{**PLACE, "port": "y", "shape": [], "length": 8}]}
    error, lane, _ = prepare_stream(peer, session, flat)
    assert type(error) is strait.ProtocolError and "has no rows" in str(error)
    assert lane.is_over()
    lane.socket.close()
    assert open_fds() == before


WIDER = payload([[1, 2]], shape=(1, 1))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    "op, other, reply, says",
    [
        (Op.OK, 1, dict(data=payload(NONE)), "sequence"),
        (Op.CHUNK, 1, dict(data=payload(NONE)), "sequence"),
        (Op.CHUNK, -1, dict(data=payload(NONE)), "sequence"),
        (Op.ERROR, 1, dict(body={"code": "INTERNAL"}), "sequence"),
        (Op.LAST, 0, dict(data=payload(NONE)), "of op 67"),
        (Op.CALL, 0, dict(data=payload(NONE)), "of op 19"),
        (Op.WELCOME, 0, {}, "of op 2"),
        (Op.OK, 0, {}, "0 bytes where 128"),
        (Op.CHUNK, 0, {}, "0 bytes where 128"),
        (Op.OK, 0, dict(data=payload(NONE)[:-8]), "120 bytes where 128"),
        (Op.CHUNK, 0, dict(data=payload(NONE) + bytes(64)), "192 bytes where 128"),
        (Op.OK, 0, dict(data=payload(NONE), body={"notes": 7}), "malformed notes"),
        (Op.OK, 0, dict(data=payload(NONE, shape=(5, 2))), "'y' has the sizes"),
        (Op.CHUNK, 0, dict(data=payload(NONE, shape=(2**63, 2))), "'y' has the sizes"),
        (Op.CHUNK, 0, dict(data=payload(NONE, shape=(4, 2, 1))), "'y' has the sizes"),
        (Op.CHUNK, 0, dict(data=payload(NONE, shape=(4, 3))), "'y' has the sizes"),
        (Op.OK, 0, dict(data=WIDER), r"shape \[1, 1\]; but for its rows it is \[4, 2\]"),
        (Op.CHUNK, 0, dict(data=WIDER), r"shape \[1, 1\]"),
        (Op.OK, 0, dict(data=payload(NONE, shape=(0, 0))), r"shape \[0, 0\]"),
        (Op.CHUNK, 0, dict(data=payload(NONE), fds=True), "brings descriptors"),
        (Op.OK, 0, dict(data=bytes(131072), body={"pad": "x" * 61000}), "longer than was said"),
        (None, 0, dict(data=b"rubbish"), "frame that starts with"),
        (None, 0, dict(data=b"S"), "a frame of 1 bytes"),
    ],
)
def test_answers_that_lie_end_it_and_nothing_else(ready, before, op, other, reply, says):
    peer, session, stream, lane = ready
    fds = open_fds()
    caller = Caller(lambda: stream.chunk(np.ones((3, 2))))
    sequence, _ = lane.expect()
    for _ in range(before):
        lane.say(Op.CHUNK, sequence, data=payload([[1, 2]]))
    if op is None:
        lane.socket.send(reply["data"])
    elif "fds" in reply:
        with open("/proc/self/stat") as file:
            lane.say(op, sequence, data=reply["data"], fds=[file.fileno()])
    else:
        lane.say(op, (sequence + other) % 2**32, **reply)
    error = caller.result()
    assert type(error) is strait.ProtocolError
    with pytest.raises(strait.ProtocolError, match=says):
        raise error
    assert "the reply to CHUNK" in str(error)
    assert open_fds() == fds - 1 and lane.is_over()
    assert is_ended(stream, strait.ProtocolError)
    assert goes_on(peer, session)


def test_a_chunk_is_no_answer_to_a_call(scripted):  # noqa: F811
    import test_prepared

    peer, session = scripted()
    scale, lane, _ = test_prepared.prepare(peer, session)
    caller = Caller(lambda: scale([1.0, 2.0]))
    lane.say(Op.CHUNK, lane.expect()[0], data=test_prepared.payload(1, 2))
    assert type(caller.result()) is strait.ProtocolError and "of op 64" in str(caller.outcome)
    lane.socket.close()


def test_as_many_chunks_as_the_host_likes(ready):
    _, _, stream, lane = ready
    caller = Caller(lambda: stream.last(NONE))
    sequence, _ = lane.expect(Op.LAST)
    x = np.arange(4000.0).reshape(2000, 2)
    for row in range(2000):
        lane.say(Op.CHUNK, sequence, data=payload(x[row : row + 1] if row % 3 else NONE))
    lane.say(Op.OK, sequence, data=payload(NONE))
    assert np.array_equal(caller.result(), x[np.arange(2000) % 3 > 0])


@pytest.mark.parametrize("before", [0, 1])
def test_an_error_ends_the_stream(ready, before):
    peer, session, stream, lane = ready
    fds = open_fds()
    failure = {"code": "INTERNAL", "reason": "GUEST_TRAP", "message": "it trapped", "request_id": "r", "details": {"chunk": 1}}
    caller = Caller(lambda: stream.chunk(np.ones((9, 2))))
    lane.say(Op.OK, lane.expect()[0], data=payload([[1, 2]]))
    sequence, _ = lane.expect()
    for _ in range(before):
        lane.say(Op.CHUNK, sequence, data=payload([[1, 2]]))
    lane.say(Op.ERROR, sequence, failure)
    error = caller.result()
    assert type(error) is strait.RemoteError and (error.reason, error.details) == ("GUEST_TRAP", {"chunk": 1})
    # What would have come behind it was not sent.
    assert lane.is_over() and open_fds() == fds - 1
    assert is_ended(stream)
    with pytest.raises(strait.DisconnectedError, match="has failed; prepare another one"):
        stream.chunk(NONE)
    assert goes_on(peer, session)
    stream.close()
    assert goes_on(peer, session)


def test_its_end_is_told(ready):
    peer, session, stream, lane = ready
    caller = Caller(lambda: stream.chunk(NONE))
    lane.say(Op.CHUNK, lane.expect()[0], data=payload([[1, 2]]))
    lane.socket.close()
    assert type(caller.result()) is strait.DisconnectedError and "prepare it again" in str(caller.outcome)
    assert is_ended(stream) and goes_on(peer, session)


@pytest.mark.parametrize("who", ["close", "session"])
def test_it_ends_with_whoever_has_it(ready, who):
    peer, session, stream, lane = ready
    before = open_fds()
    caller = Caller(lambda: stream.chunk(NONE))
    lane.expect()
    stream.close() if who == "close" else session.close()
    assert type(caller.result()) is strait.DisconnectedError and "closed" in str(caller.outcome)
    if who == "close":
        # The chunk that was under way is to end, too.
        assert peer.answer(Op.CANCEL, {"cancelled": True}) == {"prepared": 3}
    assert is_ended(stream) and lane.is_over()
    stream.close()
    assert open_fds() == before - (1 if who == "close" else 2)


def test_one_that_nobody_holds_ends(scripted):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    stream, lane, _ = prepare_stream(peer, session)
    del stream
    gc.collect()
    assert lane.is_over()
    lane.socket.close()
    stream, lane, _ = prepare_stream(peer, session)
    with stream:
        pass
    assert lane.is_over() and is_ended(stream)
    lane.socket.close()
    assert open_fds() == before and goes_on(peer, session)


@pytest.mark.parametrize("before", [0, 1])
def test_an_interrupt_ends_the_stream_in_the_host_too(ready, before):
    peer, session, stream, lane = ready
    fds = open_fds()

    def host():
        sequence, _ = lane.expect()
        for _ in range(before):
            lane.say(Op.CHUNK, sequence, data=payload([[1, 2]]))
        interrupt_main_thread(peer)
        return peer.answer(Op.CANCEL, {"cancelled": True})

    caller = Caller(host)
    with pytest.raises(KeyboardInterrupt):
        stream.chunk(NONE)
    assert caller.result() == {"prepared": 3}
    assert open_fds() == fds - 1 and lane.is_over()
    with pytest.raises(strait.DisconnectedError, match="was broken off; prepare another one"):
        stream.chunk(NONE)
    assert is_ended(stream) and goes_on(peer, session)


def test_it_belongs_to_its_process(ready):
    _, _, stream, lane = ready
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(stream)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stream.close()
            stream.chunk(NONE)
        except strait.ForkedError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    assert "is a fork" in os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(child, 0)
    caller = Caller(lambda: stream.chunk(NONE))
    lane.say(Op.OK, lane.expect()[0], data=payload([[1, 2]]))
    assert caller.result().tolist() == [[1.0, 2.0]]


# Against a real host


def parts(results):
    """By port, whether the kernel has one output or more."""
    results = [result if isinstance(result, dict) else {"y": result} for result in results]
    return {port: np.concatenate([result[port] for result in results]) for port in results[0]}


def whole(result):
    named = result.items() if isinstance(result, strait.Arrays) else [("y", result)]
    return {port: array.numpy() for port, array in named}


def same(some, others):
    return some.keys() == others.keys() and all(
        some[port].dtype == others[port].dtype and some[port].shape == others[port].shape and some[port].tobytes() == others[port].tobytes()
        for port in some
    )


KERNELS = [
    ("cumsum", {}),
    ("rolling-mean", dict(window=5)),
    ("fir", dict(taps=np.arange(7.0))),
    ("histogram", dict(bins=6, lo=-50.0, hi=50.0)),
    ("cast", dict(to="float32")),
    ("zscore-running", {}),
]


@pytest.mark.parametrize("kernel, options", KERNELS, ids=[kernel for kernel, _ in KERNELS])
def test_however_the_rows_are_cut_it_is_one_call(session, kernel, options):
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    inputs = {port: options[port] for port in options if port == "taps"}
    parameters = {key: value for key, value in options.items() if key not in inputs}
    for dtype, most in itertools.product(("float64", "float32"), (1, 3, 16, 200)):
        width = chance.randint(1, 3)
        stream = session.prepare_stream(kernel, strait.Spec(dtype, (most, width)), **options)
        for count in (0, 1, 7, 300):
            x = np.array([chance.choice([np.nan, np.inf, -0.0, chance.uniform(-100, 100)]) for _ in range(count * width)], dtype)
            x = x.reshape(count, width)
            cuts = sorted(chance.randint(0, count) for _ in range(chance.randint(0, 6)))
            cuts = [0, *cuts, count]
            chunks = [x[start:stop] for start, stop in zip(cuts, cuts[1:])]
            expected = whole(session.call(kernel, inputs={"x": x, **inputs}, **parameters))
            # One after another over the same socket, and with the last rows as the last ones or without.
            for end in (chunks[-1], None):
                came = [stream.chunk(chunk) for chunk in (chunks if end is None else chunks[:-1])]
                assert same(parts([*came, stream.last(end)]), expected), (seed, dtype, most, cuts)
            rows = chance.choice([None, most])
            came = list(session.stream(kernel, iter(chunks), rows=rows, **options))
            assert len(came) == len(chunks) + 1
            assert same(parts(came), expected), (seed, dtype, rows, cuts)
        stream.close()


def test_fixed_inputs_are_given_by_name_or_as_fixed(session):
    x = np.arange(40.0).reshape(20, 2)
    taps = np.array([1.0, -1.0, 0.5])
    expected = session.call("fir", x, taps).numpy()
    session.put("taps", taps, replace=True)
    for options in (dict(taps=taps), dict(taps="taps"), dict(fixed={"taps": "taps"}), dict(taps=session.get("taps"))):
        assert np.array_equal(np.concatenate(list(session.stream("fir", [x[:7], x[7:]], **options))), expected)
        with session.prepare_stream("fir", strait.Spec("float64", (5, 2)), **options) as stream:
            assert np.array_equal(np.concatenate([stream.chunk(x), stream.last()]), expected)
    with pytest.raises(TypeError, match="'taps' of kernel 'fir' was given twice"):
        session.prepare_stream("fir", strait.Spec("float64", (5, 2)), taps="taps", fixed={"taps": "taps"})
    with pytest.raises(TypeError, match="has the inputs x, taps; give those"):
        list(session.stream("fir", [x]))
    # Chunks by port say which it is.
    assert np.array_equal(np.concatenate(list(session.stream("fir", [{"x": x}], taps="taps"))), expected)
    session.delete("taps")


def test_chunks_of_every_kind(session):
    pa = pytest.importorskip("pyarrow")
    x = np.arange(12.0).reshape(3, 4)
    segment = session.empty((3, 4))
    segment[:] = x
    result = session.call("scale-shift", segment, inline_bytes=0, a=1.0)
    chunks = [*orders(x), segment, result, x[::-1], np.asfortranarray(np.tile(x, (50, 1))), pa.table({str(i): x[:, i] for i in range(4)})]
    for rows in (1, 2, None):
        came = list(session.stream("scale-shift", chunks, rows=rows, a=2.0))
        for chunk, y in zip(chunks, came):
            chunk = np.column_stack([column.to_numpy() for column in chunk.columns]) if isinstance(chunk, pa.Table) else np.asarray(chunk)
            assert np.array_equal(y, 2 * chunk) and y.flags.owndata and y.flags.writeable
        assert came[-1].shape == (0, 4)
    bits = list(session.stream("filter-finite", [[True, False], np.array([True])]))
    assert [y.dtype for y in bits] == [bool] * 3 and np.concatenate(bits).tolist() == [True, False, True]
    for name in ("bfloat16", "float8_e5m2"):
        dtype = _dtypes.to_numpy(name)
        narrow = np.arange(-3, 3).astype(dtype).reshape(6, 1)
        if narrow.dtype.kind != "u":
            y = np.concatenate(list(session.stream("clip", [narrow, narrow[::-1]], rows=4, hi=1.0)))
            assert y.dtype == dtype and y.astype(float).ravel().tolist() == [-3, -2, -1, 0, 1, 1, 1, 1, 0, -1, -2, -3]


def test_kernels_say_whether_they_stream(session):
    streaming = {kernel.name: kernel.streaming for kernel in session.kernels()}
    assert all(streaming[kernel] is True for kernel, _ in KERNELS) and streaming["zscore"] is False


def test_notes_come_with_the_last_rows(session):
    with session.prepare_stream("filter-finite", strait.Spec("float64", (4,))) as stream:
        assert stream.chunk([1.0, np.nan, np.inf]).tolist() == [1.0] and stream.notes == {}
        assert stream.last([np.nan, 2.0]).tolist() == [2.0] and stream.notes == {"dropped": "3"}
        assert stream.chunk([3.0]).tolist() == [3.0] and stream.notes == {}
        assert stream.last().tolist() == [] and stream.notes == {"dropped": "0"}


@pytest.mark.parametrize(
    "chunks, error, says",
    [
        (np.zeros((2, 2)), TypeError, "chunks is one ndarray"),
        ("flight", TypeError, "chunks is one str"),
        ({"x": np.zeros(2)}, TypeError, "chunks is one dict"),
        (7, TypeError, "not iterable"),
        ([], ValueError, "no chunk came for 'cumsum'"),
        ([1.5], ValueError, "most rows of a chunk"),
        ([np.zeros((2, 2)), np.zeros((2, 3))], ValueError, r"shape \[2, 3\]"),
        ([np.zeros(2), np.zeros(2, int)], TypeError, "'x' is int64"),
        (["flight"], TypeError, "no place in a tensor"),
    ],
)
def test_chunks_that_are_none(session, chunks, error, says):
    with pytest.raises(error, match=says):
        list(session.stream("cumsum", chunks))
    with pytest.raises(ValueError, match="rows is 0"):
        session.stream("cumsum", [np.zeros(2)], rows=0)
    with pytest.raises(strait.RemoteError, match="KERNEL_NOT_FOUND"):
        list(session.stream("nope", [np.zeros(2)]))
    with pytest.raises(strait.RemoteError, match="does not stream"):
        list(session.stream("zscore", [np.zeros(2)], axis=0))


class Broken(Exception):
    pass


def breaks(session):
    for _ in session.stream("cumsum", itertools.repeat(np.ones(100))):
        break


def raises(session):
    for _ in session.stream("cumsum", itertools.repeat(np.ones(100))):
        raise Broken


def runs_dry(session):
    def chunks():
        yield np.ones(100)
        raise Broken

    list(session.stream("cumsum", chunks()))


def misfits(session):
    list(session.stream("cumsum", [np.ones(100), np.ones((100, 2))]))


def leaves(session):
    with session.prepare_stream("cumsum", np.ones(10)) as stream:
        stream.chunk(np.ones(100))
        raise Broken


def forgets(session):
    session.prepare_stream("cumsum", np.ones(10)).chunk(np.ones(100))


def keeps(session):
    came = session.stream("cumsum", itertools.repeat(np.ones(100)))
    next(came)
    came.close()


def ends(session):
    list(session.stream("cumsum", [np.ones(100)]))


def fixes(session):
    next(session.stream("fir", itertools.repeat(np.ones(100)), taps=np.ones(3)))


def test_whatever_ends_it_nothing_is_left_on_the_host():
    with tempfile.TemporaryDirectory(prefix="strait-python-") as directory:
        host = serve(directory)
        with strait.connect(next(host)) as session:
            for ended in (breaks, raises, runs_dry, misfits, leaves, forgets, keeps, ends, fixes):
                fds = open_fds()
                try:
                    ended(session)
                except (Broken, ValueError):
                    pass
                gc.collect()
                assert open_fds() == fds, ended
                until = time.monotonic() + 20
                while True:
                    stats = session.stats()
                    left = {key: stats["account"][key] for key in ("connections", "bytes", "leases", "running", "queued")}
                    if left == {"connections": 1, "bytes": 0, "leases": 0, "running": 0, "queued": 0}:
                        break
                    assert time.monotonic() < until, (ended, left)
                    time.sleep(0.01)
        assert next(host, None) is None


def test_streams_of_several_threads(session):
    def run(number):
        x = np.random.default_rng(number).normal(size=(3000, 2))
        came = list(session.stream("cumsum", np.array_split(x, 9), rows=100))
        return np.array_equal(np.concatenate(came), np.cumsum(x, axis=0))

    assert all(caller.result() is True for caller in [Caller(lambda n=n: run(n)) for n in range(4)])


def test_a_storm_of_interrupts_loses_no_row_unseen(notebook):  # noqa: F811
    notebook = notebook(
        """
        import signal
        s = strait.connect(sys.argv[1])
        x = np.arange(300.0)
        expected = np.cumsum(x)
        interrupts = streams = 0
        armed = False

        def interrupt(*_):
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        until = time.monotonic() + 3
        print("ready", flush=True)
        sums = None
        while time.monotonic() < until:
            try:
                sums = s.prepare_stream("cumsum", strait.Spec("float64", 64))
                armed = True
                while time.monotonic() < until:
                    came = [sums.chunk(chunk) for chunk in np.array_split(x, 3)]
                    assert np.array_equal(np.concatenate([*came, sums.last()]), expected)
                    streams += 1
                armed = False
            except KeyboardInterrupt:
                interrupts += 1
                if sums is not None:
                    sums.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sums = came = None
        assert np.array_equal(np.concatenate(list(s.stream("cumsum", [x, x]))), np.cumsum([x, x]))
        while s.stats()["account"]["connections"] > 1:
            time.sleep(0.01)
        print(streams > 0, interrupts > 0, len(os.listdir("/proc/self/fd")) < 64, s.stats()["account"]["bytes"], flush=True)
        """,
    )
    assert notebook.line() == "ready"
    until = time.monotonic() + 3.5
    while time.monotonic() < until and notebook.process.poll() is None:
        notebook.interrupt()
        time.sleep(0.005)
    assert notebook.end() == "True True True 0"


def test_a_host_that_shuts_down_ends_it():
    with tempfile.TemporaryDirectory(prefix="strait-python-") as directory:
        host = serve(directory)
        with strait.connect(next(host)) as session:
            stream = session.prepare_stream("cumsum", np.ones(10))
            assert stream.chunk(np.ones(2)).tolist() == [1.0, 2.0]
            assert next(host, None) is None
            for use in (stream.chunk, stream.last):
                with pytest.raises(strait.DisconnectedError):
                    use([1.0])
