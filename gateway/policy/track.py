"""What `present` reads of one level's learned state, which `predictor` keeps. Pure interface."""

from __future__ import annotations

from typing import Protocol

from gateway.policy.quantile import Margins


class Track(Protocol):
    """What is known of one level's speed."""

    @property
    def prefill_ms(self) -> float:
        """Per prompt token."""
        ...

    @property
    def load_ms(self) -> float: ...
    def step_ms(self, batch: int) -> float:
        """One decode step of `batch` sequences alone on the host."""
        ...

    def factors(self) -> tuple[float, float]:
        """The level's own corrections of time to first token and time per token."""
        ...

    def margins(self) -> Margins:
        """What upper quantiles add."""
        ...
