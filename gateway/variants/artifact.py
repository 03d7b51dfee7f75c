"""Between tensors and the cache's bytes: writing a model as an artifact, mapping it back.

The only file that knows both torch dtypes and manifest records.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from cache.artifact import Artifact
from cache.manifest import Manifest, ModuleRecord, TensorRecord
from cache.writer import ArtifactWriter
from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.export.formats import open_packed, write_packed
from compressors.export.model import CompressedModel
from compressors.export.packed import FormatError
from compressors.kv_scheme import scheme_of
from compressors.model import build_skeleton, source_names
from compressors.recipe import Recipe
from compressors.tensor import LinearForm, StoredLinear
from gateway.engine.kernels.nested import child_of
from gateway.engine.kernels.store import pack, unpack
from gateway.engine.model import VariantWeights
from gateway.errors import InvalidRequest

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ArtifactSink:
    """A `compressors.base.Sink` that packs every linear for its kernel and stores it at once.

    Packing runs in the calling thread; storing is one tensor at a time.
    """

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self.model_config: dict[str, Any] = {}
        self.tensors: dict[str, TensorRecord] = {}
        self.modules: dict[str, ModuleRecord] = {}

    def config(self, config: dict[str, Any]) -> None:
        self.model_config = config

    def tensor(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous()
        data = memoryview(b"")
        if flat.numel():
            data = flat.reshape(-1).view(torch.uint8).numpy().data
        with self._lock:
            self.tensors[name] = self._writer.put(name, data, _NAMES[flat.dtype], tuple(flat.shape))

    def linear(self, module: str, form: LinearForm) -> None:
        stored = pack(form)
        names = {}
        for suffix, tensor in stored.tensors.items():
            names[suffix] = f"{module}.{suffix}"
            self.tensor(names[suffix], tensor)
        record = ModuleRecord(
            scheme=stored.scheme, layout=stored.layout, meta=stored.meta, tensors=names
        )
        with self._lock:
            self.modules[module] = record

    def records(self) -> tuple[dict[str, TensorRecord], dict[str, ModuleRecord]]:
        """What was stored so far, by name: tensors and linears, in an order of their own."""
        with self._lock:
            return dict(sorted(self.tensors.items())), dict(sorted(self.modules.items()))


def weights_of(artifact: Artifact, dtype: torch.dtype, *, child: int = 0) -> VariantWeights:
    """The artifact's tensors as views of its mapped blobs: nothing is copied or repacked.

    How it is served besides, with a quantized KV cache or not, its recipe says.

    Args:
        child: compute nested weights with so many bits; 0 is all. What is unused stays on disk.

    Raises:
        CorruptArtifact: a blob is not what the manifest says.
    """
    manifest = artifact.manifest
    tensors = {name: _tensor(artifact, name, record) for name, record in manifest.tensors.items()}
    linears = {
        module: StoredLinear(
            scheme=record.scheme,
            layout=record.layout,
            meta=dict(record.meta),
            tensors={suffix: tensors[name] for suffix, name in record.tensors.items()},
        )
        for module, record in manifest.modules.items()
    }
    if child:
        linears = {module: child_of(stored) for module, stored in linears.items()}
    packed = {name for record in manifest.modules.values() for name in record.tensors.values()}
    plain: Mapping[str, Tensor] = {n: t for n, t in tensors.items() if n not in packed}
    return VariantWeights(
        config=manifest.config,
        tensors=plain,
        linears=linears,
        dtype=dtype,
        kv=scheme_of(Recipe.parse(manifest.recipe)),
        identity=_identity(manifest, child),
    )


def _identity(manifest: Manifest, child: int) -> str:
    tensors = sorted(
        (name, record.digest, record.dtype, tuple(record.shape))
        for name, record in manifest.tensors.items()
    )
    modules = sorted(
        (name, record.scheme, record.layout, repr((record.meta, record.tensors)))
        for name, record in manifest.modules.items()
    )
    config = json.dumps(manifest.config, sort_keys=True)
    return blake3(repr((config, tensors, modules, child)).encode()).hexdigest()


def dense_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    identity: str = "",
    names: Mapping[str, str] | None = None,
) -> VariantWeights:
    """The checkpoint itself as a variant; tensors of `dtype` stay views of its mapped files.

    Args:
        identity: the checkpoint's `source_digest`, where it is known.
        names: `compressors.model.source_names` of it, likewise.

    Raises:
        CheckpointError: a parameter is missing or misshapen.
    """
    if names is None:
        names = source_names(checkpoint, build_skeleton(checkpoint.config))
    tensors = {name: checkpoint.tensor(source) for name, source in names.items()}
    return VariantWeights(
        config=checkpoint.config,
        tensors=tensors,
        linears={},
        dtype=dtype,
        identity=identity,
    )


def imported_weights(folder: Path, dtype: torch.dtype) -> VariantWeights:
    """A compressed checkpoint as a variant: its codes in our kernels' layout, held in memory.

    Raises:
        CompressionError: not of a format that can be read, or malformed; names the tensor.
    """
    packed = open_packed(folder)
    if packed is None:
        raise FormatError(f"{folder}: is not compressed")
    return VariantWeights(
        config=packed.config,
        tensors=dict(packed.tensors()),
        linears={module: pack(form) for module, form in packed.forms()},
        dtype=dtype,
    )


def export_artifact(
    artifact: Artifact, folder: Path, form: str, *, tokenizer_from: Path, child: int = 0
) -> Path:
    """Write the artifact as a checkpoint folder in a format of `compressors.export.formats`.

    Args:
        child: of nested weights, the bits to keep; 0 is all.

    Raises:
        InvalidRequest: the format cannot hold the level, or the folder cannot be written; the
            message says why.
    """
    weights = weights_of(artifact, torch.float32, child=child)
    model = CompressedModel(
        config=weights.config,
        tensors=weights.tensors,
        forms=_Unpacked(weights.linears),
    )
    try:
        return write_packed(folder, model, form=form, tokenizer_from=tokenizer_from)
    except (CompressionError, OSError) as error:
        raise InvalidRequest(f"--export: {error}", param="export") from error


class _Unpacked(Mapping[str, LinearForm]):
    """Canonical forms of stored linears, made when asked for: one at a time in memory."""

    def __init__(self, linears: Mapping[str, StoredLinear]) -> None:
        self._linears = linears

    def __getitem__(self, module: str) -> LinearForm:
        return unpack(self._linears[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


def _tensor(artifact: Artifact, name: str, record: TensorRecord) -> Tensor:
    dtype = _DTYPES[record.dtype]
    if not record.nbytes:
        return torch.empty(record.shape, dtype=dtype)
    return torch.frombuffer(artifact.tensor(name), dtype=dtype).reshape(record.shape)
