"""What the cache raises. Callers outside Redis meet only these and `OSError`."""

from __future__ import annotations


class CacheError(Exception):
    """The cache cannot do what was asked; the message names the file or key at fault."""


class CacheFull(CacheError):
    """No room: the disk or its quota is full and nothing more may be evicted."""


class CorruptArtifact(CacheError):
    """Bytes do not match their digest, or a manifest cannot be read; such are never served."""


class ClaimLost(CacheError):
    """Another builder took the lock over; what this one made must not be published."""
