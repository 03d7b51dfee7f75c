"""The disk tier: published whole or not at all, proven before use, within its quota."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cache.blobs import hash_bytes
from cache.disk import DiskStore, Event
from cache.errors import CacheError, CacheFull, ClaimLost, CorruptArtifact
from cache.manifest import Manifest
from tests.cache.samples import MIB, build, files_under, key_of, some_bytes


@pytest.fixture
def events() -> Counter[Event]:
    return Counter()


@pytest.fixture
def store(tmp_path: Path, events: Counter[Event]) -> DiskStore:
    return DiskStore(tmp_path, 64 * MIB, on_event=lambda event, _what: events.update([event]))


def reopened(store: DiskStore) -> DiskStore:
    """The same folder seen by a process that has proven nothing yet."""
    return DiskStore(store.root, store.budget)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_read_is_what_was_put(store: DiskStore, events: Counter[Event]) -> None:
    tensors = {"a": some_bytes(1, 3 * MIB + 7), "b": some_bytes(2, 5), "empty": b""}
    written = build(store, "int8", tensors)
    for view in (store, reopened(store)):
        with view.read(key_of("int8")) as artifact:  # type: ignore[union-attr]
            assert artifact.manifest == written
            for name, data in tensors.items():
                assert artifact.tensor(name) == data
            with pytest.raises(CacheError, match="no tensor 'c'"):
                artifact.tensor("c")
    assert store.keys() == [key_of("int8")]
    assert store.manifest(key_of("int8")) == written
    assert store.read(key_of("bf16")) is None
    assert events == {Event.HIT: 1, Event.MISS: 1}


def test_any_buffer_can_be_put(store: DiskStore) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    with store.writer(key_of("fp32")) as writer:
        record = writer.put("w", array, "F32", array.shape)
        none = writer.put("n", np.zeros((0, 4), np.float32), "F32", (0, 4))
        with pytest.raises(ValueError, match="bytes are not F32"):
            writer.put("w", array, "F32", (3, 5))
        manifest = Manifest(
            key=key_of("fp32"), model="m", recipe="fp32", tensors={"w": record, "n": none}
        )
        writer.commit(manifest)
    with store.read(key_of("fp32")) as artifact:  # type: ignore[union-attr]
        assert np.array_equal(np.frombuffer(artifact.tensor("w"), np.float32).reshape(3, 4), array)


def test_views_are_mapped_shared_and_outlive_the_artifact(store: DiskStore) -> None:
    embedding = some_bytes("embedding", MIB)
    build(store, "int8", {"embed": embedding, "w": b"8" * 100})
    build(store, "int4", {"tok": embedding, "w": b"4" * 100})
    first, second = store.read(key_of("int8")), store.read(key_of("int4"))
    assert first is not None
    assert second is not None
    one = np.frombuffer(first.tensor("embed"), np.uint8)
    two = np.frombuffer(second.tensor("tok"), np.uint8)
    assert one.ctypes.data == two.ctypes.data, "one mapping for one digest"
    first.close()
    first.close()
    second.close()
    store.delete(key_of("int8"))
    store.delete(key_of("int4"))
    assert bytes(one) == embedding
    assert store.usage().blobs == 0


def test_torch_takes_a_view_without_copying(store: DiskStore) -> None:
    torch = pytest.importorskip("torch")
    build(store, "int8", {"w": some_bytes(1, 4096)})
    with store.read(key_of("int8")) as artifact:  # type: ignore[union-attr]
        view = artifact.tensor("w")
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        assert tensor.data_ptr() == np.frombuffer(view, np.uint8).ctypes.data


def test_mappings_hold_no_descriptors(store: DiskStore) -> None:
    build(store, "int8", {f"t{i}": some_bytes(i, 64) for i in range(200)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    artifact = store.read(key_of("int8"))
    assert artifact is not None
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the lease
    artifact.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_equal_tensors_are_stored_once(store: DiskStore) -> None:
    shared = some_bytes("shared", MIB)
    build(store, "int8", {"embed": shared, "head": shared, "w": b"8"})
    inode = store.blobs.path(hash_bytes(shared)).stat().st_ino
    build(store, "int4", {"embed": shared, "w": b"4"})
    assert store.usage().blob_bytes == MIB + 2
    assert store.blobs.path(hash_bytes(shared)).stat().st_ino == inode, "not written again"
    store.delete(key_of("int8"))
    assert store.usage().blob_bytes == MIB + 1
    assert store.read(key_of("int4")) is not None


def test_an_abandoned_writer_leaves_nothing(store: DiskStore) -> None:
    before = files_under(store.root)
    with store.writer(key_of("int8")) as writer:
        writer.put("w", b"x" * 1000, "U8", (1000,))
        assert store.usage().other_bytes == 1000
    assert files_under(store.root) == before
    assert list(store.staging.iterdir()) == []
    assert store.keys() == []
    with pytest.raises(CacheError, match="closed"):
        writer.put("w", b"", "U8", (0,))


def test_commit_refuses_what_was_not_put(store: DiskStore) -> None:
    manifest = build(store, "int8", {"w": b"8"})
    with store.writer(key_of("int8")) as writer, pytest.raises(CacheError, match="never put"):
        writer.commit(manifest)
    with store.writer(key_of("int4")) as writer, pytest.raises(CacheError, match="given to"):
        writer.commit(manifest)


def test_a_leader_that_lost_its_claim_cannot_publish(store: DiskStore) -> None:
    with store.writer(key_of("int8")) as writer:
        record = writer.put("w", b"x", "U8", (1,))
        manifest = Manifest(key=key_of("int8"), model="m", recipe="r", tensors={"w": record})
        with pytest.raises(ClaimLost):
            writer.commit(manifest, guard=lambda: False)
    assert store.keys() == []
    assert files_under(store.root) == set()


def damage_flip(store: DiskStore, digest: str) -> None:
    flip_byte(store.blobs.path(digest))


def damage_truncate(store: DiskStore, digest: str) -> None:
    os.truncate(store.blobs.path(digest), 10)


def damage_extend(store: DiskStore, digest: str) -> None:
    with store.blobs.path(digest).open("ab") as file:
        file.write(b"more")


def damage_remove(store: DiskStore, digest: str) -> None:
    store.blobs.path(digest).unlink()


def damage_manifest(store: DiskStore, _digest: str) -> None:
    path = store.manifest_path(key_of("int8"))
    path.write_bytes(path.read_bytes()[:-20])


def damage_swap(store: DiskStore, _digest: str) -> None:
    other = store.manifest_path(key_of("bf16"))
    store.manifest_path(key_of("int8")).write_bytes(other.read_bytes())


DAMAGES = [
    damage_flip,
    damage_truncate,
    damage_extend,
    damage_remove,
    damage_manifest,
    damage_swap,
]


@pytest.mark.parametrize("proven", [True, False], ids=["proven before", "fresh process"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_never_served_and_can_be_rebuilt(
    store: DiskStore, damage: object, proven: bool, events: Counter[Event]
) -> None:
    tensors = {"w": some_bytes(1, 2 * MIB), "v": some_bytes(2, 100)}
    build(store, "int8", tensors)
    build(store, "bf16", {"w": b"other"})
    if proven:
        store.read(key_of("int8")).close()  # type: ignore[union-attr]
    damage(store, hash_bytes(tensors["w"]))  # type: ignore[operator]
    if not proven:
        store = DiskStore(
            store.root, store.budget, on_event=lambda event, _what: events.update([event])
        )
    assert store.read(key_of("int8")) is None
    assert events[Event.CORRUPTION] == 1
    assert store.keys() == [key_of("bf16")]
    assert store.usage().other_bytes > 0, "kept aside for a look"
    assert store.read(key_of("bf16")) is not None
    build(store, "int8", tensors)
    with store.read(key_of("int8")) as artifact:  # type: ignore[union-attr]
        assert artifact.tensor("w") == tensors["w"]
    assert reopened(store).verify().corrupt == ()


def test_verify_reads_everything_again(store: DiskStore) -> None:
    shared = some_bytes(0, MIB)
    build(store, "int8", {"e": shared, "w": b"8" * 50})
    build(store, "int4", {"e": shared, "w": b"4" * 50})
    report = store.verify()
    assert (report.artifacts, report.blobs, report.checked_bytes) == (2, 3, MIB + 100)
    path = store.blobs.path(hash_bytes(b"4" * 50))
    times = path.stat()
    flip_byte(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as silent as a failing disk
    report = store.verify()
    assert [line.split(":")[0] for line in report.corrupt] == [key_of("int4")]
    assert store.keys() == [key_of("int8")]


def test_gc_removes_what_a_crash_left(store: DiskStore) -> None:
    """Crashes between blobs and manifest, in the middle of a blob, and of a manifest."""
    build(store, "int8", {"w": b"8" * 100})
    orphan = store.blobs.path("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x" * 1000)
    dead = store.staging / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "half.part").write_bytes(b"y" * 500)
    (store.root / "manifests" / ".zz.tmp").write_bytes(b"{")
    with store.writer(key_of("int4")) as writer:
        record = writer.put("w", b"4" * 100, "U8", (100,))
        report = store.gc()
        assert (report.blobs, report.staging, report.freed_bytes) == (1, 1, 1500)
        writer.commit(Manifest(key=key_of("int4"), model="m", recipe="int4", tensors={"w": record}))
    assert store.verify().corrupt == ()
    assert store.keys() == sorted([key_of("int8"), key_of("int4")])
    assert not list((store.root / "manifests").glob(".*"))


def test_a_blob_held_by_a_writer_survives_its_last_owner(store: DiskStore) -> None:
    shared = some_bytes(0, MIB)
    build(store, "int8", {"e": shared})
    with store.writer(key_of("int4")) as writer:
        record = writer.put("e", shared, "U8", (MIB,))
        store.delete(key_of("int8"))
        assert not store.blobs.path(record.digest).exists()
        writer.commit(Manifest(key=key_of("int4"), model="m", recipe="int4", tensors={"e": record}))
    with reopened(store).read(key_of("int4")) as artifact:  # type: ignore[union-attr]
        assert artifact.tensor("e") == shared


def test_a_file_system_without_links_writes_again(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = some_bytes(0, MIB)
    build(store, "int8", {"e": shared})

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    build(store, "int4", {"e": shared, "w": b"4"})
    assert store.usage().blob_bytes == MIB + 1
    assert store.verify().corrupt == ()


def test_quarantine_is_emptied_in_time(store: DiskStore) -> None:
    build(store, "int8", {"w": b"8" * 100})
    flip_byte(store.blobs.path(hash_bytes(b"8" * 100)))
    assert store.read(key_of("int8")) is None
    assert store.gc().quarantined == 0
    assert store.gc(quarantine_seconds=0).quarantined == 2
    assert store.usage().total_bytes == 0


def test_the_quota_evicts_the_least_valuable(tmp_path: Path, events: Counter[Event]) -> None:
    store = DiskStore(tmp_path, 10 * MIB, on_event=lambda event, _w: events.update([event]))
    build(store, "cheap", {"w": some_bytes(1, 4 * MIB)}, build_seconds=1)
    build(store, "dear", {"w": some_bytes(2, 4 * MIB)}, build_seconds=100)
    build(store, "new", {"w": some_bytes(3, 4 * MIB)}, build_seconds=10)
    assert store.keys() == sorted([key_of("dear"), key_of("new")])
    assert events[Event.EVICTION] == 1
    assert store.usage().total_bytes <= store.budget
    for _ in range(50):
        store.touch(key_of("new"))
    build(store, "newest", {"w": some_bytes(4, 4 * MIB)}, build_seconds=50)
    assert store.keys() == sorted([key_of("newest"), key_of("new")]), (
        "50 uses outweigh 10x the cost"
    )


def test_a_leased_artifact_is_not_evicted_and_full_is_said(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 10 * MIB)
    build(store, "held", {"w": some_bytes(1, 6 * MIB)}, build_seconds=0)
    lease = reopened(store).read(key_of("held"))
    assert lease is not None
    before = files_under(tmp_path)
    with pytest.raises(CacheFull, match="no room for 6291456 bytes"):
        build(store, "new", {"w": some_bytes(2, 6 * MIB)})
    assert files_under(tmp_path) == before
    lease.close()
    build(store, "new", {"w": some_bytes(2, 6 * MIB)})
    assert store.keys() == [key_of("new")]


def test_bad_keys_never_reach_the_disk(store: DiskStore) -> None:
    for bad in ("../../x", "", "A" * 64, "a" * 31, "a" * 64 + "\n"):
        for call in (store.read, store.writer, store.manifest, store.delete, store.touch):
            with pytest.raises(CacheError):
                call(bad)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot use .*file"):
        DiskStore(tmp_path / "file", MIB)


def test_streamed_blobs_are_checked(store: DiskStore) -> None:
    digest = hash_bytes(b"abcdef")
    with store.writer(key_of("int8")) as writer:
        with writer.blob(6) as blob:
            blob.write(b"abc")
            with pytest.raises(CorruptArtifact, match="3 bytes instead of 6"):
                blob.finish(digest)
            blob.write(b"xyz")
            with pytest.raises(CorruptArtifact, match="do not match"):
                blob.finish(digest)
            with pytest.raises(CorruptArtifact, match="after its end"):
                blob.write(b"!")
        assert not writer.hold(digest, 6)
        assert [p.name for p in next(store.staging.iterdir()).iterdir()] == ["lock"]
