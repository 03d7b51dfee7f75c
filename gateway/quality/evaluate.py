"""How much a level's predictions differ from the dense model's, on the same held-out windows.

Owns the numbers on a card: perplexity and its ratio, KL divergence, top-1 agreement. Both models
run window batch by window batch; only one batch of logits of each is alive at a time, and of what
they say only a few numbers per token are kept. Log-probabilities are in float32, sums in float64.

Perplexity alone hides damage that cancels out over a text, so the divergence of the two predictive
distributions and the share of changed answers stand beside it ("Accuracy is not all you need",
Dutta et al., arXiv:2407.09141: flips and KL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
"""Token ids int64 [B, T] → logits [B, T, V] in any float dtype, on any device."""

MIN_RATIO_WINDOWS = 2
_ROWS = 512  # rows of logits turned to float32 at a time
_RESAMPLES = 2000


class QualityError(ValueError):
    """The comparison cannot be made; the message says which model or input is at fault."""


@dataclass(frozen=True)
class Quality:
    """A candidate against its reference, over `tokens` predicted tokens of `windows` windows.

    Attributes:
        perplexity: of the candidate, exp of its mean negative log-likelihood.
        reference_perplexity: of the reference, on the same tokens.
        perplexity_ratio: candidate ÷ reference; 1.0 is no loss.
        ratio_low, ratio_high: 95 % confidence interval of the ratio (paired bootstrap over
            windows); both equal the ratio when there is only one window.
        kl_nats: mean over tokens of KL(reference ‖ candidate), never negative.
        kl_p99: its 99th percentile over tokens.
        top1_agreement: share of tokens where both name the same most likely token.
        flips: share of tokens where one of the two, not both, names the true next token.
    """

    windows: int
    tokens: int
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    ratio_low: float
    ratio_high: float
    kl_nats: float
    kl_p99: float
    top1_agreement: float
    flips: float


@dataclass(frozen=True)
class _PerToken:
    """What is kept of one batch; every tensor is [B, T-1], float64 or bool."""

    nll_reference: Tensor
    nll_candidate: Tensor
    kl: Tensor
    agrees: Tensor
    flips: Tensor


def evaluate(
    reference: LogitsFn,
    candidate: LogitsFn,
    windows: Tensor,
    *,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Quality:
    """Compare `candidate` with `reference` on the next-token predictions of every window.

    Args:
        windows: token ids, int64 [W, T], T ≥ 2. A window's first token is given, not predicted.
        batch: windows per forward; bounds memory at two [batch, T, V] tensors.
        seed: of the bootstrap.
        progress: called with the share done after each batch; raising from it stops.

    Raises:
        QualityError: windows of the wrong shape, logits of the wrong shape or not finite.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise QualityError(
            f"windows are {list(windows.shape)}, expected [W, T] with T of 2 or more"
        )
    if batch < 1:
        raise QualityError("batch must be at least 1")
    parts: list[_PerToken] = []
    with torch.inference_mode():
        for start in range(0, windows.shape[0], batch):
            ids = windows[start : start + batch]
            expected = _logits("the reference", reference, ids)
            actual = _logits("the candidate", candidate, ids)
            if actual.shape != expected.shape:
                raise QualityError(
                    f"the candidate gives {list(actual.shape)} logits, "
                    f"the reference {list(expected.shape)}"
                )
            parts.append(_compare(expected, actual, ids))
            del expected, actual
            if progress is not None:
                progress(min(1.0, (start + batch) / windows.shape[0]))
    return _summary(parts, seed)


def _logits(who: str, model: LogitsFn, ids: Tensor) -> Tensor:
    logits = model(ids)
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(ids.shape):
        raise QualityError(f"{who} gives {list(logits.shape)} logits for {list(ids.shape)} tokens")
    return logits


def _compare(expected: Tensor, actual: Tensor, ids: Tensor) -> _PerToken:
    """Per-token numbers of one batch, a slice of rows in float32 at a time."""
    count, length, vocabulary = expected.shape
    before = expected[:, :-1].reshape(-1, vocabulary)
    after = actual[:, :-1].reshape(-1, vocabulary)
    targets = ids[:, 1:].reshape(-1)
    columns: list[list[Tensor]] = [[] for _ in range(5)]
    for start in range(0, before.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        for column, values in zip(
            columns, _compare_rows(before[rows], after[rows], targets[rows]), strict=True
        ):
            column.append(values.cpu())
    return _PerToken(*(torch.cat(column).reshape(count, length - 1) for column in columns))


def _compare_rows(
    before: Tensor, after: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_p = F.log_softmax(before.float(), dim=-1)
    log_q = F.log_softmax(after.to(before.device).float(), dim=-1)
    targets = targets.to(before.device)
    picked = targets[:, None]
    nll_p = -log_p.gather(1, picked)[:, 0].double()
    nll_q = -log_q.gather(1, picked)[:, 0].double()
    if not bool(torch.isfinite(nll_p).all()):
        raise QualityError("the reference gives logits that are not finite")
    if not bool(torch.isfinite(nll_q).all()):
        raise QualityError("the candidate gives logits that are not finite")
    # Where p underflows to 0 the term is 0, whatever q is; rounding may leave a sum just below 0.
    terms = torch.where(log_p > -100.0, log_p.exp() * (log_p - log_q), 0.0)
    kl = terms.sum(dim=-1, dtype=torch.float64).clamp_min(0.0)
    if not bool(torch.isfinite(kl).all()):
        raise QualityError("the candidate rules out tokens that the reference thinks possible")
    best_p, best_q = before.argmax(dim=-1), after.to(before.device).argmax(dim=-1)
    flips = (best_p == targets) != (best_q == targets)
    return nll_p, nll_q, kl, best_p == best_q, flips


def _summary(parts: list[_PerToken], seed: int) -> Quality:
    nll_reference = torch.cat([part.nll_reference for part in parts])
    nll_candidate = torch.cat([part.nll_candidate for part in parts])
    kl = torch.cat([part.kl for part in parts])
    # Windows are of one length, so the mean over tokens is the mean of the windows' means.
    loss = (nll_candidate - nll_reference).mean(dim=1)
    low, high = _interval(loss, seed)
    ratio = _exp(float(loss.mean()))
    return Quality(
        windows=loss.shape[0],
        tokens=kl.numel(),
        perplexity=_exp(float(nll_candidate.mean())),
        reference_perplexity=_exp(float(nll_reference.mean())),
        perplexity_ratio=ratio,
        ratio_low=min(low, ratio),
        ratio_high=max(high, ratio),
        kl_nats=float(kl.mean()),
        kl_p99=float(kl.flatten().quantile(0.99)) if kl.numel() < 2**24 else float(kl.max()),
        top1_agreement=_share([part.agrees for part in parts]),
        flips=_share([part.flips for part in parts]),
    )


def _interval(loss: Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of exp(mean loss), for `loss` float64 [W] in nats.

    Whole windows are resampled, as tokens of one window depend on each other; the two models
    together, as they see the same text.
    """
    count = loss.shape[0]
    if count < MIN_RATIO_WINDOWS:
        ratio = _exp(float(loss.mean()))
        return ratio, ratio
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (_RESAMPLES, count), generator=generator)
    means = loss[draws].mean(dim=1)
    points = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype))
    return _exp(float(points[0])), _exp(float(points[1]))


def _share(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def _exp(nats: float) -> float:
    """exp, at most the largest float32: a ruined level's perplexity must still be valid JSON."""
    return float(torch.tensor(nats, dtype=torch.float64).exp().clamp(max=3.4e38))
