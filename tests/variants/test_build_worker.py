"""Real build workers: killed in the middle they are gone on with; memory stays bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from cache.disk import DiskStore
from cache.manifest import Manifest
from compressors.base import CompressionError
from compressors.checkpoint import Checkpoint
from compressors.forecast import forecast
from compressors.plan import open_source, shapes_of
from compressors.recipe import Recipe
from gateway.variants import build
from gateway.variants.spec import BuildSpec
from tests.variants.workers import Worker, random_model, spec_of

LAYERS = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return random_model(folder, hidden=128, inter=344, layers=LAYERS, shard="1MB")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Some words of many kinds to look at, and 12 numbers. " * 60)
    return file


def with_text(folder: Path, cache_dir: Path, level: str, text: Path) -> BuildSpec:
    digest = blake3(text.read_bytes()).hexdigest()
    return spec_of(folder, cache_dir, level, calibration=text, calibration_digest=digest)


def manifest_of(spec: BuildSpec) -> Manifest:
    manifest = DiskStore(spec.cache_dir, spec.disk_budget).manifest(spec.key)
    assert manifest is not None
    return manifest


def test_a_killed_worker_is_gone_on_with_to_equal_digests(
    small: Path, text: Path, tmp_path: Path
) -> None:
    whole = with_text(small, tmp_path / "whole", "int4-gptq-g128", text)
    with Worker(whole) as worker:
        worker.built()
    killed = whole.model_copy(update={"cache_dir": tmp_path / "killed"})
    with Worker(killed) as worker:
        worker.kill_after("model.layers.1 done")
    store = DiskStore(killed.cache_dir, killed.disk_budget)
    assert store.manifest(killed.key) is None
    assert len(list(store.staging.iterdir())) == 1
    with Worker(killed) as worker:
        said = list(worker.messages())
    assert not [what for what in said if what.startswith(("model.layers.0.", "model.layers.1."))]
    assert f"model.layers.{LAYERS - 1} done" in said
    first, second = manifest_of(whole), manifest_of(killed)
    assert first.tensors == second.tensors
    assert first.modules == second.modules
    assert first.config == second.config
    layers = [[layer["module"] for layer in m.report["layers"]] for m in (first, second)]
    assert layers[0] == layers[1]
    assert not list(store.staging.iterdir())
    parts = first.report["parts"]
    assert sum(parts.values()) == first.total_bytes
    assert {"attention", "MLP", "embeddings", "norms", "scales, zeros and masks"} <= parts.keys()


def test_a_build_that_does_not_fit_says_so_before_it_starts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "free_memory", lambda: 10**6)
    with pytest.raises(CompressionError, match=r"int8 takes about 0\.\d GB of memory to build"):
        build.build(spec_of(small, tmp_path, "int8"), lambda _share, _what: None)
    assert not list((tmp_path / "staging").iterdir())


def test_memory_is_bounded_by_layers_not_by_the_model(tmp_path: Path) -> None:
    layers = 40
    folder = random_model(tmp_path / "m", hidden=512, inter=1376, layers=layers, shard="20MB")
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(files) > 8
    assert sum(files) > 220e6
    with Worker(spec_of(folder, tmp_path / "cache", "int8", threads=2)) as worker:
        base = peak = 0
        for message in worker.messages():
            if not base and message == "model.layers.0 done":
                worker.reset_peak()
                base = worker.memory("VmRSS")
            peak = worker.memory("VmHWM") if base else 0
            if message == f"model.layers.{layers - 1} done":
                break
    layer = 4 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 1376 * 512)  # computed with in float32
    assert base > 0
    assert peak - base <= max(files) + 2 * layer
    shapes = shapes_of(open_source(Checkpoint(folder)).model, 2)
    assert peak - base <= forecast(shapes, Recipe.parse("int8"), threads=2).peak_bytes
