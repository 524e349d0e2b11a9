"""Frames, addresses and dtypes: what needs no host."""

import datetime
import decimal
import fractions
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import strait
from strait import _address, _dtypes, _wire
from strait._parameters import parameter as _parameter
from strait._wire import milliseconds


def test_frames_byte_by_byte():
    frame = _wire.encode(_wire.Op.LOOKUP, 0x01020304, {"name": "ä"})
    assert frame == b"ST\x02\x06\x04\x03\x02\x01" + b"\x0d\0\0\0" + bytes(36) + '{"name":"ä"}'.encode()
    assert _wire.decode(frame) == (6, 0x01020304, {"name": "ä"}, b"")
    assert _wire.encode(_wire.Op.PING, 1, {}) == b"ST\x02\x16\x01" + bytes(43)


def conformance_frames(part):
    """The frames that every client's tests read."""
    table = Path(__file__).resolve().parents[3] / "tests" / "conformance" / "frames.json"
    if not table.exists():
        pytest.skip("not in the repository")
    frames = json.loads(table.read_text())
    assert frames["version"] == _wire.PROTOCOL and frames[part]
    return frames[part]


def test_headers_are_those_of_every_client():
    for good in conformance_frames("frames"):
        trace = _wire.TraceContext(bytes.fromhex(good["trace_id"]), bytes.fromhex(good["parent_id"]), good["trace_flags"])
        body = json.loads(good["body"])
        frame, payload = bytes.fromhex(good["hex"]), bytes.fromhex(good.get("payload", ""))
        assert _wire.encode(good["op"], good["sequence"], body, trace, payload) == frame, good["name"]
        assert _wire.decode(frame) == (good["op"], good["sequence"], body, payload), good["name"]


def test_headers_that_every_client_refuses():
    for bad in conformance_frames("refused"):
        with pytest.raises(strait.ProtocolError) as refused:
            _wire.decode(bytes.fromhex(bad["hex"]))
        assert all(word in str(refused.value) for word in bad["says"]), (bad["name"], refused.value)


def test_frames_are_those_of_the_protocol():
    """docs/protocol.md has byte-exact frames, which the host's tests replay."""
    document = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"
    if not document.exists():
        pytest.skip("not in the repository")
    frames = re.findall(r"```frame client (\w+)[^\n]*\n([0-9a-f \n]+)\n(.*?)```", document.read_text(), re.DOTALL)
    assert len(frames) > 10
    for op, header, body in frames:
        body, _, payload = body.strip().partition("\n")
        text = re.sub(r"<segment:(\d)>", lambda found: found[1] * 32, body)
        header = bytes.fromhex(header)
        if op in ("CALL", "CHUNK", "LAST"):
            # Without a body its payload follows at once.
            header, payload = header[:16], header[16:].hex()
        header = header.ljust(_wire.HEADER.size, b"\0")
        out_of_place = any(header[12:16]) and op not in ("INVOKE", "CALL", "CHUNK", "LAST")
        if op == "STREAM" or header[2] != _wire.PROTOCOL or out_of_place or any(header[41:48]):
            # An example of what is refused: a reserved op, another version, a payload, flags.
            continue
        payload = bytes.fromhex(payload)
        number, sequence, fields, carried = _wire.decode(header + text.encode() + payload)
        assert number == _wire.Op[op] and carried == payload
        trace = _wire.TraceContext(header[16:32], header[32:40], header[40])
        assert _wire.encode(number, sequence, fields, trace, payload) == header + text.encode() + payload


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"ST\x02\x16\x01\0\0",
        b"XX\x02\x16\x01" + bytes(43),
        b"ST\x03\x16\x01" + bytes(43),
        b"ST\x02\x16\x01\0\0\0\x03" + bytes(39) + b"{}",
        b"ST\x02\x16\x01\0\0\0\x02" + bytes(39) + b"{]",
        b"ST\x02\x16\x01\0\0\0\x02" + bytes(39) + b"[]",
        b"ST\x02\x16\x01\0\0\0\x03" + bytes(39) + b"{}x",
        b"ST\x02\x16\x01\0\0\0\x07" + bytes(39) + b"{\"a\":\xff}",
    ],
)
def test_frames_that_are_none(frame):
    with pytest.raises(strait.ProtocolError):
        _wire.decode(frame)


def test_a_request_that_fits_into_no_frame():
    with pytest.raises(ValueError, match="61440"):
        _wire.encode(_wire.Op.LOOKUP, 1, {"name": "x" * 61440})


def mapping(**changes):
    tensor = {"name": "x", "dtype": "float64", "shape": [2, 3], "offset": 65536, "length": 48}
    tensor.update(changes.pop("tensor", {}))
    whole = {"strait-mmap": 1, "segment": "ab", "bytes": 131072, "writers": "none", "tensors": [tensor]}
    whole.update(changes)
    return whole


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"tensor": {"length": 56}}, "not 56 bytes"),
        ({"tensor": {"shape": [-2, -3]}}, "not 48 bytes"),
        ({"tensor": {"dtype": "float7"}}, "float7"),
        ({"tensor": {"offset": 131072}}, "131072 in all"),
        ({"tensor": {"offset": -64}}, "-64"),
        ({"tensor": {"offset": 65544}}, "multiple of 64"),
        ({"strait-mmap": 2}, "version is 2"),
        ({"bytes": None}, "malformed"),
        ({"tensors": [{}]}, "KeyError"),
    ],
)
def test_mappings_that_reach_out(wrong, says):
    assert _wire.SegmentMapping.read(mapping()).tensors[0].shape == (2, 3)
    with pytest.raises(strait.ProtocolError, match=says):
        _wire.SegmentMapping.read(mapping(**wrong))


def test_addresses(tmp_path):
    assert str(_address.directory("unix:///run/strait")) == "/run/strait"
    for wrong in ["", "/run/strait", "unix:/run", "unix://run/strait", "grpc://host:1"]:
        with pytest.raises(ValueError, match="unix:///DIRECTORY"):
            _address.directory(wrong)
    for name in ("runtime", "session/strait"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data.sock").touch()
    environment = {
        "STRAIT_ADDRESS": "unix:///named",
        "RUNTIME_DIRECTORY": str(tmp_path / "runtime"),
        "XDG_RUNTIME_DIR": str(tmp_path / "session"),
    }
    uid = 4_000_000_000
    assert str(_address.directory(None, environment, uid)) == "/named"
    del environment["STRAIT_ADDRESS"]
    assert _address.directory(None, environment, uid) == tmp_path / "runtime"
    # A service's own runtime directory without a host in it does not hide the host.
    (tmp_path / "runtime" / "data.sock").unlink()
    assert _address.directory(None, environment, uid) == tmp_path / "session" / "strait"
    with pytest.raises(strait.NoHostError, match="/tmp/strait-4000000000/data.sock.*strait serve"):
        _address.directory(None, {}, uid)


def test_a_directory_of_somebody_else_is_refused(tmp_path):
    tmp_path.chmod(0o700)
    uid = os.geteuid()
    assert _address._owned(tmp_path, uid) == tmp_path
    with pytest.raises(strait.NoHostError, match="belongs to uid"):
        _address._owned(tmp_path, uid + 1)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(strait.NoHostError):
        _address._owned(tmp_path / "link", uid)


def test_no_host(tmp_path):
    with pytest.raises(strait.NoHostError, match="strait serve") as caught:
        strait.connect(f"unix://{tmp_path}")
    assert isinstance(caught.value, ConnectionError)


def test_dtypes():
    for name, size in _dtypes.SIZES.items():
        dtype = _dtypes.to_numpy(name)
        assert dtype.itemsize == size
        assert _dtypes.to_name(name) == name
        assert _dtypes.to_name(dtype) == name
    for given, name in [(bool, "bool8"), (float, "float64"), (">i4", "int32"), (np.complex64, "complex64"), ("u2", "uint16")]:
        assert _dtypes.to_name(given) == name
    for wrong in ["float7", object, "U3", "M8[s]", [("a", int)], np.longdouble, 3.5]:
        with pytest.raises(TypeError, match="has no place in a tensor"):
            _dtypes.to_name(wrong)


def test_without_ml_dtypes_there_are_the_bits():
    program = """
import sys; sys.modules["ml_dtypes"] = None
from strait import _dtypes
print([_dtypes.to_numpy(n).name for n in ("bfloat16", "float8_e5m2")], _dtypes.to_name("u2"), _dtypes.to_name("u1"))
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(strait.__file__))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['uint16', 'uint8'] uint16 uint8\n"


def test_parameters():
    given = {"a": 1, "b": 2.5, "c": np.float32(0.5), "d": float("nan"), "e": [1.0, float("-inf")], "f": np.arange(3), "g": True}
    sent = {name: _parameter(name, value) for name, value in given.items()}
    assert json.loads(json.dumps(sent, allow_nan=False)) == {
        "a": 1, "b": 2.5, "c": 0.5, "d": "nan", "e": [1.0, "-inf"], "f": [0, 1, 2], "g": True,
    }
    assert _parameter("to", np.float32) == _parameter("to", np.dtype("f4")) == "float32"


def test_integers_among_parameters_are_exact():
    limits = [-(2**63), -(2**53) - 1, 2**53 + 1, 2**63, 2**64 - 1]
    given = [*limits, *map(np.int64, limits[:3]), *map(np.uint64, limits[2:]), np.array(limits[2:], np.uint64), True, np.bool_(True)]
    text = _wire.encode(_wire.Op.INVOKE, 1, {"parameters": [_parameter("x", value) for value in given]})[_wire.HEADER.size :].decode()
    written = ",".join(map(str, [*limits, *limits[:3], *limits[2:]]))
    assert text == f'{{"parameters":[{written},[{",".join(map(str, limits[2:]))}],true,true]}}'
    # A float stays one, also where it is whole.
    assert json.dumps([_parameter("x", value) for value in (2.0, np.float64(2), np.float16(2), 1e300)]) == "[2.0, 2.0, 2.0, 1e+300]"
    for wrong in (2**64, -(2**63) - 1, [1, 2**64]):
        with pytest.raises(ValueError, match="parameter 'x' is -?[0-9]+; integers reach from"):
            _parameter("x", wrong)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        1j,
        np.complex64(1),
        decimal.Decimal("0.1"),
        fractions.Fraction(1, 3),
        np.datetime64("2020", "ns"),
        np.timedelta64(1, "ns"),
        np.array(["2020"], "M8[D]"),
        datetime.timedelta(1),
        np.longdouble(1),
        b"text",
        np.bytes_(b"text"),
    ],
    ids=repr,
)
def test_parameters_that_no_kernel_could_take(value):
    for given in (value, [value]):
        with pytest.raises(TypeError, match="parameter 'x'"):
            _parameter("x", given)


def test_arrays_as_parameters():
    pa = pytest.importorskip("pyarrow")
    assert _parameter("x", pa.array([1, 2**53 + 1])) == [1, 2**53 + 1]
    assert _parameter("x", pa.scalar(1.5)) == 1.5
    for wrong in (np.ma.masked, np.ma.array([1, 2], mask=[0, 1]), pa.array([1, None])):
        with pytest.raises(ValueError, match="parameter 'x' has 1"):
            _parameter("x", wrong)


def test_bounds_of_parameters_are_exact():
    bounds = {"default": 2**64 - 1, "minimum": -(2**63), "maximum": 1.5}
    parameter = {"name": "p", "kind": "integer", **bounds, "choices": [], "doc": ""}
    kernel = {"name": "k", "plugin": "p", "version": "1", "doc": "", "inputs": [], "outputs": [], "parameters": [parameter]}
    _, _, body, _ = _wire.decode(_wire.encode(_wire.Op.OK, 1, kernel))
    (read,) = strait.Kernel.read(body).parameters
    assert (read.default, read.minimum, read.maximum) == (2**64 - 1, -(2**63), 1.5)
    assert [type(value) for value in (read.default, read.minimum, read.maximum)] == [int, int, float]


def test_times():
    assert [milliseconds(s) for s in (0.0000001, 0.0015, 1, 1e300)] == [1, 2, 1000, 2**53]
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            milliseconds(wrong)
