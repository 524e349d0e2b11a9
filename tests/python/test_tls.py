"""Flight over TLS with stock pyarrow: tokens, client certificates, and each way not to get in."""

import json
import os
import re
import subprocess
import time

import numpy as np
import pyarrow as pa
import pytest
from conftest import PATIENCE_SECONDS, command, environment, path
from pyarrow import flight

DAY = 86_400


def openssl(*words, cwd):
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)


def authority(directory, name):
    """NAME.pem and NAME.key, which signs others."""
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem", cwd=directory,
    )  # fmt: skip


def sign(directory, by, name, host=None):
    """NAME.pem and NAME.key, signed by that authority."""
    host = host or name
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=directory,
    )  # fmt: skip
    (directory / f"{name}.ext").write_text(f"subjectAltName=DNS:{host}\n")
    openssl(
        "x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial",
        "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem", cwd=directory,
    )  # fmt: skip


class Remote:
    """A host with TLS, tokens and client certificates, and what its clients need."""

    def __init__(self, directory):
        os.chmod(directory, 0o700)
        self.directory = directory
        authority(directory, "ca")
        authority(directory, "stranger")
        sign(directory, "ca", "host", "localhost")
        sign(directory, "ca", "pipeline")
        sign(directory, "stranger", "intruder")
        (directory / "rights.toml").write_text('[rights]\n"cert:pipeline" = ["put", "get"]\n')
        self.tokens = directory / "tokens.toml"
        self.alice = self.token("new", "alice", "--can", "put,get,share,call:scale-*")
        self.bob = self.token("new", "bob", "--can", "get")
        (directory / "run").mkdir(mode=0o700)
        self.process = subprocess.Popen(
            [
                os.environ["STRAIT_BIN"], "serve", "--directory", directory / "run", "--tcp", "127.0.0.1:0",
                "--tls-cert", directory / "host.pem", "--tls-key", directory / "host.key",
                "--tls-client-ca", directory / "ca.pem", "--rights", directory / "rights.toml", "--tokens", self.tokens,
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        port = re.search(r"grpc\+tls://\S+:(\d+)", self.process.stdout.readline()).group(1)
        self.address = f"grpc+tls://localhost:{port}"

    def token(self, *words):
        program = os.environ["STRAIT_BIN"]
        words = [program, "token", *words, "--tokens", self.tokens]
        return subprocess.run(words, env=environment(), check=True, capture_output=True, text=True).stdout.strip()

    def pem(self, name):
        return (self.directory / name).read_bytes()

    def connect(self, ca="ca", **options):
        return flight.FlightClient(self.address, tls_root_certs=self.pem(f"{ca}.pem"), **options)


def by(token):
    return flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())])


def field_1(message):
    """A protobuf message with that one as its field 1, as requests of actions are."""
    length, rest = b"", len(message)
    while rest > 127:
        length, rest = length + bytes([rest % 128 + 128]), rest // 128
    return b"\x0a" + length + bytes([rest]) + message


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    host = Remote(tmp_path_factory.mktemp("tls"))
    try:
        yield host
        host.process.terminate()
        assert host.process.wait(PATIENCE_SECONDS) == 0
    finally:
        host.process.kill()
        host.process.wait()


def put(client, name, table, options):
    writer, reader = client.do_put(path(name), table.schema, options)
    with writer:
        writer.write_table(table)
        writer.done_writing()
        reply = reader.read()
    assert reply is None or reply.size == 0


def test_all_that_stock_clients_do(remote):
    x = np.arange(300_000, dtype=np.float64)
    options = by(remote.alice)
    with remote.connect() as client:
        put(client, "x", pa.table({"x": x}), options)
        info = client.get_flight_info(path("x"), options)
        assert info.app_metadata == b"" and info.endpoints[0].app_metadata == b""
        ticket = info.endpoints[0].ticket
        assert client.do_get(ticket, options).read_all()["x"].to_numpy().tobytes() == x.tobytes()
        assert client.get_schema(path("x"), options).schema == info.schema
        assert [i.descriptor.path for i in client.list_flights(options=options)] == [[b"x"]]
        assert list(client.list_flights(options=by(remote.bob))) == []

        called = client.get_flight_info(command("scale-shift", {"x": "x"}, a=2, b=1), options)
        told = json.loads(called.app_metadata)
        assert told["results"][0]["port"] == "y" and "mapping" not in told["results"][0]
        renew = ("RenewFlightEndpoint", field_1(called.endpoints[0].serialize()))
        [renewed] = client.do_action(renew, options)
        assert flight.FlightEndpoint.deserialize(renewed.body.to_pybytes()).app_metadata == b""
        y = client.do_get(called.endpoints[0].ticket, options).read_all()["y"].to_numpy()
        assert np.array_equal(y, 2 * x + 1)
        list(client.do_action(("CancelFlightInfo", field_1(called.serialize())), options))
        with pytest.raises(pa.ArrowKeyError, match="no result"):
            client.do_get(called.endpoints[0].ticket, options).read_all()

        cmd = json.dumps({"kernel": "scale-shift", "parameters": {"a": 3, "b": 0}})
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(cmd), options)
        with writer:
            writer.begin(pa.schema([("x", pa.float64())]))
            writer.write_table(pa.table({"x": x[:1000]}))
            writer.done_writing()
            assert np.array_equal(reader.read_all()["y"].to_numpy(), 3 * x[:1000])

        share = json.dumps({"name": "x", "add": ["token:bob"]}).encode()
        [told] = client.do_action(("share", share), options)
        assert json.loads(told.body.to_pybytes())["shared"] == ["token:bob"]
        ticket = flight.Ticket(b"token:alice/x")
        assert client.do_get(ticket, by(remote.bob)).read_all().num_rows == len(x)
        assert {action.type for action in client.list_actions(options)} > {"share", "drop", "kernels"}
        list(client.do_action(("drop", b"x"), options))


def test_a_handshake_gives_a_header(remote):
    with remote.connect() as client:
        key, value = client.authenticate_basic_token(b"alice", remote.alice.encode())
        assert (key, value) == (b"authorization", f"Bearer {remote.alice}".encode())
        list(client.list_flights(options=flight.FlightCallOptions(headers=[(key, value)])))
        with pytest.raises(flight.FlightUnauthenticatedError, match="does not know the token"):
            client.authenticate_basic_token(b"alice", b"guess")


def test_certificates_of_clients(remote):
    own = {"cert_chain": remote.pem("pipeline.pem"), "private_key": remote.pem("pipeline.key")}
    with remote.connect(**own) as client:
        put(client, "p", pa.table({"x": np.arange(10.0)}), flight.FlightCallOptions())
        assert [i.descriptor.path for i in client.list_flights()] == [[b"p"]]
        with pytest.raises(flight.FlightUnauthorizedError, match="cert:pipeline may not"):
            client.get_flight_info(command("scale-shift", {"x": "p"}, a=2, b=1))
    own = {"cert_chain": remote.pem("intruder.pem"), "private_key": remote.pem("intruder.key")}
    with remote.connect(**own) as client, pytest.raises(flight.FlightUnavailableError):
        list(client.list_flights())


def test_who_does_not_get_in(remote):
    def fails(error, match, call):
        with pytest.raises(error, match=match):
            call()

    with remote.connect() as client:
        fails(flight.FlightUnauthenticatedError, "authorization: Bearer", lambda: list(client.list_flights()))
        fails(
            flight.FlightUnauthenticatedError,
            "does not know the token",
            lambda: list(client.list_flights(options=by("guess"))),
        )
        ticket = flight.Ticket(b"nothing")
        fails(pa.ArrowKeyError, "no flight `nothing`", lambda: client.do_get(ticket, by(remote.bob)).read_all())
        table = pa.table({"x": np.arange(3.0)})
        fails(flight.FlightUnauthorizedError, "`put`", lambda: put(client, "y", table, by(remote.bob)))
        call = command("zscore", {"x": "x"})
        fails(
            flight.FlightUnauthorizedError, "`call:zscore`", lambda: client.get_flight_info(call, by(remote.alice))
        )

        short = remote.token("new", "carol", "--expires", "2s")
        gone = remote.token("new", "dave")
        for token in (short, gone):
            wait_until_let_in(client, token)
        remote.token("rm", "dave")
        deadline = time.monotonic() + PATIENCE_SECONDS
        for token, why in ((short, "expired at"), (gone, "was revoked at")):
            while time.monotonic() < deadline:
                try:
                    list(client.list_flights(options=by(token)))
                except flight.FlightUnauthenticatedError as error:
                    assert why in str(error)
                    break
                time.sleep(0.1)
            else:
                pytest.fail(f"a token that {why} lets in")

    with remote.connect(ca="stranger") as client, pytest.raises(flight.FlightUnavailableError):
        list(client.list_flights(options=by(remote.alice)))
    with remote.connect(override_hostname="elsewhere") as client, pytest.raises(flight.FlightUnavailableError):
        list(client.list_flights(options=by(remote.alice)))
    plain = remote.address.replace("grpc+tls", "grpc+tcp")
    with flight.connect(plain) as client, pytest.raises(flight.FlightUnavailableError):
        list(client.list_flights(options=by(remote.alice)))


def wait_until_let_in(client, token):
    """The host sees a new token within a second or so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return list(client.list_flights(options=by(token)))
        except flight.FlightUnauthenticatedError as error:
            if "expired" in str(error):
                return []
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
