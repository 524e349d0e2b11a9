"""A request under way, and the reply that ends it."""

from __future__ import annotations

import os
import threading
from collections import deque
from itertools import repeat
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from ._errors import ProtocolError
from ._wire import Op, leases_in

if TYPE_CHECKING:
    from ._connection import Connection


class Reply:
    """An OK with its descriptors, which belong to whoever has the reply."""

    def __init__(self, op: int, body: Dict[str, Any], fds: List[int], payload: bytes = b"") -> None:
        self.op = op
        self.body = body
        self.fds = fds
        #: The elements of small tensors.
        self.payload = payload

    def __del__(self) -> None:
        # An interrupt may have come before anybody took it, or before it was more than a name.
        if hasattr(self, "fds"):
            self.close()

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        # No Python code is run, so that an interrupt comes before or after all of it. -1: somebody took it.
        taken = filter((-1).__lt__, map(list.pop, repeat(self.fds, len(self.fds))))
        deque(map(os.close, taken), maxlen=0)


class Grant:
    """A reply's descriptors and leases: at the end of the `with` block, those that nobody took are closed and given back."""

    def __init__(self, connection: "Connection", reply: Reply) -> None:
        self._connection = connection
        self._reply = reply
        self.leases = set(leases_in(reply.body))

    def fd(self, index: Any) -> int:
        """The descriptor of that index; it stays the reply's."""
        if not isinstance(index, int) or not 0 <= index < len(self._reply.fds):
            raise ProtocolError(f"descriptor {index!r} of a reply that has {len(self._reply.fds)}")
        return self._reply.fds[index]

    def keep(self, index: int) -> int:
        """The descriptor of that index; it is the caller's from now on."""
        fd, self._reply.fds[index] = self._reply.fds[index], -1
        return fd

    def __enter__(self) -> "Grant":
        return self

    def __exit__(self, *_: object) -> None:
        self._reply.close()
        self._connection.drop(list(self.leases))


class Pending:
    """A request whose reply is to come."""

    __slots__ = ("sequence", "op", "reply", "sleeper", "abandoned")

    def __init__(self, sequence: int, op: Op, abandoned: bool) -> None:
        self.sequence = sequence
        self.op = op
        self.reply: Optional[Reply] = None
        # Held by the thread that sleeps until it is released; None while nobody sleeps.
        self.sleeper: Optional[threading.Lock] = None
        # Nobody wants the reply; leases that it grants are given back.
        self.abandoned = abandoned
