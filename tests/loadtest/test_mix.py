from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.mix import BadInput, load_mix
from loadtest.options import MIXES, mix_path


def test_the_bundled_mix_has_its_four_classes() -> None:
    mix = load_mix(mix_path("mixed-sla"))
    assert [item.name for item in mix.classes] == [
        "tight-latency",
        "strict-quality",
        "small-memory",
        "best-effort",
    ]
    assert mix.classes[-1].sla is None


def test_every_bundled_mix_can_be_read() -> None:
    names = sorted(MIXES.glob("*.yaml"))
    assert names
    for path in names:
        load_mix(path)


def _load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    return load_mix(path)


def test_goals_are_the_latency_budgets_of_the_sla_unless_given(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        "classes:\n"
        "  - {name: a, sla: {ttft_ms: 100, memory_mb: 5}}\n"
        "  - {name: b, sla: {ttft_ms: 100}, goals: {latency_ms: 50}}\n"
        "  - {name: c}\n"
    )
    goals = [item.goals.model_dump(exclude_none=True) for item in load_mix(path).classes]
    assert goals == [{"ttft_ms": 100.0}, {"latency_ms": 50.0}, {}]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param("classes: []", "classes", id="none"),
        pytest.param("classes: [{name: a, speed: 3}]", "classes.0.speed", id="unknown key"),
        pytest.param("clases: [{name: a}]", "clases", id="misspelt"),
        pytest.param("classes: [{name: a, weight: 0}]", "classes.0.weight", id="no weight"),
        pytest.param("classes: [{name: a, weight: .inf}]", "classes.0.weight", id="infinite"),
        pytest.param("classes: [{name: a}, {name: a}]", "twice", id="twice"),
        pytest.param("classes: [{name: 'a b'}]", "classes.0.name", id="name"),
        pytest.param("classes: [{name: a, max_tokens: [9, 3]}]", "max_tokens", id="reversed"),
        pytest.param("classes: [{name: a, max_tokens: 0}]", "max_tokens", id="zero"),
        pytest.param("classes: [{name: a, sla: {ttft_ms: -1}}]", "ttft_ms", id="goal"),
        pytest.param("classes: [{name: a", "not valid YAML", id="yaml"),
        pytest.param("", "--mix", id="empty"),
        pytest.param("- 1", "--mix", id="list"),
    ],
)
def test_a_bad_mix_names_what_is_wrong(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(BadInput, match="--mix") as caught:
        _load(tmp_path, text)
    assert names in str(caught.value)


def test_a_missing_mix_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml"):
        load_mix(tmp_path / "none.yaml")
