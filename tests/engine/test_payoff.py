"""Speculation is used where the figures say that it pays, and only there."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gateway.engine.payoff import Choice, Curve, Offer, Payoff, Verdicts

MOST = 8


def test_a_curve_leaves_out_cold_samples_and_lies_on_lines() -> None:
    curve = Curve()
    assert curve.at(1) is None
    for size, seconds in ((1, 10.0), (5, 18.0)):
        curve.note(size, 900.0)
        curve.note(size, 900.0)
        assert not curve.known(size)
        for _ in range(3):
            curve.note(size, seconds)
        assert curve.known(size)
    assert [curve.at(n) for n in (1, 3, 5, 9)] == [10.0, 14.0, 18.0, 26.0]


def test_large_sizes_are_learned_together() -> None:
    curve = Curve()
    for size in (19, 20, 21, 20, 19):
        curve.note(size, 5.0)
    assert curve.known(20)
    assert curve.at(20) == 5.0
    assert not curve.known(7)


def test_disturbed_samples_count_little_and_a_change_counts_soon() -> None:
    curve = Curve()
    for index in range(30):
        curve.note(1, 100.0 if index % 3 == 0 else 1.0)
    assert curve.at(1) == 1.0
    for _ in range(8):
        curve.note(1, 2.0)
    assert curve.at(1) == 2.0


def test_acceptance_starts_from_the_prior_and_follows_what_is_measured() -> None:
    verdicts = Verdicts()
    assert verdicts.rate(0.8) == pytest.approx(0.8)
    for _ in range(500):
        verdicts.note(4, 1)
    assert verdicts.rate(0.8) == pytest.approx(0.25, abs=0.02)


class Host:
    """A machine with known times, on which a payoff decides."""

    def __init__(self, step: Callable[[int], float], draft: float, alpha: float) -> None:
        self._step, self._draft, self._alpha = step, draft, alpha
        self._random = random.Random(1)
        self.payoff, self.verdicts = Payoff(), Verdicts()
        self.seconds = self.tokens = 0.0
        self.plain_seconds = 0.0
        self.last = ""

    def run(self, steps: int, batch: int = 1, places: int = 64) -> Host:
        for _ in range(steps):
            choice = None
            if self.payoff.due(batch):
                offer = Offer(self.verdicts.rate(0.8), MOST)
                choice = self.payoff.choose(batch, {"d": [offer] * batch}, places)
            else:
                self.payoff.skip()
            self._take(batch, choice)
        return self

    def _take(self, batch: int, choice: Choice | None) -> None:
        counts = [0] * batch if choice is None else choice.counts
        made = rows = 0
        for count in counts:
            kept = 0
            while kept < count and self._random.random() < self._alpha:
                kept += 1
            if count:
                self.verdicts.note(min(kept + 1, count), kept)
            made, rows = made + kept + 1, rows + count + 1
        took = self._step(rows)
        self.payoff.steps.note(rows, took)
        if choice is not None:
            self.payoff.drafts["d"].note(sum(c > 0 for c in counts), self._draft)
        self.seconds += took + max(counts) * self._draft
        self.plain_seconds += made / batch * self._step(batch)
        self.tokens += made
        self.last = "plain" if choice is None else f"{max(counts)}"


def test_a_cheap_good_draft_is_used_and_gains_what_the_formula_says() -> None:
    host = Host(lambda rows: 1.0 + 0.01 * rows, draft=0.2, alpha=0.85).run(2000)
    best = max(
        (1 - 0.85 ** (k + 1)) / 0.15 * 1.01 / (1.01 + 0.01 * k + 0.2 * k) for k in range(1, MOST)
    )
    assert host.plain_seconds / host.seconds > 0.93 * best


@pytest.mark.parametrize(
    ("step", "draft", "alpha"),
    [
        pytest.param(lambda rows: 1.0 + 0.01 * rows, 0.9, 0.9, id="slow draft"),
        pytest.param(lambda rows: 1.0 * rows, 0.1, 0.8, id="verification costs as much as steps"),
        pytest.param(lambda rows: 1.0 + 0.01 * rows, 0.3, 0.1, id="drafts are wrong"),
    ],
)
def test_where_it_is_slower_next_to_nothing_is_lost(
    step: Callable[[int], float], draft: float, alpha: float
) -> None:
    host = Host(step, draft, alpha).run(4000)
    assert host.seconds / host.plain_seconds < 1.02
    assert host.last == "plain"


def test_it_is_off_for_batches_that_fill_the_machine() -> None:
    host = Host(lambda rows: max(1.0, rows / 8), draft=0.2, alpha=0.85).run(1000)
    assert host.last != "plain"
    host.run(600, batch=8)
    assert host.last == "plain"
    host.run(400)
    assert host.last != "plain"


def test_a_host_that_changes_is_noticed() -> None:
    host = Host(lambda rows: 1.0 + 0.01 * rows, draft=0.9, alpha=0.85).run(1000)
    assert host.last == "plain"
    host._draft = 0.1
    host.run(8000)
    assert host.last != "plain"


def test_nobody_is_asked_often_who_had_nothing_to_offer() -> None:
    payoff = Payoff(idle_patience=64)
    asked = 0
    for _ in range(1000):
        payoff.steps.note(1, 1.0)
        if payoff.due(1):
            asked += 1
            assert payoff.choose(1, {"d": [Offer(0.9, 0)]}, 64) is None
        else:
            payoff.skip()
    assert asked < 30
    for _ in range(65):
        payoff.skip()
    assert payoff.due(1)
    assert payoff.choose(1, {"d": [Offer(0.9, MOST)]}, 64) is not None


@pytest.mark.parametrize(("alpha", "used"), [(0.9, True), (0.3, False)])
def test_steps_that_are_launched_ahead_are_what_drafts_have_to_beat(
    alpha: float, used: bool
) -> None:
    """Steps that wait take twice as long here: what beats those may be slower all the same."""
    payoff, chosen = Payoff(ahead=Curve()), 0
    assert payoff.ahead is not None
    for _ in range(300):
        if not payoff.due(1):
            payoff.skip()
            payoff.ahead.note(1, 0.5)
            continue
        assert payoff.ahead.known(1)
        choice = payoff.choose(1, {"d": [Offer(alpha, MOST)]}, 64)
        payoff.steps.note(1 if choice is None else 1 + choice.counts[0], 1.0)
        if choice is not None:
            payoff.drafts["d"].note(1, 0.1)
            chosen += 1
    assert chosen > 100 if used else chosen < 10


class Pipeline(Host):
    """A machine that launches plain steps ahead: they take `flowing` seconds, and others what
    `step` says. A text repeats itself for 20 steps now and then."""

    def __init__(
        self, flowing: float, step: Callable[[int], float], draft: float, alpha: float
    ) -> None:
        super().__init__(step, draft, alpha)
        self.payoff = Payoff(64, ahead=Curve())
        self._flowing = flowing

    def run(
        self, steps: int, batch: int = 1, places: int = 64, *, repeats: float = 1.0
    ) -> Pipeline:
        flow = 0
        for index in range(steps):
            most = MOST if index // 20 % 10 < 10 * repeats else 0
            offers = {"d": [Offer(self.verdicts.rate(0.8), most)] * batch}
            if self.payoff.due(batch):
                flow = 0
                self._take(batch, self.payoff.choose(batch, offers, places))
                continue
            flow += 1
            self.payoff.skip()
            if repeats < 1.0 and flow % 8 == 0:
                self.payoff.hurry(batch, offers, places)
            if flow > 3:
                assert self.payoff.ahead is not None
                self.payoff.ahead.note(batch, self._flowing)
            self.seconds += self._flowing
            self.tokens += batch
        self.plain_seconds = self.tokens / batch * self._flowing
        return self


def test_little_is_lost_by_trying_where_steps_are_launched_ahead() -> None:
    def step(rows: int) -> float:
        return 1.7 + 0.05 * rows

    for batch in (1, 8):
        host = Pipeline(1.0, step, draft=1.1, alpha=0.9).run(1000, batch)
        assert host.seconds / host.plain_seconds < 1.04


def test_texts_that_repeat_themselves_now_and_then_are_drafted_for() -> None:
    def step(rows: int) -> float:
        return 1.02 + 0.16 * (rows > 1) + 0.01 * rows

    host = Pipeline(1.0, step, draft=0.01, alpha=0.8).run(2000, repeats=0.4)
    always = Pipeline(1.0, step, draft=0.01, alpha=0.8).run(2000)
    assert host.plain_seconds / host.seconds > 1.2
    assert always.plain_seconds / always.seconds > 2.0


def test_no_more_rows_than_there_are_places() -> None:
    payoff = Payoff()
    for _ in range(20):
        payoff.steps.note(6, 1.0)
        payoff.skip()
    choice = payoff.choose(6, {"d": [Offer(0.9, MOST)] * 6}, 8)
    assert choice is not None
    assert sum(choice.counts) <= 2


def test_rows_are_drafted_for_as_far_as_their_tokens_are_kept() -> None:
    payoff = Payoff()
    for _ in range(20):
        payoff.steps.note(2, 1.0)
        payoff.steps.note(20, 1.01)
        payoff.skip()
    payoff.drafts["d"] = Curve()
    for _ in range(5):
        payoff.drafts["d"].note(2, 0.01)
    choice = payoff.choose(2, {"d": [Offer(0.95, MOST), Offer(0.3, MOST)]}, 64)
    assert choice is not None
    assert choice.counts[0] == MOST
    assert choice.counts[1] == 1
