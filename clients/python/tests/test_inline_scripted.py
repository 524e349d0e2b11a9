"""Small tensors in frames against a scripted host: what a request says of its payload, and replies that lie."""

import numpy as np
import pytest

import strait
from strait._wire import Op
from test_connection import Caller, goes_on, open_fds, scripted  # noqa: F401


def floats(count, offset=0, **changes):
    return {"dtype": "float64", "shape": [count], "offset": offset, "length": 8 * count, **changes}


def answer(*results):
    return {"results": list(results), "notes": [], "copied_bytes": 0, "pages": [], "minor_faults": 0, "seconds": {}}


def test_what_a_request_says_of_its_payload(scripted):
    peer, session = scripted(inline_bytes=1024)
    call = session.start("k", inputs={"a": np.ones(3, np.float32), "b": np.zeros((0, 2)), "c": [2.5], "d": "flight"})
    sequence, body = peer.expect(Op.INVOKE)
    assert body["inputs"] == {
        "a": {"inline": {"dtype": "float32", "shape": [3], "offset": 0, "length": 12}},
        "b": {"inline": {"dtype": "float64", "shape": [0, 2], "offset": 64, "length": 0}},
        "c": {"inline": {"dtype": "float64", "shape": [1], "offset": 64, "length": 8}},
        "d": "flight",
    }
    assert body["inline_bytes"] == 1024
    assert peer.payload == np.ones(3, np.float32).tobytes() + bytes(52) + np.float64(2.5).tobytes()
    one, two = {"port": "y", "inline": floats(1)}, {"port": "z", "inline": floats(2, 64)}
    peer.say(Op.OK, sequence, answer(one, two), payload=np.array([1.0] + [0.0] * 7 + [2.0, 3.0]).tobytes())
    assert {port: y.numpy().tolist() for port, y in call.result().items()} == {"y": [1.0], "z": [2.0, 3.0]}
    # Two inputs into the frame, two results out of it.
    assert session.client_stats().copied_bytes == 20 + 24


def test_a_host_that_has_no_tensors_in_frames_is_asked_for_none(scripted):
    peer, session = scripted()
    call = session.start("k", inputs={"x": "flight"})
    assert "inline_bytes" not in peer.expect(Op.INVOKE)[1]
    del call


@pytest.mark.parametrize("send_buffer_bytes, room", [(40_000, 80_000 - 32 - 48 - 61440), (20_000, 0)])
def test_a_payload_has_the_room_that_the_socket_leaves_it(scripted, send_buffer_bytes, room):
    """Linux doubles what it is asked for. The first input that has no room left gets a segment."""
    peer, session = scripted(send_buffer_bytes, inline_bytes=32768)
    assert session._connection.payload_room == room
    parts = {str(number): np.full(1024, float(number)) for number in range(4)}
    caller = Caller(lambda: session.start("k", inputs=parts))
    peer.expect(Op.CREATE)
    assert session.client_stats().copied_bytes == room // 8192 * 8192
    session.close()
    assert type(caller.result()) is strait.DisconnectedError


@pytest.mark.parametrize(
    "entry, says",
    [
        ({}, "in a segment or in the reply"),
        ({"inline": floats(2), "mapping": {"segment": "s"}, "expires_ms": 60000, "fd": 0}, "in a segment or in the reply"),
        ({"inline": floats(3)}, "24 bytes at 0, where there are 16 in all"),
        ({"inline": floats(1, 64)}, "8 bytes at 64, where there are 16 in all"),
        ({"inline": floats(1, 8)}, "at 8, no multiple of 64"),
        ({"inline": floats(1, -64)}, "at -64"),
        ({"inline": floats(2**61)}, "where there are 16"),
        ({"inline": floats(2, length=8)}, "not 8 bytes long"),
        ({"inline": floats(2, dtype="float32")}, "not 16 bytes long"),
        ({"inline": floats(2, dtype="float7")}, "float7"),
        ({"inline": floats(2, shape=[-1, -2])}, "not 16 bytes long"),
        ({"inline": floats(1, shape=[1] * 9)}, "9 axes"),
        ({"inline": floats(2, shape=None)}, "malformed inline result"),
        ({"inline": {}}, "malformed inline result 'y'.*KeyError"),
        ({"inline": [1]}, "malformed inline result"),
    ],
)
def test_replies_that_lie(scripted, entry, says):
    peer, session = scripted(inline_bytes=1024)
    before = open_fds()
    call = session.start("k", inputs={})
    sequence, _ = peer.expect(Op.INVOKE)
    with open("/proc/self/stat") as file:
        peer.say(Op.OK, sequence, answer({"port": "y", "lease": 7, **entry}), [file.fileno()], payload=bytes(16))
    with pytest.raises(strait.ProtocolError, match=says):
        call.result()
    # The descriptor and the lease that came along are given back, and the connection stays.
    assert open_fds() == before
    assert peer.answer(Op.RELEASE, {"released": 1}) == {"leases": [7]}
    assert goes_on(peer, session)


@pytest.mark.parametrize("op", [Op.ERROR, Op.WELCOME, Op.GONE])
def test_a_payload_where_none_belongs_ends_the_connection(scripted, op):
    peer, session = scripted(inline_bytes=1024)
    ping = Caller(session.ping)
    sequence, _ = peer.expect(Op.PING)
    peer.say(op, sequence, {}, payload=bytes(8))
    assert type(ping.result()) is strait.ProtocolError and "payload" in str(ping.outcome)
