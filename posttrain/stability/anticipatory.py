"""Anticipatory routing: after a spike, experts are chosen by weights some steps old (DeepSeek-V4 report).

Outliers in a mixture of experts and the routers' choices can drive each other up. With choices from older weights,
what a step does to the routers does not decide where the next step's tokens go; the weights of the chosen experts stay
the model's own. V4 chose experts when a step's data was fetched, some steps ahead; data that a policy writes do not
exist by then, so here the older weights are kept and make a pass of their own while the mode is on.

A spike is one of the gradient's norm: unlike the loss of a policy gradient it has a scale, and all learner processes
know it.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.config import AnticipatoryRouting
from posttrain.routing import UNKNOWN, Routers


class SpikeGuard:
    """Says for how many steps to be careful: ``hold_steps`` from each spike on.

    A value is a spike when it exceeds the mean of the last ``window`` ones by ``threshold`` times their deviation, and
    by half their mean. Spikes do not enter the mean.
    """

    def __init__(self, config: AnticipatoryRouting) -> None:
        self._config = config
        self._seen: deque[float] = deque(maxlen=config.window)
        self.steps_left = 0

    def observe(self, value: float) -> None:
        """Once a step, after it."""
        self.steps_left = max(0, self.steps_left - 1)
        if self._is_spike(value):
            self.steps_left = self._config.hold_steps
        else:
            self._seen.append(value)

    def state(self) -> dict[str, Any]:
        return {"seen": list(self._seen), "steps_left": self.steps_left}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._seen.extend(state["seen"])
        self.steps_left = state["steps_left"]

    def _is_spike(self, value: float) -> bool:
        if len(self._seen) < self._config.window:
            return False
        mean = sum(self._seen) / len(self._seen)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in self._seen) / len(self._seen))
        return value > mean + max(self._config.threshold * deviation, 0.5 * mean)


class OlderRoutes:
    """The weights of the last ``lag_steps`` steps, and the expert choices of the oldest.

    ``trained`` are the parameters that change. Needs memory for that many copies of them, in host memory, and one copy
    of the model.
    """

    def __init__(
        self, model: PreTrainedModel, trained: Mapping[str, nn.Parameter], config: AnticipatoryRouting
    ) -> None:
        self._trained = trained
        self._snapshots: deque[dict[str, torch.Tensor]] = deque(maxlen=config.lag_steps)
        self._older = copy.deepcopy(model)
        self._older.requires_grad_(False)
        self._routers = Routers(self._older)
        self._is_set = False
        self.guard = SpikeGuard(config)

    @property
    def active(self) -> bool:
        return self.guard.steps_left > 0 and len(self._snapshots) == self._snapshots.maxlen

    def before_step(self) -> None:
        """Keep the weights that the optimizer is about to change."""
        self._snapshots.append({name: each.detach().cpu().clone() for name, each in self._trained.items()})
        self._is_set = False

    @torch.no_grad()
    def routes(self, run: Callable[[PreTrainedModel], Any], known: torch.Tensor | None) -> torch.Tensor:
        """Choices of the oldest weights kept, [N, L, K], where they are not ``known``; ``run`` makes the pass."""
        if not self._is_set:
            mine = dict(self._older.named_parameters())
            for name, tensor in self._snapshots[0].items():
                mine[name].copy_(tensor)
            self._is_set = True
        self._routers.replay(known)
        run(self._older)
        chosen = self._routers.chosen()
        return chosen if known is None else torch.where(known != UNKNOWN, known.long(), chosen)

    def state(self) -> dict[str, Any]:
        return {"snapshots": list(self._snapshots), "guard": self.guard.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._snapshots.extend(state["snapshots"])
        self.guard.restore(state["guard"])
        self._is_set = False
