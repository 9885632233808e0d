"""Task sources of the shipped recipes: one module per domain, all drawn from seeded generators."""
