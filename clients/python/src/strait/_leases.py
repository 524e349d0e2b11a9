"""What one session holds, and when each lease is to be renewed.

No clock, no lock and no socket: the caller says what time it is (`time.monotonic`), and lets one thread in at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Dict, Iterable, List, Optional, Tuple

#: One RENEW or RELEASE with this many ids of 20 digits stays below the limit of a frame's body.
IN_FRAME_MAX = 2000
#: A host that grants very short leases is not asked more often than this.
_RENEW_INTERVAL_MIN = 0.005
#: GONE frames remembered for leases whose reply has not been looked at yet.
_EARLY_GONE_MAX = 1024


def renew_interval(life: float) -> float:
    """Seconds from the grant of a lease of so many seconds to its renewal."""
    return max(life / 2, _RENEW_INTERVAL_MIN)


class _Held:
    __slots__ = ("life", "due", "expires", "gone")

    def __init__(self, life: float, due: Optional[float], expires: float, gone: Optional[str]) -> None:
        self.life = life
        #: When to renew; None if that is not wanted.
        self.due = due
        self.expires = expires
        #: Why it is over.
        self.gone = gone


class Leases:
    """The leases of one session, by their numbers. Times and lives are seconds."""

    def __init__(self, renew: bool) -> None:
        self._renew = renew
        self._held: Dict[int, _Held] = {}
        self._early_gone: "OrderedDict[int, str]" = OrderedDict()

    def hold(self, lease: int, life: float, now: float) -> Optional[float]:
        """From now on; returns when it is to be renewed."""
        held = self._granted(life, now, self._early_gone.pop(lease, None))
        self._held[lease] = held
        return held.due

    def _granted(self, life: float, now: float, gone: Optional[str] = None) -> _Held:
        due = now + renew_interval(life) if self._renew and gone is None else None
        return _Held(life, due, now + life, gone)

    def renewed(self, leases: Iterable[int], life: float, now: float) -> None:
        """The host gave them a new life, which began when it was asked."""
        for lease in leases:
            held = self._held.get(lease)
            if held is not None and held.gone is None:
                self._held[lease] = self._granted(life, now)

    def end(self, leases: Iterable[int]) -> None:
        """They are given back."""
        for lease in leases:
            self._held.pop(lease, None)

    def gone(self, lease: int, why: str) -> None:
        """The host announced its end, perhaps before anybody looked at the reply that grants it."""
        held = self._held.get(lease)
        if held is not None:
            held.gone, held.due = why, None
            return
        self._early_gone[lease] = why
        if len(self._early_gone) > _EARLY_GONE_MAX:
            self._early_gone.popitem(last=False)

    def why_gone(self, lease: int) -> Optional[str]:
        """Why it is over, as far as is known."""
        held = self._held.get(lease)
        return None if held is None else held.gone

    def left(self, lease: int, now: float) -> float:
        """Seconds until it expires; 0 if it is over."""
        held = self._held.get(lease)
        return 0.0 if held is None or held.gone is not None else held.expires - now

    def due(self, now: float) -> List[Tuple[float, List[int]]]:
        """What is to be renewed now: lives, and leases that one RENEW with that life has room for."""
        by_life: Dict[float, List[int]] = {}
        for lease, held in self._held.items():
            # Half of the waiting time early still saves a frame for each neighbour in time.
            if held.due is not None and held.due - renew_interval(held.life) / 2 <= now:
                by_life.setdefault(held.life, []).append(lease)
        return [
            (life, leases[start : start + IN_FRAME_MAX])
            for life, leases in by_life.items()
            for start in range(0, len(leases), IN_FRAME_MAX)
        ]

    def next_due(self) -> Optional[float]:
        """When the next renewal is due."""
        return min((held.due for held in self._held.values() if held.due is not None), default=None)
