"""The quantized KV cache computes what its definition says, however the engine schedules it.

The reference is a model of transformers whose attention is a naive float64 simulation over
contiguous arrays, written from the definition: a query sees keys of complete groups before its own
quantized per channel, keys of its own group at 8 bits per token, and values quantized per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compressors.kv_scheme import KVScheme
from gateway.engine.attention import LayerShape, Layout
from gateway.engine.core import Core, Job, LocalOptions
from gateway.engine.kv_cache import BlockPool
from gateway.engine.kv_quant import QuantPool, make_pool
from gateway.engine.runner import Model, VariantWeights, build_model, forward_logits
from gateway.engine.scheduler import Limits, Scheduler, Sequence
from gateway.engine.tokenizer import Tokenizer

from .conftest import request, run, small_core, tokens_of, weights_of
from .test_greedy import prompts

Maker = Callable[[str], Path]
FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2")
GROUP = 8


STEPS = [np.float32(2.0 ** (index / 8 - 20)) for index in range(256)]


def affine(x: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """One group (float32) rounded to `bits` and back, in float32: what was rounded before lies on
    borders of the next rounding so often that another precision would take the other side."""
    top, unit = np.float32(2**bits - 1), np.float32(2 ** (bits - 4))
    low, high = x.min(), x.max()
    span = max((high - low) / (top + 1 - unit), low / (127 * unit), -low / (128 * unit))
    step = next((step for step in STEPS if step >= span), STEPS[-1])
    zero = min(127, max(-128, int(np.floor(low / (step * unit) + np.float32(0.5) / unit))))
    codes = np.clip(np.round(x / step - np.float32(zero) * unit), 0, top)
    return codes * step + np.float32(zero) * step * unit


def rounded(rows: Tensor, bits: int) -> Tensor:
    """Every row [n, d] rounded as one group, float64."""
    return torch.tensor(np.array([affine(row, bits) for row in rows.float().numpy()])).double()


def naive_attention(bits: int) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        query, key, value = query[0].double(), key[0].double(), value[0].double()
        heads, length, dim = query.shape
        scale, cap = options.get("scaling") or dim**-0.5, options.get("softcap")
        window = options.get("sliding_window") or length
        out = torch.zeros(length, heads, value.shape[2], dtype=torch.float64)
        for head in range(heads):
            kv_head = head * key.shape[0] // heads
            tail, values = rounded(key[kv_head], 8), rounded(value[kv_head], bits)
            groups = range(0, length // GROUP * GROUP, GROUP)
            # What becomes codes is the tail, not the original.
            codes = [rounded(tail[at : at + GROUP].T, bits).T for at in groups]
            for at in range(length):
                first, begin = at // GROUP, max(0, at + 1 - window)
                keys = torch.cat([*codes[:first], tail[first * GROUP : at + 1]])
                scores = keys[begin:] @ query[head, at] * scale
                scores = scores if cap is None else torch.tanh(scores / cap) * cap
                out[at, head] = torch.softmax(scores, 0) @ values[begin : at + 1]
        return out[None].float(), None

    return attend


def shallow(folder: Path, attention: str) -> Any:
    """transformers' model cut to one layer: with more, one key that a last bit of float32 puts on
    the other side of a rounding border changes all later layers, and no tolerance would mean much.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation=attention
    ).eval()


def naive_logprobs(folder: Path, bits: int, tokens: list[int]) -> Tensor:
    """float64 [n, vocab] of the shallow model with the naive attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(f"naive_kv{bits}", naive_attention(bits))
    model = shallow(folder, f"naive_kv{bits}")
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), -1)


def shallow_model(folder: Path, scheme: KVScheme) -> Model:
    model = shallow(folder, "eager")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights = VariantWeights(model.config.to_dict(), tensors, {}, torch.float32, scheme)
    return build_model(weights)


def loaded(folder: Path, tokenizer: Tokenizer, scheme: KVScheme, **options: Any) -> Core:
    core = small_core(**options)
    core.attach("v", build_model(replace(weights_of(folder), kv=scheme)), tokenizer)
    return core


@pytest.fixture(params=["native", "torch"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESSGATE_NATIVE", "1" if request.param == "native" else "0")


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_naive_simulations(
    family: str, bits: int, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    model = shallow_model(checkpoint(family), KVScheme(bits, GROUP))
    # Chunks that end inside groups, and too little memory for all at once.
    core = small_core(kv_bytes=model.layout.block_bytes(GROUP) * 13, prefill_chunk=5)
    core.attach("v", model, bytes_tokenizer)
    ragged = prompts(4, longest=40, seed=11)
    jobs = [
        Job("v", request(p, 20, logprobs=0, prompt_logprobs=True), bytes_tokenizer) for p in ragged
    ]
    for prompt, events in zip(ragged, run(core, jobs), strict=True):
        sequence = prompt + tokens_of(events)
        naive = naive_logprobs(checkpoint(family), bits, sequence)
        entries = [*(events[0].prompt_logprobs or ())[1:], *(e.logprob for e in events)]
        found = [e.logprob for e in entries if e is not None and e.logprob is not None]
        assert len(found) == len(sequence) - 1
        expected = naive[torch.arange(len(found)), torch.tensor(sequence[1:])]
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), expected, atol=2e-4, rtol=0
        )
    assert core.stats("v").preemptions > 0


def test_the_simulation_tells_levels_apart(checkpoint: Maker) -> None:
    """What the tolerance above would miss is far below what quantization does."""
    folder, tokens = checkpoint("llama"), prompts(1, seed=3)[0]
    four, eight = (naive_logprobs(folder, bits, tokens) for bits in (4, 8))
    assert float((four - eight).abs().max()) > 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_the_schedule(
    family: str, bits: int, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    folder, scheme = checkpoint(family), KVScheme(bits, GROUP)
    ragged = prompts(6)

    def jobs() -> list[Job]:
        return [Job("v", request(prompt, 12), bytes_tokenizer) for prompt in ragged]

    core = loaded(folder, bytes_tokenizer, scheme)
    expected = [tokens_of(events) for events in run(core, jobs())]
    assert [tokens_of(events) for events in run(core, jobs())] == expected
    assert core.stats("v").prefix_hit_tokens > 0
    alone = loaded(folder, bytes_tokenizer, scheme, prefix_cache=False, prefill_chunk=64)
    assert [tokens_of(run(alone, [job])[0]) for job in jobs()] == expected
    block = core._variants["v"].model.layout.block_bytes(GROUP)
    tiny = loaded(folder, bytes_tokenizer, scheme, kv_bytes=block * 16, prefill_chunk=5)
    assert [tokens_of(events) for events in run(tiny, jobs())] == expected
    assert tiny.stats("v").preemptions > 0
    assert tiny.stats("v").kv_used_blocks == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_windows_go_through_the_cache(bits: int, checkpoint: Maker) -> None:
    folder = checkpoint("llama")
    model = shallow_model(folder, KVScheme(bits, GROUP))
    windows = torch.randint(3, 300, (2, 37), generator=torch.Generator().manual_seed(4))
    for row, window in zip(forward_logits(model, windows), windows.tolist(), strict=True):
        expected = naive_logprobs(folder, bits, window)
        found = torch.log_softmax(row.double(), -1)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_measuring_does_not_disturb_serving(checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    core = loaded(checkpoint("qwen2"), bytes_tokenizer, KVScheme(4, GROUP))
    prompt = prompts(1, seed=3)[0]
    (expected,) = run(core, [Job("v", request(prompt, 12), bytes_tokenizer)])
    job = Job("v", request(prompt, 12), bytes_tokenizer)
    core.submit(job)
    tokens = []
    while core.busy:
        core.logits("v", torch.tensor([prompt]))
        tokens += [event.token for _, event in core.step() if hasattr(event, "token")]
        core.check_integrity()
    assert tokens == tokens_of(expected)


def admitted(layout: Layout, budget: int, length: int) -> int:
    """Tokens of equal sequences that run at the same time in pools of at most `budget` bytes."""
    size = layout.block_size(LocalOptions().block_size)
    pool = make_pool(layout, budget // layout.block_bytes(size), size, "cpu")
    assert pool.nbytes <= budget
    scheduler = Scheduler(
        BlockPool(pool.num_blocks, size, reuse=False),
        Limits(max_num_seqs=10_000, max_waiting=10_000),
        layout.tail_blocks,
    )
    scheduler.open("v", identity="v")
    for _ in range(budget // layout.block_bytes(size)):
        scheduler.add(Sequence("v", length - 1, 1, [5] * (length - 1)))
    scheduler.plan("v")
    scheduler.check_integrity()
    return scheduler.stats("v").running * length


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        pytest.param(LayerShape(6, 64, 64), 1024, id="bundled model, full context"),
        pytest.param(LayerShape(8, 128, 128), 4096, id="8B shape"),
    ],
)
def test_the_same_memory_holds_twice_and_three_and_a_half_times_the_tokens(
    shape: LayerShape, length: int
) -> None:
    layers, budget = (shape,) * 2, 192 << 20
    plain = admitted(Layout(layers, torch.bfloat16), budget, length)
    eight, four = (
        admitted(Layout(layers, torch.bfloat16, KVScheme(bits)), budget, length) for bits in (8, 4)
    )
    # Eight-bit codes alone would make it 2; scales take the rest.
    assert eight >= 1.9 * plain
    assert four >= 3.5 * plain


@pytest.mark.parametrize("bits", [8, 4])
def test_the_pool_is_as_large_as_it_says(bits: int) -> None:
    layout = Layout((LayerShape(2, 12, 20), LayerShape(1, 67, 67)), torch.float32, KVScheme(bits))
    pool = QuantPool(layout, KVScheme(bits), 7, "cpu")
    assert pool.nbytes == sum(layer._blocks.nbytes for layer in pool.layers)


def test_tokens_of_the_bundled_model_hardly_change(
    builtin_weights: VariantWeights, builtin_tokenizer: Tokenizer
) -> None:
    texts = ("The function returns a handle to the", "To open a file for reading,", "A list is")
    prompts = [builtin_tokenizer.encode(text) for text in texts]
    answers = {}
    for bits in (16, 8):
        scheme = None if bits == 16 else KVScheme(bits)
        core = Core(LocalOptions(prefill_chunk=16))
        core.attach("v", build_model(replace(builtin_weights, kv=scheme)), builtin_tokenizer)
        jobs = [Job("v", request(prompt, 48), builtin_tokenizer) for prompt in prompts]
        answers[bits] = [tokens_of(events) for events in run(core, jobs)]
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(answers[16], answers[8], strict=True)
    ]
    assert sum(same) > 0.75 * 3 * 48


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_cuda_computes_the_same(bits: int, checkpoint: Maker, bytes_tokenizer: Tokenizer) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = shallow(checkpoint("llama"), "eager")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    scheme = KVScheme(bits, GROUP)
    weights = VariantWeights(model.config.to_dict(), tensors, {}, torch.float32, scheme)
    found: dict[str, list[list[tuple[int | None, float]]]] = {}
    for device in ("cpu", "cuda"):
        core = Core(LocalOptions(device=device, prefill_chunk=16, kv_bytes=4 << 20))
        core.attach("v", build_model(weights, device=device), bytes_tokenizer)
        jobs = [Job("v", request(p, 30, logprobs=0), bytes_tokenizer) for p in prompts(4)]
        found[device] = [
            [
                (e.token, e.logprob.logprob)
                for e in events
                if e.logprob and e.logprob.logprob is not None
            ]
            for events in run(core, jobs)
        ]
    differences = []
    for left, right in zip(found["cpu"], found["cuda"], strict=True):
        # Rounding borders may fall differently, and a text go on otherwise from there; a wrong
        # byte or mask would be far off, and at once.
        pairs = list(zip(left, right, strict=True))
        same = next((i for i, (x, y) in enumerate(pairs) if x[0] != y[0]), len(pairs))
        differences += [abs(x[1] - y[1]) for x, y in pairs[:same]]
    assert len(differences) > 4 * 30 / 2
    assert max(differences) < 0.2
    assert sum(differences) < 0.01 * len(differences)
