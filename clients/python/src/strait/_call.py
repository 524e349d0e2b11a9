"""Calls under way."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, List, Mapping, Optional, Tuple, Union

import numpy as np

from ._array import Array, Arrays, Segment
from ._errors import RemoteError
from ._reply import Pending

if TYPE_CHECKING:
    from ._session import Session


@dataclass
class Scratch:
    """A segment for an array that has to be copied in."""

    key: Tuple[str, Tuple[int, ...]]
    segment: Segment
    array: "np.ndarray[Any, Any]"


class Call:
    """A call under way; made by `Session.start`."""

    def __init__(
        self, session: "Session", kernel: str, pending: Pending, inputs: Mapping[str, Any], scratch: List[Scratch]
    ) -> None:
        self._session = session
        self._kernel = kernel
        self._pending = pending
        self._lock = threading.Lock()
        # Arrays that go in are kept, so that their leases are not given back while the kernel runs.
        self._inputs: Optional[Mapping[str, Any]] = inputs
        self._scratch = scratch
        self._result: Union[Array, Arrays, None] = None
        self._error: Optional[BaseException] = None

    def result(self, timeout: Optional[float] = None) -> Union[Array, Arrays]:
        """Waits for the output and returns it as `Session.call` does.

        Raises what the call failed with: `RemoteError` (after `cancel` its code is `CANCELLED`), `LeaseExpiredError`
        or `DisconnectedError`; `TimeoutError` after that many seconds, while the call goes on. An interrupt
        (Ctrl-C) while it waits cancels the call.
        """
        self._session._connection.check_process()
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"the call of {self._kernel} is not done after {timeout} s")
        try:
            if self._error is None and self._result is None:
                self._wait(timeout)
            if self._error is not None:
                raise self._error
            assert self._result is not None
            return self._result
        finally:
            self._lock.release()

    def _wait(self, timeout: Optional[float]) -> None:
        session = self._session
        try:
            reply = session._connection.wait(self._pending, timeout)
        except TimeoutError:
            raise
        except RemoteError as error:
            self._error = error
            session._forget_ports(self._kernel, error)
            self._done()
            return
        except BaseException as error:
            # The kernel may still read its inputs, so the copies are not used again.
            session._connection.abandon(self._pending)
            self._error = error
            self._scratch.clear()
            self._inputs = None
            return
        self._done()
        try:
            self._result = session._results(reply)
        except BaseException as error:
            self._error = error

    def _done(self) -> None:
        self._session._give_scratch(self._scratch)
        self._inputs = None

    def __reduce__(self) -> Any:
        raise TypeError(
            "a call under way belongs to its session and cannot be pickled; take its result, and send that by a name or as a copy"
        )

    def __del__(self) -> None:
        if self._result is None and self._error is None:
            self._session._connection.forget(self._pending)

    def done(self) -> bool:
        """Whether `result` would return at once."""
        if self._result is not None or self._error is not None:
            return True
        self._session._connection.look()
        return self._pending.reply is not None or self._session._connection.closed

    def cancel(self) -> None:
        """Asks the host to end the call, from any thread; returns at once. No effect once it has been answered."""
        if not self.done():
            self._session._connection.cancel(self._pending)
