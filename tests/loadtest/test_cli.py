"""The command line as a user has it: a process, its exit status, what it says and writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtest.standin import Behaviour, serve


def loadtest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
    )


MIX = """\
classes:
  - {name: fast, weight: 1, sla: {ttft_ms: 60000}, max_tokens: 4}
  - {name: hopeless, weight: 1, sla: {ttft_ms: 0.001}, max_tokens: 4}
"""
SAYS = {"level": "int8", "predicted": {"ttft_ms": 20.0}, "slo_met": True}


def test_a_run_reports_what_the_server_did(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(MIX)
    out, records = tmp_path / "report.json", tmp_path / "records.jsonl"
    # The two calibration probes are answered; then every fourth request is refused.
    statuses = [200, 200, *[200, 200, 200, 429] * 10]
    with serve(Behaviour(ttft=0.02, compression=SAYS, statuses=statuses)) as server:
        done = loadtest(
            *("run", "--url", server.url, "--model", "m", "--users", "4", "--requests", "40"),
            *("--mix", str(tmp_path / "mix.yaml"), "--prompt-tokens", "30:50"),
            *("--json", str(out), "--records", str(records)),
            PRESSGATE_API_KEY="very-secret",
        )
    assert done.returncode == 0, done.stderr
    report, text = json.loads(out.read_text()), out.read_text() + done.stdout + done.stderr
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    total = report["total"]
    assert (total["requests"], total["ok"], total["refused"]) == (40, 30, 10)
    fast, hopeless = report["classes"]["fast"], report["classes"]["hopeless"]
    assert (fast["good"], hopeless["good"]) == (fast["ok"], 0)
    assert hopeless["missed"] == {"ttft_ms": hopeless["ok"]}
    assert total["good"] == sum(line["good"] for line in lines) == fast["ok"]
    assert report["levels"]["int8"]["requests"] == 30
    assert report["prediction_error"]["ttft_ms"]["count"] == 30
    assert report["workload"]["prompt_calibration"]["overhead_tokens"] == pytest.approx(7, abs=2)
    assert all(25 <= line["prompt_tokens"] <= 55 for line in lines if line["status"] == "ok")
    assert report["command"].startswith("python -m loadtest run")
    assert {"cpu", "cores"} <= report["host"].keys()
    assert "goodput" in done.stdout
    assert "hopeless" in done.stdout
    assert "very-secret" not in text
    assert server.headers[0]["authorization"] == "Bearer very-secret"


def test_json_can_go_to_stdout() -> None:
    with serve(Behaviour()) as server:
        done = loadtest(
            *("run", "--url", server.url, "--rate", "50", "--duration", "0.5", "--json", "-")
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"]["errors"] == 0
    assert "goodput" in done.stderr


def test_a_trace_is_played(tmp_path: Path) -> None:
    rows = "".join(
        f"2023-11-16 18:15:4{i}.6805900,{100 * (i + 1)},{10 * (i + 1)}\n" for i in range(5)
    )
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    with serve(Behaviour()) as server:
        done = loadtest(
            *("run", "--url", server.url, "--trace", str(tmp_path / "t.csv"), "--json", "-"),
            *("--time-scale", "10", "--length-scale", "0.5"),
        )
    assert done.returncode == 0, done.stderr
    assert [body["max_tokens"] for body in server.bodies[2:]] == [5, 10, 15, 20, 25]
    gaps = [b - a for a, b in zip(server.arrivals[2:], server.arrivals[3:], strict=False)]
    assert sum(gaps) == pytest.approx(0.4, abs=0.25)


def test_the_same_seed_sends_the_same_requests() -> None:
    seen = []
    for seed in ("5", "5", "6"):
        with serve(Behaviour()) as server:
            done = loadtest(
                *("run", "--url", server.url, "--users", "1", "--requests", "8", "--seed", seed),
                *("--prompt-tokens", "10:90", "--max-tokens", "1:50"),
            )
        assert done.returncode == 0, done.stderr
        seen.append(server.bodies)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param("run", "--rate, --users, --trace", id="no arrivals"),
        pytest.param("run --rate 1 --users 1", "--rate, --users, --trace", id="two arrivals"),
        pytest.param("run --rate 0", "--rate", id="no rate"),
        pytest.param("run --rate nan", "--rate", id="nan"),
        pytest.param("run --rate many", "--rate", id="words"),
        pytest.param("run --users 0", "--users", id="no users"),
        pytest.param("run --users 1 --duration inf", "--duration", id="endless"),
        pytest.param("run --users 1 --requests 1000000000", "--requests", id="too many"),
        pytest.param("run --users 1 --url http://example.com", "--allow-remote", id="remote"),
        pytest.param("run --users 1 --url ftp://127.0.0.1", "--url", id="scheme"),
        pytest.param("run --users 1 --url http://127.0.0.1:99999", "--url", id="port"),
        pytest.param("run --users 1 --url http://u:p@127.0.0.1", "--url", id="password"),
        pytest.param("run --users 1 --mix /none.yaml", "--mix", id="no mix"),
        pytest.param("run --users 1 --mix mixed-sla --ttft-ms 5", "--ttft-ms", id="goals twice"),
        pytest.param("run --users 1 --prompts /none.txt", "--prompts", id="no prompts"),
        pytest.param("run --trace /none.csv", "--trace", id="no trace"),
        pytest.param("run --users 1 --prompt-tokens 9:3", "--prompt-tokens", id="reversed"),
        pytest.param("run --users 1 --max-tokens x", "--max-tokens", id="no number"),
        pytest.param("run --users 1 --max-tokens 1:2:3", "--max-tokens", id="three numbers"),
        pytest.param("run --users 1 --body [1]", "--body", id="body list"),
        pytest.param('run --users 1 --body {"stream":false}', "--body", id="body stream"),
        pytest.param("run --users 1 --endpoint chats", "--endpoint", id="endpoint"),
        pytest.param("run --users 1 --json /none/x.json", "--json", id="no folder"),
        pytest.param("overhead", "--baseline-url", id="overhead alone"),
        pytest.param("overhead --nominal-ttft-ms 1", "--nominal-tpot-ms", id="half nominal"),
        pytest.param("overhead --baseline-url http://example.com", "--baseline-url", id="baseline"),
        pytest.param("stall", "--level", id="stall no level"),
        pytest.param("stall --level x --url nowhere", "--url", id="stall url"),
        pytest.param("fly", "fly", id="no such command"),
    ],
)
def test_bad_input_exits_with_2_and_names_the_flag(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from loadtest.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(arguments.split(" "))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["run --users 1", "stall --level int8"])
def test_a_server_that_is_not_there_exits_with_1(command: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        done = loadtest(*command.split(), "--url", url)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_needs_nothing_of_the_gateway() -> None:
    code = "import sys, loadtest.__main__; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"gateway", "compressors", "cache", "torch", "transformers"} & set(
        done.stdout.split()
    )
