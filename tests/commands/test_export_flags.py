"""What `pressgate compress --export` refuses before anything is built."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.commands import complaint


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    line = complaint(
        *("compress", "--level", "int8", "--export", str(tmp_path / "out"), "--format", "gguf")
    )
    assert "--format" in line
    assert "compressed-tensors, gptq" in line


def test_a_folder_that_exists_is_not_written_into(tmp_path: Path) -> None:
    line = complaint("compress", "--level", "int8", "--export", str(tmp_path))
    assert f"--export: {tmp_path} exists" in line


def test_a_way_of_caching_is_no_checkpoint(tmp_path: Path) -> None:
    line = complaint("compress", "--level", "int8+kv8", "--export", str(tmp_path / "out"))
    assert "kv8 is how the KV cache is kept" in line
    assert list(tmp_path.iterdir()) == []
