"""Build jobs: a bounded queue in front of one worker process at a time.

Owns the worker subprocess and what is told about it. Does not know what a level is for, who waits,
or where artifacts go: `variants.pool` gives it a spec and hears of the end.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import orjson

from gateway.errors import NotFound, Overloaded

log = logging.getLogger(__name__)

_HISTORY = 256  # finished jobs kept for /v1/jobs
_LINE_LIMIT = 1 << 20


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Job:
    """One build as `/v1/jobs` shows it. Times are Unix seconds."""

    id: str
    model: str
    level: str
    state: JobState
    progress: float
    message: str
    created: float
    started: float | None = None
    finished: float | None = None
    error: str | None = None
    build_seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class BuildFailed(Exception):
    """The worker said no, or died; the message is one line for people."""


class JobBoard:
    """Every job this process knows, newest last. Jobs are replaced, never changed in place."""

    def __init__(self, max_open: int, on_change: Callable[[Job], None]) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._max_open = max_open
        self._on_change = on_change

    def open(self, model: str, level: str) -> Job:
        """Enter a queued job.

        Raises:
            Overloaded: too many jobs are queued or running.
        """
        unfinished = [job for job in self._jobs.values() if not job.ended]
        if len(unfinished) >= self._max_open:
            raise Overloaded(
                f"{len(unfinished)} builds are queued or running, the limit is {self._max_open}",
                retry_after=30.0,
            )
        job = Job(
            id=f"job-{uuid.uuid4().hex[:12]}",
            model=model,
            level=level,
            state=JobState.QUEUED,
            progress=0.0,
            message="queued",
            created=time.time(),
        )
        self._put(job)
        return job

    def start(self, job_id: str) -> None:
        self._put(
            replace(
                self.get(job_id), state=JobState.RUNNING, started=time.time(), message="starting"
            )
        )

    def progress(self, job_id: str, share: float, message: str) -> None:
        job = self.get(job_id)
        self._put(replace(job, progress=max(job.progress, min(share, 1.0)), message=message))

    def finish(self, job_id: str, state: JobState, error: str | None = None) -> None:
        job = self.get(job_id)
        now = time.time()
        done = state is JobState.DONE
        self._put(
            replace(
                job,
                state=state,
                progress=1.0 if done else job.progress,
                message=state.value,
                finished=now,
                error=error,
                build_seconds=now - (job.started or now),
            )
        )
        ended = [job.id for job in self._jobs.values() if job.ended]
        for old in ended[:-_HISTORY]:
            del self._jobs[old]

    def get(self, job_id: str) -> Job:
        """
        Raises:
            NotFound: no such job (or forgotten: only the last 256 are kept).
        """
        if job_id not in self._jobs:
            raise NotFound(f"no job {job_id!r}", param="id")
        return self._jobs[job_id]

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def _put(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._on_change(job)


async def run_worker(
    spec: bytes,
    *,
    timeout: float,
    on_progress: Callable[[float, str], None],
    on_event: Callable[[str, str], None] = lambda _event, _what: None,
) -> dict[str, object]:
    """Run `python -m gateway.variants.worker` on a JSON spec and return its result object.

    `on_event` hears of what the worker's disk cache evicted or found damaged. The worker lowers
    its own priority, limits its threads and dies with this process. Cancelling this coroutine
    kills it.

    Raises:
        BuildFailed: the worker reported an error, died, or ran over `timeout` seconds.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the folder we were started in must not shadow our packages
        "-m",
        "gateway.variants.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
    )
    try:
        async with asyncio.timeout(timeout):
            return await _converse(process, spec, on_progress, on_event)
    except TimeoutError:
        raise BuildFailed(f"the build ran over {timeout:.0f} s and was stopped") from None
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _converse(
    process: asyncio.subprocess.Process,
    spec: bytes,
    on_progress: Callable[[float, str], None],
    on_event: Callable[[str, str], None],
) -> dict[str, object]:
    """Send the spec, follow the progress lines, return the result line."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    complaints = asyncio.create_task(_tail(process.stderr))
    result: dict[str, object] | None = None
    try:
        process.stdin.write(spec)
        process.stdin.close()
        async for line in process.stdout:
            said = orjson.loads(line)
            if "progress" in said:
                on_progress(said["progress"], said["message"])
            elif "event" in said:
                on_event(said["event"], said["what"])
            else:
                result = said
        code = await process.wait()
        last_words = await complaints
    finally:
        complaints.cancel()
    if result is not None and "error" in result:
        raise BuildFailed(str(result["error"]))
    if code != 0 or result is None:
        log.error("build worker died with status %s: %s", code, last_words)
        raise BuildFailed(f"the build worker died with status {code}")
    return result


async def _tail(stream: asyncio.StreamReader, keep: int = 4000) -> str:
    """The last `keep` characters of a stream; reading on keeps the worker from blocking."""
    text = b""
    while chunk := await stream.read(4096):
        text = (text + chunk)[-keep:]
    return text.decode(errors="replace")
