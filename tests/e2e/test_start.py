"""Starting: what cannot work is refused with one line and status 2, what can work starts."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.commands import complaint, facts, one_line, pressgate, tiny_checkpoint, wait_for_jobs
from tests.support.gateway_process import GatewayProcess, write_texts

pytestmark = pytest.mark.slow

FAKE = {"models": [{"id": "fake", "path": "fake"}], "device": "cpu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


def refused(folder: Path, config: dict[str, Any] | str, *flags: str) -> str:
    """The line that `pressgate serve` ends with on this configuration."""
    file = folder / "pressgate.yaml"
    if isinstance(config, dict):
        config = yaml.safe_dump({"cache": {"dir": str(folder / "cache")}, **config})
    file.write_text(config)
    return complaint("serve", "--config", str(file), "--port", "0", *flags)


# -- the configuration ------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "no YAML": ("models:\n  - {id: a\nport: 1\n", ("not valid YAML", "line 3")),
    "a list": ("- a\n- b\n", ("not valid YAML",)),
    "unknown key": ({"modles": []}, ("modles",)),
    "unknown key inside": ({"engine": {"max_seqs": 3}}, ("engine.max_seqs",)),
    "wrong type": ({"threads": "many"}, ("threads",)),
    "absurd number": ({"engine": {"kv_fraction": 2.0}}, ("engine.kv_fraction",)),
    "unknown level": (
        FAKE | {"levels": ["int8", "int9-magic-g64"]},
        ("magic", "known here:"),
    ),
    "bad policy": (
        FAKE | {"policies": [{"name": "p", "max_ppl_ratio": 0.2}]},
        ("policies.0.max_ppl_ratio",),
    ),
    "open to everybody": (FAKE | {"host": "::"}, ("'::'", "api_keys")),
    "a foreign address": (
        FAKE | {"host": "203.0.113.7", "api_keys": [{"name": "k", "sha256": "0" * 64}]},
        ("203.0.113.7", "cannot listen"),
    ),
    "a secret as it is": (FAKE | {"api_keys": [{"name": "k", "sha256": "hunter2"}]}, ("sha256",)),
    "no such calibration file": (
        FAKE | {"build": {"calibration": "/nowhere/text.txt"}},
        ("build.calibration", "/nowhere/text.txt"),
    ),
    "too little memory": (
        FAKE | {"memory_budget": "20MB"},
        ("memory_budget", "20 MB", "at least 44 MB"),
    ),
    "too little memory for what is pinned": (
        FAKE
        | {"models": [{"id": "fake", "path": "fake", "pinned": ["int8"]}], "levels": ["int8"]}
        | {"memory_budget": "50MB"},
        ("memory_budget", "bf16 beside int8", "50 MB"),
    ),
    "a pinned level that is none": (
        FAKE | {"models": [{"id": "fake", "path": "fake", "pinned": ["int9"]}]},
        ("models.pinned", "'int9'", "bf16"),
    ),
    "no redis address": (FAKE | {"cache": {"redis_url": "gopher://x"}}, ("cache.redis_url",)),
}


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=lambda name: name.replace(" ", "-"))
def test_a_bad_configuration_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, words = BAD_CONFIGS[case]
    line = refused(tmp_path, config)
    assert all(word in line for word in words), line
    assert "hunter2" not in line


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    """The same as a process of its own, as a shell sees it."""
    done = pressgate("serve", "--config", str(tmp_path / "nowhere.yaml"))
    assert done.returncode == 2
    assert "nowhere.yaml" in one_line(done.stderr)


def test_a_calibration_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(b"\xff\xfe\x00\x80")
    line = refused(tmp_path, FAKE, "--calibration", str(tmp_path / "text.bin"))
    assert "text.bin" in line
    assert "UTF-8" in line


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(tmp_path, FAKE, "--port", str(port))
    assert str(port) in line
    assert "in use" in line


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(tmp_path, FAKE, "--cache-dir", str(tmp_path / "file"))
    assert "cache.dir" in line


# -- the model --------------------------------------------------------------------------------


def _missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_safetensors_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing folder": (_missing, ("no such folder",)),
    "pickle only": (_pickle_only, ("pickle", "safetensors")),
    "no weights": (_no_weights, ("safetensors",)),
    "truncated": (_truncated, ("model.safetensors",)),
    "garbage": (_no_safetensors_at_all, ("model.safetensors",)),
    "unknown architecture": (_change_config(model_type="nonesuch"), ("nonesuch",)),
    "its own code": (
        _change_config(
            model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling_homemade.Model"}
        ),
        ("homemade",),
    ),
    "config of another shape": (_change_config(hidden_size="wide"), ("config.json",)),
    "misshapen tensors": (
        _change_config(vocab_size=300),
        ("embed_tokens.weight", "[256, 64]", "[300, 64]"),
    ),
    "no tokenizer": (_no_tokenizer, ("tokenizer",)),
}


@pytest.mark.parametrize("case", BAD_MODELS, ids=lambda name: name.replace(" ", "-"))
def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path, tiny: Path, case: str) -> None:
    spoil, words = BAD_MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil(folder)
    line = refused(tmp_path, {"device": "cpu"}, "--model", str(folder))
    assert all(word in line for word in words), line


def test_code_beside_a_model_is_never_run(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    _change_config(
        model_type="homemade",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )(folder)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    refused(tmp_path, {"device": "cpu"}, "--model", str(folder))
    assert not ran.exists()


# -- good starts ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_is_served_under_its_name_and_its_second_start_builds_nothing(
    tmp_path: Path, kind: Any
) -> None:
    folder = tiny_checkpoint(tmp_path / f"tiny-{kind}", kind)
    config = {"levels": ["int8"], "threads": 1}
    texts = []
    for _ in range(2):
        flags = ("--model", str(folder))
        with GatewayProcess(tmp_path / "home", config, flags=flags, ready_s=280) as gateway:
            model = f"tiny-{kind}"
            assert next(row["id"] for row in gateway.get("/v1/models")["data"]) == model
            answer = gateway.complete(model=f"{model}@int8", sla={"on_miss": "wait"})
            assert answer["compression"]["level"] == "int8"
            texts.append(answer["choices"][0]["text"])
            jobs = gateway.get("/v1/jobs")["data"]
            built = [job["level"] for job in jobs if job["level"] == "int8"]
            assert built == (["int8"] if len(texts) == 1 else [])
            if len(texts) == 1:
                wait_for_jobs(gateway)
            else:
                assert jobs == []
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("form", "level"), [("gptq", "int4-gptq-g128"), ("compressed-tensors", "int4-rtn-g128")]
)
def test_a_compressed_checkpoint_is_served_as_the_level_it_is(
    form: str, level: str, tmp_path: Path
) -> None:
    eval_text = write_texts(tmp_path)["eval_text"]
    exported = tmp_path / "exported"
    common = ("--cache-dir", str(tmp_path / "cache"), "--eval-text", eval_text, "--json")
    export = ("--export", str(exported), "--format", form)
    facts("compress", "--level", "int4-rtn-g128", *export, *common)
    flags = ("--model", str(exported))
    with GatewayProcess(tmp_path / "home", {"threads": 1}, flags=flags, ready_s=280) as gateway:
        rows = gateway.get("/v1/levels")["data"]
        assert [row["level"] for row in rows] == [level]
        answer = gateway.complete(model="exported")
        assert answer["compression"]["level"] == level
        assert answer["usage"]["completion_tokens"] == 8
        assert len(answer["choices"][0]["text"].strip()) > 3


# -- keys -------------------------------------------------------------------------------------


def test_without_keys_a_loopback_gateway_is_open_to_all_it_offers(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path, FAKE) as gateway:
        assert gateway.complete(model="fake")["choices"]
        assert gateway.get("/v1/policies")["data"]


def test_with_keys_scopes_are_kept(tmp_path: Path) -> None:
    keys = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": scopes}
        for name, scopes in (("user", ["inference"]), ("boss", ["inference", "admin"]))
    ]
    body = {"model": "fake", "prompt": "hello", "max_tokens": 4}
    policy = {"max_ppl_ratio": 1.5}
    with GatewayProcess(tmp_path, FAKE | {"api_keys": keys}) as gateway:

        def ask(method: str, path: str, key: str | None, document: Any) -> tuple[int, str]:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = httpx.request(
                method, gateway.url + path, headers=headers, json=document, timeout=60
            )
            return answer.status_code, answer.text

        asked = {
            (key, what): ask(*call)
            for key in (None, "wrong", "user", "boss")
            for what, call in {
                "complete": ("POST", "/v1/completions", key, body),
                "policy": ("PUT", "/v1/policies/mine", key, policy),
            }.items()
        }
        assert {name: status for name, (status, _) in asked.items()} == {
            (None, "complete"): 401,
            (None, "policy"): 401,
            ("wrong", "complete"): 401,
            ("wrong", "policy"): 401,
            ("user", "complete"): 200,
            ("user", "policy"): 403,
            ("boss", "complete"): 200,
            ("boss", "policy"): asked["boss", "policy"][0],
        }
        assert asked["boss", "policy"][0] in (200, 201)
        assert json.loads(asked["user", "policy"][1])["error"]["code"] == "insufficient_scope"
        assert httpx.get(gateway.url + "/healthz").status_code == 200
