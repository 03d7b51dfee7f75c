"""What the README claims, checked: its commands exist, its files are there, its settings are valid.

The examples that need a running gateway are in `tests/e2e/test_readme.py`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from compressors.levels import STANDARD
from compressors.recipe import Recipe
from gateway.cli import app
from gateway.config import Settings, load_settings
from loadtest.__main__ import app as loadtest_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "deploy" / "README.md", ROOT / "compressors" / "README.md"]
LEVELS = README.partition("<!-- levels -->")[2].partition("<!-- /levels -->")[0]
SHELL = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if not line.startswith((" ", "curl", '"'))
]


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")], ids=str)
def test_make_targets_exist(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize(
    "line",
    [line for line in SHELL if line.startswith(("pressgate ", "python -m loadtest"))],
    ids=str,
)
def test_commands_and_their_flags_exist(line: str) -> None:
    words = shlex.split(line.partition("#")[0])
    application: typer.Typer = app
    words = words[1:]
    if line.startswith("python"):
        application, words = loadtest_app, words[2:]
    named = [word for word in words if not word.startswith("-")]
    for depth in (2, 1):
        asked = CliRunner().invoke(application, [*named[:depth], "--help"], terminal_width=300)
        if asked.exit_code == 0:
            break
    assert asked.exit_code == 0, asked.output
    for flag in (word for word in words if word.startswith("--") and word != "--help"):
        assert flag in asked.output, f"{flag} is no flag of {' '.join(named[:depth])}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_settings_shown_are_valid(tmp_path: Path) -> None:
    block = re.findall(r"```yaml\n(.*?)```", README, re.S)[0]
    file = tmp_path / "pressgate.yaml"
    file.write_text(block)
    settings = load_settings(file)
    names = [policy.name for policy in settings.policies]
    assert names == ["gold", "gold-at-night", "default"]
    assert set(yaml.safe_load(block)) <= set(Settings.model_fields)
    for level in settings.levels:
        assert Recipe.parse(level).name == level


def test_the_table_of_levels_is_the_standard_benchmark() -> None:
    shown = re.findall(r"^\| `([^`]+)` \|", LEVELS, re.M)
    standard = [level.name for name in STANDARD for level in Recipe.parse(name).offers]
    assert sorted(shown) == sorted({"bf16", *standard}), "refresh it: see below the table"
    assert "pressgate bench --levels all" in LEVELS, "the command that made it stands beside it"


def test_every_row_of_the_table_of_levels_says_what_its_level_is() -> None:
    rows = [line.strip("| ").split(" | ") for line in LEVELS.splitlines() if line[:3] == "| `"]
    assert {len(row) for row in rows} == {10}
    for level, family, megabytes, ratio, *_ in rows:
        assert Recipe.parse(level.strip("`")).family == family
        assert float(megabytes) * float(ratio) == pytest.approx(34.6, rel=0.02)


def test_the_changelog_speaks_of_this_version() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_speeds_shown_are_those_in_the_results() -> None:
    """Every ratio of the README's table stands in the table of the comparison it comes from."""
    shown = README.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0]
    measured = {
        (shape, bits, what): ratio
        for shape, bits, what, ratio in re.findall(
            r"^\| (\d+m) \| (\d+) \| ([^|]+?) \|.*\| \*\*([\d.]+)\*\* \|$",
            (ROOT / "loadtest" / "RESULTS.md").read_text(),
            re.M,
        )
    }
    columns = ("decode, batch 1", "decode, batch 8", "prefill 512")
    rows = re.findall(r"^\| (\d+m), (\d+) bits \| (.+) \|$", shown, re.M)
    assert len(rows) == 6
    for shape, bits, cells in rows:
        expected = [measured[shape, bits, column] for column in columns]
        assert cells.split(" | ") == expected, (shape, bits)
