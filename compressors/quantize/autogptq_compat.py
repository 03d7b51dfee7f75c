"""Makes auto-gptq 0.7.1 importable and runnable beside current transformers and peft, for a while.

The package was last released in March 2024. Since then transformers 5 and peft dropped names
that it imports and hardly needs here, decoder blocks began to return a tensor where it expects a
tuple, and three of its lines take a CUDA device for granted. `load()` supplies the names while
the package is imported; `running(...)` bridges the rest while it quantizes. Both put back
what they found; auto-gptq itself stays imported and unpatched.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn

from compressors.base import CompressionError

INSTALL_HINT = "pip install 'pressgate[auto-gptq]'"


class AutoGptqMissing(CompressionError):
    """auto-gptq, an optional extra, is not installed."""

    def __init__(self) -> None:
        super().__init__(f"this level needs the auto-gptq package: {INSTALL_HINT}")


class _Dropped:
    """Stands for a name that its library no longer has; using it says so."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise NotImplementedError("this part of auto-gptq needs an older transformers or peft")


# Names that auto_gptq imports at module level, where from, and what stands in. The first was a
# context that skips initialisation, to load faster; the others are for uploads and LoRA training.
DROPPED: tuple[tuple[str, str, Any], ...] = (
    ("transformers.modeling_utils", "no_init_weights", nullcontext),
    ("transformers.utils.hub", "create_commit", _Dropped),
    ("transformers.utils.hub", "create_repo", _Dropped),
    ("transformers.utils.hub", "CommitOperationAdd", _Dropped),
    ("peft.peft_model", "PEFT_TYPE_TO_MODEL_MAPPING", {}),
)


def load() -> ModuleType:
    """The `auto_gptq` package, imported with the names it misses in place for the import only.

    Raises:
        AutoGptqMissing: it is not installed.
        CompressionError: it is installed and cannot be imported even so.
    """
    if importlib.util.find_spec("auto_gptq") is None:
        raise AutoGptqMissing
    # It warns about missing CUDA extensions on import, and logs every layer to stderr by itself.
    logging.getLogger("auto_gptq").setLevel(logging.ERROR)
    try:
        with _names_restored():
            package = importlib.import_module("auto_gptq")
            base = importlib.import_module("auto_gptq.modeling._base")
    except ImportError as error:
        raise CompressionError(f"auto-gptq is installed but cannot be imported: {error}") from error
    base.logger.setLevel(logging.ERROR)
    return package


@contextmanager
def _names_restored() -> Iterator[None]:
    with ExitStack() as stack:
        for module_name, name, stand_in in DROPPED:
            module = importlib.import_module(module_name)
            if not hasattr(module, name):
                stack.enter_context(_attribute(module, name, stand_in))
        yield


@contextmanager
def running(
    blocks: Iterable[nn.Module], device: torch.device, on_block: Callable[[], None]
) -> Iterator[None]:
    """Everything auto-gptq's `quantize` takes for granted, while it runs on `device`.

    - A block's output is a tensor since transformers 5; it takes `block(...)[0]`, which would
      silently be the first sequence of the batch. A hook on each block makes it a tuple again.
    - It moves blocks to "cuda:0" to work on them: that constant becomes `device`.
    - It synchronises CUDA after every layer, which raises without CUDA: not called then.
    - It solves a layer column by column, thousands of tiny operations; on a CPU that also serves,
      waiting for the other threads each time makes that many times slower.

    `on_block` is called after every forward of a block; raising from it ends the run.
    """

    def as_tuple(_block: nn.Module, _inputs: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        on_block()
        return output if isinstance(output, tuple) else (output,)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(as_tuple).remove)
        for name in ("auto_gptq.modeling._base", "auto_gptq.modeling._utils"):
            stack.enter_context(_attribute(importlib.import_module(name), "CUDA_0", device))
        if device.type != "cuda":
            stack.enter_context(_attribute(torch.cuda, "synchronize", _nothing))
            solver = importlib.import_module("auto_gptq.quantization.gptq").GPTQ
            one = _on_one_thread(solver.fasterquant)
            stack.enter_context(_attribute(solver, "fasterquant", one))
        yield


def _on_one_thread(solve: Callable[..., Any]) -> Callable[..., Any]:
    """`solve` with one torch thread: its operations are so small that threads mostly wait."""

    @wraps(solve)
    def alone(*args: Any, **kwargs: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return solve(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return alone


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` inside, and afterwards what it was, or absent."""
    absent = object()
    before = getattr(owner, name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _nothing(*_args: object, **_kwargs: object) -> None:
    return None
