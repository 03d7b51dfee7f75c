"""How steps are written: one spelling per kind of name. Adding a kind is one entry. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from compressors.registry import METHODS, Kind, variants
from compressors.stack import RecipeError
from compressors.step import Step

Dtype = Literal["fp32", "bf16", "fp16"]
BITS = (2, 3, 4, 8)
_MIN_GROUP, _MAX_GROUP = 8, 4096
_MIN_PERCENT, _MAX_PERCENT = 5, 99
_MAX_RANK = 1024


def grammar() -> str:
    """One line that lists every kind of level name; used in error messages and help."""
    return "; ".join(
        [
            ", ".join(get_args(Dtype)),
            *(s.shown() for s in _SPELLINGS if s.kind in _kinds()),
            "stacks joined by '+'",
        ]
    )


def _kinds() -> set[Kind]:
    return {method.kind for method in METHODS.values()}


def _method_of(part: str, variant: str, kind: Kind, spelled: str = "settings") -> str:
    known = [v for v in variants(kind) if METHODS[_key(v, kind)].spelled == spelled]
    if variant not in known:
        raise RecipeError(f"{part!r}: unknown method {variant!r}; known here: {', '.join(known)}")
    return _key(variant, kind)


def _key(variant: str, kind: Kind) -> str:
    return next(k for k, m in METHODS.items() if (m.variant, m.kind) == (variant, kind))


def _only(kind: Kind) -> str:
    """The one method of a kind that has one."""
    return next(key for key, method in METHODS.items() if method.kind == kind)


def _percent(part: str, digits: str) -> int:
    if not _MIN_PERCENT <= int(digits) <= _MAX_PERCENT:
        raise RecipeError(f"{part!r}: percent must be {_MIN_PERCENT} to {_MAX_PERCENT}")
    return int(digits)


def _group(part: str, text: str) -> int | None:
    columns = None if text == "ch" else int(text)
    if columns is not None and not (
        _MIN_GROUP <= columns <= _MAX_GROUP and columns % _MIN_GROUP == 0
    ):
        raise RecipeError(
            f"{part!r}: group must be a multiple of {_MIN_GROUP} from {_MIN_GROUP} to "
            f"{_MAX_GROUP}, or 'ch' for per channel"
        )
    return columns


def _read_int(part: str, match: re.Match[str]) -> Step:
    key = _method_of(part, match[2], "quantize")
    bits, method = int(match[1]), METHODS[key]
    if bits not in BITS:
        raise RecipeError(f"{part!r}: bits must be one of {', '.join(map(str, BITS))}")
    if bits not in method.prior:
        allowed = ", ".join(map(str, sorted(method.prior)))
        raise RecipeError(f"{part!r}: {match[2]} does {allowed} bits")
    options = match[4].split("-")[1:]
    if unknown := set(options) - method.options:
        allowed = ", ".join(sorted(method.options)) or "none"
        raise RecipeError(f"{part!r}: {match[2]} has no option {unknown.pop()!r}; it has {allowed}")
    return Step(
        key,
        "quantize",
        bits=bits,
        group=_group(part, match[3]),
        symmetric=bits >= method.symmetric_from or "sym" in options,
        act_order="act" in options,
    )


def _read_nested(part: str, match: re.Match[str]) -> Step:
    base, child = _method_of(part, match[1], "quantize"), int(match[3] or 0)
    if METHODS[base].whole_model or not METHODS[base].nests:
        nests = ", ".join(m.variant for m in METHODS.values() if m.nests)
        raise RecipeError(f"{part!r}: {match[1]} cannot be the high half; {nests} can")
    group = _group(part, match[2])
    return Step("nested", "quantize", bits=8, group=group, base=base, child=child)


def _read_sparse(part: str, match: re.Match[str]) -> Step:
    key = _method_of(part, match[2], "sparse")
    if int(match[1]) not in METHODS[key].prior:
        allowed = ", ".join(f"sparse{p}-{match[2]}" for p in sorted(METHODS[key].prior))
        raise RecipeError(f"{part!r}: {match[2]} does {allowed}")
    return Step(key, "sparse", pattern=match[1], percent=50)


def _read_rank(part: str, match: re.Match[str]) -> Step:
    if not 1 <= int(match[1]) <= _MAX_RANK:
        raise RecipeError(f"{part!r}: rank must be 1 to {_MAX_RANK}")
    return Step(_only("correct"), "correct", rank=int(match[1]))


@dataclass(frozen=True)
class _Spelling:
    """How steps of one kind are written, read, and shown to who got it wrong."""

    kind: Kind
    pattern: re.Pattern[str]
    read: Callable[[str, re.Match[str]], Step]
    shown: Callable[[], str]


def _settled(kind: Kind, spelled: str = "settings") -> str:
    return "|".join(m.variant for m in METHODS.values() if m.kind == kind and m.spelled == spelled)


_SPELLINGS = (
    _Spelling(
        "quantize",
        re.compile(r"int8"),
        lambda part, match: Step("rtn", "quantize", bits=8, symmetric=True),
        lambda: "int8",
    ),
    _Spelling(
        "quantize",
        re.compile(r"int(\d+)-([a-z0-9]+)-g(\d+|ch)((?:-[a-z]+)*)"),
        _read_int,
        lambda: (
            f"int<{','.join(map(str, BITS))}>-<{_settled('quantize')}>-g<group or ch>[-sym][-act]"
        ),
    ),
    _Spelling(
        "quantize",
        re.compile(r"nested84-([a-z0-9]+)-g(\d+|ch)(?:@int([84]))?"),
        _read_nested,
        lambda: "nested84-<" + "|".join(m.variant for m in METHODS.values() if m.nests) + ">-g<…>",
    ),
    _Spelling(
        "sparse",
        re.compile(r"sparse(24|48|50)-([a-z0-9]+)"),
        _read_sparse,
        lambda: f"sparse<24|48|50>-<{_settled('sparse')}>",
    ),
    _Spelling(
        "depth",
        re.compile(r"depth-(\d+)"),
        lambda part, match: Step(_only("depth"), "depth", percent=_percent(part, match[1])),
        lambda: "depth-<percent of layers kept>",
    ),
    _Spelling(
        "width",
        re.compile(r"width-(\d+)"),
        lambda part, match: Step(_only("width"), "width", percent=_percent(part, match[1])),
        lambda: "width-<percent of heads and channels kept>",
    ),
    _Spelling(
        "lowrank",
        re.compile(r"lowrank-(\d+)"),
        lambda part, match: Step(_only("lowrank"), "lowrank", percent=_percent(part, match[1])),
        lambda: "lowrank-<percent of parameters kept>",
    ),
    _Spelling("correct", re.compile(r"lorc-(\d+)"), _read_rank, lambda: "lorc-<rank>"),
    _Spelling(
        "distill",
        re.compile(r"distill-([a-z0-9]+)"),
        lambda part, match: Step(_method_of(part, match[1], "distill"), "distill"),
        lambda: f"distill-<{_settled('distill')}>",
    ),
    _Spelling(
        "embed",
        re.compile(r"embed([84])"),
        lambda part, match: Step(_only("embed"), "embed", bits=int(match[1])),
        lambda: "embed<8|4>",
    ),
    _Spelling(
        "kv",
        re.compile(r"kv([84])"),
        lambda part, match: Step(_only("kv"), "kv", bits=int(match[1])),
        lambda: "kv<8|4>",
    ),
    # Last, as the most general: a name that says it all, e.g. `w8a8-smoothquant`.
    _Spelling(
        "quantize",
        re.compile(r"((?:w8a8|fp8)(?:-[a-z0-9]+)?)"),
        lambda part, match: Step(
            _method_of(part, match[1], "quantize", "name"), "quantize", bits=8, symmetric=True
        ),
        lambda: _settled("quantize", "name").replace("|", ", "),
    ),
)


def parse_step(part: str, name: str) -> Step:
    for spelling in _SPELLINGS:
        match = spelling.pattern.fullmatch(part)
        if match and spelling.kind in _kinds():
            return spelling.read(part, match)
    if part in get_args(Dtype):
        raise RecipeError(f"{name!r}: {part} is a dense level and cannot be part of a stack")
    raise RecipeError(f"unknown level {name!r}: {part!r} is not a step; known: {grammar()}")
