"""Finding the host: from an address or the environment to the directory of `data.sock`, and there."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import List, Mapping, Optional

from ._errors import NoHostError

DATA_SOCKET = "data.sock"


def directory(address: Optional[str], environment: Mapping[str, str] = os.environ, uid: Optional[int] = None) -> Path:
    """The runtime directory of the host that `address` names, or else of the one that the environment leads to.

    Without an address it is `$STRAIT_ADDRESS` alone if that is set, else the first of `$RUNTIME_DIRECTORY`,
    `$XDG_RUNTIME_DIR/strait`, `/run/strait` (as root) and `/tmp/strait-UID` that has a `data.sock`.

    Raises `ValueError` for an address of another form, `NoHostError` if none of the places has a host.
    """
    uid = os.geteuid() if uid is None else uid
    if address is None:
        address = from_environment(environment)
    if address is not None:
        return _parse(address)
    places: List[Path] = []
    if environment.get("RUNTIME_DIRECTORY"):
        places.append(Path(environment["RUNTIME_DIRECTORY"]))
    if environment.get("XDG_RUNTIME_DIR"):
        places.append(Path(environment["XDG_RUNTIME_DIR"]) / "strait")
    if uid == 0:
        places.append(Path("/run/strait"))
    for place in places:
        if (place / DATA_SOCKET).exists():
            return place
    shared = Path(f"/tmp/strait-{uid}")
    if (shared / DATA_SOCKET).exists():
        return _owned(shared, uid)
    looked_at = ", ".join(str(place / DATA_SOCKET) for place in [*places, shared])
    raise NoHostError(
        f"no host found: none of {looked_at} exists; start one with `strait serve`, or name its directory by an "
        "address (unix:///DIRECTORY) or in STRAIT_ADDRESS"
    )


def from_environment(environment: Mapping[str, str] = os.environ) -> Optional[str]:
    """`$STRAIT_ADDRESS`, if it is set."""
    return environment.get("STRAIT_ADDRESS") or None


def _parse(address: str) -> Path:
    prefix = "unix://"
    if address.startswith(prefix + "/"):
        return Path(address[len(prefix) :])
    raise ValueError(
        f"address {address!r} is none of unix:///DIRECTORY (an absolute path, this machine), grpc+tls://HOST:PORT, grpc+tcp://HOST:PORT and "
        "grpc+unix:///DIRECTORY/flight.sock"
    )


def _owned(place: Path, uid: int) -> Path:
    """The one place that anybody can create, hence the check of its owner."""
    # Not `stat`: a link would answer with the owner of its target.
    found = place.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o022:
        return place
    raise NoHostError(
        f"{place} belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; a host's directory there "
        f"belongs to uid {uid} and only it can write to it: remove it, or name the host's directory by an address"
    )


def connect(sock: socket.socket, path: str) -> None:
    """Connects to the socket at `path`, however long that is."""
    if len(os.fsencode(path)) < 108:
        sock.connect(path)
        return
    # A socket's address has room for 107 bytes.
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)


def interruptible(sock: socket.socket) -> None:
    """Lets a signal (Ctrl-C) end the wait for a packet, whatever its handler asks for.

    Some libraries (polars) install handlers after which Linux goes on waiting by itself, except on a socket that has
    a timeout. This one is of days, and who waits then waits again.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1_000_000, 0))
