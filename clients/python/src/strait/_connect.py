"""The way to a session: with a host on this machine, or with one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple, Union

from . import _address
from ._connection import Connection
from ._session import VERSION, Session

#: PEM, as text or bytes, or the path of a file of it.
Pem = Union[str, bytes, Path]


def connect(
    address: Optional[str] = None,
    *,
    token: Optional[str] = None,
    ca: Optional[Pem] = None,
    certificate: Optional[Tuple[Pem, Pem]] = None,
    server_name: Optional[str] = None,
    retry: float = 10.0,
    renew: bool = True,
    lease: Optional[float] = None,
    name: str = f"strait-python/{VERSION}",
) -> Session:
    """Connects to the host at `address`, or to the one that the environment points to.

    `"unix:///DIRECTORY"`: a host on this machine, with which memory is shared. `renew`: leases are renewed in the background, so that
    they end only by release or with the session; without it they end when they expire. `lease`: their lifetime in
    seconds; the host's default if None. `name`: what the host's log calls this client.

    `"grpc+tls://HOST:PORT"`: a host anywhere, over Arrow Flight; also `"grpc+tcp://HOST:PORT"`, which is not encrypted, and
    `"grpc+unix:///DIRECTORY/flight.sock"`. The session has the same verbs, and what travels is copied (`FarSession`). `token`: who asks.
    `ca`: the authorities whose certificates are trusted, those of the system if None. `certificate`: a client certificate and its key.
    `server_name`: what the host's certificate is issued to, if that is not HOST. `retry`: for so many seconds what a lost connection
    interrupted is asked again; a call still runs once. Needs pyarrow (`pip install 'strait[remote]'`).

    Raises `NoHostError`, `CertificateError`, `AuthenticationError`; `RemoteError` if the host speaks another version of the protocol;
    `ValueError` for options that the address has no use for; `ImportError` without pyarrow.
    """
    if address is None:
        address = _address.from_environment()
    if address is not None and address.startswith("grpc"):
        from ._far import FarSession
        from ._flight import Credentials, Remote

        return FarSession(Remote(address, Credentials(token, ca, certificate, server_name), retry))
    given = {"token": token, "ca": ca, "certificate": certificate, "server_name": server_name}
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option} is for hosts that are reached over the network (grpc+tls://HOST:PORT); this address is {address!r}")
    return Session(Connection.connect(_address.directory(address), name, renew), lease)
