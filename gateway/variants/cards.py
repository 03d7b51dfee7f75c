"""The card book: measured cards of every variant, kept as documents and shared between replicas.

Speed belongs to one host, quality to the variant wherever it was measured: a card from another host
lends its quality and sizes, not its speed. Torch-free.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache.documents import Documents
from gateway.variants.card import Card

log = logging.getLogger(__name__)

NAMESPACE = "cards"
_SPEED_FIELDS = {
    "prefill_tokens_per_s": 0.0,
    "decode_tokens_per_s": {},
    "speculation": None,
    "speedup": 1.0,
    "prefill_speedup": 1.0,
    "build_seconds": 0.0,
    "load_seconds": 0.0,
}


def processor_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def conditions(*, device: str, threads: int, dtype: str, eval_text: str) -> str:
    """A short fingerprint of what a measurement depends on besides the artifact: the processor,
    its threads, the libraries, the compute type and the digest of the evaluation text."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    facts = (processor_name(), os.cpu_count(), device, threads, dtype, eval_text, *versions)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


class CardBook:
    """Cards by variant key. Reads are from memory; writes go to the document store."""

    def __init__(self, documents: Documents, host: str) -> None:
        self._documents = documents
        self._host = host
        self._cards: dict[str, dict[str, Card]] = {}
        self._listeners: list[Callable[[str], None]] = []

    async def start(self) -> None:
        """Read what is stored and follow what other replicas measure."""
        for name, document in (await self._documents.all(NAMESPACE)).items():
            self._take(name, document)
        await self._documents.watch(NAMESPACE, self._changed)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener(variant key)` whenever a card arrives."""
        self._listeners.append(listener)

    def get(self, key: str) -> Card | None:
        """This host's card, else another host's without its speeds, else None."""
        cards = self._cards.get(key)
        if not cards:
            return None
        if self._host in cards:
            return cards[self._host]
        other = next(iter(cards.values()))
        return other.model_copy(update=_SPEED_FIELDS)

    def measured_here(self, key: str) -> bool:
        """This host has timed the variant."""
        card = self._cards.get(key, {}).get(self._host)
        return card is not None and bool(card.decode_tokens_per_s)

    async def put(self, key: str, card: Card) -> None:
        card = card.model_copy(update={"host": self._host})
        name = f"{key}-{self._host}"
        self._take(name, card.model_dump(mode="json"))
        await self._documents.put(NAMESPACE, name, card.model_dump(mode="json"))

    def _changed(self, name: str, document: dict[str, Any] | None) -> None:
        if document is not None:
            self._take(name, document)

    def _take(self, name: str, document: dict[str, Any]) -> None:
        key, _, host = name.rpartition("-")
        try:
            card = Card.model_validate(document)
        except ValidationError as error:
            log.warning("card %s is not readable and is left out: %s", name, error.error_count())
            return
        self._cards.setdefault(key, {})[host] = card
        for listener in self._listeners:
            listener(key)
