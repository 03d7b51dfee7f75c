"""Which artifacts to give up for space. Pure: facts in, keys out; it touches nothing.

Both tiers use it. The value of keeping an artifact is `rebuild_seconds × uses ÷ bytes it alone
holds` (the cost over size of GreedyDual-Size, Cao & Irani 1997, with a decayed use count in place
of its clock): cheap to rebuild, rarely used and large goes first. Bytes shared with a survivor are
not freed, so they count for nothing, and the count is redone after every choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Candidate:
    """One artifact as the evictor sees it.

    Attributes:
        blobs: digest → bytes of everything it refers to.
        uses: recent uses, decayed (`cache.uses`); last_used: Unix seconds.
        pinned: in use or being published; never chosen, and its blobs are never freed.
    """

    key: str
    blobs: Mapping[str, int] = field(default_factory=dict)
    rebuild_seconds: float = 0.0
    uses: float = 0.0
    last_used: float = 0.0
    pinned: bool = False


def freed_bytes(candidates: Collection[Candidate], victims: Collection[str]) -> int:
    """Bytes that go when `victims` go: blobs that no survivor refers to."""
    gone = set(victims)
    kept = {digest for c in candidates if c.key not in gone for digest in c.blobs}
    lost = {d: n for c in candidates if c.key in gone for d, n in c.blobs.items() if d not in kept}
    return sum(lost.values())


def choose_victims(candidates: Collection[Candidate], need: int) -> list[str]:
    """Keys to evict, in order, so that at least `need` bytes go.

    No key in it is superfluous. Empty when `need` is not positive or cannot be reached even by
    evicting everything unpinned: then nothing is given up in vain. The order of `candidates` does
    not matter.
    """
    open_to_choice = [c for c in candidates if not c.pinned]
    if need <= 0 or freed_bytes(candidates, [c.key for c in open_to_choice]) < need:
        return []
    owners = Counter(digest for c in candidates for digest in c.blobs)
    victims: list[str] = []
    freed = 0
    while freed < need:
        victim = min(open_to_choice, key=lambda c: _value(c, owners))
        open_to_choice.remove(victim)
        victims.append(victim.key)
        freed += _unshared(victim, owners)
        owners.subtract(victim.blobs.keys())
    return _without_superfluous(candidates, victims, need)


def _unshared(candidate: Candidate, owners: Mapping[str, int]) -> int:
    return sum(size for digest, size in candidate.blobs.items() if owners[digest] == 1)


def _value(candidate: Candidate, owners: Mapping[str, int]) -> tuple[bool, float, float, str]:
    """What keeping it is worth; ties go to the least recently used, then by key.

    One that frees nothing by itself comes last, but still before giving up: a group that shares
    everything goes only together.
    """
    size = _unshared(candidate, owners)
    worth = candidate.rebuild_seconds * candidate.uses / max(size, 1)
    return size == 0, worth, candidate.last_used, candidate.key


def _without_superfluous(
    candidates: Collection[Candidate], victims: list[str], need: int
) -> list[str]:
    for key in reversed(victims.copy()):
        fewer = [k for k in victims if k != key]
        if freed_bytes(candidates, fewer) >= need:
            victims = fewer
    return victims
