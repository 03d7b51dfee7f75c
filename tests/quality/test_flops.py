"""Operations per token against torch's own counter, and how compression changes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from compressors.model import linears, weight_of
from compressors.tensor import Dense, Grouped, LowRank, Sparse24
from gateway.quality.flops import attention_flops, flops_per_token, linear_flops, utilisation

CONFIGS = [
    pytest.param(
        LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        ),
        id="llama-gqa",
    ),
    pytest.param(
        Qwen3Config(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        ),
        id="qwen3-wide-heads",
    ),
    pytest.param(
        GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64), id="gpt2"
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_what_torch_counts(config: Any) -> None:
    length = 16
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    shapes = {
        name: (weight_of(module).shape[0], weight_of(module).shape[1])
        for name, module in linears(model)
        if "lm_head" not in name
    }
    ours = flops_per_token(config.to_dict(), shapes, context=length)
    counted = counter.get_flop_counts()["Global"]
    # Eager attention multiplies the whole square, so every one of the tokens sees all of them. The
    # rotary angles are a matmul of head_dim/2 x 1 x length, and no part of ours.
    rotary = length * getattr(config, "head_dim", 0) if hasattr(config, "rope_parameters") else 0
    assert sum(counted.values()) == pytest.approx(ours.total * length, abs=rotary)


def grouped(n: int, k: int) -> Grouped:
    return Grouped(torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, 1), torch.zeros(n, 1), 4, k)


def test_forms_count_what_they_multiply() -> None:
    n, k, rank = 48, 64, 10
    assert linear_flops((n, k)) == 2 * n * k
    assert linear_flops(Dense(torch.zeros(n, k))) == 2 * n * k
    assert linear_flops(grouped(n, k)) == 2 * n * k
    index = torch.tensor([0, 1], dtype=torch.uint8).repeat(n, k // 4)
    assert linear_flops(Sparse24(Dense(torch.zeros(n, k // 2)), index)) == n * k
    low = LowRank(Dense(torch.zeros(n, rank)), grouped(rank, k))
    assert linear_flops(low) == 2 * rank * (n + k)


def test_dropped_layers_drop_their_share() -> None:
    full = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=4).to_dict()
    half = full | {"num_hidden_layers": 2}
    assert attention_flops(half, 100) * 2 == attention_flops(full, 100)


def test_a_sliding_window_bounds_attention() -> None:
    config = Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=4, head_dim=16,
        use_sliding_window=True, sliding_window=32, max_window_layers=2,
    ).to_dict()  # fmt: skip
    per_token = 4 * 4 * 16
    assert attention_flops(config, 20) == 4 * per_token * 20
    assert attention_flops(config, 100) == 2 * per_token * 100 + 2 * per_token * 32


def test_utilisation_is_a_share_of_the_peak() -> None:
    flops = flops_per_token(
        LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict(), {"a": (50, 10)}, context=1
    )
    assert utilisation(flops, 10.0, flops.total * 100.0) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="peak"):
        utilisation(flops, 10.0, 0.0)
