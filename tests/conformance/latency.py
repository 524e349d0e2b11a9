"""Prints how long a call of 1 KiB takes from each language: STRAIT_BIN=… python tests/conformance/latency.py"""

import tempfile
from pathlib import Path

from conftest import connect
from drivers import Driver, Host, languages

WARM_UP, CALLS, ELEMENTS = 300, 3000, 128


def measure(host, folder):
    driver = Driver(folder)
    driver.build()
    driver.start()
    try:
        driver.address = None
        connect(driver, host)
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(bytes(ELEMENTS * 8))
            driver.do("make", **{"as": "x"}, dtype="float64", shape=[ELEMENTS], file=file.name, how="segment")
            driver.do("make", **{"as": "ordinary"}, dtype="float64", shape=[ELEMENTS], file=file.name, how="copy")
        kernel, parameters = "scale-shift", {"a": 2.0}
        spec = {"dtype": "float64", "shape": [ELEMENTS]}
        driver.do("prepare", **{"as": "p"}, kernel=kernel, inputs={"x": spec}, parameters=parameters)
        ways = {
            "INVOKE": ("call", {"kernel": kernel, "inputs": {"x": {"handle": "x"}}, "parameters": parameters}),
            "INVOKE, frames": ("call", {"kernel": kernel, "inputs": {"x": {"handle": "ordinary"}}, "parameters": parameters}),
            "CALL": ("call_prepared", {"prepared": "p", "inputs": {"x": {"handle": "ordinary"}}}),
        }
        for op, fields in ways.values():
            driver.do(op, **fields, repeat=WARM_UP)
        return {way: sorted(driver.do(op, **fields, repeat=CALLS)["seconds"]) for way, (op, fields) in ways.items()}
    finally:
        driver.stop()


def main():
    host = Host()
    try:
        print(f"{'language':10} {'way':14} {'p50 us':>8} {'p99 us':>8}   scale-shift of {ELEMENTS * 8} bytes, {CALLS} calls")
        for language, folder in languages().items():
            for way, seconds in measure(host, folder).items():
                p50, p99 = (seconds[int(len(seconds) * part)] * 1e6 for part in (0.5, 0.99))
                print(f"{language:10} {way:14} {p50:8.0f} {p99:8.0f}")
    finally:
        host.stop()


if __name__ == "__main__":
    main()
