"""Every command as users type it; one cache folder for the whole file, so that few builds run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.commands import complaint, facts, pressgate
from tests.support.gateway_process import GatewayProcess, write_texts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAKE = {"models": [{"id": "fake", "path": "fake"}], "device": "cpu"}
CONTRACT = {
    *("level", "family", "stored_bytes", "resident_bytes", "compression_ratio", "perplexity"),
    *("perplexity_ratio", "kl_nats", "top1_agreement", "flops_per_token", "prefill_tokens_per_s"),
    *("decode_tokens_per_s", "speedup", "build_seconds", "load_seconds", "prefill_speedup"),
    *("perplexity_ratio_low", "perplexity_ratio_high", "flips", "quality_windows"),
}


@dataclass(frozen=True)
class Desk:
    """Where the commands of this file work."""

    folder: Path
    cache: tuple[str, ...]
    texts: tuple[str, ...]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    files = write_texts(folder)
    return Desk(
        folder,
        ("--cache-dir", str(folder / "cache")),
        ("--eval-text", files["eval_text"], "--calibration", files["calibration"]),
    )


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path_factory.mktemp("fake"), FAKE) as process:
        yield process


# -- levels, compress, bench, search: in this order, on one cache --------------------------------


def test_levels_before_anything_is_built(desk: Desk) -> None:
    rows = {row["level"]: row for row in facts("levels", "--json", *desk.cache)["levels"]}
    assert CONTRACT | {"state"} <= rows["int8"].keys()
    assert rows["bf16"]["state"] == "stored"
    assert rows["int8"]["state"] == "absent"
    assert rows["int8"]["measured"] is False
    assert (
        rows["int8"]["stored_bytes"] < rows["bf16"]["stored_bytes"] < rows["fp32"]["stored_bytes"]
    )


def test_compress_builds_and_measures_one_level(desk: Desk) -> None:
    made = facts("compress", "--level", "int4-rtn-g64", "--json", *desk.cache, *desk.texts)
    assert made["level"] == "int4-rtn-g64"
    assert made["family"] == "quantization"
    assert made["measured"] is True
    assert made["compression_ratio"] > 2
    assert 1.0 < made["perplexity_ratio"] < 1.3
    assert made["decode_tokens_per_s"].keys() == {"1", "8"}
    assert all(rate > 0 for rate in made["decode_tokens_per_s"].values())
    rows = facts("levels", "--json", *desk.cache, *desk.texts)["levels"]
    (row,) = (row for row in rows if row["level"] == "int4-rtn-g64")
    assert row["state"] == "stored"
    assert row["measured"] is True
    assert row["stored_bytes"] == made["stored_bytes"]


def test_bench_measures_what_the_contract_says(desk: Desk) -> None:
    out, png = desk.folder / "bench.json", desk.folder / "bench.png"
    done = pressgate(
        *("bench", "--levels", "bf16,int8", "--no-speed", "--json", str(out), "--png", str(png)),
        *(*desk.cache, *desk.texts),
    )
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout  # the table
    result = json.loads(out.read_text())
    assert result.keys() >= {"host", "versions", "model", "levels"}
    assert result["model"] == "docs-17m"
    assert result["versions"]["torch"]
    assert result["host"]["cores"] >= 1
    rows = {row["level"]: row for row in result["levels"]}
    assert rows.keys() == {"bf16", "int8"}
    assert all(row.keys() >= CONTRACT for row in rows.values())
    dense, int8 = rows["bf16"], rows["int8"]
    assert dense["perplexity_ratio"] == 1.0
    assert dense["top1_agreement"] == 1.0
    assert int8["perplexity_ratio"] == pytest.approx(int8["perplexity"] / dense["perplexity"], 1e-3)
    assert 0 < int8["kl_nats"] < 0.01
    assert int8["top1_agreement"] > 0.95
    assert int8["stored_bytes"] < 0.7 * dense["stored_bytes"]
    assert int8["flops_per_token"] > 0
    assert int8["decode_tokens_per_s"] == {}  # --no-speed
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


def test_search_keeps_what_nothing_beats(desk: Desk) -> None:
    found = facts(
        *("search", "--candidates", "int8,int4-rtn-g64", "--json", *desk.cache, *desk.texts)
    )
    tried = {row["level"]: row for row in found["tried"]}
    assert {"bf16", "int8", "int4-rtn-g64"} == tried.keys()
    for name in found["ladder"]:
        row = tried[name]
        better = [
            other
            for other in tried.values()
            if other["stored_bytes"] < row["stored_bytes"]
            and other["perplexity_ratio"] < row["perplexity_ratio"]
        ]
        assert not better
    smallest = min(tried, key=lambda name: tried[name]["stored_bytes"])
    assert smallest in found["ladder"]
    config = desk.folder / "auto.yaml"
    config.write_text("levels: auto\n")
    rows = facts("levels", "--json", "--config", str(config), *desk.cache)["levels"]
    assert {row["level"] for row in rows} == {"bf16", *found["ladder"]}  # what `auto` serves


def test_the_cache_can_be_listed_checked_and_swept(desk: Desk) -> None:
    listed = facts("cache", "ls", "--json", *desk.cache)
    assert {row["level"] for row in listed["artifacts"]} == {"int8", "int4-rtn-g64"}
    assert listed["usage"]["artifacts"] == 2
    # Embeddings and norms are the same blobs in both.
    assert listed["usage"]["blob_bytes"] < sum(row["bytes"] for row in listed["artifacts"])
    assert facts("cache", "verify", "--json", *desk.cache)["corrupt"] == []
    assert facts("cache", "gc", "--json", *desk.cache)["blobs"] == 0
    blob = max((desk.folder / "cache" / "blobs").rglob("*"), key=lambda file: file.stat().st_size)
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.write(b"damage")
    done = pressgate("cache", "verify", "--json", *desk.cache)
    assert done.returncode == 1
    assert json.loads(done.stdout)["corrupt"]
    assert facts("cache", "verify", "--json", *desk.cache)["corrupt"] == []
    facts("cache", "gc", "--json", "--quarantine-seconds", "0", *desk.cache)
    assert not list((desk.folder / "cache" / "quarantine").iterdir())


# -- explain, replay, policy ----------------------------------------------------------------------


def test_explain_tells_of_every_level(fake: GatewayProcess) -> None:
    answer = facts(
        *("explain", "hello", "--url", fake.url, "--memory-mb", "20", "--on-miss", "nearest"),
        *("--max-tokens", "16", "--json"),
    )
    verdicts = {row["level"]: row["ok"] for row in answer["levels"]}
    assert verdicts["bf16"] is False
    assert any(verdicts.values())
    assert answer["decision"]["reason"]
    table = pressgate("explain", "hello", "--url", fake.url, "--memory-mb", "20")
    assert table.returncode == 0
    assert all(level in table.stdout for level in verdicts)


def test_replay_compares_policies(desk: Desk) -> None:
    trace = desk.folder / "trace.csv"
    rows = [f"2026-01-01 00:00:{second:02d}.5,100,20" for second in range(20)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    file = desk.folder / "two.yaml"
    file.write_text("- {name: default}\n- {name: none, memory_mb: 0.001, on_miss: reject}\n")
    result = facts("replay", str(trace), "--policy", str(file), "--json", *desk.cache)
    by_name = {row["tried"]: row["total"]["new"] for row in result["comparisons"]}
    assert by_name["default"]["requests"] == by_name["none"]["requests"] == 20
    assert sum(by_name["none"]["refusals"].values()) == 20
    assert by_name["none"]["attainment"] == 0
    assert not by_name["default"]["refusals"]
    moved = {row["tried"]: row["moves"] for row in result["comparisons"]}
    assert [(move["to"], move["requests"]) for move in moved["none"]] == [(None, 20)]
    alone = facts("replay", str(trace), "--against", str(file), "--json", *desk.cache)
    assert [row["requests"] for row in alone["policies"]] == [20, 20]


def test_policies_are_checked_sent_and_shown(desk: Desk, fake: GatewayProcess) -> None:
    file = desk.folder / "policies.yaml"
    file.write_text("- name: gold\n  match: {header: {x-tier: gold}}\n  max_ppl_ratio: 1.01\n")
    checked = pressgate("policy", "validate", str(file))
    assert (checked.returncode, checked.stdout) == (0, "gold: ok\n")
    sent = pressgate("policy", "apply", str(file), "--url", fake.url)
    assert (sent.returncode, sent.stdout) == (0, "gold: applied\n")
    shown = facts("policy", "show", "gold", "--url", fake.url, "--json")
    assert shown["max_ppl_ratio"] == 1.01
    assert shown["match"]["header"] == {"x-tier": "gold"}
    everything = pressgate("policy", "show", "--url", fake.url)
    assert everything.returncode == 0
    assert "gold" in everything.stdout


# -- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown level": ("compress --level int9", ("int9",)),
    "unknown levels": ("bench --levels int8,nonsense", ("levels", "nonsense")),
    "no folder for json": ("bench --json /nowhere/out.json", ("--json", "/nowhere")),
    "no folder for png": ("bench --png /nowhere/out.png", ("--png", "/nowhere")),
    "no eval text": ("bench --eval-text /nowhere.txt", ("--eval-text", "/nowhere.txt")),
    "no calibration": ("search --calibration /nowhere.txt", ("--calibration", "/nowhere.txt")),
    "bad candidate": ("search --candidates int8,magic", ("magic",)),
    "no model": ("levels --model /nowhere/model", ("--model", "/nowhere/model")),
    "no config": ("levels --config /nowhere.yaml", ("/nowhere.yaml",)),
    "cache is a file": ("cache ls --cache-dir {file}", ("--cache-dir", "{file}")),
    "no trace": ("replay /nowhere.csv", ("/nowhere.csv",)),
    "trace without columns": ("replay {file}", ("{file}", "TIMESTAMP")),
    "bad policies": ("policy validate {file}", ("{file}:1", "expected a policy")),
    "bad policies in replay": ("replay {trace} --policy {file}", ("{file}",)),
    "nobody listens": ("explain hello --url http://127.0.0.1:1", ("--url", "127.0.0.1:1")),
    "not an address": ("policy show --url nonsense", ("--url", "nonsense")),
    "no such policy": ("policy show nosuch --url {url}", ("nosuch",)),
    "absurd budget": ("explain hello --memory-mb -3 --url {url}", ("memory_mb",)),
    "no such model": ("explain hello --model other --url {url}", ("other",)),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_is_one_line_that_names_it(
    tmp_path: Path, fake: GatewayProcess, case: str
) -> None:
    command, words = BAD[case]
    (tmp_path / "file").write_text("a,b\n1,2\n")
    (tmp_path / "trace").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n")
    names = {"file": tmp_path / "file", "trace": tmp_path / "trace", "url": fake.url}
    line = complaint(*command.format(**names).split())
    assert all(word.format(**names) in line for word in words), line


@pytest.mark.parametrize(
    "command",
    [
        "serve --port many",
        "replay x.csv --limit 0",
        "search --max-ppl-ratio 0.5",
        "compress",
        "serve --nonsense 3",
    ],
)
def test_a_wrong_flag_is_named(command: str) -> None:
    done = pressgate(*command.split(), env={"NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    flag = next((part for part in command.split() if part.startswith("--")), "--level")
    assert flag in done.stderr


def test_a_level_that_no_format_holds_is_not_exported(desk: Desk) -> None:
    target = desk.folder / "exported"
    line = complaint(
        *("compress", "--level", "fp32", "--export", str(target), *desk.cache, *desk.texts)
    )
    assert "--export" in line
    assert not target.exists()
