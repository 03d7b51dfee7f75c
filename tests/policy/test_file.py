"""Policy files: what is read, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import ConfigError
from gateway.policy.file import load_policies

GOOD = """\
policies:
  - name: interactive
    match: {api_key: [team-a], header: {x-tier: gold}}
    ttft_ms: 300
    max_ppl_ratio: 1.10
    on_miss: wait
  - name: default
    max_ppl_ratio: 1.02
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "policies.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_file(tmp_path: Path) -> None:
    first, second = load_policies(write(tmp_path, GOOD))
    assert (first.name, first.ttft_ms, first.on_miss) == ("interactive", 300, "wait")
    assert first.match.api_key == ("team-a",)
    assert second.max_ppl_ratio == 1.02


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param("name: one\ntpot_ms: 3\n", ["one"], id="one policy"),
        pytest.param("- name: one\n- name: two\n", ["one", "two"], id="a list"),
        pytest.param("device: cpu\npolicies:\n- name: one\n", ["one"], id="a whole configuration"),
        pytest.param("[]", [], id="an empty list"),
        pytest.param(
            "- &a {name: one}\n- {name: two, match: {model: m}}\n", ["one", "two"], id="&"
        ),
    ],
)
def test_shapes(tmp_path: Path, text: str, names: list[str]) -> None:
    assert [policy.name for policy in load_policies(write(tmp_path, text))] == names


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        pytest.param(GOOD.replace("ttft_ms", "ttft"), 4, "ttft: unknown; allowed are", id="key"),
        pytest.param(GOOD.replace("300", "-3"), 4, "ttft_ms: .*greater than 0", id="value"),
        pytest.param(GOOD.replace("300", "soon"), 4, "ttft_ms", id="type"),
        pytest.param(GOOD.replace("wait", "hope"), 6, "on_miss: .*'wait'", id="choice"),
        pytest.param(
            GOOD.replace("x-tier: gold", "x-tier: 3"), 3, "match.header.x-tier", id="deep"
        ),
        pytest.param(
            GOOD.replace("api_key", "key"), 3, "match.key: unknown", id="unknown in match"
        ),
        pytest.param(GOOD.replace("default", "interactive"), 7, "name: 'interactive'", id="twice"),
        pytest.param(
            GOOD.replace("name: default", "nmae: default"), 7, "name: .*required", id="gone"
        ),
        pytest.param(GOOD + "    max_ppl_ratio: 2\n", 9, "max_ppl_ratio: given twice", id="dup"),
        pytest.param("polices: []\npolicies: []\n", 1, "polices: unknown", id="beside"),
        pytest.param("policies: {}\n", 1, "policies: expected a list", id="not a list"),
        pytest.param("just text\n", 1, "expected a policy", id="text"),
        pytest.param("- name: [\n", 2, "not YAML", id="syntax"),
        pytest.param("- name: a\n  tpot_ms: !!python/object:os.x 3\n", 2, "python", id="tag"),
        pytest.param("- name: a\n  ? [b]\n  : 3\n", 2, "a key must be a word", id="odd key"),
        pytest.param("- &a [*a]\n", 1, "too large or too deep", id="recursive"),
    ],
)
def test_errors_name_the_line_and_the_key(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as refused:
        load_policies(path)
    assert refused.value.message.startswith(f"{path}:{line}: ")


def test_every_fault_is_reported(tmp_path: Path) -> None:
    text = GOOD.replace("300", "-3").replace("1.02", "0.5")
    with pytest.raises(ConfigError) as refused:
        load_policies(write(tmp_path, text))
    assert [line.split(":")[1] for line in refused.value.message.splitlines()] == ["4", "8"]


def test_unfolding_aliases_is_bounded(tmp_path: Path) -> None:
    levels = "- &l0 [x,x,x,x,x,x,x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"- &l{n} [{','.join([f'*l{n - 1}'] * 16)}]\n" for n in range(1, 7)
    )
    with pytest.raises(ConfigError, match="too large"):
        load_policies(write(tmp_path, levels))


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "empty", "huge"])
def test_unreadable_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "policies.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"binary": b"\xff\xfe\x00", "empty": b"", "huge": b"#" * 2**21}[kind])
    with pytest.raises(ConfigError, match=str(path)):
        load_policies(path)
