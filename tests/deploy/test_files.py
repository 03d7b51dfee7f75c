"""Container, compose, Kubernetes and example files: valid, consistent with the code, no secrets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from compressors.recipe import Recipe
from gateway.config import Settings, load_settings
from tests.deploy.dockerfile import Dockerfile

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = Path(sys.executable).parent
CONFIGS = [
    *sorted((DEPLOY / "examples").glob("*.yaml")),
    DEPLOY / "pressgate.yaml",
    DEPLOY / "k8s" / "pressgate.yaml",
]
# From github.com/compose-spec/compose-spec (Apache-2.0), schema/compose-spec.json, June 2026.
COMPOSE_SCHEMA = Path(__file__).with_name("compose-spec.json")
KUBERNETES = "1.33"


def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 60) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration comes from the file alone."""
    import os

    for name in os.environ:
        if name.startswith("PRESSGATE_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_configurations_load_and_mean_something(path: Path) -> None:
    settings = load_settings(path)
    assert isinstance(settings.levels, tuple)
    for level in settings.levels:
        Recipe.parse(level)
    offered = {*settings.levels, *(name for model in settings.models for name in model.upstream)}
    names = {key.name for key in settings.api_keys}
    for policy in settings.policies:
        assert set(policy.levels) <= offered, policy.name
        assert set(policy.match.api_key) <= names, policy.name
    assert "default" in {policy.name for policy in settings.policies}


def test_yaml_is_tidy() -> None:
    run(TOOLS / "yamllint", "--strict", "-c", DEPLOY / ".yamllint.yaml", DEPLOY)


# -- image ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return Dockerfile((DEPLOY / "Dockerfile").read_text())


def test_the_dockerfile_passes_its_linter() -> None:
    run(TOOLS / "hadolint", DEPLOY / "Dockerfile")


def test_the_image_has_the_torch_that_the_project_pins(dockerfile: Dockerfile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (line for line in project["dependencies"] if line.startswith("torch="))
    installs = [line for line in dockerfile.all("RUN") if "pip install" in line and "torch" in line]
    assert len(installs) == 1
    assert pin in installs[0].split()


def test_the_image_does_not_run_as_root(dockerfile: Dockerfile) -> None:
    assert dockerfile.last("USER").split(":")[0].isdigit()
    assert dockerfile.last("USER").split(":")[0] != "0"


def test_the_image_forms_its_commands_as_lists(dockerfile: Dockerfile) -> None:
    assert dockerfile.command("ENTRYPOINT") == ["pressgate"]
    assert dockerfile.command("CMD") == ["serve"]
    assert dockerfile.healthcheck()[0] == "python"


def _copied(dockerfile: Dockerfile) -> list[str]:
    sources = [line.split()[:-1] for line in dockerfile.all("COPY") if "--from" not in line]
    return [source for line in sources for source in line]


def test_what_is_copied_is_in_the_build_context(dockerfile: Dockerfile) -> None:
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[0] == "*"
    for source in _copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in kept


def test_what_is_copied_makes_a_whole_package(
    dockerfile: Dockerfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The native kernels are optional; compiling them once more would only take time.
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("CXX", "false")
    context = tmp_path / "context"
    context.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for source in _copied(dockerfile):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=ignore)
        else:
            shutil.copy(ROOT / source, context)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", tmp_path, "."),
        cwd=context,
        timeout=280,
    )
    (wheel,) = tmp_path.glob("pressgate-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "gateway", "compressors", "cache", "loadtest").split()
    # notes beside the code stay behind
    development = (".cpp", ".h", ".gitignore", "s/README.md", "t/RESULTS.md", ".png")
    sources = {name for name in tracked if not name.endswith(development)}
    assert sources <= packed, sorted(sources - packed)


# -- compose ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_compose_follows_its_specification(compose: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(json.loads(COMPOSE_SCHEMA.read_text())).validate(compose)


def test_compose_names_nothing_that_is_not_there(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            found = (DEPLOY / source).exists() if source[0] == "." else source in compose["volumes"]
            assert found, f"{name}: {mount}"
        assert set(service.get("depends_on", ())) <= compose["services"].keys()
        assert set(service.get("secrets", ())) <= compose.get("secrets", {}).keys()
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][other]
    build = compose["services"]["gateway"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]) == DEPLOY / ".." / "deploy/Dockerfile"


def test_compose_opens_only_loopback_and_holds_no_secret(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for key, value in (service.get("environment") or {}).items():
            if re.search("KEY|PASSWORD|TOKEN|SECRET", key):
                assert value.startswith(("${", "/run/secrets/")), f"{name}: {key}"


def test_the_parts_of_compose_find_each_other(compose: dict[str, Any]) -> None:
    services = compose["services"]
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for job in scrape["scrape_configs"]:
        for static in job["static_configs"]:
            assert {target.split(":")[0] for target in static["targets"]} <= services.keys()
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    every = scrape["global"]["scrape_interval"]
    assert source["datasources"][0]["jsonData"]["timeInterval"] == every
    boards = yaml.safe_load((provisioning / "dashboards" / "pressgate.yaml").read_text())
    path = boards["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{path}:ro" in services["grafana"]["volumes"]


@pytest.mark.usefixtures("no_environment")
def test_the_gateway_of_compose_starts_from_its_environment(
    compose: dict[str, Any], dockerfile: Dockerfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in dockerfile.environment().items():
        if name.startswith("PRESSGATE_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match="api_keys"):
        load_settings(DEPLOY / "pressgate.yaml")
    keys = [{"name": "me", "sha256": "0" * 64, "scopes": ["inference", "admin"]}]
    monkeypatch.setenv("PRESSGATE_API_KEYS", json.dumps(keys))
    settings = load_settings(DEPLOY / "pressgate.yaml")
    assert settings.cache.redis_url is not None
    assert settings.cache.redis_url.get_secret_value() == "redis://redis:6379/0"
    volumes = compose["services"]["gateway"]["volumes"]
    assert f"artifacts:{settings.cache.dir}" in volumes
    _same_port(settings, dockerfile)


def _same_port(settings: Settings, dockerfile: Dockerfile) -> None:
    assert str(settings.port) == dockerfile.last("EXPOSE")
    assert settings.host == "0.0.0.0"  # noqa: S104 - inside a container


# -- Kubernetes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    rendered = run("kubectl", "kustomize", DEPLOY / "k8s")
    return list(yaml.safe_load_all(rendered))


def test_kubernetes_takes_every_manifest(manifests: list[dict[str, Any]]) -> None:
    assert sorted(item["kind"] for item in manifests) == ["ConfigMap", "Deployment", "Service"]
    for item in manifests:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_pods_get_their_configuration_and_ports(
    manifests: list[dict[str, Any]], dockerfile: Dockerfile
) -> None:
    by_kind = {item["kind"]: item for item in manifests}
    pod = by_kind["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    mounted = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    config = mounted["config"]["configMap"]["name"]
    assert config == by_kind["ConfigMap"]["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted.keys()
    assert container["args"][-1] == "/etc/pressgate/pressgate.yaml"
    (port,) = container["ports"]
    assert str(port["containerPort"]) == dockerfile.last("EXPOSE")
    (service,) = by_kind["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    selector = by_kind["Service"]["spec"]["selector"].items()
    assert selector <= pod["metadata"]["labels"].items()
    assert pod["spec"]["securityContext"]["runAsUser"] == int(dockerfile.last("USER").split(":")[0])


def test_the_pod_monitor_joins_in(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    shutil.copytree(DEPLOY / "k8s", tmp_path / "k8s")
    path = tmp_path / "k8s" / "kustomization.yaml"
    path.write_text(path.read_text().replace("# components:", "components:"))
    rendered = list(yaml.safe_load_all(run("kubectl", "kustomize", tmp_path / "k8s")))
    (monitor,) = (item for item in rendered if item["kind"] == "PodMonitor")
    (deployment,) = (item for item in rendered if item["kind"] == "Deployment")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= deployment["spec"]["template"]["metadata"]["labels"].items()
