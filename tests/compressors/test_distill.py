"""Whole trainings of compressed students: what they give back, going on, and their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressors.base import CompressionError
from compressors.calibration import Calibration, generate
from compressors.checkpoint import Checkpoint
from compressors.distill import corpus, job, kl, rkl, seq, train
from compressors.distill.corpus import Corpus, make_corpus, own_text
from compressors.distill.losses import forward_kl
from compressors.distill.state import TrainingState
from compressors.distill.student import Student
from compressors.distill.teacher import Teacher
from compressors.distill.train import Pace, Training
from compressors.memory import MemorySink, materialize
from compressors.pipeline import Host, compress
from compressors.recipe import Recipe, RecipeError
from compressors.tensor import Grouped, LowRank, Sparse24

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def taught(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt something: sequences that count on from any token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        make_checkpoint("llama", initializer_range=0.05), dtype=torch.float32
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = _counting(16, generator)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    return folder


def _counting(rows: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(97, (rows, 1), generator=generator)
    stride = torch.randint(1, 3, (rows, 1), generator=generator)
    return (first + stride * torch.arange(32)) % 97


@pytest.fixture
def text() -> Calibration:
    return Calibration(_counting(24, torch.Generator().manual_seed(1)), "counting")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text and few tokens; nothing else differs."""
    for module in (kl, rkl, seq):
        plain = module.objective()
        short = dataclasses.replace(
            plain,
            tokens=5_000,
            generated=512 if plain.text else 4096,
            rounds=min(plain.rounds, 2),
        )
        monkeypatch.setattr(module, "objective", lambda short=short: short)
    pace = Pace(
        batch_tokens=256,
        rate=2e-3,
        factor_rate=2e-3,
        norm_rate=2e-3,
        gain_rate=5e-3,
        shift_rate=3e-2,
        latent_rate=3e-2,
    )
    monkeypatch.setattr(job, "Pace", lambda: pace)
    monkeypatch.setattr(train, "_SAVE_SECONDS", 0.0)


def _loss(sink: MemorySink, teacher: Path, tokens: Tensor) -> float:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        said = materialize(sink)(input_ids=tokens).logits
        return float(forward_kl(said, reference(input_ids=tokens).logits).mean())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("level", "recovered"),
    [
        ("depth-75+distill-kl", 0.5),
        ("depth-75+distill-rkl", 0.2),
        ("depth-25+distill-seq", 0.2),
        ("width-50+distill-kl", 0.5),
        ("lowrank-60+distill-kl", 0.5),
        ("sparse24-wanda+distill-kl", 0.5),
        ("int2-gptq-g16+distill-kl", 0.3),
        ("int4-rtn-gch+distill-kl", 0.2),
        ("sparse24-wanda+int2-rtn-g8+distill-kl", 0.3),
    ],
)
def test_training_gives_back_what_compression_took(
    level: str, recovered: float, taught: Path, text: Calibration
) -> None:
    held_out = _counting(32, torch.Generator().manual_seed(2))
    before, after = MemorySink(), MemorySink()
    compress(
        Checkpoint(taught),
        Recipe.parse(level.rpartition("+")[0]),
        sink=before,
        calibration=text,
    )
    report = compress(Checkpoint(taught), Recipe.parse(level), sink=after, calibration=text)
    lost, left = _loss(before, taught, held_out), _loss(after, taught, held_out)
    assert left < (1 - recovered) * lost, f"{lost} to {left}"
    assert report.recipe == level
    assert after.tensors.keys() == before.tensors.keys()
    assert after.nbytes == before.nbytes
    assert {n: type(f) for n, f in after.linears.items()} == {
        n: type(f) for n, f in before.linears.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before.tensors:
            assert torch.equal(after.tensors[name], before.tensors[name])
    for name, form in before.linears.items():
        if isinstance(form, Sparse24):
            now = after.linears[name]
            assert isinstance(now, Sparse24)
            assert torch.equal(now.index, form.index)


@pytest.mark.usefixtures("quick")
def test_quantization_aware_training_beats_gptq_on_the_same_grid(
    taught: Path, text: Calibration
) -> None:
    held_out = _counting(32, torch.Generator().manual_seed(2))
    plain, aware = MemorySink(), MemorySink()
    compress(Checkpoint(taught), Recipe.parse("int2-gptq-g16"), sink=plain, calibration=text)
    compress(Checkpoint(taught), Recipe.parse("int2-qat-g16"), sink=aware, calibration=text)
    assert _loss(aware, taught, held_out) < 0.7 * _loss(plain, taught, held_out)
    for name, form in aware.linears.items():
        other = plain.linears[name]
        assert isinstance(form, Grouped)
        assert isinstance(other, Grouped)
        assert (form.bits, form.group, form.codes.shape) == (2, 16, other.codes.shape)
        assert int(form.codes.max()) <= 3
        assert form.nbytes == other.nbytes


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "level",
    [
        "depth-75+distill-kl+int4-gptq-g16",
        "lowrank-60+distill-kl+int8",
        "sparse24-wanda+distill-kl+int4-gptq-g16",
        "int2-gptq-g16+distill-kl+kv8",
        "depth-75+int3-qat-g16+embed8",
    ],
)
def test_steps_go_on_from_the_trained_student(level: str, taught: Path, text: Calibration) -> None:
    head, _, last = level.rpartition("+")
    healed, whole = MemorySink(), MemorySink()
    compress(Checkpoint(taught), Recipe.parse(head), sink=healed, calibration=text)
    report = compress(Checkpoint(taught), Recipe.parse(level), sink=whole, calibration=text)
    held_out = _counting(16, torch.Generator().manual_seed(2))
    assert report.recipe == level
    quantizes = last.startswith("int")
    for name, form in healed.linears.items():
        now = whole.linears[name]
        assert type(now) is type(form)
        if isinstance(now, LowRank) and isinstance(form, LowRank):
            assert now.rank == form.rank
            assert isinstance(now.left, Grouped) == quantizes
        error = (now.dense() - form.dense()).norm() / form.dense().norm()
        assert float(error) < (0.35 if quantizes else 1e-6)
    assert _loss(whole, taught, held_out) < _loss(healed, taught, held_out) + 0.5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("level", ["depth-75+distill-rkl", "int2-qat-g16"])
def test_a_stopped_training_ends_as_one_that_was_not(
    level: str, taught: Path, text: Calibration, tmp_path: Path
) -> None:
    def run(scratch: Path | None, stop: float = 2.0) -> tuple[MemorySink, list[str]]:
        seen: list[str] = []

        def progress(share: float, what: str) -> None:
            seen.append(what)
            if share > stop and "training" in what:
                raise KeyboardInterrupt

        sink = MemorySink()
        compress(
            Checkpoint(taught),
            Recipe.parse(level),
            sink=sink,
            calibration=text,
            progress=progress,
            host=Host(scratch=scratch),
        )
        return sink, seen

    whole, steps = run(None)
    folder = tmp_path / "scratch"
    for stop in (0.4, 0.7):
        with pytest.raises(KeyboardInterrupt):
            run(folder, stop)
        assert (folder / "training.json").exists()
    resumed, rest = run(folder)
    assert sum("step" in s for s in rest) < 0.6 * sum("step" in s for s in steps)
    assert not folder.exists()
    _assert_equal(whole, resumed)


def _assert_equal(a: MemorySink, b: MemorySink) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    assert a.linears.keys() == b.linears.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    assert all(torch.equal(a.linears[n].dense(), b.linears[n].dense()) for n in a.linears)


@pytest.mark.parametrize("damage", ["tensors", "note", "job"])
def test_a_state_that_does_not_fit_is_not_taken_up(damage: str, tmp_path: Path) -> None:
    state = TrainingState(tmp_path, "job")
    assert state.load() is None
    state.save(3, {"x": torch.arange(4.0)})
    state.save(7, {"x": torch.arange(5.0)})
    kept = state.load()
    assert kept is not None
    assert kept[0] == 7
    assert torch.equal(kept[1]["x"], torch.arange(5.0))
    assert len(list(tmp_path.iterdir())) == 2
    file, note = tmp_path / "step-7.safetensors", tmp_path / "training.json"
    if damage == "tensors":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "note":
        note.write_text('{"format": 1}')
    else:
        state = TrainingState(tmp_path, "another job")
    assert state.load() is None
    state.clear()
    assert not tmp_path.exists()


def test_only_what_belongs_to_the_blocks_trains(taught: Path, text: Calibration) -> None:
    sink = MemorySink()
    compress(Checkpoint(taught), Recipe.parse("depth-75"), sink=sink, calibration=text)
    student = Student(sink)
    student.logits(text.tokens[:2]).square().mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in student.model.named_parameters():
        inside = name.startswith("model.layers.") or name == "model.norm.weight"
        assert (name in student.names) == inside
        assert (parameter.grad is not None) == inside
    teacher = Teacher(Checkpoint(taught))
    teacher.read(text.tokens)
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(input_ids=text.tokens[3:5]).logits
    got = teacher.logits(torch.tensor([3, 4])).float()
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_black_box_training_scores_the_teachers_words_only(taught: Path) -> None:
    windows = torch.zeros(2, 32, dtype=torch.int64)
    rows = make_corpus(
        dataclasses.replace(seq.objective(), generated=128), Checkpoint(taught), windows, seed=0
    )
    assert rows.rows.shape == (4, 32)
    assert not bool(rows.scored[:, -1].any())
    assert bool(rows.scored[:, :-1].all())
    mixed = make_corpus(
        dataclasses.replace(kl.objective(), generated=64), Checkpoint(taught), windows, seed=0
    )
    assert mixed.rows.shape == (4, 32)
    assert not bool(mixed.rows[:2].any())
    assert bool(mixed.scored.all())


@pytest.mark.parametrize("damage", ["nothing", "torn", "altered"])
def test_the_teachers_text_is_kept_for_other_trainings(
    damage: str, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.zeros(2, 32, dtype=torch.int64)
    objective = dataclasses.replace(kl.objective(), generated=64)

    def make(seed: int) -> Tensor:
        return make_corpus(objective, Checkpoint(taught), windows, seed=seed, kept=tmp_path).rows

    first, other = make(0), make(1)
    assert not torch.equal(first, other)
    assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        if damage == "torn":
            file.write_bytes(data[: len(data) // 2])
        elif damage == "altered":
            data[-8] ^= 1
            file.write_bytes(data)
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(corpus, "generate", counted)
    assert torch.equal(make(0), first)
    assert len(made) == (0 if damage == "nothing" else 1)


def test_half_of_an_on_policy_row_is_the_students(taught: Path, text: Calibration) -> None:
    sink = MemorySink()
    compress(Checkpoint(taught), Recipe.parse("depth-75"), sink=sink, calibration=text)
    student = Student(sink)
    rows = own_text(student, text.tokens, seed=5)
    assert torch.equal(rows[:, :16], text.tokens[:, :16])
    assert not torch.equal(rows[:, 16:], text.tokens[:, 16:])
    assert torch.equal(rows, own_text(student, text.tokens, seed=5))
    assert not torch.equal(rows, own_text(student, text.tokens, seed=6))


def test_every_row_is_seen_before_any_is_seen_again(taught: Path, text: Calibration) -> None:
    sink = MemorySink()
    compress(Checkpoint(taught), Recipe.parse("depth-75"), sink=sink, calibration=text)
    rows = Corpus(text.tokens, torch.ones_like(text.tokens, dtype=torch.bool))
    training = Training(
        Student(sink),
        Teacher(Checkpoint(taught)),
        rows,
        dataclasses.replace(kl.objective(), tokens=24 * 32 * 2),
        Pace(batch_tokens=8 * 32),
        seed=4,
    )
    assert training.steps == 6
    picked = [training._pick(step) for step in range(6)]
    for epoch in (picked[:3], picked[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(24))
    assert not torch.equal(torch.cat(picked[:3]), torch.cat(picked[3:]))


def test_a_conv1d_model_with_biases_is_healed(make_checkpoint: Make, quick: None) -> None:
    folder = make_checkpoint("gpt2")
    tokens = torch.randint(97, (16, 32), generator=torch.Generator().manual_seed(0))
    text = Calibration(tokens, "random")
    before, after = MemorySink(), MemorySink()
    level = "int2-rtn-g16"
    compress(Checkpoint(folder), Recipe.parse(level), sink=before, calibration=text)
    compress(Checkpoint(folder), Recipe.parse(f"{level}+distill-kl"), sink=after, calibration=text)
    assert _loss(after, folder, tokens) < 0.8 * _loss(before, folder, tokens)
    name = "transformer.h.0.attn.c_attn.bias"
    assert after.tensors[name].shape == before.tensors[name].shape
    assert not torch.equal(after.tensors[name], before.tensors[name])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("distill-kl", "needs a smaller model"),
        ("int3-qat-g64+distill-kl", "trains the model already"),
        ("depth-50+distill-kl+distill-rkl", "distilled once"),
        ("int4-qat-g64", "does 2, 3 bits"),
        ("lowrank-80+int3-qat-g64", "works on plain weights"),
    ],
)
def test_senseless_trainings_are_refused(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(name)


def test_a_training_without_text_is_refused(taught: Path) -> None:
    with pytest.raises(CompressionError, match="needs calibration text"):
        compress(Checkpoint(taught), Recipe.parse("depth-75+distill-kl"), sink=MemorySink())
