"""An artifact whose writer was killed goes on with the blobs that it had put, if they are whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from cache.disk import DiskStore
from cache.manifest import Manifest, TensorRecord
from tests.cache.samples import key_of

KEY = key_of("int8")


def manifest_of(records: dict[str, TensorRecord]) -> Manifest:
    return Manifest(key=KEY, model="docs-17m", recipe="int8", tensors=records)


def put_and_die(root: Path) -> None:
    writer = DiskStore(root, 2**20).writer(KEY)
    for name in ("a", "b"):
        writer.put(name, name.encode() * 1000, "U8", (1000,))
    writer.blob(10)  # begun, never finished
    (writer.folder / "notes").write_text("two done")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    """A store whose writer was killed."""
    process = multiprocessing.get_context("spawn").Process(target=put_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return DiskStore(tmp_path, 2**20)


def test_the_next_writer_of_the_key_goes_on(store: DiskStore) -> None:
    with store.writer(KEY, resume=True) as writer:
        assert writer.resumed
        assert (writer.folder / "notes").read_text() == "two done"
        assert not list(writer.folder.glob("*.part"))
        again = {name: writer.put(name, name.encode() * 1000, "U8", (1000,)) for name in "abc"}
        assert sum(path.stat().st_size == 1000 for path in writer.folder.iterdir()) == 3
        writer.commit(manifest_of(again))
    artifact = store.read(KEY)
    assert artifact is not None
    assert bytes(artifact.tensor("b")) == b"b" * 1000
    assert not list(store.staging.iterdir())


def test_a_torn_blob_is_written_again(store: DiskStore) -> None:
    (folder,) = store.staging.iterdir()
    blob = next(path for path in folder.iterdir() if path.stat().st_size == 1000)
    blob.write_bytes(b"x" * 1000)
    with store.writer(KEY, resume=True) as writer:
        assert writer.resumed
        assert not writer.has(blob.name)
        records = {name: writer.put(name, name.encode() * 1000, "U8", (1000,)) for name in "ab"}
        writer.commit(manifest_of(records))
    assert store.read(KEY) is not None


def test_others_leave_it_alone(store: DiskStore) -> None:
    with store.writer(key_of("int4"), resume=True) as other, store.writer(KEY) as fresh:
        assert not other.resumed
        assert not fresh.resumed
    with store.writer(KEY, resume=True) as first, store.writer(KEY, resume=True) as second:
        assert first.resumed  # what a living writer stages is never taken
        assert not second.resumed
