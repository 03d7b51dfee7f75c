"""A checkpoint that comes compressed: a folder of packed linears and plain tensors.

Owns matching what is stored with the architecture that the config describes; how one linear is
packed is each format's business. Never writes, never loads pickle, never runs a repository's code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from compressors.base import CompressionError, Sink
from compressors.checkpoint import Checkpoint
from compressors.export.model import CollectingSink, CompressedModel
from compressors.model import build_skeleton, linears, weight_of
from compressors.tensor import LinearForm


class FormatError(CompressionError):
    """A form or a tensor does not fit a checkpoint format; the message names it."""


class PackedCheckpoint(ABC):
    """A compressed folder, opened and checked by name and shape; linears are unpacked one by one.

    Attributes:
        config: the model's config without `quantization_config`.
        modules: names of the compressed linears, sorted.
        shapes: (N, K) of every linear of the architecture.

    Raises (on construction):
        FormatError: settings that cannot be read, or tensors that the architecture has no place
            for.
        compressors.checkpoint.CheckpointError: broken or pickle-only files, unknown architecture.
    """

    parts: ClassVar[tuple[str, ...]]
    """Suffixes of the tensors that make up one packed linear; `marker` is in every one."""
    marker: ClassVar[str]
    error: ClassVar[type[FormatError]] = FormatError

    def __init__(self, folder: str | Path) -> None:
        self._checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = {
            key: value
            for key, value in self._checkpoint.config.items()
            if key not in ("quantization_config", "auto_map")
        }
        ending = "." + self.marker
        self.modules = tuple(
            name.removesuffix(ending) for name in self._checkpoint.names if name.endswith(ending)
        )
        if not self.modules:
            raise self.error(f"{folder}: not one tensor is named *{ending}")
        self.shapes, self._plain = self._match()

    @property
    @abstractmethod
    def level(self) -> str:
        """The name of the level that the checkpoint is."""

    @abstractmethod
    def unpack(self, stored: dict[str, Tensor], shape: tuple[int, int]) -> LinearForm:
        """One linear's form from those of `parts` that are stored.

        Raises:
            FormatError: dtypes or shapes that do not belong together.
        """

    def linear(self, module: str) -> LinearForm:
        """The canonical form of one compressed linear.

        Raises:
            FormatError: the message names the module.
        """
        shape = self.shapes[module]
        try:
            form = self.unpack(self.stored(module), shape)
        except FormatError as error:
            raise self.error(f"{module}: {error}") from error
        if form.shape != shape:
            raise self.error(
                f"{module}: packed weight is {form.shape[0]}x{form.shape[1]}, "
                f"the config says {shape[0]}x{shape[1]}"
            )
        return form

    def stored(self, module: str) -> dict[str, Tensor]:
        """The tensors of one compressed linear by part, mapped: no data is read."""
        names = {part: f"{module}.{part}" for part in self.parts}
        return {
            part: self._checkpoint.tensor(name)
            for part, name in names.items()
            if name in self._checkpoint
        }

    def forms(self) -> Iterator[tuple[str, LinearForm]]:
        """Every compressed linear in turn."""
        for module in self.modules:
            yield module, self.linear(module)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every other tensor of the architecture; packers' zero biases and tied copies left out."""
        for name in self._plain:
            yield name, self._checkpoint.tensor(name)

    def stream(self, sink: Sink) -> None:
        """Hand the whole checkpoint to a sink, one linear in memory at a time."""
        sink.config(dict(self.config))
        for name, tensor in self.tensors():
            sink.tensor(name, tensor)
        for module, form in self.forms():
            sink.linear(module, form)

    def read(self) -> CompressedModel:
        """The whole checkpoint in memory: config, plain tensors and canonical forms."""
        sink = CollectingSink()
        self.stream(sink)
        return sink.model()

    def _match(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Shapes [N, K] of the compressed linears, and the plain tensors that the model has."""
        skeleton = build_skeleton(self.config)
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in linears(skeleton):
            weight = weight_of(module)
            shapes[name] = (weight.shape[0], weight.shape[1])
        for module_name in self.modules:
            if module_name not in shapes:
                raise self.error(
                    f"{module_name}.{self.marker}: the architecture has no linear of that name"
                )
        packed = {f"{module}.{part}" for module in self.modules for part in self.parts}
        parameters = dict(skeleton.named_parameters())
        stored = skeleton.state_dict(keep_vars=True)
        wanted: dict[str, Tensor] = {n: b for n, b in skeleton.named_buffers() if n in stored}
        wanted |= parameters
        plain: list[str] = []
        for name in self._checkpoint.names:
            if name not in packed and name in wanted:
                self._check_shape(name, wanted[name])
                plain.append(name)
        needed = set(parameters) - {f"{module}.weight" for module in self.modules} - set(plain)
        if needed:
            raise self.error(f"{min(needed)}: missing from the checkpoint")
        return shapes, plain

    def _check_shape(self, name: str, parameter: Tensor) -> None:
        shape = self._checkpoint.shape(name)
        if shape != tuple(parameter.shape):
            raise self.error(
                f"{name}: shape is {list(shape)}, the config says {list(parameter.shape)}"
            )


def take(stored: dict[str, Tensor], part: str) -> Tensor:
    """That part of a packed linear.

    Raises:
        FormatError: it is not stored.
    """
    if part not in stored:
        raise FormatError(f"{part} is missing")
    return stored[part]
