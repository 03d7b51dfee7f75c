"""Cores that speculate whenever they may, on tiny random models, for the tests of speculation."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gateway.engine.core import Core, Job
from gateway.engine.payoff import Choice, Offer, Payoff
from gateway.engine.runner import Model, VariantWeights, build_model
from gateway.engine.tokenizer import Tokenizer

from .conftest import VOCAB, small_core, weights_of

Maker = Callable[[str], Path]
_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _CUDA])]


class Always(Payoff):
    """Drafts `most` tokens for whoever may have some, whatever it costs."""

    most = 3

    def due(self, batch: int) -> bool:
        return True

    def choose(
        self, batch: int, offers: Mapping[str, Sequence[Offer]], places: int
    ) -> Choice | None:
        for name, rows in offers.items():
            counts, left = [], places - batch
            for row in rows:
                counts.append(min(row.most, self.most, left))
                left -= counts[-1]
            if any(counts):
                return Choice(name, counts)
        return None


def speculating(core: Core, most: int = 3) -> Core:
    """Make every variant speculate on every step it may."""
    for variant in core._variants.values():
        if variant.speculator is not None:
            always = Always()
            always.most = most
            variant.speculator.payoff = variant.speculator.sampled = always
    return core


@cache
def exact(folder: Path, device: str = "cpu") -> Model:
    """The checkpoint's model; of one core at a time."""
    return build_model(weights_of(folder), device=device)


@cache
def blurred(folder: Path, noise: float, device: str = "cpu") -> Model:
    """The checkpoint's model with noise on its weights: agrees with it now and then, and counts
    as lighter."""
    weights = weights_of(folder)
    torch.manual_seed(5)
    tensors = {n: t + noise * t.std() * torch.randn_like(t) for n, t in weights.tensors.items()}
    blurry = VariantWeights(weights.config, tensors, {}, weights.dtype)
    model = build_model(blurry, device=device)
    object.__setattr__(model, "resident_bytes", 1)
    return model


def pair(folder: Path, tokenizer: Tokenizer, noise: float = 0.1, **options: Any) -> Core:
    """A core with a target `m@big` and a level `m@small` that drafts for it."""
    core = small_core(**{"speculate": "small", "max_num_seqs": 32} | options)
    device = options.get("device", "cpu")
    core.attach("m@big", exact(folder, device), tokenizer)
    core.attach("m@small", blurred(folder, noise, device), tokenizer)
    return speculating(core)


def plain_core(folder: Path, tokenizer: Tokenizer, device: str = "cpu") -> Core:
    core = small_core(device=device)
    core.attach("m@big", exact(folder, device), tokenizer)
    return core


def prompts(count: int, seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def jobs_of(requests: Sequence[Any], tokenizer: Tokenizer) -> list[Job]:
    return [Job("m@big", item, tokenizer) for item in requests]
