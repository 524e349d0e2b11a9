"""Prepared calls against a scripted host, which lies, and against a real one."""

import gc
import os
import pickle
import select
import signal
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
from test_interrupt import notebook, running, spinning  # noqa: F401

PLACE = {"port": "x", "dtype": "float64", "shape": [2], "offset": 64, "length": 16}
TOLD = {"prepared": 3, "request_bytes": 128, "inputs": [PLACE], "reply_bytes": 128, "outputs": [{**PLACE, "port": "y"}]}
X = np.array([1.0, 2.0])


def sizes(*shape):
    return struct.pack("<8Q", *shape, *[0] * (8 - len(shape)))


def payload(*values, shape=None):
    shape = (len(values),) if shape is None else shape
    return (sizes(*shape) + struct.pack(f"<{len(values)}d", *values)).ljust(128, b"\0")


class Lane:
    """The host's end of the socket for calls."""

    def __init__(self, sock):
        self.socket = sock
        self.socket.settimeout(20)

    def expect(self):
        """The next call's sequence and payload."""
        op, sequence, body, data = _wire.decode(self.socket.recv(_wire.FRAME_BYTES_MAX))
        assert (op, body) == (Op.CALL, {})
        return sequence, data

    def say(self, op, sequence, body=None, data=b"", fds=()):
        frame = _wire.encode(op, sequence, body or {}, payload=data)
        socket.send_fds(self.socket, [frame], fds) if fds else self.socket.send(frame)

    def is_over(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            # It was closed before a frame of ours was read.
            return True

    def answer(self, *values, **reply):
        sequence, _ = self.expect()
        self.say(Op.OK, sequence, data=payload(*values), **reply)


def prepare(peer, session, told=TOLD, fds=1, sock=socket.SOCK_SEQPACKET, **options):
    """What is prepared, or the error of that; the host's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, sock)
    caller = Caller(lambda: session.prepare("k", **{"inputs": {"x": X}, **options}))
    sequence, body = peer.expect(Op.PREPARE)
    peer.say(Op.OK, sequence, told, [ours.fileno()] * fds)
    ours.close()
    return caller.result(), Lane(theirs), body


@pytest.fixture
def ready(scripted):  # noqa: F811
    peer, session = scripted()
    prepared, lane, _ = prepare(peer, session)
    yield peer, session, prepared, lane
    lane.socket.close()


def test_what_is_asked_and_sent(scripted):  # noqa: F811
    peer, session = scripted()
    inputs = {"x": strait.Spec(np.float64, 2), "t": "flight#t"}
    prepared, lane, body = prepare(peer, session, inputs=inputs, parameters={"a": 2}, b=1.0, deadline=1.5, limits={"guest_bytes": 7})
    assert body == {
        "kernel": "k",
        "inputs": {"x": {"dtype": "float64", "shape": [2]}, "t": "flight#t"},
        "parameters": {"a": 2, "b": 1.0},
        "deadline_ms": 1500,
        "limits": {"guest_bytes": 7},
    }
    assert prepared.inputs == {"x": strait.Spec("float64", (2,))} and prepared.outputs == {"y": strait.Spec("float64", (2,))}
    assert repr(prepared) == "<strait.Prepared 'k': (x: float64 [2]) -> (y: float64 [2])>"
    for x, data in [(X, payload(1, 2)), (X[:1], payload(1, shape=[1])), (X[:0], payload(shape=[0])), ([3, 4.0], payload(3, 4))]:
        caller = Caller(lambda: prepared(x))
        sequence, sent = lane.expect()
        assert sent == data
        lane.say(Op.OK, sequence, data=payload(5, shape=[1]))
        assert caller.result().tolist() == [5.0]
    copied = 16 + 8 + 0 + 16 + 4 * 8
    assert (session.client_stats().copied_bytes, session.client_stats().calls) == (copied, 4)


@pytest.mark.parametrize(
    "given, error, says",
    [
        (([1, 2],), TypeError, "'x' is int64, and float64 .2. was prepared"),
        ((np.zeros(2, np.float32),), TypeError, "'x' is float32"),
        ((np.zeros(3),), ValueError, r"shape \[3\], and at most \[2\]"),
        ((np.zeros((1, 2)),), ValueError, r"shape \[1, 2\]"),
        ((np.float64(1),), ValueError, r"shape \[\]"),
        ((np.ma.array(X, mask=[0, 1]),), ValueError, "1 masked"),
        ((None,), TypeError, "NoneType"),
        ((), TypeError, "bring 1 inputs .x.; 0 were given"),
        ((X, X), TypeError, "2 were given"),
        (dict(z=X), TypeError, "'z' is none that calls bring; prepared were x"),
        (dict(out=X[:1], x=X), TypeError, "out for 'y' is float64 .1.; a numpy array of float64 .2. is needed"),
        (dict(out={"z": X}, x=X), TypeError, "out for 'z'"),
        (dict(out=np.zeros(2, ">f8"), x=X), TypeError, "out for 'y'"),
        (dict(out=np.broadcast_to(1.0, 2), x=X), ValueError, "cannot be written"),
    ],
)
def test_misfits_are_refused_before_anything_is_sent(ready, given, error, says):
    _, session, prepared, lane = ready
    with pytest.raises(error, match=says):
        prepared(**given) if isinstance(given, dict) else prepared(*given)
    with pytest.raises(TypeError, match="by position and by name"):
        prepared(X, x=X)
    caller = Caller(lambda: prepared(X))
    lane.answer(3, 4)
    assert caller.result().tolist() == [3.0, 4.0]
    assert session.client_stats().calls == 1


def places(**changes):
    return {**TOLD, "inputs": [{**PLACE, **changes}]}


@pytest.mark.parametrize(
    "told, says",
    [
        ({}, "malformed OK to PREPARE: KeyError"),
        ({**TOLD, "inputs": None}, "malformed"),
        ({**TOLD, "request_bytes": 192}, "192 bytes for 1 ports, which have 128"),
        ({**TOLD, "reply_bytes": 64}, "64 bytes"),
        ({**TOLD, "inputs": []}, "128 bytes for 0 ports"),
        ({**TOLD, "inputs": [], "request_bytes": 0}, "calls bring {}, where"),
        (places(offset=0), "it is at 0, and belongs at 64"),
        (places(offset=65), "multiple of 64"),
        (places(dtype="float7"), "float7"),
        (places(dtype="int64"), "calls bring"),
        (places(port="z"), "calls bring"),
        (places(length=8), "not 8 bytes"),
        (places(shape=[-2]), "not 16 bytes"),
        (places(shape=[1] * 9), "9 axes"),
        (places(shape=[2**40], length=2**43), "131072 in all"),
        ({**TOLD, "outputs": [{**PLACE, "offset": 128}, {**PLACE, "offset": 192}], "reply_bytes": 256}, "each once"),
    ],
)
def test_preparations_that_lie(scripted, told, says):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    error, lane, _ = prepare(peer, session, told)
    assert type(error) is strait.ProtocolError
    with pytest.raises(strait.ProtocolError, match=says):
        raise error
    assert lane.socket.recv(1) == b"", "the socket that came along is closed"
    lane.socket.close()
    assert open_fds() == before
    assert goes_on(peer, session)


@pytest.mark.parametrize(
    "more, says",
    [(dict(fds=0), "0 descriptors"), (dict(fds=2), "2 descriptors"), (dict(sock=socket.SOCK_STREAM), "socket of another kind")],
)
def test_preparations_without_their_socket(scripted, more, says):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    error, lane, _ = prepare(peer, session, **more)
    assert type(error) is strait.ProtocolError and says in str(error)
    lane.socket.close()
    assert open_fds() == before


def test_a_descriptor_that_is_no_socket(scripted):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    caller = Caller(lambda: session.prepare("k", inputs={"x": X}))
    sequence, _ = peer.expect(Op.PREPARE)
    with open("/proc/self/stat") as file:
        peer.say(Op.OK, sequence, TOLD, [file.fileno()])
    error = caller.result()
    assert type(error) is strait.ProtocolError and "no socket" in str(error)
    assert open_fds() == before


@pytest.mark.parametrize(
    "op, other, reply, says",
    [
        (Op.OK, 1, dict(data=payload(1, 2)), "sequence"),
        (Op.OK, -1, dict(data=payload(1, 2)), "sequence"),
        (Op.ERROR, 1, dict(body={"code": "INTERNAL"}), "sequence"),
        (Op.WELCOME, 0, {}, "of op 2"),
        (Op.OK, 0, {}, "0 bytes where 128"),
        (Op.OK, 0, dict(data=payload(1, 2)[:-8]), "120 bytes where 128"),
        (Op.OK, 0, dict(data=payload(1, 2) + bytes(64)), "192 bytes where 128"),
        (Op.OK, 0, dict(data=payload(1, 2), body={"notes": 7}), "malformed notes"),
        (Op.OK, 0, dict(data=payload(1, 2), body={"notes": [{}]}), "malformed notes"),
        (Op.OK, 0, dict(data=payload(1, 2, shape=[3])), "'y' has the sizes"),
        (Op.OK, 0, dict(data=payload(1, 2, shape=[2**63])), "'y' has the sizes"),
        (Op.OK, 0, dict(data=payload(1, 2, shape=[2, 1])), "'y' has the sizes"),
        (Op.OK, 0, dict(data=payload(1, 2), fds=True), "brings descriptors"),
        (Op.OK, 0, dict(data=bytes(131072), body={"pad": "x" * 61000}), "longer than was said"),
        (None, 0, dict(data=b"rubbish"), "frame that starts with"),
    ],
)
def test_replies_that_lie_end_it_and_nothing_else(ready, op, other, reply, says):
    peer, session, prepared, lane = ready
    before = open_fds()
    caller = Caller(lambda: prepared(X))
    sequence, _ = lane.expect()
    if op is None:
        lane.socket.send(reply["data"])
    elif reply.pop("fds", False):
        with open("/proc/self/stat") as file:
            lane.say(op, sequence, fds=[file.fileno()], **reply)
    else:
        lane.say(op, (sequence + other) % 2**32, **reply)
    error = caller.result()
    assert type(error) is strait.ProtocolError and says in str(error), error
    assert open_fds() == before - 1
    with pytest.raises(strait.ProtocolError, match="the reply to CALL"):
        prepared(X)
    assert goes_on(peer, session)


def test_an_error_concerns_its_call_alone(ready):
    _, _, prepared, lane = ready
    failure = {"code": "INTERNAL", "reason": "GUEST_TRAP", "message": "it trapped", "request_id": "r", "backtrace": "b"}
    for _ in range(2):
        caller = Caller(lambda: prepared(X))
        lane.say(Op.ERROR, lane.expect()[0], failure)
        error = caller.result()
        assert type(error) is strait.RemoteError
        assert (error.code, error.reason, error.message, error.request_id, error.backtrace) == tuple(failure.values())
        caller = Caller(lambda: prepared(X))
        lane.say(Op.OK, lane.expect()[0], {"notes": [{"key": "k", "text": "t"}]}, payload(5, 6))
        assert caller.result().tolist() == [5.0, 6.0] and prepared.notes == {"k": "t"}
        caller = Caller(lambda: prepared(X))
        lane.answer(7, 8)
        assert caller.result().tolist() == [7.0, 8.0] and prepared.notes == {}


def test_its_end_is_told(ready):
    peer, session, prepared, lane = ready
    caller = Caller(lambda: prepared(X))
    lane.expect()
    lane.socket.close()
    assert type(caller.result()) is strait.DisconnectedError and "prepare it again" in str(caller.outcome)
    with pytest.raises(strait.DisconnectedError):
        prepared(X)
    assert goes_on(peer, session)


@pytest.mark.parametrize("who", ["close", "session"])
def test_it_ends_with_whoever_has_it(ready, who):
    _, session, prepared, lane = ready
    before = open_fds()
    caller = Caller(lambda: prepared(X))
    lane.expect()
    prepared.close() if who == "close" else session.close()
    assert type(caller.result()) is strait.DisconnectedError and "closed" in str(caller.outcome)
    with pytest.raises(strait.DisconnectedError, match="closed"):
        prepared(X)
    prepared.close()
    assert open_fds() == before - (1 if who == "close" else 2)
    assert lane.socket.recv(1) == b""


def test_one_that_nobody_holds_ends(scripted):  # noqa: F811
    peer, session = scripted()
    prepared, lane, _ = prepare(peer, session)
    before = open_fds()
    del prepared
    gc.collect()
    assert lane.socket.recv(1) == b"" and open_fds() == before - 1
    prepared, lane, _ = prepare(peer, session)
    with prepared:
        pass
    assert lane.socket.recv(1) == b"" and open_fds() == before - 1


def test_threads_wait_for_each_other(ready):
    _, _, prepared, lane = ready
    callers = [Caller(lambda n=n: prepared(np.full(2, n))) for n in map(float, range(8))]
    for _ in callers:
        sequence, data = lane.expect()
        # Nobody sends before the one ahead has its reply.
        assert not select.select([lane.socket], [], [], 0.01)[0]
        lane.say(Op.OK, sequence, data=data)
    assert [caller.result().tolist() for caller in callers] == [[float(n)] * 2 for n in range(8)]


@pytest.mark.parametrize("interrupts", [True, False])
def test_an_interrupted_call_is_cancelled_and_its_reply_is_nobodys(ready, interrupts):
    """Whatever the handler asks Linux to do with what it was doing."""
    peer, _, prepared, lane = ready

    def host():
        sequence, _ = lane.expect()
        interrupt_main_thread(peer)
        assert peer.answer(Op.CANCEL, {"cancelled": False}) == {"prepared": 3}
        # The next call asks again, for the host may not have looked at its socket.
        assert peer.answer(Op.CANCEL, {"cancelled": True}) == {"prepared": 3}
        lane.say(Op.OK, sequence, data=payload(1, 1))
        # Nothing is sent before all cancels are answered: they would end the next call.
        ping, _ = peer.expect(Op.PING)
        assert not select.select([lane.socket], [], [], 0.05)[0]
        peer.say(Op.OK, ping, {})
        lane.answer(2, 2)

    signal.siginterrupt(signal.SIGINT, interrupts)
    try:
        caller = Caller(host)
        with pytest.raises(KeyboardInterrupt):
            prepared(X)
        assert prepared(X).tolist() == [2.0, 2.0]
        assert caller.result() is None
    finally:
        signal.siginterrupt(signal.SIGINT, True)


def test_a_reply_that_came_late_is_held_against_its_call(ready):
    peer, _, prepared, lane = ready

    def host():
        sequence, _ = lane.expect()
        interrupt_main_thread(peer)
        peer.answer(Op.CANCEL, {"cancelled": False})
        lane.say(Op.OK, sequence + 1, data=payload(1, 1))

    caller = Caller(host)
    with pytest.raises(KeyboardInterrupt):
        prepared(X)
    caller.result()
    with pytest.raises(strait.ProtocolError, match="sequence"):
        prepared(X)


def test_it_belongs_to_its_process(ready):
    _, _, prepared, lane = ready
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(prepared)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepared.close()
            prepared(X)
        except strait.ForkedError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    assert "is a fork" in os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(child, 0)
    caller = Caller(lambda: prepared(X))
    lane.answer(3, 4)
    assert caller.result().tolist() == [3.0, 4.0]


def test_it_ends_though_a_forked_child_has_its_socket(ready):
    _, _, prepared, lane = ready
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    prepared.close()
    assert lane.socket.recv(1) == b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# Against a real host


def orders(x):
    """The same elements, as arrays come."""
    wide = np.zeros((x.shape[0], 2 * x.shape[1]), x.dtype)
    wide[:, ::2] = x
    return [x, np.asfortranarray(x), wide[:, ::2], x.astype(x.dtype.newbyteorder(">")), x.tolist(), x[::-1][::-1]]


def test_arrays_of_every_kind(session):
    pa = pytest.importorskip("pyarrow")
    x = np.arange(12.0).reshape(3, 4)
    twice = session.prepare("scale-shift", x, a=2.0)
    for given in orders(x):
        assert np.array_equal(twice(given), 2 * x)
    segment = session.empty((3, 4))
    segment[:] = x
    result = session.call("scale-shift", segment, inline_bytes=0)
    for given in (segment, result, session.call("scale-shift", x)):
        assert np.array_equal(twice(given), 2 * x)
    assert np.array_equal(session.prepare("scale-shift", strait.Spec("f8", 3), a=2.0)(pa.array([1.0, 2.0])), [2.0, 4.0])
    y = twice(x)
    y += 1
    assert np.array_equal(twice(x), 2 * x), "a result is the caller's own"
    assert twice(x).flags.owndata and y.flags.writeable


def test_out(session):
    x = np.arange(12.0).reshape(3, 4)
    twice = session.prepare("scale-shift", x, a=2.0)
    out = np.full((3, 8), -1.0)[:, ::2]
    assert twice(x, out=out) is out and np.array_equal(out, 2 * x)
    out[:] = -1
    y = twice(x[:2, :3], out={"y": out})
    assert y.base is out or y.base is out.base
    assert np.array_equal(y, 2 * x[:2, :3]) and np.array_equal(out[:2, :3], y) and (out[2] == -1).all() and (out[:, 3] == -1).all()
    number = session.prepare("scale-shift", 1.5, a=2.0)
    out = np.zeros(())
    assert number(2.5) == 5.0 and number(2.5).shape == () and number(3.5, out=out) is out and out == 7.0


def test_truth_values_are_numpys(session):
    bits = session.empty(4, "bool8")
    bits.view(np.uint8)[:] = [0, 1, 2, 255]
    finite = session.prepare("filter-finite", strait.Spec(bool, 4))
    out = np.zeros(4, bool)
    for y in (finite(bits), finite(bits, out=out)):
        assert y.view(np.uint8).tolist() == [0, 1, 1, 1]
    assert finite(bits[:2]).tolist() == [False, True] and finite.notes == {"dropped": "0"}


def test_narrow_floats(session):
    for name in ("bfloat16", "float8_e5m2"):
        dtype = _dtypes.to_numpy(name)
        x = np.arange(-3, 3).astype(dtype).reshape(2, 3)
        low = session.prepare("clip", strait.Spec(name, (2, 3)), hi=1.0)
        for given in orders(x)[:3]:
            y = low(given)
            assert y.dtype == dtype and y.astype(float).tolist() == [[-3, -2, -1], [0, 1, 1]]
        assert low(np.asarray(1, dtype).reshape(1, 1)).astype(float).tolist() == [[1]]


def test_cancel_from_another_thread(spinning):  # noqa: F811
    with strait.connect(spinning) as session:
        spin = session.prepare("k", np.ones(10), deadline=60)
        scale = session.prepare("scale-shift", np.ones(10), a=2.0)
        spin.cancel()
        for _ in range(3):
            caller = Caller(lambda: spin(np.ones(10)))
            running(spinning, 1)
            assert scale(np.ones(10))[0] == 2.0
            spin.cancel()
            error = caller.result()
            assert (type(error), error.code) == (strait.RemoteError, "CANCELLED")
        # At once: the host may not have seen the call yet.
        for _ in range(20):
            caller = Caller(lambda: spin(np.ones(10)))
            while not spin._under_way:
                pass
            spin.cancel()
            assert caller.result().code == "CANCELLED"
    running(spinning, 0)


def test_a_timer_of_the_deadline(spinning):  # noqa: F811
    with strait.connect(spinning) as session:
        spin = session.prepare("k", np.ones(10), deadline=0.2, request_id="r-late")
        for _ in range(2):
            with pytest.raises(strait.RemoteError, match="DEADLINE_EXCEEDED DEADLINE, request r-late"):
                spin(np.ones(10))


def test_ctrl_c_ends_the_call_and_it_goes_on(spinning, notebook):  # noqa: F811
    notebook = notebook(
        """
        s = strait.connect(sys.argv[1])
        x = np.ones(10)
        spin, scale = s.prepare("k", x, deadline=60), s.prepare("scale-shift", x, a=2.0)
        print("ready", flush=True)
        for _ in range(3):
            try:
                spin(x)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            until = time.monotonic() + 20
            while s.stats()["running"] and time.monotonic() < until:
                time.sleep(0.01)
            print((scale(x) == 2).all(), flush=True)
        print(s.stats()["running"], flush=True)
        """,
    )
    assert notebook.line() == "ready"
    for _ in range(3):
        running(spinning, 1)
        notebook.interrupt()
        assert notebook.line() == "interrupted"
        assert notebook.line() == "True"
    assert notebook.end() == "0"


def test_a_storm_of_interrupts_mixes_no_replies_up(notebook):  # noqa: F811
    notebook = notebook(
        """
        import signal
        s = strait.connect(sys.argv[1])
        scale = s.prepare("scale-shift", np.ones(100), a=2.0)
        interrupts = calls = 0
        armed = False

        def interrupt(*_):
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        until = time.monotonic() + 3
        print("ready", flush=True)
        number = 0
        while time.monotonic() < until:
            try:
                armed = True
                while time.monotonic() < until:
                    number += 1
                    x = np.full(1 + number % 100, float(number))
                    assert np.array_equal(scale(x), 2 * x)
                    calls += 1
                armed = False
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert np.array_equal(scale(np.ones(3)), [2, 2, 2])
        print(calls > 0, interrupts > 0, len(os.listdir("/proc/self/fd")) < 64, flush=True)
        """,
    )
    assert notebook.line() == "ready"
    until = time.monotonic() + 3.5
    while time.monotonic() < until and notebook.process.poll() is None:
        notebook.interrupt()
        time.sleep(0.001)
    assert notebook.end() == "True True True"


def test_a_host_that_shuts_down_ends_it():
    with tempfile.TemporaryDirectory(prefix="strait-python-") as directory:
        host = serve(directory)
        with strait.connect(next(host)) as session:
            scale = session.prepare("scale-shift", X, a=2.0)
            assert scale(X).tolist() == [2.0, 4.0]
            assert next(host, None) is None
            for _ in range(2):
                with pytest.raises(strait.DisconnectedError):
                    scale(X)
