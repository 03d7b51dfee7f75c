"""What a configuration must keep that only its files and its models can tell; said at start.

Each check raises `ConfigError` with the key at fault and what would do.
"""

from __future__ import annotations

from gateway.config import SPECULATE, Model, Settings
from gateway.errors import ConfigError
from gateway.variants.backend import Backend
from gateway.variants.worth import occupied


def check_texts(settings: Settings) -> None:
    """A text file that cannot be read is said at start, not by the first build.

    Raises:
        ConfigError.
    """
    for name in ("calibration", "eval_text"):
        file = getattr(settings.build, name)
        try:
            if file is not None:
                file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"build.{name}: {file}: not UTF-8: {error.reason}", param=name
            ) from None
        except OSError as error:
            raise ConfigError(f"build.{name}: {file}: {error.strerror}", param=name) from None


def check_memory(settings: Settings, backends: tuple[Backend, ...]) -> None:
    """A budget that cannot hold a model's own weights would never become ready.

    Raises:
        ConfigError: with the budget that would do.
    """
    budget, share = settings.memory_budget, settings.engine.kv_fraction
    always: list[tuple[str, int]] = []
    for model, backend in zip(settings.models, backends, strict=True):
        _check_pinned(model, backend)
        always += [
            (f"{model.id}@{backend.memory(level)}", backend.load_bytes(level))
            for level in model.pinned
        ]
        level = backend.default_level
        default = (f"{model.id}@{backend.memory(level)}", backend.load_bytes(level))
        weights = occupied([*always, default])
        if weights > budget * (1 - share):
            beside = f" beside {', '.join(model.pinned)}" if model.pinned else ""
            raise ConfigError(
                f"memory_budget: {budget / 1e6:.0f} MB is too little for {backend.model}: "
                f"{level}{beside} weighs {weights / 1e6:.0f} MB and {share:.0%} of the "
                f"budget is KV cache; set at least {weights / (1 - share) / 1e6 + 1:.0f} MB",
                param="memory_budget",
            )


def _check_pinned(model: Model, backend: Backend) -> None:
    """
    Raises:
        ConfigError: a pinned level is not in the model's ladder.
    """
    known = [spec.level for spec in backend.ladder()]
    for level in model.pinned:
        if level not in known:
            raise ConfigError(
                f"models.pinned: {level!r} is no level of {model.id}; there is {', '.join(known)}",
                param="models.pinned",
            )


def check_speculate(settings: Settings, names: tuple[str, ...]) -> None:
    """Whether `engine.speculate` is a way to draft or a level of the ladder `names`.

    Raises:
        ConfigError: neither.
    """
    mode, known = settings.engine.speculate, (*SPECULATE, *names)
    if mode not in known:
        raise ConfigError(
            f"engine.speculate: {mode!r} is none of {', '.join(known)}", param="engine.speculate"
        )
