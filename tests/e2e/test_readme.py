"""The README's requests, sent to a real gateway: the levels it shows are the levels one gets."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.gateway_process import GatewayProcess
from tests.test_docs import README

pytestmark = pytest.mark.slow

CURLS = re.findall(r"^curl .*?'\s*$", README, re.M | re.S)
TABLE = README.partition("<!-- budgets -->")[2].partition("<!-- /budgets -->")[0]
BUDGETS = re.findall(r"^\| `(\{.*?\})` \| `([^`]+)` \|", TABLE, re.M)
FASTEST = re.findall(r"^\| `(\{.*?\})` \| the fastest here \|", TABLE, re.M)
LEVELS = ["int8", "int4-gptq-g128", "int4-rtn-g64", "depth-75", "depth-75+int8"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Judged on the default text, as the README's reader would."""
    folder = tmp_path_factory.mktemp("readme")
    with GatewayProcess(folder, {"levels": LEVELS}, short_texts=False) as process:
        yield process


def test_the_first_request_answers_as_shown(gateway: GatewayProcess) -> None:
    (command,) = CURLS
    words = shlex.split(command.replace("http://127.0.0.1:8000", gateway.url))
    done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    shown = json.loads(re.findall(r"```json\n(.*?)```", README, re.S)[0])
    assert answer["compression"]["level"] == shown["compression"]["level"]
    assert set(shown["compression"]) <= set(answer["compression"])
    assert set(shown["choices"][0]) <= set(answer["choices"][0])


def test_budgets_get_the_levels_shown(gateway: GatewayProcess) -> None:
    for level in LEVELS:
        gateway.post(f"/v1/levels/{level}:warm")
    assert len(BUDGETS) == 4
    for sla, level in BUDGETS:
        answer = gateway.complete(max_tokens=16, sla=json.loads(sla))
        assert answer["compression"]["level"] == level, f"{sla}: {answer['compression']}"


def test_a_latency_objective_gets_the_fastest_level(gateway: GatewayProcess) -> None:
    (sla,) = FASTEST
    body = {"model": "docs-17m", "prompt": "The function returns", "max_tokens": 16}
    answer = gateway.post("/v1/explain", body | {"sla": json.loads(sla)})
    fitting = [row for row in answer["levels"] if row["ok"]]
    best = min(fitting, key=lambda row: row["predicted"]["latency_ms"])
    assert answer["decision"]["level"] == best["level"]
    assert len(fitting) >= 4
