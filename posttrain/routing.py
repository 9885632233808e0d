"""Which experts the tokens of a mixture-of-experts model go to: recorded in the engine, replayed in the learner.

A router takes the ``top_k`` experts of the highest score. Where two scores are close, rounding decides, so engine and
learner send some tokens to different experts and their log-probabilities differ by far more than rounding. Replayed,
the choice is the engine's; the weights of the chosen experts still come from the learner's own scores, with gradient
(DeepSeek-V3.2, arXiv 2512.02556, "Keep Routing"; routing replay of arXiv 2510.11370).

Covers routers that choose with one ``topk`` over the scores of all experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE,
DeepSeek-V3, GPT-OSS and their like in transformers. A router that looks its experts up by token needs no replay.

Shape letters: ``N`` tokens of a pass, ``L`` routers of the model, ``K`` experts a token goes to, ``E`` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from posttrain.errors import RecipeError

UNKNOWN = -1
"""In place of an expert's number: the router chooses by itself."""

_TOPK = (torch.topk, torch.Tensor.topk)
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def has_experts(config: Any) -> bool:
    """Whether a model of this transformers config is a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in _NUM_EXPERTS)


class Routers:
    """The routers of a model, from first to last layer, made to record their choices and to replay given ones.

    Changes the model in place, once however often it is wrapped. ``RecipeError`` for a mixture of experts whose routers
    are not recognised; a model without experts has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if _is_router(module)]
        if not self._routers and has_experts(model.config):
            raise RecipeError(
                f"model: {type(model).__name__} is a mixture of experts whose routers are not recognised, so their "
                "choices cannot be kept; set grpo.keep_routing to false, or choose another architecture"
            )
        for router in self._routers:
            if not hasattr(router, "replayed_routes"):
                router.replayed_routes = router.chosen_routes = None  # type: ignore[assignment]
                router.register_forward_pre_hook(_enter)
                router.register_forward_hook(_leave, always_call=True)

    def __len__(self) -> int:
        return len(self._routers)

    @property
    def top_k(self) -> int:
        return int(self._routers[0].top_k)  # type: ignore[arg-type]

    def replay(self, routes_NLK: torch.Tensor | None) -> None:
        """Choose these experts in all passes from now on, as far as they are known; None: by the scores again.

        Backward passes that compute activations again replay, too, so this is set and left.
        """
        if routes_NLK is not None and routes_NLK.shape[1:] != (len(self), self.top_k):
            raise ValueError(
                f"routes have shape {tuple(routes_NLK.shape)}; expected [tokens, {len(self)}, {self.top_k}] for this "
                "model; were they recorded by another one?"
            )
        for index, router in enumerate(self._routers):
            router.replayed_routes = None if routes_NLK is None else routes_NLK[:, index].long()  # type: ignore

    def chosen(self) -> torch.Tensor:
        """Experts of the last pass, [N, L, K] int64, ``UNKNOWN`` for a router that did not choose by score."""
        found: list[torch.Tensor | None] = [router.chosen_routes for router in self._routers]  # type: ignore[misc]
        like = next(each for each in found if each is not None)
        return torch.stack([torch.full_like(like, UNKNOWN) if each is None else each for each in found], dim=1)


class _Choosing(TorchFunctionMode):
    """Within a router's pass: notes its top-k over all experts, or gives it the one that is replayed."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self._router: Any = router

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return result
        scores_NE: torch.Tensor = args[0]
        values_NK, indices_NK = result
        router = self._router
        if scores_NE.ndim != 2 or scores_NE.shape[1] != router.num_experts or indices_NK.shape[1] != router.top_k:
            return result
        replayed_NK = router.replayed_routes
        if replayed_NK is not None:
            if replayed_NK.shape != indices_NK.shape:
                raise ValueError(
                    f"routes of {len(replayed_NK)} tokens are replayed in a pass of {len(indices_NK)}; expected one "
                    "row per token"
                )
            indices_NK = torch.where(replayed_NK >= 0, replayed_NK, indices_NK)
            values_NK = scores_NE.gather(-1, indices_NK)
        router.chosen_routes = indices_NK.detach()
        return torch.return_types.topk((values_NK, indices_NK))


def _enter(router: Any, args: Any) -> None:
    router.choosing = _Choosing(router)
    router.choosing.__enter__()


def _leave(router: Any, args: Any, output: Any) -> None:
    router.choosing.__exit__(None, None, None)
    del router.choosing


def _is_router(module: nn.Module) -> bool:
    if not all(isinstance(getattr(module, name, None), int) for name in ("top_k", "num_experts")):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and len(weight) == module.num_experts
