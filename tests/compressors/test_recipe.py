"""Level names: canonical, total, and refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressors.estimate import estimate
from compressors.recipe import Recipe, RecipeError, expand
from compressors.registry import METHODS, Kind, variants


def quantizers(*follows: Kind) -> st.SearchStrategy[str]:
    """Names of quantization steps that can work on what steps of those kinds leave."""
    methods = [
        m
        for m in METHODS.values()
        if (m.kind, m.spelled) == ("quantize", "settings")
        and not m.whole_model
        and m.follows.issuperset(follows)
    ]
    return st.builds(
        "int{}-g{}".format,
        st.sampled_from([f"{bits}-{m.variant}" for m in methods for bits in m.prior]),
        st.sampled_from(["32", "64", "128", "ch"]),
    )


middle = st.one_of(
    st.builds(
        "sparse{}-{}".format,
        st.sampled_from(["24", "48", "50"]),
        st.sampled_from(variants("sparse")),
    ),
    st.builds("lowrank-{}".format, st.integers(5, 99)),
)
depth = st.builds("depth-{}".format, st.integers(5, 99))
names = (
    st.one_of(
        st.tuples(st.none() | depth, st.none() | middle, quantizers("lowrank", "sparse")),
        st.tuples(st.none() | depth, st.none() | quantizers()),
        st.tuples(st.none() | depth, middle),
    )
    .map(lambda parts: "+".join(part for part in parts if part))
    .filter(bool)
)


@given(names)
def test_every_well_ordered_stack_parses_and_prints_canonically(name: str) -> None:
    recipe = Recipe.parse(name)
    assert Recipe.parse(recipe.name) == recipe
    assert hash(Recipe.parse(recipe.name)) == hash(recipe)
    assert len(recipe.steps) == name.count("+") + 1


@given(names)
def test_an_estimate_is_possible_for_every_recipe_and_stacking_never_improves(name: str) -> None:
    whole = estimate(Recipe.parse(name))
    assert whole.perplexity_ratio >= 1
    assert 0 <= whole.top1_agreement <= 1
    assert 0 < whole.size_ratio < 1
    for part in name.split("+"):
        single = estimate(Recipe.parse(part))
        assert whole.perplexity_ratio >= single.perplexity_ratio - 1e-9
        assert whole.kl_nats >= single.kl_nats - 1e-9


@pytest.mark.parametrize(
    ("name", "family", "calibrated"),
    [
        ("fp32", "dense", False),
        ("bf16", "dense", False),
        ("int8", "quantization", False),
        ("int4-hqq-g64", "quantization", False),
        ("int4-gptq-g128", "quantization", True),
        ("int4-gptq-g128-sym-act", "quantization", True),
        ("int4-hqq-g64-sym", "quantization", False),
        ("int4-awq-g128", "quantization", True),
        ("int2-rot-gch", "quantization", True),
        ("nested84-gptq-g128", "quantization", True),
        ("nested84-hqq-g64@int4", "quantization", False),
        ("w8a8", "quantization", False),
        ("w8a8-smoothquant", "quantization", True),
        ("lowrank-80+fp8", "lowrank", True),
        ("embed8", "quantization", False),
        ("int4-gptq-g128+embed4", "quantization", True),
        ("sparse24-magnitude", "pruning", False),
        ("sparse24-wanda", "pruning", True),
        ("sparse50-sparsegpt+int4-gptq-g64", "pruning", True),
        ("depth-75", "pruning", True),
        ("depth-75+width-75+int4-gptq-g64", "pruning", True),
        ("lowrank-80", "lowrank", True),
        ("lowrank-80+int8", "lowrank", True),
        ("depth-75+int4-rtn-g64", "pruning", True),
        ("depth-75+distill-kl+int4-gptq-g128", "distillation", True),
        ("int2-qat-g64", "quantization", True),
    ],
)
def test_family_and_need_of_calibration(name: str, family: str, calibrated: bool) -> None:
    recipe = Recipe.parse(name)
    assert (recipe.family, recipe.needs_calibration) == (family, calibrated)


def test_one_recipe_has_one_name() -> None:
    assert Recipe.parse("int8-rtn-gch").name == "int8"
    assert Recipe.parse(" INT4-RTN-G64 ").name == "int4-rtn-g64"


def test_a_nested_name_stands_for_two_levels_that_are_built_as_one() -> None:
    names = expand(["int8", "depth-75+nested84-gptq-g128", "int8"])
    assert names == (
        "int8",
        "depth-75+nested84-gptq-g128@int8",
        "depth-75+nested84-gptq-g128@int4",
    )
    levels = [Recipe.parse(name) for name in names]
    assert [level.child for level in levels] == [0, 0, 4]
    assert len({level.parent.name for level in levels[1:]}) == 1
    assert levels[1].parent == Recipe.parse("depth-75+nested84-gptq-g128")
    assert estimate(levels[2]).perplexity_ratio > estimate(levels[1]).perplexity_ratio
    assert estimate(levels[2]).size_ratio < estimate(levels[1]).size_ratio


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "known: fp32"),
        ("int5-rtn-g64", "2, 3, 4, 8"),
        ("int4-magic-g64", "rtn, hqq, gptq"),
        ("int4-hqq-g64-act", "no option 'act'"),
        ("int8-rot-g64", "rot does 2, 3, 4 bits"),
        ("sparse24-wanda+int4-awq-g128", "plain weights"),
        ("int4-rtn-g7", "multiple of 8"),
        ("int4-rtn-g0", "multiple of 8"),
        ("nested84-rtn-g64", "hqq, gptq can"),
        ("nested84-gptq-g64@int3", "known:"),
        ("int4-nested-g64", "rtn, hqq, gptq"),
        ("lowrank-80+nested84-gptq-g128", "plain weights"),
        ("sparse24-magic", "magnitude, wanda"),
        ("depth-0", "5 to 99"),
        ("depth-100", "5 to 99"),
        ("width-75+depth-75", "depth-75+width-75"),
        ("lowrank-999999999999", "5 to 99"),
        ("int8+depth-75", "depth-75+int8"),
        ("int8+int4-rtn-g64", "both quantization"),
        ("int8+w8a8", "both quantization"),
        ("w8a8-magic", "w8a8-smoothquant"),
        ("sparse24-wanda+w8a8", "plain weights"),
        ("embed8+int8", "int8+embed8"),
        ("lowrank-80+sparse24-wanda", "both low rank or sparsity"),
        ("bf16+int8", "dense level"),
        ("int8+", "known:"),
        ("a" * 1000, "longer than"),
        ("../../etc/passwd", "known:"),
    ],
)
def test_what_is_wrong_is_said(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("+", r"\+")):
        Recipe.parse(name)


def test_every_method_is_where_the_table_says() -> None:
    for method in METHODS.values():
        assert callable(method.load())
        alone = method.kind == "depth" or method.whole_model or method.trains
        if method.needs_calibration and not alone:
            assert callable(method.module().empty)
            assert callable(method.module().accumulate)


def test_names_cost_no_torch() -> None:
    code = (
        "import sys; from compressors.recipe import Recipe\n"
        "from compressors.estimate import estimate\n"
        "estimate(Recipe.parse('depth-75+int4-gptq-g128')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
