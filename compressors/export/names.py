"""Which level a checkpoint from elsewhere is: the name that the gateway serves it under."""

from __future__ import annotations

from compressors.grammar import BITS
from compressors.recipe import Recipe, RecipeError


def level_name(method: str, bits: int, group: int | None, *, symmetric: bool = False) -> str:
    """`int<bits>-<method>-g<group>`, the nearest legal name.

    Args:
        method: who made the codes; `rtn` where that is not known or the method has no such level.
        group: columns per scale; None or -1 for per channel.
    """
    width = min((b for b in BITS if b >= bits), default=max(BITS))
    columns = "ch" if group is None or group < 0 else str(min(4096, max(8, -(-group // 8) * 8)))
    if (width, columns, symmetric) == (8, "ch", True):
        return "int8"
    sym = "-sym" if symmetric and width < 8 else ""
    for name in (
        f"int{width}-{method}-g{columns}{sym}",
        f"int{width}-{method}-g{columns}",
        f"int{width}-rtn-g{columns}",
    ):
        try:
            return Recipe.parse(name).name
        except RecipeError:
            continue
    return f"int4-rtn-g{columns}"
