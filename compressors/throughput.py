"""How fast methods are on this machine: `python -m compressors.throughput`, JSON on stdout.

Compresses the linears of decoder blocks of random weights, in the shapes of a Llama, layer after
layer as the pipeline does it (threads on a CPU, linears of one input together on a GPU), without
files. Methods that need text get random inputs; the time they take for their statistics counts, the
model's own forward passes do not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.apply import compress_linear
from compressors.observe import Observer
from compressors.parallel import Lanes
from compressors.plan import LinearPlan
from compressors.recipe import Recipe
from compressors.tensor import LinearForm
from compressors.together import compress_together

_BATCH = 4096  # tokens of one accumulation
Groups = list[dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class Shape:
    """A Llama's decoder block. `groups`: linears of one input as {name: (N, K)}."""

    hidden: int = 4096
    inter: int = 14336
    heads: int = 32
    kv_heads: int = 8

    @property
    def groups(self) -> Groups:
        kv = self.hidden // self.heads * self.kv_heads
        h, i = self.hidden, self.inter
        return [
            {"q": (h, h), "k": (kv, h), "v": (kv, h)},
            {"o": (h, h)},
            {"gate": (i, h), "up": (i, h)},
            {"down": (h, i)},
        ]

    @property
    def weights(self) -> int:
        return sum(n * k for group in self.groups for n, k in group.values())


def random_block(shape: Shape, device: str) -> nn.Module:
    """bf16 linears with weights of a usual spread."""
    block = nn.Module()
    for group in shape.groups:
        for name, (n, k) in group.items():
            linear = nn.Linear(k, n, bias=False, device="meta")
            weight = torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            block.add_module(name, linear)
    return block


def _inputs(width: int, tokens: int, device: str) -> Tensor:
    """Correlated inputs [tokens, width]: a few strong directions and noise."""
    mix = torch.randn(64, width, device=device)
    return torch.randn(tokens, 64, device=device) @ mix + torch.randn(tokens, width, device=device)


def _block(
    block: nn.Module, groups: Groups, recipe: Recipe, lanes: Lanes, tokens: int
) -> tuple[float, float]:
    """Seconds for the statistics and for the solving of one block."""
    device = next(block.parameters()).device.type
    methods = [step.method for step in recipe.steps if step.needs_calibration]
    seen, solved = 0.0, 0.0
    for group in groups:
        rows = [LinearPlan(name, name, size, recipe.steps) for name, size in group.items()]
        observer = Observer(methods, rows[0].shape[1], device)
        if methods:
            x = _inputs(rows[0].shape[1], min(tokens, _BATCH), device)
            began = _now(device)
            for _ in range(max(1, tokens // _BATCH)):
                observer(x)
            seen += _now(device) - began
        began = _now(device)
        _solve(block, rows, observer, lanes, device)
        solved += _now(device) - began
    return seen, solved


def _solve(
    block: nn.Module, rows: Sequence[LinearPlan], observer: Observer, lanes: Lanes, device: str
) -> None:
    if device != "cpu" and compress_together(block, rows, observer.statistics):
        return

    def compress(row: LinearPlan) -> LinearForm:
        weight = block.get_submodule(row.name).get_parameter("weight")
        return compress_linear(
            weight.float(), row.steps, observer.statistics, rank=row.rank, dtype=weight.dtype
        )

    for _ in lanes.map(compress, rows):
        pass


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    level: str, shape: Shape, *, layers: int, tokens: int, threads: int | None, device: str
) -> dict[str, Any]:
    """Seconds and rates of one level over `layers` blocks (a first one is not counted)."""
    recipe = Recipe.parse(level)
    block = random_block(shape, device)
    with Lanes(threads if device == "cpu" else 1) as lanes:
        _block(block, shape.groups, recipe, lanes, min(tokens, _BATCH))
        times = [_block(block, shape.groups, recipe, lanes, tokens) for _ in range(layers)]
    seen, solved = (sum(column) for column in zip(*times, strict=True))
    dense = 2 * shape.weights * layers
    return {
        "level": level,
        "layers": layers,
        "dense_gb": round(dense / 1e9, 3),
        "statistics_s": round(seen, 3),
        "solve_s": round(solved, 3),
        "gb_per_s": round(dense / 1e9 / (seen + solved), 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compressors.throughput", description=__doc__)
    parser.add_argument("--levels", default="int8,int4-rtn-g64,int4-hqq-g64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; what torch would use if left out")
    parser.add_argument("--layers", type=int, default=1, help="blocks to measure")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    for name in ("hidden", "inter", "heads", "kv-heads"):
        default = getattr(Shape, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    shape = Shape(options.hidden, options.inter, options.heads, options.kv_heads)
    for level in options.levels.split(","):
        facts = measure(
            level,
            shape,
            layers=options.layers,
            tokens=options.tokens,
            threads=options.threads,
            device=options.device,
        )
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
