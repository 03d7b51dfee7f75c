"""Build one variant and measure its card. Runs inside a worker process (or `pressgate bench`).

Phases: read texts, compress layer by layer into an artifact, compare predictions with the dense
model's, time both side by side. Everything it learns goes into the artifact and the card.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import torch

from cache.disk import DiskStore, EventFn
from cache.manifest import Manifest
from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.experts import active_share
from compressors.forecast import forecast, refusal
from compressors.model import build_skeleton, torch_dtype
from compressors.pages import free_memory
from compressors.pipeline import Host, compress
from compressors.plan import shapes_of
from compressors.recipe import Recipe
from compressors.tensor import LinearForm
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.kernels.store import unpack
from gateway.engine.local import LocalEngine, LocalOptions, LocalRuntime
from gateway.engine.model import Model, VariantWeights, build_model
from gateway.engine.runner import forward_logits
from gateway.engine.tokenizer import load_tokenizer
from gateway.quality.evaluate import Quality, evaluate
from gateway.quality.flops import flops_per_token, linear_flops
from gateway.variants.artifact import ArtifactSink, dense_weights, imported_weights, weights_of
from gateway.variants.card import Card, Speculation
from gateway.variants.measure import Speed, measure_speculation, measure_speed
from gateway.variants.parts import bytes_by_part
from gateway.variants.resume import BuildJournal
from gateway.variants.shared import OUTLINES
from gateway.variants.spec import BuildSpec
from gateway.variants.texts import calibration_of, evaluation_windows

ProgressFn = Callable[[float, str], None]

_MEASURE_SEQS = 16  # as it serves by default: drafts to verify take places, too
_MEASURE_KV_BYTES = 128 * 2**20
_DRAFT_PROMPT, _DRAFT_TEXTS = 48, 16  # tokens, windows that drafts are timed on
_TRAINING = "training"  # in the writer's folder: outlives a kill, and is cleaned up like it
_VERSIONED = ("pressgate", "torch", "transformers", "safetensors")
# Shares of the progress bar: texts and compression, quality, speed.
_COMPRESSED, _JUDGED = 0.7, 0.85


def build(
    spec: BuildSpec,
    progress: ProgressFn,
    on_event: EventFn = lambda _event, _what: None,
) -> dict[str, Any]:
    """Make the artifact `spec.key` unless it exists, and measure its card.

    `on_event` hears what the disk cache did to make room.

    Returns:
        `{"card": {...}}`, JSON-able.

    Raises:
        CompressionError, CacheError: with the layer, file or setting at fault.
    """
    checkpoint = Checkpoint(spec.folder)
    disk = DiskStore(spec.cache_dir, spec.disk_budget, on_event=on_event)
    if spec.imported:
        dense = imported_weights(spec.folder, torch_dtype(spec.compute_dtype))
    else:
        dtype = torch_dtype(spec.dense_dtype)
        dense = dense_weights(checkpoint, dtype, identity=spec.source_digest)
    build_seconds = 0.0
    if spec.key:
        if disk.manifest(spec.key) is None:
            make_artifact(spec, checkpoint, disk, lambda s, m: progress(_COMPRESSED * s, m))
        artifact = disk.read(spec.key)
        if artifact is None:
            raise OSError(f"artifact {spec.key} did not survive being written")
        build_seconds = artifact.manifest.build_seconds
        recipe = Recipe.parse(spec.level)
        dtype = torch_dtype(spec.compute_dtype)
        level = weights_of(artifact, dtype, child=recipe.child)
        stored = artifact.manifest.total_bytes
    else:
        level, stored = dense, checkpoint.total_bytes
    progress(_COMPRESSED, "measuring quality")
    windows = evaluation_windows(spec, checkpoint)
    quality = _quality(
        spec,
        (dense, level),
        windows,
        lambda s: progress(_COMPRESSED + (_JUDGED - _COMPRESSED) * s, "measuring quality"),
    )
    progress(_JUDGED, "measuring speed")
    torch.set_num_threads(spec.serve_threads)
    card = _card(spec, quality, level)
    sizes = {
        "stored_bytes": stored,
        "compression_ratio": checkpoint.total_bytes / max(stored, 1),
        "build_seconds": build_seconds,
    }
    speeds = {}
    if spec.measure_speed:
        speeds = asyncio.run(_speeds(spec, dense, level, (disk, windows)))
    return {"card": card.model_copy(update=sizes | speeds).model_dump(mode="json")}


def make_artifact(
    spec: BuildSpec, checkpoint: Checkpoint, disk: DiskStore, progress: ProgressFn
) -> None:
    """Compress the checkpoint into the artifact `spec.key`; going on where a killed one stopped.

    Raises:
        CompressionError, CacheError: as `build`.
    """
    began = time.monotonic()
    recipe = Recipe.parse(spec.level).parent
    calibration = None
    if recipe.needs_calibration:
        progress(0.0, "preparing calibration text")
        calibration = calibration_of(spec, checkpoint)
    skeleton = build_skeleton(checkpoint.config)
    shapes = shapes_of(skeleton, next(skeleton.parameters()).element_size())
    expected = forecast(shapes, recipe, threads=spec.threads, device=spec.device)
    if why := refusal(recipe, expected, free_memory()):
        raise CompressionError(why)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    text = calibration.digest if calibration is not None else ""
    with disk.writer(spec.key, resume=True) as writer:
        sink = ArtifactSink(writer)
        same = {"versions": versions, "calibration": text}
        journal = BuildJournal(writer, sink, same, every=spec.note_seconds)
        report = compress(
            checkpoint,
            recipe,
            sink=sink,
            calibration=calibration,
            progress=lambda share, message: progress(0.2 + 0.8 * share, message),
            seed=spec.seed,
            host=Host(
                device=spec.device,
                threads=spec.threads,
                journal=journal,
                scratch=writer.folder / _TRAINING,
                texts=spec.cache_dir / "texts",
            ),
        )
        tensors, modules = sink.records()
        writer.commit(
            Manifest(
                key=spec.key,
                model=spec.model,
                revision=spec.revision,
                recipe=recipe.name,
                source_digest=spec.source_digest,
                calibration_digest=text,
                seed=spec.seed,
                versions=versions,
                config=sink.model_config,
                tensors=tensors,
                modules=modules,
                build_seconds=time.monotonic() - began,
                report=report.to_json()
                | {"parts": bytes_by_part(tensors, modules), "forecast": asdict(expected)},
            )
        )


def _quality(
    spec: BuildSpec,
    pair: tuple[VariantWeights, VariantWeights],
    windows: torch.Tensor,
    progress: Callable[[float], None],
) -> Quality:
    """Compare the level with the dense model on held-out windows, as both will be served."""
    dense, level = pair
    reference = build_model(dense, device=spec.device)
    candidate = reference if level is dense else build_model(level, device=spec.device)

    def run(model: Model) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: forward_logits(model, ids)

    return evaluate(run(reference), run(candidate), windows, seed=spec.seed, progress=progress)


def _card(spec: BuildSpec, quality: Quality, level: VariantWeights) -> Card:
    model = build_model(level, device=spec.device)
    return Card(
        measured=True,
        resident_bytes=model.resident_bytes,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity_ratio,
        perplexity_ratio_low=quality.ratio_low,
        perplexity_ratio_high=quality.ratio_high,
        kl_nats=quality.kl_nats,
        top1_agreement=quality.top1_agreement,
        flips=quality.flips,
        quality_windows=quality.windows,
        flops_per_token=_flops(model, level),
    )


def _flops(model: Model, level: VariantWeights) -> int:
    """Operations per token, of experts only those that a token goes through."""
    shares = active_share(model.module)

    def cost(name: str, weight: LinearForm | tuple[int, int]) -> int:
        owner = name.rpartition(".")[0].rpartition(".")[0]
        return int(linear_flops(weight) * shares.get(owner, 1.0))

    done = {"lm_head", *level.linears}
    total = flops_per_token(level.config, {}, context=model.context_length // 2).total
    for name, module in model.module.named_modules():
        inside = any(part in done for part in (name, *_parents(name)))
        if isinstance(module, (torch.nn.Linear, KernelLinear)) and not inside:
            total += cost(name, (module.out_features, module.in_features))
    for name, stored in level.linears.items():  # one unpacked at a time
        total += cost(name, unpack(stored)) if name != "lm_head" else 0
    return total


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


async def _speeds(
    spec: BuildSpec,
    dense: VariantWeights,
    level: VariantWeights,
    given: tuple[DiskStore, torch.Tensor],
) -> dict[str, Any]:
    """Rates of the level, its speed-up over dense timed in the same minutes, seconds to load.

    Args:
        given: where drafting levels are stored, and the texts to time them on.
    """
    tokenizer = load_tokenizer(spec.folder)
    async with AsyncExitStack() as stack:
        runtime = LocalRuntime(
            LocalOptions(
                device="cuda" if spec.device == "cuda" else "cpu",
                threads=spec.serve_threads,
                max_num_seqs=_MEASURE_SEQS,
                kv_bytes=_MEASURE_KV_BYTES,
                prefix_cache=False,
                outlines=spec.cache_dir / OUTLINES,
            )
        )
        stack.push_async_callback(runtime.close)
        name = f"@{spec.level}"
        once = await runtime.load(name, level, tokenizer)
        await once.close()  # it is settled now, as servers will find it
        began = time.monotonic()
        engines: dict[str, LocalEngine] = {"level": await runtime.load(name, level, tokenizer)}
        load_seconds = time.monotonic() - began
        if level is not dense:
            engines["dense"] = await runtime.load("dense", dense, tokenizer)
        speeds: dict[str, Speed] = await measure_speed(
            engines,
            vocab_size=tokenizer.vocab_size,
            context_length=engines["level"].context_length,
            seed=spec.seed,
        )
        speculation = await _speculation(spec, runtime, engines["level"], given)
    mine, base = speeds["level"], speeds.get("dense", speeds["level"])
    return {
        "prefill_tokens_per_s": mine.prefill_tokens_per_s,
        "decode_tokens_per_s": mine.decode_tokens_per_s,
        "speculation": speculation,
        "speedup": mine.decode_tokens_per_s["1"] / base.decode_tokens_per_s["1"],
        "prefill_speedup": mine.prefill_tokens_per_s / base.prefill_tokens_per_s,
        "load_seconds": load_seconds,
    }


async def _speculation(
    spec: BuildSpec,
    runtime: LocalRuntime,
    engine: LocalEngine,
    given: tuple[DiskStore, torch.Tensor],
) -> Speculation | None:
    """How fast the level decodes with drafts; None where nobody may draft for it."""
    disk, windows = given
    if spec.drafters is None or Recipe.parse(spec.level).step("kv") is not None:
        return None
    for level, key in spec.drafters:
        artifact = disk.read(key) if key else None
        if artifact is not None:
            dtype, child = torch_dtype(spec.compute_dtype), Recipe.parse(level).child
            weights = weights_of(artifact, dtype, child=child)
            await runtime.load(f"@{level}", weights, engine.tokenizer)
    room = max(1, min(_DRAFT_PROMPT, engine.context_length // 4))
    return await measure_speculation(
        engine,
        runtime.speculate,
        [level for level, _ in spec.drafters],
        windows[:_DRAFT_TEXTS, :room].tolist(),
    )
