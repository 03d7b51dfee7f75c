"""Which code runs a model's steps: transformers' own module, or a thin runner of its parts.

A thin runner computes the same from `Model.decoder` without transformers' Python between the
operations. There is one per kind of device (`THIN`); where it is missing, does not know the model,
or gives another answer than transformers does, the module itself runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gateway.engine.attention import Pool
from gateway.engine.kv_quant import make_pool
from gateway.engine.model import Model
from gateway.engine.runner import Runner
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens

log = logging.getLogger(__name__)

# Device type → module with `make(model, pool, max_batch) -> StepRunner | None`.
THIN = {
    "cpu": "gateway.engine.native_runner",
    "cuda": "gateway.engine.cuda.runner",
}
_BLOCK = 16
_PROMPT = 21  # tokens: more than a block, an odd number, cut into two chunks
# Relative difference of logits: fp32 sums in another order, bf16 rounds in other places.
_AGREE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class StepRunner(Protocol):
    """Runs a model's steps on a KV pool. One thread at a time."""

    def bind(self, pool: Pool) -> None:
        """Use (another) pool of the model's layout."""
        ...

    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        """Compute the last token of every sequence; fp32 logits [batch, vocab] of what follows."""
        ...

    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        """Compute chunks; for each the fp32 logits [n, vocab] after its last token, or after all
        its tokens where `every` says so."""
        ...


@runtime_checkable
class AheadRunner(StepRunner, Protocol):
    """A runner whose calls only enqueue work on one stream of its device."""

    def decode_from(self, batch: Sequence[Tokens], ids: Tensor) -> Tensor:
        """`decode` with the sequences' last tokens from the device, `ids` int64 [batch]: some are
        `scheduler.UNKNOWN` in the sequences themselves."""
        ...


class MixedRunner(StepRunner, Protocol):
    """A runner that computes a decode batch and chunks of prompts in one pass over the weights."""

    def mixed(
        self, batch: Sequence[Tokens], chunks: Sequence[Chunk], every: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor]] | None:
        """What `decode` and `prefill` would give; None: this takes two passes."""
        ...


def make_runner(model: Model, pool: Pool, *, max_batch: int) -> StepRunner:
    """The fastest runner this host has for the model."""
    return _thin(model, pool, max_batch) or Runner(model, pool, max_batch=max_batch)


def _thin(model: Model, pool: Pool, max_batch: int) -> StepRunner | None:
    if model.decoder is None or pool.device.type not in THIN:
        return None
    runner: StepRunner | None = import_module(THIN[pool.device.type]).make(model, pool, max_batch)
    return runner


@torch.inference_mode()
def settle(model: Model, *, max_batch: int = 2) -> Model:
    """The model, without its parts where a thin runner of them is not what transformers computes.

    Takes two short prompts' time, and that of compiling what steps of up to `max_batch` sequences
    need; call it before the model serves.
    """
    layout = model.layout
    if model.decoder is None:
        return model
    try:
        thin = _thin(model, _short_pool(model), max_batch)
        ours = None if thin is None else _short_run(thin, model)
        if thin is not None and hasattr(thin, "warm"):
            thin.warm()
    except Exception:  # a compiler that is missing, a device too small: the module needs neither
        log.exception("%s is run by transformers' own code", type(model.module).__name__)
        return replace(model, decoder=None)
    if ours is None:
        return replace(model, decoder=None)
    theirs = _short_run(Runner(model, _short_pool(model), max_batch=2), model)
    for slot in model.slots:
        slot.kv = None
    difference = float((ours - theirs).norm() / (theirs - theirs.mean(-1, keepdim=True)).norm())
    if difference <= _AGREE.get(layout.dtype, 0.0):
        return model
    log.warning(
        "%s is run by transformers' own code: its parts as we read them give logits that differ "
        "by %.3g",
        type(model.module).__name__,
        difference,
    )
    return replace(model, decoder=None)


@torch.inference_mode()
def same(model: Model, other: Model) -> bool:
    """Whether thin runners of two models give the very same logits; both have one."""
    found = []
    for one in (model, other):
        runner = _thin(one, _short_pool(one), 2)
        found.append(None if runner is None else _short_run(runner, one))
        for slot in one.slots:
            slot.kv = None
    return found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def _short_pool(model: Model) -> Pool:
    """Room for `_short_run`."""
    layout, device = model.layout, str(next(model.module.parameters()).device)
    size = layout.block_size(_BLOCK)
    return make_pool(layout, 1 + layout.tail_blocks - (-(_PROMPT + 1) // size), size, device)


def _short_run(runner: StepRunner, model: Model) -> Tensor:
    """fp32 logits [n, vocab] of a prompt in two chunks and of one decode step."""
    tail, size = model.layout.tail_blocks, model.layout.block_size(_BLOCK)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (_PROMPT + 1,), generator=generator).tolist()
    table = list(range(1 + tail, 1 + tail - (-(_PROMPT + 1) // size)))
    seq = Tokens("", _PROMPT, 0, ids[:-1], blocks=table, tail=list(range(1, 1 + tail)))
    half = _PROMPT // 2
    rows = runner.prefill([Chunk(seq, 0, half)], [True])
    rows += runner.prefill([Chunk(seq, half, _PROMPT - half)], [True])
    seq.tokens.append(ids[-1])
    rows.append(runner.decode([seq]))
    return torch.cat(rows).float().cpu()
