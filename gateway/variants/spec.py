"""What a build worker is told: one JSON object on its standard input. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class BuildSpec(BaseModel):
    """One variant to build and measure.

    Attributes:
        folder: the dense checkpoint.
        key: the artifact's key; empty for the checkpoint's own dense level, which needs none.
        calibration, eval_text: the user's text files, or None for the default text.
        threads: while compressing; `serve_threads`: while measuring speed, as the gateway serves.
        imported: the folder is a compressed checkpoint, served as it is; there is no dense model.
        drafters: who may draft for it, with the artifact's key if it is a level; None: nobody.
        compute_dtype, dense_dtype: `bf16`, `fp16` or `fp32`, of the level and of its reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str
    folder: Path
    source_digest: str
    level: str
    key: str
    calibration: Path | None
    calibration_digest: str
    eval_text: Path | None
    seed: int
    cache_dir: Path
    disk_budget: int
    compute_dtype: str
    dense_dtype: str
    device: str
    threads: int
    serve_threads: int
    nice: int
    imported: bool = False
    measure_speed: bool = True
    drafters: tuple[tuple[str, str], ...] | None = None
    note_seconds: float = 5.0
