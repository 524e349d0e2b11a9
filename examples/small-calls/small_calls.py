"""Times calls of a kernel over 1 KiB: ADDRESS CALLS. See README.md."""

import json
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


def percentile(times: "list[float]", of: int) -> float:
    """Percentile of sorted times."""
    return times[-(-len(times) * of // 100) - 1]


def main(address: str, calls: int) -> None:
    with strait.connect(address) as session:
        x = session.empty(ELEMENTS)
        for i in range(WARM_CALLS):
            cycle(session, x, i)
        times = sorted(cycle(session, x, i) for i in range(calls))
    print(json.dumps({"client": "Python", "calls": calls, "p50_us": percentile(times, 50), "p99_us": percentile(times, 99)}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: small_calls.py ADDRESS CALLS")
    main(sys.argv[1], int(sys.argv[2]))
