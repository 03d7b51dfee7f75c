"""The local runtime: one engine thread for all variants of the process, and its asyncio face.

The thread owns `Core` alone; the event loop sends it commands through a queue and gets tokens back,
one `call_soon_threadsafe` per step. Models are built in a loader thread (one torch thread), so that
neither the loop nor decoding waits for a load.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from gateway.engine import device_sampler
from gateway.engine.base import (
    BadPrompt,
    Engine,
    EngineError,
    EngineFailed,
    EngineStats,
    GenerationRequest,
    SequenceFailed,
    TokenEvent,
)
from gateway.engine.core import Core, Event, Job, LocalOptions
from gateway.engine.grammar import Grammars
from gateway.engine.model import Model, VariantWeights
from gateway.engine.outlines import open_model
from gateway.engine.tokenizer import Tokenizer

__all__ = ["LocalEngine", "LocalOptions", "LocalRuntime"]

log = logging.getLogger(__name__)
T = TypeVar("T")
_Outbox = asyncio.Queue[TokenEvent | EngineError]

_STATS_SECONDS = 0.01  # statistics are no older than this while tokens flow
# Python's own 5 ms are a whole decode step: after every native call the engine's thread may have to
# wait that long for a busy event loop to let it go on.
_SWITCH_SECONDS = 0.0005


class LocalRuntime:
    """Owner of the engine thread. Create, load and close it on one event loop."""

    def __init__(self, options: LocalOptions) -> None:
        self.options = options
        self._core = Core(options)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[Job, tuple[asyncio.AbstractEventLoop, _Outbox]] = {}
        self._stats: dict[str, EngineStats] = {}
        self._kv_bytes = 0
        self._stale_at = 0.0
        self._stopping = False
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._loader = ThreadPoolExecutor(
            1, "pressgate-loader", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._thread = threading.Thread(target=self._main, name="pressgate-engine", daemon=True)
        self._thread.start()

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV pools take now."""
        return self._kv_bytes

    @property
    def alive(self) -> bool:
        """Whether the engine thread still serves; False for good once it has ended or is ending."""
        return not self._stopping and self._thread.is_alive()

    async def load(self, name: str, weights: VariantWeights, tokenizer: Tokenizer) -> LocalEngine:
        """Build a variant and make it ready.

        Raises:
            ModelError: it cannot be built, or the name is taken.
            Unavailable: the KV budget has no room for it.
        """
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(self._loader, self._build, weights)
        await self._ask(lambda: self._deliver(self._core.attach(name, model, tokenizer)))
        return LocalEngine(self, name, model, tokenizer)

    async def speculate(self, mode: str) -> None:
        """Change who drafts from now on (`LocalOptions.speculate`)."""
        await self._ask(lambda: self._core.speculate(mode))

    def _build(self, weights: VariantWeights) -> Model:
        if self.options.device == "cuda":
            device_sampler.kernel()  # compiled now, not while a request waits
        options = self.options
        return open_model(
            weights, options.outlines, device=options.device, max_batch=options.max_num_seqs
        )

    async def close(self) -> None:
        """Stop the thread; sequences still running fail. Idempotent."""
        if not self._stopping:
            self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)
        self._loader.shutdown(wait=False)

    def _stop(self) -> None:
        self._stopping = True

    async def _ask(self, call: Callable[[], T]) -> T:
        """Run `call` in the engine thread, between two steps."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                if self._stopping:
                    raise EngineFailed("the engine is closed")
                result = call()
            except Exception as error:
                answer.set_exception(error)
            else:
                self._publish()
                answer.set_result(result)

        self._post(run)
        return await asyncio.wrap_future(answer)

    def _submit(self, job: Job, outbox: _Outbox) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            self._streams[job] = (loop, outbox)
            try:
                if self._stopping:
                    raise EngineFailed("the engine is closed")
                self._core.submit(job)
            except EngineError as error:
                self._deliver([(job, error)])
            except Exception as error:  # one request's trouble must not end the thread
                log.exception("a request could not be queued")
                failure = SequenceFailed(f"{type(error).__name__}: {error}")
                self._deliver([(job, failure)])

        self._post(run)

    def _cancel(self, job: Job) -> None:
        def run() -> None:
            if self._streams.pop(job, None) is not None:
                self._core.cancel(job)

        self._post(run)

    async def _move(self, request_id: str, name: str) -> int | None:
        def run() -> int | None:
            job = next((job for job in self._streams if job.request.id == request_id), None)
            if job is None:
                return None
            boundary, events = self._core.move(job, name)
            self._deliver(events)
            return boundary

        return await self._ask(run)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        if not self._thread.is_alive():
            self._finish_commands()

    def _finish_commands(self) -> None:
        """Answer what came too late for the thread (every command checks `_stopping` itself)."""
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _main(self) -> None:
        torch.set_num_threads(self.options.threads)
        # Asked once, it stays this thread's own: before, torch would take over what another thread
        # (the loader) set last.
        torch.get_num_threads()
        try:
            while not self._stopping:
                changed = self._obey()
                events = self._core.step()
                if changed or any(map(_is_last, events)) or time.monotonic() > self._stale_at:
                    self._publish()
                self._deliver(events)
        except Exception:
            log.exception("the engine thread died")
        finally:
            self._stopping = True
            failure = EngineFailed("the engine is closed")
            self._deliver([(job, failure) for job in list(self._streams)])
            self._finish_commands()

    def _obey(self) -> bool:
        """Carry out all commands, if any; with nothing to compute, sleep until one comes."""
        idle = not self._core.busy
        if not idle and self._inbox.empty():
            return False
        with contextlib.suppress(Empty):
            command = self._inbox.get(block=idle)
            while True:
                command()
                command = self._inbox.get_nowait()
        return True

    def _publish(self) -> None:
        self._stale_at = time.monotonic() + _STATS_SECONDS
        self._kv_bytes = self._core.kv_bytes
        self._stats = {name: self._core.stats(name) for name in self._core.names}

    def _deliver(self, events: list[Event]) -> None:
        """Hand events to their loops, one call per loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Outbox, TokenEvent | EngineError]]]
        batches = {}
        for job, event in events:
            last = _is_last((job, event))
            stream = self._streams.pop(job, None) if last else self._streams.get(job)
            if stream is not None:
                batches.setdefault(stream[0], []).append((stream[1], event))
        for loop, batch in batches.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, batch)


def _is_last(told: Event) -> bool:
    """Whether nothing follows for its job."""
    return isinstance(told[1], EngineError) or told[1].finish_reason is not None


def _put_all(batch: list[tuple[_Outbox, TokenEvent | EngineError]]) -> None:
    for outbox, event in batch:
        outbox.put_nowait(event)


class LocalEngine:
    """One loaded variant; implements `gateway.engine.base.Engine`."""

    def __init__(
        self, runtime: LocalRuntime, name: str, model: Model, tokenizer: Tokenizer
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.context_length = model.context_length
        self.resident_bytes = model.resident_bytes
        self._vocab_size = model.vocab_size
        self._runtime = runtime
        self._grammars = Grammars(tokenizer, model.vocab_size)
        self._closed = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Generate; see `Engine.generate`.

        Raises:
            BadSchema, BadPrompt: before anything runs.
            EngineOverloaded, SequenceFailed, EngineFailed.
        """
        self._check_tokens("prompt", request.prompt)
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        schema = request.sampling.json_schema
        matcher = (
            None if schema is None else await asyncio.to_thread(self._grammars.compile, schema)
        )
        if self._closed or self._runtime._stopping:
            raise EngineFailed(f"{self.name} is closed")
        job = Job(self.name, request, self.tokenizer, matcher)
        outbox: _Outbox = asyncio.Queue()
        self._runtime._submit(job, outbox)
        over = False
        try:
            while not over:
                event = await outbox.get()
                if isinstance(event, EngineError):
                    over = True
                    raise event
                over = event.finish_reason is not None
                yield event
        finally:
            if not over:
                self._runtime._cancel(job)

    def _check_tokens(self, param: str, tokens: Iterable[int]) -> None:
        """A tokenizer may count more tokens than the model has embeddings for."""
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise BadPrompt(
                    f"token id {token} is outside the model's vocabulary of {self._vocab_size}",
                    param=param,
                )

    async def move(self, request_id: str, target: Engine) -> int | None:
        """See `Movable.move`. Raises: EngineFailed: the runtime is closed."""
        if not isinstance(target, LocalEngine) or target._runtime is not self._runtime:
            return None
        return await self._runtime._move(request_id, target.name)

    def stats(self) -> EngineStats:
        """As of the last arrival or end, and not much older than the last step."""
        return self._runtime._stats.get(self.name, EngineStats())

    async def logits_for(self, windows: Tensor) -> Tensor:
        """fp32 logits [n, length, vocab] of token windows (int64 [n, length]), computed in full.

        Row by row between steps, so that decoding goes on meanwhile.
        """
        core, name = self._runtime._core, self.name
        parts = [
            await self._runtime._ask(lambda row=row: core.logits(name, row[None]))  # type: ignore[misc]
            for row in windows
        ]
        return torch.cat(parts)

    async def close(self) -> None:
        """Stop its sequences (they fail) and free its memory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        runtime = self._runtime
        if not runtime._stopping:
            await runtime._ask(lambda: runtime._deliver(runtime._core.detach(self.name)))
