"""Outcomes of the candidates that are being tried: counted here, shared with every replica.

A replica adds its own outcomes to the shared document once a second and judges the sum, so all of
them conclude the same, and a restart loses a second at most. While the documents cannot be written
it judges what it knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache.documents import Documents
from cache.errors import CacheError
from gateway.errors import PressgateError
from gateway.policy.canary import Arm, Counts, Split, Tally, drop_between, state_of
from gateway.policy.policy import Policy

log = logging.getLogger(__name__)

NAMESPACE: Final = "policy-canaries"
SHARE_SECONDS: Final = 1.0
Fallback = Callable[[str, int, str], Awaitable[None]]
"""Called with the policy's name, the candidate's version and why it must go."""


class _Shared(BaseModel):
    """What replicas have counted for one version of one candidate."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = Field(default=0, ge=0)
    stable: tuple[int, int] = (0, 0)
    canary: tuple[int, int] = (0, 0)

    @property
    def counts(self) -> Counts:
        return Counts(Tally(*self.stable), Tally(*self.canary))


@dataclass(slots=True)
class _Trial:
    """One candidate; `shared` is what the document holds, `own` what is not in it yet."""

    split: Split
    version: int
    shared: Counts = field(default_factory=Counts)
    own: Counts = field(default_factory=Counts)

    @property
    def counts(self) -> Counts:
        return self.shared.plus(self.own)


class Rollouts:
    """The candidates being tried. Owned by the event loop.

    Args:
        fallback: ends a candidate that attains too little.
        on_outcome: told of every outcome counted here.
    """

    def __init__(
        self, documents: Documents, fallback: Fallback, on_outcome: Callable[[str, str, bool], None]
    ) -> None:
        self._documents = documents
        self._fallback = fallback
        self._on_outcome = on_outcome
        self._trials: dict[str, _Trial] = {}
        self._arms: dict[int, tuple[_Trial, Arm]] = {}  # by identity: arms may be equal
        self._sharing: asyncio.Task[None] | None = None
        self._observed = 0
        self._busy = asyncio.Lock()  # what is being sent must not be sent twice

    async def load(self) -> None:
        """Read what was counted before, and follow what other replicas count."""
        await self._documents.watch(NAMESPACE, self._heard)
        for name, document in (await self._documents.all(NAMESPACE)).items():
            self._heard(name, document)

    async def close(self) -> None:
        """Share what is counted."""
        if self._sharing is not None and not self._busy.locked():
            self._sharing.cancel()  # it sleeps
        await self.share()

    def follow(self, splits: Mapping[str, tuple[Split, int]]) -> None:
        """These are the candidates now, with their versions. Counts of a version go on."""
        trials = {}
        for name, (split, version) in splits.items():
            old = self._trials.get(name)
            if old is None or old.version != version:
                old = _Trial(split, version)
            old.split = split
            trials[name] = old
        self._trials = trials
        self._arms = {}
        for trial in trials.values():
            self._arms[id(trial.split.stable)] = (trial, "stable")
            self._arms[id(trial.split.canary)] = (trial, "canary")

    def observe(self, policy: Policy, *, met: bool) -> None:
        """Count an outcome, if `policy` is an arm of a trial."""
        if not self._arms or (found := self._arms.get(id(policy))) is None:
            return
        trial, arm = found
        trial.own = trial.own.counting(arm, met=met)
        self._observed += 1
        self._on_outcome(policy.name, arm, met)
        if self._sharing is None or self._sharing.done():
            self._sharing = asyncio.create_task(self._share_soon())

    def counts(self, name: str) -> Counts:
        """What is known of a policy's candidate."""
        trial = self._trials.get(name)
        return trial.counts if trial is not None else Counts()

    def status(self, name: str, split: Split) -> dict[str, Any]:
        """Both arms and what they show, ready for JSON."""
        counts = self.counts(name)
        low, high = drop_between(counts)
        return {
            **split.plan.model_dump(mode="json"),
            "stable": counts.stable.json(),
            "canary": counts.canary.json(),
            "drop": {"low": round(low, 4), "high": round(high, 4)},
            "state": state_of(split.plan, counts),
        }

    async def share(self) -> None:
        """Add what is counted here to the shared documents, and end what attains too little."""
        async with self._busy:
            for name, trial in list(self._trials.items()):
                await self._add(name, trial)
                if state_of(trial.split.plan, trial.counts) == "falls":
                    await self._end(name, trial)

    async def _end(self, name: str, trial: _Trial) -> None:
        try:
            await self._fallback(name, trial.version, _why(trial.counts))
        except PressgateError as error:  # tried again with the next outcomes
            log.error("policy %s: %s", name, error.message)

    async def _share_soon(self) -> None:
        """Until nothing comes in meanwhile."""
        seen = -1
        while seen != self._observed:
            await asyncio.sleep(SHARE_SECONDS)
            seen = self._observed
            await self.share()

    async def _add(self, name: str, trial: _Trial) -> None:
        sent = trial.own
        if sent == Counts():
            return

        def added(document: dict[str, Any] | None) -> dict[str, Any]:
            return _plus(_read(document), trial.version, sent)

        try:
            document = await self._documents.update(NAMESPACE, name, added)
        except (CacheError, OSError) as error:
            log.warning("outcomes of policy %s stay here for now: %s", name, error)
            return
        now = _read(document)
        if now.version == trial.version:
            trial.shared = now.counts
        trial.own = _minus(trial.own, sent)

    def _heard(self, name: str, document: dict[str, Any] | None) -> None:
        trial = self._trials.get(name)
        found = _read(document)
        if trial is not None and found.version == trial.version:
            trial.shared = found.counts


def _plus(old: _Shared, version: int, sent: Counts) -> dict[str, Any]:
    """The shared document with a replica's outcomes added; those of an older version count no
    more."""
    if old.version > version:
        return old.model_dump(mode="json")
    total = sent if old.version < version else old.counts.plus(sent)
    arms = {"stable": total.stable, "canary": total.canary}
    return {"version": version} | {arm: [t.requests, t.met] for arm, t in arms.items()}


def _minus(counts: Counts, sent: Counts) -> Counts:
    """What came in while `sent` was on its way."""
    return Counts(_less(counts.stable, sent.stable), _less(counts.canary, sent.canary))


def _less(tally: Tally, sent: Tally) -> Tally:
    return Tally(tally.requests - sent.requests, tally.met - sent.met)


def _read(document: dict[str, Any] | None) -> _Shared:
    """Garbage counts as nothing: it is overwritten with the next outcome."""
    try:
        return _Shared.model_validate(document or {})
    except ValidationError:
        return _Shared()


def _why(counts: Counts) -> str:
    stable, canary = counts.stable, counts.canary
    return (
        f"attainment {canary.attainment or 0.0:.1%} of {canary.requests} requests against "
        f"{stable.attainment or 0.0:.1%} of {stable.requests}"
    )
