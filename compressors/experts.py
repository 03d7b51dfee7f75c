"""Mixture-of-experts layers as plain linears.

transformers keeps the experts of a layer as 3-D parameters, computed by one of its registered
experts functions. Here each such module gets one child per expert, `0`, `1`, …, made of `nn.Linear`
(`gate_proj`, `up_proj`, `down_proj`, as most checkpoints name them), and a forward that routes to
them: whatever finds, compresses, fills or computes linears then works on experts too. Gating stays
the architecture's own. Knows the interface that `use_experts_implementation` gives to modules, and
no architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class Part:
    """Where a matrix of an expert lies in the fused parameter.

    Attributes:
        fused: the parameter's name in the experts module, e.g. `gate_up_proj`.
        expert: index along the first dimension.
        rows: first and last + 1 output feature.
        transposed: the fused parameter has inputs before outputs.
    """

    fused: str
    expert: int
    rows: tuple[int, int]
    transposed: bool

    def of(self, stored: str) -> str:
        """What `Checkpoint.tensor` calls this part of the tensor `stored`."""
        turn = ".T" if self.transposed else ""
        return f"{stored}[{self.expert}]{turn}[{self.rows[0]}:{self.rows[1]}]"


class Routed(nn.Module):
    """Mixed into an experts module's class by `unfuse`; see there.

    Attributes:
        num_experts: children named `0` … in the order of the router's indices.
        parts: parameter name inside this module → its place in a fused parameter.
    """

    num_experts: int
    parts: dict[str, Part]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] through the `top_k_index` [tokens, k] experts of each, weighted.

        A token's result does not depend on the other tokens, and is summed in its router's order.
        """
        tokens, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        x = hidden_states[order // k]
        parts = torch.split(x, counts[: self.num_experts])
        given = [self._expert(e, part) for e, part in enumerate(parts) if len(part)]
        out = torch.empty(tokens * k, given[0].shape[-1], dtype=given[0].dtype, device=x.device)
        out[order] = torch.cat(given)
        weighted = out * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        expert: Any = self._modules[str(index)]
        this: Any = self
        if "up_proj" not in expert._modules:
            inner = this._apply_gate(expert.gate_up_proj(x))
        elif not this.has_gate:
            inner = this.act_fn(expert.up_proj(x))
        elif _gates_plainly(type(self)):
            inner = this.act_fn(expert.gate_proj(x)) * expert.up_proj(x)
        else:
            inner = this._apply_gate(torch.cat([expert.gate_proj(x), expert.up_proj(x)], dim=-1))
        out: Tensor = expert.down_proj(inner)
        return this.post_expert_norm(out) if this.has_post_expert_norm else out


def _gates_plainly(kind: Any) -> bool:
    """Whether the class has transformers' own gating: act(gate) · up."""
    return bool(kind._apply_gate.__name__ == "_default_apply_gate")


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _routed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with `Routed`'s forward: one per class, so that equal layers stay equal."""
    return _classes.setdefault(kind, type(f"Routed{kind.__name__}", (Routed, kind), {}))


def is_fused(module: nn.Module) -> bool:
    """Whether the module is a layer of experts in transformers' fused interface."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    shapes = [
        p.ndim for name, p in module._parameters.items() if p is not None and "bias" not in name
    ]
    return bool(shapes) and all(ndim == 3 for ndim in shapes) and "down_proj" in module._parameters


def unfuse(model: nn.Module) -> None:
    """Give every layer of fused experts in `model` (on the meta device) linears instead, in place.

    Layers of experts that have another interface stay as they are.
    """
    for module in list(model.modules()):
        if is_fused(module):
            _unfuse_layer(module)


def _unfuse_layer(module: Any) -> None:
    fused = {name: p for name, p in module._parameters.items() if not name.endswith("_bias")}
    biases = {name: p for name, p in module._parameters.items() if name.endswith("_bias")}
    module.num_experts = experts = next(iter(fused.values())).shape[0]
    module.parts = {}
    module._parameters.clear()
    module.__class__ = _routed(type(module))
    for index in range(experts):
        expert = nn.Module()
        for name, parameter in fused.items():
            n, k = parameter.shape[1:]
            if module.is_transposed:
                n, k = k, n
            for leaf, rows in _leaves(name, n, module.is_concatenated):
                linear = nn.Linear(
                    k,
                    rows[1] - rows[0],
                    bias=f"{name}_bias" in biases,
                    device="meta",
                    dtype=parameter.dtype,
                ).requires_grad_(False)
                expert.add_module(leaf, linear)
                path = f"{index}.{leaf}"
                part = Part(name, index, rows, module.is_transposed)
                module.parts[f"{path}.weight"] = part
                if linear.bias is not None:
                    module.parts[f"{path}.bias"] = Part(f"{name}_bias", index, rows, False)
        module.add_module(str(index), expert)


def _leaves(name: str, rows: int, concatenated: bool) -> list[tuple[str, tuple[int, int]]]:
    """The linears that a fused parameter becomes: name and rows of each."""
    if name == "gate_up_proj" and concatenated:
        return [("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows))]
    return [(name, (0, rows))]


def parts_of(model: nn.Module) -> dict[str, tuple[str, Part]]:
    """Parameter name of an expert → the name of its fused parameter, and its place in there."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Routed):
            for name, part in module.parts.items():
                found[f"{path}.{name}"] = (f"{path}.{part.fused}", part)
    return found


def active_share(model: nn.Module) -> dict[str, float]:
    """Path of every layer of experts → the share of its experts that a token goes through."""
    config: Any = model.config
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_k", "moe_topk")
    chosen = next((k for name in names if isinstance(k := getattr(text, name, None), int)), None)
    return {
        path: min(1.0, (chosen or module.num_experts) / module.num_experts)
        for path, module in model.named_modules()
        if isinstance(module, Routed)
    }


def expert_name(stored: str, fused: str, pattern: str, place: int) -> str | None:
    """Today's name of a tensor that transformers would merge into a fused parameter.

    Args:
        stored: the tensor's name (renamed already), e.g. `….experts.3.w1.weight`.
        fused: the fused parameter's, e.g. `….experts.gate_up_proj`.
        pattern: what matched, with a star for the expert's number, e.g. `.experts.*.w1.weight`.
        place: of the pattern among those that are merged: 0 is the gate, 1 what it multiplies.

    Returns:
        e.g. `….experts.3.gate_proj.weight`; None when the pattern has another form.
    """
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), stored)
    module, _, leaf = fused.rpartition(".")
    if number is None or not module:
        return None
    if leaf == "gate_up_proj":
        leaf = ("gate_proj", "up_proj")[place]
    return f"{module}.{number.group(1)}.{leaf}.weight"
