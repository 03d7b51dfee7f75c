"""The decision log: one line of JSON per request that has ended, in files of bounded size.

What `pressgate replay` reads as a trace. No prompt and no answer unless the configuration asks for
them. Blocks; the ledger calls it in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import orjson

from gateway.errors import ConfigError
from gateway.policy.explain import predicted
from gateway.policy.record import Record

log = logging.getLogger(__name__)

_MODE: Final = 0o600

_UNDECIDED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "policy_version": None,
        "generated_tokens": 0,
        "action": None,
        "reason": None,
        "level": None,
        "levels": None,
        "predicted": None,
        "measured": {"ttft_ms": None, "tpot_ms": None, "latency_ms": None},
        "slo_met": None,
        "missed": [],
    }
)

Decode = Callable[[str, Sequence[int]], str]
"""The text of token ids of a model."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that ended before anything was decided: too many at once, or a quota spent.
    Fields as in the log; `at`: Unix seconds."""

    at: float
    model: str
    key: str | None
    path: str
    policy: str
    sla: Mapping[str, Any]
    pinned: str | None
    prompt_tokens: int
    max_tokens: int
    code: int


class DecisionLog:
    """Lines in `path`; beyond `max_bytes` it becomes `path.1`, and so on, `files` in all."""

    def __init__(
        self, path: Path, *, max_bytes: int, files: int, decode: Decode | None = None
    ) -> None:
        """`decode`: given, prompts and answers are logged as text.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._decode = decode
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _Lines(
                path, maxBytes=max_bytes, backupCount=max(1, files - 1), encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(
                f"decisions.log: {path}: {error.strerror}", param="decisions.log"
            ) from None

    @property
    def with_text(self) -> bool:
        return self._decode is not None

    def write(self, lines: Sequence[dict[str, Any]]) -> bool:
        """Append lines. False when the disk does not take them."""
        before = self._file.failures
        for document in lines:
            text = document.pop("text", None)
            if text is not None and self._decode is not None:
                model = document["model"]
                document["prompts"] = [self._decode(model, ids) for ids in text[0]]
                document["answers"] = [self._decode(model, ids) for ids in text[1]]
            self._file.line(orjson.dumps(document).decode())
        return self._file.failures == before

    def close(self) -> None:
        self._file.close()


class _Lines(RotatingFileHandler):
    """The standard library's rotation, with failures counted instead of printed."""

    failures = 0

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).touch(mode=_MODE)  # also of every file after the first
        return super()._open()

    def line(self, text: str) -> None:
        self.handle(logging.LogRecord("decisions", logging.INFO, "", 0, text, None, None))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        del record
        if not self.failures:
            log.warning("the decision log %s cannot be written", self.baseFilename)
        self.failures += 1


def line(record: Record | Refused) -> dict[str, Any]:
    """A finished request as one line. Times in ms; `ts`: when it came in, Unix seconds."""
    if isinstance(record, Refused):
        ask = {field: getattr(record, field) for field in record.__slots__ if field != "at"}
        return {"ts": round(record.at, 6), "decision_id": None, **ask, **_UNDECIDED}
    decision, result, case = record.decision, record.result, record.decision.case
    assert case is not None, "decide says what it decided on"
    assert result is not None, "only what has ended is logged"
    expected = predicted(decision)
    document = {
        "ts": round(record.at, 6),
        "decision_id": record.id,
        "model": case.ask.model,
        "key": record.key,
        "path": record.path,
        "policy": decision.policy,
        "policy_version": record.version,
        "sla": case.ask.sla.model_dump(mode="json", exclude_none=True),
        "pinned": case.ask.pinned_level,
        "prompt_tokens": case.ask.prompt_tokens,
        "max_tokens": case.ask.max_tokens,
        "generated_tokens": result.generated_tokens,
        "action": decision.action,
        "reason": decision.code,
        "level": decision.level or decision.build,
        "levels": result.levels,
        "predicted": None if expected is None else expected.numbers(case.policy.confidence),
        "measured": {n: result.costs.get(n) for n in ("ttft_ms", "tpot_ms", "latency_ms")},
        "slo_met": None if result.missed is None else not result.missed,
        "missed": list(result.missed or ()),
        "code": result.code,
    }
    return document if record.text is None else document | {"text": record.text}
