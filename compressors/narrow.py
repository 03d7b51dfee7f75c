"""Making a model narrower: which heads and channels go together, in any architecture, and where.

Owns the structure: which linears make what another one reads, the config of the smaller model, and
its tensors as edits of the checkpoint's. Which units go is `prune.width`'s. A block is cut part by
part on the inputs that what was cut before gives; until the end nothing is narrower, what is gone
has weight zero in its consumer. A part that a plain config cannot say (GPT-2 has no word for fewer
heads) stays whole, with a note.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.base import CompressionError
from compressors.model import (
    build_skeleton,
    decoder_blocks,
    is_transposed,
    linears,
    set_tensor,
    weight_of,
)
from compressors.prune import width
from compressors.walk import Source, Walk

_CHANNEL_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
_MAX_STEP = 128  # channels stay in steps, for kernels and groups, that cost 1/64 at most
_TRIED = 4  # numbers of heads
_SAME = 1e-3  # relative difference that rounding may make
# What is the same model under a config that allows head counts which do not divide the hidden size.
_TWINS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
}

Edits = dict[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Part:
    """Something that every block has and that can be cut: heads or channels.

    Attributes:
        keys: what it changes in the config.
        unit: columns of the consumer that go together.
        total, kept: units.
        rows: for producers by their number of rows: runs of (first row, rows per unit).
        sums: allowed numbers of rows of all producers together; empty for any.
    """

    name: str
    keys: dict[str, Any]
    unit: int
    total: int
    kept: int
    rows: Mapping[int, Sequence[tuple[int, int]]]
    sums: tuple[int, ...] = ()

    def joins(self, producers: Sequence[nn.Module], consumer: nn.Module) -> bool:
        """Whether these linears make and read this part, judged by their sizes."""
        sizes = [weight_of(p).shape[0] for p in producers]
        return (
            weight_of(consumer).shape[1] == self.unit * self.total
            and bool(sizes)
            and all(size in self.rows for size in sizes)
            and (not self.sums or sum(sizes) in self.sums)
        )

    def kept_rows(self, rows: int, units: Tensor) -> Tensor:
        """Rows, of a producer with so many, that make `units`."""
        runs = [start + width.columns_of(units, per) for start, per in self.rows[rows]]
        return torch.cat(runs)


@dataclass(frozen=True)
class Place:
    """A part in a block: the linears that make it and the one that reads it."""

    part: Part
    producers: tuple[str, ...]
    consumer: str


@dataclass
class Narrowing:
    """A width job on one model: parts to cut, the config they make, what stays whole and why."""

    source: Source
    config: dict[str, Any]
    parts: tuple[Part, ...]
    notes: dict[str, str]


def plan_width(source: Source, config: Mapping[str, Any], percent: int) -> Narrowing:
    """Which parts `width-<percent>` cuts, and to what size; shapes only.

    Raises:
        CompressionError: neither heads nor channels of this model can be cut so.
    """
    job = Narrowing(source, dict(config), (), {})
    twin = _TWINS.get(str(config.get("model_type")), {})
    for part in (*_heads(source, percent), *_channels(source, percent)):
        if any(part.name == done.name for done in job.parts):
            continue
        for other in ({}, twin) if twin else ({},):
            trial, parts = {**job.config, **other, **part.keys}, (*job.parts, part)
            reason = _reason_against(source, trial, parts, part)
            if not reason:
                job.notes.pop(part.name, None)
                job.config, job.parts = trial, parts
                break
            job.notes.setdefault(part.name, reason)
    if not job.parts:
        reasons = "; ".join(f"{name}: {why}" for name, why in job.notes.items())
        raise CompressionError(f"width-{percent}: nothing of this model can be cut ({reasons})")
    return job


def _heads(source: Source, percent: int) -> Iterator[Part]:
    """Key-value heads, each with the query heads that share it: as many as asked, and the numbers
    beside it, nearest first, for configs that do not take every number."""
    parsed: Any = source.model.config
    heads = int(parsed.num_attention_heads)
    groups = int(getattr(parsed, "num_key_value_heads", None) or heads)
    size = int(getattr(parsed, "head_dim", None) or parsed.hidden_size // heads)
    shared, queries, values = heads // groups, heads * size, groups * size
    rows = {
        values: [(0, size)],
        queries: [(0, shared * size)],
        queries + 2 * values: [(0, shared * size), (queries, size), (queries + values, size)],
    }
    wanted = groups * percent / 100
    nearest = sorted(range(1, groups + 1), key=lambda n: (abs(n - wanted), n))
    for kept in nearest[:_TRIED]:
        key = parsed.attribute_map.get("num_attention_heads", "num_attention_heads")
        keys = {key: kept * shared, "head_dim": size}
        if hasattr(parsed, "num_key_value_heads"):
            keys["num_key_value_heads"] = kept
        yield Part("heads", keys, shared * size, groups, kept, rows, (queries + 2 * values,))
        if kept == groups:
            return


def _channels(source: Source, percent: int) -> Iterator[Part]:
    """The MLP's channels, under each name that a config may have for them."""
    parsed: Any = source.model.config
    for key in _CHANNEL_KEYS:
        name = parsed.attribute_map.get(key, key)
        if not hasattr(parsed, name):
            continue
        total = int(getattr(parsed, name) or 4 * int(parsed.hidden_size))
        step = _MAX_STEP
        while step > 1 and (32 * step > total or total % step):
            step //= 2
        kept = max(1, math.floor(total * percent / 100 / step + 0.5)) * step
        rows = {total: [(0, 1)], 2 * total: [(0, 1), (total, 1)]}
        yield Part("channels", {name: kept}, 1, total, kept, rows)


def _reason_against(
    source: Source, config: Mapping[str, Any], parts: Sequence[Part], new: Part
) -> str:
    """Why the model cannot be cut in these parts, the last of them new; empty if it can."""
    if new.kept >= new.total:
        return f"{new.kept} of {new.total} is all of them"
    blocks = source.blocks.modules
    places = [list(places_of(block, parts)) for block in blocks]
    if any([p.part.name for p in found] != [p.name for p in parts] for found in places):
        return "the linears that make and read them are not told apart by their sizes"
    unsaid = "its config has no word for fewer of them"
    try:
        smaller = decoder_blocks(build_skeleton(config)).modules
    except CompressionError:
        return unsaid
    for block, found, small in zip(blocks, places, smaller, strict=True):
        shapes = _narrow_shapes(block, found)
        if {name: p.shape for name, p in small.named_parameters()} != shapes:
            return unsaid
    return ""


def places_of(block: nn.Module, parts: Sequence[Part]) -> Iterator[Place]:
    """Where `parts` are in a block: linears of one module, of which the last reads the others."""
    families: dict[str, list[str]] = {}
    for name, _ in linears(block):
        families.setdefault(name.rpartition(".")[0], []).append(name)
    for part in parts:
        for *producers, consumer in families.values():
            made = [block.get_submodule(name) for name in producers]
            if part.joins(made, block.get_submodule(consumer)):
                yield Place(part, tuple(producers), consumer)


def _narrow_shapes(block: nn.Module, places: Sequence[Place]) -> dict[str, torch.Size]:
    """Shape of every parameter of a block once it is cut."""
    shapes = {name: p.shape for name, p in block.named_parameters()}
    for place in places:
        units = torch.arange(place.part.kept)
        for name in place.producers:
            linear = block.get_submodule(name)
            rows, columns = weight_of(linear).shape
            rows = len(place.part.kept_rows(rows, units))
            flipped = is_transposed(linear)
            shapes[f"{name}.weight"] = torch.Size((columns, rows) if flipped else (rows, columns))
            if f"{name}.bias" in shapes:
                shapes[f"{name}.bias"] = torch.Size((rows,))
        linear = block.get_submodule(place.consumer)
        rows, columns = weight_of(linear).shape[0], place.part.kept * place.part.unit
        flipped = is_transposed(linear)
        shapes[f"{place.consumer}.weight"] = torch.Size(
            (columns, rows) if flipped else (rows, columns)
        )
    return shapes


def narrow(
    job: Narrowing,
    walk: Walk,
    solve: Callable[..., width.Cut],
    said: Callable[[float, str], None],
) -> Source:
    """Cut every block; the source of the smaller model, whose config is the job's.

    Args:
        walk: of the job's source, before its first block; it is used up.
        solve: `prune.width.solve`.
        said: called with the share done and what is done now.

    Raises:
        CompressionError: the model's blocks do not compute what their sizes promise.
    """
    source, edits = job.source, dict(job.source.edits)
    first: list[Tensor] = []
    for index in range(len(source.blocks)):
        block = walk.load(index)
        for place in places_of(block, job.parts):
            said(index / len(source.blocks), f"{source.blocks.prefix(index)}.{place.consumer}")
            _cut(edits, walk, index, place, solve)
        if not first:
            first = [walk.run(0, walk.hidden[0])]
        walk.advance(index)
        walk.free(index)
    model = build_skeleton(job.config)
    smaller = Source(source.checkpoint, model, decoder_blocks(model), source.names, edits)
    trial = Walk(smaller, walk.tokens[0], device=walk.device)
    trial.load(0)
    found = trial.run(0, trial.hidden[0])
    trial.free(0)
    if float((found - first[0]).norm()) > _SAME * float(first[0].norm()):
        raise CompressionError(
            f"{type(model).__name__}: a narrower block computes something else; width pruning does "
            "not know this architecture"
        )
    return smaller


def _cut(
    edits: Edits, walk: Walk, index: int, place: Place, solve: Callable[..., width.Cut]
) -> None:
    """Choose the units of one part of a loaded block, and compute so from now on."""
    block, prefix = walk.source.blocks.modules[index], walk.source.blocks.prefix(index)
    part, consumer = place.part, block.get_submodule(place.consumer)
    statistic = width.empty(part.unit * part.total, walk.device)
    for seen in walk.inputs(index, [place.consumer]):
        width.accumulate(statistic, seen[place.consumer])
    biased = getattr(consumer, "bias", None) is not None
    weight = weight_of(consumer).float()
    try:
        cut = solve(weight, statistic, unit=part.unit, kept=part.kept, biased=biased)
    except ValueError as error:
        raise CompressionError(f"{prefix}.{place.consumer}: {error}") from error
    for name in place.producers:
        linear = block.get_submodule(name)
        rows = part.kept_rows(weight_of(linear).shape[0], cut.units).cpu()
        _then(edits, f"{prefix}.{name}.weight", _taker(rows, 1 if is_transposed(linear) else 0))
        if getattr(linear, "bias", None) is not None:
            _then(edits, f"{prefix}.{name}.bias", _taker(rows, 0))
    stored = walk.source.read(f"{prefix}.{place.consumer}.weight").dtype
    edits |= _refit(f"{prefix}.{place.consumer}", consumer, cut, part.unit, stored)


def _refit(name: str, consumer: nn.Module, cut: width.Cut, unit: int, stored: torch.dtype) -> Edits:
    """The consumer's tensors in the type they are stored in; it computes from these now."""
    fitted = cut.weight.to(stored)
    edits = {f"{name}.weight": _giver(_spilled(weight_of(consumer, fitted).contiguous().cpu()))}
    wide = torch.zeros_like(weight_of(consumer), dtype=torch.float32)
    wide[:, width.columns_of(cut.units, unit)] = fitted.float()
    set_tensor(consumer, "weight", weight_of(consumer, wide).contiguous())
    if cut.shift is not None:
        bias = (consumer.get_parameter("bias").float() + cut.shift).to(stored)
        edits[f"{name}.bias"] = _giver(bias.cpu())
        set_tensor(consumer, "bias", bias.float())
    return edits


def _then(edits: Edits, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Do `edit` after what is done to the tensor already."""
    before = edits.get(name)
    edits[name] = edit if before is None else lambda tensor: edit(before(tensor))


def _taker(index: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(dim, index)


def _giver(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _stored: tensor


def _spilled(tensor: Tensor) -> Tensor:
    """The same in a file that nobody else sees and that ends with the tensor: a large model's
    re-fitted weights need not stay in memory until they are written."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(tensor.numel() * tensor.element_size())
        mapped = torch.from_file(
            file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype
        ).view(tensor.shape)
    return mapped.copy_(tensor)
