"""The benchmark's outputs and how it goes on, with a stand-in for what measures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from compressors.levels import STANDARD
from compressors.recipe import Recipe
from gateway.cli import app
from gateway.commands import bench as command
from gateway.commands.frontier import draw_frontier, fastest, pareto
from gateway.commands.markdown import BEGIN, END, splice, table
from gateway.commands.options import settings_of
from gateway.config import DEFAULT_LEVELS, Settings
from gateway.errors import InvalidRequest
from gateway.variants.backend import LevelSpec, ProgressFn
from gateway.variants.card import Card
from gateway.variants.jobs import BuildFailed


def card(megabytes: float, kl: float, speed: float = 1.0) -> Card:
    return Card(
        measured=True,
        stored_bytes=int(megabytes * 1e6),
        perplexity_ratio=1 + kl,
        perplexity_ratio_low=1 + kl - 0.02,
        perplexity_ratio_high=1 + kl + 0.03,
        kl_nats=kl,
        top1_agreement=0.9,
        flips=0.05,
        quality_windows=32,
        decode_tokens_per_s={"1": 100 * speed, "8": 500 * speed},
        prefill_speedup=speed / 2,
        speedup=speed,
        build_seconds=1.5,
    )


class Bench:
    """A backend whose cards come from a table; counts what it measures."""

    model = "small"

    def __init__(self, levels: tuple[str, ...]) -> None:
        self.levels = ("bf16", *levels)
        self.cards: dict[str, Card] = {}
        self.measured: list[str] = []
        self.broken: set[str] = set()

    def ladder(self) -> tuple[LevelSpec, ...]:
        return tuple(LevelSpec(name, Recipe.parse(name).family) for name in self.levels)

    def card(self, level: str) -> Card:
        return self.cards.get(level, Card())

    async def measure(self, level: str, progress: ProgressFn, *, speed: bool = True) -> Card:
        progress(0.5, "half")
        self.measured.append(level)
        if level in self.broken:
            raise BuildFailed(f"{level}: 97 columns are odd | really")
        return card(10 + len(level), 0.01 * len(level))

    async def remember(self, level: str, made: Card) -> None:
        self.cards[level] = made


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    backend = Bench(("int8", "depth-75"))

    @asynccontextmanager
    async def workshop(_: Settings) -> AsyncIterator[Bench]:
        yield backend

    monkeypatch.setattr(command, "workshop", workshop)
    return backend


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_what_was_measured_is_not_measured_again_unless_asked(bench: Bench) -> None:
    first = run("--markdown")
    assert first.exit_code == 0, first.output
    assert bench.measured == ["bf16", "int8", "depth-75"]
    assert "[2/3] int8: perplexity ratio 1.0400" in first.stderr
    second = run("--markdown")
    assert second.stdout == first.stdout
    assert bench.measured == ["bf16", "int8", "depth-75"]
    assert "measured before" in second.stderr
    run("--fresh")
    assert len(bench.measured) == 6


def test_cards_of_before_confidence_intervals_are_measured_anew(bench: Bench) -> None:
    old = {"measured": True, "perplexity_ratio": 1.1, "decode_tokens_per_s": {"1": 9.0}}
    bench.cards["int8"] = Card.model_validate(old)
    assert bench.cards["int8"].ratio_margin is None
    run()
    assert "int8" in bench.measured


def test_a_level_that_cannot_be_built_is_told_and_the_rest_measured(
    bench: Bench, tmp_path: Path
) -> None:
    bench.broken = {"int8"}
    done = run("--json", str(tmp_path / "out.json"), "--markdown")
    assert done.exit_code == 0
    assert "- `int8`: int8: 97 columns are odd" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["level"] for row in result["levels"]] == ["bf16", "depth-75"]
    assert result["failed"] == {"int8": "int8: 97 columns are odd | really"}
    assert "97 columns" in run().stdout  # the terminal's table says it too
    bench.broken = {"bf16", "int8", "depth-75"}
    none = run("--fresh")
    assert isinstance(none.exception, InvalidRequest)
    assert "97 columns" in none.exception.message


def test_nothing_untimed_is_remembered(bench: Bench) -> None:
    assert run("--no-speed").exit_code == 0
    assert bench.cards == {}


def test_the_readme_is_refreshed_between_its_markers(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    for _ in range(2):  # again gives the same
        assert run("--readme", str(file)).exit_code == 0
        text = file.read_text()
        assert text.startswith(f"# Title\n\n{BEGIN}\n`pressgate bench --levels all` for small on ")
        assert text.endswith(f"{END}\n\nMore.\n")
        assert "old" not in text
        assert "same 32 windows of the default text" in " ".join(text.split())
        assert "| `int8` | quantization | 14.0 | 1.00 | 1.0400 ± 0.0250 | 0.0400 | 0.900 |" in text
    assert text.count(BEGIN) == 1
    assert run("--readme", str(file), "--png", str(tmp_path / "docs.png")).exit_code == 0
    assert "\n\n![Size, quality and speed of every level](docs.png)\n" in file.read_text()
    assert (tmp_path / "docs.png").exists()


def test_a_file_without_markers_is_refused_before_anything_is_measured(
    bench: Bench, tmp_path: Path
) -> None:
    file = tmp_path / "plain.md"
    file.write_text("nothing here\n")
    for given in (file, tmp_path / "absent.md"):
        done = run("--readme", str(given))
        assert isinstance(done.exception, InvalidRequest)
    assert bench.measured == []
    assert file.read_text() == "nothing here\n"
    with pytest.raises(InvalidRequest, match="has no <!-- levels -->"):
        splice(file, "table")


def test_untimed_speeds_are_shown_as_unknown() -> None:
    untimed = card(1, 0.1).model_copy(update={"decode_tokens_per_s": {}})
    assert table([("int8", "quantization", untimed)], {}).endswith("| – | – | 1.5 |")


def test_all_means_the_standard_levels() -> None:
    assert settings_of(None, levels="all").levels == STANDARD
    assert settings_of(None).levels == DEFAULT_LEVELS
    assert settings_of(None, levels=" int8 , fp32").levels == ("int8", "fp32")
    assert len(set(STANDARD)) == len(STANDARD)
    for level in STANDARD:
        assert Recipe.parse(level).name == level
    families = {Recipe.parse(level).family for level in STANDARD}
    assert {"dense", "quantization", "pruning", "lowrank"} <= families


def test_the_frontier_joins_what_nothing_beats(tmp_path: Path) -> None:
    rows = [
        ("bf16", "dense", card(34, 0.0)),
        ("int8", "quantization", card(20, 0.002, 1.3)),
        ("int4-rtn-g64", "quantization", card(14, 0.09, 1.2)),
        ("int4-gptq-g128", "quantization", card(13.5, 0.05, 1.1)),
        ("depth-75", "pruning", card(27, 0.9, 1.4)),
    ]
    assert pareto(rows) == ["int4-gptq-g128", "int8", "bf16"]
    assert fastest(rows) == ["depth-75", "int8", "bf16"]
    draw_frontier("small", rows, tmp_path / "f.png")
    draw_frontier("small", rows[:1], tmp_path / "one.png")
    for name in ("f", "one"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_names_on_the_picture_do_not_cover_each_other(tmp_path: Path) -> None:
    """Forty levels, all on the frontier and close together: every name keeps its own place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gateway.commands.frontier import _panel

    figure = Figure(figsize=(6, 6))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [
        (f"level-{i}", "dense" if i % 2 else "pruning", card(10 + i, 0.2 * 0.7**i))
        for i in range(16)
    ]
    _panel(axes, rows, lambda c: c.stored_bytes / 1e6, pareto(rows))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 16
    overlapping = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert overlapping == 0
