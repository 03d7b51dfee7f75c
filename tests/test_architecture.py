"""Who may import whom, and what stays light: the layout rules, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "compressors", "cache", "loadtest")
# Inside the gateway, what each part may import of the gateway besides itself.
LEAVES = {"errors", "config", "metrics"}
BELOW = {
    "engine": set(),
    "quality": {"engine"},
    "variants": {"engine", "quality"},
    "policy": {"variants", "engine.base"},
    "api": {"policy", "variants", "engine", "quality"},
    "commands": {"app", "api", "policy", "variants", "engine", "quality"},
}
POLICY_SEES = {"gateway.variants.variant", "gateway.variants.card", "gateway.engine.base"}
HEAVY = ("torch", "transformers")
TORCH_FREE = (
    "gateway.api",
    "gateway.policy",
    "cache",
    "loadtest",
    "gateway.errors",
    "gateway.config",
    "gateway.metrics",
    "gateway.cli",
    "gateway.commands",
    "gateway.app",
    "gateway.variants.variant",
    "gateway.variants.cards",
    "gateway.variants.entry",
    "gateway.variants.spec",
    "gateway.variants.shared",
    "gateway.variants.fake_backend",
    "gateway.variants.pool",
    "gateway.variants.roster",
    "gateway.variants.card",
    "gateway.variants.jobs",
    "gateway.variants.backend",
    "gateway.engine.base",
    "gateway.engine.scheduler",
    "gateway.engine.kv_cache",
    "gateway.engine.fake",
    "gateway.engine.upstream",
    "compressors.recipe",
    "compressors.registry",
)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names imported; type-checking-only imports are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def is_under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("name", MODULES, ids=str)
def test_packages_below_the_gateway_import_no_sibling(name: str) -> None:
    package = name.split(".", maxsplit=1)[0]
    if package == "gateway":
        return
    others = [other for other in PACKAGES if other != package]
    wrong = [target for target in imports(MODULES[name]) if is_under(target, *others)]
    assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("gateway.")], ids=str)
def test_inside_the_gateway_imports_point_downwards(name: str) -> None:
    part = name.split(".")[1]
    if part not in BELOW:
        return
    allowed = {f"gateway.{target}" for target in BELOW[part] | LEAVES | {part}}
    # configuration embeds the policies' and budgets' data models
    targets = [t for t in imports(MODULES[name]) if is_under(t, "gateway")]
    wrong = [t for t in targets if not is_under(t, *allowed)]
    assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("name", [n for n in MODULES if is_under(n, "gateway.policy")], ids=str)
def test_policy_sees_facts_never_engines(name: str) -> None:
    seen = [t for t in imports(MODULES[name]) if is_under(t, "gateway.variants", "gateway.engine")]
    assert set(seen) <= POLICY_SEES


@pytest.mark.parametrize("name", MODULES, ids=str)
def test_fastapi_stays_in_api_and_app(name: str) -> None:
    if is_under(name, "gateway.api", "gateway.app"):
        return
    assert not [t for t in imports(MODULES[name]) if is_under(t, "fastapi", "starlette")]


def test_no_import_cycles() -> None:
    graph = {
        name: {t for t in imports(path, top_level_only=True) if t in MODULES and t != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_light_modules_load_no_torch() -> None:
    light = [name for name in MODULES if is_under(name, *TORCH_FREE)]
    assert len(light) > 20
    code = (
        f"import importlib, sys\nfor name in {light!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    heavy = [h for h in {HEAVY!r} if h in sys.modules]\n"
        f"    assert not heavy, f'{{name}} loads {{heavy}}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", [n for n, p in MODULES.items() if p.name == "__init__.py"], ids=str
)
def test_package_files_are_one_screen(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 40
