"""`pressgate policy …` against a real gateway over the stand-in model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.errors import PressgateError
from tests.e2e.commands import complaint
from tests.support.fake_pool import Gateway
from tests.support.live import LiveServer

FILE = """\
- name: child
  extends: parent
  tpot_ms: 40
- name: parent
  extends: default
  ttft_ms: 300
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with LiveServer(Gateway().open) as server:
        yield server.url


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["policy", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["policy", *arguments])
    assert isinstance(done.exception, PressgateError), done.output
    return done.exception.message


def test_the_life_of_a_policy(url: str, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(FILE)
    at = ("--url", url)
    assert said("validate", str(file)) == "child: ok\nparent: ok\n"
    assert said("apply", str(file), "--comment", "begin", *at) == (
        "parent: applied\nchild: applied\n"
    )
    assert orjson.loads(said("show", "child", "--json", *at))["ttft_ms"] == 300
    file.write_text("{name: parent, extends: default, ttft_ms: 200}\n")
    said("apply", str(file), *at)
    assert orjson.loads(said("show", "child", "--json", *at))["ttft_ms"] == 200
    assert said("diff", "parent", *at) == (
        "parent: version 1 → 2\n- ttft_ms: 300.0\n+ ttft_ms: 200.0\n"
    )
    assert "version 3" in said("rollback", "parent", "1", "--comment", "too tight", *at)
    told = said("history", "parent", *at)
    assert [word in told for word in ("3 *", "rollback", "too tight", "local", "begin")] == [
        True
    ] * 5
    rows = orjson.loads(said("history", "parent", "--json", *at))["data"]
    assert [row["kind"] for row in rows] == ["rollback", "put", "put"]


def test_the_life_of_a_candidate(url: str, tmp_path: Path) -> None:
    file, at = tmp_path / "policies.yaml", ("--url", url)
    file.write_text("{name: tried, ttft_ms: 300}\n")
    assert "no policy 'tried'" in refused("apply", str(file), "--canary", "10", *at)
    said("apply", str(file), *at)
    file.write_text("{name: tried, ttft_ms: 200}\n")
    assert "tried on 10 %" in said("apply", str(file), "--canary", "10", *at)
    shown = said("canary", "tried", *at)
    assert "version 2 on 10 %" in shown
    assert "collecting" in shown
    assert "dropped (version 3)" in said("abort", "tried", "--comment", "no", *at)
    assert "no candidate" in refused("promote", "tried", *at)
    said("apply", str(file), "--canary", "10", *at)
    assert "in force (version 5)" in said("promote", "tried", *at)
    assert orjson.loads(said("show", "tried", "--json", *at))["ttft_ms"] == 200


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- name: a\n  extends: nobody\n", 2, "extends: no policy 'nobody'"),
        ("- name: a\n  extends: b\n- name: b\n  extends: a\n", 2, "extends: a policy cannot"),
        ("name: a\nmatch:\n  hours:\n    zone: Mars\n", 4, "match.hours.zone: no timezone 'Mars'"),
        ("name: a\nmatch:\n  metadata:\n    tier: 3\n", 4, "match.metadata.tier"),
    ],
    ids=["parent", "circle", "zone", "metadata"],
)
def test_a_bad_file_ends_with_2_and_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    said_ = complaint("policy", "validate", str(file))
    assert f"{file}:{line}: " in said_
    assert words in said_


def test_a_name_is_never_a_path(url: str) -> None:
    assert "404" in refused("history", "../levels", "--url", url)
