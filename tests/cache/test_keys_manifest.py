"""Names and manifests: what is let in and what is not."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache.errors import CacheError, CorruptArtifact
from cache.keys import check_key, check_name, check_namespace, file_name, name_of, variant_key
from cache.manifest import ITEM_SIZE, Manifest, ModuleRecord, TensorRecord

DIGEST = "a" * 64
FACTS = {
    "model": "m",
    "revision": "r",
    "recipe": "int8",
    "source": "ab",
    "calibration": "cd",
    "seed": 0,
}


def test_every_fact_is_part_of_the_key() -> None:
    base = variant_key(**FACTS)  # type: ignore[arg-type]
    assert check_key(base) == base
    assert variant_key(**FACTS) == base  # type: ignore[arg-type]
    others = {
        variant_key(**{**FACTS, name: 1 if name == "seed" else "other"})  # type: ignore[arg-type]
        for name in FACTS
    }
    assert len(others | {base}) == len(FACTS) + 1


def test_facts_do_not_run_together() -> None:
    one = variant_key(**{**FACTS, "model": "a", "revision": "bc"})  # type: ignore[arg-type]
    two = variant_key(**{**FACTS, "model": "ab", "revision": "c"})  # type: ignore[arg-type]
    assert one != two


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a b", "a\n", "-x", "ü", "a" * 193])
def test_unsafe_document_names_are_refused(name: str) -> None:
    with pytest.raises(CacheError):
        check_name(name)


@pytest.mark.parametrize("namespace", ["", "..", "a/b", "A", "a" * 65, "a\n"])
def test_unsafe_namespaces_are_refused(namespace: str) -> None:
    with pytest.raises(CacheError):
        check_namespace(namespace)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@+/:=-]{0,60}", fullmatch=True))
def test_a_good_name_is_one_path_component_and_comes_back(name: str) -> None:
    file = file_name(check_name(name))
    assert "/" not in file
    assert file not in {".", ".."}
    assert name_of(file) == name


def record(
    digest: str = DIGEST, dtype: str = "F32", shape: tuple[int, ...] = (2, 3)
) -> TensorRecord:
    nbytes = ITEM_SIZE[dtype]
    for size in shape:
        nbytes *= size
    return TensorRecord(digest=digest, dtype=dtype, shape=shape, nbytes=nbytes)


def manifest(**fields: object) -> Manifest:
    base: dict[str, object] = {
        "key": "ab" * 32,
        "model": "m",
        "recipe": "int8",
        "tensors": {"w": record()},
        "modules": {
            "model.layers.0.mlp.up_proj": ModuleRecord(
                scheme="grouped",
                layout="rowmajor",
                meta={"bits": 4, "scale": 0.5, "name": "x", "symmetric": True},
                tensors={"codes": "w"},
            )
        },
    }
    return Manifest(**(base | fields))  # type: ignore[arg-type]


def test_a_manifest_survives_json_exactly() -> None:
    original = manifest(config={"hidden_size": 64, "rope": {"theta": 1e4}}, report={"x": [1, None]})
    again = Manifest.from_json(original.to_json())
    assert again == original
    meta = again.modules["model.layers.0.mlp.up_proj"].meta
    assert [type(value) for value in meta.values()] == [int, float, str, bool]


def test_total_bytes_counts_a_shared_blob_once() -> None:
    shared = manifest(
        tensors={"w": record(), "head": record(), "n": record("b" * 64, "BF16", (8,))}
    )
    assert shared.total_bytes == 24 + 16
    assert shared.blobs == {DIGEST: 24, "b" * 64: 16}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("key",), "../../etc/passwd"),
        (("format_version",), 99),
        (("total_bytes",), 7),
        (("surprise",), 1),
        (("tensors", "w", "digest"), "A" * 64),
        (("tensors", "w", "digest"), "../" + "a" * 61),
        (("tensors", "w", "nbytes"), 23),
        (("tensors", "w", "nbytes"), -24),
        (("tensors", "w", "nbytes"), 24.5),
        (("tensors", "w", "shape"), [2, -3]),
        (("tensors", "w", "shape"), [1] * 9),
        (("tensors", "w", "dtype"), "O"),
        (("tensors", "w", "path"), "/etc/passwd"),
        (("modules", "model.layers.0.mlp.up_proj", "tensors", "codes"), "absent"),
        (("build_seconds",), "nan"),
    ],
    ids=str,
)
def test_a_manifest_with_a_wrong_field_is_refused_and_named(
    path: tuple[str, ...], value: object
) -> None:
    data = orjson.loads(manifest().to_json())
    at = data
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    with pytest.raises(CorruptArtifact, match=r"manifest is not valid: \S+: "):
        Manifest.from_json(orjson.dumps(data))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    with pytest.raises(CorruptArtifact):
        Manifest.from_json(data)


def test_deep_nesting_is_refused_not_fatal() -> None:
    with pytest.raises(CorruptArtifact):
        Manifest.from_json(b'{"config":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}")


def test_one_digest_cannot_have_two_sizes() -> None:
    with pytest.raises(ValidationError, match="two sizes"):
        manifest(tensors={"w": record(), "v": record(shape=(3, 3))}, modules={})
