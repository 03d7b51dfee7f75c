"""A whole compressed model in plain values: what the writers take and the readers give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compressors.tensor import LinearForm


@dataclass(frozen=True, eq=False)
class CompressedModel:
    """A model's parts, as a `compressors.base.Sink` gets them piece by piece.

    Attributes:
        config: transformers' config as JSON, without `quantization_config`.
        tensors: full tensor name → tensor that stays as it is (embeddings, norms, biases).
        forms: module name → compressed weight of that linear, always [N, K]; for GPT-2's Conv1D
            too, whose plain weight is stored as [K, N].
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    forms: Mapping[str, LinearForm]


@dataclass
class CollectingSink:
    """A `Sink` that keeps everything in memory; for exporting and for tests."""

    model_config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, LinearForm] = field(default_factory=dict)

    def config(self, config: dict[str, Any]) -> None:
        """Keep the config."""
        self.model_config = dict(config)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Keep an uncompressed tensor."""
        self.tensors[name] = tensor

    def linear(self, module: str, form: LinearForm) -> None:
        """Keep a compressed linear."""
        self.forms[module] = form

    def model(self) -> CompressedModel:
        """What was collected."""
        return CompressedModel(self.model_config, self.tensors, self.forms)
