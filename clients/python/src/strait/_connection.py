"""One connection, shared by any number of threads.

    callers ── request ─▶ send ─▶ host
       ▲                           │
       └── wait ◀─ _pending ◀─ receive (by one of those who wait)

A reply that goes through a reader thread costs a second wake-up, twice the time of a small call. So a thread that
waits receives by itself, also for the others, and wakes the next one when it leaves. What the host pushes is
received with the next reply, or when a lease is looked at. One daemon thread, the keeper, renews leases and gives
back those of arrays that were collected; it needs no strong reference to the connection while it sleeps.

Finalizers run anywhere, also in a thread that holds a lock: they only append to `_dropped` and ring the keeper's
bell, both of which take no lock of Python code.
"""

from __future__ import annotations

import array
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from . import _address, _leases, _pages, _wire
from ._errors import (
    DisconnectedError,
    ForkedError,
    LeaseExpiredError,
    NoHostError,
    ProtocolError,
    StraitError,
    from_host,
)
from ._reply import Pending, Reply
from ._wire import Op, milliseconds

#: After an array is dropped the next call, which takes its lease along, is probably near.
_SERIES_SECONDS = 0.02
#: For so long, and so often, the keeper looks for the answer to a call that was abandoned, whose results may be large (or to a STREAM, whose
#: channel nobody else can read meanwhile).
_STRAY_SECONDS = 5.0
_STRAY_INTERVAL = 0.05
#: Leases of dropped arrays wait for each other, up to so many or to segments of so many bytes: a RELEASE for each
#: would cost a small call half as much again. Larger segments go back before the next call, which may want their pages.
_DROPPED_COUNT_MAX = 32
_DROPPED_BYTES_MAX = 512 << 10
_ANCILLARY = (socket.CMSG_SPACE(_wire.FDS_MAX * 4),)
_WHEN_THERE = int(socket.MSG_CMSG_CLOEXEC)
_NOW = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT_FLAGS = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_STOP = "stop"


class Connection:
    """A greeted connection to a host. It belongs to the process that made it."""

    def __init__(self, sock: socket.socket, name: str, renew: bool) -> None:
        self._pid = os.getpid()
        self._socket = sock
        _address.interruptible(sock)
        self._sending = threading.Lock()
        # Held for short, never over a system call that waits. Guards all below.
        self._lock = threading.Lock()
        # The thread that receives, for all.
        self._leader: Optional[int] = None
        # A frame that was taken from the socket and not handed on yet.
        self._incoming: Deque[Tuple[int, List[Tuple[int, int, bytes]], int, Any]] = deque(maxlen=1)
        self._pending: Dict[int, Pending] = {}
        self._sequence = 0
        self._leases = _leases.Leases(renew)
        self._end: Optional[StraitError] = None
        self._shutdown: Optional[float] = None
        # Written by finalizers.
        self._dropped: Deque[int] = deque()
        self._dropped_bytes = 0
        self._lapsed: Deque[int] = deque()
        self._stray_until = 0.0
        self._forgotten: Deque[Pending] = deque()
        self._rung = False
        self._bell: "queue.SimpleQueue[Optional[str]]" = queue.SimpleQueue()
        self._keeper_due: Optional[float] = None
        #: What is known of the host's own end, once the connection is over; called by the thread that notices.
        self.epitaph: Callable[[], str] = str
        self._buffer = bytearray(_wire.FRAME_BYTES_MAX + 1)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        #: Bytes of small tensors that one request has room for.
        self.payload_room = _wire.payload_room(sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        reply = self.call(Op.HELLO, {"protocol": _wire.PROTOCOL, "client": name})
        if reply.op != Op.WELCOME:
            raise ProtocolError(f"HELLO was answered by op {reply.op}")
        self.welcome = reply.body
        threading.Thread(
            target=_keep, args=(weakref.ref(self), self._bell), name="strait-keeper", daemon=True
        ).start()

    @classmethod
    def connect(cls, directory: Path, name: str, renew: bool) -> "Connection":
        path = str(directory / "data.sock")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _address.connect(sock, path)
            return cls(sock, name, renew)
        except OSError as error:
            sock.close()
            if isinstance(error, StraitError):
                raise
            raise NoHostError(f"no strait host at {path}: {error}; start one with `strait serve`") from error
        except BaseException:
            sock.close()
            raise

    def __del__(self) -> None:
        # A connection that never came up has nothing of this.
        if getattr(self, "_bell", None) is not None:
            self._bell.put(_STOP)

    # Requests

    def call(self, op: Op, body: Mapping[str, Any]) -> Reply:
        """Sends a request and waits for its OK. ERROR is raised as `RemoteError`."""
        return self.wait(self.request(op, body))

    def request(
        self, op: Op, body: Mapping[str, Any], abandoned: bool = False, payload: Union[bytes, bytearray] = b""
    ) -> Pending:
        """Sends a request; its reply is to be waited for, or abandoned."""
        self.check()
        many = len(self._dropped) >= _DROPPED_COUNT_MAX or self._dropped_bytes >= _DROPPED_BYTES_MAX
        if many and op != Op.RELEASE:
            self._release_dropped()
        with self._lock:
            pending = self._expect(op, abandoned)
        frame = None
        try:
            frame = _wire.encode(op, pending.sequence, body, payload=payload)
            with self._sending:
                self._send(frame)
        except BaseException:
            if frame is None:
                with self._lock:
                    self._pending.pop(pending.sequence, None)
            else:
                # An interrupt may have come just after it was sent.
                self.abandon(pending)
            raise
        return pending

    def check(self) -> None:
        """Raises if this is not the process that connected, or the connection is over."""
        self.check_process()
        if self._end is not None:
            raise type(self._end)(*self._end.args)

    def check_process(self) -> None:
        # Before any lock: a fork may have copied it while another thread held it.
        here = os.getpid()
        if here != self._pid:
            raise ForkedError(
                f"this session belongs to process {self._pid}, of which this process ({here}) is a fork; "
                "connect again after the fork"
            )

    def _expect(self, op: Op, abandoned: bool) -> Pending:
        while True:
            self._sequence = self._sequence % 0xFFFF_FFFF + 1
            if self._sequence not in self._pending:
                pending = self._pending[self._sequence] = Pending(self._sequence, op, abandoned)
                return pending

    def _send(self, frame: bytes) -> None:
        while True:
            try:
                self._socket.send(frame, _SEND_FLAGS)
                return
            except BlockingIOError:
                self._make_room()
            except OSError as error:
                # The host may have said why before it closed.
                self.look()
                self._lose(error)
                self.check()

    def _make_room(self) -> None:
        """The host may wait for us to read before it reads: do that, unless another thread does."""
        try:
            leads = self._lead()
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT | (select.POLLIN if leads else 0))
            poll.poll(100)
            if leads:
                while self._end is None and self._receive(_NOW):
                    pass
        finally:
            self._stop_leading()

    # Replies

    def wait(self, pending: Pending, timeout: Optional[float] = None) -> Reply:
        """Waits for a reply. After `TimeoutError` it can be waited for again; any other exception abandons it."""
        until = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                left = None if until is None else until - time.monotonic()
                sleeper = None
                with self._lock:
                    reply = self._take(pending)
                    if reply is not None:
                        break
                    if left is not None and left <= 0:
                        raise TimeoutError(f"no answer within {timeout} s; it may still come")
                    if self._leader is None or self._leader == threading.get_ident():
                        self._leader = threading.get_ident()
                    else:
                        sleeper = pending.sleeper = threading.Lock()
                        sleeper.acquire()
                if sleeper is not None:
                    sleeper.acquire(timeout=-1 if left is None else left)
                    continue
                self._receive_until(pending, left)
                self._stop_leading()
        except TimeoutError:
            self._leave(pending)
            raise
        except BaseException:
            self.abandon(pending)
            raise
        if reply.op == Op.ERROR:
            reply.close()
            raise from_host(reply.body)
        return reply

    def abandon(self, pending: Pending) -> None:
        """Nobody waits for this reply any more: a running call is cancelled, leases that arrive are given back."""
        self._leave(pending)
        with self._lock:
            # A reply that nobody is known to wait for is discarded with all that it grants.
            waited = self._pending.pop(pending.sequence, None)
            reply, pending.reply = pending.reply, None
        if reply is not None:
            self._discard(reply)
        elif waited is not None and pending.op in (Op.INVOKE, Op.PREPARE, Op.STREAM):
            if pending.op != Op.STREAM:
                self.cancel(pending)
            self._stray_until = time.monotonic() + _STRAY_SECONDS
            self._bell.put(None)

    def cancel(self, pending: Pending) -> None:
        """Asks the host to end a running INVOKE or PREPARE, whose own reply tells how it went."""
        if self._end is None:
            try:
                self.request(Op.CANCEL, {"sequence": pending.sequence}, abandoned=True)
            except DisconnectedError:
                # That ended the call, too.
                pass

    def _take(self, pending: Pending) -> Optional[Reply]:
        if pending.reply is None:
            if self._end is not None:
                self._pending.pop(pending.sequence, None)
                raise type(self._end)(*self._end.args)
            return None
        self._pending.pop(pending.sequence, None)
        return pending.reply

    def _leave(self, pending: Pending) -> None:
        """A thread stops waiting, perhaps just when it was its turn to receive."""
        pending.sleeper = None
        self._stop_leading()

    def _lead(self) -> bool:
        with self._lock:
            if self._leader not in (None, threading.get_ident()):
                return False
            self._leader = threading.get_ident()
            return True

    def _stop_leading(self) -> None:
        """Hands on to the next who waits, unless another thread leads. An interrupt may have kept this one from saying so."""
        with self._lock:
            if self._leader not in (None, threading.get_ident()):
                return
            self._leader = None
            if self._end is not None:
                self._socket.close()
            self._wake_one()

    def _wake_one(self) -> None:
        """Wakes one to receive; and whoever has a reply, for an interrupt may have kept a leader from waking it."""
        successor = None
        for pending in self._pending.values():
            if pending.sleeper is not None:
                if pending.reply is not None:
                    self._wake(pending)
                elif successor is None:
                    successor = pending
        if successor is not None:
            self._wake(successor)

    @staticmethod
    def _wake(pending: Pending) -> None:
        sleeper, pending.sleeper = pending.sleeper, None
        if sleeper is not None:
            sleeper.release()

    def _receive_until(self, pending: Pending, timeout: Optional[float]) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        while pending.reply is None and self._end is None:
            if until is None:
                self._receive(_WHEN_THERE)
                continue
            left = until - time.monotonic()
            if left <= 0:
                return
            if self._poll.poll(left * 1000):
                self._receive(_NOW)

    def _receive(self, flags: int) -> bool:
        """Takes one frame from the socket and hands it on; False if there is none.

        An interrupt (Ctrl-C) may come between any two steps of Python code. Then the frame is kept, and the next who
        receives hands it on.
        """
        incoming = self._incoming
        try:
            if not incoming:
                # One step, for `map` and `extend` run no Python code: nothing can be received and then lost.
                incoming.extend(map(self._socket.recvmsg_into, ([self._buffer],), _ANCILLARY, (flags,)))
            length, ancillary, cut, _ = incoming[0]
            fds: List[int] = []
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                    fds += numbers
            if length == 0:
                self._lose()
                return False
            try:
                if cut & _CUT_FLAGS:
                    raise ProtocolError("a frame that is longer, or has more descriptors, than the protocol allows")
                op, sequence, body, payload = _wire.decode(self._buffer, length)
            except ProtocolError as error:
                # A frame, and perhaps somebody's reply, is lost: no later one could be trusted.
                incoming.clear()
                Reply(Op.ERROR, {}, fds).close()
                self._finish(error)
                return False
            self._deliver(op, sequence, body, payload, fds)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(error)
            return False

    def _deliver(self, op: int, sequence: int, body: Dict[str, Any], payload: bytes, fds: List[int]) -> None:
        if sequence == 0:
            self._pushed(op, body)
            self._incoming.clear()
            Reply(op, body, fds).close()
            return
        with self._lock:
            pending = self._pending.get(sequence)
            if pending is not None and not pending.abandoned:
                reply = Reply(op, body, [], payload)
                # No interrupt comes between these three: else it would be handed on twice.
                reply.fds = fds
                pending.reply = reply
                self._incoming.clear()
                self._wake(pending)
                return
            self._pending.pop(sequence, None)
        reply = Reply(op, body, [])
        # As above: else nobody would close them.
        reply.fds = fds
        self._incoming.clear()
        self._discard(reply)

    def _discard(self, reply: Reply) -> None:
        reply.close()
        self.drop(_wire.leases_in(reply.body))

    def _pushed(self, op: int, body: Mapping[str, Any]) -> None:
        if op == Op.GONE:
            with self._lock:
                self._leases.gone(body.get("lease", 0), str(body.get("reason", "gone")))
        elif op == Op.SHUTDOWN:
            self._shutdown = time.monotonic() + body.get("drain_ms", 0) / 1000
        elif op == Op.ERROR:
            # The host closes the connection after this.
            self._finish(from_host(body))

    def _lose(self, error: Optional[OSError] = None) -> None:
        gone = "the connection to the host is over; mapped tensors stay readable, but everything else needs a new connection"
        if self._end is None:
            self._finish(DisconnectedError(gone + (f" ({error})" if error else "") + self.epitaph()))

    def _finish(self, end: StraitError) -> None:
        with self._lock:
            if self._end is None:
                self._end = end
            for pending in self._pending.values():
                self._wake(pending)
        self._bell.put(_STOP)

    def close(self) -> bool:
        """Ends the connection; whoever waits gets `DisconnectedError`. False in a forked child, whose it is not."""
        if os.getpid() != self._pid:
            return False
        self._finish(DisconnectedError("this session was closed; what is mapped stays readable"))
        try:
            # Wakes the one who receives, who then closes the socket.
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The host was faster.
            pass
        if self._lead():
            self._stop_leading()
        return True

    @property
    def closed(self) -> bool:
        return self._end is not None

    @property
    def end(self) -> Optional[StraitError]:
        """Why it is over."""
        return self._end

    @property
    def draining(self) -> Optional[float]:
        """Seconds until the host ends, once it announced that."""
        self.look()
        return None if self._shutdown is None else max(0.0, self._shutdown - time.monotonic())

    # Leases

    def hold(self, lease: int, expires_ms: int) -> None:
        """Keeps a lease alive from now on, if that was asked for."""
        with self._lock:
            due = self._leases.hold(lease, expires_ms / 1000, time.monotonic())
            nearer = due is not None and (self._keeper_due is None or due < self._keeper_due)
            if nearer:
                self._keeper_due = due
        if nearer:
            self._bell.put(None)

    def drop(self, leases: Sequence[int], segment_bytes: int = 0) -> None:
        """Gives leases back soon. Takes no lock: finalizers call it."""
        if leases and self._end is None:
            self._dropped.extend(leases)
            # Two threads may lose a sum here, which then only waits for the keeper.
            self._dropped_bytes += segment_bytes
            self._ring()

    def lapse(self, lease: int) -> None:
        """Ends a lease soon without a release, so that the host never writes to its segment again. Takes no lock."""
        if self._end is None:
            self._lapsed.append(lease)
            self._ring()

    def forget(self, pending: Pending) -> None:
        """`abandon`, soon. Takes no lock: finalizers call it."""
        if self._end is None and os.getpid() == self._pid:
            self._forgotten.append(pending)
            self._ring()

    def _ring(self) -> None:
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    def _end_lapsed(self) -> None:
        while self._lapsed:
            lease = self._lapsed.popleft()
            with self._lock:
                self._leases.end([lease])
            self.request(Op.RENEW, {"leases": [lease], "lease_ms": 1}, abandoned=True)

    def _release_dropped(self, wait: bool = False) -> None:
        self._dropped_bytes = 0
        while self._dropped:
            batch: List[int] = []
            while self._dropped and len(batch) < _leases.IN_FRAME_MAX:
                try:
                    batch.append(self._dropped.popleft())
                except IndexError:
                    break
            with self._lock:
                self._leases.end(batch)
            pending = self.request(Op.RELEASE, {"leases": batch}, abandoned=not wait)
            if wait:
                self.wait(pending).close()

    def check_lease(self, lease: int) -> None:
        """Raises `LeaseExpiredError` if it is known that a lease is over."""
        self.look()
        self.check()
        gone = self._leases.why_gone(lease)
        if gone is not None:
            raise LeaseExpiredError(
                {
                    "code": "FAILED_PRECONDITION",
                    "reason": "LEASE_EXPIRED",
                    "message": f"lease {lease} is over ({gone}); its pages stay readable, for anything else get "
                    "the flight again",
                }
            )

    def expires_in(self, lease: int) -> float:
        """Seconds that a lease has left as far as is known; 0 if it is over."""
        with self._lock:
            return self._leases.left(lease, time.monotonic())

    def renew(self, leases: List[int], life: Optional[float]) -> float:
        """Gives leases a new life and returns the seconds that the host granted."""
        body: Dict[str, Any] = {"leases": leases}
        if life is not None:
            body["lease_ms"] = milliseconds(life)
        now = time.monotonic()
        granted: float = self.call(Op.RENEW, body).body["expires_ms"] / 1000
        with self._lock:
            self._leases.renewed(leases, granted, now)
        return granted

    def look(self) -> None:
        """Takes in what the host pushed, unless a thread receives anyway."""
        self.check_process()
        if self._end is None and self._lead():
            try:
                # Asking first is cheaper than the exception for nothing being there.
                while self._end is None and (self._incoming or self._poll.poll(0)) and self._receive(_NOW):
                    pass
            finally:
                self._stop_leading()

    def tend(self) -> Optional[float]:
        """The keeper's work; returns when it is to come again, as `time.monotonic` counts."""
        _pages.sweep()
        if self._rung:
            time.sleep(_SERIES_SECONDS)
            self._rung = False
            while self._forgotten:
                self.abandon(self._forgotten.popleft())
            self._end_lapsed()
            self._release_dropped(wait=True)
        self.look()
        now = time.monotonic()
        with self._lock:
            due = self._leases.due(now)
        for life, leases in due:
            self._renew_all(leases, life)
        with self._lock:
            next_due = self._leases.next_due()
            if now < self._stray_until:
                stray = now + _STRAY_INTERVAL
                next_due = stray if next_due is None else min(next_due, stray)
            self._keeper_due = next_due
            return next_due

    def _renew_all(self, leases: List[int], life: float) -> None:
        try:
            self.renew(leases, life)
        except LeaseExpiredError as error:
            # None was renewed; the others are still due.
            if len(leases) > 1:
                half = len(leases) // 2
                self._renew_all(leases[:half], life)
                self._renew_all(leases[half:], life)
                return
            with self._lock:
                self._leases.gone(leases[0], error.message)


def _keep(reference: "weakref.ref[Connection]", bell: "queue.SimpleQueue[Optional[str]]") -> None:
    due: Optional[float] = None
    while True:
        try:
            word = bell.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except queue.Empty:
            word = None
        connection = reference()
        if word == _STOP or connection is None:
            return
        try:
            due = connection.tend()
        except StraitError:
            # Whoever uses the connection next is told; a lease that was refused is marked.
            if connection.closed:
                return
            due = time.monotonic() + 1
        del connection
