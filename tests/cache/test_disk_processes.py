"""The disk tier under other processes, crashes and a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cache.disk import DiskStore
from cache.errors import CacheError, CacheFull
from tests.cache.samples import MIB, build, files_under, key_of, some_bytes

PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
from cache.disk import DiskStore
from cache.errors import CacheFull
from tests.cache.samples import MIB, build, key_of, some_bytes
store = DiskStore(Path(sys.argv[1]), 256 * MIB)
"""


def process(root: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(root)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def run(root: Path, code: str) -> str:
    child = process(root, code)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return output


def test_two_processes_write_one_artifact_at_once(tmp_path: Path) -> None:
    code = """
    sys.stdin.readline()
    for _ in range(5):
        build(store, "int8", {f"t{i}": some_bytes(i, MIB // 2) for i in range(8)})
        with store.read(key_of("int8")) as artifact:
            assert all(artifact.tensor(f"t{i}") == some_bytes(i, MIB // 2) for i in range(8))
    print("good")
    """
    children = [process(tmp_path, code) for _ in range(2)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[0] for child in children] == ["good\n", "good\n"]
    store = DiskStore(tmp_path, 256 * MIB)
    assert store.verify().corrupt == ()
    assert store.usage().blob_bytes == 4 * MIB
    assert store.usage().other_bytes == 0
    assert list(store.staging.iterdir()) == []


def test_eviction_and_gc_beside_writers_and_readers_never_serve_damage(tmp_path: Path) -> None:
    """A small quota, so that three processes constantly evict what the others write and read."""
    code = """
    store = DiskStore(Path(sys.argv[1]), 3 * MIB)
    me = int(sys.stdin.readline())
    shared = some_bytes("shared", MIB // 4)
    for turn in range(25):
        recipe = f"level{(turn + me) % 4}"
        try:
            build(store, recipe, {"e": shared, "w": some_bytes(recipe, MIB)})
        except CacheFull:
            pass
        artifact = store.read(key_of(recipe))
        if artifact is not None:
            with artifact:
                assert artifact.tensor("w") == some_bytes(recipe, MIB)
                assert artifact.tensor("e") == shared
        store.gc()
    print("good")
    """
    children = [process(tmp_path, code) for _ in range(3)]
    for number, child in enumerate(children):
        assert child.stdin is not None
        child.stdin.write(f"{number}\n")
        child.stdin.flush()
    assert [child.communicate(timeout=90)[0] for child in children] == ["good\n"] * 3
    store = DiskStore(tmp_path, 3 * MIB)
    assert store.verify().corrupt == ()
    assert list((tmp_path / "quarantine").iterdir()) == [], "nothing was ever taken for damaged"
    assert store.usage().total_bytes <= 3 * MIB


@pytest.mark.parametrize("moment", ["staged", "blobs published"])
def test_a_writer_killed_at_any_moment_leaves_only_debris(tmp_path: Path, moment: str) -> None:
    code = f"""
    import cache.writer
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if {moment!r} == "staged":
        cache.writer.ArtifactWriter.commit = die
    else:
        cache.writer.write_atomic = die
    build(store, "int8", {{"w": some_bytes(1, MIB), "v": some_bytes(2, 100)}})
    """
    child = process(tmp_path, code)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    store = DiskStore(tmp_path, 256 * MIB)
    assert store.keys() == []
    assert store.read(key_of("int8")) is None
    assert store.usage().total_bytes == MIB + 100
    store.gc()
    assert files_under(tmp_path) == set()
    build(store, "int8", {"w": some_bytes(1, MIB), "v": some_bytes(2, 100)})
    assert store.read(key_of("int8")) is not None


def test_another_process_respects_a_lease(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 256 * MIB)
    build(store, "held", {"w": some_bytes(1, 2 * MIB)})
    code = """
    try:
        DiskStore(Path(sys.argv[1]), 3 * MIB).make_room(2 * MIB)
        print("evicted")
    except CacheFull:
        print("full")
    """
    lease = store.read(key_of("held"))
    assert lease is not None
    assert run(tmp_path, code) == "full\n"
    lease.close()
    assert run(tmp_path, code) == "evicted\n"


def test_a_file_size_limit_reads_as_a_full_disk(tmp_path: Path) -> None:
    code = """
    build(store, "small", {"w": some_bytes(1, MIB)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
    try:
        build(store, "large", {"a": some_bytes(2, MIB), "w": some_bytes(3, 3 * MIB)})
    except CacheFull as error:
        print(error)
    """
    assert run(tmp_path, code) == "cannot write a blob: File too large\n"
    store = DiskStore(tmp_path, 256 * MIB)
    assert store.keys() == [key_of("small")]
    assert store.usage().total_bytes == MIB
    assert list(store.staging.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    return folder


def test_a_really_full_disk(tiny_disk: Path) -> None:
    try:
        store = DiskStore(tiny_disk, 256 * MIB)
        build(store, "old", {"w": some_bytes(1, 2 * MIB)})
        held = store.read(key_of("old"))
        assert held is not None
        before = files_under(tiny_disk)
        with pytest.raises(CacheFull):
            build(store, "new", {"a": some_bytes(2, MIB), "w": some_bytes(3, 2 * MIB)})
        assert files_under(tiny_disk) == before
        with held:
            assert held.tensor("w") == some_bytes(1, 2 * MIB)
        build(store, "new", {"a": some_bytes(2, MIB), "w": some_bytes(3, 2 * MIB)})
        assert store.keys() == [key_of("new")], "with nothing in use, the old one made room"
    finally:
        subprocess.run(["umount", "-l", str(tiny_disk)], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_errors_of_the_disk_are_clear_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    store = DiskStore(tmp_path, 256 * MIB)
    build(store, "old", {"w": b"old"})
    before = files_under(tmp_path)
    real = getattr(os, call)
    calls = 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    full = code in {errno.ENOSPC, errno.EDQUOT}
    with pytest.raises(CacheFull if full else CacheError, match=os.strerror(code)) as caught:
        build(store, "new", {f"t{i}": some_bytes(i, 1000) for i in range(4)})
    assert isinstance(caught.value, CacheFull) == full
    assert files_under(tmp_path) == before
    monkeypatch.undo()
    build(store, "new", {f"t{i}": some_bytes(i, 1000) for i in range(4)})
    assert store.verify().corrupt == ()
