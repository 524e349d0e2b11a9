"""What a connection is to a session, for a host that is reached over Flight."""

from __future__ import annotations

import functools
import json
import os
import queue
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from pyarrow import flight

from . import _tables, _wire
from ._bridge import Bridge
from ._errors import DisconnectedError, ForkedError, LocalOnlyError, NotFoundError, ProtocolError, StraitError
from ._flight import Asking, Remote
from ._reply import Reply
from ._tables import Column
from ._wire import PAYLOAD_BYTES_MAX, Op, Tensor

#: Rows of so many bytes go in one message, between which an interrupt is seen.
_MESSAGE_BYTES = 1 << 20
#: A result is read in parts from this size on, each by a thread of its own, in at most so many.
_PART_BYTES = 32 << 20
_PARTS_MAX = 4
#: What was uploaded, or is to be read, is renewed when it is older than this: the host keeps it for a minute.
_RENEW_SECONDS = 15.0
#: A call that is to end is cancelled again until it is answered, since it may not have been there yet.
_CANCEL_SECONDS_MAX = 0.2
#: What is done with is told after that; on closing, for so long at most.
_RELEASE_SECONDS = 0.05
_RELEASE_SECONDS_MAX = 2.0
#: A thread that has nothing to do ends after that.
_IDLE_SECONDS = 10.0
#: Beyond a call's own deadline, for the way there and back.
_SLACK_SECONDS = 30.0


@dataclass
class Fetched:
    """Tensors that were read."""

    tensors: Sequence[Tensor]
    memory: Sequence["np.ndarray[Any, Any]"]

    @property
    def nbytes(self) -> int:
        return sum(tensor.length for tensor in self.tensors)


class FarReply(Reply):
    """An OK to INVOKE, and those of its results that did not come in it, by port."""

    def __init__(self, body: Dict[str, Any], payload: bytes, fetched: Mapping[str, Fetched]) -> None:
        super().__init__(Op.OK, body, [], payload)
        self.fetched = fetched


class FarPending:
    """A call that a thread is busy with."""

    def __init__(self, key: str, is_keyed: bool) -> None:
        self.key = key
        #: The key is the caller's.
        self.is_keyed = is_keyed
        self.reply: Optional[FarReply] = None
        self.error: Optional[BaseException] = None
        self.over = threading.Event()
        self.is_cancelled = False
        # The reads that are under way for it.
        self.readers: List[Any] = []


class _Threads:
    """Threads for calls, as many as are under way."""

    def __init__(self) -> None:
        self._work: "queue.SimpleQueue[Callable[[], None]]" = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0

    def run(self, work: Callable[[], None]) -> None:
        with self._lock:
            is_new = self._idle == 0
            if not is_new:
                self._idle -= 1
        self._work.put(work)
        if is_new:
            threading.Thread(target=self._serve, name="strait-far", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    # Counted as idle, unless work was meant for it just now.
                    if self._idle == 0:
                        continue
                    self._idle -= 1
                return
            work()
            del work
            with self._lock:
                self._idle += 1


class FarConnection:
    """Asks over Flight what a connection to a data socket asks in frames."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._pid = os.getpid()
        self._threads = _Threads()
        self._lock = threading.Lock()
        # Segments that were uploaded without a name, and when.
        self._uploaded: Dict[str, float] = {}
        self._bridges: Dict[int, Bridge] = {}
        self._last_bridge = 0
        # Segments that are done with, and keys of calls that are.
        self._garbage: List[str] = []
        self._over: List[str] = []
        try:
            self.welcome: Dict[str, Any] = self._json("welcome", b"")
        except BaseException:
            remote.close()
            raise

    @property
    def address(self) -> str:
        return self._remote.address

    # As of a connection

    @property
    def payload_room(self) -> int:
        return PAYLOAD_BYTES_MAX

    @property
    def closed(self) -> bool:
        return self._remote.end is not None

    @property
    def end(self) -> Optional[StraitError]:
        return self._remote.end

    @property
    def draining(self) -> Optional[float]:
        return None

    def check(self) -> None:
        self.check_process()
        end = self._remote.end
        if end is not None:
            raise type(end)(*end.args)

    def check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError("this session belongs to the process that connected; connect again after the fork")

    def check_lease(self, lease: int) -> None:
        raise LocalOnlyError("a lease is a session's on the host's machine")

    def look(self) -> None:
        pass

    def drop(self, leases: Sequence[int], segment_bytes: int = 0) -> None:
        pass

    def close(self) -> bool:
        if os.getpid() != self._pid or self._remote.end is not None:
            return False
        with self._lock:
            bridges = list(self._bridges.values())
            self._bridges.clear()
        for bridge in bridges:
            bridge.close()
        self._release()
        self._remote.close()
        return True

    def __del__(self) -> None:
        if getattr(self, "welcome", None) is not None:
            self.close()

    def call(self, op: Op, body: Mapping[str, Any]) -> Reply:
        self.check()
        return Reply(op, *self._answer(op, body))

    def _answer(self, op: Op, body: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[int]]:
        if op == Op.PING:
            self._json("welcome", b"")
            return {}, []
        if op == Op.STATS:
            return self._json("stats", b""), []
        if op == Op.KERNELS:
            found = self._act("kernels", json.dumps(body).encode() if body else b"")
            return {"kernels": [_parsed(kernel, "a kernel") for kernel in found], "more": False}, []
        if op == Op.DROP:
            self._drop(str(body["name"]))
            return {}, []
        if op == Op.CANCEL:
            self._cancel_bridge(body.get("prepared"))
            return {"cancelled": True}, []
        if op in (Op.PREPARE, Op.STREAM):
            return self._bridge("prepare" if op == Op.PREPARE else "stream", dict(body))
        raise LocalOnlyError(f"{op.name} is for shared memory, and the host is at {self.address}: connect on that machine (unix:///DIRECTORY)")

    def request(
        self, op: Op, body: Mapping[str, Any], abandoned: bool = False, payload: Union[bytes, bytearray] = b""
    ) -> FarPending:
        if op == Op.CANCEL:
            self._cancel_bridge(body.get("prepared"))
            return FarPending("", True)
        if op != Op.INVOKE:
            raise LocalOnlyError(f"{op.name} is for shared memory")
        self.check()
        asked = dict(body)
        is_keyed = asked.setdefault("idempotency_key", uuid.uuid4().hex) is body.get("idempotency_key")
        asked.pop("lease_ms", None)
        pending = FarPending(str(asked["idempotency_key"]), is_keyed)
        # Whatever is too long for a frame is said here.
        frame = _wire.encode(op, 1, asked, payload=payload)
        self._threads.run(lambda: self._work(pending, asked, frame))
        return pending

    def wait(self, pending: FarPending, timeout: Optional[float] = None) -> FarReply:
        try:
            if not pending.over.wait(timeout):
                raise TimeoutError(f"the call is not done after {timeout} s")
        except TimeoutError:
            raise
        except BaseException:
            self.cancel(pending)
            raise
        if pending.error is not None:
            raise pending.error
        assert pending.reply is not None
        return pending.reply

    def abandon(self, pending: FarPending) -> None:
        self.cancel(pending)

    def forget(self, pending: FarPending) -> None:
        pass

    def cancel(self, pending: FarPending) -> None:
        if pending.over.is_set() or pending.is_cancelled:
            return
        pending.is_cancelled = True
        for reader in list(pending.readers):
            reader.cancel()

        def cancel() -> None:
            pause = 0.005
            while not pending.over.is_set():
                try:
                    self._act("cancel", pending.key.encode(), again=False)
                except StraitError:
                    # The call knows, too.
                    return
                pending.over.wait(pause)
                pause = min(2 * pause, _CANCEL_SECONDS_MAX)

        self._threads.run(cancel)

    # Actions

    def _act(self, name: str, body: bytes, again: bool = True, headers: Sequence[Tuple[bytes, bytes]] = (), timeout: float = _SLACK_SECONDS) -> List[bytes]:
        def act(asking: Asking) -> List[bytes]:
            results = asking.client.do_action((name, body), self._remote.options(timeout, headers))
            return [result.body.to_pybytes() for result in results]

        return self._remote.ask(act, again)

    def _json(self, name: str, body: bytes) -> Dict[str, Any]:
        results = self._act(name, body)
        if len(results) != 1:
            raise ProtocolError(f"the action {name} gave {len(results)} results instead of 1; {self.address} may be no strait host")
        return _parsed(results[0], f"the action {name}")

    def _drop(self, name: str) -> None:
        attempts = 0

        def drop(asking: Asking) -> None:
            nonlocal attempts
            attempts += 1
            list(asking.client.do_action(("drop", name.encode()), self._remote.options(_SLACK_SECONDS)))

        try:
            self._remote.ask(drop)
        except NotFoundError:
            # The one whose answer was lost may have done it.
            if attempts == 1:
                raise

    # Calls

    def _work(self, pending: FarPending, asked: Mapping[str, Any], frame: bytes) -> None:
        try:
            pending.reply = self._invoked(pending, asked, frame)
        except BaseException as error:
            pending.error = error
        finally:
            pending.over.set()

    def _invoked(self, pending: FarPending, asked: Mapping[str, Any], frame: bytes) -> FarReply:
        segments = _segments(asked)
        deadline_ms = asked.get("deadline_ms") or self.welcome.get("deadline_ms_default") or 0
        timeout = deadline_ms / 1000 + _SLACK_SECONDS
        headers = [(b"x-request-id", asked["request_id"].encode())] if "request_id" in asked else []

        def invoke(asking: Asking) -> List[bytes]:
            self._renew(segments)
            results = asking.client.do_action(("invoke", frame), self._remote.options(timeout, headers))
            return [result.body.to_pybytes() for result in results]

        results = self._remote.ask(invoke, until=lambda: pending.is_cancelled)
        if len(results) != 1:
            raise ProtocolError(f"the action invoke gave {len(results)} results instead of 1")
        op, _, body, payload = _wire.decode(results[0])
        if op != Op.OK or not isinstance(body.get("results"), list):
            raise ProtocolError(f"the action invoke was answered by op {op}")
        fetched: Dict[str, Fetched] = {}
        left: List[str] = []
        for result in body["results"]:
            mapping = result.get("mapping")
            if mapping is None:
                continue
            if result.get("name") is None:
                left.append(str(mapping["segment"]))
            if asked.get("map", True):
                fetched[str(result["port"])] = self._read_result(pending, result)
        # Whoever has it asks for no repeat, unless the key is its own.
        self.release(left, [] if pending.is_keyed else [pending.key])
        return FarReply(body, payload, fetched)

    def _read_result(self, pending: FarPending, result: Mapping[str, Any]) -> Fetched:
        try:
            mapping = result["mapping"]
            segment, tensors = str(mapping["segment"]), [Tensor.read(tensor) for tensor in mapping["tensors"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a malformed result: {error!r}") from None
        tensors = [Tensor(t.name, t.dtype, t.shape, 0, t.length) for t in tensors]
        for tensor in tensors:
            wrong = tensor.misfit(tensor.length)
            if wrong is not None:
                raise ProtocolError(f"result {tensor.name!r}: {wrong}")
        named = {"name": result["name"]} if result.get("name") is not None else {}
        rows = tensors[0].shape[0] if tensors and tensors[0].shape else 1
        parts = max(1, min(sum(t.length for t in tensors) // _PART_BYTES, _PARTS_MAX, rows))
        cuts = [rows * part // parts for part in range(parts + 1)]
        # With its segment: another flight may have taken the name since.
        tickets = [
            (json.dumps({**named, "segment": segment, "rows": [first, last]}).encode(), first, last)
            for first, last in zip(cuts, cuts[1:])
        ]
        return self._read(tensors, tickets, pending)

    def _read(self, tensors: Sequence[Tensor], tickets: Sequence[Tuple[bytes, int, int]], pending: Optional[FarPending] = None) -> Fetched:
        """Tensors whose rows come by these tickets, all of them at once."""
        filling = _tables.Filling(tensors)
        if len(tickets) == 1:
            self._read_part(filling, tickets[0], pending)
            return Fetched(tensors, filling.memory)
        failures: "List[BaseException]" = []
        over = [threading.Event() for _ in tickets]

        def read(index: int) -> None:
            try:
                self._read_part(filling, tickets[index], pending)
            except BaseException as error:
                failures.append(error)
            finally:
                over[index].set()

        for index in range(1, len(tickets)):
            self._threads.run(functools.partial(read, index))
        try:
            self._read_part(filling, tickets[0], pending)
        finally:
            for event in over[1:]:
                event.wait()
        if failures:
            raise failures[0]
        return Fetched(tensors, filling.memory)

    def _read_part(self, filling: _tables.Filling, ticket: Tuple[bytes, int, int], pending: Optional[FarPending]) -> None:
        text, first, last = ticket

        def read(asking: Asking) -> None:
            part = filling.part(first, last)
            reader = asking.client.do_get(flight.Ticket(text), self._remote.options())
            if pending is not None:
                pending.readers.append(reader)
                if pending.is_cancelled:
                    reader.cancel()
            try:
                while True:
                    try:
                        chunk = reader.read_chunk()
                    except StopIteration:
                        break
                    if chunk.data is not None:
                        part.add(chunk.data)
            except (KeyboardInterrupt, StraitError):
                reader.cancel()
                raise
            finally:
                if pending is not None:
                    pending.readers.remove(reader)
            part.end()

        self._remote.ask(read, until=lambda: pending is not None and pending.is_cancelled)

    # Flights

    def put(self, name: str, columns: Sequence[Column], replace: bool) -> None:
        headers = [(b"x-strait-replace", b"true")] if replace else []
        try:
            self._send(flight.FlightDescriptor.for_path(name), columns, headers, again=replace)
        except DisconnectedError as error:
            if replace or self._remote.end is not None:
                raise
            raise DisconnectedError(f"{error}; whether {name!r} was put is not known: look it up, or put it with replace=True") from None

    def upload(self, columns: Sequence[Column]) -> str:
        """The segment of tensors that get no name."""
        answer = self._send(flight.FlightDescriptor.for_command(b"unnamed"), columns, (), again=True)
        segment = _parsed(answer, "the answer to an upload").get("segment")
        if not isinstance(segment, str):
            raise ProtocolError(f"an upload without a name was answered by {answer[:200]!r}")
        with self._lock:
            self._uploaded[segment] = time.monotonic()
        return segment

    def _send(self, descriptor: Any, columns: Sequence[Column], headers: Sequence[Tuple[bytes, bytes]], again: bool) -> bytes:
        self.check()
        schema = _tables.schema(columns)
        rows = columns[0][2].shape[0] if columns[0][2].ndim else 1
        row_bytes = sum(values.nbytes for _, _, values in columns) // max(rows, 1)
        step = max(1, _MESSAGE_BYTES // max(row_bytes, 1))
        # pyarrow can only end an upload; with this the host sees that it was broken off.
        headers = [*headers, (b"x-strait-rows", str(rows).encode())]

        def send(asking: Asking) -> bytes:
            writer, reader = asking.client.do_put(descriptor, schema, self._remote.options(headers=headers))
            try:
                for first in range(0, rows, step):
                    writer.write_batch(_tables.batch(columns, first, min(rows, first + step), schema))
                writer.done_writing()
                answer = reader.read()
                writer.close()
                given: bytes = b"" if answer is None else answer.to_pybytes()
                return given
            except BaseException:
                try:
                    # Says why, where that is the host's word.
                    writer.close()
                except Exception as refused:
                    raise refused from None
                raise

        return self._remote.ask(send, again)

    def fetch(self, name: str) -> Fetched:
        """All of a flight."""
        headers = [(b"x-strait-endpoints", str(_PARTS_MAX).encode())]
        descriptor = flight.FlightDescriptor.for_path(name)
        attempts = 0
        while True:
            info = self._remote.ask(lambda asking: asking.client.get_flight_info(descriptor, self._remote.options(_SLACK_SECONDS, headers)))
            tensors = _tables.tensors(info.schema, max(info.total_records, 0))
            tickets = []
            for endpoint in info.endpoints:
                text = endpoint.ticket.ticket
                first, last = 0, max(info.total_records, 0)
                if len(info.endpoints) > 1:
                    first, last = _parsed(text, "a ticket").get("rows", (0, 0))
                tickets.append((text, first, last))
            try:
                return self._read(tensors, tickets)
            except NotFoundError as error:
                # It was replaced while it was read.
                attempts += 1
                if error.reason != "SEGMENT_NOT_FOUND" or attempts > 3:
                    raise

    def describe(self, name: str) -> List[Tensor]:
        descriptor = flight.FlightDescriptor.for_path(name)
        info = self._remote.ask(lambda asking: asking.client.get_flight_info(descriptor, self._remote.options(_SLACK_SECONDS)))
        return _tables.tensors(info.schema, max(info.total_records, 0))

    def flights(self) -> List[Tuple[str, List[Tensor]]]:
        infos = self._remote.ask(lambda asking: list(asking.client.list_flights(options=self._remote.options(_SLACK_SECONDS))))
        return [(info.descriptor.path[0].decode(), _tables.tensors(info.schema, max(info.total_records, 0))) for info in infos]

    # What has no name

    def _renew(self, segments: Sequence[str]) -> None:
        now = time.monotonic()
        with self._lock:
            old = [segment for segment in segments if now - self._uploaded.get(segment, now) > _RENEW_SECONDS]
        for segment in old:
            endpoint = flight.FlightEndpoint(json.dumps({"segment": segment}), [])
            self._act("RenewFlightEndpoint", _message(endpoint.serialize()), again=False)
            with self._lock:
                self._uploaded[segment] = now

    def release(self, segments: Sequence[str], keys: Sequence[str] = ()) -> None:
        """The host need not keep these any more, nor the answers for repeats with these keys; it is told soon."""
        if not (segments or keys) or self._remote.end is not None:
            return
        with self._lock:
            for segment in segments:
                self._uploaded.pop(segment, None)
            is_first = not (self._garbage or self._over)
            self._garbage += segments
            self._over += keys
        if is_first:
            self._threads.run(self._release_soon)

    def _release_soon(self) -> None:
        # Many small calls are told of together.
        time.sleep(_RELEASE_SECONDS)
        self._release()

    def _release(self) -> None:
        with self._lock:
            segments, keys, self._garbage, self._over = self._garbage, self._over, [], []
        if not (segments or keys) or self._remote.end is not None:
            return
        body = json.dumps({"segments": segments, "idempotency_keys": keys}).encode()
        try:
            self._act("release", body, again=False, timeout=_RELEASE_SECONDS_MAX)
        except StraitError:
            # Then they go by themselves.
            pass

    # Sockets

    def _bridge(self, key: str, body: Dict[str, Any]) -> Tuple[Dict[str, Any], List[int]]:
        request_id = body.get("request_id")
        segments = _segments(body)
        self._renew(segments)
        try:
            bridge = Bridge(self._remote, key, body, request_id)
        finally:
            # What is prepared holds them.
            self.release(segments)
        with self._lock:
            self._last_bridge += 1
            number = self._last_bridge
            self._bridges = {known: other for known, other in self._bridges.items() if not other._is_over}
            self._bridges[number] = bridge
        told = dict(bridge.told)
        if key == "prepare":
            told["prepared"] = number
        return told, [bridge.take()]

    def _cancel_bridge(self, number: Any) -> None:
        with self._lock:
            bridge = self._bridges.get(number)
        if bridge is not None:
            bridge.cancel()


def _segments(asked: Mapping[str, Any]) -> List[str]:
    """Those among the inputs, which were uploaded for them."""
    inputs = asked.get("inputs", {}).values()
    return [given["segment"] for given in inputs if isinstance(given, dict) and "segment" in given]


def _parsed(text: bytes, what: str) -> Dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ProtocolError(f"{what} is no JSON object")
    return found


def _message(inner: bytes) -> bytes:
    """A protobuf message whose only field, number 1, is a message."""
    length, size = bytearray(), len(inner)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"\x0a" + bytes(length) + inner
