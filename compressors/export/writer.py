"""A complete Hugging Face folder in AutoGPTQ's format, from a compressed model in memory.

Owns the format's settings and tensor names; the tensor layout is `autogptq_format`'s, the files
are `folder`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressors.export.autogptq_format import (
    GptqFormatError,
    Version,
    to_gptq,
)
from compressors.export.folder import SHARD_BYTES, Draft, write_folder
from compressors.export.model import CompressedModel
from compressors.model import build_skeleton, is_transposed, linears
from compressors.tensor import Dense, Grouped, LinearForm

_BLOCK = re.compile(r"^(.*?\.)\d+\.")


@dataclass(frozen=True)
class _Layout:
    """What all the quantized linears of a checkpoint share."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    version: Version


def write_gptq(
    folder: str | Path,
    model: CompressedModel,
    *,
    version: Version | None = None,
    tokenizer_from: str | Path | None = None,
    damp_percent: float = 0.01,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` as a checkpoint that AutoGPTQ, GPTQModel, transformers and vLLM load.

    Codes, zero points and plain tensors are kept exactly; scales are rounded to float16.

    Args:
        folder: must not exist yet.
        version: by default `gptq`, which everything reads, when all zero points are symmetric, else
            `gptq_v2`: GPTQModel refuses asymmetric files of the first version from other writers,
            as their zero points of 0 were often broken. AutoGPTQ itself reads the first only.
        tokenizer_from: folder whose tokenizer files are copied along.
        damp_percent: dampening that GPTQ ran with; recorded for readers that ask for it.
        shard_bytes: largest size of one file (a single larger tensor still makes one file).

    Raises:
        GptqFormatError: a form or a mix of forms that the format cannot hold; names the module.
        FileExistsError: the folder exists.
    """
    layout = _layout(model.forms, version)
    settings = _settings(model, layout, damp_percent)
    config = {**model.config, "quantization_config": settings}
    draft = Draft(config, _named_tensors(model, layout), {"quantize_config.json": settings})
    return write_folder(folder, draft, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes)


def _layout(forms: Mapping[str, LinearForm], version: Version | None) -> _Layout:
    grouped: dict[str, Grouped] = {}
    for module, form in forms.items():
        if isinstance(form, Grouped):
            grouped[module] = form
        elif not isinstance(form, Dense):
            raise GptqFormatError(f"{module}: a {form.scheme} weight has no GPTQ form")
    if not grouped:
        raise GptqFormatError("no linear is quantized in groups; nothing to write as GPTQ")
    first, head = next(iter(grouped.items()))
    per_channel = all(form.group >= form.shape[1] for form in grouped.values())
    # A layer narrower than the group is one group: the widest group is the checkpoint's.
    group = max(form.group for form in grouped.values())
    for module, form in grouped.items():
        if form.bits != head.bits:
            raise GptqFormatError(
                f"{module}: {form.bits} bits, but {first} has {head.bits}; the format has one width"
            )
        if not per_channel and form.group != min(group, form.shape[1]):
            raise GptqFormatError(
                f"{module}: groups of {form.group}, others of {group}; the format has one size"
            )
    symmetric = all(form.symmetric for form in grouped.values())
    return _Layout(
        bits=head.bits,
        group_size=-1 if per_channel else group,
        symmetric=symmetric,
        act_order=any(form.perm is not None for form in grouped.values()),
        version=version or ("gptq" if symmetric else "gptq_v2"),
    )


def _settings(model: CompressedModel, layout: _Layout, damp_percent: float) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bits": layout.bits,
        "group_size": layout.group_size,
        "damp_percent": damp_percent,
        "desc_act": layout.act_order,
        "static_groups": False,
        "sym": layout.symmetric,
        "true_sequential": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": layout.version,
        "pack_dtype": "int32",
    }
    if skipped := _unquantized(model):
        # GPTQModel's and vLLM's word for "this linear is stored as it was".
        settings["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in skipped}
    return settings


def _unquantized(model: CompressedModel) -> list[str]:
    """Linears inside the quantized blocks whose weight is plain; loaders expect them packed."""
    packed = {module for module, form in model.forms.items() if isinstance(form, Grouped)}
    blocks = {match[1] for module in packed if (match := _BLOCK.match(module))}
    plain = [module for module in model.forms if module not in packed]
    for name, tensor in model.tensors.items():
        match = _BLOCK.match(name)
        if match and match[1] in blocks and tensor.ndim == 2 and name.endswith(".weight"):
            plain.append(name.removesuffix(".weight"))
    return sorted(plain)


def _named_tensors(model: CompressedModel, layout: _Layout) -> Iterator[tuple[str, Tensor]]:
    yield from model.tensors.items()
    transposed = {n for n, m in linears(build_skeleton(model.config)) if is_transposed(m)}
    for module, form in model.forms.items():
        if isinstance(form, Dense):
            yield f"{module}.weight", form.weight.t() if module in transposed else form.weight
            continue
        assert isinstance(form, Grouped)  # _layout refused the others
        try:
            tensors = to_gptq(form, layout.version)
        except GptqFormatError as error:
            raise GptqFormatError(f"{module}: {error}") from error
        assert tensors.g_idx is not None
        yield f"{module}.qweight", tensors.qweight
        yield f"{module}.qzeros", tensors.qzeros
        yield f"{module}.scales", tensors.scales
        yield f"{module}.g_idx", tensors.g_idx
