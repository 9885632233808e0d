"""Token generation: continuous batching over a causal language model."""
