"""Flags that several commands share, and the checks behind them. A wrong flag raises `BadInput`
with the flag's name."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError
from rich.console import Console

from loadtest.client import PATHS, Endpoint, Target
from loadtest.mix import BadInput, Lengths


def finite(value: float | None) -> float | None:
    """Option callback: `nan` passes typer's own minimum and maximum. Raises: BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


MIXES = Path(__file__).parent / "mixes"

Url = Annotated[str, typer.Option(help="Base URL of the server, without /v1.")]
ModelName = Annotated[str, typer.Option("--model", help="Model name to ask for.")]
ApiKeyEnv = Annotated[str, typer.Option(help="Environment variable that holds the API key.")]
AllowRemote = Annotated[bool, typer.Option("--allow-remote", help="Permit other than loopback.")]
JsonOut = Annotated[
    Path | None, typer.Option("--json", help="Write the report here as JSON; - for stdout.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")]
Body = Annotated[str, typer.Option(help='More fields for every request, e.g. {"temperature": 0}.')]
Timeout = Annotated[
    float, typer.Option(min=0.1, max=3600, callback=finite, help="Seconds one request may take.")
]


def check_url(url: str, allow_remote: bool, flag: str = "--url") -> str:
    """The URL without trailing slashes, when it is http(s) and, unless allowed, on loopback.

    Raises:
        BadInput: otherwise; also for a URL that carries a password, which would land in reports.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BadInput(f"{flag} {url}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise BadInput(f"{flag} {url}: not an http:// or https:// URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadInput(f"{flag}: no user, password, query or fragment in the URL, please")
    if not allow_remote and not _is_loopback(host):
        raise BadInput(f"{flag} {url}: not on this machine; add --allow-remote if you mean it")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_target(
    url: str, model: str, *, endpoint: str = "chat", api_key_env: str, body: str, timeout: float
) -> Target:
    """The target of a run, with the API key out of the environment when it is there."""
    if endpoint not in PATHS:
        raise BadInput(f"--endpoint {endpoint}: not one of {', '.join(PATHS)}")
    kind: Endpoint = "chat" if endpoint == "chat" else "completions"
    extra = parse_body(body)
    key = os.environ.get(api_key_env)
    return Target(url, model, endpoint=kind, api_key=key, body=extra, timeout=timeout)


def parse_body(text: str) -> dict[str, Any]:
    """Raises: BadInput unless `text` is a JSON object that leaves the measured fields alone."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BadInput(f"--body: not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadInput("--body: not a JSON object")
    taken = {"stream", "stream_options", "n", "messages", "prompt"} & body.keys()
    if taken:
        raise BadInput(f"--body: {', '.join(sorted(taken))} cannot be set here")
    return body


def parse_lengths(text: str, flag: str) -> Lengths:
    """`64` or `16:256` as a range of tokens. Raises: BadInput."""
    try:
        numbers = [int(part) for part in text.split(":")]
        return Lengths.model_validate(numbers if len(numbers) > 1 else numbers[0])
    except ValidationError as error:
        raise BadInput(f"{flag} {text}: {error.errors()[0]['msg']}") from None
    except ValueError:
        raise BadInput(f"{flag} {text}: not a number or LOW:HIGH") from None


def mix_path(text: str) -> Path:
    """A mix file by path, or one that comes along by its bare name (`mixed-sla`)."""
    bundled = MIXES / f"{text}.yaml"
    return bundled if "/" not in text and bundled.is_file() else Path(text)


def check_writable(path: Path | None, flag: str) -> None:
    """Find out before the run, not after it, that its result cannot be kept. Raises: BadInput."""
    if path is None or str(path) == "-":
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"{flag} {path}: cannot be written")


def deliver_json(report: dict[str, Any], path: Path | None) -> Console:
    """Write the report where `--json` says. Returns the console for people: stdout, unless the JSON
    went there."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    to_stdout = str(path) == "-"
    if to_stdout:
        sys.stdout.write(text)
    elif path is not None:
        path.write_text(text, encoding="utf-8")
    return Console(stderr=to_stdout)
