"""Who is told what happens to policies."""

from __future__ import annotations

from typing import Protocol


class Audience(Protocol):
    """Who is told what happens to policies here; the metrics are one."""

    def policy_changed(self, policy: str, kind: str) -> None: ...
    def canary_outcome(self, policy: str, arm: str, met: bool) -> None: ...
    def canary_percent(self, policy: str, percent: float) -> None: ...


class Nobody:
    """An audience that does not listen."""

    def policy_changed(self, policy: str, kind: str) -> None: ...
    def canary_outcome(self, policy: str, arm: str, met: bool) -> None: ...
    def canary_percent(self, policy: str, percent: float) -> None: ...
