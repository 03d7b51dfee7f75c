"""What levels that were not measured are expected to be: memory, speed, and what is believed."""

from __future__ import annotations

import json

import pytest

from compressors.checkpoint import Checkpoint
from compressors.model import build_skeleton, parse_config
from compressors.plan import shapes_of
from compressors.recipe import Recipe
from gateway.config import BUILTIN
from gateway.variants.card import Card
from gateway.variants.expected import Anatomy, Expectations

CONFIG = parse_config(json.loads((BUILTIN / "config.json").read_text()))


@pytest.mark.parametrize(
    ("level", "share"),
    [("bf16", 1.0), ("depth-75", 0.75), ("depth-50+int8", 0.5), ("int8", 1.0)],
)
def test_dropped_blocks_keep_no_keys(level: str, share: float) -> None:
    heads, dim = CONFIG.num_key_value_heads, CONFIG.hidden_size // CONFIG.num_attention_heads
    whole = 2 * CONFIG.num_hidden_layers * heads * dim * 2
    given = Anatomy.of(CONFIG).kv_bytes_per_token(Recipe.parse(level), "bf16")
    assert given == whole * share


def test_quantized_keys_take_less_and_stack_with_dropped_blocks() -> None:
    anatomy = Anatomy.of(CONFIG)

    def taken(level: str) -> int:
        return anatomy.kv_bytes_per_token(Recipe.parse(level), "bf16")

    assert 1.9 < taken("int8") / taken("int8+kv8") < 2
    assert 3.5 < taken("int8") / taken("int8+kv4") < 4
    assert taken("depth-50+int8+kv8") == pytest.approx(taken("int8+kv8") / 2, rel=0.01)


def test_an_expected_card_is_never_called_measured_nor_faster_for_its_sparsity() -> None:
    recipes = {name: Recipe.parse(name) for name in ("bf16", "sparse24-wanda", "depth-50")}
    dense = Card(measured=True, decode_tokens_per_s={"1": 100.0}, prefill_tokens_per_s=1000.0)
    cards = {"bf16": dense}
    expected = Expectations(None, "bf16", 10**6, 0.8, recipes, cards.get, 1, "cpu")
    sparse = expected.card("sparse24-wanda", None, dense)
    assert not sparse.measured
    assert sparse.decode_tokens_per_s == dense.decode_tokens_per_s
    assert expected.card("depth-50", None, dense).decode_tokens_per_s["1"] == 200.0


def test_what_another_host_measured_is_believed_but_for_its_speed() -> None:
    recipes = {"int8": Recipe.parse("int8")}
    elsewhere = Card(measured=True, perplexity_ratio=1.001, stored_bytes=1234)
    card = Expectations(None, "bf16", 10**6, 0.8, recipes, lambda _: None, 1, "cpu").card(
        "int8", elsewhere, None
    )
    assert (card.perplexity_ratio, card.stored_bytes, card.measured) == (1.001, 1234, False)


def test_a_build_of_moments_does_not_slow_what_is_expected_of_others() -> None:
    checkpoint = Checkpoint(BUILTIN)
    shapes = shapes_of(build_skeleton(checkpoint.config), 2)
    recipes = {name: Recipe.parse(name) for name in ("int8", "int4-gptq-g128", "sparse24-wanda")}
    cards: dict[str, Card] = {}
    expected = Expectations(shapes, "bf16", 10**6, 0.8, recipes, cards.get, 1, "cpu")
    before = expected.card("int4-gptq-g128", None, None).build_seconds
    cards["int8"] = Card(measured=True, build_seconds=20.0)  # starting took long
    assert expected.card("int4-gptq-g128", None, None).build_seconds == before
    cards["sparse24-wanda"] = Card(measured=True, build_seconds=100.0)
    assert expected.card("int4-gptq-g128", None, None).build_seconds > before
