"""The runtime over asyncio: streaming, stops, cancellation, overload, several variants, budgets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend

from gateway.engine.base import (
    BadPrompt,
    BadSchema,
    Engine,
    EngineFailed,
    EngineOverloaded,
    SequenceFailed,
    TokenEvent,
)
from gateway.engine.core import Core, Event, Job
from gateway.engine.local import LocalEngine, LocalOptions, LocalRuntime
from gateway.engine.runner import VariantWeights, build_model, forward_logits
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError, Unavailable

from .conftest import (
    reference_model,
    reference_tokens,
    request,
    run,
    text_of,
    tokens_of,
    weights_of,
)

Maker = Callable[[str], Path]
OPTIONS = LocalOptions(
    max_num_seqs=4, max_waiting=2, prefill_chunk=16, block_size=4, kv_bytes=4 << 20
)


@pytest.fixture
async def runtime() -> AsyncIterator[LocalRuntime]:
    made = LocalRuntime(OPTIONS)
    yield made
    await made.close()


@pytest.fixture
async def engine(
    runtime: LocalRuntime, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> LocalEngine:
    return await runtime.load("llama", weights_of(checkpoint("llama")), bytes_tokenizer)


async def collect(
    engine: Engine, prompt: list[int], new: int = 8, **sampling: object
) -> list[TokenEvent]:
    return [event async for event in engine.generate(request(prompt, new, **sampling))]


async def settle(engine: LocalEngine) -> None:
    """Wait until the engine holds nothing."""
    for _ in range(500):
        stats = engine.stats()
        if stats.running == stats.waiting == 0 and stats.kv_used_blocks == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {engine.stats()}")


async def begun(engine: LocalEngine) -> None:
    """Returns as soon as a sequence runs: before its tokens are all there, however fast."""
    for _ in range(100_000):
        if engine.stats().running:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"nothing runs: {engine.stats()}")


@pytest.fixture
def unhurried(runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that leave the test time to cut a sequence short."""
    step = runtime._core.step

    def slowly() -> list[Event]:
        time.sleep(0.002)
        return step()

    monkeypatch.setattr(runtime._core, "step", slowly)


async def test_streams_tokens_and_ends_with_a_reason(engine: LocalEngine) -> None:
    events = await collect(engine, [5, 6, 7], 6)
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
    assert len(tokens_of(events)) == 6


async def test_the_engine_keeps_its_threads_while_models_load(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    runtime = LocalRuntime(replace(OPTIONS, threads=2))
    try:
        await runtime.load("llama", weights_of(checkpoint("llama")), bytes_tokenizer)
        assert await runtime._ask(torch.get_num_threads) == 2
    finally:
        await runtime.close()


async def test_end_of_sequence_stops(
    runtime: LocalRuntime, engine: LocalEngine, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    free = tokens_of(await collect(engine, [5, 6, 7], 12))
    ends = Tokenizer(bytes_tokenizer.backend, eos_ids=frozenset({free[4]}))
    other = await runtime.load("ends", weights_of(checkpoint("llama")), ends)
    events = await collect(other, [5, 6, 7], 12, ignore_eos=False)
    assert tokens_of(events) == free[: free.index(free[4]) + 1]
    assert events[-1].finish_reason == "stop"


async def test_a_stop_string_ends_and_is_not_shown(engine: LocalEngine) -> None:
    whole = text_of(await collect(engine, [40, 41, 42], 30))
    stop = whole[5:8]
    events = await collect(engine, [40, 41, 42], 30, stop=(stop, "never seen"))
    assert text_of(events) == whole[: whole.find(stop)]
    assert events[-1].finish_reason == "stop"


@pytest.mark.usefixtures("unhurried")
async def test_closing_the_iterator_frees_the_sequence(engine: LocalEngine) -> None:
    stream = engine.generate(request([5] * 20, 200))
    await anext(stream)
    assert engine.stats().kv_used_blocks > 0
    await stream.aclose()
    await settle(engine)


@pytest.mark.usefixtures("unhurried")
async def test_cancelling_the_task_frees_the_sequence(engine: LocalEngine) -> None:
    task = asyncio.create_task(collect(engine, [5] * 20, 200))
    await begun(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle(engine)


async def test_the_waiting_queue_is_bounded(engine: LocalEngine) -> None:
    results = await asyncio.gather(
        *(collect(engine, [5, i], 60) for i in range(40)), return_exceptions=True
    )
    refused = [r for r in results if isinstance(r, EngineOverloaded)]
    served = [r for r in results if isinstance(r, list)]
    assert refused
    assert len(served) + len(refused) == 40
    assert len(served) >= 4
    await settle(engine)


async def test_many_variants_run_at_once(
    runtime: LocalRuntime, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    prompts = [[7, 8, 9], list(range(20, 60)), [100]]
    families = ("llama", "qwen2", "gpt2")
    engines = {
        family: await runtime.load(family, weights_of(checkpoint(family)), bytes_tokenizer)
        for family in families
    }
    assert runtime.kv_bytes <= OPTIONS.kv_bytes
    got = await asyncio.gather(
        *(collect(engines[family], prompt, 10) for family in families for prompt in prompts[:2])
    )
    expected = [
        reference_tokens(reference_model(checkpoint(family)), prompt, 10)
        for family in families
        for prompt in prompts[:2]
    ]
    assert [tokens_of(events) for events in got] == expected


async def test_loading_another_layout_keeps_running_sequences_right(
    runtime: LocalRuntime, engine: LocalEngine, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    expected = reference_tokens(reference_model(checkpoint("llama")), [9, 8, 7], 120)
    task = asyncio.create_task(collect(engine, [9, 8, 7], 120))
    await begun(engine)
    other = await runtime.load("gemma", weights_of(checkpoint("gemma")), bytes_tokenizer)
    assert tokens_of(await task) == expected
    assert runtime.kv_bytes <= OPTIONS.kv_bytes
    await other.close()


async def test_a_layout_without_room_is_refused(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    runtime = LocalRuntime(LocalOptions(kv_bytes=2000))
    try:
        with pytest.raises(Unavailable):
            await runtime.load("v", weights_of(checkpoint("llama")), bytes_tokenizer)
        assert runtime.kv_bytes == 0
    finally:
        await runtime.close()


@pytest.mark.usefixtures("unhurried")
async def test_unloading_fails_its_sequences_and_frees_its_pool(
    runtime: LocalRuntime, engine: LocalEngine
) -> None:
    task = asyncio.create_task(collect(engine, [5, 6], 240))
    await begun(engine)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineFailed):
        await task
    with pytest.raises(EngineFailed):
        await collect(engine, [5, 6])
    for _ in range(100):
        if runtime.kv_bytes == 0:
            break
        await asyncio.sleep(0.01)
    assert runtime.kv_bytes == 0


async def test_a_closed_runtime_fails_what_runs(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    runtime = LocalRuntime(OPTIONS)
    engine = await runtime.load("v", weights_of(checkpoint("llama")), bytes_tokenizer)
    task = asyncio.create_task(collect(engine, [5, 6], 240))
    await begun(engine)
    await runtime.close()
    await runtime.close()
    with pytest.raises(EngineFailed):
        await task
    assert not [
        t for t in threading.enumerate() if t.name == "pressgate-engine" and t is runtime._thread
    ]


async def test_a_failing_step_fails_its_variant_only_and_it_recovers(
    runtime: LocalRuntime,
    engine: LocalEngine,
    checkpoint: Maker,
    bytes_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = await runtime.load("other", weights_of(checkpoint("llama")), bytes_tokenizer)
    expected = tokens_of(await collect(other, [9, 9], 30))
    runner = runtime._core._variants["llama"].runner

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "decode", broken)
        healthy = asyncio.create_task(collect(other, [9, 9], 30))
        with pytest.raises(SequenceFailed, match="no memory"):
            await collect(engine, [5, 6], 10)
        assert tokens_of(await healthy) == expected
    assert len(await collect(engine, [5, 6], 10)) == 10
    await settle(engine)


async def test_tokens_out_of_the_vocabulary_are_refused(engine: LocalEngine) -> None:
    with pytest.raises(BadPrompt, match="10000"):
        await collect(engine, [5, 10_000])
    with pytest.raises(BadPrompt) as caught:
        await collect(engine, [5], logit_bias={10_000: 1.0})
    assert caught.value.param == "logit_bias"
    with pytest.raises(BadPrompt, match="300 tokens"):
        await collect(engine, [5] * 300)
    assert len(await collect(engine, [5], 3)) == 3


async def test_a_token_that_only_the_tokenizer_counts_is_refused(
    runtime: LocalRuntime, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    backend = Backend.from_str(bytes_tokenizer.backend.to_str())
    backend.add_special_tokens(["<one-too-many>"])
    wider = Tokenizer(backend)
    engine = await runtime.load("wider", weights_of(checkpoint("llama")), wider)
    foreign = wider.encode("<one-too-many>")
    assert foreign == [wider.vocab_size - 1]
    with pytest.raises(BadPrompt, match=str(foreign[0])):
        await collect(engine, foreign)


async def test_an_unexpected_error_while_queueing_loses_that_request_only(
    runtime: LocalRuntime, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise KeyError("books")

    with monkeypatch.context() as patch:
        patch.setattr(runtime._core, "submit", broken)
        with pytest.raises(SequenceFailed, match="KeyError"):
            await collect(engine, [5, 6], 3)
    assert runtime.alive
    assert len(await collect(engine, [5, 6], 3)) == 3


async def test_a_dead_thread_shows_and_fails_what_runs(
    runtime: LocalRuntime, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise KeyError("books")

    assert runtime.alive
    monkeypatch.setattr(runtime._core, "step", broken)
    with pytest.raises(EngineFailed):
        await collect(engine, [5, 6], 3)
    assert not runtime.alive


def test_a_pool_that_shrinks_loses_sequences_and_not_the_engine(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    core = Core(replace(OPTIONS, kv_bytes=250_000))
    core.attach("a", build_model(weights_of(checkpoint("llama"))), bytes_tokenizer)
    large = Job("a", request([5] * 230), bytes_tokenizer)
    core.submit(large)
    core.step()
    lost = core.attach("b", build_model(weights_of(checkpoint("gemma"))), bytes_tokenizer)
    assert [(job, type(error)) for job, error in lost] == [(large, SequenceFailed)]
    core.check_integrity()
    events = run(core, [Job("a", request([5], 3), bytes_tokenizer)])
    assert len(events[0]) == 3


async def test_output_is_cut_at_the_context(engine: LocalEngine) -> None:
    events = await collect(engine, [5] * 250, 100)
    assert len(tokens_of(events)) == engine.context_length - 250
    assert events[-1].finish_reason == "length"


async def test_seeded_output_is_the_same_in_any_company(engine: LocalEngine) -> None:
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 42}
    alone = tokens_of(await collect(engine, [5, 6, 7], 20, **options))
    crowd = await asyncio.gather(
        collect(engine, [11] * 30, 20, temperature=1.0),
        collect(engine, [5, 6, 7], 20, **options),
        collect(engine, [12, 13], 20),
    )
    assert tokens_of(crowd[1]) == alone
    assert tokens_of(await collect(engine, [5, 6, 7], 20, **options | {"seed": 43})) != alone


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"level": {"enum": ["int8", "bf16"]}, "ok": {"type": "boolean"}},
        "required": ["level", "ok"],
        "additionalProperties": False,
    }
)


async def test_json_schema_output_parses(engine: LocalEngine) -> None:
    for seed in range(3):
        events = await collect(
            engine, [60, 61], 120, json_schema=SCHEMA, temperature=1.0, seed=seed, ignore_eos=False
        )
        value = json.loads(text_of(events))
        assert value.keys() == {"level", "ok"}
        assert value["level"] in {"int8", "bf16"}
        assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("schema", ["{", '{"type": "nonsense"}', "[]"])
async def test_a_bad_schema_is_refused_before_anything_runs(
    engine: LocalEngine, schema: str
) -> None:
    with pytest.raises(BadSchema):
        await collect(engine, [60], 10, json_schema=schema)


async def test_logits_for_equals_the_plain_forward(engine: LocalEngine, checkpoint: Maker) -> None:
    windows = torch.randint(3, 300, (3, 40))
    task = asyncio.create_task(collect(engine, [5, 6], 60))
    ours = await engine.logits_for(windows)
    plain = forward_logits(build_model(weights_of(checkpoint("llama"))), windows)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert len(await task) == 60


async def test_missing_or_misshapen_tensors_are_named(
    runtime: LocalRuntime, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    good = weights_of(checkpoint("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors in (
        {k: v for k, v in good.tensors.items() if k != name},
        {**good.tensors, name: torch.zeros(2, 2)},
    ):
        bad = VariantWeights(good.config, tensors, {}, good.dtype)
        with pytest.raises(ModelError, match=name):
            await runtime.load("bad", bad, bytes_tokenizer)


async def test_a_name_is_loaded_once(
    runtime: LocalRuntime, engine: LocalEngine, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    with pytest.raises(ModelError, match="already"):
        await runtime.load("llama", weights_of(checkpoint("llama")), bytes_tokenizer)
    assert len(await collect(engine, [5], 3)) == 3
