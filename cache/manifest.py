"""The manifest: everything known about one artifact besides its bytes. JSON in and out.

A manifest that parses is safe to act on: sizes are bounded and consistent, digests are hex, modules
refer only to tensors that are listed. It never holds tensor data or paths.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cache.errors import CorruptArtifact
from cache.keys import DIGEST_PATTERN, FORMAT_VERSION, KEY_PATTERN

MAX_MANIFEST_BYTES = 64 * 2**20
MAX_TENSORS = 200_000
MAX_BLOB_BYTES = 2**40

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of every dtype an artifact may hold, under safetensors' names."""

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Words = Annotated[str, Field(max_length=512)]
TensorName = Annotated[str, Field(min_length=1, max_length=512)]
Meta = dict[TensorName, int | float | str | bool]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorRecord(_Frozen):
    """One stored tensor: row-major, little-endian, `nbytes` long, in the blob named `digest`."""

    digest: Digest
    dtype: Annotated[str, Field(max_length=16)]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2**48)], ...], Field(max_length=8, strict=False)
    ]
    nbytes: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]

    @model_validator(mode="after")
    def _consistent(self) -> TensorRecord:
        size = ITEM_SIZE.get(self.dtype)
        if size is None:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        if self.nbytes != math.prod(self.shape) * size:
            raise ValueError(f"{self.nbytes} bytes are not {self.dtype}{list(self.shape)}")
        return self


class ModuleRecord(_Frozen):
    """One compressed linear in a kernel's storage layout; `tensors` maps suffix → tensor name."""

    scheme: Annotated[str, Field(min_length=1, max_length=64)]
    layout: Annotated[str, Field(min_length=1, max_length=64)]
    meta: Meta = Field(default_factory=dict, max_length=64)
    tensors: dict[TensorName, TensorName] = Field(default_factory=dict, max_length=64)


class Manifest(_Frozen):
    """One artifact.

    Attributes:
        key: `cache.keys.variant_key` of the facts below.
        config: the transformers config of the compressed model.
        versions: library → version at build time.
        tensors: tensor name → record; two names may share a digest.
        modules: module path → how its linear is stored.
        total_bytes: bytes of its distinct blobs; computed when left out.
        report: what the compression job said of itself.
        created: Unix time, seconds.
    """

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    key: Annotated[str, Field(pattern=KEY_PATTERN)]
    model: Words
    revision: Words = ""
    recipe: Words
    source_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{0,128}$")] = ""
    calibration_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{0,128}$")] = ""
    seed: int = 0
    versions: dict[Words, Words] = Field(default_factory=dict, max_length=64)
    config: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[TensorName, TensorRecord] = Field(max_length=MAX_TENSORS)
    modules: dict[TensorName, ModuleRecord] = Field(default_factory=dict, max_length=MAX_TENSORS)
    total_bytes: Annotated[int, Field(ge=-1)] = -1
    build_seconds: Annotated[float, Field(ge=0)] = 0.0
    report: dict[str, Any] = Field(default_factory=dict)
    created: Annotated[float, Field(ge=0)] = Field(default_factory=time.time)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        sizes: dict[str, int] = {}
        for name, record in self.tensors.items():
            if sizes.setdefault(record.digest, record.nbytes) != record.nbytes:
                raise ValueError(f"tensor {name!r}: one digest with two sizes")
        for module, stored in self.modules.items():
            for name in stored.tensors.values():
                if name not in self.tensors:
                    raise ValueError(f"module {module!r}: no tensor {name!r}")
        total = sum(sizes.values())
        if self.total_bytes not in (-1, total):
            raise ValueError(f"total_bytes is {self.total_bytes}, its blobs have {total}")
        object.__setattr__(self, "total_bytes", total)  # frozen; filled in once, here
        return self

    @property
    def blobs(self) -> dict[str, int]:
        """Digest → bytes of every distinct blob, in order of first use."""
        return {record.digest: record.nbytes for record in self.tensors.values()}

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and validate. Raises `CorruptArtifact` with the first field at fault."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptArtifact(f"manifest of {len(data)} bytes is too large")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise CorruptArtifact(f"manifest is not valid: {where}: {first['msg']}") from None
