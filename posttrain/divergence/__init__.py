"""Exact full-vocabulary divergences computed from hidden states."""

from posttrain.divergence.loss import divergence_sum
from posttrain.divergence.measure import Divergence

__all__ = ["Divergence", "divergence_sum"]
