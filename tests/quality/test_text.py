"""Windows of held-out text: the same for every level, never overlapping; files checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.quality import text
from gateway.quality.text import TextError, choose_windows, read_text, windows_from_file


@given(
    tokens=st.integers(2, 3000),
    length=st.integers(2, 400),
    count=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_windows_are_disjoint_pieces_in_order(
    tokens: int, length: int, count: int, seed: int
) -> None:
    windows = choose_windows(range(tokens), length=length, count=count, seed=seed)
    assert windows.dtype == torch.int64
    assert windows.shape[1] == min(length, tokens)
    assert windows.shape[0] == min(count, tokens // windows.shape[1])
    # Tokens are their own positions: consecutive within a window, rising from window to window.
    assert bool((windows.diff(dim=1) == 1).all())
    starts = windows[:, 0]
    assert bool((starts.diff() >= windows.shape[1]).all())


def test_the_seed_alone_chooses() -> None:
    def chosen(seed: int) -> torch.Tensor:
        return choose_windows(range(10_000), length=10, count=20, seed=seed)

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))


def test_a_file_is_tokenized_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "held-out.txt"
    file.write_text("grüße " * 50, encoding="utf-8")
    windows = windows_from_file(file, lambda t: [ord(c) for c in t], length=6, count=3)
    assert windows.shape == (3, 6)
    assert "".join(map(chr, windows[0].tolist())) == "grüße "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \n\t", "empty", id="blank"),
        pytest.param(b"ok \xff\xfe", "not UTF-8", id="binary"),
        pytest.param(b"x", "fewer than two tokens", id="one-token"),
        pytest.param(None, "No such file", id="missing"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        windows_from_file(file, lambda t: [ord(c) for c in t])
    assert "mine.txt" in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 10)
    file = tmp_path / "big.txt"
    file.write_text("a" * 11)
    with pytest.raises(TextError, match="11 bytes"):
        read_text(file)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (5, 0)])
def test_settings_without_a_window_are_refused(length: int, count: int) -> None:
    with pytest.raises(TextError):
        choose_windows(range(100), length=length, count=count)
