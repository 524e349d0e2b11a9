"""Sockets of frames to a host that is not on this machine: prepared calls, streams and channels.

    Prepared, PreparedStream, ChannelReader ── packets ──▶ a pair of sockets ──▶ DoExchange ──▶ host
                                                             ◀── a thread each way ──┘

Who has the other end of the pair cannot tell it from a socket that came from a host on this machine: what is true of those, about
interrupts, threads and event loops, is true here.
"""

from __future__ import annotations

import json
import select
import socket
import threading
from typing import Any, Dict, Optional, Tuple

import pyarrow as pa
from pyarrow import flight

from . import _wire
from ._errors import ProtocolError
from ._flight import Asking, Remote
from ._wire import FRAME_BYTES_MAX, HEADER, Op

#: The host ends an exchange of which nothing came for `server.stall_ms`.
_ALIVE_SECONDS = 10.0
_BUFFER_BYTES = 4 * FRAME_BYTES_MAX
_OP_AT = 3


class Bridge:
    """A socket here, and an exchange with the host that has what comes over it."""

    def __init__(self, remote: Remote, key: str, body: Dict[str, Any], request_id: Optional[str]) -> None:
        """`key`: `"prepare"` or `"stream"`; `body`: that of the request."""
        headers = [] if request_id is None else [(b"x-request-id", request_id.encode())]
        descriptor = flight.FlightDescriptor.for_command(json.dumps({key: body}))

        def begin(asking: Asking) -> Tuple[Any, Any, bytes]:
            writer, reader = asking.client.do_exchange(descriptor, remote.options(headers=headers))
            try:
                # The first message has the descriptor.
                writer.begin(pa.schema([]))
                return writer, reader, _frame(reader)
            except BaseException:
                _close(writer, reader)
                raise

        self._writer, self._reader, told = remote.once(begin)
        op, _, self.told, _ = _wire.decode(told)
        if op != Op.OK:
            _close(self._writer, self._reader)
            raise ProtocolError(f"an exchange of frames that begins with op {op}")
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self.theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        # Of the writer, which takes one message at a time.
        self._writing = threading.Lock()
        self._is_over = False
        self._sender = threading.Thread(target=self._send, name="strait-bridge", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="strait-bridge", daemon=True).start()

    def take(self) -> int:
        """The descriptor of the end that is not the host's; the caller's from now on."""
        return self.theirs.detach()

    def cancel(self) -> None:
        """Ends in the host what is under way."""
        header = HEADER.pack(_wire.MAGIC, _wire.PROTOCOL, Op.CANCEL, 0, 0, 0, *_wire.NO_TRACE, b"", 0)
        self._write(header)

    def close(self) -> None:
        """Breaks it off."""
        self._hang_up()
        try:
            self._reader.cancel()
        except (pa.ArrowException, OSError):
            pass

    def _write(self, frame: Any) -> bool:
        with self._writing:
            if self._is_over:
                return False
            try:
                self._writer.write_metadata(pa.py_buffer(frame))
                return True
            except (pa.ArrowException, KeyError, OSError, NotImplementedError):
                # Why is seen by who reads.
                return False

    def _send(self) -> None:
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        try:
            while not self._is_over:
                if not poll.poll(_ALIVE_SECONDS * 1000):
                    if not self._write(b""):
                        return
                    continue
                try:
                    packet = self._ours.recv(FRAME_BYTES_MAX)
                except ConnectionResetError:
                    # Whoever left had not read all that came. Told once; what was sent before comes next.
                    continue
                if not packet or not self._write(packet):
                    break
        except OSError:
            pass
        self._end_writing()

    def _end_writing(self) -> None:
        """Nothing more is sent; the host takes what was, and ends the call."""
        with self._writing:
            if self._is_over:
                return
            self._is_over = True
            try:
                self._writer.done_writing()
            except (pa.ArrowException, KeyError, OSError, NotImplementedError):
                pass

    def _receive(self) -> None:
        is_read = True
        try:
            while True:
                frame = _frame(self._reader)
                if frame[_OP_AT] == Op.SHUTDOWN:
                    # The host waits for this side's end: gRPC aborts a program that writes when a call is over.
                    self._end_writing()
                    self._hang_up()
                    is_read = False
                try:
                    if is_read:
                        self._ours.send(frame)
                except OSError:
                    # Nobody reads any more; what was sent last still has to get to the host, which ends it then.
                    is_read = False
        except (StopIteration, pa.ArrowException, KeyError, OSError, NotImplementedError):
            # The end of the socket says that it is over; the session knows more, if there is more to be known.
            pass
        self._hang_up()
        with self._writing:
            self._is_over = True
            _close(self._writer, self._reader)
        self._sender.join()
        self._ours.close()

    def _hang_up(self) -> None:
        try:
            self._ours.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _frame(reader: Any) -> bytes:
    while True:
        chunk = reader.read_chunk()
        if chunk.app_metadata is not None:
            frame: bytes = chunk.app_metadata.to_pybytes()
            return frame


def _close(writer: Any, reader: Any) -> None:
    try:
        reader.cancel()
    except (pa.ArrowException, OSError):
        pass
    try:
        writer.close()
    except (pa.ArrowException, KeyError, OSError, NotImplementedError):
        pass
