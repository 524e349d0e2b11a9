"""Stock pyarrow against a strait host: nothing is configured, no `generic_options`.

Needs pytest, numpy, pyarrow, and the host's program in STRAIT_BIN.
"""

import json
import os
import resource
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from conftest import PATIENCE_SECONDS, Host, command, path, put, wait_for
from pyarrow import flight, ipc


def tensor_table(array, name="x"):
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    return pa.table({name: column})


def test_list_flights(client):
    for name in ["list/b", "list/a"]:
        put(client, name, pa.table({"x": [1.0, 2.0]}))
    names = [info.descriptor.path[0].decode() for info in client.list_flights()]
    assert names == sorted(names) and {"list/a", "list/b"} <= set(names)
    assert [info.descriptor.path for info in client.list_flights(b"list/a")] == [[b"list/a"]]


def test_flight_info_of_a_tensor(client):
    mapping = put(client, "x", pa.table({"x": np.arange(1000.0)}))
    info = client.get_flight_info(path("x"))
    assert (info.total_records, info.total_bytes) == (1000, 8000)
    assert info.schema == pa.schema([pa.field("x", pa.float64())])
    [endpoint] = info.endpoints
    assert endpoint.locations == []
    assert mapping["strait-mmap"] == 1 and mapping["writers"] == "none"
    if hasattr(endpoint, "app_metadata"):
        assert json.loads(endpoint.app_metadata) == mapping
        assert json.loads(info.app_metadata) == mapping
    [result] = client.do_action(("mapping", b"x"))
    assert json.loads(result.body.to_pybytes()) == mapping
    table = client.do_get(endpoint.ticket).read_all()
    np.testing.assert_array_equal(table["x"].to_numpy(), np.arange(1000.0))


def test_flight_info_of_an_invocation(client):
    x = np.random.default_rng(1).normal(size=300_000)
    put(client, "x", pa.table({"x": x}))
    descriptor = command("scale-shift", {"x": "x"}, a=2, b=1)
    assert client.get_schema(descriptor).schema.names == ["y"]
    info = client.get_flight_info(descriptor)
    [endpoint] = info.endpoints
    y = client.do_get(endpoint.ticket).read_all()["y"].to_numpy()
    np.testing.assert_array_equal(y, 2 * x + 1)
    if hasattr(endpoint, "expiration_time"):
        assert endpoint.expiration_time is not None
    if hasattr(info, "app_metadata"):
        outcome = json.loads(info.app_metadata)
        assert outcome["copied_bytes"] == 0 and outcome["results"][0]["port"] == "y"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(4, 3, 2),
        np.arange(12, dtype=np.int16).reshape(6, 2),
        np.zeros((3, 2, 5), np.uint8),
    ],
)
def test_tensors_keep_their_shape(client, array):
    put(client, "t", tensor_table(array))
    schema = client.get_schema(path("t")).schema
    assert schema.field("x").type == pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape[1:])
    column = client.do_get(flight.Ticket("t")).read_all()["x"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    np.testing.assert_array_equal(column.to_numpy_ndarray(), array)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
def test_every_primitive_type(client, dtype):
    values = np.arange(100).astype(dtype)
    put(client, "p", pa.table({"a": values, "b": values[::-1].copy()}))
    table = client.do_get(flight.Ticket("p")).read_all()
    table.validate(full=True)
    np.testing.assert_array_equal(table["a"].to_numpy(), values)
    np.testing.assert_array_equal(table["b"].to_numpy(), values[::-1])


def annotated(arrays, nullable=True):
    """A table whose fields and schema all have metadata."""
    fields = [
        pa.field(name, array.type, nullable, {"unit": "m", "note": "é\n", "empty": ""})
        for name, array in arrays.items()
    ]
    return pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields, {"pandas": "{}", "k": "v" * 5000}))


def shaped(dim_names=None, permutation=None):
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3], dim_names, permutation)
    return pa.ExtensionArray.from_storage(kind, pa.array([[0.0] * 6, [1.5] * 6], kind.storage_type))


KINDS = {
    "primitive": pa.array([1, 2], pa.uint16()),
    "list": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
    "list of named items": pa.array(
        [[1, 2], [3, 4]], pa.list_(pa.field("v", pa.int8(), nullable=False, metadata={"a": "b"}), 2)
    ),
    "lists of lists": pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.int64(), 2), 1)),
    "tensor": shaped(),
    "dim_names": shaped(["H", "W"]),
    "identity": shaped(["H", "W"], [0, 1]),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([5, 0], pa.int8())),
}


@pytest.mark.parametrize("nullable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_comes_back_with_all_that_its_schema_says(host, client, kind, nullable):
    table = annotated({"x": KINDS[kind]}, nullable)
    put(client, "kept", table)
    for got in [
        client.do_get(flight.Ticket("kept")).read_all(),
        ipc.open_file(pa.py_buffer(recvd_segment(host, client, "kept")[1])).read_all(),
    ]:
        got.validate(full=True)
        assert got.equals(table, check_metadata=True), got.schema
    for schema in [
        client.get_schema(path("kept")).schema,
        client.get_flight_info(path("kept")).schema,
        next(client.list_flights(b"kept")).schema,
    ]:
        assert schema.equals(table.schema, check_metadata=True), schema


@pytest.mark.parametrize(
    "metadata",
    [
        {"strait.dtype": "bfloat16"},
        {"strait.dtype": "float8_e5m2"},
        {"strait.dtype": "complex64"},
        {"strait.shape": "[]", "strait.dtype": "bfloat16"},
    ],
    ids=str,
)
def test_our_own_metadata_comes_back_too(client, metadata):
    storage = {"bfloat16": pa.uint16(), "float8_e5m2": pa.uint8(), "complex64": pa.list_(pa.float32(), 2)}
    kind = storage[metadata["strait.dtype"]]
    rows = 1 if "strait.shape" in metadata else 3
    field = pa.field("x", kind, metadata=metadata | {"unit": "s"})
    array = pa.array([[1.0, 2.0]] * rows if pa.types.is_fixed_size_list(kind) else [7] * rows, kind)
    table = pa.Table.from_arrays([array], schema=pa.schema([field], {"a": "b"}))
    mapping = put(client, "own", table)
    assert mapping["tensors"][0]["dtype"] == metadata["strait.dtype"]
    assert mapping["tensors"][0]["shape"] == ([] if rows == 1 else [3])
    assert client.do_get(flight.Ticket("own")).read_all().equals(table, check_metadata=True)


def test_metadata_that_cannot_be_kept(client):
    def refused(table, *words):
        raised(pa.ArrowInvalid, "BAD_TENSOR", words, lambda: put(client, "bad", table))

    x = pa.array([1.0])
    refused(pa.table({"x": x}, metadata={"k": "v" * 65536}), "65537 bytes", "65536")
    refused(pa.table({"x": x}, metadata={"k": b"\xff"}), "UTF-8")
    refused(pa.table({"x": shaped(None, [1, 0])}), "`x`", "permuted")
    refused(pa.table({f"c{i}": x for i in range(129)}), "129 tensors")
    raised(KeyError, "FLIGHT_NOT_FOUND", [], lambda: client.get_flight_info(path("bad")))


def test_100_mb_at_default_limits_both_ways(client):
    x = np.random.default_rng(2).integers(0, 1 << 40, 12_500_000)
    put(client, "big", pa.table({"x": x}))
    got = client.do_get(flight.Ticket("big")).read_all()["x"].to_numpy()
    np.testing.assert_array_equal(got, x)


def test_several_endpoints_read_in_parallel_are_the_whole(client):
    x = np.random.default_rng(4).normal(size=25_000_000)
    put(client, "parts", pa.table({"x": x}))
    [whole] = client.get_flight_info(path("parts")).endpoints
    asked = flight.FlightCallOptions(headers=[(b"x-strait-endpoints", b"8")])
    info = client.get_flight_info(path("parts"), asked)
    assert len(info.endpoints) == 3  # of 64 MiB each at most
    assert (info.total_records, info.total_bytes) == (x.size, x.nbytes)
    if hasattr(info, "ordered"):
        assert info.ordered
    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(lambda endpoint: client.do_get(endpoint.ticket).read_all(), info.endpoints))
    assert [part.num_rows for part in parts] == [8_333_334, 8_333_334, 8_333_332]
    assert pa.concat_tables(parts) == client.do_get(whole.ticket).read_all()
    np.testing.assert_array_equal(pa.concat_tables(parts)["x"].to_numpy(), x)


def test_100_mb_in_one_batch_of_long_rows(client):
    # Rows of 10 MB: each is one message, above gRPC's default limit of 4 MiB.
    x = np.random.default_rng(3).normal(size=(10, 1_250_000))
    put(client, "rows", tensor_table(x))
    column = client.do_get(flight.Ticket("rows")).read_all()["x"]
    got = np.concatenate([chunk.to_numpy_ndarray() for chunk in column.chunks])
    np.testing.assert_array_equal(got, x)


def test_batches_sliced_and_chunked_uploads(client):
    x = np.arange(100_000.0)
    table = pa.table({"x": pa.chunked_array([x[:3], x[3:50_000], x[50_000:50_000], x[50_000:]])}).slice(1, 99_000)
    put(client, "chunks", table)
    got = client.do_get(flight.Ticket("chunks")).read_all()["x"].to_numpy()
    np.testing.assert_array_equal(got, x[1:99_001])


def test_empty_table(client):
    put(client, "empty", pa.table({"x": pa.array([], pa.float32())}))
    table = client.do_get(flight.Ticket("empty")).read_all()
    assert table.num_rows == 0 and table.schema.field("x").type == pa.float32()


def recvd_segment(host, client, name):
    """The bytes of a flight's segment, by the data socket as docs/protocol.md has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as data:
        data.connect(os.path.join(host.directory, "data.sock"))

        def call(op, sequence, body):
            body = json.dumps(body).encode()
            header = b"ST" + bytes([2, op]) + sequence.to_bytes(4, "little")
            data.sendall(header + len(body).to_bytes(4, "little") + bytes(36) + body)
            packet, fds, _, _ = socket.recv_fds(data, 65536, 16)
            reply = json.loads(packet[48:])
            assert packet[3] in (2, 3), reply
            return reply, fds

        call(1, 1, {"protocol": 2, "client": "test_flight.py"})
        reply, [fd] = call(14, 2, {"name": name})
        with os.fdopen(fd, "rb") as segment:
            return reply["mapping"], segment.read(reply["mapping"]["bytes"])


def test_a_saved_segment_is_an_arrow_file_and_a_stream(host, client, tmp_path):
    x = np.arange(60_000, dtype=np.float64).reshape(-1, 6)
    put(client, "saved", tensor_table(x))
    mapping, data = recvd_segment(host, client, "saved")
    assert len(data) == mapping["bytes"]
    file = tmp_path / "saved.arrow"
    file.write_bytes(data)

    with pa.memory_map(str(file)) as mapped:
        before = pa.total_allocated_bytes()
        table = ipc.open_file(mapped).read_all()
        assert pa.total_allocated_bytes() == before, "no copy"
        table.validate(full=True)
        np.testing.assert_array_equal(table["x"].chunk(0).to_numpy_ndarray(), x)
    with pa.memory_map(str(file)) as mapped:
        mapped.seek(8)
        stream = ipc.open_stream(mapped)
        np.testing.assert_array_equal(stream.read_all()["x"].chunk(0).to_numpy_ndarray(), x)


def raised(kind, code, words, call):
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text, text
    extra = getattr(caught.value, "extra_info", None)
    if extra:
        assert json.loads(extra)["reason"] == code


def test_errors_are_the_right_exceptions(client):
    raised(KeyError, "FLIGHT_NOT_FOUND", ["no flight `nope`"], lambda: client.get_flight_info(path("nope")))
    raised(KeyError, "FLIGHT_NOT_FOUND", ["no flight `nope`"], lambda: client.do_get(flight.Ticket("nope")).read_all())
    raised(KeyError, "KERNEL_NOT_FOUND", ["nope"], lambda: client.get_flight_info(command("nope", {})))
    put(client, "x", pa.table({"x": [1.0, 2.0]}))
    raised(
        pa.ArrowInvalid,
        "UNKNOWN_PARAMETER",
        ["nonsense"],
        lambda: client.get_flight_info(command("scale-shift", {"x": "x"}, nonsense=1)),
    )
    raised(
        pa.ArrowInvalid,
        "BAD_REQUEST",
        ["JSON"],
        lambda: client.get_flight_info(flight.FlightDescriptor.for_command(b"not json")),
    )
    raised(NotImplementedError, "UNSUPPORTED_OP", ["no action"], lambda: list(client.do_action(("nope", b""))))


def test_uploads_that_are_no_tensors(client):
    for column, words in [
        (pa.array(["a", "b"]), ["`c`", "text"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["`c`", "dictionary"]),
        (pa.array([1.0, None]), ["`c`", "1 nulls"]),
        (pa.array([True, False]), ["`c`", "int8"]),
    ]:
        raised(pa.ArrowInvalid, "BAD_TENSOR", words, lambda column=column: put(client, "bad", pa.table({"c": column})))
    raised(KeyError, "FLIGHT_NOT_FOUND", [], lambda: client.get_flight_info(path("bad")))


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("rows", [0, 3, 1000, 1_500_000])
def test_compressed_uploads(client, compression, rows):
    random = np.random.default_rng(rows)
    columns = {"same": np.full(rows, 1.5), "ramp": np.arange(rows), "noise": random.integers(0, 256, rows, np.uint8)}
    headers = [(b"x-strait-replace", b"true")]
    options = ipc.IpcWriteOptions(compression=compression)
    put(client, "packed", pa.table(columns), flight.FlightCallOptions(write_options=options, headers=headers))
    read = client.do_get(flight.Ticket(b"packed")).read_all()
    for name, values in columns.items():
        assert read[name].to_numpy().tobytes() == values.tobytes()
    list(client.do_action(("drop", b"packed")))


def test_what_is_no_utf8_is_told_so(client):
    table = pa.table({"x": [1.0]})
    bad = flight.FlightDescriptor.for_path(b"\xff")

    def uploads():
        writer, _ = client.do_put(bad, table.schema)
        with writer:
            writer.write_table(table)

    raised(pa.ArrowInvalid, "BAD_REQUEST", ["UTF-8"], uploads)
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["UTF-8"], lambda: client.get_flight_info(bad))
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["UTF-8"], lambda: client.get_schema(bad))
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["text"], lambda: client.do_get(flight.Ticket(b"\xff")).read_all())
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["UTF-8"], lambda: list(client.do_action(("drop", b"\xff"))))


def test_a_request_has_a_size(client):
    long = flight.FlightDescriptor.for_command(b" " * (1 << 20))
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["1048576"], lambda: client.get_flight_info(long))
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["1048576"], lambda: list(client.do_action(("drop", b"x" * (1 << 21)))))


def test_a_name_is_taken_once(client):
    put(client, "once", pa.table({"x": [1.0]}))
    with pytest.raises(pa.ArrowException, match="`once` already"):
        put(client, "once", pa.table({"x": [2.0]}), flight.FlightCallOptions())
    [x] = client.do_get(flight.Ticket("once")).read_all()["x"].to_pylist()
    assert x == 1.0
    assert list(client.do_action(("drop", b"once"))) == []
    put(client, "once", pa.table({"x": [3.0]}), flight.FlightCallOptions())


def test_actions(client):
    names = {action.type for action in client.list_actions()}
    assert {"welcome", "kernels", "describe", "mapping", "drop", "stats", "invoke", "cancel", "release"} <= names
    kernels = [json.loads(result.body.to_pybytes()) for result in client.do_action(("kernels", b""))]
    assert "scale-shift" in {kernel["name"] for kernel in kernels}
    [stats] = client.do_action(("stats", b""))
    assert json.loads(stats.body.to_pybytes())["process"]["fds"] > 0


def test_many_calls_on_one_connection_and_many_connections(host):
    clients = [host.connect() for _ in range(8)]
    put(clients[0], "many", pa.table({"x": np.arange(1000.0)}))
    for _ in range(20):
        for client in clients:
            assert client.get_flight_info(path("many")).total_records == 1000
    for client in clients:
        client.close()


def test_a_host_without_descriptors_tells_the_next_client(tmp_path):
    os.chmod(tmp_path, 0o700)
    host = Host(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60)))
    connected = []
    try:
        host.wait_until_ready()
        with host.connect() as client:
            put(client, "x", pa.table({"x": [1.0]}))
            closed = False
            while not closed:
                assert len(connected) < 60, "the table is full before"
                connection = socket.socket(socket.AF_UNIX)
                connected.append(connection)
                connection.connect(host.socket)
                connection.settimeout(PATIENCE_SECONDS if len(connected) > 50 else 0.05)
                try:
                    closed = connection.recv(1) == b""
                except TimeoutError:
                    pass
            # Those that are connected are served.
            assert [info.descriptor.path for info in client.list_flights()] == [[b"x"]]
            for connection in connected:
                connection.close()
            with host.connect() as other:
                wait_for(lambda: answers(other), "a client that is served again")
            list(client.do_action(("drop", b"x")))
        host.end()
    finally:
        host.process.kill()
        host.process.wait()


def answers(client):
    try:
        return bool(list(client.list_actions()))
    except flight.FlightUnavailableError:
        return False
