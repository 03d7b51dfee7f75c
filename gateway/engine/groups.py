"""Who shares which KV pool: variants of one layout share one, layouts share the budget evenly.

Owns the pools and their schedulers; knows sequences only to say which of them no longer fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from gateway.engine.attention import Layout, Pool
from gateway.engine.kv_cache import BlockPool
from gateway.engine.kv_quant import make_pool
from gateway.engine.model import Model
from gateway.engine.runners import StepRunner
from gateway.engine.scheduler import Limits, Scheduler, Sequence
from gateway.engine.speculate import OFF
from gateway.errors import Unavailable

_POOL_LIVES = 4  # a pool holds at most this many full batches of full contexts (reuse included)


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """Settings of a local runtime. `kv_bytes` bounds all KV pools, `threads` is torch's count,
    `speculate` is who drafts: `off`, `auto`, a drafter of `drafters.DRAFTERS` or a level;
    `outlines` is the folder where models' outlines are kept."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    max_num_seqs: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256
    block_size: int = 16
    kv_bytes: int = 256 * 2**20
    prefix_cache: bool = True
    speculate: str = OFF
    outlines: Path | None = None


class Member(Protocol):
    """A variant, as far as its pool is concerned."""

    @property
    def model(self) -> Model: ...

    @property
    def runner(self) -> StepRunner: ...


@dataclass(slots=True)
class Group:
    """Variants of one KV layout: their pool and their scheduler."""

    layout: Layout
    tensors: Pool
    scheduler: Scheduler
    context: int
    members: dict[str, Member] = field(default_factory=dict)

    def release(self) -> None:
        """Let go of the pool's tensors before the next are made, so that both never exist."""
        for member in self.members.values():
            for slot in member.model.slots:
                slot.kv = None
        self.tensors.clear()


class Groups:
    """The groups of all loaded variants. Iterates over them."""

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._groups: dict[Layout, Group] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(group.tensors.nbytes for group in self)

    def find(self, model: Model) -> tuple[Group, list[Sequence]]:
        """The group of a model's layout, made if it is the first; and the sequences that can never
        fit the smaller pools of the others, removed from their schedulers.

        Raises:
            Unavailable: the KV budget has no room for its layout.
        """
        layout, options = model.layout, self._options
        if layout in self._groups:
            return self._groups[layout], []
        blocks = self._blocks(layout, model.context_length, len(self._groups) + 1)
        if blocks < 2 + layout.tail_blocks:
            raise Unavailable(
                f"the KV cache of {options.kv_bytes} bytes has no room for another layout"
            )
        lost = self._share_out(len(self._groups) + 1)
        tensors = make_pool(layout, blocks, options.block_size, options.device)
        limits = Limits(options.max_num_seqs, options.max_waiting, options.prefill_chunk)
        scheduler = Scheduler(self._books(layout, blocks), limits, layout.tail_blocks)
        self._groups[layout] = Group(layout, tensors, scheduler, model.context_length)
        return self._groups[layout], lost

    def leave(self, group: Group, name: str) -> None:
        """Remove a member; the last one gives its pool's memory to the others."""
        del group.members[name]
        if not group.members:
            del self._groups[group.layout]
            lost = self._share_out(len(self._groups))
            assert not lost, "pools only grow when one leaves"

    def _share_out(self, shares: int) -> list[Sequence]:
        """Give every present layout its part of the KV budget; sequences are recomputed."""
        lost: list[Sequence] = []
        options = self._options
        for group in self:
            layout = group.layout
            blocks = max(2 + layout.tail_blocks, self._blocks(layout, group.context, shares))
            if blocks == group.tensors.num_blocks:
                continue
            lost += group.scheduler.replace_pool(self._books(layout, blocks))
            group.release()
            group.tensors = make_pool(layout, blocks, options.block_size, options.device)
            for member in group.members.values():
                member.runner.bind(group.tensors)
        return lost

    def _books(self, layout: Layout, blocks: int) -> BlockPool:
        size = layout.block_size(self._options.block_size)
        return BlockPool(blocks, size, reuse=self._options.prefix_cache)

    def _blocks(self, layout: Layout, context: int, shares: int) -> int:
        size = layout.block_size(self._options.block_size)
        affordable = self._options.kv_bytes // shares // layout.block_bytes(size)
        each = -(-context // size) + layout.tail_blocks
        useful = _POOL_LIVES * self._options.max_num_seqs * each + 1
        return min(affordable, useful)
