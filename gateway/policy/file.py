"""Policies from a YAML file, with errors that name the line and the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.policy.inherit import BrokenChain, lineage
from gateway.policy.parse import problems
from gateway.policy.policy import DEFAULT, Policy

MAX_BYTES: Final = 2**20
_MAX_NODES: Final = 50_000  # a small file can unfold to any size through aliases
Path_ = tuple[int | str, ...]


def load_policies(
    path: Path, *, elsewhere: Collection[str] | None = (DEFAULT.name,)
) -> tuple[Policy, ...]:
    """Read a file that holds a list of policies, one policy, or a configuration's `policies:`.

    Args:
        elsewhere: names that may be extended besides those of the file; None: any.

    Raises:
        ConfigError: unreadable, not YAML, a key given twice or unknown, a bad value, a name given
            twice, extending what is not there or in the end itself; each fault as
            `FILE:LINE: key: what is wrong`.
    """
    root = _compose(path)
    lines: dict[Path_, int] = {}
    document = _Reader(path, lines).read(root, ())
    prefix, entries = _entries(path, document, lines)
    policies: dict[str, Policy] = {}
    places: dict[str, Path_] = {}
    faults: list[str] = []
    for index, entry in enumerate(entries):
        at = (*prefix, index) if prefix or isinstance(document, list) else ()
        try:
            policy = Policy.model_validate(entry)
        except ValidationError as error:
            locs = [(*at, *item["loc"]) for item in error.errors()]
            faults += [
                f"{path}:{_line(lines, loc)}: {text}"
                for loc, text in zip(locs, problems(error), strict=True)
            ]
            continue
        if policy.name in policies:
            faults.append(f"{path}:{_line(lines, (*at, 'name'))}: name: {policy.name!r} is taken")
        policies[policy.name], places[policy.name] = policy, at
    for name, fault in _broken(policies, elsewhere).items():
        faults.append(f"{path}:{_line(lines, (*places[name], 'extends'))}: extends: {fault}")
    if faults:
        raise ConfigError("\n".join(faults), param="policies")
    return tuple(policies.values())


def _broken(
    policies: Mapping[str, Policy], elsewhere: Collection[str] | None
) -> dict[str, BrokenChain]:
    """The policies whose `extends` is at fault."""
    named = {policy.extends for policy in policies.values() if policy.extends is not None}
    outside = named if elsewhere is None else named & set(elsewhere)
    everything = {name: Policy(name=name) for name in outside} | dict(policies)
    broken = {}
    for policy in policies.values():
        try:
            lineage(policy, everything)
        except BrokenChain as error:
            broken[error.name] = error
    return broken


def _compose(path: Path) -> yaml.Node:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes", param="policies")
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", param="policies") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}", param="policies") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {error}", param="policies") from None
    if root is None:
        raise ConfigError(f"{path}: is empty", param="policies")
    return root


def _entries(path: Path, document: Any, lines: dict[Path_, int]) -> tuple[Path_, list[Any]]:
    """Where the policies stand in the document, and they themselves."""
    if isinstance(document, list):
        return (), document
    if not isinstance(document, dict):
        raise ConfigError(f"{path}:1: expected a policy or a list of policies", param="policies")
    if "policies" not in document:
        return (), [document]
    for name in document:
        if name not in Settings.model_fields:
            line = _line(lines, (name,))
            raise ConfigError(f"{path}:{line}: {name}: unknown beside policies", param=str(name))
    if not isinstance(document["policies"], list):
        line = _line(lines, ("policies",))
        raise ConfigError(f"{path}:{line}: policies: expected a list", param="policies")
    return ("policies",), document["policies"]


def _line(lines: dict[Path_, int], loc: Path_) -> int:
    """The line of a key, or of the innermost thing around it that stands in the file."""
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc, 1)


class _Reader:
    """Nodes to plain values, noting the line of every key and item."""

    def __init__(self, path: Path, lines: dict[Path_, int]) -> None:
        self._path = path
        self._lines = lines
        self._scalars = yaml.SafeLoader("")
        self._left = _MAX_NODES

    def read(self, node: yaml.Node, at: Path_) -> Any:
        self._left -= 1
        line = node.start_mark.line + 1
        if self._left < 0 or len(at) > 8:
            raise ConfigError(f"{self._path}:{line}: too large or too deep", param="policies")
        self._lines.setdefault(at, line)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*at, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{self._path}:{line}: {error}", param="policies") from None

    def _mapping(self, node: yaml.MappingNode, at: Path_) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, key.value
            where = f"{self._path}:{line}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key must be a word", param="policies")
            if name in found:
                raise ConfigError(f"{where}: {name}: given twice", param=name)
            self._lines[(*at, name)] = line
            found[name] = self.read(value, (*at, name))
        return found
