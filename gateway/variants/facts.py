"""What a gateway has to know of a checkpoint before it serves it, and where that is kept.

Read from transformers' module tree once per checkpoint and version of transformers; later starts
read the record and import no model code.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from cache.kept import Kept
from compressors.forecast import Shapes
from gateway.variants.expected import Anatomy

if TYPE_CHECKING:
    from compressors.checkpoint import Checkpoint
    from compressors.export.packed import PackedCheckpoint

NATIVE_LEVELS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_VERSION = 1  # of what the facts say


class CheckpointFacts(BaseModel):
    """Facts of a checkpoint that was found whole.

    Attributes:
        native: the level that its own weights are.
        share: of its parameters, what the decoder blocks hold, 0..1.
        shapes: of its linears; None for one that came compressed.
        names: parameter → name of the stored tensor (`compressors.model.source_names`); empty for
            one that came compressed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    native: str
    anatomy: Anatomy
    share: float
    shapes: Shapes | None
    names: dict[str, str]


def facts_of(
    folder: Path, checkpoint: Checkpoint, imported: PackedCheckpoint | None
) -> CheckpointFacts:
    """The facts, from `folder` or else from transformers, and then kept there.

    Raises:
        CompressionError: an unknown architecture, or tensors missing or of another shape.
    """
    version = importlib.metadata.version("transformers")
    facts = (_VERSION, version, checkpoint.source_digest, imported is not None)
    name = blake3(repr(facts).encode()).hexdigest()
    kept = Kept(folder, CheckpointFacts)
    known = kept.get(name)
    if known is None:
        known = _read(checkpoint, imported)
        kept.put(name, known)
    return known


def _read(checkpoint: Checkpoint, imported: PackedCheckpoint | None) -> CheckpointFacts:
    from compressors.model import block_share, build_skeleton, parse_config, source_names
    from compressors.plan import shapes_of

    config: Any = (imported or checkpoint).config
    text_config = parse_config(config).get_text_config()
    skeleton = build_skeleton(config)
    shapes, names = None, dict[str, str]()
    if imported is None:  # every parameter must be there, in its shape
        names = source_names(checkpoint, skeleton)
        shapes = shapes_of(skeleton, next(skeleton.parameters()).element_size())
    dtype = str(text_config.dtype or "float32").removeprefix("torch.")
    return CheckpointFacts(
        native=NATIVE_LEVELS.get(dtype, "fp32"),
        anatomy=Anatomy.of(text_config),
        share=block_share(skeleton),
        shapes=shapes,
        names=names,
    )
