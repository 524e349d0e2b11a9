"""What a kernel's parameters, and the options of a call, are in JSON."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

import numpy as np

from . import _dtypes, _foreign
from ._wire import milliseconds


def parameter(key: str, value: Any) -> Any:
    """A parameter's value as JSON has it, exactly, with the protocol's words for the numbers that JSON lacks."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ValueError(
                f"parameter {key!r} is {value}; integers reach from -2^63 to 2^64-1: give a float if it is one"
            )
        return int(value)
    if isinstance(value, float):
        if value != value:
            return "nan"
        return float(value) if abs(value) != float("inf") else ("inf" if value > 0 else "-inf")
    if isinstance(value, (list, tuple)):
        return [parameter(key, item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return _dtypes.to_name(value)
    if _foreign.is_array(value):
        array = _foreign.as_numpy(value, f"parameter {key!r}")
        if array.dtype.kind != "c":
            return parameter(key, array.tolist())
    raise TypeError(
        f"parameter {key!r} is {type(value).__name__}; an int, float, truth value, text or list of numbers is needed: "
        "convert it to what you mean, as by float(x)"
    )


def options(
    parameters: Mapping[str, Any], deadline: Optional[float], limits: Optional[Mapping[str, int]], request_id: Optional[str]
) -> Dict[str, Any]:
    """What an INVOKE and a PREPARE say alike."""
    body: Dict[str, Any] = {}
    if parameters:
        body["parameters"] = {key: parameter(key, value) for key, value in parameters.items()}
    if deadline is not None:
        body["deadline_ms"] = milliseconds(deadline)
    if limits:
        body["limits"] = dict(limits)
    if request_id is not None:
        body["request_id"] = request_id
    return body
