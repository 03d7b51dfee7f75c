"""The streaming comparison against a naive one in float64, its identities, and known orders."""

from __future__ import annotations

import itertools
import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gateway
from gateway.quality.evaluate import Quality, QualityError, evaluate

VOCABULARY = 37


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Table:
    """A bigram "model": logits depend on the current token only. Counts what it is asked."""

    def __init__(self, seed: int, noise: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        base = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7))
        self.table = base + noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.dtype = dtype
        self.largest = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.largest = max(self.largest, ids.shape[0])
        return self.table[ids].to(self.dtype)


def random_windows(count: int = 11, length: int = 23) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


def naive(reference: Table, candidate: Table, windows: Tensor) -> dict[str, float]:
    """Token by token, in Python floats."""
    nll_p, nll_q, kl, agree, flips = [], [], [], [], []
    for window in windows.tolist():
        for current, following in itertools.pairwise(window):
            p_row = [float(x) for x in reference.table[current].to(reference.dtype)]
            q_row = [float(x) for x in candidate.table[current].to(candidate.dtype)]
            p_norm = math.log(math.fsum(math.exp(x) for x in p_row))
            q_norm = math.log(math.fsum(math.exp(x) for x in q_row))
            nll_p.append(p_norm - p_row[following])
            nll_q.append(q_norm - q_row[following])
            kl.append(
                math.fsum(
                    math.exp(p - p_norm) * ((p - p_norm) - (q - q_norm))
                    for p, q in zip(p_row, q_row, strict=True)
                )
            )
            best_p, best_q = p_row.index(max(p_row)), q_row.index(max(q_row))
            agree.append(best_p == best_q)
            flips.append((best_p == following) != (best_q == following))
    count = len(kl)
    return {
        "perplexity": math.exp(math.fsum(nll_q) / count),
        "reference_perplexity": math.exp(math.fsum(nll_p) / count),
        "perplexity_ratio": math.exp((math.fsum(nll_q) - math.fsum(nll_p)) / count),
        "kl_nats": math.fsum(kl) / count,
        "top1_agreement": sum(agree) / count,
        "flips": sum(flips) / count,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 4, 50])
def test_equals_a_naive_computation(dtype: torch.dtype, batch: int) -> None:
    reference, candidate = Table(1), Table(2, noise=0.7, dtype=dtype)
    quality = evaluate(reference, candidate, random_windows(), batch=batch)
    for name, value in naive(reference, candidate, random_windows()).items():
        assert getattr(quality, name) == pytest.approx(value, rel=2e-5), name
    assert quality.tokens == 11 * 22
    assert quality.windows == 11


def test_rows_beyond_one_slice_are_counted_once() -> None:
    reference, candidate = Table(1), Table(2, noise=0.5)
    windows = random_windows(3, 700)
    whole = evaluate(reference, candidate, windows, batch=3)
    assert whole.kl_nats == pytest.approx(naive(reference, candidate, windows)["kl_nats"], rel=2e-5)
    assert whole.tokens == 3 * 699


def test_a_model_against_itself_is_perfect() -> None:
    quality = evaluate(Table(1), Table(1), random_windows())
    assert quality.perplexity_ratio == 1.0
    assert (quality.ratio_low, quality.ratio_high) == (1.0, 1.0)
    assert quality.kl_nats == 0.0
    assert quality.top1_agreement == 1.0
    assert quality.flips == 0.0


def test_shifting_all_logits_changes_nothing() -> None:
    shifted = Table(1)
    shifted.table = shifted.table + 5.0
    quality = evaluate(Table(1), shifted, random_windows())
    assert quality.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert quality.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert quality.top1_agreement == 1.0


def test_never_more_than_one_batch_is_asked_for() -> None:
    reference, candidate = Table(1), Table(2, noise=0.1)
    shares: list[float] = []
    evaluate(reference, candidate, random_windows(11), batch=4, progress=shares.append)
    assert (reference.largest, candidate.largest) == (4, 4)
    assert shares == [pytest.approx(4 / 11), pytest.approx(8 / 11), 1.0]


def test_the_interval_is_seeded_and_holds_the_ratio() -> None:
    def run(seed: int) -> Quality:
        return evaluate(Table(1), Table(2, noise=0.7), random_windows(), seed=seed)

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert (first.ratio_low, first.ratio_high) != (other.ratio_low, other.ratio_high)
    assert first.ratio_low < first.perplexity_ratio < first.ratio_high


def test_the_interval_shrinks_with_more_windows() -> None:
    few = evaluate(Table(1), Table(2, noise=0.7), random_windows(8))
    many = evaluate(Table(1), Table(2, noise=0.7), random_windows(200))
    assert many.ratio_high - many.ratio_low < (few.ratio_high - few.ratio_low) / 2


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    reference, candidate = Table(1), Table(2, noise=0.5)
    generator = torch.Generator().manual_seed(0)
    # Uniform tokens: the ratio over all token pairs is the truth that windows estimate.
    p = torch.log_softmax(reference.table.double(), -1)
    q = torch.log_softmax(candidate.table.double(), -1)
    truth = math.exp(float((p - q).mean()))
    covered = 0
    for trial in range(60):
        windows = torch.randint(VOCABULARY, (30, 20), generator=generator)
        quality = evaluate(reference, candidate, windows, batch=30, seed=trial)
        covered += quality.ratio_low <= truth <= quality.ratio_high
    assert covered >= 50  # 57 expected; fewer than 50 has a chance below 1 in 500


def test_one_window_has_no_interval() -> None:
    quality = evaluate(Table(1), Table(2, noise=0.7), random_windows(1))
    assert quality.ratio_low == quality.ratio_high == quality.perplexity_ratio


def test_a_ruined_candidate_still_gives_finite_numbers() -> None:
    ruined = Table(1)
    ruined.table = -1000.0 * ruined.table
    quality = evaluate(Table(1), ruined, random_windows())
    assert math.isfinite(quality.perplexity)
    assert math.isfinite(quality.perplexity_ratio)
    assert quality.kl_nats > 100


@pytest.mark.parametrize(
    ("poison", "who"),
    [
        pytest.param((float("nan"), None), "reference", id="reference"),
        pytest.param((None, float("nan")), "candidate", id="candidate"),
        pytest.param((None, float("inf")), "candidate", id="infinite"),
    ],
)
def test_logits_that_are_not_finite_are_an_error(
    poison: tuple[float | None, float | None], who: str
) -> None:
    models = [Table(1), Table(2)]
    for model, value in zip(models, poison, strict=True):
        if value is not None:
            model.table[:, 3] = value
    with pytest.raises(QualityError, match=f"the {who} gives logits that are not finite"):
        evaluate(models[0], models[1], random_windows())


def test_a_token_that_only_the_candidate_rules_out_is_an_error() -> None:
    candidate = Table(1)
    candidate.table[:, 3] = float("-inf")
    windows = random_windows()
    windows[windows == 3] = 4  # never the target
    with pytest.raises(QualityError, match="rules out"):
        evaluate(Table(1), candidate, windows)


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(QualityError, match="windows"):
        evaluate(Table(1), Table(1), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(QualityError, match="the candidate gives"):
        evaluate(Table(1), lambda ids: torch.zeros(*ids.shape, 5), random_windows())
    with pytest.raises(QualityError, match="the reference gives"):
        evaluate(lambda ids: torch.zeros(len(ids), 5), Table(1), random_windows())
    with pytest.raises(QualityError, match="batch"):
        evaluate(Table(1), Table(1), random_windows(), batch=0)


@pytest.mark.slow
def test_orders_known_damage_to_the_bundled_model() -> None:
    """int8 is nearly free, int4 costs a little, int2 a lot; published and measured many times."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(gateway.__file__).parent / "builtin" / "docs-17m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    windows = torch.tensor(ids[: 8 * 256]).reshape(8, 256)

    results: dict[int, Quality] = {}
    for bits in (8, 4, 2):
        level = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for module in level.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = round_to_nearest(module.weight.data, bits, group=64)
        results[bits] = evaluate(
            lambda ids: dense(ids).logits, lambda ids, m=level: m(ids).logits, windows
        )
    assert results[8].perplexity_ratio < results[4].perplexity_ratio < results[2].perplexity_ratio
    assert results[8].kl_nats < results[4].kl_nats < results[2].kl_nats
    assert results[8].top1_agreement > results[4].top1_agreement > results[2].top1_agreement
    assert results[8].perplexity_ratio == pytest.approx(1.0, abs=0.005)
    assert results[8].kl_nats < 0.002
    assert 1.005 < results[4].perplexity_ratio < 1.15
    assert results[2].perplexity_ratio > 2.0


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Asymmetric round to nearest, written out plainly."""
    blocks = weight.reshape(weight.shape[0], -1, group)
    low = blocks.amin(-1, keepdim=True)
    scale = (blocks.amax(-1, keepdim=True) - low) / (2**bits - 1)
    return (((blocks - low) / scale).round() * scale + low).reshape(weight.shape)
