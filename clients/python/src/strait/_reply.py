"""A request under way, and the reply that ends it."""

from __future__ import annotations

import os
import threading
from typing import Any, Dict, List, Optional

from ._wire import Op


class Reply:
    """An OK with its descriptors, which belong to whoever has the reply."""

    def __init__(self, op: int, body: Dict[str, Any], fds: List[int]) -> None:
        self.op = op
        self.body = body
        self.fds = fds

    def __del__(self) -> None:
        # An interrupt may have come before anybody took it.
        self.close()

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        while self.fds:
            fd = self.fds.pop()
            # -1: somebody took it.
            if fd >= 0:
                os.close(fd)


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
