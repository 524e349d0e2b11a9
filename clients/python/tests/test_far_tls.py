"""TLS and tokens, against stock servers with certificates made here: what goes wrong, and what that is to a program."""

import json
import os
import ssl
import subprocess

import pytest

import strait

flight = pytest.importorskip("pyarrow.flight")

TOKEN = "strait-0123456789"


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of an authority, and of what it issued: (chain, key) by name."""
    home = tmp_path_factory.mktemp("certificates")
    try:
        subprocess.run(["openssl", "version"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")

    def authority(name):
        key, chain = home / f"{name}.key", home / f"{name}.pem"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        openssl("req", "-x509", *curve, "-keyout", key, "-out", chain, "-subj", f"/CN={name}", "-days", 2)
        return chain, key

    def issue(name, names, by, days=2):
        key, request, chain, extra = (home / f"{name}.{end}" for end in ("key", "csr", "pem", "ext"))
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        openssl("req", "-new", *curve, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extra.write_text(f"subjectAltName={names}\n")
        signed = ["-CA", by[0], "-CAkey", by[1], "-CAcreateserial", "-days", days, "-extfile", extra]
        openssl("x509", "-req", "-in", request, "-out", chain, *signed)
        return chain, key

    ours, other = authority("ours"), authority("other")
    return {
        "ours": ours,
        "other": other,
        "local": issue("local", "IP:127.0.0.1,DNS:localhost", ours),
        "elsewhere": issue("elsewhere", "DNS:elsewhere.test", ours),
        "expired": issue("expired", "IP:127.0.0.1", ours, days=-1),
        "client": issue("client", "DNS:client", ours),
    }


class Token(flight.ServerMiddlewareFactory):
    def __init__(self, seen):
        super().__init__()
        self._seen = seen

    def start_call(self, info, headers):
        self._seen.append(headers.get("authorization", []))
        if headers.get("authorization") != [f"Bearer {TOKEN}"]:
            raise flight.FlightUnauthenticatedError("the token is none that is known")
        return None


class Server(flight.FlightServerBase):
    def __init__(self, certificate, **options):
        self.seen = []
        chain, key = (path.read_bytes() for path in certificate)
        super().__init__("grpc+tls://127.0.0.1:0", tls_certificates=[(chain, key)], middleware={"token": Token(self.seen)}, **options)

    def do_action(self, context, action):
        if action.type == "stats":
            raise flight.FlightUnauthorizedError("this token may not")
        return [json.dumps({"host_id": "h", "inline_bytes": 0}).encode()]


@pytest.fixture
def serve(certificates):
    servers = []

    def serve(name, **options):
        servers.append(Server(certificates[name], **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()


def at(server, host="127.0.0.1"):
    return f"grpc+tls://{host}:{server.port}"


def test_a_token_goes_with_each_call(serve, certificates):
    server = serve("local")
    for ca in (certificates["ours"][0], str(certificates["ours"][0]), certificates["ours"][0].read_bytes(), certificates["ours"][0].read_text()):
        for host in ("127.0.0.1", "localhost"):
            with strait.connect(at(server, host), token=TOKEN, ca=ca) as s:
                assert s.host_id == "h"
                s.ping()
    assert server.seen == [[f"Bearer {TOKEN}"]] * 16


@pytest.mark.parametrize("token", [None, "another"])
def test_a_token_that_is_not_known(serve, certificates, token):
    with pytest.raises(PermissionError, match="none that is known") as caught:
        strait.connect(at(serve("local")), token=token, ca=certificates["ours"][0])
    assert isinstance(caught.value, strait.AuthenticationError) and caught.value.code == "UNAUTHENTICATED"


def test_a_right_that_is_missing(serve, certificates):
    with strait.connect(at(serve("local")), token=TOKEN, ca=certificates["ours"][0]) as s:
        with pytest.raises(PermissionError) as caught:
            s.stats()
    assert isinstance(caught.value, strait.NoRightError) and caught.value.code == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "name, ca, words",
    [
        ("local", "other", "not trusted here"),
        ("local", None, "not trusted here"),
        ("elsewhere", "ours", "not issued to that name"),
        ("expired", "ours", "expired"),
    ],
)
def test_certificates_that_are_not_taken(serve, certificates, name, ca, words):
    with pytest.raises(ssl.SSLCertVerificationError, match=words) as caught:
        strait.connect(at(serve(name)), token=TOKEN, ca=certificates[ca][0] if ca else None)
    assert isinstance(caught.value, strait.CertificateError) and isinstance(caught.value, ConnectionError)


def test_a_name_of_ones_own(serve, certificates):
    with strait.connect(at(serve("elsewhere")), token=TOKEN, ca=certificates["ours"][0], server_name="elsewhere.test") as s:
        assert s.host_id == "h"


def test_client_certificates(serve, certificates):
    roots = certificates["ours"][0].read_bytes()
    server = serve("local", verify_client=True, root_certificates=roots)
    with strait.connect(at(server), token=TOKEN, ca=roots, certificate=certificates["client"]) as s:
        assert s.host_id == "h"
    with pytest.raises(strait.NoHostError):
        strait.connect(at(server), token=TOKEN, ca=roots)


def test_a_server_without_tls(certificates, monkeypatch):
    class Plain(flight.FlightServerBase):
        pass

    with Plain("grpc+tcp://127.0.0.1:0") as server:
        with pytest.raises(strait.NoHostError):
            strait.connect(at(server), ca=certificates["ours"][0])
        # It is none of strait's.
        with pytest.raises(strait.RemoteError) as caught:
            strait.connect(f"grpc+tcp://127.0.0.1:{server.port}")
    assert caught.value.code == "UNIMPLEMENTED"
    monkeypatch.setitem(os.environ, "STRAIT_ADDRESS", "grpc+tcp://127.0.0.1:1")
    with pytest.raises(strait.NoHostError, match="grpc"):
        strait.connect()
