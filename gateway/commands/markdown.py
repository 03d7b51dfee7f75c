"""The benchmark as Markdown: the README's table, with the conditions it was measured under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from gateway.errors import InvalidRequest
from gateway.variants.card import Card

BEGIN, END = "<!-- levels -->", "<!-- /levels -->"
_HEADER = (
    "level",
    "family",
    "stored MB",
    "ratio",
    "perplexity ratio",
    "KL (nats)",
    "top-1 agreement",
    "prefill ×",
    "decode ×",
    "build s",
)
_WIDTH = 119  # of the README's lines
_WORDS = 2  # of the columns, how many are no numbers


def table(rows: Sequence[tuple[str, str, Card]], failed: Mapping[str, str]) -> str:
    """One line per level; what could not be built is told below."""
    lines = [_line(_HEADER), _line(["---"] * _WORDS + ["---:"] * (len(_HEADER) - _WORDS))]
    lines += [_line((f"`{level}`", family, *_facts(card))) for level, family, card in rows]
    if failed:
        lines += ["", "Not built here:", ""]
        lines += [f"- `{level}`: {reason}" for level, reason in failed.items()]
    return "\n".join(lines)


def section(result: Mapping[str, Any], body: str, picture: str | None = None) -> str:
    """The table under a line that says how, where and on what it was measured.

    Args:
        picture: path of the frontier's PNG as the file has to name it.
    """
    host, versions = result["host"], result["versions"]
    windows = max((row["quality_windows"] for row in result["levels"]), default=0)
    text = (
        "the default text" if result["eval_text"] == "default" else Path(result["eval_text"]).name
    )
    threads = host["build_threads"]
    how = (
        f"`pressgate bench --levels all` for {result['model']} on {host['cores']} cores of "
        f"{host['processor']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{result['date']}. Quality against dense on the same {windows} windows of {text}, with "
        "the 95 % confidence interval of the perplexity ratio; prefill (512 tokens) and decode "
        "(batch 1) speed-ups timed beside dense in the same minutes; built with "
        f"{threads} {'thread' if threads == 1 else 'threads'}."
    )
    image = f"\n\n![Size, quality and speed of every level]({picture})" if picture else ""
    return f"{fill(how, _WIDTH, break_on_hyphens=False)}\n\n{body}{image}"


def splice(file: Path, content: str) -> None:
    """Put `content` between the markers of `file`.

    Raises:
        InvalidRequest: it cannot be read or has no such markers.
    """
    before, after = _around(file)
    file.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


def check_markers(file: Path) -> None:
    """Raise what `splice` would, before the long work."""
    _around(file)


def _around(file: Path) -> tuple[str, str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--readme: {file}: {error}", param="readme") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidRequest(f"--readme: {file}: has no {BEGIN} … {END}", param="readme")
    return before, after


def _facts(card: Card) -> tuple[str, ...]:
    margin = "" if card.ratio_margin is None else f" ± {card.ratio_margin:.4f}"
    timed = bool(card.decode_tokens_per_s)
    return (
        f"{card.stored_bytes / 1e6:.1f}",
        f"{card.compression_ratio:.2f}",
        f"{card.perplexity_ratio:.4f}{margin}",
        f"{card.kl_nats:.4f}",
        f"{card.top1_agreement:.3f}",
        f"{card.prefill_speedup:.2f}" if timed else "–",
        f"{card.speedup:.2f}" if timed else "–",
        f"{card.build_seconds:.1f}",
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
