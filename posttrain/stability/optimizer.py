"""AdamW, or Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from posttrain.config import Optim


def make_optimizer(
    parameters: Sequence[nn.Parameter], optim: Optim, *, never_muon: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """What ``optim`` asks for. Matrices are decayed, norms and biases are not, as by the Hugging Face Trainer.

    Muon (https://kellerjordan.github.io/posts/muon) takes every matrix but ``never_muon``, embeddings and head, with
    updates scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both. Stacked experts
    are not matrices to PyTorch's Muon and go to AdamW.
    """
    if optim.optimizer == "adamw":
        return _adamw(parameters, optim)
    others = {id(each) for each in never_muon}
    matrices = [each for each in parameters if each.ndim == 2 and id(each) not in others]
    rest = [each for each in parameters if each.ndim != 2 or id(each) in others]
    muon = torch.optim.Muon(
        matrices,
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        momentum=optim.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together([muon, _adamw(rest, optim)]) if rest else muon


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters, used as one. Learning rates are set through ``param_groups``."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        super().__init__([group for each in self._optimizers for group in each.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for each in self._optimizers:
            each.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self._optimizers:
            each.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [each.state_dict() for each in self._optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each, saved in zip(self._optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(saved)
        # Loading makes new groups.
        self.param_groups = [group for each in self._optimizers for group in each.param_groups]


def _adamw(parameters: Sequence[nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        fused=True,
    )
