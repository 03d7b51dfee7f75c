"""With speculation tokens come sooner, and they are the ones that come without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from compressors.checkpoint import Checkpoint
from compressors.pipeline import compress
from compressors.recipe import Recipe
from compressors.tensor import LinearForm, StoredLinear
from gateway.config import BUILTIN
from gateway.engine.acceptance import distributions
from gateway.engine.base import EngineError, SamplingParams, TokenEvent
from gateway.engine.core import Job
from gateway.engine.kernels.store import pack
from gateway.engine.runner import Model, VariantWeights, build_model, forward_logits
from gateway.engine.tokenizer import Tokenizer
from gateway.variants.artifact import dense_weights

from .chi_square import chi_square_tail
from .conftest import request, run, small_core, steps, text_of, tokens_of
from .speculating import DEVICES, Maker, exact, jobs_of, pair, plain_core, prompts, speculating


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_are_those_of_plain_decoding(
    device: str, family: str, most: int, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, asked = checkpoint(family), prompts(6)
    plain = plain_core(folder, bytes_tokenizer, device)
    expected = [
        tokens_of(e) for e in run(plain, jobs_of([request(p, 16) for p in asked], bytes_tokenizer))
    ]
    core = speculating(pair(folder, bytes_tokenizer, noise=0.2, device=device), most)
    alone = run(core, jobs_of([request(asked[0], 16)], bytes_tokenizer))
    assert tokens_of(alone[0]) == expected[0]
    together = run(core, jobs_of([request(p, 16) for p in asked], bytes_tokenizer))
    assert [tokens_of(events) for events in together] == expected
    stats = core.stats("m@big")
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens


def test_fewer_steps_are_taken(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    folder = checkpoint("llama")
    core = pair(folder, bytes_tokenizer, noise=0.0)  # every draft is right
    core.submit(*jobs_of([request([5, 6, 7], 41)], bytes_tokenizer))
    taken = sum(1 for _ in steps(core))
    assert taken == 1 + 10  # a prefill that gives the first token, then four tokens a step
    stats = core.stats("m@big")
    assert stats.drafted_tokens == stats.accepted_tokens == 30


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("level", ["bf16", "int8"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_int4_level_drafts_for_a_better_one_of_the_bundled_model(
    device: str,
    level: str,
    most: int,
    bundled: Callable[[str, str], Model],
    builtin_tokenizer: Tokenizer,
) -> None:
    texts = [
        "The function returns",
        "def read(path):\n    with open(path) as file:\n",
        "To install the package, run",
        "Raises a ValueError if",
        "An iterator over the keys and values of",
        "The server listens on",
    ]
    asked = [request(builtin_tokenizer.encode(text), 24) for text in texts]
    options = {"block_size": 16, "prefill_chunk": 256, "max_num_seqs": 36, "kv_bytes": 32 << 20}
    core = small_core(**options, device=device)
    core.attach(f"m@{level}", bundled(level, device), builtin_tokenizer)
    plain = run(core, [Job(f"m@{level}", item, builtin_tokenizer) for item in asked])
    core = small_core(**options, device=device, speculate="auto")
    core.attach(f"m@{level}", bundled(level, device), builtin_tokenizer)
    core.attach("m@int4", bundled("int4", device), builtin_tokenizer)
    speculator = core._variants[f"m@{level}"].speculator
    assert speculator is not None
    speculator.drafters = [d for d in speculator.drafters if d.name == "int4"]
    speculating(core, most)
    fast = run(core, [Job(f"m@{level}", item, builtin_tokenizer) for item in asked])
    same = 0
    for item, mine, theirs in zip(asked, fast, plain, strict=True):
        if tokens_of(mine) == tokens_of(theirs):
            assert text_of(mine) == text_of(theirs)
            same += 1
        else:
            assert_tie(bundled(level, device), item.prompt, tokens_of(mine), tokens_of(theirs))
    # On CUDA one row has kernels of its own, and ties are met more often.
    assert same >= (len(asked) - 1 if device == "cpu" else len(asked) // 2)
    stats = core.stats(f"m@{level}")
    assert stats.accepted_tokens > stats.drafted_tokens / 2


def assert_tie(model: Model, prompt: Sequence[int], mine: list[int], theirs: list[int]) -> None:
    """The two runs part where the model has two best tokens, as near as 16 bits can tell: steps of
    other sizes round in other places."""
    at = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
    logits = forward_logits(model, torch.tensor([[*prompt, *mine[:at]]]))[0, -1]
    best = logits.topk(3).values
    assert {mine[at], theirs[at]} == set(logits.topk(2).indices.tolist())
    assert float(best[0] - best[1]) < 0.02 * float(logits.std())


@pytest.fixture(scope="module")
def bundled() -> Callable[[str, str], Model]:
    """level, device → the bundled model at it, made in memory."""
    made: dict[tuple[str, str], Model] = {}

    class Memory:
        def __init__(self) -> None:
            self.parts: dict[str, torch.Tensor] = {}
            self.linears: dict[str, StoredLinear] = {}

        def config(self, config: dict[str, Any]) -> None:
            self.settings = config

        def tensor(self, name: str, tensor: torch.Tensor) -> None:
            self.parts[name] = tensor.detach().clone()

        def linear(self, module: str, form: LinearForm) -> None:
            self.linears[module] = pack(form)

    def make(level: str, device: str) -> Model:
        if (level, device) not in made:
            checkpoint = Checkpoint(BUILTIN)
            if level == "bf16":
                weights = dense_weights(checkpoint, torch.bfloat16)
            else:
                memory = Memory()
                recipe = Recipe.parse({"int4": "int4-rtn-g64"}.get(level, level))
                compress(checkpoint, recipe, sink=memory)
                weights = VariantWeights(
                    memory.settings, memory.parts, memory.linears, torch.bfloat16
                )
            made[level, device] = build_model(weights, device=device)
        return made[level, device]

    return make


@pytest.mark.parametrize("device", DEVICES)
def test_sampled_runs_of_tokens_are_distributed_as_the_targets(
    device: str, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, count, prompt = checkpoint("llama"), 2000, [9, 40, 41]
    sampling = {"temperature": 1.3, "top_k": 4, "top_p": 0.95}
    core = pair(folder, bytes_tokenizer, noise=0.3, max_num_seqs=48, device=device)
    speculating(core, most=2)
    jobs = jobs_of([request(prompt, 3, **sampling)] * count, bytes_tokenizer)
    for index, job in enumerate(jobs):
        job.row._seeded().manual_seed(index)
    seen: list[list[int]] = []
    for start in range(0, count, 16):
        seen += [tokens_of(events) for events in run(core, jobs[start : start + 16])]
    stats = core.stats("m@big")
    assert 0.1 < stats.accepted_tokens / stats.drafted_tokens < 0.9
    expected = joint(exact(folder), prompt, SamplingParams(3, **sampling))
    observed = [sum(run == list(cell) for run in seen) for cell in expected]
    assert sum(observed) == count
    assert chi_square_tail(observed, list(expected.values())) > 1e-4
    shares = list(expected.values())
    assert chi_square_tail(observed, [*shares[1:], shares[0]]) < 1e-9  # it would notice


def joint(model: Model, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Runs of `max_tokens` tokens after the prompt, with their probabilities."""
    runs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(params.max_tokens):
        windows = torch.tensor([[*prompt, *run] for run in runs])
        probs = distributions(
            forward_logits(model, windows)[:, -1].contiguous(), [params] * len(runs)
        )
        runs = {
            (*run, token): chance * float(line[token])
            for (run, chance), line in zip(runs.items(), probs, strict=True)
            for token in line.nonzero()[:, 0].tolist()
        }
    return runs


OPTIONS = [
    pytest.param({"logprobs": 3}, id="logprobs"),
    pytest.param({"max_tokens": 2}, id="ends inside a draft"),
    pytest.param({"max_tokens": 1}, id="one token"),
    pytest.param({"presence_penalty": 0.8, "frequency_penalty": 0.4}, id="penalties"),
    pytest.param({"repetition_penalty": 1.3}, id="repetition"),
    pytest.param({"logit_bias": {33: 4.0, 34: -50.0}}, id="bias"),
    pytest.param({"temperature": 1.0, "seed": 3}, id="seeded"),
    pytest.param({"temperature": 0.7, "top_p": 0.9, "seed": 4, "logprobs": 1}, id="seeded, cut"),
    pytest.param({"ignore_eos": False}, id="end of sequence"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_whatever_is_asked_for_comes_out_the_same(
    options: dict[str, Any], checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, asked = checkpoint("llama"), prompts(5, seed=3)
    options = {"max_tokens": 13, **options}
    requests = [request(p, **options) for p in asked]
    expected = run(plain_core(folder, bytes_tokenizer), jobs_of(requests, bytes_tokenizer))
    found = run(pair(folder, bytes_tokenizer), jobs_of(requests, bytes_tokenizer))
    for mine, theirs in zip(found, expected, strict=True):
        assert tokens_of(mine) == tokens_of(theirs)
        assert [(e.text, e.finish_reason) for e in mine] == [
            (e.text, e.finish_reason) for e in theirs
        ]
        assert [near(e) for e in mine] == [near(e) for e in theirs]


def near(event: TokenEvent) -> Any:
    """The log-probabilities of an event, to be compared with those of another run."""
    if event.logprob is None:
        return None
    alternatives = [(token, round_off(value)) for token, _, value in event.logprob.top]
    return event.logprob.token, round_off(event.logprob.logprob), alternatives


def round_off(value: float | None) -> Any:
    return pytest.approx(value, abs=1e-3)


def test_a_stop_string_ends_a_run_of_accepted_tokens(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, prompt = checkpoint("llama"), [70, 71, 72]
    (events,) = run(
        plain_core(folder, bytes_tokenizer), jobs_of([request(prompt, 24)], bytes_tokenizer)
    )
    text = text_of(events)
    stop = text[6:8]
    (events,) = run(
        pair(folder, bytes_tokenizer, noise=0.0),
        jobs_of([request(prompt, 24, stop=(stop,))], bytes_tokenizer),
    )
    assert text_of(events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_preempted_and_cancelled_in_the_middle(
    checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, asked = checkpoint("llama"), prompts(8)
    plain = plain_core(folder, bytes_tokenizer)
    expected = [
        tokens_of(e) for e in run(plain, jobs_of([request(p, 20) for p in asked], bytes_tokenizer))
    ]
    group = next(iter(plain._groups))
    tiny = pair(folder, bytes_tokenizer, kv_bytes=group.layout.block_bytes(4) * 30)
    squeezed = run(tiny, jobs_of([request(p, 20) for p in asked], bytes_tokenizer))
    assert [tokens_of(e) for e in squeezed] == expected
    assert tiny.stats("m@big").preemptions > 0
    core = pair(folder, bytes_tokenizer)
    jobs = jobs_of([request(p, 20) for p in asked], bytes_tokenizer)
    for job in jobs:
        core.submit(job)
    found: dict[int, list[int]] = {id(job): [] for job in jobs}
    for number, events in enumerate(steps(core)):
        for job, event in events:
            assert not isinstance(event, EngineError)
            found[id(job)].append(event.token or 0)
        if number == 9:
            core.cancel(jobs[2])
    for index, job in enumerate(jobs):
        assert found[id(job)] == expected[index][: len(found[id(job)])]
        assert index == 2 or len(found[id(job)]) == 20
    assert core.stats("m@big").kv_used_blocks == 0
