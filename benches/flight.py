"""Inline Flight, stock pyarrow as the client: the host against a pyarrow server, both over unix sockets, in turns.

STRAIT_BIN=… python benches/flight.py [--mb 100] [--rounds 7]

Prints the median and best of each, and the host's throughput as a share of the server's: ratios hold from machine to
machine, times do not. The pyarrow server keeps what was put as the batches that came; the host stores it in a sealed
segment that others can map.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
from pyarrow import flight


class Keeper(flight.FlightServerBase):
    """The least server that takes a table and gives it back."""

    def __init__(self, location):
        super().__init__(location)
        self.tables = {}

    def do_put(self, context, descriptor, reader, writer):
        self.tables[descriptor.path[0]] = reader.read_all()

    def do_get(self, context, ticket):
        return flight.RecordBatchStream(self.tables[ticket.ticket])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--mb", type=int, default=100, help="size of the table, in 10^6 bytes")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--serve", help=argparse.SUPPRESS)  # the pyarrow server's own process
    options = options.parse_args()
    if options.serve:
        Keeper(options.serve).serve()
        return
    with tempfile.TemporaryDirectory() as directory:
        theirs = os.path.join(directory, "pyarrow.sock")
        ours = os.path.join(directory, "flight.sock")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STRAIT_")}
        host = [os.environ["STRAIT_BIN"], "serve", "--directory", directory, "--log-level", "warn"]
        peer = [sys.executable, __file__, "--serve", f"grpc+unix://{theirs}"]
        processes = [
            subprocess.Popen(host, env=environment, stdout=subprocess.DEVNULL),
            subprocess.Popen(peer, env=environment),
        ]
        try:
            sides = {"strait": ours, "pyarrow": theirs}
            for path in sides.values():
                wait_for(path)
            compare({name: flight.connect(f"grpc+unix://{path}") for name, path in sides.items()}, options)
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def wait_for(path):
    until = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                return
        if time.monotonic() > until:
            sys.exit(f"nobody listens at {path}")
        time.sleep(0.02)


def compare(clients, options):
    table = pa.table({"x": np.arange(options.mb * 125_000, dtype=np.float64)})
    replace = flight.FlightCallOptions(headers=[(b"x-strait-replace", b"true")])
    times = {(side, way): [] for side in clients for way in ("put", "get")}
    for turn in range(options.rounds + 1):
        # Who goes first changes, so that neither always finds the caches of the other.
        for side in sorted(clients, reverse=turn % 2 == 1):
            put_time, get_time = once(clients[side], table, replace)
            if turn > 0:  # the first one is for warming up
                times[side, "put"].append(put_time)
                times[side, "get"].append(get_time)
    report(times, options.mb / 1e3)


def once(client, table, options):
    begin = time.perf_counter()
    writer, reader = client.do_put(flight.FlightDescriptor.for_path("bench"), table.schema, options)
    with writer:
        writer.write_table(table)
        writer.done_writing()
        reader.read()
    stored = time.perf_counter()
    back = client.do_get(flight.Ticket(b"bench")).read_all()
    read = time.perf_counter()
    assert back.num_rows == table.num_rows and back["x"][-1] == table["x"][-1]
    return stored - begin, read - stored


def report(times, gigabytes):
    print(f"{'':10}{'put':>16}{'get':>16}{'put and get':>16}   GB/s, median (best)")
    both = {}
    for side in ("strait", "pyarrow"):
        put, get = times[side, "put"], times[side, "get"]
        sums = [p + g for p, g in zip(put, get, strict=True)]
        both[side] = {"put": put, "get": get, "put and get": sums}
        rates = (f"{gigabytes / statistics.median(t):8.2f} ({gigabytes / min(t):5.2f})" for t in both[side].values())
        print(f"{side:10}" + "".join(rates))
    ratios = (
        statistics.median(theirs) / statistics.median(ours)
        for ours, theirs in zip(both["strait"].values(), both["pyarrow"].values(), strict=True)
    )
    print(f"{'ratio':10}" + "".join(f"{ratio:8.2f}{'':8}" for ratio in ratios))


if __name__ == "__main__":
    main()
