"""Connections to a host that are lost: what is asked again, what runs once, and what is told."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from conftest import serve_own

import strait

pytest.importorskip("pyarrow")


class Proxy:
    """Between clients and a unix socket: it can keep what the host says to itself, and hang up."""

    def __init__(self, target):
        self._target = target
        self._directory = tempfile.TemporaryDirectory(prefix="strait-far-")
        self.path = os.path.join(self._directory.name, "p.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._open = []
        #: What the host says is thrown away.
        self.swallows = False
        #: It hangs up once so many more bytes have come from a client.
        self.cut_after = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                host = socket.socket(socket.AF_UNIX)
                host.connect(self._target)
                self._open += [client, host]
                threading.Thread(target=self._pass, args=(client, host, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(host, client, False), daemon=True).start()

    def _pass(self, source, sink, is_client):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if is_client and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        self.hang_up()
                        return
                if is_client or not self.swallows:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def hang_up(self):
        ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()
        self.hang_up()
        self._directory.cleanup()


@pytest.fixture(scope="module")
def address():
    """A host that no other tests have: what is left in it is counted."""
    yield from serve_own()


@pytest.fixture
def proxy(address):
    proxy = Proxy(address.removeprefix("unix://") + "/flight.sock")
    yield proxy
    proxy.close()


@pytest.fixture
def far(proxy):
    with strait.connect(f"grpc+unix://{proxy.path}", retry=30.0) as far:
        yield far


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_call_whose_answer_is_lost_runs_once(session, far, proxy):
    x = np.arange(1000.0)
    far.call("scale-shift", x)
    runs = session.stats()["invocations"]
    proxy.swallows = True
    call = far.start("scale-shift", x, a=5.0)
    wait_for(lambda: session.stats()["invocations"] == runs + 1 and session.stats()["running"] == 0)
    proxy.swallows = False
    proxy.hang_up()
    np.testing.assert_array_equal(call.result(60), 5 * x)
    assert session.stats()["invocations"] == runs + 1


def test_uploads_and_results_of_any_size_survive(session, far, proxy):
    x = np.random.default_rng(1).normal(size=2_000_000)
    runs = session.stats()["invocations"]
    proxy.cut_after = 5 << 20
    y = far.call("scale-shift", x, a=2.0)
    assert proxy.cut_after is None, "it hung up"
    np.testing.assert_array_equal(y, 2 * x)
    assert session.stats()["invocations"] == runs + 1
    far.put("lost/x", x)
    proxy.cut_after = 5 << 20
    far.put("lost/x", 2 * x, replace=True)
    np.testing.assert_array_equal(far.get("lost/x"), 2 * x)
    proxy.swallows = True
    dropping = threading.Thread(target=far.delete, args=("lost/x",))
    dropping.start()
    wait_for(lambda: not session.list())
    proxy.swallows = False
    proxy.hang_up()
    dropping.join(60)
    assert not dropping.is_alive()


def test_a_put_that_may_have_been_is_not_done_twice(session, far, proxy):
    proxy.cut_after = 1 << 20
    with pytest.raises(strait.DisconnectedError, match="whether 'lost/y' was put is not known"):
        far.put("lost/y", np.zeros(1_000_000))
    wait_for(lambda: not session.list())
    far.put("lost/y", np.zeros(10))
    far.delete("lost/y")


def test_what_has_a_socket_of_its_own_ends_with_the_connection(session, far, proxy):
    scale = far.prepare("scale-shift", np.arange(4.0))
    sums = far.prepare_stream("cumsum", strait.Spec("float64", (4,)), channel="lost/c")
    reader = far.read_channel("lost/c")
    proxy.hang_up()
    for use in (lambda: scale(np.arange(4.0)), lambda: sums.chunk(np.ones(2)), lambda: next(reader)):
        with pytest.raises((strait.DisconnectedError, strait.RemoteError)):
            use()
    wait_for(lambda: session.stats()["account"]["streams"] == 0)
    again = far.prepare("scale-shift", np.arange(4.0))
    np.testing.assert_array_equal(again(np.ones(4)), np.ones(4))


def test_a_host_that_is_gone_is_told_of(proxy):
    far = strait.connect(f"grpc+unix://{proxy.path}", retry=0.3)
    proxy._listener.close()
    os.unlink(proxy.path)
    proxy.hang_up()
    with pytest.raises(strait.DisconnectedError, match="was lost"):
        far.call("scale-shift", [1.0])
    far.close()


SPIN = """
import sys, time, numpy as np, strait
s = strait.connect(sys.argv[1])
s.ping()
print("ready", flush=True)
try:
    s.call("k", np.arange(4.0))
except KeyboardInterrupt:
    print("interrupted", s.stats()["running"], flush=True)
"""


@pytest.fixture
def spinning():
    plugins = os.environ.get("STRAIT_TEST_PLUGINS")
    if not plugins:
        pytest.skip("STRAIT_TEST_PLUGINS is not set")
    yield from serve_own("--plugin", os.path.join(plugins, "spins.wasm"))


def test_a_call_that_is_cancelled(spinning):
    with strait.connect(spinning) as near, strait.connect(spinning.replace("unix://", "grpc+unix://") + "/flight.sock") as far:
        call = far.start("k", np.arange(4.0))
        wait_for(lambda: near.stats()["running"] == 1)
        with pytest.raises(TimeoutError):
            call.result(0.01)
        call.cancel()
        with pytest.raises(strait.RemoteError) as caught:
            call.result(60)
        assert caught.value.code == "CANCELLED"
        wait_for(lambda: near.stats()["running"] == 0)
        with pytest.raises(strait.RemoteError) as caught:
            far.call("k", np.arange(4.0), deadline=0.05)
        assert caught.value.code == "DEADLINE_EXCEEDED"


def test_an_interrupt_ends_the_call_in_the_host(spinning):
    address = spinning.replace("unix://", "grpc+unix://") + "/flight.sock"
    with strait.connect(spinning) as near:
        words = [sys.executable, "-c", SPIN, address]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=default_interrupt) as program:
            assert program.stdout.readline() == "ready\n"
            wait_for(lambda: near.stats()["running"] == 1)
            program.send_signal(signal.SIGINT)
            assert program.stdout.readline().startswith("interrupted")
            wait_for(lambda: near.stats()["running"] == 0)


def default_interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_program_that_is_killed_leaves_nothing(spinning):
    """Its call is cancelled with its connection."""
    address = spinning.replace("unix://", "grpc+unix://") + "/flight.sock"
    with strait.connect(spinning) as near:
        with subprocess.Popen([sys.executable, "-c", SPIN, address], stdout=subprocess.PIPE, text=True) as program:
            wait_for(lambda: near.stats()["running"] == 1)
            program.kill()
        wait_for(lambda: near.stats()["running"] == 0)
