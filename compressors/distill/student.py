"""The student: transformers' own module of a compressed model, with what may be trained trainable.

Owns which tensors train and how they come back as forms; knows no loss and no text. Everything in
the decoder blocks trains, and the norms outside them. Embeddings and head stay as they are: every
level of a model shares their bytes, and the teacher's head fits the student's last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressors.base import CompressionError, Sink
from compressors.distill.trainable import TrainedWeight, trained
from compressors.memory import MemorySink
from compressors.model import build_skeleton, decoder_blocks, is_transposed, set_tensor
from compressors.tensor import LinearForm

MakeTrained = Callable[[str, bool, LinearForm], TrainedWeight]
"""(module, whether its weight is kept as [K, N], form) → what is trained, or ValueError."""


class TrainedLinear(nn.Module):
    """A linear layer over a trained weight, in place of `nn.Linear` or GPT-2's Conv1D."""

    def __init__(self, weight: TrainedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.trained = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.trained(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Student:
    """A compressed model that can be trained and then written as the forms it was made of.

    Attributes:
        model: transformers' module, its compressed linears replaced.
        names: of the parameters that train, in a fixed order.
        transposed: compressed linears that keep their weight as [K, N], as GPT-2's do.

    Args:
        compressed: what the recipe's steps before made; its tensors are not changed.
        make: how the weight of a compressed linear is trained.
        device: where it is trained, in float32.

    Raises:
        CompressionError: a form that cannot be trained, or nothing to train.
    """

    def __init__(
        self,
        compressed: MemorySink,
        *,
        make: MakeTrained = lambda _module, _transposed, form: trained(form),
        device: torch.device | str = "cpu",
    ) -> None:
        self._compressed = compressed
        self.device = torch.device(device)
        self.model = build_skeleton(compressed.model_config, dtype=torch.float32)
        self.blocks = decoder_blocks(self.model)
        self._linears: dict[str, TrainedLinear] = {}
        self.transposed: set[str] = set()
        for name, tensor in compressed.tensors.items():
            # A copy: tensors may be mapped from the teacher's own file.
            own = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor
            set_tensor(self.model, name, own)
        for name, form in compressed.linears.items():
            self._replace(name, form, make)
        missing = [name for name, p in self.model.named_parameters() if p.is_meta]
        if missing:
            raise CompressionError(f"the compressed model lacks {', '.join(missing)}")
        self.model.to(self.device)
        self.names = self._choose()
        if not self.names:
            raise CompressionError("nothing in the model's decoder blocks can be trained")

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in a fixed order."""
        known = dict(self.model.named_parameters())
        return {name: known[name] for name in self.names}

    def logits(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] → logits [B, T, V]."""
        out: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return out

    @torch.no_grad()
    def write(self, sink: Sink) -> None:
        """Every piece of the student as it is now, in the dtypes of the compressed model."""
        parameters = dict(self.model.named_parameters())
        trains = set(self.names)
        sink.config(self._compressed.model_config)
        for name, tensor in self._compressed.tensors.items():
            now = parameters[name].detach().to("cpu", tensor.dtype) if name in trains else tensor
            sink.tensor(name, now)
        dtype = self._dtype()
        for name, layer in self._linears.items():
            sink.linear(name, layer.trained.form().stored_as(dtype))

    def _replace(self, name: str, form: LinearForm, make: MakeTrained) -> None:
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(name)
            if is_transposed(module):
                self.transposed.add(name)
            weight = make(name, name in self.transposed, form)
            layer = TrainedLinear(weight, module._parameters.get("bias"))
        except (ValueError, AttributeError) as error:
            raise CompressionError(f"{name}: {error}") from error
        setattr(self.model.get_submodule(owner), leaf, layer)
        self._linears[name] = layer

    def _choose(self) -> list[str]:
        """Names of what trains; everything else is frozen."""
        chosen = []
        inside = self.blocks.path + "."
        for name, parameter in self.model.named_parameters():
            trains = parameter.is_floating_point() and (
                name.startswith(inside) or parameter.ndim == 1
            )
            parameter.requires_grad_(trains)
            if trains:
                chosen.append(name)
        return chosen

    def _dtype(self) -> torch.dtype:
        """Of the dense parts of forms: what most of the model is stored in."""
        floats = [t for t in self._compressed.tensors.values() if t.is_floating_point()]
        return max(floats, key=lambda t: t.numel()).dtype if floats else torch.float32
