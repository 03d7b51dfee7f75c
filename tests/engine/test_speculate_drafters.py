"""Who drafts for whom, what drafters propose, and that devices and the host judge alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compressors.kv_scheme import KVScheme
from gateway.engine import drafters, speculate
from gateway.engine.base import SamplingParams, TokenEvent
from gateway.engine.drafters import Draft, LevelDrafter, LookupDrafter
from gateway.engine.host_acceptance import Shares
from gateway.engine.runner import VariantWeights, build_model
from gateway.engine.sampler import RowState
from gateway.engine.scheduler import UNKNOWN
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.tokenizer import Tokenizer

from .conftest import request, run, small_core, steps, tokens_of, weights_of
from .speculating import Maker, exact, jobs_of, pair, plain_core, prompts, speculating


def test_devices_judge_as_the_host_does() -> None:
    """Both ways draw and keep the same tokens by the same numbers."""
    params = SamplingParams(4, temperature=0.9, top_p=0.9)
    generator = torch.Generator().manual_seed(3)
    kept = 0
    for seed in range(60):
        first, second = (RowState(replace(params, seed=seed), []) for _ in range(2))
        drafts = torch.randn(1, 50, generator=generator)
        shares: list[Shares] = []
        (token,) = drafters._next_on_host(drafts, [first], [shares])
        (same,), probs = drafters._next(drafts, [second])
        assert token == same
        assert probs is not None
        logits = drafts + 0.7 * torch.randn(2, 50, generator=generator)
        given = [range(2)], [first], Draft([[token]], [shares]), [0]
        host = speculate._judged_on_host(logits, *given)
        given = [range(2)], [second], Draft([[token]], probs[None]), [0]
        assert speculate._judged(logits, *given) == host
        kept += len(host[0]) - 1
    assert 10 < kept < 60


def test_lookup_repeats_what_was_said_before(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    folder = checkpoint("llama")
    prompt = [*range(50, 70), 50, 51, 52]
    drafter, row = LookupDrafter(), RowState(SamplingParams(8), prompt)
    seq = Tokens("m", len(prompt), 8, list(prompt))
    assert drafter.most(seq, row) == 8
    assert drafter.propose([seq], [row], [4]).tokens == [[53, 54, 55, 56]]
    seq.tokens += [53, 99]
    assert drafter.most(seq, row) == 0
    seq.tokens += [52, 53]  # two tokens that occurred twice: the later time counts
    assert drafter.propose([seq], [row], [2]).tokens == [[99, 52]]
    for temperature in (0.0, 1.0):  # repetitive or not, the answer is the plain one
        asked = [request(p * 3, 20, temperature=temperature, seed=1) for p in prompts(4)]
        plain = plain_core(folder, bytes_tokenizer)
        expected = run(plain, jobs_of(asked, bytes_tokenizer))
        core = small_core(speculate="lookup", max_num_seqs=32)
        core.attach("m@big", exact(folder), bytes_tokenizer)
        found = run(speculating(core), jobs_of(asked, bytes_tokenizer))
        assert [tokens_of(e) for e in found] == [tokens_of(e) for e in expected]


def test_lookup_finds_whole_tokens_only() -> None:
    prompt = [0x00010000, 0x01000001, 7, 8, 9, 0x00000100, 0x00010000, 0x00000100]
    seq = Tokens("m", len(prompt), 8, prompt)
    assert LookupDrafter().most(seq, RowState(SamplingParams(8), prompt)) == 0


def test_unloading_the_draft_loses_nothing(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    folder, prompt = checkpoint("llama"), [12, 13, 14]
    plain = plain_core(folder, bytes_tokenizer)
    (expected,) = run(plain, jobs_of([request(prompt, 30)], bytes_tokenizer))
    core = pair(folder, bytes_tokenizer)
    (job,) = jobs_of([request(prompt, 30)], bytes_tokenizer)
    core.submit(job)
    found: list[int] = []
    for number, events in enumerate(steps(core)):
        found += tokens_of([e for _, e in events if isinstance(e, TokenEvent)])
        if number == 3:
            core.detach("m@small")
            drafted = core.stats("m@big").drafted_tokens
            assert drafted > 0
    assert found == tokens_of(expected)
    assert core.stats("m@big").drafted_tokens == drafted


@pytest.mark.parametrize("mode", ["off", "other"])
def test_nothing_is_drafted_unless_it_is_asked_for(
    mode: str, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    core = pair(checkpoint("llama"), bytes_tokenizer, speculate=mode)
    run(core, jobs_of([request([5, 6] * 8, 12)], bytes_tokenizer))
    assert core.stats("m@big").drafted_tokens == 0


def test_who_may_draft(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    """Lighter levels with the same keys and values; a quantized cache cannot take drafts back."""
    folder = checkpoint("llama")
    core = pair(folder, bytes_tokenizer, speculate="auto")
    weights = weights_of(folder)
    other = build_model(
        VariantWeights(weights.config, weights.tensors, {}, weights.dtype, KVScheme(bits=8))
    )
    core.attach("m@kv8", other, bytes_tokenizer)
    names = {
        name: None if v.speculator is None else [d.name for d in v.speculator.drafters]
        for name, v in core._variants.items()
    }
    assert names == {"m@big": ["lookup", "small"], "m@small": ["lookup"], "m@kv8": None}


class Chain:
    """A runner whose next token depends on the last one alone, by a table of logits."""

    def __init__(self, vocab: int) -> None:
        self.table = 3 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1))
        self.waits = 0

    def bind(self, pool: object) -> None: ...

    def prefill(self, chunks: object, every: object) -> list[Tensor]:
        return []

    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        self.waits += 1
        last = [seq.tokens[-1] for seq in batch]
        assert UNKNOWN not in last
        return self.table[last]


class AheadChain(Chain):
    def decode_from(self, batch: Sequence[Tokens], ids: Tensor) -> Tensor:
        assert [seq.tokens[-1] for seq in batch] == [UNKNOWN] * len(batch)
        return self.table[ids]


def test_a_draft_that_stays_on_the_device_is_the_same() -> None:
    vocab, counts = 40, [3, 0, 5, 1]
    params = [
        SamplingParams(9, temperature=0.0),
        SamplingParams(9, temperature=1.0, seed=1),
        SamplingParams(9, temperature=0.8, top_p=0.9, seed=2),
        SamplingParams(9, temperature=1.2, top_k=5, seed=3),
    ]
    found = []
    for runner in (Chain(vocab), AheadChain(vocab)):
        batch = [Tokens("m", 2, 9, [5, index]) for index in range(4)]
        rows = [RowState(item, []) for item in params]
        draft = LevelDrafter("small", runner).propose(batch, rows, counts)
        assert [seq.tokens for seq in batch] == [[5, index] for index in range(4)]
        assert [len(tokens) for tokens in draft.tokens] == counts
        assert runner.waits == (1 if isinstance(runner, AheadChain) else max(counts))
        found.append(draft)
    host, device = found
    assert device.tokens == host.tokens
    assert isinstance(device.probs, Tensor)
    assert isinstance(host.probs, list)
    for lines, shares in zip(device.probs, host.probs, strict=True):
        for line, share in zip(lines, shares, strict=False):
            assert isinstance(share, Shares)
            torch.testing.assert_close(line.double(), torch.from_numpy(share.whole(vocab)))
    assert not device.probs[0].any()  # a greedy row's


def test_penalties_are_counted_token_by_token() -> None:
    """The device does not know them: such a row's draft goes over the host."""
    runner = AheadChain(30)
    best = int(runner.table[7].argmax())
    runner.table[7, best], runner.table[best, best] = 20.0, 20.0
    row = RowState(SamplingParams(9, temperature=0.0, presence_penalty=1.0), [])
    runner.table[best, 3] = 19.5
    plain = LevelDrafter("small", runner).propose(
        [Tokens("m", 1, 9, [7])], [RowState(SamplingParams(9, temperature=0.0), [])], [3]
    )
    assert plain.tokens == [[best] * 3]
    punished = LevelDrafter("small", runner).propose([Tokens("m", 1, 9, [7])], [row], [2])
    assert punished.tokens == [[best, 3]]
    assert not row.counts


def test_only_steps_that_flow_count_as_launched_ahead() -> None:
    """The first ones after a step that waited fill the pipeline: their times say nothing."""
    now = iter(range(1000))
    model = SimpleNamespace(layout=SimpleNamespace(kv=None))
    level = speculate.Level("m@big", model, None, AheadChain(5))  # type: ignore[arg-type]
    speculator = speculate.Speculator(
        "auto",
        level,
        None,
        places=8,
        clock=lambda: float(next(now) ** 2),  # type: ignore[arg-type]
    )
    payoff = speculator.payoff
    assert payoff.ahead is not None
    noted: list[float] = []
    payoff.ahead.note = lambda _rows, seconds: noted.append(seconds)  # type: ignore[method-assign]
    batch = [Tokens("m", 1, 9, [1])]
    rows = [RowState(SamplingParams(8, temperature=0.0), [])]
    for turn in (1, 2, 3, 4, 5, 8, 9, 10, 11):  # another level's steps were in between
        speculator.skip(turn, batch, rows)
    assert noted == [3**2 - 2**2, 4**2 - 3**2, 8**2 - 7**2]


def test_a_text_that_begins_to_repeat_is_noticed_while_steps_are_launched_ahead() -> None:
    """The last token is not known then: what is known shows it."""
    model = SimpleNamespace(layout=SimpleNamespace(kv=None))
    level = speculate.Level("m@big", model, None, AheadChain(5))  # type: ignore[arg-type]
    now = iter(range(10_000))
    speculator = speculate.Speculator(
        "auto",
        level,
        None,
        places=8,
        clock=lambda: float(next(now)),  # type: ignore[arg-type]
    )
    speculator.drafters = [LookupDrafter()]
    rows = [RowState(SamplingParams(999, temperature=0.0), [])]
    seq = Tokens("m", 1, 999, [7])
    asked = []
    for turn in range(200):
        if speculator.due(rows):
            asked.append(turn)
            assert speculator.step(turn, [seq], rows) is None  # nothing to offer
        else:
            seq.tokens.append(UNKNOWN)
            seq.pending = 1
            speculator.skip(turn, [seq], rows)
            seq.tokens[-1], seq.pending = 100 + turn, 0
    assert len(asked) < 6
    seq.tokens += [7, *range(100, 109)]
    for turn in range(200, 220):
        seq.pending = 1
        speculator.skip(turn, [seq], rows)
    assert speculator.due(rows)
