"""Comparisons: what goes in, how runs become ratios and tables, and peers that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest.client import Target
from loadtest.compare import decode, load, streams, switch
from loadtest.compare.rounds import in_turn, versus
from loadtest.peers.child import Child, EngineError, Skipped
from loadtest.peers.engines import Case
from loadtest.peers.place import Place
from loadtest.peers.servers import Server, Spec
from tests.loadtest.standin import Behaviour, serve


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param("compare decode --shape 7b", "--shape", id="shape"),
        pytest.param("compare decode --bits 5", "--bits", id="bits"),
        pytest.param("compare decode --bits eight", "--bits", id="bits no number"),
        pytest.param("compare decode --batch 0", "--batch", id="batch"),
        pytest.param("compare decode --batch - --prefill -", "nothing", id="nothing to do"),
        pytest.param("compare decode --prefill 100000", "--prefill", id="prefill"),
        pytest.param("compare decode --runs 0", "--runs", id="runs"),
        pytest.param("compare decode --threads 0", "--threads", id="threads"),
        pytest.param("compare decode --peers vllm", "--peers", id="peer"),
        pytest.param("compare decode --level int8", "--level", id="level without bits"),
        pytest.param("compare decode --level 5=int8", "--level", id="level of odd bits"),
        pytest.param("compare decode --json /none/x.json", "--json", id="json"),
        pytest.param("compare decode --markdown /none/x.md", "--markdown", id="markdown"),
        pytest.param("compare streams --streams 1,99", "--streams", id="too many streams"),
        pytest.param("compare streams --peers openvino", "--peers", id="no server of that name"),
        pytest.param("compare switch --levels bf16", "--levels", id="one level"),
        pytest.param("compare load --levels int8,,bf16", "--levels", id="empty level"),
        pytest.param("compare fly", "fly", id="no such table"),
        pytest.param("peers --only vllm", "--only", id="no such part"),
        pytest.param("peers --dir /proc/none", "--dir", id="no folder to fill"),
        pytest.param("shapes /tmp --shapes 7b", "--shapes", id="no such shape"),
        pytest.param("shapes /proc/none", "OUT", id="no folder to write"),
        pytest.param("shapes /tmp --seed -1", "--seed", id="seed"),
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


def test_runs_alternate_and_the_first_of_each_is_thrown_away() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = in_turn({name: lambda name=name: measure(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert found == {"a": [4.0, 9.0, 10.0], "b": [5.0, 8.0, 11.0], "c": [6.0, 7.0, 12.0]}


def test_a_ratio_is_the_median_of_ratios_within_rounds() -> None:
    # The machine halves its speed in the last round: medians of rates mislead, ratios do not.
    runs = {"ours": [100.0, 110.0, 45.0], "one": [50.0, 55.0, 25.0], "other": [200.0, 100.0, 50.0]}
    found = versus(runs, "ours")
    assert found["median"] == {"ours": 100.0, "one": 50.0, "other": 100.0}
    assert found["ratios"] == {"one": 2.0, "other": 0.9}
    assert (found["best"], found["ratio"]) == ("other", 0.9)
    assert versus(runs, "ours", more_is_better=False)["ratios"]["one"] == 0.5
    alone = versus({"ours": [1.0]}, "ours")
    assert (alone["best"], alone["ratio"]) == (None, None)


def test_tables_say_what_was_recorded() -> None:
    row = {
        "shape": "110m",
        "bits": 8,
        "ask": "decode, batch 1",
        "forms": {"pressgate": "int8", "llama.cpp": "Q8_0"},
        **versus({"pressgate": [300.0, 330.0], "llama.cpp": [200.0, 220.0]}, "pressgate"),
    }
    alone = row | {"bits": 4, "forms": {"pressgate": "int4"}}
    alone |= versus({"pressgate": [1200.0]}, "pressgate")
    rates, forms = map(cells, decode.show({"rows": [row, alone]}))
    assert rates[2] == ["110m", "8", "decode, batch 1", "315", "210", "llama.cpp", "**1.50**"]
    assert rates[3] == ["110m", "4", "decode, batch 1", "1,200", "–", "–", "–"]
    assert forms[2:] == [["8", "int8", "Q8_0"], ["4", "int4", "–"]]


def test_the_streams_table_has_a_ratio_for_every_peer() -> None:
    row = {
        "shape": "110m",
        "bits": 8,
        "streams": 4,
        "ttft_ms": {"pressgate": 20.4, "llama-server": 41.0},
        **versus({"pressgate": [600.0], "llama-server": [400.0]}, "pressgate"),
    }
    table = cells(streams.show({"rows": [row]})[0])
    assert table[2] == ["110m", "8", "4", "600 (20)", "400 (41)", "**1.50**"]


def test_switching_is_judged_against_the_same_answers_one_after_the_other() -> None:
    found = {"a": [1.0, 2.0, 1.0], "b": [3.0, 6.0, 3.0], "mixed": [4.2, 8.0, 4.4]}
    case = Case("110m", 16, "a", 2)
    row = switch.summarize(case, found, ["a", "b"], tokens=12)[0]
    assert row["slower"] == pytest.approx(0.05)
    assert row["tokens_per_s"] == {"a": 12.0, "b": 4.0}
    assert row["alone"] == pytest.approx(24 / 4.0)
    table = cells(switch.show({"rows": [row]})[0])
    assert table[2] == ["110m", "12.0", "4.0", "6.0", "5.5", "**5.0 %**"]


def test_the_load_table_shows_times_and_bytes() -> None:
    row = {
        "shape": "110m",
        "level": "int8",
        "stored_bytes": 100e6,
        "resident_bytes": 100e6,
        "kv_bytes": 20e6,
        "process_bytes": 400e6,
        "allowed_bytes": 430e6,
        "read_s": 0.1,
        "load_s": 0.11,
        "first_s": 0.02,
        "again_s": 0.01,
        "share": 0.9,
        "share_to_token": 0.83,
    }
    times, sizes = map(cells, load.show({"rows": [row]}))
    assert times[2] == ["110m", "int8", "100", "100", "110", "20", "10", "90 %", "**83 %**"]
    assert sizes[2] == ["110m", "int8", "100", "100", "20", "400", "430"]


def test_peers_that_are_not_there_are_skipped_with_what_installs_them(tmp_path: Path) -> None:
    """The whole command on a tiny shape: our engine and transformers really run."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "compare", "decode", "--dir", str(tmp_path)),
            *("--shape", "tiny", "--bits", "16", "--batch", "2", "--prefill", "20"),
            *("--tokens", "3", "--runs", "2", "--threads", "1", "--json", str(tmp_path / "x.json")),
            *("--markdown", str(tmp_path / "x.md")),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert [row["ask"] for row in report["rows"]] == ["decode, batch 2", "prefill 20"]
    for row in report["rows"]:
        assert {name: len(runs) for name, runs in row["runs"].items()} == {
            "pressgate": 2,
            "transformers": 2,
        }
        assert all(rate > 0 for runs in row["runs"].values() for rate in runs)
    assert len(report["skipped"]) == 2
    assert all("`python -m loadtest peers`" in reason for reason in report["skipped"])
    assert {"torch", "transformers", "pressgate"} <= report["versions"].keys()
    text = (tmp_path / "x.md").read_text()
    assert "llama.cpp: not in" in text
    assert "| tiny | 16 | prefill 20 |" in text
    assert text.strip() in done.stdout


def test_our_own_failure_exits_with_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "compare", "decode", "--dir", str(tmp_path)),
            *("--shape", "tiny", "--peers", "-", "--bits", "8", "--level", "8=int9-huh"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "int9-huh" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_without_peers_says_so(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for part in (lambda: place.llama, lambda: place.python("openvino_genai")):
        with pytest.raises(Skipped, match="loadtest peers"):
            part()


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    with Child("engine", [sys.executable, "-c", request.param]) as one:
        yield one


@pytest.mark.parametrize(
    ("child", "says"),
    [
        pytest.param('input(); print(\'{"error": "no such level"}\')', "no such level", id="says"),
        pytest.param("input(); raise SystemExit('out of memory')", "out of memory", id="ends"),
        pytest.param("input(); import time; time.sleep(60)", "within 0.5 s", id="hangs"),
    ],
    indirect=["child"],
)
def test_a_child_that_gives_no_number_is_an_error(child: Child, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        child.ask({"kind": "decode"}, timeout=0.5 if "within" in says else 30)


def test_a_server_that_does_not_start_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit('port {port} is no good')"]
    with pytest.raises(EngineError, match=r"port \d+ is no good"):
        Server(Spec("s", command, "/health", "m", "bf16", {}, {}))


def test_an_answer_that_is_cut_short_is_no_measurement() -> None:
    with serve(Behaviour()) as standin:
        target = Target(standin.url, "m", endpoint="completions", keep_alive=False)
        server = SimpleNamespace(name="standin", target=target)
        run = streams.play(server, callers=2, requests=4, tokens=5)  # type: ignore[arg-type]
        assert sum(outcome.tokens for outcome in run.outcomes) == 20
    with serve(Behaviour(statuses=[500])) as standin:
        target = Target(standin.url, "m", endpoint="completions")
        server = SimpleNamespace(name="standin", target=target)
        with pytest.raises(EngineError, match="standin: error"):
            streams.play(server, callers=1, requests=1, tokens=5)  # type: ignore[arg-type]
