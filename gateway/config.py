"""The one configuration model: `pressgate.yaml` < environment (`PRESSGATE_…`) < flags.

Frozen; every default works on a laptop; an unknown key is an error that names it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from gateway.errors import ConfigError
from gateway.policy.inherit import BrokenChain, lineage
from gateway.policy.policy import BUILTIN as BUILTIN_POLICIES
from gateway.policy.policy import DEFAULT as DEFAULT_POLICY
from gateway.policy.policy import Policy

BUILTIN = Path(__file__).parent / "builtin" / "docs-17m"
DEFAULT_LEVELS = (
    "fp32",
    "bf16",
    "int8",
    "int4-gptq-g128",
    "int4-rtn-g64",
    "depth-75",
    "depth-75+int8",
    "lowrank-80",
    "sparse24-wanda",
)
LADDERS = "ladders"  # document namespace of searched ladders, by model id
SPECULATE = ("off", "auto", "lookup")  # or a level
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PREFIX = "PRESSGATE_"
_OTHER_VARIABLES = {"PRESSGATE_API_KEY", "PRESSGATE_NATIVE"}  # read elsewhere, not settings


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Upstream(_Part):
    """A level that lives in another OpenAI-compatible server."""

    url: str
    model: str
    api_key_env: str | None = None
    perplexity_ratio: Annotated[float, Field(ge=1.0)] = 1.0


class FakeModel(_Part):
    """A settable stand-in engine (no weights): for tests and for measuring the gateway itself."""

    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = 10_000.0
    tpot_ms: Annotated[float, Field(ge=0)] = 5.0
    load_seconds: Annotated[float, Field(ge=0)] = 0.0
    build_seconds: Annotated[float, Field(ge=0)] = 0.2
    failing_levels: tuple[str, ...] = ()


class Model(_Part):
    """One served model. `path`: `builtin`, a local folder or a hub id; `fake` for the stand-in.
    `pinned` levels are loaded at start and never unloaded for others."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
    path: str = "builtin"
    revision: str | None = None
    pinned: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    upstream: dict[str, Upstream] = Field(default_factory=dict)
    fake: FakeModel | None = None


class Cache(_Part):
    dir: Path = Path("~/.cache/pressgate")
    disk_budget: ByteSize = ByteSize(20 * 2**30)
    redis_url: SecretStr | None = None
    redis_budget: ByteSize = ByteSize(2 * 2**30)
    redis_variant_limit: ByteSize = ByteSize(512 * 2**20)  # larger variants stay on disk only
    redis_ttl_seconds: Annotated[int, Field(gt=0)] = 7 * 86_400
    redis_timeout_seconds: Annotated[float, Field(gt=0)] = 2.0

    @property
    def root(self) -> Path:
        return self.dir.expanduser()


class Engine(_Part):
    """Limits of the local engine. `kv_fraction` is the KV cache's share of `memory_budget`.

    `speculate` is who drafts tokens for others to verify, where that is measured to be faster:
    nobody (`off`), whoever is loaded (`auto`), the text so far (`lookup`) or one level, which is
    then kept loaded.
    """

    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 16
    max_waiting: Annotated[int, Field(ge=1, le=100_000)] = 256
    prefill_chunk: Annotated[int, Field(ge=16, le=8192)] = 256
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    kv_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    prefix_cache: bool = True
    speculate: Annotated[str, Field(min_length=1, max_length=128)] = "auto"


class Build(_Part):
    """How builds run beside serving."""

    threads: Annotated[int, Field(ge=1)] = 1
    nice: Annotated[int, Field(ge=0, le=19)] = 19
    max_jobs: Annotated[int, Field(ge=1, le=64)] = 16  # queued and running
    timeout_seconds: Annotated[float, Field(gt=0)] = 3600
    calibration: Path | None = None
    eval_text: Path | None = None
    seed: int = 0
    prebuild: bool = False  # build every missing level of the ladder after start-up


class Shadow(_Part):
    """Live quality: the share of compressed answers that the dense level scores afterwards."""

    rate: Annotated[float, Field(ge=0, le=1)] = 0.0


class Decisions(_Part):
    """What is kept of every decision, to be asked for later: lengths and numbers, never texts.

    `log` gets a line of JSON per finished request, in `log_files` files of `log_bytes` at most;
    with `log_text` prompts and answers too.
    """

    keep_seconds: Annotated[float, Field(ge=60, le=30 * 86_400)] = 86_400
    disk_budget: ByteSize = ByteSize(2**30)  # about 1 kB for each
    redis_budget: ByteSize = ByteSize(64 * 2**20)  # 0: not shared
    log: Path | None = None
    log_bytes: Annotated[ByteSize, Field(ge=4096)] = ByteSize(64 * 2**20)
    log_files: Annotated[int, Field(ge=2, le=1000)] = 4
    log_text: bool = False


class Tracing(_Part):
    """OpenTelemetry spans over OTLP/HTTP; needs `pressgate[otel]`. What these do not say, the
    standard variables do, e.g. `OTEL_EXPORTER_OTLP_HEADERS`.

    `sample_ratio` is the share of requests that are traced unless their caller has decided; with
    `text` spans hold prompts and answers.
    """

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://")] | None = None
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    service_name: Annotated[str, Field(min_length=1, max_length=128)] = "pressgate"
    text: bool = False


class Floors(_Part):
    """The tightest times that a caller may ask for, in ms: a budget that no level can keep, or one
    that takes the whole host, costs others their answers. What is tighter is refused, or raised to
    the floor (`clamp`). Policies may be tighter: they are the operator's own."""

    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    tpot_ms: Annotated[float, Field(gt=0)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    tighter: Literal["refuse", "clamp"] = "refuse"


class Quota(_Part):
    """What a caller may use up. A request counts with its prompt and its `max_tokens` while it
    runs, then with what it generated."""

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    requests_per_day: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1)] | None = None


class ApiKey(_Part):
    """A caller's key, stored as the SHA-256 hex digest of the secret. `max_concurrent` replaces
    `limits.max_concurrent_per_key`."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Literal["inference", "admin"], ...] = ("inference",)
    floors: Floors = Floors()
    quota: Quota = Quota()
    max_concurrent: Annotated[int, Field(ge=1)] | None = None


class Limits(_Part):
    """Bounds on one request and on the whole front."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20
    max_n: Annotated[int, Field(ge=1)] = 8
    max_stop: Annotated[int, Field(ge=1)] = 16
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    max_concurrent: Annotated[int, Field(ge=1)] = 256
    max_concurrent_per_key: Annotated[int, Field(ge=1)] = 256
    max_waiting: Annotated[int, Field(ge=2)] = 128  # for a slot, per model, of those at once
    max_waiting_per_key: Annotated[int, Field(ge=1)] = 128
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600


class Settings(BaseSettings):
    """Everything an operator can set."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    models: Annotated[tuple[Model, ...], Field(min_length=1)] = (Model(id="docs-17m"),)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    memory_budget: ByteSize = ByteSize(4 * 2**30)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    cache: Cache = Cache()
    engine: Engine = Engine()
    build: Build = Build()
    limits: Limits = Limits()
    shadow: Shadow = Shadow()
    decisions: Decisions = Decisions()
    tracing: Tracing = Tracing()
    api_keys: tuple[ApiKey, ...] = ()
    levels: tuple[str, ...] | Literal["auto"] = DEFAULT_LEVELS
    policies: tuple[Policy, ...] = BUILTIN_POLICIES
    predict: Literal["live", "card"] = "live"  # `card`: idle times, for comparison
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.host not in LOOPBACK and not self.api_keys:
            raise ValueError(
                f"host {self.host!r} is reachable by others: set api_keys, or use 127.0.0.1"
            )
        for name, values in (
            ("models", [m.id for m in self.models]),
            ("policies", [p.name for p in self.policies]),
            ("api_keys", [k.name for k in self.api_keys]),
        ):
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise ValueError(f"{name}: given twice: {', '.join(sorted(twice))}")
        return self

    @field_validator("policies")
    @classmethod
    def _chains(cls, policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
        named = {policy.name: policy for policy in (DEFAULT_POLICY, *policies)}
        for policy in named.values():
            try:
                lineage(policy, named)
            except BrokenChain as error:
                raise ValueError(f"{error.name}: extends: {error}") from None
        return policies

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """Read the configuration: `flags` over the environment over `file` over the defaults.

    Raises:
        ConfigError: a missing or unreadable file, bad YAML (with line and column), an unknown key
            or variable or a bad value; the message names each key at fault.
    """

    class _FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=file)

    try:
        if file is not None and not file.is_file():
            raise ConfigError(f"--config: {file}: no such file", param="config")
        settings = _FromFile(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as error:
        for item in error.errors():
            variable = _PREFIX + "__".join(map(str, item["loc"])).upper()
            if item["type"] == "extra_forbidden" and variable in map(str.upper, os.environ):
                raise _unknown_variable(variable) from None
        given = {name.upper() for name, value in flags.items() if value is not None}
        raise ConfigError(
            _explain(error, file, given), param=_path(error.errors()[0]["loc"])
        ) from None
    except OSError as error:
        raise ConfigError(f"--config: {file}: {error.strerror}", param="config") from None
    except SettingsError as error:  # a ValueError of its own: only the environment raises it
        raise _bad_variable(error) from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}", param="config") from None
    _check_environment(settings)
    return Settings.model_construct(**dict(settings))


def _bad_variable(error: SettingsError) -> ConfigError:
    found = re.search(r'field "(\w+)"', str(error))
    name = _PREFIX + found[1].upper() if found is not None else _PREFIX + "*"
    return ConfigError(f"{name}: not valid JSON", param=name)


def _check_environment(settings: Settings) -> None:
    """Pydantic skips variables that no field reads: a misspelt one would be ignored.

    Raises:
        ConfigError: naming the variable and the nearest valid name.
    """
    keys = {u.api_key_env for model in settings.models for u in model.upstream.values()}
    known = keys | _OTHER_VARIABLES | set(_variables(Settings, _PREFIX))
    for name in sorted(os.environ):
        if name.upper().startswith(_PREFIX) and not {name, name.upper()} & known:
            raise _unknown_variable(name)


def _unknown_variable(name: str) -> ConfigError:
    valid = sorted(_variables(Settings, _PREFIX))
    near = difflib.get_close_matches(name.upper(), valid, n=1, cutoff=0.0)
    return ConfigError(f"{name}: no such setting; did you mean {near[0]}?", param=name)


def _variables(part: type[BaseModel], prefix: str) -> Iterator[str]:
    """Environment names of a part's fields and of what is nested in them."""
    for name, field in part.model_fields.items():
        kind = field.annotation
        yield prefix + name.upper()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _variables(kind, f"{prefix}{name.upper()}__")


def _path(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc) or "config"


def _explain(error: ValidationError, file: Path | None, flags: set[str]) -> str:
    lines, overridden = [], flags | _overriding()
    for item in error.errors():
        inside = file is not None and item["loc"] and str(item["loc"][0]).upper() not in overridden
        line = _line(file, item["loc"]) if file is not None and inside else None
        where = _path(item["loc"]) + (f" (line {line})" if line is not None else "")
        lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    return f"{file or 'configuration'}: " + "; ".join(lines)


def _line(file: Path, loc: tuple[int | str, ...]) -> int | None:
    """The line of a key in the file, or of the innermost thing around it; None: not in there."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line: int | None = None
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == step]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            found = [(item, item) for item in node.value[step : step + 1]]
        else:
            found = []
        if not found:
            break
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def _overriding() -> set[str]:
    """Settings that the environment gives, upper case."""
    names = (name.upper() for name in os.environ)
    return {n.removeprefix(_PREFIX).split("__")[0] for n in names if n.startswith(_PREFIX)}
