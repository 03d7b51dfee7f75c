"""A compressed model in memory, and back into a transformers module: for tests and measurements.

Serving does not go through here: engines compute from the compressed forms, this makes them dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressors.model import build_skeleton, set_tensor, weight_of
from compressors.tensor import LinearForm


class MemorySink:
    """A `Sink` that keeps everything.

    Attributes:
        model_config: the compressed model's config.
        tensors: what stayed as it was, by name.
        linears: compressed linears, by module.
    """

    def __init__(self) -> None:
        self.model_config: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.linears: dict[str, LinearForm] = {}

    def config(self, config: dict[str, Any]) -> None:
        """See `base.Sink`."""
        self.model_config = config

    def tensor(self, name: str, tensor: Tensor) -> None:
        """See `base.Sink`. Raises ValueError when a piece comes twice."""
        if name in self.tensors:
            raise ValueError(f"{name} was written twice")
        self.tensors[name] = tensor

    def linear(self, module: str, form: LinearForm) -> None:
        """See `base.Sink`. Raises ValueError when a piece comes twice."""
        if module in self.linears:
            raise ValueError(f"{module} was written twice")
        self.linears[module] = form

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces, codes bit-packed."""
        plain = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return plain + sum(form.nbytes for form in self.linears.values())


def materialize(sink: MemorySink, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The compressed model as a transformers causal LM with dense weights, in `dtype`.

    Raises:
        ValueError: the sink lacks a parameter of the model.
    """
    model = build_skeleton(sink.model_config, dtype=dtype)
    for name, tensor in sink.tensors.items():
        set_tensor(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    for name, form in sink.linears.items():
        weight = weight_of(model.get_submodule(name), form.dense(dtype)).contiguous()
        set_tensor(model, f"{name}.weight", weight)  # in every module that shares it
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"the sink lacks {', '.join(missing)}")
    return model
