"""Several kernels in one call, against a real host: run with STRAIT_BIN."""

import numpy as np
import pytest

import strait
from strait import _pipeline

GRAPH = {
    "stages": [
        {"name": "up", "kernel": "scale-shift", "parameters": {"b": 1}},
        {"name": "low", "kernel": "clip", "parameters": {"hi": 2}, "inputs": {"x": "x"}},
        {"kernel": "matmul", "inputs": {"a": "up", "b": "low.y"}},
    ],
    "outputs": {"product": ".y", "up": "up"},
}


def test_text_takes_inputs_by_position_and_by_name(session):
    x = np.arange(6.0).reshape(2, 3)
    text = "clip(lo=1, hi=4) | scale-shift(a=2) | cast(to=int16)"
    expected = (np.clip(x, 1, 4) * 2).astype(np.int16)
    for y in (session.call(text, x), session.call(text, inputs={"x": x})):
        assert y.dtype == np.int16 and np.array_equal(y, expected)
        assert [(stage.stage, stage.kernel) for stage in y.info.stages] == [("1", "clip"), ("2", "scale-shift"), ("3", "cast")]
    (kernel,) = session.kernels("fir | fir")
    assert [port.name for port in kernel.inputs] == ["x", "1.taps", "2.taps"]
    taps = np.array([1.0, 1.0])
    twice = session.call("fir", session.call("fir", np.arange(5.0), taps), taps)
    assert np.array_equal(session.call("fir | fir", np.arange(5.0), taps, taps), twice)
    assert session.call("clip", x).info.stages == []


def test_a_dictionary_is_a_graph(session):
    x = np.arange(9.0).reshape(3, 3)
    result = session.call(GRAPH, x)
    assert list(result) == ["product", "up"]
    assert np.array_equal(result["up"], x + 1)
    assert np.array_equal(result["product"], (x + 1) @ np.minimum(x, 2))
    (kernel,) = session.kernels(GRAPH)
    assert (kernel.plugin, [port.name for port in kernel.outputs]) == ("pipeline", ["product", "up"])
    large = session.empty((300, 300))
    large[:] = 1.0
    info = session.call(GRAPH, large, verify=True).info
    pages = {page.port: page.inode for page in info.pages}
    assert info.copied_bytes == 0 and pages["up.y"] == pages["3.a"] and pages["low.y"] == pages["3.b"]


def test_errors_name_their_stage(session):
    x = np.arange(3.0)
    with pytest.raises(strait.RemoteError, match=r"stage 2 \(`cast`\)") as caught:
        session.call("clip | cast(to=int3)", x)
    assert caught.value.reason == "BAD_PARAMETER" and caught.value.details["stage"] == 2
    with pytest.raises(strait.RemoteError, match="character 7") as caught:
        session.call("clip ||", x)
    assert caught.value.reason == "BAD_PIPELINE"
    with pytest.raises(strait.RemoteError, match="either `kernel`"):
        session.call("", inputs={"x": x})
    with pytest.raises(TypeError, match="has 1 inputs"):
        session.call("clip | clip", x, x)


def test_any_number_of_texts_may_be_called():
    ports = _pipeline.Ports()
    for n in range(1000):
        ports[f"clip(lo={n})"] = ["x"]
    assert 0 < len(ports) <= 256 and ports["clip(lo=999)"] == ["x"]
