"""The second moment of a layer's inputs, XᵀX: the statistic GPTQ and whitened SVD share.

Pure tensors. Products are taken in float32 and kept as a mean, so that neither size nor number of
tokens can overflow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor


@dataclass
class Gram:
    """Running mean of xxᵀ over tokens: `matrix` float32 [K, K]; `tokens` seen so far.

    Linears of one input share it, and what was worked out from it (`factor_in_order`).
    """

    matrix: Tensor
    tokens: int = 0
    _factors: dict[tuple[float, bool], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)


def empty(in_features: int, device: torch.device | str = "cpu") -> Gram:
    """A statistic that has seen nothing."""
    return Gram(torch.zeros(in_features, in_features, device=device))


def accumulate(gram: Gram, x: Tensor) -> None:
    """Add the rows of x [..., K], any float dtype, in place."""
    rows = x.reshape(-1, x.shape[-1]).float()
    total = gram.tokens + rows.shape[0]
    if not total:
        return
    gram.matrix.mul_(gram.tokens / total).addmm_(rows.t(), rows, alpha=1.0 / total)
    gram.tokens = total
    gram._factors.clear()


def project(gram: Gram, right: Tensor) -> Gram:
    """Statistic of `right @ x` [r] where `gram` is that of x [K]: R G Rᵀ, right is [r, K]."""
    r = right.float()
    return Gram(r @ gram.matrix @ r.t(), gram.tokens)


def damped(gram: Gram, share: float) -> Tensor:
    """A copy with `share` of the mean diagonal added to the diagonal: positive definite.

    Columns that no token ever used get the mean too, or 1 when nothing was used at all.
    """
    matrix = gram.matrix.clone()
    mean = float(matrix.diagonal().mean())
    dead = matrix.diagonal() <= 0
    matrix.diagonal().add_(share * mean if mean > 0 else 1.0)
    matrix.diagonal()[dead] = mean if mean > 0 else 1.0
    return matrix


def cholesky(gram: Gram, share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lower Cholesky factor of the damped matrix, damped tenfold more until it succeeds.

    Raises:
        ValueError: the matrix is not finite.
    """
    if not bool(torch.isfinite(gram.matrix).all()):
        raise ValueError("the calibration inputs are not finite")
    while True:
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped(gram, share).to(dtype))
        if not int(info):
            return factor
        share = max(share * 10, 1e-6)


def inverse_factor(gram: Gram, share: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped matrix: what GPTQ and SparseGPT read.

    Raises:
        ValueError: the matrix is not finite.
    """
    while True:
        inverse = torch.cholesky_inverse(cholesky(gram, share))
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(info):
            return factor
        share *= 10  # float32 lost definiteness in the inverse


def factor_in_order(gram: Gram, share: float, by_energy: bool) -> tuple[Tensor, Tensor]:
    """`inverse_factor` of the matrix with its columns put in order, and that order (int64 [K]):
    by falling energy, the diagonal, or as they stand. Worked out once for all that share `gram`.

    Raises:
        ValueError: the matrix is not finite.
    """
    key = (share, by_energy)
    with gram._lock:
        if key not in gram._factors:
            energy = gram.matrix.diagonal()
            order = torch.arange(len(energy), device=energy.device)
            ordered = gram
            if by_energy:
                order = torch.argsort(energy, descending=True, stable=True)
                ordered = Gram(gram.matrix[order][:, order], gram.tokens)
            gram._factors[key] = inverse_factor(ordered, share), order
        return gram._factors[key]
