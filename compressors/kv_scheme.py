"""How a quantized KV cache lies in memory: sizes of codes and scales, in bytes. Torch-free.

The numbers behind `kv8` and `kv4`: what a block of tokens costs, so that schedulers, budgets and
deciders count the bytes that are really used. The tensors are `compressors.quantize.kv`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressors.recipe import Recipe

GROUP = 32  # tokens whose keys share a scale per channel, as KIVI's
VALUE_CHANNELS = 64  # of one token's values that share a scale, at most
TAIL_CHANNELS = 32  # of one token's keys that share a scale while their group is incomplete
TAIL_BITS = 8
PARAMETERS = 2  # bytes of a scale and a zero point
_LEAST = 8  # channels; smaller groups would cost more than they are worth


@dataclass(frozen=True, slots=True)
class KVScheme:
    """Widths and groups of a quantized KV cache.

    Attributes:
        bits: of a code, 8 or 4 (two codes a byte).
        group: tokens per group of keys; also the tokens of a KV block. Even.
    """

    bits: int
    group: int = GROUP

    def key_bytes(self, dim: int) -> int:
        """Keys of one head in one complete group: codes [group, dim], parameters per channel."""
        return self.group * self._codes(dim) + PARAMETERS * dim

    def value_bytes(self, dim: int) -> int:
        """One token's values of one head."""
        return self._codes(dim) + PARAMETERS * channel_groups(dim, VALUE_CHANNELS)

    def tail_bytes(self, dim: int) -> int:
        """One token's keys of one head, while its group is incomplete."""
        return dim + PARAMETERS * channel_groups(dim, TAIL_CHANNELS)

    @property
    def tail_blocks(self) -> int:
        """Blocks a running sequence holds for the keys of its incomplete group.

        At 8 bits they lie where the group's codes will be; at 4 bits they need a block's room.
        """
        return 0 if self.bits >= TAIL_BITS else 1

    def key_room(self, heads: int, dim: int) -> int:
        """Bytes that a block keeps for keys."""
        tail = 0 if self.tail_blocks else self.group * self.tail_bytes(dim)
        return heads * max(self.key_bytes(dim), tail)

    def block_bytes(self, heads: int, key_dim: int, value_dim: int) -> int:
        """One layer's bytes of a block of `group` tokens; a block can also hold a tail."""
        values = heads * self.group * self.value_bytes(value_dim)
        tail = heads * self.group * self.tail_bytes(key_dim)
        return max(self.key_room(heads, key_dim) + values, tail)

    def _codes(self, dim: int) -> int:
        return -(-dim * self.bits // 8)


def channel_groups(dim: int, most: int) -> int:
    """Into how many equal groups of at most `most` channels a head is cut; 1 if it cannot be."""
    for count in range(-(-dim // most), dim // _LEAST + 1):
        if dim % count == 0:
            return count
    return 1


def scheme_of(recipe: Recipe) -> KVScheme | None:
    """How a level's KV cache is quantized; None: it is not."""
    step = recipe.step("kv")
    return None if step is None else KVScheme(step.bits)
