"""What one request turned out to cost: numbers for the answer, the metrics and the predictor.

Decides nothing and sends nothing. Closed once, whatever way the request ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gateway.api.decision_log import Refused
from gateway.api.deps import Services
from gateway.api.sse import Choice, usage
from gateway.api.tracing import Trace, carried
from gateway.api.wanted import Wanted
from gateway.errors import DECISION_HEADER, PressgateError
from gateway.metrics import NONE, Finished
from gateway.policy.budget import Costs, excess
from gateway.policy.decision import Decision
from gateway.policy.explain import predicted
from gateway.policy.policy import Policy
from gateway.policy.record import Record, Result
from gateway.quality.shadow import Answer
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot

_HUNG_UP = 499


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds. Over several sequences the worst one counts; None where nothing was measured
    (`tpot_ms` of a one-token answer)."""

    ttft_ms: float | None
    tpot_ms: float | None
    latency_ms: float

    @classmethod
    def of(cls, choices: Sequence[Choice], arrived: float) -> Measured:
        firsts = [c.first_at for c in choices if c.first_at is not None]
        gaps = [
            (c.last_at - c.first_at) / (c.tokens - 1)
            for c in choices
            if c.first_at is not None and c.last_at is not None and c.tokens > 1
        ]
        return cls(
            ttft_ms=1000.0 * (max(firsts) - arrived) if len(firsts) == len(choices) else None,
            tpot_ms=1000.0 * max(gaps) if gaps else None,
            latency_ms=1000.0 * (time.perf_counter() - arrived),
        )

    def numbers(self) -> dict[str, float | None]:
        return {
            "ttft_ms": None if self.ttft_ms is None else round(self.ttft_ms, 1),
            "tpot_ms": None if self.tpot_ms is None else round(self.tpot_ms, 2),
            "latency_ms": round(self.latency_ms, 1),
        }


class Account:
    """Follows one request from its decision to its end."""

    def __init__(
        self,
        services: Services,
        wanted: Wanted,
        policy: Policy,
        arrived: float,
        key: str | None = None,
    ) -> None:
        self._services = services
        self._key = key
        self._wanted = wanted
        self._policy = policy
        self._arrived = arrived
        self._decision: Decision | None = None
        self._snapshot: LadderSnapshot | None = None
        self._leased_at: float | None = None
        self._measured: Measured | None = None
        self._broken: tuple[str, ...] | None = None
        self._record: Record | None = None
        self._trace: Trace | None = None
        self._context: Mapping[str, str] = {}
        self.decision_id = services.ledger.new_id()
        self.choices: Sequence[Choice] = ()
        self.ranges: Sequence[Sequence[tuple[str, int]]] = ()  # levels of sequences that may move
        self.code = 500

    def trace(self, headers: Mapping[str, str]) -> None:
        """Go on with the trace that the request's headers name, or begin one."""
        traces = self._services.traces
        if traces is not None:
            self._trace = traces.begin(self._wanted, headers, self._arrived)
        elif "traceparent" in headers:
            self._context = carried(headers)

    @property
    def context(self) -> Mapping[str, str]:
        """The headers that tell another server which trace this is."""
        return self._context if self._trace is None else self._trace.context

    def decided(self, decision: Decision, snapshot: LadderSnapshot) -> None:
        self._decision, self._snapshot = decision, snapshot
        self._record = Record(
            self.decision_id,
            self._arrived_at(),
            self._key,
            self._path,
            decision,
            version=self._services.policies.version_of(self._policy),
        )
        self._services.ledger.opened(self._record)
        if self._trace is not None:
            self._trace.decided(_waited_ms(decision) / 1000.0)
        metrics, model = self._services.metrics, self._wanted.model
        level = decision.level or decision.build
        metrics.decision(model, level, decision.policy, decision.action, decision.code)
        if level is not None and decision.predicted is not None:
            metrics.predicted(model, level, "ttft", decision.predicted.ttft_ms / 1000.0)
            metrics.predicted(model, level, "tpot", decision.predicted.tpot_ms / 1000.0)

    def failed(self, error: PressgateError) -> None:
        """The request ends with `error`, which is told which decision it belongs to."""
        self.code = error.status
        if self._decision is not None:
            error.extra = {**error.extra, "decision_id": self.decision_id}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What an answer says of its decision before its first byte."""
        return [
            (b"x-pressgate-level", self.level.encode()),
            (DECISION_HEADER.encode(), self.decision_id.encode()),
        ]

    def leased(self) -> None:
        self._leased_at = time.perf_counter()
        if self._trace is not None:
            self._trace.leased(self.level)

    @property
    def level(self) -> str:
        """The level that serves (or would have)."""
        if self._decision is None:
            return NONE
        return self._decision.level or self._decision.build or NONE

    def usage(self) -> dict[str, Any]:
        """Prompts count once, whatever `n` is."""
        generated = sum(choice.tokens for choice in self.choices)
        return usage(self._wanted.prompt_tokens, self._cached(), generated)

    def compression(self) -> dict[str, Any]:
        """The `compression` object of an answer; fixes the measured numbers."""
        decision = self._decision
        assert decision is not None
        measured = self._fix()
        return {
            "level": self.level,
            "policy": decision.policy,
            "policy_version": self._services.policies.version_of(self._policy),
            "reason": decision.reason,
            "decision_id": self.decision_id,
            "predicted": _numbers(decision, self._policy),
            "measured": measured.numbers(),
            "slo_met": not self._missed(measured),
            **self._told_ranges(),
        }

    def _told_ranges(self) -> dict[str, Any]:
        """Which tokens each level computed, of every sequence, where the policy lets them move;
        `to` is the first token that is not its own."""
        told = []
        for choice, ranges in zip(self.choices, self.ranges, strict=False):
            ends = [begin for _, begin in ranges[1:]] + [choice.tokens]
            told.append(
                [
                    {"level": level, "from": begin, "to": max(begin, end)}
                    for (level, begin), end in zip(ranges, ends, strict=True)
                ]
            )
        return {"levels": told[0] if len(told) == 1 else told} if told else {}

    @property
    def _moved(self) -> bool:
        return any(len(ranges) > 1 for ranges in self.ranges)

    def close(self) -> None:
        """Count the request and teach the predictor. A refusal misses the SLO, a hang-up not."""
        decision, metrics, wanted = self._decision, self._services.metrics, self._wanted
        level = self.level
        measured = self._fix() if self.choices else None
        served = self.code == 200 and measured is not None
        metrics.request_finished(
            Finished(
                model=wanted.model,
                level=level,
                policy=self._policy.name,
                code=self.code,
                prompt_tokens=wanted.prompt_tokens,
                cached_tokens=self._cached(),
                generated_tokens=sum(choice.tokens for choice in self.choices),
                queue_s=None if self._leased_at is None else self._leased_at - self._arrived,
                ttft_s=_seconds(measured.ttft_ms) if measured else None,
                tpot_s=_seconds(measured.tpot_ms) if measured else None,
                e2e_s=_seconds(measured.latency_ms) if served and measured else None,
            )
        )
        if measured is not None and self.code in (200, _HUNG_UP):
            self._teach(measured)
        if served:
            self._shadow()
        self._keep(measured, served)
        if self._trace is not None:
            self._trace.ended(self._record, self.code, self._span())
        if served and measured is not None:
            missed = self._missed(measured)
        elif self.code != _HUNG_UP and decision is not None:
            missed = ("refused",)
        else:
            return
        metrics.slo(wanted.model, level, self._policy.name, missed)
        self._services.policies.observe(self._policy, met=not missed)

    def _span(self) -> tuple[float, float] | None:
        """When the first and the last token came."""
        firsts = [choice.first_at for choice in self.choices if choice.first_at is not None]
        lasts = [choice.last_at for choice in self.choices if choice.last_at is not None]
        return (min(firsts), max(lasts)) if firsts and lasts else None

    def _keep(self, measured: Measured | None, served: bool) -> None:
        """Hand what was decided, and what became of it, to the ledger."""
        record, ledger = self._record, self._services.ledger
        if record is None:
            ledger.closed(self._refused())
            return
        costs = {} if measured is None else asdict(self._costs(measured))
        record.result = Result(
            code=self.code,
            level=self.level,
            generated_tokens=sum(choice.tokens for choice in self.choices),
            costs={name: _short(cost) for name, cost in costs.items()},
            missed=self._missed(measured) if served and measured is not None else None,
            seconds=round(time.perf_counter() - self._arrived, 4),
            levels=self._told_ranges().get("levels"),
        )
        traces = self._services.traces
        if ledger.with_text or (traces is not None and traces.with_text):
            answers = tuple(tuple(choice.ids) for choice in self.choices)
            record.text = (self._wanted.prompts, answers)
        ledger.closed(record)

    def _refused(self) -> Refused:
        wanted = self._wanted
        return Refused(
            at=self._arrived_at(),
            model=wanted.model,
            key=self._key,
            path=self._path,
            policy=self._policy.name,
            sla=wanted.sla.model_dump(mode="json", exclude_none=True),
            pinned=wanted.pinned,
            prompt_tokens=max(len(prompt) for prompt in wanted.prompts),
            max_tokens=wanted.sampling.max_tokens,
            code=self.code,
        )

    def _arrived_at(self) -> float:
        """Unix seconds."""
        return time.time() - (time.perf_counter() - self._arrived)

    @property
    def _path(self) -> str:
        return "/v1/chat/completions" if self._wanted.chat else "/v1/completions"

    def _shadow(self) -> None:
        """Offer the first answer for scoring, unless dense made it itself."""
        shadow, wanted = self._services.shadow, self._wanted
        if (
            shadow is None
            or self._moved
            or self.level == self._services.pool.default_level(wanted.model)
        ):
            return
        tokens = tuple(self.choices[0].ids)
        shadow.offer(Answer(wanted.model, self.level, wanted.prompts[0], tokens))

    def _teach(self, measured: Measured) -> None:
        decision = self._decision
        if decision is None or decision.predicted is None or decision.action != "serve":
            return
        model, predicted = self._wanted.model, decision.predicted
        measured = self._since_decided(measured, decision)
        if self._moved:  # only the first token is all the level's own work
            measured = replace(measured, tpot_ms=None)
        pairs: dict[Literal["ttft", "tpot"], tuple[float, float | None]] = {
            "ttft": (predicted.ttft_ms, measured.ttft_ms),
            "tpot": (predicted.tpot_ms, measured.tpot_ms),
        }
        self._services.predictor.observe(
            model,
            self.level,
            predicted,
            ttft_ms=measured.ttft_ms,
            tpot_ms=measured.tpot_ms,
            latency_ms=measured.latency_ms,
            tokens=None if self._moved else max(choice.tokens for choice in self.choices),
        )
        if self.code != _HUNG_UP:
            for choice in self.choices:
                self._services.predictor.lengths.learn(
                    self._policy.name, choice.tokens, self._wanted.sampling.max_tokens
                )
        for quantity, (guess, truth) in pairs.items():
            if truth is not None:
                self._services.metrics.prediction_error(
                    model,
                    self.level,
                    quantity,
                    predicted_s=guess / 1000.0,
                    measured_s=truth / 1000.0,
                )

    @staticmethod
    def _since_decided(measured: Measured, decision: Decision) -> Measured:
        """Predictions count from the decision; the request may have waited for its turn before."""
        waited = _waited_ms(decision)
        ttft = measured.ttft_ms
        return Measured(
            None if ttft is None else max(0.0, ttft - waited),
            measured.tpot_ms,
            max(0.0, measured.latency_ms - waited),
        )

    def _fix(self) -> Measured:
        if self._measured is None:
            self._measured = Measured.of(self.choices, self._arrived)
        return self._measured

    def _cached(self) -> int:
        """Prefix-cache hits of each prompt's first sequence (the others reuse the first's work)."""
        return sum(choice.cached_tokens for choice in self.choices[:: self._wanted.n])

    def _missed(self, measured: Measured) -> tuple[str, ...]:
        """The bounds of the effective budget that this answer did not keep; found once."""
        if self._broken is None:
            assert self._decision is not None
            self._broken = tuple(excess(self._decision.budget.bounds(), self._costs(measured)))
        return self._broken

    def _costs(self, measured: Measured) -> Costs:
        """Times are measured; the quality is that of the worst level it was computed by, from its
        card; memory is the predicted footprint of the largest (weights and KV are allocated as
        computed)."""
        decision, snapshot = self._decision, self._snapshot
        assert decision is not None
        assert snapshot is not None
        levels = {level for ranges in self.ranges for level, _ in ranges} | {self.level}
        cards = [card for level in levels if (card := _card(snapshot, level)) is not None]
        memory = decision.predicted.memory_mb if decision.predicted else None
        if self._moved and decision.case is not None and memory is not None:
            rows, said = decision.case.columns.index, decision.case.said
            moved = [said.memory_mb.item(rows[level]) for level in levels if level in rows]
            memory = max(memory, *moved)
        return Costs(
            ttft_ms=measured.ttft_ms,
            tpot_ms=measured.tpot_ms,
            latency_ms=measured.latency_ms,
            memory_mb=memory,
            max_ppl_ratio=max((card.perplexity_ratio for card in cards), default=None),
            min_agreement=min((card.top1_agreement for card in cards), default=None),
        )


def _numbers(decision: Decision, policy: Policy) -> dict[str, float] | None:
    expected = predicted(decision)
    return None if expected is None else expected.numbers(policy.confidence)


def _waited_ms(decision: Decision) -> float:
    """What the request had waited for its turn when it was decided."""
    return 0.0 if decision.case is None else decision.case.ask.moment.waited_ms


def _card(snapshot: LadderSnapshot, level: str) -> Card | None:
    facts = snapshot.level(level)
    return facts.card if facts else None


def _short(cost: float | None) -> float | None:
    """To a microsecond; a ruined level's infinite ratio is not known."""
    return round(cost, 3) if cost is not None and math.isfinite(cost) else None


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000.0
