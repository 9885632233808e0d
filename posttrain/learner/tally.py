"""What a mini-batch, or one process's share of it, adds up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from posttrain.learner.losses import Metrics


@dataclass(slots=True, kw_only=True)
class Tally:
    """Sums over micro-batches. Those of the shares of a mini-batch add up to that of the whole."""

    micro_batches: int = 0
    tokens: int = 0
    """Of the samples trained on, prompts included."""
    loss_tokens: int = 0
    loss: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The objective's metrics, numerator and denominator."""
    costs: dict[str, float] = field(default_factory=dict)
    """What the objective spent, such as loads and seconds."""

    def add(self, loss: float, metrics: Metrics) -> None:
        """Count one micro-batch in."""
        self.loss += loss
        for name, (numerator, denominator) in metrics.items():
            top, bottom = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (top + float(numerator), bottom + float(denominator))

    def metrics(self) -> dict[str, float]:
        """The loss, the objective's metrics as means, and its costs."""
        means = {name: top / bottom for name, (top, bottom) in self.sums.items() if bottom}
        return {"loss": self.loss} | means | self.costs


def add_up(shares: Iterable[Tally]) -> Tally:
    """The tally of a mini-batch from those of its shares."""
    whole = Tally()
    for share in shares:
        whole.micro_batches += share.micro_batches
        whole.tokens += share.tokens
        whole.loss_tokens += share.loss_tokens
        whole.loss += share.loss
        for name, (top, bottom) in share.sums.items():
            before = whole.sums.get(name, (0.0, 0.0))
            whole.sums[name] = (before[0] + top, before[1] + bottom)
        for name, cost in share.costs.items():
            whole.costs[name] = whole.costs.get(name, 0.0) + cost
    return whole


def step_metrics(
    tally: Tally, *, grad_norm: float, learning_rate: float, budget: int, seconds: float
) -> dict[str, float]:
    """The metrics of one optimizer step. ``budget`` is the tokens a micro-batch may hold."""
    return tally.metrics() | {
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "tokens": tally.tokens,
        "loss_tokens": tally.loss_tokens,
        "tokens_per_s": tally.tokens / seconds,
        "micro_batches": tally.micro_batches,
        # Above 1 where samples exceed the budget.
        "packing_fill": tally.tokens / (tally.micro_batches * budget),
    }
