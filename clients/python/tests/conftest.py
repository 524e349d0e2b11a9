import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

import strait

# A shell ignores SIGINT for what it runs in the background, and then Python does; the tests interrupt themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def serve(directory, *options):
    """A host in that directory, for as long as the generator is not gone on with; yields its address."""
    program = os.environ.get("STRAIT_BIN")
    if not program:
        pytest.skip("STRAIT_BIN is not set: name the host's program")
    host = subprocess.Popen([program, "serve", "--directory", directory, "--log-level", "warn", *options])
    until = time.monotonic() + 30
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if probe.connect_ex(f"{directory}/data.sock") == 0:
                break
        assert host.poll() is None and time.monotonic() < until, "the host does not listen"
        time.sleep(0.02)
    yield f"unix://{directory}"
    host.send_signal(signal.SIGTERM)
    assert host.wait(60) == 0


def serve_own(*options):
    """As `serve`, in a directory that goes with the host."""
    directory = tempfile.mkdtemp(prefix="strait-python-")
    yield from serve(directory, *options)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def address():
    """A host of its own; the tests that need one are skipped without STRAIT_BIN."""
    yield from serve_own()


@pytest.fixture
def session(address):
    with strait.connect(address) as session:
        yield session
