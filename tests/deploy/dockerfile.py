"""Just enough of a Dockerfile to run what it says: instructions with their lines joined."""

from __future__ import annotations

import json
import re
import shlex


class Dockerfile:
    """Instructions in order, comments gone; `last` and `command` look at the final stage."""

    def __init__(self, text: str) -> None:
        kept = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        joined = "\n".join(kept).replace("\\\n", " ")
        lines = (line.strip() for line in joined.splitlines())
        self._all = [tuple(line.split(None, 1)) for line in lines if line]
        start = max(i for i, (name, *_) in enumerate(self._all) if name == "FROM")
        self._final = self._all[start:]

    def all(self, name: str) -> list[str]:
        """Arguments of every such instruction, in all stages."""
        return [rest for kind, rest in self._all if kind == name]

    def last(self, name: str) -> str:
        return [rest for kind, rest in self._final if kind == name][-1]

    def command(self, name: str) -> list[str]:
        """An ENTRYPOINT or CMD in exec form. Raises: ValueError when it is not a JSON list."""
        words: list[str] = json.loads(self.last(name))
        return words

    def healthcheck(self) -> list[str]:
        """The HEALTHCHECK's command, without its options."""
        words: list[str] = json.loads(re.sub(r"^.*?CMD\s+", "", self.last("HEALTHCHECK")))
        return words

    def environment(self) -> dict[str, str]:
        """ENV of the final stage; values are not expanded."""
        return dict(
            _pair(word) for kind, rest in self._final if kind == "ENV" for word in shlex.split(rest)
        )


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value
