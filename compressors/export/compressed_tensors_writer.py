"""A complete Hugging Face folder in compressed-tensors' format, from a compressed model in memory.

Owns `quantization_config` and which linears it names; tensor layouts are
`compressed_tensors_format`'s, the files are `folder`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compressors.export.compressed_tensors_format import WeightArgs, pack
from compressors.export.folder import SHARD_BYTES, Draft, write_folder
from compressors.export.model import CompressedModel
from compressors.export.packed import FormatError
from compressors.model import build_skeleton, is_transposed, linears
from compressors.tensor import Dense, LinearForm

_VERSION = "0.15.0"  # the first whose readers know every layout written here


def write_compressed_tensors(
    folder: str | Path,
    model: CompressedModel,
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model` as a checkpoint that transformers (with compressed-tensors) and vLLM load.

    Codes and zero points are kept exactly, plain tensors too; scales are rounded to float16 where
    that holds them. vLLM has kernels for 4 and 8 bits.

    Args:
        folder: must not exist yet.
        tokenizer_from: folder whose tokenizer files are copied along.

    Raises:
        FormatError: a form that the format cannot hold; names the module and the reason.
        FileExistsError: the folder exists.
    """
    layout = _layout(model)
    config = {**model.config, "quantization_config": _settings(layout, _ignored(model, layout))}
    draft = Draft(config, _named_tensors(model, layout))
    return write_folder(folder, draft, tokenizer_from=tokenizer_from, shard_bytes=shard_bytes)


def _layout(model: CompressedModel) -> dict[str, WeightArgs]:
    """The settings of every compressed linear; each is packed once to be sure that it can be."""
    known = dict(linears(build_skeleton(model.config)))
    layout: dict[str, WeightArgs] = {}
    for module, form in model.forms.items():
        if isinstance(form, Dense):
            continue
        if module not in known:
            raise FormatError(f"{module}: is no linear; embeddings have no compressed form here")
        if is_transposed(known[module]):
            raise FormatError(
                f"{module}: is a Conv1D, and compressed-tensors has plain linears only; "
                "the gptq format has both"
            )
        layout[module] = _pack(module, form)[0]
    if not layout:
        raise FormatError("no linear is compressed; there is nothing to write")
    return layout


def _pack(module: str, form: LinearForm) -> tuple[WeightArgs, dict[str, Tensor]]:
    try:
        return pack(form)
    except FormatError as error:
        raise FormatError(f"{module}: {error}") from error


def _settings(layout: Mapping[str, WeightArgs], ignored: list[str]) -> dict[str, Any]:
    groups: dict[WeightArgs, list[str]] = {}
    for module, args in layout.items():
        groups.setdefault(args, []).append(module)
    # One kind of linear is what every reader has a short way for; several are told by name.
    entries = {
        f"group_{i}": args.config_group(["Linear"] if len(groups) == 1 else modules)
        for i, (args, modules) in enumerate(groups.items())
    }
    formats = {args.format for args in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": entries,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _VERSION,
    }


def _ignored(model: CompressedModel, layout: Mapping[str, WeightArgs]) -> list[str]:
    """Linears of the architecture that are stored as they are."""
    skeleton = build_skeleton(model.config)
    return [name for name, _ in linears(skeleton) if name not in layout]


def _named_tensors(
    model: CompressedModel, layout: Mapping[str, WeightArgs]
) -> Iterator[tuple[str, Tensor]]:
    yield from model.tensors.items()
    transposed = {n for n, m in linears(build_skeleton(model.config)) if is_transposed(m)}
    for module, form in model.forms.items():
        if module not in layout:
            assert isinstance(form, Dense)
            yield f"{module}.weight", form.weight.t() if module in transposed else form.weight
            continue
        for part, tensor in _pack(module, form)[1].items():
            yield f"{module}.{part}", tensor
