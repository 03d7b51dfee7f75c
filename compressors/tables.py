"""Where a model keeps one row per token: its input embedding and its output head."""

from __future__ import annotations

from torch import nn


def tables(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """(parameter → module it is stored as, module → why it has to stay dense).

    A tied pair is one parameter. An embedding that does more than look up and scale is left alone,
    and with it a head that shares its parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    left: dict[str, str] = {}
    embedding, head = _ends(model)
    for module in (embedding, head):
        weight = getattr(module, "weight", None)
        name = names.get(id(weight), "").removesuffix(".weight")
        if module is None or weight is None or not name:
            continue
        if module is embedding and not is_plain_embedding(module):
            left[name] = f"{type(module).__name__} is no plain embedding: left dense"
        elif module is head and not _is_plain_head(module, tied=f"{name}.weight" in found):
            left[name] = f"{type(module).__name__} is no plain head: left dense"
        elif name not in left:
            found[f"{name}.weight"] = name
    return {p: name for p, name in found.items() if name not in left}, left


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether its forward is a look-up, times `embed_scale` if it has one."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    )


def _is_plain_head(module: nn.Module, *, tied: bool) -> bool:
    return type(module) is nn.Linear and (module.bias is None or not tied)


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    embedding: nn.Module | None = getattr(model, "get_input_embeddings", lambda: None)()
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return embedding, head
