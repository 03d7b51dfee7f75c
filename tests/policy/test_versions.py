"""Histories of policies: what they put in force, what they forget, how they differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Conflict, NotFound
from gateway.policy.canary import Plan
from gateway.policy.versions import (
    MAX_VERSIONS,
    By,
    History,
    Kind,
    changes,
    lost,
    read_history,
    utc,
)

ME = By(author="me", comment="because")
NOW = 1_795_395_600.0  # 2026-11-23T01:00:00Z


def made(*steps: tuple[Kind, dict[str, Any] | None]) -> History:
    history = History()
    for second, (kind, document) in enumerate(steps):
        plan = Plan() if kind == "canary" else None
        history = history.then(kind, document, ME, NOW + second, plan=plan)
    return history


A, B, C = {"ttft_ms": 1}, {"ttft_ms": 2}, {"ttft_ms": 3}


@pytest.mark.parametrize(
    ("steps", "in_force", "tried"),
    [
        pytest.param([], None, None, id="nothing"),
        pytest.param([("put", A)], A, None, id="put"),
        pytest.param([("put", A), ("put", B)], B, None, id="replaced"),
        pytest.param([("put", A), ("delete", None)], None, None, id="deleted"),
        pytest.param([("put", A), ("canary", B)], A, B, id="tried"),
        pytest.param([("put", A), ("canary", B), ("canary", C)], A, C, id="another is tried"),
        pytest.param([("put", A), ("canary", B), ("promote", B)], B, None, id="promoted"),
        pytest.param([("put", A), ("canary", B), ("fallback", A)], A, None, id="dropped"),
        pytest.param([("put", A), ("canary", B), ("put", C)], C, None, id="superseded"),
        pytest.param([("canary", B)], None, B, id="of a configured one"),
        pytest.param([("put", A), ("canary", B), ("apart", C)], A, B, id="made apart"),
    ],
)
def test_what_is_in_force_and_what_is_tried(steps: Any, in_force: Any, tried: Any) -> None:
    history = made(*steps)
    assert history.document == in_force
    assert (history.trial.document if history.trial else None) == tried
    assert read_history(history.stored()) == history


def test_a_version_says_who_when_and_why() -> None:
    (version,) = made(("put", A)).versions
    assert version.row() == {
        "version": 1,
        "at": "2026-11-23T01:00:00Z",
        "author": "me",
        "comment": "because",
        "kind": "put",
        "of": None,
        "plan": None,
    }
    with pytest.raises(NotFound, match="there are: 1"):
        made(("put", A)).get(2)
    with pytest.raises(Conflict, match="no candidate"):
        made(("put", A)).trying()


def test_what_older_releases_stored_is_the_first_version() -> None:
    history = read_history({"name": "gold", "ttft_ms": 5.0})
    assert [(v.version, v.document) for v in history.versions] == [(1, {"ttft_ms": 5.0})]
    assert history.then("put", A, ME, NOW).last == 2


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"versions": 3}, "versions"),
        ({"versions": [{"version": -1}]}, "versions.0.version"),
        ({"versions": [{"version": 1, "kind": "canary", "document": {}}]}, "a plan"),
    ],
)
def test_garbage_is_told(document: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read_history(document)


def test_histories_are_bounded_and_keep_what_is_in_force() -> None:
    history = made(("put", A))
    for share in range(1, 2 * MAX_VERSIONS):
        plan = Plan(percent=share / 2)
        history = history.then("canary", B, ME, NOW, plan=plan)
    assert len(history.versions) <= MAX_VERSIONS + 1
    assert history.last == 2 * MAX_VERSIONS
    assert history.document == A
    assert history.versions[0].version == 1
    large = History()
    for _ in range(10):
        large = large.then("put", {"levels": ["x" * 256] * 800}, ME, NOW)
    assert 2 <= len(large.versions) < 6
    assert large.last == 10


numbers = st.integers(0, 3)
documents = st.dictionaries(
    st.sampled_from(["a", "b"]), numbers | st.dictionaries(st.sampled_from("xy"), numbers)
)


@given(documents, documents)
def test_a_diff_leads_from_one_to_the_other(old: dict[str, Any], new: dict[str, Any]) -> None:
    rows = changes(old, new)
    assert changes(old, old) == []
    patched = _flat(old)
    for row in rows:
        assert ("from" in row) == (row["field"] in patched)
        patched.pop(row["field"], None)
        if "to" in row:
            patched[row["field"]] = row["to"]
    assert patched == _flat(new)


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[name] = value
    return flat


def test_versions_of_one_that_was_cut_off_are_kept_for_the_record() -> None:
    common = made(("put", A))
    mine = common.then("put", B, By(author="here"), NOW + 9)
    theirs = common.then("put", C, By(author="there"), NOW + 8).then("put", A, ME, NOW + 10)
    gone = lost(mine, theirs)
    assert [version.document for version in gone] == [B]
    both = theirs.keeping(gone)
    assert both.document == A
    assert [(v.version, v.kind, v.of, v.author) for v in both.versions[-1:]] == [
        (4, "apart", 2, "here")
    ]
    assert lost(mine, both) == lost(theirs, both) == lost(common, theirs) == []
    longer = mine.then("put", C, ME, NOW + 20)
    assert [v.version for v in lost(longer, common)] == [2, 3]


def test_times_are_utc() -> None:
    assert utc(0) == "1970-01-01T00:00:00Z"
