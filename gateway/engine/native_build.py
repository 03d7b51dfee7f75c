"""From a model's parts to the programs of its steps: which operation, over which buffers.

Where a part has no native operation (a fp32 product, experts, a quantized KV pool, a rotation of
inputs), its own module is called on a view of the buffers, so every level takes this path.
Decides nothing at run time and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gateway.engine.attention import Mode, PlainKV, Rows, Scoring
from gateway.engine.decoder import Attention, Block, Decoder, GatedMlp
from gateway.engine.decoder import Norm as NormPart
from gateway.engine.kernels.lowrank import LowRankLinear
from gateway.engine.kernels.native import NativeCall
from gateway.engine.kernels.scaled import ScaledLinear
from gateway.engine.kernels.scheme import KernelLinear
from gateway.engine.native_step import (
    Angles,
    Attend,
    Buffers,
    Embed,
    Gate,
    Linear,
    Norm,
    Operations,
    Program,
    Rotate,
    Scale,
    Step,
    rows_of,
)
from gateway.engine.runner import Model

FULL, HALF = torch.float32, torch.bfloat16
DTYPES = (FULL, HALF)
UNLIMITED = 1 << 30  # rows


@dataclass(frozen=True, slots=True)
class Wide:
    """Rows of activations, flat, in the forms that somebody reads: float32, bf16 or both."""

    width: int
    forms: dict[torch.dtype, Tensor]

    def address(self, dtype: torch.dtype) -> int | None:
        found = self.forms.get(dtype)
        return None if found is None else found.data_ptr()


def limits(parts: Decoder, dtype: torch.dtype) -> list[int]:
    """Rows up to which some native linear is used, ascending; the last is unlimited."""
    found = {UNLIMITED}
    if dtype is HALF:
        found |= {call.max_rows for call in _calls(parts) if call.max_rows < UNLIMITED}
    return sorted(found)


def _calls(parts: Decoder) -> Iterator[NativeCall]:
    roots: list[nn.Module] = [parts.head]
    for block in parts.blocks:
        a, mlp = block.attention, block.mlp
        roots += [a.query, a.key, a.value, a.output]
        roots += [mlp.gate, mlp.up, mlp.down] if isinstance(mlp, GatedMlp) else []
    for root in roots:
        for module in root.modules():
            if isinstance(module, KernelLinear) and module.native is not None:
                yield module.native


class Builder:
    """Builds programs for steps of at most `most` rows over one set of buffers.

    Args:
        ids: int64, the step's token ids, for embeddings without a native operation.
    """

    def __init__(
        self, model: Model, operations: Operations, buffers: Buffers, ids: Tensor, most: int
    ) -> None:
        assert model.decoder is not None
        self._model, self._parts = model, model.decoder
        self._operations, self._buffers = operations, buffers
        self._ids, self._most, self._dtype = ids, most, model.layout.dtype
        self._program = Program(operations)
        self._keep: list[Tensor] = []

    def body(self) -> Program:
        """Embedding and blocks; leaves the residual in `x` and what is to be added in `y`."""
        parts = self._parts
        self._embed()
        half = len(parts.rotary.frequency)
        self._program.add(
            Angles(
                frequency=self._address(parts.rotary.frequency),
                out=self._buffers.get("angles", 2 * half).data_ptr(),
                half=half,
                scale=parts.rotary.scale,
            )
        )
        for index, block in enumerate(parts.blocks):
            self._block(block, self._buffer("y", parts.hidden) if index else None)
        return self._done()

    def head(self) -> tuple[Program, Callable[[Tensor], None]]:
        """The kept rows' norm and logits; the function says where to put the next step's."""
        parts, module = self._parts, self._parts.head
        added = self._buffer("y", parts.hidden) if parts.blocks else None
        x = self._norm(parts.norm, added, self._wants(module), kept=True)
        call = self._native(module)
        if call is not None:
            args = self._product(call, x, None, kept=True)

            def aim(logits: Tensor) -> None:
                args.out = logits.data_ptr()

            return self._done(), aim
        source, target = x.forms[self._dtype], list[Tensor]()

        def run(step: Step) -> None:
            target[0].copy_(module(rows_of(source, step.outputs, x.width)))

        def point(logits: Tensor) -> None:
            target[:] = [logits]

        self._program.call(run)
        return self._done(), point

    def _done(self) -> Program:
        program, self._program = self._program, Program(self._operations)
        program.finish()
        program.keep(self._keep)
        return program

    def _address(self, tensor: Tensor) -> int:
        """Of a float32 copy that lives as long as the program."""
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._buffers.get(name, width)

    def _forms(self, name: str, width: int, dtypes: set[torch.dtype]) -> Wide:
        return Wide(width, {d: self._buffers.get(name, width, d) for d in dtypes})

    # ---- linears -----------------------------------------------------------------------------

    def _native(self, module: nn.Module) -> NativeCall | None:
        call = module.native if isinstance(module, KernelLinear) else None
        limited = call is not None and self._dtype is HALF and self._most > call.max_rows
        return None if limited else call

    def _whole(self, module: nn.Module) -> bool:
        """Whether native operations compute all of a layer."""
        if isinstance(module, LowRankLinear):
            return self._whole(module.left) and self._whole(module.right)
        if isinstance(module, ScaledLinear):
            return self._whole(module.form)
        return self._native(module) is not None

    def _wants(self, *modules: nn.Module) -> set[torch.dtype]:
        """In which forms linears read their input."""
        found = set[torch.dtype]()
        for module in modules:
            call = self._native(module)
            if call is not None:
                found.add(HALF if call.bf16_input else FULL)
            elif not self._whole(module):
                found.add(self._dtype)
            elif isinstance(module, LowRankLinear):
                found |= self._wants(module.right)
            else:
                found.add(FULL)
        return found

    def _linear(self, module: Any, x: Wide, out: Tensor) -> None:
        call = self._native(module)
        if call is not None:
            self._product(call, x, out)
        elif not self._whole(module):
            self._module(module, x, out)
        elif isinstance(module, LowRankLinear):
            rank = module.right.out_features
            between = self._buffer(f"rank {rank}", rank)
            self._linear(module.right, x, between)
            wanted = self._wants(module.left)
            inner = Wide(rank, {FULL: between})
            if HALF in wanted:
                inner = self._scaled(inner, None, wanted, f"rank {rank}")
            self._linear(module.left, inner, out)
        elif isinstance(module, ScaledLinear):
            wanted = self._wants(module.form)
            name = f"scaled {x.width}"
            self._linear(module.form, self._scaled(x, module.scale, wanted, name), out)

    def _product(self, call: NativeCall, x: Wide, out: Tensor | None, kept: bool = False) -> Linear:
        args = Linear(
            run=call.entry,
            weight=call.address,
            x=x.address(HALF if call.bf16_input else FULL),
            out=None if out is None else out.data_ptr(),
            kept=kept,
        )
        self._program.add(args)
        return args

    def _scaled(self, x: Wide, by: Tensor | None, dtypes: set[torch.dtype], name: str) -> Wide:
        """x · by (None: 1) in other forms; the float32 one may be x's own."""
        out = self._forms(name, x.width, dtypes)
        self._program.add(
            Scale(
                x=x.address(FULL),
                by=None if by is None else self._address(by),
                full=out.address(FULL),
                half=out.address(HALF),
                n=x.width,
                kept=0,
            )
        )
        return out

    def _module(self, module: nn.Module, x: Wide, out: Tensor) -> None:
        source, width = x.forms[self._dtype], x.width

        def run(step: Step) -> None:
            found = module(rows_of(source, step.rows, width)[None])[0]
            rows_of(out, step.rows, found.shape[-1]).copy_(found)

        self._program.call(run)

    # ---- parts -------------------------------------------------------------------------------

    def _embed(self) -> None:
        module, hidden = self._parts.embed, self._parts.hidden
        out, ids = self._buffer("x", hidden), self._ids
        weight: Any = getattr(module, "weight", None)
        if (
            type(module) is nn.Embedding
            and weight.dtype in DTYPES
            and weight.is_contiguous()
            and len(weight) >= self._model.vocab_size
        ):
            bf16 = weight.dtype is HALF
            self._keep.append(weight.detach())
            self._program.add(
                Embed(table=weight.data_ptr(), out=out.data_ptr(), n=hidden, bf16=bf16)
            )
            return

        def run(step: Step) -> None:
            rows_of(out, step.rows, hidden).copy_(module(ids[: step.rows]))

        self._program.call(run)

    def _norm(
        self, norm: NormPart, added: Tensor | None, dtypes: set[torch.dtype], *, kept: bool = False
    ) -> Wide:
        width = self._parts.hidden
        out = self._forms("normed", width, dtypes)
        self._program.add(
            Norm(
                x=self._buffer("x", width).data_ptr(),
                add=None if added is None else added.data_ptr(),
                weight=self._address(norm.weight),
                full=out.address(FULL),
                half=out.address(HALF),
                n=width,
                kept=kept,
                eps=norm.eps,
            )
        )
        return out

    def _block(self, block: Block, added: Tensor | None) -> None:
        a, mlp, y = block.attention, block.mlp, self._buffer("y", self._parts.hidden)
        x = self._norm(a.norm, added, self._wants(a.query, a.key, a.value))
        self._attention(a, x, y)
        if isinstance(mlp, GatedMlp):
            self._mlp(mlp, self._norm(block.norm, y, self._wants(mlp.gate, mlp.up)), y)
        else:
            self._module(mlp, self._norm(block.norm, y, {self._dtype}), y)

    def _attention(self, a: Attention, x: Wide, y: Tensor) -> None:
        wide, narrow = a.heads * a.dim, a.kv_heads * a.dim
        names = (("query", wide), ("key", narrow), ("value", narrow))
        query, key, value = (self._buffer(name, width) for name, width in names)
        for module, out in ((a.query, query), (a.key, key), (a.value, value)):
            self._linear(module, x, out)
        kv = a.slot.kv
        plain = kv if isinstance(kv, PlainKV) else None
        bf16 = plain is not None and plain.keys.dtype is HALF
        self._program.add(self._rotate(a, (query, key, value), plain))
        mixed = self._forms("mixed", wide, self._wants(a.output))
        if plain is None:
            self._foreign(a, (query, key, value), mixed)
        else:
            self._program.add(
                Attend(
                    query=query.data_ptr(),
                    keys=plain.keys.data_ptr(),
                    values=plain.values.data_ptr(),
                    full=mixed.address(FULL),
                    half=mixed.address(HALF),
                    heads=a.heads,
                    kv_heads=a.kv_heads,
                    dim=a.dim,
                    block_size=plain.keys.shape[1],
                    window=a.window or 0,
                    bf16=bf16,
                    pairs=bf16 and self._operations.pairs,
                    scale=a.scale,
                )
            )
        self._linear(a.output, mixed, y)

    def _rotate(
        self, a: Attention, new: tuple[Tensor, Tensor, Tensor], kv: PlainKV | None
    ) -> Rotate:
        query, key, value = (tensor.data_ptr() for tensor in new)
        norms = (a.query_norm, a.key_norm)
        of_query, of_key = (None if n is None else self._address(n.weight) for n in norms)
        return Rotate(
            query=query,
            key=key,
            value=value,
            query_norm=of_query,
            key_norm=of_key,
            angles=self._buffer("angles", a.dim).data_ptr(),
            keys=None if kv is None else kv.keys.data_ptr(),
            values=None if kv is None else kv.values.data_ptr(),
            heads=a.heads,
            kv_heads=a.kv_heads,
            dim=a.dim,
            bf16=kv is not None and kv.keys.dtype is HALF,
            eps=0.0 if a.query_norm is None else a.query_norm.eps,
        )

    def _foreign(self, a: Attention, new: tuple[Tensor, Tensor, Tensor], mixed: Wide) -> None:
        """Attention through the slot's own pool layer, with the inputs in the model's `Step`."""
        slot, scoring, heads = a.slot, Scoring(a.scale, None), (a.heads, a.kv_heads, a.kv_heads)

        def run(step: Step) -> None:
            rows = [
                rows_of(flat, step.rows, count * a.dim).view(step.rows, count, a.dim)
                for flat, count in zip(new, heads, strict=True)
            ]
            assert slot.kv is not None, "a step with a pool needs a bound pool"
            if slot.step.mode is Mode.DECODE:
                query, key, value = (row[:, :, None] for row in rows)
                attend = slot.kv.decode
            else:
                query, key, value = (row.transpose(0, 1)[None].to(self._dtype) for row in rows)
                attend = slot.kv.prefill
            found = attend(Rows(query, key, value), slot.window, scoring, slot.step)
            for flat in mixed.forms.values():
                rows_of(flat, step.rows, mixed.width).copy_(found.reshape(step.rows, -1))

        self._program.call(run)

    def _mlp(self, mlp: GatedMlp, x: Wide, y: Tensor) -> None:
        width = int(getattr(mlp.down, "in_features", 0))
        gate, up = self._buffer("gate", width), self._buffer("up", width)
        self._linear(mlp.gate, x, gate)
        self._linear(mlp.up, x, up)
        inner = self._forms("inner", width, self._wants(mlp.down))
        self._program.add(
            Gate(
                gate=gate.data_ptr(),
                up=up.data_ptr(),
                full=inner.address(FULL),
                half=inner.address(HALF),
                n=width,
                gelu=mlp.activation == "gelu_tanh",
            )
        )
        self._linear(mlp.down, inner, y)
