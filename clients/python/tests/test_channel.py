"""Channels against a scripted host, which lies, and against a real one."""

import asyncio
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import strait
from conftest import serve
from strait import _wire
from strait._wire import Op
from test_connection import Caller, goes_on, open_fds, scripted  # noqa: F401
from test_interrupt import notebook, spinning  # noqa: F401
from test_prepared import Lane, sizes
from test_stream import payload

SPEC = strait.Spec("float64", (4, 2))
PLACE = {"port": "y", "dtype": "float64", "shape": [4, 2], "offset": 64, "length": 64}
TOLD = {"channel": "levels", "kernel": "k", "outputs": [PLACE], "batch_bytes": 128, "first": 1}
NONE = np.empty((0, 2))
FAILURE = {"code": "UNAVAILABLE", "reason": "PRODUCER_LOST", "message": "it left", "request_id": "r", "details": {"chunk": 7}}


class ChannelLane(Lane):
    """The host's end of a reader's socket."""

    def acknowledged(self, number):
        """What is said next, which must be that."""
        op, sequence, body, data = _wire.decode(self.socket.recv(_wire.FRAME_BYTES_MAX))
        assert (op, sequence, body, data) == (Op.OK, number, {}, b"")
        return True

    def silent(self):
        return not select.select([self.socket], [], [], 0.05)[0]

    def batch(self, number, rows=((1, 2),)):
        self.say(Op.CHUNK, number, data=payload(rows))


def read_channel(peer, session, told=TOLD, fds=1, sock=socket.SOCK_SEQPACKET, **options):
    """The reader, or the error of that; the host's end; what was asked."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, sock)
    caller = Caller(lambda: session.read_channel("levels", **options))
    sequence, body = peer.expect(Op.STREAM)
    peer.say(Op.OK, sequence, told, [ours.fileno()] * fds)
    ours.close()
    return caller.result(), ChannelLane(theirs), body


@pytest.fixture
def ready(scripted):  # noqa: F811
    peer, session = scripted()
    reader, lane, _ = read_channel(peer, session)
    yield peer, session, reader, lane
    lane.socket.close()


@pytest.fixture
def by_hand(scripted):  # noqa: F811
    peer, session = scripted()
    reader, lane, _ = read_channel(peer, session, automatic=False)
    yield reader, lane
    lane.socket.close()


async def anext_of(reader):
    return await reader.__anext__()


#: Both ways to wait for a batch.
WAYS = {"for": next, "async for": lambda reader: asyncio.run(anext_of(reader))}
either = pytest.mark.parametrize("take", list(WAYS.values()), ids=list(WAYS))


@either
def test_batches_come_and_are_acknowledged_when_the_next_one_is_asked_for(scripted, take):  # noqa: F811
    peer, session = scripted()
    reader, lane, body = read_channel(peer, session, {**TOLD, "first": 3, "more": 1}, request_id="r")
    assert body == {"channel": "levels", "request_id": "r"}
    assert (reader.kernel, reader.outputs, reader.number, reader.notes) == ("k", {"y": SPEC}, 2, {})
    assert repr(reader) == "<strait.ChannelReader 'levels': k -> (y: float64 [4, 2]), batch 2>"
    lane.batch(3, [[1, 2], [3, 4]])
    lane.batch(4)
    y = take(reader)
    assert y.tolist() == [[1, 2], [3, 4]] and y.flags.owndata and y.flags.writeable and y.dtype == np.float64
    assert reader.number == 3 and lane.silent()
    assert take(reader).tolist() == [[1, 2]] and reader.number == 4
    assert lane.acknowledged(3) and lane.silent()
    # Before the next one is asked for, and then not again.
    reader.acknowledge()
    assert lane.acknowledged(4)
    reader.acknowledge()
    reader.acknowledge(3)
    caller = Caller(lambda: take(reader))
    lane.batch(5)
    assert caller.result().tolist() == [[1, 2]] and lane.silent()
    lane.say(Op.LAST, 6, {"notes": [{"key": "k", "text": "t"}]})
    fds = open_fds()
    with pytest.raises((StopIteration, StopAsyncIteration)):
        take(reader)
    # The end is acknowledged at once, and everything is over.
    assert lane.acknowledged(5) and lane.acknowledged(6) and lane.is_over() and open_fds() == fds - 1
    assert (reader.notes, reader.number) == ({"k": "t"}, 5)
    with pytest.raises((StopIteration, StopAsyncIteration)):
        take(reader)
    assert list(reader) == [] and reader.acknowledge() is None
    reader.close()
    assert "ended" in repr(reader)
    assert (session.client_stats().copied_bytes, session.client_stats().calls) == (32 + 16 + 16, 0)
    assert goes_on(peer, session)
    lane.socket.close()


def test_the_loops(scripted):  # noqa: F811
    peer, session = scripted()

    async def asynchronously(reader):
        return [(reader.number, y.tolist()) async for y in reader]

    for loop in (lambda reader: [(reader.number, y.tolist()) for y in reader], lambda reader: asyncio.run(asynchronously(reader))):
        reader, lane, _ = read_channel(peer, session)
        for number in range(1, 6):
            lane.batch(number, [[number, number]])
        lane.say(Op.LAST, 6)
        assert loop(reader) == [(number, [[number, number]]) for number in range(1, 6)]
        assert all(lane.acknowledged(number) for number in range(1, 7)) and lane.is_over()
        # Without a batch, too.
        reader, lane, _ = read_channel(peer, session)
        lane.say(Op.LAST, 1)
        assert loop(reader) == [] and reader.notes == {} and lane.acknowledged(1) and lane.is_over()
        lane.socket.close()


def test_what_is_acknowledged_by_hand(by_hand):
    reader, lane = by_hand
    for number in range(1, 5):
        lane.batch(number)
    for _ in range(3):
        next(reader)
    assert lane.silent()
    with pytest.raises(ValueError, match="batch 4 has not come; the last one is 3"):
        reader.acknowledge(4)
    reader.acknowledge(2)
    assert lane.acknowledged(2)
    for number in (2, 1, 0):
        reader.acknowledge(number)
    assert lane.silent()
    with pytest.raises(TypeError):
        reader.acknowledge("2")
    next(reader)
    lane.say(Op.LAST, 5)
    # The end comes as often as it is asked for, and is acknowledged with the last batch.
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(reader)
    reader.acknowledge(3)
    assert lane.acknowledged(3) and lane.silent()
    reader.acknowledge()
    assert lane.acknowledged(5) and lane.is_over()
    with pytest.raises(StopIteration):
        next(reader)


def test_the_end_is_acknowledged_at_once_when_everything_was(by_hand):
    reader, lane = by_hand
    lane.batch(1)
    next(reader)
    reader.acknowledge()
    lane.say(Op.LAST, 2)
    assert next(reader, None) is None
    assert lane.acknowledged(1) and lane.acknowledged(2) and lane.is_over()


def test_numbers_are_told_modulo_two_to_the_32(scripted):  # noqa: F811
    peer, session = scripted()
    reader, lane, _ = read_channel(peer, session, {**TOLD, "first": 2**32 - 1})
    for sequence in (2**32 - 1, 0, 1):
        lane.batch(sequence)
    for number in range(2**32 - 1, 2**32 + 2):
        next(reader)
        assert reader.number == number
    lane.say(Op.LAST, 2)
    assert list(reader) == []
    assert all(lane.acknowledged(sequence) for sequence in (2**32 - 1, 0, 1, 2))
    lane.socket.close()


def test_several_outputs_come_by_port(scripted):  # noqa: F811
    peer, session = scripted()
    flags = {"port": "f", "dtype": "bool8", "shape": [3], "offset": 192, "length": 3}
    told = {**TOLD, "outputs": [{**PLACE, "offset": 128}, flags], "batch_bytes": 256}
    reader, lane, _ = read_channel(peer, session, told)
    assert list(reader.outputs) == ["y", "f"]
    lane.say(Op.CHUNK, 1, data=sizes(0, 2) + sizes(3) + bytes(64) + bytes([0, 7, 1]).ljust(64, b"\0"))
    lane.say(Op.CHUNK, 2, data=sizes(1, 2) + sizes(0) + np.array([5.0, 6.0]).tobytes().ljust(128, b"\0"))
    first, second = next(reader), next(reader)
    assert first["y"].shape == (0, 2) and first["f"].tolist() == [False, True, True] and first["f"].dtype == bool
    assert second["y"].tolist() == [[5, 6]] and second["f"].shape == (0,)
    reader.close()
    lane.socket.close()


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(kernel=None), "malformed OK to STREAM"),
        (dict(kernel=7), "malformed OK to STREAM"),
        (dict(first=None), "malformed OK to STREAM"),
        (dict(first=0), "counted from 1"),
        (dict(first=-1), "counted from 1"),
        (dict(first=1.5), "malformed OK to STREAM"),
        (dict(first=True), "malformed OK to STREAM"),
        (dict(outputs=None), "malformed OK to STREAM"),
        (dict(outputs=[{}]), "malformed OK to STREAM"),
        (dict(batch_bytes=None), "malformed OK to STREAM"),
        (dict(batch_bytes=64), "64 bytes for 1 ports"),
        (dict(batch_bytes=1 << 40), "bytes for 1 ports"),
        (dict(outputs=[{**PLACE, "dtype": "float80"}]), "'float80' is not known"),
        (dict(outputs=[{**PLACE, "offset": 0}]), "it is at 0"),
        (dict(outputs=[{**PLACE, "length": 8}]), "is not 8 bytes long"),
        (dict(outputs=[{**PLACE, "shape": [-4, 2]}]), "bytes long"),
        (dict(outputs=[{**PLACE, "shape": [], "length": 8}]), "'y' of a channel has no rows"),
        (dict(outputs=[{**PLACE, "offset": 128}, {**PLACE, "offset": 192}], batch_bytes=256), "each once"),
    ],
)
def test_a_host_that_lies_about_a_channel(scripted, wrong, says):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    error, lane, _ = read_channel(peer, session, {**TOLD, **wrong})
    assert type(error) is strait.ProtocolError
    with pytest.raises(strait.ProtocolError, match=says):
        raise error
    assert lane.is_over()
    lane.socket.close()
    assert open_fds() == before and goes_on(peer, session)


@pytest.mark.parametrize("fds, sock, says", [(0, socket.SOCK_SEQPACKET, "0 descriptors"), (2, socket.SOCK_SEQPACKET, "2 descriptors"), (1, socket.SOCK_STREAM, "another kind")])
def test_a_channel_brings_one_socket(scripted, fds, sock, says):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    error, lane, _ = read_channel(peer, session, fds=fds, sock=sock)
    with pytest.raises(strait.ProtocolError, match=says):
        raise error
    lane.socket.close()
    assert open_fds() == before and goes_on(peer, session)


WIDER = payload([[1, 2]], shape=(1, 1))


@either
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    "op, number, reply, says",
    [
        (Op.CHUNK, 0, dict(data=payload([[1, 2]])), "sequence {before} where batch"),
        (Op.CHUNK, 2, dict(data=payload([[1, 2]])), "where batch {next} comes next"),
        (Op.LAST, 0, {}, "where batch {next} comes next"),
        (Op.LAST, 2, {}, "where batch {next} comes next"),
        (Op.ERROR, 1, dict(body=FAILURE), "of op 4"),
        (Op.OK, 1, {}, "of op 3"),
        (Op.OK, 1, dict(data=payload([[1, 2]])), "of op 3"),
        (Op.CALL, 1, dict(data=payload([[1, 2]])), "of op 19"),
        (Op.WELCOME, 1, {}, "of op 2"),
        (Op.LAST, 1, dict(data=payload([[1, 2]])), "of op 67 with 128 bytes"),
        (Op.LAST, 1, dict(body={"notes": 7}), "malformed notes"),
        (Op.LAST, 1, dict(body={"notes": [{"key": "k"}]}), "malformed notes"),
        (Op.CHUNK, 1, {}, "0 bytes where 128"),
        (Op.CHUNK, 1, dict(data=payload([[1, 2]])[:-8]), "120 bytes where 128"),
        (Op.CHUNK, 1, dict(data=payload([[1, 2]]) + bytes(64)), "192 bytes where 128"),
        (Op.CHUNK, 1, dict(data=payload([[1, 2]]), body={"notes": []}), "188 in all"),
        # As long as it should be.
        (Op.CHUNK, 1, dict(data=payload([[1, 2]])[:-8], body={"p": ""}), "120 bytes where 128"),
        (Op.CHUNK, 1, dict(data=payload(NONE)), "without rows"),
        (Op.CHUNK, 1, dict(data=payload(NONE, shape=(5, 2))), "'y' has the sizes"),
        (Op.CHUNK, 1, dict(data=payload(NONE, shape=(2**63, 2))), "'y' has the sizes"),
        (Op.CHUNK, 1, dict(data=payload(NONE, shape=(4, 2, 1))), "'y' has the sizes"),
        (Op.CHUNK, 1, dict(data=payload(NONE, shape=(4, 3))), "'y' has the sizes"),
        (Op.CHUNK, 1, dict(data=WIDER), "shape .1, 1.; but for its rows it is .4, 2."),
        (Op.CHUNK, 1, dict(data=payload([[1, 2]]), fds=True), "brings descriptors"),
        (Op.CHUNK, 1, dict(data=bytes(131072), body={"pad": "x" * 61000}), "longer than was said"),
        (None, 0, b"rubbish", "frame that starts with"),
        (None, 0, b"S", "a frame of 1 bytes"),
        (None, 0, b"ST\x09" + bytes(45), "version 9"),
    ],
)
def test_what_is_no_batch_ends_it_and_nothing_else(ready, take, before, op, number, reply, says):
    peer, session, reader, lane = ready
    fds = open_fds()
    for index in range(before):
        lane.batch(index + 1)
        take(reader)
    if op is None:
        lane.socket.send(reply)
    elif "fds" in reply:
        with open("/proc/self/stat") as file:
            lane.say(op, before + number, data=reply["data"], fds=[file.fileno()])
    else:
        lane.say(op, before + number, **reply)
    for _ in range(2):
        with pytest.raises(strait.ProtocolError, match=says.format(before=before, next=before + 1)) as caught:
            take(reader)
        assert "the reply to STREAM" in str(caught.value)
        caught = None
    assert reader.number == before
    assert open_fds() == fds - 1 and all(lane.acknowledged(index + 1) for index in range(before)) and lane.is_over()
    with pytest.raises(strait.ProtocolError):
        reader.acknowledge()
    assert goes_on(peer, session)


@either
@pytest.mark.parametrize("before", [0, 1])
def test_why_no_more_comes_is_told(ready, take, before):
    peer, session, reader, lane = ready
    fds = open_fds()
    for index in range(before):
        lane.batch(index + 1)
    lane.say(Op.ERROR, 0, FAILURE)
    # It has ended there, so an acknowledgement does not arrive.
    lane.socket.shutdown(socket.SHUT_RD)
    for _ in range(before):
        assert take(reader).tolist() == [[1, 2]]
    with pytest.raises(strait.RemoteError) as caught:
        take(reader)
    assert (caught.value.code, caught.value.reason, caught.value.details) == ("UNAVAILABLE", "PRODUCER_LOST", {"chunk": 7})
    assert open_fds() == fds - 1 and reader.number == before
    with pytest.raises(strait.DisconnectedError, match="the channel 'levels' has failed"):
        take(reader)
    with pytest.raises(strait.DisconnectedError):
        reader.acknowledge()
    assert goes_on(peer, session)


@either
def test_why_no_more_comes_is_told_by_a_host_that_left_acknowledgements_unread(ready, take):
    _, _, reader, lane = ready
    lane.batch(1)
    take(reader)
    reader.acknowledge()
    lane.batch(2)
    lane.say(Op.ERROR, 0, FAILURE)
    # Linux tells of what was not read before it hands on what was sent.
    lane.socket.close()
    assert take(reader).tolist() == [[1, 2]]
    with pytest.raises(strait.RemoteError, match="PRODUCER_LOST"):
        take(reader)


@either
def test_an_end_without_a_word_is_a_host_that_ended(ready, take):
    peer, session, reader, lane = ready
    caller = Caller(lambda: take(reader))
    time.sleep(0.05)
    lane.socket.close()
    assert type(caller.result()) is strait.DisconnectedError and "ended the channel 'levels'; read it again" in str(caller.outcome)
    with pytest.raises(strait.DisconnectedError):
        take(reader)
    assert goes_on(peer, session)


@either
@pytest.mark.parametrize("who", ["close", "session"])
@pytest.mark.parametrize("waits", [False, True])
def test_it_ends_with_whoever_has_it(ready, take, who, waits):
    _, session, reader, lane = ready
    before = open_fds()
    lane.batch(1)
    take(reader)
    caller = Caller(lambda: take(reader)) if waits else None
    if waits:
        assert lane.acknowledged(1)
        time.sleep(0.05)
    reader.close() if who == "close" else session.close()
    if waits:
        assert type(caller.result()) is strait.DisconnectedError and "closed" in str(caller.outcome)
    with pytest.raises(strait.DisconnectedError, match="closed"):
        take(reader)
    reader.close()
    assert lane.is_over() and open_fds() == before - (1 if who == "close" else 2)


def test_one_that_nobody_holds_ends(scripted):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    reader, lane, _ = read_channel(peer, session)
    del reader
    gc.collect()
    assert lane.is_over()
    lane.socket.close()
    reader, lane, _ = read_channel(peer, session)
    with reader as same:
        assert same is reader
    assert lane.is_over()
    lane.socket.close()
    assert open_fds() == before and goes_on(peer, session)


def test_an_interrupt_ends_the_wait_and_nothing_else(ready):
    peer, session, reader, lane = ready
    lane.batch(1)
    assert next(reader).tolist() == [[1, 2]]
    waits = threading.Event()

    def host():
        assert lane.acknowledged(1)
        # One that comes just before a thread begins to wait is noticed only after that.
        while not waits.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            waits.wait(0.2)

    caller = Caller(host)
    with pytest.raises(KeyboardInterrupt):
        next(reader)
    while not waits.is_set():
        try:
            waits.set()
        except KeyboardInterrupt:
            pass
    caller.result()
    assert reader.number == 1
    lane.batch(2, [[3, 4]])
    assert next(reader).tolist() == [[3, 4]] and reader.number == 2
    reader.acknowledge()
    assert lane.acknowledged(2) and lane.silent()
    assert goes_on(peer, session)


def test_a_cancelled_task_leaves_it_usable(ready):
    _, _, reader, lane = ready
    fds = open_fds()
    beats = []

    async def beat():
        while True:
            beats.append(1)
            await asyncio.sleep(0.001)

    async def run():
        other = asyncio.ensure_future(beat())
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext_of(reader), 0.03)
            assert reader.number == 0
        task = asyncio.ensure_future(anext_of(reader))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(anext_of(reader))
        with pytest.raises(RuntimeError, match="another task waits"):
            await second
        lane.batch(1, [[5, 6]])
        assert (await task).tolist() == [[5, 6]]
        # Other tasks ran all the while.
        assert len(beats) > 20
        # Closed under a task that waits, which then leaves nothing with the event loop.
        task = asyncio.ensure_future(anext_of(reader))
        await asyncio.sleep(0.01)
        reader.close()
        with pytest.raises(strait.DisconnectedError, match="closed"):
            await task
        other.cancel()

    threads = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() == threads
    assert lane.acknowledged(1) and lane.is_over() and open_fds() == fds - 1


def test_closed_and_cancelled_at_once(ready):
    _, _, reader, lane = ready
    fds = open_fds()

    async def run():
        task = asyncio.ensure_future(anext_of(reader))
        await asyncio.sleep(0.01)
        reader.close()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert lane.is_over() and open_fds() == fds - 1


def test_a_fast_producer_leaves_other_tasks_their_turn(ready):
    _, _, reader, lane = ready
    for number in range(1, 51):
        lane.batch(number)
    lane.say(Op.LAST, 51)
    turns = []

    async def beat():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async def run():
        other = asyncio.ensure_future(beat())
        assert len([y async for y in reader]) == 50
        other.cancel()

    asyncio.run(run())
    assert len(turns) >= 50


def test_an_acknowledgement_never_waits(scripted):  # noqa: F811
    peer, session = scripted()
    reader, lane, _ = read_channel(peer, session, automatic=False)
    reader._lane._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    # The host takes none of them.
    for number in range(1, 101):
        lane.batch(number)
        next(reader)
        reader.acknowledge()
    sequence = 0
    while not lane.silent():
        sequence += 1
        assert lane.acknowledged(sequence)
    assert 0 < sequence < 100
    # The next one says it, too.
    reader.acknowledge()
    assert lane.acknowledged(100) and lane.silent()
    lane.socket.close()


def test_it_belongs_to_its_process(ready):
    _, _, reader, lane = ready
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(reader)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            reader.close()
            for use in (lambda: next(reader), reader.acknowledge, lambda: asyncio.run(anext_of(reader))):
                try:
                    use()
                except strait.ForkedError as error:
                    os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert os.read(reading, 10000).decode().count("is a fork") == 3
    os.close(reading)
    lane.batch(1)
    assert next(reader).tolist() == [[1, 2]]


def test_an_interrupt_before_the_channel_is_there_leaves_it(scripted):  # noqa: F811
    peer, session = scripted()
    before = open_fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def host():
        sequence, _ = peer.expect(Op.STREAM)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        peer.say(Op.OK, sequence, TOLD, [ours.fileno()])
        ours.close()

    caller = Caller(host)
    with pytest.raises(KeyboardInterrupt):
        session.read_channel("levels")
        # It may come after the answer.
        time.sleep(1)
    caller.result()
    theirs.settimeout(20)
    gc.collect()
    assert theirs.recv(1) == b""
    theirs.close()
    assert open_fds() == before


@pytest.mark.parametrize(
    "channel, body",
    [
        ("levels", {"name": "levels"}),
        (strait.ChannelOptions("levels"), {"name": "levels"}),
        (strait.ChannelOptions("l", batches=3, wait=0.0015, resume=60), {"name": "l", "batches": 3, "wait_ms": 2, "resume_ms": 60000}),
        (strait.ChannelOptions("l", resume=0), {"name": "l"}),
        (strait.ChannelOptions("l", batches=np.int64(2)), {"name": "l", "batches": 2}),
    ],
)
def test_what_is_asked_of_a_producers_channel(scripted, channel, body):  # noqa: F811
    peer, session = scripted()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller = Caller(lambda: session.prepare_stream("k", inputs={"x": SPEC}, channel=channel))
    sequence, asked = peer.expect(Op.PREPARE)
    assert asked == {"kernel": "k", "stream": True, "channel": body, "inputs": {"x": {"dtype": "float64", "shape": [4, 2]}}}
    told = {"prepared": 3, "request_bytes": 128, "inputs": [{**PLACE, "port": "x"}], "reply_bytes": 0, "outputs": []}
    peer.say(Op.OK, sequence, told, [ours.fileno()])
    ours.close()
    stream, lane = caller.result(), Lane(theirs)
    assert stream.outputs == {}
    for op, send in ((Op.CHUNK, lambda: stream.chunk(np.ones((2, 2)))), (Op.LAST, stream.last)):
        caller = Caller(send)
        got, sequence, _, _ = _wire.decode(lane.socket.recv(_wire.FRAME_BYTES_MAX))
        assert got == op
        lane.say(Op.OK, sequence)
        assert caller.result() == {}
    # Nothing can follow.
    assert theirs.recv(1) == b""
    with pytest.raises(strait.DisconnectedError, match="the stream of k is over; prepare another one"):
        stream.chunk(np.ones((2, 2)))
    stream.close()
    theirs.close()


@pytest.mark.parametrize(
    "channel, error, says",
    [
        (7, TypeError, "channel is int"),
        ({"name": "levels"}, TypeError, "channel is dict"),
        (strait.ChannelOptions("l", wait=0), ValueError, "0 s: a time must be positive"),
        (strait.ChannelOptions("l", resume=-1), ValueError, "-1 s"),
        (strait.ChannelOptions("l", batches=2.5), TypeError, "float"),
    ],
)
def test_options_that_are_none(scripted, channel, error, says):  # noqa: F811
    peer, session = scripted()
    with pytest.raises(error, match=says):
        session.prepare_stream("k", inputs={"x": SPEC}, channel=channel)
    assert goes_on(peer, session)


# Against a real host


def told(work, reason):
    """The error of that reason that `work` raises."""
    with pytest.raises(strait.RemoteError) as caught:
        work()
    assert caught.value.reason == reason, caught.value
    return caught.value


def settled(wanted):
    until = time.monotonic() + 20
    while not wanted():
        assert time.monotonic() < until
        time.sleep(0.01)
    return True


class Program:
    """Another process with a session of its own; what it prints is read line by line."""

    def __init__(self, address, source):
        program = "import asyncio, os, sys, time, numpy as np, strait\ns = strait.connect(sys.argv[1])\n" + textwrap.dedent(source)
        path = str(Path(strait.__file__).resolve().parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-uc", program, address], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.stdout.close()


@pytest.fixture
def other(address):
    with strait.connect(address) as other:
        yield other


def cut(x, seed):
    """Chunks of x, some of them without rows."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(x) + 1, 12))
    return np.split(x, [0, *cuts, len(x)])


def joined(batches):
    if isinstance(batches[0], dict):
        return {port: np.concatenate([batch[port] for batch in batches]) for port in batches[0]}
    return {"y": np.concatenate(batches)}


@either
@pytest.mark.parametrize("early", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "kernel, parameters", [("cumsum", {}), ("filter-finite", {}), ("histogram", dict(bins=6, lo=-2.0, hi=2.0)), ("rolling-mean", dict(window=5))]
)
def test_what_one_session_writes_another_reads(session, other, take, early, kernel, parameters):
    seed = np.random.randint(2**31)
    print("seed", seed)
    width = () if kernel == "filter-finite" else (3,)
    x = np.random.default_rng(seed).normal(size=(500, *width))
    x[np.random.default_rng(seed).random(x.shape) < 0.1] = np.nan
    result = session.call(kernel, x, **parameters)
    expected = {port: y.numpy() for port, y in (result.items() if isinstance(result, strait.Arrays) else [("y", result)])}
    stream = session.prepare_stream(kernel, strait.Spec("float64", (16, *width)), channel=strait.ChannelOptions("levels", batches=3), **parameters)
    assert stream.outputs == {}
    reader = other.read_channel("levels") if early else None
    *chunks, last = cut(x, seed)
    caller = Caller(lambda: [stream.chunk(chunk) for chunk in chunks] + [stream.last(last)])
    reader = reader or other.read_channel("levels")
    assert reader.kernel == kernel and list(reader.outputs) == list(expected)
    came = []
    try:
        while True:
            came.append(take(reader))
            assert reader.number == len(came)
    except (StopIteration, StopAsyncIteration):
        pass
    assert caller.result() == [{}] * (len(chunks) + 1)
    for port, y in joined(came).items():
        assert y.dtype == expected[port].dtype and y.tobytes() == expected[port].tobytes()
    assert reader.notes == stream.notes == result.info.notes
    # There is no next stream over the same socket.
    with pytest.raises(strait.DisconnectedError):
        stream.chunk(x[:1])
    told(lambda: other.read_channel("levels"), "CHANNEL_NOT_FOUND")


def test_a_stream_of_an_iterable_feeds_a_channel(session, other):
    x = np.arange(30.0)
    caller = Caller(lambda: list(session.stream("cumsum", np.array_split(x, 3), channel="levels")))
    settled(lambda: [channel["name"] for channel in other.stats()["channels"]] == ["levels"])
    assert np.array_equal(np.concatenate(list(other.read_channel("levels"))), np.cumsum(x))
    assert caller.result() == [{}] * 4


def test_a_full_channel_holds_its_producer_up_and_drops_nothing(session, other):
    stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("levels", batches=2))
    reader = other.read_channel("levels", automatic=False)
    for _ in range(2):
        stream.chunk([1.0])
    third = Caller(lambda: stream.chunk([1.0]))
    third.join(0.2)
    assert third.is_alive()
    (stats,) = other.stats()["channels"]
    assert (stats["name"], stats["kernel"], stats["batches"], stats["lag_batches"], stats["is_read"]) == ("levels", "cumsum", 2, 2, True)
    assert [next(reader).tolist() for _ in range(2)] == [[1.0], [2.0]]
    third.join(0.1)
    assert third.is_alive(), "nothing was acknowledged"
    reader.acknowledge(1)
    assert third.result() == {}
    reader.acknowledge()
    end = Caller(stream.last)
    assert [batch.tolist() for batch in reader] == [[3.0]]
    end.join(0.1)
    assert end.is_alive(), "the end is acknowledged with the last batch"
    reader.acknowledge()
    assert end.result() == {}


def test_names_and_turns(session, other):
    with session.prepare_stream("cumsum", strait.Spec("float64", 4), channel="levels"):
        error = told(lambda: session.prepare_stream("cumsum", strait.Spec("float64", 4), channel="levels"), "NAME_TAKEN")
        assert error.code == "ALREADY_EXISTS"
        with other.read_channel("levels"):
            error = told(lambda: session.read_channel("levels", request_id="mine"), "WRONG_STATE")
            assert (error.code, error.request_id) == ("FAILED_PRECONDITION", "mine")
        told(lambda: session.read_channel("level"), "CHANNEL_NOT_FOUND")
    for wrong in ("", "a#b"):
        told(lambda: session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=wrong), "BAD_NAME")
    told(lambda: session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("l", batches=0)), "BAD_REQUEST")
    settled(lambda: session.stats()["channels"] == [])


PRODUCES = """
    stream = s.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("levels", batches=2, resume={resume}))
    print("ready")
    for n in range({chunks}):
        stream.chunk([1.0])
        print(n)
    {end}
"""


@either
def test_a_producer_that_is_killed_is_told_of_at_once(session, address, take):
    with Program(address, PRODUCES.format(resume=None, chunks=2, end="time.sleep(60)")) as producer:
        assert producer.line() == "ready"
        reader = session.read_channel("levels")
        assert [take(reader).tolist() for _ in range(2)] == [[1.0], [2.0]]
        waits = Caller(lambda: take(reader))
        time.sleep(0.1)
        begin = time.monotonic()
        producer.kill()
        error = waits.result()
        assert time.monotonic() - begin < 5
        assert (error.code, error.reason) == ("UNAVAILABLE", "PRODUCER_LOST")


def test_what_came_before_its_producers_end_comes(session, address):
    with Program(address, PRODUCES.format(resume=None, chunks=2, end="time.sleep(60)")) as producer:
        assert [producer.line() for _ in range(3)] == ["ready", "0", "1"]
        reader = session.read_channel("levels")
        producer.kill()
        assert [next(reader).tolist() for _ in range(2)] == [[1.0], [2.0]]
        told(lambda: next(reader), "PRODUCER_LOST")


@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_reader_that_leaves_is_told_of_at_once(session, address, how):
    reads = """
        channel = s.read_channel("levels")
        next(channel)
        print("came")
        time.sleep({seconds})
        channel.close()
        time.sleep(60)
    """
    stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("levels", batches=1))
    with Program(address, reads.format(seconds=0.3 if how == "close" else 60)) as reader:
        stream.chunk([1.0])
        assert reader.line() == "came"
        waits = Caller(lambda: stream.chunk([1.0]))
        time.sleep(0.1)
        begin = time.monotonic()
        if how == "kill":
            reader.kill()
        error = waits.result()
        assert time.monotonic() - begin < 5
        assert (error.code, error.reason, error.details["chunk"]) == ("UNAVAILABLE", "CONSUMER_LOST", 1)
        with pytest.raises(strait.DisconnectedError):
            stream.last()


def test_a_reader_that_comes_back_goes_on_where_it_had_acknowledged(session, address):
    with Program(address, PRODUCES.format(resume=60, chunks=6, end="stream.last(); print('read')")) as producer:
        assert producer.line() == "ready"
        # One that is killed: the batch that it was at comes again.
        with Program(address, "c = s.read_channel('levels')\nfor n in range(3): next(c)\nprint(c.number)\ntime.sleep(60)") as first:
            assert first.line() == "3"
            first.kill()
        reader = session.read_channel("levels", automatic=False)
        assert reader.number == 2
        assert next(reader).tolist() == [3.0] and reader.number == 3
        reader.acknowledge()
        assert next(reader).tolist() == [4.0]
        reader.close()
        # In a task, over another session, after that one was closed.
        with strait.connect(address) as again:

            async def rest():
                with again.read_channel("levels") as channel:
                    assert channel.number == 3
                    return [(channel.number, batch.tolist()) async for batch in channel]

            assert asyncio.run(rest()) == [(4, [4.0]), (5, [5.0]), (6, [6.0])]
        assert [producer.line() for _ in range(7)] == [*map(str, range(6)), "read"]


def test_a_kernel_that_fails_in_the_middle_tells_both(session, other):
    # It keeps as many rows as its window has, and may not.
    options = dict(window=10**6, limits={"guest_bytes": 4 << 20}, channel=strait.ChannelOptions("levels", batches=4))
    stream = session.prepare_stream("rolling-mean", strait.Spec("float64", 4096), **options)
    caller = Caller(lambda: [stream.chunk(np.ones(4096)) for _ in range(1000)])
    reader = other.read_channel("levels")
    came = []
    with pytest.raises(strait.RemoteError) as caught:
        for batch in reader:
            assert batch.shape == (4096,) and np.isnan(batch).all()
            came.append(reader.number)
    mine, theirs = caller.result(), caught.value
    assert came == list(range(1, len(came) + 1)) and len(came) > 10
    assert (mine.code, mine.reason, mine.details["chunk"]) == (theirs.code, theirs.reason, theirs.details["chunk"])
    assert theirs.reason in ("LIMIT_GUEST_BYTES", "KERNEL_FAILED") and theirs.details["chunk"] == len(came)
    for end in (lambda: next(reader), lambda: stream.chunk([1.0])):
        with pytest.raises(strait.DisconnectedError, match="has failed"):
            end()


@pytest.mark.parametrize("is_read", [False, True])
def test_a_producer_waits_no_longer_than_it_said(session, other, is_read):
    stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("levels", batches=1, wait=0.15))
    reader = other.read_channel("levels") if is_read else None
    stream.chunk([1.0])
    error = told(lambda: stream.chunk([1.0]), "DEADLINE")
    assert error.code == "DEADLINE_EXCEEDED" and error.details["chunk"] == 1
    if reader is not None:
        next(reader)
        assert told(lambda: next(reader), "DEADLINE").details["chunk"] == 1


def test_an_interrupt_of_a_producer_that_waits_is_told(session, other):
    stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("levels", batches=1))
    reader = other.read_channel("levels")
    stream.chunk([1.0])
    over = threading.Event()

    def interrupts():
        while not over.wait(0.2):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    caller = Caller(interrupts)
    with pytest.raises(KeyboardInterrupt):
        try:
            stream.chunk([1.0])
        finally:
            over.set()
    caller.result()
    assert next(reader).tolist() == [1.0]
    with pytest.raises(strait.RemoteError) as caught:
        next(reader)
    assert caught.value.reason in ("CANCELLED", "PRODUCER_LOST")


def test_a_storm_of_interrupts_loses_no_batch_and_repeats_none(notebook, spinning):  # noqa: F811
    notebook = notebook(
        """
        import signal
        s = strait.connect(sys.argv[1])
        armed = False

        def interrupt(*_):
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        channel = s.read_channel("storm")
        print("ready", flush=True)
        came, interrupts = [], 0
        while True:
            try:
                armed = True
                for batch in channel:
                    armed = False
                    came.append((channel.number, batch[0]))
                    armed = True
                break
            except KeyboardInterrupt:
                interrupts += 1
        armed = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(interrupts > 0, came == [(n, float(n)) for n in range(1, len(came) + 1)], len(came), flush=True)
        """,
    )
    with strait.connect(spinning) as session:
        stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel=strait.ChannelOptions("storm", batches=4))
        assert notebook.line() == "ready"
        begin, over = time.monotonic(), threading.Event()

        def interrupts():
            while not over.wait(0.002):
                notebook.interrupt()

        caller = Caller(interrupts)
        chunks = 0
        while time.monotonic() < begin + 2:
            stream.chunk([1.0])
            chunks += 1
            if chunks % 64 == 0:
                time.sleep(0.01)
        stream.last()
        over.set()
        caller.result()
    assert notebook.end() == f"True True {chunks}"


def test_nothing_is_left_on_the_host():
    def reads(session, other, stream):
        with other.read_channel("levels") as reader:
            next(reader)
            next(reader)

    def ends(session, other, stream):
        caller = Caller(stream.last)
        list(other.read_channel("levels"))
        caller.result()

    def forgets(session, other, stream):
        next(other.read_channel("levels"))

    def cancels(session, other, stream):
        async def run():
            reader = other.read_channel("levels")
            next(reader), next(reader)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext_of(reader), 0.02)

        asyncio.run(run())

    def closes(session, other, stream):
        other.read_channel("levels")
        stream.close()

    def nobody(session, other, stream):
        pass

    with tempfile.TemporaryDirectory(prefix="strait-python-") as directory:
        host = serve(directory)
        address = next(host)
        with strait.connect(address) as session, strait.connect(address) as other:
            for ended in (reads, ends, forgets, cancels, closes, nobody):
                gc.collect()
                fds = open_fds()
                stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel="levels")
                stream.chunk([1.0])
                stream.chunk([1.0])
                ended(session, other, stream)
                del stream
                gc.collect()
                assert open_fds() == fds, ended

                def left():
                    stats = session.stats()
                    return {key: stats["account"][key] for key in ("connections", "bytes", "leases", "running", "queued")}, stats["channels"]

                settled(lambda: left() == ({"connections": 2, "bytes": 0, "leases": 0, "running": 0, "queued": 0}, []))
            # A host that ends is told apart, with what it says before.
            stream = session.prepare_stream("cumsum", strait.Spec("float64", 4), channel="levels")
            reader = other.read_channel("levels")
            stream.chunk([1.0])
            next(reader)
            assert next(host, None) is None
            with pytest.raises((strait.DisconnectedError, strait.RemoteError)) as caught:
                next(reader)
            assert getattr(caught.value, "reason", "PRODUCER_LOST") == "PRODUCER_LOST"
            with pytest.raises(strait.DisconnectedError):
                next(reader)
