"""The `peers` command: puts the engines we compare with into one folder, from PyPI.

llama.cpp is built from the sources that llama-cpp-python's source distribution carries (pinned);
OpenVINO GenAI, its converter and `gguf` go to a Python environment of their own. Nothing is added
to our own environment. What is there already is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest.mix import BadInput
from loadtest.peers.place import DEFAULT, Place

LLAMA = "llama-cpp-python==0.3.36"
# torch first and exact: anything looser would take the gigabytes of its CUDA build.
PACKAGES = (
    "torch==2.13.0",
    "openvino-genai==2026.4.1.0",
    "optimum-intel[openvino]==2.2.0",
    "gguf==0.19.0",
)
_IN_THE_WAY = "torchvision"  # comes along, does not fit this torch, and is not needed
_TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
PARTS = ("llama.cpp", "openvino")


class InstallFailed(Exception):
    """A tool is missing or failed; the message ends with what it said."""


def command(
    directory: Annotated[Path, typer.Option("--dir", help="Folder to fill.")] = DEFAULT,
    only: Annotated[str, typer.Option(help="Comma-separated parts.")] = ",".join(PARTS),
) -> None:
    """Install the engines to compare with: llama.cpp (needs CMake, a C++ compiler) and OpenVINO."""
    chosen = [part.strip() for part in only.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise BadInput(f"--only {part}: not one of {', '.join(PARTS)}")
    root = directory.expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--dir {directory}: {error.strerror}") from None
    console = Console(stderr=True)
    failed = False
    for part in chosen:
        try:
            install = _install_llama if part == "llama.cpp" else _install_openvino
            said = "was there" if not install(Place(root)) else "installed"
        except InstallFailed as error:
            said, failed = f"failed: {error}", True
        console.print(f"{part}: {said}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _install_llama(place: Place) -> bool:
    """Download, build and keep the binaries; False when they are there."""
    binaries = place.root / "llama.cpp" / "bin"
    if all((binaries / name).is_file() for name in _TARGETS):
        return False
    if shutil.which("cmake") is None:
        raise InstallFailed("cmake is not installed")
    with tempfile.TemporaryDirectory(dir=place.root) as scratch:
        folder = Path(scratch)
        source_only = ("--no-deps", "--no-binary", LLAMA.partition("==")[0])
        _run([sys.executable, "-m", "pip", "download", *source_only, "-d", scratch, LLAMA])
        archive = next(folder.glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        source = next(folder.glob("*/vendor/llama.cpp"))
        build = folder / "build"
        _run(["cmake", "-S", str(source), "-B", str(build), *_OPTIONS])
        jobs = str(os.cpu_count() or 1)
        _run(["cmake", "--build", str(build), "-j", jobs, "--target", *_TARGETS])
        binaries.mkdir(parents=True, exist_ok=True)
        for name in _TARGETS:
            shutil.copy2(build / "bin" / name, binaries / name)
    return True


def _install_openvino(place: Place) -> bool:
    """An environment with OpenVINO GenAI, the converter and gguf; False when it is there."""
    python = place.root / "venv" / "bin" / "python"
    if python.exists() and _has(python, "openvino_genai", "optimum.intel", "gguf"):
        return False
    _run([sys.executable, "-m", "venv", str(place.root / "venv")])
    _run([str(python), "-m", "pip", "install", *PACKAGES])
    _run([str(python), "-m", "pip", "uninstall", "-y", _IN_THE_WAY])
    return True


def _has(python: Path, *modules: str) -> bool:
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    done = subprocess.run([str(python), "-c", code, *modules], capture_output=True, check=False)
    return done.returncode == 0


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise InstallFailed(f"{' '.join(command[:4])} …: {said[-400:]}") from None
