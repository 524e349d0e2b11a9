"""The cases of cases.json, for each language. README.md says how."""

import json
import os
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

import reference
from conftest import NOT_FAR, connect
from drivers import Host

CASES = json.loads((Path(__file__).parent / "cases.json").read_text())
BEHAVIOUR = CASES["behaviours"]
SETTLE_SECONDS = 10


def unique(word="t"):
    return f"{word}-{uuid.uuid4().hex[:12]}"


class Bench:
    """What a test has made in a driver, all of which it takes away again."""

    def __init__(self, driver, folder):
        self.driver = driver
        self.folder = folder
        self._handles = []
        self._flights = []
        self._prepared = []

    def make(self, x, dtype, how="copy"):
        """A handle with the array x; and what the driver answered."""
        handle, file = unique("h"), self.folder / unique("in")
        file.write_bytes(x.tobytes())
        answer = self.driver.do("make", **{"as": handle}, dtype=dtype, shape=list(x.shape), file=str(file), how=how)
        file.unlink()
        self._handles.append(handle)
        same(answer, x, dtype)
        return handle, answer

    def put(self, handle, name=None):
        name = name or unique("flight")
        answer = self.driver.do("put", handle=handle, name=name)
        self._flights.append(name)
        return name, answer

    def get(self, name, **fields):
        handle = unique("h")
        answer = self.driver.do("get", name=name, **{"as": handle}, **fields)
        self._handles.append(handle)
        return handle, answer

    def read(self, handle):
        file = self.folder / unique("out")
        answer = self.driver.do("read", handle=handle, file=str(file))
        data = file.read_bytes()
        file.unlink()
        return data, answer

    def call(self, kernel, inputs, keep=(), **fields):
        """Bytes of each output, and the answer; outputs in `keep` get handles, added as answer["handles"]."""
        handles = {port: unique("h") for port in keep}
        files = {port: str(self.folder / unique("out")) for port in fields.pop("ports", ["y"])}
        answer = self.driver.do("call", kernel=kernel, inputs=inputs, files=files, **{"as": handles}, **fields)
        self._handles += handles.values()
        answer["handles"] = handles
        data = {}
        for port, file in files.items():
            data[port] = Path(file).read_bytes()
            os.unlink(file)
        return data, answer

    def prepare(self, kernel, inputs, **fields):
        """What is prepared, by its name, and the answer."""
        name = unique("prepared")
        answer = self.driver.do("prepare", kernel=kernel, inputs=inputs, **{"as": name}, **fields)
        self._prepared.append(name)
        return name, answer

    def call_prepared(self, prepared, inputs, ports=("y",), **fields):
        """Bytes of each output, and the answer."""
        files = {port: str(self.folder / unique("out")) for port in ports}
        answer = self.driver.do("call_prepared", prepared=prepared, inputs=inputs, files=files, **fields)
        data = {}
        for port, file in files.items():
            data[port] = Path(file).read_bytes()
            os.unlink(file)
        return data, answer

    def close_prepared(self, prepared):
        self.driver.do("close_prepared", prepared=prepared)
        self._prepared.remove(prepared)

    def drop(self, handle):
        self._handles.remove(handle)

    def clear(self):
        if not self.driver.alive:
            return
        for prepared in self._prepared:
            self.driver.ask("close_prepared", prepared=prepared)
        for handle in self._handles:
            self.driver.ask("release", handle=handle)
        for name in self._flights:
            self.driver.ask("delete", name=name)


@pytest.fixture
def bench(driver, tmp_path):
    bench = Bench(driver, tmp_path)
    yield bench
    bench.clear()


def same(answer, x, dtype):
    assert (answer["dtype"], answer["shape"], answer["bytes"]) == (dtype, list(x.shape), x.nbytes), answer


def has_type_for(driver, shape):
    """Whether the driver's Arrow has a type for such rows; far.json says why not."""
    return driver.language not in NOT_FAR["rows without elements"] or 0 not in shape[1:]


def counted(driver, copied, near, far):
    """What the client says that it copied: from afar all that travels, and perhaps into shared memory before."""
    assert copied == near or (driver.far and copied >= far), (copied, near, far)


def place(answer):
    return answer["device"], answer["inode"]


def page(answer, port):
    found = [place(page) for page in answer["pages"] if page["port"] == port]
    assert len(found) == 1, answer["pages"]
    return found[0]


def settled(counts, wanted):
    """Waits until `wanted` holds of `counts()`: releases may be on their way."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        now = counts()
        if wanted(now) or time.monotonic() > until:
            return now
        time.sleep(0.05)


# Put and get


@pytest.mark.parametrize("how", CASES["round_trip"]["how"])
@pytest.mark.parametrize("dtype", CASES["round_trip"]["dtypes"])
def test_round_trip(driver, bench, dtype, how):
    for shape in CASES["round_trip"]["shapes"]:
        if not has_type_for(driver, shape):
            continue
        x = reference.make(dtype, shape, "any")
        handle, _ = bench.make(x, dtype, how)
        name, put = bench.put(handle)
        counted(driver, put["copied_bytes"], 0 if how == "segment" else x.nbytes, x.nbytes)
        got, answer = bench.get(name)
        same(answer, x, dtype)
        data, answer = bench.read(got)
        same(answer, x, dtype)
        assert data == x.tobytes(), shape


@pytest.fixture(scope="session")
def written(drivers, tmp_path_factory):
    """What a language wrote for the others, written once."""
    done = {}

    def write(language):
        if language not in done:
            bench = Bench(drivers[language], tmp_path_factory.mktemp(language))
            arrays = [(dtype, shape) for dtype in CASES["round_trip"]["dtypes"] for shape in CASES["matrix"]["shapes"]]
            large = CASES["matrix"]["large"]
            arrays.append((large["dtype"], large["shape"]))
            done[language] = []
            for index, (dtype, shape) in enumerate(arrays):
                if not has_type_for(bench.driver, shape):
                    continue
                x = reference.make(dtype, shape, "any", salt=language)
                how = "segment" if index % 2 else "copy"
                handle, _ = bench.make(x, dtype, how)
                name, put = bench.put(handle)
                counted(bench.driver, put["copied_bytes"], 0 if how == "segment" else x.nbytes, x.nbytes)
                bench.driver.do("release", handle=handle)
                done[language].append((name, dtype, x))
        return done[language]

    yield write
    for language, flights in done.items():
        for name, _, _ in flights:
            drivers[language].do("delete", name=name)


def test_each_reads_what_each_wrote(drivers, written, tmp_path, producer, consumer):
    flights = written(producer)
    bench = Bench(drivers[consumer], tmp_path)
    before = bench.driver.do("client_stats")["copied_bytes"]
    host_before = bench.driver.do("stats")["stats"]["copied_bytes"]
    listed = {flight["name"]: flight["tensors"] for flight in bench.driver.do("list")["flights"]}
    for name, dtype, x in flights:
        if not has_type_for(bench.driver, x.shape):
            continue
        (tensor,) = listed[name]
        assert (tensor["dtype"], tensor["shape"]) == (dtype, list(x.shape))
        handle, answer = bench.get(name)
        same(answer, x, dtype)
        assert bench.driver.far or answer["inode"] != 0 or x.size == 0, "it is not mapped"
        data, _ = bench.read(handle)
        assert data == x.tobytes(), (dtype, x.shape)
    bench.clear()
    if bench.driver.far:
        return
    assert bench.driver.do("client_stats")["copied_bytes"] == before, "a get copied"
    assert bench.driver.do("stats")["stats"]["copied_bytes"] == host_before, "the host copied"


# Kernels


def kernel_cases():
    for entry in CASES["kernels"]:
        for dtype in entry["dtypes"]:
            each = [{key: value} for key, values in entry.get("each", {}).items() for value in values] or [{}]
            parameters = [{**entry.get("parameters", {}), **more} for more in each]
            words = ",".join(f"{key}={value}" for key, value in entry.get("parameters", {}).items())
            yield pytest.param(entry, dtype, parameters, id="-".join(filter(None, [entry["kernel"], dtype, entry["fill"], words])))


@pytest.mark.parametrize("entry, dtype, parameters", list(kernel_cases()))
def test_kernel(driver, bench, entry, dtype, parameters):
    for shape in entry["shapes"]:
        x = reference.make(dtype, shape, entry["fill"])
        handle, _ = bench.make(x, dtype, "segment")
        for given in parameters:
            wanted, to, notes = reference.expected(entry["kernel"], given, x, dtype)
            data, answer = bench.call(entry["kernel"], {"x": {"handle": handle}}, parameters=given)
            output = answer["outputs"]["y"]
            assert (output["dtype"], output["shape"]) == (to, list(wanted.shape)), (given, shape)
            reference.check(data["y"], wanted, to, entry["tolerance"], entry.get("zero_sign"))
            said = {note["key"]: note["text"] for note in answer["notes"]}
            assert {key: said.get(key) for key in notes} == notes
            # A result without a segment was copied out of its frame.
            if not driver.far:
                assert answer["client_copied_bytes"] == (output["bytes"] if output["inode"] == 0 else 0)


PRODUCTS = CASES["products"]


@pytest.mark.parametrize("dtype", PRODUCTS["dtypes"])
def test_products(driver, bench, dtype):
    shapes = [*PRODUCTS["shapes"], *([PRODUCTS["large"]["shape"]] if PRODUCTS["large"]["dtype"] == dtype else [])]
    for how in ("copy", "segment"):
        for rows, terms, columns in shapes:
            # Small integers: sums of their products are exact in every order.
            a, b = (np.rint(reference.make(dtype, shape, "normal")) for shape in ([rows, terms], [terms, columns]))
            inputs = {port: {"handle": bench.make(x, dtype, how)[0]} for port, x in (("a", a), ("b", b))}
            data, answer = bench.call(PRODUCTS["kernel"], inputs)
            same(answer["outputs"]["y"], np.empty((rows, columns), dtype), dtype)
            reference.check(data["y"], a @ b, dtype)


@pytest.mark.parametrize("past", BEHAVIOUR["threshold"]["elements_past_move_min_bytes"])
@pytest.mark.parametrize("dtype", BEHAVIOUR["threshold"]["dtypes"])
def test_both_sides_of_move_min_bytes(driver, bench, dtype, past):
    kernel = BEHAVIOUR["threshold"]["kernel"]
    size = reference.numpy_dtype(dtype).itemsize
    count = -(-driver.welcome["move_min_bytes"] // size) + past
    x = reference.make(dtype, [count], "normal")
    handle, _ = bench.make(x, dtype, "segment")
    given = {"lo": -1.0, "hi": 2.0}
    wanted, _, _ = reference.expected(kernel, given, x, dtype)
    data, answer = bench.call(kernel, {"x": {"handle": handle}}, parameters=given)
    reference.check(data["y"], wanted, dtype)
    assert answer["copied_bytes"] == (2 * x.nbytes if past < 0 else 0), "one copy in and one out below, none from there on"


def test_kernels_are_listed(driver):
    kernels = {kernel["name"]: kernel for kernel in driver.do("kernels")["kernels"]}
    for entry in CASES["kernels"]:
        kernel = kernels[entry["kernel"]]
        assert (kernel["inputs"], kernel["outputs"]) == (["x"], ["y"]) and kernel["doc"]
        given = {*entry.get("parameters", {}), *entry.get("each", {})}
        assert given <= set(kernel["parameters"])
    product = kernels[PRODUCTS["kernel"]]
    assert (product["inputs"], product["outputs"]) == (["a", "b"], ["y"]) and product["doc"]


# Zero copy


def test_zero_copy(driver, bench):
    dtype, shape = BEHAVIOUR["zero_copy"]["dtype"], BEHAVIOUR["zero_copy"]["shape"]
    x = reference.make(dtype, shape, "normal")
    handle, made = bench.make(x, dtype, "segment")
    assert made["inode"] != 0
    before = driver.do("stats")["stats"]["copied_bytes"]
    given = {"a": 3.0, "b": -1.0}
    data, answer = bench.call("scale-shift", {"x": {"handle": handle}}, keep=["y"], parameters=given, verify=True)
    y, _, _ = reference.expected("scale-shift", given, x, dtype)
    reference.check(data["y"], y, dtype)
    assert page(answer, "x") == place(made), "the kernel did not work on the pages that the client filled"
    assert page(answer, "y") == place(answer["outputs"]["y"]), "the client does not map the pages that the kernel wrote"

    first = answer["handles"]["y"]
    data, answer = bench.call("scale-shift", {"x": {"handle": first}}, parameters=given, verify=True)
    assert page(answer, "x") == place(bench.read(first)[1]), "a result was copied to become an input"
    reference.check(data["y"], reference.expected("scale-shift", given, y, dtype)[0], dtype)

    name, put = bench.put(first)
    got, answer = bench.get(name)
    assert put["copied_bytes"] == 0 and place(answer) == place(bench.read(first)[1]), "publishing a result copied it"
    name, put = bench.put(handle)
    got, answer = bench.get(name)
    assert put["copied_bytes"] == 0 and place(answer) == place(made), "publishing a segment copied it"
    assert bench.read(got)[0] == x.tobytes()
    assert driver.do("stats")["stats"]["copied_bytes"] == before, "the host copied"


def test_an_ordinary_array_is_copied_once(driver, bench):
    dtype, shape = BEHAVIOUR["zero_copy"]["dtype"], BEHAVIOUR["zero_copy"]["shape"]
    x = reference.make(dtype, shape, "normal")
    handle, made = bench.make(x, dtype, "copy")
    for _ in range(3):
        data, answer = bench.call("scale-shift", {"x": {"handle": handle}}, parameters={"a": 2.0})
        assert (answer["client_copied_bytes"], answer["copied_bytes"]) == (x.nbytes, 0)
        reference.check(data["y"], x * 2, dtype)
    mappings = driver.do("client_stats")["mappings"]
    data, answer = bench.call("scale-shift", {"x": {"handle": handle}}, repeat=5)
    assert answer["client_copied_bytes"] == 5 * x.nbytes and len(answer["seconds"]) == 5
    assert settled(lambda: driver.do("client_stats")["mappings"], lambda now: now <= mappings) <= mappings


# Small tensors


def framed(driver):
    copied = driver.do("stats")["stats"]["copied"]
    return copied["frame_in"], copied["frame_out"]


@pytest.mark.parametrize("dtype", BEHAVIOUR["small"]["dtypes"])
def test_small_tensors_travel_in_frames(driver, bench, dtype):
    for shape in BEHAVIOUR["small"]["shapes"]:
        x = reference.make(dtype, shape, "normal")
        ordinary, _ = bench.make(x, dtype, "copy")
        before, segments = framed(driver), driver.do("stats")["stats"]["segments"]
        given = {"lo": -1.0, "hi": 2.0}
        wanted, _, _ = reference.expected("clip", given, x, dtype)
        data, answer = bench.call("clip", {"x": {"handle": ordinary}}, keep=["y"], parameters=given)
        reference.check(data["y"], wanted, dtype)
        same(answer["outputs"]["y"], x, dtype)
        assert place(answer["outputs"]["y"]) == (0, 0), "a small result has a segment"
        assert answer["client_copied_bytes"] == 2 * x.nbytes, "into a frame and out of one"
        assert framed(driver) == (before[0] + x.nbytes, before[1] + x.nbytes)
        # What earlier tests let go of may end meanwhile.
        assert driver.do("stats")["stats"]["segments"] <= segments, "a small call made a segment"

        # It goes on in a frame, and is published by a copy.
        first = answer["handles"]["y"]
        assert bench.read(first)[0] == data["y"]
        again, answer = bench.call("clip", {"x": {"handle": first}}, parameters=given)
        assert again["y"] == data["y"]
        assert framed(driver) == (before[0] + 2 * x.nbytes, before[1] + 2 * x.nbytes)
        name, put = bench.put(first)
        counted(driver, put["copied_bytes"], x.nbytes, x.nbytes)
        assert bench.read(bench.get(name)[0])[0] == data["y"]
        assert bench.read(first)[0] == data["y"]


@pytest.mark.parametrize("more", [0, 1])
def test_both_sides_of_inline_bytes(driver, bench, more):
    count = driver.welcome["inline_bytes"] // 8 + more
    x = reference.make("float64", [count], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    before = framed(driver)
    data, answer = bench.call("scale-shift", {"x": {"handle": handle}}, parameters={"a": 2.0})
    reference.check(data["y"], x * 2, "float64")
    small = more == 0
    assert (answer["outputs"]["y"]["inode"] == 0) == small
    assert answer["client_copied_bytes"] == (2 * x.nbytes if small else x.nbytes)
    assert framed(driver) == ((before[0] + x.nbytes, before[1] + x.nbytes) if small else before)


def test_a_small_result_is_a_segment_if_asked(driver, bench):
    x = reference.make("float64", [10], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    before = framed(driver)
    data, answer = bench.call("scale-shift", {"x": {"handle": handle}}, keep=["y"], inline_bytes=0)
    assert data["y"] == x.tobytes()
    assert answer["outputs"]["y"]["inode"] != 0 and framed(driver) == (before[0] + x.nbytes, before[1])
    name, put = bench.put(answer["handles"]["y"])
    got, mapped = bench.get(name)
    assert put["copied_bytes"] == 0 and place(mapped) == place(answer["outputs"]["y"])


def test_a_segment_can_be_filled_again(driver, bench):
    x = reference.make("float32", [50, 3], "normal")
    handle, _ = bench.make(x, "float32", "segment")
    for salt in ("a", "b"):
        x = reference.make("float32", [50, 3], "normal", salt)
        file = bench.folder / unique("in")
        file.write_bytes(x.tobytes())
        driver.do("write", handle=handle, file=str(file))
        data, _ = bench.call("scale-shift", {"x": {"handle": handle}}, parameters={"a": 2.0})
        reference.check(data["y"], x * np.float32(2), "float32")


def test_published_outputs(driver, bench):
    x = reference.make("float64", [6, 2], "normal")
    handle, _ = bench.make(x, "float64", "segment")
    name = unique("flight")
    bench._flights.append(name)
    data, _ = bench.call("scale-shift", {"x": {"handle": handle}}, publish={"y": name})
    got, _ = bench.get(name)
    assert bench.read(got)[0] == data["y"]
    again, _ = bench.call("scale-shift", {"x": name}, parameters={"a": 2.0}, publish={"y": name}, replace=True)
    assert again["y"] == (x * 2).tobytes()
    assert bench.read(bench.get(name)[0])[0] == again["y"]
    assert bench.read(got)[0] == data["y"], "what was mapped before the replacement changed"


# Prepared calls


def prepared_cases():
    for index, entry in enumerate(CASES["prepared"]["kernels"]):
        for dtype in entry["dtypes"]:
            yield pytest.param(entry, dtype, id=f"{entry['kernel']}-{dtype}-{index}")


@pytest.mark.parametrize("entry, dtype", list(prepared_cases()))
def test_prepared_calls(driver, bench, entry, dtype):
    kernel, given = entry["kernel"], entry["parameters"]
    for shapes in entry["shapes"]:
        most = shapes["most"]
        prepared, answer = bench.prepare(kernel, {"x": {"dtype": dtype, "shape": most}}, parameters=given)
        assert answer["inputs"] == [{"port": "x", "dtype": dtype, "shape": most}]
        (output,) = answer["outputs"]
        for index, shape in enumerate(shapes["calls"]):
            x = reference.make(dtype, shape, entry["fill"], salt=str(index))
            handle, _ = bench.make(x, dtype, "segment" if index % 2 else "copy")
            wanted, to, notes = reference.expected(kernel, given, x, dtype)
            assert (output["port"], output["dtype"]) == ("y", to)
            before = framed(driver)
            data, answer = bench.call_prepared(prepared, {"x": {"handle": handle}})
            same(answer["outputs"]["y"], wanted.astype(reference.numpy_dtype(to)), to)
            assert place(answer["outputs"]["y"]) == (0, 0)
            reference.check(data["y"], wanted, to, entry["tolerance"], entry.get("zero_sign"))
            assert {note["key"]: note["text"] for note in answer["notes"]} == notes
            bytes_out = answer["outputs"]["y"]["bytes"]
            assert answer["client_copied_bytes"] == x.nbytes + bytes_out, "into a frame and out of one"
            assert framed(driver) == (before[0] + x.nbytes, before[1] + bytes_out)
        bench.close_prepared(prepared)


def test_prepared_refuses_what_was_not_prepared(driver, bench):
    plan = CASES["prepared"]["refused"]
    prepared, _ = bench.prepare("scale-shift", {"x": plan["most"]}, parameters={"a": 2.0})
    x = reference.make(plan["most"]["dtype"], plan["most"]["shape"], "normal")
    right, _ = bench.make(x, plan["most"]["dtype"])
    before = framed(driver)
    misfits = [[bench.make(reference.make(wrong["dtype"], wrong["shape"], "normal"), wrong["dtype"])[0]] for wrong in plan["calls"]]
    for handles in [*misfits, [], [right, right]]:
        inputs = {port: {"handle": handle} for port, handle in zip("xz", handles)}
        failed(driver.ask("call_prepared", prepared=prepared, inputs=inputs), {"kinds": ["argument"]})
    assert framed(driver) == before, "a misfit was sent"
    data, _ = bench.call_prepared(prepared, {"x": {"handle": right}})
    assert data["y"] == (x * 2).tobytes()


def test_prepare_refuses_what_an_invoke_would(driver, bench):
    spec = {"dtype": "float64", "shape": [3]}
    for kernel, inputs, parameters, code, reason in [
        ("no-such-kernel", {"x": spec}, {}, "NOT_FOUND", "KERNEL_NOT_FOUND"),
        ("scale-shift", {"x": spec}, {"slope": 2.0}, "INVALID_ARGUMENT", "UNKNOWN_PARAMETER"),
        ("scale-shift", {"x": {**spec, "dtype": "int8"}}, {}, "INVALID_ARGUMENT", "BAD_INPUT"),
        ("scale-shift", {"x": CASES["prepared"]["too_large"]}, {}, "INVALID_ARGUMENT", "BAD_INPUT"),
        ("scale-shift", {"x": "no-such-flight"}, {}, "NOT_FOUND", "FLIGHT_NOT_FOUND"),
        ("scale-shift", {}, {}, "INVALID_ARGUMENT", "MISSING_INPUT"),
    ]:
        request = unique("request")
        answer = driver.ask("prepare", kernel=kernel, inputs=inputs, parameters=parameters, request_id=request, **{"as": unique()})
        failed(answer, remote(code, reason), request)
    driver.do("list")


def test_prepared_with_inputs_that_are_the_same_for_all_calls(driver, bench):
    x = reference.make("float64", [40, 3], "normal")
    segment, _ = bench.make(x, "float64", "segment")
    ordinary, _ = bench.make(x, "float64", "copy")
    name, _ = bench.put(bench.make(x, "float64", "copy")[0])
    # A client calls the tensor what it will.
    [listed] = [flight for flight in driver.do("list")["flights"] if flight["name"] == name]
    tensor = listed["tensors"][0]["name"]
    for fixed in ({"handle": segment}, {"handle": ordinary}, name, f"{name}#{tensor}"):
        prepared, answer = bench.prepare("scale-shift", {"x": fixed}, parameters={"a": 3.0})
        assert answer["inputs"] == []
        for _ in range(2):
            before = framed(driver)
            data, answer = bench.call_prepared(prepared, {})
            assert data["y"] == (x * 3).tobytes()
            assert answer["client_copied_bytes"] == x.nbytes and framed(driver) == (before[0], before[1] + x.nbytes)
    # It stays, whatever becomes of its name.
    driver.do("delete", name=name)
    data, _ = bench.call_prepared(prepared, {})
    assert data["y"] == (x * 3).tobytes()


def test_prepared_goes_on_after_a_trap(driver, plugin_host, tmp_path):
    connect(driver, plugin_host("traps"))
    bench = Bench(driver, tmp_path)
    x = reference.make("float64", [100], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    spec = {"dtype": "float64", "shape": [100]}
    request = unique("request")
    traps, _ = bench.prepare("k", {"x": spec}, request_id=request)
    scales, _ = bench.prepare("scale-shift", {"x": spec}, parameters={"a": 2.0})
    for _ in range(3):
        answer = driver.ask("call_prepared", prepared=traps, inputs={"x": {"handle": handle}})
        failed(answer, remote("INTERNAL", "GUEST_TRAP"), request)
        assert answer["backtrace"]
        data, _ = bench.call_prepared(scales, {"x": {"handle": handle}})
        assert data["y"] == (x * 2).tobytes()
    bench.clear()


def test_deadline_and_cancel_of_a_prepared_call(driver, plugin_host, tmp_path):
    connect(driver, plugin_host("spins"))
    bench = Bench(driver, tmp_path)
    handle, _ = bench.make(np.ones(10), "float64", "copy")
    spec, inputs = {"dtype": "float64", "shape": [10]}, {"x": {"handle": handle}}
    late, _ = bench.prepare("k", {"x": spec}, **BEHAVIOUR["deadline"])
    spins, _ = bench.prepare("k", {"x": spec}, deadline_ms=60000)
    scales, _ = bench.prepare("scale-shift", {"x": spec}, parameters={"a": 2.0})
    for _ in range(2):
        failed(driver.ask("call_prepared", prepared=late, inputs=inputs), remote("DEADLINE_EXCEEDED", "DEADLINE"))
        answer = driver.ask("call_prepared", prepared=spins, inputs=inputs, cancel_after_ms=BEHAVIOUR["cancel"]["after_ms"])
        failed(answer, remote("CANCELLED", "CANCELLED"))
        data, _ = bench.call_prepared(scales, inputs)
        assert data["y"] == (np.ones(10) * 2).tobytes()
    assert settled(lambda: driver.do("stats")["stats"]["running"], lambda now: now == 0) == 0
    bench.clear()


def test_prepared_ends_with_its_session(driver, host, bench):
    x = reference.make("float64", [10], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    prepared, _ = bench.prepare("scale-shift", {"x": {"dtype": "float64", "shape": [10]}})
    bench.call_prepared(prepared, {"x": {"handle": handle}})
    driver.address = None
    driver.do("close")
    failed(driver.ask("call_prepared", prepared=prepared, inputs={"x": {"handle": handle}}), {"kinds": ["disconnected"]})
    bench._prepared.clear()
    connect(driver, host)


def test_prepared_ends_with_its_host(driver, plugin_host, tmp_path):
    plugin_host("spins")
    host = Host([Path(os.environ["STRAIT_TEST_PLUGINS"]) / "spins.wasm"])
    try:
        connect(driver, host)
        bench = Bench(driver, tmp_path)
        handle, _ = bench.make(np.ones(10), "float64", "copy")
        spec, inputs = {"dtype": "float64", "shape": [10]}, {"x": {"handle": handle}}
        spins, _ = bench.prepare("k", {"x": spec}, deadline_ms=60000)
        scales, _ = bench.prepare("scale-shift", {"x": spec})
        driver.send("call_prepared", prepared=spins, inputs=inputs)
        time.sleep(BEHAVIOUR["killed"]["after_ms"] / 1000)
        host.kill()
        failed(driver.answer("call_prepared"), {"kinds": ["disconnected"]})
        for prepared in (spins, scales):
            failed(driver.ask("call_prepared", prepared=prepared, inputs=inputs), {"kinds": ["disconnected"]})
    finally:
        driver.address = None
        host.stop()


def test_prepared_calls_make_nothing_and_leave_nothing(driver, bench):
    plan = CASES["prepared"]["repeated"]
    x = reference.make(plan["dtype"], plan["shape"], "normal")
    handle, _ = bench.make(x, plan["dtype"], "copy")
    spec, inputs = {"dtype": plan["dtype"], "shape": plan["shape"]}, {"x": {"handle": handle}}

    def counts():
        stats = driver.do("stats")["stats"]
        process, ours = stats["process"], driver.counts()
        return {
            "descriptors of the host": process["fds"],
            "threads of the host": process["threads"],
            "connections": stats["account"]["connections"],
            "segments": stats["segments"],
            "leases": stats["own"]["leases"],
            "descriptors of the client": ours["fds"],
            "mappings of the client": ours["mappings"],
        }

    def once(repeat):
        prepared, _ = bench.prepare("scale-shift", {"x": spec}, parameters={"a": 2.0})
        before = driver.do("stats")["stats"]
        data, answer = bench.call_prepared(prepared, inputs, repeat=repeat)
        assert data["y"] == (x * 2).tobytes() and len(answer["seconds"]) == repeat
        assert answer["client_copied_bytes"] == 2 * x.nbytes * repeat
        after = driver.do("stats")["stats"]
        # What earlier tests let go of may end meanwhile.
        assert after["segments"] <= before["segments"] and after["own"]["leases"] <= before["own"]["leases"]
        assert after["copied"]["frame_in"] - before["copied"]["frame_in"] == x.nbytes * repeat
        assert after["copied"]["frame_out"] - before["copied"]["frame_out"] == x.nbytes * repeat
        bench.close_prepared(prepared)

    once(plan["calls"])
    before = counts()
    for _ in range(plan["prepares"]):
        once(1)
    once(plan["calls"])
    slack = BEHAVIOUR["thousand"]["slack"]
    grown = lambda now: {what: (before[what], now[what]) for what in now if now[what] > before[what] + slack}
    after = settled(counts, lambda now: not grown(now))
    assert not grown(after), grown(after)


# Failures


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"].replace(" ", "-")) for case in CASES["failures"]])
def test_failure(driver, bench, case):
    handles = {}
    for word, array in case["arrays"].items():
        handles[word], _ = bench.make(reference.make(array["dtype"], array["shape"], "normal"), array["dtype"])
    for word, name in case.get("publish", {}).items():
        bench.put(handles[word], name)
    for word, name in case.get("get", {}).items():
        handles[word], _ = bench.get(name)
    for word in case.get("release", []):
        driver.do("release", handle=handles[word])
        bench.drop(handles[word])

    request = dict(case["request"])
    if "handle" in request:
        request["handle"] = handles[request["handle"]]
    if "file" in request:
        request["file"] = str(bench.folder / request["file"])
    if "inputs" in request:
        request["inputs"] = {
            port: {"handle": handles[given["handle"]]} if isinstance(given, dict) else given
            for port, given in request["inputs"].items()
        }
    if request["op"] == "call":
        request["request_id"] = unique("request")
    failed(driver.ask(**request), case["expect"], request.get("request_id"))
    driver.do("list")


def failed(answer, expect, request_id=None):
    assert answer["ok"] is False and answer["kind"] in expect["kinds"], answer
    if answer["kind"] == "remote":
        assert (answer["code"], answer["reason"]) == (expect["code"], expect["reason"]), answer
        assert answer["request_id"] and request_id in (None, answer["request_id"]), answer
    for word in expect.get("says", []):
        assert word in answer["message"], answer


def remote(code, reason):
    return {"kinds": ["remote"], "code": code, "reason": reason}


def test_no_host(driver, bench, tmp_path):
    driver.address = None
    failed(driver.ask("connect", address=driver.address_of(f"unix://{tmp_path}")), {"kinds": ["no_host"], "says": [str(tmp_path)]})


def test_a_dead_host_is_told_apart(driver, tmp_path):
    host = Host()
    try:
        connect(driver, host)
        bench = Bench(driver, tmp_path)
        x = reference.make("float64", [70000], "normal")
        handle, _ = bench.make(x, "float64", "segment")
        name, _ = bench.put(handle)
        got, _ = bench.get(name)
        driver.do("list")
        host.kill()
        failed(driver.ask("list"), {"kinds": ["disconnected"]})
        failed(driver.ask("call", kernel="scale-shift", inputs={"x": {"handle": got}}), {"kinds": ["disconnected"]})
        assert bench.read(got)[0] == x.tobytes(), "mapped pages outlive the host"
        driver.address = None
        failed(driver.ask("connect", address=driver.address_of(host)), {"kinds": ["no_host"]})
        driver.do("release", handle=got)
    finally:
        driver.address = None
        host.stop()


def test_a_closed_session(driver, bench):
    x = reference.make("float32", [1000], "normal")
    handle, _ = bench.make(x, "float32", "segment")
    name, _ = bench.put(handle)
    got, _ = bench.get(name)
    driver.address = None
    driver.do("close")
    failed(driver.ask("list"), {"kinds": ["disconnected"]})
    assert bench.read(got)[0] == x.tobytes()
    driver.do("release", handle=got)
    bench.drop(got)


def test_host_killed_during_a_call(driver, plugin_host, tmp_path):
    plugin_host("spins")
    host = Host([Path(os.environ["STRAIT_TEST_PLUGINS"]) / "spins.wasm"])
    try:
        connect(driver, host)
        handle, _ = Bench(driver, tmp_path).make(np.ones(10), "float64", "segment")
        driver.send("call", kernel="k", inputs={"x": {"handle": handle}}, deadline_ms=60000)
        time.sleep(BEHAVIOUR["killed"]["after_ms"] / 1000)
        host.kill()
        failed(driver.answer("call"), {"kinds": ["disconnected"]})
    finally:
        driver.address = None
        host.stop()


def test_trap(driver, plugin_host, tmp_path):
    connect(driver, plugin_host("traps"))
    bench = Bench(driver, tmp_path)
    x = reference.make("float64", [100000], "normal")
    handle, _ = bench.make(x, "float64", "segment")
    for _ in range(3):
        answer = driver.ask("call", kernel="k", inputs={"x": {"handle": handle}})
        failed(answer, remote("INTERNAL", "GUEST_TRAP"))
        assert answer["backtrace"]
    assert bench.read(handle)[0] == x.tobytes(), "the input changed"
    data, _ = bench.call("scale-shift", {"x": {"handle": handle}})
    assert data["y"] == x.tobytes()
    bench.clear()


def test_deadline_and_cancel(driver, plugin_host, tmp_path):
    connect(driver, plugin_host("spins"))
    bench = Bench(driver, tmp_path)
    handle, _ = bench.make(np.ones(10), "float64", "segment")
    spin = {"kernel": "k", "inputs": {"x": {"handle": handle}}}
    failed(driver.ask("call", **spin, **BEHAVIOUR["deadline"]), remote("DEADLINE_EXCEEDED", "DEADLINE"))
    answer = driver.ask("call", **spin, deadline_ms=60000, cancel_after_ms=BEHAVIOUR["cancel"]["after_ms"])
    failed(answer, remote("CANCELLED", "CANCELLED"))
    data, _ = bench.call("scale-shift", {"x": {"handle": handle}})
    assert data["y"] == np.ones(10).tobytes()
    assert driver.do("stats")["stats"]["running"] == 0
    bench.clear()


def test_a_plugin_beside_the_standard_ones(driver, plugin_host, tmp_path):
    connect(driver, plugin_host("copies"))
    bench = Bench(driver, tmp_path)
    x = reference.make("float64", [300, 300], "any")
    handle, made = bench.make(x, "float64", "segment")
    data, answer = bench.call("k", {"x": {"handle": handle}}, verify=True)
    assert data["y"] == x.tobytes()
    assert page(answer, "x") == place(made) and answer["copied_bytes"] == 0
    bench.clear()


# Leases


def test_expired_lease(driver, host, bench):
    x = reference.make("float64", [1000], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    name, _ = bench.put(handle)
    times = BEHAVIOUR["lease"]
    try:
        connect(driver, host, renew=False)
        got, _ = bench.get(name, lease_ms=times["lease_ms"])
        time.sleep(times["wait_ms"] / 1000)
        failed(driver.ask("renew", handle=got), {"kinds": ["lease_expired"]})
        failed(driver.ask("call", kernel="scale-shift", inputs={"x": {"handle": got}}), {"kinds": ["lease_expired"]})
        assert bench.read(got)[0] == x.tobytes()
        driver.do("release", handle=got)
        bench.drop(got)

        got, _ = bench.get(name, lease_ms=60000)
        assert 0 < driver.do("renew", handle=got, lease_ms=5000)["expires_ms"] <= 5000
        bench.call("scale-shift", {"x": {"handle": got}})
    finally:
        connect(driver, host)


def test_leases_are_renewed(driver, bench):
    x = reference.make("float64", [1000], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    name, _ = bench.put(handle)
    got, _ = bench.get(name, lease_ms=BEHAVIOUR["lease"]["lease_ms"])
    time.sleep(BEHAVIOUR["lease"]["wait_ms"] / 1000)
    data, _ = bench.call("scale-shift", {"x": {"handle": got}})
    assert data["y"] == x.tobytes()


def test_release_and_forget(driver, bench):
    x = reference.make("float64", [1000], "normal")
    handle, _ = bench.make(x, "float64", "copy")
    name, _ = bench.put(handle)
    own = lambda: driver.do("stats")["stats"]["own"]["leases"]
    driver.do("list")
    before = settled(own, lambda now: now == 0)
    for op in ("release", "forget"):
        got, _ = bench.get(name)
        assert own() == before + 1
        driver.do(op, handle=got)
        bench.drop(got)
        assert settled(own, lambda now: now <= before) <= before, op


# Many calls


def test_concurrent_callers(driver, bench):
    plan = BEHAVIOUR["concurrent"]
    x = reference.make("float64", plan["shape"], "normal")
    segment, _ = bench.make(x, "float64", "segment")
    ordinary, _ = bench.make(x, "float64", "copy")
    calls, files = [], []
    for index in range(plan["callers"]):
        files.append(bench.folder / unique("out"))
        calls.append(
            {
                "kernel": "scale-shift",
                "inputs": {"x": {"handle": ordinary if index % 4 == 3 else segment}},
                "parameters": {"a": index + 1.0, "b": float(index)},
                "files": {"y": str(files[-1])},
            }
        )
    answers = driver.do("concurrent", calls=calls, repeat=plan["repeat"])["answers"]
    assert len(answers) == plan["callers"]
    for index, (answer, file) in enumerate(zip(answers, files)):
        assert answer["ok"], answer
        reference.check(file.read_bytes(), x * (index + 1.0) + index, "float64")
    assert driver.do("stats")["stats"]["running"] == 0


@pytest.mark.parametrize("how", ["segment", "copy"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_many_calls_leave_nothing(driver, bench, how, size):
    plan = BEHAVIOUR["thousand"]
    calls, shape = (plan["calls"], plan["shape"]) if size == "small" else (plan["large_calls"], plan["large_shape"])
    x = reference.make("float64", shape, "normal")
    handle, _ = bench.make(x, "float64", how)
    call = lambda repeat: bench.call("scale-shift", {"x": {"handle": handle}}, parameters={"a": 2.0}, repeat=repeat)
    call(max(1, calls * plan["warm_up"] // plan["calls"]))

    def counts():
        stats = driver.do("stats")["stats"]
        process, own = stats["process"], stats["own"]
        ours = driver.counts()
        return {
            "descriptors of the host": process["fds"],
            "mappings of the host": process["mappings"],
            "threads of the host": process["threads"],
            "segments": stats["segments"],
            "leases": stats["leases"],
            "own leases": own["leases"],
            "own segments": own["segments"],
            "resident bytes of the host": process["resident_bytes"],
            "descriptors of the client": ours["fds"],
            "mappings of the client": ours["mappings"],
        }

    slack = {"resident bytes of the host": plan["resident_bytes_more"]}
    before = counts()
    data, answer = call(calls)
    assert len(answer["seconds"]) == calls
    reference.check(data["y"], x * 2, "float64")
    grown = lambda now: {
        what: (before[what], now[what]) for what in now if now[what] > before[what] + slack.get(what, plan["slack"])
    }
    after = settled(counts, lambda now: not grown(now))
    assert not grown(after), grown(after)


# Fork


def test_fork(driver, bench):
    x = reference.make("float64", [1000], "normal")
    handle, _ = bench.make(x, "float64", "segment")
    child = driver.do("fork")["child"]
    if driver.fork == "refused":
        assert child["ok"] is False and child["kind"] == "forked", child
    else:
        assert child == "unsupported"
    data, _ = bench.call("scale-shift", {"x": {"handle": handle}})
    assert data["y"] == x.tobytes()
