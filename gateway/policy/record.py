"""A decision as it is kept: its inputs in few bytes; verdicts are worked out when somebody asks.

Nothing is kept of prompts and answers but their lengths. What many decisions share (policy, cards)
is kept apart, so that it is stored once. Pure: who stores it, and for how long, is not known here.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import orjson
from pydantic import TypeAdapter, ValidationError

from gateway.policy.columns import Columns, Floats, floats
from gateway.policy.counterfactual import NO_FLOORS
from gateway.policy.decide import decide
from gateway.policy.decision import Ask, Decision
from gateway.policy.explain import explanation, outcome
from gateway.policy.lengths import Length
from gateway.policy.policy import Policy
from gateway.policy.prediction import Predictions
from gateway.policy.quantile import GRID, KINDS, MarginColumns, Margins
from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot

Floors = Mapping[str, Mapping[str, float]]
NOBODY: Final[Floors] = MappingProxyType({})
_MEMO: Final = 64  # combinations of a policy and cards whose bytes are kept
_COLUMNS: Final = ("ttft_ms", "tpot_ms", "latency_ms", "memory_mb", "load_ms")
_QUICK: Final = 1  # of zlib's levels


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a request.

    Attributes:
        code: HTTP status; 499 when the caller hung up.
        level: what served, or would have.
        costs: measured times (ms), and what is known of the other costs, named as bounds are.
        missed: the bounds that were not kept; None: it was not served to its end.
        seconds: from its arrival to its end.
        levels: which tokens each level computed, as in the answer; None: the policy does not let
            answers move.
    """

    code: int
    level: str
    generated_tokens: int
    costs: Mapping[str, float | None]
    missed: tuple[str, ...] | None
    seconds: float
    levels: Sequence[Any] | None = None


@dataclass(slots=True)
class Record:
    """One decision and, later, what became of it.

    Attributes:
        at: when the request came in, Unix seconds.
        key: name of the API key.
        version: number of the policy's version.
        text: token ids of the prompts and of the answers, only where they are to be told.
    """

    id: str
    at: float
    key: str | None
    path: str
    decision: Decision
    result: Result | None = None
    version: int | None = None
    text: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] | None = None


class Codec:
    """Records to bytes. Not thread-safe: it remembers what it has written of shared things."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, ...], tuple[bytes, object]] = OrderedDict()

    def encode(self, record: Record) -> tuple[bytes, bytes]:
        """(the record's own bytes, the bytes it shares with others)."""
        decision, case = record.decision, record.decision.case
        assert case is not None, "decide says what it decided on"
        snapshot = _snapshots().dump_python(
            case.snapshot,
            mode="json",
            exclude={"levels": {"__all__": {"card"}}},
            exclude_defaults=True,
        )
        document = {
            "id": record.id,
            "at": record.at,
            "key": record.key,
            "path": record.path,
            "version": record.version,
            "ask": _asks().dump_python(case.ask, mode="json", exclude_defaults=True),
            "snapshot": snapshot,
            "said": _said(case.said, case.policy.confidence),
            "budget": dict(decision.budget.bounds()),
            "objective": decision.objective,
            "decision": outcome(decision, case.policy.confidence),
            "result": record.result,
        }
        data = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        return zlib.compress(data, _QUICK), self._shared(case.policy, case.snapshot)

    def _shared(self, policy: Policy, snapshot: LadderSnapshot) -> bytes:
        cards = [facts.card for facts in snapshot.levels]
        name = (id(policy), *map(id, cards))  # which stay theirs: the memo keeps them alive
        known = self._known.get(name)
        if known is None:
            document = {
                "policy": policy.model_dump(mode="json", exclude_defaults=True),
                "cards": [card.model_dump(mode="json", exclude_defaults=True) for card in cards],
            }
            # A ruined level's card holds numbers that are not finite, and orjson has none.
            data = zlib.compress(json.dumps(document, separators=(",", ":")).encode())
            known = self._known[name] = (data, (policy, cards))
            if len(self._known) > _MEMO:
                self._known.popitem(last=False)
        return known[0]


def render(data: bytes, shared: bytes, floors: Floors = NOBODY) -> dict[str, Any]:
    """A kept record as JSON: `explanation`, its id, and what became of it.

    Counterfactuals are left out (None) when it was the queue that refused what would have been
    served: no budget tells how long that is. Verdicts are left out too when the inputs no longer
    lead to the decision that was taken, because it was another version of Pressgate that took it.
    `floors`: the tightest times that each API key may ask for, by bound.
    """
    kept = orjson.loads(zlib.decompress(data))
    common = json.loads(zlib.decompress(shared))
    head = {
        "id": kept["id"],
        "created": kept["at"],
        "key": kept["key"],
        "path": kept["path"],
        "policy_version": kept["version"],
        "result": _result(kept["result"], kept["budget"]),
    }
    known = {"budget": kept["budget"], "objective": kept["objective"], "decision": kept["decision"]}
    try:
        ask, policy, snapshot = _inputs(kept, common)
        said = _predictions(kept["said"], snapshot)
        again = decide(ask, policy, snapshot, lambda *_: said)
    except (ValidationError, TypeError, KeyError, ValueError):
        return head | {"object": "decision", "levels": None, "counterfactuals": None} | known
    told = explanation(ask, policy, again, snapshot, floors.get(kept["key"] or "", NO_FLOORS))
    if any(told["decision"][name] != known["decision"][name] for name in ("action", "level")):
        told["counterfactuals"] = None
        if known["decision"]["code"] != "busy":
            told["levels"] = None
    return head | told | known


def _inputs(kept: dict[str, Any], common: dict[str, Any]) -> tuple[Ask, Policy, LadderSnapshot]:
    levels = kept["snapshot"]["levels"]
    for facts, card in zip(levels, common["cards"], strict=True):
        facts["card"] = Card.model_validate(card)
    return (
        _asks().validate_python(kept["ask"]),
        Policy.model_validate(common["policy"]),
        _snapshots().validate_python(kept["snapshot"]),
    )


def _result(result: dict[str, Any] | None, budget: dict[str, float]) -> dict[str, Any] | None:
    """What became of it, promise by promise; None while it is being served."""
    if result is None:
        return None
    costs, missed = result["costs"], result["missed"]
    return {
        "code": result["code"],
        "level": result["level"],
        "levels": result["levels"],
        "generated_tokens": result["generated_tokens"],
        "measured": {name: costs.get(name) for name in ("ttft_ms", "tpot_ms", "latency_ms")},
        "seconds": result["seconds"],
        "slo_met": None if missed is None else not missed,
        "promises": None
        if missed is None
        else {
            name: {"bound": bound, "measured": costs.get(name), "kept": name not in missed}
            for name, bound in budget.items()
        },
    }


def _said(said: Predictions, confidence: float) -> dict[str, Any]:
    """Predictions, and of their distributions only what `confidence` reads."""
    return {
        **{name: getattr(said, name) for name in _COLUMNS},
        "idle_bytes": said.idle_bytes,
        "expected": said.length.expected,
        "upper": said.length.upper(confidence),
        "factors": said.margins.factors(confidence),
    }


def _predictions(kept: dict[str, Any], snapshot: LadderSnapshot) -> Predictions:
    """`_said` as predictions that read the same at the same confidence.

    Raises:
        ValueError: not of this ladder, or of other times than today's.
    """
    columns = Columns(snapshot.levels)
    numbers: dict[str, Floats] = {name: floats(kept[name]) for name in _COLUMNS}
    factors = list(zip(*kept["factors"], strict=True))
    margins = [Margins(tuple((math.log(factor),) * len(GRID) for factor in row)) for row in factors]
    if len(kept["factors"]) != len(KINDS) or len(numbers["ttft_ms"]) != len(columns):
        raise ValueError("predictions of another ladder")
    ones = np.ones(len(columns))
    said = Predictions(
        columns=columns,
        idle_bytes=kept["idle_bytes"],
        ttft_ms=numbers["ttft_ms"],
        tpot_ms=numbers["tpot_ms"],
        latency_ms=numbers["latency_ms"],
        memory_mb=numbers["memory_mb"],
        load_ms=numbers["load_ms"],
        build_ms=np.where(columns.unbuilt, numbers["load_ms"], 0.0),
        ttft_factor=ones,
        tpot_factor=ones,
        calm=lambda: said,
        cold=bool(numbers["load_ms"].any()),
        length=Length(kept["expected"], (), kept["upper"]),
        margins=MarginColumns(margins or [Margins()] * len(columns)),
    )
    return said


@cache
def _asks() -> TypeAdapter[Ask]:
    return TypeAdapter(Ask)


@cache
def _snapshots() -> TypeAdapter[LadderSnapshot]:
    return TypeAdapter(LadderSnapshot)
