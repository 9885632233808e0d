"""The stages of a run, one algorithm per file: imitate, reinforce, distill, evaluate."""
