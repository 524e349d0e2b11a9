"""Ctrl-C in a process of its own, as a notebook or a shell sends it. Needs STRAIT_BIN and STRAIT_TEST_PLUGINS."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

import strait
from conftest import serve_own


@pytest.fixture(scope="module")
def spinning():
    """The address of a host that has a kernel `k`, which never ends."""
    plugins = os.environ.get("STRAIT_TEST_PLUGINS")
    if not plugins:
        pytest.skip("STRAIT_TEST_PLUGINS is not set: name the folder of spins.wasm")
    yield from serve_own("--plugin", str(Path(plugins) / "spins.wasm"))


@pytest.fixture
def notebook(spinning):
    """Starts a Python process whose interrupts a test sends."""
    started = []

    def start(cells):
        started.append(Notebook(spinning, cells))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.communicate()


class Notebook:
    def __init__(self, address, cells):
        program = "import os, sys, threading, time, numpy as np, strait\n" + textwrap.dedent(cells)
        self.errors = tempfile.TemporaryFile("w+")
        source = Path(strait.__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, address],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def end(self):
        """What it still says; kills it if it hangs."""
        guard = threading.Timer(60, self.process.kill)
        guard.start()
        out = self.process.stdout.read()
        status = self.process.wait()
        guard.cancel()
        self.errors.seek(0)
        assert status == 0, (status, self.errors.read())
        return out.strip()


def running(address, wanted):
    with strait.connect(address) as session:
        until = time.monotonic() + 20
        while session.stats()["running"] != wanted:
            assert time.monotonic() < until, session.stats()["running"]
            time.sleep(0.02)


def test_ctrl_c_cancels_the_call_and_the_session_goes_on(spinning, notebook):
    notebook = notebook(
        """
        s = strait.connect(sys.argv[1])
        x = s.empty(1000)
        x[:] = 1
        print("ready", flush=True)
        for _ in range(3):
            began = time.monotonic()
            try:
                s.call("k", x, deadline=60)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            assert time.monotonic() - began < 30
            until = time.monotonic() + 20
            while s.stats()["running"] and time.monotonic() < until:
                time.sleep(0.01)
            print((s.call("scale-shift", x, a=2).numpy() == 2).all(), flush=True)
        print(s.stats()["running"], s.client_stats().mappings, flush=True)
        """,
    )
    assert notebook.line() == "ready"
    for _ in range(3):
        running(spinning, 1)
        notebook.interrupt()
        assert notebook.line() == "interrupted"
        assert notebook.line() == "True"
    assert notebook.end() == "0 1"


def test_ctrl_c_ends_only_the_call_that_it_interrupts(spinning, notebook):
    """Another thread receives for both, and goes on with its own call."""
    notebook = notebook(
        """
        s = strait.connect(sys.argv[1])
        x = s.empty(1000)
        other = s.start("k", x, deadline=60)
        said = []
        def wait():
            try: other.result()
            except strait.RemoteError as error: said.append(error.code)
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        print("ready", flush=True)
        try:
            s.call("k", x, deadline=60)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        s.ping()
        print(other.done(), flush=True)
        time.sleep(0.5)
        print(s.stats()["running"], flush=True)
        other.cancel()
        thread.join()
        print(said, flush=True)
        """,
    )
    assert notebook.line() == "ready"
    running(spinning, 2)
    notebook.interrupt()
    assert [notebook.line() for _ in range(3)] == ["interrupted", "False", "1"]
    assert notebook.end() == "['CANCELLED']"


def test_a_storm_of_interrupts_breaks_nothing(notebook):
    """They come between any two steps of the client, also while it takes in a reply."""
    notebook = notebook(
        """
        import signal
        s = strait.connect(sys.argv[1])
        x = np.arange(1000.0)
        s.call("scale-shift", x)
        interrupts = calls = 0
        armed = False

        def interrupt(*_):
            global armed
            if armed:
                armed = False
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        until = time.monotonic() + 2
        print("ready", flush=True)
        while time.monotonic() < until:
            try:
                armed = True
                while time.monotonic() < until:
                    y = s.call("scale-shift", x, a=2)
                    assert np.array_equal(y, 2 * x)
                    calls += 1
                armed = False
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        s.ping()
        with s.call("scale-shift", x, a=3) as y:
            assert np.array_equal(y, 3 * x)
        print(calls > 0, interrupts > 0, len(os.listdir("/proc/self/fd")) < 64, flush=True)
        """,
    )
    assert notebook.line() == "ready"
    until = time.monotonic() + 2.5
    while time.monotonic() < until and notebook.process.poll() is None:
        notebook.interrupt()
        time.sleep(random.uniform(0.0005, 0.01))
    assert notebook.end() == "True True True"
