"""What can go wrong between this process and the host.

Three failures are distinct: there is no host (`NoHostError`), the connection is over
(`DisconnectedError`), a lease is over while the connection is fine (`LeaseExpiredError`). Some are also what Python itself
raises for the like: `PermissionError`, `KeyError`, `ssl.SSLCertVerificationError`.
An argument that this package itself refuses is a plain `TypeError` or `ValueError`.
"""

from __future__ import annotations

import ssl
from typing import Any, Dict, Mapping, Optional, Type


class StraitError(Exception):
    """Every error of this package except wrong arguments."""


class RemoteError(StraitError):
    """The host refused, or the kernel failed."""

    def __init__(self, failure: Mapping[str, Any]) -> None:
        #: A gRPC code's name: `"NOT_FOUND"`.
        self.code: str = str(failure.get("code", "INTERNAL"))
        #: The protocol's stable word for the mistake: `"FLIGHT_NOT_FOUND"`.
        self.reason: str = str(failure.get("reason", "HOST"))
        #: For people: what, which, by how much, what to do.
        self.message: str = str(failure.get("message", ""))
        #: Id of the request in the host's log.
        self.request_id: str = str(failure.get("request_id", "-"))
        #: The guest's stack, for a trap.
        self.backtrace: Optional[str] = failure.get("backtrace")
        #: Figures and names.
        self.details: Mapping[str, Any] = failure.get("details") or {}
        super().__init__(failure)

    def __str__(self) -> str:
        text = f"{self.message} [{self.code} {self.reason}, request {self.request_id}]"
        return text if self.backtrace is None else f"{text}\n{self.backtrace}"


class NotFoundError(RemoteError, KeyError):
    """There is no flight, tensor, segment, channel or kernel of that name; a `KeyError`, too."""


class AuthenticationError(RemoteError, PermissionError):
    """The host does not know who asks: the token is missing, wrong, expired or revoked, or there is no client certificate."""


class NoRightError(RemoteError, PermissionError):
    """The host knows who asks, who may not do this; `details["right"]` is what is missing."""


class LeaseExpiredError(RemoteError):
    """A lease on a segment is over; the connection is fine.

    Pages that are mapped already stay readable; for anything else get the flight again.
    """


class NoHostError(StraitError, ConnectionError):
    """No host answers at the address, or none was found."""


class CertificateError(NoHostError, ssl.SSLCertVerificationError):
    """TLS: whoever answers has a certificate that is not trusted, is over, or is another host's; or takes none of this side's."""


class LocalOnlyError(StraitError, NotImplementedError):
    """Only a session on the host's own machine can do that: shared memory is needed. The message says what to do instead."""


class DisconnectedError(StraitError, ConnectionError):
    """The connection is over: the host ended or closed it, or this session was closed.

    What is mapped stays readable; everything else needs a new connection.
    """


class ProtocolError(StraitError):
    """The host said something that the protocol does not allow."""


class ReleasedError(StraitError, ValueError):
    """An array was used after its release."""


class ForkedError(StraitError, RuntimeError):
    """A session was used in a forked child; connect again after the fork. (Arrays show their values there.)"""


def from_host(failure: Mapping[str, Any]) -> RemoteError:
    """The exception for the body of an ERROR frame, or for what stands for it over Flight."""
    if failure.get("reason") == "LEASE_EXPIRED":
        return LeaseExpiredError(failure)
    return _OF_CODES.get(str(failure.get("code")), RemoteError)(failure)


_OF_CODES: Dict[str, Type[RemoteError]] = {
    "NOT_FOUND": NotFoundError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": NoRightError,
}
