"""The run directory: metrics, rollouts, plots and the report."""
