"""Exact full-vocabulary divergences computed from hidden states."""

from posttrain.divergence.reverse_kl import reverse_kl, reverse_kl_sum

__all__ = ["reverse_kl", "reverse_kl_sum"]
