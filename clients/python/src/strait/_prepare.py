"""Asks a host to make a kernel ready (PREPARE), for calls or for a stream."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Union

from . import _channel, _parameters
from ._errors import RemoteError
from ._prepared import Prepared, Spec
from ._wire import Op

if TYPE_CHECKING:
    import numpy as np

    from ._session import Session


def prepare(
    session: "Session",
    kernel: str,
    args: Sequence[Any],
    *,
    stream: bool = False,
    channel: Union[str, _channel.ChannelOptions, None] = None,
    inputs: Optional[Mapping[str, Any]] = None,
    fixed: Optional[Mapping[str, Any]] = None,
    parameters: Optional[Mapping[str, Any]] = None,
    deadline: Optional[float] = None,
    limits: Optional[Mapping[str, int]] = None,
    request_id: Optional[str] = None,
) -> Prepared:
    """What `Session.prepare` says; of a `stream` the inputs that are not fixed come in chunks of rows, and what comes of them may go to a `channel`."""
    session._connection.check()
    given = dict(inputs or {})
    if args:
        given.update(session._by_position(kernel, args, {**given, **(fixed or {})}))
    twice = [port for port in given if port in (fixed or {})]
    if twice:
        raise TypeError(f"input {twice[0]!r} of kernel {kernel!r} was given as fixed and as what calls bring")
    kept: List["np.ndarray[Any, Any]"] = []
    wanted: Dict[str, Spec] = {}
    body: Dict[str, Any] = {"kernel": kernel, "inputs": {}}
    if stream:
        body["stream"] = True
    if channel is not None:
        body["channel"] = _channel.asked(channel)
    for port, value in given.items():
        if isinstance(value, str):
            body["inputs"][port] = value
            continue
        spec = wanted[port] = Spec.of(value, f"input {port!r}")
        if stream and (not spec.shape or spec.shape[0] < 1):
            raise ValueError(f"input {port!r} is {spec}; of a stream its shape begins with the most rows of a chunk, at least 1")
        body["inputs"][port] = {"dtype": spec.dtype, "shape": spec.shape}
    for port, value in (fixed or {}).items():
        body["inputs"][port] = session._input(port, value, functools.partial(session._in_segment, kept))
    body.update(_parameters.options(parameters or {}, deadline, limits, request_id))
    try:
        reply = session._connection.call(Op.PREPARE, body)
    except RemoteError as error:
        session._forget_ports(kernel, error)
        raise
    prepared = Prepared(session, kernel, reply, wanted)
    session._prepared.add(prepared)
    # The session may have been closed just before.
    session._connection.check()
    return prepared
