"""The compiled library: building it, doing without it, refusing a foreign one."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gateway.engine.kernels import native
from gateway.engine.kernels.linear import make_linear
from gateway.engine.kernels.store import pack
from tests.engine.kernels.forms import grouped

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fresh() -> Iterator[None]:
    """The search for the library starts anew, before and after."""
    native._open.cache_clear()
    yield
    native._open.cache_clear()


def build(where: Path, **environment: str) -> list[Path]:
    """Run the package's own build of its extension into `where`."""
    arguments = ["build_ext", "--build-lib", str(where / "lib"), "--build-temp", str(where / "tmp")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return list((where / "lib").rglob("_native*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_setup_builds_a_library_of_this_version(tmp_path: Path) -> None:
    (built,) = build(tmp_path)
    assert ctypes.CDLL(str(built)).pressgate_abi() == native.ABI


def test_setup_goes_on_without_a_compiler(tmp_path: Path) -> None:
    assert build(tmp_path, CC="/bin/false", CXX="/bin/false") == []


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESSGATE_NATIVE", "0")
    assert native.library(native.Feature.INT8) is None


def test_a_host_without_the_library_computes_through_torch(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".missing"])
    form = grouped((33, 100))
    x = torch.randn(3, 100)
    layer = make_linear(pack(form), None, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ form.dense().T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "text"])
def test_a_broken_library_is_reported_and_not_used(
    fresh: None,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".so"])
    assert native.library(native.Feature.INT8) is None
    assert "do not load" in caplog.text


def test_a_library_of_another_version_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library(native.Feature(0)) is None:
        pytest.skip("no native kernels here")
    native._open.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.library(native.Feature.INT8) is None
    assert "reinstall" in caplog.text


def test_a_feature_this_cpu_lacks_is_not_offered(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_open", lambda: (ctypes.CDLL(None), native.Feature.INT8))
    assert native.library(native.Feature.INT8) is not None
    assert native.library(native.Feature.INT8 | native.Feature.BF16) is None
    monkeypatch.undo()
