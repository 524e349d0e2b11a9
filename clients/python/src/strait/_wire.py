"""Frames of the data socket and what the host says in them (docs/protocol.md)."""

from __future__ import annotations

import enum
import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _dtypes
from ._errors import ProtocolError

PROTOCOL = 2
HEADER = struct.Struct("<2sBBIII16s8sB3sI")
MAGIC = b"ST"
BODY_BYTES_MAX = 61440
PAYLOAD_BYTES_MAX = 131072
FRAME_BYTES_MAX = HEADER.size + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX
FDS_MAX = 16
#: Tensors start on multiples of this, in segments (where it is a whole page) and in payloads.
ALIGN_BYTES = 64
AXES_MAX = 8
#: Of a socket's buffer, what Linux needs itself: no packet is longer than the rest.
_SOCKET_OWN_BYTES = 32

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
_DECODE = json.JSONDecoder().raw_decode


class Op(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    OK = 3
    ERROR = 4
    KERNELS = 5
    LOOKUP = 6
    LIST = 7
    PUBLISH = 8
    DROP = 9
    STATS = 10
    CREATE = 11
    SEAL = 12
    ADOPT = 13
    MAP = 14
    RELEASE = 15
    RENEW = 16
    INVOKE = 17
    PREPARE = 18
    CALL = 19
    CANCEL = 20
    STREAM = 21
    PING = 22
    LIMITS = 23
    WORKERS = 24
    PLUGINS = 25
    PIPELINES = 26
    SHARE = 27
    CHUNK = 64
    GONE = 65
    SHUTDOWN = 66
    LAST = 67


_WITH_PAYLOAD = frozenset((Op.INVOKE, Op.CALL, Op.CHUNK, Op.LAST, Op.OK))


class TraceContext(NamedTuple):
    """W3C's: the trace that a request belongs to. All zero: none."""

    trace_id: bytes = bytes(16)
    parent_id: bytes = bytes(8)
    flags: int = 0


NO_TRACE = TraceContext()


def packet_room(send_buffer_bytes: int) -> int:
    """Bytes that a packet can have, on a socket with such a send buffer."""
    return send_buffer_bytes - _SOCKET_OWN_BYTES


def payload_room(send_buffer_bytes: int) -> int:
    """Bytes of payload that a frame with the longest body has room for, on a socket with such a send buffer."""
    return max(0, min(PAYLOAD_BYTES_MAX, packet_room(send_buffer_bytes) - HEADER.size - BODY_BYTES_MAX))


def encode(
    op: int, sequence: int, body: Mapping[str, Any], trace: TraceContext = NO_TRACE, payload: Union[bytes, bytearray] = b""
) -> bytes:
    """A whole frame; `ValueError` if the body does not fit into one."""
    text = _ENCODER.encode(body).encode() if body else b""
    if len(text) > BODY_BYTES_MAX:
        raise ValueError(
            f"a request of {len(text)} bytes; at most {BODY_BYTES_MAX} fit into a frame: shorten its lists or names"
        )
    header = HEADER.pack(MAGIC, PROTOCOL, op, sequence, len(text), len(payload), *trace, b"", 0)
    return b"".join((header, text, payload))


def decode(frame: Union[bytes, bytearray], length: Optional[int] = None) -> Tuple[int, int, Dict[str, Any], bytes]:
    """Op, sequence, body and payload of a frame, which may be the first `length` bytes of more.

    Raises `ProtocolError` if it is malformed.
    """
    length = len(frame) if length is None else length
    # What is of another version is told so, however long its header is.
    if length > 2 and (frame[:2] != MAGIC or frame[2] != PROTOCOL):
        raise ProtocolError(
            f'a frame that starts with {bytes(frame[:2])!r} (this client knows "ST") and is of protocol version {frame[2]}; '
            f"this client speaks version {PROTOCOL}: check that host and client have the same version"
        )
    if length < HEADER.size:
        raise ProtocolError(f"a frame of {length} bytes; its header alone has {HEADER.size}")
    _, _, op, sequence, body_bytes, payload_bytes, *_trace, reserved, flags = HEADER.unpack_from(frame)
    if body_bytes + payload_bytes != length - HEADER.size:
        raise ProtocolError(
            f"a frame whose header says {body_bytes} bytes of body and {payload_bytes} of payload, "
            f"and that has {length - HEADER.size}"
        )
    if body_bytes > BODY_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise ProtocolError(
            f"a frame with {body_bytes} bytes of body and {payload_bytes} of payload; at most {BODY_BYTES_MAX} and "
            f"{PAYLOAD_BYTES_MAX} are allowed"
        )
    if payload_bytes and op not in _WITH_PAYLOAD:
        raise ProtocolError(
            f"a frame of op {op} with {payload_bytes} bytes of payload; only INVOKE, CALL, CHUNK, LAST and the answers to them carry a payload"
        )
    if flags or reserved != bytes(3):
        raise ProtocolError(
            f"a frame with reserved bytes {reserved!r} and flags {flags:#x}; all of them are 0 in version {PROTOCOL}"
        )
    body_end = HEADER.size + body_bytes
    body: Any = {}
    if body_bytes:
        try:
            # `json.loads` without its search for another encoding and for white space around.
            text = frame[HEADER.size : body_end].decode()
            body, end = _DECODE(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a frame whose body is not JSON: {error!r}") from None
        if end != len(text):
            raise ProtocolError(f"a frame whose body is not JSON: it has {len(text) - end} characters behind its end")
    if not isinstance(body, dict):
        raise ProtocolError(f"a frame whose body is {type(body).__name__}, not an object")
    return op, sequence, body, memoryview(frame)[body_end:length].tobytes() if payload_bytes else b""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its segment, or in the payload of a frame; row-major and contiguous."""

    name: str
    #: The protocol's name: `"float64"`.
    dtype: str
    shape: Tuple[int, ...]
    #: Bytes from the start of the segment or payload.
    offset: int
    #: Bytes.
    length: int

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Tensor":
        return cls(
            str(body["name"]), str(body["dtype"]), tuple(map(int, body["shape"])), int(body["offset"]), int(body["length"])
        )

    @classmethod
    def read_inline(cls, port: str, body: Any, payload: bytes) -> "Tensor":
        """What the host says about a result in a payload, held against that."""
        try:
            tensor = cls.read({**body, "name": port})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"malformed inline result {port!r}: {error!r}") from None
        wrong = tensor.misfit(len(payload))
        if wrong is not None:
            raise ProtocolError(f"inline result {port!r}: {wrong}")
        return tensor

    def misfit(self, size: int) -> Optional[str]:
        """Why it cannot lie in a segment or payload of so many bytes."""
        itemsize = _dtypes.SIZES.get(self.dtype)
        if itemsize is None:
            return f"its dtype {self.dtype!r} is not known"
        if len(self.shape) > AXES_MAX:
            return f"it has {len(self.shape)} axes, at most {AXES_MAX} are allowed"
        if min(self.shape, default=0) < 0 or self.length != math.prod(self.shape) * itemsize:
            return f"{self.dtype} {list(self.shape)} is not {self.length} bytes long"
        if self.offset < 0 or self.offset + self.length > size:
            return f"{self.length} bytes at {self.offset}, where there are {size} in all"
        if self.length and self.offset % ALIGN_BYTES:
            return f"it is at {self.offset}, no multiple of {ALIGN_BYTES}"
        return None


@dataclass(frozen=True)
class SegmentMapping:
    """What the host says about a segment."""

    segment: str
    bytes: int
    #: Who can still write: `"none"`, `"host"`, `"worker"`, `"creator"` or `"anyone"`.
    writers: str
    tensors: Tuple[Tensor, ...]

    @classmethod
    def read(cls, body: Any) -> "SegmentMapping":
        """Holds the host's word against itself, so that later no tensor reaches out of its segment."""
        try:
            version = body["strait-mmap"]
            mapping = cls(
                str(body["segment"]), int(body["bytes"]), str(body["writers"]), tuple(map(Tensor.read, body["tensors"]))
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"malformed mapping: {error!r}") from None
        if version != 1:
            raise ProtocolError(f"mapping of segment {mapping.segment}: its version is {version}, known is 1")
        for tensor in mapping.tensors:
            wrong = tensor.misfit(mapping.bytes)
            if wrong is not None:
                raise ProtocolError(f"tensor {tensor.name!r} of segment {mapping.segment}: {wrong}")
        return mapping

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; `KeyError` with those that there are."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(f"no tensor {name!r} in the segment; it has {', '.join(t.name for t in self.tensors)}")


@dataclass(frozen=True)
class Flight:
    """A flight: a name, and the tensors that it stands for."""

    name: str
    tensors: Tuple[Tensor, ...]


@dataclass(frozen=True)
class Port:
    """An input or output of a kernel."""

    name: str
    #: What it takes, or can give.
    dtypes: Tuple[str, ...]
    rank_min: int
    rank_max: int
    #: `"data"` or `"mask"`.
    role: str
    doc: str
    #: An input that comes whole with every chunk and slice.
    whole: bool = False


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel."""

    name: str
    #: `"boolean"`, `"integer"`, `"real"`, `"number"` (an integer stays exact), `"axis"` (0-based, row-major), `"text"`
    #: `"integers"` or `"reals"` (lists).
    kind: str
    #: None: it must be given.
    default: Any
    #: Exact where it is an integer.
    minimum: Union[int, float, None]
    maximum: Union[int, float, None]
    #: For text: the allowed values; empty allows any.
    choices: Tuple[str, ...]
    doc: str


@dataclass(frozen=True)
class BlockTree:
    """How a reduction gives the same bits on any slicing."""

    #: Rows of one block, counted from row 0.
    block_rows: int
    #: The kernel that gives one row for each block.
    partials: str
    #: The kernel that makes the result of all those rows.
    merge: str


@dataclass(frozen=True)
class Kernel:
    """A kernel that the host offers."""

    name: str
    plugin: str
    version: str
    doc: str
    inputs: Tuple[Port, ...]
    outputs: Tuple[Port, ...]
    parameters: Tuple[Parameter, ...]
    #: Which axes are equal, such as `(n),(k)->(m)`. None: no rule.
    signature: Union[str, None] = None
    #: The axis (0-based, row-major) along which the host may cut an invocation. None: none.
    split_axis: Union[int, None] = None
    #: How the results of slices are put together: `"none"`, `"concatenate"` or `"tree"`.
    combine: str = "none"
    #: With `"tree"`.
    block_tree: Union[BlockTree, None] = None
    #: Whether it takes its inputs, but for those that are `whole`, in chunks of rows.
    streaming: bool = False

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Kernel":
        def ports(key: str) -> Tuple[Port, ...]:
            return tuple(
                Port(
                    p["name"],
                    tuple(p["dtypes"]),
                    p["rank_min"],
                    p["rank_max"],
                    p["role"],
                    p["doc"],
                    p.get("whole", False),
                )
                for p in body[key]
            )

        try:
            parameters = tuple(
                Parameter(
                    p["name"], p["kind"], p["default"], p["minimum"], p["maximum"], tuple(p["choices"]), p["doc"]
                )
                for p in body["parameters"]
            )
            tree = body.get("block_tree")
            return cls(
                body["name"],
                body["plugin"],
                body["version"],
                body["doc"],
                ports("inputs"),
                ports("outputs"),
                parameters,
                body.get("signature"),
                body.get("split_axis"),
                body.get("combine", "none"),
                BlockTree(tree["block_rows"], tree["partials"], tree["merge"]) if tree is not None else None,
                body.get("streaming", False),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ProtocolError(f"a malformed kernel: {error!r}") from None


@dataclass(frozen=True)
class Pages:
    """Which memory a port's window was backed by while the kernel ran."""

    port: str
    device: int
    inode: int


@dataclass(frozen=True)
class Stage:
    """A kernel of a pipeline that has run."""

    #: Its name, or its number from 1.
    stage: str
    kernel: str
    copied_bytes: int
    #: From its instance to its results.
    seconds: float


@dataclass(frozen=True)
class CallInfo:
    """What the host said about a call besides its outputs."""

    #: Names the call in the host's log.
    request_id: str
    #: Bytes of this call's tensors that the host copied.
    copied_bytes: int
    #: What the kernel had to say.
    notes: Dict[str, str]
    #: The pages that the kernel saw; filled by `verify=True`.
    pages: List[Pages]
    #: Page faults of the host's process during the call that needed no I/O.
    minor_faults: int
    #: Where the time went, in seconds.
    seconds: Dict[str, float]
    #: Name of the flight, for each output that was published.
    published: Dict[str, str] = field(default_factory=dict)
    #: Slices of its rows that the call ran in; 0: it ran whole.
    slices: int = 0
    #: Of a pipeline: its stages, in order.
    stages: List[Stage] = field(default_factory=list)

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "CallInfo":
        stages = body.get("stages", [])
        try:
            return cls(
                request_id=str(body.get("request_id", "-")),
                copied_bytes=int(body["copied_bytes"]),
                notes={str(note["key"]): str(note["text"]) for note in body["notes"]},
                pages=[Pages(str(p["port"]), int(p["device"]), int(p["inode"])) for p in body["pages"]],
                minor_faults=int(body["minor_faults"]),
                seconds=dict(body["seconds"]),
                published={str(r["port"]): str(r["name"]) for r in body["results"] if r.get("name") is not None},
                slices=int(body.get("slices", 0)),
                stages=[Stage(str(s["stage"]), str(s["kernel"]), int(s["copied_bytes"]), float(s["seconds"])) for s in stages],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a malformed answer to INVOKE: {error!r}") from None


def leases_in(body: Mapping[str, Any]) -> Sequence[int]:
    """The leases that a reply grants, whatever it answers."""
    entries: List[Any] = [body]
    results = body.get("results")
    if isinstance(results, list):
        entries += results
    return [e["lease"] for e in entries if isinstance(e, dict) and isinstance(e.get("lease"), int)]


def milliseconds(seconds: float) -> int:
    """As the protocol counts time; a part of a millisecond counts as a whole one."""
    if not seconds > 0:
        raise ValueError(f"{seconds} s: a time must be positive")
    return max(1, -int(-min(seconds * 1000, 2**53) // 1))
