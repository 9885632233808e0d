"""Exact full-vocabulary divergences computed from hidden states."""

from posttrain.divergence.loss import TeacherLogits, divergence_sum, divergence_sum_by_teacher
from posttrain.divergence.measure import Divergence

__all__ = ["Divergence", "TeacherLogits", "divergence_sum", "divergence_sum_by_teacher"]
