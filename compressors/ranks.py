"""Choosing the rank of every linear of a model: one walk forward over a little text, one back.

Owns the passes and the statistics between them; what a rank costs is `lowrank.sensitivity`'s. Only
the block that is walked through has weights in memory; the hidden states before the others wait in
16 bits in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressors import gram as grams
from compressors.base import CompressionError
from compressors.gram import Gram
from compressors.lowrank import sensitivity
from compressors.model import weight_of
from compressors.plan import LinearPlan, Plan
from compressors.walk import Source, Walk

_TOKENS = 8192  # enough to rank directions; the factors themselves are made on all of the text
Said = Callable[[float, str], None]


def share_ranks(
    plan: Plan, windows: Tensor, percent: int, said: Said, *, device: torch.device | str = "cpu"
) -> Plan:
    """The plan with ranks by sensitivity; together they keep `percent` of the parameters.

    Linears that the text never reaches keep the rank they have.

    Args:
        windows: calibration tokens, int64 [n, length].
        said: called with the share done and what is being measured.

    Raises:
        CompressionError: the model's loss has no finite gradient; names the linear.
    """
    losses = _Backward(plan, windows, said, device).losses
    rows = {row.module: row for block in plan.linears for row in block}
    reached = [module for module in rows if module in losses]
    shapes = [rows[module].shape for module in reached]
    ranks = sensitivity.allocate([losses[module] for module in reached], shapes, percent)
    chosen = dict(zip(reached, ranks, strict=True))
    linears = [
        [_with_rank(row, chosen[row.module]) if row.module in chosen else row for row in block]
        for block in plan.linears
    ]
    return replace(plan, linears=linears)


def _with_rank(row: LinearPlan, rank: int | None) -> LinearPlan:
    if rank is not None:
        return replace(row, rank=rank)
    steps = tuple(step for step in row.steps if step.kind != "lowrank")
    note = "; ".join(filter(None, (row.note, "needs all its ranks: not factored")))
    return replace(row, rank=0, steps=steps, note=note)


class _Backward:
    """Walks forward, then back block by block with the gradient of the model's own loss.

    Attributes:
        losses: module → what its directions are worth (`sensitivity.direction_losses`).
    """

    def __init__(self, plan: Plan, windows: Tensor, said: Said, device: torch.device | str) -> None:
        enough = max(1, _TOKENS // windows.shape[1])
        self._plan, self._said = plan, said
        self._walk = Walk(plan.source, windows[:enough], device=device)
        self.losses: dict[str, Tensor] = {}
        with TemporaryDirectory(prefix="pressgate-ranks-") as folder:
            self._forward(plan.source, Path(folder))
            gradients = [
                self._loss_gradient(tokens, hidden)
                for tokens, hidden in zip(self._walk.tokens, self._walk.hidden, strict=True)
            ]
            count = len(plan.source.blocks)
            for index in reversed(range(count)):
                said(1.0 - (index + 1) / (2 * count), f"ranks: block {index} backward")
                kept = load_file(_file(Path(folder), index), device=str(self._walk.device))
                before = [kept[str(batch)] for batch in range(len(gradients))]
                gradients = self._backward(index, before, gradients)

    def _forward(self, source: Source, folder: Path) -> None:
        """Leaves the hidden states before every block in `folder`."""
        for index in range(len(source.blocks)):
            before = {
                str(batch): hidden.to("cpu", torch.bfloat16).contiguous()
                for batch, hidden in enumerate(self._walk.hidden)
            }
            save_file(before, _file(folder, index))
            self._said(index / (2 * len(source.blocks)), f"ranks: block {index}")
            self._walk.load(index)
            self._walk.advance(index)
            self._walk.free(index)

    def _loss_gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """d loss / d hidden after the last block, the loss being that of every next token."""
        parts = []
        for row in range(len(tokens)):  # logits of a large vocabulary are the largest tensors here
            one = slice(row, row + 1)
            with torch.enable_grad():
                given = hidden[one].detach().requires_grad_()
                logits = self._walk.head(tokens[one], given)[0, :-1].float()
                loss = F.cross_entropy(logits, tokens[row, 1:], reduction="sum")
                parts.append(torch.autograd.grad(loss, given)[0])
        return torch.cat(parts)

    def _backward(self, index: int, before: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Measure the linears of a block; the gradients before it."""
        block = self._walk.load(index)
        rows = {row.name: row for row in self._plan.linears[index] if row.rank}
        seen = _Seen(block, rows, self._walk.device)
        results = []
        for hidden, gradient in zip(before, gradients, strict=True):
            with torch.enable_grad(), seen.watching():
                given = hidden.to(gradient.dtype).requires_grad_()
                out = self._walk.compute(index, given)
                results.append(torch.autograd.grad(out, given, gradient)[0])
        for name, row in rows.items():
            if not seen.gradients[name].tokens:
                continue
            weight = weight_of(block.get_submodule(name)).float()
            try:
                self.losses[row.module] = sensitivity.direction_losses(
                    weight, seen.inputs[name], seen.gradients[name]
                )
            except ValueError as error:
                raise CompressionError(f"{row.module}: {error}") from error
        self._walk.free(index)
        return results


def _file(folder: Path, index: int) -> Path:
    """Where the hidden states before block `index` wait."""
    return folder / f"{index}.safetensors"


class _Seen:
    """Second moments of the inputs and output gradients of a block's linears."""

    def __init__(
        self, block: nn.Module, rows: Mapping[str, LinearPlan], device: torch.device | str
    ) -> None:
        self._block = block
        self.inputs: dict[str, Gram] = {n: grams.empty(r.shape[1], device) for n, r in rows.items()}
        self.gradients = {n: grams.empty(r.shape[0], device) for n, r in rows.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs forward and back."""
        handles = [
            self._block.get_submodule(name).register_forward_hook(self._hook(name))
            for name in self.inputs
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if not out.requires_grad:
                return
            grams.accumulate(self.inputs[name], args[0].detach())
            kept = partial(grams.accumulate, self.gradients[name])
            out.register_hook(kept)  # type: ignore[no-untyped-call]

        return see
