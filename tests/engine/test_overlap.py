"""Steps launched before the last one is read give what steps one after the other give.

A made-up runner stands for a device: its logits are a function of the tokens that it finds in its
own KV through the block tables, so that a block shared, freed or overwritten too early changes the
output, as does a token that the host cannot know yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gateway.engine import core as core_module
from gateway.engine.attention import LayerShape, Layout, Pool, Step
from gateway.engine.base import EngineError, SequenceFailed, TokenEvent
from gateway.engine.core import Core, Job, LocalOptions
from gateway.engine.draw import DeviceDraw, Draw
from gateway.engine.grammar import Grammars
from gateway.engine.runner import Model
from gateway.engine.sampler import RowState, Scored
from gateway.engine.scheduler import UNKNOWN, Chunk
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.tokenizer import Tokenizer

from .conftest import VOCAB, request, tokens_of

SIZE = 4  # tokens of a block
LAYOUT = Layout((LayerShape(1, 1, 1),), torch.float32)
EOS = 2
LETTERS = tuple(range(68, 74))  # what the made-up model writes, and now and then its end


@dataclass
class Device:
    """What the runners of one pool share: its memory and a diary."""

    cells: np.ndarray[Any, np.dtype[np.int64]]
    rows: int = 0


class Following:
    """A runner that needs to be told every token."""

    def __init__(self, salt: str, device: Device) -> None:
        self.salt, self.device = salt.encode(), device

    def bind(self, pool: Pool) -> None:
        self.device.cells = np.full(pool.num_blocks * SIZE, -7)

    def decode(self, batch: Sequence[Tokens]) -> Tensor:
        assert all(seq.tokens[-1] != UNKNOWN for seq in batch)
        return self._decode(batch, [seq.tokens[-1] for seq in batch])

    def _decode(self, batch: Sequence[Tokens], last: list[int]) -> Tensor:
        for seq, token in zip(batch, last, strict=True):
            self._write(seq, len(seq.tokens) - 1, token)
        return torch.stack([self._logits(seq, len(seq.tokens)) for seq in batch])

    def prefill(self, chunks: Sequence[Chunk], every: Sequence[bool]) -> list[Tensor]:
        for chunk in chunks:
            for at in range(chunk.start, chunk.start + chunk.length):
                self._write(chunk.seq, at, chunk.seq.tokens[at])
        stops = [chunk.start + chunk.length for chunk in chunks]
        return [
            torch.stack(
                [
                    self._logits(chunk.seq, at)
                    for at in range(chunk.start + 1 if whole else stop, stop + 1)
                ]
            )
            for chunk, stop, whole in zip(chunks, stops, every, strict=True)
        ]

    def _write(self, seq: Tokens, at: int, token: int) -> None:
        assert token >= 0
        self.device.rows += 1
        self.device.cells[seq.blocks[at // SIZE] * SIZE + at % SIZE] = token

    def _logits(self, seq: Tokens, length: int) -> Tensor:
        cells = [seq.blocks[at // SIZE] * SIZE + at % SIZE for at in range(length)]
        digest = blake2b(self.salt + self.device.cells[cells].tobytes(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        logits = torch.full((VOCAB,), -30.0)
        logits[list(LETTERS)] = 2 * torch.randn(len(LETTERS), generator=generator)
        logits[EOS] = 2 * torch.randn((), generator=generator) - 2
        return logits


class Leading(Following):
    """A runner that can start from tokens which only its device knows."""

    def decode_from(self, batch: Sequence[Tokens], ids: Tensor) -> Tensor:
        assert any(seq.tokens[-1] == UNKNOWN for seq in batch)
        found: list[int] = ids.tolist()
        for seq, token in zip(batch, found, strict=True):
            assert seq.tokens[-1] in (UNKNOWN, token)
        return self._decode(batch, found)


def make_core(kind: type[Following], blocks: int, **options: Any) -> tuple[Core, Device]:
    device = Device(np.full(blocks * SIZE, -7))
    made = iter(("a", "b", "c"))
    core = Core(
        LocalOptions(
            **{"max_num_seqs": 4, "prefill_chunk": 6, "block_size": SIZE, "max_waiting": 99}
            | {"kv_bytes": blocks * LAYOUT.block_bytes(SIZE)}
            | options
        ),
        lambda model, pool, max_batch: kind(next(made), device),
    )
    return core, device


def attach(core: Core, tokenizer: Tokenizer, names: Sequence[str] = "ab") -> None:
    for name in names:
        core.attach(name, Model(nn.Module(), Step(), (), LAYOUT, 200, VOCAB, 0), tokenizer)


@dataclass(frozen=True)
class Wish:
    """A request, the step before which it comes and, maybe, before which it is cancelled."""

    prompt: list[int]
    new: int
    variant: str
    comes: int
    leaves: int | None
    sampling: dict[str, Any]
    scored: bool

    def job(self, tokenizer: Tokenizer) -> Job:
        asked = request(self.prompt, self.new, prompt_logprobs=self.scored, **self.sampling)
        return Job(self.variant, asked, tokenizer)


def wishes() -> st.SearchStrategy[Wish]:
    sampling = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.0, 1.0]),
            "seed": st.integers(0, 5),
            "top_p": st.sampled_from([1.0, 0.8]),
            "ignore_eos": st.booleans(),
            "stop": st.sampled_from([(), (), ("AB",), ("CC", "DAE")]),
            "logprobs": st.sampled_from([None, None, 2]),
            "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 0.5]),
            "logit_bias": st.sampled_from([{}, {}, {LETTERS[0]: 2.0}]),
        }
    )
    return st.builds(
        Wish,
        prompt=st.lists(st.sampled_from(LETTERS[:2]), min_size=1, max_size=14),
        new=st.integers(1, 14),
        variant=st.sampled_from("ab"),
        comes=st.integers(0, 12),
        leaves=st.one_of(st.none(), st.none(), st.integers(1, 25)),
        sampling=sampling,
        scored=st.sampled_from([False, False, False, True]),
    )


Told = list[tuple[Any, ...]]


def told(event: TokenEvent) -> tuple[Any, ...]:
    """All of an event but how much was reused, which depends on the others."""
    return event.text, event.token, event.logprob, event.finish_reason, event.prompt_logprobs


def play(core: Core, tokenizer: Tokenizer, script: list[Wish]) -> list[Told]:
    """Follow the script to the end, checking every book after every step; what each got."""
    jobs = {index: wish.job(tokenizer) for index, wish in enumerate(script)}
    by_job = {id(job): index for index, job in jobs.items()}
    got: dict[int, Told] = defaultdict(list)
    over: set[int] = set()
    for step in range(2000):
        for index, wish in enumerate(script):
            if wish.comes == step:
                core.submit(jobs[index])
            if wish.leaves is not None and wish.leaves + wish.comes == step:
                core.cancel(jobs[index])
                over.add(index)
        for job, event in core.step():
            if isinstance(event, EngineError):
                raise event
            index = by_job[id(job)]
            assert index not in over
            got[index].append(told(event))
            if event.finish_reason is not None:
                over.add(index)
        core.check_integrity()
        if step > 12 and not core.busy:
            assert core.stats("a").kv_used_blocks == 0
            return [got[index] for index in range(len(script))]
    raise AssertionError("no end")


def alone(tokenizer: Tokenizer, wish: Wish) -> Told:
    core, _ = make_core(Following, 60)
    attach(core, tokenizer)
    (got,) = play(core, tokenizer, [Wish(**{**vars(wish), "comes": 0, "leaves": None})])
    return got


@given(st.lists(wishes(), min_size=1, max_size=9), st.integers(8, 30), st.booleans())
@settings(max_examples=80, deadline=None)
def test_everyone_gets_what_he_gets_alone(
    bytes_tokenizer: Tokenizer, script: list[Wish], blocks: int, late: bool
) -> None:
    expected = [alone(bytes_tokenizer, wish) for wish in script]
    for kind in (Following, Leading):
        core, _ = make_core(kind, blocks)
        attach(core, bytes_tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            if late:
                patch.setattr(core_module, "launch", as_on_a_device)
            got = play(core, bytes_tokenizer, script)
        for wish, mine, whole in zip(script, got, expected, strict=True):
            assert near(mine, whole[: len(mine)])
            assert len(mine) == len(whole) or wish.leaves is not None


def as_on_a_device(parts: Sequence[Tensor], rows: Sequence[RowState]) -> Draw:
    return DeviceDraw(torch.cat(list(parts)), rows)


def near(left: Told, right: Told) -> bool:
    """Equal, log-probabilities up to the order of their sums."""
    return str(left) == str(right) or all(
        (a[0], a[1], a[3]) == (b[0], b[1], b[3])
        and (a[2] and a[2].logprob) == pytest.approx(b[2] and b[2].logprob)
        for a, b in zip(left, right, strict=True)
    )


class Diary:
    """Notes when a step's tokens are picked and when they are read."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []

    def launch(self, parts: Sequence[Tensor], rows: Sequence[RowState]) -> Draw:
        number = sum(what == "launch" for what, _ in self.lines)
        self.lines.append(("launch", number))
        return _Noted(self, number, DeviceDraw(torch.cat(list(parts)), rows))


class _Noted:
    def __init__(self, diary: Diary, number: int, draw: Draw) -> None:
        self._diary, self._number, self._draw = diary, number, draw
        self.tokens = draw.tokens

    def collect(self) -> list[Scored]:
        self._diary.lines.append(("read", self._number))
        return self._draw.collect()


def finish(core: Core, jobs: list[Job]) -> Iterator[TokenEvent]:
    for job in jobs:
        core.submit(job)
    while core.busy:
        for _, event in core.step():
            assert isinstance(event, TokenEvent)
            yield event
        core.check_integrity()


def test_the_next_step_is_launched_before_the_last_is_read(
    bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = Diary()
    monkeypatch.setattr(core_module, "launch", diary.launch)
    core, device = make_core(Leading, 30)
    attach(core, bytes_tokenizer)
    events = list(finish(core, [Job("a", request([68] * 3, 4), bytes_tokenizer)]))
    assert len(tokens_of(events)) == 4
    assert diary.lines == [
        ("launch", 0),
        *(("launch", 1), ("read", 0)),
        *(("launch", 2), ("read", 1)),
        *(("launch", 3), ("read", 2)),
        ("read", 3),
    ]
    assert device.rows == 3 + 3  # the last token's own row is known to be of no use


def test_a_stop_costs_one_row_and_a_penalty_none(
    bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, device = make_core(Leading, 30, prefix_cache=False)
    attach(core, bytes_tokenizer)
    free = tokens_of(list(finish(core, [Job("a", request([68] * 3, 9), bytes_tokenizer)])))
    stop = bytes_tokenizer.decode(free[:4])
    for penalty, wasted in ((0.0, 1), (1e-9, 0)):
        device.rows = 0
        asked = request([68] * 3, 9, stop=(stop,), presence_penalty=penalty)
        assert tokens_of(list(finish(core, [Job("a", asked, bytes_tokenizer)]))) == free[:4]
        assert device.rows == 3 + 3 + wasted


def test_a_grammar_holds_though_others_run_ahead(bytes_tokenizer: Tokenizer) -> None:
    core, _ = make_core(Leading, 40)
    attach(core, bytes_tokenizer, "a")
    matcher = Grammars(bytes_tokenizer, VOCAB).compile('{"enum": ["AB", "CD"]}')
    fenced = Job("a", request([68], 20, ignore_eos=False), bytes_tokenizer, matcher)
    plain = Job("a", request([69], 30), bytes_tokenizer)
    core.submit(plain)
    for _ in range(4):
        core.step()
    core.submit(fenced)
    text = ""
    while core.busy:
        for job, event in core.step():
            assert isinstance(event, TokenEvent)
            text += event.text if job is fenced else ""
        core.check_integrity()
    assert text in {'"AB"', '"CD"'}


def test_a_step_that_fails_on_its_way_loses_its_variant_only(
    bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, _ = make_core(Leading, 40)
    attach(core, bytes_tokenizer)
    lost, kept = (Job(name, request([68], 9), bytes_tokenizer) for name in "ab")
    core.submit(lost)
    core.submit(kept)
    core.step()

    def broken() -> list[Scored]:
        raise RuntimeError("device-side assert")

    (flight,) = core._flights
    monkeypatch.setattr(flight.draw, "collect", broken)
    events = core.step()
    assert [(job, type(event)) for job, event in events] == [(lost, SequenceFailed)]
    core.check_integrity()
    rest = [event for _ in range(20) for job, event in core.step() if job is kept]
    assert len(rest) == 9
    assert not core.busy


def test_loading_and_unloading_read_what_is_under_way(bytes_tokenizer: Tokenizer) -> None:
    core, _ = make_core(Leading, 40)
    attach(core, bytes_tokenizer)
    job = Job("a", request([68], 9), bytes_tokenizer)
    core.submit(job)
    core.step()
    core.step()
    attach_events = core.attach(
        "c", Model(nn.Module(), Step(), (), LAYOUT, 200, VOCAB, 0), bytes_tokenizer
    )
    assert len(attach_events) == 1
    core.step()
    events = [event for _, event in core.detach("a")]
    assert isinstance(events[0], TokenEvent)
    assert isinstance(events[-1], EngineError)
    core.check_integrity()
    assert not core.busy
