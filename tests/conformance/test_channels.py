"""Channels: what one driver's stream writes another driver reads. README.md says how."""

import os

import numpy as np
import pytest

import reference
from test_conformance import CASES, Bench, failed, remote, settled, unique

PLAN = CASES["channels"]


class Side(Bench):
    """One end of channels."""

    def __init__(self, driver, folder):
        if not driver.has_channels:
            pytest.skip(f"{driver.language}: its driver has no channel_produce and channel_read yet")
        super().__init__(driver, folder)

    def produces(self, handle, cuts, channel, kernel="cumsum", rows=4, **fields):
        """Begins to write; `driver.answer` waits for the end of it."""
        channel = channel if isinstance(channel, dict) else {"name": channel}
        inputs = {"x": {"handle": handle}}
        self.driver.send("channel_produce", kernel=kernel, channel=channel, inputs=inputs, rows=rows, cuts=cuts, **fields)

    def produced(self):
        answer = self.driver.answer("channel_produce")
        assert answer["ok"] is True, f"{self.driver.language}: {answer}"
        return answer["chunks"]

    def begins(self, channel, ports=("y",), **fields):
        """Begins to read; the files that get the rows."""
        files = {port: str(self.folder / unique("out")) for port in ports}
        self.driver.send("channel_read", channel=channel, files=files, **fields)
        return files

    def has_read(self, files):
        answer = self.driver.answer("channel_read")
        assert answer["ok"] is True, f"{self.driver.language}: {answer}"
        return came(files), answer

    def reads(self, channel, **fields):
        """Bytes of each output, and the answer, which must be a success."""
        return self.has_read(self.begins(channel, **fields))

    def channel(self, name):
        """What the host says of it."""
        return next((found for found in self.driver.do("stats")["stats"]["channels"] if found["name"] == name), None)

    def await_channel(self, name, wanted=lambda found: True):
        found = settled(lambda: self.channel(name), lambda found: found is not None and wanted(found))
        assert found is not None and wanted(found), found
        return found

    def clear(self):
        if self.driver.owed:
            # What a test that failed did not wait for is nothing to the next one.
            self.driver.kill()
        super().clear()

    def leave(self):
        """Ends its session, and what was kept open in it."""
        self.driver.address = None
        self.driver.do("close")


def came(files):
    data = {}
    for port, file in files.items():
        data[port] = b""
        if os.path.exists(file):
            with open(file, "rb") as read:
                data[port] = read.read()
            os.unlink(file)
    return data


@pytest.fixture
def side(tmp_path):
    """Makes an end with that driver."""
    made = []

    def make(driver):
        made.append(Side(driver, tmp_path))
        return made[-1]

    yield make
    for side in made:
        side.clear()


@pytest.fixture
def writer(drivers, language, side):
    return side(drivers[language])


@pytest.fixture
def reader(readers, language, side):
    return side(readers[language])


def ones(writer, count):
    return writer.make(np.ones(count), "float64")[0]


def sums(first, last):
    return np.arange(first, last + 1, dtype=np.float64).tobytes()


@pytest.mark.parametrize("entry", [pytest.param(entry, id=f"{entry['kernel']}-{entry['dtype']}") for entry in PLAN["kernels"]])
def test_each_reads_what_each_writes(drivers, readers, side, producer, consumer, entry):
    writer, reader = side(drivers[producer]), side(readers[consumer])
    x = reference.make(entry["dtype"], entry["shape"], entry["fill"], salt=producer)
    random = np.random.default_rng(len(producer) * 31 + len(consumer))
    handle, _ = writer.make(x, entry["dtype"], "segment" if random.integers(2) else "copy")
    ports = entry.get("outputs", ["y"])
    expected, answer = writer.call(entry["kernel"], {"x": {"handle": handle}}, parameters=entry["parameters"], ports=ports)
    outputs = answer["outputs"]
    notes = {note["key"]: note["text"] for note in answer["notes"]}
    cuts = []
    while sum(cuts) < len(x):
        cuts.append(int(random.integers(0, min(entry["rows"], len(x) - sum(cuts)) + 1)))
    name = unique("channel")
    options = dict(kernel=entry["kernel"], rows=entry["rows"], parameters=entry["parameters"])
    writer.produces(handle, cuts, {"name": name, "batches": PLAN["batches"]}, **options)
    reader.await_channel(name)
    data, answer = reader.reads(name, ports=ports)
    assert writer.produced() == len(cuts)
    assert data == expected, "the same bits as one call on all rows"
    assert answer["kernel"] == entry["kernel"] and answer["ended"] is True
    assert answer["numbers"] == list(range(1, len(answer["numbers"]) + 1))
    for told, port in zip(answer["outputs"], ports):
        whole = outputs[port]
        assert (told["port"], told["dtype"], told["shape"][1:]) == (port, whole["dtype"], whole["shape"][1:])
        rows = answer["rows"][port]
        assert len(rows) == len(answer["numbers"]) and sum(rows) == whole["shape"][0] and max(rows) <= told["shape"][0]
    assert all(map(any, zip(*(answer["rows"][port] for port in ports)))), "a batch without rows"
    assert {note["key"]: note["text"] for note in answer["notes"]} == notes


def test_a_full_channel_holds_its_producer_up_and_drops_nothing(writer, reader):
    handle, name = ones(writer, 6), unique("channel")
    writer.produces(handle, [1] * 6, {"name": name, "batches": 2})
    reader.await_channel(name, lambda found: found["lag_batches"] == 2)
    assert writer.driver.is_silent(PLAN["held_ms"] / 1000)
    found = reader.channel(name)
    assert (found["kernel"], found["batches"], found["lag_batches"], found["is_read"]) == ("cumsum", 2, 2, False)
    data, answer = reader.reads(name)
    assert writer.produced() == 6
    assert (data["y"], answer["numbers"]) == (sums(1, 6), [1, 2, 3, 4, 5, 6])
    assert reader.channel(name) is None
    failed(reader.driver.ask("channel_read", channel=name), remote("NOT_FOUND", "CHANNEL_NOT_FOUND"))


def test_a_stream_without_rows_ends(writer, reader):
    for cuts in ([], [0], [0, 0, 0]):
        handle, name = ones(writer, 0), unique("channel")
        writer.produces(handle, cuts, name)
        reader.await_channel(name)
        data, answer = reader.reads(name)
        assert writer.produced() == max(1, len(cuts))
        assert (data["y"], answer["numbers"], answer["ended"]) == (b"", [], True)


def test_a_reader_that_comes_back_goes_on_where_it_had_acknowledged(writer, reader):
    handle, name = ones(writer, 6), unique("channel")
    writer.produces(handle, [1] * 6, {"name": name, "batches": 4, "resume_ms": PLAN["resume_ms"]})
    reader.await_channel(name)
    # The last of them was not done with.
    data, answer = reader.reads(name, batches=3)
    assert (data["y"], answer["numbers"], answer["ended"]) == (sums(1, 3), [1, 2, 3], False)
    data, answer = reader.reads(name, batches=2, acknowledge=True)
    assert (data["y"], answer["numbers"]) == (sums(3, 4), [3, 4])
    # In another session.
    reader.leave()
    reader.driver.do("connect", address=writer.driver.address[0])
    data, answer = reader.reads(name)
    assert (data["y"], answer["numbers"], answer["ended"]) == (sums(5, 6), [5, 6], True)
    assert writer.produced() == 6


@pytest.mark.parametrize("how", ["close", "session", "kill"])
def test_a_producer_that_leaves_is_told_of(writer, reader, how):
    handle, name = ones(writer, 3), unique("channel")
    if how == "close":
        # It closes its stream only then.
        writer.produces(handle, [1, 1, 1], {"name": name, "batches": 2}, end="close")
        reader.await_channel(name)
    else:
        writer.produces(handle, [1, 1, 1], name, end="keep")
        assert writer.produced() == 3
    files = reader.begins(name)
    if how != "close":
        reader.driver.is_silent(PLAN["held_ms"] / 1000)
        writer.leave() if how == "session" else writer.driver.kill()
    failed(reader.driver.answer("channel_read"), remote("UNAVAILABLE", "PRODUCER_LOST"))
    assert came(files)["y"] == sums(1, 3), "what it had written came first"
    if how == "close":
        assert writer.produced() == 3


@pytest.mark.parametrize("how", ["close", "session", "kill"])
def test_a_reader_that_leaves_is_told_of(writer, reader, how):
    handle, name = ones(writer, 4), unique("channel")
    writer.produces(handle, [1] * 4, {"name": name, "batches": 1}, end="close")
    reader.await_channel(name)
    data, _ = reader.reads(name, batches=1, keep=how != "close")
    assert data["y"] == sums(1, 1)
    if how == "session":
        reader.leave()
    elif how == "kill":
        reader.driver.kill()
    answer = writer.driver.answer("channel_produce")
    failed(answer, remote("UNAVAILABLE", "CONSUMER_LOST"))
    assert answer["details"]["chunk"] == 1, answer


def test_a_kernel_that_fails_in_the_middle_tells_both(writer, reader):
    plan, name = PLAN["failing"], unique("channel")
    handle = ones(writer, plan["rows"] * plan["chunks"])
    options = {key: plan[key] for key in ("kernel", "rows", "parameters", "limits")}
    writer.produces(handle, [plan["rows"]] * plan["chunks"], {"name": name, "batches": PLAN["batches"]}, **options)
    reader.await_channel(name)
    files = reader.begins(name)
    told = [writer.driver.answer("channel_produce"), reader.driver.answer("channel_read")]
    for answer in told:
        assert answer["reason"] in plan["reasons"], answer
        failed(answer, remote(told[0]["code"], told[0]["reason"]))
        assert answer["details"]["chunk"] == told[0]["details"]["chunk"] > 1
    chunks = told[0]["details"]["chunk"]
    # None of its windows was full.
    assert np.isnan(np.frombuffer(came(files)["y"])).sum() == chunks * plan["rows"]


def test_a_producer_waits_no_longer_than_it_said(writer, reader):
    handle = ones(writer, 3)
    for is_read in (False, True):
        name = unique("channel")
        writer.produces(handle, [1] * 3, {"name": name, "batches": 1, "wait_ms": PLAN["wait_ms"]})
        if is_read:
            # It may be late for that.
            answer = reader.driver.ask("channel_read", channel=name, batches=1, keep=True)
            assert answer["ok"] or answer["reason"] == "CHANNEL_NOT_FOUND", answer
        answer = writer.driver.answer("channel_produce")
        failed(answer, remote("DEADLINE_EXCEEDED", "DEADLINE"))
        assert answer["details"]["chunk"] == 1
    reader.leave()


def test_names_and_turns(writer, reader):
    handle, name = ones(writer, 2), unique("channel")
    writer.produces(handle, [1, 1], name, end="keep")
    assert writer.produced() == 2
    writer.produces(handle, [1, 1], name)
    failed(writer.driver.answer("channel_produce"), remote("ALREADY_EXISTS", "NAME_TAKEN"))
    for wrong in ("", "a#b"):
        writer.produces(handle, [1, 1], wrong)
        failed(writer.driver.answer("channel_produce"), {**remote("INVALID_ARGUMENT", "BAD_NAME"), "kinds": ["remote", "argument"]})
    reader.reads(name, batches=1, keep=True)
    request = unique("request")
    answer = reader.driver.ask("channel_read", channel=name, request_id=request)
    failed(answer, remote("FAILED_PRECONDITION", "WRONG_STATE"), request)
    reader.leave()
    writer.leave()


def test_channels_leave_nothing(writer, reader):
    def counts():
        stats = reader.driver.do("stats")["stats"]
        return {
            "descriptors of the host": stats["process"]["fds"],
            "threads of the host": stats["process"]["threads"],
            "connections": stats["account"]["connections"],
            "bytes": stats["account"]["bytes"],
            "channels": len(stats["channels"]),
            "descriptors of the producer": writer.driver.counts()["fds"],
            "descriptors of the consumer": reader.driver.counts()["fds"],
        }

    def once():
        name = unique("channel")
        writer.produces(handle, [1] * 5, {"name": name, "batches": 2})
        reader.await_channel(name)
        reader.reads(name)
        assert writer.produced() == 5

    handle = ones(writer, 5)
    once()
    before = settled(counts, lambda now: now["channels"] == 0)
    for _ in range(10):
        once()
    slack = CASES["behaviours"]["thousand"]["slack"]
    after = settled(counts, lambda now: all(now[what] <= before[what] + slack for what in now))
    assert all(after[what] <= before[what] + slack for what in after), (before, after)
