"""What the Python client costs, each beside its control in the same run: STRAIT_BIN=… python clients/python/benches/bench.py

Ratios hold from machine to machine, times do not.
"""

import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import strait

WARM_UP, CALLS = 500, 4000
LARGE_BYTES = 100 << 20
ROUNDS = 7


def main():
    with tempfile.TemporaryDirectory() as directory:
        command = [os.environ["STRAIT_BIN"], "serve", "--directory", directory, "--log-level", "warn"]
        host = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(f"{directory}/data.sock")
            with strait.connect(f"unix://{directory}") as session:
                small_calls(session)
                large_arrays(session)
        finally:
            host.terminate()
            host.wait()


def wait_for(path):
    until = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if probe.connect_ex(path) == 0:
                return
        if time.monotonic() > until:
            sys.exit(f"nobody listens at {path}")
        time.sleep(0.02)


def small_calls(session):
    """Calls of 1 KiB and what is read of their results, against an empty round trip."""
    x = session.empty(128)
    x[:] = 1

    def call():
        with session.call("scale-shift", x, a=2.0) as y:
            y[0]

    ordinary = np.ones(128)
    prepared = session.prepare("scale-shift", ordinary, a=2.0)

    ping, own = percentiles(session.ping)
    print(f"PING                        p50 {ping[0]:6.0f} us   p99 {ping[1]:6.0f} us   client's CPU {own:5.0f} us")
    took, own = percentiles(call)
    print(f"INVOKE of 1 KiB             p50 {took[0]:6.0f} us   p99 {took[1]:6.0f} us   client's CPU {own:5.0f} us")
    print(f"  against PING              {took[0] / ping[0]:10.1f}")
    framed, own = percentiles(lambda: session.call("scale-shift", ordinary, a=2.0)[0])
    print(f"INVOKE of 1 KiB in frames   p50 {framed[0]:6.0f} us   p99 {framed[1]:6.0f} us   client's CPU {own:5.0f} us")
    took, own = percentiles(lambda: prepared(ordinary)[0])
    print(f"CALL of 1 KiB, prepared     p50 {took[0]:6.0f} us   p99 {took[1]:6.0f} us   client's CPU {own:5.0f} us")
    print(f"  against INVOKE in frames  {took[0] / framed[0]:10.2f}")


def percentiles(work):
    for _ in range(WARM_UP):
        work()
    times = []
    own = time.process_time()
    for _ in range(CALLS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    own = time.process_time() - own
    times.sort()
    return [times[int(CALLS * part)] * 1e6 for part in (0.5, 0.99)], own / CALLS * 1e6


def large_arrays(session):
    """The first fill of 100 MiB by this client against a plain memfd, and a consumer's first pass against its second."""
    rows = [large_array(session) for _ in range(ROUNDS)]
    filled, plain, first, second, results = (statistics.median(column) for column in zip(*rows))
    huge = session.client_stats().huge_bytes / (ROUNDS * LARGE_BYTES)
    print(f"empty + first fill, 100 MiB {filled * 1e3:10.1f} ms   plain memfd {plain * 1e3:6.1f} ms   in huge pages {huge:4.0%}")
    print(f"  against the plain memfd   {filled / plain:10.2f}")
    print(f"first pass of a consumer    {first * 1e3:10.1f} ms   second      {second * 1e3:6.1f} ms")
    print(f"  against the second        {first / second:10.2f}")
    print(f"first pass over a result, against the second {results:.2f}")


def large_array(session):
    count = LARGE_BYTES // 8
    x, filled = timed(lambda: fill(session.empty(count)))
    fd = os.memfd_create("plain")
    os.ftruncate(fd, LARGE_BYTES)
    with mmap.mmap(fd, LARGE_BYTES) as pages:
        _, plain = timed(lambda: fill(np.frombuffer(pages)) is None)
    os.close(fd)
    y = session.call("scale-shift", x, a=2.0)
    session.put("large", x, replace=True)
    with session.get("large") as got:
        (_, first), (_, second) = timed(got.numpy().sum), timed(got.numpy().sum)
    (_, of_result), (_, again) = timed(y.numpy().sum), timed(y.numpy().sum)
    y.release()
    session.delete("large")
    return filled, plain, first, second, of_result / again


def fill(array):
    array[:] = 1.5
    return array


def timed(work):
    begin = time.perf_counter()
    done = work()
    return done, time.perf_counter() - begin


if __name__ == "__main__":
    main()
