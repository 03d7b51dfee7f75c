"""Building models: compressed linears in place, plain tensors of the file itself, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from compressors.checkpoint import Checkpoint
from compressors.model import linears, weight_of
from compressors.tensor import Dense, Grouped, LinearForm
from gateway.config import BUILTIN
from gateway.engine.core import Core, Job, LocalOptions
from gateway.engine.kernels.store import pack
from gateway.engine.kv_quant import make_pool
from gateway.engine.runner import Runner, VariantWeights, build_model, forward_logits
from gateway.engine.runners import make_runner
from gateway.engine.scheduler import Chunk
from gateway.engine.scheduler import Sequence as Tokens
from gateway.engine.tokenizer import Tokenizer
from gateway.errors import ModelError

from .conftest import VOCAB, reference_model, reference_tokens, request, run, tokens_of, weights_of

Maker = Callable[[str], Path]


def int8(weight: torch.Tensor) -> Grouped:
    """Round to nearest, symmetric, per channel."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = ((weight / scales).round() + 128).to(torch.uint8)
    return Grouped(codes, scales, torch.full_like(scales, 128.0), bits=8, group=weight.shape[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # read as parts, and not
@pytest.mark.parametrize("thin", [True, False])
def test_blocks_reserved_ahead_change_nothing(family: str, thin: bool, checkpoint: Maker) -> None:
    """A sequence may hold blocks for drafts beyond those that its tokens need, on any runner."""
    model = build_model(weights_of(checkpoint(family)))
    found = []
    for count in (1, 9, 16):
        pool = make_pool(model.layout, 17, 16, "cpu")
        runner = make_runner(model, pool, max_batch=2) if thin else Runner(model, pool, max_batch=2)
        seq = Tokens("", 12, 0, list(range(3, 15)), blocks=list(range(1, 1 + count)))
        runner.prefill([Chunk(seq, 0, 12)], [False])
        seq.tokens.append(15)
        found.append(runner.decode([seq]).clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("compress", [Dense, int8])
def test_compressed_linears_compute_their_form(
    family: str, compress: Callable[[torch.Tensor], LinearForm], checkpoint: Maker
) -> None:
    plain = weights_of(checkpoint(family))
    reference = reference_model(checkpoint(family))
    forms, tensors = {}, dict(plain.tensors)
    for name, module in list(linears(reference)):
        if name.endswith("lm_head"):
            continue
        form = compress(weight_of(module).detach().clone())
        weight_of(module).data.copy_(form.dense())
        forms[name] = pack(form)
        del tensors[f"{name}.weight"]
    assert len(forms) >= 12
    model = build_model(VariantWeights(plain.config, tensors, forms, torch.float32))
    windows = torch.randint(3, VOCAB, (2, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(windows).logits
    ours = forward_logits(model, windows)
    if compress is Dense:
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    else:
        # The kernels may round activations to 8 bits: the same model, not the same bits.
        cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=-1)
        assert float(cosine.mean()) > 0.99


def test_plain_tensors_are_the_mapped_file_and_tied_ones_one(builtin_tokenizer: Tokenizer) -> None:
    source = Checkpoint(BUILTIN)
    tensors = {name: source.tensor(name) for name in source.names}
    model = build_model(VariantWeights(source.config, tensors, {}, torch.bfloat16))
    where = {t.data_ptr() for t in tensors.values()}
    used = [*model.module.parameters(), *model.module.buffers()]
    stored = [t for t in used if t.dtype is torch.bfloat16]
    assert {t.data_ptr() for t in stored} == where
    assert model.resident_bytes == pytest.approx(source.total_bytes, rel=0.01)
    assert model.context_length == 1024


def test_builtin_model_generates_what_transformers_does(builtin_tokenizer: Tokenizer) -> None:
    prompt = builtin_tokenizer.encode("The function returns a handle to the")
    core = Core(LocalOptions(prefill_chunk=16))
    core.attach("v", build_model(weights_of(BUILTIN)), builtin_tokenizer)
    (events,) = run(core, [Job("v", request(prompt, 24), builtin_tokenizer)])
    assert tokens_of(events) == reference_tokens(reference_model(BUILTIN), prompt, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"model_type": "nonsense"}, "nonsense", id="unknown"),
        pytest.param({"layer_types": ["linear_attention"] * 3}, "linear_attention", id="layers"),
        pytest.param({"model_type": "bloom"}, "bloom|Bloom|tensor", id="alibi"),
        pytest.param({"model_type": "t5"}, "t5", id="encoder-decoder"),
    ],
)
def test_what_is_not_supported_is_refused(
    change: dict[str, object], message: str, checkpoint: Maker
) -> None:
    good = weights_of(checkpoint("qwen2"))
    with pytest.raises(ModelError, match=message):
        build_model(VariantWeights({**good.config, **change}, good.tensors, {}, good.dtype))


def test_compressed_weights_for_no_linear_are_refused(checkpoint: Maker) -> None:
    good = weights_of(checkpoint("llama"))
    extra = {"model.layers.9.mlp.up_proj": pack(int8(torch.ones(96, 48)))}
    with pytest.raises(ModelError, match=r"layers\.9"):
        build_model(VariantWeights(good.config, good.tensors, extra, good.dtype))


def test_kv_memory_stays_inside_its_budget(builtin_tokenizer: Tokenizer) -> None:
    budget = 24 << 20
    core = Core(LocalOptions(kv_bytes=budget, max_num_seqs=8, prefill_chunk=256))
    core.attach("v", build_model(weights_of(BUILTIN, torch.bfloat16)), builtin_tokenizer)

    def jobs() -> list[Job]:
        prompts = torch.randint(5, 8000, (12, 300)).tolist()
        return [Job("v", request(prompt, 4), builtin_tokenizer) for prompt in prompts]

    run(core, jobs())
    before = psutil.Process().memory_info().rss
    run(core, jobs())
    assert core.stats("v").kv_used_blocks == 0
    assert core.kv_bytes <= budget
    assert psutil.Process().memory_info().rss - before < budget


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_cuda_gives_the_same_tokens(
    family: str, checkpoint: Maker, bytes_tokenizer: Tokenizer
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = [[5, 6, 7], list(range(20, 70)), [9]]
    reference = reference_model(checkpoint(family))
    core = Core(LocalOptions(device="cuda", prefill_chunk=16, block_size=4, kv_bytes=4 << 20))
    core.attach("v", build_model(weights_of(checkpoint(family)), device="cuda"), bytes_tokenizer)
    got = run(core, [Job("v", request(p, 12, logprobs=1), bytes_tokenizer) for p in prompts])
    assert [tokens_of(e) for e in got] == [reference_tokens(reference, p, 12) for p in prompts]
