"""What a request meets that no ladder tells: what others were promised, and what happened lately.

Pure data: whoever has a clock and a memory fills it in, `decide` only reads it. Neutral by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """
    Attributes:
        waited_ms: since the request came in; its time to first token and latency count from there.
        token_ms: the longest time per token that every running promise bears; inf: none binds.
        slack_ms: what every running promise can lose to a newcomer's prompt; inf: none binds.
        expected: requests of the policy to come while a build or a load would be of use, as learned
            from those that came; None: as the policy says.
        recent: the level that requests of this kind got a moment ago; None: none, or long ago.
        settling: a level was loaded for a request a moment ago, so that another one loaded at its
            cost would be gone again soon.
    """

    waited_ms: float = 0.0
    token_ms: float = math.inf
    slack_ms: float = math.inf
    expected: float | None = None
    recent: str | None = None
    settling: bool = False


CALM = Moment()
