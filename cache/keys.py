"""Names inside the cache: the key of a variant, digests, and which words may become file names.

Every name that reaches the disk or Redis passes through here first.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

import orjson
from blake3 import blake3

from cache.errors import CacheError

FORMAT_VERSION = 1
"""Part of every key: raised when stored bytes change meaning; old artifacts are then never read."""

DIGEST_PATTERN = r"^[0-9a-f]{64}$"
KEY_PATTERN = r"^[0-9a-f]{32,64}$"

_DIGEST = re.compile(DIGEST_PATTERN)
_KEY = re.compile(KEY_PATTERN)
_NAMESPACE = re.compile(r"^[a-z][a-z0-9_-]{0,63}$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._@+/:=-]{0,191}$")
_MAX_FILE_NAME = 240  # bytes; file systems stop at 255 and we add a suffix


def variant_key(
    *, model: str, revision: str, recipe: str, source: str, calibration: str, seed: int
) -> str:
    """The identity of a variant's bytes: 64 hex digits, the same on every host.

    Args:
        source: digest of the dense checkpoint's tensors.
        calibration: digest of the calibration tokens; empty for data-free recipes.
    """
    facts = {
        "format": FORMAT_VERSION,
        "model": model,
        "revision": revision,
        "recipe": recipe,
        "source": source,
        "calibration": calibration,
        "seed": seed,
    }
    return blake3(orjson.dumps(facts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def check_key(key: str) -> str:
    """`key` itself. Raises `CacheError` unless it is 32 to 64 hex digits."""
    if not _KEY.fullmatch(key):
        raise CacheError(f"not an artifact key: {key[:80]!r}")
    return key


def check_digest(digest: str) -> str:
    """`digest` itself. Raises `CacheError` unless it is 64 hex digits."""
    if not _DIGEST.fullmatch(digest):
        raise CacheError(f"not a digest: {digest[:80]!r}")
    return digest


def is_digest(text: str) -> bool:
    """Whether `text` is 64 hex digits."""
    return _DIGEST.fullmatch(text) is not None


def check_namespace(namespace: str) -> str:
    """`namespace` itself. Raises `CacheError` unless it is a short lower-case word."""
    if not _NAMESPACE.fullmatch(namespace):
        raise CacheError(f"not a namespace: {namespace[:80]!r}")
    return namespace


def check_name(name: str) -> str:
    """`name` itself, e.g. `docs-17m@int4-gptq-g128`. Raises `CacheError` for anything unusual."""
    if not _NAME.fullmatch(name) or len(file_name(name)) > _MAX_FILE_NAME:
        raise CacheError(f"not a document name: {name[:80]!r}")
    return name


def file_name(name: str) -> str:
    """A checked name as one path component; `/` and `:` are escaped, so nothing can climb out."""
    return quote(name, safe="@+=")


def name_of(file: str) -> str:
    """The inverse of `file_name`."""
    return unquote(file)
