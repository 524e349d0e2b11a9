"""The connection against a scripted peer on the other end of a socket pair."""

import array
import gc
import os
import select
import signal
import socket
import threading
import time

import pytest

import strait
from strait import _wire
from strait._connection import Connection
from strait._session import Session
from strait._wire import Op

GRANT = {"lease": 7, "expires_ms": 60000}


class Peer:
    """Plays the host."""

    def __init__(self, sock):
        self.socket = sock
        self.socket.settimeout(20)

    def expect(self, op):
        """The next request, which must have this op: its sequence and body."""
        got, sequence, body, self.payload = _wire.decode(self.socket.recv(_wire.FRAME_BYTES_MAX))
        assert got == op, (got, body)
        return sequence, body

    def say(self, op, sequence, body, fds=(), payload=b""):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([_wire.encode(op, sequence, body, payload=payload)], rights)

    def answer(self, op, body, fds=()):
        sequence, asked = self.expect(op)
        self.say(Op.OK, sequence, body, fds)
        return asked


@pytest.fixture
def peer_and_connection():
    yield from pair(renew=True)


def pair(renew):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(theirs)
    peer_hello = threading.Thread(target=lambda: peer.say(Op.WELCOME, peer.expect(Op.HELLO)[0], {"host_id": "h"}))
    peer_hello.start()
    connection = Connection(ours, "test/1", renew)
    peer_hello.join()
    yield peer, connection
    connection.close()
    theirs.close()


@pytest.fixture
def peer(peer_and_connection):
    return peer_and_connection[0]


@pytest.fixture
def connection(peer_and_connection):
    return peer_and_connection[1]


class Caller(threading.Thread):
    """A request on a thread of its own."""

    def __init__(self, work):
        super().__init__()
        self._work = work
        self.outcome = None
        self.start()

    def run(self):
        try:
            self.outcome = self._work()
        except BaseException as error:
            self.outcome = error

    def result(self):
        self.join(20)
        assert not self.is_alive()
        return self.outcome


def goes_on(peer, session):
    ping = Caller(session.ping)
    peer.answer(Op.PING, {})
    return ping.result() is None


@pytest.fixture
def scripted():
    """Makes a session whose host is a `Peer`."""
    made = []

    def make(send_buffer_bytes=None, **welcome):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if send_buffer_bytes is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        peer = Peer(theirs)
        hello = threading.Thread(target=lambda: peer.say(Op.WELCOME, peer.expect(Op.HELLO)[0], welcome))
        hello.start()
        session = Session(Connection(ours, "test/1", True), None)
        hello.join()
        made.append((session, theirs))
        return peer, session

    yield make
    for session, theirs in made:
        session.close()
        theirs.close()


def interrupt_main_thread(peer):
    """As Ctrl-C does, until it shows: one that comes just before a thread begins to wait is noticed only after that."""
    while True:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if select.select([peer.socket], [], [], 1)[0]:
            return


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def test_replies_find_their_callers_in_any_order(peer, connection):
    callers = [Caller(lambda n=n: connection.call(Op.LOOKUP, {"name": n})) for n in range(8)]
    asked = [peer.expect(Op.LOOKUP) for _ in callers]
    for sequence, body in reversed(asked):
        fd = os.open(f"/proc/self/{'stat' if body['name'] % 2 else 'maps'}", os.O_RDONLY)
        peer.say(Op.OK, sequence, {"name": body["name"]}, [fd])
        os.close(fd)
    for n, caller in enumerate(callers):
        reply = caller.result()
        assert reply.body["name"] == n
        (fd,) = reply.fds
        assert os.readlink(f"/proc/self/fd/{fd}").endswith("stat" if n % 2 else "maps")
        assert not os.get_inheritable(fd)
        reply.close()


def test_errors_are_the_hosts_words(peer, connection):
    caller = Caller(lambda: connection.call(Op.LOOKUP, {"name": "x"}))
    failure = {"code": "NOT_FOUND", "reason": "FLIGHT_NOT_FOUND", "message": "no x", "request_id": "r", "backtrace": "b"}
    peer.say(Op.ERROR, peer.expect(Op.LOOKUP)[0], failure)
    error = caller.result()
    assert type(error) is strait.NotFoundError and isinstance(error, KeyError)
    assert (error.code, error.reason, error.message, error.request_id, error.backtrace) == tuple(failure.values())
    assert str(error) == "no x [NOT_FOUND FLIGHT_NOT_FOUND, request r]\nb"

    caller = Caller(lambda: connection.call(Op.RENEW, {"leases": [1]}))
    peer.say(Op.ERROR, peer.expect(Op.RENEW)[0], {"code": "FAILED_PRECONDITION", "reason": "LEASE_EXPIRED"})
    assert type(caller.result()) is strait.LeaseExpiredError


def test_the_end_reaches_every_caller(peer, connection):
    callers = [Caller(lambda: connection.call(Op.PING, {})) for _ in range(4)]
    for _ in callers:
        peer.expect(Op.PING)
    peer.socket.close()
    assert all(type(caller.result()) is strait.DisconnectedError for caller in callers)
    with pytest.raises(strait.DisconnectedError):
        connection.call(Op.PING, {})


def test_close_wakes_who_waits(peer, connection):
    callers = [Caller(lambda: connection.call(Op.PING, {})) for _ in range(3)]
    for _ in callers:
        peer.expect(Op.PING)
    connection.close()
    assert all(type(caller.result()) is strait.DisconnectedError for caller in callers)


@pytest.mark.parametrize("frame", [b"rubbish", b"ST\x02\x03\x01\0\0\0\x02" + bytes(39) + b"[]", b"x" * 70000])
def test_a_frame_that_is_none_ends_the_connection(peer, connection, frame):
    before = open_fds()
    caller = Caller(lambda: connection.call(Op.PING, {}))
    peer.expect(Op.PING)
    peer.socket.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    assert type(caller.result()) is strait.ProtocolError
    # The socket itself is closed, and so is the descriptor that came with the frame.
    assert open_fds() == before - 1


def test_an_end_announced_before_its_lease_is_known_counts(peer, connection):
    peer.say(Op.GONE, 0, {"lease": 7, "segment": "s", "reason": "expired"})
    connection.look()
    connection.hold(7, 60000)
    with pytest.raises(strait.LeaseExpiredError, match="lease 7 is over .expired"):
        connection.check_lease(7)
    connection.hold(8, 60000)
    connection.check_lease(8)
    peer.say(Op.GONE, 0, {"lease": 8, "segment": "s", "reason": "expired"})
    with pytest.raises(strait.LeaseExpiredError):
        # The keeper may be receiving just now, and then takes it in a moment later.
        for _ in range(1000):
            connection.check_lease(8)
            time.sleep(0.01)


def test_the_host_says_why_it_closes(peer, connection):
    refusal = {"code": "PERMISSION_DENIED", "reason": "PRINCIPAL", "message": "who are you", "request_id": "r"}
    peer.say(Op.ERROR, 0, refusal)
    peer.socket.close()
    for _ in range(2):
        with pytest.raises(strait.RemoteError, match="who are you .PERMISSION_DENIED PRINCIPAL, request r."):
            connection.call(Op.PING, {})


def test_a_shutdown_is_announced(peer, connection):
    assert connection.draining is None
    peer.say(Op.SHUTDOWN, 0, {"drain_ms": 5000})
    assert 0 < connection.draining <= 5


def test_leases_are_renewed_together_before_they_end(peer, connection):
    connection.hold(1, 400)
    connection.hold(2, 400)
    start = time.monotonic()
    sequence, body = peer.expect(Op.RENEW)
    assert (sorted(body["leases"]), body["lease_ms"]) == ([1, 2], 400)
    assert time.monotonic() - start < 0.4
    # One of them is over: each is asked for alone.
    expired = {"code": "FAILED_PRECONDITION", "reason": "LEASE_EXPIRED", "message": "lease 2 expired"}
    peer.say(Op.ERROR, sequence, expired)
    for _ in range(2):
        sequence, body = peer.expect(Op.RENEW)
        if body["leases"] == [1]:
            peer.say(Op.OK, sequence, {"expires_ms": 60000})
        else:
            peer.say(Op.ERROR, sequence, expired)
    until = time.monotonic() + 20
    while connection.expires_in(2) and time.monotonic() < until:
        time.sleep(0.01)
    assert connection.expires_in(1) > 30
    with pytest.raises(strait.LeaseExpiredError):
        connection.check_lease(2)


def test_without_renewal_nothing_is_renewed():
    for peer, connection in pair(renew=False):
        connection.hold(1, 50)
        time.sleep(0.2)
        connection.drop([1])
        peer.answer(Op.RELEASE, {"released": 0})


def test_dropped_leases_go_together(peer, connection):
    for lease in range(5):
        connection.drop([lease])
    assert peer.answer(Op.RELEASE, {"released": 5}) == {"leases": [0, 1, 2, 3, 4]}


def test_large_segments_go_back_before_the_next_request(peer, connection):
    connection.drop([3], 100 << 20)
    caller = Caller(lambda: connection.call(Op.PING, {}))
    assert peer.answer(Op.RELEASE, {"released": 1}) == {"leases": [3]}
    peer.answer(Op.PING, {})
    assert caller.result().op == Op.OK


def test_an_interrupt_cancels_the_call_and_gives_its_results_back(peer, connection):
    before = open_fds()
    session = Session(connection, None)

    def host():
        invoked, _ = peer.expect(Op.INVOKE)
        interrupt_main_thread(peer)
        cancel, body = peer.expect(Op.CANCEL)
        assert body == {"sequence": invoked}
        with open("/proc/self/stat") as file:
            # It was too late.
            peer.say(Op.OK, invoked, {"results": [{"port": "y", **GRANT, "fd": 0}]}, [file.fileno()])
        peer.say(Op.OK, cancel, {"cancelled": False})
        return peer.answer(Op.RELEASE, {"released": 1})

    caller = Caller(host)
    with pytest.raises(KeyboardInterrupt):
        session.call("k", inputs={"x": "flight"})
    assert caller.result() == {"leases": [7]}
    assert open_fds() == before
    ping = Caller(lambda: connection.call(Op.PING, {}))
    peer.answer(Op.PING, {})
    assert ping.result().op == Op.OK


def test_an_interrupt_ends_the_wait_whatever_its_handler_asks_for(peer, connection):
    """As after polars, whose handler lets Linux go on with what it was doing."""

    session = Session(connection, None)

    def host():
        invoked, _ = peer.expect(Op.INVOKE)
        interrupt_main_thread(peer)
        assert peer.expect(Op.CANCEL)[1] == {"sequence": invoked}

    signal.siginterrupt(signal.SIGINT, False)
    try:
        caller = Caller(host)
        with pytest.raises(KeyboardInterrupt):
            session.call("k", inputs={"x": "flight"})
        assert caller.result() is None
    finally:
        signal.siginterrupt(signal.SIGINT, True)


def test_a_call_that_nobody_waits_for_is_cancelled(peer, connection):
    call = Session(connection, None).start("k", inputs={"x": "flight"}, deadline=1.5, a=2)
    sequence, body = peer.expect(Op.INVOKE)
    assert body == {"kernel": "k", "inputs": {"x": "flight"}, "parameters": {"a": 2}, "deadline_ms": 1500}
    del call
    gc.collect()
    assert peer.expect(Op.CANCEL)[1] == {"sequence": sequence}


def test_a_timeout_leaves_the_call_running(peer, connection):
    call = Session(connection, None).start("k", inputs={}, publish={"y": "n"}, map=False)
    sequence, _ = peer.expect(Op.INVOKE)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            call.result(timeout=0.01)
    assert not call.done()
    results = [{"port": "y", "mapping": {}, "name": "n"}]
    answer = {"results": results, "notes": [], "copied_bytes": 3, "pages": [], "minor_faults": 0}
    peer.say(Op.OK, sequence, {**answer, "seconds": {}})
    assert call.done()
    assert len(call.result()) == 0 and call.result().info.published == {"y": "n"}


def test_the_leader_hands_on_when_it_leaves(peer, connection):
    """A thread that times out while it receives for all leaves the others with somebody who receives."""
    call = Session(connection, None).start("k", inputs={})
    first = Caller(lambda: call.result(timeout=0.2))
    peer.expect(Op.INVOKE)
    second = Caller(lambda: connection.call(Op.PING, {}))
    sequence, _ = peer.expect(Op.PING)
    assert type(first.result()) is TimeoutError
    peer.say(Op.OK, sequence, {})
    assert second.result().op == Op.OK


def test_a_full_socket_is_read_from(peer, connection):
    """Neither side reads before it has written: the client gives way."""
    count = 300
    pad = "x" * 50000

    def send_all_and_wait():
        sent = [connection.request(Op.LOOKUP, {"name": pad}) for _ in range(count)]
        return [(pending.sequence, connection.wait(pending).body["number"]) for pending in sent]

    sender = Caller(send_all_and_wait)
    time.sleep(0.2)
    for _ in range(count):
        sequence, _ = peer.expect(Op.LOOKUP)
        peer.say(Op.OK, sequence, {"name": pad, "number": sequence})
    pairs = sender.result()
    assert len(pairs) == count and all(sequence == number for sequence, number in pairs)


def test_a_fork_is_refused(peer, connection):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            connection.call(Op.PING, {})
        except strait.ForkedError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    assert "is a fork" in os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(child, 0)


def test_a_connection_that_nobody_holds_ends():
    for peer, connection in pair(renew=True):
        connection.hold(1, 60000)
        close, connection.close = connection.close, lambda: None
        del connection, close
        break
    gc.collect()
    assert peer.socket.recv(100) == b""
