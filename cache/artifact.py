"""An artifact open for reading: its manifest and its tensors' bytes, already proven.

Holding one is a lease: no process on the host evicts it until it is closed or collected. The views
it handed out stay valid after that, because a mapping outlives its file.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from types import TracebackType

from cache.errors import CacheError
from cache.manifest import Manifest


class Artifact:
    """Made by `DiskStore.read`. `lease` is a descriptor holding a shared lock on the manifest."""

    def __init__(self, manifest: Manifest, blobs: Mapping[str, memoryview], lease: int) -> None:
        self.manifest = manifest
        self._blobs = dict(blobs)
        self._release = weakref.finalize(self, os.close, lease)

    def tensor(self, name: str) -> memoryview:
        """The bytes of tensor `name`: flat, unsigned bytes, page-aligned, not a copy.

        Writable only in form (so that `torch.frombuffer` takes it without a warning): all artifacts
        of the process that hold the same digest see the same memory, so do not write. A tensor
        without elements gives an empty view.

        Raises:
            CacheError: the artifact has no such tensor.
        """
        record = self.manifest.tensors.get(name)
        if record is None:
            raise CacheError(f"artifact {self.manifest.key} has no tensor {name!r}")
        return self._blobs[record.digest]

    def close(self) -> None:
        """End the lease. Idempotent; views handed out stay valid."""
        self._release()
        self._blobs.clear()

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
