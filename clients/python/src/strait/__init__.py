"""Client of a strait host on the same machine: numpy arrays in shared memory, sandboxed kernels by name.

    import strait

    with strait.connect() as s:
        x = s.empty((1000, 1000))
        x[:] = 1.5
        y = s.call("zscore", x, axis=0)
        print(y.numpy()[:3])

Nothing is copied here: the kernel reads the pages that the program filled, and `y` is a view of the pages that the
kernel wrote. The protocol is docs/protocol.md of the strait repository.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"strait hosts and clients need Linux; this is {sys.platform}")

from ._array import Array, Arrays
from ._call import Call
from ._channel import ChannelOptions, ChannelReader
from ._connect import connect
from ._errors import (
    AuthenticationError,
    CertificateError,
    DisconnectedError,
    ForkedError,
    LeaseExpiredError,
    LocalOnlyError,
    NoHostError,
    NoRightError,
    NotFoundError,
    ProtocolError,
    ReleasedError,
    RemoteError,
    StraitError,
)
from ._local import local
from ._prepared import Prepared, Spec
from ._session import VERSION as __version__
from ._session import ClientStats, Session
from ._stream import PreparedStream
from ._wire import BlockTree, CallInfo, Flight, Kernel, Pages, Parameter, Port, Stage, Tensor

__all__ = [
    "Array",
    "Arrays",
    "AuthenticationError",
    "BlockTree",
    "Call",
    "CallInfo",
    "CertificateError",
    "ChannelOptions",
    "ChannelReader",
    "ClientStats",
    "DisconnectedError",
    "Flight",
    "ForkedError",
    "Kernel",
    "LeaseExpiredError",
    "LocalOnlyError",
    "NoHostError",
    "NoRightError",
    "NotFoundError",
    "Pages",
    "Parameter",
    "Port",
    "Prepared",
    "PreparedStream",
    "ProtocolError",
    "ReleasedError",
    "RemoteError",
    "Session",
    "Spec",
    "Stage",
    "StraitError",
    "Tensor",
    "__version__",
    "connect",
    "local",
]
