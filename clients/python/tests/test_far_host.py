"""A host with TLS and tokens, as a program on another machine has it."""

import os
import re
import subprocess
import time

import numpy as np
import pytest
from test_far_tls import openssl

import strait

pytest.importorskip("pyarrow")


class Remote:
    def __init__(self, home):
        program = os.environ.get("STRAIT_BIN")
        if not program:
            pytest.skip("STRAIT_BIN is not set: name the host's program")
        self._program, self._tokens = program, home / "tokens.toml"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        self.ca = home / "ca.pem"
        openssl("req", "-x509", *curve, "-keyout", home / "ca.key", "-out", self.ca, "-subj", "/CN=ca", "-days", 2)
        openssl("req", "-new", *curve, "-keyout", home / "host.key", "-out", home / "host.csr", "-subj", "/CN=host")
        (home / "host.ext").write_text("subjectAltName=IP:127.0.0.1\n")
        signed = ["-CA", self.ca, "-CAkey", home / "ca.key", "-CAcreateserial", "-days", 2, "-extfile", home / "host.ext"]
        openssl("x509", "-req", "-in", home / "host.csr", "-out", home / "host.pem", *signed)
        self.alice = self.token("new", "alice", "--can", "put,get,call:scale-*,call:cumsum")
        self.bob = self.token("new", "bob", "--can", "get")
        self.carol = self.token("new", "carol")
        (home / "run").mkdir(mode=0o700)
        tls = ["--tls-cert", home / "host.pem", "--tls-key", home / "host.key", "--tokens", self._tokens]
        words = [program, "serve", "--directory", home / "run", "--log-level", "error", "--tcp", "127.0.0.1:0", *tls]
        self.process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
        self.address = re.search(r"grpc\+tls://\S+:\d+", self.process.stdout.readline()).group()

    def token(self, *words):
        command = [self._program, "token", *words, "--tokens", str(self._tokens)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def connect(self, token):
        return strait.connect(self.address, token=token, ca=self.ca)


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    remote = Remote(tmp_path_factory.mktemp("far"))
    yield remote
    remote.process.terminate()
    assert remote.process.wait(60) == 0


def test_the_same_verbs(remote):
    x = np.random.default_rng(1).normal(size=1_000_000)
    with remote.connect(remote.alice) as s:
        s.put("x", x)
        np.testing.assert_array_equal(s.get("x"), x)
        np.testing.assert_array_equal(s.call("scale-shift", "x", a=2.0), 2 * x)
        np.testing.assert_array_equal(s.call("scale-shift", x[:100], a=3.0), 3 * x[:100])
        np.testing.assert_array_equal(s.call("scale-shift", x, a=3.0), 3 * x)
        with s.prepare("scale-shift", x[:100], a=2.0) as scale:
            np.testing.assert_array_equal(scale(x[:100]), 2 * x[:100])
        came = np.concatenate(list(s.stream("cumsum", [x[:10], x[10:1000]])))
        np.testing.assert_array_equal(came, np.cumsum(x[:1000]))
        assert [flight.name for flight in s.list()] == ["x"] and s.stats()["account"]["names"] == 1
        with pytest.raises(KeyError) as missing:
            s.get("y")
        assert missing.value.reason == "FLIGHT_NOT_FOUND"
        s.delete("x")


def test_rights(remote):
    with remote.connect(remote.bob) as bob, remote.connect(remote.alice) as alice:
        for refused in (
            lambda: bob.put("x", [1.0]),
            lambda: bob.call("scale-shift", [1.0]),
            lambda: alice.call("zscore", [1.0, 2.0], axis=0),
            lambda: alice.prepare("zscore", np.ones(3)),
        ):
            with pytest.raises(PermissionError) as caught:
                refused()
            assert isinstance(caught.value, strait.NoRightError)
            assert caught.value.reason == "NO_RIGHT" and caught.value.details["right"] in ("put", "call:scale-shift", "call:zscore")
        assert bob.list() == []


@pytest.mark.parametrize("token, reason", [(None, "TOKEN_MISSING"), ("guess", "TOKEN_UNKNOWN")])
def test_tokens_that_let_nobody_in(remote, token, reason):
    with pytest.raises(PermissionError) as caught:
        remote.connect(token)
    assert isinstance(caught.value, strait.AuthenticationError) and caught.value.reason == reason


def test_a_token_that_is_revoked_ends_what_it_may(remote):
    with remote.connect(remote.carol) as s:
        scale = s.prepare("scale-shift", np.ones(3))
        np.testing.assert_array_equal(scale(np.ones(3)), np.ones(3))
        remote.token("rm", "carol")
        until = time.monotonic() + 60
        with pytest.raises(strait.AuthenticationError) as caught:
            while time.monotonic() < until:
                s.ping()
                time.sleep(0.05)
        assert caught.value.reason == "TOKEN_REVOKED"
        with pytest.raises((strait.RemoteError, strait.DisconnectedError)):
            scale(np.ones(3))
