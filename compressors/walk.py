"""Walking a model block by block over calibration windows, one block's weights in memory at a time.

Owns the activations between blocks and the filling and freeing of weights; knows no method. The
model's own forward code runs: its blocks are stubbed once to learn how each is called (masks,
rotary embeddings, positions), then every block is called alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.experts import Routed
from compressors.model import Blocks, set_tensor
from compressors.parallel import Lanes

BATCH_TOKENS = 4096
Observer = Callable[[Tensor], None]


class _Stop(Exception):
    """Ends a forward pass early."""


@dataclass(frozen=True)
class _Call:
    """How the model calls one block, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Source:
    """A model to be filled: skeleton, its blocks, and where every parameter comes from.

    Attributes:
        names: parameter name → tensor name in the checkpoint (`model.source_names`).
        edits: parameter name → what makes it of the checkpoint's tensor, where a step before has
            cut or changed it; by name of this model.
    """

    checkpoint: Checkpoint
    model: nn.Module
    blocks: Blocks
    names: Mapping[str, str]
    edits: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Parameter `name` as the checkpoint stores it (mapped: do not write to it), edited."""
        tensor = self.checkpoint.tensor(self.names[name])
        edit = self.edits.get(name)
        return tensor if edit is None else edit(tensor)

    def release(self, name: str) -> None:
        """Nobody needs the memory behind parameter `name` now; reading it again is fine."""
        self.checkpoint.release(self.names[name])

    def of_block(self, index: int) -> dict[str, str]:
        """Parameter name inside block `index` → its full name."""
        prefix = self.blocks.prefix(index) + "."
        return {n.removeprefix(prefix): n for n in self.names if n.startswith(prefix)}

    def outside(self) -> list[str]:
        """Full names of everything that is in no block."""
        prefix = self.blocks.path + "."
        return [name for name in self.names if not name.startswith(prefix)]


@dataclass
class Walk:
    """Hidden states of every window before some block, and the means to carry them further.

    Attributes:
        windows: token ids int64 [n, length].
        dtype: computed in; None is the checkpoint's own, for which the CPU copies no weight.
        lanes: where batches run side by side.
        hidden: batches [B, length, hidden size], the inputs of the next block.
    """

    source: Source
    windows: Tensor
    dtype: torch.dtype | None = torch.float32
    device: torch.device | str = "cpu"
    lanes: Lanes = field(default_factory=lambda: Lanes(1))
    hidden: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._tuples = False
        self._calls: dict[int, list[_Call]] = {}
        self._fill_outside()
        size = max(1, BATCH_TOKENS // self.windows.shape[1])
        self.tokens = [
            self.windows[i : i + size].to(self.device) for i in range(0, len(self.windows), size)
        ]
        with torch.no_grad():
            self.hidden = [self._embed(tokens) for tokens in self.tokens]

    def load(self, index: int) -> nn.Module:
        """Fill block `index` with the checkpoint's weights and return it."""
        block = self.source.blocks.modules[index]
        for name, full in self.source.of_block(index).items():
            set_tensor(block, name, self._tensor(full))
            self.source.release(full)
        return block

    def free(self, index: int) -> None:
        """Let go of block `index`'s weights."""
        block = self.source.blocks.modules[index]
        for name, tensor in list(block.named_parameters()):
            set_tensor(block, name, tensor.detach().to("meta"))

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Block `index` (loaded) on one batch of hidden states."""
        return self.compute(index, hidden)

    def compute(self, index: int, hidden: Tensor) -> Tensor:
        """As `run`, with gradients if the caller has them on."""
        call = self._calls[len(hidden)][index]
        out = self.source.blocks.modules[index](hidden, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def advance(self, index: int) -> None:
        """Carry every batch through block `index`, in place."""
        runs = self.lanes.map(lambda hidden: self.run(index, hidden), self.hidden)
        for i, result in enumerate(runs):
            self.hidden[i] = result

    def stages(self, index: int, names: Sequence[str]) -> list[list[list[str]]]:
        """The linears of block `index` in order of execution, as groups of one input each.

        Groups of one stage do not see each other's results: those of different experts. Linears
        that no batch reaches are left out.
        """
        block = self.source.blocks.modules[index]
        groups: list[list[str]] = []
        done: set[str] = set()
        for hidden in self.hidden:
            for group in self._input_groups(block, index, hidden, set(names) - done):
                groups.append(group)
                done.update(group)
            if len(done) == len(names):
                break
        stages: dict[str, list[list[str]]] = {}
        for group in groups:
            stages.setdefault(_stage(block, group[0]), []).append(group)
        return list(stages.values())

    def _input_groups(
        self, block: nn.Module, index: int, hidden: Tensor, names: set[str]
    ) -> list[list[str]]:
        """The linears `names` that one batch reaches, those with one input together."""
        seen: dict[str, Tensor] = {}  # inputs are held, so that no address is used twice

        def seer(name: str) -> Observer:
            def see(x: Tensor) -> None:
                seen.setdefault(name, x)

            return see

        with _hooks(block, {name: seer(name) for name in names}):
            self.run(index, hidden)
        groups: list[tuple[Tensor, list[str]]] = []
        for name, x in seen.items():
            if groups and _same(groups[-1][0], x):
                groups[-1][1].append(name)
            else:
                groups.append((x, [name]))
        return [group for _, group in groups]

    def inputs(self, index: int, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """For every batch in order, the inputs of those of the linears `names` that it reaches."""
        local = threading.local()

        def seer(name: str) -> Observer:
            def see(x: Tensor) -> None:
                local.seen.setdefault(name, x)
                if len(names) == 1:
                    raise _Stop

            return see

        def one(hidden: Tensor) -> dict[str, Tensor]:
            local.seen = {}
            with suppress(_Stop):
                self.run(index, hidden)
            seen: dict[str, Tensor] = local.seen
            return seen

        with _hooks(self.source.blocks.modules[index], {name: seer(name) for name in names}):
            yield from self.lanes.map(one, self.hidden)

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the model makes of the last block's output: final norm and head, [B, length, V]."""
        return self.head(tokens, hidden)

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """As `logits`, with gradients if the caller has them on."""
        last = len(self.source.blocks) - 1

        def stub(index: int, call: _Call, given: Tensor) -> Tensor:
            return hidden if index == last else given

        with self._stubbed(stub):
            out: Tensor = self.source.model(input_ids=tokens, use_cache=False).logits
        return out

    def _tensor(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype or tensor.dtype)

    def _fill_outside(self) -> None:
        """Fill embeddings, norms and head. With a dtype of our own, big tables stay as they are
        stored and only what they give is converted."""
        model = self.source.model
        tables = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            for name, _ in module.named_parameters(recurse=False)
        }
        head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        for name in self.source.outside():
            owner = model.get_submodule(name.rpartition(".")[0])
            if name in tables or owner is head:
                set_tensor(model, name, self.source.read(name).to(self.device))
            else:
                set_tensor(model, name, self._tensor(name))
        for name, buffer in list(model.named_buffers()):
            if buffer.device != torch.device(self.device):
                set_tensor(model, name, buffer.to(self.device))
        if self.dtype is None:
            return
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda _m, _i, out: out.to(self.dtype))
        if isinstance(head, nn.Linear):
            head.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))

    def _embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first block; remembers how blocks are called for this size."""
        calls: list[_Call] = []
        inputs: list[Tensor] = []
        last = len(self.source.blocks) - 1

        def record(index: int, call: _Call, given: Tensor) -> Tensor:
            calls.append(call)
            inputs.append(given)
            if index == last:
                raise _Stop
            return given

        for tuples in (self._tuples, True):
            self._tuples = tuples
            calls.clear()
            inputs.clear()
            try:
                with self._stubbed(record):
                    self.source.model(input_ids=tokens, use_cache=False)
            except _Stop:
                # A model that unpacks tuples has cut a dimension off a bare tensor.
                if all(x.shape == inputs[0].shape for x in inputs):
                    break
            except (TypeError, ValueError, IndexError, RuntimeError):
                if tuples:
                    raise
        else:
            raise CompressionError(
                f"{type(self.source.model).__name__}: its decoder blocks cannot be run one by one"
            )
        self._calls.setdefault(len(tokens), calls)
        return inputs[0]

    @contextmanager
    def _stubbed(self, stub: Callable[[int, _Call, Tensor], Tensor]) -> Iterator[None]:
        """Every block's forward replaced by `stub(index, call, hidden)`."""

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs.pop("hidden_states")
                out = stub(index, _Call(args[1:], kwargs), given)
                return (out,) if self._tuples else out

            return forward

        modules = self.source.blocks.modules
        try:
            for index, block in enumerate(modules):
                block.forward = forward_of(index)
            yield
        finally:
            for block in modules:
                block.__dict__.pop("forward", None)


@contextmanager
def _hooks(block: nn.Module, observers: Mapping[str, Observer]) -> Iterator[None]:
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, observer=observer: observer(args[0])
        )
        for name, observer in observers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stage(block: nn.Module, name: str) -> str:
    """Equal for linears that stand at the same place in sibling experts, else the name itself."""
    path, _, leaf = name.rpartition(".")
    owner = path.rpartition(".")[0]
    is_expert = owner and isinstance(block.get_submodule(owner), Routed)
    return f"{owner}.*.{leaf}" if is_expert else name


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
