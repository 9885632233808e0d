"""Counts of what parts of a process did, such as a judge's retries, which appear in the metrics of a step."""

from __future__ import annotations

from collections import Counter


class Tally:
    """Sums by name. Names begin with the kind of part and a slash: ``judge/retries``."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1.0) -> None:
        self._sums[name] += amount  # type: ignore[assignment]

    def sums(self) -> dict[str, float]:
        """Everything since the process began."""
        return {name: float(amount) for name, amount in self._sums.items()}


TALLY = Tally()
"""This process's."""
