"""Bad input to the command line: one line that names the flag or variable, before any work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.commands.serve import example
from gateway.config import BUILTIN, Model, load_settings
from gateway.errors import ConfigError, PressgateError
from gateway.variants.card import Card


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PRESSGATE_"):
            monkeypatch.delenv(name)


def complaint(*arguments: str) -> str:
    """What `pressgate` would print as its one error line; nothing went to stdout before."""
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, PressgateError), repr(done.exception)
    assert done.stdout == ""
    return done.exception.message


# -- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["all", "int8,int4-rtn-g64", "int9", ""])
def test_compress_takes_one_level_that_exists(level: str, tmp_path: Path) -> None:
    said = complaint("compress", "--level", level, "--cache-dir", str(tmp_path))
    assert said.startswith("--level")
    assert repr(level) in said


def test_compress_refuses_a_level_of_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.variants.local_backend.LocalBackend.ladder", _foreign_ladder)
    said = complaint("compress", "--level", "int8", "--cache-dir", str(tmp_path))
    assert said.startswith("--level")
    assert "int8" in said


def _foreign_ladder(_backend: object) -> tuple[Any, ...]:
    from gateway.variants.backend import LevelSpec

    return (LevelSpec("bf16", "dense"), LevelSpec("int8", "upstream"))


# -- answers of servers ---------------------------------------------------------------------------


@pytest.fixture(params=[b"<html>hello</html>", b"{}", b"[]", b""], ids=["html", "{}", "[]", "none"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that says 200 to everything and is no gateway."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(request.param)

        do_POST = do_GET  # noqa: N815 - the base class's naming

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            del code, size

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "command",
    ["policy show", "policy show gold", "explain hello", "explain hello --model docs-17m"],
)
def test_another_server_is_told_from_a_gateway(stranger: str, command: str) -> None:
    said = complaint(*command.split(), "--url", stranger)
    assert said.startswith("--url")
    assert stranger in said


@pytest.mark.parametrize("flag", ["--ttft-ms", "--memory-mb", "--min-agreement"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_explain_wants_finite_bounds(flag: str, value: str) -> None:
    assert complaint("explain", "hello", f"{flag}={value}").startswith(f"{flag}: {value}")


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--json", "--png"])
def test_bench_checks_its_outputs_before_it_works(flag: str, tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "nowhere" / "out"):
        assert complaint("bench", flag, str(file)).startswith(f"{flag}: {file}: ")


def test_the_check_of_an_output_leaves_no_trace(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before")
    for file in (kept, tmp_path / "new"):  # the check passes, the configuration ends the command
        said = complaint("bench", "--json", str(file), "--config", str(tmp_path / "none.yaml"))
        assert "none.yaml" in said
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "before"


def test_an_output_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.json"
    file.touch()
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)  # root may all
    assert complaint("bench", "--json", str(file)) == f"--json: {file}: Permission denied"


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    unreadable = "/proc/self/mem"  # a regular file whose first bytes no one may read
    assert complaint("levels", "--config", unreadable).startswith(f"--config: {unreadable}: ")
    assert complaint("levels", "--config", str(tmp_path)).startswith(f"--config: {tmp_path}: ")


POLICIES = """\
port: 8000
policies:
  - name: a
    match:
      hours: {zone: Mars}
  - name: b
    ttft_ms: -3
"""


def test_faults_of_a_config_are_told_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pressgate.yaml"
    file.write_text(POLICIES)
    said = complaint("levels", "--config", str(file))
    assert "policies.0.match.hours.zone (line 5): no timezone 'Mars'" in said
    assert "policies.1.ttft_ms (line 7): Input should be greater than 0" in said
    file.write_text("port: 8000\npolicies:\n  - {name: a, extends: b}\n")
    said = complaint("levels", "--config", str(file))
    assert "policies (line 2): a: extends: no policy 'b'; there are: a, default" in said
    monkeypatch.setenv("PRESSGATE_PORT", "99999999")
    file.write_text("port: 8000\n")
    said = complaint("levels", "--config", str(file))
    assert "port: Input" in said, "the file is not at fault"
    monkeypatch.delenv("PRESSGATE_PORT")
    with pytest.raises(ConfigError, match="port: Input"):
        load_settings(file, port=99999999)


# -- the environment ------------------------------------------------------------------------------


def test_a_variable_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESSGATE_MODELS", "nope")
    assert complaint("levels") == "PRESSGATE_MODELS: not valid JSON"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("PRESSGATE_MEMORY_BUGDET", "PRESSGATE_MEMORY_BUDGET"),
        ("PRESSGATE_CACHE__DRI", "PRESSGATE_CACHE__DIR"),
        ("PRESSGATE_PORT__X", "PRESSGATE_PORT"),
    ],
)
def test_a_misspelt_variable_is_named(
    wrong: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(wrong, "1")
    with pytest.raises(ConfigError, match=f"^{wrong}: .*{right}\\?$"):
        load_settings()


def test_variables_that_are_read_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pressgate.yaml"
    file.write_text(
        "models:\n- id: m\n  upstream:\n    big: {url: 'http://h', model: x,"
        " api_key_env: PRESSGATE_BIG_KEY}\n"
    )
    for name, value in {
        "PRESSGATE_API_KEY": "k",
        "PRESSGATE_NATIVE": "0",
        "PRESSGATE_BIG_KEY": "k",
        "PRESSGATE_CACHE__REDIS_TTL_SECONDS": "7",
        "pressgate_build__seed": "3",
        "PRESSGATE_PORT": "9",
        "PRESSGATE_LIMITS": '{"max_n": 2}',
    }.items():
        monkeypatch.setenv(name, value)
    settings = load_settings(file)
    assert (settings.cache.redis_ttl_seconds, settings.build.seed) == (7, 3)
    assert (settings.port, settings.limits.max_n) == (9, 2)


# -- serve's example ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sla"),
    [
        (Model(id="docs-17m"), {"memory_mb": 25, "max_ppl_ratio": 1.1, "on_miss": "wait"}),
        (Model(id="big", path="org/big"), {"max_ppl_ratio": 1.05}),
    ],
    ids=lambda value: value.id if isinstance(value, Model) else "",
)
def test_the_pasted_request_suits_the_model(model: Model, sla: dict[str, Any]) -> None:
    curl = example(model, "http://h")
    body = orjson.loads(curl.partition("-d '")[2].rpartition("'")[0])
    assert body["model"] == model.id
    assert body["sla"] == sla


# -- bench and search, with a worker that only answers --------------------------------------------


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("command", ["bench", "search"])
def test_own_levels_are_measured_and_timed_cards_kept(
    command: str, timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    async def worker(spec: bytes, **_: Any) -> dict[str, Any]:
        told = orjson.loads(spec)
        measured.append(told["level"])
        rates = {"1": 10.0, "8": 40.0} if told["measure_speed"] else {}
        card = Card(measured=True, stored_bytes=123, decode_tokens_per_s=rates)
        return {"card": card.model_dump(mode="json")}

    monkeypatch.setattr("gateway.variants.local_backend.run_worker", worker)
    config = tmp_path / "pressgate.yaml"
    upstream = {"big": {"url": "http://127.0.0.1:1", "model": "x"}}
    model = {"id": "docs-17m", "path": str(BUILTIN), "upstream": upstream}
    settings = {"models": [model], "levels": ["int8"], "device": "cpu", "threads": 1}
    config.write_bytes(orjson.dumps(settings))  # JSON is YAML
    shared = ("--config", str(config), "--cache-dir", str(tmp_path / "cache"))
    flags = {
        ("bench", True): (),
        ("bench", False): ("--no-speed",),
        ("search", True): ("--candidates", "int8", "--speed"),
        ("search", False): ("--candidates", "int8"),
    }[command, timed]
    done = CliRunner().invoke(app, [command, *shared, *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert set(measured) == {"bf16", "int8"}
    shown = CliRunner().invoke(app, ["levels", "--json", *shared], catch_exceptions=False)
    rows = {row["level"]: row for row in orjson.loads(shown.stdout)["levels"]}
    assert rows["int8"]["measured"] is timed
    assert (rows["int8"]["stored_bytes"] == 123) is timed
