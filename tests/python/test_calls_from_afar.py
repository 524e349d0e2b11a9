"""What Flight has for clients that map nothing, asked by stock pyarrow: uploads without a name, calls in one message, frames."""

import json
import struct
import threading

import numpy as np
import pyarrow as pa
import pytest
from conftest import path, stats, wait_for
from pyarrow import flight
from test_flight import raised

HEADER = struct.Struct("<2sBBIII16s8sB3sI")
OK, INVOKE, PREPARE_CALL, CANCEL = 3, 17, 19, 20


def frame(op, body=None, payload=b"", sequence=1):
    text = b"" if body is None else json.dumps(body).encode()
    return HEADER.pack(b"ST", 2, op, sequence, len(text), len(payload), bytes(16), bytes(8), 0, bytes(3), 0) + text + payload


def opened(data):
    """Op, sequence, body and payload of a frame."""
    _, _, op, sequence, body_bytes, payload_bytes, *_ = HEADER.unpack_from(data)
    assert len(data) == HEADER.size + body_bytes + payload_bytes
    body = data[HEADER.size : HEADER.size + body_bytes]
    return op, sequence, json.loads(body or b"{}"), data[HEADER.size + body_bytes :]


def act(client, kind, body=b""):
    [result] = client.do_action((kind, body if isinstance(body, bytes) else json.dumps(body).encode()))
    return result.body.to_pybytes()


def upload(client, table, headers=()):
    options = flight.FlightCallOptions(headers=list(headers))
    writer, reader = client.do_put(flight.FlightDescriptor.for_command(b"unnamed"), table.schema, options)
    with writer:
        writer.write_table(table)
        writer.done_writing()
        reply = reader.read()
    return json.loads(reply.to_pybytes())["segment"]


def test_a_welcome(client):
    welcome = json.loads(act(client, "welcome"))
    assert welcome["protocol"] == 2 and welcome["session"] == "" and welcome["principal"].startswith("uid:")


def test_a_small_call_in_one_message(client):
    x = np.arange(4.0)
    inline = {"inline": {"dtype": "float64", "shape": [4], "offset": 0, "length": 32}}
    body = {"kernel": "scale-shift", "inputs": {"x": inline}, "parameters": {"a": 3.0}, "inline_bytes": 1000, "request_id": "mine"}
    op, sequence, said, payload = opened(act(client, "invoke", frame(INVOKE, body, x.tobytes(), 7)))
    assert (op, sequence, said["request_id"]) == (OK, 7, "mine")
    [result] = said["results"]
    assert result["inline"]["shape"] == [4] and "mapping" not in result
    np.testing.assert_array_equal(np.frombuffer(payload, count=4), 3 * x)


def test_uploads_without_a_name_are_inputs(client):
    before = stats(client)["segments"]
    x = np.random.default_rng(1).normal(size=300_000)
    segment = upload(client, pa.table({"x": x}), [(b"x-strait-rows", b"300000")])
    assert segment not in [info.descriptor.path for info in client.list_flights()]
    body = {"kernel": "scale-shift", "inputs": {"x": {"segment": segment}}, "parameters": {"a": 2.0}, "idempotency_key": "afar"}
    _, _, said, payload = opened(act(client, "invoke", frame(INVOKE, body)))
    [result] = said["results"]
    assert payload == b"" and result["expires_ms"] > 0 and "lease" not in result
    made = result["mapping"]["segment"]
    parts = [json.dumps({"segment": made, "rows": rows}) for rows in ([0, 100_000], [100_000, 300_000])]
    read = [client.do_get(flight.Ticket(part)).read_all()["y"].to_numpy() for part in parts]
    np.testing.assert_array_equal(np.concatenate(read), 2 * x)
    # A repeat is the same run, and a result is an input.
    _, _, again, _ = opened(act(client, "invoke", frame(INVOKE, body)))
    assert again["results"][0]["mapping"]["segment"] == made
    descriptor = flight.FlightDescriptor.for_command(json.dumps({"kernel": "scale-shift", "inputs": {"x": {"segment": made}}}))
    info = client.get_flight_info(descriptor)
    other = json.loads(info.endpoints[0].ticket.ticket)["segment"]
    released = json.loads(act(client, "release", {"segments": [segment, made, other], "idempotency_keys": ["afar"]}))
    assert released["released"] == 4
    assert json.loads(act(client, "release", {"segments": [segment]}))["released"] == 0
    raised(KeyError, "SEGMENT_NOT_FOUND", [segment], lambda: client.get_flight_info(flight.FlightDescriptor.for_command(json.dumps({"kernel": "scale-shift", "inputs": {"x": {"segment": segment}}}))))
    wait_for(lambda: stats(client)["segments"] - stats(client)["pool"]["idle_segments"] <= before, "what was released is gone")


def test_an_upload_that_ends_early_is_not_kept(client):
    for descriptor in (flight.FlightDescriptor.for_command(b"unnamed"), path("afar/cut")):
        options = flight.FlightCallOptions(headers=[(b"x-strait-rows", b"11")])
        writer, _ = client.do_put(descriptor, pa.schema([("x", pa.float64())]), options)
        writer.write_table(pa.table({"x": np.arange(10.0)}))
        with pytest.raises(pa.ArrowException, match="after 10 of the 11 rows"):
            writer.close()
    assert list(client.list_flights(b"afar/cut")) == []


@pytest.mark.parametrize(
    "body, reason, words",
    [
        (b"", "BAD_FRAME", "INVOKE frame"),
        (frame(PREPARE_CALL), "BAD_FRAME", "Call"),
        (frame(INVOKE, {"kernel": "zscore"}) + b"x", "BAD_FRAME", "INVOKE frame"),
        (frame(INVOKE, {"kernel": "zscore", "inputs": {}, "nope": 1}), "BAD_REQUEST", "nope"),
        (frame(INVOKE, {"kernel": "zscore", "inputs": {"x": {"segment": "x"}}}), "BAD_REQUEST", "x"),
        (frame(INVOKE, {"kernel": "zscore", "inputs": {"x": {"inline": {"dtype": "int8", "shape": [9], "offset": 0, "length": 9}}}}), "BAD_INPUT", "9 bytes"),
    ],
)
def test_wrong_calls_are_told_why(client, body, reason, words):
    raised(pa.ArrowInvalid, reason, [words], lambda: act(client, "invoke", body))


def test_a_call_is_cancelled_by_its_key(client):
    assert json.loads(act(client, "cancel", b"nobody"))["cancelled"] is False
    raised(pa.ArrowInvalid, "BAD_REQUEST", ["idempotency_key"], lambda: act(client, "cancel", b"no key"))


def frames(client, cmd):
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(json.dumps(cmd)))
    try:
        writer.begin(pa.schema([]))
    except (pa.ArrowException, KeyError):
        pass  # Refused already; why is what is read.
    return writer, reader


def test_prepared_calls_in_an_exchange(client):
    spec = {"dtype": "float64", "shape": [4]}
    writer, reader = frames(client, {"prepare": {"kernel": "scale-shift", "inputs": {"x": spec}, "parameters": {"a": 2.0}}})
    op, _, told, _ = opened(reader.read_chunk().app_metadata.to_pybytes())
    assert (op, told["request_bytes"], told["reply_bytes"]) == (OK, 128, 128)
    for count in (4, 2):
        payload = struct.pack("<8Q", count, *[0] * 7) + np.arange(float(count)).tobytes().ljust(64, b"\0")
        writer.write_metadata(b"")
        writer.write_metadata(frame(PREPARE_CALL, None, payload, sequence=count))
        op, sequence, _, payload = opened(reader.read_chunk().app_metadata.to_pybytes())
        assert (op, sequence, struct.unpack_from("<Q", payload)) == (OK, count, (count,))
        np.testing.assert_array_equal(np.frombuffer(payload[64:], count=count), 2 * np.arange(float(count)))
    writer.write_metadata(frame(CANCEL))
    writer.done_writing()
    with pytest.raises(StopIteration):
        reader.read_chunk()
    writer.close()
    wait_for(lambda: stats(client)["account"]["connections"] <= 3, "it has no place any more")


def test_prepares_that_are_refused_fail_the_exchange(client):
    spec = {"dtype": "float64", "shape": [4]}
    for cmd, kind, words in [
        ({"prepare": {"kernel": "nope", "inputs": {"x": spec}}}, KeyError, "no loaded plugin has a kernel"),
        ({"prepare": {"kernel": "scale-shift", "inputs": {"x": spec}, "ring": True}}, pa.ArrowInvalid, "memory of one machine"),
        ({"prepare": {"nope": 1}}, pa.ArrowInvalid, "nope"),
        ({"stream": {"channel": "afar/none"}}, KeyError, "no channel"),
    ]:
        writer, reader = frames(client, cmd)
        with pytest.raises(kind, match=words):
            reader.read_chunk()
        with pytest.raises((pa.ArrowException, KeyError)):
            writer.close()


def test_several_at_once(host):
    """Each connection's exchanges, calls and uploads beside those of others."""
    wrong = []

    def work(seed):
        with host.connect() as client:
            x = np.random.default_rng(seed).normal(size=50_000)
            for _ in range(5):
                segment = upload(client, pa.table({"x": x}))
                body = {"kernel": "scale-shift", "inputs": {"x": {"segment": segment}}, "parameters": {"a": float(seed)}}
                _, _, said, _ = opened(act(client, "invoke", frame(INVOKE, body)))
                made = said["results"][0]["mapping"]["segment"]
                y = client.do_get(flight.Ticket(json.dumps({"segment": made}))).read_all()["y"].to_numpy()
                if not (y == seed * x).all():
                    wrong.append(seed)
                act(client, "release", {"segments": [segment, made]})

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
