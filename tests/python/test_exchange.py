"""Stock pyarrow streams batches through kernels: DoExchange.

Needs pytest, numpy, pyarrow, and the host's program in STRAIT_BIN.
"""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
from conftest import PATIENCE_SECONDS, Host, command, environment, put, stats, wait_for
from pyarrow import flight

MIB = 1 << 20


def cmd(kernel, inputs=None, rows=None, **parameters):
    body = {"kernel": kernel, "inputs": inputs or {}, "parameters": parameters}
    if rows:
        body["rows"] = rows
    return flight.FlightDescriptor.for_command(json.dumps(body))


def exchange(client, descriptor, schema, batches):
    """Writes in a thread of its own while this one reads; what came, and the last message's metadata."""
    writer, reader = client.do_exchange(descriptor)
    failed = []

    def write():
        try:
            writer.begin(schema)
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
        except pa.ArrowException as error:
            failed.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    came, metadata = [], None
    try:
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                break
            if chunk.data is not None:
                came.append(chunk.data)
            metadata = chunk.app_metadata
        schema = reader.schema
    finally:
        writing.join(PATIENCE_SECONDS)
        assert not writing.is_alive()
        try:
            writer.close()
        except pa.ArrowException:
            if not failed and not sys.exc_info()[0]:
                raise
    return pa.Table.from_batches(came, schema), metadata


def values(table):
    """The only column, as numpy has it."""
    [column] = table.columns
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column.to_numpy_ndarray()
    return column.to_numpy()


def tensors(array):
    return pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(array)})


def cut(table, sizes):
    """Batches of the table, each a slice of it, with those numbers of rows in turn."""
    [whole] = table.combine_chunks().to_batches()
    at, index = 0, 0
    while at < len(whole):
        rows = sizes[index % len(sizes)]
        yield whole.slice(at, rows)
        at, index = at + rows, index + 1


KERNELS = [
    ("cumsum", {}, {}),
    ("scale-shift", {}, {"a": 3.5, "b": 0.1}),
    ("clip", {}, {"lo": -1, "hi": 1.5}),
    ("cast", {}, {"to": "float32"}),
    ("rolling-mean", {}, {"window": 5}),
    ("fir", {"taps": "exchange/taps"}, {}),
    ("zscore-running", {}, {}),
]


@pytest.mark.parametrize("kernel, inputs, parameters", KERNELS, ids=[kernel for kernel, *_ in KERNELS])
@pytest.mark.parametrize("width", [None, 3])
def test_batches_give_what_one_invocation_gives(client, kernel, inputs, parameters, width):
    random = np.random.default_rng(7)
    shape = 5000 if width is None else (5000, width)
    x = random.normal(size=shape)
    x[17] = np.nan
    table = pa.table({"x": x}) if width is None else tensors(x)
    put(client, "exchange/x", table)
    put(client, "exchange/taps", pa.table({"taps": random.normal(size=9)}))
    info = client.get_flight_info(command(kernel, {"x": "exchange/x"} | inputs, **parameters))
    whole = client.do_get(info.endpoints[0].ticket).read_all()
    for sizes, rows in [([5000], None), ([5000], 333), ([1, 0, 7, 64, 0, 129], 50), ([2048], 4096)]:
        came, _ = exchange(client, cmd(kernel, inputs, rows, **parameters), table.schema, cut(table, sizes))
        assert came.schema.names == whole.schema.names and came.schema.types == whole.schema.types
        assert values(came).tobytes() == values(whole).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes(client, dtype):
    x = np.random.default_rng(3).normal(size=3000).astype(dtype)
    table = pa.table({"anything": x})
    put(client, "exchange/x", table)
    info = client.get_flight_info(command("cumsum", {"x": "exchange/x"}))
    whole = client.do_get(info.endpoints[0].ticket).read_all()
    came, _ = exchange(client, cmd("cumsum", rows=100), table.schema, cut(table, [77]))
    assert values(came).tobytes() == values(whole).tobytes()


def test_rows_that_are_left_out(client):
    x = np.where(np.arange(4000) % 3 == 0, np.nan, np.arange(4000.0))
    table = pa.table({"x": x})
    came, _ = exchange(client, cmd("filter-finite", rows=128), table.schema, cut(table, [1000]))
    np.testing.assert_array_equal(values(came), x[np.isfinite(x)])


def test_no_rows_at_all(client):
    table = pa.table({"x": np.zeros(0)})
    came, _ = exchange(client, cmd("cumsum"), table.schema, table.to_batches())
    assert len(came) == 0 and came.schema.types == [pa.float64()]


def test_answers_come_while_more_is_written(client):
    """Each batch is answered before the next one is sent."""
    writer, reader = client.do_exchange(cmd("cumsum"))
    with writer:
        schema = pa.schema([("x", pa.float64())])
        writer.begin(schema)
        total = 0.0
        for step in range(20):
            x = np.full(1000, float(step))
            writer.write_batch(pa.record_batch([x], schema=schema))
            answer = reader.read_chunk().data.column(0).to_numpy()
            np.testing.assert_array_equal(answer, total + np.cumsum(x))
            total += x.sum()
        writer.done_writing()
        with pytest.raises(StopIteration):
            reader.read_chunk()


def resident(host):
    with open(f"/proc/{host.process.pid}/status") as status:
        [line] = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10


def test_a_long_stream_needs_little_memory(host, client):
    """200 MB through cumsum; the host has a few chunks of it at any time."""
    rows, count = 125_000, 200
    schema = pa.schema([("x", pa.float64())])
    used = stats(client)["budget_used_bytes"]
    before, most, charged = resident(host), 0, 0
    batch = pa.record_batch([np.ones(rows)], schema=schema)
    writer, reader = client.do_exchange(cmd("cumsum"))

    def write():
        writer.begin(schema)
        for _ in range(count):
            writer.write_batch(batch)
        writer.done_writing()

    writing = threading.Thread(target=write)
    writing.start()
    seen, last, chunks = 0, 0.0, 0
    while True:
        try:
            answer = reader.read_chunk().data.column(0).to_numpy()
        except StopIteration:
            break
        assert answer[0] == last + 1
        seen, last, chunks = seen + len(answer), answer[-1], chunks + 1
        if chunks % 20 == 0:
            most = max(most, resident(host))
            charged = max(charged, stats(client)["budget_used_bytes"] - used)
    writing.join(PATIENCE_SECONDS)
    writer.close()
    assert (seen, last) == (rows * count, float(rows * count))
    # HTTP/2 has windows of 16 MiB.
    assert most - before < 64 * MIB, f"{most - before} bytes more"
    assert 0 < charged < 32 * MIB, f"{charged} bytes charged"
    wait_for(lambda: stats(client)["budget_used_bytes"] <= used + MIB, "what it had is given back")


def test_an_error_in_the_middle_says_where(client):
    schema = pa.schema([("x", pa.float64())])

    def batches():
        for _ in range(3):
            yield pa.record_batch([np.ones(10)], schema=schema)
        nulls = pa.array([1.0, None])
        yield pa.record_batch([nulls], schema=schema)

    with pytest.raises(pa.ArrowInvalid, match="chunk 3 of a stream: column `x`: it has 1 nulls"):
        exchange(client, cmd("cumsum"), schema, batches())


def test_compressed_batches_are_refused(client):
    writer, reader = client.do_exchange(cmd("cumsum"))
    schema = pa.schema([("x", pa.float64())])
    writer.begin(schema, pa.ipc.IpcWriteOptions(compression="zstd"))
    writer.write_batch(pa.record_batch([np.ones(1000)], schema=schema))
    with pytest.raises(pa.ArrowInvalid, match="chunk 0 of a stream: the batch is compressed"):
        reader.read_chunk()
    with pytest.raises(pa.ArrowInvalid):
        writer.close()


@pytest.mark.parametrize(
    "descriptor, schema, words",
    [
        (cmd("nope"), pa.schema([("x", pa.float64())]), "nope"),
        (cmd("zscore"), pa.schema([("x", pa.float64())]), "does not stream"),
        (cmd("cumsum"), pa.schema([("x", pa.string())]), "column `x`"),
        (cmd("cumsum"), pa.schema([("x", pa.dictionary(pa.int8(), pa.float64()))]), "column `x`"),
        (cmd("cumsum"), pa.schema([("x", pa.float64()), ("z", pa.float64())]), "`z`"),
        (cmd("cumsum", nope=1), pa.schema([("x", pa.float64())]), "nope"),
        (cmd("fir"), pa.schema([("x", pa.float64())]), "taps"),
        (cmd("cumsum", rows=1 << 40), pa.schema([("x", pa.float64())]), "fewer `rows`"),
        (cmd("cumsum", {"x": "a"}), pa.schema([("x", pa.float64())]), "give it once"),
        (cmd("histogram", bins=4, lo=0, hi=1), pa.schema([("x", pa.float64())]), "different lengths"),
        (flight.FlightDescriptor.for_command(b"{"), pa.schema([("x", pa.float64())]), "cumsum"),
        (flight.FlightDescriptor.for_path("x"), pa.schema([("x", pa.float64())]), "no cmd"),
    ],
)
def test_what_is_refused_is_named(client, descriptor, schema, words):
    # All in one thread: pyarrow aborts now and then if a call is over while another thread ends its writing.
    writer, reader = client.do_exchange(descriptor)
    try:
        writer.begin(schema)
        writer.done_writing()
    except pa.ArrowException:
        pass  # Refused already; why is what is read.
    with pytest.raises((pa.ArrowException, KeyError), match=words):
        while True:
            reader.read_chunk()
    with pytest.raises((pa.ArrowException, KeyError)):
        writer.close()


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "STRAIT__SERVER__STALL_MS", "1500")
    directory = tmp_path / "h"
    directory.mkdir(mode=0o700)
    with monkeypatch.context() as context:
        context.setattr("conftest.environment", lambda: environment() | {"STRAIT__SERVER__STALL_MS": "1500"})
        host = Host(directory)
    try:
        host.wait_until_ready()
        yield host
        host.end()
    finally:
        if host.process.poll() is None:
            host.process.kill()
            host.process.wait()


def test_whoever_writes_all_before_reading_is_told(impatient):
    """It is no deadlock: what it still writes is thrown away, and the error says what to do."""
    with impatient.connect() as client:
        writer, reader = client.do_exchange(cmd("cumsum"))
        schema = pa.schema([("x", pa.float64())])
        batch = pa.record_batch([np.ones(125_000)], schema=schema)
        writer.begin(schema)
        for _ in range(100):
            writer.write_batch(batch)
        writer.done_writing()
        with pytest.raises(pa.ArrowException, match="read while you write"):
            while True:
                reader.read_chunk()
        with pytest.raises(pa.ArrowException):
            writer.close()


GOES_AWAY = """
import sys, numpy as np, pyarrow as pa
from pyarrow import flight
client = flight.connect(sys.argv[1])
writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b'{"kernel": "cumsum"}'))
schema = pa.schema([("x", pa.float64())])
writer.begin(schema)
for step in range(10**9):
    writer.write_batch(pa.record_batch([np.ones(10_000)], schema=schema))
    if sys.argv[2] == "reads" or step == 0:
        reader.read_chunk()
    if step == 0:
        print("begun", flush=True)
"""


@pytest.mark.parametrize("how", ["reads", "only writes"])
def test_a_killed_client_leaves_nothing(host, client, how):
    used = stats(client)["budget_used_bytes"]
    threads = len(os.listdir(f"/proc/{host.process.pid}/task"))
    words = [sys.executable, "-c", GOES_AWAY, f"grpc+unix://{host.socket}", how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"

        def exchanges():
            tasks = f"/proc/{host.process.pid}/task"
            return sum(
                open(f"{tasks}/{task}/comm").read() == "strait-exchange\n"
                for task in os.listdir(tasks)
                if os.path.exists(f"{tasks}/{task}/comm")
            )

        assert exchanges() == 1
        process.kill()
    wait_for(lambda: exchanges() == 0, "its thread ends")
    wait_for(lambda: stats(client)["budget_used_bytes"] <= used + MIB, "what it had is given back")
    assert len(os.listdir(f"/proc/{host.process.pid}/task")) <= threads + 2
