"""A child process that is asked in JSON lines: how engines of other interpreters are timed."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

_STDERR_TAIL = 400


class EngineError(Exception):
    """An engine gave no number; the message says which and why."""


class Skipped(EngineError):
    """A peer is not there or has nothing comparable; the message says what is missing."""


class Child:
    """A process that answers one JSON line per JSON line. `with` it, or `close` it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | dict(environment or {}),
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a line that has no answer. Raises: EngineError when the child has ended."""
        stdin = self._process.stdin
        assert stdin is not None, "made with a pipe"
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise EngineError(f"{self.name}: ended: {self._tail()}") from None

    def ask(self, question: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Send a question and wait for its answer.

        Raises:
            EngineError: the child says so, ended, or took longer than `timeout` seconds.
        """
        self.tell(question)
        stdout = self._process.stdout
        assert stdout is not None, "made with a pipe"
        with selectors.DefaultSelector() as ready:
            ready.register(stdout, selectors.EVENT_READ)
            if not ready.select(timeout):
                raise EngineError(f"{self.name}: no answer within {timeout:g} s")
        line = stdout.readline()
        if not line:
            raise EngineError(f"{self.name}: ended: {self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return dict(answer)

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _tail(self) -> str:
        """The last of what it wrote to standard error."""
        self._process.wait(timeout=10)
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        return text[-_STDERR_TAIL:] or f"exit status {self._process.returncode}"
