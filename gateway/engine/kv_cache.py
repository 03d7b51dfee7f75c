"""Block accounting of one KV pool: who holds which block, what may be reused, what is evicted.

Owns numbers only (torch-free): the tensors live in `attention.KVPool`. Block 0 is scratch, written
by the padding rows of a batch, and is never handed out. A block is *held* (reference count > 0),
*cached* (no holder, contents still valid under its key; evicted in LRU order) or *free*.

A key chains a digest over all tokens before and in the block (as vLLM's automatic prefix caching)
from a root that names the variant: KV of two variants is never shared, and a cryptographic digest
keeps one caller from forging another's prefix.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Key = bytes


def root_key(variant: str) -> Key:
    """The key before the first block of `variant`."""
    return blake2b(variant.encode(), digest_size=16).digest()


def chain_key(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block holding `tokens` after the prefix that `parent` stands for."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference-counted blocks with an LRU of reusable ones. Single owner, not thread-safe."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks, got {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._reuse = reuse
        # popped from the end: low numbers first, so that little memory is ever touched
        self._free = list(range(num_blocks - 1, 0, -1))
        self._refs: dict[int, int] = {}
        self._cached: OrderedDict[int, Key] = OrderedDict()
        self._key_of: dict[int, Key] = {}
        self._block_of: dict[Key, int] = {}

    @property
    def total(self) -> int:
        """Blocks that can be handed out."""
        return self.num_blocks - 1

    @property
    def used(self) -> int:
        """Blocks some sequence holds."""
        return len(self._refs)

    @property
    def available(self) -> int:
        """Blocks `allocate` could hand out now, evicting cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting the least recently used cached ones; None if too few."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _key = self._cached.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def lookup(self, keys: Iterable[Key]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is stored; takes nothing."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds, i.e. what holding them takes off `available`."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to stored blocks that `lookup` found."""
        for block in blocks:
            self._cached.pop(block, None)
            self._refs[block] = self._refs.get(block, 0) + 1

    def store(self, block: int, key: Key) -> None:
        """Declare that a held block is full and its contents stand for `key`."""
        if self._reuse and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one holder of each block, last block first so that prefixes outlive their tails."""
        for block in reversed(list(blocks)):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            del self._refs[block]
            key = self._key_of.get(block)
            if key is None:
                self._free.append(block)
            else:
                self._cached[block] = key

    def drop_cached(self) -> None:
        """Forget every reusable block without a holder."""
        for block in list(self._cached):
            self._forget(block)
            self._free.append(block)
        self._cached.clear()

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with `tables`, the holders' block lists."""
        holders = Counter(block for table in tables for block in table)
        assert dict(holders) == self._refs, "reference counts differ from the holders' tables"
        groups = [set(self._free), set(self._cached), set(self._refs)]
        assert len(self._free) == len(groups[0]), "a block is twice in the free list"
        assert sum(map(len, groups)) == self.total, "a block is lost or in two states"
        assert set().union(*groups) == set(range(1, self.num_blocks))
        assert {b: k for k, b in self._block_of.items()} == self._key_of
        assert dict(self._cached).items() <= self._key_of.items()
        assert not groups[0] & self._key_of.keys(), "a free block still has a key"
