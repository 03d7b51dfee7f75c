"""Builds and measurements: one at a time, each a task that later callers join, each with a job.

Moves a variant between absent, building, stored and failed; everything else is the pool's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.errors import Unavailable
from gateway.variants.entry import Variant
from gateway.variants.jobs import BuildFailed, JobBoard, JobState
from gateway.variants.variant import State

log = logging.getLogger(__name__)


class Builder:
    """Makes levels for the pool.

    Args:
        board: where jobs are shown.
        made: told of every level whose artifact was built.
    """

    def __init__(
        self, board: JobBoard, made: Callable[[Variant], None], clock: Callable[[], float]
    ) -> None:
        self.board = board
        self._made, self._clock = made, clock
        self._turn = asyncio.Semaphore(1)  # one worker at a time: builds are heavy
        self._closing = False

    def close(self) -> None:
        """Start nothing any more; who owns the tasks cancels them."""
        self._closing = True

    def ensure(self, variant: Variant, reason: str) -> asyncio.Task[None]:
        """The task that builds the level, started if there is none.

        Raises:
            Unavailable: closed.
            Overloaded: too many builds.
        """
        if variant.building is None:
            if self._closing:
                raise Unavailable("the gateway is shutting down", retry_after=5.0)
            job = self.board.open(variant.backend.model, variant.spec.level)
            log.info("building %s (%s)", variant.name, reason)
            variant.state, variant.job_id, variant.error = State.BUILDING, job.id, None
            variant.building = asyncio.create_task(
                self._build(variant, job.id), name=f"build {variant.name}"
            )
        return variant.building

    def ready_in(self, variant: Variant) -> float:
        """Seconds after which asking again makes sense."""
        card = variant.backend.card(variant.spec.level)
        if variant.state is not State.BUILDING or variant.job_id is None:
            return max(1.0, card.load_seconds)
        job = self.board.get(variant.job_id)
        return max(1.0, card.build_seconds * (1.0 - job.progress))

    async def _build(self, variant: Variant, job_id: str) -> None:
        try:
            async with self._turn:
                self.board.start(job_id)
                await variant.backend.build(
                    variant.spec.level,
                    lambda share, message: self.board.progress(job_id, share, message),
                )
            self.board.finish(job_id, JobState.DONE)
            variant.state = State.STORED
            self._made(variant)
        except asyncio.CancelledError:
            self.board.finish(job_id, JobState.CANCELLED)
            variant.state = State.ABSENT
            raise
        except BuildFailed as error:
            self.board.finish(job_id, JobState.FAILED, str(error))
            variant.fail(str(error), self._clock())
            raise
        except Exception as error:
            log.exception("building %s", variant.name)
            self.board.finish(job_id, JobState.FAILED, "internal error; see the log")
            variant.fail("internal error; see the log", self._clock())
            raise BuildFailed("internal error; see the log") from error
        finally:
            variant.building = None

    async def measure(self, variant: Variant) -> None:
        """Make the card of a level that serves already; it keeps serving on an estimate if not."""
        job = self.board.open(variant.backend.model, variant.spec.level)
        state = JobState.CANCELLED
        error: str | None = None
        try:
            # Not in the builds' queue: nobody waits for this, and nobody should wait behind it.
            self.board.start(job.id)
            await variant.backend.build(
                variant.spec.level,
                lambda share, message: self.board.progress(job.id, share, message),
            )
            state = JobState.DONE
        except Exception as failure:
            # Whatever it was, the level serves on; its card stays an estimate.
            state, error = JobState.FAILED, str(failure)
            log.warning("measuring %s failed: %s", variant.name, failure)
        finally:
            self.board.finish(job.id, state, error)
