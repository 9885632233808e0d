"""Teachers for distillation: sources, loading on demand, the hidden-state cache and the start-up checks."""
