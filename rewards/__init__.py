"""Rewards: verifiable checks, rubrics, judges, and adapters for reward functions written elsewhere."""
