"""From samples to new weights: packing, objectives and the training loop shared by GRPO and OPD."""
