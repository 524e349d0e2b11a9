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
        call = {"kernel": "scale-shift", "inputs": {"x": {"handle": "x"}}, "parameters": {"a": 2.0}}
        driver.do("call", **call, repeat=WARM_UP)
        return sorted(driver.do("call", **call, repeat=CALLS)["seconds"])
    finally:
        driver.stop()


def main():
    host = Host()
    try:
        print(f"{'language':10} {'p50 us':>8} {'p99 us':>8}   scale-shift of {ELEMENTS * 8} bytes, {CALLS} calls")
        for language, folder in languages().items():
            seconds = measure(host, folder)
            p50, p99 = (seconds[int(len(seconds) * part)] * 1e6 for part in (0.5, 0.99))
            print(f"{language:10} {p50:8.0f} {p99:8.0f}")
    finally:
        host.stop()


if __name__ == "__main__":
    main()
