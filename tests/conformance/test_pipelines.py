"""Pipelines: several kernels in one call, as text, in every language. README.md says how."""

import numpy as np
import pytest

import reference
from test_conformance import Bench, failed, remote, same

LARGE = [300, 300]


@pytest.fixture
def bench(driver, tmp_path):
    bench = Bench(driver, tmp_path)
    yield bench
    bench.clear()


@pytest.mark.parametrize("shape", [[2, 3], LARGE])
@pytest.mark.parametrize("how", ["copy", "segment"])
def test_a_linear_pipeline(bench, shape, how):
    x = reference.make("float64", shape, "normal")
    handle, _ = bench.make(x, "float64", how)
    text = "clip(lo=0, hi=1) | scale-shift(a=2, b=1) | cast(to=float32)"
    data, answer = bench.call(text, {"x": {"handle": handle}}, verify=True)
    y = (np.clip(x, 0.0, 1.0) * 2.0 + 1.0).astype(np.float32)
    assert data["y"] == y.tobytes()
    same(answer["outputs"]["y"], y, "float32")
    if shape == LARGE:
        # The last result is below what is moved; the others are not.
        assert answer["copied_bytes"] in (0, y.nbytes), answer
        pages = {page["port"]: (page["device"], page["inode"]) for page in answer["pages"]}
        assert pages["1.y"] == pages["2.x"] and pages["2.y"] == pages["3.x"] and pages["1.x"] != pages["1.y"], pages


@pytest.mark.parametrize("shape", [[3, 3], LARGE])
def test_a_pipeline_that_fans_out_and_in(bench, shape):
    x = np.round(reference.make("float64", shape, "normal") * 4)
    handle, _ = bench.make(x, "float64", "segment")
    text = "up: scale-shift(b=1) | low: clip(x: x, hi=2) | matmul(a: up, b: low) -> product: .y, up: up"
    data, answer = bench.call(text, {"x": {"handle": handle}}, ports=["product", "up"])
    up, low = x + 1.0, np.minimum(x, 2.0)
    assert set(answer["outputs"]) == {"product", "up"}
    assert data["up"] == up.tobytes()
    # Small whole numbers: exact in any order.
    assert data["product"] == (up @ low).tobytes()


def test_a_stage_that_does_not_fit_names_itself(bench):
    x = reference.make("float64", [4], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    for text, reason, says in [
        ("clip | cast(to=complex64) | clip", "BAD_INPUT", ["stage 3 (`clip`)", "complex64"]),
        ("clip | scale-shift(c=1)", "UNKNOWN_PARAMETER", ["stage 2 (`scale-shift`)", "`c`"]),
        ("clip | | clip", "BAD_PIPELINE", ["character 8"]),
    ]:
        answer = bench.driver.ask("call", kernel=text, inputs={"x": {"handle": handle}})
        failed(answer, remote("INVALID_ARGUMENT", reason) | {"says": says})
