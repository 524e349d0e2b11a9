"""Flight calls to a host: credentials, errors as this package has them, and what is asked again after a lost connection.

    Remote ── pyarrow's client ──▶ host
      ▲  trailers (reason, request id, details) ── middleware, one for each call

Of a failed call pyarrow gives an exception of its own and a text with much around it. What the host said beside that comes in trailers, which
only a middleware sees.
"""

from __future__ import annotations

import json
import random
import re
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

from ._errors import CertificateError, DisconnectedError, NoHostError, ProtocolError, StraitError, from_host

try:
    import pyarrow as pa
    from pyarrow import flight
except ImportError as missing:
    raise ImportError(
        f"a host that is not on this machine is reached through pyarrow, which cannot be imported here ({missing}): pip install 'strait[remote]'"
    ) from None

Pem = Union[str, bytes, Path, None]
T = TypeVar("T")

_SCHEMES = ("grpc+tls", "grpc+tcp", "grpc+unix", "grpc")
_LOOPBACK = re.compile(r"^(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$")
_WINDOW_BYTES = 16 << 20
#: Of a connection: on which nothing comes for so long the other side is asked whether it is there.
_KEEPALIVE_MS = 30_000
#: Between attempts, at first and at most.
_PAUSES = (0.02, 1.0)
_REASON = "x-strait-reason"
_REQUEST_ID = "x-request-id"
_DETAILS = "grpc-status-details-bin"
#: What TLS and gRPC say of certificates that they do not take, theirs or ours.
_CERTIFICATE = re.compile(
    r"certificate|CERTIFICATE|Hostname Verification|not in peer|handshake failed|Handshake failed|SSL_ERROR|tls[a-z]* alert|TLSV1_ALERT", re.ASCII
)
#: Around what the host said.
_BEFORE = re.compile(r"^(?:gRPC|Flight) returned [\w ]*(?:error|status)?, with message: ", re.ASCII)
_BEHIND = re.compile(r"\.? (?:gRPC client debug context|Client context|Detail): .*", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Credentials:
    """Who asks, and whom to believe."""

    token: Optional[str] = None
    #: Certificates of authorities in PEM, or a file of them; None: those of the system.
    ca: Pem = None
    #: A client certificate and its key in PEM, or files of them.
    certificate: Optional[Tuple[Pem, Pem]] = None
    #: What the host's certificate is issued to, where that is not the name in the address.
    server_name: Optional[str] = None

    def check(self, address: str) -> None:
        """Raises `ValueError` for what would be of no use at the address, or would be given away."""
        scheme, place = split(address)
        tls_only = {"ca": self.ca, "certificate": self.certificate, "server_name": self.server_name}
        if scheme == "grpc+tls":
            return
        for name, value in tls_only.items():
            if value is not None:
                raise ValueError(f"{name} is for TLS, which {address!r} is without; use grpc+tls://HOST:PORT")
        if self.token is not None and scheme != "grpc+unix" and not _LOOPBACK.match(place):
            raise ValueError(f"the token would cross the network to {address!r} in the clear; use grpc+tls://HOST:PORT")


def split(address: str) -> Tuple[str, str]:
    """Scheme and place of an address that is reached over Flight."""
    scheme, mark, place = address.partition("://")
    if scheme not in _SCHEMES or not mark or not place or (scheme == "grpc+unix" and not place.startswith("/")):
        raise ValueError(
            f"address {address!r} is none of unix:///DIRECTORY (this machine), grpc+tls://HOST:PORT, grpc+tcp://HOST:PORT and "
            "grpc+unix:///DIRECTORY/flight.sock"
        )
    return ("grpc+tcp" if scheme == "grpc" else scheme), place


def is_remote(address: Optional[str]) -> bool:
    """Whether the address is reached over Flight."""
    return address is not None and address.startswith("grpc")


def _pem(value: Pem, what: str) -> Optional[bytes]:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value
    text = str(value)
    if text.lstrip().startswith("-----BEGIN"):
        return text.encode()
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise ValueError(f"{what}: {text!r} cannot be read: {error.strerror}") from None


def _roots() -> Optional[bytes]:
    """The certificates of authorities that OpenSSL uses here; pyarrow knows only some places."""
    file = ssl.get_default_verify_paths().cafile
    try:
        return Path(file).read_bytes() if file else None
    except OSError:
        return None


class _Trailers(flight.ClientMiddleware):  # type: ignore[misc]
    """What the host says of one call beside its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.said: Dict[str, Any] = {}

    def received_headers(self, headers: Mapping[str, Sequence[Any]]) -> None:
        for name, values in headers.items():
            if name.lower() in (_REASON, _REQUEST_ID, _DETAILS) and values:
                self.said[name.lower()] = values[0]


class _Middleware(flight.ClientMiddlewareFactory):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.of_thread = threading.local()

    def start_call(self, _: Any) -> _Trailers:
        # Called by the thread that calls.
        begun = _Trailers()
        self.of_thread.begun = begun
        return begun


class Remote:
    """A connection to a host's Flight service, for any number of threads."""

    def __init__(self, address: str, credentials: Credentials, patience: float) -> None:
        self.address = address
        self._patience = patience
        scheme, place = split(address)
        credentials.check(address)
        self._middleware = _Middleware()
        options: Dict[str, Any] = {
            "middleware": [self._middleware],
            "generic_options": [
                ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # Another session may have other credentials, and one that is closed is closed.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        }
        if scheme == "grpc+tls":
            options["tls_root_certs"] = _pem(credentials.ca, "ca") or _roots()
            if credentials.certificate is not None:
                chain, key = credentials.certificate
                options["cert_chain"] = _pem(chain, "certificate")
                options["private_key"] = _pem(key, "certificate")
            if credentials.server_name is not None:
                options["override_hostname"] = credentials.server_name
        self._headers: List[Tuple[bytes, bytes]] = []
        if credentials.token is not None:
            if not re.fullmatch(r"[\x21-\x7e]+", credentials.token):
                raise ValueError("the token has characters that no token has; give it without line breaks and spaces")
            self._headers.append((b"authorization", b"Bearer " + credentials.token.encode()))
        self._client = flight.FlightClient(f"{scheme}://{place}", **options)
        #: Whether the host has answered before.
        self.met = False
        self.end: Optional[StraitError] = None

    def options(self, timeout: Optional[float] = None, headers: Sequence[Tuple[bytes, bytes]] = ()) -> Any:
        return flight.FlightCallOptions(timeout=timeout, headers=[*self._headers, *headers])

    def close(self) -> None:
        if self.end is None:
            self.end = DisconnectedError("the session was closed")
            self._client.close()

    # Calls

    def ask(self, call: Callable[["Asking"], T], again: bool = True, until: Optional[Callable[[], bool]] = None) -> T:
        """What `call` gives, which makes one call of Flight's; its errors as this package has them.

        `again`: it may be made again after a lost connection, as often as there is time for. `until` says that it may not any more.
        """
        deadline: Optional[float] = None
        pause = _PAUSES[0]
        while True:
            try:
                return self.once(call)
            except NoHostError as error:
                # A certificate is the same the next time.
                if isinstance(error, CertificateError) or not self.met or not again:
                    raise
                lost: StraitError = error
            except DisconnectedError as error:
                if not again or self.end is not None:
                    raise
                lost = error
            now = time.monotonic()
            deadline = now + self._patience if deadline is None else deadline
            if now + pause > deadline or (until is not None and until()):
                raise lost
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _PAUSES[1])

    def once(self, call: Callable[["Asking"], T]) -> T:
        """The same, once."""
        if self.end is not None:
            raise type(self.end)(*self.end.args)
        asking = Asking(self, self._client)
        try:
            given = call(asking)
        except (pa.ArrowException, KeyError, NotImplementedError, OSError, MemoryError) as error:
            if isinstance(error, StraitError):
                raise
            raise self._failed(error, asking.trailers()) from None
        self.met = True
        return given

    def begun(self) -> Optional[_Trailers]:
        """The trailers of the call that this thread began last."""
        return getattr(self._middleware.of_thread, "begun", None)

    def _failed(self, error: BaseException, said: Mapping[str, Any]) -> StraitError:
        if self.end is not None:
            return type(self.end)(*self.end.args)
        text = _BEHIND.sub("", _BEFORE.sub("", str(error.args[0] if error.args else error)))
        if _REASON in said:
            self.met = True
            failure = _details(said, text)
            return from_host(failure)
        code = _code(error)
        if code in ("UNAVAILABLE", "UNKNOWN"):
            why = str(error)
            if _CERTIFICATE.search(why) and not self.met:
                return CertificateError(1, f"{self.address}: {_tls(why)}")
            if not self.met:
                return NoHostError(f"no host answers at {self.address}: {text}")
            return DisconnectedError(f"the connection to {self.address} was lost: {text}")
        if code == "DEADLINE_EXCEEDED":
            return DisconnectedError(f"{self.address} did not answer in time: {text}")
        if isinstance(error, pa.ArrowInvalid) and code == "":
            return ProtocolError(f"{self.address}: {text}")
        # Of a server that is not strait's, or something before it.
        return from_host({"code": code or "INTERNAL", "reason": "HOST", "message": text, "request_id": _text(said.get(_REQUEST_ID, "-"))})


class Asking:
    """One call under way."""

    def __init__(self, remote: Remote, client: Any) -> None:
        self.remote = remote
        self.client = client
        remote._middleware.of_thread.begun = None
        self._begun: Optional[_Trailers] = None

    def trailers(self) -> Mapping[str, Any]:
        begun = self.remote.begun()
        return {} if begun is None else begun.said


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _details(said: Mapping[str, Any], text: str) -> Dict[str, Any]:
    """The failure that the trailers tell of, as an ERROR frame has it."""
    failure: Dict[str, Any] = {}
    try:
        details = _status_details(said.get(_DETAILS, b""))
        failure = json.loads(details) if details else {}
    except ValueError:
        pass
    if not isinstance(failure, dict):
        failure = {}
    return {
        "code": "INTERNAL",
        **failure,
        "reason": _text(said[_REASON]),
        "message": text,
        "request_id": failure.get("request_id") or _text(said.get(_REQUEST_ID, "-")),
    }


def _status_details(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _code(error: BaseException) -> str:
    """The gRPC code that pyarrow made its exception of."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return ""


_CODES: List[Tuple[Any, str]] = [
    (flight.FlightUnavailableError, "UNAVAILABLE"),
    (flight.FlightTimedOutError, "DEADLINE_EXCEEDED"),
    (flight.FlightCancelledError, "CANCELLED"),
    (flight.FlightUnauthenticatedError, "UNAUTHENTICATED"),
    (flight.FlightUnauthorizedError, "PERMISSION_DENIED"),
    (flight.FlightInternalError, "INTERNAL"),
    (NotImplementedError, "UNIMPLEMENTED"),
    (KeyError, "NOT_FOUND"),
    (flight.FlightError, "INTERNAL"),
    (pa.ArrowInvalid, "INVALID_ARGUMENT"),
    (pa.ArrowException, "UNKNOWN"),
    (OSError, "UNAVAILABLE"),
]


def _tls(text: str) -> str:
    """What of a long text is about certificates."""
    lowered = text.lower()
    if "hostname" in lowered or "not in peer" in lowered:
        what = "the host's certificate is not issued to that name; use the name that it is issued to, or give server_name"
    elif "expired" in lowered:
        what = "a certificate has expired"
    elif "alert" in lowered:
        what = "the host did not take this side's certificate, or wants one: give certificate=(chain, key)"
    else:
        what = "the host's certificate is not trusted here; give the authority that issued it as ca"
    found = re.search(r"(error:[0-9a-fA-F]+:[^\"}]*|Peer name [^\"}]*|Hostname Verification[^\"}]*|Ssl handshake[^\"}]*)", text)
    return f"{what} ({found.group(1).strip()[:300]})" if found else f"{what} ({text[:300]})"
