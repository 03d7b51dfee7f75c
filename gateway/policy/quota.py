"""What an API key may use up: requests and tokens, per minute and per day. Sliding windows.

A window's use is what was counted in it and the share of the one before that a window ending now
still covers, so that no moment lets twice the quota through. A request takes all it may need at
once, or nothing, and gives back what it did not use; libraries for rate limits know no giving back,
and without it every answer would count as long as it might have become. Counted in Redis where
there is one (one script, one round trip, for all replicas), else here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, cast

from gateway.errors import Overloaded

log = logging.getLogger(__name__)

MINUTE: Final = 60
DAY: Final = 86_400
_PREFIX: Final = "pressgate:quota"
Unit = Literal["requests", "tokens"]


class Quota(Protocol):
    """A key's quotas; None: unlimited. `config.Quota` is one."""

    @property
    def requests_per_minute(self) -> int | None: ...
    @property
    def requests_per_day(self) -> int | None: ...
    @property
    def tokens_per_minute(self) -> int | None: ...
    @property
    def tokens_per_day(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Allowance:
    """One limit of one key: `most` of a unit per window."""

    key: str
    name: str
    unit: Unit
    window_s: int
    most: int


@dataclass(frozen=True, slots=True)
class Use:
    """What a window and the one before it hold, `into` seconds after the window began."""

    before: float
    count: float
    into: float

    def now(self, window_s: int) -> float:
        return self.before * (1.0 - self.into / window_s) + self.count

    def fits_in(self, cost: float, most: int, window_s: int) -> float | None:
        """Seconds until `cost` more fits, if nobody takes anything; None: it never does."""
        if cost > most:
            return None
        room = most - cost
        if self.count <= room:  # as soon as enough of the window before is past
            return max(0.0, _past(self.before, room - self.count, window_s) - self.into)
        return window_s - self.into + _past(self.count, room, window_s)

    def empty_in(self, window_s: int) -> float:
        """Seconds until nothing counts any more."""
        left = window_s - self.into
        return left + window_s if self.count else left if self.before else 0.0


def _past(before: float, room: float, window_s: int) -> float:
    """How far into a window the one before counts for `room` only."""
    return 0.0 if before <= room else window_s * (1.0 - room / before)


class Counters(Protocol):
    """Where use is counted."""

    async def take(
        self, wants: Sequence[tuple[Allowance, int]], now: float
    ) -> tuple[bool, list[Use]]:
        """Count every cost, or none where one does not fit; (were they counted, the uses after)."""
        ...

    async def give_back(self, wants: Sequence[tuple[Allowance, int]], at: float) -> None:
        """Uncount what was taken at `at` and not used."""
        ...


class MemoryCounters:
    """For one process. Holds two numbers per key and limit."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], tuple[int, float, float]] = {}

    async def take(
        self, wants: Sequence[tuple[Allowance, int]], now: float
    ) -> tuple[bool, list[Use]]:
        uses = [self._use(allowed, now) for allowed, _ in wants]
        fits = all(
            use.now(allowed.window_s) + cost <= allowed.most
            for use, (allowed, cost) in zip(uses, wants, strict=True)
        )
        if not fits:
            return False, uses
        after = []
        for use, (allowed, cost) in zip(uses, wants, strict=True):
            number = int(now // allowed.window_s)
            self._windows[allowed.key, allowed.name] = (number, use.before, use.count + cost)
            after.append(Use(use.before, use.count + cost, use.into))
        return True, after

    async def give_back(self, wants: Sequence[tuple[Allowance, int]], at: float) -> None:
        for allowed, cost in wants:
            number, before, count = self._windows.get((allowed.key, allowed.name), (0, 0.0, 0.0))
            taken = int(at // allowed.window_s)
            if number == taken:
                count = max(0.0, count - cost)
            elif number == taken + 1:
                before = max(0.0, before - cost)
            self._windows[allowed.key, allowed.name] = (number, before, count)

    def _use(self, allowed: Allowance, now: float) -> Use:
        window, into = int(now // allowed.window_s), now % allowed.window_s
        number, before, count = self._windows.get((allowed.key, allowed.name), (window, 0.0, 0.0))
        if number == window:
            return Use(before, count, into)
        return Use(count if number == window - 1 else 0.0, 0.0, into)


# KEYS: of every limit its window and the one before. ARGV: of every limit most, cost, the share of
# the one before that counts, and how long a window is kept. Numbers are whole but for the share.
_TAKE: Final = """
local uses, fits = {}, 1
for i = 1, #KEYS / 2 do
  local count = tonumber(redis.call('GET', KEYS[2 * i - 1]) or '0')
  local before = tonumber(redis.call('GET', KEYS[2 * i]) or '0')
  local most, cost = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2])
  if before * tonumber(ARGV[4 * i - 1]) + count + cost > most then fits = 0 end
  uses[2 * i - 1], uses[2 * i] = before, count
end
if fits == 1 then
  for i = 1, #KEYS / 2 do
    uses[2 * i] = redis.call('INCRBY', KEYS[2 * i - 1], ARGV[4 * i - 2])
    redis.call('EXPIRE', KEYS[2 * i - 1], ARGV[4 * i])
  end
end
return {fits, unpack(uses)}
"""


class RedisCounters:
    """For all replicas. While Redis does not answer, every replica counts for itself."""

    def __init__(self, client: Any) -> None:
        """`client`: a `redis.asyncio.Redis` with short timeouts."""
        self._client = client
        self._script = client.register_script(_TAKE)
        self._meanwhile = MemoryCounters()
        self._up = True

    async def take(
        self, wants: Sequence[tuple[Allowance, int]], now: float
    ) -> tuple[bool, list[Use]]:
        from redis.exceptions import RedisError

        keys, args = [], []
        for allowed, cost in wants:
            window, into = int(now // allowed.window_s), now % allowed.window_s
            keys += [_name(allowed, window), _name(allowed, window - 1)]
            share = 1.0 - into / allowed.window_s
            args += [allowed.most, cost, repr(share), 2 * allowed.window_s]
        try:
            found = cast(list[int], await self._script(keys=keys, args=args))
        except (RedisError, OSError, TimeoutError) as error:
            self._says(up=False, why=error)
            return await self._meanwhile.take(wants, now)
        self._says(up=True)
        uses = [
            Use(float(found[2 * i + 1]), float(found[2 * i + 2]), now % allowed.window_s)
            for i, (allowed, _) in enumerate(wants)
        ]
        return bool(found[0]), uses

    async def give_back(self, wants: Sequence[tuple[Allowance, int]], at: float) -> None:
        from redis.exceptions import RedisError

        if not self._up:
            await self._meanwhile.give_back(wants, at)
            return
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for allowed, cost in wants:
                    name = _name(allowed, int(at // allowed.window_s))
                    pipe.decrby(name, cost)
                    pipe.expire(name, 2 * allowed.window_s)
                await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._says(up=False, why=error)

    def _says(self, *, up: bool, why: BaseException | None = None) -> None:
        if up != self._up:
            self._up = up
            if up:
                log.info("quotas are counted in Redis again")
            else:
                log.warning("quotas are counted by this replica alone: %s", why)


def _name(allowed: Allowance, window: int) -> str:
    return f"{_PREFIX}:{allowed.key}:{allowed.name}:{window}"


@dataclass(frozen=True, slots=True)
class Taken:
    """What one request took of its key's quotas, and the headers that tell what is left."""

    at: float
    wants: tuple[tuple[Allowance, int], ...]
    tokens: int
    headers: Mapping[str, str]


class Quotas:
    """The quotas of every API key that has some."""

    def __init__(
        self,
        keys: Mapping[str, Quota] | None = None,
        counters: Counters | None = None,
        *,
        clock: Callable[[], float] = time.time,
        on_refusal: Callable[[str, str], None] = lambda _key, _limit: None,
    ) -> None:
        """`clock`: Unix seconds, as all replicas see them; `on_refusal`: told key and limit."""
        self._allowances = {key: _allowances(key, quota) for key, quota in (keys or {}).items()}
        self._counters = counters or MemoryCounters()
        self._clock = clock
        self._on_refusal = on_refusal

    async def take(self, key: str | None, tokens: int) -> Taken | None:
        """Count one request of at most so many tokens, prompt and answer; None: no quota binds it.

        Raises:
            Overloaded: a quota is used up; with what is left in its headers.
        """
        allowances = self._allowances.get(key or "")
        if not allowances:
            return None
        wants = tuple((a, 1 if a.unit == "requests" else tokens) for a in allowances)
        now = self._clock()
        taken, uses = await self._counters.take(wants, now)
        headers = _headers(wants, uses)
        if not taken:
            raise self._refusal(wants, uses, headers)
        return Taken(now, wants, tokens, headers)

    async def settle(self, taken: Taken, used: int) -> None:
        """Give back the tokens that a request took and did not need."""
        unused = taken.tokens - used
        wants = [(allowed, unused) for allowed, _ in taken.wants if allowed.unit == "tokens"]
        if wants and unused > 0:
            await self._counters.give_back(wants, taken.at)

    def _refusal(
        self,
        wants: Sequence[tuple[Allowance, int]],
        uses: Sequence[Use],
        headers: dict[str, str],
    ) -> Overloaded:
        waits = {
            allowed: use.fits_in(cost, allowed.most, allowed.window_s)
            for use, (allowed, cost) in zip(uses, wants, strict=True)
            if use.now(allowed.window_s) + cost > allowed.most
        }
        worst = max(waits, key=lambda allowed: _or_never(waits[allowed]))
        wait_s, cost = waits[worst], dict(wants)[worst]
        self._on_refusal(worst.key, worst.name)
        per = "minute" if worst.window_s == MINUTE else "day"
        message = f"this API key may use {worst.most} {worst.unit} per {per}"
        if wait_s is None:
            message += f"; this request alone may take {cost}: lower max_tokens"
        else:
            message += f", and this request would take {cost} more; retry in {_period(wait_s)}"
        error = Overloaded(message, code="rate_limit_exceeded", retry_after=wait_s)
        error.more_headers.update(headers)
        return error


def _allowances(key: str, quota: Quota) -> tuple[Allowance, ...]:
    limits: tuple[tuple[str, Unit, int, int | None], ...] = (
        ("requests_per_minute", "requests", MINUTE, quota.requests_per_minute),
        ("requests_per_day", "requests", DAY, quota.requests_per_day),
        ("tokens_per_minute", "tokens", MINUTE, quota.tokens_per_minute),
        ("tokens_per_day", "tokens", DAY, quota.tokens_per_day),
    )
    return tuple(
        Allowance(key, name, unit, window_s, most)
        for name, unit, window_s, most in limits
        if most is not None
    )


def _headers(wants: Sequence[tuple[Allowance, int]], uses: Sequence[Use]) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*`: of the limits of a unit, the one of which the least is left."""
    told: dict[Unit, tuple[int, Allowance, Use]] = {}
    for use, (allowed, _) in zip(uses, wants, strict=True):
        left = max(0, int(allowed.most - use.now(allowed.window_s)))
        if allowed.unit not in told or left < told[allowed.unit][0]:
            told[allowed.unit] = (left, allowed, use)
    headers = {}
    for unit, (left, allowed, use) in told.items():
        headers[f"x-ratelimit-limit-{unit}"] = str(allowed.most)
        headers[f"x-ratelimit-remaining-{unit}"] = str(left)
        headers[f"x-ratelimit-reset-{unit}"] = _period(use.empty_in(allowed.window_s))
    return headers


def _or_never(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _period(seconds: float) -> str:
    """As OpenAI writes it: `6m0s`, `1s`, `250ms`."""
    if seconds < 1.0:
        return f"{round(1000 * seconds)}ms"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    return text + (f"{minutes}m" if hours or minutes else "") + f"{left}s"
