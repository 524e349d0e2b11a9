"""What a call asks for: a kernel by its name, or several in a pipeline, as text or as JSON."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Union

#: A kernel's name, a pipeline's text, or a pipeline as `docs/protocol.md` has it in JSON.
Asked = Union[str, Mapping[str, Any]]

#: A program may make any number of texts that differ in a parameter.
_PORTS_COUNT_MAX = 256


def fields(asked: Asked) -> Dict[str, Any]:
    """The field of a request that says so."""
    return {"kernel": asked} if isinstance(asked, str) else {"pipeline": dict(asked)}


def name(asked: Asked) -> str:
    """What it is called in messages, and kept by."""
    return asked if isinstance(asked, str) else json.dumps(asked, sort_keys=True, default=str)


class Ports(Dict[str, List[str]]):
    """The input ports of what was called lately, by its name."""

    def __setitem__(self, key: str, ports: List[str]) -> None:
        if len(self) >= _PORTS_COUNT_MAX:
            self.clear()
        super().__setitem__(key, ports)
