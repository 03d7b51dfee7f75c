"""GPTQ (Frantar et al., arXiv:2210.17323) by the auto-gptq 0.7.1 package itself, an optional extra.

Unlike the other methods this one does a whole model at once: the package quantizes and packs; its
checkpoint is read back by `export.reader`, so what is served is exactly what it wrote. The dense
weights are in memory while it runs. `quantize/gptq.py` is our own, layer by layer.

The scheme is symmetric: the package packs an asymmetric zero point of 0 into its neighbours' bits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressors.base import CompressionError, LayerReport, ProgressFn, Report, Sink
from compressors.checkpoint import Checkpoint
from compressors.export.autogptq_format import BITS, WORD
from compressors.export.reader import GptqCheckpoint
from compressors.model import build_skeleton, is_transposed, parse_config, source_names
from compressors.quantize import autogptq_compat
from compressors.recipe import Step
from compressors.tensor import Grouped

BATCH = 4


@dataclass(frozen=True)
class AutoGptqSettings:
    """What auto-gptq is asked for: code width, columns per group (None: per channel), dampening."""

    bits: int = 4
    group: int | None = 128
    damp_percent: float = 0.01
    act_order: bool = False

    @property
    def name(self) -> str:
        """The level's name."""
        return f"int{self.bits}-autogptq-g{self.group or 'ch'}"


def solve(
    checkpoint: Checkpoint,
    step: Step,
    windows: Tensor,
    sink: Sink,
    *,
    progress: ProgressFn | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """`build` as the pipeline calls it: `windows` int64 [n, T]."""
    settings = AutoGptqSettings(bits=step.bits, group=step.group)
    return build(
        checkpoint.folder,
        list(windows),
        sink,
        settings=settings,
        device=torch.device(device).type,
        progress=progress,
    )


def build(
    folder: str | Path,
    windows: Sequence[Tensor],
    sink: Sink,
    *,
    settings: AutoGptqSettings | None = None,
    device: str = "cpu",
    progress: ProgressFn | None = None,
) -> Report:
    """Quantize the model in `folder` with auto-gptq and hand the result to `sink`.

    Tensors that stay as they are come from `folder` unchanged, so that they are shared with other
    levels; only the packed linears come from auto-gptq.

    Args:
        windows: calibration token ids, each int64 [T] or [1, T], all of one length.
        device: `cpu`, or `cuda` to work block by block on the first GPU.
        progress: called after each batch through a block; raising from it cancels.

    Raises:
        autogptq_compat.AutoGptqMissing: the extra is not installed.
        CompressionError: the package does not know the architecture or cannot pack its shapes.
    """
    settings = settings or AutoGptqSettings()
    package = autogptq_compat.load()
    checkpoint = Checkpoint(folder)
    skeleton = build_skeleton(checkpoint.config)
    wrapper = _wrapper_class(package, checkpoint.config["model_type"])
    _check(skeleton, wrapper, settings, windows)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="autogptq-") as scratch:
        with _timed(seconds, "load"):
            model = wrapper(
                _dense_model(checkpoint, device), False, _quantize_config(package, settings)
            )
        with _timed(seconds, "quantize"):
            _quantize(model, windows, _working_device(device), progress)
        with _timed(seconds, "store"):
            model.save_quantized(scratch)
            del model
            layers = _deliver(checkpoint, skeleton, GptqCheckpoint(scratch), sink)
    tokens = sum(window.numel() for window in windows)
    return Report(settings.name, tuple(layers), {}, seconds, calibration_tokens=tokens)


def _wrapper_class(package: Any, model_type: str) -> Any:
    known: dict[str, Any] = package.modeling.auto.GPTQ_CAUSAL_LM_MODEL_MAP
    if model_type not in known:
        raise CompressionError(
            f"auto-gptq 0.7.1 does not know model type {model_type!r} (it knows "
            f"{', '.join(sorted(known))}); use the gptq method instead"
        )
    return known[model_type]


def _check(
    skeleton: nn.Module, wrapper: Any, settings: AutoGptqSettings, windows: Sequence[Tensor]
) -> None:
    """Everything that would fail late, before the weights are read."""
    if settings.bits not in BITS:
        raise CompressionError(f"auto-gptq quantizes to {BITS} bits, not {settings.bits}")
    if not windows or len({window.numel() for window in windows}) != 1:
        raise CompressionError("auto-gptq needs calibration windows of one length")
    block = skeleton.get_submodule(wrapper.layers_block_name + ".0")
    wanted = [name for group in wrapper.inside_layer_modules for name in group]
    linears = {name: module for name, module in block.named_modules() if name in wanted}
    if not linears:
        raise CompressionError(
            f"auto-gptq 0.7.1 expects {', '.join(wanted)} in every block of a "
            f"{type(skeleton).__name__}; transformers' current code has none of them"
        )
    for name, module in linears.items():
        rows, columns = module.get_parameter("weight").shape
        if rows % WORD or columns % WORD:
            raise CompressionError(
                f"{wrapper.layers_block_name}.0.{name}: {rows}x{columns} is not a multiple of "
                f"{WORD} on both sides, which auto-gptq's packing needs"
            )
        inputs = rows if is_transposed(module) else columns
        if settings.group is not None and inputs % settings.group:
            raise CompressionError(
                f"{wrapper.layers_block_name}.0.{name}: {inputs} columns are no whole number of "
                f"groups of {settings.group}"
            )


def _quantize_config(package: Any, settings: AutoGptqSettings) -> Any:
    return package.BaseQuantizeConfig(
        bits=settings.bits,
        group_size=-1 if settings.group is None else settings.group,
        damp_percent=settings.damp_percent,
        desc_act=settings.act_order,
        static_groups=False,
        sym=True,
        true_sequential=True,
    )


def _dense_model(checkpoint: Checkpoint, device: str) -> nn.Module:
    """The transformers model; in float32 on a CPU, where float16 is slow and less exact."""
    from transformers import AutoModelForCausalLM

    config = parse_config(checkpoint.config)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=config,
        dtype=torch.float32 if device == "cpu" else torch.float16,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


def _quantize(
    model: Any, windows: Sequence[Tensor], device: torch.device, progress: ProgressFn | None
) -> None:
    blocks = list(model.model.get_submodule(model.layers_block_name))
    groups = [g for g in model.inside_layer_modules if _any_in(blocks[0], g)]
    # A block runs once per group of linears to calibrate it, and once more for the next's inputs.
    runs = len(blocks) * (len(groups) + 1) * -(-len(windows) // BATCH)
    done = 0

    def on_block() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(1.0, done / runs), f"auto-gptq: block {done * len(blocks) // (runs + 1)}")

    examples = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in (window.reshape(1, -1).long() for window in windows)
    ]
    with autogptq_compat.running(blocks, device, on_block):
        try:
            model.quantize(
                examples, batch_size=BATCH, use_triton=False, cache_examples_on_gpu=False
            )
        except (TypeError, AttributeError, KeyError) as error:
            # E.g. GPT-2, whose blocks transformers now calls with positional arguments.
            raise CompressionError(
                f"auto-gptq 0.7.1 cannot run the blocks of transformers' current "
                f"{type(model.model).__name__} ({error}); use the gptq method instead"
            ) from error


def _working_device(device: str) -> torch.device:
    # It compares devices for equality, and tensors say "cuda:0", never "cuda".
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)


def _any_in(block: nn.Module, names: Sequence[str]) -> bool:
    present = {name for name, _ in block.named_modules()}
    return any(name in present for name in names)


def _deliver(
    dense: Checkpoint, skeleton: nn.Module, packed: GptqCheckpoint, sink: Sink
) -> list[LayerReport]:
    """Everything to the sink: plain tensors from the dense checkpoint, linears from auto-gptq's."""
    names = source_names(dense, skeleton)
    quantized = {f"{module}.weight" for module in packed.modules}
    sink.config(dict(dense.config))
    for name, source in names.items():
        if name not in quantized:
            sink.tensor(name, dense.tensor(source))
    reports: list[LayerReport] = []
    for module, form in packed.forms():
        weight = dense.tensor(names[f"{module}.weight"])
        if is_transposed(skeleton.get_submodule(module)):
            weight = weight.t()
        sink.linear(module, form)
        reports.append(_report(module, weight, form))
    return reports


def _report(module: str, weight: Tensor, form: Grouped) -> LayerReport:
    exact = weight.float()
    error = torch.linalg.vector_norm(form.dense() - exact) / torch.linalg.vector_norm(exact)
    groups = form.scales.numel()
    return LayerReport(
        module=module,
        scheme=form.scheme,
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=form.codes.numel() * form.bits // 8 + groups * (16 + form.bits) // 8,
        relative_error=float(error),
        seconds=0.0,
        note="packed by auto-gptq; relative error of the weight",
    )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
