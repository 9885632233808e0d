"""What lies between a language model's last hidden state and its logits.

``logits = cap * tanh(scale * head @ state / cap)``: Cohere, Granite and Falcon-H1 scale, Gemma caps, most do neither.
The scale goes into the cached states, so that heads stay as they are in the files and are shared by content; the cap
goes with the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from posttrain.errors import RecipeError


class _BodyOutput(BaseModelOutputWithPast):
    """Nothing but states; whatever else a head's code looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


CHECKED_TOKENS = 1024
"""Of the vocabulary, evenly spread: as many logits are compared as tell one transform from another."""
UNCAPPED_PEAK = 200.0
"""Logits of this size show a soft cap that the config does not tell of; caps in use are 15 to 50."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """A teacher's last step."""

    weight_VE: torch.Tensor
    """Output projection, in host memory."""
    logit_cap: float | None
    """c where logits are ``c tanh(logits / c)``; None where they are not capped."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """How logits differ from head @ state."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """As the fields of a transformers config say."""
        text = config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) * (getattr(text, "lm_head_multiplier", None) or 1.0)
        cap = getattr(text, "final_logit_softcapping", None)
        return cls(scale / (getattr(text, "logits_scaling", None) or 1.0), cap)

    def scaled(self, states: torch.Tensor) -> torch.Tensor:
        """States whose product with the head is the logits, cap aside; in float32 where they had to be scaled."""
        return states if self.scale == 1.0 else states.float() * self.scale

    def logits(self, states: torch.Tensor, head_VE: torch.Tensor) -> torch.Tensor:
        """The logits of states as the model computes them, in float32."""
        linear = self.scale * (states.float() @ head_VE.float().T)
        return linear if self.cap is None else self.cap * (linear / self.cap).tanh()


def body_of(model: Any) -> Any:
    """A causal language model without its output head."""
    return getattr(model, model.base_model_prefix)


@torch.no_grad()
def check_logits(model: Any, transform: LogitTransform, *, name: str) -> None:
    """The model's logits must be what ``transform`` makes of states and head, small ones and large ones.

    The layers do not run: what follows them is given states of chosen size. ``RecipeError`` when the logits differ.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise RecipeError(
            f"teacher {name!r} ({type(model).__name__}) has no output head without bias; expected logits that are "
            "head @ state; choose another teacher"
        )
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    states_BTE = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight.device)
    spread = slice(None, None, -(-len(weight) // CHECKED_TOKENS))
    size = LogitTransform(transform.scale).logits(states_BTE, weight[spread]).abs().max().clamp_min(1e-30)
    for peak in (1.0, UNCAPPED_PEAK if transform.cap is None else 4 * transform.cap):
        given_BTE = (states_BTE * (peak / size)).to(weight.dtype)
        own_BTV = _logits_of(model, given_BTE)[..., spread].float()
        worst = (own_BTV - transform.logits(given_BTE, weight[spread])).abs().max().item()
        bound = peak * (1e-4 if weight.dtype is torch.float32 else 2**-6)
        if not worst <= bound:
            raise RecipeError(
                f"teacher {name!r} ({type(model).__name__}): logits of size {peak:.3g} differ by {worst:.3g} from "
                f"{transform} of head @ state, where at most {bound:.3g} is rounding. Logits that are made in another "
                "way cannot be rebuilt from states; choose a teacher without that, or without an adapted head"
            )


def _logits_of(model: Any, states_BTE: torch.Tensor) -> torch.Tensor:
    """What the model makes of given states after its last norm."""
    body = body_of(model)
    ids_BT = torch.zeros(states_BTE.shape[:2], dtype=torch.long, device=states_BTE.device)
    own = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: _BodyOutput(last_hidden_state=states_BTE)
    try:
        return model(input_ids=ids_BT, use_cache=False).logits
    finally:
        del body.forward
        if own is not None:
            body.forward = own
