"""Times calls of a kernel over 1 KiB: ADDRESS CALLS. See README.md."""

import json
import mmap
import os
import sys
import time
from typing import Any

import numpy as np
import strait

ELEMENTS = 128
WARM_CALLS = 200


def cycle(session: strait.Session, x: "np.ndarray[Any, Any]", i: int) -> float:
    """One whole cycle: the kernel, its result read and given back. Answers microseconds."""
    begun = time.perf_counter_ns()
    x[0] = i
    with session.call("scale-shift", x, a=2, b=1) as y:
        first = y.numpy()[0]
    if first != 2 * i + 1:
        raise RuntimeError(f"the first element is {first}, expected {2 * i + 1}")
    return (time.perf_counter_ns() - begun) / 1e3


def prepared_cycle(prepared: strait.Prepared, x: "np.ndarray[Any, Any]", i: int) -> float:
    """A call of what was prepared: an array of this process, and a fresh one back. Answers microseconds."""
    begun = time.perf_counter_ns()
    x[0] = i
    first = prepared(x)[0]
    if first != 2 * i + 1:
        raise RuntimeError(f"the first element is {first}, expected {2 * i + 1}")
    return (time.perf_counter_ns() - begun) / 1e3


def pipe_cycle(there: int, back: int, x: "np.ndarray[Any, Any]", y: "np.ndarray[Any, Any]", i: int) -> float:
    """What people make by hand: the arrays in shared memory, a byte through a pipe each way. Answers microseconds."""
    begun = time.perf_counter_ns()
    x[0] = i
    os.write(there, b"x")
    os.read(back, 1)
    if y[0] != 2 * i + 1:
        raise RuntimeError(f"the first element is {y[0]}, expected {2 * i + 1}")
    return (time.perf_counter_ns() - begun) / 1e3


def pipes(calls: int) -> "list[float]":
    """Cycles against another process that maps the same memory and has no sandbox."""
    shared = np.frombuffer(mmap.mmap(-1, 2 * 8 * ELEMENTS), dtype=np.float64)
    x, y = shared[:ELEMENTS], shared[ELEMENTS:]
    (asked, there), (back, answer) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        while os.read(asked, 1):
            np.multiply(x, 2.0, out=y)
            np.add(y, 1.0, out=y)
            os.write(answer, b"y")
        os._exit(0)
    for i in range(WARM_CALLS):
        pipe_cycle(there, back, x, y, i)
    times = [pipe_cycle(there, back, x, y, i) for i in range(calls)]
    os.close(there)
    os.waitpid(child, 0)
    return times


def tell(client: str, times: "list[float]") -> None:
    """One line of JSON."""
    times.sort()
    print(json.dumps({"client": client, "calls": len(times), "p50_us": percentile(times, 50), "p99_us": percentile(times, 99)}))


def percentile(times: "list[float]", of: int) -> float:
    """Percentile of sorted times."""
    return times[-(-len(times) * of // 100) - 1]


def main(address: str, calls: int) -> None:
    # Before there is a session, which a forked child must not have.
    by_hand = pipes(calls)
    with strait.connect(address) as session:
        x = session.empty(ELEMENTS)
        for i in range(WARM_CALLS):
            cycle(session, x, i)
        tell("Python", [cycle(session, x, i) for i in range(calls)])
        own = np.zeros(ELEMENTS)
        with session.prepare("scale-shift", own, a=2, b=1) as prepared:
            for i in range(WARM_CALLS):
                prepared_cycle(prepared, own, i)
            tell("Python, prepared", [prepared_cycle(prepared, own, i) for i in range(calls)])
    tell("a pipe, by hand", by_hand)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: small_calls.py ADDRESS CALLS")
    main(sys.argv[1], int(sys.argv[2]))
