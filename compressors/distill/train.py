"""The training loop: AdamW over what a student trains, resumable, the same under one seed.

Owns steps, learning rates and the state that a stopped training goes on from; knows losses only as
functions and writes no model. Which rows a step takes depends on the seed and the step alone, so a
training that was stopped and resumed ends as one that was not (to the bit on a CPU).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressors.distill.compute import computing
from compressors.distill.corpus import Corpus, own_text
from compressors.distill.objective import Objective
from compressors.distill.state import TrainingState
from compressors.distill.student import Student
from compressors.distill.teacher import Teacher

Say = Callable[[float, str], None]
LOGITS = 1 << 24  # logits of one forward pass; more rows than that are taken one after the other
_SAVE_SECONDS = 30.0
_OWN, _ROUND = "own.rows", "own.round"


@dataclass(frozen=True)
class Pace:
    """How fast a student learns.

    Attributes:
        batch_tokens: of one step, at least a row.
        rate: peak learning rate of weights, whole or those that pruning left.
        factor_rate: of low-rank factors.
        norm_rate: of norms and biases.
        gain_rate, shift_rate: of a grid's relative scale, and of its zero in code units.
        latent_rate: of a weight behind its quantization, in mean scales of its layer.
        warmup: share of the steps in which the rate rises; it falls as a cosine to `floor` of it.
        clip: largest norm of a step's gradient.
    """

    batch_tokens: int = 2048
    rate: float = 3e-4
    factor_rate: float = 2e-4
    norm_rate: float = 2e-4
    gain_rate: float = 2e-3
    shift_rate: float = 1e-2
    latent_rate: float = 6e-3
    warmup: float = 0.05
    floor: float = 0.02
    clip: float = 1.0

    def rate_of(self, name: str, parameter: Tensor) -> float:
        """Peak learning rate of a parameter by its name."""
        if parameter.ndim == 1:
            return self.norm_rate
        if ".left." in name or ".right." in name:
            return self.factor_rate
        leaf = name.rpartition(".")[2]
        special = {"gain": self.gain_rate, "shift": self.shift_rate, "latent": self.latent_rate}
        return special.get(leaf, self.rate)

    def share(self, step: int, steps: int) -> float:
        """Learning rate at `step` as a share of the peak."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, steps - rise)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class Training:
    """One training of one student.

    Args:
        teacher: of white-box objectives; it reads the rows when they are known.
        corpus: what is trained on, and what the student continues where it writes itself.
        state: where an unfinished training is kept, if anywhere.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        corpus: Corpus,
        objective: Objective,
        pace: Pace,
        *,
        seed: int = 0,
        state: TrainingState | None = None,
    ) -> None:
        self._student, self._teacher, self._corpus = student, teacher, corpus
        self._objective, self._pace, self._seed, self._state = objective, pace, seed, state
        self._parameters = student.parameters
        self._optimizer = torch.optim.AdamW(
            [{"params": [p], "peak": pace.rate_of(n, p)} for n, p in self._parameters.items()],
            lr=0.0,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        length = corpus.rows.shape[1]
        self._rows = corpus.rows
        self._batch = min(len(corpus.rows), max(1, pace.batch_tokens // length))
        self.steps = max(1, objective.tokens // (self._batch * length))
        self._round = -1
        self._written = -1  # the round whose text the student has written

    def run(self, say: Say = lambda _share, _what: None) -> list[float]:
        """Train to the end; the mean loss (nats) of every step done here.

        Raises:
            whatever `say` raises: the training stops, and its last kept state stays.
        """
        losses: list[float] = []
        saved = time.monotonic()
        for step in range(self._resume(), self.steps):
            self._enter_round(step, say)
            losses.append(self._step(step))
            if self._state is not None and time.monotonic() - saved > _SAVE_SECONDS:
                self._save(step + 1)
                saved = time.monotonic()
            recent = losses[-20:]
            say(
                (step + 1) / self.steps,
                f"training: step {step + 1} of {self.steps}, loss {sum(recent) / len(recent):.3f}",
            )
        return losses

    def _enter_round(self, step: int, say: Say) -> None:
        """Make the rows of the round that `step` is in, if it is a new one."""
        rounds = max(1, self._objective.rounds)
        current = min(rounds - 1, step * rounds // self.steps)
        if current == self._round:
            return
        if self._objective.rounds and current != self._written:
            say(step / self.steps, "the student writes")
            seed = self._seed * 1009 + current
            self._rows = own_text(self._student, self._corpus.rows, seed=seed)
            self._written = current
        self._round = current
        if self._objective.white_box:
            self._teacher.read(
                self._rows, lambda share: say(step / self.steps, f"teacher: {share:.0%} read")
            )

    def _step(self, step: int) -> float:
        picked = self._pick(step)
        length = self._rows.shape[1]
        vocabulary = int(self._student.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        most = max(1, LOGITS // (length * vocabulary))
        scored = int(self._corpus.scored[picked, :length].sum())
        total = 0.0
        for rows in picked.split(most):  # type: ignore[no-untyped-call]
            loss = self._loss(rows) / scored
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._pace.clip)
        share = self._pace.share(step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, rows: Tensor) -> Tensor:
        """Sum of the loss over the scored positions of these rows."""
        device = self._student.device
        tokens = self._rows[rows].to(device)
        scored = self._corpus.scored[rows, : tokens.shape[1]].to(device)
        words = tokens.roll(-1, 1)
        with computing(device):
            said = self._student.logits(tokens)
            known = said.new_empty((*tokens.shape, 0))
            if self._objective.white_box:
                known = self._teacher.logits(rows)
        if not bool(scored.all()):
            said, known, words = said[scored], known[scored], words[scored]
        return self._objective.loss(said, known, words).sum()

    def _pick(self, step: int) -> Tensor:
        """Numbers of the rows of a step: all rows in some order, then again in another."""
        total = len(self._corpus.rows)
        picked = []
        for place in range(step * self._batch, (step + 1) * self._batch):
            epoch, index = divmod(place, total)
            picked.append(self._order(epoch)[index])
        return torch.stack(picked)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 7919 + epoch)
        return torch.randperm(len(self._corpus.rows), generator=generator)

    def _save(self, step: int) -> None:
        assert self._state is not None
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().cpu()
            moments = self._optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{key}.{name}"] = moments[key].detach().cpu()
        if self._objective.rounds:
            tensors |= {_OWN: self._rows, _ROUND: torch.tensor(self._written)}
        self._state.save(step, tensors)

    @torch.no_grad()
    def _resume(self) -> int:
        """Take up a kept state; the step to go on with."""
        kept = None if self._state is None else self._state.load()
        if kept is None:
            return 0
        step, tensors = kept
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"],
                **{key: value.to(parameter.device) for key, value in moments.items()},
            }
        if self._objective.rounds:
            self._rows, self._written = tensors[_OWN], int(tensors[_ROUND])
        return step
