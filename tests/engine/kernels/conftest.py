"""Both back ends of the kernels, one thread, a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gateway.engine.kernels.native import Feature, library


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """Seeded, one thread, no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with the compiled kernels (where this host has them) and without."""
    name: str = request.param
    monkeypatch.setenv("PRESSGATE_NATIVE", "1" if name == "native" else "0")
    if name == "native" and library(Feature.INT8) is None:
        pytest.skip("no native kernels here: not installed, no compiler, or no AVX-512 VNNI")
    return name
