"""Outlines kept on disk, and opening a variant by the one that is kept for it.

A variant is read through transformers and settled once; its outline is kept only if the model built
from it then answers bit for bit the same. Later loads, also of other processes, build from the
outline alone and import no transformers. What the answer depends on is part of an outline's name:
the variant's identity, its dtypes, the libraries' versions and the compiled kernels.
"""

from __future__ import annotations

import importlib.metadata
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from blake3 import blake3

from cache.kept import Kept
from gateway.engine import native_step
from gateway.engine.model import Model, VariantWeights, build_model
from gateway.engine.native_linears import DTYPES
from gateway.engine.outline import Outline, build, outline_of
from gateway.engine.runners import same, settle
from gateway.errors import ModelError

log = logging.getLogger(__name__)

_VERSION = 2  # of what an outline says


def open_model(
    weights: VariantWeights,
    folder: Path | None,
    *,
    device: str = "cpu",
    max_batch: int = 2,
) -> Model:
    """The variant as it is served: by its kept outline, or read through transformers and settled.

    Args:
        folder: where outlines are kept; None: nowhere.
        max_batch: as in `settle`.

    Raises:
        ModelError: see `build_model`.
    """
    if folder is None or device != "cpu" or not _can_be_outlined(weights):
        return settle(build_model(weights, device=device), max_batch=max_batch)
    kept, name = Kept(folder, Outline), _name(weights)
    known = kept.get(name)
    if known is not None:
        try:
            return build(known, weights)
        except ModelError as error:
            log.warning("an outline does not fit its variant: %s", error)
    model = settle(build_model(weights), max_batch=max_batch)
    _keep(kept, name, model, weights)
    return model


def _can_be_outlined(weights: VariantWeights) -> bool:
    has_runner = native_step.operations() is not None and weights.dtype in DTYPES
    return bool(weights.identity) and has_runner


def _name(weights: VariantWeights) -> str:
    facts = (_VERSION, weights.identity, str(weights.dtype), repr(weights.kv), _surroundings())
    return blake3(repr(facts).encode()).hexdigest()


@cache
def _surroundings() -> tuple[str, ...]:
    """Versions of the libraries, and digests of the compiled kernels."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    kernels = Path(native_step.__file__).parent / "kernels"
    built = [path for end in EXTENSION_SUFFIXES for path in kernels.glob(f"_*{end}")]
    digests = [blake3(path.read_bytes()).hexdigest() for path in sorted(set(built))]
    return (*versions, *digests, torch.backends.cpu.get_cpu_capability())


def _keep(kept: Kept[Outline], name: str, model: Model, weights: VariantWeights) -> None:
    """Keep the model's outline if it says all of the model; without a word where it cannot."""
    outline = outline_of(model)
    if outline is None:
        return
    try:
        again = build(Outline.model_validate_json(outline.model_dump_json()), weights)
    except ModelError as error:
        log.warning("an outline is not kept: %s", error)
        return
    if same(model, again) and again.resident_bytes == model.resident_bytes:
        kept.put(name, outline)
    else:
        log.warning("an outline gives another model than its own; it is not kept")
