"""lm-evaluation-harness through our own HTTP API, on tasks made here: nothing is downloaded.

Its `local-completions` sends token ids and wants them back with log-probabilities (`echo`), so
equal scores with its own transformers backend check the whole way from HTTP to logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import yaml

from gateway.config import BUILTIN
from tests.support.gateway_process import GatewayProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed"),
]
QUESTIONS = 12
WORDS = 24  # of context, and a third of that in each answer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of four passages of Python's help follows? And how likely are whole passages?"""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [text.split() for _, text in sorted(topics.items()) if len(text.split()) > 60]
    endings = [" " + " ".join(words[WORDS : WORDS + WORDS // 3]) for words in texts]
    rows = [
        {
            "context": " ".join(words[:WORDS]),
            "choices": [endings[(i + 7 * j) % len(endings)] for j in range(4)],
            "label": 0,
        }
        for i, words in enumerate(texts[:QUESTIONS])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    which = {
        "task": "which_follows",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    how = {
        "task": "how_likely",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (which, how):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    levels = ["fp32", "int4-rtn-g64"]
    config = {"levels": levels, "build": {"nice": 0}}
    with GatewayProcess(tmp_path_factory.mktemp("home"), config, ready_s=280) as process:
        for level in levels:
            process.post(f"/v1/levels/{level}:warm")
        yield process


def scores(
    model: str, arguments: dict[str, Any], tasks: Path
) -> tuple[dict[str, Any], list[float]]:
    """lm_eval's results, and the log-likelihood of every request, in order."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["which_follows", "how_likely"]
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    likelihoods = [
        float(value[0] if isinstance(value, list | tuple) else value)
        for name in names
        for sample in found["samples"][name]
        for value in sample["filtered_resps"]
    ]
    return {name: found["results"][name] for name in names}, likelihoods


def through_the_gateway(gateway: GatewayProcess, level: str) -> dict[str, Any]:
    return {
        "model": f"docs-17m@{level}",
        "base_url": f"{gateway.url}/v1/completions",
        "tokenizer": str(BUILTIN),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 1,
        "max_length": 512,
    }


def test_scores_equal_those_of_the_harness_own_backend(
    gateway: GatewayProcess, tasks: Path
) -> None:
    here = {"pretrained": str(BUILTIN), "dtype": "float32", "device": "cpu", "max_length": 512}
    expected, likelihoods = scores("hf", here, tasks)
    dense, ours = scores("local-completions", through_the_gateway(gateway, "fp32"), tasks)
    assert len(ours) == len(likelihoods) == 5 * QUESTIONS
    assert ours == pytest.approx(likelihoods, abs=2e-3)
    for metric in ("acc,none", "acc_norm,none"):
        assert dense["which_follows"][metric] == expected["which_follows"][metric]
    assert expected["which_follows"]["acc,none"] > 0.4  # four choices: better than guessing
    perplexity = "word_perplexity,none"
    assert dense["how_likely"][perplexity] == pytest.approx(
        expected["how_likely"][perplexity], 1e-4
    )
    _, other = scores("local-completions", through_the_gateway(gateway, "int4-rtn-g64"), tasks)
    apart = [abs(a - b) / abs(b) for a, b in zip(other, ours, strict=True)]
    assert 0.001 < sum(apart) / len(apart) < 0.1  # near dense, and not dense
