"""Feed-forward layers that clamp their SwiGLU or compute with MXFP4 weights, as a checkpoint's config says.

The config carries two entries of ours, so that whoever loads a checkpoint with ``posttrain.models.load_model`` computes
alike: learner, engine, judge and teacher. Covers dense layers with ``gate_proj``, ``up_proj`` and ``down_proj``, and
experts with stacked ``gate_up_proj`` and ``down_proj``, which is Llama, Qwen, Mistral, Mixtral, OLMoE, DeepSeek-V3 and
their like in transformers.

Shape letters: ``N`` tokens, ``H`` hidden width, ``K`` experts a token goes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from posttrain.errors import RecipeError
from posttrain.stability.mxfp4 import fake_quantise

SWIGLU_LIMIT = "posttrain_swiglu_limit"
"""Entry of a model's config: DeepSeek-V4's ``swiglu_limit``; it clamps the gate from above, before its activation, and
the linear part on both sides."""
QUANTISATION = "posttrain_fake_quantization"
"""Entry of a model's config: ``mxfp4``, or absent."""


def use_stable_layers(model: nn.Module) -> None:
    """Change a model's feed-forward layers, in place, to what its config asks for. Names of parameters stay.

    Raises ``RecipeError`` when it asks for something and no layer is recognised.
    """
    if not asks_for_stable_layers(model.config):
        return
    limit, quantisation = getattr(model.config, SWIGLU_LIMIT, None), getattr(model.config, QUANTISATION, None)
    layers = [module for module in model.modules() if _is_dense(module) or _is_experts(module)]
    experts = [layer for layer in layers if _is_experts(layer)]
    if not layers:
        raise RecipeError(
            f"model: no feed-forward layer of {type(model).__name__} is known to be a SwiGLU, so model.swiglu_limit "
            "and model.fake_quantization cannot be applied; leave them unset, or choose another architecture"
        )
    for layer in layers:
        layer.swiglu_limit = limit  # type: ignore[assignment]
        layer.__class__ = _derived(type(layer), ExpertLayers if _is_experts(layer) else DenseLayer)
    if quantisation is not None:
        # The experts of a mixture, as in V4; what a dense model has in their place.
        for layer in experts or layers:
            for matrix in _matrices(layer):
                matrix.__class__ = _derived(type(matrix), QuantisedExperts if _is_experts(matrix) else QuantisedMatrix)


def asks_for_stable_layers(config: Any) -> bool:
    """Whether ``use_stable_layers`` changes a model of this config."""
    return any(getattr(config, entry, None) is not None for entry in (SWIGLU_LIMIT, QUANTISATION))


def clamp_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``min(gate, limit)`` and ``clamp(up, -limit, limit)``; None changes nothing."""
    if limit is None:
        return gate, up
    return gate.clamp(max=limit), up.clamp(-limit, limit)


class DenseLayer:
    """``down(act(gate x) * up x)`` with clamps."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    swiglu_limit: float | None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = clamp_swiglu(self.gate_proj(hidden), self.up_proj(hidden), self.swiglu_limit)
        output: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return output


class ExpertLayers:
    """The same for the experts of a mixture: each token by its K experts, weighted."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    act_fn: nn.Module
    swiglu_limit: float | None

    def forward(self, hidden_NH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Indices and weights are [N, K]."""
        # Once a pass: they may have to be quantised.
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
        output_NH = torch.zeros_like(hidden_NH)
        for expert in top_k_index.unique().tolist():
            if expert >= len(down_proj):
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = linear(hidden_NH[token], gate_up_proj[expert]).chunk(2, dim=-1)
            gate, up = clamp_swiglu(gate, up, self.swiglu_limit)
            mixed = linear(self.act_fn(gate) * up, down_proj[expert]) * top_k_weights[token, place, None]
            output_NH.index_add_(0, token, mixed.to(output_NH.dtype))
        return output_NH


def _quantised(module: Any, name: str) -> torch.Tensor:
    """A parameter as the forward pass sees it. A frozen one is rounded once, until it changes."""
    master: nn.Parameter = module._parameters[name]
    if master.requires_grad:
        # Fused optimizers change a parameter without counting up its version.
        return fake_quantise(master)
    kept = module.__dict__.setdefault("rounded_weights", {})
    state = (master.data_ptr(), master._version)
    if name not in kept or kept[name][0] != state:
        kept[name] = (state, fake_quantise(master.detach()))
    rounded: torch.Tensor = kept[name][1]
    return rounded


class QuantisedMatrix:
    """A linear layer that computes with its weight in MXFP4; the parameter is the master."""

    @property
    def weight(self) -> torch.Tensor:
        return _quantised(self, "weight")


class QuantisedExperts:
    """The same for stacked experts."""

    @property
    def gate_up_proj(self) -> torch.Tensor:
        return _quantised(self, "gate_up_proj")

    @property
    def down_proj(self) -> torch.Tensor:
        return _quantised(self, "down_proj")


def _derived(base: type, mixin: type) -> type:
    """``base`` with the methods of ``mixin``."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


def _matrices(layer: Any) -> list[nn.Module]:
    return [layer] if _is_experts(layer) else [layer.gate_proj, layer.up_proj, layer.down_proj]


def _is_dense(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names) and hasattr(module, "act_fn")


def _is_experts(module: nn.Module) -> bool:
    stacked = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    return plain and hasattr(module, "act_fn") and all(each is not None and each.ndim == 3 for each in stacked)
