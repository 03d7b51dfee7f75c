"""How facts look in a terminal: the ladder and the benchmark as rich tables."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from gateway.variants.card import Card
from gateway.variants.variant import LadderSnapshot

_WIDTH = 170
_COLUMNS = (
    "MB",
    "ratio",
    "prefill/s",
    "decode/s",
    "×8/s",
    "drafted/s",
    "prefill ×",
    "decode ×",
    "ppl ratio",
    "± 95 %",
    "KL nats",
    "top-1",
    "flips",
    "build s",
)


def wide_console() -> Console:
    """A console that does not squeeze tables when the output is no terminal."""
    return Console(width=max(_WIDTH, shutil.get_terminal_size().columns), soft_wrap=True)


def ladder_table(snapshot: LadderSnapshot) -> Table:
    """Every level with its state and card; estimates are marked with `~`."""
    table = _table(f"{snapshot.model}: levels", ("level", "state"))
    for facts in snapshot.levels:
        table.add_row(facts.level, str(facts.state), *cells(facts.card))
    table.caption = "~ estimated: measured on this machine once the level is built"
    return table


def card_table(title: str, cards: Iterable[tuple[str, str, Card]]) -> Table:
    """Rows of (level, family, card)."""
    table = _table(title, ("level", "family"))
    for level, family, card in cards:
        table.add_row(level, family, *cells(card))
    return table


def cells(card: Card) -> tuple[str, ...]:
    """The card's figures in the order of the columns; `–` where unknown."""
    mark = "" if card.measured else "~"
    timed = card.measured and bool(card.decode_tokens_per_s)
    return (
        f"{mark}{card.stored_bytes / 1e6:.1f}",
        f"{mark}{card.compression_ratio:.2f}",
        _number(card.prefill_tokens_per_s),
        _number(card.decode_tokens_per_s.get("1", 0.0)),
        _number(card.decode_tokens_per_s.get("8", 0.0)),
        _number(card.speculation.decode_tokens_per_s.get("1", 0.0) if card.speculation else 0.0),
        f"{card.prefill_speedup:.2f}" if timed else "–",
        f"{card.speedup:.2f}" if timed else "–",
        f"{mark}{card.perplexity_ratio:.4f}",
        "–" if card.ratio_margin is None else f"{card.ratio_margin:.4f}",
        f"{mark}{card.kl_nats:.4f}",
        f"{mark}{card.top1_agreement:.3f}",
        f"{card.flips:.3f}" if card.measured else "–",
        f"{mark}{card.build_seconds:.1f}",
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value else "–"


def _table(title: str, first: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table
