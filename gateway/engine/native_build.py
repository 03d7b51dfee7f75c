"""From a model's parts to the programs of its steps: which operation, over which buffers.

Where a part has no native operation (a fp32 product, experts, a quantized KV pool, a rotation of
inputs), its own module is called on a view of the buffers, so every level takes this path.
Decides nothing at run time and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gateway.engine.attention import Mode, PlainKV, Rows, Scoring
from gateway.engine.decoder import Attention, Block, Decoder, GatedMlp
from gateway.engine.decoder import Norm as NormPart
from gateway.engine.model import Model
from gateway.engine.native_linears import DTYPES, FULL, HALF, Linears, Wide
from gateway.engine.native_step import (
    Angles,
    Attend,
    Buffers,
    Embed,
    Gate,
    Norm,
    Operations,
    Program,
    Rotate,
    Step,
    rows_of,
)


def roots(parts: Decoder) -> Iterator[nn.Module]:
    """The linears of a model, the head first."""
    yield parts.head
    for block in parts.blocks:
        a, mlp = block.attention, block.mlp
        yield from (a.query, a.key, a.value, a.output)
        if isinstance(mlp, GatedMlp):
            yield from (mlp.gate, mlp.up, mlp.down)


class Builder:
    """Builds one program for steps of at most `most` rows over one set of buffers.

    Args:
        ids: int64, the step's token ids, for embeddings without a native operation.
    """

    def __init__(
        self, model: Model, operations: Operations, buffers: Buffers, ids: Tensor, most: int
    ) -> None:
        assert model.decoder is not None
        self._model, self._parts, self._ids = model, model.decoder, ids
        self._dtype, self._pairs = model.layout.dtype, operations.pairs
        self._program = Program(operations)
        self._linears = Linears(self._program, buffers, self._dtype, most)

    def body(self) -> Program:
        """Embedding and blocks; leaves the residual in `x` and what is to be added in `y`."""
        parts = self._parts
        self._embed()
        half = len(parts.rotary.frequency)
        self._program.add(
            Angles(
                frequency=self._linears.address(parts.rotary.frequency),
                out=self._buffer("angles", 2 * half).data_ptr(),
                half=half,
                scale=parts.rotary.scale,
            )
        )
        for index, block in enumerate(parts.blocks):
            self._block(block, self._buffer("y", parts.hidden) if index else None)
        self._program.finish()
        return self._program

    def head(self) -> tuple[Program, Callable[[Tensor], None]]:
        """The kept rows' norm and logits; the function says where to put the next step's."""
        parts, module = self._parts, self._parts.head
        added = self._buffer("y", parts.hidden) if parts.blocks else None
        call = self._linears.native(module)
        wanted = {self._dtype} if call is None else self._linears.wants(module)
        x = self._norm(parts.norm, added, wanted, kept=True)
        if call is not None:
            args = self._linears.product(call, x, None, kept=True)

            def aim(logits: Tensor) -> None:
                args.out = logits.data_ptr()

            self._program.finish()
            return self._program, aim
        source, target = x.forms[self._dtype], list[Tensor]()

        def run(step: Step) -> None:
            target[0].copy_(module(rows_of(source, step.outputs, x.width)))

        def point(logits: Tensor) -> None:
            target[:] = [logits]

        self._program.call(run)
        self._program.finish()
        return self._program, point

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._linears.buffers.get(name, width)

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
            self._program.keep([weight])
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
        out = self._linears.forms("normed", width, dtypes)
        self._program.add(
            Norm(
                x=self._buffer("x", width).data_ptr(),
                add=None if added is None else added.data_ptr(),
                weight=self._linears.address(norm.weight),
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
        x = self._norm(a.norm, added, self._linears.wants(a.query, a.key, a.value))
        self._attention(a, x, y)
        if isinstance(mlp, GatedMlp):
            self._mlp(mlp, self._norm(block.norm, y, self._linears.wants(mlp.gate, mlp.up)), y)
        else:
            self._linears.module(mlp, self._norm(block.norm, y, {self._dtype}), y)

    def _attention(self, a: Attention, x: Wide, y: Tensor) -> None:
        wide, narrow = a.heads * a.dim, a.kv_heads * a.dim
        names = (("query", wide), ("key", narrow), ("value", narrow))
        query, key, value = (self._buffer(name, width) for name, width in names)
        for module, out in ((a.query, query), (a.key, key), (a.value, value)):
            self._linears.linear(module, x, out)
        kv = a.slot.kv
        plain = kv if isinstance(kv, PlainKV) else None
        bf16 = plain is not None and plain.keys.dtype is HALF
        self._program.add(self._rotate(a, (query, key, value), plain))
        mixed = self._linears.forms("mixed", wide, self._linears.wants(a.output))
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
                    pairs=bf16 and self._pairs,
                    scale=a.scale,
                )
            )
        self._linears.linear(a.output, mixed, y)

    def _rotate(
        self, a: Attention, new: tuple[Tensor, Tensor, Tensor], kv: PlainKV | None
    ) -> Rotate:
        query, key, value = (tensor.data_ptr() for tensor in new)
        norms = (a.query_norm, a.key_norm)
        of_query, of_key = (None if n is None else self._linears.address(n.weight) for n in norms)
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
        self._linears.linear(mlp.gate, x, gate)
        self._linears.linear(mlp.up, x, up)
        inner = self._linears.forms("inner", width, self._linears.wants(mlp.down))
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
        self._linears.linear(mlp.down, inner, y)
