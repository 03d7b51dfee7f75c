"""Options that several commands share, and how flags become settings."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from compressors.levels import STANDARD
from gateway.config import Settings, load_settings
from gateway.errors import ConfigError, InvalidRequest

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Configuration file, YAML.", show_default=False)
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub id. Default: the bundled model or the config's."),
]
LevelNames = Annotated[
    str | None,
    typer.Option("--levels", help="Comma-separated levels, or 'all' for the standard benchmark's."),
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Text to calibrate on (UTF-8).")
]
EvalFile = Annotated[
    Path | None, typer.Option("--eval-text", help="Held-out text for perplexity (UTF-8).")
]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Where artifacts are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Url = Annotated[str, typer.Option("--url", help="A running gateway.")]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="PRESSGATE_API_KEY", help="Its API key.")
]
DEFAULT_URL = "http://127.0.0.1:8000"


def settings_of(
    config: Path | None,
    *,
    model: str | None = None,
    levels: str | None = None,
    calibration: Path | None = None,
    eval_text: Path | None = None,
    cache_dir: Path | None = None,
    speculate: str | None = None,
    **flags: Any,
) -> Settings:
    """Settings from file, environment and flags.

    Raises:
        ConfigError, InvalidRequest: naming the key or flag at fault.
    """
    base = load_settings(config, **flags)
    changes: dict[str, Any] = {}
    if model is not None:
        changes["models"] = [{"id": _model_id(model), "path": model}]
    if levels is not None:
        named = tuple(part.strip() for part in levels.split(",") if part.strip())
        changes["levels"] = STANDARD if named == ("all",) else named
    build = {"calibration": calibration, "eval_text": eval_text}
    for name, file in build.items():
        if file is not None and not file.is_file():
            raise InvalidRequest(f"--{name.replace('_', '-')}: {file}: no such file", param=name)
    if any(build.values()):
        given = {name: file for name, file in build.items() if file is not None}
        changes["build"] = base.build.model_dump() | given
    if speculate is not None:
        changes["engine"] = base.engine.model_dump() | {"speculate": speculate}
    if cache_dir is not None:
        changes["cache"] = base.cache.model_dump() | {"dir": cache_dir}
    if not changes:
        return base
    return load_settings(config, **flags, **changes)


def check_output(flag: str, file: Path) -> None:
    """Long work must not end with a result that cannot be written.

    Raises:
        InvalidRequest: naming the flag, when `file` cannot be made or written.
    """
    target = file.resolve()
    try:
        if not target.exists():
            target.touch()
            target.unlink()
        elif target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InvalidRequest(f"{flag}: {file}: {error.strerror}", param=flag) from None


def _model_id(model: str) -> str:
    """A served name for a folder (its last part) or a hub id (itself)."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve().name
    if path.is_absolute() or model.startswith((".", "~")):
        raise ConfigError(f"--model: {model}: no such folder", param="model")
    return model
