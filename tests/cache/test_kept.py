"""Records kept in files: lost ones are absent, never wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from cache import kept
from cache.kept import Kept


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: float


def test_what_is_put_is_got_by_another(tmp_path: Path) -> None:
    Kept(tmp_path / "new", Record).put("a", Record(value=0.1))
    assert Kept(tmp_path / "new", Record).get("a") == Record(value=0.1)
    assert Kept(tmp_path / "new", Record).get("b") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"value": "x"}', '{"value": 1, "more": 2}'])
def test_what_is_no_record_is_absent(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert Kept(tmp_path, Record).get("a") is None


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST", 3)
    records = Kept(tmp_path, Record)
    for at in range(5):
        records.put(str(at), Record(value=at))
        os.utime(tmp_path / f"{at}.json", (at, at))
    assert [records.get(str(at)) is None for at in range(5)] == [True, True, False, False, False]


def test_large_ones_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Kept(tmp_path, Record)
    records.put("a", Record(value=1))
    monkeypatch.setattr(kept, "_LARGEST", 5)
    assert records.get("a") is None
    records.put("b", Record(value=2))
    assert not (tmp_path / "b.json").exists()


def test_a_disk_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    records = Kept(tmp_path / "file", Record)
    records.put("a", Record(value=1))
    assert records.get("a") is None
