"""The same random weights in each peer's format, made once and kept."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from loadtest.peers.child import EngineError
from loadtest.peers.place import Place
from loadtest.shapes import SHAPES, write

GGUF_KINDS = {32: "F32", 16: "BF16", 8: "Q8_0", 4: "Q4_0"}
OPENVINO_KINDS = {32: "fp32", 16: "fp16, computed in bf16", 8: "int8 sym", 4: "int4 sym g128"}
_WEIGHT_FORMATS = {
    32: ("fp32",),
    16: ("fp16",),
    8: ("int8", "--sym"),
    4: ("int4", "--sym", "--group-size", "128", "--backup-precision", "int8_sym"),
}
# The fastest of those tried: both attention back ends, each precision, groups of 0, 32, 64 and 128.
_INTEGERS: dict[str, str | int] = {
    "ATTENTION_BACKEND": "PA",
    "INFERENCE_PRECISION_HINT": "bf16",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
}
OPENVINO_PROPERTIES: dict[int, dict[str, str | int]] = {
    32: {"ATTENTION_BACKEND": "PA", "INFERENCE_PRECISION_HINT": "f32"},
    16: {"ATTENTION_BACKEND": "PA", "INFERENCE_PRECISION_HINT": "bf16"},
    8: _INTEGERS,
    4: _INTEGERS,
}
_WRITER = Path(__file__).parent / "write_gguf.py"


def checkpoint(place: Place, shape: str) -> Path:
    """The folder of the dense checkpoint, written if it is not there."""
    return write(place.models / shape, SHAPES[shape])


def gguf(place: Place, shape: str, bits: int) -> Path:
    """The GGUF file; raises Skipped without llama.cpp or the `gguf` package."""
    done = place.models / f"{shape}-{GGUF_KINDS[bits]}.gguf"
    if done.is_file():
        return done
    quantize = place.llama / "llama-quantize"
    part = done.with_suffix(".part")
    if bits == 16:
        folder = checkpoint(place, shape)
        _run([str(place.python("gguf")), str(_WRITER), str(folder), str(part)])
    else:
        dense = gguf(place, shape, 16)
        _run([str(quantize), str(dense), str(part), GGUF_KINDS[bits], "2"])
    return part.rename(done)


def openvino(place: Place, shape: str, bits: int) -> Path:
    """The folder of the OpenVINO model; raises Skipped without the packages."""
    done = place.models / f"{shape}-openvino-{bits}"
    if done.is_dir():
        return done
    python = str(place.python("openvino_genai"))
    place.python("optimum")
    part = done.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    source = ["--model", str(checkpoint(place, shape)), "--task", "text-generation-with-past"]
    _run([*command, *source, "--weight-format", *_WEIGHT_FORMATS[bits], str(part)])
    return part.rename(done)


def _run(command: Sequence[str]) -> None:
    """Raises: EngineError with the end of what the tool said."""
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        raise EngineError(f"{Path(command[0]).name}: {said[-400:]}") from None
