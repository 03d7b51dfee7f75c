"""Room for weights: what is held, who would leave next and why, and who left. Moves nothing itself.

The pool acts on it; `worth` knows the arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import Conflict, Overloaded
from gateway.variants.entry import Variant
from gateway.variants.roster import Roster
from gateway.variants.variant import State
from gateway.variants.worth import Holding, leaving, occupied, partings

_HISTORY: Final = 64
_LEAST_LOAD_S: Final = 1e-3  # a load is never free: ties go by use


@dataclass(frozen=True, slots=True)
class Eviction:
    """A level that left so that another could come; `at` by the pool's clock."""

    at: float
    gone: Holding
    room_for: str

    def why(self) -> str:
        """One sentence."""
        gone = self.gone
        return (
            f"{gone.name} left for {self.room_for}: asked for {60 * gone.rate:.2f} times a minute "
            f"and back in {gone.reload_s:.2f} s, its {gone.bytes / 1e6:.1f} MB saved the least "
            f"waiting per byte"
        )


class Room:
    """The weight budget of a roster as a set of holdings."""

    def __init__(self, roster: Roster, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._clock = clock
        self._gone: deque[Eviction] = deque(maxlen=_HISTORY)
        self.evictions = 0

    def next_to_leave(self, variant: Variant) -> Variant | None:
        """Who has to be unloaded first for `variant`'s bytes to fit; None when they do.

        Raises:
            Overloaded: what must stay leaves no room, or one level alone is more than there is;
                nothing should be unloaded in vain.
        """
        budget = self._roster.weight_budget
        holdings = self._holdings(coming=variant)
        need = self._roster.weight_bytes() - budget
        going = leaving(tuple(holdings.values()), need)
        if going is None:
            raise _no_room(variant, budget)
        if not going:
            return None
        first = going[0]
        self._gone.append(Eviction(self._clock(), first, variant.name))
        self.evictions += 1
        return next(v for v in self._roster.all() if v.name == first.name)

    def check_pin(self, variant: Variant) -> None:
        """
        Raises:
            Conflict: pinned levels would take more than there is for weights.
        """
        pinned = [v for v in self._roster.all() if v.pinned or v is variant]
        need = occupied((v.place, v.backend.load_bytes(v.spec.level)) for v in pinned)
        if need > self._roster.weight_budget:
            names = ", ".join(v.name for v in pinned)
            raise Conflict(
                f"{names} pinned together take {need / 1e6:.0f} MB of the "
                f"{self._roster.weight_budget / 1e6:.0f} MB for weights; unpin one first",
                param="level",
            )

    def plan(self) -> dict[str, Any]:
        """The budget, what each level in memory is worth, the order in which they would leave, and
        who left last; ready for JSON."""
        now, holdings = self._clock(), self._holdings()
        order = [one.name for way in partings(holdings.values()) for one in way.levels]
        leaves = list(dict.fromkeys(order))
        return {
            "budget_bytes": self._roster.memory_budget,
            "weight_budget_bytes": self._roster.weight_budget,
            "weight_bytes": self._roster.weight_bytes(),
            "used_bytes": self._roster.memory_used(),
            "levels": [_row(holding, leaves, now) for holding in holdings.values()],
            "evictions": self.evictions,
            "evicted": [
                {"level": e.gone.name, "seconds_ago": round(now - e.at, 1), "why": e.why()}
                for e in reversed(self._gone)
            ],
        }

    # -- inside -----------------------------------------------------------------------------

    def _holdings(self, coming: Variant | None = None) -> dict[str, Holding]:
        now = self._clock()
        return {
            variant.name: Holding(
                name=variant.name,
                place=variant.place,
                bytes=variant.resident_bytes,
                rate=variant.demand.per_second(now),
                reload_s=max(_LEAST_LOAD_S, variant.load_s),
                last_used=variant.last_used,
                kept=_kept(variant, coming),
            )
            for variant in self._roster.all()
            if variant.resident_bytes
        }


def _kept(variant: Variant, coming: Variant | None) -> str:
    """Why a level must stay."""
    if variant is coming:
        return "coming"
    if variant.pinned:
        return "pinned"
    if variant.leases:
        return "in use"
    return "" if variant.state is State.READY else variant.state.value


def _no_room(variant: Variant, room: int) -> Overloaded:
    return Overloaded(
        f"{variant.name} needs {variant.resident_bytes / 1e6:.0f} MB of the "
        f"{room / 1e6:.0f} MB for weights, and levels in use or pinned leave less",
        code="out_of_memory",
        retry_after=2.0,
    )


def _row(holding: Holding, leaves: list[str], now: float) -> dict[str, Any]:
    return {
        "level": holding.name,
        "bytes": holding.bytes,
        "shares_with": holding.place,
        "requests_per_minute": round(60 * holding.rate, 3),
        "reload_seconds": round(holding.reload_s, 4),
        "idle_seconds": round(max(0.0, now - holding.last_used), 1),
        "saves_seconds_per_hour_per_mb": 3600 * holding.value / (holding.bytes / 1e6),
        "kept": holding.kept or None,
        "leaves": leaves.index(holding.name) + 1 if holding.name in leaves else None,
    }
