"""Flight over TCP: reads and puts of the host's own user, and nothing more."""

import json
import os
import re
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from conftest import PATIENCE_SECONDS, command, environment, path, put
from pyarrow import flight


def serve(directory, address):
    return subprocess.Popen(
        [os.environ["STRAIT_BIN"], "serve", "--directory", directory, "--tcp", address],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """(over TCP, over the unix socket) of one host."""
    directory = tmp_path_factory.mktemp("t")
    os.chmod(directory, 0o700)
    host = serve(str(directory), "127.0.0.1:0")
    try:
        ready = host.stdout.readline()
        address = re.search(r"grpc\+tcp://\S+", ready).group()
        # stderr must not fill its pipe.
        with flight.connect(address) as remote, flight.connect(f"grpc+unix://{directory}/flight.sock") as local:
            yield remote, local
        host.terminate()
        host.communicate(timeout=PATIENCE_SECONDS)
        assert host.returncode == 0
    finally:
        host.kill()
        host.communicate()


def test_reads_and_puts(clients):
    remote, local = clients
    x = np.arange(300_000, dtype=np.float64)
    writer, reader = remote.do_put(path("x"), pa.schema([("x", pa.float64())]))
    with writer:
        writer.write_table(pa.table({"x": x}))
        writer.done_writing()
        reply = reader.read()
    assert reply is None or reply.size == 0, "no mapping for somebody far away"
    for client in clients:
        info = client.get_flight_info(path("x"))
        assert client.do_get(info.endpoints[0].ticket).read_all()["x"].to_numpy().tobytes() == x.tobytes()
    [far] = list(remote.list_flights())
    [near] = list(local.list_flights())
    assert far.endpoints[0].app_metadata == b"" and json.loads(near.endpoints[0].app_metadata)["strait-mmap"] == 1
    assert remote.get_schema(path("x")).schema == near.schema


def test_nothing_more(clients):
    remote, local = clients
    put(local, "y", pa.table({"y": np.arange(10.0)}))
    refused = [
        lambda: remote.get_flight_info(command("scale-shift", {"x": "y"})),
        lambda: remote.get_schema(command("scale-shift", {"x": "y"})),
        lambda: list(remote.do_action(("drop", b"y"))),
        lambda: list(remote.do_action(("stats", b""))),
        lambda: list(remote.do_action(("mapping", b"y"))),
    ]
    for call in refused:
        with pytest.raises(NotImplementedError, match="over TCP"):
            call()
    assert len(list(remote.do_action(("kernels", b"")))) > 0
    assert [info.descriptor.path for info in local.list_flights()].count([b"y"]) == 1


def test_other_addresses_are_refused(tmp_path):
    os.chmod(tmp_path, 0o700)
    host = serve(str(tmp_path), "0.0.0.0:0")
    _, said = host.communicate(timeout=PATIENCE_SECONDS)
    assert host.returncode == 3 and "loopback" in said and "0.0.0.0" in said
    assert os.listdir(tmp_path) == []
