"""Teachers for distillation: sources, loading on demand, the hidden-state cache, heads and ordering."""
