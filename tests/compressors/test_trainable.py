"""Training compressed weights: losses and forms against their equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressors.distill.losses import cross_entropy, forward_kl, reverse_kl
from compressors.distill.trainable import trained
from compressors.forms.rotated import Rotated
from compressors.forms.scaled import Scaled
from compressors.prune.magnitude import solve as magnitude
from compressors.quantize import rtn
from compressors.quantize.qat import FakeQuantized
from compressors.tensor import Dense, Grouped, LinearForm, LowRank, Sparse24

Make = Callable[..., Path]


def _softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max())
    probabilities: np.ndarray[Any, Any] = e / e.sum()
    return probabilities


def test_losses_equal_their_equations_in_float64() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 5, 11)) * 3
    words = rng.integers(0, 11, size=(3, 5))
    got = {
        "forward": forward_kl(torch.tensor(student), torch.tensor(teacher)),
        "soft": forward_kl(torch.tensor(student), torch.tensor(teacher), 2.0),
        "reverse": reverse_kl(torch.tensor(student), torch.tensor(teacher)),
        "words": cross_entropy(torch.tensor(student), torch.tensor(words)),
    }
    for i in range(3):
        for j in range(5):
            p, q = _softmax(teacher[i, j]), _softmax(student[i, j])
            p2, q2 = _softmax(teacher[i, j] / 2), _softmax(student[i, j] / 2)
            expected = {
                "forward": sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)),
                "soft": 4 * sum(a * (np.log(a) - np.log(b)) for a, b in zip(p2, q2, strict=True)),
                "reverse": sum(b * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True)),
                "words": -np.log(q[words[i, j]]),
            }
            for name, value in expected.items():
                assert float(got[name][i, j]) == pytest.approx(value, rel=1e-4, abs=1e-5)


def _form(kind: str) -> LinearForm:
    torch.manual_seed(3)
    weight = torch.randn(12, 24)
    grouped = rtn.solve(weight, bits=3, group=8)
    if kind == "sparse":
        return magnitude(weight, None, pattern="24")
    if kind == "sparse50":
        return magnitude(weight, None, pattern="50")
    if kind == "sparse-codes":
        sparse = magnitude(weight, None, pattern="24")
        assert isinstance(sparse, Sparse24)
        return dataclasses.replace(sparse, values=rtn.solve(sparse.values.dense(), bits=4, group=4))
    forms: dict[str, LinearForm] = {
        "dense": Dense(weight),
        "codes": grouped,
        "symmetric": rtn.solve(weight, bits=4, group=8, symmetric=True),
        "ordered": dataclasses.replace(grouped, perm=torch.arange(24, dtype=torch.int32) % 3),
        "short-group": rtn.solve(weight, bits=4, group=16),
        "lowrank": LowRank(Dense(torch.randn(12, 4)), Dense(torch.randn(4, 24))),
        "scaled": Scaled(grouped, torch.rand(24) + 0.5),
        "rotated": Rotated(grouped, torch.arange(24).remainder(2).mul(2).sub(1).char(), 8),
        "lowrank-codes": LowRank(
            rtn.solve(torch.randn(12, 4), bits=8, group=4), Dense(torch.randn(4, 24))
        ),
    }
    return forms[kind]


FORMS: tuple[str, ...] = (
    "dense",
    "codes",
    "symmetric",
    "ordered",
    "short-group",
    "lowrank",
    "lowrank-codes",
)
FORMS += ("scaled", "rotated", "sparse", "sparse50", "sparse-codes")


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_trains_inside_its_constraint(kind: str) -> None:
    form = _form(kind)
    module = trained(form)
    torch.testing.assert_close(module.form().dense(), form.dense())
    x, target = torch.randn(40, 24), torch.randn(40, 12)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = module.form()
    assert type(after) is type(form)
    assert after.shape == form.shape
    assert after.nbytes <= form.nbytes + 2 * 24 * 12  # float32 now, before `stored_as`
    torch.testing.assert_close(x @ after.dense().t(), module(x).detach(), rtol=1e-4, atol=1e-5)
    if isinstance(form, Grouped) and isinstance(after, Grouped):
        assert torch.equal(after.codes, form.codes)
        assert after.symmetric == form.symmetric
        assert not torch.equal(after.scales, form.scales)
    if kind.startswith("sparse"):
        assert bool((after.dense()[form.dense() == 0] == 0).all())
        assert int((after.dense() != 0).sum()) == int((form.dense() != 0).sum())
    if isinstance(form, LowRank) and isinstance(after, LowRank):
        assert after.rank == form.rank


def test_quantization_in_training_has_the_gradients_of_its_equations() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 16) * 2
    start = rtn.solve(weight, bits=2, group=8)
    module = FakeQuantized(weight, start)
    torch.testing.assert_close(module.weight().detach(), start.dense())
    with torch.no_grad():
        module.latent.add_(0.3 * torch.randn_like(module.latent))
    upstream = torch.randn(4, 16)
    (module.weight() * upstream).sum().backward()  # type: ignore[no-untyped-call]
    latent = (module.latent * module.unit).detach().double()
    for n in range(4):
        for g in range(2):
            s, z = float(start.scales[n, g]), float(start.zeros[n, g])
            scale_grad = zero_grad = 0.0
            for k in range(8 * g, 8 * g + 8):
                w, up = float(latent[n, k]), float(upstream[n, k])
                place = w / s + z
                q = min(max(round(place), 0), 3)
                inside = 0 <= round(place) <= 3
                # LSQ eq. 3 with a zero point; straight through inside the range, nothing outside.
                assert float(module.latent.grad[n, k]) == pytest.approx(  # type: ignore[index]
                    up * float(module.unit) if inside else 0.0, rel=1e-4, abs=1e-6
                )
                scale_grad += up * ((q - z) - (w / s if inside else 0.0))
                zero_grad += up * (0.0 if inside else -s)
            assert module.shift is not None
            assert float(module.gain.grad[n, g]) == pytest.approx(  # type: ignore[index]
                scale_grad * s, rel=1e-3, abs=1e-4
            )
            assert float(module.shift.grad[n, g]) == pytest.approx(  # type: ignore[index]
                zero_grad, rel=1e-3, abs=1e-4
            )
    after = module.form()
    assert int(after.codes.max()) <= 3
    torch.testing.assert_close(after.dense(), module.weight().detach(), rtol=2e-3, atol=1e-3)


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(ValueError, match="cannot be trained"):
        trained(_Opaque())


@dataclasses.dataclass(frozen=True, eq=False)
class _Opaque(LinearForm):
    scheme = "opaque"
    shape = (1, 1)
    nbytes = 0

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(1, 1, dtype=dtype)

    def stored_as(self, dtype: torch.dtype) -> LinearForm:
        return self
