"""What the tests share: a host of their own, stock pyarrow as its client, and the command line.

Needs the host's program in STRAIT_BIN; `cargo xtask test python` sets everything up.
"""

import json
import os
import socket
import subprocess
import time

import pytest
from pyarrow import flight

# Long enough for a loaded machine; nothing waits for it unless it fails.
PATIENCE_SECONDS = 120
# Results that nobody fetched go after that time. The end of the tests waits for it.
UNDELIVERED_MS = 15_000


def path(name):
    return flight.FlightDescriptor.for_path(name)


def command(kernel, inputs, publish=None, **parameters):
    body = {"kernel": kernel, "inputs": inputs, "parameters": parameters}
    if publish:
        body |= {"publish": publish, "replace": True}
    return flight.FlightDescriptor.for_command(json.dumps(body))


def put(client, name, table, options=None):
    """Uploads a table, under a name that may be taken; answers the mapping."""
    options = options or flight.FlightCallOptions(headers=[(b"x-strait-replace", b"true")])
    writer, reader = client.do_put(path(name), table.schema, options)
    with writer:
        writer.write_table(table)
        writer.done_writing()
        reply = reader.read()
    return json.loads(reply.to_pybytes())


def stats(client):
    [result] = client.do_action(("stats", b""))
    return json.loads(result.body.to_pybytes())


def environment():
    """This one's, without settings and addresses of strait that the tests do not know."""
    kept = ("STRAIT__SERVER__STANDARD_PLUGIN", "STRAIT__ENGINE__CACHE")
    return {k: v for k, v in os.environ.items() if not k.startswith("STRAIT_") or k in kept}


def strait(*words, directory=None):
    """Runs the command line with --json; answers the object that it prints."""
    env = environment() | ({"STRAIT_ADDRESS": f"unix://{directory}"} if directory else {})
    words = [os.environ["STRAIT_BIN"], *map(str, words), "--json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


class Host:
    """`strait serve` in a directory of its own."""

    def __init__(self, directory, **options):
        self.directory = str(directory)
        self.socket = os.path.join(self.directory, "flight.sock")
        program = os.environ["STRAIT_BIN"]
        env = environment() | {"STRAIT__LEASE__UNDELIVERED_MS": str(UNDELIVERED_MS)}
        self.process = subprocess.Popen([program, "serve", "--directory", self.directory], env=env, **options)

    def wait_until_ready(self):
        def is_ready():
            assert self.process.poll() is None, f"the host ended with {self.process.returncode}"
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(self.socket) == 0

        wait_for(is_ready, f"no {self.socket}")

    def connect(self):
        return flight.connect(f"grpc+unix://{self.socket}")

    def end(self):
        """Drops all flights, holds what is left against nothing, and ends the host as an operator does."""
        with self.connect() as client:
            for info in client.list_flights():
                list(client.do_action(("drop", info.descriptor.path[0])))
            wait_for(lambda: not left_behind(stats(client)), lambda: f"left behind: {left_behind(stats(client))}")
        self.process.terminate()
        assert self.process.wait(PATIENCE_SECONDS) == 0, "SIGTERM drains and exits 0"
        assert os.listdir(self.directory) == [], "sockets are removed"


def left_behind(stats):
    """What is still held when no flight is there: idle segments of the pool are no loss."""
    pool = stats["pool"]
    held = {
        "flights": stats["flights"],
        "leases": stats["leases"],
        "sessions": stats["sessions"],
        "running": stats["running"],
        "segments": stats["segments"],
        "segments of the pool in use": pool["segments"] - pool["idle_segments"],
        "budget_used_bytes": stats["budget_used_bytes"] - pool["idle_bytes"],
    }
    return {what: count for what, count in held.items() if count != 0}


def wait_for(condition, failure):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            text = failure() if callable(failure) else failure
            pytest.fail(f"{text}, after {PATIENCE_SECONDS} s")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    # A short path: the kernel takes 108 bytes for a socket's.
    directory = tmp_path_factory.mktemp("h")
    os.chmod(directory, 0o700)
    host = Host(directory)
    try:
        host.wait_until_ready()
        yield host
        host.end()
    finally:
        if host.process.poll() is None:
            host.process.kill()
            host.process.wait()


@pytest.fixture
def client(host):
    with host.connect() as client:
        yield client
