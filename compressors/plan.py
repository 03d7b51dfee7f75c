"""The whole job worked out on shapes, before any weight is read or byte written.

Owns every decision about *what* is done to which layer and what is refused; reads headers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compressors.base import CompressionError
from compressors.calibration import Calibration
from compressors.checkpoint import Checkpoint
from compressors.forecast import Shapes
from compressors.lowrank.svd import rank_of
from compressors.model import (
    build_skeleton,
    decoder_blocks,
    linears,
    parse_config,
    source_names,
    weight_of,
)
from compressors.recipe import Recipe, Step
from compressors.tables import tables
from compressors.walk import Source

# Kinds that compress no linear: fewer or narrower blocks; keys and values, which serving makes.
NO_LINEARS = frozenset({"depth", "width", "embed", "kv"})
# Lists with one entry per decoder block, which must shrink with them.
_PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")


@dataclass(frozen=True)
class LinearPlan:
    """What will be done to one linear.

    Attributes:
        name: inside its block, e.g. `mlp.up_proj`.
        module: in the whole (pruned) model, e.g. `model.layers.0.mlp.up_proj`.
        shape: (N, K).
        steps: the recipe's steps that apply to it; empty: it stays as it is.
        rank: of the factors when a low-rank step applies.
        note: why it differs from the recipe, if it does.
    """

    name: str
    module: str
    shape: tuple[int, int]
    steps: tuple[Step, ...]
    rank: int = 0
    note: str = ""


@dataclass
class Plan:
    """A job on one model: its source, its new config, and one list of linears per block."""

    source: Source
    config: dict[str, Any]
    linears: list[list[LinearPlan]] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """Number of weights that will be compressed."""
        return sum(p.shape[0] * p.shape[1] for block in self.linears for p in block if p.steps)


def shapes_of(model: nn.Module, item_size: int) -> Shapes:
    """What `forecast` needs to know of a skeleton whose weights are stored in `item_size` bytes."""
    blocks = decoder_blocks(model)
    inside = {id(parameter) for parameter in blocks.modules.parameters()}
    config: Any = model.config
    return Shapes(
        blocks=tuple(
            tuple((weight.shape[0], weight.shape[1]) for weight in (weight_of(m) for _, m in found))
            for found in (linears(block) for block in blocks.modules)
        ),
        item_size=item_size,
        hidden=int(config.get_text_config().hidden_size),
        largest=item_size
        * max((p.numel() for p in model.parameters() if id(p) not in inside), default=0),
    )


def open_source(checkpoint: Checkpoint) -> Source:
    """The dense model: skeleton and where its tensors are.

    Raises:
        CheckpointError: an unknown architecture, or tensors missing or of another shape.
        CompressionError: it is compressed already.
    """
    if checkpoint.config.get("quantization_config"):
        raise CompressionError(f"{checkpoint.folder}: is quantized already; give a dense model")
    model = build_skeleton(checkpoint.config)
    return Source(checkpoint, model, decoder_blocks(model), source_names(checkpoint, model))


def blocks_kept(total: int, percent: int) -> int:
    """Number of blocks that `depth-<percent>` keeps.

    Raises:
        CompressionError: the model has too few blocks for this level to drop any.
    """
    kept = max(1, round(total * percent / 100))
    if kept >= total:
        raise CompressionError(
            f"depth-{percent}: {percent} % of {total} blocks is all of them; choose a lower percent"
        )
    return kept


def keep_blocks(source: Source, kept: tuple[int, ...]) -> tuple[Source, dict[str, Any]]:
    """The same model with only the blocks `kept`, renumbered, and its config."""
    config = dict(source.checkpoint.config)
    parsed = parse_config(config)
    total = len(source.blocks)
    config[parsed.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    for key in _PER_LAYER:
        # Filled in by the config class when config.json lacks it, so ask the parsed one.
        values = getattr(parsed, key, None)
        if isinstance(values, list) and len(values) == total:
            config[key] = [values[i] for i in kept]
    if "attention_types" in config:  # GPT-Neo's short form of attention_layers
        config["attention_types"] = [[config["attention_layers"], 1]]
    model = build_skeleton(config)
    blocks = decoder_blocks(model)
    old = {i: source.blocks.prefix(i) + "." for i in kept}
    names = {name: source.names[name] for name in source.outside()}
    edits = {name: source.edits[name] for name in names if name in source.edits}
    for new_index, old_index in enumerate(kept):
        new = blocks.prefix(new_index) + "."
        for name, stored in source.names.items():
            if name.startswith(old[old_index]):
                renamed = new + name.removeprefix(old[old_index])
                names[renamed] = stored
                if name in source.edits:
                    edits[renamed] = source.edits[name]
    return Source(source.checkpoint, model, blocks, names, edits), config


def make_plan(source: Source, config: dict[str, Any], recipe: Recipe) -> Plan:
    """What `recipe` does to each linear of `source`.

    Raises:
        CompressionError: nothing in the model can be compressed by it.
    """
    plan = Plan(source, config)
    for index, block in enumerate(source.blocks.modules):
        prefix = source.blocks.prefix(index)
        rows = []
        for name, module in linears(block):
            n, k = weight_of(module).shape
            steps, rank, note = _fit(recipe, n, k)
            rows.append(LinearPlan(name, f"{prefix}.{name}", (n, k), steps, rank, note))
        plan.linears.append(rows)
    if any(step.kind not in NO_LINEARS for step in recipe.steps) and not plan.weights:
        notes = {p.note for block in plan.linears for p in block} - {""}
        raise CompressionError(
            f"{recipe.name}: no linear of this model can be compressed so "
            f"({'; '.join(sorted(notes)) or 'its blocks have none'})"
        )
    if recipe.step("embed") and not tables(source.model)[0]:
        raise CompressionError(f"{recipe.name}: no embedding or head that can be quantized")
    return plan


def _fit(recipe: Recipe, n: int, k: int) -> tuple[tuple[Step, ...], int, str]:
    """The steps that suit a layer [n, k], the rank, and a note on what was left out."""
    steps, rank, notes = [], 0, []
    for step in recipe.steps:
        if step.kind in NO_LINEARS:
            continue
        if step.kind == "sparse" and step.pattern == "24" and k % 4:
            notes.append(f"{k} columns are no multiple of 4: not pruned")
            continue
        if step.kind == "sparse" and step.pattern == "48" and k % 8:
            notes.append(f"last group of 8 has {k % 8} columns")
        if step.kind == "lowrank":
            rank = rank_of(n, k, step.percent)
            if not rank:
                notes.append(f"no rank of a {n}×{k} layer saves bytes: not factored")
                continue
        if step.kind == "quantize" and not rank and k % step.group_columns(k):
            notes.append(f"last group has {k % step.group_columns(k)} columns")
        steps.append(step)
    return tuple(steps), rank, "; ".join(notes)


def check_calibration(source: Source, calibration: Calibration) -> torch.Tensor:
    """The calibration windows, cut to the model's context.

    Raises:
        CompressionError: token ids outside the vocabulary.
    """
    config: Any = source.model.config
    tokens = calibration.tokens
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size:
        raise CompressionError(
            f"calibration ({calibration.description}): token ids outside the model's vocabulary of "
            f"{config.vocab_size}; was it made with another tokenizer?"
        )
    limit = getattr(config, "max_position_embeddings", None) or tokens.shape[1]
    return tokens[:, :limit]
